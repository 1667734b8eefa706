"What is read from a run: points, logs, signals, and steps that are not finite"
import json, math, os, signal, subprocess, sys
from pathlib import Path

import pytest, torch
from test_loop import cfg, small, uneven

import lm_nb
import lm_nb.training.monitor as monitor
from lm_nb.core import UserError, read_json
from lm_nb.model.estimate import flops_per_token
from lm_nb.training.loop import Ranks, Runtime, Step, training_steps
from lm_nb.training.monitor import (
    _append, _AsyncFlag, Meter, NonFiniteGuard, RunLog, explain_oom, is_due, plot_run, read_log,
    stop_flag)
from lm_nb.training.optim import make_optimizers

PACKAGE = Path(lm_nb.__file__).resolve().parent.parent


def step(k, nll=30., targets=10., norm=1., bad=False, local=None):
    local = nll if local is None else local
    return Step(k, *map(torch.tensor, (nll, targets, norm)), 1., torch.tensor(bad),
                torch.tensor(local))


# --- points of the curve

def test_a_point_is_the_mean_over_targets_and_a_stop_in_its_middle_does_not_bend_it():
    gpt, c = small(), cfg(6)
    steps = list(training_steps(gpt, make_optimizers(gpt, c), uneven, c))
    nll, n = sum(s.nll.item() for s in steps), sum(s.targets.item() for s in steps)
    whole, first = Meter(gpt, c, Runtime()), Meter(gpt, c, Runtime())
    for s in steps: whole.add(s)
    for s in steps[:4]: first.add(s)
    second = Meter(gpt, c, Runtime(), json.loads(json.dumps(first.state())))
    for s in steps[4:]: second.add(s)
    points = [m.read(steps[-1]) for m in (whole, second)]
    assert [p['loss'] for p in points] == pytest.approx([nll / n] * 2, rel=1e-6)
    assert points[0]['tokens'] == 6 * 96 and points[0]['lr'] == pytest.approx(steps[-1].lr * c.lr)
    assert whole.read(steps[-1]).keys().isdisjoint({'loss', 'empty_steps'}), 'the next point begins'


def test_skipped_steps_and_steps_without_targets_do_not_count():
    meter = Meter(small(), cfg(4), Runtime())
    for s in (step(1), step(2, math.nan, bad=True), step(3, 0., 0.), step(4, 50., 10.)):
        meter.add(s)
    point = meter.read(step(4))
    assert point['loss'] == 4. and point['empty_steps'] == 1


def peak_is(monkeypatch, rate):
    "All that has been measured of this machine is one matmul"
    key = 'cpu', 'fp32', torch.get_num_threads()
    monkeypatch.setattr('lm_nb.training.monitor._SEEN', {key: rate}, raising=False)
    monkeypatch.setattr('lm_nb.training.monitor.matmul_peak', lambda device, dtype: rate)


def test_speed_counts_positions_per_second_without_pauses(monkeypatch):
    now = [100.]
    peak_is(monkeypatch, 1e9)
    monkeypatch.setattr('lm_nb.training.monitor.time.perf_counter', lambda: now[0])
    gpt = small()
    meter = Meter(gpt, cfg(4), Runtime(ranks=Ranks(world=2)))
    for _ in range(2): meter.add(step(1))
    now[0] += 2
    with meter.paused(): now[0] += 50
    point = meter.read(step(2))
    assert point['tokens_per_s'] == pytest.approx(96)
    assert point['mfu'] == pytest.approx(96 * flops_per_token(gpt.cfg, 16) / 2e9)
    assert point['peak_tflops'] == pytest.approx(1e-3)


def test_a_utilisation_is_never_above_one_and_a_peak_that_was_too_low_is_told(monkeypatch, capfd):
    now = [100.]
    peak_is(monkeypatch, 1e6)
    monkeypatch.setattr('lm_nb.training.monitor.time.perf_counter', lambda: now[0])
    meter = Meter(small(), cfg(4), Runtime())
    def point(seconds):
        meter.add(step(1))
        now[0] += seconds
        return meter.read(step(1))
    fast, slow = point(.01), point(.02)
    assert fast['mfu'] == 1 and slow['mfu'] == pytest.approx(.5), 'measured by what is known now'
    assert fast['peak_tflops'] == slow['peak_tflops'] > 1e-6
    assert capfd.readouterr().err.count('taken for the peak') == 1
    meter = Meter(small(), cfg(4), Runtime())
    assert point(.02)['mfu'] == pytest.approx(.5), 'and so it is for the rest of the process'


def test_the_best_of_several_measurements_counts(monkeypatch):
    rates = iter([1., 5., 2., *[3.]*6])
    monkeypatch.setattr(monitor, '_SEEN', {})
    monkeypatch.setattr(monitor, '_matmul_rate', lambda *args: next(rates))
    cpu = torch.device('cpu')
    assert monitor.matmul_peak(cpu, 'fp32') == 5 and next(rates, None) is None
    monkeypatch.setattr(monitor, '_matmul_rate', lambda *args: 4.)
    assert monitor.matmul_peak(cpu, 'fp32') == 5, 'a busy moment does not lower it'
    assert monitor.matmul_peak(cpu, 'bf16') == 4


PEAK = '''
import torch
from lm_nb.training.monitor import _peak_memory
cpu = torch.device('cpu')
big = torch.ones(2**26)  # 256 MiB: above all that came before
a = _peak_memory(cpu)
more = torch.ones(2**25)
b = _peak_memory(cpu)
del more
print(1024 * (b - a), abs(1024 * (_peak_memory(cpu) - b)) < 4)
'''


@pytest.mark.skipif(os.name != 'posix', reason='needs resource')
def test_peak_memory_rises_by_what_is_taken_and_does_not_fall():
    env = {**os.environ, 'PYTHONPATH': str(PACKAGE)}
    out = subprocess.run([sys.executable, '-c', PEAK], env=env, capture_output=True,
                         text=True).stdout
    rise, stays = out.split()
    assert float(rise) == pytest.approx(128, abs=4) and stays == 'True'


def test_what_is_due():
    assert [s for s in range(1, 11) if is_due(3, s, 10)] == [3, 6, 9, 10]
    assert [s for s in range(1, 11) if is_due(0, s, 10)] == [10]


# --- logs

def test_a_log_is_cut_back_to_where_a_run_goes_on(tmp_path):
    with RunLog(tmp_path) as log:
        for s in range(1, 6):
            log.scalars(s, loss=1. / s), log.text(s, 'sample', f'## step {s}0\nno')
    (tmp_path/'log.jsonl').write_text((tmp_path/'log.jsonl').read_text() + '{"step": 6, "lo')
    with RunLog(tmp_path, start=3) as log: log.scalars(4, loss=9.)
    assert [(r['step'], r['loss']) for r in read_log(tmp_path)] == [
        (1, 1.), (2, .5), (3, 1/3), (4, 9.)]
    assert '## step 4\n' not in (tmp_path/'samples.md').read_text()
    assert '## step 3\n' in (tmp_path/'samples.md').read_text()


def test_only_the_first_rank_writes(tmp_path):
    with RunLog(tmp_path/'none', on=False) as log:
        log.scalars(1, loss=1.), log.text(1, 'sample', 'x'), log.hparams({})
        log.figure(1, 'x', None), log.note('x', ValueError())
    assert not (tmp_path/'none').exists()


def test_tensorboard_has_points_and_recipe(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from matplotlib.figure import Figure
    from tensorboard.plugins.hparams import metadata
    with RunLog(tmp_path) as log:
        log.hparams(dict(lr=.1, recipe='x', beta1=.9, seed=None))
        for s in (1, 2): log.scalars(s, loss=float(s), own=1.)
        log.text(2, 'sample', 'a lone \ud800')
        log.figure(2, 'picture', Figure(figsize=(2, 1)))
    with RunLog(tmp_path, start=1) as log: log.scalars(2, loss=7.)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars('loss/train')] == [(1, 1.), (2, 7.)]
    assert set(events.Tags()['scalars']) == {'loss/train', 'more/own'}
    begun = events.summary_metadata['_hparams_/session_start_info'].plugin_data.content
    assert set(metadata.parse_session_start_info_plugin_data(begun).hparams) == {'lr', 'recipe'}
    assert len(list(tmp_path.rglob('events*'))) == len(list(tmp_path.glob('events*'))) == 2


def test_a_picture_keeps_its_size(tmp_path):
    pytest.importorskip('tensorboard')
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    with RunLog(tmp_path) as log: log.figure(3, 'picture', Figure(figsize=(2, 1), dpi=100))
    (image,) = EventAccumulator(str(tmp_path)).Reload().Images('picture')
    assert (image.step, image.width, image.height) == (3, 200, 100)
    assert image.encoded_image_string[1:4] == b'PNG'


@pytest.mark.skipif(os.name != 'posix', reason='needs a limit on the size of files')
def test_what_is_appended_is_all_there_or_not_at_all(tmp_path):
    import resource
    path = tmp_path/'log.jsonl'
    _append(path, b'{"step": 1}\n')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))  # the first bytes still fit
    try:
        with pytest.raises(OSError): _append(path, b'{"step": 2}\n')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize('bad', ['log.jsonl', 'samples.md', 'events'])
def test_points_wait_for_room_in_their_order(tmp_path, monkeypatch, capsys, bad):
    def write(folder, full=()):
        now = 0
        def append(path, data):
            if now in full and path.name.startswith(bad): raise OSError(28, 'No space left')
            _append(path, data)
        monkeypatch.setattr('lm_nb.training.monitor._append', append)
        with RunLog(folder) as log:
            for now in range(1, 9): log.scalars(now, loss=1./now), log.text(now, 'sample', f'{now}')
        return [(folder/n).read_text() for n in ('log.jsonl', 'samples.md')]
    assert write(tmp_path/'a') == write(tmp_path/'b', full=(2, 3, 6))
    assert capsys.readouterr().out.count('the run goes on') == 1


def test_curves_of_several_runs_are_drawn_over_each_other(tmp_path):
    for name in 'ab':
        with RunLog(tmp_path/name) as log:
            log.scalars(1, loss=2., lr=1.), log.scalars(2, loss=1., lr=.5, valid_loss=1.5)
    fig = plot_run(tmp_path/'a', tmp_path/'b', keys=('loss', 'lr'), labels=('a', 'b'))
    loss, lr = fig.axes
    assert [list(l.get_ydata()) for l in loss.lines] == [[2., 1.], [1.5]] * 2 and len(lr.lines) == 2
    assert len(plot_run(tmp_path/'a', keys=('loss',)).axes) == 1


def test_a_policy_shows_its_reward(tmp_path):
    with RunLog(tmp_path/'sft') as log: log.scalars(1, loss=2., grad_norm=1., lr=1.)
    with RunLog(tmp_path/'grpo') as log:
        for step in (1, 2): log.scalars(step, loss=0., grad_norm=1., lr=1., reward=step / 4)
        log.scalars(2, valid_reward=.4)
    titles = [ax.get_title() for ax in plot_run(tmp_path/'sft').axes]
    assert titles == ['loss', 'grad norm', 'lr'], 'nothing was rewarded'
    fig = plot_run(tmp_path/'sft', tmp_path/'grpo')
    *_, reward = fig.axes
    assert [list(line.get_ydata()) for line in reward.lines] == [[.25, .5], [.4]]
    assert [ax.get_title() for ax in fig.axes] == [*titles, 'reward']
    assert fig.get_size_inches()[0] == 4 / 3 * plot_run(tmp_path/'sft').get_size_inches()[0]


# --- signals

def test_one_signal_raises_the_flag_and_a_second_ctrl_c_ends_at_once():
    with stop_flag() as stopped:
        assert not stopped()
        for kind in (signal.SIGTERM, signal.SIGTERM): signal.raise_signal(kind)  # as launchers do
        assert stopped()
        with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)


# --- steps that are not finite

class Two(Ranks):
    "Two ranks, of which the other one's loss is finite or not"
    other_is_bad = False
    def sum(self, t): return t + torch.tensor([float(self.other_is_bad), 0.])


class Bad(Two): other_is_bad = True


def guard(folder, skip_bad=0, ranks=Ranks(), **kw):
    documents = lambda step: [f'step {step}, rank {ranks.rank}']
    return NonFiniteGuard(cfg(9, skip_bad=skip_bad), folder, documents, ranks, 'pretrain', **kw)


def test_a_flag_knows_its_value():
    assert bool(_AsyncFlag(torch.tensor(True))) and not _AsyncFlag(torch.tensor(False))


@pytest.mark.parametrize('what, s', [('loss is nan', step(7, math.nan, bad=True)),
                                     ('gradient norm is inf', step(7, norm=math.inf, bad=True))])
def test_a_step_that_is_not_finite_ends_the_run_with_a_report(tmp_path, what, s):
    g = guard(tmp_path)
    g.observe(step(6))
    with pytest.raises(UserError, match=f'pretrain: the {what} at step 7 .rank 0.') as e:
        g.observe(s)
    assert '\n' not in str(e.value) and 'skip_bad' in str(e.value)
    report = read_json(tmp_path/'bad-step-00000007-rank-0.json')
    assert report['documents'] == ['step 6, rank 0'] and report['step'] == 7
    assert report['targets'] == 10


def test_some_may_be_skipped_and_the_count_goes_on_after_a_stop(tmp_path):
    g = guard(tmp_path, skip_bad=2)
    for k in (3, 5): g.observe(step(k, math.nan, bad=True))
    assert g.skipped == 2 and len(list(tmp_path.glob('bad-step-*'))) == 2
    with pytest.raises(UserError, match='step 8'): g.observe(step(8, math.nan, bad=True))
    again = guard(tmp_path, skip_bad=2, skipped=2)
    with pytest.raises(UserError, match='step 9'): again.observe(step(9, math.nan, bad=True))


def test_the_rank_whose_loss_it_is_reports(tmp_path):
    "Rank 1 of 2 has a finite loss of its own; the other's is not"
    g = guard(tmp_path, ranks=Bad(rank=1, world=2))
    with pytest.raises(UserError, match='.rank 0.'):
        g.observe(step(2, math.nan, bad=True, local=1.))
    assert not list(tmp_path.glob('bad-step-*')), 'the other one writes'
    both = step(3, math.nan, bad=True, local=math.nan)
    with pytest.raises(UserError, match='.rank 0, 1.'): g.observe(both)
    assert [p.name for p in tmp_path.glob('bad-step-*')] == ['bad-step-00000003-rank-1.json']
    calm = guard(tmp_path, ranks=Two(rank=1, world=2))
    with pytest.raises(UserError, match='.rank 0, 1.'):
        calm.observe(step(4, norm=math.nan, bad=True))


# --- memory

@pytest.mark.parametrize('error', [MemoryError(), torch.OutOfMemoryError(),
                                   RuntimeError('DefaultCPUAllocator: can\'t allocate memory: 9')])
def test_an_allocators_error_says_what_to_lower(error):
    with pytest.raises(UserError, match='over 6 rows of 16 tokens .*micro_rows=3') as e:
        with explain_oom(small(), cfg(3), Runtime()): raise error
    assert '\n' not in str(e.value)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match='shapes'):
        with explain_oom(small(), cfg(3), Runtime()): raise RuntimeError('shapes')
