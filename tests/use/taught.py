"A small model that has learned some facts, for every program that is to say the same as ours"
import random

import pytest
import torch

from lm_nb.data.instructions import conversation_ids
from lm_nb.data.shards import IGNORE
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.model.gpt import GPT, GPTConfig

SYLLABLES = 'ba ke mo ri tu sa lin vor den gal pi nu'.split()
COLOURS = dict(red='红', blue='蓝', green='绿', white='白', black='黑', yellow='黄')


def facts(n=30):
    "Questions with one right answer each, English and Chinese"
    rng, out = random.Random(0), {}
    while len(out) < 2*n:
        name = ''.join(rng.sample(SYLLABLES, 3)).capitalize()
        age, (colour, zh) = rng.randrange(10, 99), rng.choice([*COLOURS.items()])
        out[f'What is known of {name}?'] = f'{name} is {age} years old and likes {colour}.'
        out[f'{name}喜欢什么颜色？'] = f'{name}喜欢{zh}色，今年{age}岁。'
    return out


FACTS = facts()


def row(tok, question, answer, system=''):
    "The ids of a conversation, and the targets in it"
    asked = conversation_ids(tok, [], question, system)
    ids = torch.tensor([*asked, *tok.encode(answer), tok.eos])
    y = ids.roll(-1)
    y[:len(asked) - 1] = IGNORE
    y[-1] = IGNORE
    return ids, y


def learn(gpt, tok, steps=130):
    "Teach a model the facts"
    rows = [row(tok, q, a) for q, a in FACTS.items()]
    longest = max(len(x) for x, _ in rows)
    fill = lambda x, value: torch.nn.functional.pad(x, (0, longest - len(x)), value=value)
    x = torch.stack([fill(x, tok.pad) for x, _ in rows])
    y = torch.stack([fill(y, IGNORE) for _, y in rows])
    opt = torch.optim.AdamW(gpt.parameters(), 4e-3, betas=(.9, .95))
    for step in range(steps):
        for group in opt.param_groups: group['lr'] = 4e-3 * min(1, (steps - step)/steps*1.5)
        loss = gpt(x, targets=y) / (y != IGNORE).sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return loss.item()


@pytest.fixture(scope='session')
def tok():
    "Of BPE: what llama.cpp reads, too"
    return Tokenizer.train([*FACTS, *FACTS.values()], 480, kind='bpe')


@pytest.fixture(scope='session')
def trained(tok):
    "arch -> a model that answers; trained once"
    made = {}
    def model(arch):
        if arch not in made:
            torch.manual_seed(0)
            shape = dict(n_layer=2, n_head=2, d_model=64, d_ff=128, context=96)
            if arch == 'qwen3': shape |= dict(n_kv_head=1, tie=False)
            made[arch] = GPT(GPTConfig(arch, vocab_size=len(tok) + 3, **shape))
            assert learn(made[arch], tok) < .1, 'it has not learned them'
            made[arch].eval()
        return made[arch]
    return model
