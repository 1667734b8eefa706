"""The fault tests at their full counts: what came of them goes into soak.json

    python tools/soak.py [pytest's words …]

Without words all files below run, and the table is written anew. With words (a file, -k …) only the
lines that were tried again are replaced."""
import json, os, subprocess, sys, tempfile, time
from pathlib import Path

from lm_nb.core import hardware, read_json, root, write_json

TABLE = root()/'nbs'/'4_training'/'results'/'soak.json'
TESTS = root()/'tests'/'training'
FILES = 'test_faults.py', 'test_checkpoint.py', 'test_ranks.py', 'test_hostile.py'


def lines(path):
    "What was recorded: the last word on each thing that was tried"
    if not path.exists(): return {}
    found = [json.loads(l) for l in path.read_text(encoding='utf-8').splitlines()]
    return {r['what']: r for r in found}


def soak(words):
    "Run the tests; pytest's exit status, and what was recorded"
    files = [] if any('.py' in w for w in words) else [str(TESTS/f) for f in FILES]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder)/'soak.jsonl'
        env = {**os.environ, 'LM_NB_SOAK': '1', 'LM_NB_SOAK_LOG': str(log),
               'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}
        pytest = [sys.executable, '-m', 'pytest', '-q', '--durations=5', *files, *words]
        return subprocess.call(pytest, cwd=root(), env=env), lines(log)


def main(words):
    whole, began = not words, time.perf_counter()
    status, tried = soak(words)
    minutes = round((time.perf_counter() - began) / 60, 1) if whole else None
    old = {} if whole or not TABLE.exists() else {r['what']: r for r in read_json(TABLE)['tried']}
    rows = list({**old, **tried}.values())
    write_json(TABLE, dict(hardware=hardware(), minutes=minutes, tried=rows))
    for r in tried.values(): print(f'{r["count"]:6} {r["failed"]:4} failed  {r["what"]}')
    print(f'{TABLE.relative_to(root())} has {len(rows)} lines')
    return status


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
