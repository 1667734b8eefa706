"Readers on files as people have them: every format, compressed or not, and every kind of damage"
import bz2
import gzip
import json
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
from source_files import (
    COMPRESS, NEEDS_REAL, REAL, dump, error_of, json_lines, page, put, reading_fails, rejected,
    texts)

from lm_nb.core import UserError, root
from lm_nb.data.corpus import (
    FORMATS, _baike_text, _format_and_text, _json_values, as_dataset, format_of, has_instructions,
    map_ordered, read_records, read_texts, source_format, with_counts)
from lm_nb.data.instructions import read_instructions
from lm_nb.data.sources import (
    Report, _file_kind, find_files, join_sources, open_bytes, split_sources, total_bytes)
from lm_nb.data.survey import corpus_report, survey_source

DOCS = ['春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少。', 'A line, with "quotes"; and a\ttab.',
        'naïve']


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


# ---- the report of every row

def test_a_report_that_does_not_add_up_is_not_shown():
    report = Report('x', rows=5, kept=3, rejected={'empty': [1, '']})
    for show in (str, repr, Report.check, Report._repr_markdown_):
        with pytest.raises(AssertionError, match='5 rows read, but 4'): show(report)
    report.rejected['empty'][0] = 2
    assert report.check() is report and '5' in str(report)


def test_the_first_example_is_kept_and_short():
    report = Report()
    for example in ('a' * 5000, 'second'): report.row(); report.reject('long', example)
    assert report.rejected['long'] == [2, 'a' * 60]


@pytest.mark.parametrize('example', ['\ud800', '\x1b[2J', 'a\u202eb', '\0', {'a': '\udcff'},
                                     b'\xff', None])
def test_examples_can_be_printed(example):
    report = Report()
    report.row()
    report.reject('odd', example)
    assert str(report).encode() and report.rejected['odd'][1].isprintable()


@pytest.mark.parametrize('example', ['<img onerror=x>', '![](http://a.b/c)', '[a](b)', '$x$',
                                     '`a`'])
def test_an_example_is_not_obeyed_as_html_or_markdown(example):
    from markdown_it import MarkdownIt
    report = Report()
    report.row()
    report.reject('<script>', f'{example} | a\\|b')
    page = MarkdownIt().enable('table').render(report._repr_markdown_())
    for tag in '<script', '<img', '<a ', '<code', '<em': assert tag not in page
    assert page.count('<td') == 6 and '$' not in report._repr_markdown_().replace('\\$', '')


# ---- formats of files

FILES = [
    ('a.jsonl', lambda p: put(p, json_lines({'text': d} for d in DOCS))),
    ('a.ndjson', lambda p: put(p, json_lines({'completion': d} for d in DOCS))),
    ('list.json', lambda p: put(p, json.dumps([{'text': d} for d in DOCS], indent=2))),
    ('oneline.json', lambda p: put(p, json.dumps([{'text': d} for d in DOCS]))),
    ('strings.json', lambda p: put(p, json.dumps(DOCS))),
    ('wrapped.json', lambda p: put(p, json.dumps({'n': 3, 'rows': [{'text': d} for d in DOCS]}))),
    ('wrapped2.json', lambda p: put(p, json.dumps({'n': 3, 'rows': [{'text': d} for d in DOCS]},
                                                  indent=1))),
    ('lines.json', lambda p: put(p, '\n' + json_lines({'content': d} for d in DOCS))),
    ('inarow.json', lambda p: put(p, '\n'.join(json.dumps({'text': d}, indent=1) for d in DOCS))),
    ('bom.jsonl', lambda p: put(p, '\ufeff' + json_lines({'text': d} for d in DOCS))),
    ('bom.json', lambda p: put(p, '\ufeff' + json.dumps(DOCS))),
    ('crlf.jsonl', lambda p: put(p, json_lines({'text': d} for d in DOCS).replace('\n', '\r\n'))),
    ('a.csv', write_csv),
    ('a.tsv', lambda p: write_csv(p, '\t')),
]


@pytest.mark.parametrize('name, write', FILES)
def test_every_text_format_gives_the_same_documents(tmp_path, name, write):
    write(tmp_path/name)
    assert texts(tmp_path/name) == DOCS
    for ending, compress in COMPRESS.items():
        put(tmp_path/(name + ending), compress((tmp_path/name).read_bytes()))
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
    for part in ('train', 'test'):
        put(hub/'data'/f'{part}-00000-of-00001.parquet', (columns/'a.parquet').read_bytes())
    assert texts(f'hf:{hub}') == texts(f'hf:{hub}:default:test') == DOCS
    assert 'nope' in error_of(lambda: texts(f'hf:{hub}::nope'))
    datasets.Dataset.from_dict({'text': DOCS}).save_to_disk(tmp_path/'saved')
    assert texts(tmp_path/'saved') == DOCS
    assert corpus_report(f'{tmp_path}/saved hf:{hub}').total().kept == 6


def test_the_hub_is_streamed(tmp_path, monkeypatch):
    import datasets
    asked = []
    monkeypatch.setattr(datasets, 'load_dataset', lambda *a,
                        **kw: asked.append((a, kw)) or iter([{'text': 'a'}]))
    assert texts('hf:owner/name:20231101.zh:train') == ['a']
    assert asked == [(('owner/name', '20231101.zh'), {'split': 'train', 'streaming': True})]


def test_a_hub_that_breaks_off_is_one_line(monkeypatch):
    import datasets

    def some(*a, **kw):
        yield {'text': 'a'}
        raise ConnectionError('the line went dead\nsecond line')
    monkeypatch.setattr(datasets, 'load_dataset', some)
    found = survey_source('hf:owner/name')
    assert found.stats.documents == 1
    assert found.stopped == 'hf:owner/name: cannot be loaded: the line went dead'


def test_damaged_columns(tmp_path):
    for name in ('a.parquet', 'a.arrow'):
        for content in (b'', b'PAR1 but no more', b'\0' * 500):
            assert name in reading_fails(tmp_path/name, content)
    assert 'unpack it' in reading_fails(tmp_path/'a.parquet.gz', gzip.compress(b'x'))


def test_text_files(tmp_path):
    path = put(tmp_path/'a.txt', 'one\r\n\r\n  \ntwo\u2028still two\x0b\nthree')
    assert [r['text'] for r in read_records(path)] == ['one', 'two\u2028still two\x0b', 'three']
    assert [r['text'] for r in read_records(path, separator='blank')] == ['one',
        'two\u2028still two\x0b\nthree']
    assert len(list(read_records(path, separator='file'))) == 1
    assert 'separator = word' in error_of(lambda: list(read_records(path, separator='word')))


def test_texts_are_raw(tmp_path):
    raw = ['  a\x00b ', 'same', 'same', 'e\u0301', '\ufeffx']
    assert texts(put(tmp_path/'a.jsonl', json_lines({'text': t} for t in raw))) == raw


# ---- compressed files

@pytest.mark.parametrize('ending', COMPRESS)
def test_a_cut_archive_gives_what_it_holds_and_one_line(tmp_path, ending):
    r = random.Random(0)
    # several blocks of any format
    rows = [f'{i} ' + ''.join(r.choices('abcdefgh', k=200)) for i in range(20_000)]
    packed = COMPRESS[ending](json_lines({'text': row} for row in rows).encode())
    kept = []
    for cut in (len(packed) - 1, len(packed) // 2, 10):
        report, found = Report(), []
        path = put(tmp_path/f'a.jsonl{ending}', packed[:cut])
        with pytest.raises(UserError, match='the archive is cut off') as e:
            for text in read_texts(path, report=report): found.append(text)
        assert path.name in str(e.value)
        assert found == rows[:len(found)] and report.check().kept == len(found)
        kept.append(len(found))
    assert kept[0] > 18_000 and 5_000 < kept[1] < 12_000 and kept[2] == 0


@pytest.mark.parametrize('ending', COMPRESS)
def test_damaged_and_foreign_archives(tmp_path, ending):
    compress, path = COMPRESS[ending], tmp_path/f'a.txt{ending}'
    assert f'not a {ending} archive' in reading_fails(path, b'just text\n' * 50)
    letters = ''.join(random.Random(1).choices('abcdefgh\n', k=100_000))
    packed = bytearray(compress(letters.encode()))
    packed[len(packed) // 2] ^= 255
    assert path.name in reading_fails(path, bytes(packed))
    assert 'the file is empty' in reading_fails(tmp_path/f'b.txt{ending}', b'')
    assert 'no records' in reading_fails(tmp_path/f'c.txt{ending}', compress(b''))
    advice = f'{ending} archive; give it that ending'
    assert advice in reading_fails(tmp_path/'d.txt', compress(b'x'))


@pytest.mark.parametrize('ending', COMPRESS)
def test_streams_in_a_row_and_padding(tmp_path, ending):
    parts = [f'part {i}\n'.encode() * 3 for i in range(5)]
    path = put(tmp_path/('a.txt' + ending), b''.join(map(COMPRESS[ending], parts)) + b'\0' * 512)
    assert open_bytes(path).read() == b''.join(parts)


def test_zip_and_rar_are_named(tmp_path):
    assert '.zip archive; unpack it' in reading_fails(tmp_path/'a.jsonl', b'PK\x03\x04....')
    assert "unknown kind of file '.rar'" in reading_fails(tmp_path/'a.rar', b'Rar!\x1a\x07')
    for name, todo in {'a.xlsx': 'save it as .csv', 'a.doc': '.docx', 'a.zip': 'unpack'}.items():
        assert todo in reading_fails(tmp_path/name, b'x')
    assert "unknown kind of file '.tar'" in reading_fails(tmp_path/'a.tar.gz', gzip.compress(b'x'))
    assert 'unknown kind of file' in reading_fails(tmp_path/'a.gz', gzip.compress(b'x'))


ENDINGS = 'a.txt', 'a.txt.zst', 'a.json', 'a.json.gz', 'a.jsonl.bz2', 'a.csv.xz', 'a.xml.bz2'


@pytest.mark.parametrize('name', ENDINGS)
def test_every_byte_on_the_disk_is_counted(tmp_path, name):
    records = [{'text': 'x' * 99}] * 999
    content = {'.xml': dump(page('A', 'text') * 300), '.json': json.dumps(records),
               '.csv': 'text\n' + 'x\n' * 999}.get(_file_kind(name), json_lines(records))
    path = put(tmp_path/name, COMPRESS.get(Path(name).suffix, bytes)(content.encode()))
    ticks = []
    assert texts(path, tick=ticks.append)
    assert sum(ticks) == path.stat().st_size == total_bytes(path) == survey_source(path).size


def test_memory_does_not_grow_with_the_file(tmp_path):
    r = random.Random(0)
    rows = [json.dumps({'text': r.randbytes(500).hex()}) for _ in range(100)] * 80
    contents = {'a.jsonl.gz': '\n'.join(rows), 'b.json.gz': f'[{",".join(rows)}]',
                'c.xml.gz': dump(''.join(page('A', row) for row in rows))}
    peaks = []
    for name, content in contents.items():
        path = put(tmp_path/name, gzip.compress(content.encode(), 1))
        assert len(content) > 8e6
        tracemalloc.start()
        assert sum(1 for _ in read_records(path)) == len(rows)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 4e6, peaks


# ---- sources

def test_sources(tmp_path, monkeypatch):
    folder = tmp_path/'d'
    for name in ('b.txt', 'a.txt', 'sub/c.jsonl', '.hidden/x.txt', 'image.png'):
        put(folder/name, json.dumps({'text': name}))
    put(folder/'d.xml-p1p9.bz2', bz2.compress(dump(page('D', 'd')).encode()))
    found = [p.name for p in find_files(folder)]
    assert found == ['a.txt', 'b.txt', 'd.xml-p1p9.bz2', 'c.jsonl']
    assert [p.name for p in find_files(f'{folder}/*.txt')] == ['a.txt', 'b.txt']
    assert [p.name for p in find_files(f'{folder}/**/*.jsonl')] == ['c.jsonl']
    monkeypatch.chdir(folder)
    for both in ('a.txt, b.txt', 'a.txt b.txt\n', ['a.txt', 'b.txt']): assert len(texts(both)) == 2
    put(folder/'with blank.txt', 'x')
    assert texts('with blank.txt') == ['x']
    assert total_bytes('a.txt b.txt') == 2 * len(json.dumps({'text': 'a.txt'}))
    assert total_bytes('a.txt hf:x/y') is None


def test_bad_sources(tmp_path):
    notes = put(tmp_path/'notes.txt', 'x')
    (tmp_path/'empty').mkdir()
    assert "did you mean 'notes.txt'" in reading_fails(tmp_path/'note.txt')
    assert 'no file in this folder' in reading_fails(tmp_path/'empty')
    assert "unknown kind of file '.png'" in reading_fails(tmp_path/'image.png', 'x')
    assert 'no source' in reading_fails(' ,')
    assert 'expected strict or replace' in reading_fails(notes, errors='ignore')
    assert "did you mean 'blank'" in reading_fails(notes, separator='blanks')
    assert "did you mean 'gb18030'" in reading_fails(notes, encoding='gb1803')
    assert 'Python knows no such encoding' in reading_fails(notes, encoding='base64')
    assert 'expected pairs' in reading_fails(notes, fields='question')
    assert "did you mean 'baike'" in reading_fails(notes, format='baikee')
    assert 'no such format of text' in reading_fails(notes, format='instruction/output')
    for odd in ('x' * 5000, 'nul\0byte', '[', '~nobody/x', '\ud800'):
        assert 'no such file' in reading_fails([odd])


def test_empty_files(tmp_path):
    for name in ('a.txt', 'a.json', 'a.jsonl', 'a.csv', 'a.xml'):
        assert f'{name}: the file is empty' in reading_fails(tmp_path/name, '')
    contents = {'b.txt': '\n \n', 'b.json': '[]', 'b.jsonl': '\n\n', 'b.csv': 'text\n',
                'd.txt': '\ufeff', 'd.json': '\ufeff', 'b.xml': dump('')}
    for name, content in contents.items():
        assert 'no records' in reading_fails(tmp_path/name, content)
    assert 'the first record has: ; set field' in reading_fails(tmp_path/'c.json', '{}')


def test_an_empty_file_among_others_is_noted(tmp_path):
    contents = {'a.txt': 'x\n', 'b.txt': '', 'c.jsonl': '\n', 'd.jsonl': '{"text": "y"}'}
    for name, content in contents.items(): put(tmp_path/name, content)
    report = Report()
    assert texts(tmp_path, report=report) == ['x', 'y']
    assert report.notes == {'files without records': 2}


@pytest.mark.skipif(hasattr(os, 'geteuid') and os.geteuid() == 0, reason='root may read everything')
def test_unreadable_file(tmp_path):
    path = put(tmp_path/'a.txt', 'x')
    path.chmod(0)
    assert 'cannot be read' in reading_fails(path)


NAMES = st.text(st.sampled_from(' ,"\'ab/\n*'), min_size=1, max_size=6)


@given(st.lists(NAMES, min_size=1))
def test_sources_that_were_joined_are_split_into_the_same(names):
    assert split_sources(join_sources(names)) == names


def test_a_name_that_exists_does_not_hide_two_others(tmp_path, monkeypatch):
    for name in ('a', 'b', 'a b'): put(tmp_path/name, '')
    monkeypatch.chdir(tmp_path)
    for names in (['a', 'b'], ['a b'], ['a b', 'a']):
        assert split_sources(join_sources(names)) == names
    assert split_sources("'my dir/a' \"b c\" d,e") == ['my dir/a', 'b c', 'd', 'e']
    assert split_sources("it's  o'clock") == ["it's", "o'clock"]


def test_blanks_in_the_name_of_a_folder(tmp_path):
    paths = [put(tmp_path/'my dir'/f'{name} x.txt', name) for name in 'ab']
    assert texts(join_sources(paths)) == texts(paths) == texts(tmp_path/'my dir') == ['a', 'b']


def test_a_file_name_that_is_no_text_is_refused(tmp_path):
    path = os.fsencode(tmp_path) + b'/\xc4\xe3.txt'
    with open(path, 'w') as f: f.write('x\n')
    for source in (tmp_path, os.fsdecode(path), f'{tmp_path}/*.txt'):
        assert r'\udcc4\udce3.txt: the bytes of this name are no text' in reading_fails([source])
        report = corpus_report([source])
        assert report.stopped() and (str(report) + report._repr_markdown_()).encode()


# ---- bad content

NOT_UTF8 = {
    'a.txt': b'fine\ncaf\xe9\n', 'a.jsonl': b'{"text": "fine"}\n{"text": "caf\xe9"}\n',
    'a.json': b'[{"text": "fine"},\n{"text": "caf\xe9"}]', 'a.csv': b'text\nfine\ncaf\xe9\n'}


@pytest.mark.parametrize('name', NOT_UTF8)
def test_bytes_that_are_not_utf8(tmp_path, name):
    data = NOT_UTF8[name]
    where = f'not UTF-8 at byte {data.index(0xe9)} (0xe9)'
    for path in (put(tmp_path/name, data), put(tmp_path/f'{name}.gz', gzip.compress(data))):
        assert f'{path.name}: {where}' in reading_fails(path)
        report = Report()
        assert texts(path, errors='replace', report=report) == ['fine', 'caf\ufffd']
        assert report.notes == {'places that are not UTF-8, replaced': 1}
        assert report.check().kept == 2


def test_hints_at_the_encoding(tmp_path):
    path = tmp_path/'a.txt'
    assert 'set encoding=gb18030' in reading_fails(path, '青石镇的磨坊\n'.encode('gb18030'))
    assert 'set encoding=utf-16' in reading_fails(path, '青石镇'.encode('utf-16'))
    for name in 'utf-16-le', 'utf-16-be':
        assert f'set encoding={name}' in reading_fails(path, 'The river Ash'.encode(name))
    assert 'perhaps' not in reading_fails(path, 'café\n'.encode('latin-1'))


@pytest.mark.parametrize('encoding', ['gb18030', 'gbk', 'utf-16', 'utf-16-le', 'utf-8', 'UTF8',
                                      'utf_32'])
@pytest.mark.parametrize('name', ['a.txt', 'a.txt.gz', 'a.json', 'a.jsonl', 'a.csv', 'a.tsv',
                                  'a.md'])
def test_files_in_another_encoding(tmp_path, name, encoding):
    docs = ['河水清凉，', '石桥上的 "Oda"', 'a line'] * 9
    kind = _file_kind(name)
    content = {'.json': json.dumps(docs, ensure_ascii=False), '.jsonl': json_lines(docs), '.csv':
               'text\n' + ''.join(f'"{d}"\n'.replace('"Oda"', '""Oda""') for d in docs),
               '.tsv': 'text\n' + '\n'.join(docs)}.get(kind, '\n'.join(docs))
    data = content.encode(encoding)
    path = put(tmp_path/name, gzip.compress(data) if name.endswith('.gz') else data)
    wanted = ['\n'.join(docs)] if kind == '.md' else docs
    assert texts(path, encoding=encoding) == wanted
    if encoding in ('gb18030', 'gbk'):
        put(path, gzip.compress(data + b'\xff\n') if name.endswith('.gz') else data + b'\xff\n')
        message = error_of(lambda: texts(path, encoding=encoding))
        assert f'not {encoding} at byte {len(data):,}' in message and 'errors=replace' in message


def test_a_file_of_utf8_among_others_stays_what_it_is(tmp_path):
    put(tmp_path/'a.txt', '灰河的河水\n'.encode('gb18030'))
    put(tmp_path/'b.txt', '灰河的河水\n')
    put(tmp_path/'c.html', '<p>灰河的河水')
    put(tmp_path/'d.txt', 'plain\n')
    report = Report()
    assert texts(tmp_path, report=report, encoding='gb18030') == ['灰河的河水'] * 3 + ['plain']
    assert report.notes['files that are UTF-8 and not gb18030'] == 1


def test_a_bad_place_in_another_encoding_is_counted(tmp_path):
    report, path = Report(), put(tmp_path/'a.txt', '河水\n'.encode('gbk') + b'\xff\n')
    assert texts(path, report=report, encoding='gbk', errors='replace') == ['河水', '\ufffd']
    assert report.notes == {'places not gbk, replaced': 1}


HALVES = ['{"text": "a \\ud800"}', '{"text": "a", "\\udc00": 1}', '{"text": ["a", "\\ud83d"]}',
          '{"messages": [{"role": "\\ud800", "content": "x"}], "text": "a"}', '"\\udfff"']


@pytest.mark.parametrize('row', HALVES)
def test_half_of_a_surrogate_pair_passes_no_gate(tmp_path, row):
    whole = json.dumps({'text': 'a \U0001f680'})  # a pair that is whole
    path, report = put(tmp_path/'a.jsonl', f'{whole}\n{row}\n{whole}\n'), Report()
    assert texts(path, report=report) == ['a \U0001f680'] * 2
    assert list(rejected(report)) == ['half of a surrogate pair in it (errors=replace mends it)']
    report = Report()
    for record in read_records(path, report, errors='replace'):
        json.dumps(record, ensure_ascii=False).encode()
    assert report.check().kept == 3
    assert report.notes == {'halves of surrogate pairs, replaced': 1}
    for shown in (str, repr, Report._repr_markdown_): shown(report).encode()
    for name in ('a.json', 'b.jsonl'):
        content = f'[{row}]' if name == 'a.json' else row
        assert 'half of a surrogate pair' in reading_fails(put(tmp_path/name, content))


BROKEN = ['{"text": "torn', '{"text": }', '\0\0\0\0', '[' * 50_000, '{"n": ' + '9' * 9999 + '}',
          'not json at all', '{"a": 1} {"b": 2}', "{'text': 'single'}", '}']


@pytest.mark.parametrize('name', ['a.jsonl', 'a.json'])
def test_garbled_lines_spoil_only_themselves(tmp_path, name):
    good = [f'document {i}' for i in range(50)]
    rows = [json.dumps({'text': text}) for text in good]
    for i, b in enumerate(BROKEN): rows.insert(3 + 5 * i, b)
    report = Report()
    assert texts(put(tmp_path/name, '\n'.join(rows)), report=report) == good
    assert report.rows == len(rows) and rejected(report) == {'broken JSON': len(BROKEN)}
    assert report.rejected['broken JSON'][1].startswith('line 4: ')


def test_a_file_of_nothing_but_garbage_is_an_error(tmp_path):
    assert 'none of its 7 rows can be used' in reading_fails(tmp_path/'a.jsonl', 'oops\n' * 7)
    ragged = 'a,b\n' + '1,2,3\n' * 4
    assert 'none of its 4 rows can be used' in reading_fails(tmp_path/'a.csv', ragged)
    redirects = dump(page('T', '#REDIRECT [[A]]') * 2)
    assert 'none of its 2 rows can be used' in reading_fails(tmp_path/'a.xml', redirects)


@pytest.mark.parametrize('name, content, where', [
    ('a.json', '[{"text": "a"},\n\n{"text": "b"]', 'line 3'),
    ('b.json', '[{"text": "a"},\n{"text": "b"}', 'cut off'),
    ('c.json', '"just a string"', 'expected a list'),
    ('d.json', '{"text": "a",\n "b": }', 'line 2'),
    ('e.json', '[{"text": "a"}] x', 'more text after'),
    ('f.json', '[' * 100_000, 'broken JSON'),
    ('g.json', '[1, "' + 'x' * 3_000_000, 'broken JSON'),
    ('h.json', '[' + '9' * 10_000 + ']', 'broken JSON'),
    ('i.json', 'null', 'expected a list'),
    ('a.csv', 'text\n"open\n', 'never closed')])
def test_files_that_cannot_be_read_on_say_where(tmp_path, name, content, where):
    message = reading_fails(tmp_path/name, content)
    assert name in message and where in message


def test_what_comes_before_the_break_counts(tmp_path):
    records = [json.dumps({'text': f'{i} ' * 50}) for i in range(30_000)]
    found = survey_source(put(tmp_path/'a.json', '[' + ',\n'.join([*records, 'oops']) + ']'))
    assert found.stats.documents == found.report.check().kept == 30_000
    assert 'line 30001: broken JSON' in found.stopped


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(SCALARS, lambda c: st.lists(c) | st.dictionaries(st.text(), c), max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(JSON), st.sampled_from([None, 0, 2]), st.integers(0, 99))
def test_a_list_in_pieces_is_the_list(values, indent, seed):
    text = json.dumps(values, indent=indent, ensure_ascii=bool(seed % 2))
    r, pieces = random.Random(seed), []
    while text:
        n = r.randint(1, 9)
        pieces, text = pieces + [text[:n]], text[n:]
    assert list(_json_values(pieces, 'x.json')) == values


# ---- containers

TURNS = [{'role': 'user', 'content': '?'}, {'role': 'assistant', 'content': '!'}]
RECORD = {'messages': TURNS}
ARTICLE = {'title': 'A', 'summary': 's', 'sections': [{'title': 'B', 'content': 'b'}] * 3}
ROWS = [{'text': 'a'}, {'text': 'b'}]
CONTAINERS = [ # what a file holds, its records, what is counted of the rest
    (RECORD, [RECORD], {}), (ARTICLE, [ARTICLE], {}),
    ({'text': 'a', 'tags': ['x', 'y']}, [{'text': 'a', 'tags': ['x', 'y']}], {}),
    ({'text': 'a', 'data': ROWS}, [{'text': 'a', 'data': ROWS}], {'data': 2}),
    ({'title': 'p', 'paragraphs': ['x', 'y']}, [{'title': 'p', 'paragraphs': ['x', 'y']}], {}),
    ({'instruction': 'i', 'output': 'o', 'history': [['q', 'a']]},
     [{'instruction': 'i', 'output': 'o', 'history': [['q', 'a']]}], {}),
    ({'n': 2, 'rows': ROWS}, ROWS, {}),
    ({'train': ROWS, 'test': [{'text': 't'}]}, ROWS, {'test': 1}),
    ({'test': ROWS * 5, 'train': ROWS, 'valid': ROWS}, ROWS, {'test': 10, 'valid': 2}),
    ({'errors': [{'line': 3}], 'rows': ROWS, 'by': ['x']}, ROWS, {'errors': 1, 'by': 1}),
    ({'data': [RECORD, RECORD]}, [RECORD] * 2, {}),
    ({'data': [None, {'text': 'a'}]}, [{'text': 'a'}], {}),
    (ROWS, ROWS, {}), ([RECORD], [RECORD], {})]


@pytest.mark.parametrize('indent', [None, 1])
@pytest.mark.parametrize('name', ['a.json', 'a.jsonl', 'a.json.gz'])
@pytest.mark.parametrize('value, records, counted', CONTAINERS)
def test_containers_are_understood_first(tmp_path, value, records, counted, name, indent):
    if name == 'a.jsonl' and indent is None and isinstance(value, dict):
        records, counted = [value], {}  # a row of JSON Lines
    data = json.dumps(value, indent=indent).encode()
    path = put(tmp_path/name, gzip.compress(data) if name.endswith('.gz') else data)
    report = Report()
    assert list(read_records(path, report)) == records
    found = {k.split("'")[1]: n for k, n in report.notes.items()}
    assert found == counted and report.check().kept == len(records)


def test_a_list_in_a_file_called_json_lines(tmp_path):
    for content in ('[\n{"text":"a"},\n{"text":"b"},\n{"text":"c"}\n]\n',
                    '[{"text":"a"}, {"text":"b"},\n{"text":"c"}]',
                    '\ufeff[{"text":"a"}, {"text":"b"}, {"text":"c"}]', '{\n"text":"a"}\n{\n"text":"b"}\n{\n"text":"c"}',
                    '\n\n[\n"a",\n"b",\n"c"]'):
        assert texts(put(tmp_path/'a.jsonl', content)) == ['a', 'b', 'c']
    report = Report()
    mixed = '["a"]\n{"text": "b"}\n[{"text": "c"}]\n'  # rows, of which some are no records
    assert texts(put(tmp_path/'a.jsonl', mixed), report=report) == ['b']
    assert rejected(report) == {'not a record': 2}


@pytest.mark.parametrize('record', [
    {'title': 'T', 'content': 5}, {'title': 'T', 'content': [{'p': 'x'}]}, {'title': 5,
        'content': 'x'},
    {'title': 'T', 'paragraphs': [{'context': 'x', 'qas': []}]}, {'title': 'T', 'paragraphs': 'x',
        'author': 7},
    {'title': 'T', 'summary': 's', 'sections': [{'heading': 'h', 'body': 'b'}]},
    {'title': 'T', 'summary': 's', 'sections': 7}, {'title': 'T', 'summary': 9,
                                                    'sections': [{'content': 'c'}]},
    {'title': 'T', 'wikitext': ['x', 3]}, {'text': [['a'], ['b']]}, {'completion': {'text': 'x'}}])
def test_a_value_that_is_no_text_leaves_no_title_without_its_body(tmp_path, record):
    report = Report()
    path = put(tmp_path/'a.jsonl', json_lines([{'text': 'good'}, record]))
    assert texts(path, report=report) == ['good']
    assert [why[:22] for why in rejected(report)] == ['no text in a record of']


def test_a_heading_is_no_document(tmp_path):
    rows = [{'head': 'H', 'body': 'b'}, {'head': 'H', 'body': ''}, {'head': 'H', 'body': 3},
            {'head': 'H'},
            {'body': 'b'}, {'head': None, 'body': 'b'}]
    report = Report()
    assert texts(put(tmp_path/'a.jsonl', json_lines(rows)), field='head+body',
                 report=report) == ['H\nb', 'b', 'b']
    assert rejected(report) == {"no text in the field 'head+body'": 3}


# ---- names of fields

def test_fields_get_our_names(tmp_path):
    put(tmp_path/'a.csv', 'Nr,the question,A\n1,what?,that\n2,why?,so\n')
    put(tmp_path/'b.jsonl', json_lines([{'the question': 'who?', 'A': 'I', 'text': 'no'}]))
    how = dict(fields='question="the question" answer=A')
    for name in ('a.csv', 'b.jsonl'):
        path, report = tmp_path/name, Report()
        assert has_instructions(path, **how) and source_format(path, **how) == 'question/answer'
        assert [e.answer for e in read_instructions(path, report, **how)] in (['that', 'so'], ['I'])
        assert not report.notes
        assert 'are instructions' in reading_fails(path, **how)
    assert [r['answer'] for r in read_records(tmp_path, **how)] == ['that', 'so', 'I']
    assert texts(tmp_path/'a.csv', fields='text=A') == ['that', 'so']
    found = corpus_report(tmp_path, instructions=lambda s,
                          **k: (e.text for e in read_instructions(s, **k)), **how)
    assert found.total().kept == 3 and not found.stopped()


def test_a_field_that_is_in_no_record_is_said(tmp_path):
    path, report = put(tmp_path/'a.jsonl', json_lines([{'text': 'a'}, {'text': 'b'}])), Report()
    assert texts(path, report=report, fields='title=head') == ['a', 'b']
    assert report.notes == {"files without the field 'head' that fields= names": 1}
    swapped = put(tmp_path/'b.jsonl', json_lines([{'text': 'x', 'body': 'y'}]))
    assert texts(swapped, fields='text=body body=text') == ['y']
    for name in 'c.txt', 'd.md':  # has no fields: they are those of other files
        page, report = put(tmp_path/name, 'a page\n'), Report()
        assert texts(page, report=report, fields='question=q answer=a') == ['a page']
        assert not any('fields=' in note for note in report.notes)


def test_records_without_text_list_their_fields(tmp_path):
    message = reading_fails(tmp_path/'a.jsonl', json_lines([{'id': 1, 'body': 'x'}] * 3))
    assert 'id, body' in message and 'field=NAME' in message
    path = put(tmp_path/'b.jsonl', json_lines([{'text': 'x'}]))
    assert "the field 'texts'" in reading_fails(path, field='texts')


def test_odd_records_are_counted(tmp_path):
    odd = [{'text': 'a'}, {'text': None}, {'text': 3}, {'text': ' \n'}, {}, [1, 2], 7, None,
           'plain string', {'text': 'a'}, {'content': None}]
    report, formats = Report(), Counter()
    found = texts(put(tmp_path/'a.jsonl', json_lines(odd)), report=report, formats=formats)
    assert found == ['a', 'plain string', 'a']
    assert rejected(report) == {
        'no text in a record of the format text': 2, 'empty': 1,
        'no field known to hold the text': 1, 'not a record': 3,
        'no text in a record of the format content': 1}
    assert report.check().rows == len(odd) and formats == {'text': 6, 'unknown': 1, 'content': 1}
    assert all(example for why, (_, example) in report.rejected.items())


def test_ragged_table(tmp_path):
    table = 'id,text\n1,a\n2\n3,b,c\n\n4,"two\nlines"\n5,"x"y\n6,"last, one"\n'
    report = Report()
    found = texts(put(tmp_path/'a.csv', table), report=report)
    assert found == ['a', 'two\nlines', 'last, one']
    assert rejected(report) == {'wrong number of cells': 2, 'broken row': 1}
    example = report.rejected['wrong number of cells'][1]
    assert example.startswith('line 3: 1 where the header has 2')


STRAY = [ # a table, the rows that are good, the rows that are rejected
    ('id,text\n1,a\n2,"b\n3,c\n4,d\n', ['a', 'c', 'd'], 1),
    ('id,text\n1,a\n2,"b\n3,"c"\n4,d\n', ['a', 'c', 'd'], 1),
    ('id,text\n1,"a\n2,"b\n3,"c"\n4,"d', ['c'], 3),
    ('id,text\n1,"two\nlines"\n2,"b" x\n3,"say ""c"""\n', ['two\nlines', 'say "c"'], 1),
    ('id,text\n1,6" nails\n2,b\n', ['6" nails', 'b'], 0),
    ('id,text\n1,"a\n\nb"\n\n2,"c,""d"""\n', ['a\n\nb', 'c,"d"'], 0),
    ('id,text\n1,a\n2,b,c\n3\n4,"x\n5,y\n', ['a', 'y'], 3)]


@pytest.mark.parametrize('table, good, bad', STRAY)
def test_a_stray_quotation_mark_costs_its_row(tmp_path, table, good, bad):
    report = Report()
    assert texts(put(tmp_path/'a.csv', table), report=report) == good
    assert report.check().rows == len(good) + bad


CELLS = st.text(st.sampled_from('ab "\n,;\t河'), max_size=6)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1), st.integers(0, 99), st.booleans())
def test_tables_come_back_as_written_around_one_bad_row(tmp_path_factory, rows, at, all_quoted):
    import csv
    path = tmp_path_factory.getbasetemp()/'t.csv'
    with open(path, 'w', newline='', encoding='utf-8') as f:
        table = csv.writer(f, quoting=csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL,
                           lineterminator='\n')
        table.writerow(['id', 'a', 'b'])
        for n, row in enumerate(rows): table.writerow([n, *row])
    report = Report()
    found = [(r['a'], r['b']) for r in read_records(path, report)]
    assert found == rows and not report.rejected
    at %= len(rows)
    with open(path, 'w', newline='', encoding='utf-8') as f:
        table = csv.writer(f, quoting=csv.QUOTE_ALL, lineterminator='\n')
        table.writerow(['id', 'a', 'b'])
        for n, row in enumerate(rows):
            if n == at: f.write('"7","never closed,x\n')
            table.writerow([n, *row])
    report = Report()
    assert [(r['a'], r['b']) for r in read_records(path, report)] == rows
    assert rejected(report) == {'broken row': 1}


TABS = [ # a table of tabs, its texts
    ('id\ttext\n1\t"Yes," she said.\n2\t"No."\n3\t5" nails\n',
     ['"Yes," she said.', '"No."', '5" nails']),
    ('id\ttext\n1\t"open\n2\tb\n', ['"open', 'b']), ('text\n"a"\n"b"\n', ['"a"', '"b"']),
    ('id\ttext\n1\t"two\nlines"\n2\tb\n', ['two\nlines', 'b']), ('id\ttext\n1\t"a ""b"""\n',
        ['a "b"']),
    ('"id"\t"text"\n"1"\t"a"\n', ['a']), ('id\ttext\n1\t"a\tb"\n2\tc\n', ['a\tb', 'c'])]


@pytest.mark.parametrize('table, good', TABS)
def test_tables_of_tabs_as_their_writers_meant_them(tmp_path, table, good):
    for name in ('a.tsv', 'a.tsv.gz'):
        data = table.encode()
        path = put(tmp_path/name, gzip.compress(data) if name.endswith('.gz') else data)
        report = Report()
        assert texts(path, report=report) == good and not report.rejected


def test_headers_of_tables(tmp_path):
    assert texts(put(tmp_path/'a.csv', 'id;text\n1;a, b\n2;"c; d"\n')) == ['a, b', 'c; d']
    assert texts(put(tmp_path/'a.csv', 'id\ttext\n1\ta, b\n')) == ['a, b']
    assert texts(put(tmp_path/'a.csv', '"the id","text"\n1,a\n')) == ['a']
    assert texts(put(tmp_path/'a.csv', ',text,,\n1,a,,\n')) == ['a']  # names may be missing
    assert "are called 'text'" in reading_fails(tmp_path/'a.csv', 'text,id,text\na,1,b\n')
    assert 'its first line' in reading_fails(tmp_path/'a.csv', 'te"xt,"id" x\na,1\n')


# ---- columns

def test_parts_without_rows_are_noted(tmp_path):
    import pyarrow as pa
    import pyarrow.feather, pyarrow.parquet
    table, report = pa.table({'text': ['a', 'b']}), Report()
    for name, n in (('a', 2), ('b', 0), ('c', 2)):
        pa.parquet.write_table(table[:n], tmp_path/f'{name}.parquet')
    for name, n in (('d', 0), ('e', 2)):
        pa.feather.write_feather(table[:n], tmp_path/f'{name}.arrow', 'uncompressed')
    assert texts(tmp_path, report=report) == ['a', 'b'] * 3
    assert report.notes == {'files without records': 2}
    assert 'no records' in reading_fails(tmp_path/'b.parquet')
    found = corpus_report(tmp_path)
    assert not found.stopped() and len(found.surveys) == 5
    assert corpus_report(tmp_path/'b.parquet').stopped()


def not_utf8(rows, kind=None):
    "An array of strings that are not all UTF-8"
    import pyarrow as pa
    data = pa.array(rows, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(data), data.buffers())


@pytest.mark.parametrize('ending', ['.parquet', '.arrow'])
def test_strings_of_columns_that_are_not_utf8(tmp_path, ending):
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet
    bad = not_utf8([b'tea', b'caf\xe9', None, b'\xe6\xb2\xb3'])
    turns = pa.StructArray.from_arrays([bad, pa.array([1, 2, 3, 4])], ['content', 'n'])
    table = pa.table({'text': bad, 'turns': pa.ListArray.from_arrays([0, 1, 2, 3, 4], turns),
                      'kind': bad.dictionary_encode(), 'id': [1, 2, 3, 4]})
    path = tmp_path/f'a{ending}'
    if ending == '.parquet': pa.parquet.write_table(table, path)
    else: pa.feather.write_feather(table, path, 'uncompressed')
    message = error_of(lambda: list(read_records(path)))
    assert 'a string in it is not UTF-8' in message and 'errors=replace' in message
    report = Report()
    rows = list(read_records(path, report, errors='replace'))
    assert [r['text'] for r in rows] == ['tea', 'caf\ufffd', None, '河']
    assert rows[1] == {'text': 'caf\ufffd', 'turns': [{'content': 'caf\ufffd', 'n': 2}],
                       'kind': 'caf\ufffd', 'id': 2}
    assert rows[2]['turns'] == [{'content': None, 'n': 3}]
    assert report.notes == {'places that are not UTF-8, replaced': 1} and report.check().kept == 4


def test_a_broken_row_group_costs_its_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet
    r = random.Random(0)
    docs = [r.randbytes(50).hex() for _ in range(4000)]
    path = tmp_path/'a.parquet'
    pa.parquet.write_table(pa.table({'text': docs}), path, row_group_size=1000, compression='gzip',
                           use_dictionary=False)
    whole = pa.parquet.ParquetFile(path).metadata
    at = whole.row_group(1).column(0).data_page_offset + 2000
    data = bytearray(path.read_bytes())
    data[at:at + 500] = b'?' * 500
    ticks, report = [], Report()
    assert texts(put(path, bytes(data)), report=report,
                 tick=ticks.append) == docs[:1000] + docs[2000:]
    assert rejected(report) == {'broken row group': 1000} and sum(ticks) == path.stat().st_size
    assert report.check().rejected['broken row group'][1].startswith('row group 2 of 4')


@pytest.mark.parametrize('text', [
    'x' * 2_000_000, '\0', 'a\0b', '\u202bمرحبا بالعالم\u202c', '👩‍🚀🏳️‍🌈', 'שלום',
    'x\u0085y\u2028z', '𠮷野家', 'e\u0301' * 5])
def test_texts_of_every_kind_come_through_every_format(tmp_path, text):
    path = put(tmp_path/'a.jsonl', json.dumps({'text': text}) + '\n')
    put(tmp_path/'a.json', json.dumps([text]))
    assert texts(path) == texts(tmp_path/'a.json') == [text]
    stats = survey_source(path).stats
    assert stats.characters == sum(stats.scripts.values()) == len(text)
    put(tmp_path/'a.txt', text + '\n')
    put(tmp_path/'a.jsonl', json.dumps({'text': text}, ensure_ascii=False))
    assert texts(tmp_path/'a.txt') == texts(path) == [text]


def test_a_document_of_100_megabytes(tmp_path):
    size = 100_000_000
    long = b'{"text": "' + '灰河的水'.encode() * (size // 12) + b'"}\n'
    content = b'{"text": "before"}\n' + long + b'{"text": "after"}\n'
    path = put(tmp_path/'a.jsonl.zst', COMPRESS['.zst'](content))
    assert [len(t) for t in read_texts(path)] == [6, size // 12 * 4, 5]


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5),
                   st.lists(st.text(max_size=3), max_size=3))
SECTION = st.dictionaries(st.sampled_from(['title', 'content', 'sections']), VALUES)
ARTICLES = st.fixed_dictionaries({'sections': st.lists(st.one_of(VALUES, SECTION), max_size=3)},
                                 optional={'title': VALUES, 'summary': VALUES})
FIELDS = ['text', 'content', 'title', 'x', 'completion', 'summary', 'paragraphs', 'wikitext',
          'author', 'instruction', 'output', 'messages', '']
RECORDS = st.one_of(VALUES, st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), ARTICLES)
ONE_LINE = st.characters(exclude_categories=['Cs'], exclude_characters='\n')
ROWS = st.one_of(RECORDS.map(json.dumps), st.text(ONE_LINE, max_size=20))


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(ROWS, min_size=1, max_size=40))
def test_the_report_always_adds_up(tmp_path_factory, rows):
    "About 5,000 records, whole and garbled"
    path = put(tmp_path_factory.getbasetemp()/'fuzz.jsonl', '\n'.join(rows))
    found = survey_source(path)
    written = path.read_bytes().decode().removeprefix('\ufeff').split('\n')
    filled = sum(1 for row in written if row.strip())
    if 'no records' in found.stopped or 'is empty' in found.stopped:
        assert filled == 0 and not found.report.rows
    elif 'by its content' in found.stopped: return
    else: assert found.report.check().rows == filled
    assert found.report.kept == found.stats.documents
    assert str(found) and found._repr_markdown_()


NAMES = ['a.txt', 'a.json', 'a.jsonl', 'a.csv', 'a.xml', 'a.txt.gz', 'a.json.zst', 'a.jsonl.bz2',
         'a.xml.xz', 'a.md', 'a.html', 'a.docx', 'a.epub', 'a.tsv', 'a.parquet', 'a.arrow']
STARTS = [b'', b'PK\x03\x04', b'ARROW1', b'PAR1', b'[', b'{"text": ', b'[{"text": "', b'\x1f\x8b\x08', b'<mediawiki>', b'a,b\n']


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200), st.sampled_from(NAMES), st.sampled_from(STARTS))
def test_any_bytes_give_documents_or_one_line(tmp_path_factory, data, name, start):
    path = put(tmp_path_factory.getbasetemp()/name, start + data)
    for errors in ('strict', 'replace'):
        report = Report()
        try: assert len(texts(path, errors=errors, report=report)) == report.check().kept
        except UserError as e: assert name in str(e) and '\n' not in str(e); report.check()


# ---- formats of records

@pytest.mark.parametrize('record, name, text', [
    ({'text': 'a', 'title': 'T', 'instruction': 'x'}, 'text', 'a'),
    ({'text': 'a', 'instruction': 'x', 'output': 'y'}, 'instruction/output', None),
    ({'completion': '昭通机场是机场。', 'source': 'wikipedia.zh2307'}, 'completion', '昭通机场是机场。'),
    ({'id': 0, 'uniqueKey': 'k', 'dataType': '博客', 'title': '水位', 'content': '上涨。'},
     'content', '水位\n上涨。'),
    ({'title': None, 'content': '上涨。'}, 'content', '上涨。'),
    ({'content': ['甲', '乙']}, 'content', '甲\n乙'),
    ({'title': '只有题', 'content': None}, 'content', None),
    ({'title': '春曉', 'author': '孟浩然', 'paragraphs': ['甲', '乙']}, 'poem', '《春曉》孟浩然\n甲\n乙'),
    ({'paragraphs': ['甲']}, 'poem', '甲'),
    ({'title': '灰河', 'wikitext': "'''灰河'''是[[河流]]。"}, 'mediawiki', '灰河\n灰河是河流。'),
    ({'title': '灰河', 'wikitext': '{{stub}}'}, 'mediawiki', ''),
    ({'title': 'A', 'summary': 's', 'sections': [{'title': 'B', 'content': 'b'}]},
     'baike', 'A\ns\nB\nb'),
    ({'instruction': 'x', 'input': '', 'output': 'y'}, 'instruction/output', None),
    ({'input': 'x', 'target': 'y'}, 'input/target', None),
    ({'instruction': 'x', 'instances': []}, 'instances', None),
    ({'conversations': [], 'chosen': {}, 'rejected': {}}, 'conversations', None),
    ({'messages': []}, 'messages', None),
    ({'prompt': 'x', 'completion': 'y'}, 'prompt/completion', None),
    ({'id': 1}, None, None)])
def test_formats(record, name, text): assert _format_and_text(record) == (name, text)


@pytest.mark.parametrize('name', [n for n, f in FORMATS.items() if f.kind in ('question', 'chat')])
def test_what_one_reader_takes_for_instructions_no_other_takes_for_text(tmp_path, name):
    record = dict.fromkeys(FORMATS[name].fields, 'x') | {'text': 'all of it in a template'}
    path = put(tmp_path/'a.jsonl', json_lines([record]))
    assert source_format(path) == name and has_instructions(path)
    message = error_of(lambda: texts(path))
    assert f'these are instructions ({name})' in message and 'field=text' in message
    assert texts(path, field='text') == ['all of it in a template']


def test_null_columns_do_not_decide(tmp_path):
    columns = 'messages', 'instruction', 'output', 'text', 'content'
    rows = [{'text': 'a'}, {'content': 'b'}, {'instruction': 'x', 'output': 'y'}, {'messages': []},
            {}]
    found = [format_of({**dict.fromkeys(columns), **row}) for row in rows]
    assert found == ['text', 'content', 'instruction/output', 'messages', 'messages']


NO_TEXT = None, 3, {}, [None], True, [3]
TEXT_FIELDS = [('title', 'summary', 'sections'), ('title', 'content'), ('text',), ('completion',),
               ('title', 'author', 'paragraphs'), ('title', 'wikitext')]


@pytest.mark.parametrize('fields', TEXT_FIELDS)
def test_no_text_is_ever_the_word_none(fields):
    for value in NO_TEXT:
        _, text = _format_and_text(dict.fromkeys(fields, value))
        assert not (text or '').strip()


def test_nor_within_an_article():
    sections = [{'title': None, 'content': None}, {'title': 'B', 'content': []}, {},
                {'content': 'c', 'sections': None}, {'sections': [{'title': 'd'}]}, None, '']
    assert _baike_text({'title': 'A', 'summary': None, 'sections': sections}) == 'A\nB\nc\nd'


def test_every_section_is_kept():
    sections, wanted = [], ['灰河', '灰河是河。']
    for i in range(20):
        inner = [{'title': f'小节{i}.{j}', 'content': f'细节{i}.{j}。'} for j in range(i)]
        sections.append({'title': f'节{i}', 'content': f'内容{i}。', 'sections': inner})
        wanted += [f'节{i}', f'内容{i}。', *(text for part in inner for text in part.values())]
    text = _baike_text({'title': '灰河', 'summary': '灰河是河。', 'sections': sections})
    assert text.split('\n') == wanted


def test_sections_without_end(tmp_path):
    deep = '{"sections": [' * 400 + '"end"' + ']}' * 400
    found = survey_source(put(tmp_path/'a.jsonl', f'{deep}\n{{"text": "a"}}\n{"[" * 5000}\n'))
    assert found.report.check().rows == 3 and found.stats.documents in (1, 2)
    assert found.report.rejected['broken JSON'][0] == 1
    shallow = {'content': 'end'}
    for _ in range(50): shallow = {'title': 't', 'sections': [shallow]}
    assert _format_and_text(shallow) == ('baike', 't\n' * 50 + 'end')


def test_a_named_field_or_format_wins(tmp_path):
    rows = [{'text': 'no', 'body': 'yes'}, {'body': ['two', 'lines']}, {'text': 'lost'}]
    report = Report()
    found = texts(put(tmp_path/'a.jsonl', json_lines(rows)), field='body', report=report)
    assert found == ['yes', 'two\nlines']
    assert report.rejected["no text in the field 'body'"][0] == 1
    path = put(tmp_path/'b.jsonl', json_lines([{'title': 'T', 'text': 'short', 'content': 'long'}]))
    assert texts(path) == ['short'] and texts(path, format='content') == ['T\nlong']
    assert texts(path, field='title+text+absent') == ['T\nshort']
    path = put(tmp_path/'c.jsonl', json_lines([{'a+b': 'x', 'a': 'y'}]))
    assert texts(path, field='a+b') == ['x']


def test_the_format_of_a_source(tmp_path):
    for record, name in (({'instruction': 'a', 'output': 'b'}, 'instruction/output'),
                         ({'sections': []}, 'baike'), ({'id': 1}, None)):
        path = put(tmp_path/'a.jsonl', 'garbled\n' + json_lines([record]))
        assert (source_format(path), has_instructions(path)) == (name, name == 'instruction/output')


@pytest.mark.parametrize('name', FORMATS)
def test_the_formats_know_what_they_are(name):
    form = FORMATS[name]
    assert format_of(dict.fromkeys(form.fields, '')) == name
    assert (form.document is not None) == (form.kind == 'text')
    assert len(form.fields) == 2 or form.kind != 'question'


# ---- processes

def test_processes_change_nothing(tmp_path):
    articles = [f"'''{i}''' is a number. {{{{stub}}}}" if i % 7 else '{{stub}}' for i in range(300)]
    pages = ''.join(page(f'P{i}', article) for i, article in enumerate(articles))
    path, reports = put(tmp_path/'a.xml', dump(pages)), (Report(), Report())
    alone, together = (texts(path, report=r, workers=w) for r, w in zip(reports, (0, 2)))
    assert alone == together and len(alone) == 257 and str(reports[0]) == str(reports[1])


@pytest.mark.parametrize('workers', [0, 1])
def test_what_was_read_ahead_and_not_used_is_in_no_report(tmp_path, workers):
    rows = [b'{"text": "caf\xe9"}', b'torn', b'{"text": ""}', b'{"text": "b"}'] * 500
    path = put(tmp_path/'a.jsonl', b'\n'.join(rows))
    whole, part, formats = Report(), Report(), Counter()
    assert len(texts(path, report=whole, errors='replace', workers=workers)) == 1000
    stream = read_texts(path, part, formats=formats, errors='replace', workers=workers)
    assert [next(stream) for _ in range(3)] == ['caf\ufffd', 'b', 'caf\ufffd']
    stream.close()
    assert part.check().rows == 5 and part.kept == 3 and formats == {'text': 4}
    assert part.notes == {'places that are not UTF-8, replaced': 2}
    assert whole.check().rows == 2000 and whole.notes == {
        'places that are not UTF-8, replaced': 500}


@pytest.mark.parametrize('workers', [0, 1])
def test_what_comes_before_an_error_comes_before_it_with_processes_too(tmp_path, workers):
    rows = [json.dumps({'text': f'{n}'}) for n in range(500)]
    path, report, found = put(tmp_path/'a.json',
                              '[' + ',\n'.join([*rows, 'oops']) + ']'), Report(), []
    with pytest.raises(UserError, match='line 501: broken JSON'):
        for text in read_texts(path, report, workers=workers): found.append(text)
    assert len(found) == report.check().kept == 500


def test_counts_go_with_the_items():
    report = Report()
    def items():
        for n in range(5):
            report.row()
            if n % 2: report.reject('odd', n)
            else: yield n
        report.note('end')
    pairs = list(with_counts(items(), report))
    assert [item for item, _ in pairs] == [0, 2, 4, None] and report == Report()
    total = Report()
    for _, counts in pairs: total.add(counts)
    assert total == Report(rows=5, kept=3, rejected={'odd': [2, '1']}, notes={'end': 1})


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
    for i in range(4):
        rows = json_lines({'title': f'{i}', 'content': f'{n}'} for n in range(50))
        put(tmp_path/'d'/f'{i}.jsonl.gz', gzip.compress(rows.encode()))
    made = as_dataset(tmp_path/'d', workers=2)
    assert made['text'][:] == texts(tmp_path/'d') and made['file'][-1] == '3.jsonl.gz'
    assert as_dataset(tmp_path/'d', field='content')['text'][:] == [str(n) for n in range(50)] * 4
    put(tmp_path/'d'/'3.jsonl.gz', b'cut')
    assert 'not a .gz archive' in error_of(lambda: as_dataset(tmp_path/'d', workers=2))
    made.save_to_disk(tmp_path/'saved')
    assert texts(tmp_path/'saved') == made['text'][:]


# ---- imports and real files

def test_reading_plain_files_imports_nothing_heavy(tmp_path):
    put(tmp_path/'a.txt', 'x')
    heavy = 'torch', 'datasets', 'pyarrow', 'pandas', 'mwparserfromhell', 'zstandard', 'matplotlib'
    code = ('import sys; from lm_nb.data.corpus import read_texts; list(read_texts(sys.argv[1])); '
            f'print([m for m in {heavy} if m in sys.modules])')
    command = [sys.executable, '-c', code, str(tmp_path/'a.txt')]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root())
    assert done.stdout.strip() == '[]'


def test_a_dump_is_read_by_who_imports_only_the_readers(tmp_path):
    path = put(tmp_path/'a.xml', dump(page('A', '[[a]]')))
    code = ('import sys; from lm_nb.data.corpus import read_texts; '
            'assert "lm_nb.data.mediawiki" not in sys.modules; '
            'print(list(read_texts(sys.argv[1])))')
    command = [sys.executable, '-c', code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root())
    assert done.stdout.strip() == str(['A\na'])


@pytest.mark.skipif(not (REAL/'wiki_demo.txt').exists(), reason=NEEDS_REAL)
def test_real_files():
    assert len(texts(REAL/'wiki_demo.txt')) == 30
    report = Report()
    records = list(read_records(REAL/'alpaca_zh_demo.json', report))
    assert report.rows == report.kept == len(records) == 1000
    assert set(records[0]) == {'instruction', 'input', 'output'}
    assert records == json.loads((REAL/'alpaca_zh_demo.json').read_text(encoding='utf-8'))
