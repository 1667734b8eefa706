"Small models of every shape, and what the tests of the model ask of them"
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lm_nb.data.shards import IGNORE
from lm_nb.model.gpt import GPT, GPTConfig

SMALL = GPTConfig(vocab_size=97, context=64, n_layer=2, n_head=4, d_model=32)
SHAPES = {
    'gpt2 tied': replace(SMALL, arch='gpt2'),
    'gpt2 untied': replace(SMALL, arch='gpt2', tie=False, norm_eps=1e-5),
    'qwen3 tied': SMALL,
    'qwen3 untied': replace(SMALL, tie=False),
    'qwen3 grouped': replace(SMALL, n_kv_head=2, rope_theta=1e6),
    'qwen3 one key head, wide heads': replace(SMALL, n_kv_head=1, d_head=16, d_ff=40, tie=False),
}


def disturbed(cfg, seed=0):
    "A model in which no weight is 0 or 1 by its start"
    torch.manual_seed(seed)
    gpt = GPT(cfg).eval()
    with torch.no_grad():
        for p in gpt.parameters(): p.add_(0.15 * torch.randn_like(p))
    return gpt


def generator(seed): return torch.Generator().manual_seed(seed)
def tokens(*shape, seed=1): return torch.randint(SMALL.vocab_size, shape, generator=generator(seed))
def bf16(on=True): return torch.autocast('cpu', torch.bfloat16, enabled=on)


def targets(ids, share=0.3, seed=7):
    "The next ids, of which a share is ignored"
    ignored = torch.rand(ids.shape, generator=generator(seed)) < share
    return ids.roll(-1, 1).masked_fill(ignored, IGNORE)


def loss_of(gpt, ids, doc=None):
    "Of each prediction (N,), from the logits"
    logits = gpt(ids, doc)[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction='none')


def loss_and_gradients(gpt, ids, doc=None, y=None, auto=False, weight=None):
    with bf16(auto): loss = gpt(ids, doc, targets=y, weight=weight)
    return [loss.detach(), *torch.autograd.grad(loss, list(gpt.parameters()))]


def close_all(got, want, far):
    """Each tensor within `far` of the other's length, or of a thousandth of the longest:
    the gradient of a key's bias is 0 but for rounding"""
    longest = max(b.norm() for b in want)
    for a, b in zip(got, want, strict=True):
        gap, length = (a - b).norm(), max(b.norm(), longest / 1000)
        assert gap <= far * length, (a.shape, a.norm(), b.norm())


def library_model(config, state):
    "The transformers library's model with these weights"
    transformers = pytest.importorskip('transformers')
    Model, Config = dict(
        gpt2=(transformers.GPT2LMHeadModel, transformers.GPT2Config),
        qwen3=(transformers.Qwen3ForCausalLM, transformers.Qwen3Config))[config['model_type']]
    model = Model(Config(**config)).eval()
    missing, extra = model.load_state_dict(state, strict=False)
    tied = {'lm_head.weight'} if config['tie_word_embeddings'] else set()
    assert not extra and set(missing) <= tied
    model.tie_weights()
    return model
