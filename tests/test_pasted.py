"""What is shown can be pasted: the command line takes each command up to where work would begin,
Python runs, and the Chinese pages show the same"""
import gzip
import importlib.util
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
import tomllib
import zipfile
from pathlib import Path

import pytest

from desk import asks, facts, furnish, text
from lm_nb.cli import main
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.model.lora import add_lora, save_adapter

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = 'lm-nb', 'make', 'torchrun', 'pip', 'python', 'python3', 'jupyter', 'jupytext'


def tool(name):
    spec = importlib.util.spec_from_file_location(f'tools_{name}', ROOT/'tools'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


translate = tool('translate')


# ------------------------------------------------------------------ what is shown

def blocks(said, *kinds):
    "The fenced blocks of some kinds"
    found = re.findall(r'^```(\w+)\n(.*?)^```', said, re.M | re.S)
    return [body for kind, body in found if kind in kinds]


def split(line):
    "The commands of a line, as words: `a b  # why` is one, `a; b && c` are three"
    lexer = shlex.shlex(line, posix=True, punctuation_chars='&;|')
    lexer.whitespace_split = True
    out = [[]]
    for word in lexer:
        if set(word) <= set('&;|'): out.append([])
        else: out[-1].append(word)
    return [words for words in out if words]


def commands(said):
    "The commands that a text shows, in blocks and in its sentences, in their order"
    lines = '\n'.join(blocks(said, 'bash', 'sh')).replace('\\\n', ' ').splitlines()
    spans = re.findall(r'`([^`\n]+ [^`\n]+)`', translate.without_code(said))
    return [words for line in [*lines, *(s for s in spans if s.split()[0] in PROGRAMS)]
            for words in split(line.removeprefix('$ '))]


def pages(lang):
    "Page -> {cell: what it says}"
    name = 'README.md' if lang == 'en' else 'README.zh.md'
    found = {str(path): translate.english(nb) if lang == 'en' else translate.chinese(path)
             for path, nb in translate.notebooks().items()}
    return found | {'README': {'': (ROOT/name).read_text(encoding='utf-8')}}


ENGLISH, CHINESE = pages('en'), pages('zh')


def test_commands_are_seen():
    said = ('`not this`, `make x y=1`\n```bash\n$ A=1 lm-nb run a \\\n    k="b c"  # why; not\n'
            'cd x && make\n```\n```python\nmake = 1\n```')
    assert commands(said) == [['A=1', 'lm-nb', 'run', 'a', 'k=b c'], ['cd', 'x'], ['make'],
                              ['make', 'x', 'y=1']]
    assert blocks(said, 'python') == ['make = 1\n']


# ------------------------------------------------------------------ commands

POEMS = 'data/downloads/poems'
TEXT, ASKS = text(facts()), json.dumps(asks(facts()))
GIVEN = {  # files that the commands name
    'short.py': '''from lm_nb.alignment.grpo import register_reward
@register_reward('short')
def short(run): return lambda examples, answers: [0.]*len(answers)
''',
    'notes.txt': TEXT, 'wiki_demo.txt': TEXT, 'my.json': ASKS, 'alpaca_zh_demo.json': ASKS,
    'table.csv': 'text,body,正文\nA text.,B,C\n',
    'qa.csv': 'question,answer,q,a,问,答\nWho?,Me.,Q?,A.,问？,答。\n',
    **{name: ''.join(json.dumps(a) + '\n' for a in asks(facts())) for name in (
        'pairs.jsonl', 'faq.jsonl', 'belle_zh_seed_tasks.jsonl',
        f'{POEMS}/instructions-train.jsonl', f'{POEMS}/instructions-valid.jsonl',
        f'{POEMS}/instructions-test.jsonl')},
    **{f'{POEMS}/tang-{part}.jsonl': json.dumps(dict(text=TEXT)) for part in ('train', 'valid')},
    'dpo_zh_demo.json': json.dumps([dict(prompt='Who?', chosen='Me.', rejected='You.')]*20)}

DOCX = ('<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body>'
        '<w:p><w:r><w:t>A text.</w:t></w:r></w:p></w:body></w:document>')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A folder where `micro` is a recipe of seconds, which has been run"
    folder = furnish(tmp_path_factory.mktemp('trained'), {
        'minutes': 'none', 'context': 64, 'batch_tokens': 320, 'pretrain.tokens': 640,
        'sft.tokens': 640, 'warmup': 1})
    settings = folder/'settings.ini'
    settings.write_text(settings.read_text().replace('[tiny]', '[micro]'))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        m.setenv('IN_TEST', '1')
        assert main(['run', 'micro']) == 0
    recipe = shutil.copytree(folder/'runs/micro', folder/'runs/own')/'recipe.json'
    recipe.write_text(recipe.read_text().replace('"micro"', '"own"'))
    return folder


@pytest.fixture(scope='module')
def desk(trained, tmp_path_factory):
    "A reader's folder: the workbook's recipes, files, and what was trained before"
    folder = tmp_path_factory.mktemp('desk')
    for name in ('settings.ini', 'grids.ini'): shutil.copy(ROOT/name, folder)
    with open(folder/'settings.ini', 'a', encoding='utf-8') as f:
        f.write('\n[RECIPE]\nlike = micro\n[NAME]\nlike = micro\n[名字]\nlike = micro\n')
    for name, said in GIVEN.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_text(said, encoding='utf-8')
    (folder/'my.jsonl.gz').write_bytes(gzip.compress(json.dumps(dict(text=TEXT)).encode()))
    (folder/'reports').mkdir()
    for name in ('notes.docx', 'reports/one.docx'):
        with zipfile.ZipFile(folder/name, 'w') as docx: docx.writestr('word/document.xml', DOCX)
    data = shutil.ignore_patterns('text', 'records', 'shards', 'packed', 'pretrain', 'sft')
    shutil.copytree(trained/'runs', folder/'runs', ignore=data)
    for name in ('runs/zero', 'runs/finetune', 'my_model', 'FOLDER'):
        shutil.copytree(folder/'runs/micro', folder/name)
    gpt = GPT(GPTConfig(vocab_size=330, context=64, n_layer=1, n_head=2, d_model=32))
    save_adapter(folder/'adapter', add_lora(gpt, 2), str(folder/'runs/micro/chat'))
    for file in (folder/'adapter').iterdir(): shutil.copy(file, folder/'FOLDER')
    return folder


class Begins(BaseException): "Here the work would begin"


WORK = '''workbook.run_all workbook.evaluate_stage training.stage.run_stage bench.plan.plan_run
          bench.profiling.profile_recipe bench.measure._run bench.scaling.sweep
          bench.shakespeare.fetch_shakespeare data.poems.fetch_poems data.prepare.write_microworld
          data.prepare.write_values inference.choice.score_files use.export.load_model
          use.serve.serve_models'''.split()


@pytest.fixture
def at_desk(desk, tmp_path, monkeypatch):
    "A copy of the folder, where commands stop before they work"
    shutil.copytree(desk, tmp_path/'desk', copy_function=os.link)  # nobody writes into a file
    monkeypatch.chdir(tmp_path/'desk')
    monkeypatch.setenv('IN_TEST', '1')
    monkeypatch.setattr('sys.stdin', io.StringIO('Hello!\n'))
    def before(f):
        def begin(*args, **keys):
            inspect.signature(f).bind(*args, **keys)
            raise Begins
        return begin
    for name in WORK:
        module, name = f'lm_nb.{name}'.rsplit('.', 1)
        work = getattr(importlib.import_module(module), name)
        monkeypatch.setattr(f'{module}.{name}', before(work))
    monkeypatch.setattr('tensorboard.program.TensorBoard.launch', before(lambda self: 0))
    # nothing is timed, and nothing downloaded
    monkeypatch.setattr('lm_nb.workbook.announce', lambda recipe: [])
    monkeypatch.setattr('lm_nb.bench.sizes.choose_sizes', lambda *args: [])
    monkeypatch.setattr('lm_nb.model.hub._fetch', lambda *args: Path('runs/micro/base').absolute())
    return tmp_path/'desk'


FOREIGN = 'jupyter', 'jupytext'  # of which only the files that they are to open are looked at
# programs whose lines are not tried, and why
NOT_TRIED = {
    'curl': 'asks the server, below', 'ssh': 'needs another machine',
    'lm_eval': 'is not installed', 'ollama': 'is not installed',
    'git': 'there is no address', 'cd': 'a folder that another command makes',
    'export': 'a value for the shell', 'source': 'an environment that another command makes',
    '.': 'an environment that another command makes', 'rm': 'what another command has made',
    'mkdir': 'makes a folder for another command'}
SCHEMES = {'lm-nb COMMAND RECIPE key=value': 'names no command',
           'lm-nb 命令 配方 键=值': 'the same', 'lm-nb bench NAME': 'names no benchmark',
           'lm-nb corpus report': 'names no file'}
FILE = {'instructions=FILE': 'instructions=pairs.jsonl', 'text=FILE': 'text=notes.txt',
        'FILE…': 'notes.txt', '…': 'text=notes.txt', 'api_key=…': 'api_key=secret'}
TRAINS = 'run', 'tokenizer', 'shards', 'pretrain', 'sft'


def taken(argv, capsys):
    "The command line takes these words; a run begins where nothing was trained before"
    argv = [FILE.get(word, word) for word in argv]
    if argv[0] == 'init': os.remove('settings.ini')
    keys = dict(word.split('=', 1) for word in argv if '=' in word)
    if argv[0] in TRAINS and argv[1:]:
        shutil.rmtree(keys.get('run_dir', f'runs/{argv[1]}'), ignore_errors=True)
    try: status = main(argv)
    except Begins: status = 0
    said = capsys.readouterr().err
    assert status == 0 and 'has no effect' not in said, said


def made(words, capsys):
    "`make` has the target, and the words of ARGS go to a command that takes them"
    env = {k: v for k, v in os.environ.items() if not k.startswith(('MAKE', 'MFLAGS'))}
    done = subprocess.run(['make', '-n', *words], cwd=ROOT, env=env, capture_output=True,
                          text=True)  # also where `make test` has begun this
    assert done.returncode == 0, done.stderr
    for argv in split(done.stdout.splitlines()[-1]):
        if argv[0].endswith('/lm-nb'): taken(argv[1:], capsys)


def launched(words, capsys):
    from torch.distributed.run import get_args_parser
    args = get_args_parser().parse_args(words)
    if args.training_script == 'lm_nb.cli': taken(args.training_script_args, capsys)


def interpreted(words, capsys):
    if words[0] == '-c': compile(words[1], 'python -c', 'exec')
    elif words[0] == '-m': assert importlib.util.find_spec(words[1]), words[1]
    else:
        about = (ROOT/words[0]).read_text(encoding='utf-8')
        unknown = [w for w in words[1:] if '/' not in w and w not in about]
        assert not unknown, f'{words[0]} knows nothing of {unknown}'


def installed(words, capsys):
    extras = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['optional-dependencies']
    wanted = [name for w in words for name in re.sub(r'^.*?\[|\]$', '', w).split(',') if '[' in w]
    assert set(wanted) <= set(extras)


TRY = {'lm-nb': taken, 'make': made, 'torchrun': launched, 'python': interpreted,
       'python3': interpreted, 'pip': installed}
SHOWN = {shlex.join(words) for cells in [*ENGLISH.values(), *CHINESE.values()]
         for said in cells.values() for words in commands(said)}


def tried(line, capsys):
    words = shlex.split(line)
    while re.match(r'[A-Z_]+=', words[0]): words = words[1:]  # variables for this command
    if ' '.join(words) in SCHEMES or words[0] in NOT_TRIED: return
    ours = [Path(w) for w in words if re.match('(tools|nbs)/|constraints', w)]
    for name in ours:  # jupytext makes 01_optim.py of 01_optim.ipynb
        assert (ROOT/name).exists() or (ROOT/name).with_suffix('.ipynb').exists(), name
    if words[0] in TRY: TRY[words[0]](words[1:], capsys)
    else: assert Path(words[0]) in ours or words[0] in FOREIGN, f'what is {words[0]}?'


@pytest.mark.parametrize('line', sorted(SHOWN))
def test_a_command_is_taken(line, at_desk, capsys): tried(line, capsys)


@pytest.mark.parametrize('line', [
    'lm-nb rnu micro', 'lm-nb run mikro', 'lm-nb run micro d_modle=1', 'lm-nb run micro seed=x',
    'lm-nb run own text=notes.txt weights=1', 'lm-nb run micro stages=pretrain sft.lr=0.1',
    'lm-nb chat own temprature=1', 'lm-nb bench trianing', 'lm-nb export micro olama', 'make rum',
    'make run ARGS=sede=1', 'python tools/tranlsate.py check', 'python tools/translate.py chekc',
    'pip install -e .[srve]', 'lmnb run micro',
    'torchrun -m lm_nb.cli pretrain micro paralel=fsdp'])
def test_a_wrong_command_is_not_taken(line, at_desk, capsys):
    with pytest.raises(AssertionError): tried(line, capsys)


# ------------------------------------------------------------------ Python

PORT = 'http://127.0.0.1:8000'
# what is run in place of what stands there
SMALLER = {'tasks=64, workers=4': 'tasks=2, workers=1'}
NOT_RUN = {'def top(': 'an example of style, which uses what it does not define'}
PASTE = """
import contextlib, io, json, sys, traceback
said = []
for code in json.load(sys.stdin):
    out, error = io.StringIO(), ''
    try:
        with contextlib.redirect_stdout(out): exec(code, {'__name__': '__main__'})
    except BaseException: error = traceback.format_exc()
    said.append((out.getvalue(), error))
print(json.dumps(said))
"""
PYTHON = {code: page for page, cells in ENGLISH.items() for said in cells.values()
          for code in blocks(said, 'python')}
RUN = [code for code in PYTHON if not any(part in code for part in NOT_RUN)]


@pytest.fixture(scope='module')
def url(trained):
    "The server of `lm-nb serve micro`, at a free port; none if it is not installed"
    if not (importlib.util.find_spec('starlette') and importlib.util.find_spec('uvicorn')):
        yield ''
        return
    from lm_nb.use.serve import find_models, serving
    with serving(find_models(trained/'runs/micro', 'cpu')) as url: yield url


@pytest.fixture(scope='module')
def pasted(trained, url):
    "What each block writes, and its error: all are pasted into one Python, one after the other"
    (trained/'crawl').mkdir()
    (trained/'crawl/a.txt').write_text(TEXT, encoding='utf-8')
    codes = [code.replace(PORT, url or PORT) for code in RUN]
    for large, small in SMALLER.items(): codes = [code.replace(large, small) for code in codes]
    env = os.environ | dict(PYTHONPATH=str(ROOT), IN_TEST='1', MPLBACKEND='Agg', HF_HUB_OFFLINE='1')
    done = subprocess.run([sys.executable, '-c', PASTE], input=json.dumps(codes), cwd=trained,
                          env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(zip(RUN, json.loads(done.stdout)))


def test_what_is_not_run_is_there_and_compiles():
    for code in PYTHON: compile(code, PYTHON[code], 'exec')
    shown = '\n'.join(PYTHON)
    assert all(shown.count(part) == 1 for part in [*SMALLER, *NOT_RUN])


@pytest.mark.parametrize('code', RUN, ids=[f'{PYTHON[code]}-{i}' for i, code in enumerate(RUN)])
def test_python_runs(code, pasted, url):
    if PORT in code and not url: pytest.skip('needs the extra serve')
    for module in re.findall(r'^from (transformers|openai|datatrove)\b', code, re.M):
        pytest.importorskip(module)
    said, error = pasted[code]
    assert not error, error
    assert said or 'print(' not in code


def test_curl_asks_the_server(url):
    [line] = [line for line in SHOWN if line.startswith('curl ')]
    if not url or not shutil.which('curl'): pytest.skip('needs the extra serve, and curl')
    words = shlex.split(line.replace(PORT, url))
    done = subprocess.run(['curl', '-s', *words[1:]], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)['choices'][0]['message']['role'] == 'assistant'


# ------------------------------------------------------------------ Chinese

# names in a reader's own file
TRANSLATED = {'text=正文 question=问 answer=答': 'text=body question=q answer=a',
              'field=正文': 'field=body'}


def program(kind, body):
    "A block without its comments"
    if kind == 'python':
        tokens = tokenize.generate_tokens(io.StringIO(body).readline)
        return [t.string for t in tokens if t.type != tokenize.COMMENT]
    return commands(f'```sh\n{body}```') if kind in ('bash', 'sh') else body


def programs(said):
    for chinese, english in TRANSLATED.items(): said = said.replace(chinese, english)
    found = re.findall(r'^```(\w+)\n(.*?)^```', said, re.M | re.S)
    return [(kind, program(kind, body)) for kind, body in found]


def test_the_chinese_pages_show_the_same_programs():
    other = [(page, cell) for page, cells in CHINESE.items() for cell, said in cells.items()
             if cell in ENGLISH[page] and programs(said) != programs(ENGLISH[page][cell])]
    assert not other
    sh, python = '```sh\na b\n```', '```python\na(1)\n```'
    assert programs(sh) == programs(sh.replace('\n`', '  # 好\n`')) != programs(sh.replace('b', ''))
    assert programs(python) == programs(python.replace(')', ') # 好')) != programs(
        python.replace('1', '2'))
