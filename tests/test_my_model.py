"The notebook to copy: in an empty folder by itself, and in JupyterLab before a person's eyes"
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from browser import Browser, find_browser

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT/'nbs/my_model.ipynb'
SLOW = 600  # seconds: others may be at work on this machine


def copy_to(folder, sizes=None):
    "A copy of the notebook, without what it showed; `sizes` replaces what the first cell trains"
    nb = json.loads(NOTEBOOK.read_text(encoding='utf-8'))
    code = [c for c in nb['cells'] if c['cell_type'] == 'code']
    for cell in code: cell['outputs'] = []
    values = ''.join(code[0]['source'])
    for key, tokens in (sizes or {}).items():
        values, n = re.subn(rf"('{key}': )[\d_]+", rf'\g<1>{tokens}', values)
        assert n == 1, f'the first cell sets {key}'
    code[0]['source'] = values
    path = folder/'copy.ipynb'
    path.write_text(json.dumps(nb), encoding='utf-8')
    return path


def elsewhere(folder):
    "The environment of somebody who has the package and works in `folder`"
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    return env | dict(PYTHONPATH=str(ROOT), HOME=str(folder), IPYTHONDIR=str(folder/'ipython'),
                      JUPYTER_CONFIG_DIR=str(folder/'config'), OMP_NUM_THREADS='1',
                      CUDA_VISIBLE_DEVICES='')


def test_a_copy_runs_in_an_empty_folder(tmp_path):
    pytest.importorskip('nbconvert')
    (tmp_path/'home').mkdir()
    (work := tmp_path/'work').mkdir()
    path = copy_to(work, {'pretrain.tokens': 2048, 'sft.tokens': 2048})
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
    nb = json.loads(copy_to(tmp_path, {'pretrain.tokens': 300_000, 'sft.tokens': 2048}).read_text())
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


# --- in JupyterLab

@pytest.fixture
def page(tmp_path):
    "JupyterLab in an empty folder with a copy of the notebook, which is open in a browser"
    for name in ('jupyterlab', 'ipywidgets', 'websocket'): pytest.importorskip(name)
    if not find_browser(): pytest.skip('needs Chromium')
    (home := tmp_path/'home').mkdir()
    (work := tmp_path/'work').mkdir()
    copy_to(work, {'pretrain.tokens': 150_000, 'sft.tokens': 40_000})  # time for some drawings
    said = home/'said.txt'
    words = ['-m', 'jupyterlab', '--no-browser', '--allow-root', '--expose-app-in-browser',
             f'--ServerApp.root_dir={work}', '--LabApp.news_url=None',
             '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with said.open('w') as out, subprocess.Popen(
            [sys.executable, *words], cwd=work, env=elsewhere(home), stdout=out,
            stderr=out) as server:
        try:
            end = time.monotonic() + SLOW
            while not (url := re.search(r'(http://localhost:\d+)/lab\?(token=\w+)',
                                        said.read_text())):
                assert time.monotonic() < end and server.poll() is None, said.read_text()
                time.sleep(.2)
            with Browser(1280, 1000) as page:
                page.work = work
                page('Page.navigate', url=f'{url[1]}/lab/tree/copy.ipynb?{url[2]}')
                try:
                    page.until(f'window.jupyterapp?.shell && {KERNEL}?.status === "idle"', SLOW)
                    yield page
                finally: keep(page, 'last')
        finally: server.terminate()


PANEL = '[...jupyterapp.shell.widgets("main")].find(w => w.sessionContext)'
KERNEL = f'{PANEL}?.sessionContext?.session?.kernel'
CELLS = f'{PANEL}.content.widgets'


def outputs(number):
    "JavaScript: the outputs of a cell, as the notebook's model holds them"
    return f'{CELLS}[{number}].model.outputs.toJSON()'


def command(page, name): page.js(f'jupyterapp.commands.execute("{name}"); 0')


def number_of(page, text):
    "Which cell has a text in its source"
    return page.js(f'{CELLS}.findIndex(c => c.model.sharedModel.source.includes({text!r}))')


def until_seen(page, number, code):
    "Wait until something is true, with a cell in view: what is out of view may not be drawn"
    scroll = f'{PANEL}.content.activeCellIndex = {number}; {PANEL}.content.scrollToItem({number})'
    page.until(f'(() => {{ {scroll}; return {code} }})()', SLOW)


def keep(page, name):
    if folder := os.environ.get('PICTURES'): page.picture(Path(folder)/f'{name}.png')


def test_a_person_trains_and_talks(page):
    train, chat = number_of(page, 'with live_plot('), number_of(page, 'display(chat_widget(')
    shown = f'{outputs(train)}.find(o => o.data?.["image/png"])?.data["image/png"]'
    page.js(f'window.pictures = new Set();'
            f'{CELLS}[{train}].model.outputs.changed.connect(() => pictures.add({shown})); 0')
    command(page, 'notebook:run-all-cells')
    box = f'{CELLS}[{chat}].node.querySelector("input[type=text]")'
    until_seen(page, chat, f'Boolean({box})')
    assert page.js('pictures.delete(undefined); pictures.size') > 1, 'the curves grew'
    page.js(f'{box}.focus()')
    page.type('Where is the owl?')
    page.key('Enter', 13, '\r')
    talk = f'{CELLS}[{chat}].node.querySelector(".widget-html-content")?.textContent'
    until_seen(page, chat, f'{KERNEL}.status === "idle" && /^Where is the owl.\\n./.test({talk})')
    assert page.js(f'{box}.value') == ''
    keep(page, 'chat')
    code = f'{CELLS}.filter(c => c.model.type === "code")'
    page.until(f'{code}.every(c => c.model.executionCount)', SLOW)
    failed = 'c.model.outputs.toJSON().some(o => o.output_type === "error")'
    assert not page.js(f'{code}.some(c => {failed})')
    until_seen(page, train, 'true')
    keep(page, 'trained')
