"Texts, damaged and healthy, for the tests of cleaning and of duplicates"
import json
import os
import random
from functools import cache
from pathlib import Path

import pytest

from lm_nb.core import root

REAL = Path(os.environ.get('LM_NB_REAL_DATA', root().parent/'shared'/'data'))
needs_real = pytest.mark.skipif(
    not (REAL/'alpaca_zh_demo.json').exists(),
    reason='needs wiki_demo.txt and alpaca_zh_demo.json; set LM_NB_REAL_DATA to their folder')

ARTICLE = ('茶树原产于中国西南部，唐代陆羽著有《茶经》，系统地记述了种茶、制茶和饮茶的方法。宋人好斗茶，点茶的技艺由此传到日本。'
           '明代以后，散茶取代了团茶，人们改用沸水冲泡，紫砂壶也随之流行。'
           '十七世纪，荷兰商人把茶叶带到欧洲，不久英国人养成了午后饮茶的习惯。')

HOSTILE = [
    '', ' ', '\n' * 10_000, '\ufeff', '\x00' * 1000, '\ud83d', 'a\udc00b' * 50, 'שלום ' * 60,
    '👩\u200d👩\u200d👧' * 99, '\u202e' + ARTICLE, 'é' * 999, 'e\u0301' * 999, '\u200b' * 99,
    '<script>alert(1)</script>' * 9, 'x' * 1_000_000, '茶' * 400_000,
    ' '.join('ab' for _ in range(300_000)), '\r' * 5000, 'Ã' * 5000, 'Ã©' * 5000,
    '\U0010ffff' * 99, '( ' * 9999, '|' * 120 + '>', '首页' + ' ' * 50]


@cache
def alpaca():
    "A thousand Chinese instructions with their answers"
    records = json.loads((REAL/'alpaca_zh_demo.json').read_text(encoding='utf-8'))
    return ['\n'.join([r['instruction'], r['input'], r['output']]) for r in records]


@cache
def wiki():
    "Thirty articles of the English Wikipedia"
    return (REAL/'wiki_demo.txt').read_text(encoding='utf-8').strip().split('\n')


def counted(texts, report):
    "The texts, each a row of the report"
    for text in texts:
        report.row()
        yield text


def adds_up(report): return report.rows == report.kept + sum(n for n, _ in report.rejected.values())


def random_units(kind, rng, n):
    if kind == 'zh': return [chr(rng.randrange(0x4e00, 0x8000)) for _ in range(n)]
    letters = 'abcdefghijklmnopqrstuvwxyz'
    return [''.join(rng.choices(letters, k=rng.randrange(2, 9))) for _ in range(n)]


def near_duplicates(kind, n, most, seed=0):
    "Documents, each with a copy in which a share of the units, up to `most`, was changed"
    rng, pairs = random.Random(f'{kind} {seed}'), []
    for i in range(n):
        row = random_units(kind, rng, rng.randrange(80, 600))
        copy = []
        for u in row:
            what = rng.random()
            if what >= most*i/n: copy.append(u)
            elif what < most*i/n/3: copy += [u, *random_units(kind, rng, 1)]
            elif what < most*i/n*2/3: copy += random_units(kind, rng, 1)
        pairs.append(tuple(('' if kind == 'zh' else ' ').join(r) for r in (row, copy)))
    return pairs
