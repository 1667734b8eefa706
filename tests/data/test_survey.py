"Surveys of sources: numbers, scripts, and reports of several files"
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_files import NEEDS_REAL, REAL, json_lines, put

from lm_nb.core import root
from lm_nb.data.survey import (
    _SCRIPTS, _CorpusReport, _Survey, _count_scripts, corpus_report, survey_source)

POEMS = root()/'data'/'downloads'/'poems'


@given(st.text())
def test_every_character_has_a_script(text): assert sum(_count_scripts(text).values()) == len(text)


def test_the_table_of_scripts_is_in_order():
    starts = [start for start, _ in _SCRIPTS]
    assert starts == sorted(set(starts)) and starts[0] == 0


def test_reports_of_several_sources(tmp_path):
    put(tmp_path/'a.txt', '一\n二\n\n三三\n')
    put(tmp_path/'b.jsonl', json_lines([{'text': 'x' * 100}, {'text': ''}, {'id': 1}]))
    put(tmp_path/'c.json', '[{"text": "half"}, {"text"')
    put(tmp_path/'d.jsonl', json_lines([{'messages': []}]))
    report = corpus_report(tmp_path)
    assert isinstance(report, _CorpusReport) and all(isinstance(s, _Survey) for s in report.surveys)
    found = [(s.report.rows, s.report.kept, bool(s.stopped)) for s in report.surveys]
    assert found == [(3, 3, False), (3, 1, False), (1, 1, True), (1, 0, True)]
    total = report.total()
    assert (total.rows, total.kept, total.rejected['empty'][0]) == (8, 5, 1)
    assert [s.stats.quantiles((0, .5, 1)) for s in report.surveys[:2]] == [[1, 1, 2], [100] * 3]
    for text in ('b.jsonl', 'all sources'): assert text in str(report)
    assert '| source |' in report._repr_markdown_()
    chinese, english = (s.stats for s in report.surveys[:2])
    assert chinese.mainly == {'Han': 3} and english.scripts == {'Latin': 100}


@pytest.mark.skipif(not (REAL/'wiki_demo.txt').exists(),
                    reason=NEEDS_REAL)
def test_reports_on_real_files_add_up():
    report = corpus_report(REAL)
    found = {Path(s.report.source).name: (s.report.check().rows, *s.formats)
             for s in report.surveys}
    assert found == {
        'alpaca_zh_demo.json': (1000, 'instruction/output'), 'wiki_demo.txt': (30, 'text'),
        'belle_zh_seed_tasks.jsonl': (175, 'instances'), 'dpo_zh_demo.json': (300, 'conversations')}
    assert report.total().rows == 1505


@pytest.mark.skipif(not (POEMS/'tang-valid.jsonl').exists(),
                    reason='needs the poems: lm-nb fetch poems')
def test_the_poems_add_up():
    found = survey_source(POEMS/'tang-valid.jsonl')
    assert found.report.check().rows == found.stats.documents > 1000 and not found.stopped
    assert found.stats.mainly.most_common(1)[0][0] == 'Han'
