"""Several processes: they learn what one learns, go on as if nothing had happened when one dies,
and never wait forever"""
import json, os, random, shutil, signal, subprocess, sys, threading, time
from pathlib import Path

import numpy as np
import pytest, torch, yaml
from hypothesis import given, settings, strategies as st

import rank_work, soak
from batch_tools import assert_same
from lm_nb.training.cluster import RemoteShards, kubernetes_job, slurm_script, _unpermute, when_read
from lm_nb.core import UserError
from lm_nb.training.checkpoint import _saved_tensors
from lm_nb.training.ranks import launch
from lm_nb.data.order import Order, PretrainBatches, splitmix64, permute
from lm_nb.data.shards import Shards, write_token_shards
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.training.monitor import read_log

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(),
                                reason='this torch cannot run several ranks')
WORK = Path(rank_work.__file__)
KINDS = [dict(parallel='ddp'), dict(parallel='fsdp'), dict(parallel='hsdp', shard_group=1),
         dict(parallel='ddp', micro_rows=2), dict(parallel='fsdp', micro_rows=2)]
BOTH = 'ddp', 'fsdp'
KILLS = soak.count(1, 10)
LONG = dict(steps=36*max(1, KILLS//2), model=dict(dropout=.1))   # the runs that get hurt


@pytest.fixture(scope='module', autouse=True)
def quiet():
    own = {k: os.environ.get(k) for k in ('IN_TEST', 'OMP_NUM_THREADS')}
    os.environ.update(IN_TEST='1', OMP_NUM_THREADS='1')
    yield
    for k, v in own.items(): os.environ.pop(k) if v is None else os.environ.update({k: v})


def start(folder, jobs, nproc, **how):
    "Run jobs on ranks; (exit status, lines written)"
    Path(folder).mkdir(parents=True, exist_ok=True)
    job, lines = dict(folder=str(folder), jobs=[{'folder': str(folder), **j} for j in jobs]), []
    return launch(WORK, [json.dumps(job)], nproc, show=lines.append,
                  **{'max_restarts': 0, 'timeout': 60, **how}), lines


def well(folder, jobs, nproc, **how):
    "Run jobs on ranks; what they found"
    status, lines = start(folder, jobs, nproc, **how)
    assert status == 0, '\n'.join(lines[-30:])
    return json.loads((Path(folder)/'told.json').read_text())


def losses(folder): return [r['loss'] for r in read_log(folder)]
def hexes(folder):
    return [(r['step'], float.hex(r['loss']), float.hex(r['grad_norm'])) for r in read_log(folder)]
def furthest(a, b): return max(abs(x - y)/x for x, y in zip(a, b, strict=True))


# --------------------------------------------------------- the same numbers on any number of ranks

@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    "What two ranks find when nothing happens to them, in one start: (folder, results by job)"
    desk = tmp_path_factory.mktemp('pair')
    jobs = {str(k): dict(cfg=k) for k in KINDS}
    jobs |= {f'calm {p}': dict(LONG, cfg=dict(parallel=p, save_every=5)) for p in BOTH}
    jobs |= {f'exchanges {p}': dict(do='exchanges', cfg=dict(parallel=p)) for p in BOTH}
    return desk, dict(
        zip(jobs, well(desk, [dict(j, folder=str(desk/name)) for name, j in jobs.items()], 2)))


def test_two_ranks_of_any_kind_learn_what_one_does(pair, tmp_path):
    desk, found = pair
    rank_work.learn(dict(folder=str(tmp_path)))
    one = losses(tmp_path)
    assert len(one) == 20 and one[-1] < one[0]
    far = {str(k): furthest(one, losses(desk/str(k))) for k in KINDS}
    assert max(far.values()) < 1e-5, far
    assert [found[str(k)]['sharded'] for k in KINDS] == [False, True, True, False, True]


def test_two_ranks_train_the_adapters_that_one_does_and_go_on_bitwise(tmp_path):
    "Frozen weights are held, sharded or not, and neither exchanged as gradients nor stored"
    def job(name, cfg, **more):
        return dict(lora=3, model=dict(zero_init=False), cfg=dict(lr=.02, **cfg),
                    folder=str(tmp_path/name), **more)
    rank_work.learn(job('one', {}))
    jobs, far = [job(str(i), k) for i, k in enumerate(KINDS)], {}
    halves = [job(f'half {i}', k, **until)
              for i, k in enumerate(KINDS[:2]) for until in (dict(until=9), {})]
    found = well(tmp_path, jobs + halves, 2)
    for i in range(len(KINDS)):
        far[i] = furthest(losses(tmp_path/'one'), losses(tmp_path/str(i)))
    assert max(far.values()) < 1e-5, far
    assert losses(tmp_path/'one')[-1] < losses(tmp_path/'one')[0]
    for i in range(2):
        assert hexes(tmp_path/f'half {i}') == hexes(tmp_path/str(i))
        assert found[len(KINDS) + 2*i + 1]['weights'] == found[i]['weights']
        newest, = (tmp_path/str(i)/'checkpoints').glob('step-*')
        names = list(_saved_tensors(newest))
        assert names and all('lora_' in n for n in names)


LOW = [dict(arch='qwen3'), dict(arch='gpt2'), dict(recompute=True, dropout=.1)]

def test_sharded_bf16_runs_learn_what_autocast_does_and_go_on_bitwise(tmp_path):
    "Blocks travel in bf16; the weights that are moved, gradients and checkpoints stay fp32"
    def job(name, parallel, model, **more):
        cfg = dict(dtype='bf16', parallel=parallel, micro_rows=2)
        return dict(folder=str(tmp_path/name), cfg=cfg, model=model, **more)
    jobs = [j for i, model in enumerate(LOW) for j in (
        job(f'ddp{i}', 'ddp', model), job(f'fsdp{i}', 'fsdp', model),
        job(f'cut{i}', 'fsdp', model, until=9), job(f'cut{i}', 'fsdp', model))]
    found = well(tmp_path, jobs, 2)
    for i in range(len(LOW)):
        _, whole, part, rest = found[4*i : 4*i + 4]
        assert (part['first'], rest['first']) == (0, 9) and whole['sharded']
        assert hexes(tmp_path/f'cut{i}') == hexes(tmp_path/f'fsdp{i}')
        assert rest['weights'] == whole['weights'] != part['weights']
        assert furthest(losses(tmp_path/f'ddp{i}'), losses(tmp_path/f'fsdp{i}')) < 2e-3


def test_what_travels_in_which_dtype(tmp_path):
    found = well(tmp_path, [dict(do='travels', cfg=dict(dtype=d)) for d in ('bf16', 'fp32')], 2)
    assert found[0]['blocks'] == ['torch.bfloat16'] and found[1]['blocks'] == ['torch.float32']
    for f in found: assert f['weights'] == f['gradients'] == f['means'] == ['torch.float32']


@pytest.mark.parametrize('parallel', BOTH)
def test_gradients_are_exchanged_once_a_step(pair, parallel):
    got = pair[1][f'exchanges {parallel}']
    assert got['one'] == got['three'] > 0, got
    assert got['apart'], 'after the first of three micro-batches the gradients are alike already'


def test_a_run_moves_from_one_rank_to_two_to_four_and_back(tmp_path):
    run, t0, before = tmp_path/'run', time.perf_counter(), None
    plan = [(1, {}), (2, dict(parallel='fsdp')), (4, dict(parallel='hsdp', shard_group=2)),
            (2, dict(parallel='ddp')), (1, {})]
    for i, (n, cfg) in enumerate(plan):
        job = dict(folder=str(run), steps=100, cfg=cfg)
        jobs = [dict(job, do='peek')]*(i > 0) + [dict(job, until=20*(i + 1)), dict(job, do='peek')]
        found = [getattr(rank_work, j.get('do', 'learn'))(j) for j in jobs] if n == 1 else well(
            run, jobs, n)
        *first, learned, last = found
        if first:
            assert first[0]['state'] == first[0][
                'again'] == before, f'{n} ranks read something else than was written'
        assert learned['first'] == 20*i and last['step'] == 20*(i + 1)
        assert last['weights'] == learned['weights'] and last['again'] == last['state']
        before = last['state']
    rank_work.learn(dict(folder=str(tmp_path/'whole'), steps=100))
    far = furthest(losses(tmp_path/'whole'), losses(run))
    soak.record('1 → 2 → 4 → 2 → 1 ranks, 20 steps each', len(plan), 0, time.perf_counter() - t0,
                largest_difference=far)
    assert len(losses(run)) == 100 and far < 1e-5


# ------------------------------------------------------------ ranks that die, stop, or are told to

class Run(threading.Thread):
    "A run on two ranks that goes on beside the test"
    def __init__(self, folder, job, **how):
        super().__init__(daemon=True)
        self.folder, self.job, self.how = Path(folder), job, how
        self.start()
    def run(self): self.status, self.lines = start(self.folder, [self.job], 2, **self.how)
    def until(self, ready, seconds=120):
        end = time.time() + seconds
        while not ready():
            assert self.is_alive() and time.time() < end, getattr(
                self, 'lines', ['nothing happened in time'])[-30:]
            time.sleep(.01)
    def step(self): return max((r['step'] for r in read_log(self.folder)), default=0)
    def pid(self, rank, attempt):
        note = self.folder/'pids'/f'{rank}-{attempt}'
        return int(note.read_text() or 0) if note.exists() else 0
    def runs(self, attempt): return self.pid(0, attempt) and self.pid(1, attempt)
    def result(self): return json.loads((self.folder/'told.json').read_text())[0]
    def ended(self, seconds=180):
        self.join(seconds)
        assert not self.is_alive() and self.status == 0, getattr(
            self, 'lines', ['did not end'])[-30:]


def same(run, pair, name):
    "The run ended as the undisturbed one: every loss, every gradient norm, all weights"
    calm = hexes(pair[0]/name)
    return len(calm) == LONG['steps'] and hexes(run.folder) == calm and run.result(
        )['weights'] == pair[1][name]['weights']


@pytest.mark.parametrize('parallel', BOTH)
def test_a_killed_rank_costs_seconds_and_nothing_else(pair, tmp_path, parallel):
    chance, run = (random.Random(parallel), Run(
        tmp_path, dict(LONG, pause=.02, cfg=dict(parallel=parallel, save_every=5)),
        max_restarts=KILLS))
    with soak.trials(f'kill -9 of one of two ranks, {parallel}') as tally:
        waits = []
        for k in range(KILLS):
            at = (k + 1)*LONG['steps']//(KILLS + 1) + chance.randrange(-3, 4)
            run.until(lambda k=k, at=at: run.runs(k) and run.step() >= at)
            os.kill(run.pid(chance.randrange(2), k), signal.SIGKILL)
            t0 = time.time()
            run.until(lambda k=k: run.runs(k + 1))
            begun = time.time()
            run.until(lambda begun=begun: (run.folder/'log.jsonl').stat().st_mtime > begun)
            waits.append(time.time() - t0)
        run.ended()
        tally.more['slowest_restart_s'] = round(max(waits), 1)
        for _ in waits:
            tally.add(same(run, pair, f'calm {parallel}'), 'the curve or the weights differ')


def test_a_stopped_rank_is_given_up_within_the_time_out(pair, tmp_path):
    seconds = 5
    run = Run(tmp_path, dict(LONG, pause=.02, cfg=dict(parallel='ddp', save_every=5)),
              max_restarts=1, timeout=seconds)
    with soak.trials('SIGSTOP of one of two ranks') as tally:
        run.until(lambda: run.runs(0) and run.step() >= 12)
        os.kill(run.pid(1, 0), signal.SIGSTOP)
        t0, alive = time.time(), Path(f'/proc/{run.pid(0, 0)}/stat')
        run.until(
            lambda: not alive.exists() or alive.read_text().rsplit(')', 1)[1].split()[0] == 'Z')
        tally.more['given_up_after_s'] = round(time.time() - t0, 1)
        # the launcher would do it, after 30 s
        if not soak.FULL: os.kill(run.pid(1, 0), signal.SIGKILL)
        run.ended()
        assert [l
                for l in run.lines if 'rank 0 of 2 has lost the others (Timed out' in l], run.lines
        assert not [l for l in run.lines if 'Traceback' in l], run.lines
        tally.add(same(run, pair, 'calm ddp') and tally.more['given_up_after_s'] < 2*seconds + 5,
                  tally.more)


def test_ctrl_c_reaches_the_ranks_and_they_save(pair, tmp_path):
    job = dict(folder=str(tmp_path),
               jobs=[dict(LONG, folder=str(tmp_path), pause=.02, cfg=dict(parallel='ddp'))])
    code = ('from lm_nb.training.ranks import launch\n'
            f'launch({str(WORK)!r}, [{json.dumps(job)!r}], 2, max_restarts=0)')
    with subprocess.Popen([sys.executable, '-c', code], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as p:
        end = time.time() + 120
        while len(read_log(tmp_path)) < 7 and p.poll() is None and time.time() < end:
            time.sleep(.01)
        p.send_signal(signal.SIGINT)
        out = p.communicate(timeout=120)[0]
    kept = sorted((tmp_path/'checkpoints').glob('step-*'))
    assert p.returncode != 0 and len(kept) == 1, out
    assert 7 <= int(kept[0].name[5:]) < LONG['steps'], out


@pytest.mark.skipif(not soak.FULL,
                    reason='the tests above do it seven times; make soak a hundred more')
def test_a_hundred_runs_on_two_ranks_end_with_status_0(tmp_path):
    with soak.trials('two-rank runs that end with status 0') as tally:
        for i in range(100):
            status, lines = start(tmp_path/str(i), [dict(steps=3, cfg=dict(parallel=BOTH[i % 2]))],
                                  2)
            tally.add(status == 0, lines[-5:])


@pytest.mark.parametrize('nproc', [0, -1, 1000, 10**9])
def test_as_many_ranks_as_a_machine_can_hold(nproc):
    with pytest.raises(UserError, match=f'nproc = {nproc}: expected 1 to'): launch(WORK, [], nproc)


def test_ranks_that_differ_in_their_micro_batches_are_told_and_nobody_waits(tmp_path):
    t0 = time.time()
    status, lines = start(tmp_path, [dict(do='uneven')], 2)
    assert status == 2
    assert 'ranks differ in the number of micro-batches in a step: 2 and 3' in '\n'.join(lines)
    assert time.time() - t0 < 60  # the time-out, at which a rank that waits would have given up


# ------------------------------------------------------------------ a trillion tokens

@pytest.mark.parametrize('world, rows', [(1024, 4096), (1000, 4099), (7, 64), (1, 5)])
def test_a_trillion_tokens_are_read_without_repeats_or_gaps(world, rows):
    n = 10**12 // 2048
    orders = [Order(n, rows, 3, r, world) for r in range(world)]
    chance = np.random.default_rng(world)
    # the step at n//rows goes across the epoch's end
    for step in (0, n//rows, *chance.integers(0, n//rows, 1)):
        places = np.concatenate([np.concatenate(o.positions(int(step))) for o in orders])
        assert np.array_equal(
            places,
            np.arange(step*rows, (step + 1)*rows)), 'the shares of the ranks do not tile the step'
        samples = np.concatenate([np.concatenate(o(int(step))) for o in orders])
        epochs = places//n
        for e in np.unique(epochs):
            key = int(splitmix64(3)[0]) + int(e)
            assert np.array_equal(_unpermute(samples[epochs == e], n, key),
                                  places[epochs == e] % n), 'the order has no inverse'
    for sample in chance.integers(0, n, 3):
        step, rank = when_read(int(sample), orders[0], world)
        assert sample in np.concatenate(orders[rank](step))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 10**12), st.integers(0, 2**63), st.data())
def test_the_inverse_undoes_the_permutation_for_any_size(n, key, data):
    some = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50)))
    assert np.array_equal(_unpermute(permute(some, n, key), n, key), some)
    assert np.array_equal(permute(_unpermute(some, n, key), n, key), some)


# ------------------------------------------------------------------ data far away

def test_two_readers_share_a_cache_and_a_cut_fetch_leaves_nothing(tmp_path):
    docs = [f'Text {i} ' * 30 for i in range(200)]
    tok = Tokenizer.train(docs, vocab_size=280, kind='bpe')
    write_token_shards(docs, tok, tmp_path/'near', shard_tokens=2**12)
    near, url = Shards(tmp_path/'near', tok), f'file://{tmp_path}/far'
    shutil.copytree(tmp_path/'near', tmp_path/'far')
    names = [s['name'] + '.bin' for s in near.index['shards']]
    size = max((tmp_path/'far'/n).stat().st_size for n in names)
    a, b = (RemoteShards(url, tmp_path/'cache', tok, room=2*size) for _ in range(2))
    # each throws out what the other reads
    for at in np.random.default_rng(0).integers(0, len(near) - 300, 60):
        want = near.tokens(int(at), int(at) + 300)
        for far in a, b: assert np.array_equal(far.tokens(int(at), int(at) + 300), want)
        assert len(list((tmp_path/'cache').glob('*.bin'))) <= 2
    assert_same(*(PretrainBatches(s, 40, rows=4)(7)[0] for s in (near, a)))
    assert (near.pad, near.bos, near.eos) == (a.pad, a.bos, a.eos)
    for p in (tmp_path/'cache').glob('*.bin'): p.unlink()
    path = tmp_path/'far'/names[0]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match='is not the file that the index names'): a.tokens(0, 5)
    path.unlink()
    with pytest.raises(UserError, match='cannot be read'): a.tokens(0, 5)
    assert not [p for p in (tmp_path/'cache').iterdir() if 'tmp' in p.name or p.suffix == '.bin']


def test_launch_files_are_valid():
    known = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--help'],
                           capture_output=True, text=True).stdout.replace(',', ' ').split()
    for nodes, gpus in (1, 1), (16, 8):
        script = slurm_script('micro', '/runs/micro', nodes, gpus)
        assert subprocess.run(['bash', '-n'], input=script, text=True).returncode == 0
        service, job = yaml.safe_load_all(kubernetes_job('micro', 'image:1', 'claim', nodes, gpus))
        words = job['spec']['template']['spec']['containers'][0]['command']
        for text in (script, ' '.join(words)):
            assert f'--nproc-per-node={gpus}' in text and '-m lm_nb.cli pretrain micro' in text
        assert {w.split('=')[0] for w in words if w.startswith('--')} <= set(known)
