"""Profiles at a tiny size: what they name has to be there, whatever the time."""
import json
import math
from pathlib import Path

import pytest

import lm_nb.bench.profiling as profiling
import lm_nb.training.monitor as monitor
from lm_nb.bench.profiling import _KINDS, _Profile, _kind_of, plot_kinds, profile_recipe
from lm_nb.core import UserError
from lm_nb.training.recipe import load_recipe

TINY = ('n_layer=1 n_head=2 d_model=32 d_ff=64 context=32 vocab_size=512 batch_tokens=128 '
        'device=cpu dtype=fp32')


def test_a_profile_names_what_a_step_calls(tmp_path):
    found = profile_recipe(load_recipe('micro', TINY.split()), tmp_path/'profile', steps=2)
    assert found.trace == str(tmp_path/'profile'/'step.pt.trace.json')
    names = {e.get('name') for e in json.loads(Path(found.trace).read_text())['traceEvents']}
    called = {'aten::mm', 'Optimizer.step#Muon.step'}
    assert called <= names and called <= set(found.ops)
    assert len(found.rows) == 10 and sum(found.kinds.values()) == pytest.approx(1)
    assert sum(float(r[3]) for r in found.rows) <= 1.01*1e3*found.seconds
    assert set(found.floors) == {'arithmetic', 'bytes'}
    assert all(0 < s < math.inf for s in found.floors.values())
    assert 'perfetto' in str(found) and len(found.kinds) >= 5


def test_the_floor_of_arithmetic_is_never_above_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, 'matmul_peak', lambda device, dtype: 1.)
    monkeypatch.setattr(monitor, '_SEEN', {('cpu', 'fp32', 1): 1.})  # far too low a peak
    found = profile_recipe(load_recipe('micro', TINY.split()), tmp_path, steps=1)
    assert found.floors['arithmetic'] == pytest.approx(found.seconds)
    assert '(100 % of it)' in str(found)


def test_a_stage_is_profiled_by_its_name(tmp_path):
    recipe = load_recipe('micro', [*TINY.split(), 'sft.optimizer=adamw'])
    found = profile_recipe(recipe, tmp_path, steps=1, stage='sft')
    assert any('fused_adam' in op for op in found.ops)
    assert 'Optimizer.step#Muon.step' not in found.ops
    with pytest.raises(UserError, match="did you mean 'sft'"):
        profile_recipe(recipe, tmp_path, steps=1, stage='stf')


@pytest.mark.parametrize('name,kind', [
    ('aten::mm', 'matmuls'), ('aten::addmm', 'matmuls'), ('aten::bmm', 'matmuls'),
    ('aten::mul', 'elementwise'), ('aten::add_', 'elementwise'),
    ('aten::silu_backward', 'elementwise'), ('aten::copy_', 'copies and casts'),
    ('aten::_fused_adamw_', 'optimizer'), ('Optimizer.step#Muon.step', 'optimizer'),
    ('aten::embedding', 'lookups'), ('aten::sum', 'sums and norms'),
    ('_BlockAttentionBackward', 'attention'), ('aten::empty', 'everything else')])
def test_kinds_of_operators(name, kind):
    assert _kind_of(name) == kind and (kind in _KINDS or kind == 'everything else')


def test_shares_are_those_of_the_step_without_the_profiler():
    ops = {'aten::mm': (1., 3.), 'aten::mul': (1., 1.)}
    found = _Profile('x', 2., ops, dict(arithmetic=1., bytes=.5), 'here')
    assert found.kinds == {'matmuls': .75, 'elementwise': .25}
    assert [r[3] for r in found.rows] == ['1500.00', '500.00']
    assert 'arithmetic 1 s (50 % of it), bytes 0.5 s (25 % of it)' in str(found)
    floors = [line.get_xdata()[0] for line in plot_kinds(found).axes[0].lines]
    assert floors == [1000, 500]  # milliseconds
