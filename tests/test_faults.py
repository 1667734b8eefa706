"""What happens to runs: stops, kills, a full disk, too little memory, numbers that are no numbers. Each scene is in tests/fault_work.py

Every scene ends with the same question: is the run that this happened to, bit for bit, the run that it did not happen to?"""
import os, subprocess, sys
from pathlib import Path

import pytest

import lm_nb

HERE, PACKAGE = Path(__file__).resolve().parent, Path(lm_nb.__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(os.name != 'posix', reason='needs fork and signals')


def play(scene, folder):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(PACKAGE), str(HERE)])}
    job = subprocess.run([sys.executable, HERE/'fault_work.py', scene, folder], env=env, capture_output=True, text=True, errors='replace')
    assert job.returncode == 0, (job.stdout + job.stderr)[-3000:]


def test_stopped_at_random_steps_and_inside_them_and_gone_on(tmp_path): play('stops', tmp_path/'s')
def test_killed_at_random_moments_of_training_that_saves_all_the_time(tmp_path): play('kills', tmp_path/'s')
def test_killed_anywhere_in_a_whole_job(tmp_path): play('job', tmp_path/'s')
def test_sigterm_and_ctrl_c_save_and_say_so(tmp_path): play('signals', tmp_path/'s')
def test_a_disk_that_fills_up_costs_nothing_that_was_saved(tmp_path): play('disk', tmp_path/'s')
def test_too_little_memory_is_one_line_with_the_way_out(tmp_path): play('memory', tmp_path/'s')
def test_loss_or_gradient_that_is_not_finite(tmp_path): play('numbers', tmp_path/'s')
def test_unsound_steps_may_be_left_out_up_to_a_cap(tmp_path): play('skipped', tmp_path/'s')
def test_steps_without_targets(tmp_path): play('no_targets', tmp_path/'s')
