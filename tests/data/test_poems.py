"The parts of the poems, what can be asked about them, and the download when it goes wrong"
import json
import os
import stat
import sys
from itertools import combinations

import pytest

from lm_nb.core import UserError, sha256
from lm_nb.data.sources import Report
from lm_nb.data.poems import (
    fetch_poems, _instruction_sets, _make_poem, _npm_pack, _poem_instructions, is_quatrain,
    _write_poems)


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def message_of(call):
    with pytest.raises(UserError) as e: call()
    assert '\n' not in str(e.value)
    return str(e.value)


SIZES = dict(train=60, valid=10, test=20)
SPRING = dict(title='春曉', author='孟浩然', paragraphs=['春眠不覺曉，處處聞啼鳥。', '夜來風雨聲，花落知多少。'])


@pytest.mark.parametrize('paragraphs, reason', [
    ([], 'empty'), (['  '], 'empty'), (None, 'empty'),
    (['冰□已鏤津。'], 'lost characters'), (['綠{𥫗/戢}兮。'], 'lost characters'),
    (['\ue864日依山盡。'], 'lost characters'), (['（以上劉瑛整理）。'], "editor's notes"),
    (['鶴立〖1〗。'], "editor's notes"), (['詩題：原無題句：微臣自愧。'], "editor's notes"),
    (['see page 3'], "editor's notes")])
def test_poems_that_are_rejected(paragraphs, reason):
    report = Report()
    report.row()
    assert _make_poem(dict(SPRING, paragraphs=paragraphs), report) is None
    assert list(report.rejected) == [reason] and report.kept == 0


@pytest.mark.parametrize('paragraphs, body', [
    (['[爽]節在重九，物華新雨餘。'], '爽節在重九，物華新雨餘。'), (['闌風長雨（一作「東風細雨」）秋紛紛。'], '闌風長雨秋紛紛。'),
    (['說：「正直神不欺。', '」忠義恆獨守。'], '說：「正直神不欺。」\n忠義恆獨守。'), (['月有陰晴圓缺。'], '月有陰晴圓缺。')])
def test_poems_that_are_repaired(paragraphs, body):
    report = Report()
    report.row()
    poem = _make_poem(dict(SPRING, title='題 （注）', paragraphs=paragraphs), report)
    assert poem['text'] == f'《題》孟浩然\n{body}'


@pytest.mark.parametrize('text, right', [
    ('春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少。', True), ('松下問童子，言師採藥去。\n只在此山中，雲深不知處？', True),
    ('春眠不覺曉，處處聞啼鳥。', False), ('春眠不覺曉，處處聞啼鳥。夜來風雨聲，花落知多少。', False),
    ('春眠不覺曉處，處聞啼鳥。\n夜來風雨聲，花落知多少。', False), ('', False), ('abcde，abcde。\nabcde，abcde。', False),
    ('春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少', False),
    ('春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少。\n春眠不覺曉，處處聞啼鳥。', False)])
def test_quatrain_form(text, right): assert is_quatrain(text) is right


def poems(n=1500):
    def han(k): return ''.join(chr(0x4e00 + (k * 7919 + i * 104729) % 5000) for i in range(5))
    for i in range(n):
        a, b = 4 * i, 4 * (i // 2) + 2  # two poems share the second couplet
        couplets = [f'{han(a)}，{han(a + 1)}。', f'{han(b)}，{han(b + 1)}。']
        yield dict(title=han(i)[:3], author='甲乙丙'[i % 3], paragraphs=couplets)


def test_parts_share_no_couplet_and_questions_stay_in_their_part(tmp_path):
    records = [('tang' if i % 3 else 'song', p) for i, p in enumerate(poems())]
    reports = _write_poems(records, tmp_path/'out', SIZES, poems_each=5).values()

    def read(name):
        lines = (tmp_path/'out'/name).read_text(encoding='utf-8').splitlines()
        return [json.loads(line) for line in lines]
    parts = {part: read(f'tang-{part}.jsonl') + read(f'song-{part}.jsonl') for part in SIZES}
    couplets = {part: {line for p in ps for line in p['text'].split('\n')[1:]}
                for part, ps in parts.items()}
    for a, b in combinations(SIZES, 2): assert not couplets[a] & couplets[b]
    used, unused = sum(map(len, parts.values())), sum(r.notes['unused part'] for r in reports)
    assert used + unused == sum(r.kept for r in reports) == 1500
    assert len(parts['valid']) > 10 and len(parts['test']) > 40 and len(parts['train']) > 900
    for part in ('train', 'valid', 'test'):
        for r in read(f'instructions-{part}.jsonl'):
            assert set(r) == {'instruction', 'input', 'output', 'task'}
            where = 'train' if r['task'] == 'author-read' else part
            line = (r['output'] if r['task'] == 'quatrain' else r['input']).split('\n')[0]
            assert line in couplets[where]
    asked = {r['input'] for r in read('instructions-train.jsonl') if r['task'] == 'author'}
    again = {r['input'] for r in read('instructions-test.jsonl') if r['task'] == 'author-read'}
    assert len(again) == 20 and not asked & again
    again = message_of(lambda: _write_poems([('tang', SPRING)], tmp_path/'out'))
    assert 'exists already' in again


def test_nothing_half_written(tmp_path):
    def broken():
        yield 'tang', SPRING
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): _write_poems(broken(), tmp_path/'out')
    assert list(tmp_path.iterdir()) == []


def test_only_known_poets_are_asked_for():
    authors = ['甲'] * 30 + ['不詳'] * 29 + ['乙']
    made = [_make_poem(dict(p, author=a), Report()) for p, a in zip(poems(60), authors)]
    sizes = dict(train=50, valid=1, test=1)
    sets = _instruction_sets(dict(train=made, valid=[], test=[]), sizes, poems_each=20)
    assert {r['output'] for r in sets['train'] if r['task'] == 'author'} == {'甲'}


def test_irregular_poems_are_not_continued():
    couplets = ['君不見，黃河之水天上來。', '奔流到海不復回，高堂明鏡悲白髮。']
    poem = _make_poem(dict(SPRING, paragraphs=couplets), Report())
    assert _poem_instructions(poem) == []


# ---- download

def fake_npm(folder, script):
    path = put(folder/'npm', f'#!{sys.executable}\nimport sys, os, pathlib\n{script}\n')
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(folder)


FAILS = ('print("npm error code ENOTFOUND\\nnpm error network no such host", file=sys.stderr)\n'
         'sys.exit(1)')
WRITES = ('folder = sys.argv[sys.argv.index("--pack-destination") + 1]\n'
          'pathlib.Path(folder, "p.tgz").write_bytes(b"x")')


@pytest.mark.skipif(os.name == 'nt', reason='the stand-in for npm is a shell script')
class TestDownload:
    def test_failure_is_one_line_and_leaves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setenv('PATH', fake_npm(tmp_path/'bin', FAILS))
        message = message_of(lambda: _npm_pack('p@1', '00', tmp_path/'cache'))
        assert 'ENOTFOUND' in message and 'no such host' in message
        assert not (tmp_path/'cache').exists() and not list(tmp_path.glob('.*'))

    def test_a_wrong_archive_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setenv('PATH', fake_npm(tmp_path/'bin', WRITES))
        assert 'damaged' in message_of(lambda: _npm_pack('p@1', '00', tmp_path/'cache'))

    def test_downloads_once(self, tmp_path, monkeypatch):
        import hashlib
        monkeypatch.setenv('PATH', fake_npm(tmp_path/'bin', WRITES))
        digest = hashlib.sha512(b'x').hexdigest()
        first = _npm_pack('p@1', digest, tmp_path/'cache')
        monkeypatch.setenv('PATH', '')
        assert _npm_pack('p@1', digest, tmp_path/'cache') == first


def test_fetch_does_nothing_when_done_and_overwrites_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', '')
    put(tmp_path/'done'/'report.json', '{}')
    assert fetch_poems(tmp_path/'done') == tmp_path/'done'
    put(tmp_path/'mine'/'thesis.txt', 'x')
    assert 'holds something else' in message_of(lambda: fetch_poems(tmp_path/'mine'))
    assert (tmp_path/'mine'/'thesis.txt').read_text() == 'x'


def test_an_archive_without_poems(tmp_path):
    assert 'no Tang poem' in message_of(lambda: _write_poems([], tmp_path/'out'))
    assert not (tmp_path/'out').exists()


def test_the_files_are_those_of_the_recorded_results(tmp_path):
    _write_poems((('tang', p) for p in poems(600)), tmp_path/'out', SIZES, poems_each=5)
    assert {p.name: sha256(p)[:16] for p in (tmp_path/'out').iterdir()} == {
        'instructions-train.jsonl': 'f9763ae256267c00', 'tang-train.jsonl': '7e8bf0f6b4786bc3',
        'instructions-valid.jsonl': 'f2f82d55665cade7', 'tang-valid.jsonl': '5017ec1c73d55133',
        'instructions-test.jsonl': '7708b25d7ec79030', 'tang-test.jsonl': '64d1087b06867495',
        'report.json': '48af3c19600e1f8a'}
