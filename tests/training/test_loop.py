"One step of the loop: what is learned, and that dividing and sharing the work change nothing"
import pytest, torch
import torch.nn.functional as F

from lm_nb.core import UserError
from lm_nb.data.shards import IGNORE, Batch
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.training.loop import (
    Ranks, Runtime, TrainConfig, grad_scaler, next_token_loss, training_steps)
from lm_nb.training.optim import make_optimizers



def small(seed=0, **kw):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=50, context=16, n_layer=1, n_head=2, d_model=32,
                         zero_init=False, **kw))


def uneven(step, rows=6):
    "A batch whose rows have 1, 3, 5, … targets, cut into micro-batches of one row"
    g = torch.Generator().manual_seed(step)
    x, y = torch.randint(50, (2, rows, 16), generator=g).unbind()
    for i in range(rows): y[i, 1 + 2*i:] = IGNORE
    return [Batch(x[i:i+1], y[i:i+1]) for i in range(rows)]


def together(step): return [Batch(*map(torch.cat, zip(*((b.x, b.y) for b in uneven(step)))))]


def cfg(steps, **kw):
    own = dict(tokens=steps*96, batch_tokens=96, warmup=1, device='cpu', dtype='fp32')
    return TrainConfig(**{**own, 'log_every': 1, 'eval_every': 0, **kw})


def steps_of(gpt, batches, n, config=None, **kw):
    "Losses per target of n steps"
    c = cfg(n, **config or {})
    steps = training_steps(gpt, make_optimizers(gpt, c), batches, c, **kw)
    return [(s.nll / max(s.targets, 1)).item() for s in steps]


def apart(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters()))


def test_the_loss_falls_on_what_is_read_again_and_again():
    losses = steps_of(small(), lambda step: together(0), 30)
    assert losses[0] > 3.5 and losses[-1] < .5 * losses[0]


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_accumulation_equals_one_batch(optimizer):
    a, b = small(), small()
    la, lb = (steps_of(m, f, 5, config=dict(optimizer=optimizer, lr=1e-3, muon_lr=1e-3))
              for m, f in ((a, uneven), (b, together)))
    assert la == pytest.approx(lb, rel=1e-5) and apart(a, b) < 2e-5
    assert apart(a, small()) > 1e-3, 'and the weights have moved'


def test_the_mean_of_micro_batch_means_is_another_gradient():
    gpt = small()
    def gradient(loss):
        gpt.zero_grad()
        loss().backward()
        return torch.cat([p.grad.flatten() for p in gpt.parameters()])
    def losses(): return [next_token_loss(gpt, b) for b in uneven(0)]
    n = sum(count.item() for _, count in losses())
    right = gradient(lambda: sum(nll for nll, _ in losses()) / n)
    means = gradient(lambda: sum(nll / count for nll, count in losses()) / 6)
    assert (right - means).norm() > .2 * right.norm()
    x, y = together(0)[0][:2]
    plain = gradient(
        lambda: F.cross_entropy(gpt(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE))
    assert (right - plain).norm() < 1e-5 * right.norm()


def test_a_batch_without_targets_has_loss_0_and_changes_nothing():
    gpt = small()
    c = cfg(3, weight_decay=.5)
    seen, empty = [], [b._replace(y=torch.full_like(b.y, IGNORE)) for b in uneven(0)]
    for s in training_steps(gpt, make_optimizers(gpt, c),
                            lambda step: empty if step == 1 else uneven(step), c):
        seen.append((s, [p.detach().clone() for p in gpt.parameters()]))
    (_, first), (s, second), (_, third) = seen
    assert s.nll == 0 and s.targets == 0 and s.grad_norm == 0
    assert all(torch.equal(p, q) for p, q in zip(first, second))
    assert not all(torch.equal(p, q) for p, q in zip(second, third))


def test_gradients_are_clipped_to_the_norm():
    gpt = small()
    c = cfg(1, clip=1e-3, optimizer='adamw')
    seen = []
    for p in gpt.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()))
    optimizers, moved = make_optimizers(gpt, c), []
    optimizers[0].register_step_pre_hook(lambda o, *_: moved.extend(
        p.grad.norm() for g in o.param_groups for p in g['params']))
    s = next(training_steps(gpt, optimizers, together, c))
    whole = torch.stack(seen).norm() / s.targets  # of the sum, divided by its count
    assert s.grad_norm == pytest.approx(whole.item(),
                                        rel=1e-4), 'the norm is the one before clipping'
    assert s.grad_norm > .1 and torch.stack(moved).norm() == pytest.approx(1e-3, rel=1e-4)


def test_a_gradient_below_the_limit_is_left_as_it_is():
    a, b = small(), small()
    steps_of(a, together, 3, config=dict(clip=1e3)), steps_of(b, together, 3, config=dict(clip=0))
    assert apart(a, b) == 0


def test_a_target_of_weight_nought_is_no_target_and_the_count_may_be_a_fraction():
    def weighted(step, w=1.):
        return [Batch(b.x, b.y.clamp(min=0), None, torch.where(b.y == IGNORE, 0., w))
                for b in uneven(step)]
    a, b, c = small(), small(), small()
    la = steps_of(a, uneven, 4)
    assert steps_of(b, weighted, 4) == pytest.approx(la, rel=1e-5) and apart(a, b) < 2e-5
    assert apart(a, small()) > 1e-3
    tiny = cfg(4)
    steps = list(
        training_steps(c, make_optimizers(c, tiny), lambda step: weighted(step, 1e-3), tiny))
    assert all(s.targets < 1 for s in steps), 'the counts are below one'
    assert [(s.nll / s.targets).item() for s in steps] == pytest.approx(la, rel=1e-4)
    assert apart(a, c) < 1e-4


def test_the_loss_is_an_argument():
    def half(model, batch):
        nll, n = next_token_loss(model, batch)
        return nll / 2, n
    a, b = small(), small()
    la, lb = (steps_of(m, uneven, 4, loss=f) for m, f in ((a, next_token_loss), (b, half)))
    assert lb[0] == pytest.approx(la[0] / 2) and apart(a, b) > 0


class Pair(Ranks):
    "Two ranks that read the same, as this one sees them: sums double, gradients are averaged"
    def sum(self, t): return 2 * t


@pytest.mark.parametrize('form', [
    lambda x, y: (x, y), lambda x, y: [x, y], lambda x, y: [(x, y)], lambda x, y: Batch(x, y),
    lambda x, y: [(x[:2], y[:2]), [x[2:], y[2:]]]], ids='pair list micro batch several'.split())
def test_plain_tensors_are_a_batch(form):
    def plain(step):
        (whole,) = together(step)
        return form(whole.x, whole.y)
    a, b = small(), small()
    la, lb = steps_of(a, together, 3), steps_of(b, plain, 3)
    assert lb == pytest.approx(la, rel=1e-5) and apart(a, b) < 2e-5 and apart(a, small()) > 1e-3


def test_what_ranks_average_is_undone():
    a, b = small(), small()
    la = steps_of(a, uneven, 4)
    lb = steps_of(b, uneven, 4, runtime=Runtime(ranks=Pair(world=2)))
    assert la == pytest.approx(lb, rel=1e-6) and apart(a, b) < 1e-6


def test_bf16_learns_like_fp32():
    fp32, bf16 = (steps_of(small(), together, 12, runtime=Runtime(dtype=d))
                  for d in ('fp32', 'bf16'))
    assert bf16 == pytest.approx(fp32, rel=.02) and bf16 != fp32


# --------------------------------------------- the scaler of fp16, which can also be tried in fp32

def scaler(): return torch.amp.GradScaler('cpu', init_scale=1024.)


def test_scaled_gradients_learn_the_same():
    a, b = small(), small()
    assert steps_of(a, uneven, 5, scaler=scaler()) == pytest.approx(
        steps_of(b, uneven, 5), rel=1e-5)
    assert apart(a, b) < 1e-4


def test_a_batch_without_targets_does_not_upset_the_scaler():
    empty = [b._replace(y=torch.full_like(b.y, IGNORE)) for b in uneven(0)]
    losses = steps_of(small(), lambda step: empty if step == 1 else uneven(step), 4,
                      scaler=scaler())
    assert losses[1] == 0 and losses[3] > 0


def test_an_overflow_in_one_optimizers_part_skips_the_whole_step():
    """A NaN in the gradient norm would otherwise spread, through clipping, to the weights of the
    other optimizer"""
    gpt, grads = small(), scaler()
    c = cfg(4)
    table = next(p for n, p in gpt.named_parameters() if p.shape == (50, 32))
    table.register_hook(lambda g: g * float('nan') if step == 1 else g)
    step, kept = 0, []
    for s in training_steps(gpt, make_optimizers(gpt, c), together, c, scaler=grads):
        kept.append([p.detach().clone() for p in gpt.parameters()])
        step = s.step
    assert all(torch.equal(p, q) for p, q in zip(kept[0], kept[1])), 'no weight has moved'
    assert all(p.isfinite().all() for p in kept[3]) and not torch.equal(
        kept[1][0], kept[2][0]), 'and training goes on'
    assert grads.get_scale() < 1024


def test_the_scale_of_fp16_begins_smaller_for_larger_sums():
    "As large as the scale of a mean loss would be: 2**16 over the number of targets"
    if not torch.cuda.is_available():
        half = Runtime(torch.device('cpu'), 'fp16')
        scales = [grad_scaler(half, n).state_dict()['scale'] for n in (1024, 2560, 2**19)]
        assert scales == [2.**6, 2.**5, 2.**-3]
    assert not grad_scaler(Runtime(), 1024).is_enabled()


# --- values that cannot work

@pytest.mark.parametrize('key, values, said', [
    ('tokens', (0, -1), 'must be positive'), ('tokens', (10**30,), 'expected at most'),
    ('batch_tokens', (0, -5), 'must be positive'), ('batch_tokens', (2**31,), 'expected less'),
    ('tokens', (95,), 'is less than one batch; batch_tokens = 96'),
    *[(k, (0, -1), 'must be positive') for k in ('log_every', 'keep_last', 'micro_rows')],
    *[(k, (-1,), 'must not be negative') for k in ('eval_every', 'save_every', 'skip_bad')],
    ('clip', (-1., float('nan')), 'must not be negative'),
    ('lr', (1e9, float('inf'), float('nan'), 0.), 'expected a number above 0 and at most 1'),
    ('device', ('gpu', 'cuda:', 'cuda:x', ''), 'expected auto, cpu, cuda, cuda:N or mps'),
    ('dtype', ('fp8', 'fp16'), 'fp16'), ('parallel', ('dpp',), 'did you mean')])
def test_values_that_cannot_work_are_named_when_they_are_read(key, values, said):
    for value in values:
        own = dict(tokens=2**40) if key == 'batch_tokens' else {}
        with pytest.raises(UserError) as e: cfg(3, **{**own, key: value})
        assert f'{key} = {value}' in str(e.value) and said in str(e.value)
        assert '\n' not in str(e.value)


def test_values_at_the_edge_work():
    assert cfg(1, tokens=2**53, batch_tokens=2**31 - 1, lr=1., clip=0, device='cuda:3').steps > 0
