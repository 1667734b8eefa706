"One process in one folder, and whose run it is"
import json, os, shutil, signal, time
from dataclasses import replace
from pathlib import Path

import pytest

from lm_nb.core import UserError, atomic, read_json, root
from lm_nb.model.gpt import GPT
from lm_nb.model.hub import load_model, save_model
from lm_nb.training import stage
from lm_nb.training.recipe import Stage, load_recipe, recorded_recipe, register_stage
from lm_nb.training.run import Run, differing, fork_run, _open_run, run_lock

pytestmark = pytest.mark.filterwarnings('ignore:.*fork.*')

def told(call, *args, **kw):
    with pytest.raises(UserError) as e: call(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)

# -- one process in one folder

def holder(folder):
    "A process that holds a folder until it is killed; its id"
    r, w = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            with run_lock(folder): os.write(w, b'1'), time.sleep(60)
        finally: os._exit(1)
    assert os.read(r, 1) == b'1'
    return pid

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_second_process_is_refused_and_a_dead_one_keeps_nothing(tmp_path):
    other = holder(tmp_path/'r')
    line = told(lambda: run_lock(tmp_path/'r').__enter__())
    assert f'process {other} on' in line and str(tmp_path/'r') in line
    os.kill(other, signal.SIGSTOP)  # a sleeping process still has it
    assert f'process {other} on' in told(lambda: run_lock(tmp_path/'r').__enter__())
    os.kill(other, signal.SIGKILL), os.waitpid(other, 0)
    with run_lock(tmp_path/'r'), run_lock(tmp_path/'x'/'..'/'r'):
        assert f'process {os.getpid()} on' in told(
            lambda: _in_child(lambda: run_lock(tmp_path/'r').__enter__()))
    with run_lock(tmp_path/'r'): pass
    assert _open_run(tmp_path/'r', dict(a=1)) is False  # a lock is no content

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize('how', ['orderly', 'a mistake', 'killed'])
def test_only_after_a_crash_are_token_files_read_again(tmp_path, how):
    note = tmp_path/'shards'/'train'/'.verified.json'
    note.parent.mkdir(parents=True)
    note.write_text('{}')
    if how == 'killed':
        other = holder(tmp_path)
        os.kill(other, signal.SIGKILL), os.waitpid(other, 0)
    elif how == 'orderly':
        with run_lock(tmp_path), run_lock(tmp_path): pass
    else:
        with pytest.raises(UserError), run_lock(tmp_path): raise UserError('a mistake')
    assert note.exists()
    with run_lock(tmp_path): assert note.exists() == (how != 'killed')


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path):
    r, w = os.pipe()
    with run_lock(tmp_path):
        if (child := os.fork()) == 0:
            os.read(r, 1)
            os._exit(0)
        # a child is another process
        assert told(lambda: _in_child(lambda: run_lock(tmp_path).__enter__()))
    with run_lock(tmp_path): pass
    assert _in_child(lambda: run_lock(tmp_path).__enter__()) is None
    os.write(w, b'1'), os.waitpid(child, 0)

def _in_child(work):
    "Run in a forked process; a UserError comes back"
    r, w = os.pipe()
    if os.fork() == 0:
        try: work()
        except UserError as e: os.write(w, str(e).encode())
        finally: os._exit(0)
    os.close(w)
    os.wait()
    with os.fdopen(r) as f: said = f.read()
    if said: raise UserError(said)

def test_a_folder_that_may_not_be_written_to(tmp_path):
    (tmp_path/'file').write_text('x')
    for bad in (tmp_path/'file', tmp_path/'file'/'below'):
        assert 'run_dir' in told(lambda bad=bad: run_lock(bad).__enter__())

# -- whose run

RECIPE = dict(seed=0, model=dict(n_layer=4, tie=True, d_ff=None), pretrain=dict(lr=1e-3),
              path=Path('a/b'), shape=(1, 2))

def test_a_run_is_created_and_found_again(tmp_path):
    assert _open_run(tmp_path/'a'/'b', RECIPE) is False
    assert _open_run(tmp_path/'a'/'b', RECIPE) is True
    assert read_json(tmp_path/'a'/'b'/'recipe.json')['model'] == RECIPE['model']

def test_another_recipe_is_refused_with_every_difference(tmp_path):
    _open_run(tmp_path/'r', RECIPE)
    (tmp_path/'r'/'base').mkdir()
    line = told(_open_run, tmp_path/'r',
                {**RECIPE, 'seed': 1, 'model': dict(n_layer=6, tie=True), 'new': 'x'})
    odd = ('seed: 0 there, 1 now', 'model.n_layer: 4 there, 6 now',
           'model.d_ff: null there, absent now', 'new: absent there, "x" now')
    for part in (*odd, 'run_dir=', 'remove the folder'): assert part in line
    assert 'tie' not in line and 'lr' not in line and _open_run(tmp_path/'r', RECIPE) is True

def test_a_recipe_from_which_nothing_came_may_be_corrected(tmp_path):
    _open_run(tmp_path/'r', RECIPE)
    assert _open_run(tmp_path/'r', {**RECIPE, 'seed': 1}) is False
    assert read_json(tmp_path/'r'/'recipe.json')['seed'] == 1

def test_free_keys_may_change_and_others_are_still_told(tmp_path):
    _open_run(tmp_path/'r', RECIPE)
    (tmp_path/'r'/'base').mkdir()
    changed = {**RECIPE, 'pretrain': dict(lr=1e-3, micro_rows=4)}
    assert _open_run(tmp_path/'r', changed) is True
    assert read_json(tmp_path/'r'/'recipe.json')['pretrain']['micro_rows'] == 4
    other = {**RECIPE, 'seed': 1, 'pretrain': dict(lr=1e-3, micro_rows=2)}
    line = told(_open_run, tmp_path/'r', other)
    assert 'seed: 0 there, 1 now' in line and read_json(tmp_path/'r'/'recipe.json')['seed'] == 0

def test_stages_may_be_appended_and_not_dropped(tmp_path):
    _open_run(tmp_path/'r', RECIPE | dict(stages='', plugins=''))
    (tmp_path/'r'/'base').mkdir()
    longer = RECIPE | dict(stages='pretrain more', plugins='more.py', more=dict(lr=1))
    assert _open_run(tmp_path/'r', longer) is True
    assert read_json(tmp_path/'r'/'recipe.json') == json.loads(json.dumps(longer, default=str))
    line = told(_open_run, tmp_path/'r', RECIPE | dict(stages='', plugins=''))
    assert 'stages: "pretrain more" there, "" now' in line and 'more.lr' not in line
    other = longer | dict(more=dict(lr=2))
    assert 'more.lr: 1 there, 2 now' in told(_open_run, tmp_path/'r', other)

def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path/'photos').mkdir()
    (tmp_path/'photos'/'a.jpg').write_bytes(b'1')
    assert 'no recipe.json' in told(_open_run, tmp_path/'photos', RECIPE)
    assert 'is a file' in told(_open_run, tmp_path/'photos'/'a.jpg', RECIPE)
    assert [p.name for p in (tmp_path/'photos').iterdir()] == ['a.jpg']
    (tmp_path/'odd').mkdir()
    (tmp_path/'odd'/'recipe.json').write_text('{oh')
    assert 'not valid JSON' in told(_open_run, tmp_path/'odd', RECIPE)
    (tmp_path/'odd'/'recipe.json').write_text('[1]')
    assert 'is not a recipe' in told(_open_run, tmp_path/'odd', RECIPE)

def test_ranks_that_arrive_while_the_recipe_is_being_written(tmp_path):
    with atomic(tmp_path/'r'/'recipe.json') as t:
        t.write_text('half')
        assert _open_run(tmp_path/'r', RECIPE) is False
        t.write_text(json.dumps(read_json(tmp_path/'r'/'recipe.json')))
    assert _open_run(tmp_path/'r', RECIPE) is True

def test_one_and_one_point_nought_and_true_are_told_apart():
    assert differing(dict(a=1, b=1), dict(a=True, b=1)) == ['a: 1 there, true now']
    assert differing(dict(a=dict(b=1)), dict(a=3)) == [
        'a.b: 1 there, absent now', 'a: absent there, 3 now']
    assert differing(RECIPE | dict(path=''), RECIPE | dict(path='')) == []

# -- stages from files of the user's

PLUGIN = """from lm_nb.training.recipe import Stage, register_stage
register_stage(Stage('extra', start=None, feed=None, output={output!r}))
"""

@pytest.mark.parametrize('text, line', [
    ('def f(:', 'line 1: SyntaxError: invalid syntax'),
    ('x = 1\nimport no_such', "line 2: ModuleNotFoundError: No module named 'no_such'"),
    ('\n\n1/0', 'line 3: ZeroDivisionError'),
    ('def f():\n    return nothing\nf()', "line 2: NameError: name 'nothing' is not defined"),
    (PLUGIN.format(output='extra'), "stage extra: output = 'extra' is the name of another folder"),
    (PLUGIN.format(output='chat'), 'each needs an output of its own')])
def test_a_mistake_in_a_plugin_is_one_line(tmp_path, text, line):
    (tmp_path/'plugin.py').write_text(text)
    keys = f'plugins={tmp_path}/plugin.py', 'stages=pretrain sft extra'
    assert line in told(load_recipe, 'micro', keys)

@pytest.mark.parametrize('name', ['plugin.txt', 'settings.ini', 'plugin'])
def test_a_plugin_is_a_python_file(tmp_path, name):
    (tmp_path/name).write_text(PLUGIN.format(output='extra'))
    assert 'must end in .py' in told(load_recipe, 'micro', [f'plugins={tmp_path/name}'])

def test_a_plugin_that_has_gone_is_named(tmp_path):
    assert 'there is no file gone.py' in told(load_recipe, 'micro', ['plugins=gone.py'])
    (tmp_path/'recipe.json').write_text(json.dumps(dict(name='x', plugins='gone.py')))
    assert 'there is no file gone.py' in told(recorded_recipe, tmp_path)

def test_a_stage_is_listed_once_and_a_misspelt_one_gets_a_hint():
    assert "did you mean 'sft'" in told(load_recipe, 'micro', ['stages=pretrain sfd'])
    assert 'pretrain is listed twice' in told(load_recipe, 'micro', ['stages=pretrain pretrain'])

def test_the_last_definition_of_a_stage_counts():
    one, two = (register_stage(Stage('again', None, None, output=o)) for o in ('one', 'two'))
    assert load_recipe('micro', ['stages=pretrain again']).stage_names == ['pretrain', 'again']
    assert register_stage(one) is one is not two


SMALL = ['n_layer=1', 'n_head=1', 'd_model=32', 'vocab_size=300', 'pretrain.tokens=512',
         'context=32', 'device=cpu']

def _grow(folder): (folder/'b.txt').write_text('came later, and long enough to be a text\n')
def _edit(folder): (folder/'a.txt').write_text('something else, and long enough to be a text\n' * 9)

@pytest.mark.parametrize('change,word', [
    (_grow, 'b.txt came after'), (_edit, 'a.txt: has changed')])
def test_a_run_that_is_done_says_that_its_source_is_another_now(tmp_path, capsys, change, word):
    "It trains nothing, so what it shows is of the source as it was"
    texts = tmp_path/'my texts'
    texts.mkdir()
    lines = [f'a line that is number {i} of this text' for i in range(90)]
    (texts/'a.txt').write_text('\n'.join(lines))
    recipe = load_recipe('own', [f'text="{texts}"', 'valid_share=0.3', *SMALL])
    stage.prepare_stages(run := Run(recipe, tmp_path/'run'), ['pretrain'])
    (run.folder/'base').mkdir()
    stage.prepare_stages(Run(recipe, run.folder), ['pretrain'])
    before = capsys.readouterr()
    assert word not in before.out + before.err
    change(texts)
    stage.prepare_stages(Run(recipe, run.folder), ['pretrain'])
    after = capsys.readouterr()
    assert (after.out + after.err).count(word) == 1


def test_sources_are_those_of_the_folder_where_the_run_began(tmp_path, monkeypatch):
    "The same words name other files, or none, in another folder"
    for place in 'here', 'there':
        (tmp_path/place).mkdir()
        rows = [dict(instruction=f'{place} {i}?', output=f'{i}.') for i in range(40)]
        (tmp_path/place/'r.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    words = ['text=', 'instructions=r.jsonl', 'vocab_size=290', 'valid_share=0.2', 'base=x']
    shutil.copy(root()/'settings.ini', tmp_path)
    monkeypatch.chdir(tmp_path/'here')
    Run(load_recipe('own', words), tmp_path/'run')
    for place in 'there', 'here', '.':
        monkeypatch.chdir(tmp_path/place)
        run = Run.open(tmp_path/'run')
        assert all(e.prompt.startswith('here') for e in run.records('train'))
        shutil.rmtree(tmp_path/'run'/'records')
    (tmp_path/'here').rename(tmp_path/'moved')
    monkeypatch.chdir(tmp_path/'moved')
    assert Run.open(tmp_path/'run').data.instructions == str(tmp_path/'moved'/'r.jsonl')


def test_recomputing_concerns_a_model_from_a_folder_too(tmp_path):
    words = ['paraphrases=1', 'vocab_size=1024', 'n_layer=1', 'n_head=1', 'd_model=16',
             'context=32', 'recompute=true']
    run = Run(load_recipe('micro', words), tmp_path/'run')
    gpt = GPT(replace(run.recipe.model, vocab_size=len(run.tokenizer)))
    save_model(run.folder/'base', gpt, run.tokenizer)
    assert not load_model(run.folder/'base')[0].cfg.recompute
    assert run.model_before('sft').cfg.recompute

# -- forks

def aligned_run(folder):
    "A run with two stages and one more, as far as folders go"
    keys = ['stages=pretrain sft dpo', 'preferences=votes.jsonl', 'text=a.txt', 'device=cpu']
    run = Run(load_recipe('own', ['instructions=a.jsonl', *keys]), folder)
    for name in ('text', 'tokenizer', 'base', 'chat', 'aligned', 'dpo', 'sft/checkpoints/step-1'):
        (folder/name).mkdir(parents=True)
        (folder/name/'x').write_text(name)
    for name in ('results.json', 'values-dpo.jsonl'): (folder/name).write_text('{}')
    return run

def test_a_fork_has_what_was_made_and_leaves_behind_what_was_measured(tmp_path):
    run = aligned_run(tmp_path/'run')
    fork = fork_run(run, tmp_path/'fork', 'pretrain sft')
    made = {p.name for p in fork.folder.iterdir() if p.name[0] != '.'}
    assert made == {'recipe.json', 'sources.json', 'text', 'tokenizer', 'base', 'chat', 'sft'}
    assert (fork.folder/'chat'/'x').read_text() == 'chat' and not [*(fork.folder/'sft').iterdir()]
    assert (run.folder/'sft'/'checkpoints').exists() and fork.recipe.stage_names == [
        'pretrain', 'sft']
    whole = fork_run(run, tmp_path/'whole')
    assert whole.recipe == run.recipe and (whole.folder/'aligned'/'x').exists()

def test_a_fork_takes_other_values_for_what_follows_and_for_nothing_else(tmp_path):
    run = aligned_run(tmp_path/'run')
    fork = fork_run(run, tmp_path/'fork', 'pretrain sft')
    again = Run(replace(run.recipe, configs=run.recipe.configs | dict(
        dpo=replace(run.recipe.configs['dpo'], beta=.5))), fork.folder)
    assert again.recipe.configs['dpo'].beta == .5
    other = replace(run.recipe, configs=run.recipe.configs | dict(
        sft=replace(run.recipe.configs['sft'], tokens=9_999)))
    assert 'sft.tokens' in told(Run, other, fork.folder)

def test_a_fork_is_refused_where_something_is_and_while_others_work(tmp_path):
    run = aligned_run(tmp_path/'run')
    (tmp_path/'fork').mkdir()
    assert 'exists already' in told(fork_run, run, tmp_path/'fork')
    assert 'takes over the first of pretrain sft dpo' in told(fork_run, run, tmp_path/'f', 'sft')
    other = holder(run.folder)
    try: assert f'process {other} on' in told(fork_run, run, tmp_path/'f')
    finally: os.kill(other, signal.SIGKILL), os.waitpid(other, 0)
    assert {p.name for p in tmp_path.iterdir()} == {'run', 'fork'}
