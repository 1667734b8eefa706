"Dumps of a Wikipedia, whole and broken, and text out of any wikitext"
import bz2
import gzip
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import dump, page, put, reading_fails, rejected, texts

from lm_nb.data.corpus import Report
from lm_nb.data.mediawiki import _tidy, wiki_text
from lm_nb.data.survey import survey_source


NAMES = {'a.xml': bytes, 'a.xml.bz2': bz2.compress, 'a.xml.gz': gzip.compress,
         'a.xml-p1p99.bz2': bz2.compress}


@pytest.mark.parametrize('name', NAMES)
def test_a_dump(tmp_path, name):
    pages = [page('灰河', "'''灰河'''是[[河流|一条河]]。"), page('灰水', '#REDIRECT [[灰河]]'),
             page('灰江', 'x', extra='<redirect title="灰河" />'), page('Talk:灰河', '讨论', ns=1),
             page('模块', 'return {}', model='Scribunto'), page('空', ''),
             page('只有模板', '{{stub}}'), page('A & B', 'a < b'), page('又一', '#重定向 [[灰河]]')]
    content = NAMES[name](dump(''.join(pages)).encode())
    report = Report()
    assert texts(put(tmp_path/name, content), report=report) == ['灰河\n灰河是一条河。', 'A & B\na < b']
    assert rejected(report.check()) == {
        'redirect': 3, 'not an article': 1, 'not wikitext': 1, 'empty': 2}
    assert report.rejected['redirect'][1] == '灰水' and report.rows == 9


def test_the_last_revision_counts_and_versions_do_not_matter(tmp_path):
    old = '<revision><id>1</id><text>old</text></revision>'
    pages = dump(page('A', 'new', extra=old), version='0.3')
    assert texts(put(tmp_path/'a.xml', pages)) == ['A\nnew']


def test_broken_dumps(tmp_path):
    whole = dump(page('A', 'a') * 3)
    found = survey_source(put(tmp_path/'a.xml', whole[:-60]))
    assert found.stats.documents == 2 and 'broken XML' in found.stopped
    found = survey_source(put(tmp_path/'a.xml.bz2', bz2.compress(whole.encode())[:-4]))
    assert 'the archive is cut off' in found.stopped
    feed = '<rss><page>x</page></rss>'
    assert 'not a MediaWiki dump' in reading_fails(tmp_path/'b.xml', feed)
    entities = ''.join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(8))
    bomb = f'<!DOCTYPE m [<!ENTITY a "{"x" * 1000}">{entities}]><mediawiki>&i;</mediawiki>'
    assert 'broken XML' in reading_fails(tmp_path/'bomb.xml', bomb)


@pytest.mark.parametrize('wikitext, text', [
    ("'''灰河'''（{{lang-en|River Ash}}，{{IPA|x}}）", '灰河（River Ash）'),
    ('灰河（{{IPA|x}}）在北方', '灰河在北方'), ('a<ref>note</ref> b<ref name="x" /> c', 'a b c'),
    ('[[File:A.jpg|thumb|[[caption]] text]]x', 'x'), ('[[分类:河流]][[Category:X]]y', 'y'),
    ('[[en:Ash]] z', 'z'), ('[[Re:Zero]]', 'Re:Zero'), ('[[:Category:河]]', 'Category:河'),
    ('[http://a.b 灰河网]和 http://c.d', '灰河网和'), ('a<br>b<br/>c', 'a\nb\nc'),
    ('a<!-- b -->c', 'ac'), ('5&nbsp;km &lt; 6', '5 km < 6'),
    ('* a\n** b\n# c\n: d', '- a\n- b\n- c\nd'),
    ('{|\n|a\n|{{x|\n{|\n|b\n|}\n}}\n|}\nafter', 'after'), ('<math>x^2</math>', '$x^2$'),
    ("''i'' and '''b'''", 'i and b'), ('== A ==\n{{stub}}', ''), ('__NOTOC__x', 'x'),
    ('== A ==\ntext\n== References ==\n* x\n=== Web ===\ny\n== B ==\nz', 'A\ntext\n\nB\nz'),
    ('<nowiki>[[a]]</nowiki>', '[[a]]'), ('-{zh-hans:计算机;zh-hant:電腦}-', '计算机'),
    ('-{zh-hant:電腦;zh-tw:電腦}-', '電腦'), ('-{原样}-', '原样'),
    ('-{H|zh-cn:a;zh-tw:b}-x', 'x'), ('x-{A|zh-cn:甲;zh-tw:乙}-', 'x甲'),
    ('{{convert|80|km|mi}} long', '80 km long'), ('a<ref name="x">never closed', 'anever closed'),
    ('{{As of|2020}}，{{ quote |甲[[乙]]}}', '2020，甲乙'), ('<poem>甲\n乙</poem>', '甲\n乙'),
    ('<gallery>\na.png|b\n</gallery>c', 'c'), ('{{nowrap|一 二}}', '一 二'), ('', ''),
    ('#REDIRECT [[A]]', '- REDIRECT A')])
def test_wikitext(wikitext, text): assert wiki_text(wikitext) == text


MARKUP = ("[[ ]] {{ }} {| |} | = == = \n '' ''' <ref> </ref> < > / & &#xD800; &#0; &#x110000; "
          '&nbsp; -{ }- zh-hans: ; * # <nowiki> <math> </math> [http://a http:// File: a 灰河 <!-- '
          '--> {{{ }}} \0 😀 <br __TOC__ <table> <li> : lang-en convert|80').split(' ')
WIKI = st.lists(st.sampled_from(MARKUP), max_size=60).map(''.join)


@settings(max_examples=300, deadline=None)
@given(WIKI)
def test_any_wikitext_gives_some_text(wikitext):
    text = wiki_text(wikitext)
    assert isinstance(text, str) and text == text.strip()


AS_WRITTEN = ['{{' * 5000, '[[' * 5000, '<b>' * 2000, "''" * 5000, '-{' * 100_000, '（' * 100_000,
              ',' * 100_000]
SHORTER = {'{|\n' * 1000: '', '( ,' * 30_000: '(' * 30_000, '- ' * 50_000 + 'x': '- x',
           '\n' * 100_000: ''}


@pytest.mark.parametrize('wikitext, text', [*zip(AS_WRITTEN, AS_WRITTEN), *SHORTER.items()],
                         ids=lambda t: repr(t[:4]))
def test_no_wikitext_takes_forever(wikitext, text):
    "Each takes a tenth of a second; what tries again from every place would take minutes"
    start = time.process_time()
    assert wiki_text(wikitext) == text
    assert len(_tidy(wikitext)) <= len(wikitext) and _tidy(text) == text
    assert time.process_time() - start < 10
