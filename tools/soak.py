"""The fault tests at their full counts; what came of them goes into nbs/results/soak.json.  python tools/soak.py [pytest's words …]

Without words all files below run, and the table is written anew. With words (a file, -k …) only the lines that were tried again are replaced."""
import json, os, subprocess, sys, tempfile, time
from pathlib import Path

from lm_nb.core import hardware, read_json, root, write_json

FILES = 'test_faults.py', 'test_checkpoint.py', 'test_ranks.py', 'test_hostile.py'


def lines(path):
    "What was recorded: the last word on each thing that was tried"
    found = [json.loads(l) for l in path.read_text(encoding='utf-8').splitlines()] if path.exists() else []
    return {r['what']: r for r in found}


def main(words):
    out, tests = root()/'nbs'/'results'/'soak.json', root()/'tests'
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder)/'soak.jsonl'
        env = {**os.environ, 'LM_NB_SOAK': '1', 'LM_NB_SOAK_LOG': str(log), 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}
        files = [] if any('.py' in w for w in words) else [str(tests/f) for f in FILES]
        began = time.perf_counter()
        status = subprocess.call([sys.executable, '-m', 'pytest', '-q', '--durations=5', *files, *words], cwd=root(), env=env)
        tried = lines(log)
    whole = not words
    old = {} if whole or not out.exists() else {r['what']: r for r in read_json(out)['tried']}
    write_json(out, dict(hardware=hardware(), minutes=round((time.perf_counter() - began) / 60, 1) if whole else None, tried=list({**old, **tried}.values())))
    for r in tried.values(): print(f'{r["count"]:6} {r["failed"]:4} failed  {r["what"]}')
    print(f'{out.relative_to(root())} has {len({**old, **tried})} lines')
    return status


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
