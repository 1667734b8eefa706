"""Measure the built site in a browser:  python tools/look.py [PAGE …]   (tour.html zh/faq.html)

Each page of _docs/ is opened on a desk's screen and on a phone's, in light and in dark. Nothing may
be wider than the screen but what scrolls by itself; text has to stand out from its ground, in
folded parts, too; pictures load; headings have words; the language is set; the buttons of a bar do
not cover each other (tools/look.js has the rules). Without names it looks at all pages, which takes
minutes: tests/test_look.py has some of them.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tests'))
from browser import Browser

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / '_docs'
SCREENS = (1280, 800), (390, 844)


def faults(pages, root=OUT):
    "What is wrong with the pages under `root`: line -> where"
    found, rules = {}, (ROOT / 'tools/look.js').read_text(encoding='utf-8')
    for dark in (False, True):
        with Browser(*SCREENS[0], dark=dark) as browser:
            for page in pages:
                browser.open((root / page).as_uri(), f'location.href.endsWith({page!r}) && '
                             'document.readyState == "complete"')
                browser.js('new Promise(done => setTimeout(done, 60))')  # the theme's class
                for width, height in SCREENS:
                    browser.resize(width, height)
                    where = f'{page} {width} {"dark" if dark else "light"}'
                    for line in browser.js(f'{rules}({width})'):
                        found.setdefault(line, []).append(where)
    return found


def main(pages):
    if not pages: pages = sorted(p.relative_to(OUT).as_posix() for p in OUT.rglob('*.html'))
    if not pages: sys.exit('look: no pages in _docs/: run `make docs` first')
    found = faults(pages)
    for line, where in found.items():
        more = f' and {len(where) - 3} others' if len(where) > 3 else ''
        print(f'{line}, on {", ".join(where[:3])}{more}')
    if found: sys.exit(f'look: {len(found)} faults')
    print(f'{len(pages)} pages without a fault')


if __name__ == '__main__': main(sys.argv[1:])
