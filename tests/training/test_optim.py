"""The optimizers against torch's, against naive loops, in odd situations; the schedules at all
lengths"""
import copy, io, math, os
from dataclasses import dataclass
from itertools import pairwise
import pytest, torch
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st
from torch import nn
from lm_nb.core import UserError
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.training import optim
from lm_nb.training.optim import (
    Muon, OptimConfig, _default_batch_tokens, _default_lr, lr_factor, make_optimizers,
    _orthogonalize, _orthogonalize_all, _matmul_dtype, _param_groups, _walk, set_lr,
    resolve_defaults)

SHAPES = [(16, 16), (48, 16), (16, 48), (16, 16), (1, 16), (16, 1), (48, 16), (7, 5)]

def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def tiny(**kw):
    return GPT(GPTConfig(
        **{**dict(vocab_size=19, context=16, n_layer=2, n_head=2, d_model=16, d_ff=32), **kw}))

def train(model, optimizers, steps):
    for s in steps:
        x = torch.randint(0, 19, (4, 17), generator=torch.Generator().manual_seed(s))
        nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
        for o in optimizers: o.step(), o.zero_grad()
    return model

def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))

def naive_muon(p, g, m, lr, mu, decay, cautious=False):
    "The paper's step for one matrix, with its own loop, in double precision"
    m.mul_(mu).add_(g, alpha=1 - mu)
    X = ((1 - mu) * g + mu * m).double()
    tall = X.shape[0] > X.shape[1]
    X = X.T if tall else X
    X = X / X.norm()
    for _ in range(5): X = 3.4445*X - 4.7750*(X @ X.T) @ X + 2.0315*(X @ X.T) @ (X @ X.T) @ X
    X = X.T if tall else X
    for i in range(p.shape[0]):
        for j in range(p.shape[1]):
            if not cautious or p[i, j] * X[i, j] > 0: p[i, j] *= 1 - lr*decay
    p.sub_(lr * max(1, p.shape[0]/p.shape[1])**0.5 * X.to(p.dtype))

@pytest.mark.parametrize('cautious', [False, True])
def test_stacks_equal_a_loop_over_matrices(cautious):
    """Batching, transposing and baddbmm change nothing beyond rounding, over several steps with
    momentum and decay"""
    ours = [nn.Parameter(rand(*s, seed=i)) for i, s in enumerate(SHAPES)]
    theirs, means = [p.detach().clone() for p in ours], [torch.zeros(s) for s in SHAPES]
    o = Muon(ours, lr=0.1, weight_decay=0.2, momentum=0.9, dtype=torch.float32, cautious=cautious)
    for step in range(4):
        for i, p in enumerate(ours): p.grad = rand(*p.shape, seed=100*step + i)
        for p, q, m in zip(ours, theirs, means): naive_muon(q, p.grad, m, 0.1, 0.9, 0.2, cautious)
        o.step()
    for p, q in zip(ours, theirs): torch.testing.assert_close(p.detach(), q, atol=2e-4, rtol=0)

@pytest.mark.parametrize('shape', [(32, 32), (96, 32), (32, 96)])
def test_muon_follows_torchs(shape):
    a, b = (nn.Parameter(0.1*rand(*shape)) for _ in range(2))
    ours, theirs = (Muon([a], 0.02, 0.1, dtype=torch.bfloat16, cautious=False),
                    torch.optim.Muon([b], 0.02, 0.1, 0.95))
    for step in range(5):
        a.grad = b.grad = rand(*shape, seed=step)
        ours.step(), theirs.step()
    assert (a - b).norm() < 0.02 * (a - 0.1*rand(*shape)).norm()
    assert torch.equal(ours.state[a]['momentum_buffer'], theirs.state[b]['momentum_buffer'])

def test_bf16_points_where_fp32_does():
    G = rand(6, 32, 64)
    a, b = _orthogonalize(G), _orthogonalize(G, dtype=torch.bfloat16)
    assert b.dtype == torch.float32 and (a - b).norm() < 0.03 * a.norm()

def test_the_scale_of_a_gradient_is_lost_and_its_sign_kept():
    G = rand(3, 8, 24)
    for scale in (1e-4, 1e5):
        torch.testing.assert_close(_orthogonalize(scale*G), _orthogonalize(G), atol=1e-4, rtol=0)
    torch.testing.assert_close(_orthogonalize(-G), -_orthogonalize(G))

def test_cautious_decay_never_grows_a_weight_that_the_step_shrinks_less():
    """Beside no decay, each weight ends nearer to zero or at the same place; where step and weight
    differ in sign it is the same place"""
    ends = {}
    for decay in (0., 0.5):
        p = nn.Parameter(rand(24, 16))
        p.grad = rand(24, 16, seed=1)
        Muon([p], 0.01, weight_decay=decay, dtype=torch.float32).step()
        ends[decay] = p.detach()
    start, moved = rand(24, 16), ends[0.] - rand(24, 16)
    with_it = start * moved < 0  # the step leads towards zero
    assert 0.3 < with_it.float().mean() < 0.7
    torch.testing.assert_close(ends[0.5][~with_it], ends[0.][~with_it], rtol=0, atol=0)
    torch.testing.assert_close((ends[0.5] - ends[0.])[with_it], -0.005 * start[with_it], atol=1e-6,
                               rtol=1e-3)

@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
@pytest.mark.parametrize('steps_before', [0, 2])
def test_a_step_that_found_infinities_changes_no_bit(optimizer, steps_before):
    torch.manual_seed(0)
    model = tiny()
    optimizers = make_optimizers(model, OptimConfig(optimizer=optimizer, weight_decay=0.1))
    train(model, optimizers, range(steps_before))
    def held():
        state = {(i, j, k): v.clone() for i, o in enumerate(optimizers)
                 for j, s in enumerate(o.state.values()) for k, v in s.items()}
        return {n: p.detach().clone() for n, p in model.named_parameters()}, state
    weights, state = held()
    for p in model.parameters(): p.grad = torch.full_like(p, math.nan)
    for o in optimizers:
        o.found_inf = torch.tensor(1.)
        o.step()
    after, now = held()
    assert all(torch.equal(weights[k], after[k]) for k in weights)
    assert all(torch.equal(state.get(k, torch.zeros_like(v)), v) for k, v in now.items())
    for p in model.parameters(): p.grad = torch.ones_like(p)
    for o in optimizers: o.found_inf = torch.tensor(0.); o.step()
    assert not any(torch.equal(weights[k], p) for k, p in model.named_parameters())

def test_not_skipping_is_as_if_nobody_had_asked():
    ends = []
    for found in (None, torch.tensor(0.)):
        torch.manual_seed(0)
        model = tiny()
        optimizers = make_optimizers(model, OptimConfig())
        for o in optimizers: o.found_inf = found
        ends.append(train(model, optimizers, range(3)))
    assert same(*ends)

def test_a_zero_gradient_moves_nothing():
    p = nn.Parameter(torch.ones(4, 8))
    p.grad = torch.zeros(4, 8)
    Muon([p], 0.1).step()
    assert torch.equal(p.detach(), torch.ones(4, 8))

def test_parameters_without_a_gradient_are_left_alone():
    a, b = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    a.grad = rand(4, 4)
    o = Muon([a, b], 0.1, weight_decay=0.5)
    o.step()
    assert torch.equal(b.detach(), torch.ones(4, 4)) and b not in o.state
    assert not torch.equal(a.detach(), torch.ones(4, 4))
    b.grad = rand(4, 4)
    o.step()
    assert b in o.state

def test_muon_takes_matrices_only():
    for p in (torch.zeros(3), torch.zeros(2, 3, 4)):
        with pytest.raises(ValueError, match='matrices'): Muon([nn.Parameter(p)])

def test_closure_gives_the_loss():
    p = nn.Parameter(torch.eye(4))
    def closure():
        loss = (p**2).sum()
        loss.backward()
        return loss
    assert Muon([p], 0.1).step(closure).item() == 4.0 and not torch.equal(p.detach(), torch.eye(4))

@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
@pytest.mark.parametrize('tie', [True, False])
@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_each_parameter_is_moved_once_and_by_the_right_one(arch, tie, optimizer):
    class Wrapper(nn.Module):  # as DDP names parameters
        def __init__(self, module): super().__init__(); self.module = module
    model = tiny(arch=arch, tie=tie)
    for m in (model, Wrapper(model)):
        names = {id(p): n for n, p in model.named_parameters()}
        groups = [(type(o).__name__, g)
                  for o in make_optimizers(m, OptimConfig(optimizer=optimizer, weight_decay=0.1))
                  for g in o.param_groups]
        covered = [id(p) for _, g in groups for p in g['params']]
        assert sorted(covered) == sorted(names)
        for kind, g in groups:
            assert g['lr'] == g['peak_lr']
            assert (g['weight_decay'] > 0) == (g['name'] in ('matrices', 'head'))
            for p in g['params']:
                matrix = p.ndim == 2 and names[id(p)].startswith('blocks.')
                embedding = 'embed' in names[id(p)]  # with `tie` it is the head, too
                assert (g['name'] == 'matrices') == matrix
                assert (g['name'] == 'embeddings') == embedding
                assert (kind == 'Muon') == (matrix and optimizer == 'muon')

def test_frozen_parameters_get_no_optimizer():
    model = tiny()
    model.embed.weight.requires_grad_(False)
    assert not _param_groups(model)['embeddings']
    assert all(p is not model.embed.weight for o in make_optimizers(model, OptimConfig())
               for g in o.param_groups for p in g['params'])

def test_a_model_of_matrices_needs_no_adamw():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    assert [type(o) for o in make_optimizers(model, OptimConfig())] == [Muon]

def test_a_recipe_in_fp32_orthogonalizes_in_fp32():
    from lm_nb.training.loop import TrainConfig
    for name, dtype in (('fp32', torch.float32), ('auto', None)):
        assert make_optimizers(tiny(), TrainConfig(dtype=name))[0].dtype == dtype

def test_adamw_is_torchs():
    torch.manual_seed(0)
    a = tiny(arch='gpt2')
    b = copy.deepcopy(a)
    cfg = OptimConfig(optimizer='adamw', lr=2e-3, weight_decay=0.1, beta1=0.8, beta2=0.97)
    decayed = {id(p) for n, p in b.named_parameters() if p.ndim >= 2 and 'embed' not in n}
    groups = [dict(params=[p for p in b.parameters() if (id(p) in decayed) == yes],
                   weight_decay=0.1*yes) for yes in (True, False)]
    train(a, make_optimizers(a, cfg), range(5))
    train(b, [torch.optim.AdamW(groups, lr=2e-3, betas=(0.8, 0.97), foreach=False)], range(5))
    # key biases: no true gradient, rounding decides
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-4)

@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_state_goes_through_a_file_bit_for_bit(optimizer):
    cfg = OptimConfig(optimizer=optimizer)
    torch.manual_seed(0)
    a = tiny()
    oa = make_optimizers(a, cfg)
    train(a, oa, range(3))
    b, file = copy.deepcopy(a), io.BytesIO()
    torch.save([o.state_dict() for o in oa], file)
    file.seek(0)
    ob = make_optimizers(b, cfg)
    for o, s in zip(ob, torch.load(file, weights_only=True)): o.load_state_dict(s)
    assert [g['name'] for o in ob for g in o.param_groups] == ['matrices', 'embeddings', 'vectors']
    assert same(train(a, oa, range(3, 6)), train(b, ob, range(3, 6)))
    c = tiny()
    c.load_state_dict(b.state_dict())
    # the state matters
    assert not same(train(b, ob, range(6, 8)), train(c, make_optimizers(c, cfg), range(6, 8)))

def test_both_start_by_lowering_the_loss():
    def loss(m):
        x = torch.randint(0, 19, (4, 17), generator=torch.Generator().manual_seed(0))
        return nn.functional.cross_entropy(m(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).item()
    for optimizer in ('muon', 'adamw'):
        torch.manual_seed(0)
        m = tiny()
        before = loss(m)
        assert loss(
            train(m, make_optimizers(m, OptimConfig(optimizer=optimizer)), [0]*10)) < before - 0.1

@dataclass(frozen=True)
class Exact(OptimConfig):
    """Muon multiplies in fp32 as well: in bf16 the gradients' rounding would turn an entry near 0
    now and then"""
    weight_decay: float = 0.1
    dtype: str = 'fp32'

def _learn(model, optimizers, rank, world):
    "Three steps on the global batch: each rank reads its rows"
    for s in range(3):
        x = torch.randint(0, 19, (4, 17), generator=torch.Generator().manual_seed(s))[rank::world]
        nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
        for o in optimizers: o.step(), o.zero_grad()

def _rank(rank, folder):
    from torch.distributed.fsdp import fully_shard
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous',
                                         rank=rank, world_size=2)
    for kind in ('ddp', 'fsdp'):
        torch.manual_seed(0)
        model = tiny(d_ff=33)  # three rows of 33 do not halve
        if kind == 'ddp': wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            for block in model.blocks: fully_shard(block)
            wrapped = fully_shard(model)
        optimizers = make_optimizers(wrapped, Exact())
        _learn(wrapped, optimizers, rank, 2)
        if kind == 'fsdp':
            means = [s['momentum_buffer'] for s in optimizers[0].state.values()]
            # memory is shared out
            assert means and all(m.to_local().numel() <= m.numel() // 2 + m.size(1) for m in means)
            assert all(m.placements == p.placements for p, s in optimizers[0].state.items()
                       for m in [s['momentum_buffer']])
        whole = {k: v.full_tensor() if kind == 'fsdp' else v for k, v in model.state_dict().items()}
        torch.save(whole, f'{folder}/{kind}{rank}.pt')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)

def test_ranks_stay_equal_and_equal_one_process(tmp_path):
    "Each reads its own rows. Whole or sharded, after three steps all hold what one process would"
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    alone = tiny(d_ff=33)
    start = copy.deepcopy(alone.state_dict())
    _learn(alone, make_optimizers(alone, Exact()), 0, 1)
    for kind in ('ddp', 'fsdp'):
        a, b = (torch.load(tmp_path/f'{kind}{r}.pt', weights_only=True) for r in range(2))
        assert all(torch.equal(a[k], b[k]) for k in a)
        for k, v in alone.state_dict().items():
            assert (a[k] - v).norm() < 0.05 * (v - start[k]).norm() + 1e-5, (kind, k)

def _five_steps(params, muon):
    "The same gradients on every rank"
    for s in range(5):
        for i, p in enumerate(params):
            g = rand(*p.shape, seed=100*s + i)
            if hasattr(p, 'placements'):
                from torch.distributed.tensor import distribute_tensor
                g = distribute_tensor(g, p.device_mesh, p.placements)
            p.grad = g
        muon.step()

def _muon_rank(rank, folder):
    from torch.distributed.fsdp import fully_shard
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meeting',
                                         rank=rank, world_size=2)
    alone, done = optim._orthogonalize, []
    def counted(G, *args, **kw):
        done.append(len(G))
        return alone(G, *args, **kw)
    optim._orthogonalize = counted
    for kind in ('ddp', 'fsdp'):
        torch.manual_seed(0)
        model = tiny(d_ff=33)
        wrapped = nn.parallel.DistributedDataParallel(model) if kind == 'ddp' else model
        if kind == 'fsdp': fully_shard([*model.blocks])
        muon = make_optimizers(wrapped, Exact())[0]
        params = muon.param_groups[0]['params']
        done.clear()
        _five_steps(params, muon)
        whole = [p.full_tensor() if kind == 'fsdp' else p.detach() for p in params]
        torch.save((sum(done) / 5 / len(params), whole), f'{folder}/{kind}{rank}.pt')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)

def test_ranks_share_the_orthogonalizing(tmp_path):
    "Each works out some of the matrices, all hold what one process would"
    mp.spawn(_muon_rank, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    muon = make_optimizers(tiny(d_ff=33), Exact())[0]
    params = muon.param_groups[0]['params']
    _five_steps(params, muon)
    for kind in ('ddp', 'fsdp'):
        (x, a), (y, b) = (torch.load(tmp_path/f'{kind}{r}.pt', weights_only=True) for r in range(2))
        assert abs(x + y - 1) < 1e-9 and max(x, y) < .7, (kind, x, y)
        assert all(map(torch.equal, a, b))
        assert max((p - q).abs().max().item() for p, q in zip(a, params)) < 1e-6


def test_what_a_recipe_leaves_open_is_filled_in():
    shape, left = GPTConfig(), dict(lr=None, muon_lr=None, weight_decay=None, warmup=None)
    full = resolve_defaults(OptimConfig(**left), shape, 2_000_000)
    # settled: nothing moves any more
    assert None not in vars(full).values() and full == resolve_defaults(full, shape, 10**9)
    with pytest.raises(UserError, match='resolve_defaults'):
        make_optimizers(tiny(), OptimConfig(**left))
    assert resolve_defaults(OptimConfig(**left | dict(warmup=3)), shape, 2_000_000).warmup == 3
    one = resolve_defaults(OptimConfig(**left | dict(optimizer='adamw', lr=1e-3)), shape,
                           10_000_000)
    assert one.lr == 1e-3
    assert math.isclose(
        one.weight_decay,
        min(0.1, 1 / (1e-3 * (10_000_000 // _default_batch_tokens(shape, 10_000_000)))))

def test_larger_models_take_shorter_steps_and_longer_runs_larger_batches():
    shapes = [GPTConfig(d_model=d, n_layer=n)
              for d, n in ((64, 2), (128, 4), (768, 12), (4096, 32))]
    for optimizer in ('muon', 'adamw'):
        rates = [_default_lr(s, optimizer) for s in shapes]
        assert rates == sorted(rates, reverse=True) and all(0 < r < 0.01 for r in rates)
    for tokens in (1, 10**4, 10**6, 10**9, 10**12):
        batch = _default_batch_tokens(shapes[1], tokens)
        assert batch % 160 == 0 and batch >= 160
        assert batch <= _default_batch_tokens(shapes[1], 10 * tokens)
        assert tokens < 750 * 160 or tokens // batch >= 750

plans = st.builds(OptimConfig, schedule=st.sampled_from(['wsd', 'cosine']),
                  warmup=st.integers(0, 50), cooldown=st.floats(0, 1), final_lr=st.floats(0, 1))

@settings(max_examples=200, deadline=None)
@given(plans, st.integers(1, 200))
def test_schedules_at_all_lengths(cfg, total):
    rates = [lr_factor(s, total, cfg) for s in range(total + 1)]
    assert all(0 < r <= 1 for r in rates[:total])
    top = rates.index(max(rates))
    assert all(a <= b + 1e-12 for a, b in pairwise(rates[:top+1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[top:]))
    if total > cfg.warmup:
        assert math.isclose(rates[total], cfg.final_lr, abs_tol=1e-9)
        assert lr_factor(total + 100, total, cfg) == rates[total]

@pytest.mark.parametrize('total', [100, 1000])
def test_wsd_is_flat_between(total):
    cfg = OptimConfig(warmup=10, cooldown=0.4)
    assert {lr_factor(s, total, cfg) for s in range(10, int(0.6*total) + 1)} == {1.0}
    assert math.isclose(lr_factor(int(0.8*total), total, cfg), 0.5)

def test_set_lr_reaches_every_group_and_is_no_product_of_itself():
    optimizers = make_optimizers(tiny(), OptimConfig(lr=1e-3, muon_lr=0.01))
    for factor in (0.5, 0.5): set_lr(optimizers, factor)
    assert [g['lr'] for o in optimizers for g in o.param_groups] == [0.005, 0.0005, 0.0005]

@pytest.mark.parametrize('kw, told', [
    (dict(optimizer='adam'), "optimizer = adam: expected muon or adamw (did you mean 'adamw'?)"),
    (dict(schedule='linear'), 'schedule = linear: expected wsd or cosine'),
    (dict(lr=0), 'lr = 0: expected a number above 0'), (dict(muon_lr=-1), 'muon_lr = -1'),
    (dict(lr=math.inf), 'lr = inf'), (dict(lr=math.nan), 'lr = nan'),
    (dict(beta1=1.0), 'beta1 = 1.0'), (dict(momentum=-0.1), 'momentum = -0.1'),
    (dict(cooldown=2), 'cooldown = 2: expected a share'),
    (dict(final_lr=-0.5), 'final_lr = -0.5'), (dict(warmup=-1), 'warmup = -1'),
    (dict(weight_decay=-1), 'weight_decay = -1'),
    (dict(lr=1e9), 'lr = 1000000000.0: expected a number above 0 and at most 1'),
    (dict(muon_lr=20), 'muon_lr = 20: expected a number above 0 and at most 1'),
    (dict(weight_decay=1e3), 'weight_decay = 1000.0: expected at most 50'),
    (dict(weight_decay=math.nan), 'weight_decay = nan')])
def test_impossible_values_are_named(kw, told):
    with pytest.raises(UserError) as e: OptimConfig(**kw)
    assert told in str(e.value) and '\n' not in str(e.value)

def test_products_are_bf16_only_where_the_hardware_has_it(monkeypatch):
    cpu = torch.device('cpu')
    for name, dtype in (('bf16', torch.bfloat16), ('fp32', torch.float32)):
        monkeypatch.setattr('lm_nb.training.optim.pick_dtype', lambda device, name=name: name)
        assert _matmul_dtype(cpu) == dtype
    assert [X.dtype for X in _orthogonalize_all([rand(4, 4)], torch.bfloat16)] == [torch.float32]

@given(st.floats(-8, 8), st.floats(-8, 8), st.integers(-6, 6), st.integers(-6, 6))
def test_the_walk_ends_where_no_neighbour_is_better(a, b, start_a, start_b):
    "A bowl with its bottom anywhere, from anywhere on the grid"
    asked = {}
    def loss(rates):
        x, y = math.log2(rates['lr']) - a, math.log2(rates['muon_lr']) - b
        return asked.setdefault(tuple(rates.values()), x*x + y*y + x*y)
    found = _walk(loss, dict(lr=2.**start_a, muon_lr=2.**start_b))
    for name in found:
        for factor in (1/2, 2):  # both sides were tried, and are no better
            assert asked[tuple({**found, name: found[name]*factor}.values())] >= loss(found)
