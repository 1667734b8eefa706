"""What a CUDA card does with the workbook, step by step, in bounded time (tools/gpu.sh calls this):

    python tools/gpu.py [MINUTES] [--dry]

Each step of tools/gpu_steps.py is a process of its own with a time limit. One that fails, hangs or
finds no time left costs one line in the result, and the next begins. The result is
nbs/7_bench/results/gpu.json, or gpu.json in the folder $OUT; it is written after every step. What
the steps print, and what they made, lies in runs/gpu or $OUT/gpu.

    --dry    every step at a toy size on the CPU; the result goes to the folder of the steps"""
import argparse
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

BEGUN = time.monotonic()
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from lm_nb.core import UserError, check, json_text, write_json  # noqa: E402

GRACE = 3.  # seconds between being told to stop and being killed
MINE = Path(__file__).with_name('gpu_steps.py')


class Step(NamedTuple):
    "A part of the call: a function that yields lines, in a process of its own"
    name: str
    seconds: float        # at most
    least: float = 10.    # with less left it is skipped
    call: str = ''        # FILE:FUNCTION; the function of that name in gpu_steps.py if empty


STEPS = [Step('environment', 30), Step('tests', 100, 20), Step('training', 120, 30),
         Step('memory', 30, 15), Step('attention', 60, 15), Step('generating', 60, 15),
         Step('decoding', 40, 10), Step('resume', 30, 10), Step('packed', 100, 30),
         Step('real', math.inf, 20)]  # the last one takes what is left
KEPT = 60.  # seconds that are kept for the last step, or a tenth of all if that is less


class Given(NamedTuple):
    "What a step may use"
    dry: bool       # toy sizes, on the CPU
    seconds: float  # after which it should be done
    folder: Path    # for whatever it makes; empty at the start


# --- in the process of a step

def load(call):
    "The function that a text FILE:FUNCTION names"
    path, name = call.rsplit(':', 1)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def as_record(found):
    "What a step has yielded, as JSON: a line of its table, or what its type says"
    for kind, name in {str: 'note', list: 'curve', dict: 'where'}.items():
        if isinstance(found, kind): return {name: found}
    got, met = found.got, found.margin >= 1 if found.goal else None
    return dict(line=dict(what=found.what, median=got.median, unit=got.unit,
                          values=list(got.values), goal=found.goal, met=met))


def work(call, given, out):
    "Run a step and write down what it finds as it finds it; whether it came to its end"
    def say(**record):
        with out.open('a', encoding='utf-8') as f: f.write(json_text(record) + '\n')
    try:
        step = load(call)
        say(about=' '.join((step.__doc__ or '').split()))
        for found in step(given): say(**as_record(found))
    except BaseException as e:
        traceback.print_exc()
        first = (str(e).splitlines() or [''])[0][:300]
        say(why=first if isinstance(e, UserError) else f'{type(e).__name__}: {first}'.rstrip(': '))
        return False
    return True


# --- in the process that starts the steps

def read(path):
    "What a step has written, each line of its table once; a last line that was cut off is dropped"
    done = dict(about='', why='', notes=[], curve=[], lines={}, where={})
    for text in path.read_text(encoding='utf-8').splitlines() if path.exists() else []:
        try: record = json.loads(text)
        except ValueError: break
        if 'line' in record: done['lines'][record['line']['what']] = record['line']
        elif 'note' in record: done['notes'].append(record['note'])
        else: done |= record
    return done | dict(lines=list(done['lines'].values()))


def stop(process):
    "Ask a process to stop, then end it with all that it has started"
    with suppress(subprocess.TimeoutExpired):
        process.send_signal(signal.SIGINT)
        process.wait(GRACE)
    with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment(dry):
    "The variables that a step sees: a dry run uses one thread of the CPU, and never compiles"
    if not dry: return dict(os.environ)
    return {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'TORCH_COMPILE_DISABLE': '1',
            'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'IN_TEST': '1'}


def attempt(step, seconds, folder, dry):
    "Run a step within so many seconds: its status, why it ended early, and what it found"
    own, out, begun = folder/step.name, folder/f'{step.name}.jsonl', time.monotonic()
    own.mkdir(parents=True)
    command = [sys.executable, __file__, '--call', step.call or f'{MINE}:{step.name}', '--seconds',
               str(max(1., seconds - 2*GRACE)), '--out', str(out), '--folder', str(own)]
    with (folder/f'{step.name}.log').open('w') as log:
        process = subprocess.Popen(command + ['--dry']*dry, stdout=log, stderr=log, cwd=ROOT,
                                   env=environment(dry), start_new_session=True)
        try: status = 'failed' if process.wait(max(.1, seconds - GRACE)) else 'done'
        except subprocess.TimeoutExpired: status = 'out of time'
        finally: stop(process)
    found = read(out)
    if status == 'done': found['why'] = ''
    if status == 'out of time': found['why'] = f'not done after {seconds:.0f} s'
    if status == 'failed': found['why'] = found['why'] or f'ended with {process.returncode}'
    return dict(name=step.name, status=status, seconds=round(time.monotonic() - begun, 1), **found)


def verdict(s):
    "A step in a line"
    goals = [line['met'] for line in s['lines'] if line['goal']]
    met = f', {sum(goals)} of {len(goals)} goals met' if goals else ''
    why = f' ({s["why"]})' if s['why'] else ''
    return f'{s["name"]}: {s["status"]}{why}, {s["seconds"]:.0f} s, {len(s["lines"])} figures{met}'


def run_steps(steps, minutes, path, folder, dry=False, begun=None, log=print):
    "Run the steps within so many minutes; what came of each, also in the file `path`"
    begun, done, where = begun or time.monotonic(), [], {}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, step in enumerate(steps, 1):
        left = 60*minutes - (time.monotonic() - begun)
        if i < len(steps): left -= min(KEPT, 6*minutes)
        if left < min(step.least, step.seconds):
            why = f'{max(left, 0):.0f} s were left, and it needs {step.least:.0f}'
            done.append(dict(name=step.name, status='skipped', seconds=0., about='', why=why,
                             notes=[], curve=[], lines=[]))
        else: done.append(attempt(step, min(left, step.seconds), folder, dry))
        where = done[-1].pop('where', {}) or where
        log(verdict(done[-1]))
        write_json(path, dict(where=where, dry=dry, minutes=minutes, steps=done, seconds=round(
            time.monotonic() - begun, 1)))
    return done


def has_card():
    "Whether there is a CUDA card that this torch can use"
    import torch
    return torch.cuda.is_available()


def main(argv=None):
    parser = argparse.ArgumentParser(usage='tools/gpu.sh [MINUTES] [--dry]')
    parser.add_argument('minutes', nargs='?', type=float, default=9.)
    parser.add_argument('--dry', action='store_true')
    parser.add_argument('--spent', type=float, default=0., help=argparse.SUPPRESS)  # seconds
    for name in ('call', 'seconds', 'out', 'folder'):  # how a step is started
        parser.add_argument(f'--{name}', help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.call:
        given = Given(asked.dry, float(asked.seconds), Path(asked.folder))
        return int(not work(asked.call, given, Path(asked.out)))
    try:
        check(asked.minutes > 0, f'minutes = {asked.minutes}: has to be above 0')
        check(asked.dry or has_card(), 'no CUDA card was found here; --dry tries every step at a '
              'toy size on the CPU')
    except UserError as e: parser.exit(2, f'tools/gpu.sh: {e}\n')
    out = os.environ.get('OUT')
    folder = Path(out)/'gpu' if out else ROOT/'runs'/'gpu'
    kept = Path(out) if out else folder if asked.dry else ROOT/'nbs'/'7_bench'/'results'
    done = run_steps(STEPS, asked.minutes, kept/'gpu.json', folder, asked.dry,
                     BEGUN - asked.spent)
    print(f'{kept/"gpu.json"} has what {len(done)} steps found; what they printed is in {folder}')
    return int(any(s['status'] in ('failed', 'out of time') for s in done))


if __name__ == '__main__': sys.exit(main())
