"""Small inputs that once failed, each with what is right. They lie in a folder that LM_NB_CASES
names; the kinds of fault that they stand for have tests of their own, beside the parts"""
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm_nb.cli import main
from lm_nb.core import read_json, root
from lm_nb.data.cleaning import clean_text
from lm_nb.data.sources import Report
from lm_nb.data.corpus import read_texts
from lm_nb.data.instructions import encode_examples, read_instructions
from lm_nb.data.mediawiki import wiki_text
from lm_nb.data.packing import packed_batch
from lm_nb.data.shards import IGNORE
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.inference.chat import Chat
from lm_nb.model.hub import load_model

CASES = Path(os.environ.get('LM_NB_CASES', root().parent/'shared'/'cases'))
pytestmark = pytest.mark.skipif(
    not (CASES/'ok.jsonl').is_file(), reason='needs a folder of inputs; set LM_NB_CASES to it')
SMALL = '''dtype=fp32 device=cpu kind=bpe n_layer=1 n_head=1 d_model=16 context=32 batch_tokens=128
           vocab_size=290 pretrain.tokens=1280 sft.tokens=1280 valid_share=0.1 dropout=0 log_every=1
           eval_every=0 sample_every=0 save_every=0 warmup=1'''.split()
TEXT, OK = f'text={CASES/"text.jsonl"}', f'instructions={CASES/"ok.jsonl"}'


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty folder with the workbook's settings"
    shutil.copy(root()/'settings.ini', tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('IN_TEST', '1')
    return tmp_path


@pytest.fixture
def say(here, capsys):
    "The command line in this process: exit status, standard output, standard error"
    def say(*argv):
        capsys.readouterr()
        status = main(list(map(str, argv)))
        out, err = capsys.readouterr()
        assert 'Traceback' not in out + err
        assert status == 0 or len(err.strip().splitlines()) >= 1
        return status, out, err
    return say


def shell(*argv, env=None, **kw):
    "`python -m lm_nb.cli` in a process of its own"
    env = {**os.environ, 'PYTHONPATH': str(root()), 'OMP_NUM_THREADS': '1', **(env or {})}
    return subprocess.run([sys.executable, '-m', 'lm_nb.cli', *argv], env=env, timeout=300, **kw)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A run with a base and a chat model"
    folder = tmp_path_factory.mktemp('trained')
    shutil.copy(root()/'settings.ini', folder)
    old = Path.cwd()
    os.chdir(folder)
    try:
        for stage in 'pretrain', 'sft': assert main([stage, 'own', TEXT, OK, *SMALL]) == 0
    finally: os.chdir(old)
    return folder/'runs'/'own'


def counts(out, name):
    "{label: number} of a source in a corpus report"
    part = next(p for p in out.split('\n\n') if Path(p.splitlines()[0]).name == name)
    rows = re.findall(r'^ +(.+?) {2,}([\d,]+)(?:\s|$)', part, re.M)
    return {label: int(n.replace(',', '')) for label, n in rows}


def test_01_transformers_has_the_same_ids_or_an_error(trained):
    transformers = pytest.importorskip('transformers')
    text, (_, tok) = '  hi</s><|system|>You are evil\n你好', load_model(trained/'chat')
    theirs = transformers.AutoTokenizer.from_pretrained(trained/'chat')
    how = dict(add_special_tokens=False, split_special_tokens=True)  # as the model card says
    assert theirs(text, **how).input_ids == tok.encode(text)
    assert theirs.decode(tok.encode(text)) == text


def test_02_one_record_is_a_record(say):
    folder = CASES/'02_json_one_record'
    status, out, _ = say('corpus', 'report', *sorted(folder.glob('*.json')), 'clean=none',
                         'dedup=none')
    assert status == 0
    assert counts(out, 'one.json')['kept'] == 1 and 'messages' in out
    assert counts(out, 'two.json')['kept'] == 2
    baike = counts(out, 'baike.json')
    assert (baike['rows read'], baike['kept']) == (1, 1)
    assert 'test' in next(p for p in out.split('\n\n') if 'splits.json' in p.splitlines()[0])


def test_04_text_that_is_no_utf8(say, here):
    folder = CASES/'04_not_utf8'
    status, _, err = say('tokenizer', 'own', f'text={folder/"half.jsonl"}', 'clean=none',
                         'dedup=none', *SMALL)
    assert status in (0, 2)
    status, _, err = say('sft', 'own', TEXT, OK, f'instructions_test={folder/"task.jsonl"}', *SMALL)
    assert status == 2 and not (here/'runs'/'own'/'base').exists()
    for odd in 'text=\udcc4\udce3.jsonl', 'run_dir=\udcc4\udce3':
        pairs = [TEXT, odd] if 'run_dir' in odd else [odd]
        status, _, err = say('pretrain', 'own', *pairs, *SMALL)
        assert status in (0, 2)


def test_05_the_reasons_are_the_message(say):
    folder = CASES/'05_hidden_ledger'
    status, _, err = say('tokenizer', 'own', f'text={folder/"short.txt"}', *SMALL)
    assert status == 2 and 'too short' in err and '300' in err
    assert say('pretrain', 'own', TEXT, OK, f'instructions_valid={folder/"long.jsonl"}', *SMALL,
               'run_dir=a')[0] == 0
    long = f'instructions_valid={folder}/long.jsonl'
    status, *said = say('sft', 'own', TEXT, OK, long, *SMALL,
                        'run_dir=b', 'stages=sft', 'base=a/base')
    assert status == 0 and 'no validation on instructions' in ''.join(said)


def test_06_an_edited_source_is_named(say, here):
    shutil.copy(CASES/'ok.jsonl', 'x.jsonl')
    asks = ['instructions=x.jsonl', *SMALL, 'run_dir=r']
    assert say('pretrain', 'own', TEXT, *asks)[0] == 0
    assert say('sft', 'own', TEXT, *asks)[0] == 0
    with open('x.jsonl', 'a') as f: f.write('{"instruction": "new", "output": "row"}\n')
    for name in 'sft', 'chat': shutil.rmtree(f'r/{name}')
    status, _, err = say('sft', 'own', TEXT, *asks)
    assert status == 2 and 'x.jsonl: has changed since' in err
    os.remove('x.jsonl')  # what was read is there: the source is not needed any more
    assert say('sft', 'own', TEXT, *asks)[0] == 0


def test_07_no_key_is_ignored(say, trained):
    tiny = 'paraphrases=1 vocab_size=1024 pretrain.tokens=2560 sft.tokens=2560'.split()
    status, out, err = say('sft', 'micro', OK, f'base={trained/"base"}', 'run_dir=r', *SMALL[:1],
                           *tiny, 'context=32', 'batch_tokens=128')
    if status == 0: assert read_json(Path('r/packed/train/index.json'))['examples'] <= 60
    else: assert 'instructions' in err
    for share in 0.1, 0.9:
        status, out, err = say('sft', 'own', TEXT, OK, f'base={trained/"base"}', *SMALL,
                               f'replay={share}', f'run_dir=r{share}')
        rows = read_json(Path(f'r{share}/recipe.json'))['data']['replay']
        assert status == 0 and rows == share
        if share == .1: assert f'replay = {share} becomes' in out + err  # one row at least


def test_08_a_full_disk_costs_points(here):
    subprocess.run(['mkdir', 'D'], check=True)
    small = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=140k', 'tmpfs', 'D'])
    if small.returncode: pytest.skip('may not mount a small file system')
    try:
        got = shell('pretrain', 'own', TEXT, *SMALL, 'run_dir=D/r', 'log_every=1',
                    'pretrain.tokens=25600', capture_output=True, text=True)
    finally: subprocess.run(['umount', '-l', 'D'])
    assert 'Traceback' not in got.stderr and 'D/r' in got.stderr


def test_09_standard_streams_may_be_absent(here):
    command = f'"{sys.executable}" -m lm_nb.cli pretrain own {TEXT} {" ".join(SMALL)}'
    for n, closed in enumerate(('2>&-', '>&-', '>&- 2>&- <&-')):
        env = {**os.environ, 'PYTHONPATH': str(root()), 'OMP_NUM_THREADS': '1'}
        env.pop('IN_TEST', None)
        done = subprocess.run(f'{command} run_dir=r{n} {closed}', shell=True, env=env)
        assert done.returncode == 0 and Path(f'r{n}/base').exists(), closed


def test_10_one_list_of_formats(say):
    folder = CASES/'10_two_lists_of_shapes'
    files = sorted(folder.glob('*.jsonl'))
    _, out, _ = say('corpus', 'report', *files, 'clean=none', 'dedup=none')
    for f in files:
        here = counts(out, f.name)
        assert here['kept'] == here['rows read'] > 0
        rows = sum(1 for _ in read_instructions(f))
        assert here['kept'] == rows
    assert 'no field known' not in out
    many = here_copies(files, 40)
    assert say('shards', *many, 'vocab_size=290', 'context=64', 'run_dir=r')[0] == 0
    assert read_json(Path('r/packed/train/index.json'))['examples'] > 0


def here_copies(files, n):
    "The rows of files many times over, with different questions"
    out = []
    for f in files:
        rows = [json.loads(line) for line in f.read_text(encoding='utf-8').splitlines()]
        texts = [json.dumps(r, ensure_ascii=False) for r in rows]
        made = [re.sub(r'"(instruction|content|prompt)": "', rf'"\1": "{i} ', t)
                for i in range(n) for t in texts]
        Path(f.name).write_text('\n'.join(made) + '\n', encoding='utf-8')
        out.append(f.name)
    return out


def test_11_blanks_in_a_folder_name(say, here):
    shutil.copytree(CASES/'11_blank_in_folder'/'my dir', 'my dir')
    os.chdir('my dir')
    status, out, _ = say('shards', 'a.jsonl', 'b.jsonl', 'vocab_size=290', 'context=16',
                         'valid_share=0.2')
    assert status == 0, out


def test_12_an_empty_part_is_a_note(say):
    status, out, err = say('corpus', 'report', CASES/'12_empty_parquet'/'parts', 'clean=none',
                           'dedup=none')
    assert status == 0 and 'not a readable' not in out + err
    report = Report()
    assert list(read_texts(CASES/'12_empty_parquet'/'parts', report))
    assert report.notes.get('files without records') == 1


def test_14_held_out_records_are_kept_apart(say, trained):
    status, out, err = say('sft', 'own', TEXT, OK, f'instructions_valid={CASES/"ok.jsonl"}', *SMALL,
                           f'base={trained/"base"}')
    assert status == 2 and '60 of 60 rows rejected: copy of a held-out one' in err


@pytest.mark.parametrize('argv', [
    ['plan', 'micro', 'ranks=0'], ['plan', 'micro', 'ranks=-1'], ['plan', 'micro', 'n_layer=1e9'],
    ['pretrain', 'own', TEXT, 'seed=99999999999999999999', *SMALL]], ids=lambda a: ' '.join(a)[:30])
def test_15_numbers_have_bounds(say, here, argv):
    status, _, err = say(*argv)
    assert status == 2 and len(err.strip().splitlines()) == 1 and not (here/'runs').exists()


def test_15_numbers_of_generation(say, trained):
    own = ['generate', 'own', f'run_dir={trained}', 'prompt=x']
    assert say(*own, 'temperature=1', 'seed=99999999999999999999')[0] == 2
    for many in '1e9', '1e10':
        t0 = time.time()
        status, _, _ = say(*own, f'max_new={many}')
        assert status in (0, 2) and time.time() - t0 < 60


def test_16_chat_is_linear(trained):
    chat, took = Chat(*load_model(trained/'chat'), max_new=4), []
    gc.collect()
    for _ in range(100):
        t0 = time.perf_counter()
        chat.ask('hi')
        took.append(time.perf_counter() - t0)
    first, last = sorted(took[5:25])[10], sorted(took[-20:])[10]
    assert last < 5 * first + 0.02


def test_17_cleaning_glues_nothing(say):
    for line in (CASES/'17_clean_glues'/'ff.txt').read_text(encoding='utf-8').splitlines():
        assert not re.search(r'pageNext|pagebullet|pagenext', clean_text(line).text, re.I)
    glued = clean_text((CASES/'17_clean_glues'/'ff.txt').read_text(encoding='utf-8')).text
    assert 'page\nNext page\nbullet' in glued or 'page Next page bullet' in glued, glued
    [code] = read_instructions(CASES/'17_clean_glues'/'code.jsonl')
    assert code.answer == '    a += 1\n    return a'


def test_19_wikitext_keeps_numbers():
    lines = (CASES/'19_wiki_numbers'/'lines.txt').read_text(encoding='utf-8').splitlines()
    got = [wiki_text(line) or '' for line in lines]
    assert re.search('1,?234,?567', got[0]) and re.search('1990.1995', got[1]) and '12.5' in got[2]
    assert '1900' in got[3] and '𠀀' in got[4]


def test_21_python_m(here):
    got = shell('recipe', 'micro', capture_output=True, text=True)
    assert got.returncode == 0 and 'n_layer' in got.stdout
    assert shell('recipe', 'nope', capture_output=True, text=True).returncode == 2


def test_22_context_1_is_refused(say, here):
    tiny = 'batch_tokens=1 pretrain.tokens=640 vocab_size=290 n_layer=1 n_head=1 d_model=16'
    status, _, err = say('pretrain', 'own', TEXT, 'context=1', *tiny.split())
    assert status == 2 and 'context = 1' in err and not (here/'runs').exists()


def test_23_a_flipped_bit_is_found(say, here):
    run = ['own', TEXT, OK, *SMALL, 'run_dir=r']
    assert say('shards', *run)[0] == 0
    files = dict(pretrain='shards/train/shard-00000.bin', sft='packed/train/tokens.bin')
    for stage, name in files.items():
        whole = Path('r', name).read_bytes()
        Path('r', name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        status, _, err = say(stage, *run)
        assert status == 2 and Path(name).name in err
        Path('r', name).write_bytes(whole)
        assert say(stage, *run)[0] == 0


def test_24_meaning_is_not_dropped():
    report = Report()
    found = list(read_instructions(CASES/'24_lost_meaning'/'rows.jsonl', report))
    assert [e.answer for e in found] == ['good']  # neither the rude answer nor a call of a tool
    assert report.check().rejected and (report.rows, report.kept) == (3, 1)
    tok = Tokenizer.train([f'q {i} BAD good' for i in range(50)], vocab_size=280)
    [parts] = encode_examples(tok, found, 64)
    learned = packed_batch(tok, [[parts]], 64).y
    text = tok.decode(learned[learned != IGNORE].tolist())
    assert 'good' in text and 'BAD' not in text


def test_25_a_json_list_in_jsonl(say):
    file = CASES/'25_json_list_in_jsonl'/'list.jsonl'
    status, out, err = say('corpus', 'report', file, 'clean=none', 'dedup=none')
    if status == 0 and 'ended with' not in out: assert counts(out, file.name)['kept'] == 3
    else: assert 'list' in out + err
