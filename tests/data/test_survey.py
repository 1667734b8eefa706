"Surveys of sources: numbers, scripts, and reports of several files"
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_files import NEEDS_REAL, REAL, json_lines, put

from lm_nb.core import UserError, root
from lm_nb.data.survey import (
    _SCRIPTS, _CorpusReport, _Survey, count_scripts, corpus_report, survey_source)

POEMS = root()/'data'/'downloads'/'poems'


@given(st.text())
def test_every_character_has_a_script(text): assert sum(count_scripts(text).values()) == len(text)


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


def test_one_file_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    put(tmp_path/'a.jsonl', '{"text": "a"}\n')
    put(tmp_path/'b.jsonl.gz', b'no archive')
    put(tmp_path/'c.txt', b'caf\xe9\n')
    put(tmp_path/'d.jsonl', '{"text": "d"}\n')
    put(tmp_path/'e.txt', '')
    put(tmp_path/'f.pdf', '')
    report = corpus_report([tmp_path, tmp_path/'nothing.txt'])
    assert list(report.stopped()) == [str(tmp_path/name) for name in ('b.jsonl.gz', 'c.txt',
        'nothing.txt')]
    total = report.total()
    assert total.rows == total.kept == 2 and total.notes == {
        'files skipped: .pdf is not read': 1, 'sources that could not be read to their end': 3}
    for part in 'c.txt', 'nothing.txt: no such file', '.pdf is not read': assert part in str(report)
    assert 'nothing.txt' in report._repr_markdown_()
    assert not corpus_report(tmp_path/'c.txt', encoding='latin-1').stopped()
    with pytest.raises(UserError, match='encoding = latin-99'):
        corpus_report(tmp_path, encoding='latin-99')


def test_the_command_ends_with_an_error_where_a_file_cannot_be_read(tmp_path, capsys):
    from lm_nb.cli import main
    put(tmp_path/'a.csv', 'question;reply\nwhat?;that\n')
    put(tmp_path/'b.txt', b'caf\xe9\n')
    words, keys = ['corpus', 'report', str(tmp_path/'a.csv')], ['fields=answer=reply', 'clean=none']
    assert not main([*words, *keys])
    assert 'question/answer 1' in capsys.readouterr().out
    assert main([*words, str(tmp_path/'b.txt'), *keys]) != 0
    out, err = capsys.readouterr()
    assert 'question/answer 1' in out and f'{tmp_path}/b.txt: not UTF-8 at byte 3' in err


def test_many_sources_are_a_line_each_and_one_sum(tmp_path):
    for i in range(12): put(tmp_path/f'{i:02}.md', f'第{i}页。\n' if i % 2 else f'Page {i}.\n')
    report = corpus_report(tmp_path)
    lines = str(report).splitlines()
    assert len(lines) < 40 and sum('.md' in line for line in lines) == 12
    whole = report.whole()
    assert whole.stats.documents == 12 and set(whole.stats.mainly) == {'Han', 'Latin'}
    assert whole.size == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert len(whole.stats.lengths) == 12 and 'characters by script' in str(report)
