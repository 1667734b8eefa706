"""Build the documentation site in _docs/:  python tools/site.py

Each chapter becomes a page source under _proc/: nbdev's processors apply the directives, remove hidden cells and link names in
backticks; here each exported definition gets its signature, its table of parameters and a link to its source. `smalldocs`
renders these pages. Then formulas become MathML, and every link is followed: a page that leads nowhere, or that would ask the
network for anything, fails the build.
"""
import ast
import io
import os
import re
import shutil
import sys
import time
import tokenize
from html import escape, unescape
from pathlib import Path
from urllib.parse import unquote

os.environ['IN_TEST'] = '1'
from fastcore.nbio import mk_cell, read_nb, write_nb
from latex2mathml.converter import convert
from nbdev.doclinks import patch_name
from nbdev.processors import FilterDefaults, add_links, add_show_docs, exec_show_docs

ROOT = Path(__file__).resolve().parent.parent
NBS, PROC, OUT = ROOT / 'nbs', ROOT / '_proc', ROOT / '_docs'
Def, Import = ast.FunctionDef | ast.ClassDef, ast.Import | ast.ImportFrom
index, sources = {}, {}  # module -> its exported names and what they are; source page -> the file that it shows


# --- the API documentation of one definition, read from its code: nothing is imported

def parameters(node, method=False):
    "Name, type, default and place of each parameter of a function, or of each field of a class"
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'), None)
        if init: return [row for row in parameters(init, method=True) if row[0] != 'returns']
        return [(n.target.id, n.annotation, n.value, n) for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    static = any(isinstance(d, ast.Name) and d.id == 'staticmethod' for d in node.decorator_list)
    rows = [(p.arg, p.annotation, d, p) for p, d in zip(plain, [None] * (len(plain) - len(a.defaults)) + a.defaults)]
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


def table(head, rows):
    cells = ''.join(f'<tr>{"".join(f"<td>{c}</td>" for c in row)}</tr>' for row in rows)
    return f'<div class="scroll"><table><thead><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr></thead><tbody>{cells}</tbody></table></div>' if rows else ''


def call(name, node, method=False):
    "How it is called: name, parameters, and what it gives"
    gives = f' → {ast.unparse(node.returns)}' if getattr(node, 'returns', None) else ''
    return f'{name}({", ".join(row[0] for row in parameters(node, method) if row[0] != "returns")}){gives}'


def api(node, name, module, line, notes):
    "The heading of an exported definition, a link to its source, and, folded, its parameters and methods"
    patched = '.' in name
    rows = [(f'<code>{n}</code>', code(t), code(d), inline(notes.get(at.end_lineno))) for n, t, d, at in parameters(node, patched)]
    methods = [m for m in node.body if isinstance(node, ast.ClassDef) and isinstance(m, ast.FunctionDef) and m.name[0] != '_']
    tables = table(['parameter', 'type', 'default', ''], rows)
    tables += table(['method', ''], [(f'<code>{escape(call(m.name, m, method=True))}</code>', inline(ast.get_docstring(m))) for m in methods])
    index.setdefault(module, []).append((name, call(name, node, patched), (ast.get_docstring(node) or '').split('\n')[0]))
    body = f'<details><summary><code>{escape(call(name, node, patched))}</code></summary>{tables}</details>' if tables else '<span></span>'
    source = f'<a class="api-source" href="source/{module}.html#code-{line}">source</a>'
    return f'### `{name}` {{#{name.lower()} .api-name}}\n\n```{{=html}}\n<div class="api">{body}{source}</div>\n```\n'


def documented(cell, module):
    "An exported cell's code, with the API documentation of what it defines before it"
    tree = ast.parse(cell.source)
    text = (ROOT / 'lm_nb' / f'{module}.py').read_text()
    lines = {patch_name(n): n.lineno for n in ast.parse(text).body if isinstance(n, Def)}
    notes = comments(cell.source)
    docs = [api(n, patch_name(n), module, lines.get(patch_name(n), 1), notes) for n in tree.body if isinstance(n, Def) and n.name[0] != '_']
    return [*(mk_cell(d, 'markdown') for d in docs), mk_cell('::::: {.exported}', 'markdown'), cell, mk_cell(':::::', 'markdown')]


# --- a chapter becomes a page source

def page(stem): return re.sub(r'^\d+[a-z]?_', '', stem)  # 03_tokenizer -> tokenizer, as nbdev's links have it


def document(nb):
    "Show the code of exported cells, imports aside, with its API documentation"
    module = next((m[1] for c in nb.cells if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', c.source, re.M))), None)
    cells = []
    for cell in nb.cells:
        flag = re.match(r'#\|\s*export\s*\n', cell.source) if cell.cell_type == 'code' else None
        if flag and not all(isinstance(n, Import) for n in ast.parse(cell.source).body):
            cell.source = cell.source[flag.end():]
            cells += documented(cell, module)
        else: cells.append(cell)
    nb.cells = cells


def source_page(path):
    "The page that shows a file of the repository"
    rel = path.relative_to(ROOT)
    name = rel.stem if rel.parts[0] == 'lm_nb' else re.sub(r'\W+', '-', str(rel)).strip('-_').lower()
    sources[name] = rel
    return f'source/{name}.md'


def places():
    "Name -> its place on the site, as nbdev's index of the package has it"
    tree = ast.parse((ROOT / 'lm_nb' / '_modidx.py').read_text())
    modules = ast.literal_eval(tree.body[0].value)['syms']
    return {name.removeprefix(f'{module}.'): place[0] for module, names in modules.items() for name, place in names.items()}


def link_names(text, known):
    "Names of the package in backticks become links, outside fences, headings and links"
    out, fenced = [], False
    for line in text.split('\n'):
        fenced ^= line.startswith('```')
        if not fenced and not line.startswith(('#', '    ', ':::')):
            line = re.sub(r'(?<!\[)`([A-Za-z]\w+(?:\.\w+)?)(\(\))?`(?!\])', lambda m: f'[{m[0]}]({known[m[1]]})' if m[1] in known else m[0], line)
        out.append(line)
    return '\n'.join(out)


def relink(text):
    "Links between chapters and into the repository, as they have to be on the site"
    def repo(m):
        path = (NBS / m[1]).resolve()
        return f']({source_page(path)}{m[2] or ""}' if path.is_file() and ROOT in path.parents else m[0]
    text = re.sub(r'\]\((?:\./)?\d+[a-z]?_(\w+\.ipynb)', r'](\1', text)
    return re.sub(r'\]\((\.\./[^)#\s]+)(#[^)\s]*)?(?=\))', repo, text)


class Processors(FilterDefaults):
    "nbdev's processors, less those that make API documentation by running the notebook once more, and links to other packages"
    def base_procs(self): return [p for p in super().base_procs() if p not in (add_show_docs, exec_show_docs, add_links)]


def stage(path, known):
    "Write one notebook's page source into _proc/"
    nb = read_nb(path)
    document(nb)
    Processors()(nb)
    for cell in nb.cells:
        if cell.cell_type == 'markdown': cell.source = link_names(relink(cell.source or ''), known)
        for out in cell.get('outputs', []):
            if 'text/markdown' in out.get('data', {}): out['data']['text/markdown'] = relink(''.join(out['data']['text/markdown']))
    write_nb(nb, PROC / (page(path.stem) + '.ipynb'))


def write_sources():
    "Write a page for each module, and for each file of the repository that a chapter links to"
    langs = {'.py': 'python', '.ini': 'ini', '.toml': 'toml', '.json': 'json', '.yml': 'yaml', '.md': 'markdown'}
    (PROC / 'source').mkdir()
    for path in sorted((ROOT / 'lm_nb').glob('[!_]*.py')): source_page(path)
    for name, rel in sources.items():
        text = (ROOT / rel).read_text(errors='replace')
        fence = '`' * max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
        (PROC / 'source' / f'{name}.md').write_text(
            f'---\ntitle: "{rel}"\ntoc: false\nsearch: false\npage-navigation: false\n---\n\n'
            f'{fence}{{#code .{langs.get(rel.suffix, "default")} code-line-numbers="true"}}\n{text}\n{fence}\n')


def write_index():
    "Write the page that lists every exported name"
    chapters = {m: page(Path(p).stem) for p in NBS.glob('[0-9]*.ipynb') for m in re.findall(r'default_exp (\w+)', p.read_text())}
    parts = ['---\ntitle: "API"\ndescription: "Every public name, by module"\n---\n']
    for module, names in index.items():
        rows = [f'<dt><a href="{chapters[module]}.html#{n.lower()}"><code>{escape(sig)}</code></a></dt><dd>{inline(doc)}</dd>' for n, sig, doc in names]
        parts.append(f'## lm_nb.{module}\n\n```{{=html}}\n<dl class="names">{"".join(rows)}</dl>\n```\n')
    (PROC / 'api.md').write_text('\n'.join(parts))


# --- after rendering

def mathml(html):
    "Formulas as MathML, which browsers draw by themselves"
    def one(m):
        try: return convert(unescape(m[2]), display='block' if m[1] == 'display' else 'inline')
        except Exception as e: sys.exit(f'site: the formula {m[2]!r} cannot be converted: {type(e).__name__} {e}')
    html = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', one, html, flags=re.S)
    return re.sub(r'<(link|script)[^>]*katex[^>]*>(</script>)?\s*', '', html)


def offline_search():
    "A copy of the search index that a page opened from the disk can load too"
    (OUT / 'search.js').write_text('window.searchIndex = ' + (OUT / 'search.json').read_text())


def complaints():
    "Each link to nowhere and each thing fetched from the network, with the pages that have it"
    found = {}
    pages = {p: p.read_text() for p in OUT.rglob('*.html')}
    ids = {p: set(re.findall(r'\bid="([^"]+)"', html)) for p, html in pages.items()}
    remote = r'((?:https?:)?//[^"\')\s]+)'
    for p, html in pages.items():
        def say(text): found.setdefault(text, []).append(str(p.relative_to(OUT)))  # noqa: B023
        if 'class="math' in html: say('a formula is left as TeX')
        if 'class="mermaid"' in html: say('mermaid comes from the network (draw an SVG)')
        html = re.sub(r'<(pre|code)\b.*?</\1>', '', html, flags=re.S)
        for url in re.findall(rf'<(?:script|img|iframe|source|video)\b[^>]*\bsrc="{remote}|<link\b[^>]*\bhref="{remote}', html): say(f'fetches {"".join(url)}')
        for href in re.findall(r'<a\b[^>]*\bhref="([^"]*)"', html):
            name, _, anchor = unescape(href).partition('#')
            if re.match(r'[a-z]+:|//', name): continue
            target = (p.parent / unquote(name)).resolve() if name else p
            if target.is_dir(): target /= 'index.html'
            if not target.is_file(): say(f'no page {os.path.relpath(target, OUT)}')
            elif anchor and target in ids and unquote(anchor) not in ids[target]: say(f'no place #{anchor} in {os.path.relpath(target, OUT)}')
    sidebar = (ROOT / '_quarto.yml').read_text()
    for p in PROC.glob('*.ipynb'):
        if not re.search(rf'\b{p.name}\b', sidebar): found[f'no {p.name} in the sidebar'] = ['_quarto.yml']
    for css in OUT.rglob('*.css'):
        for url in re.findall(rf'(?:url\(|@import\s+)["\']?{remote}', css.read_text()): found.setdefault(f'fetches {url}', []).append(css.name)
    return [f'{text}, wanted by {", ".join(where[:3])}{" and others" if len(where) > 3 else ""}' for text, where in found.items()]


def main():
    start = time.time()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    shutil.rmtree(PROC, ignore_errors=True)
    PROC.mkdir()
    known = places()
    for path in sorted(NBS.glob('[!_.]*.ipynb')): stage(path, known)
    write_index()
    write_sources()
    shutil.copy(ROOT / '_quarto.yml', PROC)
    for extra in NBS.glob('*.css'): shutil.copy(extra, PROC)
    if (NBS / 'images').is_dir(): shutil.copytree(NBS / 'images', PROC / 'images')

    from smalldocs.site import build  # after the pages: it needs nothing of the package
    site = build(PROC, quiet=True)
    for p in OUT.rglob('*.html'): p.write_text(mathml(p.read_text()))
    offline_search()
    if problems := [w for w in site.warnings if 'broken link' not in w and 'output-file' not in w] + complaints():
        sys.exit('\n  '.join(['site: the build has faults:', *sorted(problems)]))
    print(f'{len(site.pages)} pages in _docs/ ({time.time() - start:.0f} s)')


if __name__ == '__main__': main()
