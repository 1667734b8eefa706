"""Write README.md and README.zh.md from nbs/index.ipynb, CONTRIBUTING.md from its notebook:

    python tools/readme.py [--check]

Prose, code and saved outputs are taken as they are; a cell with `#| echo: false` gives its output
only, one with `#| readme: false` is for the site, and folded imports are left out. So a number that
a cell reads from a stored result stands in the README as the notebook shows it; the reading times
of the paths come from tools/guide.py, Chinese prose from translations/zh. Pictures go to
nbs/images/. With --check nothing is written: the exit status says whether all is up to date.
"""
import ast
import base64
import json
import os
import re
import sys
from html import escape, unescape
from pathlib import Path
from urllib.parse import unquote

sys.path.insert(0, str(Path(__file__).resolve().parent))
import guide
import translate

ROOT = Path(__file__).resolve().parent.parent
PAGES = {'README.md': 'index.ipynb', 'README.zh.md': 'index.ipynb',
         'CONTRIBUTING.md': 'contributing.ipynb'}
OTHER = {'README.md': '[中文](README.zh.md)', 'README.zh.md': '[English](README.md)'}
LEFT_OUT = {'hide', 'default_exp', 'export', 'code-fold'}


def directives(source):
    "The directives of a cell: name -> value"
    return dict(re.findall(r'^#\|\s*([\w-]+):?[ \t]*(.*?)\s*$', source, re.M))


def picture_words(out, options, heading):
    "What a picture shows, in words: as the cell says, or its heading and what is written in it"
    if alt := options.get('fig-alt'): return alt.strip('"\'')
    data = '\n'.join(out.get('metadata', {}).get('data', []))  # as tools/chapters.py saves it
    written = re.findall(r'^axes \w+ \w+ (\[.*\]) =', data, re.M)
    words = [w for words in written for w in ast.literal_eval(words)]
    return ': '.join(filter(None, [heading, ', '.join(dict.fromkeys(words))])).replace('\n', ' ')


def output(out, picture, words, files):
    "The Markdown of one saved output; a picture goes to `files` under the name `picture`"
    data = {k: ''.join(v) for k, v in out.get('data', {}).items() if isinstance(v, str | list)}
    if 'image/png' in data:
        png = files[f'nbs/images/{picture}.png'] = base64.b64decode(data['image/png'])
        width = int.from_bytes(png[16:20]) // 2  # drawn with two pixels for one
        return f'<img src="images/{picture}.png" alt="{escape(words)}" width="{width}">'
    if out['output_type'] == 'stream': return '```\n' + ''.join(out['text']).rstrip() + '\n```'
    for kind in ('text/markdown', 'text/html'):
        if kind in data: return data[kind].strip()
    return '```\n' + data['text/plain'].rstrip() + '\n```' if 'text/plain' in data else ''


def relink(text, folder):
    "The links of a notebook in `folder` as they are seen from the repository's root"
    def one(m):
        path = (ROOT / folder / unquote(unescape(m[2]))).resolve()
        known = path.exists() or path.parent == ROOT / 'nbs/images'
        ours = known and path.is_relative_to(ROOT)
        return f'{m[1]}{os.path.relpath(path, ROOT)}' if ours else m[0]
    return re.sub(r'(\]\(|\b(?:src|href)=")([^)":#\s]+)(?=[#)"\s])', one, text)


def titles(nb):
    "The headings of a notebook"
    text = '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
    return re.findall(r'^#+ (.+)$', translate.without_code(text), re.M)


def anchor(heading): return re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')


def chinese(nb, path):
    "A notebook with Chinese prose, and the places on its page: anchor in English -> in Chinese"
    before = titles(nb)
    translate.translate(nb, path)
    return nb, dict(zip(map(anchor, before), map(anchor, titles(nb))))


def markdown(path, files, lang='en'):
    "A notebook as Markdown; its pictures go to `files`"
    nb, at, parts, heading = json.loads(path.read_text(encoding='utf-8')), {}, [], ''
    if lang == 'zh': nb, at = chinese(nb, path.relative_to(ROOT / 'nbs'))
    took = {guide.name(p): guide.minutes(cells) for p, cells in guide.notebooks().items()}
    for cell in nb['cells']:
        source = ''.join(cell['source']).strip()
        options = directives(source) if cell['cell_type'] == 'code' else {}
        if not source or LEFT_OUT & set(options) or options.get('readme') == 'false': continue
        if cell['cell_type'] == 'markdown':
            heading = ([heading] + re.findall(r'^#+ (.+)$', source, re.M))[-1]
            paths = '<!-- paths -->' in source
            parts.append(guide.with_minutes(source, took, lang) if paths else source)
        elif cell['cell_type'] == 'code':
            code = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
            if code and options.get('echo') != 'false':  # what follows without a word goes together
                apart = not parts or not parts[-1].startswith('```python')
                before = '```python' if apart else parts.pop()[:-3]
                parts.append(f'{before}\n{code}\n```')
            for i, out in enumerate(cell['outputs']):
                name = f'{path.stem}-{cell["id"]}-{i}'
                words = picture_words(out, options, heading)
                if text := output(out, name, words, files): parts.append(text)
    text = relink('\n\n'.join(parts) + '\n', path.parent)
    return re.sub(r'(?<=\]\(#)[\w-]+(?=\))', lambda m: at.get(m[0], m[0]), text)


def main():
    files = {}
    for name, notebook in PAGES.items():
        path = ROOT / 'nbs' / notebook
        if not path.exists(): sys.exit(f'nbs/{notebook} is missing: {name} is made from it')
        text = markdown(path, files, 'zh' if '.zh.' in name else 'en')
        if name in OTHER: text = text.replace('\n\n', f'\n\n{OTHER[name]}\n\n', 1)
        files[name] = text.encode()
    def agrees(name): return (ROOT / name).exists() and (ROOT / name).read_bytes() == files[name]
    stale = [name for name in files if not agrees(name)]
    ours = [p for notebook in {*PAGES.values()}
            for p in (ROOT / 'nbs/images').glob(f'{Path(notebook).stem}-*.png')]
    left = [p for p in ours if str(p.relative_to(ROOT)) not in files]  # of cells that are gone
    if '--check' in sys.argv:
        if stale or left:
            names = ', '.join([*stale, *(p.name for p in left)])
            sys.exit(f'{names}: not what the notebook says. Run `make readme`, commit the result.')
        return print(f'{" and ".join(PAGES)} are up to date')
    for name in stale:
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(files[name])
    for p in left: p.unlink()
    print(f'wrote {", ".join(stale)}' if stale else 'already up to date')


if __name__ == '__main__': main()
