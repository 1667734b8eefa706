"`lm-nb board`: all runs in one page, wherever they lie; one line where that cannot be"
import json, os, re, shutil, signal, socket, subprocess, sys, tempfile, time
from pathlib import Path
from urllib.request import urlopen

import pytest

import lm_nb
from lm_nb.cli import main
from lm_nb.training.monitor import RunLog, link_run

HOME = Path(lm_nb.__file__).resolve().parent.parent


@pytest.fixture
def desk(tmp_path, monkeypatch):
    "A folder with settings, a run in `runs/`, and one on another disk"
    monkeypatch.chdir(tmp_path)
    shutil.copy(HOME/'settings.ini', tmp_path)
    for folder in ('runs/micro', 'disk/mine'):
        with RunLog(tmp_path/folder/'log'/'pretrain') as log: log.scalars(1, loss=2.)
        link_run(tmp_path/folder)
    return tmp_path


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def shown(desk, *words):
    "The runs that TensorBoard shows, what is printed, and how it ends at Ctrl-C"
    words = [sys.executable, '-m', 'lm_nb.cli', 'board', *words]
    env = {**os.environ, 'PYTHONPATH': str(HOME)}
    with subprocess.Popen(words, cwd=desk, env=env, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as p:
        try:
            line = p.stdout.readline()
            url, runs, end = re.search(r'http:\S+', line)[0], [], time.time() + 30
            while not runs and time.time() < end:
                time.sleep(.5)
                with urlopen(f'{url}data/runs') as page: runs = json.load(page)
            p.send_signal(signal.SIGINT)
            return sorted(runs), line, p.wait(20), p.stderr.read()
        finally: p.kill()


def test_all_runs_in_one_page(desk):
    port = free_port()
    runs, line, status, said = shown(desk, f'port={port}')
    assert [r.removesuffix('/log/pretrain') for r in runs] == ['elsewhere/mine', 'micro']
    assert f'http://localhost:{port}/' in line and str(desk/'runs') in line
    assert (status, said) == (0, '')


@pytest.mark.parametrize('name', ['mine', 'disk/mine'])
def test_one_run_by_its_name_or_its_folder(desk, name):
    assert shown(desk, name)[0] == ['log/pretrain']


def test_without_any_word_it_finds_a_port(desk):
    runs, line, status, said = shown(desk)
    assert len(runs) == 2 and 'http://localhost:' in line and (status, said) == (0, '')


@pytest.mark.parametrize('words, says', [
    ('mikro', ['mikro: ', "did you mean 'micro'", 'micro, mine']),
    ('micro mine', ['one run or folder']), ('port=x', ['port = x']), ('port=0', ['port = 0']),
    ('port=70000', ['port = 70000']), ('prot=6006', ['prot', 'port, host']),
    ('port={taken}', ['{taken}', 'already in use', 'port=7007'])])
def test_what_cannot_be_is_one_line(desk, capsys, words, says):
    with socket.socket() as s:
        s.bind(('localhost', 0))
        s.listen()
        taken = str(s.getsockname()[1])
        assert main(['board', *words.format(taken=taken).split()]) == 2
    line = capsys.readouterr().err
    assert line.count('\n') == 1 and line.startswith('lm-nb: ')
    assert all(part.format(taken=taken) in line for part in says), line


def links(runs): return {p.name: str(p.resolve()) for p in (runs/'elsewhere').glob('*')}


def test_a_link_for_each_run_elsewhere(tmp_path):
    runs = tmp_path/'runs'
    for where in ('a/micro', 'b/micro', 'a/micro', 'runs/micro', 'a/../a/micro', 'b/micro/control'):
        link_run(tmp_path/where, runs)
    assert links(runs) == {'micro': f'{tmp_path}/a/micro', 'micro-2': f'{tmp_path}/b/micro'}
    link_run(tmp_path/'c/micro', runs)  # what the first two lead to is not there: they stay
    assert len(links(runs)) == 3


def test_temporary_and_impossible_links(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path/'tmp'))
    link_run(tmp_path/'tmp'/'x', tmp_path/'runs')
    assert not (tmp_path/'runs').exists()
    (tmp_path/'runs').write_text('a file where the folder should be')
    link_run(tmp_path/'x', tmp_path/'runs')
    monkeypatch.setattr(Path, 'symlink_to', lambda *a, **k: (_ for _ in ()).throw(OSError()))
    link_run(tmp_path/'x', tmp_path/'more')
    assert not links(tmp_path/'more')


def test_bench_needs_no_word_either(monkeypatch):
    asked = []
    monkeypatch.setattr('lm_nb.bench.measure.run_benchmarks',
                        lambda names, **kw: asked.append(names) or [])
    assert main(['bench']) == 0 and asked == [[]]


def test_a_run_that_is_made_elsewhere_is_found(desk, monkeypatch):
    from lm_nb.training.recipe import load_recipe
    from lm_nb.training.run import Run
    monkeypatch.setattr(tempfile, 'tempdir', str(desk/'tmp'))
    for _ in range(2): Run(load_recipe('micro'), desk/'disk'/'other')
    Run(load_recipe('micro'), desk/'tmp'/'passing')
    Run(load_recipe('micro'), desk/'runs'/'micro-2')
    assert sorted(links(desk/'runs')) == ['mine', 'other']
