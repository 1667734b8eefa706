"""What every notebook has to be: opened without a dialog, read without being run, the same on every machine."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').glob('*.ipynb') if not p.name.startswith('_'))
CHAPTERS = [p for p in NOTEBOOKS if re.match(r'\d', p.name)]


def load(path): return json.loads(path.read_text(encoding='utf-8'))


def cells(path, kind): return [(i, ''.join(c['source']), c) for i, c in enumerate(load(path)['cells']) if c['cell_type'] == kind]


def flags(source): return set(re.findall(r'^#\|\s*(\w+)', source, re.M))


def code(source):
    "The statements of a cell; magics count as nothing"
    return [] if source.startswith('%%') else ast.parse(re.sub(r'^(\s*)[%!].*', r'\1pass', source, flags=re.M)).body


def modules():
    "Module -> the chapter that exports it"
    opening = {p: ''.join(load(p)['cells'][0]['source']) for p in CHAPTERS}
    return {m[1]: p for p, source in opening.items() if (m := re.match(r'#\|\s*default_exp\s+(\w+)', source))}


every = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
chapter = pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)


def test_there_are_chapters():
    assert len(CHAPTERS) >= 16


@every
def test_jupyter_knows_the_kernel(path):
    nb = load(path)
    assert nb['metadata']['kernelspec']['name'] == 'python3'
    assert nb['nbformat'] == 4 and all(c.get('id') for c in nb['cells'])
    assert len({c['id'] for c in nb['cells']}) == len(nb['cells'])


@every
def test_title_and_promise(path):
    first = next(s for _, s, _ in cells(path, 'markdown'))
    assert re.fullmatch(r'# [^\n]+\n+> [^\n]+(\n> [^\n]+)*\n*', first), 'the title cell holds `# Title` and `> promise`, and no more'


@chapter
def test_opens_with_its_module(path):
    source = ''.join(load(path)['cells'][0]['source'])
    if 'default_exp' in source: assert source.strip().splitlines()[0].startswith('#| default_exp ')
    else: assert not any('export' in flags(s) for _, s, _ in cells(path, 'code')), 'exported cells need a `#| default_exp` in the first cell'


@every
def test_outputs_are_saved_and_clean(path):
    for i, source, cell in cells(path, 'code'):
        for out in cell['outputs']:
            assert out['output_type'] != 'error', f'cell {i} saved an error'
            if out.get('name') == 'stderr':  # a command's own message is a result; warnings and progress bars are not
                assert ''.join(out['text']).startswith('lm-nb: '), f'cell {i} saved what it wrote to stderr'
        last = code(source)[-1:]
        value = last and isinstance(last[0], ast.Expr) and isinstance(last[0].value, ast.Name | ast.Subscript | ast.List | ast.Dict | ast.Tuple)
        if value and not source.rstrip().endswith(';') and not flags(source) & {'export', 'hide', 'eval'}:
            assert cell['outputs'], f'cell {i} ends on a value, but its output is not saved'


@every
def test_nothing_of_one_machine(path):
    text = json.dumps([[''.join(c['source']), c.get('outputs')] for c in load(path)['cells']], ensure_ascii=False)
    text = re.sub(r'"image/png": ("[^"]*"|\[[^\]]*\])', '', text)
    found = re.findall(r'(?:/home/|/root/|/Users/|/tmp/|[A-Z]:\\\\Users)[^\s"\']*|\bat 0x[0-9a-f]{6,}', text)
    assert not found, f'paths or addresses of one machine: {found[:3]}'


@chapter
def test_imports_only_earlier_chapters(path):
    exports, later = modules(), []
    for _, source, _ in cells(path, 'code'):
        for name in re.findall(r'^\s*(?:from|import)\s+lm_nb\.(\w+)', source, re.M):
            if name in exports and exports[name].name > path.name: later.append(name)
    assert not later, f'imports of later chapters: {later}'


@chapter
def test_imports_stand_alone(path):
    "A cell that imports and computes is run by the documentation tools: imports have cells of their own"
    for i, source, _ in cells(path, 'code'):
        body = code(source)
        kinds = {isinstance(n, ast.Import | ast.ImportFrom) for n in body}
        assert len(kinds) < 2 or not any(isinstance(n, ast.Expr | ast.Assign) for n in body), f'cell {i} imports and does something else'


def test_the_package_loads_no_torch():
    program = 'import sys, lm_nb; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', program], cwd=ROOT).returncode == 0
