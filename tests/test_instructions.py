"""Rows, packing and reading of instructions under every length and every make of record"""
import csv, json
from itertools import chain, pairwise

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from lm_nb.core import UserError, root
from lm_nb.corpus import Report
from lm_nb.instructions import (Example, MixedBatches, SFTBatches, encode_examples, pack, packed_row, plot_rows, prompt_ids, prompt_text,
                                read_instructions, sft_eval_batches, sft_row, to_examples)
from lm_nb.shards import IGNORE

VECTORS = dict(bos=8, eos=16, pad=0, max_length=16)
ids = st.lists(st.integers(0, 20), max_size=30)


class Bytes:
    "A tokenizer of bytes: id = byte + 6"
    pad, unk, bos, eos, system, user = range(6)
    def __len__(self): return 262
    def encode(self, text): return [b + 6 for b in text.encode()]
    def encode_batch(self, texts): return [self.encode(t) for t in texts]
    def decode(self, ids): return bytes(i - 6 for i in ids if i >= 6).decode()


tok = Bytes()


# ------------------------------------------------------------------ one row

@pytest.mark.parametrize('answer,x,y,mask', [
    (range(9, 16), [*range(1, 16)], [*range(2, 17)], [0]*6 + [1]*9),
    (range(9, 14), [*range(1, 14), 16, 0], [*range(2, 14), 16, 0, 0], [0]*6 + [1]*7 + [0]*2)])
def test_worked_examples(answer, x, y, mask):
    got = sft_row(list(range(1, 8)), list(answer), **VECTORS)
    assert [t.tolist() for t in got] == [x, y, mask]
    assert all(t.dtype == torch.int64 for t in got)


@settings(max_examples=400, deadline=None)
@given(ids.filter(len), ids, st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.integers(3, 70))
def test_any_row(prompt, answer, bos, eos, pad, max_length):
    # ids are drawn from a range so small that bos, eos and pad collide with each other and with the text all the time
    if len(prompt) + 2 > max_length:
        with pytest.raises(UserError, match='leaves no room'): sft_row(prompt, answer, bos=bos, eos=eos, pad=pad, max_length=max_length)
        return
    x, y, mask = sft_row(prompt, answer, bos=bos, eos=eos, pad=pad, max_length=max_length)
    room = max_length - len(prompt)
    assert len(x) == len(y) == len(mask) == max_length - 1
    assert y[mask.bool()].tolist() == [bos, *answer, eos][:room]
    assert mask.sum() == min(len(answer) + 2, room)
    assert x[1:].tolist() == y[:-1].tolist()
    assert x.tolist()[:len(prompt) + 1] == [*prompt, bos]
    start = len(prompt) - 1
    assert mask.tolist() == [0]*start + [1]*int(mask.sum()) + [0]*(max_length - 1 - start - int(mask.sum()))
    assert (y[start + int(mask.sum()):] == pad).all()


@pytest.mark.parametrize('n', [126, 127, 128, 129, 130, 200])
def test_a_part_over_the_limit_loses_no_more_than_it_must(n):
    _, y, mask = sft_row([1], [5]*n, bos=8, eos=16, pad=0, max_length=130)
    assert (y[mask.bool()] == 5).sum() == min(n, 128)


def test_a_whole_over_the_limit_keeps_its_length():
    rows = [sft_row([1]*7, [5]*n, **VECTORS) for n in range(60)]
    assert {tuple(map(len, row)) for row in rows} == {(15, 15, 15)}
    assert all(row[2].sum() == min(n + 2, 9) for n, row in enumerate(rows))


def test_a_bos_in_the_prompt_is_nothing_special():
    _, y, mask = sft_row([8, 1, 8, 2], [9, 10], **VECTORS)
    assert y[mask.bool()].tolist() == [8, 9, 10, 16]


def test_only_a_whole_answer_gets_eos():
    for n in range(1, 20):
        _, y, mask = sft_row([1]*7, [5]*n, **VECTORS)
        assert (16 in y.tolist()) == (n <= 7)


@pytest.mark.parametrize('pad', [0, 16, 8, 5])
def test_padding_is_known_by_position(pad):
    _, y, mask = sft_row([1]*7, [5, 0, 5], **{**VECTORS, 'pad': pad})
    assert y[mask.bool()].tolist() == [8, 5, 0, 5, 16]


def test_instruction_and_input_stay_apart():
    assert prompt_text('ab', 'c') != prompt_text('a', 'bc')
    assert prompt_text(' ab\n', ' \n') == 'ab' and prompt_text('ab', 'c\nd') == 'ab\nc\nd'


def test_the_longest_prompt_that_leaves_room():
    x, y, mask = sft_row(list(range(1, 15)), [9, 9], **{**VECTORS, 'bos': 20})
    assert y[mask.bool()].tolist() == [20, 9]
    with pytest.raises(UserError, match='a prompt of 15 tokens leaves no room for an answer in a row of 16'): sft_row([1]*15, [9], **VECTORS)


def test_a_row_without_an_answer_still_ends():
    _, y, mask = sft_row([1, 2], [], **VECTORS)
    assert y[mask.bool()].tolist() == [8, 16]


def test_roles():
    assert prompt_ids(tok, 'hi') == [tok.user, *tok.encode('hi')]
    assert prompt_ids(tok, 'hi', 'you') == [tok.system, *tok.encode('you'), tok.user, *tok.encode('hi')]


# ------------------------------------------------------------------ reading

def test_every_format():
    want = ('translate\nhello', '你好')
    for r in [dict(instruction='translate', input='hello', output='你好'), dict(instruction='translate', context='hello', response='你好'),
              dict(input='translate\nhello', target='你好'), dict(prompt='translate\nhello', answer='你好'), dict(prompt='translate\nhello', completion='你好'),
              dict(question='translate', context='hello', answer='你好'), dict(instruction='translate', instances=[dict(input='hello', output='你好')])]:
        [e] = to_examples(r)
        assert (e.prompt, e.answer) == want


def test_nothing_of_a_record_is_lost():
    [e] = to_examples(dict(instruction='i', input='', output='o', system='s', task='t', entity='e', wording='seen'))
    assert e == Example('i', 'o', 's', 't', dict(entity='e', wording='seen'))
    assert [e.answer for e in to_examples(dict(instruction='i', id=7, instances=[dict(input='a', output='1'), dict(input='b', output=2)]))] == ['1', '2']


@pytest.mark.parametrize('record,why', [
    (dict(instruction='i'), 'among the fields instruction'), (dict(conversations=[], chosen={}), 'among the fields chosen, conversations'),
    ({}, 'among the fields'),
    (dict(instruction='', output='o'), 'instruction is empty'), (dict(instruction='i', output='\n'), 'output is empty'),
    (dict(instruction='i', output=None), 'output is empty'),
    (dict(instruction='i', output=['o']), 'output is not text but a list'), (dict(prompt={}, answer='a'), 'prompt is not text'),
    (dict(instruction='i', instances=['o']), 'among the fields instruction')])
def test_what_is_no_example_says_why(record, why):
    with pytest.raises(UserError, match=why): to_examples(record)


RECORDS = [dict(instruction=f'question {i}', input='', output='' if i % 5 == 0 else f'answer {i}') for i in range(20)]

@pytest.mark.parametrize('kind', ['json', 'jsonl', 'csv'])
def test_files_of_every_kind(tmp_path, kind):
    file = tmp_path/f'set.{kind}'
    if kind == 'json': file.write_text(json.dumps(RECORDS))
    elif kind == 'jsonl': file.write_text('\n'.join(map(json.dumps, RECORDS)))
    else:
        with open(file, 'w', newline='') as f: (w := csv.DictWriter(f, RECORDS[0])).writeheader(), w.writerows(RECORDS)
    report = Report()
    got = list(read_instructions(file, report))
    assert [e.answer for e in got] == [r['output'] for r in RECORDS if r['output']]
    assert (report.rows, report.kept, report.rejected['output is empty'][0]) == (20, 16, 4)


def test_several_sources_and_several_instances_are_counted(tmp_path):
    (tmp_path/'a.jsonl').write_text(json.dumps(dict(instruction='i', instances=[dict(input=str(k), output='o') for k in range(3)])))
    (tmp_path/'b.jsonl').write_text(json.dumps(dict(prompt='p', answer='a')) + '\n' + json.dumps(dict(prompt='p')))
    report = Report()
    assert len(list(read_instructions([tmp_path/'a.jsonl', tmp_path/'b.jsonl'], report))) == 4
    assert (report.rows, report.kept, sum(n for n, _ in report.rejected.values())) == (5, 4, 1)


def test_a_source_without_instructions_says_what_it_has(tmp_path):
    (tmp_path/'text.jsonl').write_text(json.dumps(dict(text='no question here')))
    with pytest.raises(UserError, match='text.jsonl: no instruction to learn from: .* among the fields text'):
        list(read_instructions(tmp_path/'text.jsonl'))


# ------------------------------------------------------------------ encoding and packing

@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=12).filter(str.strip), st.text(max_size=12), st.sampled_from(['', 'be brief'])), min_size=1, max_size=12),
       st.integers(8, 50))
def test_encoding_keeps_or_counts(rows, max_length):
    examples, report = [Example(*row) for row in rows], Report()
    whole = [prompt_ids(tok, e.prompt, e.system) + [tok.bos, *tok.encode(e.answer), tok.eos] for e in examples]
    if all(len(w) > max_length for w in whole):
        with pytest.raises(UserError, match='none of the'): encode_examples(tok, examples, max_length, report)
        return
    pairs = encode_examples(tok, iter(examples), max_length, report)
    assert [[*p, tok.bos, *a, tok.eos] for p, a in pairs] == [w for w in whole if len(w) <= max_length]
    assert report.rows == len(rows) and report.kept == len(pairs) and sum(n for n, _ in report.rejected.values()) == len(rows) - len(pairs)


def test_a_report_that_came_along_is_carried_on(tmp_path):
    (tmp_path/'a.jsonl').write_text('\n'.join(map(json.dumps, RECORDS + [dict(instruction='x'*99, output='y')])))
    report = Report()
    pairs = encode_examples(tok, read_instructions(tmp_path/'a.jsonl', report), 40, report)
    assert (report.rows, report.kept, len(pairs)) == (21, 16, 16)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=80), st.integers(40, 100))
def test_packing(lengths, size):
    rows = pack(lengths, size)
    assert sorted(chain(*rows)) == list(range(len(lengths)))
    loads = sorted(sum(lengths[i] for i in row) for row in rows)
    assert not loads or loads[-1] <= size
    assert all(a + b > size for a, b in pairwise(loads))  # no two rows could have been one
    assert rows == pack(list(lengths), size)


def test_packing_takes_the_tightest_place():
    assert pack([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    assert pack([], 10) == []
    with pytest.raises(UserError, match='11 tokens does not fit into a row of 10'): pack([3, 11], 10)


def test_packing_many_is_quick_and_nearly_full():
    lengths = [(i*7919) % 211 + 5 for i in range(50_000)]
    rows = pack(lengths, 512)
    assert len(rows) <= 1.01*sum(lengths)/512


# ------------------------------------------------------------------ batches

PAIRS = [([tok.user, *range(50, 50 + i*5 % 17 + 1)], [*range(100, 100 + i*3 % 11 + 1)]) for i in range(45)]
def scored(batches): return sorted(t for b in batches for row, y in zip(b.x.tolist(), b.y.tolist()) for t in answers(y))
def answers(y):
    "The scored stretches of a row of targets"
    out, run = [], []
    for t in [*y, IGNORE]:
        if t != IGNORE: run.append(t)
        elif run: out, run = [*out, tuple(run)], []
    return out
WANT = sorted((tok.bos, *a, tok.eos) for _, a in PAIRS)


@pytest.mark.parametrize('packed', [True, False])
def test_an_epoch_asks_every_question_once(packed):
    b = SFTBatches(tok, PAIRS, context=40, rows=1, packed=packed)
    steps = [b(s)[0] for s in range(2*b.steps_per_epoch)]
    assert scored(steps[:b.steps_per_epoch]) == scored(steps[b.steps_per_epoch:]) == WANT
    assert b.steps_per_epoch == len(PAIRS) or packed
    real = sum((s.doc >= 0).sum() for s in steps[:b.steps_per_epoch])
    assert real == sum(len(p) + len(a) + 1 for p, a in PAIRS) and abs(real/(40*b.steps_per_epoch) - b.filled) < 1e-6


@pytest.mark.parametrize('world,micro', [(1, 4), (2, None), (3, 1)])
def test_batches_are_the_same_for_any_number_of_ranks(world, micro):
    one = SFTBatches(tok, PAIRS, 40, rows=6, seed=5)
    many = [SFTBatches(tok, PAIRS, 40, 6, 5, r, world, micro) for r in range(world)]
    for step in (0, 2, 100):
        for whole, parts in zip(one(step)[0], zip(*(b for m in many for b in m(step)))): assert (whole == torch.cat(parts)).all()


@pytest.mark.parametrize('rows', [1, 4, 1000])
def test_evaluation_asks_every_question_once(rows):
    batches = list(sft_eval_batches(tok, PAIRS, 40, rows))
    assert scored(batches) == WANT and all(len(b.x) <= rows for b in batches)


def test_a_packed_row_is_its_examples_side_by_side():
    x, y, doc = packed_row(tok, PAIRS[:3], 60)
    for i, (p, a) in enumerate(PAIRS[:3]):
        single = sft_row(p, a, bos=tok.bos, eos=tok.eos, pad=tok.pad, max_length=len(p) + len(a) + 2)
        assert x[doc == i].tolist() == single[0].tolist()
        assert y[doc == i].tolist() == [t if m else IGNORE for t, m in zip(single[1].tolist(), single[2].tolist())]
    assert (y[doc == -1] == IGNORE).all() and (x[doc == -1] == tok.pad).all()


def test_packing_does_not_change_the_loss():
    from lm_nb.model import GPT, GPTConfig
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(arch='qwen3', vocab_size=262, context=40, n_layer=2, n_head=2, d_model=16, zero_init=False)).eval()
    def total(**kw):
        b = SFTBatches(tok, PAIRS, 40, rows=64, **kw)
        sums = [F.cross_entropy(gpt(m.x, doc=m.doc).flatten(0, 1), m.y.flatten(), reduction='none').view(m.y.shape) for m in b(0)]
        return sum(s[:len(b.rows)].sum() for s in sums)  # the first epoch of a step that is longer than one
    with torch.no_grad(): packed, padded = total(), total(packed=False)
    assert torch.isclose(packed, padded, rtol=1e-5) and packed > 100


def test_errors():
    with pytest.raises(UserError, match='no example'): SFTBatches(tok, [], 40, 2)
    with pytest.raises(UserError, match='no example'): list(sft_eval_batches(tok, [], 40, 2))
    for packed in (True, False):
        with pytest.raises(UserError, match='an example takes 4[0-9] tokens, but a row has 40'): SFTBatches(tok, [([1]*30, [2]*12)], 40, 2, packed=packed)


def test_mixing_keeps_both():
    a, b = SFTBatches(tok, PAIRS, 40, 4), SFTBatches(tok, PAIRS[:5], 60, 2, micro_rows=1)
    mixed = MixedBatches(a, b)
    for step in (0, 3): assert [m.x.tolist() for m in mixed(step)] == [m.x.tolist() for m in [*a(step), *b(step)]]
    assert mixed.steps_per_epoch == a.steps_per_epoch


def test_the_picture_tells_prompt_from_answer_from_padding():
    [b] = SFTBatches(tok, PAIRS, 40, rows=4)(0)
    picture = plot_rows(some=b).axes[0].images[0].get_array()
    assert ((picture == 2) == (b.y != IGNORE).numpy()).all() and ((picture == 0) == (b.doc == -1).numpy()).all()


# ------------------------------------------------------------------ real sets

@pytest.mark.parametrize('name,rows', [('alpaca_zh_demo.json', 1000), ('belle_zh_seed_tasks.jsonl', 175)])
def test_real_sets_are_read_whole(name, rows):
    file = root().parent/'shared'/'data'/name
    if not file.exists(): pytest.skip(f'needs the instruction set {file}')
    report = Report()
    examples = list(read_instructions(file, report))
    assert report.rows == report.kept + sum(n for n, _ in report.rejected.values())
    assert len(examples) == report.kept and report.rows == rows and report.kept >= .98*rows
    pairs = encode_examples(tok, examples, 1500, report)
    batches = list(sft_eval_batches(tok, pairs, 1500, 16))
    assert sum((b.y != IGNORE).sum() for b in batches) == sum(len(a) + 2 for _, a in pairs)


def test_preference_pairs_are_refused_with_their_fields():
    file = root().parent/'shared'/'data'/'dpo_zh_demo.json'
    if not file.exists(): pytest.skip(f'needs the preference set {file}')
    with pytest.raises(UserError, match='among the fields chosen, conversations, rejected'): list(read_instructions(file))
