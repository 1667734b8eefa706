"What every notebook has to be: opened without a dialog, read without a run, the same everywhere"
import ast
import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unicodedata import east_asian_width

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE = ROOT / 'nbs', ROOT / 'lm_nb'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
CHAPTERS = [p for p in NOTEBOOKS if p.stem not in ('index', 'contributing')]
PARTS = 'core data model inference training alignment use bench workbook cli'.split()


def page(path): return re.sub(r'^\d\d_', '', path.stem)  # 09_tokenizer -> tokenizer


def reading_order():
    "The notebooks as the sidebar has them"
    folders = {path: path.parent.relative_to(NBS) for path in NOTEBOOKS}
    pages = {f'{folders[path]}/{page(path)}'.removeprefix('./'): path for path in NOTEBOOKS}
    names = re.findall(r'- (\S+)\.ipynb', (ROOT / '_quarto.yml').read_text())
    return [pages[name] for name in names]


def load(path): return json.loads(path.read_text(encoding='utf-8'))


def cells(path, kind):
    "The cells of one kind: (number, source, cell)"
    found = enumerate(load(path)['cells'])
    return [(i, ''.join(c['source']), c) for i, c in found if c['cell_type'] == kind]


def flags(source): return set(re.findall(r'^#\|\s*(\w+)', source, re.M))


def code(source):
    "The statements of a cell; magics count as nothing"
    if source.startswith('%%'): return []
    return ast.parse(re.sub(r'^(\s*)[%!].*', r'\1pass', source, flags=re.M)).body


def modules():
    "Module -> the chapter that exports it"
    opening = {p: ''.join(load(p)['cells'][0]['source']) for p in CHAPTERS}
    found = {p: re.match(r'#\|\s*default_exp\s+([\w.]+)', source) for p, source in opening.items()}
    return {m[1]: p for p, m in found.items() if m}


every = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
chapter = pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)


# --- the book

def test_the_sidebar_names_every_notebook_once_and_in_order():
    order = reading_order()
    assert sorted(order) == NOTEBOOKS
    numbered = [path for path in order if path.parent != NBS]
    assert numbered == sorted(numbered), 'the sidebar has parts and chapters in another order'


def test_there_are_chapters():
    assert len(CHAPTERS) >= 16


@chapter
def test_the_last_text_leads_to_the_next_chapter(path):
    order = reading_order()
    after = order[order.index(path) + 1]
    text = cells(path, 'markdown')[-1][1]
    links = re.findall(r'\]\(([^)#:\s]+\.ipynb)', text)
    onward = [(path.parent / link).resolve() for link in links]
    wanted = os.path.relpath(after, path.parent)
    assert after in onward, f'the last text should link to {wanted}, not to {links or "nothing"}'


@every
def test_prose_names_chapters_by_their_titles(path):
    sources = [source for kind in ('markdown', 'code') for _, source, _ in cells(path, kind)]
    found = [m for source in sources for m in re.findall(r'\b[Cc]hapters? \d+[a-z]?\b', source)]
    assert not found, f'numbers change: link to the chapter under its title instead of {found}'


# --- a notebook

@every
def test_jupyter_knows_the_kernel(path):
    nb = load(path)
    assert nb['metadata']['kernelspec']['name'] == 'python3'
    assert nb['nbformat'] == 4 and all(c.get('id') for c in nb['cells'])
    assert len({c['id'] for c in nb['cells']}) == len(nb['cells'])


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    "JupyterLab's files as `make lab` serves them, in an empty folder"
    from traitlets.config import PyFileConfigLoader
    config = PyFileConfigLoader('jupyter_server_config.py', path=str(ROOT / 'tools')).load_config()
    folder = str(tmp_path_factory.mktemp('desk'))
    config.NotebookNotary.data_dir = str(tmp_path_factory.mktemp('signatures'))
    return config.ServerApp.contents_manager_class(root_dir=folder, config=config)


def opened_and_saved(desk, path):
    "What JupyterLab gets when it opens a notebook; it saves it with what a run adds, and closes it"
    async def both():
        model = await desk.get(path.name)
        for cell in model['content']['cells']:
            if cell['cell_type'] != 'code': continue
            cell['metadata'] |= dict(trusted=True, collapsed=False)
            cell['execution_count'] = 7
        await desk.save(dict(type='notebook', content=json.loads(json.dumps(model['content']))),
                        path.name)
        return model['content'], (await desk.get(path.name))['content']
    return asyncio.run(both())


@every
def test_jupyterlab_finds_and_leaves_nothing_to_save(path, desk):
    copy = Path(desk.root_dir) / path.name
    copy.write_bytes(path.read_bytes())
    before, after = opened_and_saved(desk, copy)
    assert copy.read_bytes() == path.read_bytes(), 'it is not as `nbdev-clean` leaves it'
    assert all(c['metadata'] == {'trusted': True} for c in after['cells'] if 'outputs' in c)
    from ipykernel.ipkernel import IPythonKernel
    about = before['metadata']
    assert about['language_info'] == IPythonKernel.language_info
    assert set(about['kernelspec']) == {'name', 'display_name', 'language'}


@every
def test_title_and_promise(path):
    first = next(s for _, s, _ in cells(path, 'markdown'))
    wanted = r'# [^\n]+\n+> [^\n]+(\n> [^\n]+)*\n*'
    assert re.fullmatch(wanted, first), 'the title cell holds `# Title` and `> promise` only'


@chapter
def test_opens_with_its_module(path):
    source = ''.join(load(path)['cells'][0]['source'])
    if 'default_exp' in source: assert source.strip().splitlines()[0].startswith('#| default_exp ')
    else:
        exported = any('export' in flags(s) for _, s, _ in cells(path, 'code'))
        assert not exported, 'exported cells need a `#| default_exp` in the first cell'


@every
def test_outputs_are_saved_and_clean(path):
    values = ast.Name | ast.Subscript | ast.List | ast.Dict | ast.Tuple
    for i, source, cell in cells(path, 'code'):
        for out in cell['outputs']:
            assert out['output_type'] != 'error', f'cell {i} saved an error'
            if out.get('name') == 'stderr':  # a command's message is a result, a warning is not
                ours = ''.join(out['text']).startswith('lm-nb: ')
                assert ours, f'cell {i} saved what it wrote to stderr'
        last = code(source)[-1:]
        value = last and isinstance(last[0], ast.Expr) and isinstance(last[0].value, values)
        quiet = source.rstrip().endswith(';') or flags(source) & {'export', 'hide', 'eval'}
        if value and not quiet:
            assert cell['outputs'], f'cell {i} ends on a value, but its output is not saved'


@every
def test_nothing_of_one_machine(path):
    found = [[''.join(c['source']), c.get('outputs')] for c in load(path)['cells']]
    text = json.dumps(found, ensure_ascii=False)
    text = re.sub(r'"image/png": ("[^"]*"|\[[^\]]*\])', '', text)
    folders = r'(?:/home/|/root/|/Users/|/tmp/|[A-Z]:\\\\Users)[^\s"\']*'
    found = re.findall(rf'{folders}|\bat 0x[0-9a-f]{{6,}}', text)
    assert not found, f'paths or addresses of one machine: {found[:3]}'


def width(line): return sum(2 if east_asian_width(c) in 'WF' else 1 for c in line)


@every
def test_code_is_at_most_100_columns_wide(path):
    wide = {}
    for i, source, _ in cells(path, 'code'):
        lines = [width(line) for line in source.splitlines() if width(line) > 100]
        if lines: wide[i] = max(lines)
    assert not wide, f'{len(wide)} cells are too wide (number: columns): {wide}'


@chapter
def test_imports_stand_alone(path):
    "A cell that imports and computes is run by the documentation tools: imports stand apart"
    for i, source, _ in cells(path, 'code'):
        body = code(source)
        kinds = {isinstance(n, ast.Import | ast.ImportFrom) for n in body}
        computes = any(isinstance(n, ast.Expr | ast.Assign) for n in body)
        assert len(kinds) < 2 or not computes, f'cell {i} imports and does something else'


# --- who imports whom

def dotted(path):
    "lm_nb/data/corpus.py -> data.corpus"
    return '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)


MODULES = {dotted(p): p for p in sorted(PACKAGE.rglob('*.py')) if p.name != '__init__.py'}


def origin(package, name):
    "The module that a name comes from, or is, in `from lm_nb.PACKAGE import name`"
    whole = f'{package}.{name}'.strip('.')
    if package in MODULES or whole in MODULES: return package if package in MODULES else whole
    stub = PACKAGE / package.replace('.', '/') / '__init__.pyi'
    nodes = ast.parse(stub.read_text()).body if stub.exists() else []
    nodes = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    handed = {a.asname or a.name: n.module for n in nodes for a in n.names}
    return origin(f'{package}.{handed[name]}'.strip('.'), name) if handed.get(name) else None


def imported(nodes, package=''):
    "The modules of lm_nb that some statements import; relative imports are seen from `package`"
    found = set()
    for n in nodes:
        if isinstance(n, ast.Import):
            names = [a.name.partition('.')[2] for a in n.names if a.name.split('.')[0] == 'lm_nb']
            found |= {name for name in names if name in MODULES}
        if not isinstance(n, ast.ImportFrom): continue
        if n.level:
            parts = package.split('.') if package else []
            above = parts[:len(parts) - n.level + 1]
            base = '.'.join([*above, n.module or '']).strip('.')
        elif (n.module or '').split('.')[0] == 'lm_nb': base = n.module.partition('.')[2]
        else: continue
        found |= {origin(base, a.name) for a in n.names}
    return found - {None}


def arrows():
    "Module -> the modules that it imports, in its functions too (but for the command line)"
    found = {}
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding='utf-8'))
        nodes = tree.body if name == 'cli' else ast.walk(tree)
        found[name] = imported(nodes, name.rpartition('.')[0]) - {name}
    return found


@chapter
def test_imports_only_earlier_chapters(path):
    exports, order, later = modules(), reading_order(), set()
    for _, source, _ in cells(path, 'code'):
        nodes = [n for top in code(source) for n in ast.walk(top)]
        homes = {name: exports[name] for name in imported(nodes) if name in exports}
        later |= {name for name, home in homes.items() if order.index(home) > order.index(path)}
    assert not later, f'imports of later chapters: {sorted(later)}'


def test_imports_are_seen():
    "The arrows are read as Python reads them"
    text = ('from ..core import check\nfrom . import shards\nimport lm_nb.model.gpt\n'
            'def f(): from lm_nb.data import Tokenizer, corpus')
    wanted = {'core', 'data.shards', 'model.gpt', 'data.tokenizer', 'data.corpus'}
    assert imported(ast.walk(ast.parse(text)), 'data') == wanted


def circle(found):
    "A circle among arrows, as a list of names, or None"
    clear = set()

    def walk(name, trail):
        if name in trail: return [*trail[trail.index(name):], name]
        if name in clear: return None
        around = next(filter(None, (walk(n, [*trail, name]) for n in sorted(found[name]))), None)
        if not around: clear.add(name)
        return around
    return next(filter(None, (walk(name, []) for name in found)), None)


def test_no_module_imports_itself_through_others():
    assert circle({'a': {'b', 'c'}, 'b': {'c'}, 'c': set()}) is None
    assert circle({'a': {'b'}, 'b': {'c'}, 'c': {'b'}}) == ['b', 'c', 'b']
    around = circle(arrows())
    assert not around, ' -> '.join(around)


def test_no_arrow_points_back():
    def part(name): return PARTS.index(name.split('.')[0])
    pairs = [(a, b) for a, others in arrows().items() for b in sorted(others)]
    back = [f'{a} imports {b}' for a, b in pairs if part(b) > part(a)]
    assert not back, '\n'.join(back)


def test_the_package_loads_no_torch():
    program = 'import sys, lm_nb; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', program], cwd=ROOT).returncode == 0
