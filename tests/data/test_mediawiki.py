"Dumps of a Wikipedia, whole and broken, and text out of any wikitext"
import bz2
import gzip
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import dump, page, put, reading_fails, rejected, texts

from lm_nb.data.sources import Report
from lm_nb.data.corpus import read_texts
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
    bare = '<mediawiki>' + page('A', 'x') + '</mediawiki>'  # without a namespace
    assert texts(put(tmp_path/'a.xml', bare)) == ['A\nx']


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


def test_dumps_in_other_encodings(tmp_path):
    head, pages = '<?xml version="1.0" encoding="{}"?>', dump(page('灰河', '茶 café'))
    for encoding in 'utf-8', 'utf-16', 'utf-8-sig':
        xml = (head.format(encoding.removesuffix('-sig')) + pages).encode(encoding)
        assert texts(put(tmp_path/'a.xml', xml)) == ['灰河\n茶 café']
    for encoding in 'gb18030', 'big5', 'nonsense':
        file = put(tmp_path/'b.xml', head.format(encoding) + pages)
        assert 'set encoding=' in reading_fails(file)
        assert texts(file, errors='replace') == ['灰河\n茶 café']
    file = put(tmp_path/'c.xml', (head.format('gb18030') + pages).encode('gb18030'))
    assert texts(file, encoding='gb18030') == ['灰河\n茶 café']
    broken, report = put(tmp_path/'d.xml', pages.encode().replace(b'\xc3\xa9', b'\xe9')), Report()
    assert 'errors=replace' in reading_fails(broken)
    assert texts(broken, report=report, errors='replace') == ['灰河\n茶 caf\ufffd']
    assert list(report.notes.values()) == [1]
    assert 'errors=' not in reading_fails(tmp_path/'e.xml', pages.replace('</text>', '</txt>'))


@pytest.mark.parametrize('wikitext, text', [
    ("'''灰河'''（{{lang-en|River Ash}}，{{cn}}）", '灰河（River Ash）'),
    ('灰河（{{cn}}）在北方', '灰河在北方'), ('a<ref>note</ref> b<ref name="x" /> c', 'a b c'),
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


# ---- numbers and characters stay, holes do not

@pytest.mark.parametrize('wikitext, text', [
    ('pop. {{formatnum:1234567}} people', 'pop. 1234567 people'),
    ('1990{{ndash}}1995', '1990–1995'), ('{{val|12.5|u=km}} long', '12.5 km long'),
    ('built {{circa|1900}}', 'built c. 1900'), ('{{僻字|𠀀|x}}', '𠀀'),
    ('{{c.|1900|1910}} {{reign|1|2}}', 'c. 1900–1910 r. 1–2'), ('{{gaps|12|345}}', '12345'),
    ('{{val|1.23|(4)|e=5}}', '1.23(4)×10^5'),
    ('{{HK$|5}} {{RMB|7}} {{height|m=1.8}}', 'HK$5 ¥7 1.8 m'),
    ('{{FORMATNUM:{{nts|1200}}}} m', '1200 m'), ('{{nts|1,200}}', '1,200'),
    ('1990{{snd}}1995 {{endash}} {{mdash}}', '1990 – 1995 – —'),
    ('5{{nbsp}}km{{thinsp}}², 3{{times}}4', '5 km ², 3×4'), ('{{val|6.241|e=18}}', '6.241×10^18'),
    ('{{val|1.2|0.3|ul=kg|up=s}}', '1.2±0.3 kg/s'),
    ('{{convert|5|ft|6|in|m|2}} tall', '5 ft 6 in tall'), ('{{cvt|10|-|20|km}}', '10–20 km'),
    ('{{convert|10|to|20|km|mi}}', '10 to 20 km'), ('{{convert|2|x|3|m|ft}}', '2 x 3 m'),
    ('{{convert|100|km2|mi2|0|abbr=on}}', '100 km2'), ('{{convert|{{formatnum:80}}|km}}', '80 km'),
    ('a {{frac|3|1|2}}, {{frac|1|2}} and {{sfrac|4}}', 'a 3 1/2, 1/2 and 1/4'),
    ('(1{{e|24}} kg)', '(1×10^24 kg)'), ('{{US$|2 billion}}', 'US$2 billion'),
    ('{{chem|C|4|H|10}}', 'C4H10'), ('at {{coord|13|19|N|169|9|W}}, in', 'at 13°19′N 169°9′W, in'),
    ('毛（{{bd|1893年|12月26日|1976年|9月9日|catIdx=M}}）', '毛（1893年12月26日－1976年9月9日）'),
    ('{{birth date|1950|1|2}}', '1950-1-2'), ('{{as of|2016}}', '2016'),
    ('A (named {{IPAc-en|ˈ|eɪ}}, plural As)', 'A (named /ˈeɪ/, plural As)'),
    ('{{IPA|/ɬ/}}, {{IPA-el|akʰi|pron}}', '/ɬ/, akʰi'), ('{{respell|ASS|kee}}', 'ASS-kee'),
    ('{{lang|grc|ἄνθρωπος}} {{rtl-lang|ar|الكيمياء}}', 'ἄνθρωπος الكيمياء'),
    ('{{transl|ar|al-kīmiyā}} {{transl|ar|DIN|kīm}}', 'al-kīmiyā kīm'),
    ('({{zh|s=汉语|t=漢語|p=Hànyǔ}})', '(汉语, 漢語, Hànyǔ)'), ('{{zh|c=中|p=zhōng}}', '中, zhōng'),
    ('{{nihongo|Aikido|合気道|aikidō}}', 'Aikido (合気道, aikidō)'), ('{{nihongo|X}} a', 'X a'),
    ('{{link-en|中文|English}}，{{tsl|en|River|河}}', '中文，河'),
    ('{{color|red|红}}{{lang-en|Ash}}', '红Ash'),
    ("{{HMS|Ajax|22|6}} and {{'s}}", "HMS Ajax and 's"),
    ('{{angbr|a}} {{abbr|km|kilometre}}', '⟨a⟩ km'),
    ('&eacute;&#233;&#xe9;&mdash;&#20013; 5&amp;nbsp;km', 'ééé—中 5 km'),
    ('<code>a[3] = {{x}}</code> &lt;b&gt;', 'a[3] = <b>'),
    ('<nowiki>{{b}}[1]</nowiki>', '{{b}}[1]'),
    ('<math>\\frac{{a}}{{b}}</math>', '$\\frac{{a}}{{b}}$'),
    ('-{zh-cn:{{lang|en|a}};zh-tw:b}-c', 'ac'), ('-{zh-cn:甲;zh-tw:乙}-', '甲'),
    ('-{-|zh-cn:甲}-x', 'x')])
def test_numbers_and_characters_stay(wikitext, text): assert wiki_text(wikitext) == text


@pytest.mark.parametrize('wikitext, text', [
    ('A (named {{x}}, plural As)', 'A (named, plural As)'), ('a {{cn}}, b {{x}}. {{x}}', 'a, b.'),
    ('a ({{x}}) b ({{x}}; {{y}}) c（{{x}}，{{y}}）', 'a b c'),
    ('such as {{x}}, {{x}}, and b', 'such as, and b'), ('a {{x}} b', 'a b'), ('a{{x}}b', 'ab'),
    ('a <ref>n</ref>. B <ref name=x/>, c', 'a. B, c'), ('({{x}} a, {{x}})', '(a)'),
    ('甲{{x}}，乙（{{x}}，丙）', '甲，乙（丙）'), ('* {{x}}\n* b', '- b'), ('{{Main|Ash}}\nb', 'b'),
    ('* {{flag|Ash}}', ''), ('* {{flag|Ash}} won', '- Ash won'), ('{{x|word}} b', 'word b'),
    ('b {{x|1950}} c', 'b c'), ('b {{x|word|date=May}} c', 'b c'), ('b {{sfn|Ash|1950}} c', 'b c'),
    ('- {{cite book|title=Ash 2|year=1950}}, reprinted', '- Ash 2, reprinted'),
    ('b {{x|{{y|word}}}} c', 'b word c'), ("the ''Iliad'''s end", "the Iliad's end"),
    ("''War, b", 'War, b'), ('b.[3] C。[12][13]', 'b. C。'),
    ('Savage [1987] L[0]', 'Savage [1987] L[0]'), ('a\n! Year\n! colspan="2"|%\nb', 'a\n\nb'),
    ('a\n!Kung people live\nb', 'a\n!Kung people live\nb'),
    ('Nevada.{{cite web |url= |title=b}} He<ref>{{a}}', 'Nevada. He'),
    ('a [[File:b.svg|c\n* d]] e', 'a e'), ('a {{cite web |title=never closed', 'a'),
    ('a }} b ]] c', 'a b c'), ('L = [[1, 2], [3, 4]]', 'L = [[1, 2], [3, 4]]'),
    ('{{DEFAULTSORT:A}}b{{#tag:ref|note}} {{#if:x|y}}', 'b'), ('pour : une', 'pour : une'),
    ('. . . and', '. . . and')])
def test_no_holes(wikitext, text): assert wiki_text(wikitext) == text


def test_what_was_dropped_is_counted_by_name():
    dropped = Counter()
    page = '{{Main|B}}\n{{x|word}} {{Cite  Web|a}} b {{y|1}}<ref>{{z}}</ref>{{ndash}}\n{{x|word}}'
    wiki_text(page, dropped)
    assert dropped == {'main': 1, 'cite_web': 1, 'y': 1, 'x': 1}


def test_the_report_names_the_templates_of_which_nothing_is_left(tmp_path):
    wikitext = "'''A''' is one.{{cn}} {{Infobox x|a=1}} {{x%d}}"
    pages = [page(f'A{i}', wikitext % i) for i in range(12)]
    file = put(tmp_path/'a.xml', dump(''.join(pages)))
    for workers in (0, 2):
        report = Report()
        assert len(list(read_texts(file, report, workers=workers))) == 12
        notes = {what.split(': ')[1]: n for what, n in report.check().notes.items()}
        assert notes['cn'] == notes['infobox_x'] == 12 and notes['others'] == 5 and len(notes) == 10


# ---- any wikitext

MARKUP = ("[[ ]] {{ }} {| |} | = == = \n '' ''' <ref> </ref> < > / & &#xD800; &#0; &#x110000; "
          '&nbsp; -{ }- zh-hans: ; * # <nowiki> <math> </math> [http://a http:// File: a 灰河 <!-- '
          '--> {{{ }}} \0 😀 <br __TOC__ <table> <li> : lang-en convert|80').split(' ')
WIKI = st.lists(st.sampled_from(MARKUP), max_size=60).map(''.join)


@settings(max_examples=300, deadline=None)
@given(WIKI)
def test_any_wikitext_gives_some_text(wikitext):
    text = wiki_text(wikitext)
    assert isinstance(text, str) and text == text.strip()


AS_WRITTEN = ['[[' * 5000, '-{' * 100_000, '（' * 100_000, ',' * 100_000, 'a !b ' * 9000 + 'c']
SHORTER = {
    '{{' * 5000: '', '<b>' * 2000: '', "''" * 5000: '', '{{a|b}} ' * 9000: '',
    '[[File:' * 9000: 'File:' * 9000, '{|\n' * 1000: '', '! a\n' * 9000: '',
    '{{x}}' * 9000 + 'b': 'b', '&lt;b&gt;' * 9000: '<b>' * 9000, '( ,' * 30_000: '(' * 30_000,
    '- ' * 50_000 + 'x': '- x', '\n' * 100_000: ''}


@pytest.mark.parametrize('wikitext, text', [*zip(AS_WRITTEN, AS_WRITTEN), *SHORTER.items()],
                         ids=lambda t: repr(t[:4]))
def test_no_wikitext_takes_forever(wikitext, text):
    "Each takes a tenth of a second; what tries again from every place would take minutes"
    start = time.process_time()
    assert wiki_text(wikitext) == text
    assert len(_tidy(wikitext)) <= len(wikitext)
    assert time.process_time() - start < 10


WORDS = st.sampled_from('河 Ash 1,234 5.6 é 𠀀 x² 1990–1995'.split())
WRAPPED = (
    '{{nowrap|%s}} {{lang|en|%s}} {{abbr|%s|x}} {{formatnum:%s}} {{val|%s}} {{IPA|%s}} '
    '{{transl|ar|%s}} {{zh|s=%s}} {{lang-fr|%s}} -{zh-cn:%s;zh-tw:x}- <!--x-->%s %s{{stub}} '
    "%s<ref>x</ref> <math>%s</math> <code>%s</code> %s [[%s]] [[x|%s]] ''%s'' <b>%s</b> "
    '<small>%s</small>').split()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(WORDS, st.sampled_from(WRAPPED)), min_size=1, max_size=8))
def test_words_in_markup_stay(pieces):
    "In their order, apart from one another, and nothing else"
    text = wiki_text(' '.join(form % word for word, form in pieces))
    assert text.replace('$', '').split() == [word for word, _ in pieces]


@settings(max_examples=300, deadline=None)
@given(WIKI)
def test_no_mark_of_a_gap_is_left(wikitext):
    assert not re.search('[\x00-\x08\x0e-\x1f]', wiki_text(wikitext))


# ---- real dumps

CACHE = Path(os.environ.get('LM_NB_GENSIM_WHEEL', Path(tempfile.gettempdir())/'lm_nb-cache'))
MARKUP_LEFT = re.compile(
    r"\{\{|\}\}|\[\[|\]\]|\''|&[a-z]+;|\|\||^[!|]|colspan|[a-z.]\[\d+\]|</?(?:ref|br)", re.M)
HOLE = re.compile(r'[(（]\s*[,;，；)）]|[,;，；]\s*[)）]|such as ,|, ,|named ,')


@pytest.fixture(scope='module')
def dumps():
    "Real dumps, which the wheel of gensim holds; its path or folder is LM_NB_GENSIM_WHEEL"
    def wheels(): return [CACHE] if CACHE.is_file() else sorted(CACHE.glob('gensim-*.whl'))
    if not wheels():
        get = [sys.executable,
               *'-m pip download gensim --no-deps -q --only-binary :all: -d'.split(), CACHE]
        try: subprocess.run(get, capture_output=True, timeout=120, check=True)
        except (subprocess.SubprocessError, OSError): pass
    if not wheels():
        pytest.skip('needs the wheel of gensim: no PyPI here; set LM_NB_GENSIM_WHEEL to its path')
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheels()[-1]) as wheel:
        found = {}
        for name in wheel.namelist():
            if 'wiki' not in name or not name.endswith('.bz2'): continue
            file, report = put(Path(folder)/Path(name).name, wheel.read(name)), Report()
            found[file.name] = list(read_texts(file, report)), report.check()
        yield found


def test_real_dumps_add_up(dumps):
    counts = sorted((report.rows, report.kept, rejected(report)) for _, report in dumps.values())
    assert counts == [(3, 1, {'not an article': 2}), (5, 5, {}),
                      (206, 106, {'redirect': 99, 'not an article': 1})]


def test_real_dumps_keep_no_markup_and_no_holes(dumps):
    for articles, _ in dumps.values():
        for text in articles:
            prose = re.sub(r'\$[^$]*\$', 'X', text)
            assert not MARKUP_LEFT.search(prose) and not HOLE.search(prose)
