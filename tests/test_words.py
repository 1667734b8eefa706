"The glossary, the links that lead to it, and the messages that the answers quote"
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS, ZH = ROOT / 'nbs', ROOT / 'translations/zh'
spec = importlib.util.spec_from_file_location('site_tool', ROOT / 'tools/site.py')
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)
ENTRY = r'- <a id="(.+?)"></a>(\*.+\*) · (.+?)(?:: |：)(.+?) ?\[(.+?)\]\((.+?)\)'


def prose(name):
    cells = json.loads((NBS / f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def entries(text):
    return [re.fullmatch(ENTRY, line) for line in text.split('\n') if line[:2] == '- ']


glossaries = pytest.mark.parametrize('text', [
    prose('glossary'), (ZH / 'glossary.md').read_text(encoding='utf-8')], ids=['en', 'zh'])


@glossaries
def test_entries_have_two_languages_a_sentence_and_a_chapter(text):
    found = entries(text)
    assert len(found) >= 80 and all(found)
    ids = [m[1] for m in found]
    assert len(set(ids)) == len(ids)
    for m in found:
        assert re.search('[A-Za-z]', m[2]) and re.search(r'[\u4e00-\u9fff]', m[3] + m[5]), m[0]
        assert m[4].endswith(('.', '。', ' …', '……')), m[0]
        assert (NBS / m[6]).is_file(), m[6]


@glossaries
def test_entries_are_sorted_within_their_theme(text):
    for theme in text.split('\n## ')[1:]:
        names = [re.search(r'\*([^*]+)\*', m[2])[1].lower() for m in entries(theme)]
        assert names == sorted(names)


def test_both_languages_explain_the_same_words():
    both = [[m.group(1, 2, 3, 6) for m in entries(text)]
            for text in (prose('glossary'), (ZH / 'glossary.md').read_text(encoding='utf-8'))]
    assert both[0] == both[1]


def linked(*texts, path='1_data/02_toy.ipynb'):
    from fastcore.nbio import mk_cell
    from fastcore.basics import NS
    words = {'token': ('token', 'A "piece".', '1_data/09_tokenizer.ipynb'),
             '词元': ('token', 'A "piece".', '1_data/09_tokenizer.ipynb'),
             'loss mask': ('loss-mask', 'Which count.', '1_data/12_x.ipynb'),
             'loss': ('loss', 'Small.', '4_training/02_loop.ipynb')}
    nb = NS(cells=[mk_cell(text, 'markdown') for text in texts])
    site.link_terms(nb, Path(path), words)
    return [re.findall(r'<a class="term" href="(.*?)" title="(.*?)">(.*?)</a>', c.source)
            for c in nb.cells]


def test_the_first_use_of_a_word_leads_to_the_glossary():
    to = '../glossary.html#token', 'A &quot;piece&quot;.'
    assert linked('Tokens and tokens.', 'A token.') == [[(*to, 'Tokens')], []]
    assert linked('它读词元。') == [[(*to, '词元')]]
    [[one, other]] = linked('A loss mask of a loss.')
    assert one[2] == 'loss mask' and other[2] == 'loss'
    assert linked('A loss.', path='4_training/02_loop.ipynb') == [[]]  # it explains it itself


@pytest.mark.parametrize('text', [
    '`token`', '## Token', '> token', '[a token](x.html)', '| token |', '$token$', 'a.token',
    '```\ntoken\n```', '<a href="x">token</a>', '<i title="token">', '![token](x.png)',
    '[the\ntoken](x.html)', '到**词元**、',
    '到**GPT**，读**词元**，', 'token_id', 'tokenizer', 'x-token'])
def test_code_headings_tables_and_links_stay_as_they_are(text): assert linked(text) == [[]]


def messages():
    "What the package says, and what the page of one's own files shows of it"
    files = sorted((ROOT / 'lm_nb').rglob('*.py'))
    text = '\n'.join(p.read_text(encoding='utf-8') for p in files)
    text = re.sub(r"""['"]\s*\n\s*f?['"]""", '', text)  # a message over several lines
    cells = json.loads((NBS / 'own_data.ipynb').read_text(encoding='utf-8'))['cells']
    outputs = [out['data'] for c in cells for out in c.get('outputs', ()) if 'data' in out]
    return '\n'.join([text, *(''.join(data.get('text/markdown', '')) for data in outputs)])


@pytest.mark.parametrize('text', [
    prose('faq'), (ZH / 'faq.md').read_text(encoding='utf-8')], ids=['en', 'zh'])
def test_the_answers_quote_messages_that_are_said(text):
    said = messages()
    rows = [row for row in text.split('\n') if row.startswith('| `')]
    assert len(rows) >= 20 and text.count('\n### ') >= 20
    for row in rows:
        parts = [part for part in row.split('`')[1].split('…') if len(part.strip()) > 3]
        unsaid = [part for part in parts if part not in said]
        assert parts and not unsaid, f'{row}: nothing says {unsaid}'
