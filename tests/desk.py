"""A folder to train in: a recipe that takes seconds, a text, and instruction records; and what the
tests of its stages share"""
import json, sys
from contextlib import chdir, contextmanager
from functools import partial

import pytest

from lm_nb.training.monitor import Interrupted, read_log
from lm_nb.training.recipe import load_recipe
from lm_nb.training.run import Run
from lm_nb.training.stage import run_stage, train

PEOPLE = 'Ada Bela Cora Dora Edna Fay Gail Hope Iris'.split()
TOWNS = '林城 海门 青山 石桥 Rivertown Hillford Oakham'.split()
RECIPE = dict(
    text='text.txt', instructions='ask.jsonl', dtype='fp32', device='cpu', kind='bpe',
    vocab_size=330, context=32, n_layer=1, n_head=2, d_model=32,
    batch_tokens=160,  # 5 rows a step: an odd number, so that two ranks must share unevenly
    valid_share=0.1, warmup=2, log_every=1)


def facts(people=PEOPLE, towns=TOWNS):
    "Who came to which town, and when"
    return [(p, t, 1800 + 10*i + j) for i, p in enumerate(people) for j, t in enumerate(towns)]


def text(some):
    return ''.join(f'{p} came to {t} in {y}. {p} 在 {y} 年来到 {t}。\n' for p, t, y in some)


def asks(some):
    return [dict(instruction=f'When did {p} come?', input=t, output=f'In {y}.')
            for p, t, y in some]


def furnish(folder, keys):
    """Write settings.ini with the recipe `tiny`, where `keys` add to `RECIPE` or replace it,
    text.txt and ask.jsonl"""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = ''.join(f'{k} = {v}\n' for k, v in (RECIPE | keys).items())
    (folder/'settings.ini').write_text(f'[tiny]\n{pairs}')
    (folder/'text.txt').write_text(text(facts()), encoding='utf-8')
    (folder/'ask.jsonl').write_text(''.join(json.dumps(a) + '\n' for a in asks(facts())))
    return folder


# ------------------------------------------------------------------ its stages

# dropout and replay, so that all dice are thrown; validation and samples between the steps
KEYS = {'dropout': 0.1, 'pretrain.tokens': 4800, 'sft.tokens': 3200, 'replay': 0.2, 'eval_every': 9,
        'sample_every': 9, 'save_every': 0}


@pytest.fixture
def at_desk(desk, monkeypatch):
    "The folder of the fixture `desk`, which the test runs in"
    monkeypatch.chdir(desk)
    return desk


def stages(run, *overrides, which=('pretrain', 'sft')):
    "Run stages of `tiny` in a folder"
    run = Run(load_recipe('tiny', overrides), run)
    for name in which: run_stage(run, name)
    return run.folder


def whole_run(desk, *overrides):
    "Both stages without a stop"
    with chdir(desk): return stages(desk/'whole', *overrides)


def curve(folder, *keys):
    "Step and values of each point of the log that has any of the keys"
    return [[r['step'], *(r[k] for k in keys if k in r)]
            for r in read_log(folder) if any(k in r for k in keys)]


def weights(folder): return (folder/'model.safetensors').read_bytes()


@contextmanager
def stopping(monkeypatch, stage, after, step):
    "Let `train` stop of itself after some more steps, as Ctrl-C would"
    asked = []
    with monkeypatch.context() as m:
        m.setattr(sys.modules['lm_nb.training.stage'], 'train',
                  partial(train, stop=lambda: asked.append(1) or len(asked) == after))
        with pytest.raises(
            Interrupted,
            match=f'{stage}: stopped at step {step} of .*; lm-nb run .* goes on from there') as e:
            yield
        assert e.value.status == 130
