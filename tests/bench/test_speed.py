"Speed benchmarks at a tiny size: what they say has to be true, however long anything took"
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

from lm_nb.bench import shakespeare, speed
from lm_nb.bench.measure import BENCHMARKS, load_benchmarks, run_benchmarks
from lm_nb.model.gpt import GPT, Ops, ops
from lm_nb.training.recipe import load_recipe

load_benchmarks()
NBS = Path(__file__).parents[2]/'nbs'/'7_bench'
TINY = ('n_layer=1 n_head=2 d_model=32 d_ff=64 context=32 vocab_size=512 batch_tokens=128 '
        'device=cpu dtype=fp32')


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def chapter(name):
    "The cells of a chapter, as (kind, source, outputs)"
    path, = NBS.glob(f'[0-9][0-9]_{name}.ipynb')
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [(c['cell_type'], ''.join(c['source']), c.get('outputs')) for c in cells]


def names_of(module):
    return {n for n, f in BENCHMARKS.items() if f.__module__ == f'lm_nb.bench.{module}'}


@pytest.mark.parametrize('module,names', [
    ('data_speed', 'tokenizing processes shards batches resume packing cleaning'),
    ('speed', 'training memory transformers loss algorithm compile sft generating plan'),
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
    assert sorted(named) == sorted(names_of('speed'))


UNITS = r'GFLOP/s|tokens/s|nats|steps|times|GB|MB/s|MB|ms|s|%'
FIGURE = re.compile(rf'(?<![\d.,])(\d[\d,]*\.\d+|\d[\d,]*(?= (?:{UNITS})\b| %))')


@pytest.mark.parametrize('name,least', [
    ('plan', 2), ('data_speed', 7), ('speed', 15), ('shakespeare', 2), ('profiling', 4)])
def test_what_is_said_about_recorded_figures_is_what_was_recorded(name, least):
    cells = chapter(name)
    slow = [i for i, (_, source, _) in enumerate(cells) if source.startswith('#| slow')]
    recorded = json.dumps([cells[i][2] for i in slow], ensure_ascii=False)
    after = ' '.join(source for kind, source, _ in cells[slow[0]:] if kind == 'markdown')
    said = FIGURE.findall(re.sub(r'\]\([^)]*\)', ']', after))
    def there(n): return re.search(rf'(?<![\d.,]){re.escape(n)}(?![\d,]*\d)', recorded)
    assert len(said) >= least and [n for n in said if not there(n)] == []


@pytest.mark.parametrize('name', ['plan', 'data_speed', 'speed', 'shakespeare', 'profiling'])
def test_a_recorded_table_says_on_what_and_when(name):
    tables = [out['data']['text/markdown'] for _, source, outs in chapter(name)
              if source.startswith('#| slow') for out in outs if 'text/markdown' in out['data']]
    assert tables
    for note in (''.join(table).split('|\n')[-1] for table in tables):
        assert re.search('EPYC|hardware.* not recorded', note), note
        assert re.search('bf16|fp32|dtype.* not recorded', note), note
        assert re.search(r'20\d\d-\d\d-\d\d|date not recorded', note), note


def test_the_plain_loop_and_ours_are_one_computation():
    options = 'optimizer=adamw lr=0.001 beta2=0.999 weight_decay=0.01 warmup=0 schedule=cosine'
    ours, plain, _ = speed._both_sides(load_recipe('micro', f'{TINY} {options}'.split()))
    pairs = [(ours().item(), plain().item()) for _ in range(5)]
    # norms are not decayed in ours: a difference of 1e-5 a step
    assert all(a == pytest.approx(b, abs=2e-4) for a, b in pairs)
    assert pairs[-1][0] < pairs[0][0]


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
    ours, plain, timer = speed._both_sides(load_recipe('micro', TINY.split()))
    for step in (ours, plain, timer, plain): step()
    assert faster_ops == [fast, set(), fast, set()]
    ids = shakespeare._by_character(shakespeare._Text('Speak, speak. '*80, 'Hear me. '*9))
    shape = dict(n_layer=1, n_head=2, d_model=16, d_ff=32, context=16)
    next(shakespeare._plain_steps(*shakespeare._plain_model(ids), ids))
    shakespeare._our_run(ids, steps=1, rows=2, shape=shape)
    assert faster_ops[4:] == [set(), fast]


def test_steps_in_a_process_of_its_own():
    first, step = speed._steps_alone('micro', TINY, 3)
    assert first > 0 and step > 0
    assert speed._train_alone('micro', TINY, 'plain') is None


def test_a_plan_is_followed_by_a_run(tmp_path):
    text = tmp_path/'text.txt'
    text.write_text('\n'.join(f'Line {n} follows {n - 1} and {n + 1} is next.' for n in range(400)))
    options = f'{TINY} text={text} vocab_size=400 valid_share=0.1'
    result, = run_benchmarks(['plan'], log=None, tokens=2000, options=options)
    announced, took, off = (line.got.median for line in result.lines)
    assert announced > 0 and took > 0 and off == pytest.approx(100*abs(announced/took - 1))
