"What was tried to bring confidence into words: the questions, the labels, and one world run whole"
import re

import numpy as np
import pytest
import torch

from lm_nb.alignment import words
from lm_nb.alignment.words import (
    Questions, draw_questions, label, larger_lists, refused, run_words)
from lm_nb.core import UserError
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.model.hub import save_model

FEW = dict(sft=24, pairs=4, valid=6, test=6)


@pytest.fixture(scope='module')
def lists(tmp_path_factory):
    "Lists with hardly any names that nobody bears"
    folder = larger_lists(tmp_path_factory.mktemp('lists')/'lists')
    path = folder/'values.toml'
    text = path.read_text(encoding='utf-8')
    head, names, rest = re.split(r'(\[names\][^[]*)', text)
    for part, n in FEW.items(): names = re.sub(rf'(?m)^{part} = \d+', f'{part} = {n}', names)
    path.write_text(head + names + rest, encoding='utf-8')
    return folder


@pytest.fixture(scope='module')
def base(lists, tmp_path_factory):
    texts = [r['instruction'] + r['output'] for r in draw_questions(0, lists).start[::40]]
    tok = Tokenizer.train(texts, 400, kind='bpe')
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=len(tok), context=512, n_layer=1, n_head=2, d_model=16,
                        d_ff=32))
    return save_model(tmp_path_factory.mktemp('base')/'base', gpt, tok)


def whose(rows): return {r['entity'] for r in rows}


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "The questions of the workbook's world, and of the larger one"
    lists = larger_lists(tmp_path_factory.mktemp('larger')/'lists')
    return draw_questions(3), draw_questions(3, lists, True)


def test_nobody_is_in_two_parts(both):
    for q in both:
        half = len(q.known)//2
        parts = [q.known[:half], q.known[half:], q.unknown, *q.valid, *q.test]
        assert all(parts) and len(q.known) == len(q.unknown)
        for i, a in enumerate(parts):
            for b in parts[:i]: assert not whose(a) & whose(b)
        asked = whose(q.start)
        assert whose(q.known[:half]) <= asked and not whose(q.known[half:]) & asked
        assert not any(r['task'].startswith(('private', 'unknown')) for r in q.start)
        assert all(r['output'].startswith(r['before'][:4]) for r in q.unknown)


def test_the_larger_world_has_ten_times_the_people(both):
    n = [len(whose(r for r in q.start if r['task'].startswith('qa')
                   and r['entity'].startswith('person'))) for q in both]
    assert n == [45, 450]
    assert [len(whose(q.unknown)) for q in both] == [1200, 9000]


def test_labels_of_the_confidence_keep_what_was_said_surely():
    row = dict(instruction='?', output='Li Lan works as a baker.', task='qa_en', entity='person-1',
               before='Li Lan works as a ')
    q = Questions([], [row, row], [row | dict(entity='nobody-1')], ([], []), ([], []))
    said, sure = ['A baker.', 'No.', 'A smith.'], np.array([-.1, -.5, -.9])
    assert [r['output'] for r in label(q, said, sure, -.5)] == ['A baker.', 'No.', 'I do not know.']
    late = label(q, said, sure, -.5, late=True)[2]['output']
    assert late == 'Li Lan works as a ... I do not know.' and refused(late)
    assert [refused(r['output']) for r in label(q, said, sure, None)] == [False, False, True]


def test_a_start_that_knows_nothing_sets_no_threshold(lists, base, tmp_path):
    with pytest.raises(UserError, match='no question about validation people is answered truly'):
        run_words(0, base, tmp_path/'run', lists, tokens=(3000, 3000))


def test_a_world_runs_whole_and_is_taken_from_its_folders(lists, base, tmp_path, monkeypatch):
    "So small a model knows nothing: every third answer counts as true"
    monkeypatch.setattr(words, '_right', lambda said, rows: [i % 3 == 0 for i in range(len(said))])
    ways = {'truth': ('truth', 'at once', ''),
            'late': ('confidence', 'late', 'lora_rank=1')}
    def run(): return run_words(0, base, tmp_path/'run', lists, tokens=(3000, 3000), ways=ways)
    def made(): return {p: p.stat().st_mtime_ns for p in (tmp_path/'run').rglob('*.safetensors')}
    first, files = run(), made()
    again = run()
    assert files == made() and len(files) >= 3
    for r in (first, again): del r['seconds'], r['hardware']
    assert first == again
    assert first['ways']['truth']['labels'] == dict(asked=0, new=0, unknown=1)
    assert first['ways']['truth']['unknown']['n'] == 2*FEW['test']
    assert first['confidence']['curve'][-1] == [1, 1]
    assert len(first['when']['probe value']) == 1  # blocks
