"The notebooks that a newcomer opens, run in JupyterLab before a person's eyes"
import json
import shutil
import subprocess
import sys

import pytest

from lab import ROOT, Notebook, copy, jupyterlab, my_model

# what a newcomer meets first, and what runs in seconds
CHAPTERS = '00_tour', '1_data/09_tokenizer', '2_model/01_gpt', '3_inference/01_sampling'
# all cells of the tour, with less training and what holds without it
QUICK = {r'steps=\d+': 'steps=3', r'^assert .*': ''}


@pytest.fixture(scope='module')
def work(tmp_path_factory): return tmp_path_factory.mktemp('work')


@pytest.fixture(scope='module')
def page(work, tmp_path_factory):
    "JupyterLab on a copy of the chapters"
    shutil.copytree(ROOT/'nbs', work/'nbs')
    with jupyterlab(work, tmp_path_factory.mktemp('home')) as page: yield page


def shown(path):
    "How many pictures and tables (or other HTML) a chapter has saved"
    cells = json.loads((ROOT/f'nbs/{path}.ipynb').read_text(encoding='utf-8'))['cells']
    kinds = [o['data'].keys() for c in cells for o in c.get('outputs', []) if 'data' in o]
    return [sum('image/png' in k for k in kinds),
            sum(bool(k & {'text/html', 'text/markdown'}) for k in kinds)]


@pytest.mark.parametrize('path', CHAPTERS)
def test_a_chapter_runs_and_shows_what_it_shows_on_the_site(page, path):
    with Notebook(page, f'nbs/{path}.ipynb') as nb:
        nb.run_all()
        nb.until_run()
        assert nb.pictures_and_tables() == shown(path)


def test_the_chinese_tour_runs(page, work):
    words = 'tools/translate.py', 'notebooks', str(work/'zh')
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
    tour = work/'zh/00_tour.ipynb'
    copy(tour, tour, QUICK)
    with Notebook(page, 'zh/00_tour.ipynb') as nb:
        nb.run_all()
        nb.until_run()
        assert nb.pictures_and_tables() == shown('00_tour')
        nb.until_seen(0, 'cell.node.querySelector("h1")?.textContent.startsWith("导览")')


def test_a_cell_that_fails_is_seen(page, work):
    copy(ROOT/'nbs/00_tour.ipynb', work/'fails.ipynb', {'^import math': '1/0'})
    with Notebook(page, 'fails.ipynb') as nb:
        nb.run_all()
        with pytest.raises(AssertionError, match='ZeroDivisionError'): nb.until_run()


def test_a_person_trains_and_talks(page, work):
    (work/'own').mkdir()
    my_model(work/'own/copy.ipynb', pretrain=150_000, sft=40_000)  # time for some drawings
    with Notebook(page, 'own/copy.ipynb') as nb:
        train, chat = nb.number_of('with live_plot('), nb.number_of('display(chat_widget(')
        cell = f'{nb.cells}[{train}]'
        drawn = 'outputs.toJSON().find(o => o.data?.["image/png"])?.data["image/png"]'
        page.js(f'window.pictures = new Set(); {cell}.model.outputs.changed.connect('
                f'outputs => pictures.add({drawn})); 0')
        nb.run_all()
        box = 'cell.node.querySelector("input[type=text]")'
        nb.until_seen(chat, f'Boolean({box})')
        assert page.js('pictures.delete(undefined); pictures.size') > 1, 'the curves grew'
        nb.until_seen(chat, f'{box}.focus() || true')
        page.type('Where is the owl?')
        page.key('Enter', 13, '\r')
        talk = 'cell.node.querySelector(".widget-html-content")?.textContent'
        nb.until_seen(chat, f'{nb.kernel}.status === "idle" && '
                            f'/^Where is the owl.\\n./.test({talk})')
        nb.until_seen(chat, f'{box}.value === ""')
        nb.keep('chat')
        nb.until_run()
        nb.until_seen(train, 'true')
        nb.keep('trained')
