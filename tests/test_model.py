"The model where it is too heavy or too dull for its chapter"
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lm_nb.core import UserError
from lm_nb.model import GPT, GPTConfig, KVCache, attend, attention_weights, from_transformers, to_transformers

SMALL = GPTConfig(vocab_size=97, context=64, n_layer=2, n_head=4, d_model=32)
SHAPES = {
    'gpt2 tied': replace(SMALL, arch='gpt2'),
    'gpt2 untied': replace(SMALL, arch='gpt2', tie=False, norm_eps=1e-5),
    'qwen3 tied': SMALL,
    'qwen3 untied': replace(SMALL, tie=False),
    'qwen3 grouped': replace(SMALL, n_kv_head=2, rope_theta=1e6),
    'qwen3 one key head, wide heads': replace(SMALL, n_kv_head=1, d_head=16, d_ff=40, tie=False),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def cfg(request): return request.param


@pytest.fixture(autouse=True)
def one_thread(): # small tensors: more threads only wait for each other
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def disturbed(cfg, seed=0):
    torch.manual_seed(seed)
    gpt = GPT(cfg).eval()
    with torch.no_grad():
        for p in gpt.parameters(): p.add_(0.15 * torch.randn_like(p))
    return gpt


def tokens(*shape, seed=1): return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
def loss_of(gpt, ids, doc=None): return F.cross_entropy(gpt(ids, doc)[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction='none')
def bf16(): return torch.autocast('cpu', torch.bfloat16)


def library_model(config, state):
    transformers = pytest.importorskip('transformers')
    Model, Config = ((transformers.GPT2LMHeadModel, transformers.GPT2Config) if config['model_type'] == 'gpt2'
                     else (transformers.Qwen3ForCausalLM, transformers.Qwen3Config))
    model = Model(Config(**config)).eval()
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra and set(missing) <= ({'lm_head.weight'} if config['tie_word_embeddings'] else set())
    model.tie_weights()
    return model


@torch.no_grad()
def test_equals_transformers_both_ways(cfg):
    gpt, ids = disturbed(cfg), tokens(3, 64)
    theirs = library_model(*to_transformers(gpt))
    want = theirs(ids).logits
    assert want.std() > 0.3, 'a flat model would agree with anything'
    assert (gpt(ids) - want).abs().max() <= 1e-4
    back = from_transformers(theirs.config.to_dict(), theirs.state_dict()).eval()
    assert (back(ids) - want).abs().max() <= 1e-4
    assert {**vars(back.cfg), 'd_ff': 0, 'd_head': 0, 'n_kv_head': 0} == {**vars(cfg), 'd_ff': 0, 'd_head': 0, 'n_kv_head': 0}


@torch.no_grad()
def test_own_start_of_the_library_comes_over():
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(3)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64, bos_token_id=None, eos_token_id=None)).eval()
    ours = from_transformers(theirs.config.to_dict(), theirs.state_dict()).eval()
    assert (ours(tokens(2, 40)) - theirs(tokens(2, 40)).logits).abs().max() <= 1e-4


def test_gpt2_weights_without_the_outer_name_and_with_old_buffers():
    gpt = disturbed(SHAPES['gpt2 tied'])
    config, state = to_transformers(gpt)
    old = {k.removeprefix('transformer.'): v for k, v in state.items()}
    old |= {'h.0.attn.bias': torch.ones(1, 1, 64, 64), 'h.0.attn.masked_bias': torch.tensor(-1e4)}
    config = {k: v for k, v in config.items() if k not in ('tie_word_embeddings', 'activation_function', 'n_inner')}
    assert torch.equal(from_transformers(config, old).eval()(tokens(1, 9)), gpt(tokens(1, 9)))


def test_foreign_or_broken_weights_are_refused():
    config, state = to_transformers(disturbed(SMALL))
    some = next(k for k in state if 'q_proj' in k)
    for c, s, word in (
        (config, {k: v for k, v in state.items() if k != some}, some),
        (config, {**state, 'model.layers.0.self_attn.q_proj.bias': torch.zeros(32)}, 'q_proj.bias'),
        (config, {**state, some: state[some][:-1]}, some),
        ({**config, 'model_type': 'llama'}, state, 'llama'),
        ({k: v for k, v in config.items() if k != 'hidden_size'}, state, 'hidden_size'),
        ({**config, 'attention_bias': True}, state, 'attention_bias'),
        ({**config, 'rope_parameters': {'rope_type': 'linear', 'factor': 2}}, state, 'linear'),
        ({**config, 'use_sliding_window': True}, state, 'use_sliding_window'),
    ):
        with pytest.raises(UserError, match=word): from_transformers(c, s)


@pytest.mark.parametrize('wrong, word', [
    (dict(arch='llama'), 'llama'), (dict(d_model=34), 'divisible'), (dict(n_kv_head=3), 'n_kv_head'), (dict(n_kv_head=0), 'n_kv_head'),
    (dict(context=0), 'context'), (dict(vocab_size=0), 'vocab_size'), (dict(n_head=0), 'n_head'),
    (dict(n_layer=-1), 'n_layer'), (dict(d_model=0), 'd_model'),
    (dict(d_ff=0), 'd_ff'), (dict(d_head=0), 'd_head'), (dict(d_head=7), 'odd'), (dict(dropout=1.0), 'dropout'),
    (dict(norm_eps=0.), 'norm_eps'), (dict(rope_theta=0.), 'rope_theta'),
    (dict(arch='gpt2', n_kv_head=2), 'qwen3'), (dict(arch='gpt2', d_head=16), 'qwen3')])
def test_impossible_shapes(wrong, word):
    with pytest.raises(UserError, match=word): replace(SMALL, **wrong)


def test_unreadable_ids():
    gpt = GPT(SMALL)
    for ids, word in ((tokens(1, 65), '65'), (torch.full((1, 3), 97), '96'), (torch.full((1, 3), -1), '-1'), (tokens(5), 'shape'), (tokens(2, 0), 'shape')):
        with pytest.raises(UserError, match=word): gpt(ids)


@torch.no_grad()
@pytest.mark.parametrize('auto', [False, True])
def test_causal(cfg, auto):
    gpt, ids = disturbed(cfg), tokens(2, 40)
    other = ids.clone(); other[:, 20] += 1; other %= 97
    with torch.autocast('cpu', torch.bfloat16, enabled=auto): a, b = gpt(ids), gpt(other)
    assert torch.equal(a[:, :20], b[:, :20]) and (a[:, 20:] != b[:, 20:]).any(-1).all()


def test_packed_row_trains_as_separate_rows(cfg):
    gpt = disturbed(cfg).double()
    parts = [tokens(1, n, seed=n) for n in (7, 19, 12)]
    doc = torch.cat([torch.full((1, p.shape[1]), i) for i, p in enumerate(parts)], 1)
    ends = (doc[:, 1:] != doc[:, :-1]).flatten()
    loss_of(gpt, torch.cat(parts, 1), doc)[~ends].sum().backward()
    packed = [p.grad.clone() for p in gpt.parameters()]
    gpt.zero_grad()
    sum(loss_of(gpt, p).sum() for p in parts).backward()
    for a, p in zip(packed, gpt.parameters()): assert torch.allclose(a, p.grad, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize('padded', [False, True])
def test_cache(cfg, padded):
    gpt, ids = disturbed(cfg), tokens(3, 30)
    doc = (torch.arange(30) >= torch.tensor([[0], [4], [11]])).long() - 1 if padded else None
    cache, out = KVCache(cfg, 3, 40), []
    for a, b in ((0, 15), (15, 16), (16, 17), (17, 25), (25, 30)): # one by one and in chunks
        given = doc[:, a:b] if padded and a < 17 else None # afterwards each row goes on with its last document
        out.append(gpt(ids[:, a:b], given, cache=cache))
    gap = (torch.cat(out, 1) - gpt(ids, doc)).abs().amax(-1)
    assert gap[doc >= 0 if padded else ...].max() < 1e-4
    cache.keep(torch.tensor([0, 2]))
    longer = torch.cat((ids, tokens(3, 1, seed=5)), 1)[[0, 2]]
    whole = gpt(longer, F.pad(doc, (0, 1))[[0, 2]] if padded else None)
    assert (gpt(longer[:, -1:], cache=cache) - whole[:, -1:]).abs().max() < 1e-4
    with pytest.raises(UserError, match='no room'): gpt(tokens(2, 20), cache=cache)


@torch.no_grad()
def test_cache_under_autocast():
    gpt, ids = disturbed(SMALL), tokens(2, 20)
    cache = KVCache(SMALL, 2, 20, dtype=torch.bfloat16)
    with bf16(): out = torch.cat([gpt(ids[:, :10], cache=cache)] + [gpt(ids[:, t:t + 1], cache=cache) for t in range(10, 20)], 1)
    assert (out - gpt(ids)).abs().max() < 0.1 * gpt(ids).std()


@torch.no_grad()
def test_given_positions():
    gpt2, qwen3, ids = disturbed(SHAPES['gpt2 tied']), disturbed(SMALL), tokens(2, 10)
    pos = torch.arange(10).expand(2, 10)
    for gpt in gpt2, qwen3: assert torch.allclose(gpt(ids, pos=pos), gpt(ids), atol=1e-5)
    assert torch.allclose(qwen3(ids, pos=pos + 7), qwen3(ids), atol=1e-4), 'only distances count'
    assert not torch.allclose(gpt2(ids, pos=pos + 7), gpt2(ids), atol=1e-1)


@pytest.mark.parametrize('with_doc', [False, True])
def test_half_precision_stays_near(cfg, with_doc):
    gpt, ids = disturbed(cfg), tokens(4, 48)
    doc = (torch.arange(48) // 20).expand(4, 48) if with_doc else None
    loss_of(gpt, ids, doc).mean().backward()
    want = torch.cat([p.grad.flatten() for p in gpt.parameters()])
    gpt.zero_grad()
    with bf16(): loss = loss_of(gpt, ids, doc).mean()
    loss.backward()
    got = torch.cat([p.grad.flatten() for p in gpt.parameters()])
    assert F.cosine_similarity(got, want, dim=0) > 0.99 and 0.95 < got.norm() / want.norm() < 1.05


@pytest.mark.parametrize('kind', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('T', [33, 1100]) # 1100: past the limit up to which bf16 takes plain products
def test_kernels_agree(kind, T):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, T, 8, dtype=kind) for h in (4, 2, 2))
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    want = F.scaled_dot_product_attention(q.double(), *(x.double().repeat_interleave(2, 1) for x in (k, v)), mask)
    bias = torch.zeros(T, T, dtype=kind).masked_fill(~mask, -torch.inf)
    far = 1e-5 if kind == torch.float32 else 0.03
    for got in attend(q, k, v, bias), attend(q, k, v, causal=True): assert got.dtype == kind and (got - want).abs().max() < far


@pytest.mark.parametrize('auto', [False, True])
def test_dropout_only_in_training(auto):
    for arch in 'gpt2', 'qwen3':
        gpt, ids = disturbed(replace(SMALL, arch=arch, dropout=0.5)), tokens(2, 20)
        with torch.autocast('cpu', torch.bfloat16, enabled=auto):
            assert torch.equal(gpt(ids), gpt(ids))
            gpt.train()
            assert not torch.equal(gpt(ids), gpt(ids))
    q = torch.ones(1, 1, 400, 8)
    kept = attend(q, q, q, dropout=0.25).mean().item()
    assert abs(kept - 1) < 0.02, 'what is dropped is made up for'


@pytest.mark.parametrize('arch, auto', [('gpt2', False), ('qwen3', True)])
def test_compiles_to_one_graph(arch, auto):
    gpt, ids = disturbed(replace(SMALL, arch=arch, n_layer=1)), tokens(2, 20)
    doc = (torch.arange(20) // 7).expand(2, 20)
    with torch.autocast('cpu', torch.bfloat16, enabled=auto):
        assert (torch.compile(gpt, backend='eager', fullgraph=True)(ids, doc) - gpt(ids, doc)).abs().max() < (0.05 if auto else 1e-5)


@torch.no_grad()
def test_attention_weights(cfg):
    gpt, ids = disturbed(cfg), tokens(2, 16)
    doc = (torch.arange(16) // 6).expand(2, 16)
    for d in None, doc:
        w = attention_weights(gpt, ids, -1, d)
        assert w.shape == (2, 4, 16, 16) and torch.allclose(w.sum(-1), torch.ones(2, 4, 16), atol=1e-5) and (w.triu(1) == 0).all()
    assert (w[:, :, 6:, :6] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize('D', [64, 512])
@pytest.mark.parametrize('tie', [False, True])
def test_first_loss_is_log_vocabulary(D, tie):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=4096, n_layer=2, d_model=D, tie=tie))
    ids = torch.randint(4096, (4, 100))
    assert abs(loss_of(gpt, ids).mean() - math.log(4096)) < 0.2


@pytest.mark.parametrize('auto', [False, True])
@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
def test_learns_one_batch(arch, auto):
    torch.manual_seed(0)
    gpt, ids = GPT(replace(SMALL, arch=arch)), tokens(4, 24)
    ids[:, 0] = torch.arange(4) # the first token tells the rows apart
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=5e-3, betas=(0.9, 0.95))
    for _ in range(120):
        with torch.autocast('cpu', torch.bfloat16, enabled=auto): loss = loss_of(gpt, ids).mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert loss < 0.1


def test_sizes_are_known_before_they_are_paid_for():
    with torch.device('meta'):
        gpt2 = GPT(GPTConfig('gpt2', 50257, 1024, 12, 12, 768))
        qwen3 = GPT(GPTConfig('qwen3', 151936, 40960, 28, 16, 1024, n_kv_head=8, d_head=128, d_ff=3072, rope_theta=1e6))
    assert gpt2.n_params() == 124_439_808 and qwen3.n_params() == 596_049_920 # GPT-2 small, Qwen3-0.6B
    assert gpt2(torch.zeros(2, 10, dtype=torch.int64, device='meta')).shape == (2, 10, 50257)
    assert gpt2.flops_per_token(1024) == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 1024 * 768
