"""Preference pairs in every layout, their rows and batches: what counts, and what never does"""
import json
from collections import Counter
from dataclasses import asdict, replace

import pytest, torch
from hypothesis import given, settings, strategies as st
from source_files import REAL, put, rejected

from batch_tools import Bytes
from lm_nb.core import UserError, read_json, sha256
from lm_nb.data.cleaning import CleanConfig
from lm_nb.data.instructions import (
    Example, NothingFits, encode_each, lay_out, needed_context, sft_row)
from lm_nb.data.packing import _example_length
from lm_nb.data.prepare import (
    DataConfig, check_sources, first_look, stored_preferences, write_preferences)
from lm_nb.data.preferences import (
    PairBatches, PairBatch, Preference, answer_batch, encode_preferences, has_preferences,
    pair_batch, pair_eval_batches, read_preferences, to_preference)
from lm_nb.data.shards import IGNORE
from lm_nb.data.sources import Report
from lm_nb.training.recipe import load_recipe
from lm_nb.training.run import Run

tok = Bytes()
words = st.text('abc 是否', min_size=1, max_size=8).map(str.strip).filter(len)


@st.composite
def preferences(draw):
    chosen = draw(words)
    return Preference(draw(words), chosen, draw(words.filter(lambda t: t != chosen)),
                      draw(st.just('') | words), tuple(draw(st.lists(st.tuples(words, words),
                                                                    max_size=3))))


# ---- layouts

def said(role, text): return dict(role=role, content=text)


def context(p):
    "What is said before the answer, as messages"
    system = [said('system', p.system)] if p.system else []
    turns = [said(role, text) for turn in p.turns for role,
             text in zip(('user', 'assistant'), turn)]
    return [*system, *turns, said('user', p.prompt)]


def hh(p, answer):
    turns = [*p.turns, (p.prompt, answer)]
    return ''.join(f'\n\nHuman: {q}\n\nAssistant: {a}' for q, a in turns)


def sharegpt(m):
    names = dict(user='human', assistant='gpt', system='system')
    return {'from': names[m['role']], 'value': m['content']}


LAYOUTS = { # name: what a pair is written as
    'texts': lambda p: dict(prompt=p.prompt, chosen=p.chosen, rejected=p.rejected, system=p.system,
                            history=[list(t) for t in p.turns]),
    'question': lambda p: dict(question=p.prompt, chosen=p.chosen, rejected=p.rejected,
                               system=p.system, history=[list(t) for t in p.turns]),
    'messages': lambda p: dict(prompt=context(p), chosen=[said('assistant', p.chosen)],
                               rejected=[said('assistant', p.rejected)]),
    'conversations': lambda p: dict(conversations=list(map(sharegpt, context(p))),
                                    chosen=sharegpt(said('assistant', p.chosen)),
                                    rejected=sharegpt(said('assistant', p.rejected))),
    'messages and texts': lambda p: dict(messages=context(p), chosen=p.chosen,
                                         rejected=p.rejected),
    'whole': lambda p: dict(chosen=[*context(p), said('assistant', p.chosen)],
                            rejected=[*context(p), said('assistant', p.rejected)]),
    'whole, prompt repeated': lambda p: dict(LAYOUTS['whole'](p), prompt=p.prompt),
    'hh': lambda p: dict(chosen=hh(p, p.chosen), rejected=hh(p, p.rejected), system=p.system)}


@settings(max_examples=60, deadline=None)
@given(preferences(), st.sampled_from(sorted(LAYOUTS)))
def test_every_layout_is_the_same_pair(p, layout):
    found = to_preference(LAYOUTS[layout](p))
    assert replace(found, extra={}) == p


def test_input_and_other_fields():
    p = to_preference(dict(instruction='Say', input='hi', chosen='hi', rejected='no', id=7,
                           task='a'))
    assert p == Preference('Say\nhi', 'hi', 'no', task='a', extra=dict(id=7))


GOOD = dict(prompt='Who?', chosen='Alan.', rejected='Go!')
ASK, TOLD = said('user', 'Who?'), said('assistant', 'Alan.')
DEEP = []
for _ in range(3000): DEEP = [DEEP]
BAD = [ # record, the reason
    (dict(GOOD, rejected='Alan.'), 'chosen and rejected are the same text'),
    (dict(GOOD, rejected=' Alan.\n'), 'chosen and rejected are the same text'),
    (dict(GOOD, rejected=' \n\u3000'), 'rejected is empty'),
    (dict(GOOD, chosen=''), 'chosen is empty'),
    (dict(GOOD, chosen=None), 'chosen is null'),
    (dict(GOOD, rejected=4), 'rejected is not text but a number'),
    (dict(prompt='Who?', chosen='Alan.'), 'rejected is missing'),
    (dict(prompt='Who?', rejected='Alan.'), 'chosen is missing'),
    (dict(prompt='', chosen='a', rejected='b'), 'prompt is empty'),
    (dict(chosen='a', rejected='b'), 'there is no prompt to the two answers'),
    (dict(chosen=[ASK, TOLD], rejected=[ASK]), 'there is no answer at the end'),
    (dict(chosen=hh(Preference('a', 'b', 'c'), ''), rejected=hh(Preference('a', 'b', 'c'), 'c')),
     'there is no answer at the end'),
    (dict(chosen=[ASK, TOLD], rejected=[said('user', 'Where?'), said('assistant', 'Here.')]),
     'chosen and rejected do not answer the same question'),
    (dict(chosen=[ASK, TOLD, ASK, TOLD], rejected=[ASK, said('assistant', 'x')]),
     'chosen and rejected do not answer the same question'),
    (dict(chosen=[said('system', 'Be kind'), ASK, TOLD], rejected=[ASK, said('assistant', 'x')]),
     'chosen and rejected do not answer the same question'),
    (dict(chosen=[ASK, TOLD], rejected=[ASK, said('tool', '{}'), said('assistant', 'x')]),
     'a tool is called in it'),
    (dict(GOOD, images=['a.png']), 'it comes with images, and only text is read'),
    (dict(GOOD, images=DEEP), 'it is nested too deeply'),
    (dict(GOOD, chosen=[dict(TOLD, meta=DEEP)]), 'it is nested too deeply')]


@pytest.mark.parametrize('record, reason', BAD)
def test_what_is_no_pair_is_refused_with_its_reason(record, reason):
    with pytest.raises(UserError) as e: to_preference(record)
    assert str(e.value) == reason


def test_every_row_is_kept_or_rejected(tmp_path):
    bad = [(r, why) for r, why in BAD if 'nested' not in why]
    file = put(tmp_path/'p.jsonl',
               ''.join(json.dumps(r) + '\n' for r in [GOOD, *(r for r, _ in bad)])
               + '{broken\n')
    report = Report()
    assert list(read_preferences(file, report)) == [to_preference(GOOD)]
    report.check()
    assert (report.rows, report.kept) == (len(bad) + 2, 1)
    found = rejected(report)
    assert sum(found.values()) == len(bad) + 1
    assert Counter(why for _, why in bad).items() <= found.items()


def test_the_first_row_stands_beside_its_reason(tmp_path):
    rows = [GOOD, GOOD, dict(GOOD, chosen=''), dict(GOOD, chosen='')]
    file = put(tmp_path/'p.jsonl', ''.join(json.dumps(r) + '\n' for r in rows))
    report = Report()
    list(read_preferences([file, file], report))
    assert report.rejected['chosen is empty'][0] == 4
    assert report.rejected['chosen is empty'][1].startswith("row 3: {'prompt': 'Who?'")


@pytest.mark.parametrize('row, words', [
    (dict(instruction='Who?', output='Alan.'), ('chosen is missing (1)', 'instruction, output',
                                                'a pair has prompt, chosen and rejected')),
    (dict(GOOD, rejected='Alan.'), ('the same text (1)',)),
    (dict(prompt='a', completion='b', label=True), ('a good answer, and no bad one',))])
def test_a_file_without_a_pair_is_an_error_of_one_line(tmp_path, row, words):
    file = put(tmp_path/'p.jsonl', json.dumps(row) + '\n')
    with pytest.raises(UserError) as e: list(read_preferences(file))
    assert str(e.value).startswith(f'{file}: no preference pair in it: ') and '\n' not in str(
        e.value)
    assert all(w in str(e.value) for w in words), str(e.value)


def test_fields_can_be_named(tmp_path):
    file = put(tmp_path/'p.jsonl', json.dumps(dict(q='Who?', good='Alan.', bad='Go!')) + '\n')
    how = 'prompt=q chosen=good rejected=bad'
    assert list(read_preferences(file, fields=how)) == [to_preference(GOOD)]
    assert has_preferences(file, fields=how) and not has_preferences(file)


def test_the_longer_answers_are_counted(tmp_path):
    rows = [GOOD, dict(GOOD, chosen='A.'), dict(GOOD, chosen='Abc')]
    report = Report()
    list(read_preferences(put(tmp_path/'p.jsonl', ''.join(json.dumps(r) + '\n' for r in rows)),
                          report))
    assert report.notes == {'pairs whose chosen answer is the longer one': 1}


# ---- answers with a verdict

kto = st.lists(st.tuples(st.sampled_from('pq'), st.sampled_from('xyz'), st.booleans()), max_size=14)


@settings(max_examples=150, deadline=None)
@given(kto.filter(len))
def test_good_and_bad_answers_are_paired(tmp_path_factory, rows):
    file = put(tmp_path_factory.mktemp('kto')/'k.jsonl', ''.join(
        json.dumps(dict(prompt=p, completion=a, label=good)) + '\n' for p, a, good in rows))
    report = Report()
    try: pairs = list(read_preferences(file, report))
    except UserError: pairs = []
    report.check()
    assert report.kept == 2*len(pairs)
    used = Counter((p.prompt, p.chosen, True) for p in pairs)
    used += Counter((p.prompt, p.rejected, False) for p in pairs)
    left = Counter(rows) - used
    assert left + used == Counter(rows)  # none twice, none invented
    for p in 'pq':  # what is left over could not have been paired
        good, bad = ({a for q, a, g in left if (q, g) == (p, verdict)} for verdict in (True, False))
        assert not good or not bad or good == bad and len(good) == 1
    assert sum(rejected(report).values()) == left.total()


@pytest.mark.parametrize('mark, good, bad', [
    ('label', True, False), ('label', 'true', 'false'), ('label', 1, 0), ('kto_tag', True, False),
    ('desirable', 1, -1)])
def test_verdicts(tmp_path, mark, good, bad):
    rows = [dict(messages=[ASK, TOLD], **{mark: good}),
            dict(messages=[ASK, said('assistant', 'Go!')], **{mark: bad}),
            dict(messages=[ASK, TOLD], **{mark: 'perhaps'})]
    report = Report()
    file = put(tmp_path/'k.jsonl', ''.join(json.dumps(r) + '\n' for r in rows))
    assert list(read_preferences(file, report)) == [Preference('Who?', 'Alan.', 'Go!')]
    assert rejected(report) == {f'{mark} is neither true nor false': 1}


# ---- a real file

def test_the_demo_file():
    file = REAL/'dpo_zh_demo.json'
    if not file.exists(): pytest.skip('shared/data/dpo_zh_demo.json is not here')
    report = Report()
    pairs = list(read_preferences(file, report))
    records = read_json(file)
    assert (len(pairs), report.check().kept, report.rejected) == (300, 300, {})
    assert report.notes == {'pairs whose chosen answer is the longer one': 186}
    assert sum(bool(p.system) for p in pairs) == 64
    for p, r in zip(pairs, records):
        assert p.prompt.split() == r['conversations'][-1]['value'].split()
    encoded = encode_preferences(tok, pairs, 1000, report)
    assert len(encoded) == report.check().kept
    longest = [max(_example_length(e) for e in both) for both in encode_preferences(tok, pairs,
        10**6)]
    assert len(encoded) == sum(n < 1000 for n in longest)
    assert max(needed_context(report)) >= max(longest)
    [batch] = [b for b in pair_eval_batches(tok, encoded, 2*len(encoded))]
    said = [tok.decode(row[row != IGNORE].tolist()) for row in batch.y]
    kept = [p for p, n in zip(pairs, longest) if n < 1000]
    assert said == [a for p in kept for a in (p.chosen, p.rejected)]


# ---- rows

@settings(max_examples=100, deadline=None)
@given(st.lists(preferences(), min_size=1, max_size=5))
def test_only_the_last_answers_count(prefs):
    pairs = encode_preferences(tok, prefs, 10**4)
    batch = pair_batch(tok, pairs)
    assert isinstance(batch, PairBatch) and len(batch.x) == 2*len(prefs)
    assert batch.x.shape[1] % 32 == 0 and batch.x.shape[1] - 32 < (batch.doc >= 0).sum(1).max()
    for i, (parts, answer) in enumerate(
            (parts, a) for p, both in zip(prefs, pairs) for parts, a in zip(both, (p.chosen,
                p.rejected))):
        x, y, mask = sft_row(*parts, bos=tok.bos, eos=tok.eos, pad=tok.pad,
                             max_length=batch.x.shape[1] + 1)
        assert torch.equal(batch.y[i] != IGNORE, mask.bool())  # as fine-tuning counts
        assert torch.equal(batch.y[i][mask.bool()], y[mask.bool()])
        there = batch.doc[i] >= 0
        assert torch.equal(batch.x[i][there], x[there])
        assert (batch.x[i][~there] == tok.pad).all() and (batch.y[i][~there] == IGNORE).all()
        counted = batch.y[i][batch.y[i] != IGNORE].tolist()
        assert counted == [tok.bos, *tok.encode_batch([answer])[0], tok.eos]


@settings(max_examples=60, deadline=None)
@given(preferences())
def test_the_rows_of_a_pair_differ_in_the_answer_alone(p):
    (asked, _), (same, _) = encode_preferences(tok, [p], 10**4)[0]
    assert asked == same
    x, y, *_ = pair_batch(tok, encode_preferences(tok, [p], 10**4))
    n = len(asked) + 1  # with bos
    assert torch.equal(x[0, :n], x[1, :n]) and torch.equal(y[0, :n - 2], y[1, :n - 2])


@settings(max_examples=60, deadline=None)
@given(preferences())
def test_whole_conversations_may_come_as_their_turns(p):
    "`encode_each` gives further turns as further parts: their answers are context all the same"
    turns = [Example(p.prompt, a, p.system, turns=p.turns) for a in (p.chosen, p.rejected)]
    parts = list(encode_each(tok, turns, 10**4))
    assert len(parts[0]) == 2 + 2*len(p.turns)
    ours = pair_batch(tok, encode_preferences(tok, [p], 10**4))
    for a, b in zip(answer_batch(tok, parts)[:3], ours[:3]): assert torch.equal(a, b)
    whole, _ = lay_out(parts[0], *tok.chat.answer)
    assert ours.x[0][ours.doc[0] >= 0].tolist() == whole[:-1].tolist()


def test_long_pairs_are_dropped_whole():
    fits, short = Preference('a', 'bb', 'c'), Preference('a', 'b', 'c'*60)
    prompt = Preference('p'*70, 'b', 'c')
    report = Report()
    size = max(_example_length(e) for e in encode_preferences(tok, [fits], 99)[0]) + 1
    assert encode_preferences(tok, [fits], size) and len(encode_preferences(tok, [fits, short],
        size)) == 1
    with pytest.raises(NothingFits): encode_preferences(tok, [fits], size - 1)
    pairs = encode_preferences(tok, [fits, short, prompt], 60, report)
    assert len(pairs) == report.check().kept == 1
    assert rejected(report) == {'prompt and answer are longer than 60 tokens': 1,
                                'prompt leaves no room for an answer in 60 tokens': 1}
    assert encode_preferences(tok, [fits, short, prompt], max(needed_context(report)) + 1,
                              Report())[2:]
    with pytest.raises(NothingFits) as e: encode_preferences(tok, [short], 60)
    assert 'none of the 1 pairs fits into 60 tokens' in str(e.value) and 'context=' in str(e.value)


def test_a_report_that_counted_the_rows_is_not_counted_again(tmp_path):
    report = Report()
    file = put(tmp_path/'p.jsonl', json.dumps(GOOD) + '\n' + json.dumps(dict(GOOD, chosen='x'*99))
               + '\n')
    encode_preferences(tok, read_preferences(file, report), 64, report)
    assert (report.rows, report.kept) == (2, 1)
    report.check()


def test_a_row_too_short_is_an_error():
    parts = encode_preferences(tok, [Preference('a', 'b', 'c'*20)], 99)[0]
    with pytest.raises(UserError, match='takes 24 tokens, but a row has 20'):
        answer_batch(tok, parts, 20)
    with pytest.raises(UserError, match='no answer'): answer_batch(tok, [])
    with pytest.raises(UserError, match='takes 24 tokens, but a row has 20'):
        pair_batch(tok, [parts], context=20)
    assert pair_batch(tok, [parts], context=30).x.shape == (2, 30)
    assert pair_batch(tok, [parts], context=100).x.shape == (2, 32)


# ---- batches

PAIRS = encode_preferences(tok, [Preference(f'q{i}', f'good {i}', f'bad {i}{"!"*(i % 7)}')
                                 for i in range(23)], 99)
REF = torch.arange(46.).view(23, 2)


def rows_of(batches, step):
    return [(x[x != tok.pad].tolist(), y[y != IGNORE].tolist(), ref.item())
            for b in batches(step) for x, y, ref in zip(b.x, b.y, b.ref)]


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 30), st.sampled_from([1, 2, 4]), st.none() | st.integers(1, 9),
       st.integers(0, 50), st.integers(0, 3))
def test_ranks_and_micro_batches_read_the_same_pairs(rows, world, micro, step, seed):
    def batches(**how): return PairBatches(tok, PAIRS, REF, rows=rows, seed=seed, **how)
    one = rows_of(batches(), step)
    assert len(one) == rows//2*2
    ranks = [batches(rank=r, world=world, micro_rows=micro) for r in range(world)]
    assert [row for b in ranks for row in rows_of(b, step)] == one
    for b in ranks:
        for micro_batch in b(step):
            n = len(micro_batch.x)
            assert n % 2 == 0 and n <= max(2, micro or n)
            good, bad = micro_batch.ref[::2], micro_batch.ref[1::2]
            assert torch.equal(bad, good + 1) and torch.equal(good % 2, torch.zeros(n//2))
            for i in range(0, n, 2):  # a pair, and its own reference
                pair = PAIRS[int(good[i//2])//2]
                for j, (_, reply) in enumerate(pair):
                    y = micro_batch.y[i + j]
                    assert y[y != IGNORE].tolist() == [tok.bos, *reply, tok.eos]
        assert len(b.documents(step)) == sum(len(m.x) for m in b(step))


def test_an_epoch_reads_every_pair_once_and_the_step_alone_decides():
    batches = PairBatches(tok, PAIRS, REF, rows=4)
    stream = [row[2] for step in range(23) for row in rows_of(batches, step)]
    assert sorted(stream[:46]) == REF.flatten().tolist() and stream[:46] != sorted(stream[:46])
    assert stream[46:] != stream[:46]
    fresh = PairBatches(tok, PAIRS, REF, rows=4)
    assert rows_of(fresh, 17) == rows_of(batches, 17)
    other = PairBatches(tok, PAIRS, REF, rows=4, seed=1)
    assert rows_of(other, 0) != rows_of(batches, 0)


def test_batches_split_between_pairs():
    batch = pair_batch(tok, PAIRS[:5], REF[:5])
    for rows, sizes in {1: [2]*5, 2: [2]*5, 5: [4, 4, 2], 99: [10]}.items():
        parts = batch.split(rows)
        assert [len(b.x) for b in parts] == sizes
        for k, whole in enumerate(batch):
            assert torch.equal(torch.cat([b[k] for b in parts]), whole)
    assert pair_batch(tok, PAIRS[:2]).map(lambda t: t[:2]).ref is None


def test_impossible_batches_are_errors():
    for pairs, how, words in [
            ([], dict(rows=2), 'there is no pair'), (PAIRS, dict(rows=1), 'a pair takes two'),
            (PAIRS, dict(rows=3, world=2), 'a pair takes two'),
            (PAIRS, dict(rows=4, world=2, rank=2), 'rank 2 of 2')]:
        with pytest.raises(UserError, match=words): PairBatches(tok, pairs, **how)
    with pytest.raises(UserError, match='no pair to measure'): list(pair_eval_batches(tok, [], 4))


@pytest.mark.parametrize('rows', [1, 2, 7, 100])
def test_measuring_reads_every_pair_once_and_in_order(rows):
    found = [b for b in pair_eval_batches(tok, PAIRS, rows, REF)]
    assert torch.cat([b.ref for b in found]).tolist() == REF.flatten().tolist()
    assert all(len(b.x) <= max(2, rows) for b in found)


# ---- a run's pairs

def pair_file(path, n=60):
    rows = [dict(prompt=f'What is the number {i}?', chosen=f'It is {i}.', rejected='No.')
            for i in range(n)]
    return put(path, ''.join(json.dumps(r) + '\n' for r in rows))


def parts(folder):
    return [list(stored_preferences(folder/f'{part}.jsonl')) for part in ('train', 'valid')]


def test_a_share_is_held_out_by_prompt(tmp_path):
    twice = [dict(GOOD, prompt=f'{i}?', chosen=f'{k}') for i in range(40) for k in range(3)]
    file = put(tmp_path/'p.jsonl', ''.join(json.dumps(r) + '\n' for r in twice))
    data = DataConfig(preferences=str(file), valid_share=.3, base='model')
    write_preferences(data, CleanConfig(), 0, tmp_path/'out')
    train, valid = parts(tmp_path/'out')
    assert len(train) + len(valid) == 120 and 10 < len(valid) < 80
    assert {p.prompt for p in train}.isdisjoint(p.prompt for p in valid)
    write_preferences(data, CleanConfig(), 0, tmp_path/'again')
    assert parts(tmp_path/'again') == [train, valid]
    stamps = read_json(tmp_path/'out'/'sources.json')
    assert stamps[str(file.resolve())][2] == sha256(file)
    file.write_text(file.read_text() + '\n')
    with pytest.raises(UserError, match='has changed'): check_sources(tmp_path/'out', str(file))


def test_copies_of_held_out_prompts_leave_training(tmp_path):
    held = Preference('What is the number 3?', 'x', 'y')
    valid = put(tmp_path/'v.jsonl', json.dumps(dict(prompt='what is the number 7', chosen='a',
                                                    rejected='b')) + '\n')
    data = DataConfig(preferences=str(pair_file(tmp_path/'p.jsonl')), preferences_valid=str(valid),
                      base='model')
    write_preferences(data, CleanConfig(), 0, tmp_path/'out', held.examples()[:1])
    train, valid = parts(tmp_path/'out')
    gone = {f'What is the number {i}?' for i in range(60)} - {p.prompt for p in train}
    assert gone == {'What is the number 3?', 'What is the number 7?'} and len(valid) == 1
    reports = {r['source']: r for r in read_json(tmp_path/'out'/'report.json')}
    assert reports[data.preferences]['rejected']['copy of a held-out one'][0] == 2


def test_turns_and_extras_survive_the_disk(tmp_path):
    row = dict(LAYOUTS['conversations'](Preference('c', 'd', 'e', 's', (('a', 'b'),))), id=[1, 2])
    file = put(tmp_path/'p.jsonl', json.dumps(row) + '\n')
    data = DataConfig(preferences=str(file), base='model', valid_share=1e-9)
    write_preferences(data, CleanConfig(), 0, tmp_path/'out')
    assert parts(tmp_path/'out')[0] == list(read_preferences(file))


def test_nothing_left_is_an_error(tmp_path):
    file = str(pair_file(tmp_path/'p.jsonl', 1))
    with pytest.raises(UserError, match='copy of a held-out one'):
        write_preferences(DataConfig(preferences=file, preferences_valid=file, base='m'),
                          CleanConfig(), 0, tmp_path/'out')
    with pytest.raises(UserError, match='every pair is held out'):
        write_preferences(DataConfig(preferences=file, base='m', valid_share=.9999999),
                          CleanConfig(), 0, tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_the_first_look_names_a_file_that_holds_no_pair(tmp_path):
    file = put(tmp_path/'i.jsonl', json.dumps(dict(instruction='Who?', output='I.')) + '\n')
    data = DataConfig(preferences=str(file), base='model')
    with pytest.raises(UserError, match='no preference pair in it'): first_look(data)
    first_look(data, pairs=False)


SMALL = ['device=cpu', 'dtype=fp32', 'vocab_size=300', 'context=64', 'n_layer=1', 'n_head=1',
         'd_model=16', 'valid_share=0.2', 'tokens=1280', 'batch_tokens=640']


@pytest.fixture
def own(tmp_path):
    records = [dict(instruction=f'What is the number {i}?', output=f'{i}') for i in range(40, 90)]
    asks = put(tmp_path/'asks.jsonl', ''.join(json.dumps(r) + '\n' for r in records))
    text = put(tmp_path/'t.txt',
               ''.join(f'Line {i} says something about {i}.\n' for i in range(90)))
    def open_run(**keys):
        named = dict(text=text, instructions=asks) | keys
        return Run(load_recipe('own', [*SMALL, *(f'{k}={v}' for k, v in named.items())]),
                   tmp_path/'run')
    return open_run


def test_a_run_has_its_pairs(own, tmp_path):
    same = put(tmp_path/'v.jsonl', json.dumps(dict(instruction='what is the number 3', output='3')))
    run = own(preferences=pair_file(tmp_path/'p.jsonl'), instructions_valid=same)
    train, valid = run.preferences('train'), run.preferences('valid')
    found = {p.prompt for p in train} | {p.prompt for p in valid}
    assert {f'What is the number {i}?' for i in range(60)} - found == {'What is the number 3?'}
    assert min(len(train), len(valid)) > 3
    assert asdict(train[0]) == json.loads((tmp_path/'run/preferences/train.jsonl').open().readline()
                                          ) | dict(turns=())
    assert run.check_sources() == []
    (tmp_path/'p.jsonl').write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match=r'p\.jsonl: has changed'): run.check_sources()


def test_a_run_without_pairs_says_so(own):
    with pytest.raises(UserError, match='there are no preference pairs; set preferences='):
        own().preferences('train')


def test_pairs_may_be_named_later_but_not_others(own, tmp_path):
    run = own()
    assert run.text.exists() and run.record_folder.exists()
    (run.folder/'base').mkdir()
    own(preferences=pair_file(tmp_path/'no.jsonl'))
    run = own(preferences=pair_file(tmp_path/'p.jsonl', 30))
    assert run.data.preferences == str(tmp_path/'p.jsonl')
    assert run.preferences('train')[0].chosen.startswith('It is')
    again = own(preferences=tmp_path/'p.jsonl')
    assert again.preferences('train') == run.preferences('train')
    with pytest.raises(UserError, match='holds the run of another recipe: data.preferences'):
        own(preferences=tmp_path/'no.jsonl')
    with pytest.raises(UserError, match='another recipe'): own()


def test_a_run_from_before_there_were_pairs_goes_on(own):
    run = own()
    recipe = read_json(run.folder/'recipe.json')
    for key in ('preferences', 'preferences_valid'): del recipe['data'][key]
    (run.folder/'recipe.json').write_text(json.dumps(recipe))
    (run.folder/'base').mkdir()
    assert own().data == run.data


def test_a_key_without_its_file_is_refused():
    with pytest.raises(UserError, match='preferences_valid = v.jsonl has no effect'):
        load_recipe('own', [*SMALL, 'text=t.txt', 'preferences_valid=v.jsonl'])
