"""Plans, speed benchmarks and profiles at a tiny size: what they say has to be true, whatever the time. No test judges how long anything took."""
import inspect
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lm_nb.plan as planning
import lm_nb.speed as speed
from lm_nb.bench import BENCHMARKS, run_benchmarks
from lm_nb.core import UserError, read_settings
from lm_nb.estimate import Memory
from lm_nb.plan import affordable_rows, made_up, measured, plan, plot_plan, split_rows, stage_plan, stages
from lm_nb.pretrain import load_recipe
from lm_nb.profiling import KINDS, Profile, kind_of, profile_recipe
from lm_nb.shards import IGNORE

CPU = torch.device('cpu')
TINY = 'n_layer=1 n_head=2 d_model=32 d_ff=64 context=32 vocab_size=512 batch_tokens=128 device=cpu dtype=fp32'


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_benchmark_of_the_chapter_is_on_the_list_with_options_a_command_line_can_give():
    names = {'training', 'memory', 'transformers', 'loss', 'algorithm', 'compile', 'sft', 'generating', 'plan'}
    assert names <= set(BENCHMARKS)
    for name in names:
        for p in inspect.signature(BENCHMARKS[name]).parameters.values():
            assert p.default is not inspect.Parameter.empty and p.annotation in (int, float, str, bool)
        assert BENCHMARKS[name].__doc__


def cells(name):
    return json.loads((Path(__file__).parent.parent/'nbs'/f'{name}.ipynb').read_text(encoding='utf-8'))['cells']


def test_the_page_says_of_every_benchmark_what_it_compares():
    prose = ''.join(''.join(c['source']) for c in cells('15b_speed') if c['cell_type'] == 'markdown')
    here = {name for name, f in BENCHMARKS.items() if f.__module__ == 'lm_nb.speed'}
    assert set(re.findall(r'^\| `lm-nb bench (\w+)` \|', prose, re.M)) == here


@pytest.mark.parametrize('name', ['14b_plan', '15_benchmarks', '15b_speed'])
def test_what_is_said_about_recorded_figures_is_what_was_recorded(name):
    slow = [c for c in cells(name) if ''.join(c['source']).startswith('#| slow')]
    recorded = json.dumps([c['outputs'] for c in slow], ensure_ascii=False)
    last = ''.join(cells(name)[-1]['source'])
    said = re.findall(r'\d+\.\d+', last)
    assert said and [n for n in said if not re.search(rf'(?<![\d.]){re.escape(n)}(?!\d)', recorded)] == []


@pytest.mark.parametrize('name', sorted(read_settings(Path(__file__).parent.parent/'settings.ini')))
def test_every_recipe_has_a_plan(name):
    recipe = load_recipe(name, ['text=mine.txt'] if name == 'own' else [])
    if not stages(recipe): return
    found = plan(recipe, budget=0, bytes=24e9, device=CPU, dtype='bf16')
    assert [s.name for s in found.stages] == stages(recipe)
    for s in found.stages:
        stage = getattr(recipe, s.name)
        assert s.steps*stage.batch_tokens <= s.tokens < (s.steps + 1)*stage.batch_tokens
        assert (s.micros - 1)*s.rows < s.all_rows <= s.micros*s.rows and s.all_rows == stage.batch_tokens//recipe.model.context
        assert s.flops > 6*.5*sum(found.model.values())*s.tokens*.1
        assert s.fits == (s.memory.total <= 24e9)
        assert s.fits or f'{name}' and f'{s.name}.micro_rows={s.most_rows}' in str(found) or not s.most_rows
    assert all(part in str(found) for part in Memory.__annotations__)
    assert '| ' in found._repr_markdown_()


class Steps:
    "Stands in for `Trial`, with times that are known: a step takes `fixed` seconds, and each row `each`"
    fixed, each, made = .5, .01, []
    def __init__(self, recipe, name='pretrain', device=None, micro_rows=None, micros=None):
        rows, n = split_rows(recipe, getattr(recipe, name))
        self.rows, self.micros, self.first = micro_rows or rows, micros or n, True
        Steps.made.append((self.rows, self.micros))
    def __call__(self): pass
    def seconds(self):
        start, self.first = 20.*self.first, False  # the first step has to be prepared
        return start + self.fixed + self.each*self.rows*self.micros


@pytest.mark.parametrize('options,rows,micros', [('', 16, 1), ('batch_tokens=163840 micro_rows=64', 64, 16), ('batch_tokens=10240 micro_rows=24', 24, 3)])
def test_a_step_is_put_together_from_its_parts(monkeypatch, options, rows, micros):
    monkeypatch.setattr(planning, 'Trial', Steps)
    recipe = load_recipe('micro', options.split())
    arithmetic = stage_plan(recipe, 'pretrain', CPU, 'bf16', 8e9)
    assert (arithmetic.rows, arithmetic.micros, arithmetic.all_rows) == (rows, micros, recipe.pretrain.batch_tokens//160)
    found = measured(recipe, arithmetic, CPU, 10.)
    assert found.step_seconds == pytest.approx(Steps.fixed + Steps.each*arithmetic.all_rows, rel=.02)
    assert found.seconds == pytest.approx(found.start_seconds + found.steps*found.step_seconds)


def test_a_large_step_is_measured_on_few_rows(monkeypatch):
    monkeypatch.setattr(planning, 'Trial', Steps)
    monkeypatch.setattr(Steps, 'each', 10.)
    monkeypatch.setattr(Steps, 'made', [])
    recipe = load_recipe('base-124m', ['batch_tokens=491520', 'micro_rows=16', 'compile=false'])
    assert affordable_rows(recipe, 'pretrain', 16, CPU, 3.) == 1
    found = measured(recipe, stage_plan(recipe, 'pretrain', CPU, 'bf16', 64e9), CPU, 3.)
    assert max(r*m for r, m in Steps.made) <= 2
    assert found.step_seconds == pytest.approx(.5 + 480*10., rel=.05)


def test_a_plan_says_what_to_lower():
    found = plan(load_recipe('micro'), budget=0, bytes=60e6, device=CPU, dtype='bf16')
    rows = found.stages[0].most_rows
    lower = plan(load_recipe('micro', [f'micro_rows={rows}']), budget=0, bytes=60e6, device=CPU, dtype='bf16')
    assert f'pretrain.micro_rows={rows}' in str(found) and lower.stages[0].fits and lower.stages[0].micros == math.ceil(16/rows)
    none = plan(load_recipe('micro'), budget=0, bytes=1e6, device=CPU, dtype='bf16')
    assert 'not even one row' in str(none)
    assert len(plot_plan(load_recipe('micro'), device=CPU, dtype='bf16', bytes=1e8).axes[0].collections) == len(Memory.__annotations__)


def test_a_recipe_that_trains_nothing_is_told_so(tmp_path):
    recipe = load_recipe('micro')
    idle = replace(recipe, data=replace(recipe.data, text='', instructions='', base='somewhere'))
    for f in (lambda: plan(idle), lambda: profile_recipe(idle, tmp_path)):
        with pytest.raises(UserError, match='trains nothing'): f()


def test_made_up_batches_are_rows_of_a_text():
    cfg = load_recipe('micro').model
    b, c = made_up(cfg, 3), made_up(cfg, 3, seed=1)
    assert b.x.shape == (3, 160) and b.x[:, 1:].equal(b.y[:, :-1]) and not b.x.equal(c.x)
    assert b.doc.diff(dim=1).ge(0).all() and b.doc.max() == 2 and made_up(cfg, 3, docs=0).doc is None
    assert 0 <= b.x.min() and b.x.max() < cfg.vocab_size and (b.y != IGNORE).all()


def test_the_plain_loop_and_ours_are_one_computation():
    recipe = load_recipe('micro', [*TINY.split(), 'optimizer=adamw', 'lr=0.001', 'beta2=0.999', 'weight_decay=0.01', 'warmup=0', 'schedule=cosine'])
    ours, plain, _ = speed.sides(recipe)
    pairs = [(ours().item(), plain().item()) for _ in range(5)]  # norms are not decayed in ours: a difference of 1e-5 a step
    assert all(a == pytest.approx(b, abs=2e-4) for a, b in pairs) and pairs[-1][0] < pairs[0][0]


def test_steps_in_a_process_of_its_own():
    first, step = speed.steps_alone('micro', TINY, 3)
    assert 0 < step < first
    assert speed.train_alone('micro', TINY, 'plain') is None


def test_a_plan_is_followed_by_a_run(tmp_path):
    text = tmp_path/'text.txt'
    text.write_text('\n'.join(f'Line {n} of a text in which {n} follows {n - 1} and {n + 1} is next.' for n in range(400)))
    result, = run_benchmarks(['plan'], tell=None, tokens=2000, options=f'{TINY} text={text} vocab_size=400 valid_share=0.1')
    announced, took, off = (line.got.median for line in result.lines)
    assert announced > 0 and took > 0 and off == pytest.approx(100*abs(announced/took - 1))


def test_a_profile_names_what_a_step_calls(tmp_path):
    found = profile_recipe(load_recipe('micro', TINY.split()), tmp_path/'profile', steps=2)
    assert found.trace == str(tmp_path/'profile'/'step.pt.trace.json')
    names = {e.get('name') for e in json.loads(Path(found.trace).read_text())['traceEvents']}
    assert {'aten::mm', 'Optimizer.step#Muon.step'} <= names and {'aten::mm', 'Optimizer.step#Muon.step'} <= set(found.ops)
    assert len(found.table.rows) == 10 and sum(found.kinds.values()) == pytest.approx(1)
    assert sum(float(r[3]) for r in found.table.rows) <= 1.01*1e3*found.seconds
    assert set(found.floors) == {'arithmetic', 'bytes'} and all(0 < s < math.inf for s in found.floors.values())
    assert 'perfetto' in str(found) and len(found.kinds) >= 5


@pytest.mark.parametrize('name,kind', [('aten::mm', 'products'), ('aten::addmm', 'products'), ('aten::bmm', 'products'), ('aten::mul', 'elementwise'),
    ('aten::add_', 'elementwise'), ('aten::silu_backward', 'elementwise'), ('aten::copy_', 'copies and casts'), ('aten::_fused_adamw_', 'optimizer'),
    ('Optimizer.step#Muon.step', 'optimizer'), ('aten::embedding', 'lookups'),
    ('aten::sum', 'sums and norms'), ('_BlockAttentionBackward', 'attention'), ('aten::empty', 'everything else')])
def test_kinds_of_operators(name, kind):
    assert kind_of(name) == kind and (kind in KINDS or kind == 'everything else')


def test_shares_are_those_of_the_step_without_the_profiler():
    found = Profile('x', 2., {'aten::mm': (1., 3.), 'aten::mul': (1., 1.)}, dict(arithmetic=1., bytes=.5), 'here')
    assert found.kinds == {'products': .75, 'elementwise': .25}
    assert [r[3] for r in found.table.rows] == ['1500.00', '500.00'] and '50 % of it' in str(found)


