"The chat page in a browser, at the width of a desk and of a telephone"
import os, re, time
from importlib.resources import files
from pathlib import Path

import pytest, torch

from browser import Browser, browser_version, find_browser
from lm_nb.data.instructions import Example, encode_examples
from lm_nb.data.packing import SFTBatches
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.inference.chat import Chat
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.use import serve as serving_module
from lm_nb.use.serve import Served, serving

for name in ('starlette', 'uvicorn', 'websocket', 'openai', 'httpx'): pytest.importorskip(name)
from serve_load import record  # noqa: E402

pytestmark = pytest.mark.skipif(not find_browser(), reason='needs Chromium')

LESSONS = [Example('Hello!', 'Hello, traveller! 🙂 Ask me about the river.'),
           Example('你好！', '你好，旅人！🙂 问我这条河吧。'),
           Example('<b>&', '<img src=x onerror="document.title=1"> & so on')]
READY = 'typeof models !== "undefined" && models.length > 0'
DONE = '!running.size && turns.length'


@pytest.fixture(scope='module')
def models():
    "A model that has learned three answers by heart, in two roles"
    tok = Tokenizer.train([text for e in LESSONS for text in (e.prompt, e.answer)], 312)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=len(tok), context=128, n_layer=2, n_head=2, d_model=48))
    feed = SFTBatches(tok, encode_examples(tok, LESSONS, 128), context=128, rows=3, packed=False)
    opt = torch.optim.AdamW(gpt.parameters(), lr=1e-2, weight_decay=0)
    for step in range(160):
        opt.param_groups[0]['lr'] = 1e-2 * min(1, 2*(1 - step/160))
        opt.zero_grad()
        for b in feed(step): (gpt(b.x, doc=b.doc, targets=b.y) / (b.y >= 0).sum()).backward()
        opt.step()
    about = dict(examples=[e.prompt for e in LESSONS], system=False, turns=False)
    return [Served('m/base', gpt, tok, False), Served('m/chat', gpt, tok, True, about)]


@pytest.fixture(scope='module')
def url(models):
    with serving(models) as url: yield url


@pytest.fixture(params=[1280, 390])
def page(request, url):
    with Browser(request.param, 780) as page:
        page.open(f'{url}/?lang=en', READY)
        yield page
        assert not page.errors
        assert all(a.startswith((url, 'data:')) for a in page.asked), 'it asks nobody else'
        assert page.js('document.documentElement.scrollWidth') <= request.param
        if folder := os.environ.get('PICTURES'):  # to be looked at
            page.picture(Path(folder)/f'{request.node.name}.png')


def ask(page, text):
    page.js('$("text").focus()')
    page.type(text)
    page.key('Enter', 13, '\r')
    page.until(DONE)


def said(page, model='chat', turn=-1):
    return page.js(f'''[...document.querySelectorAll(".turn")].at({turn}).querySelector(
        '.said[aria-label="m/{model}"]').textContent''')


def test_it_answers_and_shows_how_sure_it_was(page, models):
    for e in LESSONS:
        ask(page, e.prompt)
        assert said(page) == e.answer, 'text is text, whatever it spells'
    assert page.js('document.title') == 'm/base | m/chat'
    record('chromium', 'Chromium', f'answers on the page, {page.js("innerWidth")} px wide',
           [True] * len(LESSONS), browser_version())
    page.js('globalThis.box = document.querySelectorAll(".said")[0]')
    pieces = page.js('[...box.querySelectorAll(".t")].map(t => t.textContent)')
    assert ''.join(pieces) == LESSONS[0].answer and len(pieces) > 5
    smile = '[...box.querySelectorAll(".t")].find(t => t.textContent.includes("🙂"))'
    assert page.js(f'{smile}.textContent.length') <= 3, 'the bytes of a character stand together'
    assert all(0 <= float(u) <= 1 for u in page.js(
        '[...box.querySelectorAll(".t")].map(t => t.style.getPropertyValue("--u"))'))


def test_the_number_is_under_the_pointer_and_under_the_arrows(page):
    ask(page, 'Hello!')
    x, y = page.js('(() => { const r = document.querySelectorAll(".t")[2].getBoundingClientRect();'
                   'return [r.x + r.width/2, r.y + r.height/2] })()')
    page.move(x, y)
    page.until('!$("tip").hidden')
    tip, p = page.js('$("tip").textContent'), page.js('document.querySelectorAll(".t")[2].tip[0].p')
    assert re.search(r'\d %', tip) and 0 < p <= 1
    page.move(1, 1)
    page.until('$("tip").hidden')
    page.js('document.querySelector(".said").focus()')
    for _ in range(2): page.key('ArrowRight', 39)
    assert page.js('[...document.querySelectorAll(".t")].indexOf(pointed)') == 1
    assert page.js('document.querySelectorAll(".t.on").length') == 1
    page.key('Escape', 27)
    assert page.js('$("tip").hidden')


def test_base_and_chat_side_by_side(page):
    page.js('$("model").value = "*"')
    ask(page, 'Hello!')
    assert said(page) == LESSONS[0].answer and said(page, 'base').startswith('Hello!')
    left, right = page.js('[...document.querySelectorAll(".answer")].map(a => '
                          '[a.getBoundingClientRect().x, a.getBoundingClientRect().y])')
    beside = left[1] == right[1]
    assert beside == (page.js('innerWidth') > 640)


def test_settings_reach_the_model(page, models):
    chat = Chat(models[1].gpt, models[1].tok, system='A river.', max_new=7)
    page.js('$("system").value = "A river."; $("length").value = 7; $("memory").value = "999"')
    for text in ('Hello!', '你好！'):
        ask(page, text)
        assert said(page) == chat.ask(text)
        chat.turns[-1] = text, chat.tok.encode(said(page))
    assert 'no notice' in page.js('$("log").textContent'), 'a system text that no record had'
    page.js('$("temperature").value = 1.5; $("system").value = ""; $("length").value = 90')
    page.js('$("memory").value = "0"')
    texts = set()
    for _ in range(30):  # how sure the model is of one answer differs between machines
        ask(page, 'river?')
        texts.add(said(page))
        if len(texts) > 1: break
    assert len(texts) > 1
    page.js('document.querySelector("#new").click()')
    assert page.js('turns.length') == 0 and not page.js('document.querySelector(".turn")')


def test_an_answer_that_is_too_long_for_the_past(page, models):
    page.js('$("memory").value = "999"; $("length").value = 60')
    for _ in range(4): ask(page, 'Hello!' * 30)
    assert 'left out' in page.js('$("log").textContent')
    ask(page, 'Hello!' * 99)
    assert 'shorten it' in page.js('document.querySelector(".error").textContent')
    page.errors.clear()  # Chromium notes every status 400


def test_it_streams_and_stops(page, monkeypatch):
    step = serving_module._step
    monkeypatch.setattr(serving_module, '_step', lambda *a: (time.sleep(.1), step(*a))[1])
    page.js('$("text").value = "Hello!"; $("form").requestSubmit()')
    page.until('document.querySelectorAll(".t").length > 2')
    assert page.js('running.size') == 1 and page.js('$("send").textContent') == 'Stop'
    page.click('#send')
    page.until('!running.size', 2)
    assert 'stopped' in page.js('$("log").textContent')
    n = page.js('document.querySelectorAll(".t").length')
    time.sleep(.3)
    assert page.js('document.querySelectorAll(".t").length') == n
    assert LESSONS[0].answer.startswith(said(page)) and said(page) != LESSONS[0].answer


def test_two_languages(page):
    english = page.js('document.body.innerText')
    page.click('#lang')
    assert page.js('document.documentElement.lang') == 'zh-CN'
    assert '新对话' in page.js('document.body.innerText') and 'New chat' in english
    assert page.js('$("text").placeholder') == '问点什么'
    assert '你好！' in page.js('$("log").textContent')
    words = page.js('Object.keys(WORDS.en).join() === Object.keys(WORDS.zh).join()')
    assert words, 'every word is there in both'


def test_an_example_is_a_question(page):
    page.click('.hello button')
    page.until(DONE)
    assert said(page) == LESSONS[0].answer


def luminance(rgb):
    parts = [int(x) / 255 for x in re.findall(r'\d+', rgb)[:3]]
    linear = [x / 12.92 if x <= .04045 else ((x + .055) / 1.055)**2.4 for x in parts]
    return .2126*linear[0] + .7152*linear[1] + .0722*linear[2]


@pytest.mark.parametrize('dark', [False, True])
def test_light_and_dark_can_be_read(url, dark):
    with Browser(1280, 780, dark) as page:
        page.open(url, READY)
        style = 'getComputedStyle(document.querySelector("{}")).{}'
        colour = lambda e, what: luminance(page.js(style.format(e, what)))
        paper = colour('body', 'backgroundColor')
        assert (paper < .1) == dark
        for e in ('body', 'summary', '.hello'):
            low, high = sorted([paper, colour(e, 'color')])
            assert (high + .05) / (low + .05) > 4.5, e


def test_a_key_is_asked_for(models):
    with serving(models, api_key='sesame') as url, Browser(1280, 780) as page:
        page.open(f'{url}/?lang=en', 'typeof models !== "undefined" && $("more").open')
        page.type('sesame')
        page.key('Enter', 13, '\r')
        page.until(READY)
        ask(page, 'Hello!')
        assert said(page) == LESSONS[0].answer


def test_it_has_no_address_but_its_own():
    text = (files('lm_nb.use')/'page.html').read_text(encoding='utf-8')
    assert not re.search('https?:|innerHTML|eval', text)
    assert "default-src 'none'" in serving_module._PAGE_POLICY
