"Notebooks in JupyterLab as a person uses them: a server, a page of a browser, the menu Run"
import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from browser import Browser, find_browser

ROOT = Path(__file__).resolve().parent.parent
SLOW = 600  # seconds: others may be at work on this machine


def copy(source, to, changes):
    "A notebook without what it showed, changed: what a pattern finds in code becomes something"
    nb = json.loads(source.read_text(encoding='utf-8'))
    code = [c for c in nb['cells'] if c['cell_type'] == 'code']
    for cell in code: cell['outputs'], cell['source'] = [], ''.join(cell['source'])
    for pattern, words in changes.items():
        done = [re.subn(pattern, words, cell['source'], flags=re.M) for cell in code]
        assert any(n for _, n in done), f'no {pattern} in {source}'
        for cell, (text, _) in zip(code, done): cell['source'] = text
    to.write_text(json.dumps(nb), encoding='utf-8')
    return to


def my_model(to, **tokens):
    "A copy of the notebook to copy, with so many tokens for each stage"
    return copy(ROOT/'nbs/my_model.ipynb', to, {rf"('{stage}.tokens': )[\d_]+": rf'\g<1>{n}'
                                               for stage, n in tokens.items()})


def elsewhere(folder):
    "The environment of somebody who has the package and keeps what is theirs in `folder`"
    from matplotlib import get_cachedir  # looking for fonts anew takes seconds
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    return env | dict(PYTHONPATH=str(ROOT), HOME=str(folder), IPYTHONDIR=str(folder/'ipython'),
                      JUPYTER_CONFIG_DIR=str(folder/'config'), OMP_NUM_THREADS='1',
                      MPLCONFIGDIR=get_cachedir(), CUDA_VISIBLE_DEVICES='')


@contextmanager
def jupyterlab(work, home):
    "JupyterLab on the folder `work`, set up as `make lab` does it, open in a browser"
    for name in ('jupyterlab', 'ipywidgets', 'websocket', 'nbdev'): pytest.importorskip(name)
    if not find_browser(): pytest.skip('needs Chromium')
    words = ['-m', 'jupyterlab', '--no-browser', '--expose-app-in-browser',
             f'--config={ROOT}/tools/jupyter_server_config.py', f'--ServerApp.root_dir={work}',
             f'--LabApp.workspaces_dir={home}']
    with (home/'said.txt').open('w') as out, subprocess.Popen(
            [sys.executable, *words], cwd=work, env=elsewhere(home), stdout=out,
            stderr=out) as server:
        try:
            url, token = address(server, home/'said.txt')
            with Browser(1280, 1000) as page:
                page('Page.navigate', url=f'{url}/lab?{token}')
                menu = 'document.querySelector("#jp-MainMenu li")'
                page.until(f'Boolean(window.jupyterapp?.shell && {menu})', SLOW)
                yield page
        finally: server.terminate()


def address(server, file):
    "Where a server that has just been started answers, and its token"
    end = time.monotonic() + SLOW
    while not (said := re.search(r'(http://localhost:\d+)/lab\S*\?(token=\w+)', file.read_text())):
        assert time.monotonic() < end and server.poll() is None, file.read_text()
        time.sleep(.2)
    return said.groups()


# how many pictures and tables (or other HTML) the outputs of a cell hold, and how many are seen
HELD = '''cell => {
    const data = (cell.model.outputs?.toJSON() ?? []).map(o => o.data ?? {})
    return [data.filter(d => d['image/png']).length,
            data.filter(d => d['text/html'] ?? d['text/markdown']).length]
}'''
SEEN = '''cell => {
    const seen = name => [...cell.node.querySelectorAll(`.jp-Cell-outputArea ${name}`)]
    return [seen('img').filter(i => i.naturalWidth).length,
            seen('.jp-RenderedHTMLCommon').filter(t => t.firstElementChild?.offsetHeight).length]
}'''


class Notebook:
    "A notebook that is open in JupyterLab, with its kernel"
    def __init__(self, page, path):
        self.page, self.path = page, path
        self.panel = ('[...jupyterapp.shell.widgets("main")]'
                      f'.find(w => w.context?.path === "{path}")')
        self.kernel = f'{self.panel}?.sessionContext?.session?.kernel'
        self.cells = f'{self.panel}.content.widgets'
        self.code = f'{self.cells}.filter(c => c.model.sharedModel.source && c.model.outputs)'
        page.js(f'jupyterapp.commands.execute("docmanager:open", {{path: "{path}"}}); 0')
        page.until(f'{self.kernel}?.status === "idle"', SLOW)

    def __enter__(self):
        self.keep('opened')
        return self

    def __exit__(self, *how):
        self.keep('closed')
        self.page.js(f'(async () => {{ const p = {self.panel}; await p.sessionContext.shutdown();'
                     ' p.dispose() })()')

    def run_all(self):
        "Choose Run > Run All Cells with the mouse"
        self.page.js('[...document.querySelectorAll("#jp-MainMenu li")]'
                     '.find(li => li.textContent === "Run").id = "menu-run"')
        item = '.lm-Menu-item[data-command="runmenu:run-all"]'
        self.page.click('#menu-run')
        self.page.until(f'Boolean(document.querySelector(\'{item}\'))')
        self.page.click(item)

    def until_run(self):
        "Wait until all cells have run, or one could not"
        failed = ('c => c.model.outputs.toJSON().filter(o => o.output_type === "error")'
                  '.map(o => `${o.ename}: ${o.evalue}`)')
        errors = f'{self.code}.flatMap({failed})'
        self.page.until(f'{self.kernel}.status === "idle" && ({errors}.length || '
                        f'{self.code}.every(c => c.model.executionCount))', SLOW, every=.5)
        assert not (said := self.page.js(errors)), said

    def number_of(self, text):
        "Which cell has a text in its source"
        return self.page.js(
            f'{self.cells}.findIndex(c => c.model.sharedModel.source.includes({text!r}))')

    def until_seen(self, number, code):
        "Wait until something is true of `cell`, which is in view: others may not be drawn"
        scroll = (f'const p = {self.panel}.content, cell = p.widgets[{number}];'
                  f'p.activeCellIndex = {number}; p.scrollToItem({number})')
        return self.page.until(f'(() => {{ {scroll}; return {code} }})()', SLOW, every=.1)

    def pictures_and_tables(self):
        "How many of each the cells show; each of them has been looked at"
        held = self.page.js(f'{self.cells}.map({HELD})')
        for i, counts in enumerate(held):
            if any(counts): self.until_seen(i, f'({SEEN})(cell).every((n, i) => n >= {counts}[i])')
        return [sum(some) for some in zip(*held)]

    def keep(self, name):
        "A picture of the page, to be looked at"
        name = f'{self.path.removesuffix(".ipynb").replace("/", "-")}-{name}.png'
        if folder := os.environ.get('PICTURES'): self.page.picture(Path(folder)/name)
