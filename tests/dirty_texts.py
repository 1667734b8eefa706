"Texts, damaged and healthy, for the tests of cleaning and of duplicates"
import json
import os
import random
from functools import cache
from pathlib import Path

import pytest

from lm_nb.core import root
from lm_nb.data.tokenizer import _SPECIALS

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


# what text is made of where it is dirty: each kind with its own traps
SCRIPTS = {
    'ascii': [chr(c) for c in range(128)],
    'latin': [chr(c) for c in range(0x80, 0x250)],
    'combining': ['e\u0301', '\u0308', 'o\u0302\u0323', '\u3099'],
    'han': [chr(c) for c in range(0x4e00, 0x9fff, 7)],
    'rare han': [chr(c) for c in range(0x20000, 0x2a6df, 41)],
    'kana': [chr(c) for c in range(0x3040, 0x30ff)],
    'hangul': [chr(c) for c in range(0xac00, 0xd7a3, 37)] + ['\u1112\u1161\u11ab'],
    'arabic': list('مرحبا بالعالم\u064b\u0651'),
    'hebrew': list('שלום עולם\u05b8'),
    'devanagari': list('नमस्ते\u094d\u200d'),
    'thai': list('สวัสดีชาวโลก'),
    'emoji': ['👩\u200d🚀', '🇨🇳', '👍🏽', '❤\ufe0f', '🏴\U000e0067\U000e0062\U000e007f',
              '#\ufe0f\u20e3'],
    'direction': list('\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2069'),
    'space': list(' \t\n\r\v\f\x1c\x85\xa0\u2003\u2028\u2029\u3000\u200b\u2060\ufeff'),
    'control': list('\0\x01\x07\x08\x1b\x7f\x80\x9f'),
    'wide': list('，。！？（）「」ＡＢｃ１２﹏～'),
    'sentencepiece': list('▁▅⁇') + ['▁▁', ' ▁', '▁ ', '<0xE4>', '<unk>', ' ⁇ '],
    'non-characters': list('\ufffe\uffff\U0001ffff\U0010ffff\ufdd0\ufffd'),
    'private': list('\ue000\uf8ff\U000f0000'),
}
FORMS = [*_SPECIALS, '<|assistant|>', '<|endoftext|>', '<|im_start|>', '[INST]', '<bos>', '<eos>',
         '\x02', '\x03']


def fuzzed(rand):
    "A short text out of one to three of the scripts"
    kinds = rand.sample(sorted(SCRIPTS), rand.randint(1, 3))
    return ''.join(rand.choice(SCRIPTS[rand.choice(kinds)]) for _ in range(rand.randint(0, 60)))


def smuggled(rand):
    "Something that looks like a marker, or nearly"
    words = [rand.choice(FORMS) if rand.random() < .7 else fuzzed(rand)[:9]
             for _ in range(rand.randint(1, 6))]
    def twist(w):
        match rand.randrange(8):
            case 0: return w.upper()
            case 1: return w.replace('<', '＜').replace('>', '＞').replace('|', '｜')
            case 2: return '\u200b'.join(w)
            case 3: return ''.join(f'<0x{b:02X}>' for b in w.encode())
            case 4: return w.replace('|', '▁|') + '▁'
            case 5: return w[:-1] + '\n' + w[-1:]
            case _: return w
    return rand.choice(['', ' ', '\n', '▁']).join(map(twist, words))
