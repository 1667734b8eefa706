"Sampling; whatever continues rows is tried with both decoders"
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import SAMPLING, make, prompts, six_each

from lm_nb.core import UserError
from lm_nb.inference import sampling as S
from lm_nb.inference.sampling import generate, generate_batch, stream
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.model.hub import to_transformers

# the filters

@pytest.mark.parametrize('ours, theirs', [
    (lambda z: S._apply_temperature(z, .7), lambda t: t.TemperatureLogitsWarper(.7)),
    (lambda z: S._keep_top_k(z, 5), lambda t: t.TopKLogitsWarper(5)),
    (lambda z: S._keep_top_p(z, .6), lambda t: t.TopPLogitsWarper(.6)),
    (lambda z: S._keep_min_p(z, .2), lambda t: t.MinPLogitsWarper(.2)),
])
def test_filters_agree_with_transformers(ours, theirs):
    lp = pytest.importorskip('transformers.generation.logits_process')
    z = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 3
    want = theirs(lp)(torch.zeros(64, 1, dtype=torch.long), z.clone())
    assert torch.allclose(ours(z).softmax(-1), want.softmax(-1), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 50, 4_096, 50_257]), st.integers(0, 2**32), st.floats(0, 30),
       st.floats(5e-324, 1) | st.sampled_from([.9, .999, 1 - 2**-24, 1 - 2**-53, 1]))
def test_top_p_keeps_the_smallest_set_that_reaches_p(n, seed, scale, p):
    z = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)) * scale
    kept = S._keep_top_p(z, p) > -math.inf
    for row, mine in zip(z.double().softmax(-1).tolist(), kept.tolist()):
        inside = sorted((q for q, k in zip(row, mine) if k), reverse=True)
        outside, near = [q for q, k in zip(row, mine) if not k], 1e-11  # rounding of n additions
        assert inside and max(outside, default=0) <= inside[-1]
        assert not outside or p < 1 and math.fsum(inside) >= p - near
        assert p == 1 or len(inside) == 1 or math.fsum(inside[:-1]) < p + near


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_top_p_of_one_keeps_all(dtype):
    z = torch.randn(4, 50_257, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert S._keep_top_p(z, 1.).equal(z)


def test_penalty_agrees_with_transformers():
    lp = pytest.importorskip('transformers.generation.logits_process')
    g = torch.Generator().manual_seed(0)
    z, ids = torch.randn(8, 50, generator=g), torch.randint(0, 50, (8, 12), generator=g)
    want = lp.RepetitionPenaltyLogitsProcessor(1.3)(ids, z.clone())
    seen = S._seen(ids, torch.ones_like(ids, dtype=torch.bool), 50)
    assert torch.allclose(S._repetition_penalty(z, seen, 1.3), want)


def test_what_stops_a_row_is_not_penalised(decoder):
    "Neither the stops of earlier turns nor those just said: their logits stay what they are"
    model, stops = make('qwen3'), (0, 2, 3, 49)
    turns = torch.tensor([[2, 7, 3, 8, 9, 2, 7, 3, 8, 9, 2]])
    said, penalise = [], S._repetition_penalty
    def note(logits, seen, *args):
        said.append((logits.clone(), seen.clone(), penalise(logits, seen, *args)))
        return said[-1][-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S, '_repetition_penalty', note)
        generate(model, turns, 5, repetition_penalty=3., eos=stops)
    for before, seen, after in said:
        words = seen.clone()
        words[:, list(stops)] = False
        assert seen[:, [2, 3]].all() and words.any()
        assert after[~words].equal(before[~words]) and (after[words] != before[words]).all()


SHARES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30)

@settings(max_examples=100, deadline=None)
@given(SHARES.filter(lambda p: sum(p) > 1e-3), st.floats(0, 1, exclude_max=True, width=32))
def test_the_impossible_is_never_drawn(p, u):
    p = torch.tensor([p])
    p = torch.where(p < 1e-6, 0, p) / p.sum()
    assert p[0, S._sample_from(p, torch.tensor([u])).item()] > 0


@pytest.mark.parametrize('bad', [
    dict(temperature=-1), dict(temperature=math.nan), dict(top_k=0), dict(top_p=0),
    dict(top_p=90), dict(min_p=2), dict(repetition_penalty=0), dict(repetition_penalty=1e300),
    dict(temperature=math.inf), dict(top_k=-1), dict(seed=10**20), dict(seed=-2**63 - 1)])
def test_impossible_settings(model, bad):
    one = torch.ones(1, 1, dtype=torch.long)
    with pytest.raises(UserError, match=next(iter(bad))): generate(model, one, 1, **bad)


POSITIVE = st.floats(5e-324, 1.7e308)  # all there are
SHARE = st.none() | st.floats(5e-324, 1)
EXTREMES = dict(
    temperature=st.just(0.) | POSITIVE, top_k=st.none() | st.integers(1, 2**70), top_p=SHARE,
    min_p=SHARE, repetition_penalty=st.floats(1e-30, 1e30))

@settings(max_examples=300, deadline=None)
@given(st.fixed_dictionaries(EXTREMES), st.integers(0, 2**32), st.floats(1e-3, 1e4))
def test_every_setting_that_is_accepted_chooses_a_possible_token(how, seed, scale):
    g = torch.Generator().manual_seed(seed)
    z, seen = torch.randn(4, 9, generator=g) * scale, torch.rand(4, 9, generator=g) < .5
    z[:, 3] = -math.inf
    new = S.sample_next(z, S.SampleConfig(**how), seen, torch.rand(4, generator=g))
    assert ((0 <= new) & (new < 9) & (new != 3)).all()


@pytest.mark.parametrize('seed', [-2**63, -1, 0, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits_serves(model, seed):
    one = torch.ones(1, 1, dtype=torch.long)
    a, b = (generate(model, one, 5, temperature=1., seed=seed) for _ in range(2))
    assert torch.equal(a, b)

# one truth, whatever the way

@pytest.mark.parametrize('how', SAMPLING)
def test_cache_changes_nothing(model, decoder, how):
    ids = six_each()
    want = generate(model, ids, 18, cache=False, **how)
    assert torch.equal(generate(model, ids, 18, **how), want)


def test_greedy_is_the_argmax_of_the_model(model, decoder):
    model.eval()
    out = generate(model, torch.tensor([prompts()[0][:3]]), 12)
    for n in range(3, 15): assert model(out[:, :n])[0, -1].argmax() == out[0, n]


@pytest.mark.parametrize('arch, name', [('gpt2', 'GPT2'), ('qwen3', 'Qwen3')])
def test_greedy_agrees_with_transformers(arch, name, decoder):
    tf = pytest.importorskip('transformers')
    gpt, ids = make(arch), torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    config, state = to_transformers(gpt)
    shape = {k: v for k, v in config.items() if k != 'architectures'}
    theirs = getattr(tf, config['architectures'][0])(getattr(tf, f'{name}Config')(**shape)).eval()
    theirs.load_state_dict(state, strict=False)
    if gpt.cfg.tie: theirs.tie_weights()
    how = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)
    assert torch.equal(generate(gpt, ids, 12), out)


@pytest.mark.parametrize('cache', [True, False])
@pytest.mark.parametrize('eos', [None, 7])
def test_batch_equals_one_by_one_to_the_end_of_the_context(model, decoder, cache, eos):
    rows = prompts() + [[1]*24]                # one fills the context: the others outlive it
    ids, doc = S._pad_left(rows)
    got = generate(model, ids, 30, doc=doc, eos=eos, cache=cache, pad=-1)[:, ids.shape[1]:]
    for row, new in zip(rows, got.tolist()):
        alone = generate(model, torch.tensor([row]), 30, eos=eos, pad=-1)[0, len(row):].tolist()
        assert new == alone
        assert sum(t >= 0 for t in new) == min(30, 25 - len(row)) or eos in new


@pytest.mark.parametrize('how', SAMPLING)
def test_batch_size_changes_nothing(model, decoder, how):
    rows = prompts(17)
    whole = generate_batch(model, rows, 12, eos=7, **how)
    for n in (1, 4, 16):
        assert generate_batch(model, rows, 12, eos=7, batch_size=n, **how) == whole
    assert all(7 not in a for a in whole)
    assert any(len(a) < min(12, 25 - len(r)) for a, r in zip(whole, rows))


def test_stream_is_generate(model, decoder):
    for how in SAMPLING:
        out = generate(model, torch.tensor([[5, 6, 7]]), 40, eos=(7, 9), pad=-1, **how)
        want = [t for t in out[0, 3:].tolist() if t >= 0]
        assert [*stream(model, [5, 6, 7], 40, eos=(7, 9), **how)] == want


def test_last_document_of_a_packed_row(model, decoder):
    ids, doc = torch.tensor([[9, 8, 7, 5, 6]]), torch.tensor([[0, 0, 0, 1, 1]])
    for how in ({}, dict(repetition_penalty=1.5)):
        alone = generate(model, ids[:, 3:], 5, **how)
        for cache in (True, False):
            out = generate(model, ids, 5, doc=doc, cache=cache, **how)
            assert torch.equal(out[0, 5:], alone[0, 2:])


def test_more_padding_than_context(model, decoder):
    ids = torch.tensor([[0]*30 + [5, 6, 7]])
    doc = torch.tensor([[-1]*30 + [0]*3])
    for cache in (True, False):
        out = generate(model, ids, 30, doc=doc, cache=cache, pad=-1)
        assert torch.equal(out[:, 30:], generate(model, ids[:, 30:], 30, pad=-1))

# chance

def test_seed_and_global_state(model, decoder):
    ids, state = torch.tensor([[5, 6, 7]]).repeat(6, 1), torch.get_rng_state()
    a, b, c = (generate(model, ids, 15, temperature=1., seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert len({tuple(r) for r in a.tolist()}) > 1     # rows draw their own numbers
    fewer = generate(model, ids, 8, temperature=1., seed=1)
    assert torch.equal(fewer, a[:, :11])               # a longer wish begins the same
    new = [generate(model, ids, 15, temperature=1.) for _ in range(2)]
    assert not torch.equal(*new)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_follows_the_model(model, decoder):
    model.eval()
    ids, n = torch.tensor([[5, 6, 7]]), 20_000
    p = (model(ids)[0, -1] / 4).softmax(-1)
    new = generate(model, ids.expand(n, -1), 1, temperature=4., seed=0)[:, -1]
    assert (new.bincount(minlength=50) / n - p).abs().max() < .012

# the ends

def test_eos_fills_with_pad(model, decoder):
    ids = torch.tensor([p[:4] for p in prompts(30) if len(p) >= 4])
    free = generate(model, ids, 12)[:, 4:]
    stop = int(free[:, 3].mode().values)
    ended = generate(model, ids, 12, eos=stop, pad=-5)[:, 4:]
    assert (ended == -5).any()
    for row, ref in zip(ended.tolist(), free.tolist()):
        n = ref.index(stop) + 1 if stop in ref else 12
        assert row == ref[:n] + [-5]*(12 - n)


def test_full_prompt_gets_one_token(model, decoder):
    out = generate(model, torch.ones(1, 24, dtype=torch.long), 5, pad=-1)
    assert (out[0, 24:] >= 0).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize('how', [dict(), dict(temperature=1., seed=3)])
def test_a_wish_beyond_the_context_costs_and_changes_nothing(model, decoder, how):
    rows, most = prompts(), 10**15
    wished = generate_batch(model, rows, most, **how)
    assert wished == generate_batch(model, rows, 24, **how)
    assert [len(new) for new in wished] == [25 - len(row) for row in rows]
    assert [*stream(model, rows[0], most, **how)] == [*stream(model, rows[0], 24, **how)]
    ids, doc = S._pad_left(rows[:2])
    assert generate(model, ids, 10**6, doc=doc, **how).shape == (2, ids.shape[1] + 10**6)


@pytest.mark.parametrize('call, words', [
    (lambda m: generate(m, torch.ones(2, 25, dtype=torch.long), 1), '25 tokens.*context = 24'),
    (lambda m: generate(m, torch.ones(1, 0, dtype=torch.long), 1), 'empty'),
    (lambda m: generate(m, torch.ones(1, 3, dtype=torch.long), 0), 'max_new = 0'),
    (lambda m: generate(m, torch.ones(1, 2, dtype=torch.long), 1, doc=torch.tensor([[0, -1]])),
     'padded on the left'),
    (lambda m: [*stream(m, [1]*25, 1)], '25 tokens'),
    (lambda m: generate_batch(m, [[1], []], 1), 'empty'),
    (lambda m: generate(m, torch.ones(1, 3, dtype=torch.long), 10**12), 'max_new = 10000*: expec'),
    (lambda m: [*stream(m, [1], -3)], 'max_new = -3'),
    (lambda m: generate_batch(m, [[1]], 1, batch_size=0), 'batch_size = 0'),
    (lambda m: generate_batch(m, [[1], [1]*25], 1), '25 tokens'),
])
def test_mistakes(model, call, words):
    with pytest.raises(UserError, match=words) as e: call(model)
    assert '\n' not in str(e.value)


def test_training_mode_comes_back(model, decoder):
    model.train()
    generate(model, torch.ones(1, 2, dtype=torch.long), 3)
    assert model.training
    s = stream(model, [1, 2], 5)
    next(s)
    # between two tokens the caller's world is as it was
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    s.close()
    assert model.training
    model.eval()


def test_rounded_up_vocabulary(decoder):
    gpt = make('qwen3', vocab_multiple=64)
    with torch.no_grad(): gpt.lm_head.weight[50:] = gpt.embed.weight[50:] = 9.
    ids, how = torch.ones(2, 3, dtype=torch.long), dict(temperature=3., seed=0)
    out = generate(gpt, ids, 10, **how)
    assert out.max() < 50 and torch.equal(out, generate(gpt, ids, 10, cache=False, **how))

# cost: counted, not timed

def read(model, monkeypatch, call):
    "How many tokens the model reads in each pass of `call`"
    sizes, hidden = [], model.hidden
    def counting(ids, *args, **kw):
        sizes.append(ids.numel())
        return hidden(ids, *args, **kw)
    monkeypatch.setattr(model, 'hidden', counting)
    call()
    monkeypatch.undo()
    return sizes


def test_each_position_is_read_once(model, monkeypatch):
    ids = torch.ones(3, 5, dtype=torch.long)
    def steps(**how): return [*S.plain_decode(model, ids, None, 10, S.SampleConfig(), **how)]
    assert read(model, monkeypatch, steps) == [3*5] + [3]*9
    uncached = read(model, monkeypatch, lambda: steps(cache=False))
    assert uncached == [3*n for n in range(5, 15)]


def test_a_batch_that_may_outlive_its_columns_goes_without_a_cache(model, monkeypatch):
    ids, doc = S._pad_left([[1]*20, [2]*3])
    for n, cached in ((4, True), (5, False)):
        def steps(n=n): return [*S.plain_decode(model, ids, doc, n, S.SampleConfig())]
        sizes = read(model, monkeypatch, steps)
        assert (sizes[1:] == [2]*(n - 1)) == cached


def test_plain_decode_reads_any_model():
    "A model needs no more than `cfg` and logits"
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cfg = GPTConfig(vocab_size=50, context=24)
        def forward(self, ids, doc=None, cache=None):
            return torch.nn.functional.one_hot(ids + 1, 50).float()
    ids, greedy = torch.tensor([[3], [7]]), S.SampleConfig()
    steps = S.plain_decode(Counting(), ids, None, 4, greedy, stops=(9,), cache=False)
    assert [s.tolist() for s in steps] == [[4, 8], [5, 9], [6, -1], [7, -1]]


def test_other_dtypes(model, decoder):
    "A float64 model gives the tokens of its float32 twin"
    twin = GPT(model.cfg).double()
    twin.load_state_dict(model.state_dict())
    ids = six_each()
    assert torch.equal(generate(twin, ids, 12), generate(model, ids, 12))


# in which dtype

@pytest.mark.parametrize('device, weight, asked, want', [
    ('cpu', torch.float32, None, None), ('cpu', torch.float32, 'bf16', 'bf16'),
    ('cpu', torch.float32, 'fp32', 'fp32'), ('cpu', torch.bfloat16, None, None),
    ('cuda', torch.float32, None, 'bf16'), ('cuda', torch.float32, 'fp32', 'fp32'),
    ('cuda', torch.float32, 'fp16', 'fp16'), ('cuda', torch.float16, None, None),
    ('mps', torch.float32, None, 'fp32')])
def test_where_it_computes_in_what(monkeypatch, device, weight, asked, want):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    some = SimpleNamespace(device=torch.device(device), dtype=weight)
    assert S._generation_dtype(some, asked) == want


def test_an_old_card_has_no_bf16_and_autocast_is_a_choice(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    some = SimpleNamespace(device=torch.device('cuda'), dtype=torch.float32)
    assert S._generation_dtype(some) == 'fp16'
    monkeypatch.setattr(S, 'working_dtype', lambda w: torch.bfloat16)
    assert S._generation_dtype(some) is None


def test_the_dtype_asked_for_is_that_of_autocast(model, decoder):
    x, row = six_each(), six_each()[0].tolist()
    how = dict(temperature=1., seed=3)
    with torch.autocast('cpu', torch.bfloat16):
        want, rows = generate(model, x, 12, **how), generate_batch(model, x.tolist(), 12, **how)
        one = [*stream(model, row, 12, **how)]
    assert generate(model, x, 12, dtype='bf16', **how).equal(want)
    assert generate_batch(model, x.tolist(), 12, dtype='bf16', **how) == rows
    assert [*stream(model, row, 12, dtype='bf16', **how)] == one
    assert not torch.is_autocast_enabled('cpu')
    plain = generate(model, x, 12, **how)
    with torch.autocast('cpu', torch.bfloat16):
        assert generate(model, x, 12, dtype='fp32', **how).equal(plain)


def test_between_the_tokens_of_a_stream_nothing_is_set(model, decoder):
    model.train()
    new = stream(model, [1, 2, 3], 9, dtype='bf16')
    for _ in range(3):
        next(new)
        assert not torch.is_autocast_enabled('cpu') and not torch.is_inference_mode_enabled()
    new.close()
    assert model.training
    model.eval()


def test_no_other_dtype(model):
    for call in (lambda: generate(model, torch.ones(1, 1).long(), 1, dtype='int8'),
                 lambda: generate_batch(model, [[1]], 1, dtype='int8'),
                 lambda: [*stream(model, [1], 1, dtype='int8')]):
        with pytest.raises(UserError, match='dtype = int8'): call()
