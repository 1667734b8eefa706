"Readers on files as people have them, the ledger, the parts of the poems, and the download when it goes wrong"
import json
import os
import stat
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_nb.core import UserError, root
from lm_nb.corpus import (Report, clean, dedup, fetch, find_files, held_out, instruction_sets, make_poem, npm_pack, poem_instructions,
                          quatrain_form, read_documents, read_records, split, write_poems)

REAL = Path(os.environ.get('LM_NB_REAL_DATA', root().parent/'shared'/'data'))
DOCS = ['春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少。', 'A line, with "quotes"; and a\ttab.', 'naïve']


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def lines(records): return '\n'.join(json.dumps(r, ensure_ascii=False) for r in records) + '\n'


def told(call):
    with pytest.raises(UserError) as e: call()
    assert '\n' not in str(e.value)
    return str(e.value)


def write_csv(path, sep=','):
    import csv
    with open(path, 'w', newline='', encoding='utf-8') as f:
        table = csv.writer(f, delimiter=sep)
        table.writerows([['id', 'text'], *enumerate(DOCS)])


@pytest.fixture(scope='module')
def columns(tmp_path_factory):
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet
    folder = tmp_path_factory.mktemp('columns')
    table = pa.table({'id': [str(i) for i in range(3)], 'text': DOCS})
    pyarrow.parquet.write_table(table, folder/'a.parquet')
    pyarrow.feather.write_feather(table, folder/'file.arrow', compression='uncompressed')
    with pa.ipc.new_stream(folder/'stream.arrow', table.schema) as out: out.write_table(table)
    return folder


# ---- formats

@pytest.mark.parametrize('name, write', [
    ('a.jsonl', lambda p: put(p, lines({'text': d} for d in DOCS))),
    ('a.ndjson', lambda p: put(p, lines({'completion': d} for d in DOCS))),
    ('list.json', lambda p: put(p, json.dumps([{'text': d} for d in DOCS], indent=2))),
    ('strings.json', lambda p: put(p, json.dumps(DOCS))),
    ('wrapped.json', lambda p: put(p, json.dumps({'n': 3, 'rows': [{'text': d} for d in DOCS]}))),
    ('lines.json', lambda p: put(p, '\n' + lines({'content': d} for d in DOCS))),
    ('bom.jsonl', lambda p: put(p, '\ufeff' + lines({'text': d} for d in DOCS))),
    ('crlf.jsonl', lambda p: put(p, lines({'text': d} for d in DOCS).replace('\n', '\r\n'))),
    ('a.csv', write_csv),
    ('a.tsv', lambda p: write_csv(p, '\t')),
])
def test_every_text_format_gives_the_same_documents(tmp_path, name, write):
    write(tmp_path/name)
    assert list(read_documents(tmp_path/name)) == DOCS


@pytest.mark.parametrize('name', ['a.parquet', 'file.arrow', 'stream.arrow'])
def test_columnar_formats(columns, name):
    assert list(read_documents(columns/name)) == DOCS


def test_hub_layout_and_saved_data_set(tmp_path, columns, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'cache')
    hub = tmp_path/'hub'
    for part in ('train', 'test'): put(hub/'data'/f'{part}-00000-of-00001.parquet', (columns/'a.parquet').read_bytes())
    assert list(read_documents(f'hf:{hub}')) == list(read_documents(f'hf:{hub}:default:test')) == DOCS
    assert 'nope' in told(lambda: list(read_documents(f'hf:{hub}::nope')))
    datasets.Dataset.from_dict({'text': DOCS}).save_to_disk(tmp_path/'saved')
    assert list(read_documents(tmp_path/'saved')) == DOCS


def test_damaged_columns(tmp_path):
    for name in ('a.parquet', 'a.arrow'):
        for content in (b'', b'PAR1 but no more', b'\0' * 500):
            path = put(tmp_path/name, content)
            assert name in told(lambda path=path: list(read_documents(path)))


def test_text_files(tmp_path):
    path = put(tmp_path/'a.txt', 'one\r\n\r\n  \ntwo\u2028still two\x0b\nthree')
    assert [r['text'] for r in read_records(path)] == ['one', 'two\u2028still two\x0b', 'three']
    assert [r['text'] for r in read_records(path, separator='blank')] == ['one', 'two\u2028still two\x0b\nthree']
    assert len(list(read_records(path, separator='file'))) == 1
    assert 'separator = word' in told(lambda: list(read_records(path, separator='word')))


def test_poems_and_titles_are_recognised(tmp_path):
    poem = {'title': '春曉', 'author': '孟浩然', 'paragraphs': ['甲', '乙']}
    path = put(tmp_path/'a.jsonl', lines([poem, {'title': 'T', 'content': 'c'}, {'content': 'alone'}]))
    assert list(read_documents(path)) == ['《春曉》孟浩然\n甲\n乙', 'T\nc', 'alone']


def test_a_named_field_wins(tmp_path):
    path = put(tmp_path/'a.jsonl', lines([{'text': 'no', 'body': 'yes'}, {'body': ['two', 'lines']}, {'text': 'lost'}]))
    report = Report()
    assert list(read_documents(path, field='body', report=report)) == ['yes', 'two\nlines']
    assert report.rejected["no field 'body'"][0] == 1


# ---- sources

def test_sources(tmp_path, monkeypatch):
    for name in ('b.txt', 'a.txt', 'sub/c.jsonl', '.hidden/x.txt', 'image.png'): put(tmp_path/'d'/name, json.dumps({'text': name}))
    assert [p.name for p in find_files(tmp_path/'d')] == ['a.txt', 'b.txt', 'c.jsonl']
    assert [p.name for p in find_files(f'{tmp_path}/d/*.txt')] == ['a.txt', 'b.txt']
    assert [p.name for p in find_files(f'{tmp_path}/d/**/*.jsonl')] == ['c.jsonl']
    monkeypatch.chdir(tmp_path/'d')
    assert len(list(read_documents('a.txt, b.txt'))) == len(list(read_documents('a.txt b.txt\n'))) == len(list(read_documents(['a.txt', 'b.txt']))) == 2
    put(tmp_path/'d'/'with blank.txt', 'x')
    assert list(read_documents('with blank.txt')) == ['x']


def test_bad_sources(tmp_path):
    put(tmp_path/'notes.txt', 'x')
    put(tmp_path/'image.png', 'x')
    (tmp_path/'empty').mkdir()
    assert "did you mean 'notes.txt'" in told(lambda: list(read_documents(tmp_path/'note.txt')))
    assert 'no file in this folder' in told(lambda: list(read_documents(tmp_path/'empty')))
    assert "unknown kind of file '.png'" in told(lambda: list(read_documents(tmp_path/'image.png')))
    assert 'no source' in told(lambda: list(read_documents(' ,')))
    assert 'expected strict or replace' in told(lambda: list(read_documents(tmp_path/'notes.txt', errors='ignore')))


# ---- bad content

def test_empty_files(tmp_path):
    for name in ('a.txt', 'a.json', 'a.jsonl', 'a.csv'):
        assert f'{name}: the file is empty' in told(lambda name=name: list(read_documents(put(tmp_path/name, ''))))
    for name, content in {'b.txt': '\n \n', 'b.json': '[]', 'b.jsonl': '\n\n', 'b.csv': 'text\n'}.items():
        path = put(tmp_path/name, content)
        assert 'no records' in told(lambda path=path: list(read_documents(path)))


@pytest.mark.skipif(hasattr(os, 'geteuid') and os.geteuid() == 0, reason='root may read everything')
def test_unreadable_file(tmp_path):
    path = put(tmp_path/'a.txt', 'x')
    path.chmod(0)
    assert 'cannot be read' in told(lambda: list(read_documents(path)))


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.json', 'a.csv'])
def test_bytes_that_are_not_utf8(tmp_path, name):
    text = {'a.txt': 'fine\ncaf@\n', 'a.jsonl': '{"text": "fine"}\n{"text": "caf@"}\n', 'a.json': '[{"text": "fine"},\n{"text": "caf@"}]',
            'a.csv': 'text\nfine\ncaf@\n'}[name]
    data = text.encode().replace(b'@', b'\xe9')
    path = put(tmp_path/name, data)
    assert f'{name}: not UTF-8 at byte {data.index(0xe9)} (0xe9)' in told(lambda: list(read_documents(path)))
    report = Report()
    assert list(read_documents(path, errors='replace', report=report)) == ['fine', 'caf\ufffd']
    assert report.notes == {'places that are not UTF-8, replaced': 1} and report.kept == 2


@pytest.mark.parametrize('name, content, where', [
    ('a.jsonl', '{"text": "a"}\n{"text": \n', 'line 2'), ('a.json', '[{"text": "a"},\n\n{"text": "b"]', 'line 3'),
    ('b.json', '{"text": "a"}\n{"text": "b"\n', 'line 2'),
    ('a.csv', 'text\n"open\n', 'not a readable table'), ('c.json', '"just a string"', 'expected a list'), ('d.json', '{"text": "a",\n "b": }', 'line 2')])
def test_broken_files_say_where(tmp_path, name, content, where):
    message = told(lambda: list(read_documents(put(tmp_path/name, content))))
    assert name in message and where in message


def test_records_without_text_list_their_fields(tmp_path):
    message = told(lambda: list(read_documents(put(tmp_path/'a.jsonl', lines([{'id': 1, 'body': 'x'}] * 3)))))
    assert 'id, body' in message and 'field=NAME' in message
    assert "the field 'texts'" in told(lambda: list(read_documents(put(tmp_path/'b.jsonl', lines([{'text': 'x'}])), field='texts')))


def test_odd_records_are_counted(tmp_path):
    odd = [{'text': 'a'}, {'text': None}, {'text': 3}, {'text': ' \n'}, {}, [1, 2], 7, None, 'plain string', {'text': 'a'}, {'text': 'a '}]
    report = Report()
    docs = list(read_documents(put(tmp_path/'a.jsonl', lines(odd)), report=report))
    assert docs == ['a', 'plain string']
    assert {why: n for why, (n, _) in report.rejected.items()} == {'no text field': 3, 'empty': 1, 'not a record': 3, 'duplicate': 2}
    assert report.rows == len(odd) and report.kept == 2
    assert all(example for why, (_, example) in report.rejected.items())


def test_ragged_table(tmp_path):
    report = Report()
    assert list(read_documents(put(tmp_path/'a.csv', 'id,text\n1,a\n2\n3,b,c\n\n4,"two\nlines"\n'), report=report)) == ['a', 'two\nlines']
    assert report.rejected['not a record'] == [2, '1 cells where the header has 2']


VALUES = st.one_of(st.none(), st.integers(), st.text(max_size=5))


@settings(max_examples=60, deadline=None)
@given(records=st.lists(st.one_of(VALUES, st.dictionaries(st.sampled_from(['text', 'content', 'title', 'x']), VALUES, max_size=3)), min_size=1, max_size=30))
def test_the_ledger_always_adds_up(tmp_path_factory, records):
    path = put(tmp_path_factory.mktemp('h')/'a.jsonl', '\n'.join(json.dumps(r) for r in records))  # escapes keep half surrogates possible
    report = Report()
    try: docs = list(read_documents(path, report=report))
    except UserError: return
    assert report.rows == len(records)
    assert report.kept == len(docs) == len(set(docs))
    assert report.rows == report.kept + sum(n for n, _ in report.rejected.values())
    assert str(report.rows) in str(report) and '<table>' in report._repr_html_()


def test_the_table_is_safe_html():
    report = Report()
    report.row()
    report.reject('<script>', '<img onerror=x>')
    assert '<script' not in report._repr_html_() and '<img' not in report._repr_html_()


# ---- cleaning, duplicates, parts

@settings(max_examples=300, deadline=None)
@given(st.text())
def test_cleaning(text):
    once = clean(text)
    assert clean(once) == once == once.strip() == unicodedata.normalize('NFC', once)
    once.encode()
    assert not any(unicodedata.category(c) in ('Cc', 'Cs') and c not in '\n\t' for c in once)


def test_cleaning_keeps_what_is_visible():
    for text in ('，。？「」　x', 'a\n\nb\tc', '①ﬁｗ', '👩‍🚀', 'if x:\n    y'): assert clean(text) == text
    assert clean('\ud83d\ude00') == '😀' and clean('\ud83d!') == '\ufffd!'


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=['Cs']), max_size=3), max_size=60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_no_text_on_both_sides(docs, share, seed):
    train, valid = split(docs, share, seed)
    assert not set(train) & set(valid) and sorted(train + valid) == sorted(docs)
    assert list(dedup(docs)) == list(dict.fromkeys(docs))
    assert all(held_out(d, share, seed) == (d in valid) for d in docs)


def test_the_split_is_even_and_seeded():
    docs = [f'doc {i}' for i in range(20_000)]
    counts = [sum(held_out(d, .05, seed) for d in docs) for seed in range(5)]
    assert all(850 < n < 1150 for n in counts) and len(set(counts)) > 1


# ---- poems

SPRING = dict(title='春曉', author='孟浩然', paragraphs=['春眠不覺曉，處處聞啼鳥。', '夜來風雨聲，花落知多少。'])


@pytest.mark.parametrize('paragraphs, reason', [
    ([], 'empty'), (['  '], 'empty'), (None, 'empty'),
    (['冰□已鏤津。'], 'lost characters'), (['綠{𥫗/戢}兮。'], 'lost characters'), (['\ue864日依山盡。'], 'lost characters'),
    (['（以上劉瑛整理）。'], "editor's notes"), (['鶴立〖1〗。'], "editor's notes"), (['詩題：原無題句：微臣自愧。'], "editor's notes"),
    (['see page 3'], "editor's notes")])
def test_poems_that_are_rejected(paragraphs, reason):
    report = Report()
    report.row()
    assert make_poem(dict(SPRING, paragraphs=paragraphs), report) is None
    assert list(report.rejected) == [reason] and report.kept == 0


@pytest.mark.parametrize('paragraphs, body', [
    (['[爽]節在重九，物華新雨餘。'], '爽節在重九，物華新雨餘。'), (['闌風長雨（一作「東風細雨」）秋紛紛。'], '闌風長雨秋紛紛。'),
    (['說：「正直神不欺。', '」忠義恆獨守。'], '說：「正直神不欺。」\n忠義恆獨守。'), (['月有陰晴圓缺。'], '月有陰晴圓缺。')])
def test_poems_that_are_mended(paragraphs, body):
    report = Report()
    report.row()
    assert make_poem(dict(SPRING, title='題 （注）', paragraphs=paragraphs), report)['text'] == f'《題》孟浩然\n{body}'


@pytest.mark.parametrize('text, right', [
    ('春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少。', True), ('松下問童子，言師採藥去。\n只在此山中，雲深不知處？', True),
    ('春眠不覺曉，處處聞啼鳥。', False), ('春眠不覺曉，處處聞啼鳥。夜來風雨聲，花落知多少。', False),
    ('春眠不覺曉處，處聞啼鳥。\n夜來風雨聲，花落知多少。', False), ('', False), ('abcde，abcde。\nabcde，abcde。', False),
    ('春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少', False), ('春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少。\n春眠不覺曉，處處聞啼鳥。', False)])
def test_quatrain_form(text, right): assert quatrain_form(text) is right


def poems(n=1500):
    han = lambda k: ''.join(chr(0x4e00 + (k * 7919 + i * 104729) % 5000) for i in range(5))
    for i in range(n):
        couplets = [f'{han(4 * i)}，{han(4 * i + 1)}。', f'{han(4 * (i // 2) + 2)}，{han(4 * (i // 2) + 3)}。']  # two poems share the second
        yield dict(title=han(i)[:3], author='甲乙丙'[i % 3], paragraphs=couplets)


def test_parts_share_no_couplet_and_questions_stay_in_their_part(tmp_path):
    records = [('tang' if i % 3 else 'song', p) for i, p in enumerate(poems())]
    reports = write_poems(records, tmp_path/'out', sizes=dict(train=60, valid=10, test=20), poems_each=5)
    read = lambda name: [json.loads(l) for l in (tmp_path/'out'/name).read_text(encoding='utf-8').splitlines()]
    parts = {part: read(f'tang-{part}.jsonl') + read(f'song-{part}.jsonl') for part in ('train', 'valid', 'test')}
    couplets = {part: {l for p in ps for l in p['text'].split('\n')[1:]} for part, ps in parts.items()}
    for a, b in (('train', 'valid'), ('train', 'test'), ('valid', 'test')): assert not couplets[a] & couplets[b]
    assert sum(map(len, parts.values())) + sum(r.notes['unused part'] for r in reports.values()) == sum(r.kept for r in reports.values()) == 1500
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
    assert 'exists already' in told(lambda: write_poems([('tang', SPRING)], tmp_path/'out'))


def test_the_same_poems_give_the_same_files(tmp_path):
    for name in 'ab': write_poems([('tang', p) for p in poems(300)], tmp_path/name, poems_each=5)
    for path in (tmp_path/'a').iterdir(): assert path.read_bytes() == (tmp_path/'b'/path.name).read_bytes()


def test_nothing_half_written(tmp_path):
    def broken():
        yield 'tang', SPRING
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_poems(broken(), tmp_path/'out')
    assert list(tmp_path.iterdir()) == []


def test_only_known_poets_are_asked_for():
    made = [make_poem(dict(p, author=a), Report()) for p, a in zip(poems(60), ['甲'] * 30 + ['不詳'] * 29 + ['乙'])]
    sets = instruction_sets(dict(train=made, valid=[], test=[]), dict(train=50, valid=1, test=1), poems_each=20)
    assert {r['output'] for r in sets['train'] if r['task'] == 'author'} == {'甲'}


def test_irregular_poems_are_not_continued():
    poem = make_poem(dict(SPRING, paragraphs=['君不見，黃河之水天上來。', '奔流到海不復回，高堂明鏡悲白髮。']), Report())
    assert poem_instructions(poem) == []


# ---- download

def fake_npm(folder, script):
    path = put(folder/'npm', f'#!{sys.executable}\nimport sys, os, pathlib\n{script}\n')
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(folder)


@pytest.mark.skipif(os.name == 'nt', reason='the stand-in for npm is a shell script')
class TestDownload:
    def test_failure_is_one_line_and_leaves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setenv('PATH', fake_npm(tmp_path/'bin', 'print("npm error code ENOTFOUND\\nnpm error network no such host", file=sys.stderr); sys.exit(1)'))
        message = told(lambda: npm_pack('p@1', '00', tmp_path/'cache'))
        assert 'ENOTFOUND' in message and 'no such host' in message
        assert not (tmp_path/'cache').exists() and not list(tmp_path.glob('.*'))

    def test_a_wrong_archive_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setenv('PATH', fake_npm(tmp_path/'bin', 'pathlib.Path(sys.argv[sys.argv.index("--pack-destination") + 1], "p.tgz").write_bytes(b"x")'))
        assert 'damaged' in told(lambda: npm_pack('p@1', '00', tmp_path/'cache'))

    def test_downloads_once(self, tmp_path, monkeypatch):
        import hashlib
        monkeypatch.setenv('PATH', fake_npm(tmp_path/'bin', 'pathlib.Path(sys.argv[sys.argv.index("--pack-destination") + 1], "p.tgz").write_bytes(b"x")'))
        digest = hashlib.sha512(b'x').hexdigest()
        first = npm_pack('p@1', digest, tmp_path/'cache')
        monkeypatch.setenv('PATH', '')
        assert npm_pack('p@1', digest, tmp_path/'cache') == first


def test_fetch_does_nothing_when_done_and_overwrites_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', '')
    put(tmp_path/'done'/'report.json', '{}')
    assert fetch('poems', tmp_path/'done') == tmp_path/'done'
    put(tmp_path/'mine'/'thesis.txt', 'x')
    assert 'holds something else' in told(lambda: fetch('poems', tmp_path/'mine'))
    assert 'poems' in told(lambda: fetch('novels', tmp_path/'x'))


def test_an_archive_without_poems(tmp_path):
    assert 'no Tang poem' in told(lambda: write_poems([], tmp_path/'out'))


# ---- imports and real files

def test_reading_plain_files_imports_nothing_heavy(tmp_path):
    put(tmp_path/'a.txt', 'x')
    code = ('import sys; from lm_nb.corpus import read_documents; list(read_documents(sys.argv[1])); '
            'print([m for m in ("torch", "datasets", "pyarrow", "pandas") if m in sys.modules])')
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path/'a.txt')], capture_output=True, text=True, cwd=root())
    assert done.stdout.strip() == '[]'


@pytest.mark.skipif(not (REAL/'wiki_demo.txt').exists(), reason='needs wiki_demo.txt and alpaca_zh_demo.json; set LM_NB_REAL_DATA to their folder')
def test_real_files():
    assert len(list(read_documents(REAL/'wiki_demo.txt'))) == 30
    report = Report()
    records = list(read_records(REAL/'alpaca_zh_demo.json', report))
    assert report.rows == report.kept == len(records) == 1000 and set(records[0]) == {'instruction', 'input', 'output'}
