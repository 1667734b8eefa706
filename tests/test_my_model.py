"The notebook to copy, in an empty folder by itself; test_lab.py has it before a person's eyes"
import json
import re
import subprocess
import sys
import time

import pytest

from lab import ROOT, SLOW, elsewhere, my_model


def test_a_copy_runs_in_an_empty_folder(tmp_path):
    pytest.importorskip('nbconvert')
    (tmp_path/'home').mkdir()
    (work := tmp_path/'work').mkdir()
    path = my_model(work/'copy.ipynb', pretrain=2048, sft=2048)
    before = {p.name for p in (ROOT/'nbs').iterdir()}
    words = f'-m nbconvert --to notebook --execute --inplace {path.name}'.split()
    done = subprocess.run([sys.executable, *words], cwd=work, env=elsewhere(tmp_path/'home'),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.name for p in work.iterdir()} >= {path.name, 'my_files', 'my_model'}
    made = {p.name for p in (work/'my_model').iterdir()}
    assert made >= {'base', 'chat', 'export', 'results.json'}
    assert {p.name for p in (ROOT/'nbs').iterdir()} == before, 'nothing lands beside the original'
    cells = [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    [train] = [c for c in cells if 'live_plot(' in ''.join(c['source'])]
    assert sum('image/png' in out.get('data', {}) for out in train['outputs']) == 1, 'replaced'


def test_a_stop_saves_and_the_cell_goes_on(tmp_path):
    start = pytest.importorskip('jupyter_client.manager').start_new_kernel
    nb = json.loads(my_model(tmp_path/'copy.ipynb', pretrain=300_000, sft=2048).read_text())
    code = [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']
    train = next(i for i, source in enumerate(code) if 'live_plot(' in source)
    log = tmp_path/'my_model/pretrain/log.jsonl'
    kernel, client = start(cwd=tmp_path, env=elsewhere(tmp_path))
    try:
        def reply(to): # other messages are about the kernel
            while (m := client.get_shell_msg(timeout=SLOW))['parent_header']['msg_id'] != to: pass
            return m['content']
        def run(source): return reply(client.execute(source))
        for source in code[:train]: assert run(source)['status'] == 'ok'
        training = client.execute(code[train])
        end = time.monotonic() + SLOW
        while not log.exists() or not log.read_text():
            assert time.monotonic() < end
            time.sleep(.05)
        kernel.interrupt_kernel()  # what ■ does
        error = reply(training)
        assert error['ename'] == 'Interrupted'
        [line] = error['traceback']
        said = r'pretrain: stopped at step (\d+) of 585 and saved; this cell or lm-nb run '
        at = re.match(said, line)
        assert at and (tmp_path/f'my_model/pretrain/checkpoints/step-{int(at[1]):08d}').exists()
        assert run(code[train])['status'] == 'ok'
        steps = [json.loads(row)['step'] for row in log.read_text().splitlines()]
        assert steps == sorted(steps) and steps[-1] == 585, 'nothing is repeated'
        assert run('assert results["sft"]["loss"]')['status'] == 'ok'
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
