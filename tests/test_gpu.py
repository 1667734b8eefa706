"The one call for a GPU: every step runs at a toy size, and nothing that goes wrong stops the next"
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lm_nb.bench.speed import _gpu_curve, _gpu_table
from lm_nb.core import UserError

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location('tools_gpu', ROOT/'tools'/'gpu.py')
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


# --- the whole call, dry

@pytest.fixture(scope='module')
def dry(tmp_path_factory):
    "What a dry run has written"
    out = tmp_path_factory.mktemp('dry')
    done = subprocess.run([ROOT/'tools'/'gpu.sh', '6', '--dry'], text=True, timeout=400,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**os.environ, 'OUT': str(out), 'PYTHON': sys.executable})
    logs = [p.read_text()[-1500:] for p in (out/'gpu').glob('*.log')] if done.returncode else ''
    assert done.returncode == 0, (done.stdout, logs)
    return json.loads((out/'gpu.json').read_text(encoding='utf-8'))


FIGURES = {
    'environment': 'matmul peak, fp32|copying within its memory', 'tests': 'tests|skipped',
    'training': 'ours, .*|plain loop sdpa, .*|ours compiled, .*|ours compiled: utilisation|'
                'ours compiled against plain loop sdpa, .*',
    'memory': 'a step, all logits by chunks|the loss alone: peak memory, all logits by chunked',
    'attention': r'documents: math|speed with documents \(\w+\), of that without .*',
    'generating': 'toy, 1 row, .*: ours against plain loop|toy, 2 rows, .*: ours',
    'decoding': 'base-124m, 1 row: speed, of what memory allows|base-124m, 16 rows',
    'resume': 'equal steps, attention kernel: math',
    'packed': 'ours: speed with documents, of that without|ours compiled, .*',
    'real': 'tokens|steps alone|held out, after step \\d+'}


def test_every_step_of_a_dry_run_records_its_figures(dry):
    steps = {s['name']: s for s in dry['steps']}
    assert list(steps) == list(FIGURES) == [s.name for s in gpu.STEPS]
    for name, s in steps.items():
        what = [line['what'] for line in s['lines']]
        assert (s['status'], s['why']) == ('done', ''), name
        assert s['about'] and s['seconds'] > 0
        for wanted in FIGURES[name].split('|'):
            assert any(re.match(wanted, w) for w in what), (name, wanted, what)
        assert all(line['median'] >= 0 and line['values'] for line in s['lines'])
    assert [line['median'] for line in steps['resume']['lines']] == [100, 100]
    assert 'transformers' in str(steps['training']) and 'transformers' not in str(steps['packed'])


def test_it_says_where_it_ran_and_whether_goals_were_met(dry):
    assert dry['dry'] and dry['where'].keys() >= {
        'name', 'torch', 'python', 'commit', 'date', 'dtype', 'threads', 'numpy'}
    lines = [line for s in dry['steps'] for line in s['lines']]
    assert {line['met'] for line in lines if line['goal']} <= {True, False}
    assert all(line['met'] is None for line in lines if not line['goal'])
    assert {line['goal'] for line in lines} == {
        '', '≥ 55', '≥ 1.5', '≥ 2', '≥ 90', '≥ 1', '≥ 70', '≥ 100'}


def test_the_chapter_shows_it(dry):
    table, n = _gpu_table(dry), sum(len(s['lines']) for s in dry['steps'])
    assert len(table.rows) == n and dry['where']['name'] in table.notes[-1]
    assert len(_gpu_curve(dry).axes[0].lines[0].get_xdata()) > 5
    cells = json.loads((ROOT/'nbs'/'7_bench'/'04_speed.ipynb').read_text(encoding='utf-8'))['cells']
    page = next(s for c in cells if (s := ''.join(c['source'])).startswith('## On a GPU'))
    assert re.findall(r'^\| `(\w+)` \|', page, re.M) == [s.name for s in gpu.STEPS]


# --- what goes wrong

ODD = '''
import os, subprocess, sys, time
from types import SimpleNamespace as Line  # what is real takes seconds to import
from lm_nb.core import UserError

def figure(x, goal):
    got = Line(median=x, values=(x,), unit='s')
    return Line(what='a figure', got=got, goal=f'≥ {goal}', margin=x/goal)

def fine(given):
    "It does\\n    what it should"
    yield figure(2., 1)
    yield figure(3., 4)  # once more: the later one counts
    yield 'a remark'

def raises(given):
    yield from fine(given)
    raise ValueError('this is\\nbroken')

def refuses(given):
    raise UserError('there is no such thing')
    yield

def dies(given):
    yield from fine(given)
    os.kill(os.getpid(), 9)

def hangs(given):
    yield from fine(given)
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    (given.folder/'child').write_text(str(child.pid))
    while True:
        try: time.sleep(600)
        except KeyboardInterrupt: pass  # nor does it stop when it is asked to
'''


@pytest.fixture
def run(tmp_path, monkeypatch):
    "Run odd steps by name: what came of each, what was said, and the seconds that it took"
    monkeypatch.setattr(gpu, 'GRACE', .5)
    path = tmp_path/'odd.py'
    path.write_text(ODD, encoding='utf-8')
    def run(*names, minutes=1., seconds=20., least=1.):
        said, begun = [], time.monotonic()
        steps = [gpu.Step(f'{i}-{name}', seconds, least, f'{path}:{name}')
                 for i, name in enumerate(names)]
        done = gpu.run_steps(steps, minutes, tmp_path/'gpu.json', tmp_path/'gpu', True,
                             log=said.append)
        kept = json.loads((tmp_path/'gpu.json').read_text(encoding='utf-8'))
        assert kept['steps'] == done and len(said) == len(names)
        return done, said, time.monotonic() - begun
    return run


def test_a_step_that_raises_refuses_or_dies_is_recorded_and_the_next_one_runs(run):
    done, said, _ = run('raises', 'refuses', 'dies', 'fine')
    assert [(s['status'], s['why']) for s in done] == [
        ('failed', 'ValueError: this is'), ('failed', 'there is no such thing'),
        ('failed', 'ended with -9'), ('done', '')]
    want = [dict(what='a figure', median=3., unit='s', values=[3.], goal='≥ 4', met=False)]
    assert [s['lines'] for s in done] == [want, [], want, want]  # what was found before stays
    assert done[3]['about'] == 'It does what it should' and done[3]['notes'] == ['a remark']
    assert said[0].startswith('0-raises: failed (ValueError: this is)')
    assert said[3].endswith('1 figures, 0 of 1 goals met')


def alive(pid):
    "Whether a process runs"
    stat = Path(f'/proc/{pid}/stat')
    return stat.exists() and stat.read_text().rsplit(')', 1)[1].split()[0] != 'Z'


def test_a_step_that_hangs_is_ended_with_all_it_started_and_the_next_one_runs(run, tmp_path):
    done, _, _ = run('hangs', 'fine', seconds=6)
    assert [s['status'] for s in done] == ['out of time', 'done']
    assert done[0]['why'] == 'not done after 6 s' and done[0]['seconds'] < 8
    assert done[0]['lines'] == done[1]['lines'] != []
    assert not alive(int((tmp_path/'gpu'/'0-hangs'/'child').read_text()))


def test_the_whole_is_bounded_and_says_what_it_had_no_time_for(run):
    done, _, seconds = run('hangs', 'hangs', 'fine', minutes=.15, seconds=6, least=4)
    assert seconds < 11  # of 9, with the noise of a busy machine
    assert [s['status'] for s in done] == ['out of time', 'skipped', 'skipped']
    assert re.fullmatch(r'\d+ s were left, and it needs 4', done[1]['why'])
    table = _gpu_table(dict(where={}, steps=done))
    assert len(table.rows) == 1 and sum('skipped' in note for note in table.notes) == 2


def test_rows_are_halved_until_they_fit_into_the_memory():
    steps, given = gpu.load(f'{gpu.MINE}:fitting'), gpu.Given(False, 1., None)
    def measure(rows):
        yield ('began', rows)
        if rows > 1: raise torch.OutOfMemoryError('too many')
        yield 'done'
    found = list(steps(given, measure))
    assert found[-3:] == ['2 rows at a time did not fit', ('began', 1), 'done']
    def never(rows):
        raise torch.OutOfMemoryError('too many')
        yield
    with pytest.raises(UserError, match='not even one row'): list(steps(given, never))


# --- the script around it

def script(tmp_path, *words, **env):
    "tools/gpu.sh with a Python that lacks einops and writes down what it is asked to do"
    python, calls = tmp_path/'python', tmp_path/'calls'
    python.write_text('#!/bin/sh\n'
                      f'if [ "$1" = - ]; then echo einops; else echo "$@" >>{calls}; fi\n')
    python.chmod(0o755)
    done = subprocess.run([ROOT/'tools'/'gpu.sh', *words], capture_output=True, text=True,
                          env={**os.environ, 'PYTHON': str(python), **env})
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_what_is_missing_comes_from_a_folder_of_wheels_and_never_from_the_network(tmp_path):
    done, calls = script(tmp_path, '5')
    assert done.returncode == 2 and 'einops' in done.stderr and calls == []
    for words, env in (([str(tmp_path)], {}), ([], dict(WHEELS=str(tmp_path)))):
        done, calls = script(tmp_path, '5', *words, DRY='1', **env)
        assert done.returncode == 0
        assert calls[0] == f'-m pip install -q --no-index --find-links {tmp_path} einops'
        assert re.fullmatch(r'tools/gpu.py --spent \d+ 5 --dry', calls[-1])
        (tmp_path/'calls').unlink()


def test_without_a_card_it_says_so_and_writes_nothing(tmp_path):
    done = subprocess.run([sys.executable, ROOT/'tools'/'gpu.py'], capture_output=True, text=True,
                          env={**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OUT': str(tmp_path)})
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and '--dry' in done.stderr
    assert list(tmp_path.iterdir()) == []
