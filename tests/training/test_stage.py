"""The loop and the two stages: what is learned, and that stopping, dividing and sharing the work
change nothing"""
import os, re, shutil, signal, subprocess, sys, time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest, torch
from torch import nn

import lm_nb
from desk import KEYS, curve, furnish, stages, stopping, weights, whole_run
from test_loop import cfg, small, uneven
from lm_nb.core import UserError
from lm_nb.training.recipe import Feed
from lm_nb.training.monitor import Interrupted, read_log
from lm_nb.training.stage import train

PACKAGE = Path(lm_nb.__file__).resolve().parent.parent


@pytest.fixture(scope='module', autouse=True)
def quiet():
    bars = os.environ.get('IN_TEST')
    os.environ['IN_TEST'] = '1'
    yield
    if bars is None: del os.environ['IN_TEST']


@pytest.fixture(scope='module')
def desk(tmp_path_factory): return furnish(tmp_path_factory.mktemp('desk'), KEYS)


@pytest.fixture(scope='module')
def whole(desk): return whole_run(desk)


def shell(cwd, *argv, **kw):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(PACKAGE)}
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=cwd, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


# ------------------------------------------------------------------ stopping and going on

def test_a_run_that_was_stopped_is_bitwise_the_run_that_was_not(
    whole, at_desk, tmp_path, monkeypatch):
    run = tmp_path/'run'
    for stage, stops in ('pretrain', {7: 7, 4: 11}), ('sft', {5: 5}):
        for after, step in stops.items():
            with stopping(monkeypatch, stage, after, step): stages(run, which=[stage])
            assert not (run/dict(pretrain='base', sft='chat')[stage]).exists()
        stages(run, which=[stage])
        keys = 'loss', 'grad_norm', 'lr', 'valid_loss', 'tokens'
        assert curve(run/stage, *keys) == curve(whole/stage, *keys)
    assert weights(run/'base') == weights(whole/'base')
    assert weights(run/'chat') == weights(whole/'chat')
    assert len(curve(whole/'pretrain', 'loss')) == 30 and len(curve(whole/'sft', 'loss')) == 20
    assert curve(whole/'sft', 'loss')[-1][1] < curve(whole/'sft', 'loss')[0][1]


def test_a_stop_between_two_points_of_the_curve_does_not_bend_it(at_desk, tmp_path):
    "A point is the mean over log_every steps, whether or not a stop lies among them"
    def run(folder, stop=lambda: False):
        return train(small(), Feed(uneven), cfg(10, log_every=5), tmp_path/folder, stop=stop)
    run('whole')
    asked = []
    with pytest.raises(Interrupted): run('stopped', lambda: asked.append(1) or len(asked) == 3)
    run('stopped')
    assert [s for s, _ in curve(tmp_path/'whole', 'loss')] == [5, 10]
    for a, b in zip(curve(tmp_path/'stopped', 'loss'), curve(tmp_path/'whole', 'loss')):
        assert a == pytest.approx(b, rel=1e-6)


def test_after_a_crash_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    class Crash(BaseException): pass
    def crash(gpt, runtime): raise Crash
    c = cfg(12, save_every=4)
    train(small(), Feed(uneven), c, tmp_path/'whole')
    with pytest.raises(Crash):
        train(small(), Feed(uneven, crash), replace(c, eval_every=6), tmp_path/'run')
    log = tmp_path/'run'/'log.jsonl'
    assert [r['step'] for r in read_log(tmp_path/'run')] == [1, 2, 3, 4, 5, 6]
    log.write_text(log.read_text() + '{"step": 7, "lo')  # and the last line was cut off
    train(small(), Feed(uneven), c, tmp_path/'run')
    assert curve(tmp_path/'run', 'loss', 'grad_norm') == curve(
        tmp_path/'whole', 'loss', 'grad_norm')
    steps = sorted(p.name for p in (tmp_path/'run'/'checkpoints').iterdir())
    assert steps == ['step-00000008', 'step-00000012'], 'the two newest are kept'


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoints(tmp_path):
    "Weights that are NaN are never saved, or the same command could not go on"
    gpt = small()
    def spoil(step):
        if step == 5:
            with torch.no_grad(): next(gpt.parameters()).fill_(float('nan'))
        return uneven(step)
    with pytest.raises(UserError, match='train: the loss is nan at step .*Lower lr') as e:
        train(gpt, Feed(spoil), cfg(20, log_every=10, save_every=1), tmp_path)
    assert '\n' not in str(e.value)
    saved = train(small(), Feed(uneven), cfg(20, log_every=10, save_every=1), tmp_path)
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
    assert 'Traceback' not in err
    assert f'and saved; lm-nb run {run} goes on from there' in err.splitlines()[-1]
    done = int(err.split('stopped at step ')[1].split()[0])
    assert 5 < done < n and not (run/'base').exists()
    again = shell(desk, *command)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0 and str(run/'base') in out, err
    monkeypatch.chdir(desk)
    stages(tmp_path/'whole', f'pretrain.tokens={160*n}', which=['pretrain'])
    assert [s for s, _ in curve(run/'pretrain', 'loss')] == list(range(1, n + 1))
    here, there = (curve(f/'pretrain', 'loss', 'valid_loss') for f in (run, tmp_path/'whole'))
    assert len(here) == len(there)
    assert all(a == pytest.approx(b, rel=1e-5) for a, b in zip(here, there))


# ------------------------------------------------------------------ what is looked at meanwhile

class Dies(BaseException): "As a kill does, but for what is on its way to the disk"


@pytest.mark.parametrize('what', ['validate', 'sample'])
@pytest.mark.parametrize('step', [4, 8, 12])
def test_what_dies_behind_a_checkpoint_is_owed_and_made_up_for(tmp_path, what, step):
    "A checkpoint comes first; the curve has every point all the same, and each only once"
    c = cfg(12, save_every=4, eval_every=4, sample_every=4)
    looked = []
    def watched(mortal):
        def look(kind):
            looked.append(kind)
            if mortal and kind == what and looked.count(kind) == step//4: raise Dies
            return {'valid_loss': 1. + len(looked)} if kind == 'validate' else 'what it says'
        return Feed(uneven, lambda gpt, runtime: look('validate'), lambda gpt: look('sample'))
    with pytest.raises(Dies): train(small(), watched(True), c, tmp_path)
    assert (tmp_path/'checkpoints'/f'step-{step:08}').exists()
    train(small(), watched(False), c, tmp_path)
    rows = read_log(tmp_path)
    assert [r['step'] for r in rows if 'loss' in r] == list(range(1, 13))
    assert [r['step'] for r in rows if 'valid_loss' in r] == [4, 8, 12]
    headings = [l for l in (tmp_path/'samples.md').read_text().splitlines() if l.startswith('## ')]
    assert headings == ['## step 4', '## step 8', '## step 12']
    assert train(small(), watched(False), c, tmp_path) == {}, 'there is nothing left to do'


@pytest.mark.parametrize('error', [
    UserError('there is nothing to measure'), ValueError('a row\nof two lines'), OSError(5, 'bad'),
    torch.OutOfMemoryError('too much')])
def test_what_fails_meanwhile_costs_one_line(tmp_path, capsys, error):
    def fails(*_): raise error
    c = cfg(8, save_every=2, eval_every=2, sample_every=4)
    got = train(small(), Feed(uneven, fails, fails, figures=fails), c, tmp_path)
    whole = train(small(), Feed(uneven), c, tmp_path/'whole')
    assert got['loss'] == whole['loss'] and 'valid_loss' not in got
    (line,) = [l for l in capsys.readouterr().out.splitlines() if 'failed' in l]
    assert line.startswith('train: validation failed: ') and line.endswith('; the run goes on')


@contextmanager
def small_disk(folder, size):
    "A file system of its own, where this process may have one"
    folder.mkdir()
    how = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)]
    try: mounted = subprocess.run(how, capture_output=True).returncode == 0
    except OSError: mounted = False
    if not mounted: pytest.skip('file systems cannot be mounted here')
    try: yield folder
    finally: subprocess.run(['umount', str(folder)], check=True)


def fill(path):
    with path.open('wb', buffering=0) as f:
        for size in (2**16, 2**12, 1):
            try:
                while True: f.write(bytes(size))
            except OSError: pass


def points(folder):
    return [(r['step'], r.get('loss'), r.get('valid_loss')) for r in read_log(folder)]


def test_a_full_disk_costs_no_point_once_there_is_room_again(tmp_path, capfd):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    c = cfg(60, eval_every=5, sample_every=10)
    def feed(ballast=None):
        def batches(step):
            if ballast and step == 20: fill(ballast)
            if ballast and step == 40: ballast.unlink()
            return uneven(step)
        return Feed(batches, lambda gpt, runtime: {'valid_loss': 2.}, lambda gpt: 'text ' * 400)
    train(small(), feed(), c, tmp_path/'roomy')
    with small_disk(tmp_path/'disk', '4m') as disk:
        train(small(), feed(disk/'ballast'), c, disk/'run')
        assert points(disk/'run') == points(tmp_path/'roomy')
        texts = [(f/'samples.md').read_text() for f in (disk/'run', tmp_path/'roomy')]
        assert texts[0] == texts[1]
        shown = [EventAccumulator(str(f)).Reload() for f in (disk/'run', tmp_path/'roomy')]
        for tag in ('loss/train', 'loss/valid'):
            assert len(shown[0].Scalars(tag)) == len(shown[1].Scalars(tag))
        assert (disk/'run'/'checkpoints'/'step-00000060').exists()
    said = ''.join(capfd.readouterr())
    (line,) = [l for l in said.splitlines() if 'No space' in l]
    assert 'disk/run/' in line and line.endswith('the run goes on') and 'Traceback' not in said


def test_a_disk_that_stays_full_costs_points_and_checkpoints_but_not_the_run(tmp_path, capfd):
    c = cfg(30, eval_every=5, save_every=10)
    with small_disk(tmp_path/'disk', '4m') as disk:
        def batches(step):
            if step == 12: fill(disk/'ballast')
            return uneven(step)
        feed = Feed(batches, lambda gpt, runtime: {'valid_loss': 2.})
        with pytest.raises(UserError, match='step 30 could not be saved: .*run/checkpoints'):
            train(small(), feed, c, disk/'run')
        assert (disk/'run'/'checkpoints'/'step-00000010').exists()
        (disk/'ballast').unlink()
        assert train(small(), Feed(uneven, feed.validate), c, disk/'run')['loss'] < 4
        assert [s for s, loss, _ in points(disk/'run') if loss] == list(range(1, 31))
    said = ''.join(capfd.readouterr())
    assert said.count('No space left') == 1 and 'found no room' in said, said
    assert 'Traceback' not in said


# ------------------------------------------------------------------ two ranks

def torchrun(desk, *words):
    job = shell(desk, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, '-m',
                'lm_nb.cli', 'pretrain', *words)
    return *job.communicate(timeout=120), job.returncode


@pytest.mark.skipif(not torch.distributed.is_available(),
                    reason='this torch cannot run several ranks')
def test_two_ranks_learn_what_one_does(desk, tmp_path, monkeypatch):
    _, err, status = torchrun(desk, 'tiny', 'dropout=0', f'run_dir={tmp_path/"two"}')
    assert status == 0, err
    monkeypatch.chdir(desk)
    stages(tmp_path/'one', 'dropout=0', which=['pretrain'])
    for keys, n in (('loss',), 30), (('valid_loss',), 4):
        one, two = (curve(tmp_path/k/'pretrain', *keys) for k in ('one', 'two'))
        assert len(one) == len(two) == n
        assert all(a == pytest.approx(b, rel=1e-4) for a, b in zip(one, two))
    assert (tmp_path/'two'/'base'/'model.safetensors').exists()


@pytest.mark.skipif(not torch.distributed.is_available(),
                    reason='this torch cannot run several ranks')
@pytest.mark.parametrize('key, said', [
    ('text=missing.txt', 'missing.txt: no such file or folder'), ('lrr=3', "unknown key 'lrr'")])
def test_a_mistake_on_two_ranks_is_said_once_and_no_rank_is_left_waiting(desk, tmp_path, key, said):
    _, err, status = torchrun(desk, 'tiny', key, f'run_dir={tmp_path/"run"}')
    assert status != 0 and err.count(said) == 1
    ours = [l for l in err.splitlines() if 'Error' in l and 'ChildFailedError' not in l]
    assert not ours, 'the other rank tells of a broken connection: ' + '\n'.join(ours)


# ------------------------------------------------------------------ what TensorBoard shows

def test_tensorboard_has_the_curves_texts_pictures_and_the_recipe(whole):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for stage, picture in ('pretrain', 'attention/layer_0'), ('sft', 'mask'):
        events = EventAccumulator(str(whole/stage),
                                  size_guidance=dict(scalars=0, images=0, tensors=0)).Reload()
        tags = events.Tags()
        want = {'loss/train', 'loss/valid', 'optim/lr', 'optim/grad_norm', 'speed/tokens_per_s',
                'speed/mfu', 'speed/peak_tflops', 'speed/tokens', 'memory/gib'} | (
            {'loss/valid_bits_per_byte'} if stage == 'pretrain' else set())
        assert want == set(tags['scalars']), stage
        assert all(len(events.Scalars(t)) > 1 for t in want), 'a curve has more than one point'
        shown = [(e.step, e.value) for e in events.Scalars('loss/train')]
        assert shown == [(s, pytest.approx(x, rel=1e-6)) for s, x in curve(whole/stage, 'loss')]
        assert picture in tags['images']
        assert events.Images(picture)[0].encoded_image_string[1:4] == b'PNG'
        text = events.Tensors(next(t for t in tags['tensors'] if t.startswith('sample')))
        assert len(text) >= 2 and text[-1].tensor_proto.string_val[0].decode()
        assert {'_hparams_/experiment', '_hparams_/session_start_info',
                '_hparams_/session_end_info'} <= set(events.summary_metadata), 'the recipe'
        mfu = [e.value for e in events.Scalars('speed/mfu')]
        assert all(0 < x <= 1 for x in mfu)
        assert all(0 < e.value < 100 for e in events.Scalars('memory/gib'))
    assert not [p for p in whole.rglob('events*') if p.parent.name not in ('pretrain', 'sft')]


# ------------------------------------------------------------------ what training needs

LIGHT = '''
import sys
import lm_nb.training.loop, lm_nb.training.pretrain, lm_nb.training.sft
from lm_nb.data.shards import Shards; from lm_nb.data.order import PretrainBatches
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.training.optim import make_optimizers
run = sys.argv[1]
tok = Tokenizer.load(run + '/tokenizer/tokenizer.model')
shards = Shards(run + '/shards/train', tok)
gpt = GPT(GPTConfig(vocab_size=len(tok), context=32, n_layer=1, n_head=2, d_model=32))
cfg = lm_nb.training.loop.TrainConfig(tokens=480, batch_tokens=160, device='cpu', dtype='fp32')
optimizers, batches = make_optimizers(gpt, cfg), PretrainBatches(shards, 32, rows=5)
steps = [s.step for s in lm_nb.training.loop.training_steps(gpt, optimizers, batches, cfg)]
assert steps == [1, 2, 3]
heavy = 'datasets', 'tensorboard', 'matplotlib', 'pandas', 'transformers', 'pyarrow', 'IPython'
print(*sorted(set(heavy) & set(sys.modules)))
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
    def validate(g, runtime):
        modes.append((g is gpt, g.training))
        return {'valid_loss': 1.}
    train(gpt, Feed(uneven, validate), cfg(4, eval_every=2), tmp_path)
    assert modes == [(True, False)] * 2 and gpt.training and isinstance(gpt, nn.Module)


@pytest.mark.parametrize('heads', [1, 3, 6])
def test_an_attention_picture_names_its_tokens_whatever_they_are(heads, recwarn):
    import io
    from lm_nb.data.tokenizer import Tokenizer
    from lm_nb.model.gpt import GPT, GPTConfig
    from lm_nb.training.pretrain import _attention_figure
    text = '双岭镇 $5 & $x_$ \\frac{ price\nnew\tline \x01 双岭镇'
    tok = Tokenizer.train([text]*3, 300, kind='bpe')
    gpt = GPT(GPTConfig(vocab_size=len(tok), context=64, n_layer=1, n_head=heads, d_model=48))
    fig = _attention_figure(gpt, tok, text*2, 0)
    fig.savefig(out := io.BytesIO())
    want = ['bos', *(p.replace('\n', '⏎') for p in tok.pieces(text*2))]
    assert len(want) > 40 # more than are drawn
    want = want[:40]
    assert fig.get_figwidth() == pytest.approx((1.5 + .11*40)*min(4, heads))
    drawn = fig.axes[:heads]
    assert all([t.get_text() for t in ax.get_xticklabels()] == want for ax in drawn)
    assert [t.get_text() for t in drawn[0].get_yticklabels()] == want
    assert [ax.get_title() for ax in drawn] == [f'layer 0, head {k}' for k in range(heads)]
    assert not any(ax.axison for ax in fig.axes[heads:]) and out.getvalue()
    assert not [w for w in recwarn if 'Glyph' in str(w.message)]


def test_the_script_in_the_readme_trains_and_goes_on(tmp_path):
    "Exactly the text that stands there; started again it finds everything done"
    readme = (PACKAGE/'README.md').read_text(encoding='utf-8')
    blocks = re.findall(r'```python\n(.*?)```', readme, re.S)
    script = next(b for b in blocks if 'train(' in b)
    assert len(script.splitlines()) <= 22
    said = []
    for _ in range(2):
        job = shell(tmp_path, '-c', script)
        out, err = job.communicate(timeout=120)
        assert job.returncode == 0, err
        said.append(out.strip())
        first, *_, last = read_log(tmp_path/'runs'/'mine')
        assert last['step'] == 60 and last['valid_loss'] < 2 < 4 < first['loss']
    assert 'valid_loss' in said[0] and said[1] == '{}'
