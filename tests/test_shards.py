"""Shards under hostile files, odd sizes and many ranks"""
import json, os, random, signal, subprocess, sys, threading, time, tracemalloc
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

import lm_nb.shards
from lm_nb.core import UserError, root, sha256
from lm_nb.model import GPT, GPTConfig
from lm_nb.shards import (IGNORE, Ahead, Mixture, MixtureBatches, Order, PretrainBatches, Shards, eval_batches, mixture_at, permute,
                          pretrain_pair, quotas, sample_at, verify, window_batch, write_shards)
from lm_nb.tokenizer import Tokenizer


class Bytes:
    "A tokenizer of bytes: id = byte + 6. `vocab` larger than needed asks for wider files"
    pad, unk, bos, eos, system, user = range(6)
    def __init__(self, vocab=262, sha='a'*64): self.vocab, self.sha256 = vocab, sha
    def __len__(self): return self.vocab
    def encode_arrays(self, texts): return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) + 6 + (self.vocab - 262) for t in texts]
    def decode(self, ids): return bytes(i - 6 - (self.vocab - 262) for i in ids if i >= 6).decode()


tok = Bytes()
texts = st.lists(st.text(max_size=30), min_size=1, max_size=12).filter(any)


def flat(docs, tok=tok): return [i for ids in tok.encode_arrays(docs) if len(ids) for i in (*ids.tolist(), tok.eos)]


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


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_range_of_tokens(four, data):
    s, want = four
    a = data.draw(st.integers(0, len(want)))
    b = data.draw(st.integers(a, len(want)))
    got = s.tokens(a, b)
    assert got.tolist() == want[a:b] and got.dtype == np.int64


@pytest.fixture(scope='module')
def four(tmp_path_factory):
    path, docs = tmp_path_factory.mktemp('four')/'s', ['ab', 'c', 'defg', 'h'*9]
    write_shards(docs, tok, path, shard_tokens=4)
    return Shards(path), flat(docs)


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


# ------------------------------------------------------------------ interrupted writing

DOCS = [f'{i} ' + 'word '*(i*31 % 97) for i in range(1200)] + ['']*3
SIZES = dict(shard_tokens=20_000, batch_chars=4000)
forking = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')


def photo(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp('undisturbed')/'s'
    assert len(write_shards(DOCS, tok, path, **SIZES)['shards']) == 15
    return photo(path)


def in_child(work):
    "Run `work` in a process of its own that a test may kill; 0 if it comes to its end"
    if pid := os.fork(): return pid
    try: work(); os._exit(0)
    except BaseException: os._exit(1)


@forking
def test_killed_at_random_moments(tmp_path, undisturbed):
    rand, kills, kept = random.Random(4), 0, []
    for run in range(3):
        out = tmp_path/f'run{run}'
        for attempt in range(200):
            pid = in_child(partial(write_shards, DOCS, tok, out, **SIZES))
            time.sleep(rand.uniform(0, .05))
            os.kill(pid, signal.SIGKILL)
            kills += 1
            if os.waitpid(pid, 0)[1] == 0 or out.exists(): break
            kept.append(len(list(Path(f'{out}.part').glob('shard-*.json'))))
            if attempt == 30: write_shards(DOCS, tok, out, **SIZES)  # a slow machine: enough of killing
        assert photo(out) == undisturbed
    assert kills > 10 and max(kept) > 0, (kills, kept)


@forking
@pytest.mark.parametrize('name', ['fsync', 'replace', 'unlink'])
def test_killed_at_every_system_call(tmp_path, undisturbed, name):
    "The process dies just before the n-th call, for every n; then a later attempt finishes, and the files are the same"
    def dying(n, out):
        real, calls = getattr(os, name), iter(range(10**9))
        def call(*args, **kw):
            if next(calls) == n: os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kw)
        setattr(os, name, call)
        write_shards(DOCS, tok, out, **SIZES)
    for n in range(0, 200, 13 if name == 'fsync' else 5):
        out = tmp_path/f'out{n}'
        status = os.waitpid(in_child(partial(dying, n, out)), 0)[1]
        if status == 0: break  # there were fewer calls than that
        if not out.exists(): write_shards(DOCS, tok, out, **SIZES)
        assert photo(out) == undisturbed
    assert status == 0


class Counting(Bytes):
    asked = 0
    def encode_arrays(self, texts):
        self.asked += len(texts)
        return super().encode_arrays(texts)


def torn(out, n=800, docs=DOCS, **kw):
    "Leave a half-finished set of shards behind"
    def source():
        yield from docs[:n]
        raise OSError('the disk went away')
    with pytest.raises(OSError): write_shards(source(), tok, out, **SIZES | kw)
    return Path(f'{out}.part')


def test_what_is_finished_is_not_encoded_again(tmp_path, undisturbed):
    torn(tmp_path/'s')
    watched = Counting()
    write_shards(DOCS, watched, tmp_path/'s', **SIZES)
    assert photo(tmp_path/'s') == undisturbed
    assert 0 < watched.asked < 500
    assert [p.name for p in tmp_path.iterdir()] == ['s']


def test_batches_of_another_size_change_nothing(tmp_path, undisturbed):
    torn(tmp_path/'s', batch_chars=300)
    write_shards(DOCS, tok, tmp_path/'s', SIZES['shard_tokens'])
    assert photo(tmp_path/'s') == undisturbed


@pytest.mark.parametrize('damage', ['cut', 'flip', 'remove', 'entry', 'no entry', 'stray'])
def test_a_damaged_part_is_written_again(tmp_path, undisturbed, damage):
    part = torn(tmp_path/'s')
    file, entry = part/'files'/'shard-00003.bin', part/'shard-00003.json'
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    if damage == 'cut': file.write_bytes(raw[:-2])
    if damage == 'flip': file.write_bytes(raw)
    if damage == 'remove': file.unlink()
    if damage == 'entry': entry.write_text('{"name": ')
    if damage == 'no entry': entry.unlink()
    if damage == 'stray':
        (part/'files'/'shard-00999.bin').write_bytes(raw)
        for stray in ('.shard-00003.json.tmp-1', 'files/index.json'): (part/stray).write_text('{}')
    watched = Counting()
    write_shards(DOCS, watched, tmp_path/'s', **SIZES)
    assert photo(tmp_path/'s') == undisturbed
    assert watched.asked > 800 if damage != 'stray' else watched.asked < 500


@pytest.mark.parametrize('change,says', [(dict(tok=Bytes(sha='b'*64)), 'tokenizer'), (dict(tok=Bytes(300)), 'vocab_size'),
                                         (dict(shard_tokens=999), 'shard_tokens'),
                                         (dict(source_key='v2'), 'source_key')])
def test_another_plan_is_refused(tmp_path, undisturbed, change, says):
    part = torn(tmp_path/'s')
    before = photo(part/'files')
    with pytest.raises(UserError, match=f's.part: begun with another {says}'): write_shards(**dict(docs=DOCS, tok=tok, out=tmp_path/'s') | SIZES | change)
    assert photo(part/'files') == before and not (tmp_path/'s').exists()
    write_shards(DOCS, tok, tmp_path/'s', **SIZES)
    assert photo(tmp_path/'s') == undisturbed


@pytest.mark.parametrize('text', [['changed'] + DOCS[1:], DOCS[1:], DOCS[:1] + [''] + DOCS[1:], DOCS[:50], [DOCS[0] + DOCS[1]] + DOCS[2:], []])
def test_changed_text_is_refused(tmp_path, undisturbed, text):
    part = torn(tmp_path/'s')
    with pytest.raises(UserError, match='s.part: the text has changed'): write_shards(text, tok, tmp_path/'s', **SIZES)
    assert part.exists() and not (tmp_path/'s').exists()
    write_shards(DOCS, tok, tmp_path/'s', **SIZES)
    assert photo(tmp_path/'s') == undisturbed


def test_a_folder_in_the_way_is_not_touched(tmp_path):
    mine = tmp_path/'s.part'
    mine.mkdir()
    (mine/'thesis.txt').write_text('mine')
    with pytest.raises(UserError, match='s.part: is in the way'): write_shards(DOCS, tok, tmp_path/'s')
    assert photo(mine) == {'thesis.txt': b'mine'}
    (tmp_path/'t.part').write_text('a file')
    with pytest.raises(UserError, match='t.part: is in the way'): write_shards(DOCS, tok, tmp_path/'t')


def test_one_writer_at_a_time(tmp_path):
    def docs():
        yield 'one'*2000
        with pytest.raises(UserError, match='another process is writing'): write_shards(['two'], tok, tmp_path/'s')
        yield 'three'
    write_shards(docs(), tok, tmp_path/'s', batch_chars=100)
    assert Shards(tmp_path/'s').n_docs == 2


def test_empty_documents_at_the_end_make_no_shard(tmp_path):
    index = write_shards(['a'*50, '', '', 'b'*50, '', ''], tok, tmp_path/'s', shard_tokens=10, batch_chars=1)
    assert [s['documents'] for s in index['shards']] == [1, 1] and [s['read'] for s in index['shards']] == [1, 3]
    assert len(photo(tmp_path/'s')) == 5


# ------------------------------------------------------------------ several processes, little memory

@pytest.fixture(scope='module')
def real(tmp_path_factory):
    path = tmp_path_factory.mktemp('real')/'t.model'
    return path, Tokenizer.train(['the quick brown fox jumps over the lazy dog\n天地玄黃宇宙洪荒']*9, 299, path)


def test_workers_change_nothing(tmp_path, real):
    docs = [f'the {i} lazy foxes 天地{chr(0x4e00 + i)}\n' for i in range(3000)]
    for workers in (1, 2): write_shards(docs, real[1], tmp_path/f'{workers}', 9000, workers=workers, batch_chars=5000)
    assert photo(tmp_path/'1') == photo(tmp_path/'2')
    with pytest.raises(UserError, match='half a surrogate pair'): write_shards(docs + ['\ud800'], real[1], tmp_path/'s', workers=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['1', '2']


HUGE = """
import resource, sys
import numpy as np
from lm_nb.shards import Shards, write_shards
from lm_nb.tokenizer import Tokenizer
tok = Tokenizer.load(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024
write_shards(['warm up'*9999], tok, sys.argv[2] + '/warm')
before = peak()
block = ''.join(f'the quick brown fox jumps over the lazy dog {k}\\n' for k in range(1000))
docs = [block*2000] if sys.argv[3] == 'one' else (block[k:k + 500] for _ in range(150) for k in range(0, len(block), 500))
index = write_shards(docs, tok, sys.argv[2] + '/huge')
print(peak() - before, index['text_bytes'], index['documents'])
shards = Shards(sys.argv[2] + '/huge', tok)
size = np.array([0 if tok.model.is_control(i) else 1 if tok.model.is_byte(i) else len(tok.decode([i]).encode()) for i in range(len(tok))])
print(sum(int(size[shards.tokens(k, min(k + 10**6, len(shards)))].sum()) for k in range(0, len(shards), 10**6)))
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is read in KiB, as Linux gives it')
@pytest.mark.parametrize('form,megabytes,limit', [('one', 95, 650), ('many', 7, 100)])
def test_large_texts_stay_within_memory(tmp_path, real, form, megabytes, limit):
    "A hundred megabytes as one document take a few times their size, once; many documents do not add up at all"
    done = subprocess.run([sys.executable, '-c', HUGE, real[0], tmp_path, form], capture_output=True, text=True, env={**os.environ, 'IN_TEST': '1'})
    assert done.returncode == 0, done.stderr
    grown, size, documents, spelled = map(int, done.stdout.split())
    assert size > megabytes*10**6 and (documents == 1) == (form == 'one')
    assert grown < limit, grown
    assert spelled == size  # the pieces of all ids are as long as the text


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
    trials = 90*n
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


def counted(call):
    "How many numbers went through a Feistel network in `call`, and in how many goes"
    sizes, real = [], lm_nb.shards.feistel
    def watched(i, half, keys):
        sizes.append(len(i))
        return real(i, half, keys)
    lm_nb.shards.feistel = watched
    try: call()
    finally: lm_nb.shards.feistel = real
    return sum(sizes), len(sizes)


@pytest.mark.parametrize('world', [1, 2, 3, 4, 8])
def test_a_million_samples_each_once_an_epoch(world):
    n, rows = 10**6, 7993  # neither divides the other: steps cross epochs, ranks get unequal shares
    ranks = [Order(n, rows, 5, r, world) for r in range(world)]
    read = np.concatenate([b for step in range(-(-2*n//rows)) for o in ranks for b in o(step)])[:2*n].reshape(2, n)
    for epoch in read: assert (np.bincount(epoch, minlength=n) == 1).all()
    assert (read[0] == read[1]).sum() < 20


def test_step_a_million_costs_what_step_zero_costs():
    order = Order(10**6, 512, 3)
    (first, goes), (late, late_goes) = counted(lambda: order(0)), counted(lambda: order(10**6))
    assert first < 4*32*512 and late < 4*32*512 and max(goes, late_goes) < 40  # 32 steps are worked out together
    mixed = Mixture([10**6, 5000, 10**9], [5, 1, 9], 512, 3)
    (first, _), (late, _) = counted(lambda: mixed(0)), counted(lambda: mixed(10**6))
    assert first < 4*(512 + 2*1000) and late < 4*(512 + 2*1000)  # a step touches two blocks at most
    start = time.perf_counter()
    for step in range(10**6, 10**6 + 5): order(step)
    assert (time.perf_counter() - start)/5 < .05


@pytest.mark.parametrize('make', [lambda r, w: Order(1000, 24, 1, r, w), lambda r, w: Mixture([500, 100], [1, 2], 24, 1, r, w, 5)])
def test_the_number_of_ranks_changes_on_the_way(make):
    def read(worlds): return [tuple(np.atleast_1d(i)) for step, w in enumerate(worlds) for r in range(w) for m in make(r, w)(step) for i in m]
    assert read([1]*12) == read([4]*3 + [1]*2 + [8]*3 + [3]*4)


# ------------------------------------------------------------------ mixtures

weights = st.lists(st.floats(.02, 1), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(weights, st.integers(300, 2000))
def test_quotas_are_the_weights_to_the_nearest(w, block):
    q, exact = quotas(w, block), np.array(w)/sum(w)*block
    assert q.sum() == block and (abs(q - exact) < 1).all() and q.min() > 0
    assert (quotas(np.array(w)*7.5, block) == q).all() or min(abs(exact - np.round(exact*2)/2)) < 1e-6


@pytest.mark.parametrize('w', [[], [0], [1, -1], [1, float('nan')], [1, float('inf')], [[1]], [1, 1e-9], [1]*1001])
def test_impossible_weights(w):
    with pytest.raises(UserError, match='weights|smallest'): quotas(w)


@settings(max_examples=25, deadline=None)
@given(weights, st.integers(0, 10**6), st.integers(-5, 5), st.data())
def test_blocks_hold_their_quota_and_sources_count_on(w, k, seed, data):
    q = quotas(w)
    source, turn = mixture_at(np.arange(k*1000, k*1000 + 2000), q, seed)
    for s in range(len(q)):
        assert (source[:1000] == s).sum() == (source[1000:] == s).sum() == q[s]
        assert (turn[source == s] == k*q[s] + np.arange(2*q[s])).all()
    at = np.array(data.draw(st.lists(st.integers(0, 1999), min_size=1, max_size=20)))
    got = mixture_at(k*1000 + at, q, seed)
    assert (got[0] == source[at]).all() and (got[1] == turn[at]).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 5), st.integers(1, 9), st.integers(0, 10**7))
def test_ranks_partition_a_mixed_step(sizes, rows, world, micro, step):
    rows += world
    weights = [1 + s for s in range(len(sizes))]
    whole = [row for m in Mixture(sizes, weights, rows, 9)(step) for row in m]
    parts = [row for r in range(world) for m in Mixture(sizes, weights, rows, 9, r, world, micro)(step) for row in m]
    assert parts == whole and len(whole) == rows
    assert all(0 <= k < sizes[s] for s, k in whole)


def test_each_source_is_read_out_before_it_comes_again():
    mixed = Mixture([3000, 70, 450], [.6, .1, .3], 100, 2)
    rows = np.array([row for step in range(120) for m in mixed(step) for row in m])
    for s, n in enumerate(mixed.sizes):
        mine = rows[rows[:, 0] == s, 1]
        epochs = mine[:len(mine)//n*n].reshape(-1, n)
        assert len(epochs) and (np.sort(epochs, 1) == np.arange(n)).all()
        assert abs(mixed.epochs(120)[s] - len(mine)/n) < 1e-9
    assert (np.bincount(rows[:, 0])/len(rows)).round(3).tolist() == [.6, .1, .3]


def test_a_mixed_batch_holds_the_windows_it_names(tmp_path):
    for name in 'ab': write_shards([name*(5 + i) for i in range(90)], tok, tmp_path/name, shard_tokens=500)
    parts = [Shards(tmp_path/name, tok) for name in 'ab']
    mixed = MixtureBatches(parts, [1, 3], 20, 6, seed=4, micro_rows=4)
    for step in (0, 3, 10**5):
        for named, batch in zip(mixed.order(step), mixed(step), strict=True):
            for (s, k), x, y, doc in zip(named, *batch, strict=True):
                want = pretrain_pair(parts[s].tokens(20*k, 20*k + 21))
                assert (x == want[0]).all() and (y == want[1]).all()
                assert doc.tolist() == [want[0][:i].tolist().count(tok.eos) for i in range(20)]
    assert mixed(0)[0].doc is not None and MixtureBatches(parts, [1, 1], 20, 6, doc_mask=False)(0)[0].doc is None


@pytest.mark.parametrize('sources,w', [([], []), ('a', [1, 2]), ('ab', [1])])
def test_impossible_mixtures(tmp_path, sources, w):
    for name in 'ab': write_shards([name*50], tok, tmp_path/name)
    with pytest.raises(UserError): MixtureBatches([Shards(tmp_path/s) for s in sources], w, 8, 2)


def test_a_mixture_of_tokenizers_names_the_folder(tmp_path):
    write_shards(['a'*50], tok, tmp_path/'a'), write_shards(['b'*50], Bytes(sha='b'*64), tmp_path/'b')
    with pytest.raises(UserError, match='b: written with another tokenizer'): MixtureBatches([Shards(tmp_path/'a'), Shards(tmp_path/'b')], [1, 1], 8, 2)


# ------------------------------------------------------------------ ahead of the model

def test_ahead_gives_the_same_batches(shards):
    plain = PretrainBatches(shards, 16, 6, micro_rows=2)
    ahead = Ahead(plain)
    for step in (0, 1, 2, 2, 9, 10, 4):
        for a, b in zip(ahead(step), plain(step), strict=True): assert all((u == v).all() for u, v in zip(a, b))
    assert ahead.steps_per_epoch == plain.steps_per_epoch


def test_ahead_works_while_the_model_does():
    asked, slow = [], threading.Event()
    def batches(step):
        asked.append((step, threading.current_thread()))
        if step == 1: slow.wait(5)
        return step
    ahead = Ahead(batches)
    assert ahead(0) == 0  # comes back although step 1 is not ready
    slow.set()
    assert ahead(1) == 1 and [s for s, _ in asked][:2] == [0, 1]
    assert asked[0][1] is threading.main_thread() and asked[1][1] is not threading.main_thread()


def test_ahead_reports_what_went_wrong_at_its_step():
    def batches(step):
        if step == 1: raise UserError('the disk went away')
        return step
    ahead = Ahead(batches)
    assert ahead(0) == 0
    with pytest.raises(UserError, match='went away'): ahead(1)


# ------------------------------------------------------------------ documents that share a row

@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
def test_documents_in_a_row_are_as_if_alone(tmp_path, arch):
    "The logits of a packed row are those of its documents, each in a row of its own"
    torch.manual_seed(0)
    cfg = GPTConfig(arch=arch, vocab_size=len(tok), context=64, n_layer=2, n_head=2, d_model=32, zero_init=False)
    gpt = GPT(cfg).eval()
    write_shards(['alpha beta', 'x', '天地玄黃', 'one two three four five', 'a'*30], tok, tmp_path/'s')
    s = Shards(tmp_path/'s', tok)
    packed = window_batch([s.tokens(0, 65)], s.eos)
    with torch.no_grad():
        got, blind = gpt(packed.x, doc=packed.doc)[0], gpt(packed.x)[0]
        numbers = packed.doc[0].unique().tolist()
        assert numbers == [0, 1, 2, 3, 4]
        for d in numbers:
            here = packed.doc[0] == d
            alone = gpt(packed.x[:, here])[0]
            torch.testing.assert_close(got[here], alone, atol=1e-5, rtol=1e-5)
            assert d == 0 or (blind[here] - alone).abs().max() > 1e-3  # without the mask they do see each other


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


# ------------------------------------------------------------------ what recorded runs rest on

def test_the_same_documents_give_the_same_files(tmp_path):
    write_shards([f'document {i} ' + '天地'*(i*7 % 40) for i in range(50)], tok, tmp_path/'s', shard_tokens=2000)
    assert {p.name: sha256(p)[:16] for p in (tmp_path/'s').iterdir()} == {
        'index.json': '2a1598ba8bab0821', 'shard-00000.bin': 'a6f6a94d07a2b82c', 'shard-00000.doc': 'a3ea65ff58721bc0',
        'shard-00001.bin': '469b6986c72899a3', 'shard-00001.doc': '7cb3ca4da4f338ac', 'shard-00002.bin': 'd23741a4a94272bc',
        'shard-00002.doc': 'a03ae998328f08e8'}


def test_the_order_of_samples_is_the_one_of_the_recorded_runs(tmp_path):
    "Another order would be as good, but a run that is resumed would skip samples and repeat others"
    assert sample_at(np.arange(8, 16), 12, seed=5).tolist() == [2, 3, 8, 0, 2, 11, 0, 8]
    assert [m.tolist() for m in Order(10**9, 5, 3, rank=0, world=2, micro_rows=2)(10**7)] == [[529488246, 924087443], [274408375]]
    assert Mixture([900, 100, 400], [.7, .2, .1], rows=6, seed=2)(400) == [[(0, 874), (0, 826), (0, 217), (0, 740), (1, 54), (0, 233)]]
