"""What happens to runs: stops, kills, a full disk, too little memory, numbers that are no numbers.
Each scene is in fault_work.py

Every scene ends with the same question: is the run that this happened to, bit for bit, the run that
it did not happen to?"""
import json, os, subprocess, sys
from pathlib import Path

import pytest
import soak, torch

import lm_nb
from lm_nb.training.checkpoint import checkpoints

HERE, PACKAGE = Path(__file__).resolve().parent, Path(lm_nb.__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(os.name != 'posix', reason='needs fork and signals')


def play(scene, folder, *launcher):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1',
           'PYTHONPATH': os.pathsep.join(map(str, (PACKAGE, HERE, HERE.parent)))}
    job = subprocess.run([sys.executable, *launcher, HERE/'fault_work.py', scene, folder], env=env,
                         capture_output=True, text=True, errors='replace')
    assert job.returncode == 0, (job.stdout + job.stderr)[-3000:]


def test_stopped_at_random_steps_and_inside_them_and_gone_on(tmp_path): play('stops', tmp_path/'s')
def test_killed_at_random_moments_of_training_that_saves_all_the_time(tmp_path):
    play('kills', tmp_path/'s')
def test_killed_anywhere_in_a_whole_job(tmp_path): play('job', tmp_path/'s')
def test_sigterm_and_ctrl_c_save_and_say_so(tmp_path): play('signals', tmp_path/'s')
def test_a_disk_that_fills_up_costs_nothing_that_was_saved(tmp_path): play('disk', tmp_path/'s')
def test_too_little_memory_is_one_line_with_the_way_out(tmp_path): play('memory', tmp_path/'s')
def test_loss_or_gradient_that_is_not_finite(tmp_path): play('numbers', tmp_path/'s')
def test_steps_that_are_not_finite_may_be_skipped_up_to_a_cap(tmp_path):
    play('skipped', tmp_path/'s')
def test_steps_without_targets(tmp_path): play('no_targets', tmp_path/'s')


@pytest.mark.skipif(not torch.distributed.is_available(),
                    reason='this torch cannot run several ranks')
def test_one_rank_with_a_loss_that_is_no_number_stops_both(tmp_path):
    with soak.trials('loss not finite on one of two ranks') as tally:
        for i in range(soak.count(1, 5)):
            folder = tmp_path/str(i)
            folder.mkdir()
            play('bad_rank', folder, '-m', 'torch.distributed.run', '--standalone',
                 '--nproc-per-node', '2')
            a, b = (json.loads((folder/f'rank-{r}.json').read_text()) for r in range(2))
            reports = list((folder/'stage').glob('bad-step-*.json'))
            report = json.loads(reports[0].read_text())
            ok = a['held'] and b['held'] and a['said'] == b['said'] and 'at step 6 (rank 1)' in a[
                'said'] and len(reports) == 1
            ok = ok and (report['step'], report['rank'], report['documents']) == (
                6, 1, b['documents']) and a['documents'] != b['documents']
            tally.add(ok and checkpoints(folder/'stage'/'checkpoints')[0].name == 'step-00000005',
                      f'{a} {b} {report}')
