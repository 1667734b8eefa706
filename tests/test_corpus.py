"Readers on files as people have them: every format, packed or not, every shape, and every way in which a file can be broken"
import bz2
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_nb.core import UserError, root
from lm_nb.corpus import (INSTRUCTIONS, SHAPES, Report, as_dataset, baike_text, find_files, json_values, kind_of, map_ordered, open_bytes, read_records,
                          read_texts, shape_of, source_shape, text_of, total_bytes, wiki_text, wiki_tidy)
from lm_nb.survey import SCRIPTS, CorpusReport, Survey, corpus_report, count_scripts, survey

REAL = Path(os.environ.get('LM_NB_REAL_DATA', root().parent/'shared'/'data'))
DOCS = ['春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少。', 'A line, with "quotes"; and a\ttab.', 'naïve']


def zst(data):
    import zstandard
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)  # as the command line of zstd does


PACK = {'.gz': lambda data: gzip.compress(data, 1), '.bz2': lambda data: bz2.compress(data, 1), '.xz': lambda data: lzma.compress(data, preset=0), '.zst': zst}


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def lines(records): return '\n'.join(json.dumps(r, ensure_ascii=False) for r in records) + '\n'


def texts(source, **kw): return list(read_texts(source, **kw))


def told(call):
    with pytest.raises(UserError) as e: call()
    assert '\n' not in str(e.value) and len(str(e.value)) < 700
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


# ---- the ledger

def test_a_ledger_that_does_not_add_up_is_not_shown():
    report = Report('x', rows=5, kept=3, rejected={'empty': [1, '']})
    for show in (str, repr, Report.check, Report._repr_html_):
        with pytest.raises(AssertionError, match='5 rows read, but 4'): show(report)
    report.rejected['empty'][0] = 2
    assert report.check() is report and '5' in str(report)


def test_the_first_example_is_kept_and_short():
    report = Report()
    for example in ('a' * 5000, 'second'): report.row(); report.reject('long', example)
    assert report.rejected['long'] == [2, 'a' * 60]


@pytest.mark.parametrize('example', ['\ud800', '\x1b[2J', 'a\u202eb', '\0', {'a': '\udcff'}, b'\xff', None])
def test_examples_can_be_printed(example):
    report = Report()
    report.row()
    report.reject('odd', example)
    assert str(report).encode() and report.rejected['odd'][1].isprintable()


def test_the_table_is_safe_html():
    report = Report()
    report.row()
    report.reject('<script>', '<img onerror=x>')
    assert '<script' not in report._repr_html_() and '<img' not in report._repr_html_()


# ---- formats

FORMATS = [
    ('a.jsonl', lambda p: put(p, lines({'text': d} for d in DOCS))),
    ('a.ndjson', lambda p: put(p, lines({'completion': d} for d in DOCS))),
    ('list.json', lambda p: put(p, json.dumps([{'text': d} for d in DOCS], indent=2))),
    ('oneline.json', lambda p: put(p, json.dumps([{'text': d} for d in DOCS]))),
    ('strings.json', lambda p: put(p, json.dumps(DOCS))),
    ('wrapped.json', lambda p: put(p, json.dumps({'n': 3, 'rows': [{'text': d} for d in DOCS]}))),
    ('wrapped2.json', lambda p: put(p, json.dumps({'n': 3, 'rows': [{'text': d} for d in DOCS]}, indent=1))),
    ('lines.json', lambda p: put(p, '\n' + lines({'content': d} for d in DOCS))),
    ('inarow.json', lambda p: put(p, '\n'.join(json.dumps({'text': d}, indent=1) for d in DOCS))),
    ('bom.jsonl', lambda p: put(p, '\ufeff' + lines({'text': d} for d in DOCS))),
    ('bom.json', lambda p: put(p, '\ufeff' + json.dumps(DOCS))),
    ('crlf.jsonl', lambda p: put(p, lines({'text': d} for d in DOCS).replace('\n', '\r\n'))),
    ('a.csv', write_csv),
    ('a.tsv', lambda p: write_csv(p, '\t')),
]


@pytest.mark.parametrize('name, write', FORMATS)
def test_every_text_format_gives_the_same_documents(tmp_path, name, write):
    write(tmp_path/name)
    assert texts(tmp_path/name) == DOCS
    for ending, pack in PACK.items():
        put(tmp_path/(name + ending), pack((tmp_path/name).read_bytes()))
        assert texts(tmp_path/(name + ending)) == DOCS


@pytest.mark.parametrize('name', ['a.parquet', 'file.arrow', 'stream.arrow'])
def test_columnar_formats(columns, name):
    read = []
    assert texts(columns/name, tick=read.append) == DOCS
    assert sum(read) == total_bytes(columns/name)


def test_hub_layout_and_saved_data_set(tmp_path, columns, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'cache')
    hub = tmp_path/'hub'
    for part in ('train', 'test'): put(hub/'data'/f'{part}-00000-of-00001.parquet', (columns/'a.parquet').read_bytes())
    assert texts(f'hf:{hub}') == texts(f'hf:{hub}:default:test') == DOCS
    assert 'nope' in told(lambda: texts(f'hf:{hub}::nope'))
    datasets.Dataset.from_dict({'text': DOCS}).save_to_disk(tmp_path/'saved')
    assert texts(tmp_path/'saved') == DOCS
    assert corpus_report(f'{tmp_path}/saved hf:{hub}').total().kept == 6


def test_the_hub_is_streamed(tmp_path, monkeypatch):
    import datasets
    asked = []
    monkeypatch.setattr(datasets, 'load_dataset', lambda *a, **kw: asked.append((a, kw)) or iter([{'text': 'a'}]))
    assert texts('hf:owner/name:20231101.zh:train') == ['a']
    assert asked == [(('owner/name', '20231101.zh'), {'split': 'train', 'streaming': True})]


def test_a_hub_that_breaks_off_is_one_line(monkeypatch):
    import datasets

    def some(*a, **kw):
        yield {'text': 'a'}
        raise ConnectionError('the line went dead\nsecond line')
    monkeypatch.setattr(datasets, 'load_dataset', some)
    found = survey('hf:owner/name')
    assert found.stats.documents == 1 and found.stopped == 'hf:owner/name: cannot be loaded: the line went dead'


def test_damaged_columns(tmp_path):
    for name in ('a.parquet', 'a.arrow'):
        for content in (b'', b'PAR1 but no more', b'\0' * 500):
            path = put(tmp_path/name, content)
            assert name in told(lambda path=path: texts(path))
    assert 'unpack it' in told(lambda: texts(put(tmp_path/'a.parquet.gz', gzip.compress(b'x'))))


def test_text_files(tmp_path):
    path = put(tmp_path/'a.txt', 'one\r\n\r\n  \ntwo\u2028still two\x0b\nthree')
    assert [r['text'] for r in read_records(path)] == ['one', 'two\u2028still two\x0b', 'three']
    assert [r['text'] for r in read_records(path, separator='blank')] == ['one', 'two\u2028still two\x0b\nthree']
    assert len(list(read_records(path, separator='file'))) == 1
    assert 'separator = word' in told(lambda: list(read_records(path, separator='word')))


def test_texts_are_raw(tmp_path):
    raw = ['  a\x00b ', 'same', 'same', 'e\u0301', '\ufeffx']
    assert texts(put(tmp_path/'a.jsonl', lines({'text': t} for t in raw))) == raw


# ---- packed files

@pytest.mark.parametrize('ending', PACK)
def test_a_cut_archive_gives_what_it_holds_and_one_line(tmp_path, ending):
    r = random.Random(0)
    rows = [{'text': f'{i} ' + ''.join(r.choices('abcdefgh', k=200))} for i in range(20_000)]  # several blocks of any format
    packed = PACK[ending](lines(rows).encode())
    kept = []
    for cut in (len(packed) - 1, len(packed) // 2, 10):
        report, found = Report(), []
        with pytest.raises(UserError, match='the archive is cut off') as e:
            for text in read_texts(put(tmp_path/('a.jsonl' + ending), packed[:cut]), report=report): found.append(text)
        assert f'a.jsonl{ending}' in str(e.value)
        assert found == [row['text'] for row in rows[:len(found)]] and report.check().kept == len(found)
        kept.append(len(found))
    assert kept[0] > 18_000 and 5_000 < kept[1] < 12_000 and kept[2] == 0


@pytest.mark.parametrize('ending', PACK)
def test_damaged_and_foreign_archives(tmp_path, ending):
    packed = bytearray(PACK[ending](''.join(random.Random(1).choices('abcdefgh\n', k=100_000)).encode()))
    assert f'not a {ending} archive' in told(lambda: texts(put(tmp_path/('a.txt' + ending), b'just text\n' * 50)))
    packed[len(packed) // 2] ^= 255
    assert f'a.txt{ending}' in told(lambda: texts(put(tmp_path/('a.txt' + ending), bytes(packed))))
    assert 'the file is empty' in told(lambda: texts(put(tmp_path/('b.txt' + ending), b'')))
    assert 'no records' in told(lambda: texts(put(tmp_path/('c.txt' + ending), PACK[ending](b''))))
    assert f'{ending} archive; give it that ending' in told(lambda: texts(put(tmp_path/'d.txt', PACK[ending](b'x'))))


@pytest.mark.parametrize('ending', PACK)
def test_streams_in_a_row_and_padding(tmp_path, ending):
    parts = [f'part {i}\n'.encode() * 3 for i in range(5)]
    path = put(tmp_path/('a.txt' + ending), b''.join(map(PACK[ending], parts)) + b'\0' * 512)
    assert open_bytes(path).read() == b''.join(parts)


def test_zip_and_rar_are_named(tmp_path):
    assert '.zip archive; unpack it' in told(lambda: texts(put(tmp_path/'a.jsonl', b'PK\x03\x04....')))
    assert "unknown kind of file '.rar'" in told(lambda: texts(put(tmp_path/'a.rar', b'Rar!\x1a\x07')))
    assert "unknown kind of file '.tar'" in told(lambda: texts(put(tmp_path/'a.tar.gz', gzip.compress(b'x'))))
    assert 'unknown kind of file' in told(lambda: texts(put(tmp_path/'a.gz', gzip.compress(b'x'))))


@pytest.mark.parametrize('name', ['a.txt', 'a.txt.zst', 'a.json', 'a.json.gz', 'a.jsonl.bz2', 'a.csv.xz', 'a.xml.bz2'])
def test_every_byte_on_the_disk_is_told(tmp_path, name):
    content = {'.xml': dump(page('A', 'text') * 300), '.json': json.dumps([{'text': 'x' * 99}] * 999), '.csv': 'text\n' + 'x\n' * 999}.get(
        kind_of(name), lines({'text': 'x' * 99} for _ in range(999))).encode()
    path = put(tmp_path/name, PACK.get(Path(name).suffix, bytes)(content))
    ticks = []
    assert texts(path, tick=ticks.append)
    assert sum(ticks) == path.stat().st_size == total_bytes(path) == survey(path).size


def test_memory_does_not_grow_with_the_file(tmp_path):
    r = random.Random(0)
    rows = [json.dumps({'text': r.randbytes(500).hex()}) for _ in range(100)] * 80
    peaks = []
    for name, content in {'a.jsonl.gz': '\n'.join(rows), 'b.json.gz': f'[{",".join(rows)}]', 'c.xml.gz': dump(''.join(page('A', row) for row in rows))}.items():
        path = put(tmp_path/name, gzip.compress(content.encode(), 1))
        assert len(content) > 8e6
        tracemalloc.start()
        assert sum(1 for _ in read_records(path)) == len(rows)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 4e6, peaks


# ---- sources

def test_sources(tmp_path, monkeypatch):
    for name in ('b.txt', 'a.txt', 'sub/c.jsonl', '.hidden/x.txt', 'image.png', 'd.xml-p1p9.bz2'):
        put(tmp_path/'d'/name, bz2.compress(dump(page('D', 'd')).encode()) if 'xml' in name else json.dumps({'text': name}))
    assert [p.name for p in find_files(tmp_path/'d')] == ['a.txt', 'b.txt', 'd.xml-p1p9.bz2', 'c.jsonl']
    assert [p.name for p in find_files(f'{tmp_path}/d/*.txt')] == ['a.txt', 'b.txt']
    assert [p.name for p in find_files(f'{tmp_path}/d/**/*.jsonl')] == ['c.jsonl']
    monkeypatch.chdir(tmp_path/'d')
    assert len(texts('a.txt, b.txt')) == len(texts('a.txt b.txt\n')) == len(texts(['a.txt', 'b.txt'])) == 2
    put(tmp_path/'d'/'with blank.txt', 'x')
    assert texts('with blank.txt') == ['x']
    assert total_bytes('a.txt b.txt') == 2 * len(json.dumps({'text': 'a.txt'})) and total_bytes('a.txt hf:x/y') is None


def test_bad_sources(tmp_path):
    put(tmp_path/'notes.txt', 'x')
    put(tmp_path/'image.png', 'x')
    (tmp_path/'empty').mkdir()
    assert "did you mean 'notes.txt'" in told(lambda: texts(tmp_path/'note.txt'))
    assert 'no file in this folder' in told(lambda: texts(tmp_path/'empty'))
    assert "unknown kind of file '.png'" in told(lambda: texts(tmp_path/'image.png'))
    assert 'no source' in told(lambda: texts(' ,'))
    assert 'expected strict or replace' in told(lambda: texts(tmp_path/'notes.txt', errors='ignore'))
    assert "did you mean 'baike'" in told(lambda: texts(tmp_path/'notes.txt', shape='baikee'))
    for odd in ('x' * 5000, 'nul\0byte', '[', '~nobody/x', '\ud800'): assert 'no such file' in told(lambda odd=odd: texts([odd]))


def test_empty_files(tmp_path):
    for name in ('a.txt', 'a.json', 'a.jsonl', 'a.csv', 'a.xml'):
        assert f'{name}: the file is empty' in told(lambda name=name: texts(put(tmp_path/name, '')))
    for name, content in {'b.txt': '\n \n', 'b.json': '[]', 'b.jsonl': '\n\n', 'b.csv': 'text\n', 'c.json': '{}', 'd.txt': '\ufeff', 'd.json': '\ufeff',
        'b.xml': dump('')}.items():
        assert 'no records' in told(lambda name=name, content=content: texts(put(tmp_path/name, content))) or name == 'c.json'


def test_an_empty_file_among_others_is_noted(tmp_path):
    for name, content in {'a.txt': 'x\n', 'b.txt': '', 'c.jsonl': '\n', 'd.jsonl': '{"text": "y"}'}.items(): put(tmp_path/name, content)
    report = Report()
    assert texts(tmp_path, report=report) == ['x', 'y'] and report.notes == {'files without records': 2}


@pytest.mark.skipif(hasattr(os, 'geteuid') and os.geteuid() == 0, reason='root may read everything')
def test_unreadable_file(tmp_path):
    path = put(tmp_path/'a.txt', 'x')
    path.chmod(0)
    assert 'cannot be read' in told(lambda: texts(path))


# ---- bad content

@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.json', 'a.csv'])
def test_bytes_that_are_not_utf8(tmp_path, name):
    text = {'a.txt': 'fine\ncaf@\n', 'a.jsonl': '{"text": "fine"}\n{"text": "caf@"}\n', 'a.json': '[{"text": "fine"},\n{"text": "caf@"}]',
            'a.csv': 'text\nfine\ncaf@\n'}[name]
    data = text.encode().replace(b'@', b'\xe9')
    for path in (put(tmp_path/name, data), put(tmp_path/f'{name}.gz', gzip.compress(data))):
        assert f'{path.name}: not UTF-8 at byte {data.index(0xe9)} (0xe9)' in told(lambda path=path: texts(path))
        report = Report()
        assert texts(path, errors='replace', report=report) == ['fine', 'caf\ufffd']
        assert report.notes == {'places that are not UTF-8, replaced': 1} and report.check().kept == 2


def test_hints_at_the_encoding(tmp_path):
    assert 'perhaps GB 18030' in told(lambda: texts(put(tmp_path/'a.txt', '青石镇的磨坊\n'.encode('gb18030'))))
    assert 'perhaps UTF-16' in told(lambda: texts(put(tmp_path/'a.txt', '青石镇'.encode('utf-16'))))
    assert 'perhaps' not in told(lambda: texts(put(tmp_path/'a.txt', 'café\n'.encode('latin-1'))))


def test_garbled_lines_spoil_only_themselves(tmp_path):
    good = [{'text': f'document {i}'} for i in range(50)]
    rows = [json.dumps(r) for r in good]
    broken = ['{"text": "torn', '{"text": }', '\0\0\0\0', '[' * 50_000, '{"n": ' + '9' * 9999 + '}', 'not json at all', '{"a": 1} {"b": 2}',
        "{'text': 'single'}", '}']
    for i, b in enumerate(broken): rows.insert(3 + 5 * i, b)
    for name in ('a.jsonl', 'a.json'):
        report = Report()
        assert texts(put(tmp_path/name, '\n'.join(rows)), report=report) == [r['text'] for r in good]
        assert report.rows == len(rows) and {why: n for why, (n, _) in report.rejected.items()} == {'broken JSON': len(broken)}
        assert report.rejected['broken JSON'][1].startswith('line 4: ')


def test_a_file_of_nothing_but_garbage_is_an_error(tmp_path):
    for name, content, count in (('a.jsonl', 'oops\n' * 7, '7 rows'), ('a.csv', 'a,b\n' + '1,2,3\n' * 4, '4 rows')):
        assert f'{name}: none of its {count} can be used' in told(lambda name=name, content=content: texts(put(tmp_path/name, content)))
    assert 'none of its 2 rows' in told(lambda: texts(put(tmp_path/'a.xml', dump(page('T', '#REDIRECT [[A]]') * 2))))


@pytest.mark.parametrize('name, content, where', [
    ('a.json', '[{"text": "a"},\n\n{"text": "b"]', 'line 3'), ('b.json', '[{"text": "a"},\n{"text": "b"}', 'cut off'),
    ('c.json', '"just a string"', 'expected a list'),
    ('d.json', '{"text": "a",\n "b": }', 'line 2'), ('e.json', '[{"text": "a"}] x', 'more text after'), ('f.json', '[' * 100_000, 'broken JSON'),
    ('g.json', '[1, "' + 'x' * 3_000_000, 'broken JSON'), ('h.json', '[' + '9' * 10_000 + ']', 'broken JSON'), ('i.json', 'null', 'expected a list'),
    ('a.csv', 'text\n"open\n', 'never closed')])
def test_files_that_cannot_be_read_on_say_where(tmp_path, name, content, where):
    message = told(lambda: texts(put(tmp_path/name, content)))
    assert name in message and where in message


def test_what_comes_before_the_break_counts(tmp_path):
    path = put(tmp_path/'a.json', '[' + ',\n'.join(json.dumps({'text': f'{i} ' * 50}) for i in range(30_000)) + ',\n{"text": oops}]')
    found = survey(path)
    assert found.stats.documents == found.report.check().kept == 30_000 and 'line 30001: broken JSON' in found.stopped


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda c: st.lists(c) | st.dictionaries(st.text(), c), max_leaves=6)),
       indent=st.sampled_from([None, 0, 2]), seed=st.integers(0, 99))
def test_a_list_in_pieces_is_the_list(values, indent, seed):
    text, r, pieces = json.dumps(values, indent=indent, ensure_ascii=bool(seed % 2)), random.Random(seed), []
    while text:
        n = r.randint(1, 9)
        pieces, text = pieces + [text[:n]], text[n:]
    assert list(json_values(pieces, 'x.json')) == values


def test_records_without_text_list_their_fields(tmp_path):
    message = told(lambda: texts(put(tmp_path/'a.jsonl', lines([{'id': 1, 'body': 'x'}] * 3))))
    assert 'id, body' in message and 'field=NAME' in message
    assert "the field 'texts'" in told(lambda: texts(put(tmp_path/'b.jsonl', lines([{'text': 'x'}])), field='texts'))


def test_odd_records_are_counted(tmp_path):
    odd = [{'text': 'a'}, {'text': None}, {'text': 3}, {'text': ' \n'}, {}, [1, 2], 7, None, 'plain string', {'text': 'a'}, {'content': None}]
    report, shapes = Report(), Counter()
    assert texts(put(tmp_path/'a.jsonl', lines(odd)), report=report, shapes=shapes) == ['a', 'plain string', 'a']
    assert {why: n for why, (n, _) in report.rejected.items()} == {
        'no text in a record of the shape text': 2, 'empty': 1, 'no field known to hold the text': 1, 'not a record': 3,
        'no text in a record of the shape content': 1}
    assert report.check().rows == len(odd) and shapes == {'text': 6, 'unknown': 1, 'content': 1}
    assert all(example for why, (_, example) in report.rejected.items())


def test_ragged_table(tmp_path):
    report = Report()
    assert texts(put(tmp_path/'a.csv', 'id,text\n1,a\n2\n3,b,c\n\n4,"two\nlines"\n5,"x"y\n6,"last, one"\n'), report=report) == ['a', 'two\nlines', 'last, one']
    assert {why: n for why, (n, _) in report.rejected.items()} == {'wrong number of cells': 2, 'broken row': 1}
    assert report.rejected['wrong number of cells'][1].startswith('line 3: 1 where the header has 2')


@pytest.mark.parametrize('text', ['x' * 2_000_000, '\0', 'a\0b', '\u202bمرحبا بالعالم\u202c', '👩‍🚀🏳️‍🌈', '\ud800 alone', 'שלום', 'x\u0085y\u2028z',
    '𠮷野家', 'e\u0301' * 5])
def test_texts_of_every_kind_come_through_every_format(tmp_path, text):
    path = put(tmp_path/'a.jsonl', json.dumps({'text': text}) + '\n')
    put(tmp_path/'a.json', json.dumps([text]))
    assert texts(path) == texts(tmp_path/'a.json') == [text]
    stats = survey(path).stats
    assert stats.characters == sum(stats.scripts.values()) == len(text)
    if '\ud800' not in text:
        put(tmp_path/'a.txt', text + '\n')
        put(tmp_path/'a.jsonl', json.dumps({'text': text}, ensure_ascii=False))
        assert texts(tmp_path/'a.txt') == texts(path) == [text]


def test_a_document_of_100_megabytes(tmp_path):
    path = tmp_path/'a.jsonl.zst'
    size = 100_000_000
    put(path, zst(b'{"text": "before"}\n{"text": "' + '灰河的水'.encode() * (size // 12) + b'"}\n{"text": "after"}\n'))
    assert [len(t) for t in read_texts(path)] == [6, size // 12 * 4, 5]


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.lists(st.text(max_size=3), max_size=3))
SECTIONS = st.lists(st.one_of(VALUES, st.dictionaries(st.sampled_from(['title', 'content', 'sections']), VALUES)), max_size=3)
FIELDS = ['text', 'content', 'title', 'x', 'completion', 'summary', 'paragraphs', 'wikitext', 'author', 'instruction', 'output', 'messages', '']
RECORDS = st.one_of(VALUES, st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
    st.fixed_dictionaries({'sections': SECTIONS}, optional={'title': VALUES, 'summary': VALUES}))


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(st.one_of(RECORDS.map(json.dumps), st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\n'), max_size=20)), min_size=1,
    max_size=40))
def test_the_ledger_always_adds_up(tmp_path_factory, rows):
    "About 5,000 records, whole and garbled"
    path = put(tmp_path_factory.getbasetemp()/'fuzz.jsonl', '\n'.join(rows))
    found = survey(path)
    given_rows = sum(1 for i, row in enumerate(path.read_bytes().decode().split('\n')) if (row.removeprefix('\ufeff') if i == 0 else row).strip())
    if 'no records' in found.stopped or 'is empty' in found.stopped: assert given_rows == 0 and not found.report.rows
    elif 'by its content' in found.stopped: return
    else: assert found.report.check().rows == given_rows
    assert found.report.kept == found.stats.documents
    assert str(found) and found._repr_html_()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=200), name=st.sampled_from(['a.txt', 'a.json', 'a.jsonl', 'a.csv', 'a.xml', 'a.txt.gz', 'a.json.zst', 'a.jsonl.bz2',
    'a.xml.xz']), start=st.sampled_from([b'', b'[', b'{"text": ', b'[{"text": "', b'\x1f\x8b\x08', b'<mediawiki>', b'a,b\n']))
def test_any_bytes_give_documents_or_one_line(tmp_path_factory, data, name, start):
    path = put(tmp_path_factory.getbasetemp()/name, start + data)
    for errors in ('strict', 'replace'):
        report = Report()
        try: assert len(texts(path, errors=errors, report=report)) == report.check().kept
        except UserError as e: assert name in str(e) and '\n' not in str(e); report.check()


# ---- shapes

@pytest.mark.parametrize('record, shape, text', [
    ({'text': 'a', 'title': 'T', 'instruction': 'x', 'output': 'y'}, 'text', 'a'),
    ({'completion': '昭通机场是中国的一座机场。', 'source': 'wikipedia.zh2307'}, 'completion', '昭通机场是中国的一座机场。'),
    ({'id': 0, 'uniqueKey': 'k', 'titleUkey': 't', 'dataType': '博客', 'title': '水位', 'content': '上涨。'}, 'content', '水位\n上涨。'),
    ({'title': None, 'content': '上涨。'}, 'content', '上涨。'), ({'content': ['甲', '乙']}, 'content', '甲\n乙'),
    ({'title': '只有题', 'content': None}, 'content', None),
    ({'title': '春曉', 'author': '孟浩然', 'paragraphs': ['甲', '乙']}, 'poem', '《春曉》孟浩然\n甲\n乙'), ({'paragraphs': ['甲']}, 'poem', '甲'),
    ({'title': '灰河', 'wikitext': "'''灰河'''是[[河流]]。"}, 'mediawiki', '灰河\n灰河是河流。'), ({'title': '灰河', 'wikitext': '{{stub}}'}, 'mediawiki', ''),
    ({'title': 'A', 'summary': 's', 'sections': [{'title': 'B', 'content': 'b'}]}, 'baike', 'A\ns\nB\nb'),
    ({'instruction': 'x', 'input': '', 'output': 'y'}, 'instruction/output', None), ({'input': 'x', 'target': 'y'}, 'input/target', None),
    ({'instruction': 'x', 'instances': []}, 'instances', None), ({'conversations': [], 'chosen': {}, 'rejected': {}}, 'conversations', None),
    ({'messages': []}, 'messages', None), ({'prompt': 'x', 'completion': 'y'}, 'prompt/completion', None), ({'id': 1}, None, None)])
def test_shapes(record, shape, text): assert (shape_of(record), text_of(record)) == (shape, text)


def test_no_text_is_ever_the_word_none():
    shapes = ('title', 'summary', 'sections'), ('title', 'content'), ('title', 'author', 'paragraphs'), ('text',), ('title', 'wikitext'), ('completion',)
    for record in (dict.fromkeys(fields, v) for fields in shapes for v in (None, 3, {}, [None], True, [3])):
        assert 'None' not in (text_of(record) or '') and not (text_of(record) or '').strip()
    deep = {'title': 'A', 'summary': None, 'sections': [{'title': None, 'content': None}, {'title': 'B', 'content': 4}, {'content': 'c', 'sections': None},
        {'sections': [{'title': 'd'}]}, {'sections': 5}]}
    assert baike_text(deep) == 'A\nB\nc\nd'


def test_every_section_is_kept():
    inner = lambda i: [{'title': f'小节{i}.{j}', 'content': f'细节{i}.{j}。'} for j in range(i)]
    sections = [{'title': f'节{i}', 'content': f'内容{i}。', 'sections': inner(i)} for i in range(20)]
    text = baike_text({'title': '灰河', 'summary': '灰河是河。', 'sections': sections})
    wanted = ['灰河', '灰河是河。'] + [line for i in range(20) for line in [f'节{i}', f'内容{i}。',
        *(l for j in range(i) for l in (f'小节{i}.{j}', f'细节{i}.{j}。'))]]
    assert text.split('\n') == wanted


def test_sections_without_end(tmp_path):
    deep = '{"sections": [' * 400 + '"end"' + ']}' * 400
    found = survey(put(tmp_path/'a.jsonl', f'{deep}\n{{"text": "a"}}\n{"[" * 5000}\n'))
    assert found.report.check().rows == 3 and found.stats.documents in (1, 2) and found.report.rejected['broken JSON'][0] == 1
    shallow = {'content': 'end'}
    for _ in range(50): shallow = {'title': 't', 'sections': [shallow]}
    assert text_of(shallow) == 't\n' * 50 + 'end'


def test_a_named_field_or_shape_wins(tmp_path):
    path = put(tmp_path/'a.jsonl', lines([{'text': 'no', 'body': 'yes'}, {'body': ['two', 'lines']}, {'text': 'lost'}]))
    report = Report()
    assert texts(path, field='body', report=report) == ['yes', 'two\nlines']
    assert report.rejected["no text in the field 'body'"][0] == 1
    path = put(tmp_path/'b.jsonl', lines([{'title': 'T', 'text': 'short', 'content': 'long'}]))
    assert texts(path) == ['short'] and texts(path, shape='content') == ['T\nlong'] and texts(path, field='title+text+absent') == ['T\nshort']
    assert texts(put(tmp_path/'c.jsonl', lines([{'a+b': 'x', 'a': 'y'}])), field='a+b') == ['x']


def test_the_shape_of_a_source(tmp_path):
    for record, shape in (({'instruction': 'a', 'output': 'b'}, 'instruction/output'), ({'sections': []}, 'baike'), ({'id': 1}, None)):
        assert source_shape(put(tmp_path/'a.jsonl', 'garbled\n' + lines([record]))) == shape
    assert set(SHAPES).isdisjoint(INSTRUCTIONS)


# ---- MediaWiki

def page(title, text, ns=0, extra='', model='wikitext'):
    import html
    return (f'<page><title>{html.escape(title)}</title><ns>{ns}</ns><id>1</id>{extra}<revision><id>2</id><model>{model}</model>'
            f'<text xml:space="preserve">{html.escape(text)}</text></revision></page>\n')


def dump(pages, version='0.11'):
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-{version}/" xml:lang="zh"><siteinfo><sitename>W</sitename></siteinfo>{pages}</mediawiki>'


@pytest.mark.parametrize('name, pack', [('a.xml', bytes), ('a.xml.bz2', bz2.compress), ('a.xml.gz', gzip.compress), ('a.xml-p1p99.bz2', bz2.compress)])
def test_a_dump(tmp_path, name, pack):
    pages = [page('灰河', "'''灰河'''是[[河流|一条河]]。"), page('灰水', '#REDIRECT [[灰河]]'), page('灰江', 'x', extra='<redirect title="灰河" />'),
        page('Talk:灰河', '讨论', ns=1),
             page('模块', 'return {}', model='Scribunto'), page('空', ''), page('只有模板', '{{stub}}'), page('A & B', 'a < b'),
             page('又一', '#重定向 [[灰河]]')]
    report = Report()
    found = texts(put(tmp_path/name, pack(dump(''.join(pages)).encode())), report=report)
    assert found == ['灰河\n灰河是一条河。', 'A & B\na < b']
    assert {why: n for why, (n, _) in report.check().rejected.items()} == {'redirect': 3, 'not an article': 1, 'not wikitext': 1, 'empty': 2}
    assert report.rejected['redirect'][1] == '灰水' and report.rows == 9


def test_the_last_revision_counts_and_versions_do_not_matter(tmp_path):
    old = '<revision><id>1</id><text>old</text></revision>'
    assert texts(put(tmp_path/'a.xml', dump(page('A', 'new', extra=old), version='0.3'))) == ['A\nnew']


def test_broken_dumps(tmp_path):
    whole = dump(page('A', 'a') * 3)
    found = survey(put(tmp_path/'a.xml', whole[:-60]))
    assert found.stats.documents == 2 and 'broken XML' in found.stopped
    found = survey(put(tmp_path/'a.xml.bz2', bz2.compress(whole.encode())[:-4]))
    assert 'the archive is cut off' in found.stopped
    assert 'not a MediaWiki dump' in told(lambda: texts(put(tmp_path/'b.xml', '<rss><page>x</page></rss>')))
    entities = ''.join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(8))
    bomb = f'<!DOCTYPE m [<!ENTITY a "{"x" * 1000}">{entities}]><mediawiki>&i;</mediawiki>'
    assert 'broken XML' in told(lambda: texts(put(tmp_path/'bomb.xml', bomb)))


@pytest.mark.parametrize('wikitext, text', [
    ("'''灰河'''（{{lang-en|River Ash}}，{{IPA|x}}）", '灰河（River Ash）'), ('灰河（{{IPA|x}}）在北方', '灰河在北方'),
    ('a<ref>note</ref> b<ref name="x" /> c', 'a b c'), ('[[File:A.jpg|thumb|[[caption]] text]]x', 'x'), ('[[分类:河流]][[Category:X]]y', 'y'),
    ('[[en:Ash]] z', 'z'),
    ('[[Re:Zero]]', 'Re:Zero'), ('[[:Category:河]]', 'Category:河'), ('[http://a.b 灰河网]和 http://c.d', '灰河网和'), ('a<br>b<br/>c', 'a\nb\nc'),
    ('a<!-- b -->c', 'ac'),
    ('5&nbsp;km &lt; 6', '5 km < 6'), ('* a\n** b\n# c\n: d', '- a\n- b\n- c\nd'), ('{|\n|a\n|{{x|\n{|\n|b\n|}\n}}\n|}\nafter', 'after'),
    ('<math>x^2</math>', '$x^2$'),
    ("''i'' and '''b'''", 'i and b'), ('== A ==\ntext\n== References ==\n* x\n=== Web ===\ny\n== B ==\nz', 'A\ntext\n\nB\nz'), ('== A ==\n{{stub}}', ''),
    ('__NOTOC__x', 'x'),
    ('<nowiki>[[a]]</nowiki>', '[[a]]'), ('-{zh-hans:计算机;zh-hant:電腦}-', '计算机'), ('-{zh-hant:電腦;zh-tw:電腦}-', '電腦'), ('-{原样}-', '原样'),
    ('-{H|zh-cn:a;zh-tw:b}-x', 'x'), ('x-{A|zh-cn:甲;zh-tw:乙}-', 'x甲'),
    ('{{convert|80|km|mi}} long', '80 km long'), ('a<ref name="x">never closed', 'anever closed'), ('{{As of|2020}}，{{ quote |甲[[乙]]}}', '2020，甲乙'),
    ('<gallery>\na.png|b\n</gallery>c', 'c'), ('<poem>甲\n乙</poem>', '甲\n乙'), ('{{nowrap|一 二}}', '一 二'), ('', ''), ('#REDIRECT [[A]]', '- REDIRECT A')])
def test_wikitext(wikitext, text): assert wiki_text(wikitext) == text


MARKUP = ("[[ ]] {{ }} {| |} | = == = \n '' \'\'\' <ref> </ref> < > / & &#xD800; &#0; &#x110000; &nbsp; -{ }- zh-hans: ; * # <nowiki> <math> </math> [http://a "
          "http:// File: a 灰河 <!-- --> {{{ }}} \0 😀 <br __TOC__ <table> <li> : lang-en convert|80").split(' ')
WIKI = st.lists(st.sampled_from(MARKUP), max_size=60).map(''.join)


@settings(max_examples=300, deadline=None)
@given(WIKI)
def test_any_wikitext_gives_some_text(wikitext):
    text = wiki_text(wikitext)
    assert isinstance(text, str) and text == text.strip()


@pytest.mark.parametrize('text', ['{{' * 5000, '[[' * 5000, '<b>' * 2000, "''" * 5000, '{|\n' * 1000, '-{' * 100_000, '（' * 100_000, ',' * 100_000,
    '( ,' * 30_000, '- ' * 50_000 + 'x', '\n' * 100_000])
def test_no_wikitext_takes_forever(text): wiki_text(text), wiki_tidy(text)


# ---- processes

def test_processes_change_nothing(tmp_path):
    path = put(tmp_path/'a.xml', dump(''.join(page(f'P{i}', f"'''{i}''' is a number. {{{{stub}}}}" if i % 7 else '{{stub}}') for i in range(300))))
    reports = Report(), Report()
    alone, together = (texts(path, report=r, workers=w) for r, w in zip(reports, (0, 2)))
    assert alone == together and len(alone) == 257 and str(reports[0]) == str(reports[1])


def test_processes_take_no_more_than_they_need():
    taken = []
    def items():
        for i in range(10_000): taken.append(i); yield -i
    stream = map_ordered(abs, items(), workers=1, n=10)
    assert [next(stream) for _ in range(25)] == [(-i, i) for i in range(25)]
    assert len(taken) < 100
    stream.close()


def test_a_data_set_made_by_several_processes(tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'cache')
    for i in range(4): put(tmp_path/'d'/f'{i}.jsonl.gz', gzip.compress(lines({'title': f'{i}', 'content': f'{n}'} for n in range(50)).encode()))
    made = as_dataset(tmp_path/'d', workers=2)
    assert made['text'][:] == texts(tmp_path/'d') and made['file'][-1] == '3.jsonl.gz'
    assert as_dataset(tmp_path/'d', field='content')['text'][:] == [str(n) for n in range(50)] * 4
    put(tmp_path/'d'/'3.jsonl.gz', b'cut')
    assert 'not a .gz archive' in told(lambda: as_dataset(tmp_path/'d', workers=2))
    made.save_to_disk(tmp_path/'saved')
    assert texts(tmp_path/'saved') == made['text'][:]


# ---- reports

@given(st.text())
def test_every_character_has_a_script(text): assert sum(count_scripts(text).values()) == len(text)


def test_the_table_of_scripts_is_in_order():
    starts = [start for start, _ in SCRIPTS]
    assert starts == sorted(set(starts)) and starts[0] == 0


def test_reports_of_several_sources(tmp_path):
    put(tmp_path/'a.txt', '一\n二\n\n三三\n')
    put(tmp_path/'b.jsonl', lines([{'text': 'x' * 100}, {'text': ''}, {'id': 1}]))
    put(tmp_path/'c.json', '[{"text": "half"}, {"text"')
    put(tmp_path/'d.jsonl', lines([{'messages': []}]))
    report = corpus_report(tmp_path)
    assert isinstance(report, CorpusReport) and all(isinstance(s, Survey) for s in report.surveys)
    assert [(s.report.rows, s.report.kept, bool(s.stopped)) for s in report.surveys] == [(3, 3, False), (3, 1, False), (1, 1, True), (1, 0, True)]
    total = report.total()
    assert (total.rows, total.kept, total.rejected['empty'][0]) == (8, 5, 1)
    assert [s.stats.quantiles((0, .5, 1)) for s in report.surveys[:2]] == [[1, 1, 2], [100] * 3]
    assert 'b.jsonl' in str(report) and 'all sources' in str(report) and '<table>' in report._repr_html_()
    assert report.surveys[0].stats.mainly == {'Han': 3} and report.surveys[1].stats.scripts == {'Latin': 100}


# ---- imports and real files

def test_reading_plain_files_imports_nothing_heavy(tmp_path):
    put(tmp_path/'a.txt', 'x')
    code = ('import sys; from lm_nb.corpus import read_texts; list(read_texts(sys.argv[1])); '
            'print([m for m in ("torch", "datasets", "pyarrow", "pandas", "mwparserfromhell", "zstandard", "matplotlib") if m in sys.modules])')
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path/'a.txt')], capture_output=True, text=True, cwd=root())
    assert done.stdout.strip() == '[]'


real = pytest.mark.skipif(not (REAL/'wiki_demo.txt').exists(),
    reason='needs wiki_demo.txt, alpaca_zh_demo.json, dpo_zh_demo.json and belle_zh_seed_tasks.jsonl; set LM_NB_REAL_DATA to their folder')


@real
def test_real_files():
    assert len(texts(REAL/'wiki_demo.txt')) == 30
    report = Report()
    records = list(read_records(REAL/'alpaca_zh_demo.json', report))
    assert report.rows == report.kept == len(records) == 1000 and set(records[0]) == {'instruction', 'input', 'output'}
    assert records == json.loads((REAL/'alpaca_zh_demo.json').read_text(encoding='utf-8'))


@real
def test_reports_on_real_files_add_up():
    report = corpus_report(REAL)
    assert {Path(s.report.source).name: (s.report.check().rows, *s.shapes) for s in report.surveys} == {
        'alpaca_zh_demo.json': (1000, 'instruction/output'), 'belle_zh_seed_tasks.jsonl': (175, 'instances'), 'dpo_zh_demo.json': (300, 'conversations'),
        'wiki_demo.txt': (30, 'text')}
    assert report.total().rows == 1505


POEMS = root()/'data'/'downloads'/'poems'


@pytest.mark.skipif(not (POEMS/'tang-valid.jsonl').exists(), reason='needs the poems: lm-nb fetch poems')
def test_the_poems_add_up():
    found = survey(POEMS/'tang-valid.jsonl')
    assert found.report.check().rows == found.stats.documents > 1000 and not found.stopped
    assert found.stats.mainly.most_common(1)[0][0] == 'Han'
