"The tokenizer on hostile text, damaged files and odd corpora"
import hashlib
import os
import random
from pathlib import Path

import pytest
import sentencepiece as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_nb.core import UserError, root, sha256
from lm_nb.tokenizer import FIXED, SPECIALS, Tokenizer, sample_lines, show_tokens, train_model, training_lines

POEMS = ['春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少。', '白日依山盡，黃河入海流。\n欲窮千里目，更上一層樓。',
         'The cat sat on the mat.\n\tThe dog  sat on the cat.']
REAL = Path(os.environ.get('LM_NB_REAL_DATA', root().parent/'shared'/'data'))


@pytest.fixture(scope='module', params=['unigram', 'bpe'])
def tok(request): return Tokenizer.train(POEMS * 5, 310, kind=request.param)


@settings(max_examples=400, deadline=None)
@given(st.text(st.characters(exclude_categories=['Cs'])))
def test_any_text_survives(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert not ids or min(ids) > tok.user


def test_every_plane_survives(tok):
    texts = [''.join(map(chr, range(start, start + 256))) for start in range(0, 0x30000, 256) if not 0xd800 <= start < 0xe000]
    rows = tok.encode_batch(texts)
    assert [tok.decode(row) for row in rows] == texts
    assert all(min(row) > tok.user for row in rows)


@given(st.lists(st.sampled_from([*SPECIALS, '▁', ' ', '<0x41>', '\n', 'a', '春', '<|', '|>'])))
@settings(max_examples=200, deadline=None)
def test_markers_in_text_stay_text(tok, parts):
    text = ''.join(parts)
    assert tok.decode(tok.encode(text)) == text
    assert all(i > tok.user for i in tok.encode(text))


def test_batch_equals_single(tok):
    texts = ['', 'a', '▁▁', *POEMS, 'x' * 5000]
    assert tok.encode_batch(texts) == [tok.encode(t) for t in texts]
    assert tok.encode_batch(iter(texts)) == tok.encode_batch(texts)
    assert tok.encode_batch([]) == []


def test_half_a_surrogate_pair_is_named(tok):
    for call in (lambda: tok.encode('ab\ud800'), lambda: tok.encode_batch(['fine', 'ab\ud800']), lambda: Tokenizer.train(['ab\ud800' * 9], 300)):
        with pytest.raises(UserError, match=r"'\\ud800' at character 2"): call()


def test_ids_out_of_range(tok):
    for ids in ([len(tok)], [-1], [10**9]):
        with pytest.raises(UserError): tok.decode(ids)


def test_same_text_same_file(tmp_path):
    a, b = (Tokenizer.train(iter(POEMS * 5), 310, tmp_path/f'{n}.model') for n in 'ab')
    assert a.sha256 == b.sha256 == sha256(tmp_path/'a.model') == hashlib.sha256((tmp_path/'b.model').read_bytes()).hexdigest()


def test_plain_sentencepiece_reads_the_file(tok, tmp_path):
    tok.save(tmp_path/'t.model')
    plain = sp.SentencePieceProcessor(str(tmp_path/'t.model'))
    assert [plain.encode(p) for p in POEMS] == [tok.encode(p) for p in POEMS]
    assert (plain.pad_id(), plain.unk_id(), plain.bos_id(), plain.eos_id()) == (tok.pad, tok.unk, tok.bos, tok.eos)
    assert [plain.id_to_piece(i) for i in range(6)] == list(SPECIALS)
    assert all(plain.is_control(i) for i in range(6) if i != tok.unk)


def test_a_long_line_is_learned_from():
    "A line of a megabyte, which the trainer itself would skip"
    r = random.Random(0)
    line = ' '.join(r.choice(['zebra', 'quokka', 'wombat', 'lemur']) for _ in range(170_000))
    assert len(line.encode()) > 1_000_000
    assert '▁quokka' in Tokenizer.train([line], 294, kind='bpe').pieces('a quokka')


@pytest.mark.parametrize('reserved', ['▅', '▁', '\n'])
def test_a_reserved_sign_does_not_hide_its_line(reserved):
    tok = Tokenizer.train([f'hello{reserved}hello hello'] * 20, 272, kind='bpe')
    assert 'hello' in tok.pieces('hello') or '▁hello' in tok.pieces(' hello')


def test_rare_characters_are_spelled_in_bytes():
    "More characters than ids: the frequent ones get a piece, the others stay readable"
    many = ''.join(chr(0x4e00 + i) for i in range(2000))
    tok = Tokenizer.train(['天地' * 500, many], 400)
    assert tok.pieces('天') == ['天']
    assert tok.decode(tok.encode(many)) == many


def test_text_without_a_space_or_newline_keeps_both():
    tok = Tokenizer.train(['春眠不覺曉'] * 3, FIXED + 5)
    assert tok.decode(tok.encode('a  b\nc ')) == 'a  b\nc '


@pytest.mark.parametrize('kind', ['unigram', 'bpe'])
@pytest.mark.parametrize('texts, size, says', [
    ([], 400, 'no text'), ([''], 400, 'no text'), (['\n\n'], 400, 'no text'), (['a'], 100, '264 ids'), (POEMS, 5000, 'at most'), (POEMS, 264, 'choose more')])
def test_impossible_trainings(texts, size, says, kind):
    with pytest.raises(UserError, match=says) as e: Tokenizer.train(texts, size, kind=kind)
    assert '\n' not in str(e.value)


def test_the_supported_size_is_true():
    "The number in the message is one that works"
    with pytest.raises(UserError) as e: Tokenizer.train(POEMS, 5000)
    size = int(str(e.value).split('at most ')[1].split()[0])
    assert len(Tokenizer.train(POEMS, size)) == size


@pytest.mark.parametrize('size', [265, 266, 270, 280])
def test_tiny_vocabularies(size):
    tok = Tokenizer.train(POEMS * 5, size)
    assert len(tok) == size and [tok.decode(tok.encode(p)) for p in POEMS] == POEMS


def test_damaged_files_never_escape_as_something_else(tmp_path):
    "Cut anywhere, a file is either refused or still a whole tokenizer"
    proto = train_model(list(training_lines(POEMS * 5)), 310)
    for size in (0, 1, 10, 100, *range(200, len(proto), len(proto)//60), len(proto) - 1):
        (tmp_path/'cut.model').write_bytes(proto[:size])
        try: assert len(Tokenizer.load(tmp_path/'cut.model')) <= 310
        except UserError as e: assert 'cut.model' in str(e) and '\n' not in str(e)


@pytest.mark.parametrize('content', [b'', b'\0' * 1000, b'{"a": 1}', random.Random(0).randbytes(2000), 'text 文'.encode() * 100])
def test_not_a_model(tmp_path, content):
    (tmp_path/'x.model').write_bytes(content)
    with pytest.raises(UserError, match='x.model'): Tokenizer.load(tmp_path/'x.model')


def test_missing_folder_and_foreign(tmp_path):
    with pytest.raises(UserError, match='No such file'): Tokenizer.load(tmp_path/'no.model')
    with pytest.raises(UserError, match='directory'): Tokenizer.load(tmp_path)
    sp.SentencePieceTrainer.train(sentence_iterator=iter(POEMS * 5), model_prefix=str(tmp_path/'other'), vocab_size=60, hard_vocab_limit=False, minloglevel=2)
    with pytest.raises(UserError, match='foreign'): Tokenizer.load(tmp_path/'other.model')


def test_right_ids_but_lossy(tmp_path):
    sp.SentencePieceTrainer.train(sentence_iterator=iter(POEMS * 5), model_prefix=str(tmp_path/'lossy'), vocab_size=80, hard_vocab_limit=False, minloglevel=2,
                                  pad_id=0, unk_id=1, bos_id=2, eos_id=3, control_symbols=list(SPECIALS[4:]))
    with pytest.raises(UserError, match='changes text'): Tokenizer.load(tmp_path/'lossy.model')


def test_markers_that_text_can_forge_are_refused(tmp_path):
    sp.SentencePieceTrainer.train(sentence_iterator=iter(POEMS * 5), model_prefix=str(tmp_path/'open'), vocab_size=330, hard_vocab_limit=False, minloglevel=2,
                                  pad_id=0, unk_id=1, bos_id=2, eos_id=3, user_defined_symbols=[*SPECIALS[4:], '\n'], byte_fallback=True,
                                  normalization_rule_name='identity', add_dummy_prefix=False, remove_extra_whitespaces=False)
    with pytest.raises(UserError, match='foreign'): Tokenizer.load(tmp_path/'open.model')


def test_save_never_overwrites(tok, tmp_path):
    other = Tokenizer.train(POEMS * 5, 300)
    tok.save(tmp_path/'deep'/'t.model')
    tok.save(tmp_path/'deep'/'t.model')
    with pytest.raises(UserError, match='another tokenizer'): other.save(tmp_path/'deep'/'t.model')
    assert Tokenizer.load(tmp_path/'deep'/'t.model').sha256 == tok.sha256
    assert [p.name for p in (tmp_path/'deep').iterdir()] == ['t.model']


@given(st.lists(st.text(max_size=20), max_size=60), st.integers(1, 200))
def test_a_sample_is_ordered_and_within_budget(lines, budget):
    kept = sample_lines(lines, budget)
    assert sum(map(len, kept)) <= budget
    it = iter(lines)
    assert all(any(k == line for line in it) for k in kept)


def test_shown_text_cannot_be_html(tok):
    page = show_tokens(tok, tok.encode('<script>alert(1)</script>'), mask=None)._repr_html_()
    assert '<script' not in page
    with pytest.raises(ValueError): show_tokens(['a'], [1, 2])


@pytest.mark.skipif(not (REAL/'wiki_demo.txt').exists(), reason='needs wiki_demo.txt; set LM_NB_REAL_DATA to its folder')
def test_real_articles_survive():
    articles = (REAL/'wiki_demo.txt').read_text(encoding='utf-8').splitlines()
    tok = Tokenizer.train(articles, 4096, kind='bpe')
    assert [tok.decode(row) for row in tok.encode_batch(articles)] == articles
    assert sum(len(a.encode()) for a in articles) / sum(map(len, tok.encode_batch(articles))) > 3
