"A reward model: what is read and where, the votes it learns from, and the stage"
import json
import math

import pytest, torch

from pairs import PAIRS, rows, small, votes
from desk import facts
from stages import begun, curve, stop_and_go_on, two_ranks, weights
from lm_nb.alignment.reward import (
    RewardModel, answer_scores, calibration, encoded_pairs, load_reward, over_pairs, pair_nll,
    reward_loss, reward_model, save_reward, score_answers, stage_pairs, tally_leads, with_end,
    without_dropout)
from lm_nb.core import UserError, read_json
from lm_nb.data.instructions import Example
from lm_nb.model.gpt import GPT
from lm_nb.model.hub import load_model
from lm_nb.training.loop import Ranks, Runtime
from lm_nb.training.monitor import read_log
from lm_nb.training.recipe import load_recipe
from lm_nb.training.run import Run
from lm_nb.training.stage import run_stage


def scorer(arch='qwen3', **keys):
    model = reward_model(small(arch, **keys)).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


arch = pytest.mark.parametrize('arch', ['qwen3', 'gpt2'])


# ------------------------------------------------------------------ what a score is

@arch
def test_it_is_the_state_behind_eos_and_nothing_else_in_the_batch(arch):
    model, batch = scorer(arch), rows(*PAIRS)
    scores = answer_scores(model, batch)
    for row, a in enumerate(PAIRS):
        ids = torch.tensor([[7, 8, 1, *a, 2]])
        alone = model.hidden(ids)[0, -1] @ model.score.weight[0]
        assert scores[row].item() == pytest.approx(alone.item(), abs=1e-5)


@arch
def test_padding_does_not_count_however_long_and_whatever_stands_in_it(arch):
    model, wide = scorer(arch), rows(*PAIRS, width=30)
    wide.x[wide.doc < 0] = 33
    torch.testing.assert_close(answer_scores(model, wide), answer_scores(model, rows(*PAIRS)),
                               atol=1e-5, rtol=0)


def test_a_full_row_gets_one_more_place_and_no_other_does():
    batch = rows([9, 10], [11], width=6)  # 7 8 1 9 10 2
    x, doc, at = with_end(rows([9, 10], [11], width=5))
    assert x.shape == (2, 6) and x[at].tolist() == [2, 2] and at.sum(1).tolist() == [1, 1]
    assert doc[0].tolist() == [0] * 6 and doc[1].tolist() == [0] * 5 + [-1]
    assert with_end(batch)[0].shape == (2, 6) and batch.x[0, 5] == 0, 'the batch was changed'


@arch
def test_a_new_reward_model_prefers_nothing_and_has_the_trunk(arch):
    gpt = small(arch, tie=False)
    model = reward_model(gpt)
    assert answer_scores(model, rows(*PAIRS)).abs().max() == 0
    loss, n = reward_loss(model, rows(*PAIRS))
    assert loss.item() / n.item() == pytest.approx(math.log(2)) and n == 3
    ids = torch.tensor([[7, 8, 1, 9]])
    assert torch.equal(model.hidden(ids), gpt.hidden(ids)) and model.lm_head is None


def test_only_differences_count():
    model, batch = scorer(), rows(*PAIRS)
    scores = answer_scores(model, batch).view(-1, 2)
    by_hand = [math.log(1 + math.exp(b - a)) for a, b in scores.tolist()]
    assert reward_loss(model, batch)[0].item() == pytest.approx(sum(by_hand), rel=1e-5)
    assert torch.allclose(pair_nll(scores.diff()), pair_nll((scores + 100).diff()), atol=1e-5)


def test_the_same_text_on_both_sides_pulls_nowhere():
    model = scorer()
    reward_loss(model, rows([9, 10], [9, 10]))[0].backward()
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-5


def test_dropout_is_off_in_training_too():
    model = reward_model(small(dropout=.5).train())
    torch.nn.init.normal_(model.score.weight)
    assert model.training and model.cfg.dropout == .5
    assert torch.equal(answer_scores(model, rows(*PAIRS)), answer_scores(model, rows(*PAIRS)))
    gpt = small(dropout=.5).train()
    assert not torch.equal(gpt(rows(*PAIRS).x), gpt(rows(*PAIRS).x))
    assert torch.equal(without_dropout(gpt)(rows(*PAIRS).x), gpt(rows(*PAIRS).x))


# ------------------------------------------------------------------ folders

@arch
def test_transformers_reads_the_folder_as_a_classifier(arch, whole, tmp_path):
    transformers = pytest.importorskip('transformers')
    tok = whole.tokenizer
    model = scorer(arch, vocab_size=len(tok))
    folder = save_reward(tmp_path/'judge', model, tok)
    same = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(same).__name__ == dict(qwen3='Qwen3',
                                       gpt2='GPT2')[arch] + 'ForSequenceClassification'
    x, doc, _ = with_end(rows(*PAIRS))
    with torch.no_grad():
        found = same(input_ids=x, attention_mask=(doc >= 0).long()).logits[:, 0]
        own, again = (answer_scores(m, rows(*PAIRS)) for m in (model, load_reward(folder)[0]))
    torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-4)
    assert torch.equal(own, again)
    assert 'writes no text' in (folder/'README.md').read_text()


def test_a_reward_model_is_no_language_model_and_the_other_way_round(whole):
    with pytest.raises(UserError, match='score.weight') as e:
        load_model(whole.folder/'reward-model')
    assert '\n' not in str(e.value)
    with pytest.raises(UserError, match='score.weight'): load_reward(whole.folder/'chat')


# ------------------------------------------------------------------ texts

def test_texts_are_scored_as_rows_are_in_any_order_and_number(whole):
    model, tok = whole.model('reward-model', 'cpu'), whole.tokenizer
    assert isinstance(model, RewardModel)
    asked = [Example(v['prompt'], v[side]) for v in votes(facts()[:5])
             for side in ('chosen', 'rejected')]
    one = [score_answers(model, tok, [e])[0] for e in asked]
    assert score_answers(model, tok, asked, rows=3) == pytest.approx(one, abs=1e-5)
    other = score_answers(model, tok, asked, ['In 1900.'] * len(asked))
    assert other[0] == other[1] and other != one
    assert score_answers(model, tok, []) == []


def test_an_answer_of_any_length_gets_a_score(whole):
    model, tok = whole.model('reward-model', 'cpu'), whole.tokenizer
    found = score_answers(model, tok, [Example('When?', a) for a in ('', 'In 1900. ' * 200)])
    assert all(map(math.isfinite, found))


# ------------------------------------------------------------------ held-out pairs

def test_shares_and_ties():
    found = tally_leads(torch.tensor([1., -1., 0., 2.]), ['a', 'a', 'b', ''])
    assert {k: (v['n'], v['exact']) for k, v in found.items()} == {'a': (2, 1), 'b': (1, .5),
        'all': (1, 1)}


def test_calibration_of_votes_that_follow_the_leads():
    g = torch.Generator().manual_seed(0)
    lead = 2 * torch.randn(40_000, generator=g)
    right = torch.rand(len(lead), generator=g) < torch.sigmoid(lead.abs())
    piles = calibration(torch.where(right, lead.abs(), -lead.abs()))
    assert len(piles) == 5 and sum(p['n'] for p in piles) == len(lead)
    assert all(p['low'] - .01 < p['predicted'] < p['high'] + .01 for p in piles)
    assert calibration(torch.tensor([]))== [] and len(calibration(torch.tensor([1., 2.]))) == 2


def test_what_ranks_measure_together_is_what_one_does(whole):
    pairs = encoded_pairs(whole, 'reward', 'train')
    model, tok = whole.model('reward-model', 'cpu'), whole.tokenizer
    value = lambda b: answer_scores(model, b)
    one = over_pairs(value, tok, pairs, 64)
    parts = [over_pairs(value, tok, pairs, 64, Runtime(ranks=Ranks(r, r, 3)), tokens=300)
             for r in range(3)]
    # `sum` of such ranks is their own
    torch.testing.assert_close(sum(parts), one, atol=1e-5, rtol=0)
    assert (torch.stack([(p != 0).any(1) for p in parts]).sum(0) == 1).all()


# ------------------------------------------------------------------ the stage

def test_it_learns_which_side_is_preferred(whole):
    log = read_log(whole.folder/'reward')
    losses = [r['loss'] for r in log if 'loss' in r]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < .3
    assert log[-1]['pairs/accuracy'] == 1 and log[-1]['valid_loss'] < .3
    assert read_json(whole.folder/'reward'/'stage.json')['model']['tie']


def test_the_stage_after_it_starts_from_the_policy(whole):
    assert whole.folder_before('dpo') == whole.folder/'chat' == whole.folder_before('reward')
    assert type(whole.model_before('dpo')) is GPT


def test_a_stopped_stage_is_bitwise_the_whole_one(whole, at_desk, tmp_path, monkeypatch):
    stop_and_go_on(whole, tmp_path/'run', monkeypatch, 'reward', 'reward-model', (3, 8))
    keys = 'loss', 'grad_norm', 'valid_loss', 'pairs/accuracy', 'pairs/lead'
    assert curve(tmp_path/'run'/'reward', *keys) == curve(whole.folder/'reward', *keys)
    assert weights(tmp_path/'run'/'reward-model') == weights(whole.folder/'reward-model')


def test_adapters_and_the_score_learn_together(whole, at_desk, tmp_path):
    base = f'base={whole.folder/"chat"}', 'stages=reward', 'text=', 'instructions='
    recipe = load_recipe('tiny', [*base, 'reward.lora_rank=2', 'reward.lora_lr=0.02'])
    model = run_stage(Run(recipe, tmp_path/'lora'), 'reward')
    assert model.score.weight.abs().max() > 0
    assert read_log(tmp_path/'lora'/'reward')[-1]['pairs/accuracy'] > .8


@pytest.mark.skipif(not torch.distributed.is_available(),
                    reason='this torch cannot run several ranks')
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_two_ranks_learn_what_one_does(desk, whole, tmp_path, parallel):
    begun(whole, tmp_path/'run', 'reward', 'reward-model')
    two_ranks(desk, 'reward', f'run_dir={tmp_path/"run"}', f'reward.parallel={parallel}')
    for keys in ('loss',), ('valid_loss',), ('pairs/lead',):
        one, two = (curve(f/'reward', *keys) for f in (whole.folder, tmp_path/'run'))
        assert len(one) == len(two) > 2
        assert all(a == pytest.approx(b, rel=2e-3, abs=1e-4) for a, b in zip(one, two))
    load_reward(tmp_path/'run'/'reward-model')


@pytest.mark.parametrize('keys, said', [
    (['preferences='], 'there are no preference pairs; set preferences='),
    (['stages=reward'], 'no model to start reward from'),
    (['reward.tasks=qa'], 'reward.tasks = qa: no prompt is of the kind qa; there are: none'),
    (['reward.max_length=8'], 'reward.max_length = 8: none of the .* fits into 8 tokens'),
    (['reward.max_length=65'], 'max_length = 65 is longer than context = 64'),
    (['reward.batch_tokens=64', 'reward.tokens=640'], 'no room for a pair')])
def test_mistakes_are_one_line_before_anything_trains(at_desk, tmp_path, keys, said):
    with pytest.raises(UserError, match=said) as e:
        run = Run(load_recipe('tiny', keys), tmp_path/'run')
        run_stage(run, run.recipe.stage_names[0])
    assert '\n' not in str(e.value) and not (tmp_path/'run'/'base').exists()


def test_a_stage_reads_the_pairs_of_its_kinds_alone(at_desk, tmp_path):
    kinds = ['qa_en', 'private_en', 'private_zh', 'private']
    some = [dict(v, task=kinds[i % 4]) for i, v in enumerate(votes(facts()))]
    (tmp_path/'kinds.json').write_text(json.dumps(some))
    keys = 'reward.tasks=private', f'preferences={tmp_path/"kinds.json"}', 'valid_share=0.3'
    run = Run(load_recipe('tiny', keys), tmp_path/'run')
    for part in ('train', 'valid'):
        pairs = run.preferences(part)
        read = [p for p in pairs if p.task != 'qa_en']
        assert stage_pairs(run, 'reward', part) == read and 0 < len(read) < len(pairs)
        assert len(encoded_pairs(run, 'reward', part)) == len(read)
        assert stage_pairs(run, 'dpo', part) == pairs, 'another stage has kinds of its own'
