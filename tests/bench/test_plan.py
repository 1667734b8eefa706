"Plans: what they announce has to follow from the recipe. No test judges how long anything took"
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from lm_nb.bench import plan
from lm_nb.bench.plan import (
    StepTimer, _affordable_rows, _measure_stage, _plan_stage, _split_rows, plan_run, plot_plan,
    random_batch)
from lm_nb.bench.profiling import profile_recipe
from lm_nb.core import UserError, read_settings
from lm_nb.data.shards import IGNORE
from lm_nb.model.estimate import Memory, parameter_counts
from lm_nb.training.recipe import PairConfig, load_recipe

CPU = torch.device('cpu')
ON_CPU = dict(budget=0, device=CPU, dtype='bf16')
SETTINGS = Path(__file__).parents[2]/'settings.ini'
TINY = ('n_layer=1 n_head=2 d_model=32 d_ff=64 context=32 vocab_size=512 batch_tokens=128 '
        'device=cpu dtype=fp32')


def recipe_with_text(name):
    mine = dict(own=['text=mine.txt'], finetune=['instructions=mine.json', 'context=256'])
    return load_recipe(name, mine.get(name, []))


@pytest.mark.parametrize('name', sorted(read_settings(SETTINGS)))
def test_every_recipe_has_a_plan(name):
    recipe = recipe_with_text(name)
    stages, cfg = recipe.stage_configs(), recipe.model
    assert stages
    found = plan_run(recipe, room=24e9, **ON_CPU)
    assert [s.name for s in found.stages] == list(stages) == found.head[1:]
    n = parameter_counts(cfg)
    multiplied = n['attention'] + n['MLP'] + (n['embedding'] if cfg.tie else n['head'])
    for s in found.stages:
        stage = stages[s.name]
        assert s.steps*stage.batch_tokens <= s.tokens < (s.steps + 1)*stage.batch_tokens
        assert (s.micros - 1)*s.rows < s.all_rows <= s.micros*s.rows
        row = stage.longest(cfg.context) if isinstance(stage, PairConfig) else cfg.context
        assert s.all_rows == stage.batch_tokens//row
        # six for each weight in a matmul; attention's scores and Muon's matmuls come on top
        assert 1 < s.flops/(6*multiplied*s.steps*s.all_rows*row) < 2
        assert s.fits == (s.memory.total <= 24e9)
    assert all(part in str(found) for part in Memory.__annotations__)
    assert '| ' in found._repr_markdown_()


@pytest.mark.parametrize('name', sorted(read_settings(SETTINGS)))
def test_a_plan_says_of_each_stage_what_to_lower_or_nothing(name):
    recipe = recipe_with_text(name)
    needed = [s.memory.total for s in plan_run(recipe, room=1e15, **ON_CPU).stages]
    for room in (max(needed), max(needed)*.7, min(needed)*.7, 1e6):
        found = plan_run(recipe, room=room, **ON_CPU)
        for s, total in zip(found.stages, needed):
            begin = f'{s.name}: a micro-batch of {s.rows} rows does not fit'
            about = [note for note in found.notes if note.startswith(begin)]
            assert s.fits == (total <= room) == (not about)
            if s.fits: continue
            assert len(about) == 1 and s.most_rows < s.rows
            lower = f'set {s.name}.micro_rows={s.most_rows}'
            assert (lower if s.most_rows else 'not even one row does') in about[0]


def test_whoever_takes_the_advice_has_a_plan_that_fits():
    found = plan_run(load_recipe('micro'), room=60e6, **ON_CPU)
    rows = found.stages[0].most_rows
    assert not found.stages[0].fits and f'pretrain.micro_rows={rows}' in str(found)
    lower = plan_run(load_recipe('micro', [f'micro_rows={rows}']), room=60e6, **ON_CPU)
    assert lower.stages[0].fits and lower.stages[0].micros == math.ceil(5/rows)
    more = plan_run(load_recipe('micro', [f'micro_rows={rows + 1}']), room=60e6, **ON_CPU)
    assert not more.stages[0].fits


def test_the_picture_shows_every_part_of_the_memory():
    axes, = plot_plan(load_recipe('micro'), device=CPU, dtype='bf16', room=1e8).axes
    assert len(axes.collections) == len(Memory.__annotations__)
    assert [line.get_ydata()[0] for line in axes.lines] == [100]  # MB: what there is


def test_any_number_of_stages_in_their_order():
    micro = load_recipe('micro')
    sft = micro.configs['sft']
    longer = replace(sft, tokens=2*sft.tokens)
    three = replace(micro, stages='sft dpo pretrain', configs=micro.configs | dict(dpo=longer))
    found = plan_run(three, room=8e9, **ON_CPU)
    assert found.head == ['micro', 'sft', 'dpo', 'pretrain'] and {len(r) for r in found.rows} == {4}
    sft, dpo, _ = found.stages
    assert (dpo.tokens, dpo.steps) == (longer.tokens, longer.tokens//2560)
    assert dpo.flops/sft.flops == pytest.approx(dpo.steps/sft.steps)
    assert 'set dpo.micro_rows=' in str(plan_run(three, room=60e6, **ON_CPU))
    drawn = plot_plan(three, 'dpo', device=CPU, dtype='bf16', room=1e8)
    assert drawn.axes[0].get_legend_handles_labels()[1] == list(Memory.__annotations__)


class Steps:
    "In place of `StepTimer`, with known times: a step takes `fixed` seconds, and each row `each`"
    fixed = .5
    def __init__(self, each, made, rows, micros):
        self.each, self.rows, self.micros, self.first = each, rows, micros, True
        made.append((rows, micros))
    def seconds(self):
        start, self.first = 20.*self.first, False  # the first step has to be prepared
        return start + self.fixed + self.each*self.rows*self.micros


@pytest.mark.parametrize('options,rows,micros', [
    ('', 16, 1), ('batch_tokens=163840 micro_rows=64', 64, 16),
    ('batch_tokens=10240 micro_rows=24', 24, 3)])
def test_a_step_is_put_together_from_its_parts(options, rows, micros):
    recipe = load_recipe('micro', ['context=160', *options.split()])
    arithmetic = _plan_stage('pretrain', recipe.configs['pretrain'], recipe.model, CPU, 'bf16', 8e9)
    all_rows = recipe.configs['pretrain'].batch_tokens//160
    assert (arithmetic.rows, arithmetic.micros, arithmetic.all_rows) == (rows, micros, all_rows)
    found = _measure_stage(arithmetic, partial(Steps, .01, []), CPU, 10.)
    assert found.step_seconds == pytest.approx(Steps.fixed + .01*all_rows, rel=.02)
    assert found.start_seconds == pytest.approx(20.)
    assert found.seconds == pytest.approx(20. + found.steps*found.step_seconds + found.besides)
    assert found.besides > 0


def test_a_plan_counts_what_a_run_does_beside_its_steps():
    def plan(**keys):
        recipe = load_recipe('micro', [f'{k}={v}' for k, v in keys.items()])
        stage = plan_run(recipe, room=8e9, **ON_CPU).stages[0]
        return replace(stage, step_seconds=.1)
    often, seldom = plan(eval_every=10), plan(eval_every=0)
    positions = .01*6_400_000
    assert seldom.validations == pytest.approx(positions), 'at the end'
    assert often.validations == pytest.approx(250*positions), 'every ten of 2500 steps'
    forward = .1*positions/2560/3
    assert often.besides - seldom.besides == pytest.approx(249*forward, rel=.01)
    assert seldom.seconds == pytest.approx(2500*.1 + seldom.besides)
    assert plan(valid_share=.1).validations == pytest.approx(10*plan().validations)


def test_stages_with_the_same_kind_of_step_have_the_same_figure():
    found = plan_run(load_recipe('micro', TINY.split()), budget=.01)
    pretrain, sft = found.stages
    assert pretrain.step_seconds == sft.step_seconds > 0
    assert pretrain.process == sft.process and not pretrain.process < 1e8
    other = load_recipe('micro', [*TINY.split(), 'sft.batch_tokens=4096'])
    pretrain, sft = plan_run(other, budget=.01).stages
    assert pretrain.step_seconds != sft.step_seconds


def test_a_large_step_is_measured_on_few_rows():
    recipe = load_recipe('base-124m', ['batch_tokens=491520', 'micro_rows=16', 'compile=false'])
    made = []
    make = partial(Steps, 10., made)
    assert _affordable_rows(make, 16, 3.) == 1
    plan = _plan_stage('pretrain', recipe.configs['pretrain'], recipe.model, CPU, 'bf16', 64e9)
    found = _measure_stage(plan, make, CPU, 3.)
    assert max(r*m for r, m in made) <= 2
    assert found.step_seconds == pytest.approx(.5 + 480*10., rel=.05)


def test_a_gpu_is_asked_for_the_rows_that_it_will_have():
    recipe, made = load_recipe('micro', ['context=160']), []
    cuda = torch.device('cuda')
    plan = _plan_stage('pretrain', recipe.configs['pretrain'], recipe.model, cuda, 'bf16', 8e9)
    assert _measure_stage(plan, partial(Steps, 10., made), cuda, 3.).step_seconds == 160.5
    assert made == [(16, 1)]


def test_a_recipe_that_trains_nothing_is_told_so(tmp_path):
    recipe = load_recipe('micro')
    idle = replace(recipe, data=replace(recipe.data, text='', instructions='', base='somewhere'))
    for f in (lambda: plan_run(idle), lambda: profile_recipe(idle, tmp_path)):
        with pytest.raises(UserError, match='trains nothing'): f()


def test_random_batches_are_rows_of_a_text():
    cfg = load_recipe('micro').model
    b, c = random_batch(cfg, 3), random_batch(cfg, 3, seed=1)
    assert b.x.shape == (3, cfg.context) and b.x[:, 1:].equal(b.y[:, :-1]) and not b.x.equal(c.x)
    assert b.doc.diff(dim=1).ge(0).all() and b.doc.max() == 2
    assert random_batch(cfg, 3, docs=0).doc is None
    assert 0 <= b.x.min() and b.x.max() < cfg.vocab_size and (b.y != IGNORE).all()


def test_a_timer_takes_the_batches_that_it_is_given():
    recipe, asked = load_recipe('micro', TINY.split()), []
    def batches(step):
        asked.append(step)
        return [random_batch(recipe.model, 2, seed=step)]
    timer = StepTimer(recipe.model, recipe.configs['pretrain'], batches=batches)
    assert [int(timer().targets) for _ in range(3)] == [64]*3
    assert asked[:3] == [0, 1, 2]


def test_a_step_of_several_ranks_is_divided_and_no_row_is_lost():
    stage = replace(load_recipe('micro').configs['pretrain'], batch_tokens=160*100, micro_rows=7)
    for ranks in range(1, 9):
        rows, micro, micros = _split_rows(stage, 160, ranks)
        assert rows*ranks >= 100 > (rows - 1)*ranks and micro == min(7, rows)
        assert micro*micros >= rows > micro*(micros - 1)


def test_a_large_model_is_not_tried_on_a_cpu_unless_asked(monkeypatch):
    tried = []
    class Watched(StepTimer):
        def __init__(self, cfg, *args, **kw):
            tried.append((cfg.n_layer, cfg.vocab_size, cfg.d_model))
            super().__init__(cfg, *args, **kw)
    monkeypatch.setattr(plan, 'StepTimer', Watched)
    keys = ['d_model=64', 'n_layer=3', 'vocab_size=9000', 'context=32', 'batch_tokens=64',
            'device=cpu', 'dtype=fp32', 'n_head=1']
    recipe, whole = load_recipe('micro', keys), (3, 9000, 64)
    assert plan_run(recipe, budget=.01).stages[0].computed is False and set(tried) == {whole}
    monkeypatch.setattr(plan, '_DEAR', 1e6)
    tried.clear()
    found = plan_run(recipe, budget=.01)
    assert tried == [(1, 8192, 64)]*2  # for both stages, which take the same kind of step
    assert all(s.computed and s.seconds > 0 for s in found.stages) and 'measure=true' in str(found)
    tried.clear()
    found = plan_run(recipe, budget=.01, measure=True)
    assert set(tried) == {whole} and not any(s.computed for s in found.stages)


def test_a_plan_is_of_the_model_that_is_given_or_says_that_none_is(tmp_path):
    given = load_recipe('finetune', [f'base={tmp_path}', 'instructions=mine.json'])
    with pytest.raises(UserError, match=f'base = {tmp_path}: .*no config.json'):
        plan_run(given, **ON_CPU)
    for recipe, said in ((recipe_with_text('finetune'), True), (load_recipe('micro'), False)):
        assert said == any('without base=' in note for note in plan_run(recipe, **ON_CPU).notes)
