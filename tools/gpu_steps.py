"""The steps of tools/gpu.py. Each is a function of a `Given` (dry, seconds, folder) and yields
lines of its table, a text for a remark, a list of the points of a curve, or a dict that says where
it ran"""
import gc
import itertools
import subprocess
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional as F

import lm_nb.training.stage as stage_module
from lm_nb.bench.measure import BENCHMARKS, Line, Measure, _surroundings, in_turn, paired
from lm_nb.bench.plan import StepTimer, pick_stage, random_batch, synchronizer
from lm_nb.bench.speed import (
    _SIZES, _equal_sides, _generate_in_turn, _our_step, _peak_on, _same_loss, _utilised)
from lm_nb.core import UserError, check, pick_device, pick_dtype, provenance, root
from lm_nb.inference.sampling import generate
from lm_nb.model.estimate import flops_per_token, parameter_counts
from lm_nb.model.fused import _kernel_times, reference_ops
from lm_nb.model.gpt import GPT, GPTConfig, document_mask
from lm_nb.training.loop import DTYPES
from lm_nb.training.monitor import Interrupted, datasheet_peak, matmul_peak, read_log
from lm_nb.training.pretrain import text_feed
from lm_nb.training.recipe import Feed, load_recipe
from lm_nb.training.run import Run

DEVICE = pick_device()
DTYPE = pick_dtype(DEVICE)
TOY = 'n_layer=1 n_head=2 d_model=32 d_ff=64 context=32 vocab_size=512 batch_tokens=128'


def base(given, rows, packed=False):
    "The recipe base-124m with micro-batches of so many rows; a toy on a dry run"
    toy = TOY.split() if given.dry else []
    return load_recipe('base-124m', [*toy, f'micro_rows={rows}', f'doc_mask={packed}'.lower()])


def rounds(given, n=6):
    "How often sides take turns; six times give an interval"
    return 1 if given.dry else n


def in_short(e):
    "An exception in one line"
    return f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:160]}'


def one(value, unit): return Measure((float(value),), unit)


# --- the machine

def card():
    "What `provenance` does not say of a CUDA card"
    if DEVICE.type != 'cuda': return {}
    card, asked = torch.cuda.get_device_properties(DEVICE), 'nvidia-smi --query-gpu=driver_version'
    try: driver = subprocess.run([*asked.split(), '--format=csv,noheader'], capture_output=True,
                                 text=True, timeout=20).stdout.split()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired): driver = None
    return dict(driver=driver, cuda=torch.version.cuda, capability=f'{card.major}.{card.minor}',
                memory_gib=round(card.total_memory/2**30, 1))


def where():
    "What all figures were measured on"
    from importlib.metadata import PackageNotFoundError, version
    found = {}
    for name in ('transformers', 'triton'):
        try: found[name] = version(name)
        except PackageNotFoundError: pass
    return {**_surroundings(), **card(), 'versions': found}


def copy_rate(given):
    "Bytes a second that are read and written when a large tensor is copied"
    n, sync = 2**20 if given.dry else 2**29, synchronizer(DEVICE)
    a, b = (torch.zeros(n, dtype=torch.uint8, device=DEVICE) for _ in 'ab')
    def seconds():
        sync(); start = time.perf_counter()
        for _ in range(10): b.copy_(a)
        sync()
        return time.perf_counter() - start
    seconds()
    return 2*10*n/min(seconds() for _ in range(5))


def environment(given):
    "The machine, its best rate of matmuls and of copying"
    yield where()
    for dtype in dict.fromkeys(('fp32', DTYPE)):
        peak = matmul_peak(DEVICE, dtype, .05 if given.dry else 3.)
        yield Line(f'matmul peak, {dtype}', one(peak/1e9, 'GFLOP/s'))
        if sheet := datasheet_peak(provenance()['name'], dtype):
            yield Line(f'matmul peak, {dtype}, by the data sheet', one(100*peak/sheet, '%'))
    yield Line('copying within its memory, read and written', one(copy_rate(given)/1e9, 'GB/s'))


# --- the tests that need a card

class Tally:
    "What came of each test, and an end between two tests when the time is up"
    def __init__(self, until): self.until, self.seen, self.all = until, {}, 0

    def pytest_runtest_logreport(self, report):
        if report.when == 'call' or report.outcome != 'passed':
            self.seen[report.nodeid.split('::')[-1]] = report.outcome

    def pytest_runtestloop(self, session): self.all = len(session.items)

    def pytest_runtest_setup(self, item):
        if time.monotonic() > self.until: item.session.shouldstop = 'the time is up'


def tests(given):
    "tests/model/test_cuda.py: what the card computes against what the CPU does"
    import pytest
    tally = Tally(time.monotonic() + given.seconds)
    pytest.main(['-q', str(root()/'tests'/'model'/'test_cuda.py')], plugins=[tally])
    yield from (f'failed: {name}' for name, outcome in tally.seen.items() if outcome == 'failed')
    n = Counter(tally.seen.values())
    ran = n['passed'] + n['failed']
    yield Line('tests', one(tally.all, ''))
    yield Line('skipped', one(n['skipped'], ''))
    yield Line('not reached in time', one(tally.all - len(tally.seen), ''))
    if ran: yield Line('passed, of those that ran', one(100*n['passed']/ran, '%'), '≥ 100')


# --- training

def fitting(given, measure):
    "Lines of `measure(rows)`, with as many rows of 1,024 tokens as the card's memory holds"
    gib = card().get('memory_gib', 8)
    for rows in [2] if given.dry else [n for n in (32, 16, 8, 4, 2, 1) if n == 1 or 2*n <= gib]:
        try: return (yield from measure(rows))
        except torch.OutOfMemoryError: yield f'{rows} rows at a time did not fit'
        gc.collect()
        torch.cuda.empty_cache()
    raise UserError('not even one row fits into the memory of this card')


def first_loss(name, step, want=None):
    "Take a first step; its loss, which has to be that of another side"
    loss = float(step())
    check(want is None or _same_loss(loss, want), f'{name}: the first loss is {loss:.4g}, and not '
          f'{want or 0:.4g}; its times cannot be compared')
    return loss


def in_step(given, rows, packed):
    "The lines of `training` and `packed` for so many rows"
    recipe = base(given, rows, packed)
    torch.manual_seed(0)
    gpt = GPT(replace(recipe.model, zero_init=False))
    sides, tokens = _equal_sides(recipe, DTYPE, gpt, ('sdpa',)), rows*recipe.model.context
    others, causal = list(sides)[1:], f'ours without documents, {DTYPE}'
    ours, compiled = f'ours, {DTYPE}', f'ours compiled, {DTYPE}'
    how = dict(dtype=DTYPE, optimizer='adamw')
    if packed:
        plain = replace(recipe, data=replace(recipe.data, doc_mask=False))
        sides[causal] = _our_step(plain, gpt, **how).loss
    wait, want = synchronizer(DEVICE), None
    for name, step in sides.items(): want = first_loss(name, step, want)
    turns = in_turn(sides, rounds(given), wait=wait)
    yield Line('rows of a step', one(rows, ''))
    for name in sides: yield Line(name, turns[name].map(lambda s: tokens/s, 'tokens/s'))
    for name in others: yield Line(f'ours against {name}', turns.ratio(ours, name))
    if packed:
        got = turns.ratio(ours, causal).map(lambda r: 100*r, '%')
        yield Line('ours: speed with documents, of that without', got)
    timer = _our_step(recipe, gpt, compile=True, **how)
    try: first_loss(compiled, timer.loss, want)
    except (torch.OutOfMemoryError, UserError): raise
    except Exception as e:
        yield f'compiling failed: {in_short(e)}'
        return
    turns = in_turn({**sides, compiled: timer.loss}, rounds(given), wait=wait)
    yield Line(compiled, turns[compiled].map(lambda s: tokens/s, 'tokens/s'))
    yield Line('ours compiled against ours', turns.ratio(compiled, ours))
    for name in others:
        goal = '≥ 1.5' if name.startswith('plain') and not packed else ''
        yield Line(f'ours compiled against {name}', turns.ratio(compiled, name), goal)
    flops = tokens*flops_per_token(recipe.model, recipe.model.context)
    for line in _utilised(turns[compiled], flops, timer, 'ours compiled'):
        goal = '≥ 55' if line.what.endswith(': utilisation') and not packed else ''
        yield line._replace(goal=goal)


def training(given):
    "Steps of base-124m: ours, eager and compiled, the plain loop, the transformers library"
    yield from fitting(given, lambda rows: in_step(given, rows, packed=False))


def packed(given):
    "The same with three documents in a row, kept apart"
    yield from fitting(given, lambda rows: in_step(given, rows, packed=True))


def memory(given):
    "Peak memory of a step of base-124m, and of its loss alone, in chunks and with all logits"
    def measure(rows):
        recipe = base(given, rows)
        timer = _our_step(recipe, GPT(recipe.model), dtype=DTYPE, optimizer='adamw')
        timer.loss()
        chunked = _peak_on(DEVICE, timer.loss)
        with reference_ops('nll'): whole = _peak_on(DEVICE, timer.loss)
        yield Line('rows of a step', one(rows, ''))
        yield Line('a step beyond weights and optimizer, loss in chunks', one(chunked/1e6, 'MB'))
        yield Line('a step beyond weights and optimizer, all logits', one(whole/1e6, 'MB'))
        yield Line('a step, all logits by chunks', one(whole/chunked, '×'))
        del timer
        cfg = recipe.model
        for line in BENCHMARKS['loss'](vocab_size=cfg.vocab_size, width=cfg.d_model,
                                       tokens=rows*cfg.context, rounds=rounds(given)):
            yield line._replace(what=f'the loss alone: {line.what}')
    yield from fitting(given, measure)


# --- attention with documents

def by_flex(q, k, v, doc):
    "FlexAttention, compiled, with a mask of blocks that is made once for all layers"
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    B, _, T, _ = q.shape
    def may(b, h, i, j): return (i >= j) & (doc[b, i] == doc[b, j])
    blocks = create_block_mask(may, B, None, T, T, device=q.device)
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=blocks)


def by_varlen(q, k, v, doc):
    "Flash attention over documents one after another, with the places where each begins"
    from torch.nn.attention.varlen import varlen_attn
    B, _, T, _ = q.shape
    first = torch.ones_like(doc, dtype=torch.bool)
    first[:, 1:] = doc[:, 1:] != doc[:, :-1]
    starts = first.flatten().nonzero()[:, 0]
    ends = torch.cat((starts, starts.new_tensor([B*T]))).int()
    longest = int(ends.diff().max())
    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        y = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0))
        return y.unflatten(0, (B, T)).transpose(1, 2)
    return attend


def forth_and_back(attend, qkv):
    "Attention and its gradients"
    return torch.autograd.grad(attend(*qkv).sum(), qkv)


def attention(given):
    "Attention of base-124m in 16 bits, there and back, with three documents in a row and without"
    cfg, rows = base(given, 2).model, 2 if given.dry else 8
    shape, kind = (rows, cfg.n_head, cfg.context, cfg.head_size), DTYPES[DTYPE]
    own = torch.Generator(DEVICE).manual_seed(0)
    qkv = [torch.randn(shape, generator=own, device=DEVICE, dtype=kind) for _ in range(3)]
    doc = random_batch(cfg, rows).doc.to(DEVICE)
    bias = torch.zeros(rows, 1, cfg.context, cfg.context, device=DEVICE, dtype=kind)
    bias = bias.masked_fill(~document_mask(doc), -torch.inf)
    without, documents = (_kernel_times(*qkv, b, rounds(given, 10)) for b in (None, bias))
    for name, times in dict(without=without, documents=documents).items():
        for kernel, s in times.items(): yield Line(f'{name}: {kernel}', one(1e3*s, 'ms'))
    best, masked = (min(t, key=t.get) for t in (without, documents))
    share = one(100*without[best]/documents[masked], '%')
    yield Line(f'speed with documents ({masked}), of that without ({best})', share, '≥ 90')
    qkv = [x.requires_grad_() for x in qkv]
    with torch.no_grad(): want = F.scaled_dot_product_attention(*qkv, bias)
    causal = partial(F.scaled_dot_product_attention, is_causal=True)
    for name, make in dict(varlen=by_varlen, flex=by_flex).items():  # what the model could use
        try:
            attend = make(*qkv, doc)
            with torch.no_grad(): far = float((attend(*qkv) - want).abs().max())
            sides = (partial(forth_and_back, f, qkv) for f in (attend, causal))
            pair = paired(*sides, rounds(given), wait=synchronizer(DEVICE))
        except Exception as e:
            yield f'{name}: {in_short(e)}'
            continue
        if far > .05: yield f'{name}: differs from the masked kernel by {far:.3g}'
        yield Line(f'documents: {name}', pair.a.map(lambda s: 1e3*s, 'ms'))
        yield Line(f'speed with documents ({name}), of that without (as PyTorch chooses)',
                   pair.ratio.map(lambda r: 100*r, '%'))


# --- generation

def generating(given):
    "Greedy generation with a cache in fp32: ours, the transformers library's, a plain loop"
    sizes = {'toy': dict(n_layer=1, n_head=2, d_model=32)} if given.dry else _SIZES
    _SIZES.update(sizes)
    for name, rows in itertools.product(sizes, (1, 2 if given.dry else 16)):
        new = 4 if given.dry else 64
        try: yield from _generate_in_turn(name, rows, 8 if given.dry else 32, new, rounds(given))
        except UserError as e: yield f'{name}, {rows} rows: {e}'  # of other tokens no time is taken


def decode_bytes(cfg, rows, length, width):
    "Bytes that one token of each row has to read: all weights once, keys and values of each row"
    parts = parameter_counts(cfg)
    weights = sum(n for part, n in parts.items() if part in ('attention', 'MLP', 'head'))
    if cfg.tie: weights += parts['embedding']
    return width*(weights + rows*2*cfg.n_layer*cfg.kv_heads*cfg.head_size*length)


def decoding(given):
    "A token's time beside that in which its weights, keys and values can be read"
    rate, sync, names = copy_rate(given), synchronizer(DEVICE), ('base-124m', 'base-350m')
    width = DTYPES[DTYPE].itemsize
    yield Line('copying within the memory, read and written', one(rate/1e9, 'GB/s'))
    few, many, prompt = (2, 6, 4) if given.dry else (32, 160, 32)
    for name, rows in itertools.product(names[:1] if given.dry else names, (1, 16)):
        cfg = base(given, 2).model if given.dry else load_recipe(name).model
        torch.manual_seed(0)
        gpt = GPT(replace(cfg, zero_init=False)).to(DEVICE).eval()
        ids = torch.randint(0, cfg.vocab_size, (rows, prompt), device=DEVICE)
        run = partial(generate, gpt, ids, dtype=DTYPE)
        # the difference of the two is that of tokens alone, without prompts and recording
        sides = dict(few=partial(run, few), many=partial(run, many))
        turns = in_turn(sides, rounds(given), wait=sync)
        spent = zip(turns['few'].values, turns['many'].values)
        each = Measure(tuple(max(1e-9, (b - a)/(many - few)) for a, b in spent), 's')
        least = decode_bytes(cfg, rows, prompt + (few + many)/2, width)/rate
        at = f'{name}, {rows} row{"s"*(rows > 1)}'
        yield Line(at, each.map(lambda s, n=rows: n/s, 'tokens/s'))
        yield Line(f'{at}: speed, of what memory allows', each.map(
            lambda s, t=least: 100*t/s, '%'), '≥ 70')


# --- a run that was stopped

def curve_of(folder, kernel, last=None):
    "Loss and gradient norm of each step of a small run, which may be stopped after the step `last`"
    cfg = GPTConfig(vocab_size=512, context=64, n_layer=2, n_head=2, d_model=64)
    stage = pick_stage(load_recipe('micro'))
    stage = replace(stage, tokens=12*256, batch_tokens=256, warmup=0, log_every=1, save_every=4,
                    eval_every=0, sample_every=0, device=DEVICE.type)
    picked = stage_module.pick_attention
    stage_module.pick_attention = lambda *args: kernel or picked(*args)
    torch.manual_seed(0)
    feed = Feed(lambda step: [random_batch(cfg, 4, step)])
    def stop(): return len(read_log(folder)) == last
    try: stage_module.train(GPT(cfg), feed, stage, folder, stop=stop)
    except Interrupted: pass
    finally: stage_module.pick_attention = picked
    return [(r['step'], r['loss'], r['grad_norm']) for r in read_log(folder)]


def resume(given):
    "Steps of a run that was stopped and went on, bit for bit those of one that was not"
    for kernel, goal in dict(math='≥ 100', fastest='').items():
        name, own = kernel, '' if kernel == 'fastest' else kernel
        straight = curve_of(given.folder/f'{name}-straight', own)
        curve_of(given.folder/f'{name}-stopped', own, 7)
        stopped = curve_of(given.folder/f'{name}-stopped', own)
        same = sum(a == b for a, b in zip(straight, stopped))
        yield Line(f'equal steps, attention kernel: {name}', one(100*same/len(straight), '%'), goal)


# --- a real training run

def choose_text(given):
    "Recipe and options: all poems if they are here, then Shakespeare, then the microworld"
    if given.dry:
        text = given.folder/'text.txt'
        lines = (f'Line {n} follows {n - 1}; {n + 1} is next.' for n in range(300))
        text.write_text('\n'.join(lines))
        return 'micro', [*TOY.split(), f'text={text}', 'vocab_size=400', 'valid_share=0.1']
    for name, more in dict(poems_all=['max_documents=100000'], shakespeare=[]).items():
        name = name.replace('_', '-')
        paths = load_recipe(name).data.text.split()
        if all((root()/path).exists() for path in paths): return name, more
    return 'micro', []


def real(given):
    "Training on a real text for the rest of the time, and its curve"
    until = time.monotonic() + given.seconds
    name, more = choose_text(given)
    more = [*more, 'stages=pretrain', 'compile=false', 'sample_every=0', 'save_every=0']
    yield f'recipe {name} {" ".join(more)}' if not given.dry else f'recipe {name}, a toy'
    run = Run(load_recipe(name, more), given.folder/'run')
    feed, cfg = text_feed(run, 'pretrain', run.shards), run.recipe.configs['pretrain']
    gpt = GPT(replace(run.recipe.model, vocab_size=len(run.tokenizer)))
    timer = StepTimer(gpt.cfg, cfg, run.recipe.data.doc_mask)
    timer.seconds()
    each = sum(timer.seconds() for _ in range(5))/5
    del timer
    left = 2. if given.dry else until - time.monotonic()
    steps = max(20, min(int(.6*left/each), cfg.steps))  # the rest: validation, saving
    own = [*more, f'pretrain.tokens={steps*cfg.batch_tokens}', f'eval_every={-(-steps//6)}',
           f'log_every={-(-steps//50)}']
    cfg, folder = load_recipe(name, own).configs['pretrain'], given.folder/'run'/'pretrain'
    began = time.perf_counter()
    try: stage_module.train(gpt, feed, cfg, folder, stop=lambda: time.monotonic() > until)
    except Interrupted as e: yield str(e)
    took, points = time.perf_counter() - began, read_log(folder)
    yield points
    logged, held = ([p for p in points if key in p] for key in ('loss', 'valid_bits_per_byte'))
    yield Line('tokens', one(logged[-1]['tokens'], ''))
    yield Line('training, with validation and saving', one(took, 's'))
    yield Line('steps alone', one(logged[-1]['tokens_per_s'], 'tokens/s'))
    yield Line('utilisation', one(100*logged[-1]['mfu'], '%'))
    for p in held[:1] + held[1:][-1:]:
        yield Line(f'held out, after step {p["step"]}', one(p['valid_bits_per_byte'], 'bits/byte'))
