"""Recipes as people write them, files that appear whole or not at all"""
import json, os, platform, signal, subprocess, sys
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings, strategies as st

from lm_nb import core
from lm_nb.core import (
    UserError, atomic, check, compose, config_texts, nearest, parse, read_json, read_settings,
    recipe_names, root, sha256, write_json, write_lines)


@dataclass(frozen=True)
class Part:
    steps: int = 10
    lr: float = 0.1
    limit: int | None = None
    fast: bool = False

    def __post_init__(self): check(self.steps > 0, f'steps = {self.steps}: must be positive')


@dataclass(frozen=True)
class Whole:
    name: str
    seed: int = 0
    text: str = ''
    first: Part = field(default_factory=Part)
    second: Part = field(default_factory=Part)


@pytest.fixture
def recipes(tmp_path):
    "Write a settings file; gives a function (recipe, overrides) -> Whole"
    def load(ini, name, *overrides):
        path = tmp_path/'settings.ini'
        path.write_text(ini, encoding='utf-8')
        return compose(Whole, name, config_texts(name, overrides, path))
    return load


# ------------------------------------------------------------------ values

@given(st.integers())
def test_whole_numbers_come_back(n):
    assert parse(str(n), int) == n and parse(f'{n:_}', int) == n and parse(str(n), int | None) == n


@given(st.floats(allow_nan=False))
def test_numbers_come_back(x): assert parse(repr(x), float) == x


@given(st.text().filter(lambda s: s.strip().lower() not in ('', 'none')))
def test_text_comes_back(s): assert parse(s, str) == s and parse(s, str | None) == s


@given(st.booleans(), st.sampled_from([str, str.lower, str.upper]))
def test_truth_comes_back(b, spell): assert parse(spell(str(b)), bool) is b


@given(st.sampled_from([int, float, bool, int | None, float | None, str | None]),
       st.text(max_size=12))
@settings(max_examples=300)
def test_any_text_is_a_value_or_a_value_error(kind, text):
    "Nothing else may escape: the command line turns a ValueError into one clear line"
    try: value = parse(text, kind)
    except ValueError: return
    assert value is None or isinstance(value, (int, float, bool, str))


@pytest.mark.parametrize('text', ['1e999', '1e400', '-1E999'])
def test_a_whole_number_beyond_all_bounds_is_a_value_error(text):
    with pytest.raises(ValueError): parse(text, int)


def test_powers_of_ten_are_whole_numbers():
    assert parse('1e6', int) == 10**6 and parse('1.5E3', int) == 1500
    for broken in ('1.5', '1e-3', '2.0001e3', 'e', 'ten', ''):
        with pytest.raises(ValueError): parse(broken, int)


def test_none_is_only_where_it_may_be():
    assert parse('none', int | None) is None and parse(' ', float | None) is None
    assert parse('none', str) == 'none'
    with pytest.raises(ValueError): parse('none', int)


# ------------------------------------------------------------------ recipes

def test_like_inherits_over_several_steps_and_default_is_under_all(recipes):
    ini = ('[DEFAULT]\nseed = 7\n'
           '[a]\nsteps = 1\nlr = 0.5\ntext = ä中 # not this\n'
           '[b]\nlike = a\nlr = 0.25\n'
           '[c]\nlike = b\nfast = yes\nseed = 9\n')
    a, c = Part(1, .5), Part(1, .25, fast=True)
    assert recipes(ini, 'a') == Whole('a', 7, 'ä中', a, a), 'a plain key sets every part with it'
    assert recipes(ini, 'c') == Whole('c', 9, 'ä中', c, c), 'the nearer recipe wins'


def test_the_narrower_key_wins_wherever_it_stands(recipes):
    for ini in ('[r]\nsecond.steps = 3\nsteps = 2\n', '[r]\nsteps = 2\nsecond.steps = 3\n',
                '[a]\nsecond.steps = 3\n[r]\nlike = a\nsteps = 2\n'):
        r = recipes(ini, 'r')
        assert (r.first.steps, r.second.steps) == (2, 3)
    r = recipes('[r]\nsecond.steps = 3\n', 'r', 'steps=5', 'first.steps=4')
    assert (r.first.steps, r.second.steps) == (4, 5), 'the command line replaces what the file says'
    assert recipes('[r]\nsecond.steps = 3\n', 'r', 'second.steps=5').second.steps == 5
    r = recipes('[r]\nsteps = 3\n', 'r', 'steps=5', 'steps=6')
    assert r.first.steps == 6, 'the last word counts'


def test_an_override_may_hold_an_equals_sign(recipes):
    assert recipes('[r]\n', 'r', 'text=a=b=c').text == 'a=b=c'


@pytest.mark.parametrize('ini, name, overrides, words', [
    ('[a]\nlike = b\n[b]\nlike = c\n[c]\nlike = a\n', 'a', (),
     ("'like' goes round in a circle: a -> b -> c -> a",)),
    ('[a]\nlike = a\n', 'a', (), ('circle', 'a -> a')),
    ('[base]\n[a]\nlike = bsae\n', 'a', (),
     ('settings.ini [a]', 'like = bsae', "did you mean 'base'")),
    ('[base]\n', 'bas', (), ("no recipe 'bas'", "did you mean 'base'", 'there are: base')),
    ('[r]\nstesp = 1\n', 'r', (),
     ('settings.ini [r]', "unknown key 'stesp'", "did you mean 'steps'")),
    ('[r]\nfrist.steps = 1\n', 'r', (), ("did you mean 'first.steps'",)),
    ('[r]\nfirst.seed = 1\n', 'r', (), ("unknown key 'first.seed'",)),
    ('[r]\nname = x\n', 'r', (), ("unknown key 'name'",)),
    ('[r]\nsteps = many\n', 'r', (),
     ('settings.ini [r]', 'steps = many', 'expected a whole number')),
    ('[r]\n', 'r', ('lr=fast',), ('command line', 'lr = fast', 'expected a number')),
    ('[r]\n', 'r', ('limit=1.5',), ('limit = 1.5', 'expected a whole number or none')),
    ('[r]\n', 'r', ('fast=perhaps',), ('expected true or false',)),
    ('[r]\n', 'r', ('seed=1e999',), ('seed = 1e999', 'expected a whole number')),
    ('[r]\n', 'r', ('steps',), ("'steps' is not of the form key=value",)),
    ('[r]\nsecond.steps = 0\n', 'r', (), ('recipe r: steps = 0: must be positive',)),
    ('steps = 1\n', 'r', (), ('settings.ini', 'not a settings file')),
    ('[r]\n[r]\n', 'r', (), ('settings.ini', 'already exists')),
])
def test_a_wrong_recipe_is_one_clear_line(recipes, ini, name, overrides, words):
    with pytest.raises(UserError) as e: recipes(ini, name, *overrides)
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


def test_a_settings_file_that_is_missing_or_not_text(tmp_path):
    with pytest.raises(UserError, match='no such settings file'):
        read_settings(tmp_path/'settings.ini')
    (tmp_path/'settings.ini').write_bytes(b'[r]\ntext = \xff\n')
    with pytest.raises(UserError, match='settings.ini: not a settings file'):
        read_settings(tmp_path/'settings.ini')


def test_every_recipe_of_the_workbook_loads():
    from lm_nb.training.recipe import load_recipe
    for name in read_settings():
        overrides = dict(own=['text=FILE'], finetune=['instructions=FILE']).get(name, [])
        assert load_recipe(name, overrides).name == name


def test_hints():
    assert nearest('tokenzier', ['tokenizer', 'shards']) == " (did you mean 'tokenizer'?)"
    assert nearest('xyz', ['tokenizer']) == ''


def test_a_wrong_recipe_spoils_no_other(tmp_path):
    path = tmp_path/'s.ini'
    path.write_text('[DEFAULT]\nseed = 1\n[a]\nlike = b\n[good]\nx = 1\n[bare]\ny\n[c]\nlike = c\n')
    assert recipe_names(path) == ['a', 'good', 'bare', 'c']
    assert config_texts('good', (), path) == [('seed', '1', 's.ini [DEFAULT]'),
                                              ('x', '1', 's.ini [good]')]
    for name in ('a', 'bare', 'c'):
        with pytest.raises(UserError, match=rf's.ini \[{name}\]'): config_texts(name, (), path)
        with pytest.raises(UserError): read_settings(path)


def test_what_is_inherited_is_said_where_it_stands(tmp_path):
    (tmp_path/'s.ini').write_text('[a]\nx = 1\n[b]\nlike = a\ny = 2\n')
    assert config_texts('b', ['z=3'], tmp_path/'s.ini') == [
        ('x', '1', 's.ini [a]'), ('y', '2', 's.ini [b]'), ('z', '3', 'command line')]


@pytest.mark.parametrize('text, kind', [
    ('nan', float), ('inf', float), ('-inf', float | None), ('1e400', float), ('1e400', int),
    ('9' * 20, int), ('9' * 5000, int), (str(2**63), int | None), ('ten', int), ('\udcff', int),
    ('', float), ('maybe', bool)])
def test_a_number_that_nothing_can_hold_is_refused(text, kind):
    with pytest.raises(UserError, match='key = ') as e: core.parse_key('key', text, kind)
    assert '\n' not in str(e.value) and len(str(e.value)) < 150


# ------------------------------------------------------------------ where things are

def test_root_is_the_nearest_folder_above_with_settings(tmp_path, monkeypatch):
    deep = tmp_path/'a'/'b'
    deep.mkdir(parents=True)
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(deep)
    assert root() == tmp_path
    (tmp_path/'a'/'settings.ini').touch()
    assert root() == tmp_path/'a'


def test_root_falls_back_on_the_package(tmp_path, monkeypatch):
    (tmp_path/'repo').mkdir()
    (tmp_path/'elsewhere').mkdir()
    (tmp_path/'repo'/'settings.ini').touch()
    monkeypatch.chdir(tmp_path/'elsewhere')
    monkeypatch.setattr(core, '__file__', str(tmp_path/'repo'/'lm_nb'/'core.py'))
    assert root() == tmp_path/'repo'
    monkeypatch.setattr(core, '__file__', str(tmp_path/'site'/'lm_nb'/'core.py'))
    assert root() == tmp_path/'elsewhere', 'an installed package leaves its own folder alone'
    (tmp_path/'site'/'lm_nb'/'files').mkdir(parents=True)
    (tmp_path/'site'/'settings.ini').touch()
    assert root() == tmp_path/'elsewhere', 'nor does it take the file of another package'


# ------------------------------------------------------------------ files

def test_atomic_leaves_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path/'sub'/'x.json'
    write_json(path, {'a': 1})
    with pytest.raises(ZeroDivisionError), atomic(path) as tmp:
        tmp.write_text('half')
        1/0  # noqa: B018
    with pytest.raises(UserError, match='nothing was written'), atomic(path): pass
    with pytest.raises(TypeError): write_json(path, {'a': object()})
    assert read_json(path) == {'a': 1} and [p.name for p in path.parent.iterdir()] == ['x.json']


def test_atomic_never_replaces_a_folder_and_cleans_up(tmp_path):
    path = tmp_path/'run'
    def fill():
        with atomic(path) as tmp:
            (tmp/'deep').mkdir(parents=True)
            (tmp/'deep'/'f').write_text('x')
    fill()
    with pytest.raises(UserError, match='exists already and is not replaced'): fill()
    assert (path/'deep'/'f').read_text() == 'x' and [p.name for p in tmp_path.iterdir()] == ['run']


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path/'x.json'
    write_json(path, [1])
    code = ('import os, signal, sys; from lm_nb.core import atomic\n'
            'with atomic(sys.argv[1]) as tmp:\n'
            '    tmp.write_text("[2")\n'
            '    os.kill(os.getpid(), signal.SIGKILL)\n')
    assert subprocess.run([sys.executable, '-c', code, str(path)]).returncode == -signal.SIGKILL
    assert read_json(path) == [1]


TEXT = st.text(st.characters(exclude_categories=['Cs']))
LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT


def nested(inner): return st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)


@given(st.recursive(LEAF, nested))
@settings(max_examples=40, deadline=None)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp('j')/'x.json'
    write_json(path, value)
    assert read_json(path) == value


@given(st.text(st.characters(categories=['Cs', 'Lu'])))
@settings(max_examples=40, deadline=None)
def test_halves_of_surrogate_pairs_are_written(tmp_path_factory, text):
    "A file name of other bytes is such a text; two halves that make a pair become one character"
    path = tmp_path_factory.mktemp('j')/'x.json'
    whole = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'surrogatepass')
    write_json(path, {text: text})
    assert read_json(path) == {whole: whole}
    write_lines(path, [text])
    assert json.loads(path.read_text(encoding='utf-8')) == whole


def test_json_that_is_none(tmp_path):
    with pytest.raises(UserError, match='no such file'): read_json(tmp_path/'x.json')
    for garbage in (b'{"a": ', b'\xff\xfe', b''):
        (tmp_path/'x.json').write_bytes(garbage)
        with pytest.raises(UserError, match='not valid JSON') as e: read_json(tmp_path/'x.json')
        assert '\n' not in str(e.value)


def test_sha256(tmp_path):
    (tmp_path/'x').write_bytes(b'abc')
    known = 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
    assert sha256(tmp_path/'x') == known


# ------------------------------------------------------------------ hardware

def test_devices_and_formats_that_are_not_there():
    import torch
    from lm_nb.core import pick_device, pick_dtype
    for name in ('gpu', 'cuda:x', ''):
        with pytest.raises(UserError, match='device = '): pick_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match='no CUDA device'): pick_device('cuda')
    with pytest.raises(UserError, match='expected auto, bf16'):
        pick_dtype(torch.device('cpu'), 'fp8')
    with pytest.raises(UserError, match='does not train on a CPU'):
        pick_dtype(torch.device('cpu'), 'fp16')


@pytest.mark.parametrize('unit', [True, False])
def test_the_format_follows_from_what_the_cpu_has_and_not_from_a_timing(monkeypatch, unit):
    "However busy the machine is: a clock that may not be read stands for it"
    import torch
    monkeypatch.setattr(core, '_has_bf16_unit', lambda: unit)
    monkeypatch.setattr('time.perf_counter', lambda: pytest.fail('timed'))
    assert core.pick_dtype(torch.device('cpu')) == ('bf16' if unit else 'fp32')


@pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='instructions of x86')
def test_a_cpu_that_is_held_to_avx2_says_so_and_computes_in_fp32():
    import torch
    code = """import torch, lm_nb.core as core
torch.cpu.get_capabilities = lambda: dict(avx2=True, avx512_bf16=True)
print(core.hardware()['instructions'], core.pick_dtype(torch.device('cpu')), sep=', ')"""
    said = [subprocess.run([sys.executable, '-c', code], env=os.environ | held, text=True,
                           capture_output=True, check=True).stdout.strip()
            for held in ({}, dict(ATEN_CPU_CAPABILITY='avx2'))]
    free = torch.backends.cpu.get_cpu_capability()
    assert said == [f'{free}, {"bf16" if free == "AVX512" else "fp32"}', 'held to AVX2, fp32']


@pytest.mark.parametrize('env', [{}, {'IN_TEST': '1'}, {'RANK': '1'}, {'RANK': '0'}], ids=str)
def test_bars_are_silent_under_test_and_on_other_ranks(env):
    "In a process of its own: other tests load notebooks, in which bars are widgets"
    code = "from lm_nb.core import progress; print(list(progress(range(3), desc='bar')))"
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'RANK')} | env
    got = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True,
                         check=True)
    silent = 'IN_TEST' in env or env.get('RANK') == '1'
    assert got.stdout == '[0, 1, 2]\n' and ('bar: 100%' in got.stderr) != silent


@pytest.mark.parametrize('stream', [None, 'closed'])
def test_nobody_listens(monkeypatch, tmp_path, stream):
    if stream:
        stream = open(tmp_path/'x', 'w')
        stream.close()
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setattr(sys, 'stderr', stream)
    assert list(core.progress(range(3), desc='bar')) == [0, 1, 2]
    core.notice('nobody reads this')


def test_workers_are_bounded_by_the_cores(monkeypatch, capsys):
    cores = core.worker_count(10**6, 'clean_workers')
    assert 1 <= cores <= 4096
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'clean_workers = 1000000' in said and f'{cores} cores' in said
    assert [core.worker_count(n) for n in (0, 1, cores)] == [0, 1, cores]
    assert capsys.readouterr().err == ''


def test_the_package_and_its_help_load_nothing_heavy():
    heavy = '{"torch", "numpy", "sentencepiece", "datasets", "safetensors", "einops"}'
    def loaded(code, most):
        "What of `heavy` the code loads, and whether it loads fewer than `most` modules in all"
        tell = f'print(*{heavy} & set(sys.modules), len(sys.modules) < {most})'
        code = f'import sys, atexit; atexit.register(lambda: {tell}); {code}'
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                              check=True)
        return done.stdout.splitlines()[-1]
    assert loaded('import lm_nb, lm_nb.core', 150) == 'True'
    assert loaded('import lm_nb.cli; lm_nb.cli.main(["--help"])', 200) == 'True'


def test_settings_keep_their_order_and_spelling(tmp_path):
    (tmp_path/'s.ini').write_text('[B]\nKey = 1\n[a]\nlike = B\n')
    assert json.dumps(read_settings(tmp_path/'s.ini')) == '{"B": {"Key": "1"}, "a": {"Key": "1"}}'


def test_a_bar_ends_on_the_rate_of_the_whole(monkeypatch):
    import io, time
    from lm_nb.core import progress
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setitem(sys.modules, 'ipykernel', sys)  # a bar that moves
    with progress(unit='doc', file=io.StringIO()) as bar:
        time.sleep(.4)  # the first takes long, as where its text is prepared before
        bar.update(1)
        bar.update(99)
        assert bar.format_dict['rate'] is None or bar.format_dict['rate'] > 50
