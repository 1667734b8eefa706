import os

import pytest

from pairs import furnish_pairs
from lm_nb.training.recipe import load_recipe
from lm_nb.training.run import Run
from lm_nb.training.stage import run_stage


@pytest.fixture(scope='session', autouse=True)
def quiet():
    "No progress bars"
    with pytest.MonkeyPatch.context() as m:
        m.setenv('IN_TEST', '1')
        yield


@pytest.fixture(scope='session')
def desk(tmp_path_factory): return furnish_pairs(tmp_path_factory.mktemp('desk'))


@pytest.fixture
def at_desk(desk, monkeypatch):
    monkeypatch.chdir(desk)
    return desk


@pytest.fixture(scope='session')
def whole(desk):
    "All four stages without a stop"
    here = os.getcwd()
    os.chdir(desk)
    try:
        run = Run(load_recipe('tiny'), desk/'whole')
        for name in run.recipe.stage_names: run_stage(run, name)
        return run
    finally: os.chdir(here)
