"The fast functions against the plain ones: values, gradients, memory, and what only they can do"
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lm_nb.core import UserError
from lm_nb.data.shards import IGNORE
from lm_nb.model import fused
from lm_nb.model.fused import (
    KVCache, attention_kernel, attention_weights, chunked_nll, _fused_attention, _kernel_times,
    pick_attention, reference_ops)
from lm_nb.model.gpt import Ops, _attention, _nll, ops
from tiny_models import (
    SHAPES, SMALL, bf16, close_all, disturbed, generator, loss_and_gradients, targets, tokens)


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('context', [40, 300]) # one block of attention; several, the last shorter
def test_fast_equals_plain(cfg, packed, context):
    cfg = replace(cfg, context=context, norm_eps=1e-5)
    gpt, ids = disturbed(cfg).train(), tokens(2, context)
    doc = torch.arange(context).expand(2, context) // 17 if packed else None
    y, weight = targets(ids), torch.rand(2, context, generator=generator(2))
    for w in None, weight:
        fast = loss_and_gradients(gpt, ids, doc, y, weight=w)
        rough = loss_and_gradients(gpt, ids, doc, y, auto=True, weight=w)
        with reference_ops(): plain = loss_and_gradients(gpt, ids, doc, y, weight=w)
        close_all(fast[:1], plain[:1], 1e-6)
        close_all(fast, plain, 1e-4)
        close_all(rough[:1], plain[:1], 0.01)
        rough, plain = (torch.cat([g.flatten() for g in x[1:]]) for x in (rough, plain))
        assert F.cosine_similarity(rough, plain, dim=0) > 0.99


def test_fast_equals_plain_at_given_positions():
    gpt, ids = disturbed(SHAPES['qwen3 grouped']).train(), tokens(3, 20)
    pos = torch.arange(20) + torch.tensor([[0], [5], [11]])
    def gradients():
        return torch.autograd.grad(gpt(ids, pos=pos).square().sum(), list(gpt.parameters()))
    fast, again = gradients(), gradients()
    with reference_ops(): plain = gradients()
    close_all(fast, plain, 1e-4)
    assert all(torch.equal(a, b) for a, b in zip(fast, again)), 'the same twice, to the bit'


@pytest.mark.parametrize('name', vars(Ops()))
def test_each_function_alone_equals_the_plain_one(name):
    gpt, ids = disturbed(SHAPES['qwen3 grouped']).train(), tokens(2, 30)
    doc, y = (torch.arange(30) // 11).expand(2, 30), targets(ids)
    with reference_ops(): plain = loss_and_gradients(gpt, ids, doc, y)
    if name == 'attn_context': name = 'norm_rope' # what it prepares is read by the others
    with reference_ops(name): some = loss_and_gradients(gpt, ids, doc, y)
    close_all(some, plain, 1e-4)


def test_reference_ops_end_where_they_say():
    gpt, ids = disturbed(SMALL), tokens(1, 8)
    def fast(): return 'ChunkedNLL' in type(gpt(ids, targets=ids).grad_fn).__name__
    with pytest.raises(ZeroDivisionError), reference_ops(): raise ZeroDivisionError
    with pytest.raises(AttributeError), reference_ops('no such function'): pass
    assert fast() and all(vars(ops)[name] is not f for name, f in vars(Ops()).items())
    with reference_ops():
        with reference_ops(): pass
        assert not fast() and ops == Ops()
    assert fast()


@pytest.mark.parametrize('kind, far', [
    (torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize('rows', [1, 7, 64, None])
@pytest.mark.parametrize('weighted', [False, True])
def test_chunked_loss(kind, far, rows, weighted):
    torch.manual_seed(0)
    h, w = (torch.randn(n, 16, dtype=torch.float64).to(kind).requires_grad_() for n in (60, 33))
    y = torch.randint(31, (60,)).masked_fill(torch.rand(60) < 0.4, IGNORE)
    weight = torch.rand(60, dtype=torch.float64) if weighted else None
    loss = chunked_nll(h, w, y, 31, weight, rows)
    z = h.double() @ w.double().T[:, :31]
    want = F.cross_entropy(z, y, ignore_index=IGNORE, reduction='none')
    want = (want * weight if weighted else want).sum()
    assert loss.dtype == torch.promote_types(kind, torch.float32) and abs(loss - want) <= far * want
    got, want = torch.autograd.grad(5 * loss, (h, w)), torch.autograd.grad(5 * want, (h, w))
    close_all([g.double() for g in got], [g.double() for g in want], far)
    assert (got[1][31:] == 0).all() and (got[0][y == IGNORE] == 0).all()
    with torch.no_grad(): assert torch.equal(chunked_nll(h, w, y, 31, weight, rows), loss)


def test_a_weight_where_nothing_is_asked_does_not_count():
    h, w = torch.randn(4, 8), torch.randn(11, 8)
    y, weight = torch.tensor([3, IGNORE, 5, IGNORE]), torch.tensor([1., torch.nan, 2., torch.inf])
    few = _nll(h[::2], w, y[::2], 11, weight[::2])
    assert torch.allclose(chunked_nll(h, w, y, 11, weight), few)


def test_chunked_loss_of_certain_and_hopeless_scores():
    w = torch.eye(4).requires_grad_()
    h = torch.tensor([[1e4, 0, 0, 0], [1e4, 0, 0, 0], [-1e4, -1e4, -1e4, -1e4]]).requires_grad_()
    loss = chunked_nll(h, w, torch.tensor([0, 1, 2]))
    assert torch.allclose(loss, torch.tensor(1e4 + math.log(4)))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (h, w)))


class Largest(TorchDispatchMode):
    "The most elements that any tensor made inside had"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.n = max([self.n, *sizes])
        return out


def test_only_one_chunk_of_logits_exists():
    h, w = torch.randn(512, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    y, sizes = torch.randint(1000, (512,)), {}
    for rows in 32, 512:
        with Largest() as largest: chunked_nll(h, w, y, rows=rows).backward()
        sizes[rows] = largest.n
    assert sizes == {32: 32 * 1000, 512: 512 * 1000}


@pytest.mark.parametrize('kind', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('T', [33, 1100]) # 1100: several blocks of queries
@pytest.mark.parametrize('learns', [False, True])
def test_versions_of_attention_agree(kind, T, learns):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, T, 8, dtype=kind, requires_grad=learns) for h in (4, 2, 2))
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    want = _attention(q.double(), k.double(), v.double(), mask)
    bias = torch.zeros(T, T, dtype=kind).masked_fill(~mask, -torch.inf)
    far = 1e-5 if kind == torch.float32 else 0.03
    for got in _fused_attention(q, k, v, bias), _fused_attention(q, k, v):
        assert got.dtype == kind and (got - want).abs().max() < far


@pytest.mark.parametrize('version', [_attention, _fused_attention])
def test_what_is_dropped_is_made_up_for(version):
    torch.manual_seed(0)
    q, everything = torch.ones(1, 1, 400, 8), torch.zeros(400, 400)
    kept = version(q, q, q, everything, 0.25)
    assert abs(kept.mean() - 1) < 0.02 and kept.std() > 0.01


def test_kernels_by_name():
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    want = _fused_attention(q, k, v)
    for name in 'auto', 'math', 'flash', 'cudnn': # the last is not for CPUs: another steps in
        with attention_kernel(name): assert torch.allclose(_attention(q, k, v), want, atol=1e-6)
    with pytest.raises(UserError, match="did you mean 'flash'"), attention_kernel('flush'): pass
    for bias in None, torch.full((16, 16), -torch.inf).triu(1):
        times = _kernel_times(q, k, v, bias, rounds=1)
        assert 'math' in times and 'cudnn' not in times and min(times.values()) > 0
    assert pick_attention(SMALL, 2, torch.device('cpu'), torch.bfloat16, masked=True) == 'auto'


@torch.no_grad()
def test_attention_weights(cfg):
    gpt, ids = disturbed(cfg), tokens(2, 16)
    doc = (torch.arange(16) // 6).expand(2, 16)
    for d in None, doc:
        outputs = []
        note = lambda module, args, out, to=outputs: to.append(out)
        hook = gpt.blocks[-1].attn.register_forward_hook(note)
        w, _ = attention_weights(gpt, ids, -1, d), gpt(ids, d)
        hook.remove()
        assert torch.allclose(*outputs, atol=1e-4), 'weights times values are its result'
        assert w.shape == (2, 4, 16, 16) and (w.triu(1) == 0).all()
        assert torch.allclose(w.sum(-1), torch.ones(2, 4, 16), atol=1e-5)
    assert (w[:, :, 6:, :6] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize('padded', [False, True])
def test_cache(cfg, padded):
    gpt, ids = disturbed(cfg), tokens(3, 30)
    doc = (torch.arange(30) >= torch.tensor([[0], [4], [11]])).long() - 1 if padded else None
    cache, out = KVCache(cfg, 3, 40), []
    for a, b in ((0, 15), (15, 16), (16, 17), (17, 25), (25, 30)): # one by one and in chunks
        given = doc[:, a:b] if padded and a < 17 else None # then it goes on with its last one
        out.append(gpt(ids[:, a:b], given, cache=cache))
    gap = (torch.cat(out, 1) - gpt(ids, doc)).abs().amax(-1)
    assert gap[doc >= 0 if padded else ...].max() < 1e-4
    cache.keep(torch.tensor([0, 2]))
    longer = torch.cat((ids, tokens(3, 1, seed=5)), 1)[[0, 2]]
    whole = gpt(longer, F.pad(doc, (0, 1))[[0, 2]] if padded else None)
    assert (gpt(longer[:, -1:], cache=cache) - whole[:, -1:]).abs().max() < 1e-4
    with pytest.raises(UserError, match='no room'): gpt(tokens(2, 20), cache=cache)
    with pytest.raises(UserError, match='longer than'): KVCache(cfg, 1, 65)


@torch.no_grad()
def test_cache_under_autocast():
    gpt, ids = disturbed(SMALL), tokens(2, 20)
    cache = KVCache(SMALL, 2, 20, dtype=torch.bfloat16)
    with bf16():
        out = [gpt(ids[:, :10], cache=cache)]
        out += [gpt(ids[:, t:t + 1], cache=cache) for t in range(10, 20)]
    assert (torch.cat(out, 1) - gpt(ids)).abs().max() < 0.1 * gpt(ids).std()


@pytest.mark.parametrize('n', [0, 1, 127, 128, 129, 300, 384])
def test_how_many_targets_there_are_changes_neither_loss_nor_gradients(n):
    "A few positions without a target are computed, too; shapes are multiples of 128"
    g = torch.Generator().manual_seed(n)
    h, w = torch.randn(384, 16, generator=g), torch.randn(50, 16, generator=g)
    y = torch.randint(50, (384,), generator=g)
    y[torch.randperm(384, generator=g)[n:]] = IGNORE
    h, w = h.requires_grad_(), w.requires_grad_()
    got = torch.autograd.grad(chunked_nll(h, w, y), (h, w))
    exact = torch.nn.functional.cross_entropy(h @ w.T, y, reduction='sum', ignore_index=IGNORE)
    want = torch.autograd.grad(exact, (h, w))
    assert torch.allclose(chunked_nll(h, w, y), exact, rtol=1e-5)
    for a, b in zip(got, want): assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert (got[0][y == IGNORE] == 0).all()
    kept = fused._with_targets(y)
    assert len(kept) % 128 == 0 and len(set(kept.tolist())) == len(kept) >= n
    assert set((y != IGNORE).nonzero()[:, 0].tolist()) <= set(kept.tolist())
