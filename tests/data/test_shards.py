"""Shards under hostile files, odd sizes and many ranks"""
import json, os, random, shutil, signal, subprocess, sys, time, tracemalloc
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

from batch_tools import Bytes, assert_same
from lm_nb.core import UserError, root, sha256
from lm_nb.data.shards import (
    IGNORE, Batch, Shards, concat_batches, forget_verified, pretrain_pair, write_token_shards)
from lm_nb.data.tokenizer import Tokenizer

tok = Bytes()
texts = st.lists(st.text(max_size=30), min_size=1, max_size=12).filter(any)


def flat(docs, tok=tok):
    opened = [[tok.bos, *ids, tok.eos] for ids in tok.encode_batch(docs) if len(ids)]
    return [i for ids in opened for i in ids]


@pytest.fixture
def shards(tmp_path):
    docs = [f'document {i} ' + 'x'*(i*7 % 40) for i in range(50)]
    write_token_shards(docs, tok, tmp_path/'s', shard_tokens=300)
    return Shards(tmp_path/'s', tok)


# ------------------------------------------------------------------ writing and reading

@settings(max_examples=20, deadline=None)
@given(texts, st.integers(1, 80))
def test_any_documents_come_back(tmp_path_factory, docs, shard_tokens):
    path = tmp_path_factory.mktemp('shards')/'s'
    index = write_token_shards(iter(docs), tok, path, shard_tokens)
    s, want = Shards(path, tok), flat(docs)
    assert s.tokens(0, len(s)).tolist() == want
    assert (len(s), s.n_docs) == (len(want), sum(map(bool, docs)))
    assert s.text_bytes == sum(len(d.encode()) for d in docs)
    # every shard but the last is full, and only its last document made it so
    for k in range(len(s.files)):
        ends = s.offsets[k]
        assert ends[0] == 0 and ends[-1] == len(s.files[k])
        assert (s.files[k][ends[:-1]] == tok.bos).all()
        assert (s.files[k][ends[1:] - 1] == tok.eos).all()
        assert ends[-2] < shard_tokens and (ends[-1] >= shard_tokens or k == len(s.files) - 1)
    assert index['tokens'] == len(want) and s.verify() == 2*len(s.files)


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
    write_token_shards(docs, tok, path, shard_tokens=4)
    return Shards(path), flat(docs)


@pytest.mark.parametrize('vocab,dtype,width', [(2**16, '<u2', 2), (2**16 + 1, '<u4', 4)])
def test_width_follows_the_vocabulary(tmp_path, vocab, dtype, width):
    wide = Bytes(vocab)
    index = write_token_shards(['abc'], wide, tmp_path/'s')
    assert index['dtype'] == dtype and (tmp_path/'s'/'shard-00000.bin').stat().st_size == 5*width
    s = Shards(tmp_path/'s', wide)
    assert s.tokens(0, 5).tolist() == flat(['abc'], wide) and max(s.tokens(0, 5)) > 2**15


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    def peak(n, name):
        tracemalloc.start()
        write_token_shards(('x'*10_000 for _ in range(n)), tok, tmp_path/name)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top
    assert peak(800, 'large') < 1.3*peak(200, 'small')  # 8 MB and 2 MB, in batches of 1 MB


def test_a_failing_source_leaves_nothing(tmp_path):
    def docs():
        yield 'fine'*1000
        raise RuntimeError('the disk went away')
    with pytest.raises(RuntimeError):
        write_token_shards(docs(), tok, tmp_path/'s', shard_tokens=100)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(tmp_path):
    write_token_shards(['old'], tok, tmp_path/'s')
    with pytest.raises(UserError, match='exists already'):
        write_token_shards(['new'], tok, tmp_path/'s')
    s = Shards(tmp_path/'s', tok)
    assert tok.decode(s.tokens(0, len(s))) == 'old'


def test_a_tokenizer_beyond_its_vocabulary(tmp_path):
    class Liar(Bytes):
        def __len__(self): return 50
    with pytest.raises(UserError, match='outside its vocabulary of 50'):
        write_token_shards(['abc'], Liar(), tmp_path/'s')
    assert not (tmp_path/'s').exists()


# ------------------------------------------------------------------ interrupted writing

DOCS = [f'{i} ' + 'word '*(i*31 % 97) for i in range(1200)] + ['']*3
SIZES = dict(shard_tokens=20_000, batch_chars=4000)
forking = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')


def photo(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp('undisturbed')/'s'
    assert len(write_token_shards(DOCS, tok, path, **SIZES)['shards']) == 15
    return photo(path)


def in_child(work):
    "Run `work` in a process of its own that a test may kill; 0 if it comes to its end"
    if pid := os.fork(): return pid
    try: work(); os._exit(0)
    except BaseException: os._exit(1)


@forking
def test_killed_at_random_moments(tmp_path, undisturbed):
    rand, kills, kept = random.Random(4), 0, [0]
    for run in range(40):  # on a fast machine a run ends after few kills
        if run > 2 and kills > 10 and max(kept): break
        out = tmp_path/f'run{run}'
        for attempt in range(200):
            pid = in_child(partial(write_token_shards, DOCS, tok, out, **SIZES))
            time.sleep(rand.uniform(0, .05))
            os.kill(pid, signal.SIGKILL)
            kills += 1
            if os.waitpid(pid, 0)[1] == 0 or out.exists(): break
            kept.append(len(list(Path(f'{out}.part').glob('shard-*.json'))))
            if attempt == 30:
                write_token_shards(DOCS, tok, out, **SIZES)  # a slow machine: enough of killing
        assert photo(out) == undisturbed
    assert kills > 10 and max(kept) > 0, (kills, kept)


@forking
@pytest.mark.parametrize('name', ['fsync', 'replace', 'unlink'])
def test_killed_at_every_system_call(tmp_path, undisturbed, name):
    "The process dies just before the n-th call; a later attempt finishes, with the same files"
    def dying(n, out):
        real, calls = getattr(os, name), iter(range(10**9))
        def call(*args, **kw):
            if next(calls) == n: os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kw)
        setattr(os, name, call)
        write_token_shards(DOCS, tok, out, **SIZES)
    for n in range(0, 200, 13 if name == 'fsync' else 5):
        out = tmp_path/f'out{n}'
        status = os.waitpid(in_child(partial(dying, n, out)), 0)[1]
        if status == 0: break  # there were fewer calls than that
        if not out.exists(): write_token_shards(DOCS, tok, out, **SIZES)
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
    with pytest.raises(OSError): write_token_shards(source(), tok, out, **SIZES | kw)
    return Path(f'{out}.part')


def test_what_is_finished_is_not_encoded_again(tmp_path, undisturbed):
    torn(tmp_path/'s')
    watched = Counting()
    write_token_shards(DOCS, watched, tmp_path/'s', **SIZES)
    assert photo(tmp_path/'s') == undisturbed
    assert 0 < watched.asked < 500
    assert [p.name for p in tmp_path.iterdir()] == ['s']


def test_batches_of_another_size_change_nothing(tmp_path, undisturbed):
    torn(tmp_path/'s', batch_chars=300)
    write_token_shards(DOCS, tok, tmp_path/'s', SIZES['shard_tokens'])
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
    write_token_shards(DOCS, watched, tmp_path/'s', **SIZES)
    assert photo(tmp_path/'s') == undisturbed
    assert watched.asked > 800 if damage != 'stray' else watched.asked < 500


@pytest.mark.parametrize('change,says', [
    (dict(tok=Bytes(sha='b'*64)), 'tokenizer'), (dict(tok=Bytes(300)), 'vocab_size'),
    (dict(shard_tokens=999), 'shard_tokens'), (dict(source_key='v2'), 'source_key')])
def test_another_plan_is_refused(tmp_path, undisturbed, change, says):
    part = torn(tmp_path/'s')
    before = photo(part/'files')
    with pytest.raises(UserError, match=f's.part: begun with another {says}'):
        write_token_shards(**dict(docs=DOCS, tok=tok, out=tmp_path/'s') | SIZES | change)
    assert photo(part/'files') == before and not (tmp_path/'s').exists()
    write_token_shards(DOCS, tok, tmp_path/'s', **SIZES)
    assert photo(tmp_path/'s') == undisturbed


@pytest.mark.parametrize('text', [
    ['changed'] + DOCS[1:], DOCS[1:], DOCS[:1] + [''] + DOCS[1:], DOCS[:50],
    [DOCS[0] + DOCS[1]] + DOCS[2:], []])
def test_changed_text_is_refused(tmp_path, undisturbed, text):
    part = torn(tmp_path/'s')
    with pytest.raises(UserError, match='s.part: the text has changed'):
        write_token_shards(text, tok, tmp_path/'s', **SIZES)
    assert part.exists() and not (tmp_path/'s').exists()
    write_token_shards(DOCS, tok, tmp_path/'s', **SIZES)
    assert photo(tmp_path/'s') == undisturbed


def test_a_folder_in_the_way_is_not_touched(tmp_path):
    mine = tmp_path/'s.part'
    mine.mkdir()
    (mine/'thesis.txt').write_text('mine')
    with pytest.raises(UserError, match='s.part: is in the way'):
        write_token_shards(DOCS, tok, tmp_path/'s')
    assert photo(mine) == {'thesis.txt': b'mine'}
    (tmp_path/'t.part').write_text('a file')
    with pytest.raises(UserError, match='t.part: is in the way'):
        write_token_shards(DOCS, tok, tmp_path/'t')


def test_one_writer_at_a_time(tmp_path):
    def docs():
        yield 'one'*2000
        with pytest.raises(UserError, match='another process is writing'):
            write_token_shards(['two'], tok, tmp_path/'s')
        yield 'three'
    write_token_shards(docs(), tok, tmp_path/'s', batch_chars=100)
    assert Shards(tmp_path/'s').n_docs == 2


def test_empty_documents_at_the_end_make_no_shard(tmp_path):
    docs = ['a'*50, '', '', 'b'*50, '', '']
    index = write_token_shards(docs, tok, tmp_path/'s', shard_tokens=10, batch_chars=1)
    assert [(s['documents'], s['read']) for s in index['shards']] == [(1, 1), (1, 3)]
    assert len(photo(tmp_path/'s')) == 5


# ------------------------------------------------------------------ processes and memory

@pytest.fixture(scope='module')
def real(tmp_path_factory):
    path = tmp_path_factory.mktemp('real')/'t.model'
    text = 'the quick brown fox jumps over the lazy dog\n天地玄黃宇宙洪荒'
    return path, Tokenizer.train([text]*9, 299, path)


def test_workers_change_nothing(tmp_path, real):
    docs = [f'the {i} lazy foxes 天地{chr(0x4e00 + i)}\n' for i in range(3000)]
    for workers in (1, 2):
        out = tmp_path/f'{workers}'
        write_token_shards(docs, real[1], out, 9000, workers=workers, batch_chars=5000)
    assert photo(tmp_path/'1') == photo(tmp_path/'2')
    with pytest.raises(UserError, match='half a surrogate pair'):
        write_token_shards(docs + ['\ud800'], real[1], tmp_path/'s', workers=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['1', '2']


HUGE = """
import resource, sys
import numpy as np
from lm_nb.data.shards import Shards, write_token_shards
from lm_nb.data.tokenizer import Tokenizer
tok = Tokenizer.load(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024
write_token_shards(['warm up'*9999], tok, sys.argv[2] + '/warm')
before = peak()
block = ''.join(f'the quick brown fox jumps over the lazy dog {k}\\n' for k in range(1000))
parts = (block[k:k + 500] for _ in range(150) for k in range(0, len(block), 500))
docs = [block*2000] if sys.argv[3] == 'one' else parts
index = write_token_shards(docs, tok, sys.argv[2] + '/huge')
print(peak() - before, index['text_bytes'], index['documents'])
shards = Shards(sys.argv[2] + '/huge', tok)
def bytes_of(i):
    if tok.model.is_control(i): return 0
    return 1 if tok.model.is_byte(i) else len(tok.decode([i]).encode())
size = np.array([bytes_of(i) for i in range(len(tok))])
starts = range(0, len(shards), 10**6)
print(sum(int(size[shards.tokens(k, min(k + 10**6, len(shards)))].sum()) for k in starts))
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is read in KiB, as Linux gives it')
@pytest.mark.parametrize('form,megabytes,limit', [('one', 95, 650), ('many', 7, 100)])
def test_large_texts_stay_within_memory(tmp_path, real, form, megabytes, limit):
    "A hundred megabytes in one document take a few times their size; in many, next to nothing"
    done = subprocess.run([sys.executable, '-c', HUGE, real[0], tmp_path, form],
                          capture_output=True, text=True, env={**os.environ, 'IN_TEST': '1'})
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
    s = Shards(shards.path, tok)
    np.memmap(shards.path/'shard-00001.bin', '<u2', 'r+')[3] = 60000  # while it is open
    with pytest.raises(UserError, match='shard-00001.bin: holds the id 60000'): s.tokens(0, len(s))
    assert s.tokens(0, int(s.starts[1])).max() < len(tok)


def flip(file, at=10):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    with file.open('r+b') as f: f.write(raw)  # the same file, as an editor or a faulty program


def age(folder, t=10**9):
    "As if the files had been written long ago"
    for p in folder.glob('shard-*'): os.utime(p, (t, t))


def flip_unseen(file):
    "As a disk does it: nothing but the content changes"
    times = file.stat()
    flip(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize('name', ['shard-00000.bin', 'shard-00001.bin', 'shard-00001.doc'])
@pytest.mark.parametrize('opened', [False, True])
def test_a_changed_file_is_read_again_and_named(shards, name, opened):
    if opened: Shards(shards.path, tok)
    flip(shards.path/name)
    for _ in range(2):  # what was found damaged once is not taken for verified
        with pytest.raises(UserError, match=f'{name}: is damaged') as e: Shards(shards.path, tok)
        assert f'remove {shards.path}' in str(e.value) and '\n' not in str(e.value)
    flip(shards.path/name)
    assert len(Shards(shards.path, tok)) == len(shards)


def read_while(monkeypatch, f):
    "The names of the files whose content is read whole meanwhile"
    import lm_nb.data.shards as module
    read = []
    monkeypatch.setattr(module, 'sha256', lambda p: read.append(p.name) or sha256(p))
    f()
    return read


def test_each_file_is_read_once_for_each_state_that_it_is_in(shards, monkeypatch, tmp_path):
    age(shards.path)
    shutil.copytree(shards.path, tmp_path/'copy')
    Shards(shards.path, tok)
    names = sorted(p.name for p in shards.path.glob('shard-*'))
    assert read_while(monkeypatch, lambda: Shards(shards.path, tok)) == []
    assert sorted(read_while(monkeypatch, lambda: Shards(shards.path, tok, verify=True))) == names
    (shards.path/names[0]).touch()
    for _ in range(2):  # so recent a change may not have been the last one of its time
        assert read_while(monkeypatch, lambda: Shards(shards.path, tok)) == names[:1]
    age(shards.path, 10**9 + 1)
    assert sorted(read_while(monkeypatch, lambda: Shards(shards.path, tok))) == names
    assert read_while(monkeypatch, lambda: Shards(shards.path, tok)) == []
    for content in ('{', '[]', '{"shard-00000.bin": 1}', '', 'null'):
        (shards.path/'.verified.json').write_text(content)
        assert read_while(monkeypatch, lambda: Shards(shards.path, tok))
    assert sorted(read_while(monkeypatch, lambda: Shards(tmp_path/'copy', tok))) == names


def test_what_is_forgotten_is_read_again(shards, monkeypatch):
    age(shards.path)
    names = sorted(p.name for p in shards.path.glob('shard-*'))
    Shards(shards.path, tok)
    forget_verified(shards.path.parent)
    assert sorted(read_while(monkeypatch, lambda: Shards(shards.path, tok))) == names
    forget_verified(shards.path/'nowhere')


@pytest.mark.parametrize('suffix', ['.bin', '.doc'])
def test_what_no_time_tells_is_found_on_request(shards, suffix):
    age(shards.path)
    Shards(shards.path, tok)
    flip_unseen(shards.path/f'shard-00001{suffix}')
    Shards(shards.path, tok)
    for ask in (lambda: Shards(shards.path, tok, verify=True), Shards(shards.path, tok).verify):
        with pytest.raises(UserError, match=f'shard-00001{suffix}: is damaged'): ask()


def test_a_folder_that_cannot_be_noted_in_is_read_each_time(shards, monkeypatch):
    import lm_nb.data.shards as module
    age(shards.path)
    def refuse(*_): raise PermissionError('read only')
    monkeypatch.setattr(module, 'write_json', refuse)
    for _ in range(2): assert read_while(monkeypatch, lambda: Shards(shards.path, tok))


@pytest.mark.parametrize('text', [
    '', '{', '[]', 'null', '{}', '{"version": 3}', '{"version": 2, "shards": []}',
    '{"version": 2, "special": {}, "tokenizer": "", "vocab_size": 3, "shards": [{}]}'])
def test_an_index_that_is_none(shards, text):
    (shards.path/'index.json').write_text(text)
    with pytest.raises(UserError, match='index.json'): Shards(shards.path, tok)


@pytest.mark.parametrize('given', [tok, None])
def test_shards_of_an_older_version_are_refused(shards, given):
    "They are whole, and their documents begin without `bos`: a model would read them as one text"
    edit(shards.path, version=1)
    with pytest.raises(UserError, match='not an index of token shards of version 2') as e:
        Shards(shards.path, given)
    assert f'{shards.path}/index.json' in str(e.value) and 'write the shards again' in str(e.value)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', ['index.json', 'shard-00001.bin', 'shard-00000.doc'])
def test_no_flipped_bit_is_trained_on(shards, name):
    "Wherever it is, it is named, or it is where nothing is read from"
    file, rng = shards.path/name, random.Random(0)
    raw = file.read_bytes()
    def read(s): return s.tokens(0, len(s)).tolist(), s.n_docs, s.text_bytes, s.pad, s.bos, s.eos
    want, named = read(shards), 0
    for _ in range(300):
        at, bit = rng.randrange(len(raw)), 1 << rng.randrange(8)
        with file.open('r+b') as f:
            f.seek(at)
            f.write(bytes([raw[at] ^ bit]))
        try: assert read(Shards(shards.path, tok)) == want
        except UserError as e:
            blamed = str(shards.path) if name == 'index.json' else name  # or the file it speaks of
            assert blamed in str(e) and '\n' not in str(e)
            named += 1
        file.write_bytes(raw)
    assert named > (150 if name == 'index.json' else 299)


def test_a_foreign_tokenizer(shards):
    with pytest.raises(UserError, match='another tokenizer'): Shards(shards.path, Bytes(sha='b'*64))
    with pytest.raises(UserError, match='no such folder'): Shards(shards.path/'deeper')


# ------------------------------------------------------------------ pairs and batches

def test_pairs_of_any_kind():
    ids = [1, 2, 3]
    for sample in (ids, tuple(ids), np.array(ids, np.uint16), torch.tensor(ids).int()):
        x, y = pretrain_pair(sample)
        assert (x.tolist(), y.tolist()) == ([1, 2], [2, 3])
        assert x.dtype == y.dtype == torch.int64
    for bad in ([], [1], [[1, 2]]):
        with pytest.raises(UserError): pretrain_pair(bad)


def a_batch(rows, T=5, doc=True, weight=True):
    "Random rows; some targets are ignored"
    x, y = torch.randint(0, 50, (2, rows, T))
    y[torch.rand(rows, T) < .3] = IGNORE
    return Batch(x, y, torch.randint(0, 3, (rows, T)) if doc else None,
                 torch.rand(rows, T) if weight else None)


@pytest.mark.parametrize('doc', [True, False])
@pytest.mark.parametrize('weight', [True, False])
@pytest.mark.parametrize('rows', [1, 2, 3, 7, 9])
def test_micro_batches_joined_are_the_batch(doc, weight, rows):
    whole = a_batch(7, doc=doc, weight=weight)
    parts = whole.split(rows)
    assert [len(p.x) for p in parts] == [rows]*(7//rows) + [7 % rows]*(7 % rows > 0)
    assert all((p.doc is None, p.weight is None) == (not doc, not weight) for p in parts)
    assert_same(concat_batches(parts), whole)


def test_what_a_batch_lacks_is_filled_with_what_it_means():
    full, bare = a_batch(2), a_batch(3, doc=False, weight=False)
    both = concat_batches([bare, full])
    assert both.weight.tolist() == [[1.]*5]*3 + full.weight.tolist()
    assert both.doc.tolist() == [[0]*5]*3 + full.doc.tolist()
    assert (both.weight.dtype, both.doc.dtype) == (torch.float32, torch.int64)
    assert concat_batches([bare, bare])[2:] == (None, None)


def test_a_map_reaches_every_tensor_that_is_there():
    full, bare = a_batch(2), a_batch(2, doc=False, weight=False)
    assert_same(full.map(lambda t: t + 1), Batch(*(t + 1 for t in full)))
    assert_same(bare.map(lambda t: t[:1]), Batch(bare.x[:1], bare.y[:1]))


# ------------------------------------------------------------------ real text

def test_real_articles_come_back(tmp_path):
    file = root().parent/'shared'/'data'/'wiki_demo.txt'
    if not file.exists(): pytest.skip(f'needs the articles in {file}')
    from lm_nb.data.tokenizer import Tokenizer
    docs = file.read_text(encoding='utf-8').splitlines()[:12]
    real = Tokenizer.train(docs, 1000, kind='bpe')
    index = write_token_shards(docs, real, tmp_path/'s', shard_tokens=20_000)
    s = Shards(tmp_path/'s', real)
    assert len(s.files) > 1 and index['text_bytes'] == sum(len(d.encode()) for d in docs)
    ids = s.tokens(0, len(s))
    parts = np.split(ids, np.flatnonzero(ids == real.eos) + 1)[:-1]
    assert all(p[0] == real.bos and (p == real.bos).sum() == 1 for p in parts)
    assert [real.decode(p) for p in parts] == docs


# ------------------------------------------------------------------ what recorded runs rest on

def test_the_same_documents_give_the_same_files(tmp_path):
    docs = [f'document {i} ' + '天地'*(i*7 % 40) for i in range(50)]
    write_token_shards(docs, tok, tmp_path/'s', shard_tokens=2000)
    assert {p.name: sha256(p)[:16] for p in (tmp_path/'s').iterdir()} == {
        'index.json': '18dd067dbca658c4',
        'shard-00000.bin': 'a96a949aaba49a7c', 'shard-00000.doc': 'd8186d982b8f611d',
        'shard-00001.bin': 'b5ac96cb57dd2b30', 'shard-00001.doc': '4f4fe2df65aa9c8b',
        'shard-00002.bin': '326b302cc161ae5e', 'shard-00002.doc': 'e5cd8bc719c9757b',
        'shard-00003.bin': '557ab6bc31a45286', 'shard-00003.doc': 'ae39d784ed996e96'}
