"The model where it is too heavy or too dull for its chapter"
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lm_nb.core import UserError
from lm_nb.model import (GPT, GPTConfig, KVCache, attend, attention_kernel, attention_weights, chunked_nll, from_transformers, kernel_times, pick_attention,
                         plainly, to_transformers)
from lm_nb.shards import IGNORE

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
def targets(ids, share=0.3, seed=7): return ids.roll(-1, 1).masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < share, IGNORE)


def close_all(got, want, far):
    "Each tensor within `far` of the other's length, or of a thousandth of the longest: the gradient of a key's bias is 0 but for rounding"
    longest = max(b.norm() for b in want)
    for a, b in zip(got, want, strict=True): assert (a - b).norm() <= far * max(b.norm(), longest / 1000), (a.shape, a.norm(), b.norm())


def loss_and_gradients(gpt, ids, doc, y, auto=False):
    with torch.autocast('cpu', torch.bfloat16, enabled=auto): loss = gpt(ids, doc, targets=y)
    return [loss.detach(), *torch.autograd.grad(loss, list(gpt.parameters()))]


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


def test_heads_work_themselves_out():
    heads = {D: GPTConfig(d_model=D).n_head for D in (32, 128, 192, 256, 320, 384, 768, 1024, 130, 514)}
    assert heads == {32: 1, 128: 4, 192: 6, 256: 8, 320: 5, 384: 6, 768: 12, 1024: 16, 130: 5, 514: 1}
    assert all(GPTConfig(d_model=D).head_size * n == D for D, n in heads.items())
    assert GPTConfig(d_model=768, n_kv_head=4).n_head == 12 and GPTConfig(d_model=512, n_kv_head=3, d_head=64).n_head == 9
    assert GPTConfig(d_model=512, n_head=4).n_head == 4 and GPTConfig('gpt2', d_model=65).n_head in (1, 5)
    for wrong, word in (dict(d_model=0), 'd_model'), (dict(n_kv_head=0), 'n_kv_head'), (dict(d_model=33), 'odd'), (dict(n_kv_head=7), 'n_kv_head'):
        with pytest.raises(UserError, match=word): GPTConfig(**wrong)
    assert GPTConfig(d_model=10**15).n_head >= 1, 'at once'


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


@pytest.mark.parametrize('arch, auto, packed, recompute, backend', [('gpt2', False, False, False, 'eager'), ('qwen3', True, True, True, 'aot_eager')])
def test_training_compiles_to_one_graph(arch, auto, packed, recompute, backend):
    gpt, ids = disturbed(replace(SMALL, arch=arch, n_layer=1, vocab_multiple=8, recompute=recompute)).train(), tokens(2, 20)
    doc, y = (torch.arange(20) // 7).expand(2, 20) if packed else None, targets(ids)
    compiled, grads = torch.compile(gpt, backend=backend, fullgraph=True, dynamic=False), []
    for model in gpt, compiled:
        with torch.autocast('cpu', torch.bfloat16, enabled=auto): loss = model(ids, doc=doc, targets=y)
        grads.append((loss.detach(), *torch.autograd.grad(loss, list(gpt.parameters()))))
    close_all(*grads, far=0.05 if auto else 1e-5)
    assert compiled(ids, targets=torch.full_like(y, IGNORE)) == 0


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


# ------------------------------------------------------------------ the fast ways against the plain ones

@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('context', [40, 300]) # one block of attention; several, the last one shorter
def test_fast_equals_plain(cfg, packed, context):
    gpt, ids = disturbed(replace(cfg, context=context, norm_eps=1e-5)).train(), tokens(2, context)
    doc, y = torch.arange(context).expand(2, context) // 17 if packed else None, targets(ids)
    fast = loss_and_gradients(gpt, ids, doc, y)
    rough = loss_and_gradients(gpt, ids, doc, y, auto=True)
    with plainly(): plain = loss_and_gradients(gpt, ids, doc, y)
    close_all(fast[:1], plain[:1], 1e-6), close_all(fast, plain, 1e-4)
    close_all(rough[:1], plain[:1], 0.01)
    rough, plain = (torch.cat([g.flatten() for g in x[1:]]) for x in (rough, plain))
    assert F.cosine_similarity(rough, plain, dim=0) > 0.99


def test_fast_equals_plain_at_given_positions():
    gpt, ids = disturbed(SHAPES['qwen3 grouped']).train(), tokens(3, 20)
    pos, grads = torch.arange(20) + torch.tensor([[0], [5], [11]]), []
    for _ in range(2):
        loss = F.cross_entropy(gpt(ids, pos=pos).flatten(0, 1), targets(ids).flatten(), reduction='sum')
        grads.append(torch.autograd.grad(loss, list(gpt.parameters())))
        with plainly(): plain = torch.autograd.grad(gpt(ids, pos=pos).square().sum(), list(gpt.parameters()))
    close_all(torch.autograd.grad(gpt(ids, pos=pos).square().sum(), list(gpt.parameters())), plain, 1e-4)
    assert all(torch.equal(a, b) for a, b in zip(*grads)), 'the same twice, to the bit'


def test_plainly_ends_where_it_says():
    gpt, ids = disturbed(SMALL), tokens(1, 8)
    with pytest.raises(ZeroDivisionError), plainly(): raise ZeroDivisionError
    assert 'ChunkedNLL' in type(gpt(ids, targets=ids).grad_fn).__name__
    with plainly():
        with plainly(): pass
        assert 'ChunkedNLL' not in type(gpt(ids, targets=ids).grad_fn).__name__


@pytest.mark.parametrize('kind, far', [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize('rows', [1, 7, 64, None])
def test_chunked_loss(kind, far, rows):
    torch.manual_seed(0)
    h, w = (torch.randn(n, 16, dtype=torch.float64).to(kind).requires_grad_() for n in (60, 33))
    y = torch.randint(31, (60,)).masked_fill(torch.rand(60) < 0.4, IGNORE)
    loss = chunked_nll(h, w, y, 31, rows)
    z = h.double() @ w.double().T[:, :31]
    want = F.cross_entropy(z, y, ignore_index=IGNORE, reduction='sum')
    assert loss.dtype == torch.promote_types(kind, torch.float32) and abs(loss - want) <= far * want
    got, want = torch.autograd.grad(5 * loss, (h, w)), torch.autograd.grad(5 * want, (h, w))
    close_all([g.double() for g in got], [g.double() for g in want], far)
    assert (got[1][31:] == 0).all() and (got[0][y == IGNORE] == 0).all()
    with torch.no_grad(): assert torch.equal(chunked_nll(h, w, y, 31, rows), loss)


def test_chunked_loss_of_certain_and_hopeless_scores():
    w = torch.eye(4).requires_grad_()
    h, y = torch.tensor([[1e4, 0, 0, 0], [1e4, 0, 0, 0], [-1e4, -1e4, -1e4, -1e4]]).requires_grad_(), torch.tensor([0, 1, 2])
    loss = chunked_nll(h, w, y)
    assert torch.allclose(loss, torch.tensor(1e4 + math.log(4)))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (h, w)))


def test_nan_is_not_hidden():
    gpt, ids = disturbed(SMALL), tokens(1, 8)
    with torch.no_grad(): gpt.norm.weight[0] = torch.nan
    assert gpt(ids, targets=ids).isnan()


@pytest.mark.parametrize('auto', [False, True])
def test_batch_without_targets(cfg, auto):
    gpt, ids = disturbed(replace(cfg, vocab_multiple=16)), tokens(2, 12)
    loss, *grads = loss_and_gradients(gpt, ids, None, torch.full_like(ids, IGNORE), auto)
    assert loss.dtype == torch.float32 and loss.item() == 0 and all((g == 0).all() for g in grads)


class Largest(TorchDispatchMode):
    "The most elements that any tensor made inside had"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.n = max([self.n, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def test_only_one_chunk_of_logits_exists():
    h, w, y = torch.randn(512, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True), torch.randint(1000, (512,))
    sizes = {}
    for rows in 32, 512:
        with Largest() as largest: chunked_nll(h, w, y, rows=rows).backward()
        sizes[rows] = largest.n
    assert sizes == {32: 32 * 1000, 512: 512 * 1000}


def test_rounded_vocabulary_is_the_same_model():
    for cfg in SHAPES['gpt2 tied'], SHAPES['qwen3 untied']:
        gpt, wide, ids = disturbed(cfg), disturbed(replace(cfg, vocab_multiple=50)), tokens(2, 30)
        state = {n: x if 'embed' not in n and 'head' not in n or n.startswith('pos') else F.pad(x, (0, 0, 0, 3), value=9.) for n, x in gpt.state_dict().items()}
        wide.load_state_dict(state)
        assert wide.head_weight.shape[0] == 100 and wide(ids).shape == (2, 30, 97) and torch.allclose(wide(ids), gpt(ids), atol=1e-5)
        got, want = loss_and_gradients(wide, ids, None, targets(ids)), loss_and_gradients(gpt, ids, None, targets(ids))
        close_all([g[:97] if g.ndim and len(g) == 100 else g for g in got], want, 1e-5)
        assert all((g[97:] == 0).all() for g in got if g.ndim and len(g) == 100)
        (config, theirs), (_, same) = to_transformers(wide), to_transformers(gpt)
        assert config['vocab_size'] == 97 and all(torch.equal(theirs[n], same[n]) for n in same)
        assert torch.allclose(library_model(config, theirs)(ids).logits, gpt(ids), atol=1e-4)


def bytes_kept(gpt, ids):
    "What the forward pass keeps for the backward pass, without the weights"
    kept, own = {}, {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    def note(x):
        if x.untyped_storage().data_ptr() not in own: kept[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x): loss = gpt(ids, targets=ids)
    return sum(n for n, _ in kept.values()), loss


@pytest.mark.parametrize('dropout', [0., 0.2])
def test_recomputing_gives_the_same_for_less_memory(cfg, dropout):
    ids, out = tokens(2, 40), []
    for again in False, True:
        gpt = disturbed(replace(cfg, n_layer=4, dropout=dropout, recompute=again)).train()
        torch.manual_seed(5)
        kept, loss = bytes_kept(gpt, ids)
        torch.manual_seed(5)
        out.append((kept, loss_and_gradients(gpt, ids, None, ids)))
    assert out[1][0] < out[0][0] / 3
    assert all(torch.equal(a, b) for a, b in zip(out[0][1], out[1][1])), 'to the bit, dropout included'


def test_kernels_by_name():
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    want = attend(q, k, v, causal=True)
    for name in 'auto', 'math', 'flash', 'cudnn': # the last is not for CPUs: another steps in
        with plainly(), attention_kernel(name): assert torch.allclose(attend(q, k, v, causal=True), want, atol=1e-6)
    with pytest.raises(UserError, match="did you mean 'flash'"), attention_kernel('flush'): pass
    for bias in None, torch.full((16, 16), -torch.inf).triu(1):
        times = kernel_times(q, k, v, bias, rounds=1)
        assert 'math' in times and 'cudnn' not in times and min(times.values()) > 0
    assert pick_attention(SMALL, 2, torch.device('cpu'), torch.bfloat16, masked=True) == 'auto'
