"Which plain text is prose, and how prose is cut: a table of small files of all kinds"
import re
import textwrap
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import error_of, json_lines, put, reading_fails, rejected, texts

from lm_nb.data.prose import looks_like_prose, page_text, passages
from lm_nb.data.sources import Report, find_files

EN = ('The mill stood where the river leaves the hills, and nobody in the town could say how old it was. '
      'Oda had the keys from her father, who had them from his. On market days she opened the sluice before '
      'dawn; the wheel began to turn, slowly at first, and the stones took up their song. "Is there flour?" '
      'the baker called from the bridge. There was. By noon the carts were gone and the yard lay quiet again. '
      'She swept it, counted the sacks that were left, and wrote the number into the book with the red cover.')
EN2 = ('Years later, when the railway had come and the carts had gone for good, people still spoke of that '
       'winter. The ice was so thick that the wheel stood for six weeks. Flour was dear, and bread was worse.')
EN3 = 'Nobody answered. The ferryman looked at his hands, then at the water, and shook his head.'
ZH = ('灰河从北方的群山里流出来，绕过青石镇，再往南去。镇口有一座水磨，没有人说得清它有多少年了。欧达的父亲把钥匙交给她的时候，'
      '只说了一句话：“水大的时候别开闸。”她记了一辈子。每逢集市，天还没亮，她就把闸门打开，轮子慢慢地转起来，石磨也跟着响了。'
      '中午以前，大车都走了，院子里又安静下来。她把地扫干净，数一数剩下的口袋，把数目写进那本红皮的账簿。')
ZH2 = '许多年以后，铁路修到了镇上，大车再也不来了，人们还常常说起那个冬天。冰结得那样厚，轮子整整停了六个星期。面粉贵，面包更坏。'
ZH3 = '“你怎么还不走？”他问。欧达没有回答，只是望着河水。'
BOTH = [EN, EN2, EN3, EN2, EN]
CHINESE = [ZH, ZH2, ZH3, ZH2, ZH]


def wrap(paragraphs, width, between='\n\n', **how):
    return between.join(textwrap.fill(p, width, **how) for p in paragraphs) + '\n'


def wrap_zh(paragraphs, width, indent='　　', between='\n'):
    cut = [re.findall(f'.{{1,{width}}}', indent + p) for p in paragraphs]
    return between.join('\n'.join(lines) for lines in cut) + '\n'


def lines(*items): return '\n'.join(items) + '\n'


def sentences(text):
    return [s.strip() for s in re.split(r'(?<=[.!?。！？])(?=[^”」"])', text) if s.strip()]


CODE = '''import os, sys

def read_all(folder, ending=".txt"):
    """Read every file below a folder, in sorted order, and give its text."""
    for path in sorted(folder.rglob("*" + ending)):
        with open(path, encoding="utf-8") as f:
            yield f.read()

# The command line: the first word is the folder, and what follows are the
# endings of the files that are wanted; without them all text files are read.
if __name__ == "__main__":
    folder, *endings = sys.argv[1:]
    for ending in endings or [".txt"]:
        for text in read_all(folder, ending):
            print(text)
'''
C_CODE = '''#include <stdio.h>

/* Count the lines of a file that is given by name. */
int main(int argc, char **argv) {
    FILE *f = fopen(argv[1], "r");
    int c, lines = 0;
    while ((c = getc(f)) != EOF)
        if (c == '\\n') lines++;
    printf("%d\\n", lines);
    return 0;
}
'''
SONNET = '''Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date;
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
'''
PLAY = '''First Citizen:
Before we proceed any further, hear me speak.

All:
Speak, speak.

First Citizen:
You are all resolved rather to die than to famish?

All:
Resolved. resolved.
'''
TANG = ['春眠不覺曉，處處聞啼鳥。夜來風雨聲，花落知多少。', '白日依山盡，黃河入海流。欲窮千里目，更上一層樓。',
        '牀前看月光，疑是地上霜。舉頭望山月，低頭思故鄉。',
        '國破山河在，城春草木深。感時花濺淚，恨別鳥驚心。烽火連三月，家書抵萬金。白頭搔更短，渾欲不勝簪。']
FAQ = ['What is the mill called?', 'It has no name that anybody knows.', 'Who owns it?',
       'Oda does.']

PROSE = {
    'a book, hard-wrapped at 70': wrap(BOTH, 70),
    'a book, hard-wrapped at 60, indented paragraphs': wrap(BOTH, 60, '\n', initial_indent='    '),
    'a book, hard-wrapped at 100': wrap(BOTH, 100),
    'a wrapped letter of two paragraphs': wrap([EN2, EN3 + ' ' + EN2], 66),
    'wrapped lower-case prose': wrap(BOTH, 72).lower(),
    'a book with two spaces before each paragraph': wrap(BOTH, 78, '\n', initial_indent='  '),
    'English paragraphs, one a line, blank lines between': '\n\n'.join(BOTH) + '\n',
    'English paragraphs, one a line, tabs before': lines(*('\t' + p for p in BOTH)),
    'a novel in chapters, one paragraph a line': lines('Chapter One', *BOTH, 'Chapter Two', *BOTH),
    'a German letter, hard-wrapped': wrap([
        'Die Mühle stand dort, wo der Fluss aus den Hügeln kommt, und niemand in der Stadt wusste, wie alt '
        'sie war. Oda hatte die Schlüssel von ihrem Vater. An Markttagen öffnete sie das Wehr vor dem '
        'Morgengrauen, und das Rad begann sich zu drehen, langsam zuerst, dann schneller.'] * 3, 70),
    'a Chinese novel, indented paragraphs': lines(*('　　' + p for p in CHINESE)),
    'a Chinese novel, indented, blank lines between': '\n\n'.join('　　' + p for p in CHINESE) + '\n',
    'a Chinese novel in chapters without indents': lines('第一章 水磨', *CHINESE, '第二章 冬天', *CHINESE),
    'a Chinese novel in numbered chapters, short lines': lines('第12回', *sentences(ZH), ZH2, '第13回',
        ZH, ZH2),
    'Chinese, hard-wrapped at 35': wrap_zh(CHINESE, 35),
    'Chinese, hard-wrapped at 30, blank lines between': wrap_zh(CHINESE, 30, '', '\n\n'),
    'Chinese paragraphs, one a line, blank lines between': '\n\n'.join([ZH, ZH2, ZH3 + ZH2,
        ZH]) + '\n',
    'traditional Chinese dialogue in a novel': lines('　　「你怎麼還不走？」他問。', '　　歐達沒有回答。', '　　「走吧。」'),
}
NOT_PROSE = {
    'English articles, one a line': lines(*[' '.join(BOTH) * 2] * 6),
    'English articles, one a line, blank lines between': '\n\n'.join([' '.join(BOTH) * 2] * 6),
    'Chinese articles, one a line': lines(*[''.join(CHINESE) * 3] * 6),
    'English paragraphs, one a line': lines(*BOTH),
    'English sentences, one a line': lines(*sentences(EN + ' ' + EN2)),
    'Chinese sentences, one a line': lines(*sentences(ZH + ZH2)),
    'Chinese sentences, blank lines between': '\n\n'.join(sentences(ZH + ZH2)),
    'Tang poems, one a line': lines(*TANG),
    'Tang poems, one a line, blank lines between': '\n\n'.join(TANG),
    'Tang poems without marks': lines(*[re.sub('[，。]', ' ', p).strip() for p in TANG[:3]] * 5),
    'Tang poems, a couplet a line': '\n\n'.join(p.replace('。', '。\n') for p in TANG),
    'a sonnet': SONNET,
    'a play': PLAY * 3,
    'dialogue': lines('How are you?', 'Fine, thanks. And you?', 'I was at the mill yesterday.',
                      'And?', 'It was closed.') * 4,
    'Chinese dialogue': lines('你好吗？', '很好，谢谢。你呢？', '我昨天去了磨坊。', '然后呢？', '门关着。') * 4,
    'dialogue with names': lines('A: How are you?', 'B: Fine, thanks. And you?',
                                 'A: I was at the mill yesterday.') * 4,
    'dialogue, blank lines between': '\n\n'.join(['- How are you?', '- Fine, thanks. And you?',
                                                  '- I was at the mill.'] * 5),
    'questions and answers': '\n\n'.join(f'{q}\n{a}' for q, a in zip(FAQ[::2], FAQ[1::2])),
    'Python': CODE, 'C': C_CODE * 2,
    'words': lines(*'mill river ford town bridge wheel stone flour'.split()),
    'Chinese words': lines(*'水磨 灰河 渡口 青石镇 面粉 石桥'.split()),
    'names and numbers': lines(*(f'{n}\t{w}\t{n * 7}' for n,
                                 w in enumerate('mill river ford town'.split()))),
    'a log': lines(*(f'2024-05-0{d} 12:00:0{d} INFO  reading part {d} of the corpus from the disk, 120 documents'
                     for d in range(1, 9))),
    'JSON Lines': json_lines({'text': EN, 'n': n} for n in range(5)),
    'Chinese headlines': lines('青石镇水磨修缮工程昨日正式开工', '灰河今年汛期比往年提前两周到来', '铁路新站选址引发镇民热烈讨论') * 4,
    'headlines': lines('Mill at the ford to be restored after the flood of last winter',
                       'River Ash rises two weeks earlier than in any year before',
                       'Where will the new railway station be built, and who will pay') * 4,
    'addresses of the net': lines(*(
        f'https://example.org/articles/{n}/the-mill-at-the-ford-and-its-owner' for n in range(9))),
    'transcripts': lines('the mill stood where the river leaves the hills',
                         'nobody in the town could say how old it was',
                         'she had the keys from her father', 'and on market days she opened the sluice before dawn') * 4,
    'two lines': lines(EN, EN2), 'one long line': EN * 50, 'nothing': '', 'blanks': ' \n\n \n',
}


@pytest.mark.parametrize('name', PROSE)
def test_prose_is_recognised(name): assert looks_like_prose(PROSE[name]), PROSE[name][:300]


@pytest.mark.parametrize('name', NOT_PROSE)
def test_what_is_not_prose_keeps_its_lines(name):
    assert not looks_like_prose(NOT_PROSE[name]), NOT_PROSE[name][:300]


def test_what_was_recognised_is_said(tmp_path):
    report = Report()
    put(tmp_path/'book.txt', PROSE['a book, hard-wrapped at 70'])
    put(tmp_path/'poems.txt', NOT_PROSE['Tang poems, one a line'])
    put(tmp_path/'notes.md', '# Notes\n\nThe mill.\n')
    found = texts(tmp_path, report=report)
    assert len(found) == 1 + 1 + len(TANG)
    assert report.notes == {'files of prose, cut where a paragraph ends (separator=line: at each line)': 2}
    assert len(texts(tmp_path/'book.txt', separator='line')) > 20


@pytest.mark.parametrize('name', PROSE)
def test_a_long_text_of_prose_gives_several_documents(tmp_path, name):
    long = PROSE[name] + ''.join('\n' + PROSE[name] for _ in range(30_000 // len(PROSE[name])))
    path = put(tmp_path/'a.txt', long)
    found = texts(path)
    assert len(found) >= 3 and max(map(len, found)) < 17_000
    assert ''.join(''.join(found).split()) == ''.join(long.split())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text('ab .。\u3000`') | st.just('```') | st.just('')), st.integers(1, 30))
def test_passages_lose_nothing_and_are_not_short(rows, size):
    found = list(passages(rows, size))
    assert ''.join(''.join(found).split()) == ''.join(''.join(rows).split())
    assert all(text.strip() for text in found)
    assert all(len(text) < 4 * size + max(map(len, rows)) + 2 + size for text in found)


def test_passages_end_with_paragraphs_and_not_in_a_listing():
    block = ['Text.', '', '```', *['x = 1', ''] * 10, '```', '']
    for text in passages(block * 20, 150):
        assert text.count('```') % 2 == 0 and text.endswith(('```', 'Text.'))


def test_marks_between_documents(tmp_path):
    stories = 'One.\n\nfile\n{0}\nTwo.\n {0} \n\n{0}\nThree {0}.\n'
    wanted = ['One.\n\nfile', 'Two.', 'Three {}.']
    for mark, how in (('<|endoftext|>', {}), ('----', {'separator': '----'}), ('[SEP]', {'separator': '[SEP]'})):
        path = put(tmp_path/'a.txt', stories.format(mark))
        assert texts(path, **how) == [text.format(mark) for text in wanted]
    path = put(tmp_path/'b.txt', 'line\nfile\nblank\n')
    assert texts(path, separator='file') == ['line\nfile\nblank']
    for word in 'word', 'lines', ' ', '': assert 'separator = ' in reading_fails(path, separator=word)


# ---- pages and books

def test_html_of_every_kind():
    for page, text in {
        '<p>a<p>b': 'a\n\nb', 'a<br>b': 'a\nb', '<b>a</b>b <i>c</i>': 'ab c', 'a &lt; b &#x6cb3;': 'a < b 河',
        '<ul><li>a</li><li>b</li></ul>': 'a\n\nb', '<table><tr><td>a</td><td>b</td></tr></table>': 'a\tb',
        '<script>if (a<b) "</p>"</script>x': 'x', '<style>p{}</style>x': 'x', '<!-- a -->x': 'x',
        '<head><title>t</title></head>x': 'x', '<title>t<p>x': '', 'a\n  b\tc\xa0d': 'a b c d',
        '<pre>def f():\n    pass\n</pre>': 'def f():\n    pass', '<p>　　河水': '　　河水', '': '', '<': '<',
        '<p>a</div></p></b>b': 'a\n\nb', '<nav><nav>x</nav>y</nav>z': 'z'}.items():
        assert page_text(page) == text, page


@settings(max_examples=200, deadline=None)
@given(st.text('<>/![]-&;#x abp"=\n') | st.text() | st.text('<![abx>]').map('<!['.__add__))
def test_any_page_gives_a_text(page): assert isinstance(page_text(page), str)


def test_a_page_in_its_own_encoding(tmp_path):
    page = '<html><head><meta http-equiv="Content-Type" content="text/html; charset={}"></head><p>河水清凉。'
    for name in 'gb2312', 'GBK', 'utf-8', 'big5':
        text = page.format(name).replace('凉', '涼' if name == 'big5' else '凉')
        path = put(tmp_path/'a.html', text.encode('gb18030' if name == 'gb2312' else name))
        assert texts(path) == [re.sub('<.*?>', '', text)]
    path = put(tmp_path/'b.htm', page.format('nonsense').encode('gbk'))
    assert 'b.htm: not utf-8 at byte' in error_of(lambda: texts(path))
    assert texts(path, encoding='gbk') == ['河水清凉。']


def zipped(path, **files):
    with zipfile.ZipFile(path, 'w') as z:
        for name, text in files.items(): z.writestr(name, text)
    return path


WORD = '<d xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body>{}</w:body></d>'


def test_word_documents(tmp_path):
    paragraph = '<w:p><w:r><w:t>{}</w:t></w:r></w:p>'
    body = ''.join(map(paragraph.format, ['The Ash', 'is <![CDATA[<cold>]]>', '', '河水']))
    path = zipped(tmp_path/'a.docx', **{'word/document.xml': WORD.format(body)})
    ticks = []
    assert texts(path, tick=ticks.append) == ['The Ash\n\nis <cold>\n\n\n\n河水']
    assert sum(ticks) == path.stat().st_size
    book = ''.join(map(paragraph.format, BOTH * 40))
    assert len(texts(zipped(tmp_path/'b.docx', **{'word/document.xml': WORD.format(book)}))) > 10
    assert len(texts(tmp_path/'b.docx', separator='file')) == 1


def test_a_named_field_is_for_files_that_have_fields(tmp_path):
    page = WORD.format('<w:p><w:r><w:t>A page.</w:t></w:r></w:p>')
    zipped(tmp_path/'b.docx', **{'word/document.xml': page})
    put(tmp_path/'a.csv', 'title,body\nAsh,A river.\n')
    put(tmp_path/'c.txt', 'A line.\n')
    for field, row in {'body': 'A river.', 'title+body': 'Ash\nA river.'}.items():
        report = Report()
        assert texts(tmp_path, field=field, report=report) == [row, 'A page.', 'A line.']
        assert not report.rejected
    assert texts(f'{tmp_path}/b.docx {tmp_path}/a.csv', field='body') == ['A page.', 'A river.']
    report = Report()  # a name that is misspelt is said, by itself and beside a text
    assert texts(tmp_path, field='bdy', report=report) == ['A page.', 'A line.']
    assert rejected(report) == {"no text in the field 'bdy'": 1}
    assert 'the first record has: title, body' in reading_fails(tmp_path/'a.csv', field='bdy')


@pytest.mark.parametrize('ending', ['.docx', '.epub'])
def test_damaged_archives_of_text(tmp_path, ending):
    whole = zipped(tmp_path/'x.zip',
                   **{'word/document.xml': WORD.format('<w:p/>' * 99)}).read_bytes()
    for data in b'', b'text', whole[:-30], whole[:40] + b'??' + whole[42:], zipped(
        tmp_path/'y.zip').read_bytes():
        assert f'a{ending}' in reading_fails(tmp_path/f'a{ending}', data)


def test_a_folder_says_what_it_skips(tmp_path):
    for name in ('a.md', 'b/c.txt', 'd.pdf', 'e.PNG', 'f.png', '.git/config', 'README.md',
                 'LICENSE', 'g',
                 '~$h.docx', 'state.json'):
        put(tmp_path/name, 'text\n')
    report = Report()
    assert texts(tmp_path, report=report) == ['text', 'text']
    assert {k.removeprefix('files skipped: '): n for k,
            n in report.notes.items() if 'skipped' in k} == {
        '.pdf is not read': 1, '.png is not read': 2, 'hidden': 2, 'without an ending': 1,
        'about the data (README, LICENSE …)': 2, 'notes of a saved data set': 1}
    assert report.check().rows == 2 and not rejected(report)
    assert texts(tmp_path/'README.md') == ['text']
    assert len(find_files(tmp_path)) == 2
    put(tmp_path/'pdfs'/'a.pdf', '')
    assert '.pdf is not read' in error_of(lambda: find_files(tmp_path/'pdfs'))
    assert 'pdftotext' in error_of(lambda: texts(tmp_path/'pdfs'/'a.pdf'))
