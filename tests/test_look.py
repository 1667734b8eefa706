"What a browser shows of the site: made-up pages with faults, and some of the real ones"
import sys
from pathlib import Path

import pytest

from browser import Browser, find_browser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tools'))
import look

ROOT = look.ROOT
if not find_browser(): pytest.skip('no chromium', allow_module_level=True)

HTML = ('<!doctype html><html lang="{lang}"><meta name="viewport" content="width=device-width">'
        '<body style="background: #fff"><main>{body}</main></body></html>')
SOUND = '''<h1>Words</h1><p style="color: #666">grey</p>
<div style="overflow-x: auto"><pre style="width: 3000px">wide, and scrolls by itself</pre></div>'''
FAULTS = {
    'sticks out: main > p': '<p style="width: 5000px">wide</p>',
    'an empty heading': '<h2> </h2>',
    'no picture: ': '<img alt="a" src="data:image/png;base64,AAAA">',
    'pale (2.8 : 1)': '<p style="color: #999">grey</p>',
    'pale (2.3 : 1)': '<details><p style="color: #aaa">in a folded part, too</p></details>',
    'pale (1.0 : 1)': '<div style="background: #222"><p style="color: #222">dark</p></div>',
}


def test_faults_of_a_page_are_named(tmp_path):
    (tmp_path/'zh').mkdir()
    (tmp_path/'sound.html').write_text(HTML.format(lang='en', body=SOUND))
    (tmp_path/'zh/page.html').write_text(HTML.format(lang='en', body=SOUND))
    (tmp_path/'bad.html').write_text(HTML.format(lang='en', body=''.join(FAULTS.values())))
    found = look.faults(['sound.html', 'zh/page.html', 'bad.html'], tmp_path)
    on = {page: {line for line, where in found.items() if any(w.startswith(page) for w in where)}
          for page in ('sound', 'zh/page', 'bad')}
    assert on['sound'] == set()
    assert on['zh/page'] == {'the language is not zh-CN'}
    missed = [f for f in FAULTS if not any(line.startswith(f) for line in on['bad'])]
    assert missed == []
    assert 'the page is wider than the screen' in on['bad']


# --- the pages of the built site

built = pytest.mark.skipif(not (ROOT/'_docs/site.js').exists(), reason='no site: make docs')


@built
def test_pages_of_the_site_have_no_faults():
    assert look.faults(['index.html', 'zh/faq.html', 'zh/1_data/packing.html', 'api.html']) == {}


@pytest.fixture
def phone():
    with Browser(*look.SCREENS[1], dark=True) as phone:
        phone.open((ROOT/'_docs/zh/faq.html').as_uri(),
                   'document.querySelectorAll("details.contents").length')
        yield phone


@built
def test_a_phone_has_the_whole_menu_and_the_contents(phone):
    side = 'document.querySelector("#quarto-sidebar")'
    assert phone.js(f'getComputedStyle({side}).visibility') == 'hidden', 'the Tab key passes it by'
    phone.js('document.querySelector(".quarto-btn-toggle").click()')
    phone.until(f'{side}.getBoundingClientRect().left == 0')
    place = phone.js(f'{side}.querySelector(".active").getBoundingClientRect().top')
    assert 50 < place < 844, 'where one is'
    phone.js(f'{side}.scrollTop = 1e6')
    assert phone.js(f'[...{side}.querySelectorAll("a")].filter(a => a.getClientRects().length)'
                    '.pop().getBoundingClientRect().bottom') <= 844, 'its last entry can be reached'
    links = 'document.querySelectorAll("details.contents a, #TOC a")'
    hrefs = phone.js(f'[...{links}].map(a => a.hash)')
    assert hrefs and hrefs[:len(hrefs) // 2] == hrefs[len(hrefs) // 2:]


@built
def test_paper_is_light(phone):
    def dark(): return phone.js('document.documentElement.classList.contains("quarto-dark")')
    def ground(): return phone.js('getComputedStyle(document.body).backgroundColor')
    phone.until('document.documentElement.classList.contains("quarto-dark")')
    screen = ground()
    phone.js('dispatchEvent(new Event("beforeprint"))')
    assert not dark() and ground() == 'rgb(255, 255, 255)' != screen
    phone.js('dispatchEvent(new Event("afterprint"))')
    assert dark() and ground() == screen
