"""Packing in memory and on disk: nothing lost, doubled, or leaked from one example to the next"""
import json, os, random, signal
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from batch_tools import Bytes, assert_same
from lm_nb.core import UserError, read_json, root, sha256
from lm_nb.data.sources import Report
from lm_nb.data.instructions import (
    Example, NothingFits, _conversation_row, encode_each, encode_examples, read_instructions,
    sft_row)
from lm_nb.data.packing import (
    Packed, ReplayBatches, SFTBatches, _bins, _example_length, _pack, packed_batch, plot_rows,
    sft_eval_batches, write_packed)
from lm_nb.data.shards import IGNORE, Shards, concat_batches, write_token_shards
from lm_nb.data.tokenizer import Tokenizer


tok = Bytes(sha='ab'*32)


# ------------------------------------------------------------------ filling rows

@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=80), st.integers(40, 100))
def test_packing(lengths, size):
    rows = _pack(lengths, size)
    assert sorted(chain(*rows)) == list(range(len(lengths)))
    loads = sorted(sum(lengths[i] for i in row) for row in rows)
    assert not loads or loads[-1] <= size
    assert all(a + b > size for a, b in pairwise(loads))  # no two rows could have been one
    assert rows == _pack(list(lengths), size)


def test_packing_takes_the_tightest_place():
    assert _pack([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    assert _pack([], 10) == []
    with pytest.raises(UserError, match='11 tokens does not fit into a row of 10'):
        _pack([3, 11], 10)


def test_packing_many_is_quick_and_nearly_full():
    lengths = [(i*7919) % 211 + 5 for i in range(50_000)]
    rows = _pack(lengths, 512)
    assert len(rows) <= 1.01*sum(lengths)/512


# ------------------------------------------------------------------ batches

PAIRS = [([tok.user, *range(50, 50 + i*5 % 17 + 1)], [*range(100, 100 + i*3 % 11 + 1)])
         for i in range(45)]
rand = random.Random(3)


def some(least): return rand.choices(range(10, 262), k=rand.randint(least, 12))


def chat():
    return [part for _ in range(rand.randint(1, 4)) for part in ([tok.user, *some(1)], some(0))]


CHATS = [tuple(chat()) for _ in range(60)]


def scored(batches):
    "The answers that batches learn, in a fixed order"
    return sorted(t for b in batches for y in b.y.tolist() for t in answers(y))


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
    assert real == sum(len(p) + len(a) + 1 for p, a in PAIRS)
    assert abs(real/(40*b.steps_per_epoch) - b.filled) < 1e-6


@pytest.mark.parametrize('world,micro', [(1, 4), (2, None), (3, 1)])
def test_batches_are_the_same_for_any_number_of_ranks(world, micro):
    one = SFTBatches(tok, PAIRS, 40, rows=6, seed=5)
    many = [SFTBatches(tok, PAIRS, 40, rows=6, seed=5, rank=r, world=world, micro_rows=micro)
            for r in range(world)]
    for step in (0, 2, 100):
        assert_same(concat_batches([b for m in many for b in m(step)]), one(step)[0])


@pytest.mark.parametrize('rows', [1, 4, 1000])
def test_evaluation_asks_every_question_once(rows):
    batches = list(sft_eval_batches(tok, PAIRS, 40, rows))
    assert scored(batches) == WANT and all(len(b.x) <= rows for b in batches)


def test_a_packed_row_is_its_examples_side_by_side():
    x, y, doc = (t[0] for t in packed_batch(tok, [PAIRS[:3]], 60)[:3])
    for i, (p, a) in enumerate(PAIRS[:3]):
        length = len(p) + len(a) + 2
        alone = sft_row(p, a, bos=tok.bos, eos=tok.eos, pad=tok.pad, max_length=length)
        assert x[doc == i].tolist() == alone[0].tolist()
        assert y[doc == i].tolist() == alone[1].masked_fill(alone[2] == 0, IGNORE).tolist()
    assert (y[doc == -1] == IGNORE).all() and (x[doc == -1] == tok.pad).all()


def test_weights_go_where_their_targets_go():
    plain = packed_batch(tok, [CHATS[:2], CHATS[2:4]], 150)
    per_example = [1., -2., 0., .5]
    weighted = packed_batch(tok, [CHATS[:2], CHATS[2:4]], 150, per_example)
    assert_same(weighted._replace(weight=None), plain)
    assert weighted.weight.dtype == torch.float32 and weighted.weight.shape == plain.x.shape
    for k, w in enumerate(per_example):
        here = plain.doc[k//2] == k % 2
        assert here.any() and (weighted.weight[k//2][here] == w).all()
    assert (weighted.weight[plain.doc < 0] == 0).all()
    lengths = [_example_length(e) for e in CHATS[:4]]
    each = [torch.rand(n).numpy() for n in lengths]
    weighted = packed_batch(tok, [CHATS[:2], CHATS[2:4]], 150, each)
    for k, w in enumerate(each):
        assert weighted.weight[k//2][plain.doc[k//2] == k % 2].tolist() == w.tolist()
    rows = [(CHATS[:2], each[:2]), (CHATS[2:4], each[2:])]
    for part, (examples, w) in zip(weighted.split(1), rows, strict=True):
        assert_same(part, packed_batch(tok, [examples], 150, w))
    with pytest.raises(ValueError): packed_batch(tok, [CHATS[:2]], 150, [1.])


def test_packing_does_not_change_the_loss_of_a_step():
    from lm_nb.model.gpt import GPT, GPTConfig
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(arch='qwen3', vocab_size=262, context=40, n_layer=2, n_head=2, d_model=16,
                        zero_init=False)).eval()
    def total(**kw):
        b = SFTBatches(tok, PAIRS, 40, rows=64, **kw)
        [m] = b(0)
        logits = gpt(m.x, doc=m.doc)
        each = F.cross_entropy(logits.flatten(0, 1), m.y.flatten(), reduction='none')
        return each.view(m.y.shape)[:len(b.bins)].sum()  # the first epoch of a step that is longer
    with torch.no_grad(): packed, padded = total(), total(packed=False)
    assert torch.isclose(packed, padded, rtol=1e-5) and packed > 100


@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
def test_each_example_has_the_loss_that_it_has_alone(arch, tmp_path):
    from lm_nb.model.gpt import GPT, GPTConfig
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(arch=arch, vocab_size=262, context=120, n_layer=2, n_head=2, d_model=32,
                        zero_init=False)).eval()
    write_packed(CHATS, tok, tmp_path/'p', context=120)
    stored, alone, packed = Packed(tmp_path/'p', tok), {}, {}
    def loss(x, y, doc=None):
        logits = gpt(x[None], doc=None if doc is None else doc[None])
        return F.cross_entropy(logits[0], y, reduction='none')
    with torch.no_grad():
        for i in range(len(stored)):
            alone[i] = loss(*_conversation_row(stored[i], bos=tok.bos, eos=tok.eos)).sum()
        for row in stored.rows:
            x, y, doc = (t[0] for t in packed_batch(tok, [[stored[i] for i in row]], 120)[:3])
            each = loss(x, y, doc)
            for n, i in enumerate(row): packed[i] = each[doc == n].sum()
    assert max(len(row) for row in stored.rows) > 2
    assert sorted(packed) == sorted(alone) == list(range(len(CHATS)))
    for i in alone:
        targets = int((_conversation_row(stored[i], bos=tok.bos, eos=tok.eos)[1] != IGNORE).sum())
        assert abs(packed[i] - alone[i])/targets < 1e-5, i


def test_errors():
    with pytest.raises(UserError, match='no example'): SFTBatches(tok, [], 40, rows=2)
    with pytest.raises(UserError, match='no example'): list(sft_eval_batches(tok, [], 40, 2))
    for packed in (True, False):
        with pytest.raises(UserError, match='an example takes 4[0-9] tokens, but a row has 40'):
            SFTBatches(tok, [([1]*30, [2]*12)], 40, rows=2, packed=packed)


def test_mixing_keeps_both():
    a, b = SFTBatches(tok, PAIRS, 40, rows=4), SFTBatches(tok, PAIRS[:5], 60, rows=2, micro_rows=1)
    both = ReplayBatches(a, b)
    for step in (0, 3):
        for one, two in zip(both(step), [*a(step), *b(step)], strict=True): assert_same(one, two)
        assert both.documents(step) == [*a.documents(step), *b.documents(step)]
    assert both.steps_per_epoch == a.steps_per_epoch


def test_the_picture_tells_prompt_from_answer_from_padding():
    [b] = SFTBatches(tok, PAIRS, 40, rows=4)(0)
    picture = plot_rows(some=b).axes[0].images[0].get_array()
    assert ((picture == 2) == (b.y != IGNORE).numpy()).all()
    assert ((picture == 0) == (b.doc == -1).numpy()).all()



# ------------------------------------------------------------------ on disk

some_ids = st.integers(0, 261)
turn = st.tuples(st.lists(some_ids, min_size=1, max_size=9), st.lists(some_ids, max_size=9))
conversation = st.lists(turn, min_size=1, max_size=3).map(lambda turns: tuple(chain(*turns)))
sets = st.lists(conversation, min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(sets)
def test_what_was_stored_is_what_was_given(tmp_path_factory, examples):
    out = tmp_path_factory.mktemp('packed')/'p'
    index = write_packed(examples, tok, out, context=70)
    stored, rows = Packed(out, tok), _pack([_example_length(e) for e in examples], 70)
    given = [examples[i] for row in rows for i in row]
    assert [[part.tolist() for part in e] for e in stored] == [list(e) for e in given]
    assert [len(row) for row in stored.rows] == [len(row) for row in rows]
    assert list(chain(*stored.rows)) == list(range(len(examples)))
    assert stored.lengths.tolist() == [_example_length(e) for e in given] and stored.verify() == 4
    assert (index['examples'], index['rows']) == (len(examples), len(rows))
    assert index['answers'] == sum(len(e)//2 for e in examples)
    assert abs(index['filled'] - stored.lengths.sum()/(70*len(rows))) < 1e-6


def test_a_stored_set_gives_the_same_batches(tmp_path):
    write_packed(CHATS, tok, tmp_path/'p', context=120)
    stored = Packed(tmp_path/'p', tok)
    for world in (1, 3):
        for rank in range(world):
            how = dict(rows=7, seed=5, rank=rank, world=world, micro_rows=2)
            a, b = (SFTBatches(tok, e, 120, **how) for e in (stored, CHATS))
            assert a.filled == b.filled and a.steps_per_epoch == b.steps_per_epoch
            for step in (0, 3, 1000):
                for one, two in zip(a(step), b(step), strict=True): assert_same(one, two)
    evals = (sft_eval_batches(tok, e, 120, 4) for e in (stored, CHATS))
    for one, two in zip(*evals, strict=True): assert_same(one, two)


def test_another_row_length_is_arranged_anew(tmp_path):
    write_packed(CHATS, tok, tmp_path/'p', context=120)
    stored = Packed(tmp_path/'p', tok)
    rows, _ = _bins(stored, 300)
    assert sorted(chain(*rows)) == list(range(len(CHATS))) and len(rows) < len(stored.rows)
    with pytest.raises(UserError, match='an example takes'): _bins(stored, 30)


def test_written_twice_it_is_the_same_to_the_byte(tmp_path):
    examples = [Example(f'question {i}', 'answer '*(i % 7 + 1), system='s'*(i % 3),
                        turns=(('a', 'b'),)*(i % 2)) for i in range(3000)]
    index = write_packed(iter(examples), tok, tmp_path/'a', 256, report := Report())
    assert write_packed(encode_each(tok, examples, 257), tok, tmp_path/'b', 256) == index
    assert read_json(tmp_path/'b'/'index.json') == index
    assert (report.rows, report.kept, index['examples']) == (3000, 3000, 3000)
    for p in (tmp_path/'a').iterdir(): assert p.read_bytes() == (tmp_path/'b'/p.name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'b']


@pytest.mark.parametrize('at', [1, 1500, 3000])
def test_killed_it_leaves_nothing_that_looks_whole(tmp_path, at):
    def source(kill):
        for i in range(3000):
            if kill and i == at - 1: os.kill(os.getpid(), signal.SIGKILL)
            yield CHATS[i % len(CHATS)]
    if not (child := os.fork()): write_packed(source(True), tok, tmp_path/'p', 120), os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and not (tmp_path/'p').exists()
    one, two = (write_packed(source(False), tok, tmp_path/name, 120) for name in ('p', 'whole'))
    assert one == two
    for p in (tmp_path/'p').iterdir():
        assert p.read_bytes() == (tmp_path/'whole'/p.name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['p', 'whole']


@pytest.mark.parametrize('name', ['tokens.bin', 'parts.bin', 'examples.bin', 'rows.bin'])
@pytest.mark.parametrize('damage', ['flip', 'cut', 'gone'])
def test_damage_is_named(tmp_path, name, damage):
    write_packed(CHATS, tok, tmp_path/'p', context=120)
    file = tmp_path/'p'/name
    raw = bytearray(file.read_bytes())
    if damage == 'gone': file.unlink()
    elif damage == 'cut': file.write_bytes(raw[:-2])
    else: raw[len(raw)//2] ^= 4; file.write_bytes(raw)
    with pytest.raises(UserError, match=name): Packed(tmp_path/'p', tok).verify()


def test_what_is_no_packed_set_is_refused(tmp_path):
    real = Tokenizer.train(['some text', 'more of it'], 290, kind='bpe')
    write_token_shards(['some text', 'more of it'], real, tmp_path/'shards')
    write_packed([Example('q', 'a')], real, tmp_path/'packed', 20)
    with pytest.raises(UserError, match='not an index of packed examples'):
        Packed(tmp_path/'shards', real)
    with pytest.raises(UserError, match='not an index of token shards'):
        Shards(tmp_path/'packed', real)
    with pytest.raises(UserError, match='another tokenizer'): Packed(tmp_path/'packed', tok)
    with pytest.raises(UserError, match='no such folder'): Packed(tmp_path/'nowhere')
    with pytest.raises(UserError, match='no such file'): Packed(tmp_path)
    with pytest.raises(UserError, match='exists already'):
        write_packed([Example('q', 'a')], real, tmp_path/'packed', 20)
    long = [Example('q'*99, 'a'), Example('q', 'a'*30)]
    for bad, why in [([], ''), (long, ': prompt leaves no room for an answer in 21 tokens (1), prompt '
                                'and answer are longer than 21 tokens (1); context=128 would keep all')]:
        with pytest.raises(NothingFits) as e: write_packed(bad, tok, tmp_path/'bad', 20)
        none = 'there is no example to write that fits into 20 tokens'
        assert str(e.value) == f'{tmp_path/"bad"}: {none}{why}' and isinstance(e.value, UserError)
    for bad, why in [
            (([5], [262]), 'outside the vocabulary'), (([5], [-1]), 'outside the vocabulary'),
            (([5],), 'a question without its answer'),
            (([7]*20, [8]), 'does not fit into a row of 20')]:
        with pytest.raises(UserError, match=why): write_packed([bad], tok, tmp_path/'bad', 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['packed', 'shards']


junk = st.one_of(st.none(), st.integers(-2**70, 2**70), st.text(max_size=3), st.just([]),
                 st.just({}), st.just(dict(bytes=0, sha256='')), st.just('<u4'), st.floats())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whoever_had_the_index_in_hand_gets_one_line_or_what_was_written(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()/'edited'
    if not folder.exists(): write_packed(CHATS, tok, folder, context=120)
    index, where = read_json(folder/'index.json'), []
    before = [[part.tolist() for part in e] for e in Packed(folder, tok)]
    at = index
    while isinstance(at, dict) and at and (not where or data.draw(st.booleans())):
        where.append((at, data.draw(st.sampled_from(sorted(at)))))
        at = at[where[-1][1]]
    inside, key = where[-1]
    old = inside[key]
    if data.draw(st.booleans()): del inside[key]
    else: inside[key] = data.draw(junk)
    try:
        (folder/'index.json').write_text(json.dumps(index), encoding='utf-8')
        stored = Packed(folder, tok)
        assert [[part.tolist() for part in e] for e in stored] == before
        assert scored(sft_eval_batches(tok, stored, 120, 4)) == scored(
            sft_eval_batches(tok, CHATS, 120, 4))
    except UserError as e: assert '\n' not in str(e)
    finally:
        inside[key] = old
        (folder/'index.json').write_text(json.dumps(index), encoding='utf-8')


def test_another_tokenizer_is_said_in_one_line_whatever_the_index_holds(tmp_path):
    index = write_packed(CHATS, tok, tmp_path/'p', context=120)
    (tmp_path/'p'/'index.json').write_text(json.dumps({**index, 'tokenizer': '\n'}))
    with pytest.raises(UserError, match='written with another tokenizer') as e:
        Packed(tmp_path/'p', tok)
    assert '\n' not in str(e.value)


def test_packed_examples_of_an_older_version_are_refused(tmp_path):
    "They are whole, and their conversations begin without `bos`"
    index = write_packed(CHATS, tok, tmp_path/'p', context=120)
    (tmp_path/'p'/'index.json').write_text(json.dumps({**index, 'version': 1}))
    for asked in tok, None:
        with pytest.raises(UserError, match='not an index of packed examples of version 2') as e:
            Packed(tmp_path/'p', asked)
        assert f'{tmp_path}/p/index.json' in str(e.value) and 'write them again' in str(e.value)
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('edit', [dict(context=60), dict(dtype='<u4'), dict(vocab_size=100)])
def test_an_edited_index_trains_on_nothing(tmp_path, edit):
    index = write_packed(CHATS, tok, tmp_path/'p', context=120)
    (tmp_path/'p'/'index.json').write_text(json.dumps({**index, **edit}))
    with pytest.raises(UserError, match='index does not fit its files|beyond the vocabulary'):
        list(Packed(tmp_path/'p', tok))


# ------------------------------------------------------------------ what is read and not learned

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.booleans(), max_size=3), st.integers(0, 9)), min_size=1,
                max_size=9))
def test_what_is_not_learned_is_no_target_in_memory_on_disk_and_in_validation(tmp_path_factory, marks):
    examples = [Example('ask', 'x'*n + str(i), turns=tuple((f'q{k}', f'no {k}') for k in range(len(m))),
                        learned=tuple(m)) for i, (m, n) in enumerate(marks)]
    out = tmp_path_factory.mktemp('marked')/'p'
    index = write_packed(examples, tok, out, context=120)
    want = [a for e in examples for a in [*(a for (_, a), yes in zip(e.turns, e.learned) if yes), e.answer]]
    want = sorted((tok.bos, *ids, tok.eos) for ids in tok.encode_batch(want))
    stored, listed = Packed(out, tok), encode_examples(tok, examples, 121)
    plain = encode_examples(tok, [replace(e, learned=()) for e in examples], 121)
    for batches in (sft_eval_batches(tok, stored, 120, 4), sft_eval_batches(tok, listed, 120, 4)):
        assert scored(batches) == want
    a, b = (SFTBatches(tok, e, 120, rows=2) for e in (stored, plain))
    for step in range(a.steps_per_epoch):
        for one, two in zip(a(step), b(step), strict=True):
            assert_same(one._replace(y=two.y), two)  # what is read is the same
    assert index['answers'] == len(want) and index['examples'] == len(examples)


def test_an_id_beyond_the_vocabulary_is_named_when_read(tmp_path):
    write_packed(CHATS, tok, tmp_path/'p', context=120)
    stored = Packed(tmp_path/'p', tok)
    np.memmap(tmp_path/'p'/'tokens.bin', '<u2', 'r+')[:] = 262  # while it is open
    with pytest.raises(UserError, match='tokens.bin: holds an id beyond the vocabulary'): stored[0]


def test_memory_grows_with_the_number_of_examples_and_not_with_their_length(tmp_path):
    import tracemalloc
    def source():
        for i in range(4000): yield Example(f'q{i}', 'long answer '*300)
    tracemalloc.start()
    write_packed(source(), tok, tmp_path/'p', 4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path/'p'/'tokens.bin').stat().st_size > 25e6 and peak < 60e6, peak


# ------------------------------------------------------------------ a real set

def test_alpaca_fills_its_rows(tmp_path):
    file = root().parent/'shared'/'data'/'alpaca_zh_demo.json'
    if not file.exists(): pytest.skip(f'needs the instruction set {file}')
    examples = list(read_instructions(file))
    real = Tokenizer.train([f'{e.prompt}\n{e.answer}' for e in examples], 4096, kind='bpe')
    index = write_packed(examples, real, tmp_path/'p', 1024, report := Report())
    assert index['filled'] >= .98 and index['examples'] == report.kept and report.rows == 1000
    stored = Packed(tmp_path/'p', real)
    batches = SFTBatches(real, stored, 1024, rows=1)
    epoch = [b for step in range(batches.steps_per_epoch) for b in batches(step)]
    targets = sum(int((b.y != IGNORE).sum()) for b in epoch)
    assert targets == sum(len(a) + 2 for _, a in encode_examples(real, examples, 1025))
    assert sum(int((b.doc >= 0).sum()) for b in epoch)/(1024*len(epoch)) >= .98


def test_the_same_examples_give_the_same_files(tmp_path):
    write_packed([pair*(1 + i % 3) for i, pair in enumerate(PAIRS)], tok, tmp_path/'p', context=120)
    assert {p.name: sha256(p)[:16] for p in (tmp_path/'p').iterdir()} == {
        'examples.bin': 'f05f1919ef8c4f1a', 'index.json': 'f9a6a678f10847b4',
        'parts.bin': '7596d949ee467a17', 'rows.bin': 'b0b0554047b6c86c',
        'tokens.bin': 'ac635b4416af4f0f'}
