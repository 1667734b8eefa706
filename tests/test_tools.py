"The tools: a chapter that shows what it no longer gives goes red; a page means what it says"
import ast
import base64
import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tool(name):
    spec = importlib.util.spec_from_file_location(f'tools_{name}', ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


chapters, site, readme = tool('chapters'), tool('site'), tool('readme')
translate, guide = site.translate, site.guide


def notebook(path, *cells):
    "Write a notebook; a cell is Markdown if it begins with a blank"
    def cell(i, source):
        one = dict(id=f'c{i}', metadata={}, source=source.lstrip(' '), cell_type='markdown')
        code = dict(cell_type='code', execution_count=None, outputs=[])
        return one if source[0] == ' ' else one | code
    nb = dict(cells=[cell(i, source) for i, source in enumerate(cells)], nbformat=4,
              nbformat_minor=5, metadata=dict(kernelspec=dict(name='python3', language='python')))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb))
    return path


def png(width):
    "The beginning of a picture"
    return base64.b64encode(bytes(16) + width.to_bytes(4) + bytes(20)).decode()


# --- texts

@pytest.mark.parametrize('saved, now', [
    ('loss 0.4137', 'loss 0.4138'), ('loss 0.4137', 'loss 0.41372'), ('1.234e-05', '1.2341e-05'),
    ('tensor([1., 2.])', 'tensor([1.0000, 2.0001])'), ('-0.0', '0.0'), ('nan 12', 'nan 12'),
    ('97.5%, 1.25x, 3.001s', '97.5%, 1.251x, 3.002s'), ('损失0.4137。', '损失0.4138。'),
    ('<f at 0x7f01aa>', '<f at 0x7f02bb>')])
def test_last_digits_of_fractions_may_differ(saved, now): assert chapters.same(saved, now)


@pytest.mark.parametrize('saved, now', [
    ('97.5', '98.3'), ('97.5', '97.7'), ('1900 steps', '1901 steps'), ('1,900,000', '1,900,001'),
    ('1.', '2.'), ('5', '5.0'), ('loss 0.4137', 'cost 0.4137'), ('0.4137', '-0.4137'),
    ('version 2.13.0', 'version 2.13.1'), ('v2.130', 'v2.131'), ('3f2.0001', '3f2.0002'),
    ('[1.0, 2.0]', '[1.0, 2.0, 2.0]'), ('a 1.0', 'a  1.0'), ('nan', '1.0'), ('1.0', ''),
    ('10.0.0.1', '10.0.0.2'), ('1e-05', '1e-06')])
def test_everything_else_is_exact(saved, now):
    assert not chapters.same(saved, now) and chapters.difference(saved, now)


def test_a_diff_holds_what_is_wrong_and_nothing_else():
    lines = chapters.difference('a 0.4137\nb 7\nc', 'a 0.4138\nb 8\nc').splitlines()
    assert [line for line in lines[3:] if line[0] in '+-'] == ['-b 7', '+b 8']


# --- a notebook and what it has saved

CELLS = ['import matplotlib.pyplot as plt\nimport os, sys, time',
         "print('shares', 0.4137, [12, 7])\n{'loss': 1/3, 'n': 12}",
         "fig, ax = plt.subplots()\nax.plot([0, 1, 2], [3, 1, 2])\nax.bar(['a', 'b'], [4, 5])\n"
         "ax.set(title='a curve', xlabel='step');",
         '#| output: varies  # seconds\ntime.time()',
         "#| slow\nraise SystemExit('not here')",
         '#| eval: false\n1/0',
         "#| hide\nassert os.environ['IN_TEST'] and os.path.exists('beside.txt')",
         ' # A text', 'object()',
         '#| output: varies\n# the number of a process\nos.getpid()']


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A notebook that was saved, and what it gave in another run"
    path = notebook(tmp_path_factory.mktemp('nbs') / '1_data/01_toy.ipynb', *CELLS)
    (path.parent / 'beside.txt').write_text('a file beside the notebook')
    nb = json.loads(path.read_text())
    nb['cells'][4]['outputs'] = [dict(output_type='stream', name='stdout', text=['kept'])]
    path.write_text(json.dumps(nb))
    chapters.main(['--save', str(path)])
    nb = json.loads(path.read_text())
    return path, nb, chapters.run(path, ['slow', 'cuda'], [], 60)


def faults(saved, change=lambda cells: None):
    "What is wrong when the saved cells are changed: cell -> words"
    _, nb, result = saved
    nb = copy.deepcopy(nb)
    change({c['id']: c for c in nb['cells']})
    return dict(chapters.faults(nb, result))


def test_what_was_saved_is_what_it_gives(saved, capsys):
    path, nb, _ = saved
    assert faults(saved) == {}
    chapters.main([str(path)])
    assert '1 notebooks show what they give' in capsys.readouterr().out
    assert ''.join(nb['cells'][4]['outputs'][0]['text']) == 'kept'  # a cell that does not run
    assert nb['cells'][1]['outputs'][1]['execution_count'] is None and nb['nbformat_minor'] == 5


def test_a_planted_number_goes_red(saved, tmp_path, capsys):
    def plant(cells): cells['c1']['outputs'][0]['text'] = ['shares 0.4137 [12, 8]\n']
    assert list(faults(saved, plant)) == ['c1']
    _, nb, _ = saved
    nb = copy.deepcopy(nb)
    plant({c['id']: c for c in nb['cells']})
    path = tmp_path / 'stale.ipynb'
    (tmp_path / 'beside.txt').touch()
    path.write_text(json.dumps(nb))
    with pytest.raises(SystemExit, match=f'--save {path}'): chapters.main([str(path)])
    out = capsys.readouterr().out
    assert 'stale.ipynb, cell c1' in out
    assert '-shares 0.4137 [12, 8]' in out and '+shares 0.4137 [12, 7]' in out


def test_last_digits_and_addresses_stay_green(saved):
    def plant(cells):
        cells['c1']['outputs'][0]['text'] = ['shares 0.4138 [12, 7]\n']
        cells['c8']['outputs'][0]['data']['text/plain'] = ['<object at 0x7fffffff>']
    assert faults(saved, plant) == {}


def test_an_output_more_or_less_goes_red(saved):
    assert 'now it gives' in faults(saved, lambda cells: cells['c1']['outputs'].pop())['c1']
    assert 'it shows nothing' in faults(saved, lambda cells: cells['c8'].update(outputs=[]))['c8']
    extra = dict(output_type='stream', name='stderr', text=['a warning'])
    words = faults(saved, lambda cells: cells['c1']['outputs'].append(extra))['c1']
    assert words.startswith('it shows stdout, stderr')


def figure(cells): return next(o for o in cells['c2']['outputs'] if 'image/png' in o['data'])


def test_a_picture_is_compared_by_its_data(saved):
    def pixels(cells): figure(cells)['data']['image/png'] = 'AAAA'
    def curve(cells):
        data = figure(cells)['metadata']['data']
        at = next(i for i, line in enumerate(data) if line.startswith('line') and ' y ' in line)
        data[at] = data[at].replace('= 3 1 2', '= 3 1.5 2')
    def title(cells):
        data = figure(cells)['metadata']['data']
        data[:] = [line.replace('a curve', 'another') for line in data]
    def bar(cells): figure(cells)['metadata']['data'].pop()
    def forget(cells): figure(cells)['metadata'].clear()
    assert faults(saved, pixels) == {}
    assert '1.5 is now 1 (1 of 3 numbers differ)' in faults(saved, curve)['c2']
    assert 'another' in faults(saved, title)['c2'] and 'nothing' in faults(saved, bar)['c2']
    assert 'without the data' in faults(saved, forget)['c2']


def test_a_figures_data_say_what_is_drawn(saved):
    text = '\n'.join(figure({c['id']: c for c in saved[1]['cells']})['metadata']['data'])
    assert "axes linear linear ['a curve', 'step', 'a', 'b'] =" in text
    assert 'line #1f77b4 y 3 = 3 1 2' in text and 'patches to y 2 = 4 5' in text


def test_what_varies_gives_a_reason(saved):
    def plant(cells): cells['c3']['outputs'] = cells['c9']['outputs'] = []
    assert faults(saved, plant) == {}
    def silent(cells): cells['c3']['source'] = '#| output: varies\ntime.time()'
    assert 'reason' in faults(saved, silent)['c3']


def test_an_error_names_its_cell(tmp_path, capsys):
    path = notebook(tmp_path / 'broken.ipynb', 'x = 1', 'def f(): return x/0\nf()', 'x')
    before = path.read_text()
    for save in [], ['--save']:
        with pytest.raises(SystemExit): chapters.main([*save, str(path)])
        out = capsys.readouterr().out
        assert 'broken.ipynb, cell c1 (number 1)' in out and 'ZeroDivisionError' in out
        assert 'in f' in out and 'execnb' not in out
    assert path.read_text() == before


def test_a_process_that_dies_is_a_fault(tmp_path):
    path = notebook(tmp_path / 'dies.ipynb', 'import os\nos._exit(3)')
    assert 'ended with 3' in chapters.run(path, [], [], 60)['error'][1]


def test_long_arrays_are_sampled():
    np = pytest.importorskip('numpy')
    long = np.sin(np.arange(5000))
    def kept(values): return [float(v) for v in chapters.numbers(values).split()]
    a, b, c = kept(long), kept(long + 1e-6), kept(long + .01)
    assert len(a) == chapters.KEPT // 2 + 4 and chapters.close(a, b) and not chapters.close(a, c)
    assert chapters.numbers([float('nan'), 1e-9, 12345.6]) == 'nan 0 12350'
    assert chapters.numbers([]) == ''


def test_cleaning_leaves_the_figures_data():
    config = chapters.tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['nbdev']
    assert {'data', 'image/png'} <= set(config['allowed_out_metadata_keys'])


# --- the site

OTHER = ['#| default_exp data.other', ' # Other\n\n> promise',
         '#| export\nclass Codec:\n    "Text to ids"\n    def encode(self, text): return []',
         '#| export\ndef rows(): pass\ndef answer(): pass\ndef plan(): pass\ndef micro(): pass']
TOY = ['#| default_exp data.toy', ' # Toy\n\n> promise',
       '#| export\nimport math\nfrom json import dumps',
       '#| hide\nfrom lm_nb.data.other import Codec, rows, plan, micro',
       '#| code-fold: true\nfrom lm_nb.data import other',
       ' ## Work\n`make` makes a `Thing`, with `Codec.encode`, `rows`, `answer`, `plan`, `micro`; '
       '[`make` it](../index.ipynb); `plan()`; `other.answer`; `dumps`; '
       'see [there](01_other.ipynb#work).',
       '#| export\ndef make(rows:int, # how many\n): return math.sqrt(rows)',
       '#| export\nclass Thing: pass\nclass thing: pass\nclass work: pass',
       'plan = make(4)\ndumps([plan, Codec().encode("a")])', ' ### Picture', '1 + 1\nplan;']


@pytest.fixture
def page(tmp_path, monkeypatch):
    "The page source of a made-up chapter"
    from fastcore.nbio import read_nb
    nbs, package = tmp_path / 'nbs', tmp_path / 'lm_nb' / 'data'
    notebook(nbs / 'index.ipynb', ' # Index\n\n> promise')
    paths = [notebook(nbs / '1_data/01_other.ipynb', *OTHER),
             notebook(nbs / '1_data/02_toy.ipynb', *TOY)]
    nb = json.loads(paths[1].read_text())
    nb['cells'][-1]['outputs'] = [dict(
        output_type='display_data', data={'image/png': 'AAAA'},
        metadata=dict(data=["axes linear linear ['loss', 'step'] = "]))]
    paths[1].write_text(json.dumps(nb))
    package.mkdir(parents=True)
    (package / 'toy.py').write_text('\n\ndef make(rows): pass\nclass Thing: pass')
    (tmp_path / 'settings.ini').write_text('[micro]\n')
    for name, to in dict(ROOT=tmp_path, NBS=nbs, PROC=tmp_path / '_proc').items():
        monkeypatch.setattr(site, name, to)
    monkeypatch.chdir(ROOT)
    site.recipes.cache_clear()
    nbs = {p.relative_to(nbs): read_nb(p) for p in paths}
    path = paths[1].relative_to(site.NBS)
    yield site.stage(path, nbs[path], site.places(nbs), site.stubs())
    site.recipes.cache_clear()


def markdown(page): return '\n'.join(c.source for c in page.cells if c.cell_type == 'markdown')


def test_pages_have_no_numbers():
    assert site.page(Path('1_data/03_corpus.ipynb')) == '1_data/corpus.html'
    assert site.page('index.ipynb') == 'index.html'


def test_names_lead_to_what_the_page_means(page):
    text = markdown(page)
    found = dict(re.findall(r'\[`([^`]+)`\]\(([^)]+)\)', text))
    assert found == {'make': '#make', 'Thing': '#Thing', 'Codec.encode': 'other.html#codec',
                     'other.answer': 'other.html#answer'}
    assert '[`make` it](../index.html)' in text.replace('.ipynb', '.html')
    assert '[there](other.html#work)' in text


def test_imports_are_shown_folded_and_run(page):
    code = [c.source for c in page.cells if c.cell_type == 'code']
    exported, hidden, marked = (source for source in code if 'code-fold: true' in source)
    assert 'import math' in exported and 'Codec' in hidden and 'import other' in marked
    assert all('code-summary' in source for source in (exported, hidden, marked))
    shown = '\n'.join(source for source in code if 'lm_nb' not in source)
    class Codec:
        def encode(self, text): return []
    exec(shown, names := dict(Codec=Codec))
    assert names['plan'] == 2


def test_definitions_have_places_of_their_own(page):
    text = markdown(page)
    assert '### `make` {#make .api-name}' in text and 'how many' in text
    assert '{#Thing .api-name}' in text and '{#thing .api-name}' in text  # told apart
    assert '{#def-work .api-name}' in text  # there is a heading `Work`
    assert 'href="../source/data.toy.html#code-3"' in text


def test_a_comment_is_of_the_last_name_on_its_line():
    text = ('def mask(doc:int, n:int = 0) -> int: # (B, S) -> (B, T)\n    pass\n'
            'def cut(\n    rows:list, # how many\n    n:int, # at most\n) -> list: # fewer\n'
            '    pass')
    def cells(node): return re.findall(r'<td>(?:(?!<td>).)*</td></tr>', site.api(
        node, node.name, node.name, '', site.comments(text)))
    one, many = (cells(n) for n in ast.parse(text).body)
    assert one == ['<td></td></tr>', '<td></td></tr>', '<td>(B, S) -&gt; (B, T)</td></tr>']
    assert many == [f'<td>{w}</td></tr>' for w in ('how many', 'at most', 'fewer')]


def test_pictures_have_words(page):
    assert page.cells[-1].source.startswith('#| fig-alt: "Picture: loss, step"')
    cell = copy.deepcopy(page.cells[-1])
    cell.outputs[0].metadata, cell.source = {}, 'x = 1\nplot(x)'
    assert site.picture_words(cell, 'Curves') == 'Curves: plot(x)'


def test_links_into_the_repository_become_pages(page):
    (site.ROOT / 'Makefile').touch()
    text = '[m](../../Makefile#x) [n](../../nothing) [w](https://x.org/a)'
    there = text.replace('../../Makefile', '../source/makefile.html')
    assert site.relink(text, Path('1_data')) == there
    assert site.relink('<a href="02_toy.ipynb#a">', Path('1_data')) == '<a href="toy.html#a">'
    assert site.relink('[r](1_data/02_toy.ipynb)', Path('.')) == '[r](1_data/toy.html)'


def test_pictures_have_their_natural_size():
    html = site.natural_size(f'<img alt="a" src="data:image/png;base64,{png(760)}" class="x">')
    shown = '<img alt="a" width="380" style="min-width: 228px" src="data:image/png;base64,'
    assert html.startswith(shown)


def test_the_phones_bar():
    bar = ('<nav class="quarto-secondary-nav"><div class="container-fluid d-flex"><button>'
           '<i class="bi bi-layout-text-sidebar-reverse"></i></button><nav></nav></div></nav>')
    html = site.phone_bar(bar)
    assert html.count('type="search"') == 1 and 'bi-list' in html
    assert 'smalldocsToggleScheme' in html and html.endswith('</a></div></nav>')


# --- what guides a reader

PROSE = ' # One\n\n> promise\n\n' + 'word ' * 1996
HOME = (' # Home\n\n## Start\n\n<!-- paths -->\n\n### Under `stand`\n\nFor [all](other.ipynb).\n\n'
        '[One](1_data/01_one.ipynb) → [Two](two.ipynb) → [x](later.ipynb)\n\n'
        '## End\n[One](1_data/01_one.ipynb)')


@pytest.fixture
def nbs(tmp_path, monkeypatch):
    "A home page, two chapters on a path, and one beside it: place -> cells"
    monkeypatch.setattr(guide, 'NBS', tmp_path)
    notebook(tmp_path / 'index.ipynb', HOME)
    notebook(tmp_path / '1_data/01_one.ipynb', PROSE, '#| hide\n' + 'x = 1\n' * 400)
    notebook(tmp_path / 'two.ipynb', ' # `Two`', '#| export\n' + 'x = 1\n\n' * 1600)
    notebook(tmp_path / 'other.ipynb', ' # Other\n\n```bash\n' + 'ls\n' * 300 + '```')
    return guide.notebooks()


def test_reading_time_counts_the_prose_and_code_of_a_page(nbs):
    took = {guide.name(p): guide.minutes(cells) for p, cells in nbs.items()}
    assert took == {'index': 5, '1_data/one': 10, 'two': 80, 'other': 15}
    assert guide.duration(80) == '1 h 20 min' and guide.duration(65, 'zh') == '1 小时 05 分钟'


def test_paths_are_read_from_the_home_page_and_get_their_minutes(nbs):
    home = nbs[Path('index.ipynb')]
    assert guide.paths(home) == [('Under `stand`', ['1_data/one', 'two', 'later'])]
    text = guide.with_minutes(HOME, {'1_data/one': 10, 'two': 80, 'other': 15})
    assert '[One](1_data/01_one.ipynb) 10 min → [Two](two.ipynb) 1 h 20 min → [x](later' in text
    assert text.count('10 min') == 1 and '(**1 h 30 min**)' in text and '15 min' not in text


def test_levels_that_cannot_be_are_faults_of_the_build(nbs):
    levels = guide.NBS / 'levels.toml'
    levels.write_text('two = ["hard"]\n"1_data/one" = ["start", "two"]\nno = ["deep"]')
    found = [f.partition(': ')[2] for f in guide.level_faults(['1_data/one', 'two'])]
    late = 'two is to be read before 1_data/one, but comes after it'
    assert found == ['two: no level hard', late, 'no chapter no']
    levels.write_text('two = ["start", "1_data/one"]')
    assert guide.level_faults(['1_data/one', 'two']) == []


def test_a_page_says_what_it_is_and_how_to_run_it(nbs):
    (guide.NBS / 'levels.toml').write_text('two = ["start", "1_data/one"]')
    html = ('<main id="m"><header id="title-block-header"><h1>T</h1></header><p>text</p>'
            '<nav class="page-navigation"><a href="x.html">x</a></nav></main>')
    page = guide.Guide(nbs, url='').dress(html, 'two')
    top, _, rest = page.partition('<header')
    assert 'page-top' in top and 'href="x.html"' in top and rest.count('page-navigation') == 1
    line = re.sub('<[^>]+>', '', rest.partition('<p>text')[0])
    assert 'start 1 h 20 min to read · read before: One · path Under `stand`: 2 of 3' in line
    assert f'{guide.LAB}/nbs/two.ipynb' in rest and 'notebooks/two.ipynb' in rest
    assert 'Colab' not in page
    first = guide.Guide(nbs, url='').dress(html, '1_data/one')
    assert 'href="../index.html#under-stand"' in first and 'then <a href="../two.html">Two' in first
    shared = guide.Guide(nbs, url='https://github.com/o/lm').dress(html, '1_data/one')
    assert 'colab.research.google.com/github/o/lm/blob/gh-pages/notebooks/1_data/01_one' in shared
    zh = guide.Guide(nbs, 'zh', url='').dress(html, 'two')
    assert '入门' in zh and '先读' in zh and not re.search('read before|Run this', zh)


def test_a_downloaded_notebook_installs_the_package_on_colab_and_only_there(nbs, monkeypatch):
    from IPython.core.inputtransformer2 import TransformerManager
    path, done = Path('1_data/01_one.ipynb'), []
    def first(url): return json.loads(guide.downloadable(path, url))['cells'][0]['source']
    assert not [line for line in first('').splitlines() if line[0] != '#']
    class Shell:
        def system(self, words): done.append(words)
        def run_line_magic(self, *words): done.append(' '.join(words))
    code = TransformerManager().transform_cell(first('https://github.com/o/lm'))
    exec(code, dict(get_ipython=Shell))
    assert done == []
    monkeypatch.setitem(sys.modules, 'google.colab', None)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    exec(code, dict(get_ipython=Shell))
    assert 'https://github.com/o/lm /content/lm_nb' in done[0] and 'pip install' in done[1]
    assert done[2] == 'cd /content/lm_nb/nbs/1_data' and sys.path[0] == '/content/lm_nb'


def test_the_picture_of_the_data_leads_to_chapters():
    steps = [step for _, row, _ in guide.WAY for step in row]
    assert {chapter for *_, chapter in steps} <= set(guide.order())
    text = guide.home('<!-- way -->\n```\na ─ b\n```\nafter', {})
    assert 'a ─ b' not in text and text.endswith('after')
    assert text.count('<a href=') == len(steps) and 'href="1_data/corpus.html">corpus' in text
    assert '>语料<' in guide.picture('zh', '../')


# --- README

def test_readme_is_the_notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, 'ROOT', tmp_path)
    text = ' # Title\n[one](1_data/01_one.ipynb#a) [two](../Makefile) [three](https://x.org)'
    code = '#| code-fold: true\nimport os', '#| echo: false\nshow()', '#| hide\n1', 'import re', '2'
    path = notebook(tmp_path / 'nbs/index.ipynb', text, *code)
    (tmp_path / 'Makefile').touch()
    notebook(tmp_path / 'nbs/1_data/01_one.ipynb')
    nb = json.loads(path.read_text())
    out = dict(output_type='display_data', metadata={})
    row = '| 97.5 | [t](1_data/01_one.ipynb) |'
    nb['cells'][2]['outputs'] = [out | dict(data={'text/markdown': [row]}),
                                 out | dict(data={'image/png': png(760)})]
    path.write_text(json.dumps(nb))
    files = {}
    assert readme.markdown(path, files) == (
        '# Title\n[one](nbs/1_data/01_one.ipynb#a) [two](Makefile) [three](https://x.org)\n\n'
        '| 97.5 | [t](nbs/1_data/01_one.ipynb) |\n\n'
        '<img src="nbs/images/index-c2-1.png" alt="Title" width="380">\n\n'
        '```python\nimport re\n\n2\n```\n')
    assert list(files) == ['nbs/images/index-c2-1.png']


# --- Chinese

CODE = '#| echo: false\nshow()'


@pytest.fixture
def tour(tmp_path, monkeypatch):
    "A notebook with prose, code and a printed sentence, and a way to write its translation"
    monkeypatch.setattr(translate, 'ROOT', tmp_path)
    (tmp_path / 'translations/zh').mkdir(parents=True)
    (tmp_path / 'translations/zh/site.yml').write_text('{sections: {}, pieces: {}}')
    path = notebook(tmp_path / 'nbs/1_a/02_tour.ipynb', ' # Tour\n\n> all of it',
                    ' ## First `x`\nsee [there](01_other.ipynb#a)', '1 + 1', CODE, ' ## First x')
    nb = json.loads(path.read_text())
    out = {'text/markdown': ['It took 5.5 minutes on 2026-11-28, in 1,024 steps.']}
    nb['cells'][3]['outputs'] = [dict(output_type='display_data', metadata={}, data=out)]
    path.write_text(json.dumps(nb))
    place = path.relative_to(tmp_path / 'nbs')
    def say(**texts):
        cells = translate.english(translate.notebooks()[place])
        translate.write(place, [(id, translate.digest(cells.get(id, '')), said)
                                for id, said in texts.items()])
    return place, path, say


def standing(place):
    wrong = translate.state(place, translate.english(translate.notebooks()[place]))
    return {kind: ids for kind, ids in wrong.items() if ids}


DONE = dict(c0='# 导览\n\n> 全部', c1='## 第一个 `x`\n见[那里](01_other.ipynb#a)，\n再往下',
            c3='用了 {0} 分钟，{2} 步（{1}）。', c4='## 再一次')


def test_the_check_names_what_is_missing_stale_or_gone(tour):
    place, path, say = tour
    say(**DONE)
    assert standing(place) == {} and translate.check() == 0
    say(c0=DONE['c0'], c1='# 第一个\n见[这里](01_other.ipynb#b)', c9='不在了')
    assert standing(place) == dict(missing=['c3', 'c4'], gone=['c9'], headings=['c1'], links=['c1'])
    assert translate.check() == 3
    say(**DONE)
    path.write_text(path.read_text().replace('all of it', 'the whole').replace('5.5', '6.5'))
    assert standing(place) == dict(stale=['c0'])  # a number that a run gives is not English


def test_sync_and_stamp_lead_a_translator(tour):
    place, path, say = tour
    say(c1=DONE['c1'])
    path.write_text(path.read_text().replace('there', 'over there'))
    cells = translate.english(nb := translate.notebooks()[place])
    translate.sync(place, cells, nb)
    text = translate.file_of(place).read_text()
    assert text.count('<!-- en:') == 4 and 'over there' in text and 'took {0} minutes' in text
    assert standing(place) == dict(missing=['c0', 'c3', 'c4'], stale=['c1'])
    translate.stamp(place, cells, ['c1'])
    assert standing(place) == dict(missing=['c0', 'c3', 'c4'])
    assert translate.chinese(place) == {'c1': DONE['c1'].replace('，\n', '，')}


def test_a_chinese_notebook_has_the_same_code_and_the_numbers_of_the_run(tour, tmp_path):
    place, path, say = tour
    say(**DONE)
    translate.write_notebooks(tmp_path / 'zh')
    old, new = (json.loads(p.read_text())['cells'] for p in (path, tmp_path / 'zh' / place))
    assert [c['id'] for c in old] == [c['id'] for c in new] and old[2] == new[2]
    said = new[3]['outputs'][0]['data']['text/markdown']
    assert said == '用了 5.5 分钟，1,024 步（2026-11-28）。'
    assert new[3]['source'] == CODE and new[1]['source'].startswith('## 第一个 `x`')


TABLE = """| seed 1 | message | note |
|---|--:|--:|
| a \\| b | No such file | `x` is 1 |
| seed 23 | no seed 4 | 0.5 [0, 1] |

2 seeds, loss"""
WORDS = """seed {0} => 种子 {0}
message | => 报错
note
a \\| b => 甲
`x` is {0} => `x` 为 {0}
{0} seeds, loss => 损失，{0} 个种子
"""


@pytest.fixture
def table(tour):
    "A notebook whose third cell gives a table; writes the list of its words"
    place, path, say = tour
    nb = json.loads(path.read_text())
    nb['cells'][2]['outputs'] = [dict(output_type='display_data', metadata={},
                                      data={'text/markdown': TABLE.splitlines(keepends=True)})]
    path.write_text(json.dumps(nb))
    say(**DONE)
    file, prose = translate.file_of(place), translate.file_of(place).read_text()
    def list_words(words):
        file.write_text(prose + translate.OUTPUTS + words)
        return translate.unlike(place, translate.notebooks()[place])
    return place, path, list_words


def test_words_of_a_table_become_chinese(table):
    place, path, list_words = table
    assert list_words(WORDS) == [] and translate.check() == 0
    old, nb = (json.loads(path.read_text()) for _ in range(2))
    new = translate.translate(nb, place)['cells'][2]
    assert new['source'] == old['cells'][2]['source']
    assert new['outputs'][0]['data']['text/markdown'] == """| 种子 1 | 报错 | note |
|---|--:|--:|
| 甲 | No such file | `x` 为 1 |
| 种子 23 | no seed 4 | 0.5 [0, 1] |

损失，2 个种子"""
    assert translate.numbered('2e-5 of 1,024, 1.5e-07') == '{0} of {1}, {2}'
    translate.file_of(place).write_text('')  # without a list all stays as it is
    assert translate.translate(json.loads(path.read_text()), place) == old


def test_the_check_names_words_of_a_table(table):
    place, path, list_words = table
    lines = WORDS.splitlines(keepends=True)
    assert list_words(''.join(lines[1:])) == ['seed {0}']
    assert list_words(WORDS.replace(' |', '')) == ['No such file', 'no seed {0}']
    assert list_words(WORDS + 'gone => 没了\n') == ['gone'] and translate.check() == 1
    assert list_words(WORDS.replace('`x` 为', '`y` 为')) == ['`x` is {0}']
    assert list_words(WORDS.replace('种子 {0}', '种子')) == ['seed {0}']
    path.write_text(path.read_text().replace('loss', 'losses'))
    assert list_words(WORDS) == ['{0} seeds, losses', '{0} seeds, loss']
    translate.sync(place, {}, translate.notebooks()[place])
    said = translate.file_of(place).read_text().partition(translate.OUTPUTS)[2]
    assert said == WORDS.replace('loss => 损失，{0} 个种子', 'losses =>')


def test_chinese_headings_keep_their_anchors(tour, tmp_path):
    from fastcore.nbio import read_nb
    place, path, say = tour
    say(**DONE)
    nb = read_nb(path)
    site.translated(nb, place, None)
    assert '## 第一个 `x` {#first-x}' in markdown(nb) and '## 再一次 {#first-x-1}' in markdown(nb)
    def leads(text): return site.in_chinese(text, Path('1_a'), {'1_a/b.html'})
    assert leads('[b](b.html#x) [c](c.html) [d](#d)') == (
        '[b](b.html#x) [c](../../1_a/c.html) [d](#d)')


def test_what_is_translated_is_of_the_english_that_there_is(): assert translate.check() == 0


PAGES = [('1_data/rows.html#mask', 'Rows', 'The mask', 'which targets count: 掩码'),
         ('zh/1_data/rows.html#mask', '一行', '损失掩码', '哪些目标算数 mask'),
         ('zh/2_model/gpt.html', '模型', '', '注意力看不到后面的词元，掩码盖住'),
         *((f'2_model/gpt.html#{i}', 'The model', f'Part {i}', 'a masked score') for i in range(5))]


@pytest.mark.parametrize('lang, query, first, n', [
    ('zh', '损失掩码', 1, 1), ('zh', '损失掩码怎么用', 1, 1), ('zh', '掩码', 1, 3),
    ('en', 'mask', 0, 5), ('en', '掩码', 1, 3), ('en', 'ask', None, 0), ('zh', '', None, 0)])
def test_search_reads_chinese(lang, query, first, n):
    entries = [dict(zip(('href', 'title', 'section', 'text'), one)) for one in PAGES]
    found = site.search(entries, query, lang)
    assert len(found) == n and (not n or found[0] == PAGES[first][0].partition('#')[0])


@pytest.fixture
def browser(tmp_path):
    "A page with nbs/site.js and some lines more: what it has in the end as its text"
    if not shutil.which('chromium'): pytest.skip('no chromium')
    def show(body, script):
        page = tmp_path / 'page.html'
        page.write_text(f'''<html lang="zh-CN"><body>{body}<script>window.Fuse = class {{
            search() {{ return [] }} }}</script><script src="{ROOT}/nbs/site.js"></script>
            <script>document.body.textContent = JSON.stringify({script})</script>''')
        words = 'chromium --headless --no-sandbox --disable-gpu --dump-dom'.split()
        said = subprocess.run([*words, page.as_uri()], capture_output=True, text=True).stdout
        return json.loads(re.search(r'<body>(.*)</body>', said, re.S)[1])
    return show


def test_an_interval_stays_on_one_line():
    cell = '<td style="text-align:right">{}</td>'.format
    assert site.unbroken(cell('99 [98, 100]')) == cell('99 [98,_100]'.replace('_', '\u00a0'))
    told = '+4 [+2, +6], p = 0.02; -1 (-1 to +2)'
    kept = '+4 [+2,_+6], p_=_0.02; -1 (-1_to_+2)'.replace('_', '\u00a0')
    assert site.unbroken(cell(told)) == cell(kept)
    for text in (cell('3 [of 4, 5]'), cell('3 (of them)'), f'<td>{told}</td>', f'<p>{told}</p>'):
        assert site.unbroken(text) == text


def test_the_switch_stays_at_the_heading(browser):
    heads = ''.join(f'<h2 data-anchor-id="{id}" style="margin: 0; height: {height}px">{id}</h2>'
                    for id, height in [('first', 60), ('second', 60), ('third', 900)])
    links = '<a class="language" href="x.html">x</a>' \
            '<a class="language" data-other href="y.html">y</a>'
    main = f'<main style="margin-top: -40px">{heads}</main>'  # scrolled a bit
    assert browser(f'{main}{links}', '''[...document.querySelectorAll('a')].map(a => {
        a.addEventListener('click', e => e.preventDefault()); a.click(); return a.hash })'''
    ) == ['#second', '']


def test_the_browser_finds_what_the_check_finds(browser):
    entries = [dict(zip(('href', 'title', 'section', 'text'), one)) for one in PAGES]
    queries = ['损失掩码', 'mask', '掩码', 'masked score', '注意力', 'ask', 'part 3']
    found = browser('', f'''{json.dumps(queries)}.map(q => new Fuse({json.dumps(entries)}, {{}})
        .search(q, {{limit: 20}}).map(h => h.item.href.split('#')[0]))''')
    assert found == [site.search(entries, query, 'zh') for query in queries]


# --- JupyterLab

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab as `make lab` starts it: how to ask it, its address, and all that it has said"
    home = tmp_path_factory.mktemp('home')
    said = home/'said.txt'
    words = '-m jupyterlab --config tools/jupyter_server_config.py --no-browser'.split()
    with said.open('w') as out, subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env={**os.environ, 'HOME': str(home)},
            stdout=out, stderr=out) as server:
        try:
            end = time.time() + 60
            while not (url := re.search(r'(http://localhost:\d+)(\S+)\?token=(\w+)',
                                        said.read_text())) and time.time() < end: time.sleep(.2)
            def ask(page, /, **about):
                asked = Request(url[1] + page, headers={'Authorization': f'token {url[3]}'},
                                data=json.dumps(about).encode() if about else None)
                with urlopen(asked) as answer: return answer.read().decode()
            ask.address, ask.token = url[1].replace('http', 'ws'), url[3]
            yield ask, url[2], said.read_text
        finally: server.terminate()


def test_jupyterlab_opens_the_home_page_of_the_repository(lab):
    ask, page, _ = lab
    assert page == '/lab/tree/README.md' and 'JupyterLab' in ask(page)
    there = {one['name'] for one in json.loads(ask('/api/contents'))['content']}
    assert {'README.md', 'nbs', 'data', 'settings.ini'} <= there
    chapter = guide.LAB.partition('8888')[2] + '/nbs/core.ipynb'  # where the pages' links lead
    assert 'JupyterLab' in ask(chapter)
    assert json.loads(ask('/api/contents/nbs/core.ipynb?content=0'))
    kept = json.loads(ask('/lab/api/settings/@jupyterlab/docmanager-extension:plugin'))
    assert kept['schema']['properties']['defaultViewers']['default'] == {
        'markdown': 'Markdown Preview'}  # rendered


def test_jupyterlab_says_its_address_and_nothing_else(lab):
    import websocket
    ask, _, said = lab
    kernel = json.loads(ask('/api/kernels', name='python3', path='nbs/1_data'))['id']
    channels = f'{ask.address}/api/kernels/{kernel}/channels?session_id=test&token={ask.token}'
    talk = websocket.create_connection(channels, timeout=60)
    talk.recv()  # it runs
    talk.close()
    lines = [line.strip() for line in said().splitlines() if line.strip()]
    known = '[C ', 'To access the server', 'file://', 'Or copy and paste', 'http://'
    assert [line for line in lines if not line.startswith(known)] == []
