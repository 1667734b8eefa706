"Every message about one's own data stands on the page that explains them"
import ast
import json
import re
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT/'nbs'/'own_data.ipynb'
# what reads, divides and packs; `None`: all of a module, else the functions with these names
WHERE = dict.fromkeys(['data.sources', 'data.prose', 'data.corpus', 'data.mediawiki',
                       'data.cleaning', 'data.dedup', 'data.survey', 'data.instructions',
                       'data.packing', 'data.preferences', 'data.prepare', 'training.run'])
WHERE |= {'data.tokenizer': {'_explain'},
          'training.pretrain': {'many_passes', 'few_held_out', '_rare_pieces'},
          'training.sft': {'_foreign', '_too_long', '_rounded'}}

# messages that are not on the page: a part of each, and why
ELSEWHERE = {
    'a machine or a file that the page cannot make': [
        'the bytes of this name are no text in', 'cannot be read: ', 'broken row group',
        'nested too deeply', 'is at work here', 'cannot be worked in',
        'both answers are the same tokens'],
    'only code that calls the package can be the cause': [
        'earlier turns', 'leaves no room for an answer in a row of', 'does not fit into a row of',
        'there is no example to', 'an example takes', 'an example holds ids',
        'near-duplicate of a held-out document', 'no such folder of packed examples',
        'there is no example to write that fits', 'there is no pair to',
        'there is no answer to lay out', 'an answer with its prompt takes',
        'a fork takes over the first of', 'a fork needs a folder of its own'],
    'files of a run, not of its user': [
        'not an index of packed examples', 'written with another tokenizer',
        'the index does not fit its files', 'the file is damaged; write it again'],
    'about runs and models, not about data': [
        'a pair takes two',
        'is a file, not a run directory', 'is not empty and not a run', 'is not a recipe',
        'is no model folder', 'leaves a model', 'there is no model yet',
        "is longer than the base model's"],
    'about the microworld': ['paraphrases = ', 'asked = ', 'values = ', 'groups = '],
    'the number of what is named above it': ['sources that could not be read to their end'],
    'the tokenizer library gave up for a reason of its own': ['the tokenizer could not be trained']}
SAY = 'check', 'UserError', 'NoRecords', 'NothingFits', 'BadRow', 'reject', 'note'
PASSED_ON = {  # these hand on what another call above says
    'row.reason', 'reason', 'done.reason', 'str(e)', 'message[1]', 'what', 'wrong', 'empty'}


def shown():
    "What the page's tables say, as plain text, a row on a line"
    cells = json.loads(PAGE.read_text(encoding='utf-8'))['cells']
    outputs = [out['data'] for cell in cells for out in cell.get('outputs', ()) if 'data' in out]
    text = '\n'.join(''.join(data.get('text/markdown', '')) for data in outputs)
    return text.replace(r'\|', '|')


class Messages(ast.NodeVisitor):
    "The messages of a module: (line, pattern) of each, holes as `.*?`"
    def __init__(self, name):
        path = ROOT/'lm_nb'/(name.replace('.', '/') + '.py')
        tree, self.functions, self.values, self.found = ast.parse(path.read_text()), {}, {}, []
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef): self.functions[node.name] = node
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.values[node.targets[0].id] = [node.value]
        self.scopes = [self.values]
        if WHERE[name] is None: self.visit(tree)
        for function in WHERE[name] or ():
            self.found += [(self.functions[function].lineno, p)
                           for p in self.returned(function)]

    def visit_FunctionDef(self, node):
        self.scopes.append(self.names(node))
        self.generic_visit(node)
        self.scopes.pop()

    def names(self, function):
        "What is assigned to each name in a function"
        found = {}
        for node in ast.walk(function):
            if not isinstance(node, ast.Assign | ast.NamedExpr): continue
            for target in getattr(node, 'targets', None) or [node.target]:
                pair = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                names = zip(target.elts, node.value.elts) if pair else [(target, node.value)]
                for name, value in names:
                    if isinstance(name, ast.Name): found.setdefault(name.id, []).append(value)
        return found

    def visit_Call(self, node):
        name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
        at = {'check': 1}.get(name, 0)
        said = len(node.args) > at and ast.unparse(node.args[at]) not in PASSED_ON
        if name in SAY and said:
            self.found += [(node.lineno, p) for p in self.patterns(node.args[at])]
        self.generic_visit(node)

    def returned(self, name):
        "The patterns of what a function of the module returns"
        function = self.functions[name]
        self.scopes.append(self.names(function))
        nodes = [n.value for n in ast.walk(function) if isinstance(n, ast.Return) and n.value]
        found = [p for n in nodes for p in self.patterns(n) if p]
        self.scopes.pop()
        return found

    def patterns(self, node, deep=4):
        "The texts that an expression may be"
        if isinstance(node, ast.Constant):
            return [re.escape(node.value)] if isinstance(node.value, str) else ['.*?']
        if isinstance(node, ast.IfExp):
            return self.patterns(node.body, deep) + self.patterns(node.orelse, deep)
        several = None
        if isinstance(node, ast.JoinedStr):
            several = [v.value if isinstance(v, ast.FormattedValue) else v for v in node.values]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            several = [node.left, node.right]
        if several: return [''.join(p) for p in product(*(self.patterns(n, deep) for n in several))]
        if isinstance(node, ast.Name) and deep:
            values = next((s[node.id] for s in self.scopes[::-1] if node.id in s), [])
            return [p for v in values for p in self.patterns(v, deep - 1)] or ['.*?']
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and deep:
            if node.func.id in self.functions: return self.returned(node.func.id) or ['.*?']
        if isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'format':
            return [p.replace(r'\{\}', '.*?') for p in self.patterns(node.func.value, deep)]
        return ['.*?']


def messages(name):
    "The messages of a module that hold words of their own, blanks as a table shows them"
    found = dict.fromkeys((line, re.sub(r'(\\\s)+', r'\\ ', p)) for line, p in Messages(name).found)
    return [(line, p) for line, p in found if re.search(r'[^\W\d]{3}', p.replace('.*?', ''))]


def words(pattern): return re.sub(r'\\(.)', r'\1', pattern.replace('.*?', '…'))


def excepted(pattern):
    return [part for parts in ELSEWHERE.values() for part in parts if part in words(pattern)]


def test_messages_are_seen_as_python_gives_them():
    found = [words(p) for _, p in messages('data.sources')]
    assert '…: no such file or folder…' in found
    assert any('perhaps GB 18030: set encoding=gb18030, or errors=replace' in p for p in found)
    assert 'files skipped: hidden' in found  # through a function
    assert 'turns left off: their conversation is longer than … tokens' in [
        words(p) for _, p in messages('data.instructions')]
    assert sum(len(messages(name)) for name in WHERE) > 120


@pytest.mark.parametrize('name', WHERE)
def test_the_page_shows_every_message(name):
    text = shown()
    absent = [f'{line}: {words(p)}' for line, p in messages(name)
              if not excepted(p) and not re.search(p, text)]
    todo = f'make them on {PAGE.name}, or say in ELSEWHERE why not'
    assert not absent, '\n'.join([todo, *absent])


def test_nothing_is_excepted_that_is_not_there():
    used = {part for name in WHERE for _, p in messages(name) for part in excepted(p)}
    assert {part for parts in ELSEWHERE.values() for part in parts} <= used


def test_the_page_shows_every_rule_of_cleaning():
    from lm_nb.data.cleaning import _RULES
    absent = [rule for rule in _RULES if not re.search(f'(rejected|changed): {rule}', shown())]
    assert not absent
    assert all(re.search(f'rejected: {why}', shown()) for why in ('duplicate', 'near-duplicate'))
