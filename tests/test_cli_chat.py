"""`lm-nb chat` and `lm-nb generate` as a person meets them: at a terminal, from a pipe, and what
is said when something cannot be"""
import io, os, signal, subprocess, sys, threading, types, warnings
from contextlib import suppress
from pathlib import Path

import pytest, torch

import lm_nb
from lm_nb import cli
from lm_nb.cli import main
from lm_nb.data.instructions import Example
from lm_nb.data.packing import write_packed
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.inference.chat import Chat
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.model.hub import save_model
from lm_nb.training.recipe import load_recipe
from lm_nb.training.run import Run

ASKS = ['What colour is the river?', 'Put this into Chinese.\nThe river is green.',
        '河是什么颜色的？']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run whose models know nothing, and whose sources are gone"
    folder = tmp_path_factory.mktemp('chat')/'run'
    Run(load_recipe('micro', ['context=44', 'n_layer=1', 'n_head=2', 'd_model=32', 'd_ff=64',
                              'vocab_size=300']), folder)
    tok = Tokenizer.train([*ASKS, 'The river is green.', '河是绿色的。'] * 4, 300)
    torch.manual_seed(0)
    shape = dict(vocab_size=300, context=44, n_layer=1, n_head=2, d_model=32, zero_init=False)
    for name in ('base', 'chat'): save_model(folder/name, GPT(GPTConfig(**shape)), tok)
    records = [Example(asks, 'Green.') for asks in ASKS]
    for part in ('train', 'valid'): write_packed(records, tok, folder/'packed'/part, 44)
    return folder


@pytest.fixture
def echo(monkeypatch):
    "What is asked comes back, as Python writes it"
    monkeypatch.setattr(Chat, 'stream', lambda self, text: [repr(text)])


@pytest.fixture
def piped(tmp_path, monkeypatch, capsys):
    "Run a command in a folder without settings; gives status, output and what was said beside it"
    def run(*argv, asks=''):
        monkeypatch.chdir(tmp_path)
        stdin = asks if asks is None else io.TextIOWrapper(io.BytesIO(asks.encode()), 'utf-8')
        monkeypatch.setattr('sys.stdin', stdin)
        return main([*map(str, argv)]), *capsys.readouterr()
    return run


def at_terminal(argv):
    "The command in this process, whose standard streams are a terminal now"
    torch.set_num_threads(1)  # other threads are not there after a fork
    sys.stdin = open(0, encoding='utf-8')
    sys.stdout = sys.stderr = open(1, 'w', encoding='utf-8')
    status = main(argv)
    sys.stdout.flush()
    return status


def converse(person, typed, also=b'> '):
    "What stands on a terminal in the end: at each prompt, or `also`, the next of `typed` arrives"
    said, todo = b'', [*typed, b'\x04']
    with suppress(OSError):  # the other end is closed
        while part := os.read(person, 4096):
            said += part
            ready = said.endswith((b'> ', b'> \x1b[?2004h', also))
            if todo and ready: os.write(person, todo.pop(0))
    return said.decode(errors='replace').replace('\r', ''), todo


@pytest.fixture
def talk(run, tmp_path, monkeypatch):
    "A conversation at a terminal; gives what stands there, the status, and what was not typed"
    pty = pytest.importorskip('pty')
    def talk(*typed, **how):
        monkeypatch.setenv('TERM', 'xterm')
        monkeypatch.chdir(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', DeprecationWarning)  # of a fork beside threads
            pid, person = pty.fork()
        if not pid:
            status = 99
            try: status = at_terminal(['chat', 'micro', f'run_dir={run}'])
            finally: os._exit(status)
        guard = threading.Timer(120, os.kill, [pid, signal.SIGKILL])
        guard.start()
        try: said, todo = converse(person, typed, **how)
        finally: os.close(person), guard.cancel()
        return said, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), todo
    return talk

# at a terminal

def test_it_opens_with_what_its_records_ask(run, talk):
    said, status, _ = talk(b'/help\r')
    opening, shown, *_ = said.split('> ')
    assert opening.startswith(f'The chat model of {run}')
    for asks in ASKS: assert all(line in opening for line in asks.split('\n')), opening
    assert '/new' in shown and status == 0


def test_there_is_a_sign_of_life_before_torch_is_loaded(run, tmp_path):
    pty = pytest.importorskip('pty')
    home = Path(lm_nb.__file__).resolve().parent.parent
    (tmp_path/'torch.py').write_text('raise SystemExit("now torch is loaded")')
    person, machine = pty.openpty()
    code = 'import sys; from lm_nb.cli import main; sys.exit(main())'
    with subprocess.Popen([sys.executable, '-c', code, 'chat', 'micro', f'run_dir={run}'],
                          cwd=tmp_path, stdin=machine, stdout=machine, stderr=machine,
                          env={**os.environ, 'PYTHONPATH': f'{tmp_path}:{home}'}):
        os.close(machine)
        said, _ = converse(person, [])
    os.close(person)
    assert said.splitlines() == [f'The chat model of {run} …', 'now torch is loaded']


LINES = 'Put this into Chinese.', 'The river is green.'
PASTES = dict(
    marked=b'\x1b[200~%s\n%s\x1b[201~\r', marked_to_the_end=b'\x1b[200~%s\r%s\r\x1b[201~\r',
    unmarked=b'%s\r%s\r', typed=b'%s\\\r%s\r')

@pytest.mark.parametrize('how', PASTES)
def test_a_pasted_text_is_one_question(talk, echo, how):
    paste = PASTES[how] % tuple(line.encode() for line in LINES)
    said, status, todo = talk(paste, b'Next?\r')
    assert repr('\n'.join(LINES)) in said and repr('Next?') in said and not todo, said
    assert said.count("'\n") == 2 and status == 0, 'two answers'


def test_a_paste_without_an_end_waits_for_one(talk, echo):
    "What stands behind its last line break is still being edited"
    said, status, todo = talk(b'One\rtwo', b'\x7f!\r', also=b'\xe2\x80\xa6 two')
    assert repr('One\ntw!') in said and not todo and status == 0, said


def test_ctrl_c_ends_an_answer_and_ctrl_d_the_conversation(talk, monkeypatch):
    def stream(self, text):
        yield 'It is '
        signal.raise_signal(signal.SIGINT)
        yield 'green'
    monkeypatch.setattr(Chat, 'stream', stream)
    said, status, todo = talk(b'river?\r', b'river?\r')
    assert said.count('It is  …') == 2 and 'It is green' not in said
    assert status == 0 and not todo


def test_ctrl_c_takes_back_a_line_and_not_the_conversation(monkeypatch):
    "It may come a moment after the answer has ended"
    typed = iter([KeyboardInterrupt, 'One', KeyboardInterrupt, KeyboardInterrupt, 'Two', EOFError])
    def line():
        if isinstance(what := next(typed), str): return what
        raise what
    monkeypatch.setattr(cli, '_typed', line)
    monkeypatch.setattr(sys, 'stdin', types.SimpleNamespace(isatty=lambda: True))
    assert list(cli._questions()) == ['One', 'Two']


def test_commands(talk, echo):
    said, status, todo = talk(b'/system Be a river.\r', b'/new\r', b'/nwe\r', b'/etc/passwd?\r',
                              b'/system ' + b'river ' * 60 + b'\r', b'/quit\r')
    for words in ('System text: Be a river.', 'none of the records', 'A new conversation.',
                  "no command /nwe (did you mean '/new'?)", 'at most 44; shorten it',
                  repr('/etc/passwd?')):
        assert words in said, said
    assert status == 0 and todo == [b'\x04'], '/quit ended it'

# from a pipe

def test_a_pipe_asks_a_question_a_line(run, piped, echo):
    status, out, err = piped('chat', 'micro', f'run_dir={run}',
                             asks='One\\\nTwo\n\n/new\n /etc/hosts\n/help me')
    assert status == 0 and err == ''
    assert out.split('\n\n') == ["'One\\\\'", "'Two'", "A new conversation.\n'/etc/hosts'",
                                 "'/help me'", '']


def test_a_system_text_that_no_record_had_is_said(run, piped):
    words = 'chat', 'micro', f'run_dir={run}'
    assert 'none of the records' in piped(*words, 'system=A river.')[2]
    assert piped(*words)[2] == ''


def test_a_model_that_saw_system_texts_takes_one(run, piped, tmp_path):
    tok, mine = Tokenizer.load(run/'chat'/'tokenizer.model'), tmp_path/'run'
    mine.mkdir()
    for name in ('chat', 'recipe.json'): (mine/name).symlink_to(run/name)
    words = 'chat', 'micro', f'run_dir={mine}', 'system=A river.'
    assert piped(*words)[::2] == (0, ''), 'without records nothing is known'
    write_packed([Example(ASKS[0], 'Green.', system='Be brief.')], tok, mine/'packed'/'train', 44)
    assert piped(*words)[::2] == (0, '')


def test_without_a_standard_input(run, piped):
    status, out, err = piped('chat', 'micro', f'run_dir={run}', asks=None)
    assert (status, out) == (2, '') and 'standard input' in err and err.count('\n') == 1

# a text

@pytest.mark.parametrize('max_new', ['1e10', '45', '1000000'])
def test_a_wish_beyond_the_context_is_said(run, piped, max_new):
    status, out, err = piped('generate', 'micro', f'run_dir={run}', 'prompt=river',
                             f'max_new={max_new}')
    assert status == 0 and out.startswith('river')
    assert f'max_new = {int(float(max_new))}' in err and 'at most 44 tokens' in err


def test_a_wish_within_the_context_is_not(run, piped):
    assert piped('generate', 'micro', f'run_dir={run}', 'prompt=river',
                 'max_new=9')[::2] == (0, '')


def test_an_empty_prompt_begins_a_document(run, piped):
    words = 'generate', 'micro', f'run_dir={run}', 'prompt=', 'max_new=9', 'temperature=1'
    texts = {piped(*words, f'seed={seed}')[1] for seed in range(3)}
    assert len(texts) == 3 and max(map(len, texts)) > 1


@pytest.mark.parametrize('command', ['generate', 'chat'])
@pytest.mark.parametrize('pair, words', [
    ('seed=99999999999999999999', '64 bits'), ('max_new=-1', 'max_new = -1'),
    ('max_new=0', 'max_new = 0'), ('max_new=1e400', 'whole number'), ('seed=0.5', 'whole number'),
    ('temperature=-1', 'temperature = -1'), ('temperature=nan', 'temperature = nan'),
    ('temperature=inf', 'temperature = inf'), ('temperature=1e999', 'temperature = 1e999'),
    ('top_k=0', 'top_k = 0'), ('top_p=0', 'top_p = 0'), ('repetition_penalty=1e99', 'repetition')])
def test_numbers_have_bounds(run, piped, command, pair, words):
    prompt = ['prompt=x'] if command == 'generate' else []
    status, out, err = piped(command, 'micro', f'run_dir={run}', *prompt, pair)
    assert status == 2 and out == '' and words in err
    assert err.startswith('lm-nb: ') and err.count('\n') == 1, err
