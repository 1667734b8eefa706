"""The arithmetic of estimates against what really happens: counted parameters, FLOPs and bytes of
true training steps. Nothing here looks at a clock."""
import os
import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lm_nb.bench.plan import StepTimer, random_batch
from lm_nb.core import UserError
from lm_nb.model.estimate import (
    Memory, _block_activation_bytes, _optimizer_numbers, _saved_activation_bytes, available_memory,
    comm_bytes, flops_per_token, format_bytes, largest_rows, memory, n_shards, parameter_counts,
    peak_allocated, quiet_stderr, step_bytes, step_flops)
from lm_nb.model.fused import reference_ops
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.training.loop import Runtime, TrainConfig
from lm_nb.training.optim import make_optimizers

warnings.filterwarnings('ignore', message='Memory block of unknown size')

SHAPES = dict(
    micro=GPTConfig(d_ff=320, tie=False),
    tutorial=GPTConfig('gpt2', context=128, n_layer=3),
    grouped=GPTConfig(n_kv_head=2, d_head=48, context=96, vocab_size=1000, n_layer=2,
                      vocab_multiple=128),
    wide=GPTConfig(context=64, n_layer=2, d_model=320, vocab_size=512),
    long=GPTConfig('gpt2', context=640, n_layer=2, d_model=64, vocab_size=3000, tie=False),
)


MORE = [GPTConfig(d_head=64, d_ff=100, n_kv_head=1),
        GPTConfig('gpt2', vocab_size=50257, vocab_multiple=128)]


@pytest.mark.parametrize('cfg', [*SHAPES.values(), *MORE])
def test_every_parameter_is_counted_in_its_part(cfg):
    gpt, counts = GPT(cfg), parameter_counts(cfg)
    assert sum(counts.values()) == gpt.n_params() and 'other' not in counts
    def inside(*words):
        return sum(p.numel() for n, p in gpt.named_parameters() if any(w in n for w in words))
    assert counts['MLP'] == inside('.mlp.') and counts['embedding'] == gpt.embed.weight.numel()
    assert counts['norms'] == inside('norm') and ('head' in counts) == (not cfg.tie)
    assert counts['attention'] == inside('.attn.') - inside('.q_norm.', '.k_norm.')
    assert ('positions' in counts) == (cfg.arch == 'gpt2')


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
@pytest.mark.parametrize('name', ['micro', 'tutorial', 'grouped'])
def test_what_an_optimizer_remembers(name, optimizer):
    gpt = GPT(SHAPES[name])
    optimizers = make_optimizers(gpt, TrainConfig(optimizer=optimizer, lr=1e-3, muon_lr=.01))
    for p in gpt.parameters(): p.grad = torch.zeros_like(p)
    for o in optimizers: o.step()
    states = [x for o in optimizers for state in o.state.values() for x in state.values()]
    held = sum(x.numel() for x in states if torch.is_tensor(x) and x.ndim)
    assert held == _optimizer_numbers(SHAPES[name], optimizer)


def counted(cfg, rows=2):
    "FLOPs of a forward and a backward pass, as PyTorch counts them for plain attention"
    gpt, batch = GPT(cfg), random_batch(cfg, rows, docs=0)
    with reference_ops(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(gpt(batch.x).flatten(0, 1), batch.y.flatten()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize('name', SHAPES)
def test_operations_are_those_that_a_step_performs(name):
    cfg = SHAPES[name]
    padding = 6*(cfg.vocab_rows - cfg.vocab_size)*cfg.d_model  # padded rows are multiplied too
    assert counted(cfg) == 2*cfg.context*(flops_per_token(cfg, cfg.context) + padding)
    assert step_flops(cfg, 2*cfg.context, 'adamw')['model'] == counted(cfg)


def test_recomputing_costs_one_more_forward_pass_of_the_blocks():
    cfg = replace(SHAPES['micro'], recompute=True)
    more = counted(cfg) - counted(replace(cfg, recompute=False))
    # nobody needs what a block's last matmul gives: torch may leave it out
    last = 2*2*cfg.context*cfg.d_model*cfg.ff_size*cfg.n_layer
    found = step_flops(cfg, 2*cfg.context)['recomputing']
    assert more in (pytest.approx(found), pytest.approx(found - last))


def held_by_graph(cfg, rows, dtype, docs=0):
    "Bytes of all that a forward pass keeps for the backward pass, weights and their copies aside"
    gpt, seen, alive = GPT(cfg).train(), {}, []
    weights = {shape for p in gpt.parameters() for shape in (p.shape, p.shape[::-1])}
    def note(x):
        if x.shape not in weights:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)  # or its address would be given away again
        return x
    batch = random_batch(cfg, rows, docs=docs)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
    with hooks, Runtime(dtype=dtype).autocast():
        gpt.hidden(batch.x, doc=batch.doc)
    return sum(seen.values())


@pytest.mark.parametrize('dtype', ['bf16', 'fp32'])
@pytest.mark.parametrize('name', SHAPES)
def test_saved_activations_are_what_autograd_keeps(name, dtype):
    cfg, rows = SHAPES[name], 3
    found = _saved_activation_bytes(cfg, rows*cfg.context, dtype)
    assert found == pytest.approx(held_by_graph(cfg, rows, dtype), rel=.06)


def test_rows_of_several_documents_keep_less():
    whole, many = (held_by_graph(SHAPES['long'], 3, 'fp32', docs=docs) for docs in (0, 4))
    assert many < .8*whole


CASES = [
    ('micro', 8, 'bf16', 'muon', 1, False), ('micro', 4, 'fp32', 'adamw', 2, False),
    ('micro', 8, 'bf16', 'muon', 1, True), ('tutorial', 8, 'bf16', 'adamw', 1, False),
    ('tutorial', 8, 'fp32', 'muon', 2, True), ('grouped', 12, 'fp32', 'muon', 1, False),
    ('wide', 2, 'bf16', 'muon', 1, False), ('wide', 8, 'fp32', 'adamw', 1, False),
    ('long', 2, 'fp32', 'muon', 1, False), ('long', 2, 'bf16', 'adamw', 2, True)]


@pytest.mark.parametrize('name,rows,dtype,optimizer,micros,recompute', CASES)
def test_the_estimate_is_within_15_percent_of_the_true_peak(
        name, rows, dtype, optimizer, micros, recompute):
    cfg = replace(SHAPES[name], recompute=recompute)
    how = dict(lr=1e-3, muon_lr=.01, warmup=1, weight_decay=.01, tokens=10**9,
               batch_tokens=rows*micros*cfg.context)
    stage = TrainConfig(optimizer=optimizer, dtype=dtype, device='cpu', **how)
    def run():
        trial = StepTimer(cfg, stage, False, micro_rows=rows, micros=micros)
        trial(), trial()
    true = peak_allocated(run)
    guess = memory(cfg, rows, optimizer, dtype, 'cpu', micros)
    assert guess.total == pytest.approx(true, rel=.15), f'{guess} but {format_bytes(true)}'


def test_parts_add_up_and_move_with_what_they_depend_on():
    cfg = GPTConfig('gpt2', 50257, 1024, 12, 12, 768)
    one = memory(cfg, 16, device='cuda')
    assert one.total == sum(getattr(one, part) for part in Memory.__annotations__)
    assert memory(cfg, 32, device='cuda').activations == 2*one.activations
    assert memory(replace(cfg, recompute=True), 16, device='cuda').total < one.total/2
    assert memory(cfg, 16, device='cuda', micros=2).gradients > one.gradients
    assert memory(cfg, 16, 'adamw', device='cuda').optimizer > one.optimizer
    assert memory(cfg, 16, dtype='fp32', device='cuda').activations > 1.5*one.activations
    assert 'activations' in str(one)


def test_sharding_divides_what_is_stored_and_not_what_is_computed():
    cfg = GPTConfig('gpt2', 50257, 1024, 12, 12, 768)
    whole, parts = (memory(cfg, 16, device='cuda', ranks=8, parallel=p) for p in ('ddp', 'fsdp'))
    assert parts.weights == whole.weights/8 and parts.optimizer == whole.optimizer/8
    assert parts.activations == whole.activations
    hsdp = memory(cfg, 16, ranks=8, parallel='hsdp', shards=8)
    assert hsdp == memory(cfg, 16, ranks=8, parallel='fsdp')
    assert memory(cfg, 16, ranks=16, parallel='hsdp', shards=4).weights == whole.weights/4
    assert [n_shards(8, *how) for how in (('ddp',), ('fsdp',), ('hsdp', 2))] == [1, 8, 2]
    for bad in (3, -2, 16):
        with pytest.raises(UserError, match='divides the 8 ranks'): n_shards(8, 'hsdp', bad)
    with pytest.raises(UserError, match="did you mean 'fsdp'"): n_shards(8, 'fsdpp')


def test_bytes_on_the_wire():
    cfg = SHAPES['micro']
    all_bytes = 4*sum(parameter_counts(cfg).values())
    assert comm_bytes(cfg, 1) == {} == comm_bytes(cfg, 1, 'fsdp')
    assert sum(comm_bytes(cfg, 2, optimizer='adamw').values()) == all_bytes
    assert comm_bytes(cfg, 1000)['gradients between copies'] == pytest.approx(2*all_bytes, rel=.01)
    assert comm_bytes(cfg, 8, 'hsdp', 8) == comm_bytes(cfg, 8, 'fsdp')
    assert comm_bytes(cfg, 8, 'hsdp', 1) == comm_bytes(cfg, 8, 'ddp')
    once, twice = (comm_bytes(cfg, 4, 'fsdp', micros=n) for n in (1, 2))
    assert twice['weights'] == 2*once['weights']
    assert twice['gradients to owners'] == once['gradients to owners']


@pytest.mark.parametrize('room', [1e7, 1e8, 3.3e9, 1e12])
@pytest.mark.parametrize('how', [
    dict(), dict(device='cuda', dtype='fp32'), dict(ranks=4, parallel='fsdp', micros=2)], ids=str)
def test_the_largest_batch_fits_and_one_more_row_does_not(room, how):
    cfg = SHAPES['micro']
    n = largest_rows(cfg, room, **how)
    if n: assert memory(cfg, n, **how).total <= room
    assert memory(cfg, n + 1, **how).total > room
    totals = [memory(cfg, r, **how).total for r in (1, 2, 3, 5, 8, 13, 21, 34, 55, 300)]
    assert totals == sorted(totals)


def test_bytes_of_a_step_grow_with_rows_and_shrink_with_the_type():
    cfg = SHAPES['micro']
    assert step_bytes(cfg, 16, dtype='bf16') < step_bytes(cfg, 16, dtype='fp32')
    assert step_bytes(cfg, 16, micros=2) < 2*step_bytes(cfg, 16)
    block = lambda cfg: sum(_block_activation_bytes(cfg).values())
    assert block(cfg) > block(replace(cfg, d_ff=64))


def test_there_is_some_memory():
    assert 1e8 < available_memory(torch.device('cpu')) < 1e15


def test_the_error_stream_comes_back():
    before = os.fstat(2)
    with pytest.raises(ZeroDivisionError), quiet_stderr(): 1/0  # noqa: B018
    assert os.path.samestat(os.fstat(2), before)


def test_the_allocator_is_read_right():
    def work():
        a = torch.zeros(250_000)          # 1 MB
        b = torch.zeros(500_000)          # 2 MB more
        del a
        c = torch.zeros(125_000)          # half a MB, when 1 MB is free again
        return b, c
    assert 3e6 <= peak_allocated(work) < 3.1e6
