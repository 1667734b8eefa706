"Speed benchmarks at a tiny size: what they say has to be true, however long anything took"
import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lm_nb.bench import measure as bench, shakespeare, speed
from lm_nb.bench.measure import (
    BENCHMARKS, Measure, Turns, load_benchmarks, read_result, run_benchmarks)
from lm_nb.core import UserError
from lm_nb.model.gpt import GPT, Ops, ops
from lm_nb.training.recipe import load_recipe

load_benchmarks()
NBS = Path(__file__).parents[2]/'nbs'/'7_bench'
TINY = ('n_layer=1 n_head=2 d_model=32 d_ff=64 context=32 vocab_size=512 batch_tokens=128 '
        'device=cpu dtype=fp32')


def chapter(name):
    "The cells of a chapter, as (kind, source, outputs)"
    path, = NBS.glob(f'[0-9][0-9]_{name}.ipynb')
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [(c['cell_type'], ''.join(c['source']), c.get('outputs')) for c in cells]


def names_of(module):
    return {n for n, f in BENCHMARKS.items() if f.__module__ == f'lm_nb.bench.{module}'}


@pytest.mark.parametrize('module,names', [
    ('data_speed', 'tokenizing processes shards batches resume packing cleaning'),
    ('speed', 'training memory loss compile sft generating plan'),
    ('shakespeare', 'shakespeare')])
def test_every_benchmark_is_on_the_list_with_options_a_command_line_can_give(module, names):
    assert names_of(module) == set(names.split())
    for name in names.split():
        for p in inspect.signature(BENCHMARKS[name]).parameters.values():
            assert p.default is not inspect.Parameter.empty
            assert p.annotation in (int, float, str, bool)
        assert BENCHMARKS[name].__doc__


def test_the_page_says_of_every_benchmark_what_it_compares():
    prose = ''.join(source for kind, source, _ in chapter('speed') if kind == 'markdown')
    named = re.findall(r'^\| `lm-nb bench (\w+)` \|', prose, re.M)
    assert sorted(named) == sorted([*names_of('speed'), 'shakespeare'])


UNITS = r'GFLOP/s|tokens/s|nats|steps|times|GB|MB/s|MB|ms|s|%'
FIGURE = re.compile(rf'(?<![\d.,])(\d[\d,]*\.\d+|\d[\d,]*(?= (?:{UNITS})\b| %))')


@pytest.mark.parametrize('name,least', [('data_speed', 7), ('profiling', 4)])
def test_what_is_said_about_recorded_figures_is_what_was_recorded(name, least):
    cells = chapter(name)
    slow = [i for i, (_, source, _) in enumerate(cells) if source.startswith('#| slow')]
    recorded = json.dumps([cells[i][2] for i in slow], ensure_ascii=False)
    after = ' '.join(source for kind, source, _ in cells[slow[0]:] if kind == 'markdown')
    said = FIGURE.findall(re.sub(r'\]\([^)]*\)', ']', after))
    def there(n): return re.search(rf'(?<![\d.,]){re.escape(n)}(?![\d,]*\d)', recorded)
    assert len(said) >= least and [n for n in said if not there(n)] == []


@pytest.mark.parametrize('name,heading', [('speed', '## Results'), ('shakespeare', '## Results'),
                                          ('plan', '## A plan beside what happened')])
def test_a_page_of_records_has_no_figure_that_was_typed(name, heading):
    cells = chapter(name)
    start, = (i for i, (_, source, _) in enumerate(cells) if source.startswith(heading))
    prose = ' '.join(source for kind, source, _ in cells[start:] if kind == 'markdown')
    prose = re.split('## Exercises|## Where the factor', prose)[0]
    assert FIGURE.findall(re.sub(r'```.*?```', '', prose, flags=re.S)) == []
    assert not any(source.startswith('#| slow') for _, source, _ in cells[start:])


def test_records_say_what_was_measured_where_and_how():
    kept = {p.stem for p in (NBS/'results').glob('*.json')}
    recorded = names_of('speed') | {'shakespeare'}
    assert kept - {'gpu', 'scaling', 'shakespeare_rates'} == recorded  # gpu: by tools/gpu.sh
    said = next(s for kind, s, _ in chapter('speed') if s.startswith('## Results'))
    all_of_them, some = re.findall(r'lm-nb bench ([a-z ]+?) (?:share|save)=', said)
    held = {p.stem for p in (NBS/'results'/'avx2').glob('*.json')}
    assert set(all_of_them.split()) == recorded and set(some.split()) == held
    for path in (p for p in (NBS/'results').rglob('*.json') if p.stem in recorded):
        result = read_result(path)
        assert result.name == path.stem and result.lines
        assert {'name', 'cpu_cores', 'threads', 'torch', 'commit', 'lm_nb', 'dtype', 'date',
                'load'} <= result.where.keys()
        known = inspect.signature(BENCHMARKS[result.name]).parameters
        assert result.options.keys() == known.keys()
        assert re.search(r'bf16|fp32', str(result).splitlines()[-1])


@pytest.mark.parametrize('name', ['data_speed', 'profiling'])
def test_a_recorded_table_says_on_what_and_when(name):
    tables = [out['data']['text/markdown'] for _, source, outs in chapter(name)
              if source.startswith('#| slow') for out in outs if 'text/markdown' in out['data']]
    assert tables
    for note in (''.join(table).split('|\n')[-1] for table in tables):
        assert re.search('EPYC|hardware.* not recorded', note), note
        assert re.search('bf16|fp32|dtype.* not recorded', note), note
        assert re.search(r'20\d\d-\d\d-\d\d|date not recorded', note), note


def model_of(recipe):
    torch.manual_seed(0)
    return GPT(replace(recipe.model, zero_init=False))


def sides(options=''):
    recipe = load_recipe('micro', f'{TINY} doc_mask=false {options}'.split())
    return speed._equal_sides(recipe, 'fp32', model_of(recipe))


def test_all_sides_are_one_computation_with_one_optimizer():
    pytest.importorskip('transformers')
    for arch in ('qwen3', 'arch=gpt2 tie=true'):
        same = 'lr=0.001 beta2=0.999 weight_decay=0.01 warmup=0 schedule=cosine'
        steps = sides(f'{same} {arch if "=" in arch else ""}')
        assert list(steps) == ['ours, fp32', 'plain loop sdpa, fp32', 'plain loop eager, fp32',
                               'transformers sdpa, fp32', 'transformers eager, fp32']
        losses = [[step().item() for step in steps.values()] for _ in range(5)]
        # norms are not decayed in ours: a difference of 1e-5 a step
        for row in losses: assert row == pytest.approx([row[0]]*5, abs=3e-4)
        assert losses[-1][0] < losses[0][0]


def lines_of(recorded):
    "What `training` says of turns of known lengths"
    seconds = {'ours': (1., 2.), 'plain loop sdpa': (4., 3.), 'plain loop eager': (2., 5.)}
    turns = Turns({f'{name}, {d}': Measure((s,), 's')
                   for name, both in seconds.items() for d, s in zip(('bf16', 'fp32'), both)})
    return {l.what: l.got.median for l in speed._compared(turns, '', 60, recorded)}


def test_a_comparison_is_in_one_dtype_and_takes_the_opponents_best():
    assert lines_of('bf16') == {': ours': 60, ': plain loop eager': 30,
                                ': ours against plain loop': 2}
    assert lines_of('fp32') == {': ours': 30, ': plain loop sdpa': 20,
                                ': ours against plain loop': 1.5}
    assert lines_of('') == {': ours against plain loop': 2}, 'the best of each'


def test_a_side_that_generates_other_tokens_is_not_timed(monkeypatch):
    def other(gpt, ids, max_new): return speed.generate(gpt, ids, max_new) + 1
    monkeypatch.setattr(speed, '_cached_loop', other)
    with pytest.raises(UserError, match='plain loop, fp32 gave a different result than ours, fp32'):
        run_benchmarks(['generating'], log=None, max_new=3, prompt=4, rows=2, rounds=1,
                       shapes='4 layers, 128 wide')


@pytest.fixture
def faster_ops():
    "For each forward pass of a model, the operations that are not those of the plain model"
    seen, plain = [], vars(Ops())
    def note(module, args):
        if isinstance(module, GPT): seen.append({n for n, f in vars(ops).items() if f != plain[n]})
    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    yield seen
    hook.remove()


def test_ours_computes_fast_and_the_plain_loop_step_by_step(faster_ops):
    fast = {n for n, f in vars(ops).items() if f != vars(Ops())[n]}
    assert {'attention', 'nll', 'rms_norm'} <= fast
    ours, plain, eager, *_ = sides().values()
    for step in (ours, plain, ours, eager): step()
    assert faster_ops == [fast, set(), fast, {'attention'}]
    ids = shakespeare._by_character(shakespeare._Text('Speak, speak. '*80, 'Hear me. '*9))
    shape = dict(n_layer=1, n_head=2, d_model=16, d_ff=32, context=16)
    next(shakespeare._plain_steps(shakespeare._plain_model(ids), ids))
    shakespeare._our_run(ids, steps=1, rows=2, shape=shape)
    assert faster_ops[4:] == [set(), fast]


def test_a_side_that_is_not_installed_is_left_out_with_a_line(monkeypatch):
    monkeypatch.setattr(speed, '_has_transformers', lambda: False)
    result, = run_benchmarks(['training'], log=None, times=1, rounds=1, options=TINY)
    assert result.remarks == [speed._WITHOUT] and result.notes == [speed._WITHOUT, result.place]
    assert result.lines and not any('transformers' in line.what for line in result.lines)


def test_at_a_glance_the_instructions_are_named_and_ordinary_machines_come_first():
    tables = {}
    for name in ('training', 'shakespeare'):
        for result in bench._kept_results(name, NBS/'results'):
            tables.setdefault(result.where['dtype'], []).append(result)
    assert list(tables) == ['fp32', 'bf16']
    ordinary = speed._glance(tables['fp32'])
    assert 'AMD EPYC held to AVX2, 2 cores' in ordinary._repr_markdown_()
    assert {case.split(':')[0] for case, *_ in ordinary.rows} == {'training', 'shakespeare'}
    assert all(', fp32' in case and loop and theirs for case, _, loop, theirs in ordinary.rows)


def test_steps_in_a_process_of_its_own():
    first, step = speed._steps_alone('micro', TINY, 3)
    assert first > 0 and step > 0
    assert speed._train_alone('micro', TINY, 'plain') is None


def test_a_plan_is_followed_by_a_run(tmp_path):
    text = tmp_path/'text.txt'
    text.write_text('\n'.join(f'Line {n} follows {n - 1} and {n + 1} is next.' for n in range(400)))
    options = f'{TINY} text={text} vocab_size=400 valid_share=0.1'
    options += ' stages=pretrain pretrain.tokens=4000'
    result, = run_benchmarks(['plan'], log=None, share=.5, options=options)
    announced, took, off, *process = (line.got.median for line in result.lines)
    assert 100 < process[0] < 4000 and 100 < process[1] < 4000  # MB
    assert announced > 0 and took > 0 and off == pytest.approx(100*abs(announced/took - 1))
