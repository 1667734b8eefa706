"""Scenes of test_faults.py, each in a process of its own: real training that is stopped,
killed, starved and misled.  python fault_work.py SCENE FOLDER

A scene imports everything once and forks a process for each run, so that a run that dies costs a
fraction of a second."""
import contextlib, json, os, random, resource, shutil, signal, sys, time
from dataclasses import replace
from pathlib import Path

os.environ['IN_TEST'] = '1'

import torch
import matplotlib.backends.backend_agg, torch.utils.tensorboard  # noqa: F401  slow: before forking
import soak
from desk import furnish
import lm_nb.data.packing, lm_nb.data.poems
import lm_nb.training.sft, lm_nb.workbook  # noqa: F401  likewise
from lm_nb.cli import main as command
from lm_nb.core import UserError, verify_manifest, sha256
from lm_nb.data.shards import Shards
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.training.checkpoint import checkpoints
from lm_nb.training.loop import TrainConfig
from lm_nb.training.monitor import Interrupted, read_log
from lm_nb.training.recipe import Feed, load_recipe
from lm_nb.training.run import Run
from lm_nb.training.stage import run_stage, train

KEYS = {'dropout': 0.1, 'micro_rows': 2, 'pretrain.tokens': 6400, 'sft.tokens': 4800, 'replay': 0.2,
        'eval_every': 9, 'sample_every': 0,
        'save_every': 3}  # 5 rows a step in three micro-batches; 40 and 30 steps


def desk(folder):
    "Go to a folder with a recipe, a text and instruction records"
    os.chdir(furnish(folder, KEYS))
    return folder


# ------------------------------------------------------------------ runs

def stage(name, run, *words):
    "Train one stage; what it needs is made before"
    return run_stage(Run(load_recipe('tiny', words), run), name)


def shell(*words):
    "The command line, as somebody's process: exit status and what it said last"
    try: return command(list(words))
    except SystemExit as e: return e.code


def child(f, *args, said=None):
    """Fork a process that calls f and ends with what it returns (none: 0); its output goes into the
    file `said`. Gives its id"""
    sys.stdout.flush(), sys.stderr.flush()
    if pid := os.fork(): return pid
    status = 99
    try:
        fd = os.open(said or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(fd, 1), os.dup2(fd, 2)
        sys.stdout, sys.stderr = (open(k, 'w', buffering=1, closefd=False) for k in (1, 2))
        status = got if isinstance(got := f(*args), int) else 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally: os._exit(status)


def prepared(run, whole):
    "A run for which the data of another one of the same recipe are there already"
    run.mkdir()
    for name in 'recipe.json', 'text', 'tokenizer', 'shards', 'packed':
        if (whole/name).is_dir(): shutil.copytree(whole/name, run/name)
        if (whole/name).is_file(): shutil.copy(whole/name, run/name)
    return run


def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def curve(folder):
    return [[r['step'], *(float(r[k]).hex() for k in ('loss', 'grad_norm', 'lr', 'valid_loss')
                          if k in r)] for r in read_log(folder)]
def fingerprint(run):
    "Weights and curves of a run"
    models = {k: sha256(run/k/'model.safetensors') for k in ('base', 'chat') if (run/k).exists()}
    return models | {k: curve(run/k) for k in ('pretrain', 'sft')}

def losses(folder): return {r['step']: r['loss'] for r in read_log(folder) if 'loss' in r}
def steps_saved(folder): return [int(p.name[5:]) for p in checkpoints(folder)]


class Troubled:
    "The batches of a stage, and what happens when one is asked for, or one of its micro-batches"
    def __init__(self, batches, asked=lambda step: None, reached=lambda step, micro: None):
        self.batches, self.asked, self.reached = batches, asked, reached
    def __getattr__(self, name): return getattr(self.batches, name)
    def __len__(self): return len(self.batches)
    def __call__(self, step):
        self.asked(step)
        return Micros(self.batches(step), lambda i: self.reached(step, i))


class Micros(list):
    "Micro-batches that call `reached(i)` when training comes to one of them"
    def __init__(self, micros, reached):
        super().__init__(micros)
        self.reached = reached

    def __iter__(self):
        for i, m in enumerate(list.__iter__(self)):
            self.reached(i)
            yield m


@contextlib.contextmanager
def trouble(name, stop=lambda: False, spoil=lambda gpt, step: None, **how):
    "Inside, the stage trains with `Troubled` batches, and stops when `stop()` says so"
    module = sys.modules['lm_nb.training.stage']
    real = module.train
    def troubled(gpt, feed, *args, **kw):
        if kw['name'] != name: return real(gpt, feed, *args, **kw)
        batches = Troubled(feed.batches, asked=lambda step: spoil(gpt, step), **how)
        return real(gpt, replace(feed, batches=batches), *args, **kw, stop=stop)
    module.train = troubled
    try: yield
    finally: module.train = real


def after(n):
    "A function that says stop when it is asked for the nth time"
    asked = []
    return lambda: asked.append(1) or len(asked) == n


class Crash(BaseException): "As if the power had gone"


# ------------------------------------------------------------------ scenes

def stops(folder):
    """Ten stops at random steps, every other one in the middle of a step; afterwards nothing can be
    told of them"""
    desk(folder)
    n = soak.count(10, 40)
    for name, total in ('pretrain', 40), ('sft', 30):
        for k in 'whole', 'run':
            if name == 'sft': stage('pretrain', folder/k)
        stage(name, folder/'whole')
        with soak.trials(f'{name}: stopped and gone on') as tally:
            rng, at, crashed, run = random.Random(0), [], [], folder/'run'
            while tally.count < n:
                start = max(steps_saved(run/name/'checkpoints'), default=0)
                if total - start < 4:  # this run is at its end: finish it, compare, take another
                    stage(name, run)
                    tally.wrong += [] if fingerprint(run) == fingerprint(folder/'whole') else [
                        'another curve or other weights']
                    run = run.with_name(run.name + 'x')
                    if name == 'sft': stage('pretrain', run)
                    continue
                step, micro = rng.randrange(start, min(start + 8, total - 1)), rng.randrange(1, 3)
                if tally.count % 2:
                    def reached(s, i, step=step, micro=micro):
                        if (s, i) == (step, micro): raise Crash
                    with contextlib.suppress(Crash), trouble(name, reached=reached):
                        stage(name, run)
                    crashed.append((step, micro))
                else:
                    with contextlib.suppress(Interrupted), trouble(name,
                                                                   stop=after(step + 1 - start)):
                        stage(name, run)
                    at.append(step + 1)
                tally.add(not (run/dict(pretrain='base', sft='chat')[name]).exists(),
                          'it did not stop')
            stage(name, run)
            tally.wrong += [] if fingerprint(run) == fingerprint(folder/'whole') else [
                'another curve or other weights']
            tally.more = dict(steps=sorted({*at, *(s + 1 for s, _ in crashed)}),
                              inside_a_step=len(crashed))
        assert len(losses(folder/'whole'/name)) == total
        assert tally.more['inside_a_step'] >= n // 2 - 1
    tokens = len(Shards(folder/'whole'/'shards'/'train',
                        Tokenizer.load(folder/'whole'/'tokenizer'/'tokenizer.model')))
    assert tokens < 20 * 160, f'{tokens} tokens in the text: an epoch ends among the stops'


def kills(folder):
    """kill -9 at random moments of a process that saves after every step; what was saved by then
    stays, and the end is the end"""
    desk(folder)
    words = 'save_every=1', 'pretrain.tokens=16000'   # 100 steps
    assert ended(child(stage, 'pretrain', folder/'whole', *words, said='whole.txt')) == 0, Path(
        'whole.txt').read_text()
    want, rng = fingerprint(folder/'whole'), random.Random(0)
    with soak.trials('kill -9 while training and saving') as tally:
        n, finished, run, resumed = soak.count(30, 200), 0, folder/'run-0', set()
        while tally.count < n or tally.more.get('runs', 0) == 0:
            where = run/'pretrain'/'checkpoints'
            goal, late = max(steps_saved(where), default=0) + rng.randint(0, 8), rng.uniform(0, .08)
            pid, patience = (child(stage, 'pretrain', run, *words, said='said.txt'),
                             time.monotonic() + 60)
            while not (dead := os.waitpid(pid, os.WNOHANG)[0]) and max(
                steps_saved(where), default=0) < goal:
                late_by = f'no step {goal} within a minute'
                assert time.monotonic(
                    ) < patience, f'{late_by}: {Path("said.txt").read_text()[-300:]}'
                time.sleep(.002)
            if not dead: time.sleep(late)  # somewhere in the steps and saves after it
            had = max(steps_saved(where), default=0)     # a step in the listing is a finished save
            if not dead and tally.count < n:
                os.kill(pid, signal.SIGKILL), ended(pid)
                left = steps_saved(where)
                unsound = [s for s in left
                           if verify_manifest(where/f'step-{s:08d}', ['state.json'])]
                resumed.add(max(left, default=0))
                tally.add(not unsound and max(left, default=0) >= had,
                          f'step {had} was saved, {left} is left, unsound: {unsound}')
                continue
            if not dead: ended(pid)
            finished += 1
            if fingerprint(run) != want:
                said = Path('said.txt').read_text()[-300:]
                tally.wrong.append(f'{run.name}: another curve or other weights; {said}')
            tally.more = dict(runs=finished, different_steps=len(resumed))
            run = folder/f'run-{finished}'
        assert not list(
            folder.glob('run-*/pretrain/checkpoints/*.bad')), 'nothing had to be set aside'
        assert len(resumed) >= min(10,
                                   n//4), f'all kills came at the same few steps: {sorted(resumed)}'


def job(folder):
    "kill -9 anywhere in a whole job: reading, tokenizer, shards, packing, pretraining, fine-tuning"
    desk(folder)
    def both(run): stage('pretrain', run), stage('sft', run)
    assert ended(child(both, folder/'whole', said='whole.txt')) == 0, Path('whole.txt').read_text()
    want, rng, run, k = fingerprint(folder/'whole'), random.Random(1), folder/'run-0', 0
    files = [p.relative_to(folder/'whole') for name in ('tokenizer', 'shards', 'packed', 'text')
             for p in (folder/'whole'/name).rglob('[!.]*') if p.is_file()]
    with soak.trials('kill -9 anywhere in a whole job') as tally:
        n = soak.count(8, 60)
        while tally.count < n or k == 0:
            pid, until = (child(both, run, said='said.txt'),
                          time.monotonic() + rng.choice((rng.uniform(0, .3), rng.uniform(0, 2.5))))
            while time.monotonic() < until and not (dead := os.waitpid(pid, os.WNOHANG)[0]):
                time.sleep(.002)
            if not dead and tally.count < n:
                os.kill(pid, signal.SIGKILL), ended(pid)
                tally.add()
                continue
            if not dead: ended(pid)
            same = fingerprint(run) == want and all(
                (run/f).read_bytes() == (folder/'whole'/f).read_bytes()
                for f in files if 'report' not in f.name)
            tally.wrong += [] if same else [
                f'{run.name} is another run; {Path("said.txt").read_text()[-300:]}']
            k += 1
            run = folder/f'run-{k}'
        tally.more = dict(runs=k)
        assert len(files) > 5


def spoken(path):
    "What a command has said, without the notes on its data"
    return [l for l in Path(path).read_text().splitlines() if not l.startswith('•')]


def signals(folder):
    "SIGTERM and Ctrl-C: saved, one line, status 130; the command that it names goes on"
    desk(folder)
    words = 'pretrain', 'tiny', 'pretrain.tokens=19200', 'save_every=0'   # 120 steps
    assert ended(child(shell, *words, f'run_dir={folder/"whole"}')) == 0
    with soak.trials('SIGTERM and Ctrl-C') as tally:
        for i in range(soak.count(2, 20)):
            kind, run, rng = ((signal.SIGTERM, signal.SIGINT)[i % 2],
                              prepared(folder/f'run-{i}', folder/'whole'), random.Random(i))
            pid, upto = (child(shell, *words, f'run_dir={run}', said='said.txt'),
                         rng.randrange(3, 60))
            while len(curve(run/'pretrain')) < upto: time.sleep(.005)
            os.kill(pid, kind)
            status, lines = ended(pid), spoken('said.txt')
            ok = (status == 130 and len(lines) == 1
                  and f'and saved; lm-nb run {run} goes on' in lines[0]
                  and len(steps_saved(run/'pretrain'/'checkpoints')) == 1)
            assert ended(child(shell, *words, f'run_dir={run}')) == 0
            tally.add(ok and fingerprint(run) == fingerprint(folder/'whole'),
                      f'{kind.name}: {status} {lines[-1:]}')


def disk(folder):
    """A disk that fills up in the middle of a run: each failed save is told, the run goes on, and
    says at its end that it is not saved"""
    desk(folder)
    def limited(size, *words):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return shell(*words)
    words = 'pretrain', 'tiny', 'save_every=4'
    assert ended(child(shell, *words, f'run_dir={folder/"whole"}')) == 0
    size = max(p.stat().st_size
               for p in checkpoints(folder/'whole'/'pretrain'/'checkpoints')[0].iterdir())
    with soak.trials('a disk that fills up while training') as tally:
        for i in range(soak.count(1, 10)):
            run, rng = prepared(folder/f'run-{i}', folder/'whole'), random.Random(i)
            step = rng.randrange(5, 30)
            with contextlib.suppress(Interrupted), trouble('pretrain', stop=after(step)):
                stage('pretrain', run, *words[2:])
            status = ended(child(limited, int(size * rng.uniform(.3, .999)), *words,
                                 f'run_dir={run}', said='said.txt'))
            said = Path('said.txt').read_text().splitlines()
            told = [l for l in said if 'could not be saved' in l and 'the run goes on' in l]
            ok = status == 2 and len(told) == len(range(
                step//4*4 + 4, 41,
                4)) and said[-1].startswith('lm-nb: ') and 'Make room' in said[-1]
            ok = ok and max(steps_saved(run/'pretrain'/'checkpoints')) == step and not (
                run/'base').exists()
            assert ended(child(shell, *words, f'run_dir={run}')) == 0
            tally.add(ok and fingerprint(run) == fingerprint(folder/'whole'),
                      f'{status} {said[-2:]}')


def memory(folder):
    """A step that does not fit: one line with the estimate and what to lower; with that lowered the
    same run goes on to the same end"""
    desk(folder)
    def limited(more, *words):
        used = int(next(l for l in Path('/proc/self/status').read_text().splitlines()
                        if l.startswith('VmSize')).split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))
        return shell(*words)
    # 3 steps of 1024 rows
    words = ('pretrain', 'tiny', 'batch_tokens=32768', 'tokens=98304', 'd_model=64',
             'vocab_size=600', 'save_every=1', 'eval_every=0')
    assert ended(child(shell, *words, 'micro_rows=64', f'run_dir={folder/"whole"}',
                       said='said.txt')) == 0, Path('said.txt').read_text()
    with soak.trials('out of memory') as tally:
        for i in range(soak.count(1, 5)):
            run = prepared(folder/f'run-{i}', folder/'whole')
            # this process stays small
            with trouble('pretrain', stop=after(1 + i % 2)):
                ended(child(stage, 'pretrain', run, 'micro_rows=64', *words[2:]))
            saved = steps_saved(run/'pretrain'/'checkpoints')
            status = ended(child(limited, 220 << 20, *words, 'micro_rows=1024', f'run_dir={run}',
                                 said='said.txt'))
            said = spoken('said.txt')
            ok = status == 2 and len(said) == 1 and all(w in said[0] for w in (
                'lm-nb: out of memory: ', 'micro_rows=', 'the last checkpoint is intact'))
            ok = ok and saved == steps_saved(run/'pretrain'/'checkpoints')
            assert ended(child(limited, 220 << 20, *words, 'micro_rows=64', f'run_dir={run}',
                               said='again.txt')) == 0, Path('again.txt').read_text()
            tally.add(ok and fingerprint(run) == fingerprint(folder/'whole'),
                      f'{status} {said[-2:]}')


def nan_loss(gpt, step): next(iter(gpt.parameters())).data.fill_(float('nan'))
def overflow(gpt, step):
    [p.data[5:9].fill_(float('inf'))
     for n, p in gpt.named_parameters() if 'embed' in n or 'head' in n]
def nan_gradient(gpt, step): _hook(gpt, lambda g: g * float('nan'))
def inf_gradient(gpt, step): _hook(gpt, lambda g: g.index_fill(0, torch.tensor([0]), float('inf')))


def _hook(gpt, f):
    p = next(p for n, p in gpt.named_parameters() if p.dim() == 2 and 'embed' not in n)
    left = [1]
    p.register_hook(lambda g: f(g) if left and left.pop() else g)   # once


def numbers(folder):
    """A loss or gradient that is not finite: the step is skipped, a report names step, rank and
    documents"""
    desk(folder)
    stage('pretrain', folder/'whole', 'save_every=1')
    with soak.trials('loss or gradient not finite') as tally:
        for i in range(soak.count(4, 40)):
            fault, run, rng = ((nan_loss, nan_gradient, inf_gradient, overflow)[i % 4],
                               prepared(folder/f'run-{i}', folder/'whole'), random.Random(i))
            at, said = rng.randrange(1, 39), ''
            try:
                with trouble('pretrain', spoil=lambda gpt, step, f=fault, at=at: f(gpt, step)
                             if step == at else None):
                    stage('pretrain', run, 'save_every=1')
            except UserError as e: said = str(e)
            reports = list((run/'pretrain').glob('bad-step-*.json'))
            report = json.loads(reports[0].read_text()) if reports else {}
            ok = f'step {at + 1}' in said and 'rank 0' in said and '\n' not in said
            ok = ok and (report.get('step'),
                         report.get('rank')) == (at + 1, 0) and report['documents']
            ok = ok and max(steps_saved(run/'pretrain'/'checkpoints')) == at
            # the fault does not come back: from here on it is the whole run
            stage('pretrain', run, 'save_every=1')
            tally.add(ok and fingerprint(run) == fingerprint(folder/'whole'),
                      f'{fault.__name__} at {at}: {said} {report}')


def skipped(folder):
    "Steps that are not finite may be skipped, up to a number; the count survives a stop"
    desk(folder)
    with soak.trials('unsound steps left out, with a cap') as tally:
        seen = {}
        def spoil(gpt, step):
            seen[step] = [p.detach().clone() for p in gpt.parameters()]
            if step in (5, 6, 20): nan_gradient(gpt, step)
        with trouble('pretrain', spoil=spoil): stage('pretrain', folder/'run', 'skip_bad=3')
        still = [s for s in range(39) if all(map(torch.equal, seen[s], seen[s + 1]))]
        tally.add(still == [5, 6, 20], f'skipped were {still}')
        reports = list((folder/'run'/'pretrain').glob('bad-step-*.json'))
        told = losses(folder/'run'/'pretrain')
        tally.add(told.keys() == set(range(1, 41)) - {6, 7, 21}
                  and all(0 < l < 10 for l in told.values())
                  and len(reports) == 3, f'curve and reports: {told}')
        said = ''
        try:
            with contextlib.suppress(Interrupted), trouble('pretrain', spoil=spoil, stop=after(12)):
                stage('pretrain', folder/'cap', 'skip_bad=2')
            with trouble('pretrain', spoil=spoil): stage('pretrain', folder/'cap', 'skip_bad=2')
        except UserError as e: said = str(e)
        tally.add('step 21' in said, f'the third one ends the run: {said!r}')


def no_targets(folder):
    "A step without targets has loss 0 and is skipped"
    desk(folder)
    with soak.trials('steps without a target') as tally:
        seen = {}
        real = Troubled.__call__
        def empty(self, step):
            out = real(self, step)
            if step in (4, 11):
                for i, b in enumerate(list.__iter__(out)):
                    out[i] = b._replace(y=torch.full_like(b.y, -100))
            return out
        Troubled.__call__ = empty
        def spoil(gpt, step): seen[step] = [p.detach().clone() for p in gpt.parameters()]
        for dtype in 'fp32', 'bf16':
            run = folder/dtype
            with trouble('pretrain', spoil=spoil):
                stage('pretrain', run, f'dtype={dtype}', 'weight_decay=0.5')
            told = losses(run/'pretrain')
            tally.add(told[5] == told[12] == 0
                      and all(l == l and l > 0 for s, l in told.items() if s not in (5, 12)),
                      f'losses {told}')
            tally.add(
                [s for s in range(39) if all(map(torch.equal, seen[s], seen[s + 1]))] == [4, 11],
                'skipped')


def bad_rank(folder):
    """One of two ranks gets a loss that is no number: both stop before the update, and the report
    names that rank and its documents"""
    from lm_nb.model.gpt import GPT, GPTConfig
    from lm_nb.training.ranks import close_ranks, init_ranks
    from lm_nb.data.shards import Batch
    from lm_nb.data.order import Order
    ranks = init_ranks(torch.device('cpu'))
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=50, context=16, n_layer=1, n_head=2, d_model=32))
    order, before = Order(64, 6, 0, ranks.rank, ranks.world), []
    class Rows:
        def documents(self, step): return [f'row {k}' for micro in order(step) for k in micro]
        def __call__(self, step):
            if step == 5: before.append([p.detach().clone() for p in gpt.parameters()])
            if step == 5 and ranks.rank == 1:
                gpt.register_forward_hook(lambda *a: a[2] * float('nan'))
            tokens = [torch.tensor([[(int(k)*7 + i*3) % 50 for i in range(17)] for k in micro])
                      for micro in order(step)]
            return [Batch(t[:, :-1], t[:, 1:], None) for t in tokens]
    said = ''
    how = dict(tokens=960, batch_tokens=96, device='cpu', dtype='fp32')
    cfg = TrainConfig(**how, save_every=1, log_every=1, eval_every=0)
    try: train(gpt, Feed(Rows()), cfg, folder/'stage', ranks=ranks)
    except UserError as e: said = str(e)
    held = all(map(torch.equal, before[0], gpt.parameters()))
    (folder/f'rank-{ranks.rank}.json').write_text(
        json.dumps(dict(said=said, held=held, documents=Rows().documents(5))))
    close_ranks(0)


def main(scene, folder):
    torch.set_num_threads(1)
    globals()[scene](Path(folder).resolve())


if __name__ == '__main__': main(*sys.argv[1:])
