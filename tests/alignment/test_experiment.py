"Arms of the experiment: their keys, their records, and that nothing is run twice"
import pytest

from lm_nb.alignment import experiment
from lm_nb.alignment.experiment import ARMS, Job, job_keys, pool, run_job
from lm_nb.core import read_json
from lm_nb.training.recipe import load_recipe


def test_arms_have_names_of_their_own_and_recipes_that_hold():
    jobs = [Job(0, arm, kinds, more) for arm in ARMS for kinds in ('private', 'all')
            for more in ('', 'lr=0.0003')]
    assert len({j.name for j in jobs}) == len(jobs)
    for job in jobs:
        recipe = load_recipe('aligned-arms', job_keys(job))
        cfg = recipe.configs[recipe.stage_names[-1]]
        assert ('unknown' not in cfg.tasks) and bool(cfg.tasks) == (job.kinds == 'private')
        if job.more: assert cfg.lr == 3e-4


@pytest.mark.parametrize('one, other', [('chosen', 'dpo'), ('model', 'rule'), ('rule', 'random')])
def test_one_key_is_different_between_two_arms(one, other):
    a, b = ({k: v for k, v in load_recipe('aligned-arms', job_keys(Job(0, arm))).flat().items()}
            for arm in (one, other))
    odd = [k for k in {**a, **b} if a.get(k) != b.get(k)]
    assert odd == ['dpo.variant'] or odd == ['grpo.reward']


def test_what_has_a_record_is_not_run_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(experiment, 'open_arm', lambda *a: 'run')
    monkeypatch.setattr(experiment, '_finish', lambda run: asked.append(run))
    monkeypatch.setattr(experiment, 'measure_arm', lambda job, *a: dict(name=job.name))
    for _ in range(2): found = run_job(Job(3, 'dpo'), tmp_path, tmp_path)
    assert asked == ['run'] and found == read_json(tmp_path/'3-dpo-all.json')


def test_no_hit_among_few_entities_is_not_nought():
    records = [dict(counts=dict(unseen=dict(told='0/4 0/4')))]
    found = pool(records, 'told')
    assert found['share'] == 0 and found['high'] > .5 and found['n'] == 8


def test_a_reward_model_reads_what_its_arm_reads():
    for kinds, tasks in dict(private='private qa translate summary', all='').items():
        configs = load_recipe('aligned-arms', job_keys(Job(0, 'model', kinds))).configs
        assert configs['reward'].tasks == configs['grpo'].tasks == tasks
