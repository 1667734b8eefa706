"Facts asked for in every way: likelihoods, chance levels, intervals over entities, differences"
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lm_nb.core import UserError, write_lines
from lm_nb.data.instructions import Example
from lm_nb.data.microworld import deal_groups, fact_probes, make_world
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.inference import facts as F
from lm_nb.inference.evaluate import evaluations
from lm_nb.model.gpt import GPT, GPTConfig


@pytest.fixture(scope='module')
def world():
    return deal_groups(make_world(people=12, towns=8, things=4, hubs=2), 'five one')


@pytest.fixture(scope='module')
def facts(world): return fact_probes(world, 'test')


@pytest.fixture(scope='module')
def tok(facts): return Tokenizer.train([t for f in facts for t in f['told']], 600)


@pytest.fixture(scope='module')
def model(tok):
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tok), context=256, n_layer=2, n_head=2, d_model=32)
    return GPT(GPTConfig(zero_init=False, dropout=.2, **shape))


class Knows(torch.nn.Module):
    "A model that finds certain texts likely, token for token, and everything else unlikely"
    def __init__(self, tok, texts):
        super().__init__()
        self.cfg = GPTConfig(vocab_size=len(tok), context=256, n_layer=1, n_head=1, d_model=2)
        self.embed = torch.nn.Embedding(len(tok), 1)
        self.known = [[tok.bos, *tok.encode(t), tok.eos] for t in texts]

    def forward(self, ids, doc=None):
        out = torch.zeros(*ids.shape, self.cfg.vocab_size)
        for b, row in enumerate(ids.tolist()):
            for known in self.known:
                for i in range(min(len(row), len(known) - 1)):
                    if row[:i + 1] == known[:i + 1]: out[b, i, known[i + 1]] = 9.
        return out

# likelihoods

def test_likelihood_is_that_of_the_document_alone(model, tok, facts):
    "Batches, padding and dropout have no part; the first token is predicted from `bos` alone"
    texts = [f['told'][0] for f in facts[:12]]
    model.train()
    got = F.log_likelihoods(model, tok, texts)
    assert model.training and np.allclose(got, F.log_likelihoods(model, tok, texts, 1), atol=1e-3)
    model.eval()
    for text, score in zip(texts, got):
        ids = tok.encode(text)
        logp = model(torch.tensor([[tok.bos, *ids[:-1]]])).log_softmax(-1)[0]
        want = sum(logp[i, t].item() for i, t in enumerate(ids))
        assert math.isclose(score, want, rel_tol=1e-4)


def test_no_texts_and_long_texts(model, tok):
    assert F.log_likelihoods(model, tok, []) == [] and F.forced_choice(model, tok, []) == []
    with pytest.raises(UserError, match='context = 256'):
        F.log_likelihoods(model, tok, ['山' * 300])


def test_who_knows_is_right_and_who_does_not_is_at_chance(model, tok, facts):
    rows = [f['canonical'] for f in facts]
    wise = Knows(tok, [f['output'] for f in facts])
    assert F.forced_choice(wise, tok, rows) == [f['answer'] for f in facts]
    many = fact_probes(deal_groups(make_world(people=60, towns=32, things=20), 'five one'), 'test')
    rows, draws = [f['canonical'] for f in many], []
    for seed in range(5):  # models that know nothing, together, are right one time in so many
        torch.manual_seed(seed)
        blank = GPT(GPTConfig(**{**vars(model.cfg), 'zero_init': False}))
        for p in blank.parameters(): torch.nn.init.normal_(p, std=.3)
        chosen = F.forced_choice(blank, tok, rows)
        draws.append(np.mean([c == f['answer'] for c, f in zip(chosen, many)]))
    chance = np.mean([1/len(f['values']) for f in many])
    assert abs(np.mean(draws) - chance) < .05, (np.mean(draws), chance)

# ways to ask

def test_every_fact_is_asked_in_every_way(model, tok, facts):
    for chat, ways in ((False, {'contained', 'few_shot'}), (True, {'seen', 'unseen'})):
        asked = F.ask_facts(model, tok, facts, chat)
        assert len(asked) == len(facts)
        for a, f in zip(asked, facts):
            assert set(a['hits']) == set(a['chance']) == {'told', 'canonical', 'cloze'} | ways
            assert a['entity'] == f['entity'] and a['chance']['told'] == 1/len(f['values'])
            assert ('shots' in a) != chat
        json.dumps(asked)


def test_contained_counts_every_value_that_is_written(tok, facts, monkeypatch):
    f = next(f for f in facts if f['lang'] == 'en')
    right, wrong = f['values'][f['answer']], f['values'][f['answer'] - 1]
    monkeypatch.setattr(F, 'generate_batch', lambda *a: [tok.encode(f'It is {wrong} or {right}.')])
    hits, chance = F._contained(None, tok, [f])
    assert hits == [1.] and math.isclose(chance[0], 2/len(f['values']))


def test_shots_are_of_the_language_and_counted(model, tok, facts, monkeypatch):
    shots = [Example(f'Which {i}?', 'It.', task=f'qa_{"en" if i % 2 else "zh"}') for i in range(20)]
    seen, answer = {}, {f['unseen']: f['output'] for f in facts}
    def generate(model, prompts, *rest):
        texts = [tok.decode(p) for p in prompts]
        starts = {text[:text.rstrip('\n').rfind('\n') + 1] for text in texts}
        assert len(starts) == 1  # all rows of a batch begin with the same examples
        seen.update({text.strip().split('\n')[-1]: text for text in texts})
        return [tok.encode(answer[text.strip().split('\n')[-1]] + '\nMore') for text in texts]
    monkeypatch.setattr(F, 'generate_batch', generate)
    hits, counts = F._few_shot(model, tok, facts, shots)
    assert hits == [1.] * len(facts)
    for f, n in zip(facts, counts):
        text = seen[f['unseen']]
        assert text.count('It.') == n > 0 and text.endswith(f['unseen'] + '\n')
        numbers = [int(t) for t in re.findall(r'Which (\d+)\?', text)]
        assert all(i % 2 == (f['lang'] == 'en') for i in numbers)

# intervals and differences

def beta_hits(rng, entities, asked, a=1.4, b=.6):
    p = rng.beta(a, b, entities)
    return (rng.random((entities, asked)) < p[:, None]).astype(float)


@pytest.mark.parametrize('entities, asked, least', [(20, 10, .9), (60, 4, .92)])
def test_coverage_on_simulated_entities(entities, asked, least):
    rng, who = np.random.default_rng(1), np.repeat(np.arange(entities), asked)
    draws = [beta_hits(rng, entities, asked).ravel() for _ in range(400)]
    ends = [F.entity_interval(hits, who, 400) for hits in draws]
    covered = np.mean([low <= .7 <= high for low, high in ends])
    assert least < covered < .99, covered


def test_interval_repeats_and_holds_the_share():
    rng = np.random.default_rng(0)
    for _ in range(50):
        hits = beta_hits(rng, 9, 5).ravel()
        who = np.repeat(np.arange(9), 5)
        low, high = F.entity_interval(hits, who, 300)
        assert 0 <= low <= hits.mean() <= high <= 1
        assert (low, high) == F.entity_interval(hits, who, 300)
    low, high = F.entity_interval([0.]*45, np.repeat(np.arange(9), 5))
    assert low == 0 and .2 < high < .4  # nine entities, not forty-five questions


def test_p_values_are_even_where_there_is_no_difference():
    rng, found = np.random.default_rng(2), {True: [], False: []}
    for _ in range(300):
        both = [dict(enumerate(beta_hits(rng, 20, 5))) for _ in range(2)]
        other = {f'x{k}': v for k, v in both[1].items()}
        for b in (both[1], other):
            d = F.difference(both[0], b, 300)
            found[d['paired']].append(d['p'])
    for paired, ps in found.items():
        assert .01 < np.mean(np.array(ps) < .05) < .1, paired
        assert .4 < np.mean(ps) < .6


def test_pairing_sees_more():
    "Entities differ much, the models by little: only the paired test can tell"
    rng = np.random.default_rng(3)
    level = rng.beta(1, 1, 60)*.8
    a, b = ({i: (rng.random(200) < p + more).astype(float) for i, p in enumerate(level)}
            for more in (.05, 0))
    assert F.difference(a, b)['p'] < .01
    assert F.difference(a, {f'x{k}': v for k, v in b.items()})['p'] > .1
    with pytest.raises(UserError, match='entities'): F.difference(a, {0: [1.], 'y': [0.]})

# in a run

def test_measured_after_both_stages(model, tok, facts, tmp_path):
    (tmp_path/'corpus').mkdir()
    write_lines(tmp_path/'corpus'/'facts-valid.jsonl', facts[:20])
    recipe = SimpleNamespace(data=SimpleNamespace(asked='valid'))
    run = SimpleNamespace(folder=tmp_path, recipe=recipe, records=lambda part: [])
    for stage, name in (('pretrain', 'base'), ('sft', 'chat')):
        got = evaluations(stage)[f'_{name}_facts'](run, model, tok)
        lines = (tmp_path/f'facts-{name}.jsonl').read_text(encoding='utf-8').splitlines()
        assert F.score_facts(map(json.loads, lines)) == got['facts']
        json.dumps(got)
        table = str(F.facts_table(got['facts']))
        assert 'chance' in table and all(group in table for group in got['facts'])


def test_a_fifth_of_the_facts_is_measured_during_training(model, tok, facts, tmp_path):
    "Each entity by one of its facts, each fact by some entity, in both languages"
    (tmp_path/'corpus').mkdir()
    write_lines(tmp_path/'corpus'/'facts-valid.jsonl', facts)
    recipe = SimpleNamespace(data=SimpleNamespace(asked='valid'))
    run, groups = SimpleNamespace(folder=tmp_path, recipe=recipe), {f['group'] for f in facts}
    asked, choose = [], F._choose
    def watched(model, tok, some, how):
        asked.extend(some)
        return choose(model, tok, some, how)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(F, '_choose', watched)
        found = evaluations('pretrain', during=True)['_base_progress'](run, model, tok)
    assert len(asked) == len(facts) / 5 == 2*len({f['entity'] for f in facts})
    assert {f['lang'] for f in asked} == {'zh', 'en'}
    assert len({f['fact'] for f in asked}) > len({f['entity'] for f in asked}) / 2
    assert found.keys() == {f'facts/{how} {g}' for how in ('canonical', 'cloze') for g in groups}
    assert all(0 <= share <= 1 for share in found.values())
    more = evaluations('sft', during=True)['_chat_progress'](run, model, tok)
    assert more.keys() - found.keys() == {f'facts/seen {g}' for g in groups}
    run.folder = tmp_path/'none'
    assert evaluations('sft', during=True)['_chat_progress'](run, model, tok) == {}
