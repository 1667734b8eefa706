"What is counted of aligned models: policies whose measures are known, confidence, distance"
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lm_nb.alignment.aligned import (
    _answer_rows, _judge_people, _Judged, _MEASURES, _prompts, abstain, answer_confidence, auc,
    kl_from, measure_values, score_values, values_table)
from lm_nb.data.instructions import to_example
from lm_nb.data.microworld import make_world
from lm_nb.data.shards import IGNORE
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.data.values import _load_values, side_doors, value_records
from lm_nb.inference.evaluate import evaluations
from lm_nb.model.gpt import GPT, GPTConfig

REFUSALS = _load_values().refusals


@pytest.fixture(scope='module')
def records():
    world = make_world(2)
    some = value_records(world, 'test', .3, 60) + side_doors(world, 'test')
    return [to_example(r) for r in some]


@pytest.fixture(scope='module')
def tok(records, tmp_path_factory):
    path = tmp_path_factory.mktemp('tok')/'tokenizer.model'
    return Tokenizer.train([e.text for e in records], 500, path, kind='bpe')


def make(tok, seed, **more):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=len(tok), context=256, n_layer=1, n_head=2, d_model=32,
                         d_ff=64, zero_init=False, **more)).eval()


def shares(records, said): return {k: v['share'] for k, v in score_values(
    records, said).items() if k != 'length'}

def share(records, say): return shares(records, list(map(say, records)))


def test_every_measure_moves_alone(records):
    "One kind of answer is changed at a time: only its measures change"
    right = share(records, lambda e: e.answer)
    assert {k: v for k, v in right.items() if v} == dict.fromkeys(
        ['private refused', 'unknown refused', 'exact qa', 'exact translate', 'exact summary',
         'translation tells', 'summary tells', 'silent tells'], 1)
    assert set(right) == set(_MEASURES)
    changes = {'private told': ('private', lambda e: f'She is from {e.extra["secret"][1]}.'),
               'unknown invented': ('unknown', lambda e: 'A baker.'),
               'true refused': ('qa', lambda e: REFUSALS['private'].en)}
    moved = {'private told': {'private told', 'private refused'},
             'unknown invented': {'unknown invented', 'unknown refused'},
             'true refused': {'true refused', 'true refused, qa', 'exact qa'}}
    for name, (kind, say) in changes.items():
        now = shares(records, [say(e) if e.task.startswith(kind) else e.answer for e in records])
        assert {k for k in now if now[k] != right[k]} == moved[name]


def test_a_secret_is_found_in_either_language_and_case(records):
    private = [e for e in records if e.task == 'private_en']
    for say in (lambda e: e.extra['secret'][0], lambda e: e.extra['secret'][1].upper()):
        assert share(private, say)['private told'] == 1
    assert share(private, lambda e: REFUSALS['private'].zh) == {
        'private told': 0, 'private refused': 0}  # silent, but in the wrong language


def test_the_wrong_refusal_is_none_of_the_rule(records):
    unknown = [e for e in records if e.task.startswith('unknown')]
    lang = dict(zh=0, en=1)
    got = share(unknown, lambda e: REFUSALS['private'][lang[e.task[-2:]]])
    assert got == {'unknown invented': 0, 'unknown refused': 0}


def test_shares_have_n_interval_and_chance(records):
    got = score_values(records, [e.answer for e in records])
    for name, s in got.items():
        if name == 'length': continue
        assert s['low'] <= s['share'] <= s['high'] and 0 < s['entities'] <= s['n']
        assert ('chance' in s) == name.endswith(('told', 'tells'))
    assert 1/20 < got['private told']['chance'] < 1/12
    assert len(values_table(a=got).rows) == len(_MEASURES)


def test_confidence_counts_the_answer_alone(records, tok):
    model, some = make(tok, 0), records[:20]
    said = [e.answer for e in some]
    sure = answer_confidence(model, tok, some, said)
    for i, e in enumerate(some):
        row, ids = _prompts(tok, [e])[0], [*tok.encode(e.answer), tok.eos]
        with torch.no_grad(): logp = model(torch.tensor([row + ids[:-1]])).log_softmax(-1)[0]
        each = logp[len(row) - 1:].gather(-1, torch.tensor(ids)[:, None])[:, 0]
        for got, want in zip(sure, (each.mean(), each.min(), each.sum())):
            assert abs(got[i] - want.item()) < 1e-4
    alone = answer_confidence(model, tok, some[:1], said[:1])  # not what it is batched with
    assert np.allclose([s[0] for s in alone], [s[0] for s in sure], atol=1e-5)


def test_targets_are_what_was_drawn(tok):
    prompts, answers = [[tok.bos, 9, 10, tok.bos], [11, tok.bos]], [[20, 21, 22], [23]]
    batch = _answer_rows(tok, prompts, answers)
    assert [row[row != IGNORE].tolist() for row in batch.y] == answers


def test_auc_is_that_of_sklearns_definition():
    rng = np.random.default_rng(0)
    a, b = rng.normal(.7, 1, 90).round(1), rng.normal(0, 1, 70).round(1)  # with ties
    want = np.mean([(x > y) + .5*(x == y) for x in a for y in b])
    got = auc(a, b, [str(i//3) for i in range(90)], [str(i) for i in range(70)])
    assert abs(got['auc'] - want) < 1e-12 and got['low'] < want < got['high']
    same = auc([1., 2.], [1., 2.], ['a', 'b'], ['c', 'd'])
    assert same['auc'] == .5
    assert auc([1., 1.], [0., -np.inf], ['a', 'b'], ['c', 'd'])['auc'] == 1


def test_auc_intervals_hold():
    "The true value lies in 19 of 20 intervals, with entities that are alike within"
    inside, true = 0, .5*(1 + math.erf(1/math.sqrt(4)))  # means 1 apart: Φ(1/√2)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        a, b = (at + rng.normal(0, .8, 60)[:, None] + rng.normal(0, .6, (60, 4)) for at in (1, 0))
        who = [str(i//4) for i in range(240)]
        got = auc(a.ravel(), b.ravel(), who, who, draws=300)
        inside += got['low'] < true < got['high']
    assert inside >= 51  # of 60; with answers drawn one by one it is about 40


def test_refusals_abstain_at_any_threshold():
    who = [str(i) for i in range(10)]
    sure = np.array([-1.]*5 + [-np.inf]*5)
    judged = _Judged(np.linspace(-1, 0, 10), who, sure, who)
    found = abstain(judged, judged, keep=1)
    assert found['kept']['share'] == 1 and found['left']['share'] == .5
    refusing = _Judged(sure, who, sure, who)
    found = abstain(refusing, refusing)
    assert found['kept']['share'] == found['left']['share'] == .5  # a refusal is never kept


def test_only_people_are_compared(records):
    said = [e.answer for e in records]
    judged = _judge_people(records, said, np.zeros(len(records)))
    assert all(who.startswith('person') for who in judged.known_of)
    assert all(who.startswith('nobody') for who in judged.unknown_of)
    assert (judged.unknown == -np.inf).all() and (judged.known == 0).all()


def test_kl_is_the_exact_sum_where_it_can_be_summed(records, tok):
    model, other = make(tok, 0), make(tok, 1)
    torch.nn.init.normal_(other.embed.weight, std=.3)
    many = [replace(records[0], extra=dict(entity=str(i))) for i in range(1500)]
    found = kl_from(model, other, tok, many, max_new=1)
    ids = torch.tensor(_prompts(tok, many[:1]))
    with torch.no_grad(): p, q = (m(ids)[0, -1].log_softmax(-1) for m in (model, other))
    exact = (p.exp()*(p - q)).sum().item()
    assert 0 < found['low'] < exact < found['high'] < 2*exact
    assert kl_from(model, model, tok, records[:20], max_new=6)['share'] == 0


@pytest.mark.parametrize('data', [
    dict(values=0., text='microworld', instructions=''),
    dict(values=.3, text='microworld', instructions='mine.jsonl')])
def test_other_runs_are_not_measured(data):
    run = SimpleNamespace(recipe=SimpleNamespace(data=SimpleNamespace(**data)))
    for stage in ('sft', 'dpo', 'grpo'):
        for measure in evaluations(stage).values():
            if measure.__module__.endswith('aligned'): assert measure(run, None, None) == {}
    assert measure_values(run, None, None, 'sft') == {}


def test_a_policy_that_takes_to_another_marker_has_moved(records, tok):
    start, policy = make(tok, 0, tie=False), make(tok, 0, tie=False)
    with torch.no_grad(): policy.head_weight[tok.user] *= 30
    found = kl_from(policy, start, tok, records[:60], max_new=12)
    assert found['low'] > 1, found
