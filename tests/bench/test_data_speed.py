"Benchmarks of the data at a tiny size: what they count has to be true, however long anything took"
import json
import threading
from itertools import count

import numpy as np
import pytest

from lm_nb.bench import data_speed
from lm_nb.bench.measure import BENCHMARKS


def test_packing_of_a_file(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 60, 300).tolist()
    rows = [dict(instruction=f'What is {i} plus one?', output=' '.join(map(str, range(i, i + n))))
            for i, n in enumerate(lengths)]
    text = ''.join(json.dumps(r) + '\n' for r in rows)
    (tmp_path/'own records.jsonl').write_text(text, encoding='utf-8')
    found = BENCHMARKS['packing'](source=str(tmp_path/'own*.jsonl'), context=256, vocab_size=400)
    lines = {line.what: line.got.median for line in found}
    assert lines['examples'] == 300
    assert lines['filled, packed'] > 95 > lines['filled, one a row'] > 10
    saved = lines['filled, packed']/lines['filled, one a row']
    assert saved == pytest.approx(lines['rows saved'])


def test_what_is_kept_of_a_file_in_a_process_of_its_own():
    lines = {line.what: line.got for line in BENCHMARKS['shards'](gb=.0001, vocab_size=600)}
    assert lines['documents kept'].median == 100
    assert lines['peak memory'].median > 1  # MB


def test_batches_are_made_in_order_and_none_twice():
    at = count()
    made = [data_speed._next_batches(str, at, n) for n in (2, 3)]
    assert made == [['0', '1'], ['2', '3', '4']]


def test_a_batch_is_made_while_a_step_is_taken():
    asked = [threading.Event() for _ in range(9)]
    def batches(k):
        asked[k].set()
        return k
    steps = count()
    def step(): assert asked[next(steps) + 1].wait(10)  # the next batch is made meanwhile
    assert 0 <= data_speed._waiting_share(batches, step, lambda: None, 8) < 1
