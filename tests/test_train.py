"""The loop and the two stages: what is learned, and that stopping, dividing and sharing the work change nothing"""
import os, shutil, signal, subprocess, sys, time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest, torch
import torch.nn.functional as F
from torch import nn

import lm_nb, lm_nb.pretrain, lm_nb.sft
from desk import furnish
from lm_nb.core import UserError
from lm_nb.model import GPT, GPTConfig
from lm_nb.optim import make_optimizers
from lm_nb.pretrain import load_recipe, pretrain, run_folder
from lm_nb.sft import sft
from lm_nb.shards import IGNORE, Batch
from lm_nb.train import Interrupted, TrainConfig, batch_nll, read_log, train, training_steps

PACKAGE = Path(lm_nb.__file__).resolve().parent.parent
KEYS = {'dropout': 0.1, 'pretrain.tokens': 4800, 'sft.tokens': 3200, 'replay': 0.2, 'eval_every': 9, 'sample_every': 9, 'save_every': 0}


@pytest.fixture(scope='module', autouse=True)
def quiet():
    n, bars = torch.get_num_threads(), os.environ.get('IN_TEST')
    torch.set_num_threads(1)
    os.environ['IN_TEST'] = '1'
    yield
    torch.set_num_threads(n)
    if bars is None: del os.environ['IN_TEST']


@pytest.fixture(scope='module')
def desk(tmp_path_factory): return furnish(tmp_path_factory.mktemp('desk'), KEYS)


@pytest.fixture
def at_desk(desk, monkeypatch):
    monkeypatch.chdir(desk)
    return desk


def stages(run, *overrides, which=('pretrain', 'sft')):
    recipe = load_recipe('tiny', overrides)
    run = run_folder(recipe, run)
    for name in which: dict(pretrain=pretrain, sft=sft)[name](recipe, run)
    return run


@pytest.fixture(scope='module')
def whole(desk):
    "Both stages without a stop"
    here = os.getcwd()
    os.chdir(desk)
    try: return stages(desk/'whole')
    finally: os.chdir(here)


def shell(cwd, *argv, **kw):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(PACKAGE)}
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


def curve(folder, *keys): return [[r['step'], *(r[k] for k in keys if k in r)] for r in read_log(folder) if any(k in r for k in keys)]
def weights(folder): return (folder/'model.safetensors').read_bytes()


# ------------------------------------------------------------------ one step

def small(seed=0, **kw):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=50, context=16, n_layer=1, n_head=2, d_model=32, zero_init=False, **kw))


def uneven(step, rows=6):
    "A batch whose rows have 1, 3, 5, … targets, cut into micro-batches of one row"
    g = torch.Generator().manual_seed(step)
    x, y = torch.randint(50, (2, rows, 16), generator=g).unbind()
    for i in range(rows): y[i, 1 + 2*i:] = IGNORE
    return [Batch(x[i:i+1], y[i:i+1], None) for i in range(rows)]


def together(step): return [Batch(*map(torch.cat, zip(*((b.x, b.y) for b in uneven(step)))), None)]


def cfg(steps, **kw): return TrainConfig(**{**dict(tokens=steps*96, batch_tokens=96, warmup=1, device='cpu', dtype='fp32', log_every=1, eval_every=0), **kw})


def steps_of(gpt, batches, n, device_type='cpu', **kw):
    "Losses per target of n steps"
    c = cfg(n, **kw.pop('config', {}))
    return [(s.nll/max(s.targets, 1)).item() for s in training_steps(gpt, kw.pop('optimizers', None) or make_optimizers(gpt, c), batches, c, **kw)]


def apart(a, b): return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters()))


def test_the_loss_falls_on_what_is_read_again_and_again():
    losses = steps_of(small(), lambda step: together(0), 30)
    assert losses[0] > 3.5 and losses[-1] < .5 * losses[0]


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_accumulation_equals_one_batch(optimizer):
    a, b = small(), small()
    la, lb = (steps_of(m, f, 5, config=dict(optimizer=optimizer, lr=1e-3, muon_lr=1e-3)) for m, f in ((a, uneven), (b, together)))
    assert la == pytest.approx(lb, rel=1e-5) and apart(a, b) < 2e-5
    assert apart(a, small()) > 1e-3, 'and the weights have moved'


def test_the_mean_of_micro_batch_means_is_another_gradient():
    gpt = small()
    def gradient(loss):
        gpt.zero_grad()
        loss().backward()
        return torch.cat([p.grad.flatten() for p in gpt.parameters()])
    n = sum(int((b.y != IGNORE).sum()) for b in uneven(0))
    right = gradient(lambda: sum(batch_nll(gpt, b) for b in uneven(0)) / n)
    means = gradient(lambda: sum(batch_nll(gpt, b) / (b.y != IGNORE).sum() for b in uneven(0)) / 6)
    assert (right - means).norm() > .2 * right.norm()
    plain = gradient(lambda: F.cross_entropy(gpt(together(0)[0].x).flatten(0, 1), together(0)[0].y.flatten(), ignore_index=IGNORE))
    assert (right - plain).norm() < 1e-5 * right.norm()


def test_a_batch_without_targets_has_loss_0_and_changes_nothing():
    gpt = small()
    c = cfg(3, weight_decay=.5)
    seen, empty = [], [b._replace(y=torch.full_like(b.y, IGNORE)) for b in uneven(0)]
    for s in training_steps(gpt, make_optimizers(gpt, c), lambda step: empty if step == 1 else uneven(step), c):
        seen.append((s, [p.detach().clone() for p in gpt.parameters()]))
    (_, first), (s, second), (_, third) = seen
    assert s.nll == 0 and s.targets == 0 and s.grad_norm == 0
    assert all(torch.equal(p, q) for p, q in zip(first, second)) and not all(torch.equal(p, q) for p, q in zip(second, third))


def test_gradients_are_clipped_to_the_norm():
    gpt = small()
    c = cfg(1, clip=1e-3, optimizer='adamw')
    seen = []
    for p in gpt.parameters(): p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()))
    big = next(training_steps(gpt, make_optimizers(gpt, c), together, c)).grad_norm
    assert big == pytest.approx(torch.stack(seen).norm().item(), rel=1e-4) and big > .1, 'the norm told is the one before clipping'


def test_bf16_learns_like_fp32():
    fp32, bf16 = (steps_of(small(), together, 12, dtype=d) for d in ('fp32', 'bf16'))
    assert bf16 == pytest.approx(fp32, rel=.02) and bf16 != fp32


# ------------------------------------------------------------------ the scaler of fp16, which can also be tried in fp32

def scaler(): return torch.amp.GradScaler('cpu', init_scale=1024.)


def test_scaled_gradients_learn_the_same():
    a, b = small(), small()
    assert steps_of(a, uneven, 5, scaler=scaler()) == pytest.approx(steps_of(b, uneven, 5), rel=1e-5) and apart(a, b) < 1e-4


def test_a_batch_without_targets_does_not_upset_the_scaler():
    empty = [b._replace(y=torch.full_like(b.y, IGNORE)) for b in uneven(0)]
    losses = steps_of(small(), lambda step: empty if step == 1 else uneven(step), 4, scaler=scaler())
    assert losses[1] == 0 and losses[3] > 0


def test_an_overflow_in_one_optimizers_part_skips_the_whole_step():
    "A NaN in the gradient norm would otherwise spread, through clipping, to the weights of the other optimizer"
    gpt, grads = small(), scaler()
    c = cfg(4)
    table = next(p for n, p in gpt.named_parameters() if p.shape == (50, 32))
    table.register_hook(lambda g: g * float('nan') if step == 1 else g)
    step, kept = 0, []
    for s in training_steps(gpt, make_optimizers(gpt, c), together, c, scaler=grads):
        kept.append([p.detach().clone() for p in gpt.parameters()])
        step = s.step
    assert all(torch.equal(p, q) for p, q in zip(kept[0], kept[1])), 'no weight has moved'
    assert all(p.isfinite().all() for p in kept[3]) and not torch.equal(kept[1][0], kept[2][0]), 'and training goes on'
    assert grads.get_scale() < 1024


# ------------------------------------------------------------------ stopping and going on

@contextmanager
def stopping(monkeypatch, stage, after, step):
    "Let `train` stop of itself after some more steps, as Ctrl-C would"
    asked = []
    with monkeypatch.context() as m:
        m.setattr(getattr(lm_nb, stage), 'train', partial(train, stop=lambda: asked.append(1) or len(asked) == after))
        with pytest.raises(Interrupted, match=f'{stage}: stopped at step {step} of .*the same command goes on') as e: yield
        assert e.value.status == 130


def test_a_run_that_was_stopped_is_bitwise_the_run_that_was_not(whole, at_desk, tmp_path, monkeypatch):
    run = tmp_path/'run'
    for stage, stops in ('pretrain', {7: 7, 4: 11}), ('sft', {5: 5}):
        for after, step in stops.items():
            with stopping(monkeypatch, stage, after, step): stages(run, which=[stage])
            assert not (run/dict(pretrain='base', sft='chat')[stage]).exists()
        stages(run, which=[stage])
        keys = 'loss', 'grad_norm', 'lr', 'valid_loss', 'tokens'
        assert curve(run/stage, *keys) == curve(whole/stage, *keys)
    assert weights(run/'base') == weights(whole/'base') and weights(run/'chat') == weights(whole/'chat')
    assert len(curve(whole/'pretrain', 'loss')) == 30 and len(curve(whole/'sft', 'loss')) == 20
    assert curve(whole/'sft', 'loss')[-1][1] < curve(whole/'sft', 'loss')[0][1]


def test_a_stop_between_two_points_of_the_curve_does_not_bend_it(at_desk, tmp_path):
    "A point is the mean over log_every steps, whether or not a stop lies among them"
    def run(folder, stop=lambda: False): return train(small(), uneven, cfg(10, log_every=5), tmp_path/folder, stop=stop)
    run('whole')
    asked = []
    with pytest.raises(Interrupted): run('stopped', lambda: asked.append(1) or len(asked) == 3)
    run('stopped')
    assert [s for s, _ in curve(tmp_path/'whole', 'loss')] == [5, 10]
    for a, b in zip(curve(tmp_path/'stopped', 'loss'), curve(tmp_path/'whole', 'loss')): assert a == pytest.approx(b, rel=1e-6)


def test_after_a_crash_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    class Crash(Exception): pass
    def crash(gpt): raise Crash
    c = cfg(12, save_every=4)
    train(small(), uneven, c, tmp_path/'whole')
    with pytest.raises(Crash): train(small(), uneven, replace(c, eval_every=6), tmp_path/'run', validate=crash)
    log = tmp_path/'run'/'log.jsonl'
    assert [r['step'] for r in read_log(tmp_path/'run')] == [1, 2, 3, 4, 5, 6]
    log.write_text(log.read_text() + '{"step": 7, "lo')  # and the last line was cut off
    train(small(), uneven, c, tmp_path/'run')
    assert curve(tmp_path/'run', 'loss', 'grad_norm') == curve(tmp_path/'whole', 'loss', 'grad_norm')
    steps = sorted(p.name for p in (tmp_path/'run'/'checkpoints').iterdir())
    assert steps == ['step-00000008', 'step-00000012'], 'the two newest are kept'


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoints(tmp_path):
    "Weights that are NaN are never saved, or the same command could not go on"
    gpt = small()
    def spoil(step):
        if step == 5:
            with torch.no_grad(): next(gpt.parameters()).fill_(float('nan'))
        return uneven(step)
    with pytest.raises(UserError, match='train: the loss is nan at step .*Lower lr') as e: train(gpt, spoil, cfg(20, log_every=10, save_every=1), tmp_path)
    assert '\n' not in str(e.value)
    saved = train(small(), uneven, cfg(20, log_every=10, save_every=1), tmp_path)
    assert saved['loss'] < 5 and not list((tmp_path/'checkpoints').glob('*.bad'))


def test_ctrl_c_saves_says_how_to_go_on_and_the_same_command_does(desk, tmp_path, monkeypatch):
    run, n = tmp_path/'run', 200
    words = ['pretrain', 'tiny', f'run_dir={run}', f'pretrain.tokens={160*n}']
    command = ['-c', 'import sys; from lm_nb.cli import main; sys.exit(main())', *words]
    job = shell(desk, *command)
    for _ in range(4000):
        if len(read_log(run/'pretrain')) > 20 or job.poll() is not None: break
        time.sleep(.01)
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 130, err
    assert 'Traceback' not in err and 'and saved; the same command goes on from there' in err.splitlines()[-1]
    done = int(err.split('stopped at step ')[1].split()[0])
    assert 5 < done < n and not (run/'base').exists()
    again = shell(desk, *command)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0 and str(run/'base') in out, err
    monkeypatch.chdir(desk)
    stages(tmp_path/'whole', f'pretrain.tokens={160*n}', which=['pretrain'])
    assert [s for s, _ in curve(run/'pretrain', 'loss')] == list(range(1, n + 1))
    here, there = (curve(f/'pretrain', 'loss', 'valid_loss') for f in (run, tmp_path/'whole'))
    assert len(here) == len(there) and all(a == pytest.approx(b, rel=1e-5) for a, b in zip(here, there))


# ------------------------------------------------------------------ two ranks

def torchrun(desk, *words):
    job = shell(desk, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, '-m', 'lm_nb.pretrain', *words)
    return *job.communicate(timeout=120), job.returncode


@pytest.mark.skipif(not torch.distributed.is_available(), reason='this torch cannot run several ranks')
def test_two_ranks_learn_what_one_does(desk, tmp_path, monkeypatch):
    _, err, status = torchrun(desk, 'tiny', 'dropout=0', f'run_dir={tmp_path/"two"}')
    assert status == 0, err
    monkeypatch.chdir(desk)
    stages(tmp_path/'one', 'dropout=0', which=['pretrain'])
    for keys, n in (('loss',), 30), (('valid_loss',), 4):
        one, two = (curve(tmp_path/k/'pretrain', *keys) for k in ('one', 'two'))
        assert len(one) == len(two) == n and all(a == pytest.approx(b, rel=1e-4) for a, b in zip(one, two))
    assert (tmp_path/'two'/'base'/'model.safetensors').exists()


@pytest.mark.skipif(not torch.distributed.is_available(), reason='this torch cannot run several ranks')
def test_a_mistake_on_two_ranks_is_said_and_no_rank_is_left_waiting(desk, tmp_path):
    _, err, status = torchrun(desk, 'tiny', 'text=missing.txt', f'run_dir={tmp_path/"run"}')
    assert status != 0 and 'missing.txt: no such file or folder' in err
    ours = [l for l in err.splitlines() if 'Error' in l and 'ChildFailedError' not in l]
    assert not ours, 'the other rank tells of a broken connection: ' + '\n'.join(ours)


# ------------------------------------------------------------------ what TensorBoard shows

def test_tensorboard_has_the_curves_texts_pictures_and_the_recipe(whole):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for stage, picture in ('pretrain', 'attention/layer_0'), ('sft', 'mask'):
        events = EventAccumulator(str(whole/stage), size_guidance=dict(scalars=0, images=0, tensors=0)).Reload()
        tags = events.Tags()
        want = {'loss', 'valid_loss', 'lr', 'grad_norm', 'tokens_per_s', 'mfu', 'memory_gib'} | ({'valid_bits_per_byte'} if stage == 'pretrain' else set())
        assert want <= set(tags['scalars']), stage
        shown = [(e.step, e.value) for e in events.Scalars('loss')]
        assert shown == [(s, pytest.approx(x, rel=1e-6)) for s, x in curve(whole/stage, 'loss')]
        assert picture in tags['images'] and events.Images(picture)[0].encoded_image_string[1:4] == b'PNG'
        text = events.Tensors(next(t for t in tags['tensors'] if t.startswith('sample')))
        assert len(text) >= 2 and text[-1].tensor_proto.string_val[0].decode()
        assert any('hparams' in t for t in events.summary_metadata), 'the recipe'
        mfu = [e.value for e in events.Scalars('mfu')]
        assert all(0 < x < 1 for x in mfu) and all(0 < e.value < 100 for e in events.Scalars('memory_gib'))


# ------------------------------------------------------------------ what training needs

LIGHT = '''
import sys
from lm_nb.core import load_config
import lm_nb.train, lm_nb.pretrain, lm_nb.sft
from lm_nb.shards import Shards, PretrainBatches
from lm_nb.tokenizer import Tokenizer
from lm_nb.model import GPT, GPTConfig
from lm_nb.optim import make_optimizers
run = sys.argv[1]
tok = Tokenizer.load(run + '/tokenizer/tokenizer.model')
shards = Shards(run + '/shards/train', tok)
gpt = GPT(GPTConfig(vocab_size=len(tok), context=32, n_layer=1, n_head=2, d_model=32))
cfg = lm_nb.train.TrainConfig(tokens=480, batch_tokens=160, device='cpu', dtype='fp32')
steps = [s.step for s in lm_nb.train.training_steps(gpt, make_optimizers(gpt, cfg), PretrainBatches(shards, 32, 5), cfg)]
assert steps == [1, 2, 3]
print(*sorted({'datasets', 'tensorboard', 'matplotlib', 'pandas', 'transformers', 'pyarrow', 'IPython'} & set(sys.modules)))
'''


def test_training_from_finished_shards_loads_nothing_heavy(whole, desk):
    job = shell(desk, '-c', LIGHT, whole)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0 and out.strip() == '', out + err


def test_training_from_finished_shards_does_not_need_the_text(whole, desk, tmp_path, monkeypatch):
    "Files that are in the run directory are enough to train from"
    monkeypatch.chdir(desk)
    (tmp_path/'moved.txt').write_bytes((desk/'text.txt').read_bytes())
    run = stages(tmp_path/'run', f'text={tmp_path/"moved.txt"}', which=[])
    for part in ('tokenizer', 'shards'): shutil.copytree(whole/part, run/part)
    (tmp_path/'moved.txt').unlink()
    stages(run, f'text={tmp_path/"moved.txt"}', which=['pretrain'])
    assert weights(run/'base') == weights(whole/'base')


def test_a_model_is_trained_where_it_stands_and_left_in_training_mode(tmp_path):
    gpt = small(dropout=.1)
    modes = []
    train(gpt, uneven, cfg(4, eval_every=2), tmp_path, validate=lambda g: modes.append((g is gpt, g.training)) or {'valid_loss': 1.})
    assert modes == [(True, False)] * 2 and gpt.training and isinstance(gpt, nn.Module)
