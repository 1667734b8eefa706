"Stopping a stage, going on, and sharing it between ranks"
import os, shutil, subprocess, sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

import lm_nb
from lm_nb.training.monitor import Interrupted, read_log
from lm_nb.training.recipe import load_recipe
from lm_nb.training.run import Run
from lm_nb.training.stage import run_stage, train

PACKAGE = Path(lm_nb.__file__).resolve().parent.parent


def begun(whole, folder, stage, output):
    "The run as it was before a stage"
    leave = shutil.ignore_patterns(stage, output, '.lock')
    return shutil.copytree(whole.folder, folder, ignore=leave)


def go_on(folder, stage, *overrides):
    return run_stage(Run(load_recipe('tiny', overrides), folder), stage)


@contextmanager
def stopping(monkeypatch, after):
    "Let `train` stop of itself after some more steps, as Ctrl-C would"
    asked = []
    with monkeypatch.context() as m:
        m.setattr(sys.modules['lm_nb.training.stage'], 'train',
                  partial(train, stop=lambda: asked.append(1) or len(asked) == after))
        with pytest.raises(Interrupted, match='goes on from there'): yield


def stop_and_go_on(whole, folder, monkeypatch, stage, output, stops):
    "A stage that was stopped after so many steps each time, as far as its end"
    begun(whole, folder, stage, output)
    for after in stops:
        with stopping(monkeypatch, after): go_on(folder, stage)
        assert not (folder/output).exists()
    go_on(folder, stage)


def curve(folder, *keys):
    return [[r['step'], *(r[k] for k in keys if k in r)]
            for r in read_log(folder) if any(k in r for k in keys)]


def weights(folder): return (folder/'model.safetensors').read_bytes()


def two_ranks(desk, stage, *words):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(PACKAGE)}
    how = '-m torch.distributed.run --standalone --nproc-per-node 2 -m lm_nb.cli'.split()
    p = subprocess.run([sys.executable, *how, stage, 'tiny', *map(str, words)], cwd=desk, env=env,
                       capture_output=True, text=True, timeout=180)
    assert p.returncode == 0, p.stderr[-2000:]
