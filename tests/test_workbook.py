"The whole job: what its results say about themselves, and that a second call does nothing again"
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from desk import asks, facts, furnish, text
from lm_nb import workbook
from lm_nb.core import UserError, read_json
from lm_nb.data.sources import split_sources
from lm_nb.inference.evaluate import heldout
from lm_nb.training.monitor import read_log
from lm_nb.training.recipe import load_recipe
from lm_nb.training.run import Run
from lm_nb.workbook import (
    evaluate_stage, measured_on, open_run, plot_progress, results_table, run_all)

RECORDS = sorted((Path(__file__).parent.parent/'nbs'/'results').glob('*.json'))
KEYS = {'pretrain.tokens': 1600, 'sft.tokens': 1600, 'eval_every': 0, 'save_every': 0,
        'instructions_test': 'test.jsonl'}
TINY_JOB = ('n_layer=1 n_head=2 d_model=32 d_ff=64 context=32 vocab_size=512 batch_tokens=128 '
            'device=cpu dtype=fp32').split()


@pytest.fixture(scope='module')
def job(tmp_path_factory):
    "A run of both stages in bf16 on a CPU, and what it said"
    with pytest.MonkeyPatch.context() as m:
        m.chdir(furnish(tmp_path_factory.mktemp('desk'), KEYS))
        rows = [json.dumps(a) + '\n' for a in asks(facts(['Jane', 'Kate']))]
        Path('test.jsonl').write_text(''.join(rows))
        m.setenv('IN_TEST', '1')
        said = []
        run = Run(load_recipe('tiny', ['dtype=bf16']), Path('run'))
        yield run, run_all(run, said.append), said


def test_a_run_is_opened_as_the_command_line_does(tmp_path, monkeypatch):
    monkeypatch.chdir(furnish(tmp_path, KEYS))
    for name in ('a b.txt', "it's.txt"): Path(name).write_text(text(facts()), encoding='utf-8')
    run = open_run('tiny', text=['a b.txt', "it's.txt"], instructions=Path('ask.jsonl'), seed=3)
    assert run.folder == tmp_path/'runs/tiny' and run.recipe.seed == 3
    assert split_sources(run.recipe.data.text) == ['a b.txt', "it's.txt"]
    assert open_run('tiny', 'other', text=Path('a b.txt')).recipe.data.text == '"a b.txt"'
    (run.folder/'tokenizer').mkdir()  # it has begun
    again = open_run('tiny')
    assert again.recipe == run.recipe, 'what it was begun with counts'
    with pytest.raises(UserError, match='seed: 3 there, 4 now'): open_run('tiny', seed=4)
    with pytest.raises(UserError, match='holds the run of another recipe, tiny'):
        open_run('own', run.folder, text='text.txt')


def test_results_say_what_they_were_measured_on(job):
    _, results, _ = job
    for key in ('commit', 'lm_nb', 'torch', 'numpy', 'sentencepiece', 'name', 'date', 'threads'):
        assert key in results['hardware'], key
    assert re.fullmatch(r'\d{4}-\d\d-\d\d', results['hardware']['date'])
    for stage in ('pretrain', 'sft'):
        assert results[stage]['dtype'] == 'bf16' and results[stage]['attention']
    line = measured_on(results)
    assert 'dtype bf16' in line and 'not recorded' not in line.replace('commit not recorded', '')


def test_what_was_asked_is_there_by_stage(job):
    run, results, said = job
    assert [k for k in results if k in ('pretrain', 'base', 'sft', 'chat')] == [
        'pretrain', 'base', 'sft', 'chat']
    assert results['base']['heldout']['bits_per_byte'] > 0 and results['chat']['exact']
    assert results_table(results).head[-1] == 'after SFT'
    asked = len(run.records('test'))
    assert sum(s['n'] for s in results['chat']['exact'].values()) == asked
    lines = (run.folder/'answers.jsonl').read_text(encoding='utf-8').splitlines()
    assert [json.loads(line)['expected'] for line in lines] == [
        e.answer for e in run.records('test')]
    assert said == ['data for all stages', 'training: pretrain', 'measuring: base',
                    'training: sft', 'measuring: chat']


def test_a_second_call_measures_nothing_again(job, monkeypatch):
    run, results, _ = job
    before = (run.folder/'results.json').read_bytes()
    monkeypatch.setattr('lm_nb.workbook.run_stage', lambda *a: pytest.fail('trained again'))
    monkeypatch.setattr('lm_nb.workbook.evaluate_stage', lambda *a: pytest.fail('asked again'))
    assert run_all(Run.open(run.folder), lambda line: None) == results
    assert (run.folder/'results.json').read_bytes() == before


def test_evaluation_computes_in_the_dtype_noted_with_the_run(job, monkeypatch):
    "Not in whatever this machine is fastest in now"
    run, results, _ = job
    seen = []
    def watched(gpt, batches, text_bytes=None, context=None, ranks=None):
        with context: seen.append(torch.is_autocast_enabled('cpu'))
        return heldout(gpt, batches, text_bytes, run.runtime('pretrain').autocast(), ranks)
    monkeypatch.setattr('lm_nb.training.pretrain.heldout', watched)
    monkeypatch.setattr('lm_nb.core._has_bf16_unit', lambda: False)
    monkeypatch.setattr('lm_nb.training.run.pick_dtype', lambda *a: pytest.fail('measured anew'))
    found = evaluate_stage(run, 'pretrain')
    assert seen == [True] and found['heldout'] == results['base']['heldout']


@pytest.mark.parametrize('path', RECORDS, ids=lambda p: p.stem)
def test_every_record_says_what_it_was_made_with_or_that_it_does_not(path):
    results = read_json(path)
    if 'hardware' not in results: return  # counts of files: nothing was computed
    on, line = results['hardware'], measured_on(results)
    assert on['name'] and on['torch'] and on['date'] and on['date'] in line
    if 'commit' not in on: assert 'lm_nb 0.1.0' in line and line.count('not recorded') >= 3


SETTINGS = Path(__file__).parent.parent/'settings.ini'
WORLD = """paraphrases=5 vocab_size=600 n_layer=1 n_head=2 d_model=32 d_ff=64 context=256
    batch_tokens=1536 pretrain.tokens=16000 sft.tokens=8000 eval_every=5 sft.eval_every=2
    sample_every=0 device=cpu
    groups=five~one""".split()


@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
def test_the_same_seed_on_the_same_machine_gives_the_same_table(dtype, tmp_path, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')
    keys = [k.replace('~', ' ') for k in WORLD] + [f'dtype={dtype}']
    def job(name):
        run = Run(load_recipe('micro', keys, SETTINGS), tmp_path/name)
        results = run_all(run, lambda line: None)
        logs = [[{k: v for k, v in r.items() if 'facts/' in k} for r in read_log(run.folder/stage)]
                for stage in ('pretrain', 'sft')]
        return run, results, logs
    (run, one, curves), (_, two, again) = job('one'), job('two')
    for output in ('base', 'chat'): assert one[output] == two[output]
    assert str(results_table(one)) == str(results_table(two)) and curves == again
    for found, how in zip(curves, ('cloze', 'seen')):
        points = [r for r in found if r]
        assert len(points) >= 2 and {f'facts/{how} five', f'facts/{how} one'} <= points[-1].keys()
    assert one['chat']['facts'].keys() == {'five', 'one'} and one['pretrain']['dtype'] == dtype
    tasks = [row[0] for row in results_table(one).rows]
    assert tasks == ['zh → en', 'en → zh', 'summary zh', 'summary en'], 'facts have their own table'
    assert all('[' in cell for row in results_table(one).rows for cell in row[1:])
    assert len(plot_progress(run.folder/'pretrain', run.folder/'sft').axes) == 3


ABOUT = r'about [\d.,]+ (s|min) on .+, (fp32|bf16), \d+ threads?, [\d,]+ tokens/s'


def test_a_job_says_at_its_start_how_long_it_takes(monkeypatch):
    monkeypatch.chdir(RECORDS[0].parents[2])
    line, = [s for s in workbook.announce(load_recipe('micro'), .05) if s.startswith('about ')]
    assert re.fullmatch(ABOUT + r'; the recipe micro-quick takes [\d.,]+ (s|min)', line)


@pytest.mark.parametrize('other', ['model', 'stage'])
def test_a_quick_recipe_of_another_kind_is_not_offered(other, monkeypatch):
    monkeypatch.chdir(RECORDS[0].parents[2])
    recipe = load_recipe('micro', ['d_model=64'] if other == 'model' else [])
    if other == 'stage':
        configs = recipe.configs | dict(dpo=recipe.configs['sft'])
        recipe = replace(recipe, stages='pretrain sft dpo', configs=configs)
    line, = [s for s in workbook.announce(recipe, .05) if s.startswith('about ')]
    assert re.fullmatch(ABOUT, line)


def test_a_mistake_in_a_quick_recipe_is_its_own(tmp_path, monkeypatch):
    settings = (RECORDS[0].parents[2]/'settings.ini').read_text(encoding='utf-8')
    wrong = settings.replace('[micro-quick]', '[micro-quick]\nn_layers = 3')
    (tmp_path/'settings.ini').write_text(wrong, encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    line, = [s for s in workbook.announce(load_recipe('micro'), .05) if s.startswith('about ')]
    assert re.fullmatch(ABOUT, line)


def test_other_work_on_the_cores_is_said_and_left_its_share(monkeypatch):
    monkeypatch.chdir(RECORDS[0].parents[2])
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(workbook.os, 'cpu_count', lambda: 4)
    recipe, before = load_recipe('micro', TINY_JOB), torch.get_num_threads()
    try:
        for others, threads in ((2.2, 2), (.1, 4), (math.nan, 4), (9, 1)):
            torch.set_num_threads(4)
            monkeypatch.setattr(workbook, '_beside', lambda work, n=others: (None, n))
            lines = workbook.announce(recipe, budget=.02)
            assert torch.get_num_threads() == threads and f', {threads} thread' in lines[0]
            busy = [f'{others:.1f} of 4 cores' in line for line in lines[1:]]
            assert busy == [True]*(threads < 4)
        monkeypatch.setenv('OMP_NUM_THREADS', '4')
        torch.set_num_threads(4)
        workbook._leave_cores(3.)
        assert torch.get_num_threads() == 4
    finally: torch.set_num_threads(before)
