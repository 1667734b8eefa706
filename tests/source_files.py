"Files of text as people have them, for the tests that read them"
import bz2
import gzip
import html
import json
import lzma
import os
from pathlib import Path

import pytest

from lm_nb.core import UserError, root
from lm_nb.data.corpus import read_texts


def zst(data):
    import zstandard
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)  # as the command line does


REAL = Path(os.environ.get('LM_NB_REAL_DATA', root().parent/'shared'/'data'))
NEEDS_REAL = ('needs wiki_demo.txt, alpaca_zh_demo.json, dpo_zh_demo.json and '
              'belle_zh_seed_tasks.jsonl; set LM_NB_REAL_DATA to their folder')
COMPRESS = {
    '.gz': lambda data: gzip.compress(data, 1), '.bz2': lambda data: bz2.compress(data, 1),
    '.xz': lambda data: lzma.compress(data, preset=0), '.zst': zst}


def put(path, data):
    "Write text or bytes to a file, and the folders that it lies in"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def json_lines(records):
    return '\n'.join(json.dumps(r, ensure_ascii=False) for r in records) + '\n'


def texts(source, **kw): return list(read_texts(source, **kw))


def error_of(call):
    "The message with which `call` fails: one line"
    with pytest.raises(UserError) as e: call()
    assert '\n' not in str(e.value) and len(str(e.value)) < 700
    return str(e.value)


def reading_fails(source, content=None, **how):
    "The message with which a source cannot be read; `content` is written to it first"
    if content is not None: put(source, content)
    return error_of(lambda: texts(source, **how))


def rejected(report): return {why: n for why, (n, _) in report.rejected.items()}


def page(title, text, ns=0, extra='', model='wikitext'):
    "A page of a MediaWiki dump"
    title, text = html.escape(title), html.escape(text)
    revision = f'<id>2</id><model>{model}</model><text xml:space="preserve">{text}</text>'
    return (f'<page><title>{title}</title><ns>{ns}</ns><id>1</id>{extra}'
            f'<revision>{revision}</revision></page>\n')


def dump(pages, version='0.11'):
    start = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-{version}/" xml:lang="zh">'
    return f'{start}<siteinfo><sitename>W</sitename></siteinfo>{pages}</mediawiki>'
