"Near-duplicates that were planted, parts that share nothing, and the whole pipeline"
import json
import random
import subprocess
import sys
import tracemalloc
from itertools import islice
from zlib import crc32

import numpy as np
import pytest
from dirty_texts import (
    ARTICLE, HOSTILE, adds_up, alpaca, counted, near_duplicates, needs_real, random_units, wiki)
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_nb.core import UserError, root, worker_count
from lm_nb.data import dedup
from lm_nb.data.cleaning import CleanConfig, RuleStats, clean_text, normalize, units
from lm_nb.data.sources import Report
from lm_nb.data.dedup import (
    LeakFilter, MinHashIndex, _Buckets, _detection_probability, _drop_duplicates, _essence,
    _Holdout, _jaccard, _shingles, clean_documents, datatrove_documents, datatrove_signatures,
    find_contamination, held_out, minhash, read_documents, train_valid_split, uniform_hash)
from lm_nb.data.microworld import write_microworld

EXACT = CleanConfig(dedup='exact')


# ---- near-duplicates

@pytest.mark.parametrize('kind', ['zh', 'en'])
def test_planted_copies_are_found(kind):
    pairs = near_duplicates(kind, 800, .06)
    truth = np.array([_jaccard(a, b) for a, b in pairs])
    index = MinHashIndex()
    for a, _ in pairs: index.add(minhash(a))
    found = np.array([index.find(minhash(b)) == i for i, (_, b) in enumerate(pairs)])
    near, edge = truth >= .8, (truth >= .8) & (truth < .83)
    assert near.sum() > 300 and edge.sum() > 25
    assert found[near].mean() >= .98 and found[edge].mean() >= .93
    assert found[truth < .55].mean() <= .01
    rng = random.Random(f'other {kind}')
    others = [' '.join(random_units(kind, rng, 200)) for _ in range(500)]
    assert sum(index.find(minhash(t)) is not None for t in others) == 0


@needs_real
def test_planted_in_real_text():
    "Real documents, their edited copies between them: the copies go, next to nothing else does"
    rng = random.Random(0)
    words = [t.split(' ') for t in wiki()]
    pieces = [' '.join(w[i:i + 300]) for w in words for i in range(0, 900, 300) if len(w) > i + 300]
    docs = list(dict.fromkeys([t for t in alpaca() if len(t) > 150] + pieces))

    def edit(t):
        at = rng.randrange(len(t) - 20)
        return t[:at] + '（编者注：此处有改动）' + t[at + 12:]
    edited = {i: edit(docs[i]) for i in range(0, len(docs), 4)}
    copies = {i: c for i, c in edited.items() if _jaccard(docs[i], c) >= .8}
    assert len(copies) > 150
    stream = [t for i, d in enumerate(docs) for t in ([d, copies[i]] if i in copies else [d])]
    report = Report()
    kept = set(_drop_duplicates(counted(stream, report), report=report))
    assert adds_up(report) and sum(c not in kept for c in copies.values()) >= .98*len(copies)
    assert sum(d not in kept for d in docs) <= .01*len(docs)


def test_formula_and_chance():
    assert _detection_probability(.8) >= .988 and _detection_probability(.9) > .9999
    assert _detection_probability(.4) < 1e-6
    for t in (.7, .95): assert _detection_probability(t, t) >= .988


@pytest.mark.parametrize('a, b', [
    ('张三打了李四，王五在旁边看着。', '李四打了张三，王五在旁边看着。'),
    ('the dog bit the man who ran', 'the man who ran bit the dog')])
def test_order_matters(a, b): assert _jaccard(a, b) < .8 and sorted(units(a)) == sorted(units(b))


def test_presentation_does_not_matter():
    assert _jaccard(ARTICLE, ARTICLE.replace('，', ', ').replace('。', '。\n\n')) == 1
    assert _jaccard('The River Ash rises here.', 'the river ash RISES, here') == 1


@pytest.mark.parametrize('drop', [clean_documents, _drop_duplicates])
def test_the_first_of_several_stays_and_the_rest_is_counted(drop):
    copies, report = [ARTICLE + f'（第{i}版）' for i in range(5)], Report()
    texts = counted([*copies, 'A quite different text.', copies[0], copies[1]], report)
    assert list(drop(texts, report=report)) == [copies[0], 'A quite different text.']
    counts = {why: n for why, (n, _) in report.rejected.items()}
    assert counts == {'near-duplicate': 4, 'duplicate': 2} and adds_up(report)
    assert list(drop(copies * 2, EXACT)) == copies
    assert list(drop(copies * 2, CleanConfig(dedup='none'))) == copies * 2


def test_a_band_that_all_share_stays_cheap():
    table, index = _Buckets(), MinHashIndex()
    for n in range(5000): table.insert(7 if n % 2 else n, n)
    assert len(table.get(7)) == 32 and table.get(8) == [8] and table.get(4998) == [4998]
    rows = np.random.default_rng(0).integers(0, 2**32, (300, 128), np.uint32)
    rows[:, :40] = 5  # half of the bands are the same everywhere
    for row in rows: index.add(row)
    assert [index.find(row) for row in rows] == list(range(300))


def test_memory_of_the_index():
    rng, index = np.random.default_rng(0), MinHashIndex()
    index.add(minhash('x'))
    tracemalloc.start()
    for row in rng.integers(0, 2**32, (2000, 128), np.uint32): index.add(row)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used/2000 < 1_200


SIGNS = [
    '😀😀😀', '😀😡', '？？？！', '……', '2+3=?', '2+4=?', '2-3=?', 'x^2 + y^2 = z^2',
    'x^2 - y^2 = z^2', '1 + 1 = 2', '1 - 1 = 2', '(a∨b)∧¬c', '(a∧b)∨¬c', '---', '===', '♜♞♝',
    '\u200b', '\u0301']


def test_texts_of_signs_are_no_duplicates_of_each_other():
    keep = CleanConfig(clean='none', dedup='near')
    assert list(_drop_duplicates(SIGNS, keep)) == SIGNS
    assert list(_drop_duplicates(SIGNS * 2, keep)) == SIGNS
    holdout = _Holdout(SIGNS, .5, cfg=keep)
    assert {holdout.part(text) for text in SIGNS} == {'train', 'valid'}


@given(st.sets(st.text(st.sampled_from('+-=?！。😀😡∧∨()^1'), min_size=1, max_size=5), max_size=20))
@settings(max_examples=200, deadline=None)
def test_only_equal_signs_are_duplicates(texts):
    signs = [text for text in texts if text.count('1') <= len(text)/2]
    assert list(_drop_duplicates(signs, CleanConfig(dedup='near'))) == signs


@pytest.mark.parametrize('text', ['', '，。', 'a', '茶', '😀', '\ud800', 'A' * 100_000])
def test_any_text_has_a_signature(text):
    assert minhash(text).shape == (128,) and (minhash(text) == minhash(text)).all()
    assert len(_shingles(text)) <= 1


# ---- parts

@pytest.mark.parametrize('kind', ['zh', 'en'])
def test_no_copy_on_the_other_side(kind):
    pairs = near_duplicates(kind, 600, .05, seed=1)
    docs = [t for pair in pairs for t in pair]
    near = [(a, b) for a, b in pairs if _jaccard(a, b) >= .8]
    apart = [(a, b) for a, b in near if held_out(a, .3) != held_out(b, .3)]
    report = Report()
    parts = train_valid_split(counted(docs, report), .3, report=report)
    train, valid = map(set, parts)
    leaks = [(a, b) for a, b in apart if {a, b} <= train | valid]
    assert len(apart) > 80 and len(leaks) <= .02*len(apart)
    assert valid == {d for d in docs if held_out(d, .3)} and not train & valid
    alone = {t for pair in pairs if not any(held_out(t, .3) for t in pair) for t in pair}
    assert len(alone - train) <= .01*len(alone)
    assert report.kept == sum(map(len, parts)) and adds_up(report)


def test_a_corpus_may_grow_and_validation_stays():
    docs = [f'{ARTICLE[:40]} {i}' * 3 for i in range(300)]
    few, many = (train_valid_split(some, .2, cfg=EXACT)[1] for some in (docs[:100], docs))
    assert few == many[:len(few)] and 10 < len(few) < 35
    assert train_valid_split(docs, 0)[1] == [] and train_valid_split(docs[:3], 1)[0] == []
    assert 0 <= uniform_hash('\ud800') < 1


def test_holdout_answers_for_one_document_at_a_time():
    docs = [t for pair in near_duplicates('zh', 40, .02) for t in pair]
    holdout, (train, valid) = _Holdout(iter(docs), .5), train_valid_split(docs, .5)
    assert [d for d in docs if holdout.part(d) == 'train'] == train
    assert [d for d in docs if holdout.part(d) == 'valid'] == valid
    assert _Holdout(docs, .5, cfg=EXACT).part(docs[0]) in ('train', 'valid')


# ---- copies of what is held out

@pytest.mark.parametrize('held, copy', [
    ('What is the capital of Iceland?', 'what is the  capital of Iceland'), ('2+3=?', '2 + 3 = ?'),
    ('2+3=?', '２＋３＝？'), ('What’s tea?', "What's tea"), ('Translate: cat', 'translate “cat”.'),
    ('茶是什么？', '茶是什么'), ('茶 是 什么?', '茶是什么？'),
    ('写一首关于春天的诗。', '写一首关于春天的诗！'),
    ('用Python写一个函数', '用 Python 写一个函数。'), ('Ｗｈａｔ is AI？', 'What is AI?'),
    ('列出3种水果：', '列出 3 种水果'), ('- Name a river', 'Name a river.'),
    ('把“你好”翻译成英文', '把「你好」翻译成英文'), ('Well-known rivers', 'well known rivers'),
    ('Line one\nline two', 'Line one line two'), ('**Bold** claim?', 'Bold claim'),
    ('😀 是什么', '😀是什么？')])
def test_a_near_copy_of_a_short_prompt(held, copy):
    for kind in 'near', 'exact', 'none':
        for a, b in (held, copy), (copy, held):
            assert LeakFilter([a], CleanConfig(dedup=kind)).leaked(b)


LONG_SLOT = 'Translate the following English word into Chinese and give only the answer: '
ZH_SLOT = '请把下面这个英文单词翻译成中文，只给出答案，不要解释，也不要重复题目：'
OTHERS = [
    ('2+3=?', '2+4=?'), ('2+3=?', '2-3=?'), ('2*3', '2/3'), ('3.5', '35'), ('1,2', '12'),
    ('-3', '3'), ('50%', '50'), ('5!', '5'), ('2*(3+4)', '(2*3)+4'), ('x - y', 'x * y'),
    ('x-y', 'x/y'), ('x<y', 'x>y'), ('2^3', '23'), ('2²', '22'),
    ('Translate: cat', 'Translate: car'), ('the rapist', 'therapist'), ('C++', 'C#'), ('C#', 'C'),
    ('What is the capital of Iceland?', 'What is the capital of Ireland?'), ('12:30', '1:230'),
    ('Who wrote Hamlet?', 'Who wrote Macbeth?'), ('?', '!'), ('😀', '😡'), ('。', '？'),
    ('[1, 2]', '[12]'), ('翻译：猫', '翻译：狗'), ('茶是什么？', '水是什么？'),
    ('张三打了李四', '李四打了张三'), ('3×4等于几', '3+4等于几'),
    ('把“你好”翻译成英文', '把“您好”翻译成英文'), ('写一首关于春天的诗', '写一首关于秋天的诗'),
    ('第1章', '第11章'),
    (LONG_SLOT + 'cat', LONG_SLOT + 'car'), (ZH_SLOT + 'cat', ZH_SLOT + 'car'),
    ('Tom has 3 apples and buys 4 more. How many?', 'Tom has 3 apples and buys 5 more. How many?')]


@pytest.mark.parametrize('a, b', OTHERS)
def test_another_prompt(a, b):
    for held, text in (a, b), (b, a): assert not LeakFilter([held]).leaked(text)
    others = [text for pair in OTHERS for text in pair if text not in (a, b)]
    assert not LeakFilter([a]).leaked(b) and not LeakFilter(set(others)).leaked('Another one: ' + a)


@pytest.mark.parametrize('kind, gap', [('zh', ''), ('en', ' ')])
def test_longer_prompts_may_be_edited_and_templates_are_no_copies(kind, gap):
    rng = random.Random(0)
    row = random_units(kind, rng, 120)
    edited = gap.join([*row[:60], *random_units(kind, rng, 1), *row[61:]])
    assert LeakFilter([gap.join(row)]).leaked(edited)
    assert not LeakFilter([gap.join(row)], EXACT).leaked(edited)
    slots = random_units(kind, rng, 12)
    prompts = [gap.join([*row, slot]) for slot in slots]
    filled = LeakFilter(prompts[:6])
    assert [filled.leaked(p) for p in prompts] == [True]*6 + [False]*6


def test_documents_are_compared_whatever_their_length():
    short = ARTICLE[:40]
    near = short.replace('。', '') + '。'
    assert LeakFilter([short + '甲乙丙'], documents=True).leaked(short + '甲乙丁')
    assert not LeakFilter([short + '甲乙丙']).leaked(short + '甲乙丁')
    assert LeakFilter([short], EXACT, documents=True).leaked(near)
    pairs = near_duplicates('zh', 60, .02)
    held, index = LeakFilter([a for a, _ in pairs], documents=True), MinHashIndex()
    for a, _ in pairs: index.add(minhash(a))
    for _, b in pairs: assert held.leaked(b) == (index.find(minhash(b)) is not None)
    assert not LeakFilter([]).leaked(short) and LeakFilter(['\ud800']).leaked('\ud800')


@given(st.text(st.characters(exclude_categories=[]), min_size=1, max_size=60))
@settings(max_examples=300, deadline=None)
def test_what_counts_of_a_prompt(text):
    once = _essence(text)
    assert LeakFilter([text]).leaked(text) and _essence(f' {text}\n') == once
    assert [c for c in once if c.isspace()] == [' '] * once.count(' ') and once == once.strip()


# ---- questions in training text

def test_questions_are_found_inside_long_documents():
    rng = random.Random(0)
    zh = [''.join(random_units('zh', rng, 30)) + '？' for _ in range(40)]
    en = [' '.join(random_units('en', rng, 14)) + '?' for _ in range(40)]

    def page(q):
        before, after = (random_units(kind, rng, n) for kind, n in (('zh', 900), ('en', 300)))
        return ''.join(before) + q.upper().replace('？', ' ?\n') + ' '.join(after)
    docs = [page(q) for q in zh[:20] + en[:20]] + [page('') for _ in range(60)]
    rng.shuffle(docs)
    result = find_contamination(zh + en, docs)
    assert set(result.found) == set(zh[:20] + en[:20])
    assert result.documents == 100 and not result.unjudged
    for q, (share, number, _) in result.found.items():
        assert share == 1 and q[:8].upper() in docs[number]


def test_half_a_question_and_a_short_one():
    q = ''.join(random_units('zh', random.Random(1), 60))
    assert find_contamination([q], [q[:50]]).found[q][0] > .7
    assert find_contamination([q], [q[:30]]).found == {}
    assert find_contamination(['1+1=?', '谁？', q], ['1+1=? 谁？']).unjudged == ['1+1=?', '谁？']
    assert find_contamination([], [q]).found == {} and find_contamination([q], []).documents == 0
    assert find_contamination(['静夜思的作者是谁'], ['请问《静夜思》的作者是谁？']).found


@needs_real
def test_instructions_are_not_in_the_articles():
    questions = [t.split('\n')[0] for t in alpaca()]
    assert find_contamination(questions, wiki()).found == {}
    found = find_contamination(questions, alpaca()[::2]).found
    unjudged = find_contamination(questions, []).unjudged
    asked = [q for q in questions[::2] if len(q) > 8]
    assert len(asked) > 450 and [q for q in asked if q not in found and q not in unjudged] == []


# ---- the pipeline

@needs_real
def test_good_text_passes():
    report = Report()
    list(clean_documents(counted(alpaca(), report), CleanConfig(dedup='none'), report))
    assert adds_up(report) and report.kept >= 990


def test_the_microworld_passes_unchanged(tmp_path):
    lines = write_microworld(tmp_path/'m', paraphrases=2)['text'].read_text(encoding='utf-8')
    texts, report = [json.loads(line)['text'] for line in lines.splitlines()], Report()
    assert list(clean_documents(counted(texts, report), report=report)) == texts
    assert not report.notes


def test_stats_count_what_the_report_counts():
    damaged = 'ä½\xa0å¥½ï¼\x8cä¸\x96ç\x95\x8cï¼\x81' + ARTICLE
    dirty = [ARTICLE, ARTICLE + '\n点击查看更多', 'x', damaged, '哈' * 500, '版权所有 © 某某公司',
             'a\x00b' * 9]
    report, stats = Report(), RuleStats(keep=1)
    out = list(clean_documents(counted(dirty, report), CleanConfig(dedup='none'), report, stats))
    assert adds_up(report) and report.kept == len(out) == 4
    rejected = {why: n for why, (n, _) in report.rejected.items()}
    assert rejected == dict(stats.rejected) == {'too short': 1, 'repetition': 1, 'boilerplate': 1}
    assert report.notes == {f'changed: {rule}': n for rule, n in stats.changed.items()}
    assert dict(stats.changed) == {'boilerplate': 1, 'mojibake': 1, 'invisible characters': 1}
    assert stats.examples['boilerplate'][0][1] == '\n点击查看更多'
    assert all(len(examples) == 1 for examples in stats.examples.values())


# ---- processes

def test_the_number_of_processes_changes_nothing():
    texts = [f'{a}\n点击查看更多' for a, _ in near_duplicates('zh', 60, 0)] * 2
    texts += ['x', '哈' * 500] * 700
    results = []
    for workers in (0, 2):
        report, stats, cfg = Report(), RuleStats(), CleanConfig(clean_workers=workers)
        out = list(clean_documents(counted(texts, report), cfg, report, stats))
        results.append((out, report, stats))
    assert results[0] == results[1] and adds_up(results[0][1]) and len(results[0][0]) == 60


def test_there_are_no_more_processes_than_cores(monkeypatch, capsys):
    asked, cores = [], worker_count(10**6)

    def map_here(function, items, workers, n):
        asked.append(workers)
        yield from ((item, function(item)) for item in items)
    monkeypatch.setattr(dedup, 'map_ordered', map_here)
    assert list(clean_documents([ARTICLE], CleanConfig(clean_workers=1000))) == [ARTICLE]
    assert asked == [cores] and 'clean_workers = 1000' in capsys.readouterr().err


def test_processes_do_not_read_ahead_without_end_and_stop_when_told():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield ARTICLE
    stream = clean_documents(endless(), CleanConfig(clean_workers=1, dedup='none'))
    assert next(stream) == ARTICLE and len(taken) <= 5*1024
    stream.close()

    def failing():
        yield ARTICLE
        raise UserError('the file ended')
    with pytest.raises(UserError, match='^the file ended$'):
        list(clean_documents(failing(), CleanConfig(clean_workers=1)))


@pytest.mark.parametrize('stop', [0, 1, 7, 40, 10_000])
def test_what_is_read_ahead_is_in_no_report(tmp_path, stop):
    lines = [json.dumps({'text': f'{a}\n点击查看更多'}, ensure_ascii=False)
             for a, _ in near_duplicates('zh', 40, 0)]
    lines = [line for text in lines for line in (text, '{broken', '{"text": "短"}', '{"text": 3}')]
    (tmp_path/'a.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    results = []
    for workers in (0, 2):
        report, stats, cfg = Report(), RuleStats(), CleanConfig(clean_workers=workers)
        stream = read_documents(tmp_path/'a.jsonl', cfg, report, stats=stats)
        out = list(islice(stream, stop))
        results.append((out, report.check(), stats, report.kept))
    assert results[0] == results[1] and report.kept == len(out) == min(stop, 40)
    assert stop == 10_000 or report.rows <= 4*stop


@pytest.mark.parametrize('workers', [0, 2])
def test_a_source_that_breaks_off_gives_what_came_before(tmp_path, workers):
    texts = [a for a, _ in near_duplicates('zh', 5, 0)]
    whole = json.dumps([{'text': t} for t in [*texts, 'x']], ensure_ascii=False)
    (tmp_path/'a.json').write_text(whole[:-1], encoding='utf-8')
    report, out = Report(), []
    with pytest.raises(UserError, match='cut off'):
        cfg = CleanConfig(clean_workers=workers)
        for text in read_documents(tmp_path/'a.json', cfg, report): out.append(text)
    assert out == texts and report.check().rows == 6 and report.kept == 5


# ---- hostile texts

@pytest.mark.parametrize('cfg', [
    CleanConfig(), CleanConfig(clean='light', dedup='exact'), CleanConfig(clean='none')])
def test_hostile_texts_are_kept_or_counted(cfg):
    report, stats = Report(), RuleStats()
    out = list(clean_documents(counted(HOSTILE, report), cfg, report, stats))
    assert adds_up(report) and report.rows == len(HOSTILE) and len(out) == report.kept
    if cfg.clean != 'none':
        for text in out: text.encode()
    str(report), stats._repr_html_()


def test_a_long_line_is_cleaned_in_bounded_memory():
    text = ''.join(random_units('zh', random.Random(0), 200_000))  # 600 KB in one line
    tracemalloc.start()
    assert clean_text(text).text == text and len(minhash(text)) == 128
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40*len(text) + 12_000_000  # and 8 MB for a piece of the signature


ODD = st.one_of(
    st.text(max_size=80), st.text(st.characters(exclude_categories=[]), max_size=40),
    st.text(st.sampled_from('茶树原产于中国，。\n '), max_size=120), st.sampled_from(HOSTILE[:14]),
    st.lists(st.sampled_from(['点击查看更多', ARTICLE, '版权所有', 'Home | About',
                              'The naÃ¯ve cafÃ©', '\x00', 'text ']), max_size=6).map('\n'.join))


@given(st.lists(ODD, min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_fuzzed_documents_are_accounted_for(texts):
    report = Report()
    out = list(clean_documents(counted(texts, report), report=report))
    assert adds_up(report) and report.rows == len(texts)
    assert len(out) == report.kept == len(set(out))
    for text in out:
        text.encode()
        assert normalize(text) == text and sum(map(str.isalnum, text)) >= 10


# ---- reading, and datatrove

AS_IT_IS = CleanConfig(clean='none', dedup='none')


def put(folder, k, texts):
    folder.mkdir(exist_ok=True)
    lines = (json.dumps({'text': t}) for t in texts)
    (folder/f'{k}.jsonl').write_text('\n'.join(lines), encoding='utf-8')


def test_read_documents(tmp_path):
    put(tmp_path/'in', 0, [ARTICLE, ARTICLE, ARTICLE + '。再版', '', 'x'])
    report, ticks = Report(), []
    assert list(read_documents(tmp_path/'in', report=report, tick=ticks.append)) == [ARTICLE]
    assert adds_up(report) and report.rows == 5
    assert set(report.rejected) == {'duplicate', 'near-duplicate', 'empty', 'too short'}
    assert sum(ticks) > 0
    light = CleanConfig(clean='light', dedup='exact')
    assert list(read_documents(tmp_path/'in', cfg=light)) == [ARTICLE, ARTICLE + '。再版', 'x']


def test_datatrove_runs_the_same_functions(tmp_path):
    pytest.importorskip('datatrove', reason='needs the optional extra datatrove')
    from functools import partial

    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import minhash as theirs
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers import ParquetWriter
    pairs = near_duplicates('zh', 12, 0) + near_duplicates('en', 12, 0)
    pairs = [(a, b + (' 再版' if k < 12 else ' second edition')) for k, (a, b) in enumerate(pairs)]
    for k in range(2):
        put(tmp_path/'in', k, [p[k] for p in pairs] + [pairs[0][k], 'x', '点击查看更多'])

    def go(name, tasks, *blocks):
        logs = str(tmp_path/'logs'/name)
        LocalPipelineExecutor(list(blocks), tasks=tasks, workers=1, logging_dir=logs).run()

    clean_all = partial(datatrove_documents, source=tmp_path/'in', reports=tmp_path)
    go('clean', 3, clean_all, ParquetWriter(str(tmp_path/'clean')))
    texts = list(read_documents(tmp_path/'clean', cfg=AS_IT_IS))
    assert texts == [p[k] for k in range(2) for p in pairs]
    files = [tmp_path/f'{k:05d}.json' for k in range(3)]
    reports = [json.loads(file.read_text(encoding='utf-8')) for file in files]
    assert [r['rows'] for r in reports] == [27, 27, 0]
    assert reports[0]['rejected']['duplicate'][0] == 1

    clean, sig = str(tmp_path/'clean'), datatrove_signatures(tmp_path/'sig')
    pairs_of, remove, cfg = str(tmp_path/'pairs'), str(tmp_path/'remove'), sig.config
    go('sig', 2, ParquetReader(clean), sig)
    go('buckets', cfg.num_buckets,
       theirs.MinhashDedupBuckets(str(tmp_path/'sig'), pairs_of, config=cfg))
    go('cluster', 1, theirs.MinhashDedupCluster(pairs_of, remove, config=cfg))
    go('filter', 2, ParquetReader(clean), theirs.MinhashDedupFilter(remove),
       ParquetWriter(str(tmp_path/'final')))
    final = list(read_documents(tmp_path/'final', cfg=AS_IT_IS))
    assert len(final) == 24 and all((a in final) != (b in final) for a, b in pairs)


@pytest.mark.parametrize('module', ['cleaning', 'dedup'])
def test_light_to_import(module):
    heavy = 'torch', 'datasets', 'ftfy', 'datasketch', 'scipy', 'matplotlib', 'datatrove'
    code = f'import sys, lm_nb.data.{module}; print([m for m in {heavy} if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root())
    assert done.stdout.strip() == '[]', done.stderr


def test_what_is_held_out_and_what_is_a_duplicate_stay_the_same():
    "Recorded runs rest on these: a hash decides what validates, a signature what is dropped"
    hashed = (ARTICLE, 0), (ARTICLE, 1), ('', 0), ('The river Ash.', 0)
    assert [round(uniform_hash(t, seed), 6) for t, seed in hashed] == [
        0.881, 0.938316, 0.515152, 0.148129]
    texts = ARTICLE, 'The river Ash rises in the hills.', 'x'
    assert [crc32(minhash(t).tobytes()) for t in texts] == [3625078431, 1039301173, 2526147483]
    assert [crc32(_shingles(t).tobytes()) for t in texts] == [302263873, 2064263868, 2204395024]
