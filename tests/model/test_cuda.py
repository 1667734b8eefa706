"""What a GPU does, against what the CPU does with the same weights and rows; skipped where there is
no GPU"""
import itertools
from dataclasses import replace
from functools import partial

import pytest, torch

import lm_nb.inference.decoding, lm_nb.training.stage
from lm_nb.bench.speed import _equal_sides, _same_loss
from lm_nb.data.shards import IGNORE, Batch
from lm_nb.inference.sampling import generate
from lm_nb.model.estimate import memory
from lm_nb.model.fused import (
    _KERNELS, attention_kernel, chunked_nll, _fused_attention, _kernel_times, pick_attention)
from lm_nb.model.gpt import GPT, GPTConfig, _nll
from lm_nb.training.monitor import NonFiniteGuard, Interrupted, read_log
from lm_nb.training.loop import Runtime, TrainConfig, training_steps
from lm_nb.training.optim import make_optimizers
from lm_nb.training.recipe import Feed, load_recipe
from lm_nb.training.stage import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
GPT2 = GPTConfig('gpt2', vocab_size=300, context=64, n_layer=2, n_head=4, d_model=64,
                 vocab_multiple=128)
SMALL = replace(GPT2, arch='qwen3', n_kv_head=2, d_ff=None)
CPU, CUDA = torch.device('cpu'), torch.device('cuda')
CFG = TrainConfig(tokens=20*512, batch_tokens=512, warmup=0, lr=1e-3)


def micros(cfg, step=0, packed=True):
    "Two micro-batches of four rows, some targets ignored"
    own = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 20, (8, cfg.context + 1), generator=own)
    y, doc = ids[:, 1:].clone(), (torch.arange(cfg.context)//20).expand(8, -1)
    y[:, ::7] = IGNORE
    return [Batch(ids[r, :-1].contiguous(), y[r], doc[r].contiguous() if packed else None)
            for r in (slice(4), slice(4, 8))]


def steps(cfg, device, dtype='fp32', packed=True, compiled=False, optimizer='muon'):
    torch.manual_seed(0)
    gpt, stage = GPT(cfg).to(device).train(), replace(CFG, optimizer=optimizer, dtype=dtype)
    model, some = gpt, micros(cfg, packed=packed)
    if compiled: model = torch.compile(gpt, dynamic=False, fullgraph=True)
    runtime = Runtime(device, dtype)
    rows = runtime.pin(some)
    return training_steps(model, make_optimizers(gpt, stage), lambda step: rows, stage,
                          runtime=runtime)


def losses(*args, n=6, **kw):
    some = itertools.islice(steps(*args, **kw), n)
    return torch.stack([s.nll/s.targets for s in some]).cpu()


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('cfg', [SMALL, GPT2, replace(SMALL, recompute=True)],
                         ids=['qwen3', 'gpt2', 'recompute'])
def test_training_learns_the_same(cfg, packed, optimizer):
    want = losses(cfg, CPU, packed=packed, optimizer=optimizer)
    assert want[-1] < want[0] - 0.2
    for dtype, far in dict(fp32=1e-4, bf16=.02, fp16=.01).items():
        found = losses(cfg, CUDA, dtype, packed, optimizer=optimizer)
        assert (found - want).abs().max() < far, dtype


@pytest.mark.parametrize('cfg', [SMALL, GPT2], ids=['qwen3', 'gpt2'])
def test_a_compiled_model_learns_the_same(cfg):
    assert (losses(cfg, CUDA, 'bf16', compiled=True) - losses(cfg, CUDA, 'bf16')).abs().max() < .02


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('cfg', [SMALL, GPT2], ids=['qwen3', 'gpt2'])
def test_a_step_never_waits_for_the_device(cfg, packed, optimizer, tmp_path):
    todo = steps(cfg, CUDA, 'bf16', packed, optimizer=optimizer)
    guard = NonFiniteGuard(CFG, tmp_path, lambda step: [])
    next(todo)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for s in itertools.islice(todo, 3): guard.observe(s)
        with pytest.raises(RuntimeError, match='synchronizing'): s.nll.item()  # the alarm works
    finally: torch.cuda.set_sync_debug_mode('default')


def test_a_run_that_was_stopped_goes_on_exactly(tmp_path, monkeypatch):
    def run(folder, kernel, last=None):
        monkeypatch.setattr(lm_nb.training.stage, 'pick_attention', lambda *args: kernel)
        torch.manual_seed(0)
        cfg = replace(CFG, device='cuda', log_every=1, save_every=5)
        stop = lambda: last == len(read_log(folder))
        train(GPT(SMALL), Feed(partial(micros, SMALL)), cfg, folder, stop=stop)
    run(tmp_path/'straight', 'math')  # which adds in one order; flash attention's way back does not
    with pytest.raises(Interrupted): run(tmp_path/'stopped', 'math', 8)
    run(tmp_path/'stopped', 'efficient')  # noted at the start, and not chosen again
    a, b = ([(r['step'], r['loss'], r['grad_norm']) for r in read_log(tmp_path/name)]
            for name in ('straight', 'stopped'))
    assert a == b and len(a) == CFG.steps


@pytest.mark.parametrize('rows', [1, 4])
@pytest.mark.parametrize('cfg', [SMALL, GPT2], ids=['qwen3', 'gpt2'])
def test_recorded_generation_writes_the_same(cfg, rows, monkeypatch):
    torch.manual_seed(0)
    gpt = GPT(replace(cfg, zero_init=False)).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            if p.ndim == 2: p.mul_(4)  # choices that differ from row to row
    ids, made = torch.randint(0, 300, (rows, 9), generator=torch.Generator().manual_seed(0)), []
    Recorded = lm_nb.inference.decoding._CUDAGraphStep
    recording = Recorded._recording
    monkeypatch.setattr(Recorded, '_recording', lambda self: made.append(1) or recording(self))
    want = generate(gpt, ids, 40)
    assert torch.equal(generate(gpt.to(CUDA), ids.to(CUDA), 40).cpu(), want) and made


def test_kernels_of_attention_agree():
    q, k, v = torch.randn(3, 2, 4, 128, 64, device=CUDA, dtype=torch.bfloat16)
    times = _kernel_times(q, k, v)
    assert 'math' in times and len(times) > 1
    with attention_kernel('math'): want = _fused_attention(q, k, v)
    for name in times:
        with attention_kernel(name): found = _fused_attention(q, k, v)
        assert (found - want).abs().max() < .05, name
    assert pick_attention(SMALL, 2, CUDA, 'bf16', masked=True) in _KERNELS


WIDE = dict(vocab_size=8192, context=256, d_model=256)


@pytest.mark.parametrize('cfg', [
    replace(GPT2, **WIDE), GPTConfig(n_layer=3, **WIDE),
    GPTConfig(n_layer=8, recompute=True, **WIDE)], ids=['gpt2', 'qwen3', 'recompute'])
def test_the_estimate_of_memory_holds(cfg):
    losses(GPT2, CUDA, 'bf16', n=1)  # the libraries take their working space at the first matmul
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    todo = steps(cfg, CUDA, 'bf16', packed=False)
    next(todo)
    torch.cuda.reset_peak_memory_stats()
    next(todo)
    peak = torch.cuda.max_memory_allocated() - before
    estimate = memory(cfg, 4, dtype='bf16', device='cuda', micros=2)
    assert peak == pytest.approx(estimate.total, rel=.15)


def test_the_loss_in_chunks_never_holds_all_logits():
    h, w = (torch.randn(n, 256, device=CUDA, requires_grad=True) for n in (4096, 50304))
    y, peaks = torch.randint(0, 50257, (4096,), device=CUDA), []
    chunks = lambda: chunked_nll(h, w, y, 50257, rows=512)
    whole = lambda: torch.nn.functional.cross_entropy((h @ w.T).float(), y, reduction='sum')
    for loss in chunks, whole:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(loss(), (h, w))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < peaks[1]/2


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_is_the_plain_one(weighted, dtype):
    h, w = (torch.randn(n, 64, device=CUDA, dtype=dtype, requires_grad=True) for n in (300, 384))
    y = torch.randint(0, 300, (300,), device=CUDA)
    y[::3] = IGNORE
    weight, found = torch.rand(300, device=CUDA) if weighted else None, []
    for loss in _nll(h, w, y, 300, weight), chunked_nll(h, w, y, 300, weight, rows=128):
        found.append([loss, *torch.autograd.grad(loss, (h, w))])
    far = 1e-4 if dtype == torch.float32 else .02
    for a, b in zip(*found): assert (a - b).norm() <= far*a.norm()


@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
def test_both_sides_of_the_benchmark_start_alike(dtype):
    options = 'device=cuda dtype=bf16 n_layer=1 context=64 batch_tokens=512'
    recipe = load_recipe('micro', options.split())
    sides = _equal_sides(recipe, dtype, GPT(replace(recipe.model, zero_init=False)))
    ours, *others = (step() for step in sides.values())
    assert len(others) >= 2 and all(_same_loss(ours, other) for other in others)
