"What is said of a trained model: both sides of every limit"
import math

import pytest
import torch

from lm_nb.bench.expect import (
    answer_form, byte_bits, compressor_bits, expectations, frequency_loss, goes_round)
from lm_nb.data.instructions import Example
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.model.gpt import GPT, GPTConfig

FINE = dict(n=100, empty=0, circles=5, repeated=0, own_question=90, records=700)


def told(bits=2., base='', held=5.9, trained_on=3., **answering):
    return expectations(dict(
        recipe=dict(data=dict(text='my/notes.txt', base=base)),
        base=dict(heldout=dict(bits_per_byte=bits), reference=dict(xz=2.5, byte_counts=4.5)),
        chat=dict(heldout_answers=dict(loss=held), answering=FINE | answering,
                  answer_losses=dict(frequency=6.5, trained_on=trained_on))))


@pytest.mark.parametrize('bits, words', [
    (2.49, 'continues text in the style of notes.txt'), (2.51, 'not yet how they go on'),
    (4.49, 'not yet how they go on'), (4.51, 'has learned next to nothing')])
def test_text(bits, words):
    assert words in told(bits)[0] and f'{bits:.2f} bits per byte' in told(bits)[0]


@pytest.mark.parametrize('found, words', [
    (dict(), 'answers in the manner'), (dict(empty=95), 'has not learned to answer'),
    (dict(circles=35), 'answers in the manner'), (dict(circles=45), 'has not learned to answer'),
    (dict(repeated=95), 'has not learned to answer'),
    (dict(empty=15, circles=15, repeated=15), 'has not learned to answer'),
    (dict(own_question=65), 'answers in the manner'), (dict(own_question=55), 'do not depend'),
    (dict(n=4, own_question=4, circles=0), 'answers in the manner'),
    (dict(n=3, own_question=3, circles=0), 'has not learned')])  # three are too few to tell
def test_answers(found, words): assert words in told(**found)[1]


@pytest.mark.parametrize('found, words', [
    (dict(held=4.8), '700 records are too few; try base=FOLDER'),   # 1.7 of 3.5 carry over
    (dict(held=4.7), 'taught too little; try more minutes='),       # 1.8 of 3.5
    (dict(held=6.4, trained_on=6.1), 'taught too little'),          # nothing was learned at all
    (dict(held=4.8, base='m'), 'a larger base=')])
def test_what_would_help_follows_from_what_carries_over(found, words):
    line = told(empty=95, **found)[2]
    assert words in line and f'{found["held"]:.1f} nats' in line


def test_results_without_measures_say_nothing():
    assert expectations({}) == expectations(dict(base=dict(heldout={}), chat={})) == []
    assert expectations(dict(recipe=dict(data=dict(text='', base='')), base={}, chat={})) == []


def test_references():
    text = 'The wind is on the sea, and the sea is under the wind. '
    assert compressor_bits(text * 9, text) < compressor_bits('', text)
    assert byte_bits('aaaa') == 0 and byte_bits('') == 0 and byte_bits('abab') == 1
    ids = torch.tensor([1, 1, 1, 2])
    expected = -(3 * math.log(4/8) + math.log(2/8)) / 4  # one more of each of four
    assert frequency_loss(ids, ids, 4) == pytest.approx(expected)


def test_a_circle_is_told_from_a_list():
    assert goes_round([7] * 20) and goes_round([1, 2, 3] * 8)
    assert not goes_round(list(range(20))) and not goes_round([]) and not goes_round([5] * 4)


def test_answers_are_counted_once_each(monkeypatch):
    torch.manual_seed(0)
    tok = Tokenizer.train(['Who? Me. ' * 9] * 3, 280, kind='bpe')
    gpt = GPT(GPTConfig(vocab_size=len(tok), context=64, n_layer=1, n_head=1, d_model=16))
    lines = '', ' ', 'Me' * 20, 'Who?', 'Who?', 'Me.'
    said = [tok.encode(line) for line in lines]
    monkeypatch.setattr('lm_nb.bench.expect.generate_batch', lambda *a: said)
    asks = [Example(f'Who? {i}', 'Me.') for i in range(6)]
    found, texts = answer_form(gpt, tok, asks)
    assert len(texts) == found['n'] == 6
    assert (found['empty'], found['circles'], found['repeated']) == (2, 1, 2)
    assert 0 <= found['own_question'] <= 6
