"What holds for all tests"
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers that several parts share

# a job started in the background ignores Ctrl-C, and so would all it starts; the tests press it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # small tensors: more threads only wait for each other

# the files that take longest, to be started first where several processes share the work
LONGEST = ('test_faults.py', 'test_ranks.py', 'test_cli.py', 'test_workbook.py', 'test_gpu.py',
           'test_stage.py', 'test_checkpoint.py', 'test_third_stage.py', 'test_cases.py',
           'test_lab.py')


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
