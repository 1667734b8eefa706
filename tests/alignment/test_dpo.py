"Direct preference optimisation: its numbers by hand, its traps, its known optimum, and the stage"
import copy
import json
import math

import pytest, torch
from torch import nn

from pairs import PAIRS, rows, small
from stages import begun, curve, stop_and_go_on, two_ranks, weights
from lm_nb.alignment.dpo import (
    DPOConfig, answer_logprobs, dpo_batch_loss, dpo_curves, dpo_loss, reference, token_logprobs)
from lm_nb.alignment.reward import encoded_pairs, pair_batches, prepare_pairs
from lm_nb.cli import main
from lm_nb.core import UserError, read_json
from lm_nb.data.preferences import encode_preferences
from lm_nb.data.shards import IGNORE, Batch
from lm_nb.training.loop import next_token_loss
from lm_nb.training.monitor import read_log
from lm_nb.training.recipe import load_recipe
from lm_nb.training.run import Run
from lm_nb.training.stage import run_stage

arch = pytest.mark.parametrize('arch', ['qwen3', 'gpt2'])


# ------------------------------------------------------------------ log-probabilities

@arch
def test_they_are_those_of_the_answer_from_bos_to_eos(arch):
    gpt, batch = small(arch).eval(), rows(*PAIRS)
    found = token_logprobs(gpt, batch)
    for row, a in enumerate(PAIRS):
        ids = torch.tensor([7, 8, 1, *a, 2])
        logp = gpt(ids[None, :-1]).log_softmax(-1)[0].gather(1, ids[1:, None])[:, 0]
        assert found[row, 1:len(ids) - 1].tolist() == pytest.approx(logp[1:].tolist(), abs=1e-5)
        assert found[row, 0] == 0 and (found[row, len(ids) - 1:] == 0).all(), 'prompt or padding'
        assert answer_logprobs(gpt, batch)[row].item() == pytest.approx(logp[1:].sum().item(),
            abs=1e-4)


def test_the_first_answer_token_counts():
    gpt, batch = small().eval(), rows([9, 10])
    late = batch._replace(y=batch.y.clone())
    late.y[0, 1] = IGNORE
    lost = token_logprobs(gpt, batch)[0, 1].item()
    assert (answer_logprobs(gpt, batch) - answer_logprobs(gpt, late)).item() == pytest.approx(lost,
        abs=1e-5)


@arch
def test_padding_does_not_count_however_long_and_whatever_stands_in_it(arch):
    gpt, wide = small(arch).eval(), rows(*PAIRS, width=30)
    wide.x[wide.doc < 0] = 33
    own = answer_logprobs(gpt, rows(*PAIRS))
    torch.testing.assert_close(answer_logprobs(gpt, wide), own, atol=1e-4, rtol=0)
    means = [token_logprobs(gpt, b).mean(-1) for b in (wide, rows(*PAIRS))]
    assert (means[0] / means[1] - 16 / 30).abs().max(
        ) < 1e-4, 'a mean over padding is of the padding'


def test_a_temperature_divides_the_logits():
    gpt, batch = small().eval(), rows([9, 10])
    logits = gpt(batch.x)[0, 1:5] / .7
    by_hand = logits.log_softmax(-1).gather(1, batch.y[0, 1:5, None])[:, 0]
    assert token_logprobs(gpt, batch, .7)[0, 1:5].tolist() == pytest.approx(by_hand.tolist(),
        abs=1e-5)


def test_gradients_are_those_of_all_logits():
    gpt, batch = small(), rows(*PAIRS)
    answer_logprobs(gpt, batch).sum().backward()
    some = {n: p.grad.clone() for n, p in gpt.named_parameters()}
    gpt.zero_grad()
    wanted = batch.y != IGNORE
    logp = gpt(batch.x, doc=batch.doc).log_softmax(-1)
    logp.gather(2, batch.y.clamp(min=0)[..., None])[..., 0][wanted].sum().backward()
    for n, p in gpt.named_parameters():
        torch.testing.assert_close(some[n], p.grad, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------ the loss

def test_by_hand():
    ref, policy = (torch.tensor([[a, b]]).log() for a, b in ((.1, .4), (.2, .2)))
    n = torch.tensor([[2, 4]])
    assert dpo_loss(policy, ref, .5).item() == pytest.approx(math.log(1.5), rel=1e-6)
    assert dpo_loss(policy, ref, .5, 'ipo').item() == pytest.approx((math.log(4) - 1)**2, rel=1e-5)
    lead = math.log(2)/2 + math.log(2)/4
    assert dpo_loss(policy, ref, .5, 'length', n).item() == pytest.approx(
        math.log(1 + math.exp(-.5*lead)), rel=1e-6)


@pytest.mark.parametrize('kind', ['sigmoid', 'length'])
def test_it_is_log_2_at_the_start_and_has_a_gradient(kind):
    gpt = small()
    batch = rows(*PAIRS)
    batch = batch._replace(ref=answer_logprobs(gpt, batch).detach())
    loss, n = dpo_batch_loss(gpt, batch, kind=kind)
    assert loss.item() / n.item() == pytest.approx(math.log(2), abs=1e-6) and n == 3
    loss.backward()
    assert max(p.grad.abs().max() for p in gpt.parameters()) > 1e-4


@pytest.mark.parametrize('kind', ['sigmoid', 'ipo', 'length'])
def test_the_same_text_on_both_sides_pulls_nowhere(kind):
    gpt = small()
    same = rows([9, 10], [9, 10])._replace(ref=torch.tensor([-3., -3.]))
    dpo_batch_loss(gpt, same, .5, kind)[0].backward()
    assert max(p.grad.abs().max() for p in gpt.parameters()) < 1e-5


def test_the_chosen_answers_alone_are_what_sft_would_learn_from():
    gpt, batch = small(), rows(*PAIRS)
    batch = batch._replace(ref=torch.zeros(len(PAIRS)))
    loss, n = dpo_batch_loss(gpt, batch, kind='chosen')
    loss.backward()
    own = {name: p.grad.clone() for name, p in gpt.named_parameters()}
    gpt.zero_grad()
    nll = next_token_loss(gpt, Batch(batch.x[::2], batch.y[::2], batch.doc[::2]))
    nll[0].backward()
    assert n == 3 and loss.item() == pytest.approx(nll[0].item(), rel=1e-5)
    for name, p in gpt.named_parameters():
        torch.testing.assert_close(own[name], p.grad, atol=1e-4, rtol=1e-4)


def test_curves_have_both_sides_apart():
    ref, policy = torch.zeros(2, 2), torch.tensor([[-1., -3.], [-1., -.5]])
    found = dpo_curves(policy, ref, DPOConfig(beta=1), torch.ones(2, 2))
    assert found['pairs/chosen'] == -1 and found['pairs/rejected'] == -1.75, 'both fell'
    assert found['pairs/lead'] == .75 and found['pairs/accuracy'] == .5
    assert found['valid_loss'] == pytest.approx((math.log1p(math.exp(-2))
                                                 + math.log1p(math.exp(.5)))/2)


# ------------------------------------------------------------------ the optimum that is known

class Tree(nn.Module):
    "6 tokens, answers of 3: logits for every beginning"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.ParameterList(.5*torch.randn(6**t, 6, dtype=torch.float64) for t in range(3))
    def forward(self):
        logp = torch.zeros(1, dtype=torch.float64)
        for row in self.rows: logp = (logp[:, None] + row.log_softmax(-1)).flatten()
        return logp


def fitted(tree, loss, steps=300):
    policy = copy.deepcopy(tree)
    o = torch.optim.LBFGS(policy.parameters(), max_iter=steps, line_search_fn='strong_wolfe',
                          history_size=20, tolerance_grad=1e-9, tolerance_change=1e-12)
    def closure():
        o.zero_grad()
        value = loss(policy())
        value.backward()
        return value
    o.step(closure)
    return policy().detach()


@pytest.mark.parametrize('kind', ['sigmoid', 'ipo'])
@pytest.mark.parametrize('beta', [.3, 1])
def test_votes_that_follow_a_reward_lead_to_its_best_policy(kind, beta):
    "All pairs in both directions: 216 answers, the reward from dice"
    tree, reward = Tree(), torch.randn(216, dtype=torch.float64)
    ref = tree().detach()
    a, b = torch.triu_indices(216, 216, 1)
    yes = torch.sigmoid(reward[a] - reward[b])
    sides = torch.cat([torch.stack([a, b], 1), torch.stack([b, a], 1)])
    weight = torch.cat([yes, 1 - yes]) / len(a)
    found = fitted(tree, lambda logp: (weight * dpo_loss(logp[sides], ref[sides], beta,
                                                         kind)).sum())
    wins = torch.sigmoid(reward[:, None] - reward).mean(1)
    gain = reward if kind == 'sigmoid' else wins - .5
    best = (ref + gain / beta).log_softmax(0)
    def kl(p, q): return (p.exp() * (p - q)).sum().item()
    assert kl(best, found) < 1e-4 and kl(found, best) < 1e-4
    assert kl(best, ref) > (.1 if kind == 'sigmoid' else .01), 'there was something to learn'


# ------------------------------------------------------------------ the stage

def test_it_begins_at_log_2_and_raises_the_preferred_side(whole):
    log = read_log(whole.folder/'dpo')
    losses = [r['loss'] for r in log if 'loss' in r]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0] - .02
    last = [r for r in log if 'pairs/lead' in r][-1]
    assert last['pairs/lead'] == pytest.approx(last['pairs/chosen'] - last['pairs/rejected'],
                                               abs=1e-3)
    assert last['pairs/accuracy'] == 1
    said = (whole.folder/'dpo'/'samples.md').read_text()
    assert 'before: ' in said and 'now: ' in said


def test_in_bf16_it_begins_at_log_2_as_well(whole, at_desk, tmp_path):
    "The reference comes from the kernels of training: those without gradients round otherwise"
    keys = f'base={whole.folder/"chat"}', 'stages=dpo', 'text=', 'instructions=', 'dpo.dtype=bf16'
    run = Run(load_recipe('tiny', [*keys, 'dpo.beta=5']), tmp_path/'run')
    run_stage(run, 'dpo')
    assert read_log(run.folder/'dpo')[0]['loss'] == pytest.approx(math.log(2), abs=1e-5)


def test_the_reference_is_computed_once_and_again_if_anything_is_different(whole, tmp_path,
    monkeypatch):
    import lm_nb.alignment.dpo as dpo
    pairs = {part: encoded_pairs(whole, 'dpo', part) for part in ('train', 'valid')}
    stored, _ = reference(whole, 'dpo', pairs)
    gpt = whole.model('chat', 'cpu')
    batches = pair_batches(whole, 'dpo', pairs['train'], ref=stored['train'])
    for b in batches(0):
        torch.testing.assert_close(answer_logprobs(gpt, b), b.ref, atol=1e-4, rtol=1e-5)
    computed = []
    monkeypatch.setattr(dpo, '_computed', lambda run, stage, pairs, asks: computed.append(1)
                        or (stored, []))
    monkeypatch.setattr(dpo, 'save_file', lambda x, path, **_: path.write_bytes(b''))
    reference(whole, 'dpo', pairs)
    assert not computed
    before = (whole.folder/'dpo'/'reference.safetensors').read_bytes()
    try: reference(whole, 'dpo', dict(pairs, train=pairs['train'][1:]))
    finally: (whole.folder/'dpo'/'reference.safetensors').write_bytes(before)
    assert computed


def test_a_stopped_stage_is_bitwise_the_whole_one(whole, at_desk, tmp_path, monkeypatch):
    stop_and_go_on(whole, tmp_path/'run', monkeypatch, 'dpo', 'aligned', (2, 9))
    keys = 'loss', 'grad_norm', 'valid_loss', 'pairs/lead', 'pairs/chosen'
    assert curve(tmp_path/'run'/'dpo', *keys) == curve(whole.folder/'dpo', *keys)
    assert weights(tmp_path/'run'/'aligned') == weights(whole.folder/'aligned')
    assert weights(whole.folder/'aligned') != weights(whole.folder/'chat')


@pytest.mark.skipif(not torch.distributed.is_available(),
                    reason='this torch cannot run several ranks')
def test_two_ranks_learn_what_one_does(desk, whole, tmp_path):
    begun(whole, tmp_path/'run', 'dpo', 'aligned')
    two_ranks(desk, 'dpo', f'run_dir={tmp_path/"run"}')
    for keys in ('loss',), ('valid_loss',), ('pairs/lead',):
        one, two = (curve(f/'dpo', *keys) for f in (whole.folder, tmp_path/'run'))
        assert len(one) == len(two) > 2
        assert all(a == pytest.approx(b, rel=1e-3, abs=1e-4) for a, b in zip(one, two))


@pytest.mark.parametrize('words', [
    ['dpo.variant=ipo'], ['dpo.variant=length', 'dpo.beta=2'], ['dpo.micro_rows=2'],
    ['dpo.variant=chosen'],
    ['dpo.lora_rank=2', 'dpo.lora_lr=0.01'], ['dpo.max_length=40']])
def test_keys(whole, at_desk, tmp_path, words):
    keys = 'stages=dpo', f'base={whole.folder/"chat"}', 'text=', 'instructions=', *words
    run = Run(load_recipe('tiny', keys), tmp_path/'run')
    run_stage(run, 'dpo')
    last = [r for r in read_log(run.folder/'dpo') if 'pairs/lead' in r][-1]
    assert last['pairs/lead'] > 0
    if words == ['dpo.micro_rows=2']:
        one, own = (curve(f/'dpo', 'loss') for f in (whole.folder, run.folder))
        assert all(a == pytest.approx(b, rel=1e-4) for a, b in zip(one, own))


@pytest.mark.parametrize('keys, said', [
    (['preferences='], 'there are no preference pairs; set preferences='),
    (['stages=dpo'], 'no model to start dpo from'),
    (['dpo.max_length=8'], 'dpo.max_length = 8: none of the .* fits into 8 tokens'),
    (['dpo.variant=simpo'], 'variant = simpo: expected sigmoid, ipo, length, chosen'),
    (['dpo.tasks=riddle'], 'dpo.tasks = riddle: no prompt is of the kind riddle; there are: none'),
    (['dpo.beta=0'], 'beta = 0.*: expected a number above 0'),
    (['dpo.batch_tokens=64', 'dpo.tokens=640'], 'no room for a pair')])
def test_mistakes_are_one_line_before_anything_trains(at_desk, tmp_path, keys, said):
    with pytest.raises(UserError, match=said) as e:
        run = Run(load_recipe('tiny', keys), tmp_path/'run')
        run_stage(run, run.recipe.stage_names[0])
    assert '\n' not in str(e.value) and not (tmp_path/'run'/'base').exists()


def test_what_is_left_out_is_said_with_what_would_keep_it(at_desk, tmp_path):
    whole = Run(load_recipe('tiny'), tmp_path/'run')
    lengths = sorted(max(len(p) + len(a) + 2 for p, a in pair) for pair in encode_preferences(
        whole.tokenizer, whole.preferences('train'), 64))
    limit = lengths[len(lengths) // 2]
    lost = sum(n > limit for n in lengths)
    recipe = load_recipe('tiny', [f'dpo.max_length={limit}'])
    said = prepare_pairs(Run(recipe, tmp_path/'cut'), 'dpo')
    assert f'dpo: {lost} of {len(lengths)} pairs are longer than {limit} tokens' in said[-1]
    assert 'dpo.max_length=64 would keep all' in said[-1] and 10 * lost > len(lengths)


def test_open_rates_are_gentle_and_a_step_has_32_rows(at_desk):
    recipe = load_recipe('tiny', ['lr=none', 'muon_lr=none', 'dpo.batch_tokens=none',
                                  'dpo.tokens=20480'])
    sft, dpo, reward = (recipe.configs[n] for n in ('sft', 'dpo', 'reward'))
    assert dpo.lr == pytest.approx(.03 * sft.lr) and reward.muon_lr == pytest.approx(
        .1 * sft.muon_lr)
    assert dpo.rows(64) == 32 and dpo.batch_tokens == 32 * 64


def test_from_the_command_line_it_is_run_measured_and_planned(at_desk, tmp_path, capsys):
    assert not main(['run', 'tiny', f'run_dir={tmp_path/"run"}', 'stages=pretrain sft dpo'])
    results = read_json(tmp_path/'run'/'results.json')
    assert results['aligned']['pairs']['all']['share'] == 1
    assert {'base', 'chat', 'aligned'} <= results.keys() and 'reward' not in results
    capsys.readouterr()
    assert not main(['evaluate', 'tiny', f'run_dir={tmp_path/"run"}', 'stages=pretrain sft dpo',
                     'json=true'])
    assert 'pairs_loss' in json.loads(capsys.readouterr().out)['aligned']
    assert not main(['plan', 'tiny', f'run_dir={tmp_path/"plan"}', 'stages=pretrain sft dpo'])
    assert 'dpo' in capsys.readouterr().out.splitlines()[0]


def test_two_stages_that_leave_one_folder_are_refused(at_desk, tmp_path):
    plugin = tmp_path/'other.py'
    plugin.write_text('from dataclasses import replace\n'
                      'from lm_nb.training.recipe import find_stage, register_stage\n'
                      "register_stage(replace(find_stage('dpo'), name='other'))\n")
    with pytest.raises(UserError, match='each needs an output of its own'):
        load_recipe('tiny', [f'plugins={plugin}', 'stages=pretrain sft dpo other'])
