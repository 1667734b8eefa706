"Fast decoding: fixed shapes, threads, recorded steps, and what is not computed"
import gc
import random
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from random_models import SAMPLING, SHAPES, make, prompts, six_each

from lm_nb.core import UserError
from lm_nb.inference import decoding as D
from lm_nb.inference.sampling import (
    SampleConfig, _pad_left, _uniform, eval_mode, generate, generate_batch, plain_decode, stream)
from lm_nb.model.gpt import GPT, GPTConfig


@pytest.mark.parametrize('start', [
    'from lm_nb import generate', 'from lm_nb.inference.sampling import generate',
    'from lm_nb.inference import generate', 'from lm_nb.inference import evaluate'])
def test_it_is_what_generate_uses(start):
    "Wherever `generate` is imported from"
    end = 'import lm_nb.inference.sampling as s; print(s._decoder().__name__)'
    job = [sys.executable, '-c', f'{start}; {end}']
    said = subprocess.run(job, capture_output=True, text=True, check=True)
    assert said.stdout == '_fast_decode\n'


@pytest.mark.parametrize('how', SAMPLING)
def test_decoders_agree(model, how):
    config = SampleConfig(**how)
    ids, doc = _pad_left(prompts())
    u = _uniform(config, 18, len(ids))
    args = model, ids, doc, 18, config, (7, 30), u
    fast, plain = (torch.stack([*decode(*args)]) for decode in (D._fast_decode, plain_decode))
    assert torch.equal(fast, plain)


@pytest.mark.parametrize('part', ['attn.q_proj', 'mlp.down_proj'])
def test_unknown_parts_are_read_by_the_model(model, monkeypatch, part):
    "An adapter on a linear layer must have its say"
    class Adapted(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear, self.weight, self.bias = linear, linear.weight, linear.bias
        def forward(self, x): return self.linear(x) * -1.5
    gpt = GPT(model.cfg).eval()
    gpt.load_state_dict(model.state_dict())
    where, name = part.split('.')
    owner = getattr(gpt.blocks[0], where)
    setattr(owner, name, Adapted(getattr(owner, name)))
    ids = six_each()
    got = generate(gpt, ids, 12)
    assert torch.equal(got, generate(gpt, ids, 12, cache=False))
    assert not torch.equal(got, generate(model, ids, 12))

# cost: counted, not timed

def positions(monkeypatch, call):
    "How many positions are read during `call`: prompts, then steps"
    n, first, step = [0, 0], D._prefill, D.CachedDecoder.step
    def reading(fused, ids, *rest):
        n[0] += ids.numel()
        return first(fused, ids, *rest)
    def stepping(self, new):
        n[1] += len(new)
        return step(self, new)
    monkeypatch.setattr(D, '_prefill', reading)
    monkeypatch.setattr(D.CachedDecoder, 'step', stepping)
    call()
    monkeypatch.undo()
    return n


def passes(monkeypatch):
    "How many positions each pass reads from now on"
    sizes, hidden = [], D._FusedGPT.hidden
    def counting(self, ids, *rest):
        sizes.append(ids.numel())
        return hidden(self, ids, *rest)
    monkeypatch.setattr(D._FusedGPT, 'hidden', counting)
    return sizes


def test_each_position_is_read_once(model, monkeypatch):
    ids = torch.ones(3, 5, dtype=torch.long)
    assert positions(monkeypatch, lambda: generate(model, ids, 10)) == [3*5, 3*9]


@pytest.mark.parametrize('arch', SHAPES)
@pytest.mark.parametrize('tails', [(3, 5, 1, 8), (4, 4, 4), (1, 1)])
def test_a_common_beginning_is_read_once(arch, tails, monkeypatch):
    model, g = make(arch, context=64), torch.Generator().manual_seed(2)
    some = lambda n: torch.randint(1, 50, (n,), generator=g).tolist()
    rows = [some(30)]*len(tails)
    rows = [row + some(n) for row, n in zip(rows, tails)]
    ids, doc = _pad_left(rows)
    args, read = (model, ids, doc, 12, SampleConfig(), (7,)), passes(monkeypatch)
    fast = torch.stack([*D._fast_decode(*args)])
    assert read[:2] == [30, max(tails)*len(tails)] and max(read[2:]) <= len(tails)
    assert torch.equal(fast, torch.stack([*plain_decode(*args)]))


def test_ended_rows_are_dropped(model, monkeypatch):
    rows = [[p] for p in range(1, 49)]
    free = generate_batch(model, rows, 20)
    stop = max(range(50), key=lambda t: sum(t in a[:4] for a in free))
    lengths = [len(a) for a in generate_batch(model, rows, 20, eos=stop)]
    assert sum(n < 20 for n in lengths) > 10
    def cost(**how):
        return sum(positions(monkeypatch, lambda: generate_batch(model, rows, 20, **how)))
    assert cost(eos=stop) < cost()


def test_long_prompts_are_read_a_few_rows_at_a_time(model, monkeypatch):
    rows = prompts(40)
    whole, sizes = generate_batch(model, rows, 3), passes(monkeypatch)
    monkeypatch.setattr(D._prefill, '__defaults__', (64,))
    assert generate_batch(model, rows, 3) == whole and max(sizes) <= 64 and len(sizes) > 5

# the step that a GPU records

def steps(model, ids, config, doc=None, record=None, static=True, n=18):
    "All new ids (B, n), by a recorded step if `record` is given"
    u = _uniform(config, n, len(ids))
    with torch.inference_mode(), eval_mode(model):
        state = D._DecodeState(model, ids, doc, n, config, (7,), u, static=static)
        def shape(): return len(state.rows), state.decoder.width
        state.start()
        step = D._CUDAGraphStep(state.step, shape, record) if record else state.step
        for _ in range(n - 1): step(), state.decoder.advance()
    return state.out.T


@pytest.mark.parametrize('how', SAMPLING)
def test_static_shapes_change_nothing(model, how):
    (ids, doc), config = _pad_left(prompts(9)), SampleConfig(**how)
    fixed = steps(model, ids, config, doc)
    assert torch.equal(fixed, steps(model, ids, config, doc, static=False))
    out = generate(model, ids, 18, doc=doc, eos=7, pad=-1, **how)[:, ids.shape[1]:]
    assert torch.equal(fixed, out)


@pytest.mark.parametrize('arch', SHAPES)
def test_the_step_asks_the_host_nothing(arch):
    config, compiled = SampleConfig(1., 20, .9, .01, 1.1, 3), []
    backend = 'eager' if arch == 'gpt2' else 'aot_eager'
    def record(step):
        compiled.append(step)
        return torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
    small, (ids, doc) = GPT(make(arch, n_layer=1).cfg), _pad_left(prompts(3, longest=8))
    want = steps(small, ids, config, doc, n=8)
    assert torch.equal(steps(small, ids, config, doc, record, n=8), want) and len(compiled) == 1


def test_a_step_that_cannot_be_recorded_goes_on(model):
    ids, doc = _pad_left(prompts(3))
    def record(step):
        raise RuntimeError('operation not permitted when stream is capturing\nmore')
    with pytest.warns(UserWarning, match='way: operation not permitted when stream is capturing$'):
        got = steps(model, ids, SampleConfig(), doc, record)
    assert torch.equal(got, steps(model, ids, SampleConfig(), doc))


def test_recorded_anew_when_shapes_change():
    shape, said = [1], []
    def record(step):
        said.append('record')
        return lambda: said.append('replay')
    step = D._CUDAGraphStep(lambda: said.append('step'), lambda: shape[0], record, first=2)
    for _ in range(4): step()
    shape[0] = 2
    for _ in range(3): step()
    once = ['step', 'step', 'record', 'replay']
    assert said == [*once, 'replay', *once]


def test_fixed_widths_grow_by_256_columns():
    gpt = GPT(GPTConfig(vocab_size=50, context=600, n_layer=1, n_head=2, d_model=16))
    widths = []
    decoder = D.CachedDecoder(D._fused(gpt), torch.tensor([250]), 600, static=True)
    for _ in range(349):
        widths.append(decoder.width)
        decoder.advance()
    assert sorted(set(widths)) == [256, 512, 640]
    assert all(w >= 251 + i for i, w in enumerate(widths))

# rows that join and leave

def begun(model, rows):
    "A decoder that has read these rows"
    length = torch.tensor([*map(len, rows)])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
    decoder = D.CachedDecoder(D._fused(model), length, ids.shape[1])
    decoder.prefill(ids)
    return decoder


@pytest.mark.parametrize('seed', range(4))
@torch.inference_mode()
def test_whoever_joins_or_leaves_the_others_read_on(model, seed):
    dice, rows, decoder, model = random.Random(seed), [], None, deepcopy(model).eval()
    some = lambda n: [dice.randrange(50) for _ in range(n)]
    for _ in range(12):
        if not rows or decoder.longest >= decoder.size or dice.random() < .4:
            new = [some(dice.randint(1, 9)) for _ in range(dice.randint(1, 3))]
            stay = [i for i, r in enumerate(rows) if dice.random() < .7 and len(r) < 20]
            parts = ([(decoder, stay)] if stay else []) + [(begun(model, new), [*range(len(new))])]
            rows = [rows[i] for i in stay] + new
            decoder = D.join_rows(parts, room=dice.randint(1, 5))
        ids = some(len(rows))
        rows = [[*r, i] for r, i in zip(rows, ids)]
        got = decoder.step(torch.tensor(ids))
        decoder.advance()
        want = torch.stack([model(torch.tensor([r]))[0, -1] for r in rows])
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
        assert decoder.length.tolist() == [*map(len, rows)]

# dtypes

def two_passes(model):
    "Logits after six tokens and after a seventh: by the decoder, and by the model"
    ids = six_each()
    decoder = D.CachedDecoder(D._fused(model), torch.full((len(ids),), 6), 24)
    fast = torch.cat([decoder.prefill(ids), decoder.step(ids[:, 0])])
    longer = torch.cat([ids, ids[:, :1]], 1)
    return decoder, fast, torch.cat([model(ids)[:, -1], model(longer)[:, -1]])


@pytest.mark.parametrize('dtype, far', [(torch.float64, 1e-7), (torch.bfloat16, .03)])
def test_other_dtypes(model, dtype, far):
    twin = GPT(model.cfg).to(dtype).eval()
    twin.load_state_dict(model.state_dict())
    with torch.inference_mode(): decoder, fast, slow = two_passes(twin)
    fast, slow = fast.double(), slow.double()
    assert decoder.k.dtype == dtype and (fast - slow).norm() / slow.norm() < far


def test_autocast(model):
    "Inside autocast the step multiplies in bf16, as the model does"
    with torch.inference_mode(), eval_mode(model):
        want = two_passes(model)[2]
        with torch.autocast('cpu', dtype=torch.bfloat16): decoder, got, _ = two_passes(model)
    assert decoder.k.dtype == got.dtype == torch.bfloat16
    assert (got.float() - want).norm() / want.norm() < .05

# threads

def test_threads_come_back_and_change_nothing(model):
    ids = torch.tensor([[5, 6, 7]]).repeat(4, 1)
    one = generate(model, ids, 20, temperature=1., seed=1)
    torch.set_num_threads(2)
    try:
        assert torch.equal(generate(model, ids, 20, temperature=1., seed=1), one)
        for _ in stream(model, [5, 6, 7], 20): assert torch.get_num_threads() == 2
        def broken(): raise RuntimeError
        with pytest.raises(RuntimeError): D._ThreadTuner(broken)()
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(1)

def test_ids_of_another_tokenizer_are_refused(model):
    for bad in (-1, 50):
        with pytest.raises(UserError, match=f'ids from .*{bad}.* knows 0 to 49; was the text'):
            generate(model, torch.tensor([[5, bad]]), 3)

# weights are laid out once

@pytest.mark.parametrize('small, large', [(0, 2**20), (0, 0)])
@pytest.mark.parametrize('arch', SHAPES)
def test_blocks_change_nothing(arch, small, large, monkeypatch):
    "Weights in oneDNN's blocks for several rows, or for any"
    monkeypatch.setattr(D, '_SMALL', small)
    monkeypatch.setattr(D, '_LARGE', large)
    model, (ids, doc) = make(arch).eval(), _pad_left(prompts())
    args = model, ids, doc, 12, SampleConfig(), (7,)
    plain = torch.stack([*plain_decode(*args)])
    assert torch.equal(torch.stack([*D._fast_decode(*args)]), plain)
    layer = D._fused(model).layers[0]
    assert D._PACKS == ('blocks' in vars(layer.up))
    with torch.inference_mode(): _, fast, slow = two_passes(model)
    assert (fast - slow).abs().max() < 1e-4


def shrink(p): p.data[0] *= .5                                # not counted by `p._version`
def swap(p):                                                  # what a hash of entries cannot see
    with torch.no_grad(): p.copy_(p.flip(0))
def replace(p): p.data = p.data.roll(1, 0)
def one_step(p):                                              # not counted, either
    p.grad = torch.ones_like(p)
    torch.optim.AdamW([p], .1, fused=True).step()


@pytest.mark.parametrize('change', [shrink, swap, replace, one_step])
@pytest.mark.parametrize('where', ['norm1.weight', 'attn.q_norm.weight', 'attn.q_proj.weight',
                                   'attn.v_proj.weight', 'mlp.down_proj.weight'])
def test_never_answered_with_old_weights(where, change):
    "However a parameter is changed between two requests"
    model, ids = make('qwen3').eval(), six_each()
    p, g = model.blocks[0].get_parameter(where), torch.Generator().manual_seed(0)
    with torch.no_grad(): p += torch.randn(p.shape, generator=g)
    with torch.inference_mode(): before = two_passes(model)[1]
    change(p)
    with torch.inference_mode(): _, fast, slow = two_passes(model)
    assert (fast - slow).abs().max() < 1e-4 < (fast - before).abs().max()
    assert torch.equal(generate(model, ids, 12), generate(model, ids, 12, cache=False))


def test_weights_are_joined_once(model, monkeypatch):
    "A second request finds the fused form of the first; it goes with the model"
    made, init = [], D._FusedGPT.__init__
    def making(self, gpt):
        made.append(gpt.cfg)
        init(self, gpt)
    monkeypatch.setattr(D._FusedGPT, '__init__', making)
    twin = GPT(model.cfg).eval()
    for _ in range(3): generate(twin, six_each(), 4)
    assert len(made) == 1
    gc.collect()  # what other tests have left
    held = len(D._fused_models)
    generate(twin.train(), six_each(), 4)
    assert len(D._fused_models) == held - 1, 'a copy is held while it learns'
    generate(twin.eval(), six_each(), 4)
    del twin
    gc.collect()
    assert len(D._fused_models) == held - 1
