"""Build the documentation site in _docs/:  python tools/site.py

Each chapter becomes a page source under _proc/, in the folder of its part: nbdev's processors apply
the directives and remove hidden cells; here each exported definition gets its signature, its table
of parameters and a link to its source, imports are folded, pictures get a text, and names in
backticks lead to what the page means by them. A chapter that is translated (tools/translate.py)
has a second page under zh/, with the same anchors. `smalldocs` renders these pages. Then formulas
become MathML, every link is followed, and the terms of tools/search.txt are looked for: a page that
leads nowhere, that would ask the network for anything, or that is not found fails the build.
"""
import ast
import base64
import io
import json
import math
import os
import re
import shutil
import sys
import time
import tokenize
from copy import deepcopy
from functools import cache
from html import escape, unescape
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

os.environ['IN_TEST'] = '1'
sys.path.insert(0, str(Path(__file__).resolve().parent))
from fastcore.nbio import mk_cell, read_nb, write_nb
from latex2mathml.converter import convert
from nbdev.doclinks import patch_name
from nbdev.processors import FilterDefaults, add_links, add_show_docs, clean_magics, exec_show_docs
import yaml
from smalldocs.markdown import pandoc_id

import guide
import translate
from guide import page

ROOT = Path(__file__).resolve().parent.parent
NBS, PROC, OUT = ROOT / 'nbs', ROOT / '_proc', ROOT / '_docs'
Def, Import = ast.FunctionDef | ast.ClassDef, ast.Import | ast.ImportFrom
LINK = re.compile(r'(?P<open>\]\(|\b(?:href|src)=")(?P<path>[^)":#\s]+)(?=[#)"\s])')
sources = {}  # source page -> the file that it shows


# --- reading a notebook

def only_imports(node):
    "Whether a statement does nothing but import; types are imported under a condition"
    guarded = isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING'
    return isinstance(node, Import) or (guarded and all(isinstance(n, Import) for n in node.body))


def flags(cell): return set(re.findall(r'^#\|\s*([\w-]+)', cell.source or '', re.M))


@cache
def parsed(source):
    "The statements of some code, magics aside; none where it is not Python"
    if source.startswith('%%'): return []
    try: return ast.parse(re.sub(r'^(\s*)[%!].*', r'\1pass', source, flags=re.M)).body
    except SyntaxError: return []


def body(cell): return parsed(cell.source or '') if cell.cell_type == 'code' else []


def module_of(nb):
    "The module that a notebook exports, or None"
    found = (re.search(r'^#\|\s*default_exp\s+(\S+)', c.source, re.M) for c in nb.cells)
    return next((m[1] for m in found if m), None)


def exports(nb):
    "The definitions that a notebook exports under public names: name -> node"
    nodes = [n for c in nb.cells if 'export' in flags(c) for n in body(c) if isinstance(n, Def)]
    return {patch_name(n): n for n in nodes if n.name[0] != '_'}


def methods(node):
    "The methods of a class; none of a function"
    if not isinstance(node, ast.ClassDef): return []
    return [n for n in node.body if isinstance(n, ast.FunctionDef)]


def members(node):
    "The names of a class's fields and methods"
    if not isinstance(node, ast.ClassDef): return []
    fields = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]
    return fields + [n.name for n in methods(node)]


def headings(cell):
    "The titles of a Markdown cell, as words"
    if cell.cell_type != 'markdown': return []
    text = re.sub(r'^```.*?^```', '', cell.source, flags=re.M | re.S)
    lines = re.findall(r'^#+ (.+)$', text, re.M)
    return [re.sub(r'[`$*]|\s*\{#[^}]*\}', '', line) for line in lines]


def anchors(nb):
    "Exported name -> its anchor on the page: in small letters, where that is not another's"
    names = list(exports(nb))
    small = [n.lower() for n in names]
    taken = {pandoc_id(words) for cell in nb.cells for words in headings(cell)}
    def free(n):
        if small.count(n.lower()) == 1 and n.lower() not in taken: return n.lower()
        return n if n not in taken else f'def-{n}'
    return {n: free(n) for n in names}


# --- the API documentation of one definition, read from its code: nothing is imported

def parameters(node, method=False):
    "Name, type, default and place of each parameter of a function, or of each field of a class"
    if isinstance(node, ast.ClassDef):
        if init := next((n for n in methods(node) if n.name == '__init__'), None):
            return [row for row in parameters(init, method=True) if row[0] != 'returns']
        fields = (n for n in node.body if isinstance(n, ast.AnnAssign))
        return [(n.target.id, n.annotation, n.value, n) for n in fields]
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    static = any(isinstance(d, ast.Name) and d.id == 'staticmethod' for d in node.decorator_list)
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    rows = [(p.arg, p.annotation, d, p) for p, d in zip(plain, defaults)]
    if a.vararg: rows.append(('*' + a.vararg.arg, a.vararg.annotation, None, a.vararg))
    rows += [(p.arg, p.annotation, d, p) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: rows.append(('**' + a.kwarg.arg, a.kwarg.annotation, None, a.kwarg))
    if node.returns: rows.append(('returns', node.returns, None, node.returns))
    return rows[1:] if method and not static else rows


def comments(source):
    "Line -> comment"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip('# ') for t in tokens if t.type == tokenize.COMMENT}


def inline(text):
    "A docstring or a comment as HTML: backticks are code"
    return re.sub(r'`([^`]+)`', r'<code>\1</code>', escape(text or '', quote=False))


def code(node): return f'<code>{escape(ast.unparse(node))}</code>' if node is not None else ''


def row(cells, tag='td'): return f'<tr>{"".join(f"<{tag}>{c}</{tag}>" for c in cells)}</tr>'


def table(head, rows):
    if not rows: return ''
    top, cells = row(head, 'th'), ''.join(row(cells) for cells in rows)
    inner = f'<table><thead>{top}</thead><tbody>{cells}</tbody></table>'
    return f'<div class="scroll">{inner}</div>'


def call(name, node, method=False):
    "How it is called: name, parameters, and what it gives"
    gives = f' → {ast.unparse(node.returns)}' if getattr(node, 'returns', None) else ''
    names = ', '.join(row[0] for row in parameters(node, method) if row[0] != 'returns')
    return f'{name}({names}){gives}'


def summary(node): return (ast.get_docstring(node) or '').split('\n')[0]


def api(node, name, anchor, source, notes):
    "The heading of an exported definition, its source, and, folded, its parameters and methods"
    patched = '.' in name
    known = parameters(node, patched)
    last = {at.end_lineno: n for n, *_, at in known}  # whom a line's comment is about
    rows = [(f'<code>{n}</code>', code(t), code(d),
             inline(notes.get(at.end_lineno) if last[at.end_lineno] == n else ''))
            for n, t, d, at in known]
    calls = [(f'<code>{escape(call(m.name, m, method=True))}</code>', inline(ast.get_docstring(m)))
             for m in methods(node) if m.name[0] != '_']
    tables = table(['parameter', 'type', 'default', ''], rows) + table(['method', ''], calls)
    head = f'<code>{escape(call(name, node, patched))}</code>'
    folded = f'<details><summary>{head}</summary>{tables}</details>' if tables else '<span></span>'
    link = f'<a class="api-source" href="{source}">source</a>'
    return (f'### `{name}` {{#{anchor} .api-name}}\n\n'
            f'```{{=html}}\n<div class="api">{folded}{link}</div>\n```\n')


def documented(cell, module, anchor, up):
    "An exported cell's code, with the API documentation of what it defines before it"
    cell.source = re.sub(r'\A(#\|.*\n)+', '', cell.source)
    text = (ROOT / 'lm_nb' / Path(*module.split('.')).with_suffix('.py')).read_text()
    lines = {patch_name(n): n.lineno for n in parsed(text) if isinstance(n, Def)}
    notes, docs = comments(cell.source), []
    for n in body(cell):
        if not isinstance(n, Def) or n.name[0] == '_': continue
        name = patch_name(n)
        source = f'{up}source/{module}.html#code-{lines.get(name, 1)}'
        docs.append(mk_cell(api(n, name, anchor[name], source, notes), 'markdown'))
    return [*docs, mk_cell('::::: {.exported}', 'markdown'), cell, mk_cell(':::::', 'markdown')]


# --- a chapter becomes a page source

def fold(cell, words):
    "A cell of imports: there to be copied, but folded"
    code = re.sub(r'\A(#\|.*\n)+', '', cell.source)
    cell.source = f'#| code-fold: true\n#| code-summary: {words}\n{code}'
    return cell


def picture_words(cell, heading):
    "What a picture shows: the heading above it, and what is written in it or the line that drew it"
    words = []
    for out in cell.get('outputs', []):
        for line in out.get('metadata', {}).get('data', []):  # as tools/chapters.py saves it
            if m := re.match(r'axes \w+ \w+ (\[.*\]) =', line): words += ast.literal_eval(m[1])
    lines = [line.strip() for line in cell.source.splitlines() if line.strip() and line[0] != '#']
    return f'{heading}: {", ".join(dict.fromkeys(words)) or (lines[-1] if lines else "picture")}'


def document(nb, anchor, up=''):
    "Show imports folded, exported code with its API documentation, and pictures with a text"
    module, heading, cells = module_of(nb), '', []
    for cell in nb.cells:
        heading = ([heading] + headings(cell))[-1]
        flag, nodes = flags(cell), body(cell)
        kinds = [kind for out in cell.get('outputs', []) for kind in out.get('data', {})]
        if any(kind.startswith('image/') for kind in kinds) and 'fig-alt' not in flag:
            words = json.dumps(picture_words(cell, heading), ensure_ascii=False)
            cell.source = f'#| fig-alt: {words}\n{cell.source}'
        imports = nodes and all(only_imports(n) for n in nodes)
        if imports and flag & {'export', 'hide', 'code-fold'}:
            cells.append(fold(cell, 'imports' if 'export' in flag else 'imports of the examples'))
        elif 'export' in flag: cells += documented(cell, module, anchor, up)
        else: cells.append(cell)
    nb.cells = cells


# --- names in backticks lead to what the page means

def stubs():
    "Package -> {name: the module that defines it}, where a package hands on names of its modules"
    found = {}
    for path in (ROOT / 'lm_nb').rglob('__init__.pyi'):
        package = '.'.join(path.parent.relative_to(ROOT / 'lm_nb').parts)
        nodes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ImportFrom)]
        found[package] = {a.name: f'{package}.{n.module}'.strip('.')
                          for n in nodes if n.module for a in n.names}
    return found


@cache
def recipes():
    "The names of the recipes: in prose they mean the recipes"
    return set(re.findall(r'^\[([\w-]+)\]', (ROOT / 'settings.ini').read_text(), re.M))


def places(nbs):
    "(module, name) -> its place on the site, for all exported names; (module, '') is the page"
    found = {}
    for path, nb in nbs.items():
        if not (module := module_of(nb)): continue
        found[module, ''] = page(path)
        anchor = anchors(nb)
        for name, node in exports(nb).items():
            found[module, name] = f'{page(path)}#{anchor[name]}'
            for m in members(node): found.setdefault((module, f'{name}.{m}'), found[module, name])
    return found


def assigned(node):
    "The variables that a statement binds where it stands, not inside of definitions"
    inner = ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp
    if isinstance(node, inner | ast.GeneratorExp): return set()
    here = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    return here.union(*(assigned(n) for n in ast.iter_child_nodes(node)))


def imported(nb, places, stubs):
    "Name -> its place on the site, for the names that a notebook imports from lm_nb"
    def home(module, name):  # where a package's name comes from
        handed = stubs.get(module, {}).get(name)
        return home(handed, name) if handed and handed != module else module

    found, nodes = {}, [n for cell in nb.cells for top in body(cell) for n in ast.walk(top)]
    for n in nodes:
        if not isinstance(n, ast.ImportFrom) or (n.module or '').split('.')[0] != 'lm_nb': continue
        package = n.module.partition('.')[2]
        for a in n.names:
            word, module = a.asname or a.name, f'{package}.{a.name}'.strip('.')
            if (module, '') in places:  # a module, and what is in it
                names = {name: place for (m, name), place in places.items() if m == module}
                found |= {f'{word}.{name}'.strip('.'): place for name, place in names.items()}
            where, whole = home(package, a.name), re.compile(rf'{a.name}(\.|$)')
            names = {name: place for (m, name), place in places.items() if m == where}
            names = {name: p for name, p in names.items() if whole.match(name)}
            found |= {word + name[len(a.name):]: place for name, place in names.items()}
    return found


def meanings(nb, places, stubs):
    """Name -> its place on the site, for the names that a notebook imports from lm_nb or exports.

    A recipe's name has no place, nor one that the examples give to something of their own, nor an
    imported one that is also a parameter or a field here: there the prose may mean either."""
    nodes = [n for cell in nb.cells for top in body(cell) for n in ast.walk(top)]
    parts = {n.arg for n in nodes if isinstance(n, ast.arg)}.union(*map(members, nodes))
    examples = [n for cell in nb.cells if 'export' not in flags(cell) for n in body(cell)]
    other = recipes().union(*map(assigned, examples))
    known = {n: p for n, p in imported(nb, places, stubs).items() if n not in parts}
    known |= {name: p for (module, name), p in places.items() if name and module == module_of(nb)}
    return {name: place for name, place in known.items() if name.split('.')[0] not in other}


def link_names(text, known):
    "Names of the package in backticks become links, outside fences, headings and links"
    def one(m): return f'[{m[0]}]({known[m[1]]})' if m[1] in known else m[0]
    out, fenced = [], False
    for line in text.split('\n'):
        fenced ^= line.startswith('```')
        if not fenced and not line.startswith(('#', '    ', ':::')):
            line = re.sub(r'\[[^\]]*\]\([^)]*\)|`([A-Za-z_]\w*(?:\.\w+)*)(?:\(\))?`', one, line)
        out.append(line)
    return '\n'.join(out)


# --- links between chapters and into the repository

def source_page(path):
    "The page that shows a file of the repository"
    rel = path.relative_to(ROOT)
    if rel.parts[0] == 'lm_nb': name = '.'.join(rel.with_suffix('').parts[1:])
    else: name = re.sub(r'\W+', '-', str(rel)).strip('-_').lower()
    sources[name] = rel
    return f'source/{name}.html'


def relink(text, folder):
    "The links of a page in `folder` as they have to be on the site; pictures are taken along"
    def one(m):
        path = (NBS / folder / unquote(m['path'])).resolve()
        if ROOT not in path.parents or not path.is_file(): return m[0]
        if path.suffix == '.ipynb': to = page(path.relative_to(NBS))
        elif path.suffix in ('.png', '.jpg', '.svg', '.gif') and NBS in path.parents:
            to = path.relative_to(NBS)
            (PROC / to).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, PROC / to)
        else: to = source_page(path)
        return f'{m["open"]}{os.path.relpath(to, folder)}'
    return LINK.sub(one, text)


class Processors(FilterDefaults):
    "nbdev's, without the API documentation, which would run the notebook, and what is not needed"
    def base_procs(self):
        without = add_show_docs, exec_show_docs, add_links, clean_magics
        return [p for p in super().base_procs() if p not in without]


def stage(path, nb, places, stubs, zh=None):
    """A notebook as a page source: `path` is its place under nbs/.

    With the guide to the Chinese pages, `zh`, it becomes one of them."""
    folder, known, own = path.parent, {}, anchors(nb)
    for name, place in meanings(nb, places, stubs).items():
        to, _, anchor = place.partition('#')
        known[name] = f'#{anchor}' if to == page(path) else os.path.relpath(place, folder)
    if zh: translated(nb, path, zh)
    document(nb, own, up='../' * len(folder.parts))
    Processors()(nb)
    def leads(text): return in_chinese(text, folder, zh.there) if zh else text
    for cell in nb.cells:
        if cell.cell_type == 'markdown':
            cell.source = leads(link_names(relink(cell.source or '', folder), known))
        for out in cell.get('outputs', []):
            for kind in {'text/markdown', 'text/html'} & set(out.get('data', {})):
                out['data'][kind] = leads(relink(''.join(out['data'][kind]), folder))
    return nb


# --- the first use of a glossary's word leads to it

def glossary(nb):
    "Word -> (anchor, sentence, page at home), for the words of a glossary's entries"
    found, entry = {}, r'- <a id="(.+?)"></a>(.+?) · (.+?)(?:: |：)(.+?) ?\[[^]]+\]\(([^)]+)\)'
    for id, names, translation, sentence, home in re.findall(entry, '\n'.join(
            c.source for c in nb.cells if c.cell_type == 'markdown')):
        words = re.findall(r'\*\*(.+?)\*\*', names) + translation.split('、')
        found |= {word: (id, sentence.replace('`', ''), home) for word in words if len(word) > 1}
    return found


def glossaries(nb):
    "The words of the glossary with sentences in English and in Chinese"
    return glossary(nb), glossary(translate.translate(deepcopy(nb), Path('glossary.ipynb')))


def link_terms(nb, path, words):
    "The first use of each word in a page's prose becomes a link to its place in the glossary"
    seen = {id for id, _, home in words.values() if home == str(path) or path.stem == 'glossary'}
    lower = words | {w[0].upper() + w[1:]: to for w, to in words.items()}
    some = '|'.join(sorted(map(re.escape, lower), key=len, reverse=True))
    skip = (r'^(?:#|>|\||:::|    )[^\n]*|^```.*?^```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]+\$|'
            r'!?\[(?:[^][]|\[[^][]*\])*\](?:\([^)]*\)|\{[^}]*\})|<a\b.*?</a>|<[^>]+>|https?:\S+|'
            r'\*+[^*\n]+\*+(?=[\u3000-\u9fff\uff00-\uffef])|'
            r'\*+[^*\n]*[\u3400-\u9fff][^*\n]*\*+')  # a link there would undo Chinese emphasis
    find = re.compile(rf'(?ms){skip}|(?<![A-Za-z0-9_/.-])({some})(e?s)?(?![A-Za-z0-9_-])')
    to = os.path.relpath('glossary.html', path.parent)

    def one(m):
        id, sentence, _ = lower.get(m[1], (None, '', ''))
        if not id or id in seen: return m[0]
        seen.add(id)
        return f'<a class="term" href="{to}#{id}" title="{escape(sentence)}">{m[0]}</a>'
    for cell in nb.cells:
        if cell.cell_type == 'markdown': cell.source = find.sub(one, cell.source)
    return nb


# --- the Chinese pages

def title(nb): return next(h for cell in nb.cells for h in headings(cell))


def guides(nbs, zh):
    "What pages say about themselves, in English and in Chinese; `zh` are the pages in Chinese"
    english = guide.Guide({path: nb.cells for path, nb in nbs.items()})
    texts = {path: translate.translate(deepcopy(nb), path).cells for path, nb in nbs.items()}
    chinese = guide.Guide(texts, 'zh', english.url, there=zh)
    chinese.minutes = english.minutes  # of the same code; Chinese has no blanks to count
    return english, chinese


def sections(said, change):
    "A text with its headings changed, but for the title"
    one = re.compile(r'^```(?s:.*?)^```|^##+ (.+)$', re.M)
    return one.sub(lambda m: change(m[0], m[1]) if m[1] else m[0], said)


def translated(nb, path, zh):
    "Put Chinese prose into a notebook: headings keep their anchors; what is left is counted"
    ids, taken = {}, set()
    def note(line, words):  # as smalldocs finds them
        base = anchor = pandoc_id(re.sub(r'[`$*]', '', words))
        n = 0
        while anchor in taken: anchor = f'{base}-{(n := n + 1)}'
        taken.add(anchor)
        ids[cell.id].append(anchor)
        return line
    texts = [cell for cell in nb.cells if cell.cell_type == 'markdown']
    for cell in texts:
        ids[cell.id] = []
        sections(cell.source, note)
    wrong = translate.state(path, translate.english(nb))
    translate.translate(nb, path)
    for cell in texts:
        left = ids[cell.id]
        def anchored(line, _, left=left): return f'{line} {{#{left.pop(0)}}}' if left else line
        cell.source = sections(cell.source, anchored)
        if path == Path('index.ipynb'): cell.source = zh.home(cell.source)
    why = dict(missing='还没有译文，以英文显示', stale='的英文在翻译之后改过')
    if words := [f'{len(wrong[kind])} 段{why[kind]}' for kind in why if wrong[kind]]:
        said = f'::: {{.translation}}\n本页有 {"；".join(words)}。\n:::'
        nb.cells.insert(1 + nb.cells.index(texts[0]), mk_cell(said, 'markdown'))


def in_chinese(text, folder, zh):
    "The links of a page as they have to be under zh/: to Chinese pages, or else to English ones"
    def one(m):
        to = os.path.normpath(folder / m['path'])
        return m['open'] + os.path.relpath(f'zh/{to}' if to in zh else to, 'zh' / folder)
    return LINK.sub(one, text)


def two_sidebars(nbs, zh):
    "_quarto.yml with a second sidebar, in Chinese; a page that is only in English is marked"
    site, words = yaml.safe_load((ROOT / '_quarto.yml').read_text()), translate.words()['sections']
    titles = {page(path).replace('.html', '.ipynb'): title(nb) for path, nb in nbs.items()}
    def place(to): return f'zh/{to}' if re.sub(r'\.ipynb(#.*)?$', '.html', to) in zh else to
    def one(entry):
        if isinstance(entry, dict):
            return {k: [one(e) for e in v] if isinstance(v, list) else
                    place(v) if k == 'href' else words.get(v, v) for k, v in entry.items()}
        if '*' in entry or place(entry) != entry: return place(entry)
        return dict(text=f'{titles.get(entry, "API")}（英文）', href=entry)
    english = site['website']['sidebar']
    chinese = english | dict(id='zh', title=site['website']['title'])
    chinese['contents'] = [one(e) for e in english['contents']]
    site['website']['sidebar'] = [english | dict(id='en'), chinese] if zh else english
    return yaml.safe_dump(site, allow_unicode=True, sort_keys=False)


# --- the pages that are no chapters

def write_sources():
    "Write a page for each module, and for each file of the repository that a chapter links to"
    langs = {'.py': 'python', '.ini': 'ini', '.toml': 'toml', '.json': 'json', '.yml': 'yaml',
             '.md': 'markdown'}
    (PROC / 'source').mkdir()
    for path in sorted((ROOT / 'lm_nb').rglob('[!_]*.py')): source_page(path)
    for name, rel in sources.items():
        text = (ROOT / rel).read_text(errors='replace')
        fence = '`' * max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
        lang = langs.get(rel.suffix, 'default')
        (PROC / 'source' / f'{name}.md').write_text(
            f'---\ntitle: "{rel}"\ntoc: false\nsearch: false\npage-navigation: false\n---\n\n'
            f'{fence}{{#code .{lang} code-line-numbers="true"}}\n{text}\n{fence}\n')


def write_index(nbs):
    "Write the page that lists every exported name"
    parts = ['---\ntitle: "API"\ndescription: "Every public name, by module"\n---\n']
    for path, nb in nbs.items():
        anchor, rows = anchors(nb), []
        for name, node in exports(nb).items():
            signature = f'<code>{escape(call(name, node, "." in name))}</code>'
            rows.append(f'<dt><a href="{page(path)}#{anchor[name]}">{signature}</a></dt>'
                        f'<dd>{inline(summary(node))}</dd>')
        if not rows: continue
        body = f'```{{=html}}\n<dl class="names">{"".join(rows)}</dl>\n```'
        parts.append(f'## lm_nb.{module_of(nb)}\n\n{body}\n')
    (PROC / 'api.md').write_text('\n'.join(parts))


def write_dark_theme():
    "Bootstrap with its own dark colours for the whole page, as a theme of its own"
    from smalldocs.site import ASSETS
    css = (ASSETS / 'vendor' / 'bootstrap' / 'bootstrap.min.css').read_text()
    dark = re.findall(r'(?<=[}\n])\[data-bs-theme=dark\]([^{}]*\{[^}]*\})', css)
    (PROC / 'dark.css').write_text(css + '\n' + '\n'.join(f':root{rule}' for rule in dark))


# --- after rendering

def mathml(html):
    "Formulas as MathML, which browsers draw by themselves"
    def one(m):
        try: return convert(unescape(m[2]), display='block' if m[1] == 'display' else 'inline')
        except Exception as e: sys.exit(f'site: the formula {m[2]!r}: {type(e).__name__} {e}')
    span = r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>'
    html = re.sub(span, one, html, flags=re.S)
    return re.sub(r'<(link|script)[^>]*katex[^>]*>(</script>)?\s*', '', html)


PHONE = '''<div class="smalldocs-search phone-search">
<i class="bi bi-search" aria-hidden="true"></i>
<input type="search" class="form-control form-control-sm" placeholder="Search" aria-label="Search"
autocomplete="off"><div class="smalldocs-search-results dropdown-menu"></div></div>
<a href="" class="quarto-color-scheme-toggle btn" title="Toggle dark mode"
aria-label="Toggle dark mode" onclick="window.smalldocsToggleScheme(); return false;">
<i class="bi"></i></a>'''


def phone_bar(html):
    "The bar of narrow screens: beside the menu's button also a search box and the switch to dark"
    bar = r'(?s)(<nav class="quarto-secondary-nav">.*?</button>)(.*?)(</div>\s*</nav>)'
    html = re.sub(bar, lambda m: f'{m[1]}{m[2]}{PHONE}{m[3]}', html, count=1)
    return html.replace('bi-layout-text-sidebar-reverse', 'bi-list', 1)


def furnished(html, name, zh):
    "A page with the switch to the other language; what stands around Chinese text is Chinese"
    here, there = name.removeprefix('zh/'), min(zh, key=lambda p: p != 'index.html', default=0)
    if name.startswith('zh/'):
        for old, new in translate.words()['pieces'].items(): html = html.replace(old, new)
        lang, word, more, to = 'en', 'English', '', here
    elif here in zh: lang, word, more, to = 'zh-CN', '中文', '', f'zh/{here}'
    else:  # to the Chinese home page
        lang, word, to = 'zh-CN', '中文', f'zh/{there}'
        more = ' title="这一页还没有中文版：去中文首页" data-other'
    to = os.path.relpath(to, Path(name).parent)
    switch = f'<a class="language" lang="{lang}" hreflang="{lang}" href="{to}"{more}>{word}</a>'
    toggle = r'(<a\b[^>]*class="quarto-color-scheme-toggle)'  # in the sidebar and the phone's bar
    if zh: html = re.sub(toggle, lambda m: switch + m[1], html)
    up = '../' * name.count('/')
    return html.replace('</head>', f'<script defer src="{up}site.js"></script></head>', 1)


def natural_size(html):
    """Pictures are drawn with two pixels for one: shown at half their width.

    A phone shows them smaller, but only as far as their letters can be read; then they scroll."""
    def one(m):
        width = int.from_bytes(base64.b64decode(m[2][:44])[16:20])  # of a PNG's header
        size = f'width="{width // 2}" style="min-width: {3 * width // 10}px"'
        return f'<img{m[1]} {size} src="data:image/png;base64,{m[2]}'
    return re.sub(r'<img([^>]*?) src="data:image/png;base64,([^"]{44})', one, html)


def unbroken(html):
    "An interval stays on one line, in the cells of tables that hold numbers"
    together = r'[\[(][+-]?\d[^])<]{2,16}[])]|p = [\d.]+'
    def cell(m): return re.sub(together, lambda m: m[0].replace(' ', '\u00a0'), m[0])
    return re.sub(r'(?<=<td style="text-align:right">)[^<]+', cell, html)


def offline_search():
    "A copy of the search index that a page opened from the disk can load too"
    (OUT / 'search.js').write_text('window.searchIndex = ' + (OUT / 'search.json').read_text())


# --- what can be wrong with the site

def terms(query):
    "What is looked for: words by their beginning, and pairs of Chinese characters"
    words = re.findall(r'[a-z0-9_]+|[\u3400-\u9fff]+', query.lower())
    return [t for w in words for t in ([w[i:i+2] for i in range(max(1, len(w) - 1))]
                                       if w > '\u3400' else [w])]


def search(entries, query, lang):
    "The pages that nbs/site.js, which has the same rules, shows to a reader of `lang`, best first"
    def count(text, t):
        if t > '\u3400' or t not in text: return text.count(t)
        return len(re.findall(rf'(?<![a-z0-9]){t}', text))
    fields = [[e[k].lower() for k in ('title', 'section', 'text')] for e in entries]
    points, seen, most = [0] * len(entries), [0] * len(entries), 0
    for t in terms(query):
        hits = {i: n for i, texts in enumerate(fields) if any(n := [count(s, t) for s in texts])}
        if not hits and t > '\u3400': continue  # a pair across two words
        rare = math.log(1 + len(entries) / (len(hits) or .5))
        most += rare
        for i, (title, section, text) in hits.items():
            points[i] += rare * (3 * (title > 0) + 2 * (section > 0) + 2 * text / (text + 2))
            seen[i] += rare
    pages = [e['href'].partition('#')[0] for e in entries]
    for i, name in enumerate(pages):
        points[i] *= seen[i] / (1 + (name.startswith('zh/') != (lang == 'zh')))
    best = sorted((i for i, s in enumerate(seen) if s and s >= most / 2), key=lambda i: -points[i])
    found = [pages[i] for i in best]
    return [name for k, name in enumerate(found) if found[:k].count(name) < 3][:20]


def lost_terms():
    "The lines of tools/search.txt, a page and what leads to it, whose page is not at the top"
    entries, found = json.loads((OUT / 'search.json').read_text()), []
    for line in (ROOT / 'tools/search.txt').read_text(encoding='utf-8').splitlines():
        if not line.strip() or line.startswith('#'): continue
        name, query = line.split(None, 1)
        top = search(entries, query, 'zh' if name.startswith('zh/') else 'en')
        top = list(dict.fromkeys(top))[:5]
        if name in top: continue
        found.append(f'search: {query} finds {", ".join(top) or "nothing"}, not {name}')
    return found


def complaints():
    "Each link to nowhere and each thing fetched from the network, with the pages that have it"
    found, remote = {}, r'((?:https?:)?//[^"\')\s]+)'
    pages = {p: p.read_text() for p in OUT.rglob('*.html')}
    ids = {p: re.findall(r'\sid="([^"]+)"', html) for p, html in pages.items()}
    for p, html in pages.items():
        def say(text): found.setdefault(text, []).append(str(p.relative_to(OUT)))  # noqa: B023
        if 'class="math' in html: say('a formula is left as TeX')
        if 'class="mermaid"' in html: say('mermaid comes from the network (draw an SVG)')
        html = re.sub(r'<(pre|code)\b.*?</\1>', '', html, flags=re.S)
        fetched = (rf'<(?:script|img|iframe|source|video)\b[^>]*\bsrc="{remote}|'
                   rf'<link\b[^>]*\bhref="{remote}|\burl\(["\']?{remote}')
        for url in re.findall(fetched, html): say(f'fetches {"".join(url)}')
        for img in re.findall(r'<img\b[^>]*>', html):
            if not re.search(r'\balt="[^"]+"', img): say(f'no alt text: {img[:60]}')
        name = p.relative_to(OUT)
        if name.parts[0] == 'zh':
            heads = [re.findall(r'data-anchor-id="([^"]+)"', pages[q])
                     for q in (p, OUT.joinpath(*name.parts[1:]))]
            for id in {*heads[0]} ^ {*heads[1]}: say(f'#{id} is not in both languages')
            if '**' in re.sub(r'<[^>]*>', '', html): say('a ** that is not read as bold')
        for id in {id for id in ids[p] if ids[p].count(id) > 1}: say(f'two places #{id}')
        for href in re.findall(r'<a\b[^>]*\bhref="([^"]*)"', html):
            name, _, anchor = unescape(href).partition('#')
            if re.match(r'[a-z]+:|//', name): continue
            target = (p.parent / unquote(name)).resolve() if name else p
            if target.is_dir(): target /= 'index.html'
            if not target.is_file(): say(f'no page {os.path.relpath(target, OUT)}')
            elif anchor and target in ids and unquote(anchor) not in ids[target]:
                say(f'no place #{anchor} in {os.path.relpath(target, OUT)}')
    for css in OUT.rglob('*.css'):
        for url in re.findall(rf'(?:url\(|@import\s+)["\']?{remote}', css.read_text()):
            found.setdefault(f'fetches {url}', []).append(css.name)
    return [f'{text}, on {", ".join(where[:3])}{" and others" if len(where) > 3 else ""}'
            for text, where in found.items()]


def sidebar_complaints(chapters):
    "What the sidebar lacks or has too much, and links onward that do not follow it"
    names, pages = guide.order(), [page(path).removesuffix('.html') for path in chapters]
    found = [f'no {name}.ipynb in the sidebar of _quarto.yml' for name in {*pages} - {*names}]
    found += [f'no chapter {name}.ipynb, which the sidebar names' for name in {*names} - {*pages}]
    if found: return found
    for name, after in pairwise(names):
        html = (OUT / f'{name}.html').read_text()
        onward = re.search(r'nav-page-next">\s*<a\b[^>]*?href="([^"]+)"', html)
        to = os.path.normpath(Path(name).parent / onward[1]) if onward else 'nowhere'
        if to != f'{after}.html': found.append(f'{name}.html leads on to {to}, not to {after}.html')
    return found


def chapters():
    "The notebooks, in the order of the sidebar: place under nbs/ -> notebook"
    paths = [p.relative_to(NBS) for p in NBS.rglob('*.ipynb')]
    paths = [p for p in paths if not any(part[0] in '_.' for part in p.parts)]
    at = {name: i for i, name in enumerate(guide.order())}
    paths.sort(key=lambda p: (at.get(page(p).removesuffix('.html'), len(at)), p))
    return {p: read_nb(NBS / p) for p in paths}


def main():
    start = time.time()
    os.chdir(ROOT)
    shutil.rmtree(PROC, ignore_errors=True)
    PROC.mkdir()
    nbs = chapters()
    where, handed = places(nbs), stubs()
    words, zh_words = glossaries(nbs[Path('glossary.ipynb')])
    write_index(nbs)
    zh = {page(path) for path in nbs if translate.file_of(path).exists()}
    (PROC / '_quarto.yml').write_text(two_sidebars(nbs, zh))
    about, zh_about = guides(nbs, zh)
    twins = {path: deepcopy(nb) for path, nb in nbs.items() if page(path) in zh}
    for cell in nbs[Path('index.ipynb')].cells:
        if cell.cell_type == 'markdown': cell.source = about.home(cell.source)
    for path, nb in nbs.items():
        to = PROC / Path(page(path)).with_suffix('.ipynb')
        to.parent.mkdir(exist_ok=True)
        write_nb(link_terms(stage(path, nb, where, handed), path, words), to)
    for path, nb in twins.items():
        to = PROC / 'zh' / Path(page(path)).with_suffix('.ipynb')
        to.parent.mkdir(parents=True, exist_ok=True)
        write_nb(link_terms(stage(path, nb, where, handed, zh_about), path, zh_words), to)
    if zh: (PROC / 'zh/_metadata.yml').write_text('lang: zh-CN\ntoc-title: 本页目录\n')
    write_sources()
    write_dark_theme()
    for extra in NBS.glob('*.css'): shutil.copy(extra, PROC)

    from smalldocs.site import build  # after the pages: it needs nothing of the package
    site = build(PROC, quiet=True)
    for p in OUT.rglob('*.html'):
        html = unbroken(natural_size(phone_bar(mathml(p.read_text()))))
        name = p.relative_to(OUT).as_posix()
        html, guided = furnished(html, name, zh), zh_about if name.startswith('zh/') else about
        p.write_text(guided.dress(html, name.removeprefix('zh/').removesuffix('.html')))
    for path in nbs:
        for folder in ['notebooks', *(['zh/notebooks'] if page(path) in zh else [])]:
            to = OUT / folder / path
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(guide.downloadable(path, about.url, chinese=folder != 'notebooks'))
    shutil.copy(NBS / 'site.js', OUT)
    offline_search()
    known = 'broken link', 'output-file'  # the first are found below
    problems = [w for w in site.warnings if not any(k in w for k in known)]
    problems += complaints() + sidebar_complaints(nbs) + guide.level_faults(guide.order())
    problems += lost_terms()
    if problems: sys.exit('\n  '.join(['site: the build has faults:', *sorted(problems)]))
    print(f'{len(site.pages)} pages in _docs/ ({time.time() - start:.0f} s)')


if __name__ == '__main__': main()
