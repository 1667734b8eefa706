"The losses of the trl library on the same models and rows; skipped where it is not installed"
import copy

import pytest, torch

pytest.importorskip('trl')
pytest.importorskip('transformers')

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer)
from trl import DPOConfig as TheirDPOConfig, DPOTrainer
from trl import RewardConfig as TheirRewardConfig, RewardTrainer

from pairs import small, votes
from desk import facts, text
from published import record
from lm_nb.alignment.dpo import answer_logprobs, dpo_loss
from lm_nb.alignment.reward import answer_scores, reward_loss, reward_model, save_reward, with_end
from lm_nb.data.preferences import Preference, encode_preferences, pair_batch
from lm_nb.data.shards import IGNORE
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.model.hub import save_model


HOW = dict(use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
           per_device_train_batch_size=4)


@pytest.fixture(scope='module')
def tok(tmp_path_factory):
    path = tmp_path_factory.mktemp('tok')/'tokenizer.model'
    Tokenizer.train([text(facts())], 320, path, 'bpe')
    return Tokenizer.load(path)


@pytest.fixture(scope='module')
def batch(tok):
    "Pairs of unequal lengths"
    some = [Preference(**v) for v in votes(facts()[:3])]
    some += [Preference('Who?', 'Ada.', 'Nobody knows, I am afraid.')]
    return pair_batch(tok, encode_preferences(tok, some, 64), context=64)


@pytest.fixture(params=['qwen3', 'gpt2'])
def models(request, tok):
    "A policy and what it started from"
    shape = dict(vocab_size=len(tok), context=64)
    start = small(request.param, **shape).eval()
    policy = copy.deepcopy(start)
    with torch.no_grad():
        for p in policy.parameters(): p.add_(.03 * torch.randn_like(p))
    return policy, start


def whole(batch):
    "The rows as trl has them: all ids, those of padding and of answers; chosen ones first"
    x, doc, at = with_end(batch)
    answers = torch.zeros_like(x)
    answers[:, 1:batch.y.shape[1] + 1] = (batch.y != IGNORE)[:, :x.shape[1] - 1]
    return [torch.cat([t[0::2], t[1::2]]) for t in (x, (doc >= 0).long(), answers)]


def theirs(gpt, folder, tok):
    return AutoModelForCausalLM.from_pretrained(save_model(folder, gpt, tok), dtype=torch.float32)


@pytest.mark.parametrize('kind, loss_type', [
    ('sigmoid', 'sigmoid'), ('length', 'sigmoid_norm'), ('ipo', 'ipo')])
def test_dpo(models, batch, tok, tmp_path, kind, loss_type):
    policy, start = models
    beta = 2. if kind == 'length' else .3
    with torch.no_grad(): a, b = (answer_logprobs(m, batch).view(-1, 2) for m in (policy, start))
    n = (batch.y != IGNORE).sum(-1).view(-1, 2)
    if kind == 'ipo': a, b = a / n, b / n  # trl's is of means over tokens
    ours = dpo_loss(a, b, beta, kind, n).mean().item()
    ids, mask, answers = whole(batch)
    data = Dataset.from_list(votes(facts()[:4]))
    folder = tmp_path/'policy'
    model, ref = theirs(policy, folder, tok), theirs(start, tmp_path/'start', tok)
    args = TheirDPOConfig(tmp_path/'out', beta=beta, loss_type=[loss_type], max_length=None, **HOW)
    trainer = DPOTrainer(model, ref, args, train_dataset=data,
                         processing_class=AutoTokenizer.from_pretrained(folder))
    with torch.no_grad():
        their = trainer.compute_loss(trainer.model.eval(), dict(
            input_ids=ids, attention_mask=mask, completion_mask=answers)).item()
    print(f'{kind}: ours {ours:.7f}, theirs {their:.7f}, {abs(ours - their):.1e}')
    assert ours == pytest.approx(their, abs=1e-5, rel=1e-5) and abs(ours - .6931) > 1e-3
    record('trl', f'DPO loss within 1e-5, {kind}, {policy.cfg.arch}', 1, 1)


def test_reward(models, batch, tok, tmp_path):
    model = reward_model(models[0]).eval()
    torch.nn.init.normal_(model.score.weight)
    with torch.no_grad(): loss, n = reward_loss(model, batch)
    ids, mask, _ = whole(batch)
    folder = save_reward(tmp_path/'reward', model, tok)
    same = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad(): scores = same(input_ids=ids, attention_mask=mask).logits[:, 0]
    with torch.no_grad(): own = answer_scores(model, batch)
    torch.testing.assert_close(torch.cat([own[0::2], own[1::2]]), scores, atol=1e-4, rtol=1e-4)
    args = TheirRewardConfig(tmp_path/'out', max_length=None, **HOW)
    data = Dataset.from_list(votes(facts()[:4]))
    trainer = RewardTrainer(same, args, train_dataset=data,
                            processing_class=AutoTokenizer.from_pretrained(folder))
    with torch.no_grad():
        their = trainer.compute_loss(trainer.model.eval(),
                                     dict(input_ids=ids, attention_mask=mask)).item()
    ours = (loss / n).item()
    print(f'reward: ours {ours:.7f}, theirs {their:.7f}, {abs(ours - their):.1e}')
    assert ours == pytest.approx(their, abs=1e-5, rel=1e-5)
    record('trl', f'reward loss within 1e-5, {models[0].cfg.arch}', 1, 1)
