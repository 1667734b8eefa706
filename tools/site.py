"""Build the documentation site in _docs/:  python tools/site.py

Each chapter becomes a page source under _proc/, in the folder of its part: nbdev's processors apply
the directives and remove hidden cells; here each exported definition gets its signature, its table
of parameters and a link to its source, imports are folded, pictures get a text, and names in
backticks lead to what the page means by them. `smalldocs` renders these pages. Then formulas become
MathML, and every link is followed: a page that leads nowhere, or that would ask the network for
anything, fails the build.
"""
import ast
import base64
import io
import json
import os
import re
import shutil
import sys
import time
import tokenize
from functools import cache
from html import escape, unescape
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

os.environ['IN_TEST'] = '1'
from fastcore.nbio import mk_cell, read_nb, write_nb
from latex2mathml.converter import convert
from nbdev.doclinks import patch_name
from nbdev.processors import FilterDefaults, add_links, add_show_docs, clean_magics, exec_show_docs
from smalldocs.markdown import pandoc_id

ROOT = Path(__file__).resolve().parent.parent
NBS, PROC, OUT = ROOT / 'nbs', ROOT / '_proc', ROOT / '_docs'
Def, Import = ast.FunctionDef | ast.ClassDef, ast.Import | ast.ImportFrom
sources = {}  # source page -> the file that it shows


# --- reading a notebook

def page(path):
    "The page of a notebook: 1_data/03_corpus.ipynb -> 1_data/corpus.html"
    path = Path(path)
    return str(path.with_name(re.sub(r'^\d+[a-z]?_', '', path.stem) + '.html'))


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
    rows = [(f'<code>{n}</code>', code(t), code(d), inline(notes.get(at.end_lineno)))
            for n, t, d, at in parameters(node, patched)]
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


def document(nb, up=''):
    "Show imports folded, exported code with its API documentation, and pictures with a text"
    module, anchor, heading, cells = module_of(nb), anchors(nb), '', []
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
    link = r'(?P<open>\]\(|\b(?:href|src)=")(?P<path>[^)":#\s]+)(?=[#)"\s])'
    return re.sub(link, one, text)


class Processors(FilterDefaults):
    "nbdev's, without the API documentation, which would run the notebook, and what is not needed"
    def base_procs(self):
        without = add_show_docs, exec_show_docs, add_links, clean_magics
        return [p for p in super().base_procs() if p not in without]


def stage(path, nb, places, stubs):
    "A notebook as a page source: `path` is its place under nbs/"
    folder, known = path.parent, {}
    for name, place in meanings(nb, places, stubs).items():
        to, _, anchor = place.partition('#')
        known[name] = f'#{anchor}' if to == page(path) else os.path.relpath(place, folder)
    document(nb, up='../' * len(folder.parts))
    Processors()(nb)
    for cell in nb.cells:
        if cell.cell_type == 'markdown':
            cell.source = link_names(relink(cell.source or '', folder), known)
        for out in cell.get('outputs', []):
            for kind in {'text/markdown', 'text/html'} & set(out.get('data', {})):
                out['data'][kind] = relink(''.join(out['data'][kind]), folder)
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


def link_terms(nb, path, words):
    "The first use of each word in a page's prose becomes a link to its place in the glossary"
    seen = {id for id, _, home in words.values() if home == str(path) or path.stem == 'glossary'}
    lower = words | {w[0].upper() + w[1:]: to for w, to in words.items()}
    some = '|'.join(sorted(map(re.escape, lower), key=len, reverse=True))
    skip = (r'^(?:#|>|\||:::|    )[^\n]*|^```.*?^```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]+\$|'
            r'!?\[(?:[^][]|\[[^][]*\])*\](?:\([^)]*\)|\{[^}]*\})|<a\b.*?</a>|<[^>]+>|https?:\S+')
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


def natural_size(html):
    "Pictures are drawn with two pixels for one: shown at half their width"
    def one(m):
        width = int.from_bytes(base64.b64decode(m[2][:44])[16:20])  # of a PNG's header
        return f'<img{m[1]} width="{width // 2}" src="data:image/png;base64,{m[2]}'
    return re.sub(r'<img([^>]*?) src="data:image/png;base64,([^"]{44})', one, html)


def offline_search():
    "A copy of the search index that a page opened from the disk can load too"
    (OUT / 'search.js').write_text('window.searchIndex = ' + (OUT / 'search.json').read_text())


def sidebar():
    "The pages of the sidebar, in its order"
    return re.findall(r'^\s*- (\S+)\.ipynb', (ROOT / '_quarto.yml').read_text(), re.M)


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
    names, pages = sidebar(), [page(path).removesuffix('.html') for path in chapters]
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
    at = {name: i for i, name in enumerate(sidebar())}
    paths.sort(key=lambda p: (at.get(page(p).removesuffix('.html'), len(at)), p))
    return {p: read_nb(NBS / p) for p in paths}


def main():
    start = time.time()
    os.chdir(ROOT)
    shutil.rmtree(PROC, ignore_errors=True)
    PROC.mkdir()
    nbs = chapters()
    where, handed = places(nbs), stubs()
    words = glossary(nbs[Path('glossary.ipynb')])
    write_index(nbs)
    for path, nb in nbs.items():
        to = PROC / Path(page(path)).with_suffix('.ipynb')
        to.parent.mkdir(exist_ok=True)
        write_nb(link_terms(stage(path, nb, where, handed), path, words), to)
    write_sources()
    write_dark_theme()
    shutil.copy(ROOT / '_quarto.yml', PROC)
    for extra in NBS.glob('*.css'): shutil.copy(extra, PROC)

    from smalldocs.site import build  # after the pages: it needs nothing of the package
    site = build(PROC, quiet=True)
    for p in OUT.rglob('*.html'): p.write_text(natural_size(phone_bar(mathml(p.read_text()))))
    offline_search()
    known = 'broken link', 'output-file'  # the first are found below
    problems = [w for w in site.warnings if not any(k in w for k in known)]
    problems += complaints() + sidebar_complaints(nbs)
    if problems: sys.exit('\n  '.join(['site: the build has faults:', *sorted(problems)]))
    print(f'{len(site.pages)} pages in _docs/ ({time.time() - start:.0f} s)')


if __name__ == '__main__': main()
