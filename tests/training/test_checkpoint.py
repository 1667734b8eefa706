"""Checkpoints under hostile conditions: killed processes, full disks, changed bits, foreign files,
ranks"""
import json, os, pickle, random, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from torch import nn
from safetensors.torch import load_file, save_file
import soak
import lm_nb.training.checkpoint as C
from lm_nb.training.checkpoint import (
    Saver, checkpoints, newest, _read_checkpoint, _run_state, _snapshot, _unique_state)
from lm_nb.core import verify_manifest, replacing, write_manifest
from lm_nb.core import UserError, read_json, write_json
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.training.optim import OptimConfig, make_optimizers

pytestmark = pytest.mark.filterwarnings('ignore:.*fork.*')

def fresh(seed=0, optimizer='muon', **kw):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(vocab_size=19, context=16, n_layer=1, n_head=2, d_model=16,
                                    d_ff=32, dropout=0.2), **kw}))
    return model, make_optimizers(model, OptimConfig(optimizer=optimizer))

def train(model, optimizers, steps):
    out = []
    for s in steps:
        torch.manual_seed(s)
        x = torch.randint(0, 19, (4, 17))
        loss = nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        for o in optimizers: o.step(), o.zero_grad()
        out.append(loss.item().hex())
    return out

def same(a, b):
    return all(torch.equal(x, y)
               for x, y in zip(_unique_state(a).values(), _unique_state(b).values(), strict=True))

def save(folder, step, model, optimizers, scaler=None, extra=None, **kw):
    "A checkpoint, written now"
    with Saver(folder, model, optimizers, scaler, **kw) as saver: saver.save(step, extra)
    return Path(folder)/f'step-{step:08d}'

def load(folder, model, optimizers, scaler=None):
    return Saver(folder, model, optimizers, scaler).load()

def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << (at % 8)
    path.write_bytes(data)

def told(call, *args, **kw):
    with pytest.raises(UserError) as e: call(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)

def shard(path): return next(path.glob('*.safetensors'))

# -- resuming

@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
@pytest.mark.parametrize('shape',
                         [dict(arch='gpt2'), dict(arch='qwen3'), dict(arch='qwen3', tie=False)])
def test_resume_is_bitwise(tmp_path, optimizer, shape):
    a, oa = fresh(optimizer=optimizer, **shape)
    train(a, oa, range(4))
    save(tmp_path, 4, a, oa, extra=dict(best=1.5, 名='甲'))
    unbroken = train(a, oa, range(4, 8))
    b, ob = fresh(seed=5, optimizer=optimizer, **shape)
    train(b, ob, range(2))  # what these optimizers remember must not survive
    assert load(tmp_path, b, ob) == (4, dict(best=1.5, 名='甲'))
    assert train(b, ob, range(4, 8)) == unbroken and same(a, b)
    x, y = _run_state(a, oa), _run_state(b, ob)
    assert x.keys() == y.keys()
    assert all(torch.equal(x[n], y[n]) and x[n].dtype == y[n].dtype for n in x)

def test_a_save_before_the_first_step(tmp_path):
    a, oa = fresh()
    save(tmp_path, 0, a, oa)
    b, ob = fresh(seed=5)
    assert load(tmp_path, b, ob) == (0, {}) and train(b, ob, range(3)) == train(a, oa, range(3))

def test_saving_in_the_background_changes_no_bit_of_the_run_or_of_the_save(tmp_path):
    (a, oa), (b, ob) = fresh(d_model=32), fresh(d_model=32)
    one, two, hashes = train(a, oa, range(30)), [], {}
    with Saver(tmp_path, b, ob, keep_last=30) as saver:
        for s in range(30):
            two += train(b, ob, [s])
            hashes[s + 1] = _snapshot(_run_state(b, ob))
            saver.save(s + 1)
    assert two == one and same(a, b) and len(checkpoints(tmp_path)) == 30
    for path in checkpoints(tmp_path):
        kept = load_file(shard(path))
        assert all(torch.equal(kept[n], t) for n, t in hashes[int(path.name[5:])].items())

def test_a_scaler_goes_along(tmp_path):
    model, optimizers = fresh()
    scaler = torch.amp.GradScaler('cpu', init_scale=8.0, growth_interval=1)
    scaler.load_state_dict({**scaler.state_dict(), 'scale': 1234.0})
    save(tmp_path, 1, model, optimizers, scaler)
    again = torch.amp.GradScaler('cpu')
    load(tmp_path, *fresh(), again)
    assert again.get_scale() == 1234.0
    off = torch.amp.GradScaler('cpu', enabled=False)
    assert load(tmp_path, *fresh(), off)[0] == 1 and load(tmp_path, *fresh())[0] == 1
    save(tmp_path, 2, model, optimizers, off)
    assert load(tmp_path, *fresh(), off)[0] == 2

def test_buffers_and_tied_tensors(tmp_path):
    class Odd(nn.Module):
        def __init__(self, fill):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight
            self.register_buffer('count', torch.tensor(fill))
            self.register_buffer('whole', torch.tensor(int(fill)))
            nn.init.constant_(self.a.weight, fill)
    save(tmp_path, 1, Odd(7.), [])
    m = Odd(0.)
    load(tmp_path, m, [])
    assert m.count == 7 and m.whole == 7 and (m.b.weight == 7).all() and m.a.weight is m.b.weight

def test_counters_land_where_each_optimizer_keeps_them(tmp_path):
    for kind in (dict(fused=True), dict(foreach=True), dict(capturable=False)):
        m = nn.Linear(3, 3)
        o = torch.optim.AdamW(m.parameters(), **kind)
        m(torch.ones(1, 3)).sum().backward(), o.step()
        save(tmp_path/str(kind), 1, m, [o])
        m2 = nn.Linear(3, 3)
        o2 = torch.optim.AdamW(m2.parameters(), **kind)
        load(tmp_path/str(kind), m2, [o2])
        for x, y in zip((m, o), (m2, o2)): x.zero_grad(), y.zero_grad()
        for x, y in ((m, o), (m2, o2)): x(torch.ones(1, 3)).sum().backward(), y.step()
        assert torch.equal(m.weight, m2.weight)

def test_which_stay_and_order_is_by_number(tmp_path):
    model, _ = fresh()
    for step in (5, 99, 100, 12): save(tmp_path, step, model, [], keep_last=3)
    assert [p.name for p in checkpoints(tmp_path)] == [
        'step-00000100', 'step-00000099', 'step-00000012']
    save(tmp_path, 101, model, [], keep_last=1, keep_every=50)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['step-00000100', 'step-00000101']
    save(tmp_path, 123456789, model, [], keep_last=0)  # the one just written always stays
    assert load(tmp_path, model, []) == (123456789, {}) and len(list(tmp_path.iterdir())) == 1

def test_saving_a_step_again_replaces_it(tmp_path):
    (a, _), (b, _) = fresh(0), fresh(1)
    save(tmp_path, 3, a, [])
    save(tmp_path, 3, b, [])
    load(tmp_path, a, [])
    assert same(a, b) and [p.name for p in tmp_path.iterdir()] == ['step-00000003']

def test_another_model_or_optimizer_is_refused_and_nothing_is_changed(tmp_path):
    save(tmp_path, 3, *fresh())
    for kw, word in ((dict(d_ff=48), 'another model'), (dict(n_layer=2), 'another model'),
                     (dict(optimizer='adamw'), 'other optimizers')):
        m, o = fresh(9, **kw)
        was = _snapshot(_run_state(m, o))
        assert word in told(load, tmp_path, m, o)
        now = _run_state(m, o)
        assert now.keys() == was.keys() and all(torch.equal(now[n], was[n]) for n in was)
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000003']

def test_nothing_to_load(tmp_path):
    assert load(tmp_path/'none', *fresh()) is None and load(tmp_path, *fresh()) is None

# -- full disks

def test_a_full_disk_is_told_before_anything_is_written_and_the_run_goes_on(
    tmp_path, monkeypatch, capsys):
    saver = Saver(tmp_path, *fresh())
    saver.save(1)
    saver.wait()
    with monkeypatch.context() as m:
        m.setattr(C.shutil, 'disk_usage', lambda p: type('', (), dict(free=1000)))
        saver.save(2)
        saver.wait()
        line = capsys.readouterr().out
        assert 'step 2 could not be saved' in line and 'the disk has 0 MiB left' in line
        assert line.count('\n') == 1
        assert 'step 2' in told(saver.close)
        saver.close()  # told once
        saver.save(3)
        saver.wait()
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000001']
    assert verify_manifest(tmp_path/'step-00000001') == ''
    saver.save(4)  # there is room again: nothing is lost
    saver.close()
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == [4, 1]

def test_an_error_of_the_run_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(C, 'write_manifest', lambda folder: 1/0)
    with pytest.raises(KeyError):
        with Saver(tmp_path, *fresh()) as saver:
            saver.save(1)
            raise KeyError('of the run')
    assert 'division by zero' in capsys.readouterr().out

LIMITED = """
import resource, sys, torch
from lm_nb.training.checkpoint import Saver, newest
torch.set_num_threads(1)
model = torch.nn.Linear(300, 300)
saver = Saver(sys.argv[1], model, [])
saver.save(1), saver.wait()
for k, limit in enumerate(map(int, sys.argv[2:])):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    saver.save(2), saver.wait()
    assert saver.failed and newest(sys.argv[1]).name == 'step-00000001', limit
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
saver.save(3), saver.close()
print(newest(sys.argv[1]).name)
"""
@pytest.mark.skipif(os.name != 'posix', reason='needs resource limits')
def test_writes_that_fail_in_the_middle(tmp_path):
    """Limits on the size of files: in the first byte, in a header, in the tensors, in their last
    byte"""
    limits = [0, 1, 100, 300, 1000, 4096, 100_000, 300*301*4]
    got = subprocess.run([sys.executable, '-c', LIMITED, str(tmp_path), *map(str, limits)],
                         capture_output=True, text=True)
    assert got.returncode == 0 and not got.stderr, got.stderr
    lines = got.stdout.splitlines()
    assert lines[-1] == 'step-00000003' and len(lines) == len(limits) + 1
    assert all('step 2 could not be saved' in line for line in lines[:-1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ['step-00000001', 'step-00000003']
    soak.record('saves that fail in the middle of a write', len(limits))

# -- damage

def harm(path, rng):
    "One random damage to a file; what was done"
    data, how = bytearray(path.read_bytes()), rng.choice(['bit', 'cut', 'page', 'hole', 'longer'])
    at = rng.randrange(len(data))
    if how == 'bit': data[at] ^= 1 << rng.randrange(8)
    if how == 'cut': del data[at:]
    page = slice(at//512*512, (at//512 + 1)*512)
    if how == 'page': data[page] = bytes(len(data[page]))
    if how == 'hole': del data[at:at+1]
    if how == 'longer': data += bytes([0])
    changed = bytes(data) != path.read_bytes()
    path.write_bytes(data)
    return changed and how

def test_flipped_bits_cut_files_and_zeroed_pages_are_all_noticed(tmp_path, capsys):
    "Every file of a checkpoint is damaged in every way; each time the one before it is taken"
    (a, oa), (b, ob) = fresh(0), fresh(1)
    train(a, oa, range(2))
    save(tmp_path/'good', 1, a, oa)
    train(b, ob, range(2))
    save(tmp_path/'good', 2, b, ob)
    rng, m = random.Random(0), fresh(2)
    names = sorted(p.name for p in (tmp_path/'good'/'step-00000002').iterdir())
    with soak.trials('checkpoints with flipped bits, cut files, zeroed pages') as tally:
        while tally.count < soak.count(60, 300):
            here, name = (Path(shutil.copytree(tmp_path/'good', tmp_path/'c')),
                          names[tally.count % len(names)])
            how = harm(here/'step-00000002'/name, rng)
            if how:
                taken = load(here, *m)
                tally.add(taken[0] == 1 and same(m[0], a)
                          and [p.name for p in here.glob('*.bad')] == ['step-00000002.bad'],
                          (name, how, taken))
            shutil.rmtree(here)

def cut(path): path.write_bytes(path.read_bytes()[:-1])
BREAK = dict(cut=lambda p: cut(shard(p)), gone=lambda p: (p/'state.json').unlink(),
             empty=lambda p: shard(p).write_bytes(b''),
             no_manifest=lambda p: (p/'manifest.json').unlink(),
             garbage=lambda p: (p/'manifest.json').write_bytes(b'\xff{'),
             nothing_sealed=lambda p: write_json(p/'manifest.json', {}),
             deep=lambda p: (p/'manifest.json').write_text('['*10**5),
             elsewhere=lambda p: write_json(
                 p/'manifest.json',
                 {**read_json(p/'manifest.json'), '/etc/hostname': dict(bytes=1, sha256='')}),
             one_more=lambda p: save_file(dict(x=torch.ones(1)), p/'shard-00002.safetensors'),
             fifo=lambda p: (shard(p).unlink(), os.mkfifo(p/'state.json.x')),
             a_list=lambda p: write_json(p/'manifest.json', [1]),
             odd=lambda p: write_json(p/'manifest.json', {'state.json': 3}))

@pytest.mark.parametrize('how', BREAK)
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_is_taken(tmp_path, capsys, how):
    a, oa = fresh(0)
    save(tmp_path, 1, a, oa)
    BREAK[how](save(tmp_path, 2, *fresh(1)))
    m, om = fresh(2)
    assert load(tmp_path, m, om)[0] == 1 and same(m, a)
    line = capsys.readouterr().out
    assert line.startswith('step-00000002: ') and line.endswith('set aside as step-00000002.bad\n')
    assert line.count('\n') == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ['step-00000001', 'step-00000002.bad']
    save(tmp_path, 2, a, oa)  # the name is free again, and may break again
    BREAK[how](tmp_path/'step-00000002')
    load(tmp_path, m, om)
    assert (tmp_path/'step-00000002.bad2').is_dir() and (tmp_path/'step-00000002.bad').is_dir()

def test_all_broken_means_none(tmp_path, capsys):
    for step in (1, 2): cut(shard(save(tmp_path, step, *fresh())))
    assert load(tmp_path, *fresh()) is None and len(list(tmp_path.glob('*.bad'))) == 2

# -- whoever can write a folder can also seal it: nothing is run, nothing is believed

class Payload:
    def __reduce__(self): return Path.touch, (Path(os.environ['PAYLOAD']),)

@pytest.mark.parametrize('name', ['.metadata', '__0_0.distcp', 'optimizer.pt', 'model.bin'])
def test_pickles_in_a_checkpoint_are_never_read(tmp_path, monkeypatch, name):
    monkeypatch.setenv('PAYLOAD', str(tmp_path/'ran'))
    path = save(tmp_path/'c', 1, *fresh(1))
    (path/name).write_bytes(pickle.dumps(Payload()))
    write_manifest(path)
    m, o = fresh()
    assert load(tmp_path/'c', m, o) == (1, {}) and same(m, fresh(1)[0])
    assert not (tmp_path/'ran').exists()
    shard(path).write_bytes(pickle.dumps(Payload()))
    write_manifest(path)
    assert 'cannot be read' in told(load, tmp_path/'c', m, o) and not (tmp_path/'ran').exists()

def lie(path, change):
    "Change the header of a safetensors file"
    data = path.read_bytes()
    n = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:8 + n])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, 'little') + new + data[8 + n:])

def offsets(**kw):
    def change(h):
        info = json.loads(h['__metadata__']['DCP_SHARDING_INFO'])
        info['model.embed.weight'] = kw
        h['__metadata__']['DCP_SHARDING_INFO'] = json.dumps(info)
    return change

def entry(**kw): return lambda h: h['model.embed.weight'].update(kw)
LIES = dict(far=offsets(saved_offsets=[10**15, 0]), negative=offsets(saved_offsets=[-1, 0]),
            words=offsets(saved_offsets='ab'),
            short=offsets(saved_offsets=[0]),
            none=offsets(), info=lambda h: h['__metadata__'].update(DCP_SHARDING_INFO='[' * 10**5),
            no_info=lambda h: h['__metadata__'].update(DCP_SHARDING_INFO='{}'),
            shape=entry(shape=[2**62, 2**62]), dtype=entry(dtype='I32'), kind=entry(dtype='F99'),
            place=entry(data_offsets=[0, 2**63]),
            minus=entry(shape=[-19, -16]),
            extra=lambda h: h.update(more=dict(dtype='F32', shape=[0, 2**40], data_offsets=[0, 0])),
            memory=lambda h: h.update({'optimizer.huge.embed.weight': dict(
                dtype='F32', shape=[0, 2**50], data_offsets=[0, 0])}))

@pytest.mark.parametrize('how', LIES)
def test_lying_headers_are_one_line(tmp_path, how):
    path = save(tmp_path, 1, *fresh())
    lie(shard(path), LIES[how])
    write_manifest(path)
    assert str(tmp_path) in told(load, tmp_path, *fresh())

@pytest.mark.parametrize('text', ['[]', '{}', '{"step": "1"}',
                                  '{"step": 1, "extra": [], "scaler": {}, "optimizers": []}',
                                  '[' * 10**5, 'x'])
def test_odd_notes_are_one_line(tmp_path, text):
    path = save(tmp_path, 1, *fresh())
    (path/'state.json').write_text(text)
    write_manifest(path)
    assert 'state.json' in told(load, tmp_path, *fresh())

def test_a_header_of_an_exabyte(tmp_path):
    path = save(tmp_path, 1, *fresh())
    shard(path).write_bytes((2**60).to_bytes(8, 'little') + b'{}')
    write_manifest(path)
    assert 'cannot be read' in told(load, tmp_path, *fresh())

# -- dying

def saving_for_ever(folder, pipe, start):
    """Save step after step; each step's number fills the weights, and is told once the save has
    finished"""
    model = nn.Linear(200, 200)
    o = torch.optim.AdamW(model.parameters())
    saver = Saver(folder, model, [o])
    def fill(x):
        for t in model.parameters(): t.data.fill_(x)
    for step in range(start, 10**9):
        fill(step)
        for p in model.parameters(): o.state[p] = dict(exp_avg=p.detach().clone())
        saver.save(step)  # returns when the one before has finished
        fill(-1.)
        if step > start and not saver.failed: os.write(pipe, f'{step - 1}\n'.encode())
        if step % 3 == 0:
            # now and then a step is replaced, by what must not be taken for it
            saver.save(step) if step % 2 else saver.wait()
            if step % 2: saver.wait(), fill(step), saver.save(step)

def loads_right(path):
    "The step of a checkpoint whose every number is that step, or was replaced by -1; else an error"
    assert verify_manifest(path, ['state.json']) == ''
    step, model = int(path.name[5:]), nn.Linear(200, 200)
    o = torch.optim.AdamW(model.parameters())
    _read_checkpoint(path, model, [o])
    values = {x.unique().tolist()[0]
              for x in model.state_dict().values() if x.unique().numel() == 1}
    assert len(values) == 1 and values <= {step, -1.}, (step, values)
    return step

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_at_random_moments_no_finished_save_is_lost(tmp_path):
    """Processes that save without end are killed with -9; what they finished is there, whole and
    right"""
    save(tmp_path/'warm', 1, *fresh())  # the first save of a process imports a lot
    folder, rng, last, told_of, kept, n = (tmp_path/'c', random.Random(0), 0, 0, 0,
                                           soak.count(30, 200))
    with soak.trials('kill -9 of a process that saves without end') as tally:
        for _ in range(n):
            told_of = max(
                [told_of, *_saves_until_killed(folder, last + 1, rng.uniform(0.01, 0.25))])
            path = newest(folder)
            last = loads_right(path) if path else 0
            before, kept = kept, len(checkpoints(folder))
            # a new one is there before an old one goes; who dies in between leaves one more
            few = kept <= max(3, before + 1)
            tidy = few and not list(folder.glob('*.bad')) and not list(folder.glob('.step*'))
            tally.add(last >= told_of and tidy,
                      (last, told_of, before, [p.name for p in folder.glob('*')]))
            for path in checkpoints(folder)[1:]: loads_right(path)
        tally.more['saves'] = last
    assert last > n // 4

def _saves_until_killed(folder, start, seconds):
    "The steps whose saves a process told to be finished before it was killed"
    r, w = os.pipe()
    if (pid := os.fork()) == 0:
        try: saving_for_ever(folder, w, start)
        finally: os._exit(1)
    os.close(w)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])  # it was still saving, not stopped by an error
    with os.fdopen(r) as f: return [int(x) for x in f.read().split()]

def test_an_exchange_that_died_between_its_renames_is_undone(tmp_path):
    with replacing(tmp_path/'m') as t: (t/'f').write_text('old')
    (tmp_path/'m').rename(tmp_path/'.m.old')  # here it died
    with pytest.raises(KeyboardInterrupt):
        with replacing(tmp_path/'m') as t: raise KeyboardInterrupt
    assert (tmp_path/'m'/'f').read_text() == 'old'
    with replacing(tmp_path/'m') as t: (t/'f').write_text('new')
    assert (tmp_path/'m'/'f').read_text() == 'new' and [p.name for p in tmp_path.iterdir()] == ['m']

def test_an_error_inside_a_save_leaves_the_others(tmp_path, monkeypatch, capsys):
    save(tmp_path, 1, *fresh())
    monkeypatch.setattr(C, 'write_manifest', lambda folder: 1/0)
    for step in (1, 2): assert 'division by zero' in told(save, tmp_path, step, *fresh())
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000001']
    assert verify_manifest(tmp_path/'step-00000001', ['state.json']) == ''

# -- ranks

RANKS = """
import hashlib, os, resource, sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from lm_nb.training.checkpoint import Saver, newest, _run_state
from lm_nb.training.ranks import _DistributedRanks
torch.set_num_threads(1)
dist.init_process_group('gloo')
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(7 + rank)
layers = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3, bias=False), torch.nn.LayerNorm(3)
model = torch.nn.Sequential(*layers)  # no size divides evenly
mesh = init_device_mesh('cpu', (world,))
for layer in model: fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
o = torch.optim.AdamW(model.parameters())
def digest():
    state = _run_state(model, [o]).items()
    full = {n: t.full_tensor() if hasattr(t, 'full_tensor') else t for n, t in state}
    parts = [n.encode() + full[n].detach().numpy().tobytes() for n in sorted(full)]
    return hashlib.sha256(b''.join(parts)).hexdigest()
ranks = _DistributedRanks(rank, rank, world)
saver = Saver(sys.argv[1], model, [o], ranks=ranks, keep_last=9, timeout=60)
assert saver.load() == (1, {'from': 'one'})
loaded = digest()
for step in range(2, 6):  # training exchanges its messages while the threads exchange theirs
    model(torch.ones(2, 5)).sum().backward()
    o.step(), o.zero_grad()
    saver.save(step)
saver.wait()
was = digest()
if rank:  # its disk is full
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
saver.save(6)
try: saver.close()
except BaseException as e: said = f'{type(e).__name__} {e}'
else: said = ''
assert saver.load() == (5, {}) and digest() == was
out = [None] * world
dist.all_gather_object(out, said)
if not rank: print('\\n'.join([loaded, was, *out]), flush=True)
dist.barrier(), dist.destroy_process_group()
os._exit(0)
"""
def digest(model, optimizers):
    import hashlib
    full = _run_state(model, optimizers)
    return hashlib.sha256(
        b''.join(n.encode() + full[n].detach().numpy().tobytes() for n in sorted(full))).hexdigest()

@pytest.mark.skipif(os.name != 'posix', reason='needs resource limits')
def test_one_process_two_ranks_and_back(tmp_path):
    def alone(seed):
        torch.manual_seed(seed)
        m = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False), nn.LayerNorm(3))
        return m, [torch.optim.AdamW(m.parameters())]
    a, oa = alone(0)
    a(torch.ones(2, 5)).sum().backward(), oa[0].step()
    save(tmp_path, 1, a, oa, extra={'from': 'one'})
    port, n = random.SystemRandom().randint(20000, 60000), soak.count(2, 4)
    env = {**os.environ, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port),
           'OMP_NUM_THREADS': '1'}
    ranks = [subprocess.Popen(
        [sys.executable, '-c', RANKS, str(tmp_path)], text=True,
        env={**env, 'RANK': str(r), 'WORLD_SIZE': str(n)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE) for r in range(n)]
    said = [p.communicate(timeout=120) for p in ranks]
    assert all(p.returncode == 0 for p in ranks), said
    loaded, was, *errors = [
        line for line in said[0][0].splitlines() if not line.startswith('step 6 could')]
    assert loaded == digest(a, oa) and len(errors) == n
    assert all('UserError step 6 could not be saved' in e for e in errors)
    b, ob = alone(1)
    assert load(tmp_path, b, ob) == (5, {}) and digest(b, ob) == was
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == [5, 4, 3, 2, 1]
