"""What guides a reader: tools/site.py puts it on the pages, tools/readme.py into README.md.

Under its title a page says its level, how long it takes to read, what to read before it, which path
leads through it, and how to run it. Levels and what to read before stand in nbs/levels.toml; the
paths stand in nbs/index.ipynb, below `<!-- paths -->`; all else is computed. Words for the reader
are in `WORDS`, in both languages.
"""
import ast
import json
import os
import re
import tomllib
from html import escape
from pathlib import Path

import translate

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
WORDS_A_MINUTE, LINES_A_MINUTE = 200, 20  # how fast prose and code are read
LAB = 'http://localhost:8888/lab/tree'    # where `make lab` is, unless that port is taken
WORDS = dict(
    en=dict(start='start', further='further', deep='deep', minutes='{} min', hours='{} h {:02} min',
            start_for='for who knows Python and no transformers yet',
            further_for='one thing in detail, for who knows the idea',
            deep_for='for who changes it, measures it or runs it at scale',
            read='{} to read', before='read before: {}', path='path {}: {} of {}',
            onward=', then {}', sum=' (**{}**)', comma=', ', stop=' · ',
            run='Run this chapter', download='Download {}',
            downloaded='the notebook, to keep and to change',
            lab='Open in JupyterLab', colab='Open in Colab',
            lab_how='works while <code>make lab</code> runs: it installs what is missing, starts '
                    'JupyterLab on your copy of the repository, at port 8888 or the next free one, '
                    'and prints its address; the chapter is <code>{}</code>',
            colab_how='its first cell installs the package there',
            onward_label='previous and next page', way='The way of the data'),
    zh=dict(start='入门', further='进阶', deep='深入', minutes='{} 分钟',
            hours='{} 小时 {:02} 分钟', start_for='会 Python、还不懂 Transformer 的读者',
            further_for='知道大意之后，把一件事讲透',
            deep_for='写给要修改、测量或大规模运行的人',
            read='阅读约 {}', before='先读：{}', path='路径「{}」第 {} 页，共 {} 页',
            sum='（**{}**）', onward='，下一页 {}', comma='、', stop=' · ', run='运行本章',
            download='下载 {}', downloaded='笔记本，可以保存，也可以修改',
            lab='在 JupyterLab 中打开', colab='在 Colab 中打开',
            lab_how='须先运行 <code>make lab</code>：它安装所缺的包，在本地仓库上启动 JupyterLab'
                    '（端口 8888，被占用时顺延），并打印地址；<code>{0}</code> 是英文笔记本，'
                    '要中文的，先运行 <code>make zh</code>，再打开 <code>zh/</code> 里同名的文件',
            colab_how='第一个单元格会在那里安装本包',
            onward_label='上一页与下一页', way='数据之路'))


# --- chapters

def page(path):
    "The page of a notebook: 1_data/03_corpus.ipynb -> 1_data/corpus.html"
    path = Path(path)
    return str(path.with_name(re.sub(r'^\d+[a-z]?_', '', path.stem) + '.html'))


def name(path): return page(path).removesuffix('.html')


def order():
    "The chapters of the sidebar, in its order: 1_data/corpus …"
    return re.findall(r'^\s*- (\S+)\.ipynb', (ROOT / '_quarto.yml').read_text(), re.M)


def notebooks():
    "The notebooks: place under nbs/ -> its cells"
    paths = [p.relative_to(NBS) for p in NBS.rglob('*.ipynb')]
    paths = [p for p in paths if not any(part[0] in '_.' for part in p.parts)]
    return {p: json.loads((NBS / p).read_text(encoding='utf-8'))['cells'] for p in sorted(paths)}


def source(cell): return ''.join(cell['source'] or '')


def title(cells):
    "The title of a notebook"
    text = '\n'.join(source(c) for c in cells if c['cell_type'] == 'markdown')
    return re.search(r'^# (.+)$', text, re.M)[1]


def only_imports(text):
    try: nodes = ast.parse(text).body
    except SyntaxError: return False
    return bool(nodes) and all(isinstance(n, ast.Import | ast.ImportFrom) for n in nodes)


def minutes(cells):
    "How long a notebook takes to read, to five minutes: prose and code that the page shows"
    words = lines = 0
    for cell in cells:
        text = source(cell)
        if cell['cell_type'] == 'markdown':
            parts = re.split(r'^```.*$', text, flags=re.M)  # every second one is code
            words += sum(len(part.split()) for part in parts[::2])
            text = '\n'.join(parts[1::2])
        elif re.search(r'^#\|\s*(hide|echo: false)', text, re.M) or only_imports(text): continue
        lines += sum(bool(line.strip()) and not line.startswith('#|') for line in text.split('\n'))
    return max(5, 5 * round((words / WORDS_A_MINUTE + lines / LINES_A_MINUTE) / 5))


def duration(n, lang='en'):
    "Minutes in words"
    say = WORDS[lang]
    return say['minutes'].format(n) if n < 60 else say['hours'].format(*divmod(n, 60))


def levels():
    "Chapter -> (level, the chapters to read before it)"
    rows = tomllib.loads((NBS / 'levels.toml').read_text(encoding='utf-8'))
    return {chapter: (level, before) for chapter, (level, *before) in rows.items()}


def level_faults(names):
    "What is wrong with levels.toml: a name of no chapter, one to read before that comes later"
    at, found = {chapter: i for i, chapter in enumerate(names)}, []
    for chapter, (level, before) in levels().items():
        if level not in WORDS['en']: found.append(f'{chapter}: no level {level}')
        found += [f'no chapter {c}' for c in (chapter, *before) if c not in at]
        found += [f'{c} is to be read before {chapter}, but comes after it' for c in before
                  if at.get(c, 0) >= at.get(chapter, len(at))]
    return [f'nbs/levels.toml: {fault}' for fault in found]


# --- paths through the chapters: sections of the home page

PATHS = re.compile(r'(?s)(?<=<!-- paths -->).*?(?=^## |\Z)', re.M)
LINK = re.compile(r'\[([^\]]+)\]\(([^)#\s]+\.ipynb)\)')


def paths(cells):
    "The paths that a home page names: (title, the chapters in their order)"
    text = PATHS.search('\n'.join(map(source, cells)))
    sections = re.findall(r'(?ms)^### (.+?)\n(.*?)(?=^### |\Z)', text[0] if text else '')
    def chain(body): return [line for line in body.split('\n') if line.startswith('[')]
    return [(title, [name(to) for line in chain(body) for _, to in LINK.findall(line)])
            for title, body in sections]


def with_minutes(text, took, lang='en'):
    "A home page's text with the minutes behind each chapter of a path, and their sum"
    def section(m):
        return '\n'.join(chain(line) if line.startswith('[') else line for line in m[0].split('\n'))
    def chain(line):
        all = [took[name(to)] for _, to in LINK.findall(line) if name(to) in took]
        def one(m):
            known = name(m[2]) in took
            return f'{m[0]} {duration(took[name(m[2])], lang)}' if known else m[0]
        total = WORDS[lang]['sum'].format(duration(sum(all), lang))
        return LINK.sub(one, line) + total if len(all) > 1 else line
    return PATHS.sub(section, text)


# --- the way of the data, as a picture that leads to the chapters

WAY = [  # row: its title, the steps (in both languages, and the chapter), what comes out
    (('pretraining', '预训练'),
     [('text', '文本', 'own_data'), ('corpus', '语料', '1_data/corpus'),
      ('cleaning', '清洗', '1_data/cleaning'), ('tokenizer', '分词器', '1_data/tokenizer'),
      ('shards', '词元分片', '1_data/shards'), ('batches', '批', '1_data/order')],
     ('loss: next token', '损失：下一个词元')),
    (('fine-tuning', '监督微调'),
     [('instructions', '指令', '1_data/instructions'), ('packing', '打包', '1_data/packing'),
      ('batches', '批', '4_training/sft')],
     ('loss: the answer', '损失：只算回答')),
    (('alignment', '偏好对齐'),
     [('preferences', '偏好', '1_data/preferences'), ('DPO', 'DPO', '5_alignment/dpo'),
      ('reward model', '奖励模型', '5_alignment/reward'),
      ('policy gradient', '策略梯度', '5_alignment/grpo')],
     ('loss: pairs, or a reward', '损失：成对比较，或奖励')),
    (('training', '训练'),
     [('model', '模型', '2_model/gpt'), ('loop', '训练循环', '4_training/loop'),
      ('optimizer', '优化器', '4_training/optim'), ('stage', '阶段', '4_training/stage'),
      ('checkpoints', '检查点', '4_training/checkpoint'),
      ('curves', '曲线', '4_training/monitor')], None),
    (('use', '使用'),
     [('sampling', '采样', '3_inference/sampling'), ('chat', '对话', '3_inference/chat'),
      ('evaluation', '评测', '3_inference/evaluate'), ('export', '导出', '6_use/export'),
      ('serve', '服务', '6_use/serve')], None)]


def picture(lang='en', up=''):
    "The way of the data in HTML: rows that wrap on a narrow screen; `up` leads to the home page"
    at, rows = list(WORDS).index(lang), []
    for head, steps, loss in WAY:
        items = ''.join(f'<li><a href="{up}{step[2]}.html">{escape(step[at])}</a></li>'
                        for step in steps)
        end = f'<span class="way-loss">{escape(loss[at])}</span>' if loss else ''
        rows.append(f'<div class="way-row way-{head[0]}"><b>{head[at]}</b><ol>{items}</ol>{end}'
                    '</div>')
    label = WORDS[lang]['way']
    return f'<div class="way" role="group" aria-label="{label}">{"".join(rows)}</div>'


def home(text, took, lang='en', up=''):
    "The text of the home page as the site shows it: with minutes, and the picture with links"
    drawn = f'```{{=html}}\n{picture(lang, up)}\n```'
    text = re.sub(r'(?s)<!-- way -->\s*```.*?```', lambda m: drawn, text)
    return with_minutes(text, took, lang)


# --- a notebook to take away

def address():
    "The public address of the repository, from pyproject.toml; empty where none is known"
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    return project.get('urls', {}).get('Repository', '').rstrip('/').removesuffix('.git')


def first_cell(path, url):
    "What a downloaded notebook begins with: where it belongs; on Colab, the installation"
    text = f'# From the pages of lm_nb: nbs/{path} of the repository, where `make lab` opens it'
    folder = Path('/content/lm_nb/nbs') / path.parent
    if url: text += f"""
import sys
if 'google.colab' in sys.modules:  # there the package is installed first; elsewhere nothing is done
    !git clone -q --depth 1 {url} /content/lm_nb
    %pip install -q -e /content/lm_nb
    %cd {folder}
    sys.path.insert(0, '/content/lm_nb')"""
    return dict(cell_type='code', id='run-here', metadata={}, source=text, outputs=[],
                execution_count=None)


def downloadable(path, url, chinese=False):
    "A notebook as it is downloaded, as text"
    nb = json.loads((NBS / path).read_text(encoding='utf-8'))
    if chinese: translate.translate(nb, path)
    nb['cells'].insert(0, first_cell(path, url))
    return json.dumps(nb, ensure_ascii=False, indent=1) + '\n'


def colab(path, url):
    "Where Colab opens the notebook of the published site, or nothing: it reads GitHub only"
    m = re.fullmatch(r'https://github\.com/([\w.-]+/[\w.-]+)', url)
    return f'https://colab.research.google.com/github/{m[1]}/blob/gh-pages/notebooks/{path}' \
        if m else ''


# --- on each page

class Guide:
    "What the pages of one language say about themselves"
    def __init__(self,
        cells,      # place of a notebook under nbs/ -> its cells, in the language of the pages
        lang='en',
        url=None,   # the repository's public address; none: that of pyproject.toml
        there=None, # the pages that there are in this language, in a folder of their own; none: all
    ):
        self.there = there
        self.lang, self.say, self.at = lang, WORDS[lang], {name(p): p for p in cells}
        self.url = address() if url is None else url
        self.titles = {name(p): re.sub('[`*]', '', title(c)) for p, c in cells.items()}
        self.minutes = {name(p): minutes(c) for p, c in cells.items()}
        self.levels, self.paths = levels(), paths(cells.get(Path('index.ipynb'), []))
        english = json.loads((NBS / 'index.ipynb').read_text(encoding='utf-8'))['cells']
        self.anchors = [re.sub(r'[^\w-]+', '-', words.lower()).strip('-')  # in all languages
                        for words, _ in paths(english)]

    def link(self, chapter, here):
        to = f'{chapter}.html'
        if self.there is not None and to not in self.there: to = f'../{to}'  # in English
        to = os.path.relpath(to, Path(here).parent)
        return f'<a href="{to}">{escape(self.titles[chapter])}</a>'

    def home(self, text): return home(text, self.minutes, self.lang)

    def about(self, chapter):
        "The line under a title: level, time, what to read before, the paths that lead through"
        say, (level, before) = self.say, self.levels.get(chapter, ('further', []))
        parts = [f'<span class="level level-{level}" title="{say[level + "_for"]}">'
                 f'{say[level]}</span> '
                 + say['read'].format(duration(self.minutes[chapter], self.lang))]
        known = [self.link(c, chapter) for c in before if c in self.at]
        if known: parts.append(say['before'].format(say['comma'].join(known)))
        up = os.path.relpath('index.html', Path(chapter).parent)
        for anchor, (words, chain) in zip(self.anchors, self.paths):
            if chapter not in chain: continue
            k = chain.index(chapter)
            to = f'<a href="{up}#{anchor}">{escape(words)}</a>'
            after = chain[k + 1] if k + 1 < len(chain) else None
            then = say['onward'].format(self.link(after, chapter)) if after in self.at else ''
            parts.append(say['path'].format(to, k + 1, len(chain)) + then)
        return f'<p>{say["stop"].join(parts)}</p>'

    def run(self, chapter):
        "How to run a chapter: download, JupyterLab, Colab"
        say, path = self.say, self.at[chapter]
        file = os.path.relpath(f'notebooks/{path}', Path(chapter).parent)
        rows = [f'<a class="run-link" href="{file}" download>'
                f'{say["download"].format(path.name)}</a> {say["downloaded"]}',
                f'<a class="run-link" href="{LAB}/nbs/{path}">{say["lab"]}</a> '
                + say['lab_how'].format(f'nbs/{path}')]
        if to := colab(path, self.url):
            rows.append(f'<a class="run-link" href="{to}">{say["colab"]}</a> {say["colab_how"]}')
        items = ''.join(f'<li>{row}</li>' for row in rows)
        return f'<details class="run"><summary>{say["run"]}</summary><ul>{items}</ul></details>'

    def dress(self, html, chapter):
        "A page with the links to its neighbours at the top, too, and what it says about itself"
        if nav := re.search(r'<nav class="page-navigation">.*?</nav>', html, re.S):
            label = f' aria-label="{self.say["onward_label"]}"'
            top = nav[0].replace('"page-navigation"', f'"page-navigation page-top"{label}', 1)
            html = re.sub(r'<main\b[^>]*>', lambda m: m[0] + top, html, count=1)
        if chapter not in self.at or chapter == 'index': return html
        head = r'(?s)<header id="title-block-header".*?</header>'
        said = f'<div class="about">{self.about(chapter)}{self.run(chapter)}</div>'
        return re.sub(head, lambda m: m[0] + said, html, count=1)
