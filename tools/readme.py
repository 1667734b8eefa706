"""Write README.md from nbs/index.ipynb and CONTRIBUTING.md from nbs/18_contributing.ipynb:  python tools/readme.py

Pictures among the outputs go to nbs/images/. With --check nothing is written: the exit status says whether all is up to date.
"""
import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {'README.md': 'index.ipynb', 'CONTRIBUTING.md': '18_contributing.ipynb'}


def output(out, picture, files):
    "The Markdown of one saved output; a picture goes to `files` under the name `picture`"
    data = {k: ''.join(v) for k, v in out.get('data', {}).items() if isinstance(v, str | list)}
    if 'image/png' in data:
        files[f'nbs/images/{picture}.png'] = base64.b64decode(data['image/png'])
        return f'![](images/{picture}.png)'
    if out['output_type'] == 'stream': return '```\n' + ''.join(out['text']).rstrip() + '\n```'
    for kind in ('text/markdown', 'text/html'):
        if kind in data: return data[kind].strip()
    return '```\n' + data['text/plain'].rstrip() + '\n```' if 'text/plain' in data else ''


def markdown(path, files):
    "A notebook as Markdown: prose, code that is not hidden, outputs; links as they are seen from the repository's root"
    parts = []
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source']).strip()
        flags = set(re.findall(r'^#\|\s*(\w+)', source, re.M))
        if not source or flags & {'hide', 'default_exp', 'export'}: continue
        if cell['cell_type'] == 'markdown': parts.append(source)
        elif cell['cell_type'] == 'code':
            code = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
            if code and not re.search(r'^#\|\s*echo:\s*false', source, re.M): parts.append(f'```python\n{code}\n```')
            texts = [output(out, f'{path.stem}-{cell["id"]}-{i}', files) for i, out in enumerate(cell['outputs'])]
            parts += [text for text in texts if text]
    text = '\n\n'.join(parts) + '\n'
    text = re.sub(r'(\]\(|src=")\.\./', r'\1', text)                             # ../settings.ini, seen from the root
    return re.sub(r'(\]\(|src=")(?=[\w-]+\.ipynb|images/)', r'\1nbs/', text)     # the chapters and their pictures


def main():
    files = {}
    for name, notebook in PAGES.items():
        if not (ROOT / 'nbs' / notebook).exists(): sys.exit(f'nbs/{notebook} is missing: {name} is made from it')
        files[name] = markdown(ROOT / 'nbs' / notebook, files).encode()
    stale = [name for name, data in files.items() if not (ROOT / name).exists() or (ROOT / name).read_bytes() != data]
    if '--check' in sys.argv:
        if stale: sys.exit(f'{", ".join(stale)}: not what the notebook says. Run `make readme` and commit the result.')
        return print(f'{" and ".join(PAGES)} are up to date')
    for name in stale:
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(files[name])
    print(f'wrote {", ".join(stale)}' if stale else 'already up to date')


if __name__ == '__main__': main()
