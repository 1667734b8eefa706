"Small models with random weights, and prompts for them"
import torch

from lm_nb.model.gpt import GPT, GPTConfig

SHAPES = dict(gpt2=dict(arch='gpt2'), qwen3=dict(arch='qwen3', n_kv_head=2, tie=False))
SAMPLING = [dict(), dict(temperature=.9, top_k=20, seed=3),
            dict(temperature=1.5, top_p=.9, min_p=.01, repetition_penalty=1.2, seed=5)]


def make(arch, context=24, seed=0, **more):
    "A model with weights large enough to make choices that differ"
    torch.manual_seed(seed)
    shape = dict(vocab_size=50, context=context, n_layer=2, n_head=4, d_model=32, dropout=.1)
    model = GPT(GPTConfig(zero_init=False, **{**shape, **SHAPES[arch], **more}))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2: p.mul_(8)
    return model


def prompts(n=13, longest=20, seed=1):
    "Rows of ids of unequal lengths"
    g = torch.Generator().manual_seed(seed)
    def row():
        size = int(torch.randint(1, longest + 1, (1,), generator=g))
        return torch.randint(1, 50, (size,), generator=g).tolist()
    return [row() for _ in range(n)]


def six_each(n=40):
    "The first six ids of those prompts that have as many (B, 6)"
    return torch.tensor([p[:6] for p in prompts(n) if len(p) >= 6])
