"Grids of runs, and laws: what comes back from points whose law is known"
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest

from lm_nb.bench.scaling import (
    JointLaw, Law, fit_joint, fit_law, interval, known_law, law_key, left_out, loss_sentence,
    predict, read_grid, rms, sweep, sweep_table)
from lm_nb.core import UserError, read_json, write_json
from lm_nb.model.estimate import parameter_counts
from lm_nb.training.checkpoint import checkpoints
from lm_nb.training.recipe import load_recipe
from lm_nb.training.run import run_lock

WORDS = 'sea hill road wood town moor field lake shore roof tower bridge'.split()

TOY = '''
[toy]
recipe = shakespeare
text = {folder}/train.txt
text_valid = {folder}/valid.txt
vocab_size = 300
context = 64
n_layer = 1
d_model = 32
n_head = 2
d_ff = 64
batch_tokens = 512
pretrain.tokens = 2_560
eval_every = 0
sample_every = 0
save_every = 0

[wide]
like = toy
d_model, n_head = 16, 1 | 33, 2 | 32, 2

[crossed]
like = toy
d_model = 16 | 32
seed = 1 | 2 | 3

[uneven]
like = toy
d_model, n_head = 16, 1 | 32

[twice]
like = toy
d_model = 16 | 16

[nameless]
d_model = 16
'''


@pytest.fixture
def grids(tmp_path):
    path = tmp_path / 'grids.ini'
    rng = random.Random(0)
    for name, lines in dict(train=600, valid=60).items():
        (tmp_path / f'{name}.txt').write_text('\n'.join(
            f'The {rng.choice(WORDS)} is on the {rng.choice(WORDS)}, and {rng.randrange(10**6)} '
            f'{rng.choice(WORDS)}s are under it.' for _ in range(lines)))
    path.write_text(TOY.format(folder=tmp_path))
    return path


# --- grids

def test_lines_are_crossed_and_keys_of_a_line_go_together(grids):
    crossed = read_grid('crossed', path=grids)
    assert [tuple(p.varied.values()) for p in crossed] == [
        (w, s) for w in ('16', '32') for s in ('1', '2', '3')]
    wide = read_grid('wide', path=grids)
    assert [p.varied for p in wide] == [dict(d_model=d, n_head=h)
                                        for d, h in (('16', '1'), ('33', '2'), ('32', '2'))]
    assert {p.recipe for p in wide} == {'shakespeare'} and wide[0].keys['context'] == '64'
    one, = read_grid('toy', path=grids)
    assert one.name == 'point' and not one.varied
    assert len(read_grid('toy', dict(lr='1e-3 | 2e-3'), grids)) == 2  # words replace the grid's


@pytest.mark.parametrize('name, words', [
    ('crossd', "did you mean 'crossed'"), ('uneven', 'expected 2 values'),
    ('twice', 'd_model-16 is there twice'), ('nameless', 'recipe = NAME')])
def test_what_is_wrong_with_a_grid_is_one_line(grids, name, words):
    with pytest.raises(UserError, match=words) as e: read_grid(name, path=grids)
    assert '\n' not in str(e.value)


def test_the_grids_that_come_along_can_be_run():
    from lm_nb.training.recipe import load_recipe
    for name in ('law', 'law-check', 'law-seeds', 'rates-tables', 'rates-muon', 'rates-adamw'):
        points = read_grid(name)
        for p in points: load_recipe(p.recipe, [f'{k}={v}' for k, v in p.keys.items()])
    law, check = read_grid('law'), read_grid('law-check')
    assert len(law) == 20 and len({p.varied['d_model'] for p in law}) == 5 and len(check) == 1


# --- the driver

def test_points_that_fail_take_nobody_with_them_and_are_tried_again(grids, tmp_path):
    said, folder = [], tmp_path / 'sweep'
    with run_lock(folder / 'd_model-16_n_head-1'):  # its process finds somebody else there
        points = sweep('wide', folder, path=grids, log=said.append)
    assert [p['keys']['d_model'] for p in points] == ['32'], said
    odd, busy = (next(s for s in said if s.startswith(f'd_model-{w}_')) for w in (33, 16))
    assert 'cannot be run' in odd and 'd_model' in odd
    assert 'has failed' in busy and 'at work here' in busy
    assert not any('\n' in s for s in said)
    before = (folder / 'd_model-32_n_head-2' / 'point.json').stat().st_mtime_ns
    points = sweep('wide', folder, path=grids, log=said.append)
    assert [p['keys']['d_model'] for p in points] == ['16', '32']
    assert (folder / 'd_model-32_n_head-2' / 'point.json').stat().st_mtime_ns == before
    assert read_json(folder / 'sweep.json') == points
    shared = [(folder / p / 'tokenizer').resolve() for p in
              ('d_model-16_n_head-1', 'd_model-32_n_head-2')]
    assert shared[0] == shared[1] and shared[0].parent.name.startswith('common-')
    for p in points:
        assert {'commit', 'name', 'torch', 'date', 'threads'} <= p['where'].keys()
        assert p['tokens'] == 2560 and p['dtype'] and p['parameters'] > p['embedding'] > 0
    text = str(sweep_table(points))
    assert f"{points[0]['parameters']:,}" in text and f"{points[0]['valid_loss']:.4f}" in text
    assert points[0]['where']['torch'] in text


def _command(grids, folder, **how):
    words = [sys.executable, '-m', 'lm_nb.cli', 'sweep', 'toy', f'grids={grids}',
             f'run_dir={folder}', 'pretrain.tokens=102_400', 'save_every=1000', 'log_every=1']
    env = os.environ | dict(OMP_NUM_THREADS='1')
    return subprocess.Popen(words, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True, **how)


def test_a_sweep_that_was_stopped_goes_on_from_its_checkpoint(grids, tmp_path):
    folder, log = tmp_path / 'sweep', tmp_path / 'sweep/point/pretrain/log.jsonl'
    first = _command(grids, folder)
    end = time.time() + 60
    while not (log.exists() and log.read_text().count('\n') > 2):
        assert first.poll() is None and time.time() < end
        time.sleep(.01)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130 and 'stopped with 0 of 1 points done' in err
    at = int(checkpoints(folder / 'point/pretrain/checkpoints')[0].name[5:])
    begun = log.read_text().splitlines()[0]  # has a time in it
    assert 2 < at < 200
    second = _command(grids, folder)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0 and 'parameters' in out, err
    assert log.read_text().splitlines()[0] == begun, 'it began anew'
    assert read_json(folder / 'sweep.json')[0]['tokens'] == 102_400


# --- the law

TRUE = Law(2.0, 60., 0.35, 200., 0.4)
N, D = (x.ravel() for x in np.meshgrid(np.geomspace(1e5, 4e6, 5), np.geomspace(2e5, 3e6, 4)))


def noisy(seed, size=.005):
    return TRUE(N, D) * np.exp(size * np.random.default_rng(seed).standard_normal(len(N)))


@pytest.mark.parametrize('true', [TRUE, Law(1.5, 400., .34, 400., .28), Law(3., 5., .2, 900., .55)])
def test_a_fit_recovers_the_law_of_points_without_noise(true):
    law, _ = fit_law(N, D, true(N, D), times=1)
    for k, v in asdict(true).items(): assert getattr(law, k) == pytest.approx(v, rel=.02), k


def test_intervals_hold_what_they_should_and_say_nothing_too_wide():
    held, wide = 0, []
    for seed in range(12):
        _, laws = fit_law(N, D, noisy(seed), times=100)
        low, high = interval(law.beta for law in laws)
        held += low <= TRUE.beta <= high
        wide.append(high - low)
    assert held >= 9 and np.median(wide) < .4


def test_a_prediction_four_times_further_holds_in_most_worlds():
    n, d = 4.6e6, 4 * 6 * N.max() * D.max() / 6 / 4.6e6
    held = 0
    for seed in range(12):
        y = noisy(seed)
        law, laws = fit_law(N, D, y, times=100)
        value, low, high = predict(n, d, law, laws, np.log(y / law(N, D)))
        assert low < value < high and value == pytest.approx(TRUE(n, d), rel=.05)
        held += low <= TRUE(n, d) <= high
    assert held >= 9


def test_a_point_gone_wrong_hardly_moves_the_law():
    y = TRUE(N, D)
    y[7] *= 1.2
    law, _ = fit_law(N, D, y, times=1)
    assert law(1e7, 1e7) == pytest.approx(TRUE(1e7, 1e7), rel=.01)


def test_the_best_size_is_the_lowest_point_for_the_same_work():
    for flops in (1e12, 1e14):
        n, d = TRUE.best(flops)
        assert 6 * n * d == pytest.approx(flops)
        assert all(TRUE(n * f, d / f) > TRUE(n, d) for f in (.5, .9, 1.1, 2))


JOINT = JointLaw(.54, .14, .09, -.012)


def test_the_form_with_a_product_is_recovered_and_has_a_lowest_point():
    law, laws = fit_joint(N, D, JOINT(N, D), times=20)
    for k, v in asdict(JOINT).items(): assert getattr(law, k) == pytest.approx(v, abs=1e-6), k
    assert laws[3](1e6, 1e6) == pytest.approx(JOINT(1e6, 1e6), rel=1e-6)
    n, d = JOINT.best(1e14)
    assert 6 * n * d == pytest.approx(1e14)
    assert all(JOINT(n * f, d / f) > JOINT(n, d) for f in (.5, .9, 1.1, 2))


def test_a_size_left_out_shows_which_form_is_wrong():
    def off(fit, y): return rms(left_out(N, D, y, fit))
    assert off(fit_joint, JOINT(N, D)) < 1e-6 < .5 < off(fit_law, JOINT(N, D))
    assert off(fit_law, TRUE(N, D)) < .01 < off(fit_joint, TRUE(N, D))


def made_points(law=JOINT, key='k', n=N, d=D):
    return [dict(parameters=a, tokens=b, valid_loss=float(law(a, b)), law_key=key,
                 text_tokens=10**6) for a, b in zip(n.round(), d.round())]


def test_a_sweep_makes_a_law_if_its_points_are_enough_and_of_one_text():
    known = known_law(made_points())
    assert known.law(1e6, 1e6) == pytest.approx(JOINT(1e6, 1e6), rel=1e-4)
    assert known.tokens == 10**6 and known.misfit < .01
    assert known.flops == pytest.approx(6 * N.max() * D.max(), rel=1e-3)
    assert known_law(made_points()[:7]) is None
    assert known_law(made_points(n=N[:8].clip(1e6, 2e6), d=D[:8])) is None, 'two sizes'
    assert known_law(made_points() + made_points(key='other')) is None
    older = [{k: v for k, v in p.items() if k != 'law_key'} for p in made_points()]
    assert known_law(older) is None


def test_a_plan_says_a_loss_only_where_a_law_is_of_its_text(tmp_path, monkeypatch):
    recipe = load_recipe('micro', ['pretrain.tokens=400_000'])
    assert loss_sentence(recipe) == ''
    monkeypatch.setattr('lm_nb.bench.scaling.root', lambda: tmp_path)
    (tmp_path / 'runs/sweep-broken').mkdir(parents=True)
    (tmp_path / 'runs/sweep-broken/sweep.json').write_text('{"no": "list"')
    (tmp_path / 'runs/sweep-mine').mkdir()
    write_json(tmp_path / 'runs/sweep-mine/sweep.json', made_points(key=law_key(recipe)))
    parameters = sum(parameter_counts(recipe.model).values())
    assert f'about {JOINT(parameters, 400_000):.2f} nats' in loss_sentence(recipe)
    far = load_recipe('micro', ['pretrain.tokens=1e9'])
    assert 'of the work' in loss_sentence(far) and 'again' in loss_sentence(far)
    assert loss_sentence(load_recipe('micro', ['vocab_size=900'])) == ''
    assert loss_sentence(load_recipe('micro', ['stages=sft', 'base=x'])) == ''


def test_too_few_points_are_refused():
    with pytest.raises(UserError, match='too few'): fit_law(N[:5], D[:5], TRUE(N, D)[:5])


def test_a_law_of_the_microworld_knows_its_values():
    assert law_key(load_recipe('aligned')) != law_key(load_recipe('aligned', ['values=0']))
