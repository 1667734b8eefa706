"""Chinese prose for the notebooks, one file a notebook: translations/zh/PATH.md for nbs/PATH.ipynb

    python tools/translate.py check            # names what is missing, stale or gone
    python tools/translate.py sync NB…         # puts in what is missing or new, in English
    python tools/translate.py stamp NB… [ID…]  # the translation (of these cells) fits the English
    python tools/translate.py notebooks [DIR]  # Chinese notebooks for JupyterLab, in zh/

Code is shared; prose exists twice: the text of a Markdown cell, and the Markdown that a cell with
`#| echo: false` gives. A file holds, for each of them,

    <!-- cell 2c0bb489 1f3a9c0d -->
    中文……

the id of the cell, and the first eight hex digits of the sha256 of the English as it was when it
was translated. What has no translation is shown in English. Headings and links are the English
ones, in number and level; a line may end between two Chinese characters. In what a cell gives the
numbers come from the run: `{0}` is the first number of the English text, whatever it is by now.

Tables, and lines of text, that other cells give as Markdown are shown in English, unless the file
ends with a list of their words for the whole page:

    <!-- outputs -->
    seed {0} => 种子 {0}
    message | => 报错
    AdamW

A line is what one cell of a table, or one line of text, says. Without `=>` it stays as it is; a
`|` behind the head of a column keeps what is below. What is no word needs no line: code, numbers,
names in capitals. `check` names the words that have no line, and the lines whose English is gone.
"""
import json
import re
import shutil
import sys
from hashlib import sha256
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
CELL = re.compile(r'^<!-- cell ([\w-]+) ([0-9a-f]{8}) -->\n', re.M)
ENGLISH = re.compile(r'^<!-- en:\n.*?\n-->\n?', re.M | re.S)  # to be translated
# Chinese characters and their punctuation
WIDE = '[\u2014\u2018-\u201d\u2026\u3000-\u303f\u3400-\u9fff\uff00-\uffef]'
NUMBER = re.compile(r'\b(?:[0-9a-f]{10}|\d[\d.,-]*(?<![.,-])(?:e[+-]\d+)?)\b')  # or a commit
CHAPTERS = '<!-- chapters -->'  # as a translation: the table of all chapters
OUTPUTS = '\n<!-- outputs -->\n'  # the list of words of the page's tables
CODE = re.compile(r'`[^`]*`|\]\([^)]*\)|\{\d+\}')  # what a translation has, too
WORD = re.compile(r'(?<![\w.=/:+<&-])[A-Za-z]*[a-z]{2}[A-Za-z]*(?![\w=(/]|\.\w)')  # not of code
TERM = re.compile(r'(.+?)( \|)?(?: =>(.*))?')  # a line of that list
FAULTS = 'stale', 'gone', 'headings', 'links', 'outputs'


# --- what is prose, and what has been translated

def prose(cell):
    "The Markdown of a cell that readers see as text, or None"
    if cell['cell_type'] == 'markdown': return ''.join(cell['source'] or '').strip()
    if cell['cell_type'] != 'code' or '#| echo: false' not in ''.join(cell['source']): return None
    found = [o['data']['text/markdown'] for o in cell['outputs']
             if 'text/markdown' in o.get('data', {})]
    return ''.join(found[0]).strip() if len(found) == 1 else None


def numbered(said):
    "A text that was printed, with `{0}` `{1}` … for its numbers"
    count = iter(range(10**6))
    return NUMBER.sub(lambda _: f'{{{next(count)}}}', said)


def english(nb):
    "Cell -> its prose as it is translated"
    said = {c['id']: (c['cell_type'], prose(c)) for c in nb['cells']}
    return {id: text if kind == 'markdown' else numbered(text)
            for id, (kind, text) in said.items() if text}


def words():
    "What stands around the Chinese text: sections of the sidebar, pieces of each page"
    return yaml.safe_load((ROOT / 'translations/zh/site.yml').read_text(encoding='utf-8'))


def digest(said): return sha256(said.encode()).hexdigest()[:8]


def file_of(path): return ROOT / 'translations/zh' / Path(path).with_suffix('.md')


def read(path):
    "Cell -> (hash, body) in the translation of a notebook; `path` is its place under nbs/"
    file = file_of(path)
    text = file.read_text(encoding='utf-8') if file.exists() else ''
    parts = CELL.split(text.partition(OUTPUTS)[0])[1:]
    return {id: (of, body.strip()) for id, of, body in zip(*[iter(parts)] * 3)}


def chinese(path):
    "Cell -> its Chinese text as it is shown, for the cells that have one"
    join = re.compile(rf'(^```.*?^```)|(?:(?<={WIDE})|(?<=\)))\n *(?=\[?{WIDE})'
                      r'|(?<=[，。：；、？！）」])\n *(?=[`\[(A-Za-z])', re.M | re.S)
    bodies = {id: ENGLISH.sub('', body).strip() for id, (_, body) in read(path).items()}
    return {id: join.sub(lambda m: m[1] or '', body) for id, body in bodies.items() if body}


def listed(text):
    "A table of chapters with the Chinese titles and promises of those that have them"
    def one(m):
        head = re.match(r'# (.+)\n+> (.+)', next(iter(chinese(m[2]).values()), ''))
        return f'[{head[1]}]({m[2]}) | {head[2]} |' if head else m[0]
    text = re.sub(r'\[([^]]+)\]\(([^)#]+\.ipynb)\) \|([^|]*)\|', one, text)
    for old, new in words()['sections'].items(): text = text.replace(f'**{old}**', f'**{new}**')
    return text.replace('| chapter | what it is about | module |', '| 章 | 讲什么 | 模块 |')


def printed(text, said):
    "What a cell printed in English, in Chinese: with the numbers that there are now"
    if said == CHAPTERS: return listed(text)
    found = dict(enumerate(NUMBER.findall(text)))
    return re.sub(r'\{(\d+)\}', lambda m: found.get(int(m[1]), m[0]), said)


# --- the tables that cells give

def terms(path):
    "English -> (Chinese, whether it heads a column that stays), or None where there is no list"
    file = file_of(path)
    text = file.read_text(encoding='utf-8') if file.exists() else ''
    if OUTPUTS not in text: return None
    lines = [TERM.fullmatch(line) for line in text.partition(OUTPUTS)[2].split('\n') if line]
    return {m[1]: (m[1] if m[3] is None else m[3].strip(), bool(m[2])) for m in lines}


def tables(nb):
    "The outputs, as Markdown, of the cells whose code is shown"
    return [out['data'] for c in nb['cells'] if c['cell_type'] == 'code' and prose(c) is None
            for out in c['outputs'] if 'text/markdown' in out.get('data', {})]


def stays(head, known): return known.get(numbered(head), ('', False))[1]


def reworded(text, change):
    "Markdown with each line and each cell of its tables changed: change(text, head of its column)"
    heads, lines = None, []
    for line in text.split('\n'):
        cells = [cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]]
        if not line.startswith('|'):
            heads, line = None, change(line, '')
        elif heads is None:
            heads, line = cells, f'| {" | ".join(change(cell, "") for cell in cells)} |'
        elif line.strip('|:- '):
            line = f'| {" | ".join(map(change, cells, heads))} |'
        lines.append(line)
    return '\n'.join(lines)


def translate(nb, path):
    "Put the Chinese prose of a notebook into its cells, and the Chinese words into its tables"
    said, known = chinese(path), terms(path)
    def word(text, head):
        new = '' if stays(head, known) else known.get(numbered(text), [''])[0]
        return printed(text, new) if new else text
    for data in tables(nb) if known else []:
        data['text/markdown'] = reworded(''.join(data['text/markdown']), word)
    for cell in nb['cells']:
        if cell.get('id') not in said or prose(cell) is None: continue
        if cell['cell_type'] == 'markdown': cell['source'] = said[cell['id']]
        for out in cell.get('outputs', []):
            if 'text/markdown' in out.get('data', {}):
                out['data']['text/markdown'] = printed(prose(cell), said[cell['id']])
    return nb


# --- how it stands

def without_code(said): return re.sub(r'^```.*?^```', '', said, flags=re.M | re.S)


def headings(said): return [len(marks) for marks in re.findall(r'^(#+) ', without_code(said), re.M)]


def links(said): return sorted(re.findall(r'\]\(([^)\s]+)\)', said))


def state(path, cells):
    "What is wrong with the translation of a notebook with this English prose: kind -> cells"
    done, said = read(path), chinese(path)
    both = [id for id in cells if id in said and said[id] != CHAPTERS]
    return dict(missing=[id for id in cells if id not in said],
                stale=[id for id in both if done[id][0] != digest(cells[id])],
                gone=[id for id in done if id not in cells],
                headings=[id for id in both if headings(said[id]) != headings(cells[id])],
                links=[id for id in both if links(said[id]) != links(cells[id])])


def spoken(path, nb):
    "What a notebook's tables say, in its order -> whether that has words, and so needs a line"
    known, found = terms(path) or {}, {}
    def note(text, head):
        if text and not stays(head, known):
            found[numbered(text)] = bool(WORD.search(CODE.sub('', text)))
        return text
    for data in tables(nb): reworded(''.join(data['text/markdown']), note)
    return found


def unlike(path, nb):
    "The lines in the list of words that are missing, gone, or have other code, numbers or links"
    known, now = terms(path), spoken(path, nb)
    if known is None: return []
    def parts(text): return sorted(CODE.findall(text))
    return ([text for text, needed in now.items() if needed and not known.get(text, [''])[0]]
            + [text for text in known if text not in now]
            + [text for text, (new, _) in known.items() if new and parts(new) != parts(text)])


def notebooks():
    "Place under nbs/ -> notebook"
    paths = sorted((ROOT / 'nbs').rglob('*.ipynb'))
    return {p.relative_to(ROOT / 'nbs'): json.loads(p.read_text(encoding='utf-8'))
            for p in paths if '.ipynb_checkpoints' not in p.parts}


def check():
    "Print how each translated chapter stands; the number of faults"
    faults, rows, without, known = [], [], [], notebooks()
    for path, nb in known.items():
        if not file_of(path).exists():
            without.append(path.stem)
            continue
        cells = english(nb)
        wrong = state(path, cells) | dict(outputs=unlike(path, nb))
        rows.append([str(path), len(cells), *(len(ids) or '' for ids in wrong.values())])
        faults += [f'{file_of(path).relative_to(ROOT)}, {id}: {kind}'
                   for kind in FAULTS for id in wrong[kind]]
    files = (ROOT / 'translations/zh').rglob('*.md')
    faults += [f'{f.relative_to(ROOT)}: no such notebook' for f in files
               if f not in {file_of(path) for path in known}]
    for row in [['Chinese', 'cells', 'missing', *FAULTS], *rows]:
        print('  '.join([f'{row[0]:32}', *(f'{n:>8}' for n in row[1:])]).rstrip())
    print(f'{len(without)} chapters have no translation: {", ".join(without)}')
    for fault in faults: print(fault)
    if faults: print('`sync NB` puts the English beside what is stale; `stamp NB` when it is done')
    return len(faults)


# --- what a translator does

def write(path, parts, words=None):
    "Write a translation: (cell, hash, body) each, and the list of words of its tables"
    file_of(path).parent.mkdir(parents=True, exist_ok=True)
    words = terms(path) if words is None else words
    text = '\n'.join(f'<!-- cell {id} {of} -->\n{body}\n' for id, of, body in parts)
    if words is not None:
        lines = [f'{old}{" |" * below}' + (f' => {new}'.rstrip() if new != old else '')
                 for old, (new, below) in words.items()]
        text += OUTPUTS + '\n'.join([*lines, ''])
    file_of(path).write_text(text, encoding='utf-8')


def sync(path, cells, nb):
    "Put the English of what is missing or stale beside what there is, in the notebook's order"
    done, wrong, parts = read(path), state(path, cells), []
    for id, said in cells.items():
        of, body = done.get(id, (digest(said), ''))
        body = ENGLISH.sub('', body).strip()
        if id in wrong['missing'] + wrong['stale']:
            body = f'<!-- en:\n{said.replace("-->", "--&gt;")}\n-->\n{body}'.strip()
        parts.append((id, digest(said) if id in wrong['missing'] else of, body))
    known = terms(path)
    words = None if known is None else {
        text: known.get(text, ('', False)) for text, needed in spoken(path, nb).items()
        if needed or text in known}
    write(path, parts, words)


def stamp(path, cells, only=()):
    "The translation fits the English that there is now"
    write(path, [(id, of, body) if id not in cells or (only and id not in only)
                 else (id, digest(cells[id]), ENGLISH.sub('', body).strip() or body)
                 for id, (of, body) in read(path).items()])


def write_notebooks(folder):
    "Copy nbs/ to a folder, with Chinese prose where there is some; links lead where they did"
    ignore = shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__')
    shutil.copytree(ROOT / 'nbs', folder, dirs_exist_ok=True, ignore=ignore)
    for path, nb in notebooks().items():
        if not file_of(path).exists(): continue
        text = json.dumps(translate(nb, path), ensure_ascii=False, indent=1)
        (folder / path).write_text(text + '\n', encoding='utf-8')


def main(args):
    word, *rest = args or ['']
    names = [Path(a).resolve() for a in rest if a.endswith('.ipynb')]
    ids = [a for a in rest if not a.endswith('.ipynb')]
    if word == 'check': sys.exit(bool(check()))
    elif word in ('sync', 'stamp') and names:
        for path in (name.relative_to(ROOT / 'nbs') for name in names):
            cells = english(nb := notebooks()[path])
            if word == 'sync': sync(path, cells, nb)
            else: stamp(path, cells, ids)
    elif word == 'notebooks':
        write_notebooks(folder := Path(*rest[:1] or [ROOT / 'zh']))
        print(f'wrote {folder}: open it in JupyterLab')
    else: sys.exit(__doc__)


if __name__ == '__main__': main(sys.argv[1:])
