"""How often a fault is tried: a few times in `make test`, all the times in `make soak`; and the
note of what came of it"""
import json, os, time
from contextlib import contextmanager
from dataclasses import dataclass, field

FULL = os.environ.get('LM_NB_SOAK', '') not in ('', '0')


def count(default, full):
    "How many times to try: `default`, or `full` where LM_NB_SOAK is set"
    return full if FULL else default


def record(what, count, failed=0, seconds=0., **more):
    "Append one line of JSON to the file that LM_NB_SOAK_LOG names, if it names one"
    if path := os.environ.get('LM_NB_SOAK_LOG'):
        line = json.dumps(dict(what=what, count=int(count), failed=int(failed),
                               seconds=round(seconds, 2), **more), ensure_ascii=False) + '\n'
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try: os.write(fd, line.encode())   # one write: lines of several processes do not mix
        finally: os.close(fd)


@dataclass
class Tally:
    "Trials and those among them that went wrong, with a word about the first few"
    what: str
    count: int = 0
    wrong: list = field(default_factory=list)
    more: dict = field(default_factory=dict)  # further figures for the table

    def add(self, ok=True, about=''):
        self.count += 1
        if not ok: self.wrong.append(str(about))


@contextmanager
def trials(what):
    """Count trials with `tally.add(ok, about)`; at the end they are recorded, and none may have
    gone wrong"""
    tally, began = Tally(what), time.perf_counter()
    try: yield tally
    except BaseException:
        record(what, tally.count + 1, len(tally.wrong) + 1, time.perf_counter() - began,
               **tally.more)
        raise
    record(what, tally.count, len(tally.wrong), time.perf_counter() - began, **tally.more)
    assert tally.count, f'{what}: nothing was tried'
    some = ' | '.join(w[:300] for w in tally.wrong[:3])
    assert not tally.wrong, f'{what}: {len(tally.wrong)} of {tally.count} went wrong: {some}'
