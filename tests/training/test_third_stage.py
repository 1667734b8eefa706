"""A stage that the package does not know: continued pretraining, defined in a file of the user's.

It is run, stopped, resumed bitwise, planned, evaluated and reported; no other file changes for
it."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lm_nb
from desk import furnish
from lm_nb.core import read_json, sha256
from lm_nb.training.monitor import read_log

PACKAGE = Path(lm_nb.__file__).resolve().parent.parent
PLUGIN = '''
"Go on pretraining on another text"
from dataclasses import replace
from lm_nb.data.order import eval_batches
from lm_nb.inference.evaluate import evaluation, heldout
from lm_nb.training.pretrain import text_feed
from lm_nb.training.recipe import Stage, register_stage

def other(run): return run.text_shards(replace(run.data, text='other.txt'), 'more')

register_stage(Stage(
    'more', output='continued', start=lambda run: run.model_before('more'),
    feed=lambda run, ranks: text_feed(run, 'more', other(run), ranks)))

@evaluation(after='more')
def other_text(run, gpt, tok):
    held = other(run).valid
    return dict(heldout=heldout(gpt, eval_batches(held, gpt.cfg.context, 64), held.text_bytes))
'''
KEYS = {'stages': 'pretrain more sft', 'plugins': 'more.py', 'pretrain.tokens': 4800,
        'more.tokens': 9600, 'more.lr': 0.002, 'sft.tokens': 3200, 'replay': 0.2, 'eval_every': 0,
        'save_every': 0}
OTHER = [f'{a} is {b} and {c}.' for a in ('The sea', 'A hill', 'Rain', 'Snow', 'Night', 'Noon')
         for b in ('old', 'blue', 'far') for c in ('cold', 'wide', 'still', 'grey', 'slow')]


def lm_nb_words(desk, *words, **kw):
    "Start a command in the folder `desk`"
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(PACKAGE), 'IN_TEST': '1'}
    return subprocess.Popen([sys.executable, '-m', 'lm_nb.cli', *words], cwd=desk, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


def said(desk, *words):
    p = lm_nb_words(desk, *words)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0, err[-2000:]
    return out


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    folder = furnish(tmp_path_factory.mktemp('desk'), KEYS)
    (folder/'more.py').write_text(PLUGIN)
    (folder/'other.txt').write_text('\n'.join(OTHER), encoding='utf-8')
    return folder


@pytest.fixture(scope='module')
def whole(desk): return desk/'whole', said(desk, 'run', 'tiny', 'run_dir=whole')


def test_the_definition_is_short():
    assert len(PLUGIN.strip().splitlines()) < 25


def test_it_runs_between_the_others_and_learns_the_other_text(whole):
    run, _ = whole
    assert [p.name for p in (run/'continued', run/'base', run/'chat') if p.exists()] == [
        'continued', 'base', 'chat']
    losses = [p['loss'] for p in read_log(run/'more') if 'loss' in p]
    assert len(losses) == 60 and losses[-1] < .7 * losses[0]
    results = read_json(run/'results.json')
    order = [k for k in results if k in ('pretrain', 'base', 'more', 'continued', 'sft', 'chat')]
    assert order == ['pretrain', 'base', 'more', 'continued', 'sft', 'chat']
    start = read_json(run/'sft'/'stage.json')['base']
    assert start == sha256(run/'continued'/'model.safetensors'), 'SFT starts from what it left'


def test_it_is_stopped_and_resumed_bitwise(desk, whole):
    words = 'run', 'tiny', 'run_dir=stopped', 'log_every=1'
    p = lm_nb_words(desk, *words)
    patience = time.monotonic() + 300
    while len(read_log(desk/'stopped'/'more')) < 5:
        assert p.poll() is None and time.monotonic() < patience, p.stderr.read()[-2000:]
        time.sleep(.005)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=300)
    assert p.returncode == 130 and 'more: stopped at step' in err
    assert not (desk/'stopped'/'continued').exists()
    said(desk, *words)
    for name in ('base', 'continued', 'chat'):
        a, b = (desk/run/name/'model.safetensors' for run in ('whole', 'stopped'))
        assert a.read_bytes() == b.read_bytes(), name
    curve = lambda run: [(r['step'], r['loss']) for r in read_log(desk/run/'more') if 'loss' in r]
    assert curve('stopped') == curve('whole')


def test_it_is_planned_evaluated_and_reported(desk, whole):
    assert 'more' in said(desk, 'plan', 'tiny', 'run_dir=whole').splitlines()[0]
    run, report = whole
    measured = json.loads(said(desk, 'evaluate', 'tiny', 'run_dir=whole', 'json=true'))
    assert list(measured) == ['base', 'continued', 'chat']
    assert measured['continued']['heldout'] == read_json(run/'results.json')['continued']['heldout']
    assert f'{measured["continued"]["heldout"]["bits_per_byte"]:.3f} bits per byte' in report
    assert 'more.lr' in ' '.join(f'more.{line.split()[0]}' for line in said(desk, 'recipe', 'tiny')
                                 .partition('\nmore\n')[2].splitlines() if line.strip())


def test_its_own_command_finds_everything_done(desk, whole):
    before = (desk/'whole'/'continued'/'model.safetensors').stat().st_mtime_ns
    assert 'continued model in whole' in said(desk, 'more', 'tiny', 'run_dir=whole')
    assert (desk/'whole'/'continued'/'model.safetensors').stat().st_mtime_ns == before
