"""Shards under hostile files, odd sizes and many ranks"""
import json, tracemalloc
from itertools import chain

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

from lm_nb.core import UserError, root
from lm_nb.shards import IGNORE, Order, PretrainBatches, Shards, eval_batches, permute, pretrain_pair, sample_at, verify, write_shards


class Bytes:
    "A tokenizer of bytes: id = byte + 6. `vocab` larger than needed asks for wider files"
    pad, unk, bos, eos, system, user = range(6)
    def __init__(self, vocab=262, sha='a'*64): self.vocab, self.sha256 = vocab, sha
    def __len__(self): return self.vocab
    def encode_batch(self, texts): return [[b + 6 + (self.vocab - 262) for b in t.encode()] for t in texts]
    def decode(self, ids): return bytes(i - 6 - (self.vocab - 262) for i in ids if i >= 6).decode()


tok = Bytes()
texts = st.lists(st.text(max_size=30), min_size=1, max_size=12).filter(any)


def flat(docs, tok=tok): return [i for ids in tok.encode_batch(docs) if ids for i in (*ids, tok.eos)]


@pytest.fixture
def shards(tmp_path):
    write_shards([f'document {i} ' + 'x'*(i*7 % 40) for i in range(50)], tok, tmp_path/'s', shard_tokens=300)
    return Shards(tmp_path/'s', tok)


# ------------------------------------------------------------------ writing and reading

@settings(max_examples=20, deadline=None)
@given(texts, st.integers(1, 80))
def test_any_documents_come_back(tmp_path_factory, docs, shard_tokens):
    path = tmp_path_factory.mktemp('shards')/'s'
    index = write_shards(iter(docs), tok, path, shard_tokens)
    s, want = Shards(path, tok), flat(docs)
    assert s.tokens(0, len(s)).tolist() == want
    assert (len(s), s.n_docs, s.text_bytes) == (len(want), sum(map(bool, docs)), sum(len(d.encode()) for d in docs))
    for k in range(len(s.files)):  # every shard but the last is full, and only its last document made it so
        ends = s.offsets[k]
        assert ends[0] == 0 and ends[-1] == len(s.files[k]) and (s.files[k][ends[1:] - 1] == tok.eos).all()
        assert ends[-2] < shard_tokens and (ends[-1] >= shard_tokens or k == len(s.files) - 1)
    assert index['tokens'] == len(want) and verify(s) == 2*len(s.files)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_range_of_tokens(tmp_path_factory, data):
    path = tmp_path_factory.mktemp('shards')/'s'
    docs = ['ab', 'c', 'defg', 'h'*9]
    write_shards(docs, tok, path, shard_tokens=4)
    s, want = Shards(path), flat(docs)
    a = data.draw(st.integers(0, len(want)))
    b = data.draw(st.integers(a, len(want)))
    got = s.tokens(a, b)
    assert got.tolist() == want[a:b] and got.dtype == np.int64


@pytest.mark.parametrize('vocab,dtype,width', [(2**16, '<u2', 2), (2**16 + 1, '<u4', 4)])
def test_width_follows_the_vocabulary(tmp_path, vocab, dtype, width):
    wide = Bytes(vocab)
    index = write_shards(['abc'], wide, tmp_path/'s')
    assert index['dtype'] == dtype and (tmp_path/'s'/'shard-00000.bin').stat().st_size == 4*width
    s = Shards(tmp_path/'s', wide)
    assert s.tokens(0, 4).tolist() == flat(['abc'], wide) and max(s.tokens(0, 4)) > 2**15


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    def peak(n, name):
        tracemalloc.start()
        write_shards(('x'*10_000 for _ in range(n)), tok, tmp_path/name)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top
    assert peak(800, 'large') < 1.3*peak(200, 'small')  # 8 MB and 2 MB, in batches of 1 MB


def test_a_failing_source_leaves_nothing(tmp_path):
    def docs():
        yield 'fine'*1000
        raise RuntimeError('the disk went away')
    with pytest.raises(RuntimeError): write_shards(docs(), tok, tmp_path/'s', shard_tokens=100)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(tmp_path):
    write_shards(['old'], tok, tmp_path/'s')
    with pytest.raises(UserError, match='exists already'): write_shards(['new'], tok, tmp_path/'s')
    s = Shards(tmp_path/'s', tok)
    assert tok.decode(s.tokens(0, len(s))) == 'old'


def test_a_tokenizer_beyond_its_vocabulary(tmp_path):
    class Liar(Bytes):
        def __len__(self): return 50
    with pytest.raises(UserError, match='outside its vocabulary of 50'): write_shards(['abc'], Liar(), tmp_path/'s')
    assert not (tmp_path/'s').exists()


# ------------------------------------------------------------------ damage

def edit(path, **changes):
    index = json.loads((path/'index.json').read_text())
    (path/'index.json').write_text(json.dumps({**index, **changes}))


@pytest.mark.parametrize('name', ['shard-00001.bin', 'shard-00000.doc'])
def test_cut_grown_and_missing_files_are_named(shards, name):
    file = shards.path/name
    whole = file.read_bytes()
    for content in (whole[:-1], whole[:-2], whole + b'\0\0', b''):
        file.write_bytes(content)
        with pytest.raises(UserError, match=name): Shards(shards.path, tok)
    file.unlink()
    with pytest.raises(UserError, match=name): Shards(shards.path, tok)
    file.write_bytes(whole)
    assert len(Shards(shards.path, tok)) == len(shards)


def test_an_id_beyond_the_vocabulary_is_named(shards):
    file = shards.path/'shard-00001.bin'
    ids = np.fromfile(file, '<u2')
    ids[3] = 60000
    ids.tofile(file)
    s = Shards(shards.path, tok)
    with pytest.raises(UserError, match='shard-00001.bin: holds the id 60000'): s.tokens(0, len(s))
    assert s.tokens(0, int(s.starts[1])).max() < len(tok)


@pytest.mark.parametrize('suffix', ['.bin', '.doc'])
def test_a_flipped_bit_is_found_by_verify(shards, suffix):
    file = shards.path/f'shard-00001{suffix}'
    raw = bytearray(file.read_bytes())
    raw[10] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match=file.name): verify(Shards(shards.path, tok))


@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '{}', '{"version": 2}', '{"version": 1, "shards": []}',
                                  '{"version": 1, "special": {}, "tokenizer": "", "vocab_size": 3, "shards": [{}]}'])
def test_an_index_that_is_none(shards, text):
    (shards.path/'index.json').write_text(text)
    with pytest.raises(UserError, match='index.json'): Shards(shards.path, tok)


def test_a_foreign_tokenizer(shards):
    with pytest.raises(UserError, match='another tokenizer'): Shards(shards.path, Bytes(sha='b'*64))
    with pytest.raises(UserError, match='no such folder'): Shards(shards.path/'deeper')


# ------------------------------------------------------------------ the order

@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(-2**70, 2**70))
def test_permute_is_a_bijection(n, key):
    out = permute(np.arange(n), n, key)
    assert (np.sort(out) == np.arange(n)).all()
    assert permute(n - 1, n, key) == out[-1] and isinstance(permute(0, n, key), int)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**60), st.integers(0, 2**64 - 1), st.data())
def test_permute_of_large_ranges(n, key, data):
    i = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=20))))
    out = permute(i, n, key)
    assert len(set(out.tolist())) == len(i) and 0 <= out.min() and out.max() < n
    assert (permute(i.reshape(1, -1), n, key) == out).all()


@pytest.mark.parametrize('i,n', [(-1, 5), (5, 5), ([], 5), (0, 0)])
def test_permute_outside_its_range(i, n):
    with pytest.raises(UserError, match='range'): permute(i, n, 0)


@pytest.mark.parametrize('n', [5, 8, 17])
def test_every_sample_is_equally_likely_everywhere(n):
    trials = 150*n
    counts = np.zeros((n, n))
    for key in range(trials): counts[np.arange(n), permute(np.arange(n), n, key)] += 1
    expected = trials/n
    chi2 = ((counts - expected)**2/expected).sum()
    free = (n - 1)**2
    assert abs(chi2 - free) < 5*(2*free)**.5


def test_neighbours_do_not_stay_neighbours():
    order = permute(np.arange(20000), 20000, 11).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < .03
    assert abs(np.corrcoef(np.arange(20000), order)[0, 1]) < .03


def test_epochs_and_seeds_have_orders_of_their_own():
    n = 500
    runs = {seed: sample_at(np.arange(3*n), n, seed).reshape(3, n) for seed in range(-1, 4)}
    orders = [tuple(epoch) for run in runs.values() for epoch in run]
    assert len(set(orders)) == len(orders)
    assert all(sorted(o) == list(range(n)) for o in orders)
    assert max((np.array(a) == np.array(b)).sum() for i, a in enumerate(orders) for b in orders[:i]) < 15


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(1, 30), st.integers(0, 2**40), st.integers(0, 10**9))
def test_ranks_partition_a_step(n, share, world, micro, seed, step):
    rows = share*world
    whole = np.concatenate(Order(n, rows, seed)(step))
    parts = [Order(n, rows, seed, r, world, micro)(step) for r in range(world)]
    assert np.concatenate(list(chain(*parts))).tolist() == whole.tolist()
    assert len({tuple(map(len, p)) for p in parts}) == 1  # as many micro-batches of the same sizes on every rank
    assert max(map(len, parts[0])) <= micro and len(whole) == rows


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 99))
def test_an_epoch_visits_every_sample_once(n, rows, seed):
    order = Order(n, rows, seed)
    stream = np.concatenate([b for step in range(2*n) for b in order(step)])
    epochs = stream[:len(stream)//n*n].reshape(-1, n)
    assert (np.sort(epochs, 1) == np.arange(n)).all()
    assert (order.steps_per_epoch - 1)*rows < n <= order.steps_per_epoch*rows


@pytest.mark.parametrize('kw', [dict(n=0, rows=1), dict(n=5, rows=0), dict(n=5, rows=1, world=2),
                                dict(n=5, rows=2, rank=2, world=2), dict(n=5, rows=2, micro_rows=0)])
def test_impossible_orders(kw):
    with pytest.raises(UserError): Order(**kw)


# ------------------------------------------------------------------ batches

@pytest.mark.parametrize('context', [1, 7, 64])
@pytest.mark.parametrize('world,micro', [(1, None), (2, 2), (3, 1)])
def test_batches_are_the_same_for_any_number_of_ranks(shards, context, world, micro):
    one = PretrainBatches(shards, context, rows=6, seed=3)
    many = [PretrainBatches(shards, context, 6, 3, r, world, micro) for r in range(world)]
    for step in (0, 5, one.steps_per_epoch):
        for whole, parts in zip(one(step)[0], zip(*(b for m in many for b in m(step)))): assert (whole == torch.cat(parts)).all()


def test_an_epoch_covers_the_corpus(shards):
    c = 13
    b = PretrainBatches(shards, c, rows=1)
    n = b.steps_per_epoch
    got = sorted(tuple(b(step)[0].y[0].tolist()) for step in range(n))
    ids = shards.tokens(0, len(shards))
    assert got == sorted(tuple(ids[k*c + 1 : (k + 1)*c + 1].tolist()) for k in range(n))
    assert 0 <= len(shards) - 1 - n*c < c


def test_document_numbers_follow_the_documents(shards):
    owner = np.repeat(np.arange(shards.n_docs), np.concatenate([np.diff(o) for o in shards.offsets]))
    b = PretrainBatches(shards, 40, rows=4)
    for step in range(b.steps_per_epoch):
        for k, doc in zip(b.order(step)[0], b(step)[0].doc):
            want = owner[k*40 : k*40 + 40]
            assert doc.tolist() == (want - want[0]).tolist()


def test_no_document_numbers_without_the_mask(shards):
    assert PretrainBatches(shards, 8, 2, doc_mask=False)(0)[0].doc is None
    assert all(b.doc is None for b in eval_batches(shards, 8, 2, doc_mask=False))


def test_too_short_a_text_says_what_to_lower(tmp_path):
    write_shards(['abcdefg'], tok, tmp_path/'s')
    s = Shards(tmp_path/'s')
    with pytest.raises(UserError, match=r'8 tokens, but one window of context 8 takes 9; lower context to at most 7'): PretrainBatches(s, 8, 1)
    assert PretrainBatches(s, 7, 1)(0)[0].x.shape == (1, 7)
    with pytest.raises(UserError): PretrainBatches(s, 0, 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 5), st.booleans())
def test_eval_batches_cover_every_target_once(tmp_path_factory, size, context, rows, doc_mask):
    path = tmp_path_factory.mktemp('shards')/'s'
    write_shards(['ab']*(size//3) + ['x'*(size % 3 or 1)], tok, path, shard_tokens=10)
    s = Shards(path)
    ids, batches = s.tokens(0, len(s)), list(eval_batches(s, context, rows, doc_mask))
    y, x = (torch.cat([getattr(b, k).flatten() for b in batches]) for k in 'yx')
    real = torch.arange(len(y)) < len(s) - 1
    assert y[real].tolist() == ids[1:].tolist() and (y[~real] == IGNORE).all()
    assert x[real].tolist() == ids[:-1].tolist() and (x[~real] == tok.pad).all()
    assert all(b.x.shape == b.y.shape and b.x.shape[1] == context and len(b.x) <= rows for b in batches)
    assert len(y) - (len(s) - 1) < context
    if doc_mask: assert ((torch.cat([b.doc.flatten() for b in batches]) == -1) == ~real).all()


def test_pairs_of_any_kind():
    for sample in ([1, 2, 3], (1, 2, 3), np.array([1, 2, 3], np.uint16), torch.tensor([1, 2, 3], dtype=torch.int32)):
        x, y = pretrain_pair(sample)
        assert (x.tolist(), y.tolist(), x.dtype, y.dtype) == ([1, 2], [2, 3], torch.int64, torch.int64)
    for bad in ([], [1], [[1, 2]]):
        with pytest.raises(UserError): pretrain_pair(bad)


# ------------------------------------------------------------------ real text

def test_real_articles_come_back(tmp_path):
    file = root().parent/'shared'/'data'/'wiki_demo.txt'
    if not file.exists(): pytest.skip(f'needs the articles in {file}')
    from lm_nb.tokenizer import Tokenizer
    docs = file.read_text(encoding='utf-8').splitlines()[:12]
    real = Tokenizer.train(docs, 1000, kind='bpe')
    index = write_shards(docs, real, tmp_path/'s', shard_tokens=20_000)
    s = Shards(tmp_path/'s', real)
    assert len(s.files) > 1 and index['text_bytes'] == sum(len(d.encode()) for d in docs)
    ids = s.tokens(0, len(s))
    parts = np.split(ids, np.flatnonzero(ids == real.eos) + 1)[:-1]
    assert [real.decode(p) for p in parts] == docs
