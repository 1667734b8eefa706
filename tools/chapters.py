"""Run the chapters and compare what they give with what they show:

    python tools/chapters.py [notebook or folder …]

Every notebook runs from top to bottom in a process of its own, in its own folder, as nbdev-test
runs it: cells flagged `slow`, `cuda` or `eval: false` are left out. A saved output that is not
what its cell gives now is an error. Texts may differ in the last digits of their fractions (see
`same`). Of a picture its data are compared, not its pixels: they are saved beside it, in the
metadata of the output (see `figure_data`).

    --save          write the outputs and the pictures' data into the notebooks
    --workers N     run N notebooks at a time
    --flags "cuda"  run cells with these flags too

A cell whose output depends on the machine says so and why; its output is not compared:

    #| output: varies  # seconds on this machine
"""
import argparse
import difflib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from math import isfinite
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
TOLERANCE = 1e-3  # of a fraction: processors differ in their last digits
KEPT = 64         # so many numbers of an array are saved, or else a sample and its moments
WIDGET = 'application/vnd.jupyter.widget-view+json'
NO_REASON = '`output: varies` needs its reason, as a comment beside or below it'
VARIES = re.compile(r'^#\|\s*output:\s*varies\b[ \t]*(.*(?:\n#(?!\|).*)?)', re.M)


# --- texts: equal, but for the last digits of fractions

# a number that stands by itself: not in a word (v2.5, 3f2a), a version (2.13.0) or an address
NUMBER = re.compile(r'(?<![\w.])[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?(?!\.?\d)', re.A)


def plain(text):
    "A text without what is different in each process: the addresses of objects"
    return re.sub(r'\bat 0x[0-9a-f]{6,}', 'at 0x…', text)


def near(a, b):
    "Whether two numbers, as written, are the same: whole ones exactly, fractions within TOLERANCE"
    if a == b: return True
    fractions = all(re.search('[.eE]', n) for n in (a, b))
    if not fractions or not re.search(r'\.\d|[eE]', a + b): return False  # torch writes 2.0 as `2.`
    return abs(float(a) - float(b)) <= TOLERANCE * max(abs(float(a)), abs(float(b)))


def same(a, b):
    "Whether two texts are the same: word for word, and number for number as `near` has it"
    a, b = plain(a), plain(b)
    if a == b: return True
    if NUMBER.split(a) != NUMBER.split(b): return False
    return all(near(x, y) for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)))


def difference(saved, now):
    "A unified diff of two texts, without the lines that differ in last digits only"
    saved, now = plain(saved).splitlines(), plain(now).splitlines()
    if len(saved) == len(now): now = [s if same(s, n) else n for s, n in zip(saved, now)]
    lines = difflib.unified_diff(saved, now, 'saved', 'now', lineterm='', n=1)
    return '\n'.join(line if len(line) <= 200 else line[:199] + '…' for line in lines)


# --- pictures: the data that a figure was drawn from

def numbers(values):
    """An array in short, as text: four digits beside its largest value.

    Of a long array so many in even distances, and its mean, deviation, least and largest."""
    import numpy as np
    values = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan).ravel()
    finite = values[np.isfinite(values)]
    if len(values) > KEPT and len(finite):
        moments = [finite.mean(), finite.std(), finite.min(), finite.max()]
        at = np.linspace(0, len(values) - 1, KEPT // 2).astype(int)
        values = np.concatenate([values[at], moments])
    scale = np.abs(finite).max(initial=0)
    digits = 3 - int(np.floor(np.log10(scale))) if scale else 0
    return ' '.join(f'{round(float(v), digits) + 0:g}' for v in values)


def columns(what, xy):
    "x and y apart: each has a scale of its own"
    for name, values in zip('xy', zip(*xy)): yield f'{what} {name} {len(values)}', values


def axis_words(axis):
    "The labels of an axis that are words, not its scale"
    from matplotlib.category import StrCategoryFormatter
    from matplotlib.ticker import FixedFormatter, FuncFormatter
    chosen = FixedFormatter | FuncFormatter | StrCategoryFormatter
    labels = axis.get_majorticklabels() if isinstance(axis.get_major_formatter(), chosen) else []
    return [axis.get_label_text(), *(t.get_text() for t in labels)]


def axes_data(ax):
    "What is drawn in one pair of axes: (what it is, numbers) for each artist"
    import numpy as np
    from matplotlib.colors import to_hex
    titles = [ax.get_title(loc=at) for at in ('left', 'center', 'right')]
    legend = [t.get_text() for t in ax.get_legend().get_texts()] if ax.get_legend() else []
    words = [*titles, *axis_words(ax.xaxis), *axis_words(ax.yaxis), *legend]
    yield f'axes {ax.get_xscale()} {ax.get_yscale()} {[w for w in words if w]}', []
    for line in ax.lines:
        xy = np.column_stack([line.get_xdata(orig=False), line.get_ydata(orig=False)])
        yield from columns(f'line {to_hex(line.get_color())}', xy)
    for c in ax.collections:
        dots = type(c).__name__ == 'PathCollection'  # all of one shape
        points = [c.get_offsets()] if dots else [path.vertices for path in c.get_paths()]
        yield from columns(type(c).__name__, np.concatenate([np.zeros((0, 2)), *points]))
        values = c.get_array() if c.get_array() is not None else c.get_facecolor()
        yield f'{type(c).__name__} colours {np.size(values)}', values
    if ax.patches:
        paths = [p.get_patch_transform().transform_path(p.get_path()) for p in ax.patches]
        yield from columns('patches from', [path.get_extents().min for path in paths])
        yield from columns('patches to', [path.get_extents().max for path in paths])
        yield f'patches colours {len(paths)}', [p.get_facecolor() for p in ax.patches]
    for image in ax.images: yield f'image {np.shape(image.get_array())}', image.get_array()
    for text in ax.texts: yield f'text {text.get_text()!r}', text.get_unitless_position()
    for table in ax.tables:
        yield f'table {[c.get_text().get_text() for _, c in sorted(table.get_celld().items())]}', []


def figure_data(fig):
    "The data that a figure shows, a line for each thing in it: `what it is = its numbers`"
    words = [t.get_text() for t in [*fig.texts, *(t for g in fig.legends for t in g.get_texts())]]
    out = [(f'figure {words}', fig.get_size_inches())]
    for ax in fig.axes: out += axes_data(ax)
    return [f'{plain(what)} = {numbers(values)}' for what, values in out]


def close(a, b):
    "Whether two lists of numbers are the same within TOLERANCE of the largest"
    scale = max((abs(v) for v in a + b if isfinite(v)), default=0)
    pairs = zip(a, b, strict=True)
    return all(repr(x) == repr(y) or abs(x - y) <= TOLERANCE * scale for x, y in pairs)


def picture_difference(saved, now):
    "How the data of two pictures differ, in words; nothing if they do not"
    lines = []
    for one, other in zip_longest(saved, now, fillvalue='nothing = '):
        (what, _, old), (what_now, _, new) = one.rpartition(' = '), other.rpartition(' = ')
        a, b = list(map(float, old.split())), list(map(float, new.split()))
        if not same(what, what_now) or len(a) != len(b): lines += [f'-{what}', f'+{what_now}']
        elif not close(a, b):
            differ = [(x, y) for x, y in zip(a, b) if repr(x) != repr(y)]
            lines.append(f' {what}: {differ[0][0]:g} is now {differ[0][1]:g} '
                         f'({len(differ)} of {len(a)} numbers differ)')
    return '\n'.join(lines)


# --- one notebook, in a process of its own

def is_picture(kind): return kind.startswith('image/') and 'svg' not in kind


def keep_figure_data(shell):
    "Whenever this shell shows a figure, put its data beside its picture"
    from matplotlib.figure import Figure
    formatter = shell.display_formatter.formatters['image/png']
    draw = formatter.lookup_by_type(Figure)

    def draw_and_describe(fig):
        shown = draw(fig)
        picture, about = shown if isinstance(shown, tuple) else (shown, {})
        return picture, {**about, 'data': figure_data(fig)}
    formatter.for_type(Figure, draw_and_describe)


def outputs_of(cell):
    """The outputs of a cell that has run, as they are saved: a picture with its data and its size;
    no widget, which is nothing without its kernel"""
    out = [o for o in json.loads(json.dumps(cell.outputs)) if WIDGET not in o.get('data', {})]
    for o in out:
        if 'execution_count' in o: o['execution_count'] = None
        if 'metadata' not in o: continue
        size = o['metadata'].get('image/png', {})
        pictures = {k: ''.join(v) for k, v in o['data'].items() if is_picture(k)}
        if 'data' in size: o['metadata'] = {'data': size.pop('data'), 'image/png': size}
        elif pictures:  # no figure: a file, or another library's picture
            sums = {k: hashlib.sha256(v.encode()).hexdigest() for k, v in pictures.items()}
            o['metadata'] = {'data': [f'{k} {checksum} = ' for k, checksum in sums.items()]}
        else: o['metadata'] = {}
    return out


def traceback_of(shell, path):
    "The traceback of a cell that failed, without the frames of what runs it"
    text = re.sub(r'\x1b\[[0-9;]*m', '', shell.prettytb(fname=path.name))
    ours = r'  File "[^"]*(?:execnb|IPython|fastcore/nbio|chapters\.py)\b.*\n(?:    .*\n)*'
    return re.sub(ours, '', text).rstrip()


def execute(path, skip, force, timeout):
    "Run a notebook; what each cell gave, and the error that stopped it"
    from execnb.shell import CaptureShell
    from fastcore.nbio import read_nb
    from nbdev.test import nb_test_cells
    nb, run = read_nb(path), {c.id for c in nb_test_cells(path, skip, force)}
    os.chdir(path.parent)
    shell, given, error = CaptureShell(path), {}, None
    keep_figure_data(shell)
    try:
        shell.run_all(nb, exc_stop=True, cell_timeout=timeout,
                      preproc=lambda cell: cell.id not in run,
                      postproc=lambda cell: given.update({cell.id: outputs_of(cell)}))
    except BaseException:
        error = (nb.cells[(shell._cell_idx or 1) - 1].id, traceback_of(shell, path))
    return {'given': given, 'error': error}


def worker(task):
    "What the other process does"
    path, skip, force, timeout, result = json.loads(Path(task).read_text())
    sys.path.insert(0, str(ROOT))
    out = execute(Path(path), skip, force, timeout)
    sys.__stdout__.flush()
    Path(result).write_text(json.dumps(out))
    os._exit(0)  # what a notebook has left running is of no more use


def run(path, skip, force, timeout):
    "Run a notebook in another process, and wait for it"
    with tempfile.TemporaryDirectory() as tmp:
        task, result = Path(tmp) / 'task.json', Path(tmp) / 'result.json'
        task.write_text(json.dumps([str(path), skip, force, timeout, str(result)]))
        done = subprocess.run([sys.executable, __file__, '--task', task], text=True,
                              env={**os.environ, 'IN_TEST': '1'}, capture_output=True)
        if result.exists(): return json.loads(result.read_text())
    words = f'its process ended with {done.returncode}\n{done.stderr[-3000:]}'
    return {'given': {}, 'error': (None, words)}


# --- what a notebook has saved, beside what it gives now

def shown(outputs):
    """A cell's outputs as (kind, text, a picture's data).

    What was printed comes first, then what was displayed: tools differ in how they mix them."""
    out = []
    for name in 'stdout', 'stderr':
        texts = [''.join(o['text']) for o in outputs if o.get('name') == name]
        if texts: out.append((name, ''.join(texts), None))
    for o in outputs:
        for kind, value in sorted(o.get('data', {}).items()):
            if is_picture(kind): out.append((kind, '', o.get('metadata', {}).get('data', 'none')))
            else: out.append((kind, value if isinstance(value, str) else ''.join(value), None))
    return out


def compare(saved, now):
    "How two lists of outputs differ, in words; nothing if they do not"
    saved, now, found = shown(saved), shown(now), []
    kinds = [[kind for kind, _, _ in side] for side in (saved, now)]
    if kinds[0] != kinds[1]:
        was, gives = (', '.join(k) or 'nothing' for k in kinds)
        texts = ('\n'.join(text for _, text, _ in side if text) for side in (saved, now))
        return f'it shows {was}; now it gives {gives}\n{difference(*texts)}'.rstrip()
    for (kind, a, data), (_, b, data_now) in zip(saved, now):
        if data == 'none': words = ' saved without the data that it was drawn from'
        elif data is None: words = '' if same(a, b) else '\n' + difference(a, b)
        else: words = (lines := picture_difference(data, data_now)) and f'\n{lines}'
        if words: found.append(f'{kind}:{words}')
    return '\n'.join(found)


def faults(nb, result):
    "What is wrong: (cell, words) for each cell that fails or shows what it does not give"
    found, cells = [], {c['id']: c for c in nb['cells']}
    failed = tuple(result['error'] or ())
    for id, now in result['given'].items():
        if id in failed[:1]: continue
        varies = VARIES.search(''.join(cells[id]['source']))
        if varies: words = '' if '#' in varies[1] else NO_REASON
        else: words = compare(cells[id]['outputs'], now)
        if words: found.append((id, words))
    return found + ([failed] if failed else [])


def save(path, nb, given):
    "Write what the cells gave into the notebook, and clean it as nbdev-clean does"
    from fastcore.nbio import write_nb
    from nbdev.clean import clean_nb
    for cell in nb['cells']:
        if cell['id'] in given: cell['outputs'] = given[cell['id']]
    clean_nb(nb, clean_ids=False, allowed_out_metadata_keys=['data', 'image/png'])
    write_nb(nb, path)


# --- the command

def notebooks(paths):
    "The notebooks under the paths"
    found = [sorted(p.rglob('*.ipynb')) if p.is_dir() else [p] for p in paths]
    return [p for ps in found for p in ps if p.parent.name != '.ipynb_checkpoints']


def name(path): return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def check(path, args, skip):
    "Run one notebook, save what it gave if that is wanted: (path, seconds, cells with faults)"
    nb, start = json.loads(path.read_text(encoding='utf-8')), time.time()
    result = run(path, skip, args.flags.split(), args.timeout)
    found = faults(nb, result)
    if args.save and not result['error']:
        save(path, nb, result['given'])
        found = [(id, words) for id, words in found if words == NO_REASON]
    number = {c['id']: i for i, c in enumerate(nb['cells'])}
    for id, words in found:
        print(f'{name(path)}, cell {id} (number {number.get(id)}): {words}\n', flush=True)
    return path, time.time() - start, [id for id, _ in found]


def main(argv=None):
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument('paths', nargs='*', type=Path, default=[NBS])
    parser.add_argument('--save', action='store_true')
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--flags', default='')
    parser.add_argument('--timeout', type=int, default=600, help='seconds for a cell')
    args = parser.parse_args(argv)
    config = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['nbdev']
    skip = config['tst_flags'].split()
    paths = notebooks([p.resolve() for p in args.paths])
    if not paths: sys.exit('chapters: no notebook there')
    with ThreadPoolExecutor(args.workers) as pool:
        done = list(pool.map(lambda path: check(path, args, skip), paths))
    for path, seconds, found in sorted(done, key=lambda row: -row[1]):
        print(f'{seconds:7.1f} s  {name(path)}{f"  {len(found)} faults" if found else ""}')
    bad = [name(path) for path, _, found in done if found]
    well = 'saved' if args.save else 'show what they give'
    if not bad: return print(f'{len(done)} notebooks {well}')
    sys.stdout.flush()
    sys.exit('\n'.join([f'chapters: {len(bad)} of {len(done)} notebooks have faults.',
                        'Where the new output is right, save the chapter, and look at the diff:',
                        f'  python tools/chapters.py --save {" ".join(bad)}']))


if __name__ == '__main__': worker(sys.argv[2]) if sys.argv[1:2] == ['--task'] else main()
