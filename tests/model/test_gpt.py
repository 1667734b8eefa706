"""The model where it is too heavy or too dull for its chapter, with the plain functions and with
the fast ones"""
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lm_nb.core import UserError
from lm_nb.data.shards import IGNORE
from lm_nb.model.fused import reference_ops
from lm_nb.model.gpt import GPT, GPTConfig
from tiny_models import (
    SHAPES, SMALL, bf16, close_all, disturbed, loss_and_gradients, loss_of, targets, tokens)


@pytest.fixture(params=['plain', 'fused'], autouse=True)
def version(request):
    if request.param == 'fused': yield
    else:
        with reference_ops(): yield


@pytest.mark.parametrize('wrong, word', [
    (dict(arch='llama'), 'llama'), (dict(d_model=34), 'divisible'),
    (dict(n_kv_head=3), 'n_kv_head'), (dict(n_kv_head=0), 'n_kv_head'),
    (dict(context=0), 'context'), (dict(vocab_size=0), 'vocab_size'),
    (dict(n_head=0), 'n_head'), (dict(n_layer=-1), 'n_layer'), (dict(d_model=0), 'd_model'),
    (dict(d_ff=0), 'd_ff'), (dict(d_head=0), 'd_head'), (dict(d_head=7), 'odd'),
    (dict(dropout=1.0), 'dropout'), (dict(dropout=-0.1), 'dropout'),
    (dict(norm_eps=0.), 'norm_eps'), (dict(rope_theta=0.), 'rope_theta'),
    (dict(vocab_multiple=0), 'vocab_multiple'),
    (dict(arch='gpt2', n_kv_head=2), 'qwen3'), (dict(arch='gpt2', d_head=16), 'qwen3')])
def test_impossible_shapes(wrong, word):
    with pytest.raises(UserError, match=word): replace(SMALL, **wrong)


def test_heads_work_themselves_out():
    heads = {32: 1, 128: 4, 192: 6, 256: 8, 320: 5, 384: 6, 768: 12, 1024: 16, 130: 5, 514: 1}
    for D, n in heads.items():
        assert GPTConfig(d_model=D).n_head == n and GPTConfig(d_model=D).head_size * n == D
    assert GPTConfig(d_model=768, n_kv_head=4).n_head == 12
    assert GPTConfig(d_model=512, n_kv_head=3, d_head=64).n_head == 9
    assert GPTConfig(d_model=512, n_head=4).n_head == 4
    assert GPTConfig('gpt2', d_model=65).n_head in (1, 5)
    for wrong, word in ((dict(d_model=0), 'd_model'), (dict(n_kv_head=0), 'n_kv_head'),
                        (dict(d_model=33), 'odd'), (dict(n_kv_head=7), 'n_kv_head')):
        with pytest.raises(UserError, match=word): GPTConfig(**wrong)
    assert GPTConfig(d_model=10**15).n_head >= 1, 'at once'


def test_unreadable_ids():
    gpt = GPT(SMALL)
    wrong = ((tokens(1, 65), '65'), (torch.full((1, 3), 97), '96'), (torch.full((1, 3), -1), '-1'),
             (tokens(5), 'shape'), (tokens(2, 0), 'shape'))
    for ids, word in wrong:
        with pytest.raises(UserError, match=word): gpt(ids)


@torch.no_grad()
@pytest.mark.parametrize('auto', [False, True])
def test_causal(cfg, auto):
    gpt, ids = disturbed(cfg), tokens(2, 40)
    other = ids.clone()
    other[:, 20] = (other[:, 20] + 1) % 97
    with bf16(auto): a, b = gpt(ids), gpt(other)
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
    for a, p in zip(packed, gpt.parameters()):
        assert torch.allclose(a, p.grad, rtol=1e-3, atol=1e-4)


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


@pytest.mark.parametrize('auto', [False, True])
def test_dropout_only_in_training(auto):
    for arch in 'gpt2', 'qwen3':
        gpt, ids = disturbed(replace(SMALL, arch=arch, dropout=0.5)), tokens(2, 20)
        with bf16(auto):
            assert torch.equal(gpt(ids), gpt(ids))
            gpt.train()
            assert not torch.equal(gpt(ids), gpt(ids))


@pytest.mark.parametrize('arch, auto, packed, recompute, weighted, backend', [
    ('gpt2', False, False, False, False, 'eager'), ('qwen3', True, True, True, True, 'aot_eager')])
def test_training_compiles_to_one_graph(arch, auto, packed, recompute, weighted, backend):
    cfg = replace(SMALL, arch=arch, n_layer=1, vocab_multiple=8, recompute=recompute)
    gpt, ids, grads = disturbed(cfg).train(), tokens(2, 20), []
    doc, y = (torch.arange(20) // 7).expand(2, 20) if packed else None, targets(ids)
    weight = torch.rand(2, 20) if weighted else None
    compiled = torch.compile(gpt, backend=backend, fullgraph=True, dynamic=False)
    for model in gpt, compiled:
        with bf16(auto): loss = model(ids, doc=doc, targets=y, weight=weight)
        grads.append((loss.detach(), *torch.autograd.grad(loss, list(gpt.parameters()))))
    close_all(*grads, far=0.05 if auto else 1e-5)
    assert compiled(ids, targets=torch.full_like(y, IGNORE)) == 0


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
        with bf16(auto): loss = loss_of(gpt, ids).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_sizes_are_known_before_they_are_paid_for():
    small = GPTConfig('gpt2', 50257, 1024, 12, 12, 768)
    modern = GPTConfig('qwen3', 151936, 40960, 28, 16, 1024, n_kv_head=8, d_head=128, d_ff=3072)
    with torch.device('meta'):
        gpt2, qwen3 = GPT(small), GPT(modern)
        ids = torch.zeros(2, 10, dtype=torch.int64)
    assert gpt2.n_params() == 124_439_808 and qwen3.n_params() == 596_049_920 # as published
    assert gpt2(ids).shape == (2, 10, 50257)


def test_weights_scale_the_loss_of_each_target(cfg):
    gpt, ids = disturbed(cfg).train(), tokens(3, 40)
    y, weight = targets(ids), torch.rand(3, 40, generator=torch.Generator().manual_seed(3)) * 2
    ones = loss_and_gradients(gpt, ids, None, y, weight=torch.ones(3, 40))
    close_all(ones, loss_and_gradients(gpt, ids, None, y), 1e-5)
    how = dict(ignore_index=IGNORE, reduction='none')
    each = F.cross_entropy(gpt(ids).flatten(0, 1), y.flatten(), **how)
    want = (each * weight.flatten()).sum()
    want = [want.detach(), *torch.autograd.grad(want, list(gpt.parameters()))]
    close_all(loss_and_gradients(gpt, ids, None, y, weight=weight), want, 1e-4)
    masked = torch.where(weight > 1, weight, 0.)
    same = loss_and_gradients(gpt, ids, None, y.masked_fill(weight <= 1, IGNORE), weight=weight)
    close_all(loss_and_gradients(gpt, ids, None, y, weight=masked), same, 1e-5)


def test_nan_is_not_hidden():
    gpt, ids = disturbed(SMALL), tokens(1, 8)
    with torch.no_grad(): gpt.norm.weight[0] = torch.nan
    assert gpt(ids, targets=ids).isnan()


@pytest.mark.parametrize('auto', [False, True])
def test_batch_without_targets(cfg, auto):
    gpt, ids = disturbed(replace(cfg, vocab_multiple=16)), tokens(2, 12)
    for weight in None, torch.rand(2, 12):
        nothing = torch.full_like(ids, IGNORE)
        loss, *grads = loss_and_gradients(gpt, ids, None, nothing, auto, weight)
        assert loss.dtype == torch.float32 and loss.item() == 0
        assert all((g == 0).all() for g in grads)


def test_rounded_vocabulary_is_the_same_model():
    for cfg in SHAPES['gpt2 tied'], SHAPES['qwen3 untied']:
        gpt, padded, ids = disturbed(cfg), disturbed(replace(cfg, vocab_multiple=50)), tokens(2, 30)
        table = lambda name: name in ('embed.weight', 'lm_head.weight')
        padded.load_state_dict({n: F.pad(x, (0, 0, 0, 3), value=9.) if table(n) else x
                                for n, x in gpt.state_dict().items()})
        assert padded.head_weight.shape[0] == 100 and padded(ids).shape == (2, 30, 97)
        assert torch.allclose(padded(ids), gpt(ids), atol=1e-5)
        got, want = (loss_and_gradients(m, ids, None, targets(ids)) for m in (padded, gpt))
        tables = [g for g in got if g.ndim and len(g) == 100]
        close_all([g[:97] if g.ndim and len(g) == 100 else g for g in got], want, 1e-5)
        assert tables and all((g[97:] == 0).all() for g in tables)


def bytes_kept(gpt, ids):
    "What the forward pass keeps for the backward pass, without the weights"
    kept, own = {}, {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own: kept[storage.data_ptr()] = storage.nbytes(), x
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x): loss = gpt(ids, targets=ids)
    return sum(n for n, _ in kept.values()), loss


@pytest.mark.parametrize('dropout', [0., 0.2])
def test_recomputing_gives_the_same_for_less_memory(cfg, dropout):
    ids, out = tokens(2, 40), []
    for again in False, True:
        gpt = disturbed(replace(cfg, n_layer=4, dropout=dropout, recompute=again)).train()
        torch.manual_seed(5)
        kept, _ = bytes_kept(gpt, ids)
        torch.manual_seed(5)
        out.append((kept, loss_and_gradients(gpt, ids, None, ids)))
    assert out[1][0] < out[0][0] / 3
    assert all(torch.equal(a, b) for a, b in zip(out[0][1], out[1][1])), 'to the bit, with dropout'
