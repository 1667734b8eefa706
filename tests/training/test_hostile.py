"""Mutated tokenizers, recipes, checkpoints and model folders: one line or a clean answer; never a
crash, a hang or a traceback

Each kind is worked through by processes of their own (hostile_work.py), so that a crash in
somebody's C++ is found and not suffered."""
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest
import soak
from desk import furnish

import lm_nb
from lm_nb.core import root

HERE, PACKAGE = Path(__file__).resolve().parent, Path(lm_nb.__file__).resolve().parent.parent
POEMS = ['春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少。',
         '白日依山盡，黃河入海流。\n欲窮千里目，更上一層樓。',
         'The cat sat on the mat.\n\tThe dog  sat on the cat.']
KEYS = {'vocab_size': 310, 'pretrain.tokens': 480, 'sft.tokens': 480, 'warmup': 1}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "What is going to be mutated"
    import torch
    from torch import nn
    from lm_nb.training.checkpoint import Saver
    from lm_nb.model.hub import save_model
    from lm_nb.model.gpt import GPT, GPTConfig
    from lm_nb.data.tokenizer import Tokenizer
    folder = tmp_path_factory.mktemp('hostile')
    for kind in ('unigram', 'bpe'):
        tok = Tokenizer.train(POEMS * 5, 310, folder/f'{kind}.model', kind)
    shutil.copy(root()/'settings.ini', folder/'good.ini')
    torch.manual_seed(0)
    save_model(folder/'model',
               GPT(GPTConfig(vocab_size=len(tok), context=16, n_layer=2, n_head=2, d_model=16)),
               tok)
    module = nn.Sequential(nn.Embedding(19, 16), nn.Linear(16, 16), nn.Linear(16, 19))
    o = torch.optim.AdamW(module.parameters())
    with Saver(folder/'checkpoints', module, [o]) as saver:
        for step in (1, 2, 3):
            module(torch.arange(8)).logsumexp(-1).sum().backward()
            o.step()
            saver.save(step, dict(point=dict(nll=1.5)))
    return folder


@pytest.fixture(scope='module')
def desk(tmp_path_factory): return furnish(tmp_path_factory.mktemp('desk'), KEYS)


def work(tally, kind, folder, n):
    """Try n cases; a process that dies in one is a failure, and another goes on behind it. Gives
    what came of the others"""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(PACKAGE),
           'PYTHONFAULTHANDLER': '', 'PAYLOAD': str(folder/'payload-ran')}
    first, came = 0, []
    while first < n:
        job = subprocess.run(
            [sys.executable, HERE/'hostile_work.py', kind, folder, str(first), str(n)], env=env,
            cwd=folder, capture_output=True, text=True, errors='replace')
        lines = job.stdout.splitlines()
        done = [json.loads(l) for l in lines if l.startswith('{"case"')]
        for d in done: tally.add(d['ok'], f'case {d["case"]}: {d["about"]}')
        came += [d['about'] for d in done]
        if job.returncode == 0 and len(done) == n - first: break
        # it did not even begin
        assert lines and lines[-1].startswith('#') or done, job.stderr[-2000:]
        at = int(next(l for l in reversed(lines) if l.startswith('#'))[1:])
        tally.add(False, f'case {at}: ended with {job.returncode}: {job.stderr[-300:]}')
        first = at + 1
    return came


def test_mutated_tokenizers_are_refused_or_keep_every_text(place):
    with soak.trials('mutated tokenizer models') as tally:
        came = work(tally, 'tokenizer', place, soak.count(200, 1500))
        tally.more['accepted'] = came.count('accepted')
        assert 0 < came.count('accepted') < .8 * len(
            came), 'most mutations are noticed, some change nothing that matters'


def test_mutated_recipes_are_read_or_told_in_one_line(place):
    with soak.trials('mutated recipes') as tally:
        came = work(tally, 'recipe', place, soak.count(100, 1000))
        tally.more['accepted'] = came.count('accepted')
        assert .05 * len(came) < came.count('accepted') < .9 * len(came)


def test_mutated_checkpoints_are_passed_over_or_told_in_one_line(place):
    with soak.trials('mutated checkpoints') as tally:
        came = work(tally, 'checkpoint', place, soak.count(40, 600))
        tally.more |= {k: came.count(k) for k in ('accepted', 'the one before')}
        assert came.count('the one before') > .1 * len(came)


def test_mutated_model_folders_load_whole_or_are_told_in_one_line(place):
    with soak.trials('mutated model folders') as tally:
        came = work(tally, 'model', place, soak.count(40, 400))
        tally.more['accepted'] = came.count('accepted')
        assert came.count('accepted') < .5 * len(came)


def test_runs_of_odd_recipes_end_well_or_in_one_line(desk):
    with soak.trials('whole runs of odd recipes') as tally:
        came = work(tally, 'run', desk, soak.count(5, 300))
        tally.more['accepted'] = sum(c.startswith('accepted') for c in came)
