"""The command line as a user meets it: what works, and what a mistake looks like"""
import bz2, gzip, json, os, re, shutil, subprocess, sys, threading
from functools import reduce
from pathlib import Path

import pytest

import lm_nb
from desk import asks, facts, text
from lm_nb.cli import main
from lm_nb.core import read_json, root

ROOT = root()
DATA = ROOT.parent/'shared'/'data'
TINY = '''dtype=fp32 device=cpu n_layer=1 n_head=2 d_model=32 context=48 batch_tokens=192
          vocab_size=340 kind=bpe pretrain.tokens=3840 sft.tokens=1920 valid_share=0.1 dropout=0
          log_every=5 eval_every=10 save_every=0 warmup=2'''.split()
PEOPLE = 'Ada Bela Cora Dora Edna Fay Gail Hope Iris Jade Kay Lena Mona Nora Olga Rosa'.split()
TOWNS = '林城 海门 青山 石桥 白河 Rivertown Hillford Oakham'.split()

def of_base(words): return [w for w in words if w != 'kind=bpe']  # a base brings its tokenizer


# what the script `lm-nb` runs
LM_NB = [sys.executable, '-c', 'import sys; from lm_nb.cli import main; sys.exit(main())']


def shell(cwd, *argv, env=None, **kw):
    "`lm-nb` in a process of its own, with bars"
    home = Path(lm_nb.__file__).resolve().parent.parent
    env = {**{k: v for k, v in os.environ.items() if k != 'IN_TEST'}, **(env or {}),
           'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(home)}
    return subprocess.run([*LM_NB, *map(str, argv)], cwd=cwd, env=env, capture_output=True,
                          **{'text': True, **kw})


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    "A folder with the workbook's settings and a user's two files"
    folder = tmp_path_factory.mktemp('desk')
    shutil.copy(ROOT/'settings.ini', folder)
    some = facts(PEOPLE, TOWNS)
    folder.joinpath('text.txt').write_text(text(some), encoding='utf-8')
    folder.joinpath('ask.json').write_text(json.dumps(asks(some), ensure_ascii=False),
                                           encoding='utf-8')
    return folder


@pytest.fixture
def at_desk(desk, monkeypatch):
    monkeypatch.chdir(desk)
    monkeypatch.setenv('COLUMNS', '100')
    monkeypatch.setenv('IN_TEST', '1')
    return desk


@pytest.fixture
def good(at_desk, capsys):
    "Run a command that works; gives what it says"
    def run(*argv, says=''):
        status = main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert status == 0 and says in err, err
        return out
    return run


def one_line(err, *words):
    "One line for the user beside progress bars and the `•` lines of `run`"
    bar = r'[^|]*: *(\d+%\||[\d.]+k?(it|doc|tok) \[|0it)'
    lines = [l for l in re.split('[\r\n]', err) if l.strip() and not re.match(f'•|{bar}', l)]
    assert len(lines) == 1 and lines[0].startswith('lm-nb: '), err
    assert 'Traceback' not in err and all(w in lines[0] for w in words), lines[0]


@pytest.fixture
def bad(at_desk, capsys):
    """Run a command that must fail with one clear line that holds `words`, and must leave every
    file as it was"""
    def run(argv, *words):
        capsys.readouterr()
        before, status = photo(at_desk), main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert status == 2, (status, out, err)
        one_line(err, *words)
        after = photo(at_desk)
        assert {k: after.get(k) for k in before} == before, 'what was there has changed'
        return err
    return run


def photo(folder):
    "Every file below a folder but the lock and notes: its content and when it was written"
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
            for p in Path(folder).rglob('*')
            if p.is_file() and p.name not in ('.lock', '.verified.json')}


def run_dir(tmp_path): return f'run_dir={tmp_path/"run"}'


# ------------------------------------------------------------------ finding one's way

def test_help_names_every_stage_and_recipe_and_loads_no_torch(at_desk):
    code = ('import sys; from lm_nb.cli import main; main(["--help"]);'
            'print(sorted({"torch", "numpy", "datasets"} & set(sys.modules)))')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith('[]\n') and done.stderr == ''
    for word in '''run corpus tokenizer shards pretrain sft evaluate choice chat generate recipe
                   plan profile fetch bench micro poems base-124m own'''.split():
        assert re.search(rf'\b{word}\b', done.stdout), word


def test_the_module_is_the_command(at_desk, good):
    home = Path(lm_nb.__file__).resolve().parent.parent
    def module(*argv):
        return subprocess.run([sys.executable, '-m', 'lm_nb.cli', *argv], capture_output=True,
                              text=True, env={**os.environ, 'PYTHONPATH': str(home)})
    done = module('--help')
    assert (done.returncode, done.stdout, done.stderr) == (0, good('--help'), '')
    done = module('pretrian', 'own')
    assert done.returncode == 2 and done.stdout == ''
    one_line(done.stderr, "no command 'pretrian'")


def test_help_of_a_stage(good):
    assert 'continue a text' in good('generate')
    assert good('generate', '--help') == good('generate', '-h') == good('generate')
    assert good() == good('help') == good('-h')


def test_a_recipe_shows_each_key_with_its_meaning(good):
    text = good('recipe', 'own', 'text=text.txt', 'n_layer=3', 'sft.lr=0.5')
    assert re.search(r'n_layer +3 +\w+', text) and re.search(r'lr +0\.5 +\w+', text)
    # what is long goes on in the next lines, far to the right
    rows = re.findall(r'^  (\S+) +(.*(?:\n {20}.*)*)$', text, re.M)
    bare = [k for k, doc in rows if not re.search('[a-z]{3}', doc)]
    assert len(rows) > 60 and not bare, 'a key without its meaning'


PLUGIN = '''
from lm_nb.training.pretrain import text_feed
from lm_nb.training.recipe import Stage, register_stage
register_stage(Stage('further', output='longer', start=lambda run: run.model_before('further'),
                     feed=lambda run, ranks: text_feed(run, 'further', run.shards, ranks)))
'''


def test_a_stage_that_only_a_recipe_knows_is_a_command(bad, good, tmp_path):
    (tmp_path/'further.py').write_text(PLUGIN)
    bare = ['own', 'text=text.txt', *TINY, run_dir(tmp_path)]
    words = [*bare, f'plugins={tmp_path/"further.py"}', 'stages=pretrain further',
             'further.tokens=1920']
    err = bad(['furhter', *words], "no command 'furhter'", "did you mean 'further'")
    there = err.split('there are: ')[1].strip().split(', ')
    assert 'further' in there and there.count('pretrain') == 1, 'listed with the others, each once'
    bad(['further', *bare], "no command 'further'")
    bad(['further', *words], 'no model to start further from', 'lm-nb pretrain own')
    good('pretrain', *words)
    out = good('further', *words)
    assert 'longer model in' in out and (tmp_path/'run'/'longer'/'model.safetensors').is_file()


@pytest.mark.parametrize('line, words', [
    ('pretrian own', ("no command 'pretrian'", "did you mean 'pretrain'",
                      'there are: run, corpus, tokenizer')),
    ('run owm', ("no recipe 'owm'", "did you mean 'own'", 'micro')),
    ('chat owm', ("no recipe 'owm'", "did you mean 'own'")),
    ('generate owm prompt=x', ("no recipe 'owm'", "did you mean 'own'")),
    ('run text=text.txt', ('the recipe comes first',)),
    ('run own text', ("'text' is not of the form key=value",)),
    ('run own text=text.txt n_layers=2',
     ('command line', "unknown key 'n_layers'", "did you mean 'n_layer'")),
    ('run own text=text.txt sft.n_layer=2', ("unknown key 'sft.n_layer'",)),
    ('run own text=text.txt n_layer=two', ('n_layer = two', 'expected a whole number')),
    ('run own text=text.txt seed=1e999', ('seed = 1e999', 'expected a whole number')),
    ('run own text=text.txt lr=fast', ('lr = fast', 'expected a number')),
    ('run own text=text.txt tie=perhaps', ('tie = perhaps', 'expected true or false')),
    ('run own text=text.txt d_model=100 n_head=3',
     ('recipe own', 'd_model = 100 is not divisible by n_head = 3')),
    ('run own text=text.txt d_model=192 n_head=6 n_kv_head=4',
     ('n_head = 6 is not divisible by n_kv_head = 4',)),
    ('run own text=text.txt arch=gpt3', ('arch = gpt3', "did you mean 'gpt2'")),
    ('run own text=text.txt optimizer=adam', ('optimizer = adam', "did you mean 'adamw'")),
    ('run own text=text.txt batch_tokens=100 context=200',
     ('batch_tokens = 100 is less than one row of context = 200',)),
    ('run own text=text.txt pretrain.tokens=100', ('tokens = 100 is less than one batch',)),
    ('run own text=text.txt lr=nan', ('lr = nan',)),
    ('run own text=text.txt valid_share=1', ('valid_share = 1.0',)),
    ('run own text=text.txt errors=ignore', ('errors = ignore', 'strict or replace')),
    ('run own text=text.txt vocab_size=100', ('vocab_size = 100',)),
    ('run own', ('recipe own', 'set text=')),
    ('tokenizer own text=text.txt run_dir=text.txt',
     ('text.txt', 'is a file, not a run directory')),
    ('tokenizer own text=text.txt run_dir=text.txt/deeper', ('text.txt',)),
    ('tokenizer own text=text.txt run_dir=.', ('is not empty and not a run',)),
    ('chat own', ('runs/own', 'no chat model here', 'lm-nb run own')),
    ('generate own prompt=x', ('runs/own', 'no base model here')),
    ('generate own', ("prompt='…'",)),
    ('fetch peoms', ("nothing known to fetch under the name 'peoms'", "did you mean 'poems'")),
    ('fetch poems colour=red', ('unknown key colour',)),
])
def test_a_mistake_in_the_command_is_one_clear_line(bad, at_desk, line, words):
    files = set(photo(at_desk))
    bad(line.split(), *words)
    assert set(photo(at_desk)) == files, 'a refused command leaves nothing behind'


def test_a_workbook_without_npm_says_so(bad, at_desk, monkeypatch):
    monkeypatch.setenv('PATH', '')
    bad(['fetch', 'poems'], 'npm is needed', 'install Node.js')


# ------------------------------------------------------------------ files that cannot be used

def test_a_missing_file_is_named_and_the_command_can_be_given_again(bad, good, tmp_path):
    bad(['tokenizer', 'own', 'text=txet.txt', *TINY, run_dir(tmp_path)],
        'txet.txt: no such file or folder', "did you mean 'text.txt'")
    out = good('tokenizer', 'own', 'text=text.txt', *TINY, run_dir(tmp_path))
    assert 'pieces in' in out, 'a typing mistake does not occupy the run directory'


def test_an_empty_file_a_blank_file_and_an_empty_folder(bad, tmp_path):
    (tmp_path/'empty.txt').touch()
    (tmp_path/'blank.txt').write_text('\n \n')
    (tmp_path/'folder').mkdir()
    for name, words in {'empty.txt': 'the file is empty', 'blank.txt': 'blank.txt: no',
                        'folder': 'no file in this folder'}.items():
        bad(['tokenizer', 'own', f'text={tmp_path/name}', *TINY, run_dir(tmp_path)], name, words)


def test_an_unreadable_file(bad, tmp_path):
    (tmp_path/'memory.txt').symlink_to('/proc/self/mem')  # opens, but cannot be read, even by root
    if not Path('/proc/self/mem').exists(): pytest.skip('there is no /proc on this system')
    bad(['tokenizer', 'own', f'text={tmp_path/"memory.txt"}', *TINY, run_dir(tmp_path)],
        'memory.txt: cannot be read')
    (tmp_path/'picture.png').write_bytes(b'\x89PNG')
    bad(['tokenizer', 'own', f'text={tmp_path/"picture.png"}', *TINY, run_dir(tmp_path)],
        "unknown kind of file '.png'", '.jsonl')


def test_a_file_without_permission(bad, tmp_path):
    (tmp_path/'secret.txt').write_text('x\n')
    (tmp_path/'secret.txt').chmod(0)
    if os.access(tmp_path/'secret.txt', os.R_OK): pytest.skip('this user may read everything')
    bad(['tokenizer', 'own', f'text={tmp_path/"secret.txt"}', *TINY, run_dir(tmp_path)],
        'secret.txt: cannot be read: Permission denied')


def test_text_that_is_not_utf8_names_file_and_byte_and_can_be_replaced_and_counted(
        bad, good, desk, tmp_path):
    data = (desk/'text.txt').read_bytes()
    at = data.index(b'\n', 1000) + 5
    (tmp_path/'latin.txt').write_bytes(data[:at] + b'\xe9\xff ' + data[at:])
    words = ['shards', 'own', f'text={tmp_path/"latin.txt"}', *TINY]
    bad([*words, f'run_dir={tmp_path/"strict"}'], 'latin.txt', f'not UTF-8 at byte {at:,} (0xe9)',
        'errors=replace')
    good(*words, f'run_dir={tmp_path/"replace"}', 'errors=replace')
    report = read_json(tmp_path/'replace'/'text'/'report.json')[0]
    assert report['notes']['places that are not UTF-8, replaced'] == 2


def test_records_without_the_fields_say_which_were_found(bad, tmp_path):
    (tmp_path/'r.jsonl').write_text('{"headline": "a", "size": 3}\n' * 3)
    (tmp_path/'bare.csv').write_text('headline,size\na,3\n')
    for name in ('r.jsonl', 'bare.csv'):
        bad(['tokenizer', 'own', f'text={tmp_path/name}', *TINY, run_dir(tmp_path)], name,
            'the first record has: headline, size', 'set field=')
    bad(['tokenizer', 'own', f'text={tmp_path/"r.jsonl"}', 'field=body', *TINY,
         f'run_dir={tmp_path/"b"}'], "the field 'body'", 'headline, size')


def test_broken_records_are_counted_and_a_file_of_them_is_refused(bad, good, desk, tmp_path):
    lines = [json.dumps(dict(text=l)) for l in (desk/'text.txt').read_text().splitlines()]
    (tmp_path/'r.jsonl').write_text('\n'.join([*lines[:5], '{"text": ', *lines[5:]]))
    good('shards', 'own', f'text={tmp_path/"r.jsonl"}', *TINY, run_dir(tmp_path))
    report = read_json(tmp_path/'run'/'text'/'report.json')[0]
    rejected = {why: n for why, (n, _) in report['rejected'].items()}
    assert [n for why, n in rejected.items() if 'broken JSON' in why] == [1]
    assert report['rows'] == len(lines) + 1 == report['kept'] + sum(rejected.values())
    (tmp_path/'r.jsonl').write_text('{"text": \n' * 3)
    bad(['tokenizer', 'own', f'text={tmp_path/"r.jsonl"}', *TINY, f'run_dir={tmp_path/"b"}'],
        'r.jsonl')
    (tmp_path/'r.parquet').write_bytes(b'PAR1 not really')
    bad(['tokenizer', 'own', f'text={tmp_path/"r.parquet"}', *TINY, f'run_dir={tmp_path/"p"}'],
        'r.parquet: not a readable .parquet file')


def test_too_large_a_vocabulary_says_how_large_it_may_be(bad, good, tmp_path):
    words = ['tokenizer', 'own', 'text=text.txt', *TINY, run_dir(tmp_path)]
    err = bad([*words, 'vocab_size=50000'], 'vocab_size = 50000', 'the text supports at most')
    most = int(re.search(r'choose (\d+) or fewer', err)[1])
    out = good(*words, f'vocab_size={most}')
    assert f'{most} pieces' in out, 'the advice is sound, and can be followed in the same folder'


def test_too_little_text_says_so(bad, tmp_path):
    words = ', '.join(f'number {i} comes before number {i + 1}' for i in range(60))
    (tmp_path/'one.txt').write_text(f'One line alone is too little for two parts: {words}.\n')
    small = [w for w in TINY if not w.startswith('vocab_size')]
    bad(['pretrain', 'own', f'text={tmp_path/"one.txt"}', *small, 'vocab_size=290', 'clean=none',
         run_dir(tmp_path)], 'one.txt', 'valid_share')


def test_a_context_longer_than_the_text(bad, tmp_path):
    (tmp_path/'few.txt').write_text(''.join(f'line {i} of a few\n' for i in range(40)))
    odd = 'vocab_size', 'context', 'batch_tokens', 'pretrain', 'sft'
    small = [w for w in TINY if not w.startswith(odd)]
    bad(['pretrain', 'own', f'text={tmp_path/"few.txt"}', *small, 'vocab_size=285', 'context=4096',
         'batch_tokens=4096', run_dir(tmp_path)],
        'one window of context 4096', 'lower context')


# ------------------------------------------------------------------ two files, and what answers

@pytest.fixture(scope='module')
def trained(desk):
    "`lm-nb run own` on the two files, once: what it said, and its words"
    words = ['own', 'text=text.txt', 'instructions=ask.json', *TINY, 'replay=0.25']
    done = shell(desk, 'run', *words)
    assert done.returncode == 0, done.stderr
    return desk/'runs'/'own', words, done


def test_run_makes_everything_and_says_where(trained):
    run, _, done = trained
    for name in '''recipe.json results.json tokenizer/tokenizer.model shards/train/index.json
                   shards/valid/index.json base/model.safetensors chat/model.safetensors'''.split():
        assert (run/name).is_file(), name
    for pattern in ('pretrain/events*', 'sft/events*', 'pretrain/checkpoints/step-*'):
        assert list(run.glob(pattern)), pattern
    for words in (str(run), 'bits per byte', 'lm-nb chat own', 'TensorBoard'):
        assert words in done.stdout, words
    for words in ('pretrain', 'tok/s', 'loss='):
        assert words in done.stderr, 'a bar with speed and loss'
    results = read_json(run/'results.json')
    assert results['recipe'] == read_json(run/'recipe.json')
    assert results['base']['heldout']['bits_per_byte'] > 0
    assert results['pretrain']['tokens'] == 3840 and results['sft']['tokens'] == 1920
    assert len(results['dialogues']) == 3


def test_run_again_is_a_no_op_that_says_the_same(trained, good):
    run, words, done = trained
    before = photo(run)
    assert good('run', *words) == done.stdout and photo(run) == before


def test_stages_again_are_no_ops(trained, good):
    run, words, _ = trained
    before = photo(run/'tokenizer') | photo(run/'shards') | photo(run/'base')
    assert 'pieces in' in good('tokenizer', *words)
    assert 'tokens' in good('shards', *words)
    assert 'base model in' in good('pretrain', *words)
    assert photo(run/'tokenizer') | photo(run/'shards') | photo(run/'base') == before


def test_evaluate_measures_both_models(trained, good):
    run, words, _ = trained
    got = json.loads(good('evaluate', *words, 'json=true'))
    kept = read_json(run/'results.json')
    for keys in (('base', 'heldout', 'bits_per_byte'), ('chat', 'heldout_answers', 'loss')):
        now, before = (reduce(dict.get, keys, scores) for scores in (got, kept))
        assert now == pytest.approx(before, rel=1e-4), keys
    again = json.loads(good('evaluate', 'own', 'device=cpu', 'json=true'))
    assert again == got, 'the run knows what it was made with'
    table = good('evaluate', run)
    assert f'{got["base"]["heldout"]["bits_per_byte"]:.3f}' in table and '{' not in table, table


def test_generate_continues_the_prompt(trained, good):
    words = 'generate', 'own', 'prompt=Ada came'
    one = good(*words, 'max_new=12')
    assert one.startswith('Ada came') and one == good(*words, 'max_new=12')
    warm = [good(*words, 'max_new=12', 'temperature=2', f'seed={s}') for s in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    assert good(*words, 'model=chat', 'max_new=3').startswith('Ada came')


def test_generate_and_chat_refuse_what_cannot_be(trained, bad):
    bad(['generate', 'own', 'prompt=Ada', 'temperature=hot'], 'temperature = hot',
        'expected a number')
    bad(['generate', 'own', 'prompt=Ada', 'temprature=1'], "unknown key 'temprature'",
        "did you mean 'temperature'")
    bad(['generate', 'own', 'prompt=Ada', 'top_p=2'], 'top_p = 2.0')
    bad(['generate', 'own', 'prompt=Ada', 'max_new=0'], 'max_new = 0')
    bad(['generate', 'own', 'prompt=' + 'Ada came to 林城. ' * 30], 'context = 48')
    bad(['generate', 'own', 'prompt=Ada', 'device=tpu'], 'device = tpu')
    bad(['chat', 'own', 'colour=red'], "unknown key 'colour'")


def test_chat_answers_each_piped_line_and_ends_with_them(trained):
    asks = [b'When did Ada come to this town?\n', b'much too long ' * 100 + b'\n', b' \n',
            b'caf\xe9?\n', 'Hello, 林城\n'.encode()]
    done = shell(trained[0].parent.parent, 'chat', 'own', 'max_new=8', input=b''.join(asks),
                 text=False, env={'PYTHONIOENCODING': 'utf-8:strict'})
    assert done.returncode == 0 and b'Traceback' not in done.stderr, done.stderr.decode()
    answers = done.stdout.decode().split('\n\n')
    assert len(answers) == 5 and 'the model reads at most 48' in answers[1] and answers[4] == ''


@pytest.mark.skipif(sys.platform == 'win32', reason='needs a pseudo-terminal')
def test_chat_at_a_terminal_edits_lines_and_outlives_an_empty_one(trained):
    "The arrow key brings a question back; an empty line asks nothing; Ctrl-D ends"
    import pty
    person, machine = pty.openpty()
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'TERM': 'xterm',
           'LC_ALL': 'C.UTF-8'}
    with subprocess.Popen([*LM_NB, 'chat', 'own', 'max_new=4'], cwd=trained[0].parent.parent,
                          env=env, stdin=machine, stdout=machine, stderr=machine) as job:
        os.close(machine)
        guard = threading.Timer(120, job.kill)  # rather a failure than a test that waits for ever
        guard.start()
        said, todo = b'', [b'Hello, \xe6\x9e\x97\n', b'\n', b'\x1b[A\n', b'\x04']
        try:
            while part := os.read(person, 4096):
                said += part
                if todo and said.endswith((b'> ', b'> \x1b[?2004h')): os.write(person, todo.pop(0))
        except OSError: pass  # the other end is closed
        finally: os.close(person), guard.cancel()
    said = said.decode(errors='replace')
    assert job.returncode == 0 and not todo and said.count('> Hello, 林') == 2, said


def test_a_run_directory_of_another_recipe_is_refused_and_untouched(trained, bad):
    run, words, _ = trained
    for stage in ('run', 'tokenizer', 'pretrain', 'sft', 'evaluate'):
        bad([stage, *words, 'lr=0.01'], str(run), 'holds the run of another recipe', 'pretrain.lr',
            '0.01 now', 'run_dir=')
    bad(['run', 'micro', f'run_dir={run}'], 'holds the run of another recipe')


def test_a_damaged_model_is_named(trained, bad, tmp_path):
    run, _, _ = trained
    copy = shutil.copytree(run, tmp_path/'run')
    weights = copy/'chat'/'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1])
    bad(['chat', 'own', f'run_dir={copy}'], 'model.safetensors')
    (copy/'base'/'config.json').unlink()
    bad(['generate', 'own', f'run_dir={copy}', 'prompt=x'], 'config.json')


def test_sft_without_a_base_model_or_records(trained, bad, tmp_path):
    run, words, _ = trained
    words = of_base(words)
    bad(['sft', *words, run_dir(tmp_path)], 'no model to start sft from', 'lm-nb pretrain own')
    assert not list((tmp_path/'run').glob('*/')), 'said before anything is read or made'
    alone = [w for w in words if not w.startswith('text')]
    bad(['run', *alone, f'run_dir={tmp_path/"c"}'], 'no model to start sft from', 'set text=')
    assert not list((tmp_path/'c').glob('*/')), 'said before anything is read or made'
    bare = [w for w in words if not w.startswith('instructions')]
    bad(['sft', *bare, f'base={run/"base"}', f'run_dir={tmp_path/"b"}'], 'no instruction records',
        'instructions=')
    bad(['sft', *words, f'base={tmp_path/"nowhere"}', f'run_dir={tmp_path/"c"}'], 'nowhere',
        'base=')


def test_a_context_longer_than_the_base_models(trained, bad, tmp_path):
    run, words, _ = trained
    words = of_base(words)
    longer = [w for w in words if not w.startswith('context')]
    bad(['sft', *longer, 'context=96', f'base={run/"base"}', run_dir(tmp_path)],
        "context = 96 is longer than the base model's 48", 'context=48')


def test_instruction_records_without_the_fields(trained, bad, tmp_path):
    run, words, _ = trained
    words = of_base(words)
    (tmp_path/'r.jsonl').write_text('{"headline": "a", "size": 3}\n' * 3)
    (tmp_path/'empty.jsonl').touch()
    mine = [w for w in words if not w.startswith('instructions')] + [f'base={run/"base"}']
    bad(['sft', *mine, f'instructions={tmp_path/"r.jsonl"}', f'run_dir={tmp_path/"a"}'], 'r.jsonl',
        'headline, size')
    bad(['sft', *mine, f'instructions={tmp_path/"empty.jsonl"}', f'run_dir={tmp_path/"b"}'],
        'empty.jsonl', 'empty')
    bad(['sft', *mine, f'instructions={tmp_path/"none.jsonl"}', f'run_dir={tmp_path/"c"}'],
        'none.jsonl: no such file')


def test_prompts_that_leave_no_room_are_dropped_and_counted(trained, good, bad, tmp_path):
    run, words, _ = trained
    words = of_base(words)
    asks = read_json(run.parent.parent/'ask.json')
    long = [dict(instruction=f'{i} ' + 'When did Ada come to this town? ' * 9, output='Never.')
            for i in range(60)]
    (tmp_path/'mixed.json').write_text(json.dumps(asks + long))
    (tmp_path/'long.json').write_text(json.dumps(long))
    odd = 'instructions', 'replay'
    mine = [w for w in words if not w.startswith(odd)] + [f'base={run/"base"}']
    good('sft', *mine, f'instructions={tmp_path/"mixed.json"}', f'run_dir={tmp_path/"a"}')
    report = read_json(tmp_path/'a'/'packed'/'train-report.json')
    dropped = {why: n for why, (n, _) in report['rejected'].items()}
    no_room = 'prompt leaves no room for an answer in 49 tokens'
    assert report['rows'] == report['kept'] + sum(dropped.values())
    assert set(dropped) == {no_room}
    assert 40 <= dropped[no_room] <= 60, 'all but the held-out ones'
    bad(['sft', *mine, f'instructions={tmp_path/"long.json"}', f'run_dir={tmp_path/"b"}'],
        'no example to write that fits into 48 tokens')


def test_held_out_records_that_are_all_too_long_do_not_stop_training(trained, good, tmp_path):
    run, words, _ = trained
    words = of_base(words)
    long = [dict(instruction=f'{i} ' + 'When did Ada come to this town? ' * 9, output='Never.')
            for i in range(3)]
    (tmp_path/'long.json').write_text(json.dumps(long))
    mine = [w for w in words if not w.startswith('replay')]
    mine += [f'base={run/"base"}', f'instructions_valid={tmp_path/"long.json"}', run_dir(tmp_path)]
    assert 'chat model in' in good('sft', *mine)


def test_replay_without_a_text_is_said(trained, good, tmp_path):
    run, words, _ = trained
    words = of_base(words)
    mine = [w for w in words if not w.startswith('text')]
    good('sft', *mine, f'base={run/"base"}', run_dir(tmp_path), says='there is no text to replay')


# ------------------------------------------------------------------ real text

@pytest.mark.skipif(not (DATA/'wiki_demo.txt').exists(),
                    reason='the shared demo data is not beside this repository')
def test_real_files_by_path(good, tmp_path):
    words = ['own', f'text={DATA/"wiki_demo.txt"}', f'instructions={DATA/"alpaca_zh_demo.json"}',
             'vocab_size=3000', 'max_documents=400', run_dir(tmp_path)]
    assert good('tokenizer', *words).startswith('3000 pieces')
    out = good('shards', *words)
    sizes = re.findall(r'(?:train|valid): ([\d,]+) tokens', out)
    train, valid = (int(n.replace(',', '')) for n in sizes)
    assert train > valid > 0
    from lm_nb.data.shards import Shards
    from lm_nb.data.tokenizer import Tokenizer
    tok = Tokenizer.load(tmp_path/'run'/'tokenizer'/'tokenizer.model')
    ids = Shards(tmp_path/'run'/'shards'/'train', tok).tokens(0, 30_000).tolist()
    first = tok.decode(ids[:ids.index(tok.eos)])
    whole = (DATA/'wiki_demo.txt').read_text(encoding='utf-8')
    assert first in whole, 'a document comes back to the letter'


def test_an_error_at_the_shell(at_desk):
    "Exit status, one line, no traceback, where torch was loaded and bars were drawn"
    done = shell(at_desk, 'tokenizer', 'own', 'text=text.txt', *TINY, 'vocab_size=9999',
                 'run_dir=shell')
    assert done.returncode == 2 and done.stdout == ''
    one_line(done.stderr, 'vocab_size = 9999')


# ------------------------------------------------------------------ files of other people

HILLS = '青白黑红金银玉石铁木水火云雪雷风春夏秋冬'
CLIMB = '登山的人从东边上去，走了三天三夜。' * 2
BAIKE = [dict(title=f'{p}山', summary=f'{p}山是一座山，在城的北边，第{i}高。',
              sections=[dict(title='历史', content=f'{p}山在一八{i:02}年才有人登上，{CLIMB}'),
                        dict(title='地理',
                             content=f'山高{1000 + 37*i}米，山上有{i}条小河和许多松树。')])
         for i, p in enumerate(HILLS)]
WIKI = ('<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="en">'
        '{}</mediawiki>')
PAGE = ('<page><title>{}</title><ns>{}</ns><id>{}</id><revision><id>1</id>'
        '<model>wikitext</model><format>text/x-wiki</format>'
        '<text xml:space="preserve">{}</text></revision></page>')
TOWN = """'''{0}''' is a [[town]] on the [[River {1}|river]].{{{{Infobox town|pop={1}}}}}

== History ==
It was founded in {1}. {2}

[[Category:Towns]]"""
TOLD = ['Its market is known for lanterns.', 'A painter lived there.',
        'The old bridge was built twice.', 'Nobody remembers why.', 'Winters are long.']


def wiki_dump():
    "A dump of 24 pages: 20 articles, a redirect, a talk page, a template and an empty page"
    def town(i):
        told = ' '.join(f'{TOLD[(i + k) % 5]} {i}{k}' for k in range(4))
        return PAGE.format(f'Town {i}', 0, i, TOWN.format(f'Town {i}', 1700 + 7*i, told))
    odd = [PAGE.format('Old name', 0, 90, '#REDIRECT [[Town 1]]'),
           PAGE.format('Talk:Town 1', 1, 91, 'I think so.'),
           PAGE.format('Template:Infobox', 10, 92, 'x'), PAGE.format('Blank', 0, 93, '')]
    return WIKI.format(''.join([*map(town, range(20)), *odd]))


def counts(text):
    "rows, kept and rejected of each report that was printed"
    def numbers(label):
        found = re.finditer(rf'^ *{label} +([\d,]+)|^ *([\d,]+)  {label}', text, re.M)
        return [int((m[1] or m[2]).replace(',', '')) for m in found]
    return numbers('rows read'), numbers('kept')


def asked(i):
    "A conversation of two turns"
    said = f'Who is {i}?', f'I am {i}.', 'And then?', f'Then comes {i + 1}.'
    return dict(messages=[dict(role=role, content=content)
                          for role, content in zip(('user', 'assistant') * 2, said)])


def alpaca():
    "30 records, and one without an answer"
    return [*(dict(instruction=f'Say {i}', output=f'{i}!') for i in range(30)),
            dict(instruction='?')]


def json_lines(records): return '\n'.join(json.dumps(r, ensure_ascii=False) for r in records)


@pytest.mark.parametrize('name, content, rows, kept', [
    ('towns.xml.bz2', bz2.compress(wiki_dump().encode()), 24, 20),
    ('baike.json', json_lines(BAIKE).encode(), 20, 20),
    ('alpaca.json', json.dumps(alpaca()).encode(), 31, 30),
    ('messages.jsonl.gz', gzip.compress(json_lines(map(asked, range(30))).encode()), 30, 30)],
    ids=['wiki', 'baike', 'alpaca', 'messages'])
def test_files_are_reported_on_and_become_token_files(good, tmp_path, name, content, rows, kept):
    (tmp_path/name).write_bytes(content)
    told = good('corpus', 'report', tmp_path/name)
    assert [n[0] for n in counts(told)] == [rows, kept], told
    made = good('shards', tmp_path/name, f'run_dir={tmp_path/"run"}', 'vocab_size=300',
                'valid_share=0.1')
    if read_json(tmp_path/'run'/'recipe.json')['data']['instructions']:
        assert 'filled' in made and (tmp_path/'run'/'packed'/'train'/'index.json').exists()
    else:
        assert re.search(r'train: [\d,]+ tokens', made)
        report = read_json(tmp_path/'run'/'text'/'report.json')[0]
        rejected = sum(n for n, _ in report['rejected'].values())
        assert (report['rows'], report['kept'], rejected) == (rows, kept, rows - kept)


def test_all_sections_of_an_encyclopaedia_article_are_kept(good, desk, tmp_path):
    (tmp_path/'baike.json').write_text(json_lines(BAIKE), encoding='utf-8')
    good('shards', tmp_path/'baike.json', f'run_dir={tmp_path/"run"}', 'vocab_size=300',
         'valid_share=0.1')
    docs = [json.loads(l)['text'] for p in (tmp_path/'run'/'text').glob('*.jsonl')
            for l in p.read_text(encoding='utf-8').splitlines()]
    by = {d.split('\n')[0]: d for d in docs}
    for r in BAIKE:
        sections = [x['content'] for x in r['sections']]
        assert all(s in by[r['title']] for s in [r['summary'], *sections])


def test_questions_inside_the_text_are_found(good, desk, tmp_path):
    ask = 'In which year did the {} society open its first library in the harbour?'
    asks = [dict(instruction=ask.format(w), output='1870.') for w in ('lantern', 'silver')]
    (tmp_path/'ask.json').write_text(json.dumps(asks))
    quiz = f'A page of a quiz. {ask.format("silver")} Nobody knew.'
    (tmp_path/'text.txt').write_text(
        f'{quiz}\nThe northern society was large and old and had many halls.\n')
    told = good('corpus', 'report', tmp_path/'text.txt', f'questions={tmp_path/"ask.json"}')
    assert 'silver' in told and 'lantern' not in told


def test_corpus_says_what_it_wants(bad, tmp_path):
    bad(['corpus', 'reprot', 'text.txt'], "'reprot'", 'lm-nb corpus report FILE')
    bad(['corpus', 'report'], 'which files?')
    bad(['corpus', 'report', 'text.txt', 'dedup=nearly'], 'dedup = nearly',
        'expected near, exact, none')
    bad(['corpus', 'report', 'tetx.txt'], 'tetx.txt: no such file', "did you mean 'text.txt'")
    bad(['shards', 'tetx.txt'], 'tetx.txt: no such file')
    (tmp_path/'short.txt').write_text('Hm.\nNo.\n')
    bad(['corpus', 'report', tmp_path/'short.txt'], 'nothing in these files can be trained on')


def test_a_run_on_text_alone_does_not_answer(bad, tmp_path):
    from lm_nb.training.recipe import load_recipe
    from lm_nb.training.run import Run
    run = Run(load_recipe('own', ['text=text.txt']), tmp_path/'run')
    bad(['chat', 'own', f'run_dir={run.folder}'], 'no chat model', 'lm-nb generate')


def test_bench_measures_by_name_and_refuses_others(bad, desk):
    done = shell(ROOT, 'bench', 'resume')
    assert done.returncode == 0, done.stderr
    assert 'ms' in done.stdout and 'resume (1 of 1)' in done.stderr, done.stderr
    bad(['bench', 'resumee'], "no benchmark 'resumee'", "did you mean 'resume'", 'tokenizing')
    bad(['bench', 'resume', 'colour=red'], 'colour')


# ------------------------------------------------------------------ only the package

@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "The package as a wheel lays it out, without its repository"
    site = tmp_path_factory.mktemp('site')
    skip = shutil.ignore_patterns('__pycache__')
    shutil.copytree(Path(lm_nb.__file__).parent, site/'lm_nb', ignore=skip)
    code = ('import runpy, setuptools; from setuptools.dist import Distribution\n'
            'seen = {}; setuptools.setup = lambda **kw: seen.update(kw)\n'
            f'runpy.run_path({str(ROOT/"setup.py")!r})\n'
            'build = seen["cmdclass"]["build_py"](Distribution())\n'
            f'build.build_lib, build.editable_mode = {str(site)!r}, False\n'
            'type(build).__mro__[1].run = lambda self: None\nbuild.run()\n')
    subprocess.run([sys.executable, '-c', code], check=True)
    return site


def alone(site, cwd, *argv, **env):
    "A command of the installed package"
    env = {**os.environ, 'PYTHONPATH': str(site), 'OMP_NUM_THREADS': '1', **env}
    return subprocess.run([*LM_NB, *map(str, argv)], cwd=cwd, env=env, capture_output=True,
                          text=True)


SMALL = '''paraphrases=1 vocab_size=600 n_layer=1 n_head=2 d_model=32 d_ff=64 context=96 replay=0
           batch_tokens=960 pretrain.tokens=1920 device=cpu dtype=fp32'''.split()


def test_the_package_works_without_its_repository(installed, tmp_path):
    "Recipes and lists travel along; the run lies where one is"
    done = alone(installed, tmp_path, 'pretrain', 'micro', *SMALL)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'runs'/'micro'/'base'/'model.safetensors').is_file()
    done = alone(installed, tmp_path, 'generate', 'run_dir=runs/micro', 'prompt=The', 'max_new=2')
    assert done.returncode == 0 and done.stdout.startswith('The'), done.stderr
    made = alone(installed, tmp_path, 'init')
    assert made.returncode == 0 and 'micro' in made.stdout
    mine = tmp_path/'settings.ini'
    assert mine.read_bytes() == (ROOT/'settings.ini').read_bytes()
    mine.write_text('[mine]\ntext = a.txt\n')
    again = alone(installed, tmp_path, 'init')
    assert again.returncode == 2 and mine.read_text() == '[mine]\ntext = a.txt\n'
    one_line(again.stderr, str(mine), 'stays as it is')


def test_a_recipe_with_a_mistake_spoils_only_itself(tmp_path, monkeypatch, capsys):
    settings = (ROOT/'settings.ini').read_text(encoding='utf-8')
    (tmp_path/'settings.ini').write_text(settings + '\n[lost]\nlike = owm\n[round]\nlike = round\n'
                                         '[bare]\nlike = own\ntext\n', encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    def said(*argv):
        status = main([*argv])
        return status, ''.join(capsys.readouterr())
    assert said('recipe', 'micro')[0] == 0
    assert 'lost, round, bare' in ' '.join(said('--help')[1].split())
    for name, words in dict(lost="did you mean 'own'", round='in a circle',
                            bare="[bare]: 'text' has no value").items():
        status, text = said('recipe', name)
        assert status == 2 and words in text and len(text.splitlines()) == 1, text
    status, text = said('chat', 'own')
    assert status == 2 and 'no chat model' in text, text


# ------------------------------------------------------------------ going on by the name

def test_a_run_goes_on_by_its_name_or_its_folder(trained, good, tmp_path, monkeypatch):
    run, words, done = trained
    before = photo(run)
    elsewhere = shutil.copytree(run, tmp_path/'else where')
    for argv in (['run', 'own'], ['run', run], ['run', 'own', f'run_dir={run}'],
                 ['run', f'run_dir={run}'], ['run', 'own', 'text=text.txt', 'n_layer=1']):
        assert good(*argv) == done.stdout, argv
        assert photo(run) == before, argv
    assert str(elsewhere) in good('run', elsewhere)
    for stage in ('pretrain', 'sft', 'tokenizer', 'shards'): good(stage, elsewhere)
    assert good('generate', elsewhere, 'prompt=Ada', 'max_new=3').startswith('Ada')
    monkeypatch.chdir(run.parent)
    assert good('evaluate', elsewhere).startswith('held out')
    assert re.search(r'^  text +text\.txt .* \*$', good('recipe', elsewhere, 'text=text.txt'), re.M)


def test_a_run_that_goes_on_takes_runtime_keys_and_refuses_others(trained, good, bad, tmp_path,
                                                                  capsys):
    run, words, _ = trained
    copy = shutil.copytree(run, tmp_path/'run')
    good('pretrain', 'own', 'log_every=7', f'run_dir={copy}')
    recipe = read_json(copy/'recipe.json')
    assert recipe['pretrain']['log_every'] == 7 and recipe['model']['n_layer'] == 1
    for name in ('own', copy):
        where = [f'run_dir={copy}'] if name == 'own' else []
        err = bad(['pretrain', name, 'n_layer=2', *where], 'holds the run of another recipe',
                  'model.n_layer: 1 there, 2 now')
        assert 'd_model' not in err, 'only what was asked for differs'
    bad(['pretrain', 'micro', f'run_dir={copy}'], 'holds the run of another recipe', 'own')
    bad(['pretrain', tmp_path/'nowhere'], 'is no folder of a run')
    bad(['pretrain', 'nowhere'], "no recipe 'nowhere'")
    bad(['pretrain', f'run_dir={tmp_path/"nowhere"}'], 'is no folder of a run')
    bad(['evaluate', 'own', 'text=text.txt', f'run_dir={tmp_path/"nope"}'], 'nope',
        'there is no run here')
    assert not (tmp_path/'nope').exists() and not (tmp_path/'nowhere').exists()


def test_a_recipe_that_changed_since_is_said(tmp_path, monkeypatch, capsys, desk):
    monkeypatch.chdir(tmp_path)
    keys = '\n'.join(w for w in TINY if not w.startswith('sft.'))
    (tmp_path/'settings.ini').write_text(f'[mine]\ntext = {desk/"text.txt"}\n{keys}\n')
    assert main(['pretrain', 'mine']) == 0
    assert 'goes on with' not in capsys.readouterr().err
    made = photo(tmp_path/'runs'/'mine')
    with open(tmp_path/'settings.ini', 'a') as f: f.write('clip = 3\n')
    assert main(['pretrain', 'mine']) == 0
    err = capsys.readouterr().err
    assert 'runs/mine goes on with its recipe.json' in err and '1.0 there, 3.0 now' in err
    after = photo(tmp_path/'runs'/'mine')
    assert {k: after.get(k) for k in made} == made


# ------------------------------------------------------------------ a table of mistakes

HOSTILE = ['0', '-1', '1e9', '4e18', '1e400', '9' * 20, 'nan', '-inf', '', 'none', 'x', '1e-300',
           '1e300', '0.5', '\udcff', '"']


def all_keys():
    from lm_nb.core import part_keys, parts
    from lm_nb.training.recipe import Recipe, load_recipe
    configs = {n: type(c) for n, c in load_recipe('micro').configs.items()}
    return [f'{part}.{key}'.lstrip('.') for part, cls in {**parts(Recipe), **configs}.items()
            for key in part_keys(cls)]


@pytest.mark.parametrize('key', all_keys())
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(key, monkeypatch, capsys):
    "What `lm-nb recipe` says: the table, or one line"
    from lm_nb import cli
    monkeypatch.setattr(cli, '_docs', lambda cls: {})  # the table itself takes long
    for value in HOSTILE:
        capsys.readouterr()
        status = main(['recipe', 'micro', f'{key}={value}'])
        err = capsys.readouterr().err
        assert status == 0 if not err or err.startswith('•') else status == 2, (value, err)
        assert len(err.splitlines()) <= 1 and 'Traceback' not in err, (value, err)


@pytest.mark.parametrize('line, words', [
    ('recipe micro device=gpu', ('device = gpu', 'expected auto, cpu')),
    ('recipe micro seed=99999999999999999999', ('seed', 'beyond 64 bits')),
    ('recipe micro lr=1e400', ('lr', 'expected a number')),
    ('recipe micro n_layer=1e9', ('n_layer = 1000000000', 'at most')),
    ('plan micro ranks=0', ('ranks = 0', 'expected 1')),
    ('plan micro ranks=-1', ('ranks = -1', 'expected 1')),
    ('profile micro steps=0', ('steps = 0', 'expected 1')),
    ('recipe micro instructions=ask.json', ('instructions = ask.json has no effect', 'microworld')),
    ('recipe micro separator=blank', ('separator = blank has no effect', 'leave it out')),
    ('recipe micro weights=2', ('weights = 2 has no effect', 'one source')),
    ('recipe micro muon_lr=0.1 optimizer=adamw', ('muon_lr = 0.1 has no effect', 'muon')),
    ('recipe micro sft.muon_lr=0.1 sft.optimizer=adamw', ('sft.muon_lr = 0.1 has no effect',)),
    ('recipe micro near_threshold=0.9', ('near_threshold = 0.9 has no effect', 'dedup=near')),
    ('recipe micro arch=gpt2 zero_init=false', ('zero_init = false has no effect', 'qwen3')),
    ('recipe own text=t.txt paraphrases=3', ('paraphrases = 3 has no effect', 'microworld')),
    ('recipe own text=t.txt replay=0.1', ('replay = 0.1 has no effect', 'instructions=')),
    ('recipe own text=t.txt text_valid=v.txt valid_share=0.2', ('valid_share = 0.2 has no',)),
    ('recipe own text=t.txt instructions_test=u.json', ('instructions_test', 'no effect')),
    ('recipe own text=t.txt shard_group=2', ('shard_group = 2 has no effect', 'hsdp')),
    ('init here', ('no further words',)),
])
def test_a_value_that_cannot_be_meant_is_one_line(bad, line, words): bad(line.split(), *words)


@pytest.mark.parametrize('line', [
    'micro optimizer=adamw', 'micro paraphrases=3', 'micro valid_share=0.2', 'micro dedup=near '
    'near_threshold=0.9', 'micro muon_lr=0.1 sft.optimizer=adamw', 'own text=t.txt',
    'own text=t.txt optimizer=adamw', 'own text=t.txt arch=gpt2', 'micro-one arch=gpt2',
    'own text=a.txt instructions=b.json replay=0.3 tokenizer_reads=both', 'poems optimizer=adamw'])
def test_a_key_that_does_something_or_is_inherited_is_taken(good, line):
    good('recipe', *line.split())


def test_a_recipe_marks_what_it_sets(good):
    rows = {m[1]: bool(m[2]) for m in re.finditer(r'^  (\S+) .*?( \*)?$', good(
        'recipe', 'micro-one', 'beta1=0.8').partition('\nsft\n')[0], re.M)}
    set_ = {key for key, mark in rows.items() if mark}
    assert {'groups', 'n_layer', 'tokens', 'beta1', 'text'} <= set_, 'inherited ones, too'
    assert not {'minutes', 'beta2', 'field', 'n_kv_head'} & set_, 'shared ones have no mark'


def test_processes_are_bounded_and_it_is_said(at_desk, capsys):
    assert main(['recipe', 'micro', 'clean_workers=1000']) == 0
    out, err = capsys.readouterr()
    assert err.count('clean_workers = 1000') == 1
    assert int(re.search(r'clean_workers +(\d+)', out)[1]) <= os.cpu_count()


def test_files_in_a_folder_with_blanks(good, tmp_path, monkeypatch, desk):
    folder = tmp_path/'my dir'
    folder.mkdir()
    (folder/'a b.txt').write_text(''.join(f'line {i} of one file\n' for i in range(60)))
    (folder/'c.txt').write_text(''.join(f'row {i} of another\n' for i in range(60)))
    monkeypatch.chdir(folder)
    out = good('shards', 'a b.txt', 'c.txt', 'vocab_size=290', 'context=16', 'clean=light',
               'valid_share=0.1', 'dedup=exact', f'run_dir={tmp_path/"run dir"}')
    assert re.search('train: .* 10[0-9] documents', out), out


def test_a_key_without_effect_beside_the_one_that_decides(tmp_path, monkeypatch, capsys):
    (tmp_path/'settings.ini').write_text('[a]\ntext = t\noptimizer = adamw\nmuon_lr = 0.5\n'
                                         '[b]\ntext = t\nmuon_lr = 0.5\n'
                                         '[c]\nlike = b\noptimizer = adamw\n')
    monkeypatch.chdir(tmp_path)
    assert [main(['recipe', name]) for name in 'abc'] == [2, 0, 0]
    assert 'settings.ini [a]: muon_lr = 0.5 has no effect' in capsys.readouterr().err


# ------------------------------------------------------------------ names, locales and streams

ODD = os.fsdecode(b'\xc4\xe3')  # a name in GBK


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems refuse such names themselves')
def test_names_that_are_not_utf8(at_desk, bad, tmp_path):
    shutil.copy('text.txt', tmp_path/f'{ODD}.txt')
    words = [w for w in TINY if not w.startswith('sft.')]
    source = f'text={tmp_path/ODD}.txt'
    bad(['pretrain', 'own', source, *words, run_dir(tmp_path)], 'rename the file')
    bad(['pretrain', 'own', 'text=text.txt', *words, f'run_dir={tmp_path/ODD}'], 'run_dir = ',
        'not UTF-8')
    bad(['recipe', 'own', 'text=t.txt', f'{ODD}=3'], 'unknown key')


def test_a_locale_without_utf8(desk, trained):
    env = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONIOENCODING='ascii')
    for argv in (['recipe', 'micro'], ['--help'], ['evaluate', 'own', 'json=true'], ['run', 'own'],
                 ['generate', 'own', 'prompt=Ada', 'max_new=3']):
        done = shell(desk, *argv, env=env)
        assert done.returncode == 0 and 'Traceback' not in done.stderr, (argv, done.stderr)


@pytest.mark.skipif(os.name != 'posix', reason='needs a shell that closes streams')
@pytest.mark.parametrize('closed', ['2>&-', '>&-', '<&-', '<&- >&- 2>&-'])
def test_absent_streams(desk, tmp_path, closed):
    "They cost nothing, and no file takes their place"
    words = [w for w in TINY if not w.startswith('sft.')] + ['text=text.txt', run_dir(tmp_path)]
    home = Path(lm_nb.__file__).resolve().parent.parent
    env = {**os.environ, 'PYTHONPATH': str(home), 'OMP_NUM_THREADS': '1'}
    env.pop('IN_TEST', None)
    done = subprocess.run(['sh', '-c', f'"$@" {closed}', 'sh', *LM_NB, 'pretrain', 'own', *words],
                          cwd=desk, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    assert (tmp_path/'run'/'base'/'model.safetensors').is_file()
    done = subprocess.run(['sh', '-c', f'"$@" {closed}', 'sh', *LM_NB, 'pretrain', 'owm'], cwd=desk,
                          env=env, capture_output=True, text=True)
    assert done.returncode == 2


def test_a_full_disk_under_standard_output(desk):
    if not Path('/dev/full').exists(): pytest.skip('no /dev/full here')
    with open('/dev/full', 'w') as full:
        done = subprocess.run([*LM_NB, 'recipe', 'micro'], cwd=desk, stdout=full, text=True,
                              stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 2
    one_line(done.stderr, 'No space left')


def test_two_processes_at_one_tokenizer(at_desk, bad, good, tmp_path):
    from lm_nb.training.run import run_lock
    words = [w for w in TINY if not w.startswith('sft.')] + ['text=text.txt', run_dir(tmp_path)]
    code = ('import sys; from lm_nb.training.run import run_lock\n'
            'with run_lock(sys.argv[1]): print("held", flush=True); sys.stdin.read()')
    for command in ('tokenizer', 'shards'):
        with subprocess.Popen([sys.executable, '-c', code, str(tmp_path/'run')], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout.readline() == 'held\n'
            bad([command, 'own', *words], 'is at work here')
            other.stdin.close()
        good(command, 'own', *words)
    with run_lock(tmp_path/'run'): pass
