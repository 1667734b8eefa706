"""Several processes: they learn what one learns, go on as if nothing had happened when one dies, and never wait forever"""
import json, os, random, re, signal, sys, threading, time
from pathlib import Path

import pytest, torch

import rank_work
from lm_nb.core import UserError
from lm_nb.ranks import Ranks, launch
from lm_nb.train import read_log

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason='this torch cannot run several ranks')
WORK = Path(rank_work.__file__)
SOAK = bool(os.environ.get('LM_NB_SOAK'))


def count(few, full): return full if SOAK else few


def record(**what):
    if path := os.environ.get('LM_NB_SOAK_LOG'):
        with open(path, 'a', encoding='utf-8') as f: f.write(json.dumps(what) + '\n')


@pytest.fixture(scope='module', autouse=True)
def quiet():
    n, own = torch.get_num_threads(), {k: os.environ.get(k) for k in ('IN_TEST', 'OMP_NUM_THREADS')}
    torch.set_num_threads(1)
    os.environ.update(IN_TEST='1', OMP_NUM_THREADS='1')
    yield
    torch.set_num_threads(n)
    for k, v in own.items(): os.environ.pop(k) if v is None else os.environ.update({k: v})


def start(jobs, nproc, **how):
    "Run jobs on ranks; (exit status, lines written)"
    job, lines = dict(jobs[0], jobs=jobs), []
    return launch(WORK, [json.dumps(job)], nproc, show=lines.append, **{'max_restarts': 0, 'timeout': 60, **how}), lines


def told(folder, n): return json.loads((Path(folder)/f'told-{n}.json').read_text())
def losses(folder): return [r['loss'] for r in read_log(folder)]
def hexes(folder): return [(r['step'], float.hex(r['loss']), float.hex(r['grad_norm'])) for r in read_log(folder)]


class Run(threading.Thread):
    "A run on ranks going on beside the test"
    def __init__(self, folder, nproc=2, **how):
        super().__init__(daemon=True)
        self.folder, self.nproc, self.how = Path(folder), nproc, how
        self.job = how.pop('job')
        self.start()
    def run(self): self.status, self.lines = start([dict(self.job, folder=str(self.folder))], self.nproc, **self.how)
    def until(self, ready, seconds=60):
        end = time.time() + seconds
        while not ready():
            assert self.is_alive() and time.time() < end, getattr(self, 'lines', ['timed out'])[-30:]
            time.sleep(.01)
    def step(self): return max((r['step'] for r in read_log(self.folder)), default=0)
    def pid(self, rank, attempt): return int((self.folder/'pids'/f'{rank}-{attempt}').read_text())
    def has(self, attempt): return all((self.folder/'pids'/f'{r}-{attempt}').exists() and (self.folder/'pids'/f'{r}-{attempt}').read_text() for r in range(self.nproc))


JOB = dict(steps=60, pause=.02, model=dict(dropout=.1))


def attacked(folder, parallel, kills, seed, sig=signal.SIGKILL, **how):
    "Kill random ranks at random steps; the seconds until training went on"
    chance, waits = random.Random(seed), []
    steps = JOB['steps'] * max(1, -(-kills // 3))
    run = Run(folder, job=dict(JOB, steps=steps, cfg=dict(parallel=parallel, save_every=5)), max_restarts=kills + 2, **how)
    for k in range(kills):
        at = (k + 1) * steps // (kills + 1) + chance.randrange(-3, 4)
        run.until(lambda: run.has(k) and run.step() >= at)
        before, t0 = run.step(), time.time()
        os.kill(run.pid(chance.randrange(2), k), sig)
        run.until(lambda: run.has(k + 1))
        mark = time.time()
        run.until(lambda: (run.folder/'log.jsonl').stat().st_mtime > mark)
        waits.append(time.time() - t0)
    run.join(120)
    assert run.status == 0, run.lines[-30:]
    return waits


@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_a_killed_rank_costs_seconds_and_nothing_else(tmp_path, parallel):
    t0, kills = time.time(), count(1, 10)
    waits = attacked(tmp_path/'hit', parallel, kills, seed=parallel)
    steps = JOB['steps'] * max(1, -(-kills // 3))
    status, lines = start([dict(JOB, steps=steps, pause=0, folder=str(tmp_path/'calm'), cfg=dict(parallel=parallel, save_every=5))], 2)
    assert status == 0, lines[-30:]
    print(waits)
    assert hexes(tmp_path/'hit') == hexes(tmp_path/'calm') and len(hexes(tmp_path/'calm')) == steps
    assert told(tmp_path/'hit', 2)['weights'] == told(tmp_path/'calm', 2)['weights']
    record(what=f'kill -9 of a rank, {parallel}', count=kills, failed=0, seconds=time.time() - t0, slowest_restart=max(waits))


def test_a_stopped_rank_is_given_up_within_the_time_out(tmp_path):
    run = Run(tmp_path/'run', job=dict(JOB, cfg=dict(save_every=5)), max_restarts=1, timeout=5)
    run.until(lambda: run.step() >= 12)
    os.kill(run.pid(1, 0), signal.SIGSTOP)
    t0 = time.time()
    run.until(lambda: run.has(1), 30)
    waited = time.time() - t0
    run.join(60)
    print(waited, run.lines)
    assert run.status == 0
