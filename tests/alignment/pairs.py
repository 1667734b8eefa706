"A folder to align in, and pairs of ids"
import json

import torch

from desk import asks, facts, furnish
from lm_nb.data.preferences import PairBatch
from lm_nb.data.shards import IGNORE
from lm_nb.model.gpt import GPT, GPTConfig

KEYS = {'stages': 'pretrain sft reward dpo', 'preferences': 'votes.json', 'context': 64,
        'batch_tokens': 320, 'dropout': 0.1, 'pretrain.tokens': 6400, 'sft.tokens': 6400,
        'reward.tokens': 7680, 'dpo.tokens': 7680, 'valid_share': 0.2, 'eval_every': 9,
        'sample_every': 9, 'save_every': 0}


def votes(some):
    "The plain answer is preferred to the hedged one"
    return [dict(prompt='\n'.join((a['instruction'], a['input'])), chosen=a['output'],
                 rejected=a['output'].replace('.', ', perhaps.')) for a in asks(some)]


def furnish_pairs(folder):
    "`furnish`, with preferences"
    furnish(folder, KEYS)
    (folder/'votes.json').write_text(json.dumps(votes(facts())))
    return folder


def small(arch='qwen3', seed=0, **keys):
    torch.manual_seed(seed)
    shape = dict(vocab_size=40, context=32, n_layer=2, n_head=2, d_model=32, zero_init=False)
    return GPT(GPTConfig(arch, **{**shape, **keys}))


def rows(*answers, width=16, prompt=(7, 8)):
    "Answers as rows: bos 1, eos 2, padding 0"
    x, y = torch.zeros(len(answers), width).long(), torch.full((len(answers), width), IGNORE)
    doc = torch.full((len(answers), width), -1)
    for row, a in enumerate(answers):
        ids = torch.tensor([*prompt, 1, *a, 2])
        x[row, :len(ids) - 1], doc[row, :len(ids) - 1] = ids[:-1], 0
        y[row, len(prompt) - 1:len(ids) - 1] = ids[len(prompt):]
    return PairBatch(x, y, doc)


PAIRS = [9, 10], [11], [12, 13, 14, 15], [9], [20], [21, 22, 23]
