"""What happens to the stages that learn from pairs: stops at random steps, and kill -9 while they
save and while the reference is written. Each ends as the run that nothing happened to, bit for
bit"""
import os, random, signal, subprocess, sys, time

import pytest

from stages import PACKAGE, begun, curve, stop_and_go_on, weights
from lm_nb.training.checkpoint import checkpoints

STEPS = 24
POINTS = ('loss', 'grad_norm', 'lr', 'valid_loss', 'pairs/accuracy', 'pairs/lead', 'pairs/chosen',
          'pairs/rejected')
pair_stages = pytest.mark.parametrize('stage, output', [('reward', 'reward-model'),
                                                        ('dpo', 'aligned')])
kills = pytest.mark.skipif(os.name != 'posix', reason='needs signals')


def is_whole(run, whole, stage, output):
    assert curve(run/stage, *POINTS) == curve(whole.folder/stage, *POINTS)
    assert weights(run/output) == weights(whole.folder/output)


def python(desk, *words):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(PACKAGE), 'IN_TEST': '1'}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=desk, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def to_its_end(desk, *words):
    job = python(desk, *words)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said[-2000:]


def last_saved(run, stage):
    return max((int(p.name[5:]) for p in checkpoints(run/stage/'checkpoints')), default=0)


@pair_stages
@pytest.mark.parametrize('seed', [0, 1])
def test_stopped_at_random_steps(whole, at_desk, tmp_path, monkeypatch, stage, output, seed):
    assert len(curve(whole.folder/stage, 'loss')) == STEPS
    at = sorted(random.Random(f'{stage} {seed}').sample(range(1, STEPS), 3))
    stops = [b - a for a, b in zip([0, *at], at)]
    stop_and_go_on(whole, tmp_path/'run', monkeypatch, stage, output, stops)
    is_whole(tmp_path/'run', whole, stage, output)


@kills
@pair_stages
def test_killed_while_it_saves_at_every_step(whole, desk, tmp_path, stage, output):
    run, rng, ends = begun(whole, tmp_path/'run', stage, output), random.Random(stage), []
    words = '-m', 'lm_nb.cli', stage, 'tiny', f'run_dir={run}', 'save_every=1'
    for goal in sorted(rng.sample(range(1, STEPS - 8), 2)):
        job, patience = python(desk, *words), time.monotonic() + 120
        while job.poll() is None and last_saved(run, stage) < goal:
            assert time.monotonic() < patience, f'no step {goal} within two minutes'
            time.sleep(.002)
        time.sleep(rng.uniform(0, .05))  # somewhere in the steps and saves after it
        had = last_saved(run, stage)
        job.kill()
        job.communicate()
        ends.append(job.returncode)
        assert last_saved(run, stage) >= had
    assert -signal.SIGKILL in ends, 'each had ended before it was killed'
    to_its_end(desk, *words)
    is_whole(run, whole, stage, output)


CUT = '''
import os, signal, sys
import lm_nb.alignment.dpo as dpo
from lm_nb.cli import main
def half(tensors, path, **how):
    path.write_bytes(b'half of it')
    os.kill(os.getpid(), signal.SIGKILL)
dpo.save_file = half
main(sys.argv[1:])
'''


@kills
def test_killed_while_the_reference_is_written(whole, desk, tmp_path):
    run = begun(whole, tmp_path/'run', 'dpo', 'aligned')
    words = 'dpo', 'tiny', f'run_dir={run}'
    job = python(desk, '-c', CUT, *words)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == -signal.SIGKILL, said[-2000:]
    assert not (run/'dpo'/'reference.safetensors').exists()
    to_its_end(desk, '-m', 'lm_nb.cli', *words)
    is_whole(run, whole, 'dpo', 'aligned')
