"""Reading of instructions in every make of record, and their rows under every length"""
import bz2, csv, json, random
from dataclasses import asdict

import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from source_files import REAL, put, rejected

from lm_nb.core import UserError
from lm_nb.data.corpus import FORMATS, format_of, has_instructions
from lm_nb.data.sources import Report
from lm_nb.data.instructions import (
    Example, NothingFits, _exchanges, _fitting, _fold_context, _MARKS, _prompt_text,
    _split_dialogue, _Turn, _unfold, _with_roles, conversation_ids, _conversation_row, encode_each,
    encode_examples, lay_out, needed_context, prompt_ids, read_instructions, sft_row, to_example)
from lm_nb.data.shards import IGNORE, Shards, write_token_shards
from lm_nb.data.tokenizer import Tokenizer

VECTORS = dict(bos=8, eos=16, pad=0, max_length=16)
ids = st.lists(st.integers(0, 20), max_size=30)


class Bytes:
    "A tokenizer of bytes: id = byte + 6"
    pad, unk, bos, eos, system, user = range(6)
    chat = Tokenizer.chat
    sha256 = 'a'*64
    def __len__(self): return 262
    def encode(self, text): return [b + 6 for b in text.encode()]
    def encode_batch(self, texts): return [self.encode(t) for t in texts]
    def encode_arrays(self, texts): return [np.array(ids) for ids in self.encode_batch(texts)]
    def decode(self, ids): return bytes(i - 6 for i in ids if i >= 6).decode()


tok = Bytes()


def to_examples(record): return [to_example(r) for r in _unfold(record)]


# ---- one row

@pytest.mark.parametrize('answer,x,y,mask', [
    (range(9, 16), [*range(1, 16)], [*range(2, 17)], [0]*6 + [1]*9),
    (range(9, 14), [*range(1, 14), 16, 0], [*range(2, 14), 16, 0, 0], [0]*6 + [1]*7 + [0]*2)])
def test_worked_examples(answer, x, y, mask):
    got = sft_row(list(range(1, 8)), list(answer), **VECTORS)
    assert [t.tolist() for t in got] == [x, y, mask]
    assert all(t.dtype == torch.int64 for t in got)


@settings(max_examples=400, deadline=None)
@given(ids.filter(len), ids, st.integers(0, 20), st.integers(0, 20), st.integers(0, 20),
       st.integers(3, 70))
def test_any_row(prompt, answer, bos, eos, pad, max_length):
    # so few ids that bos, eos and pad collide with each other and with the text all the time
    if len(prompt) + 2 > max_length:
        with pytest.raises(UserError, match='leaves no room'):
            sft_row(prompt, answer, bos=bos, eos=eos, pad=pad, max_length=max_length)
        return
    x, y, mask = sft_row(prompt, answer, bos=bos, eos=eos, pad=pad, max_length=max_length)
    room = max_length - len(prompt)
    assert len(x) == len(y) == len(mask) == max_length - 1
    assert y[mask.bool()].tolist() == [bos, *answer, eos][:room]
    assert mask.sum() == min(len(answer) + 2, room)
    assert x[1:].tolist() == y[:-1].tolist()
    assert x.tolist()[:len(prompt) + 1] == [*prompt, bos]
    start, n = len(prompt) - 1, int(mask.sum())
    assert mask.tolist() == [0]*start + [1]*n + [0]*(max_length - 1 - start - n)
    assert (y[start + n:] == pad).all()


@pytest.mark.parametrize('n', [126, 127, 128, 129, 130, 200])
def test_a_part_over_the_limit_loses_no_more_than_it_must(n):
    _, y, mask = sft_row([1], [5]*n, bos=8, eos=16, pad=0, max_length=130)
    assert (y[mask.bool()] == 5).sum() == min(n, 128)


def test_a_whole_over_the_limit_keeps_its_length():
    rows = [sft_row([1]*7, [5]*n, **VECTORS) for n in range(60)]
    assert {tuple(map(len, row)) for row in rows} == {(15, 15, 15)}
    assert all(row[2].sum() == min(n + 2, 9) for n, row in enumerate(rows))


def test_a_bos_in_the_prompt_is_nothing_special():
    _, y, mask = sft_row([8, 1, 8, 2], [9, 10], **VECTORS)
    assert y[mask.bool()].tolist() == [8, 9, 10, 16]


def test_only_a_whole_answer_gets_eos():
    for n in range(1, 20):
        _, y, mask = sft_row([1]*7, [5]*n, **VECTORS)
        assert (16 in y.tolist()) == (n <= 7)


@pytest.mark.parametrize('pad', [0, 16, 8, 5])
def test_padding_is_known_by_position(pad):
    _, y, mask = sft_row([1]*7, [5, 0, 5], **{**VECTORS, 'pad': pad})
    assert y[mask.bool()].tolist() == [8, 5, 0, 5, 16]


def test_instruction_and_input_stay_apart():
    assert _prompt_text('ab', 'c') != _prompt_text('a', 'bc')
    assert _prompt_text(' ab\n', ' \n') == 'ab' and _prompt_text('ab', 'c\nd') == 'ab\nc\nd'


def test_the_longest_prompt_that_leaves_room():
    x, y, mask = sft_row(list(range(1, 15)), [9, 9], **{**VECTORS, 'bos': 20})
    assert y[mask.bool()].tolist() == [20, 9]
    with pytest.raises(UserError,
                       match='a prompt of 15 tokens leaves no room for an answer in a row of 16'):
        sft_row([1]*15, [9], **VECTORS)


def test_a_row_without_an_answer_still_ends():
    _, y, mask = sft_row([1, 2], [], **VECTORS)
    assert y[mask.bool()].tolist() == [8, 16]


def test_roles():
    assert prompt_ids(tok, 'hi') == [tok.bos, tok.user, *tok.encode('hi')]
    assert prompt_ids(tok, 'hi', 'you') == [tok.bos, tok.system, *tok.encode('you'), tok.user,
                                            *tok.encode('hi')]


def test_a_conversation_opens_like_a_document_once(tmp_path):
    "Its first id is a document's, whatever its turns and system text, and no other turn has it"
    write_token_shards(['a document'], tok, tmp_path/'s')
    first = Shards(tmp_path/'s').tokens(0, 1).tolist()
    turns = (('q1', 'a1'), ('q2', 'a2'))
    for system in ('', 's'):
        for n in range(3):
            e = Example('q3', 'a3', system, turns=turns[:n])
            [parts] = encode_examples(tok, [e], 60)
            assert list(parts[0][:1]) == first == [tok.bos]
            assert all(part[0] == tok.user for part in parts[2::2])
            row = conversation_ids(tok, turns[:n], 'q3', system)
            assert row[:1] == first and row.count(tok.bos) == n + 2  # and one for each answer
            _, y = _conversation_row(parts, bos=tok.bos, eos=tok.eos)
            assert (y == tok.bos).sum() == n + 1  # to be read; those of the answers are learned


# ---- a conversation's row

parts_of = st.lists(st.tuples(ids.filter(len), ids), min_size=1,
                    max_size=5).map(lambda turns: [part for turn in turns for part in turn])

@settings(max_examples=300, deadline=None)
@given(parts_of, st.integers(0, 20), st.integers(0, 20))
def test_a_conversation_learns_every_answer_and_nothing_else(parts, bos, eos):
    x, y = _conversation_row(parts, bos=bos, eos=eos)
    assert y[y != IGNORE].tolist() == [t for a in parts[1::2] for t in (bos, *a, eos)]
    whole, learned = lay_out(parts, bos, eos)
    assert x.tolist() == whole[:-1].tolist() and len(x) == len(y) == sum(map(len,
        parts)) + len(parts) - 1
    assert ((y == torch.as_tensor(whole[1:])) | (y == IGNORE)).all()
    assert (y != IGNORE).tolist() == learned[1:].tolist()


@settings(max_examples=100, deadline=None)
@given(parts_of)
def test_each_answer_is_trained_as_in_a_row_of_its_own(parts):
    bos, eos, pad = 30, 31, 32
    x, y = _conversation_row(parts, bos=bos, eos=eos)
    seen = torch.full_like(y, IGNORE)
    for k in range(1, len(parts), 2):
        before = lay_out(parts[:k], bos, eos)[0].tolist()
        xk, yk, mask = sft_row(before, parts[k], bos=bos, eos=eos, pad=pad, max_length=len(x) + 1)
        n = len(before) + 1 + len(parts[k])
        assert xk[:n].tolist() == x[:n].tolist()
        assert (seen[mask.bool()] == IGNORE).all()  # no target is trained twice
        seen[mask.bool()] = yk[mask.bool()]
    assert seen.tolist() == y.tolist()


def test_a_single_turn_is_sft_row():
    for p, a in [([1], []), ([1, 2, 3], [4, 5]), ([8, 16, 0], [16, 8, 0])]:
        x, y, mask = sft_row(p, a, bos=8, eos=16, pad=0, max_length=len(p) + len(a) + 2)
        got = _conversation_row([p, a], bos=8, eos=16)
        assert got[0].equal(x) and got[1].equal(y.masked_fill(mask == 0, IGNORE))


# ---- what was trained is what is asked

said = st.text(max_size=12)
ASKED = st.tuples(st.lists(st.tuples(said, said), max_size=4), said, said, said)


@settings(max_examples=200, deadline=None)
@given(ASKED)
def test_a_conversation_is_asked_as_it_was_trained(asked):
    "Token by token: all turns in one row, a prompt's row, and what is given at inference"
    turns, question, answer, system = asked
    ids, answered = conversation_ids(tok, turns, question, system), tok.encode(answer)
    assert ids == [*prompt_ids(tok, question, system, turns), tok.bos]
    want = [tok.bos, *([tok.system, *tok.encode(system)] if system else [])]
    for q, a in turns: want += [tok.user, *tok.encode(q), tok.bos, *tok.encode(a), tok.eos]
    assert ids == [*want, tok.user, *tok.encode(question), tok.bos]
    [parts] = encode_examples(tok, [Example(question, answer, system, turns=tuple(turns))], 10**6)
    x, y = _conversation_row(parts, bos=tok.bos, eos=tok.eos)
    assert x.tolist() == [*ids, *answered] and y[len(ids) - 1:].tolist() == [*answered, tok.eos]
    x, y, mask = sft_row(ids[:-1], answered, bos=tok.bos, eos=tok.eos, pad=tok.pad,
                         max_length=len(ids) + len(answered) + 1)
    assert x.tolist() == [*ids, *answered]
    assert y[mask.bool()].tolist() == [tok.bos, *answered, tok.eos]


@settings(max_examples=50, deadline=None)
@given(ASKED)
def test_an_answer_may_be_the_ids_that_were_sampled(asked):
    turns, question, _, system = asked
    sampled = [(q, tok.encode(a)) for q, a in turns]
    ids = conversation_ids(tok, turns, question, system)
    assert conversation_ids(tok, sampled, question, system) == ids
    q, r = tok.encode('q'), tok.encode('r')
    want = [tok.bos, tok.user, *q, tok.bos, 7, 7, tok.eos, tok.user, *r, tok.bos]
    assert conversation_ids(tok, [('q', [7, 7])], 'r') == want


def test_a_trained_tokenizer_agrees():
    real = Tokenizer.train(['hello user system 你好 Who? Alan.'], 300, kind='bpe')
    turns = [('hello', '你好'), ('Who?', real.encode('Alan.'))]
    ids = conversation_ids(real, turns, 'user', 'system')
    turns = [('hello', '你好'), ('Who?', 'Alan.')]
    assert ids == [*prompt_ids(real, 'user', 'system', turns), real.bos]
    assert all(type(i) is int for i in ids)


# ---- reading

def turns(*said, who='from', what='value', names=('human', 'gpt')):
    return [{who: names[i % 2], what: text} for i, text in enumerate(said)]


openai = dict(who='role', what='content', names=('user', 'assistant'))
chosen = dict(role='assistant', content='你好')

@pytest.mark.parametrize('record', [
    dict(instruction='translate', input='hello', output='你好'),
    dict(instruction='translate', context='hello', response='你好'),
    dict(input='translate\nhello', target='你好'), dict(prompt='translate\nhello', answer='你好'),
    dict(prompt='translate\nhello', completion='你好'),
    dict(question='translate', context='hello', answer='你好'),
    dict(instruction='translate', instances=[dict(input='hello', output='你好')]),
    dict(conversations=turns('translate\nhello', '你好')),
    dict(conversations=turns('translate\nhello', '你好', names=('Human', 'Assistant'))),
    dict(messages=turns('translate\nhello', '你好', **openai)),
    dict(messages=[*turns('translate', **openai), *turns('hello', '你好', **openai)]),
    dict(conversations=turns('translate\nhello'), chosen={'from': 'gpt', 'value': '你好'},
         rejected={'from': 'gpt', 'value': 'no'}),
    dict(conversations=turns('translate\nhello'), chosen='你好'),
    dict(prompt='translate\nhello', chosen='你好', rejected='no'),
    dict(prompt='ignored', chosen=turns('translate\nhello', '你好', **openai), rejected=[]),
    dict(instruction='Human:translate\nAssistant:', input='hello', output='你好'),
    dict(instruction='Human: translate\nhello\n\nAssistant: ', output='你好'),
    dict(instruction='Human：translate\nhello\nAssistant：', output='你好'),
    dict(prompt=turns('translate\nhello', **openai), chosen=[chosen], rejected=[chosen]),
    dict(prompt=turns('translate\nhello'), completion=turns('你好', names=('gpt',))),
    dict(prompt='translate\nhello', chosen=[chosen], rejected=[]),
    dict(prompt='translate\nhello', completion=chosen),
    dict(prompt=turns('translate\nhello', **openai), response='你好'),
    dict(chosen='\n\nHuman: translate\nhello\n\nAssistant: 你好', rejected='\n\nHuman: no'),
    dict(messages=turns([dict(type='text', text='translate'), 'hello'], '你好', **openai)),
    dict(messages=turns('translate\nhello', [dict(type='output_text', text='你好')], **openai)),
    dict(messages=None, prompt='translate\nhello', answer='你好'),
    dict(instruction='translate', input='hello', output=None, response='你好', context='hello')])
def test_every_format(record):
    [e] = to_examples(record)
    assert (e.prompt, e.answer, e.turns, e.system) == ('translate\nhello', '你好', (), '')


THREE = (('q1', 'a1'), ('q2', 'a2'), ('q3', 'a3'))
flat = [t for turn in THREE for t in turn]

@pytest.mark.parametrize('record', [
    dict(conversations=turns(*flat)), dict(messages=turns(*flat, **openai)),
    dict(conversation=turns(*flat)),
    dict(conversations=turns(*flat[:5]), chosen={'from': 'gpt', 'value': 'a3'}),
    dict(instruction='Human:q1\nAssistant:a1\nHuman:q2\nAssistant:a2\nHuman:q3\nAssistant:',
         input='', output='a3'),
    dict(instruction='Human:q1Assistant:a1Human:q2Assistant:a2Human:q3Assistant:', input='',
         output='a3'),
    dict(instruction='Human:q1\nAssistant:a1\nHuman:q2\nAssistant:a2\nHuman:q3', output='a3'),
    dict(instruction='q3', output='a3', history=[['q1', 'a1'], ['q2', 'a2']]),
    dict(prompt='q3', response='a3', history=turns(*flat[:4], **openai)),
    dict(prompt=turns(*flat[:5], **openai), chosen=turns('a3', names=('gpt',)), rejected=[]),
    dict(chosen='Human: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant: a2\n\nHuman: q3\n\n'
         'Assistant: a3', rejected='')])
def test_every_turn_of_a_conversation_is_kept(record):
    e = to_example(record)
    assert (*e.turns, (e.prompt, e.answer)) == THREE and e.opening == 'q1'
    [parts] = encode_examples(tok, [e], 99)
    _, y = _conversation_row(parts, bos=tok.bos, eos=tok.eos)
    answers = [[tok.bos, *tok.encode(a), tok.eos] for a in ('a1', 'a2', 'a3')]
    assert y[y != IGNORE].tolist() == [t for answer in answers for t in answer]


@pytest.mark.parametrize('record,system', [
    (dict(messages=[dict(role='system', content='s'), *turns('q', 'a', **openai)]), 's'),
    (dict(messages=[dict(role='developer', content='s'), *turns('q', 'a', **openai)]), 's'),
    (dict(system='s', conversations=turns('q', 'a')), 's'),
    (dict(system='r', conversations=[{'from': 'system', 'value': 's'}, *turns('q', 'a')]), 'r\ns'),
    (dict(messages=[dict(role='system', content=''), *turns('q', 'a', **openai)]), ''),
    (dict(instruction='q', output='a', system='s'), 's'),
    (dict(instruction='q', output='a', system=None), ''),
    *((dict(prompt='q', response='a', **{name: 's'}), 's')
      for name in ('system_prompt', 'system_message', 'system_instruction', 'sys')),
    (dict(system_prompt='s', messages=turns('q', 'a', **openai)), 's'),
    (dict(system='s', system_prompt='s', prompt='q', answer='a'), 's'),
    (dict(system=None, system_prompt='s', sys='', prompt='q', answer='a'), 's'),
    (dict(system='s', messages=[dict(role='system', content='s'), *turns('q', 'a', **openai)]),
     's')])
def test_system_texts_are_kept(record, system):
    e = to_example(record)
    assert (e.system, e.prompt, e.answer, e.turns) == (system, 'q', 'a', ())
    before = [tok.system, *tok.encode(system)] if system else []
    assert prompt_ids(tok, e.prompt, e.system) == [
        tok.bos, *before, tok.user, *tok.encode('q')]
    assert e.extra == {}


def test_nothing_of_a_record_is_lost():
    rest = dict(entity='e', wording='seen')
    e = to_example(dict(instruction='i', input='', output='o', system='s', task='t', **rest))
    assert e == Example('i', 'o', 's', 't', rest)
    chat = dict(messages=turns('q', 'a', **openai), task=7, id=1)
    assert to_example(chat).extra == dict(task=7, id=1)
    instances = [dict(input='a', output='1'), dict(input='b', output='2')]
    both = to_examples(dict(instruction='i', id=7, instances=instances))
    assert [e.answer for e in both] == ['1', '2']


@pytest.mark.parametrize('record,why', [
    (dict(instruction='i'), 'instruction without an answer'),
    (dict(conversations=[], chosen={}), 'chosen answers no question'),
    (dict(conversations=[]), 'no question with an answer'),
    ({}, 'no question and answer'), (dict(text='t'), 'no question and answer'),
    (dict(output='o'), 'no question and answer'),
    (dict(messages=None), 'no question and answer'),
    (dict(instruction='', output='o'), 'instruction is empty'),
    (dict(instruction='i', output='\n'), 'output is empty'),
    (dict(instruction='i', output='\x00\ufeff'), 'output is empty'),
    (dict(instruction='i', output=None), 'output is null'),
    (dict(instruction=None, output='o'), 'instruction is null'),
    (dict(instruction='i', output=2), 'output is not text but a number'),
    (dict(instruction='i', output=float('nan')), 'output is not text but a number'),
    (dict(instruction='i', output=True), 'true or false'),
    (dict(instruction='i', input=['x'], output='o'), 'input is not text but a list'),
    (dict(instruction='i', system=3, output='o'), 'system is not text but a number'),
    (dict(instruction='i', output=['o']), 'output is not text but a list'),
    (dict(prompt={}, answer='a'), 'prompt is not text'),
    (dict(instruction='i', instances=['o']), 'instruction without an answer'),
    (dict(instruction='i', instances=[]), 'instruction without an answer'),
    (dict(instruction='i', output='o', history='h'), 'history is not a list of questions'),
    (dict(instruction='i', output='o', history=[['q', None]]), 'history is null'),
    (dict(instruction='Human: q\nAssistant: a', output='o'), 'does not end with a question'),
    (dict(instruction='Human: q\nAssistant:\nHuman: r\nAssistant:', output='o'),
     'a turn in the dialogue is empty'),
    (dict(instruction='Human:', output='o'), 'a turn in the dialogue is empty'),
    (dict(instruction='Human: q\nAssistant:', output=None), 'output is null'),
    (dict(conversations='[]'), 'conversations is not a list of turns'),
    (dict(conversations=['hi']), 'a turn is not a record'),
    (dict(conversations=[None]), 'a turn is not a record'),
    (dict(conversations=turns('q', None)), 'value is null'),
    (dict(conversations=turns('q', '')), 'value is empty'),
    (dict(conversations=turns('q', 3)), 'value is not text but a number'),
    (dict(conversations=[{'from': 'human'}]), 'value is missing'),
    (dict(messages=turns('q', [], **openai)), 'content is not text but a list'),
    (dict(messages=turns('q', [dict(type='text', text=None)], **openai)), 'more than text'),
    (dict(messages=turns('q', [dict(type='image_url')], **openai)), 'more than text'),
    (dict(messages=[*turns('q', **openai), dict(role='wizard', content='x')]), 'unknown role'),
    (dict(messages=[dict(role=None, content='x')]), 'unknown role'),
    (dict(messages=[*turns('q', 'a', **openai), dict(role='system', content='s')]),
     'a system text in the middle'),
    (dict(conversations=turns('q')), 'no question with an answer'),
    (dict(conversations=turns('q', 'a'), chosen=chosen), 'chosen answers no question'),
    (dict(conversations=turns('q'), chosen={}), 'chosen is not text but a record'),
    (dict(prompt=turns('q', 'a'), chosen=turns('b', names=('gpt',)) + [None]), 'not a record'),
    (dict(chosen='no dialogue', rejected=''), 'chosen is not a list of turns'),
    (dict(conversations=turns('q'), chosen=7), 'chosen is not text')])
def test_what_is_no_example_says_why(record, why):
    with pytest.raises(UserError, match=why): to_examples(record)


@pytest.mark.parametrize('name', [n for n, f in FORMATS.items() if f.kind in ('question', 'chat')])
def test_every_format_of_the_table_is_read(name):
    form, talk = FORMATS[name], turns('q', 'a')
    fields = dict(zip(form.fields, ('q', 'a') if form.kind == 'question' else (talk, talk)))
    about = {form.context: 'text'} if form.context else {}
    e = to_example({**fields, **about, 'text': 'the same in a template'})
    assert (e.prompt, e.answer) == ('q\ntext' if about else 'q', 'a')
    assert e.extra['text'] == 'the same in a template'


def test_untidy_logs_lose_only_their_ends():
    report = Report()
    said = [('assistant', 'a0'), ('user', 'q1'), ('user', 'more'), ('assistant', 'a1'),
            ('assistant', 'and'), ('user', 'q2')]
    system, [pair] = _exchanges([_Turn(*turn) for turn in said], report)
    assert [turn.text for turn in pair] == ['q1\nmore', 'a1\nand']
    assert list(report.notes.values()) == [1, 1]


def test_a_question_that_speaks_of_markers_is_no_dialogue():
    others = ('What is a Human: in a prompt?', 'Humans: a history', 'Assistant: hello',
              'human: lower case')
    for text in others: assert _split_dialogue(text) == []
    quoted = 'Human: write "Assistant:" twice\nAssistant:'
    assert _split_dialogue(quoted) == [_Turn('user', 'write "Assistant:" twice')]
    assert to_example(dict(prompt='Who?', answer='Human: me\nAssistant: you')).turns == ()


def test_text_is_cleaned_like_the_text_of_pretraining():
    e = to_example(dict(instruction='\ufeffcafe\u0301\r\n', output='a\x00b\ud800 👩\u200d👩'))
    assert (e.prompt, e.answer) == ('caf\u00e9', 'ab\ufffd 👩\u200d👩')


def answer_of(i): return '' if i % 5 == 0 else f'answer {i}'


RECORDS = [dict(instruction=f'question {i}', input='', output=answer_of(i)) for i in range(20)]


@pytest.mark.parametrize('kind', ['json', 'jsonl', 'csv', 'jsonl.bz2'])
def test_files_of_every_kind(tmp_path, kind):
    file = tmp_path/f'set.{kind}'
    if kind == 'json': file.write_text(json.dumps(RECORDS))
    elif kind == 'jsonl': file.write_text('\n'.join(map(json.dumps, RECORDS)))
    elif kind == 'csv':
        with open(file, 'w', newline='') as f:
            (w := csv.DictWriter(f, RECORDS[0])).writeheader(), w.writerows(RECORDS)
    else: file.write_bytes(bz2.compress('\n'.join(map(json.dumps, RECORDS)).encode()))
    report = Report()
    got = list(read_instructions(file, report))
    assert [e.answer for e in got] == [r['output'] for r in RECORDS if r['output']]
    assert (report.rows, report.kept, report.rejected['output is empty'][0]) == (20, 16, 4)


def test_a_table_of_prompts_and_answers(tmp_path):
    (tmp_path/'a.csv').write_text('prompt,answer\n"one, two",三\n"over\ntwo lines",四\n,五\nsix,\n')
    report = Report()
    found = [(e.prompt, e.answer) for e in read_instructions(tmp_path/'a.csv', report)]
    assert found == [('one, two', '三'), ('over\ntwo lines', '四')]
    assert rejected(report) == {'prompt is empty': 1, 'answer is empty': 1}


def test_parquet(tmp_path):
    datasets = pytest.importorskip('datasets')
    rows = [turns('q1', 'a1', 'q2', 'a2', **openai), turns('q', None, **openai)]
    table = datasets.Dataset.from_list([dict(messages=messages) for messages in rows])
    table.to_parquet(tmp_path/'a.parquet')
    report = Report()
    [e] = read_instructions(tmp_path/'a.parquet', report)
    assert (e.turns, e.prompt, e.answer) == ((('q1', 'a1'),), 'q2', 'a2')
    assert rejected(report) == {'content is null': 1}


def test_several_sources_and_several_instances_are_counted(tmp_path):
    instances = [dict(input=str(k), output='o' if k else None) for k in range(4)]
    a = put(tmp_path/'a.jsonl', json.dumps(dict(instruction='i', instances=instances)))
    b = put(tmp_path/'b.jsonl', json.dumps(dict(prompt='p', answer='a')) + '\n{"prompt": "p"}')
    report = Report()
    assert len(list(read_instructions([a, b], report))) == 4
    assert (report.rows, report.kept, sum(rejected(report).values())) == (6, 4, 2)


def test_a_source_without_instructions_says_what_it_has(tmp_path):
    path = put(tmp_path/'text.jsonl', json.dumps(dict(text='no question here')))
    why = ('text.jsonl: no instruction to learn from: no question and answer in it \\(1\\); '
           'the fields of its last record are text')
    with pytest.raises(UserError, match=why): list(read_instructions(path))


# ---- what is not to be learned

AGAINST = {'weight': (0, 0., -1, False, '0', 'false'), 'verdict': (False, 'False'),
           'rating': (-1, False, 'bad', 'Thumbs_Down'), 'fault': (True, 1, 'true')}
FOR = {'weight': (1, True, '1.0', None, .5, 3, 'high'), 'verdict': (True, 1, None, 0, 'positive'),
       'rating': (1, 5, 'good', 0, None), 'fault': (False, 0, None, 'User')}
DECIDES = 1, True, '1.0', False, None


def marked(values): return [(name, v) for name, kind in _MARKS.items() for v in values[kind]]


@pytest.mark.parametrize('name,value', marked(AGAINST))
def test_a_mark_against_an_answer_is_heeded(name, value):
    "of a record and of a turn, of the only answer, the last one and one in between"
    for record in (dict(prompt='q', answer='a'), dict(messages=turns('q', 'a', **openai))):
        with pytest.raises(UserError, match=f'its {name} says that it is not to be learned'):
            to_example({**record, name: value})
    said = turns('q1', 'a1', 'q2', 'a2', 'q3', 'a3', **openai)
    def without(*which):
        return dict(messages=[{**t, name: value} if i in which else t for i, t in enumerate(said)])
    e = to_example(without(3), report := Report())
    assert (e.turns, e.answer, e.learned) == ((('q1', 'a1'), ('q2', 'a2')), 'a3', (True, False))
    assert report.notes == {'answers kept as context: not to be learned': 1}
    e = to_example(without(3, 5), report := Report())
    assert (e.turns, e.prompt, e.answer, e.learned) == ((), 'q1', 'a1', ())
    assert report.notes == {'last answers left off: not to be learned': 2}
    with pytest.raises(UserError, match='no answer that is to be learned'):
        to_example(without(1, 3, 5))


@pytest.mark.parametrize('name,value', marked(FOR))
def test_a_mark_that_is_not_against_it_is_not(name, value):
    plain = dict(prompt='q', answer='a')
    e = to_example({**plain, name: value}, report := Report())
    assert (e.prompt, e.answer, e.learned) == ('q', 'a', ())
    decides = value is None or _MARKS[name] != 'rating' and value in (1, '1.0') or (
        _MARKS[name] == 'fault' and value == 0)
    assert report.notes == ({} if decides else {f'the field {name} is not used': 1})


@pytest.mark.parametrize('more,why', [
    (dict(image='cat.png'), 'comes with image'), (dict(images=['cat.png']), 'comes with images'),
    (dict(video='cat.mp4'), 'comes with video')])
def test_a_question_about_more_than_text_is_none(more, why):
    with pytest.raises(UserError, match=why): to_example(dict(prompt='q', answer='a', **more))
    with pytest.raises(UserError, match=why):
        to_example(dict(messages=[{**t, **more} for t in turns('q', 'a', **openai)]))
    empty = {k: None if isinstance(v, str) else [] for k, v in more.items()}
    assert to_example(dict(prompt='q', answer='a', **empty)).answer == 'a'


@pytest.mark.parametrize('name', ['context', 'passage', 'input', 'history', 'score', 'tools'])
def test_a_field_that_adds_to_the_meaning_and_is_not_used_is_noted(name):
    for record in (dict(prompt='q', answer='a'), dict(messages=turns('q', 'a'))):
        if name == 'history' and 'prompt' in record: continue  # is used there
        assert to_example({**record, name: [['q0', 'a0']]}, report := Report()).answer == 'a'
        assert report.notes == {f'the field {name} is not used': 1}
    used = dict(instruction='i', input='x', output='o', context='y', history=[])
    to_example(used, report := Report())
    assert report.notes == {'the field context is not used': 1}


call = dict(role='assistant', content=None, tool_calls=[dict(function=dict(name='f'))])

@pytest.mark.parametrize('tool', [
    call, {**call, 'content': 'let me look'}, dict(role='tool', content='x'),
    dict(role='assistant', content='', function_call=dict(name='f', arguments='{}')),
    dict(role='assistant', content=[dict(type='text', text='t'), dict(type='tool_use', name='f')]),
    dict(role='user', content=[dict(type='tool_result', content='x')]),
    *({'from': role, 'value': 'x'} for role in (
        'function', 'observation', 'function_call', 'Tool', 'tool_response', 'ipython'))])
def test_a_conversation_ends_before_its_first_tool_call(tool):
    said = turns('q1', 'a1', 'q2', 'a2', 'q3', **openai)
    e = to_example(dict(messages=[*said, tool, chosen]), report := Report())
    assert (e.turns, e.prompt, e.answer) == ((('q1', 'a1'),), 'q2', 'a2')
    assert report.notes == {'conversations that end before their first call of a tool': 1}
    for before in ([], said[:1]):
        with pytest.raises(UserError, match='no answer before the first call of a tool'):
            to_example(dict(messages=[*before, tool, chosen]))
    e = to_example(dict(prompt=said, chosen=[tool, chosen], rejected=[]))
    assert (e.prompt, e.answer) == ('q2', 'a2')


def test_nulls_of_a_table_call_no_tool():
    "A file format with columns writes every field of every turn"
    empty = dict(tool_calls=None, function_call=dict(name=None, arguments=None), weight=None)
    said = [{**t, **empty} for t in turns('q', 'a', **openai)]
    e = to_example(dict(messages=said, images=[], label=None, history=None), report := Report())
    assert (e.prompt, e.answer, e.learned, report.notes) == ('q', 'a', (), {})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(said, said, st.booleans()), min_size=1, max_size=5), said,
       st.integers(1, 200))
def test_what_is_not_learned_is_read(turns, system, room):
    "The ids of a row are those of the conversation, and only its answers to learn are targets"
    *before, (question, answer, _) = turns
    plain = Example(question, answer, system, turns=tuple(t[:2] for t in before))
    e = Example(question, answer, system, turns=plain.turns, learned=tuple(t[2] for t in before))
    [whole], [parts] = (encode_examples(tok, [e], 10**6) for e in (plain, e))
    ids, learned = lay_out(parts, tok.bos, tok.eos)
    assert ids.tolist() == lay_out(whole, tok.bos, tok.eos)[0].tolist()
    want = [a for _, a, yes in before if yes] + [answer]
    targets = [t for a in want for t in (tok.bos, *tok.encode(a), tok.eos)]
    assert ids[learned].tolist() == targets
    assert ids.tolist()[:-len(tok.encode(answer)) - 1] == conversation_ids(
        tok, plain.turns, question, system)
    for fits in encode_each(tok, [e], room):
        n = len(lay_out(fits, tok.bos, tok.eos)[0])
        assert n <= room and list(fits) == list(parts[:len(fits)])


def test_as_many_marks_as_turns():
    for learned in ((True,), (True,)*3):
        with pytest.raises(UserError, match='learned has'):
            Example('q', 'a', turns=(('q', 'a'),)*2, learned=learned)
    assert _fold_context([[1], [2]], [True], 8, 9) == [[1], [2]]


# ---- one list of formats

@pytest.mark.parametrize('record', [m.args[1][i] for m in (
    test_every_format.pytestmark[0], test_every_turn_of_a_conversation_is_kept.pytestmark[0],
) for i in range(len(m.args[1])) if m.args[0] == 'record'])
def test_what_is_read_is_recognised(record):
    "A record that can be read is one of instructions, also with a column `text` beside"
    for r in (record, {**record, 'text': 'the same in a template'}):
        assert FORMATS[format_of(r)].kind != 'text'


@pytest.mark.parametrize('kind', ['jsonl', 'csv', 'json'])
@pytest.mark.parametrize('names,fields', [
    (('q', 'a'), 'question=q answer=a'), (('the question', 'reply'), 'prompt="the question" '
    'response=reply'), (('do', 'out', 'with'), 'instruction=do, output=out, input=with'),
    (('Question', 'text'), 'question=Question answer=text'), (('dialog',), 'messages=dialog')])
def test_fields_under_other_names_are_read_and_recognised(tmp_path, kind, names, fields):
    if 'dialog' in names and kind == 'csv': pytest.skip('a cell holds no conversation')
    rows = [dict(zip(names, (f'q{i}', f'a{i}', 'x'))) for i in range(3)]
    if 'dialog' in names: rows = [dict(dialog=turns(f'q{i}', f'a{i}', **openai)) for i in range(3)]
    path = tmp_path/f'a.{kind}'
    if kind == 'json': path.write_text(json.dumps(rows))
    elif kind == 'jsonl': path.write_text('\n'.join(map(json.dumps, rows)))
    else:
        with open(path, 'w', newline='') as f:
            (w := csv.DictWriter(f, rows[0])).writeheader(), w.writerows(rows)
    got = list(read_instructions(path, report := Report(), fields=fields))
    about = '\nx' if len(names) == 3 else ''
    assert [(e.prompt, e.answer, e.extra) for e in got] == [
        (f'q{i}{about}', f'a{i}', {}) for i in range(3)]
    assert (report.rows, report.kept) == (3, 3) and has_instructions(path, fields=fields)


def test_a_mark_under_another_name_is_heeded(tmp_path):
    rows = [dict(prompt='q', answer='a', good=i > 0) for i in range(3)]
    path = put(tmp_path/'a.jsonl', '\n'.join(map(json.dumps, rows)))
    assert len(list(read_instructions(path))) == 3
    assert len(list(read_instructions(path, report := Report(), fields='label=good'))) == 2
    assert rejected(report) == {'its label says that it is not to be learned': 1}


# ---- what no file could hold

HALF = '\ud800'


@pytest.mark.parametrize('record', [
    dict(prompt=f'q{HALF}', answer='a'), dict(prompt='q', answer='a', task=f't{HALF}'),
    dict(prompt='q', answer='a', id={HALF: [HALF, 7, {'x': (HALF + 'y')}]}),
    {'prompt': 'q', 'answer': 'a', HALF: HALF},
    dict(messages=[dict(role='user', content='q'), dict(role='assistant', content=HALF + 'a')],
         rejected=dict(role='assistant', content=HALF))])
def test_halves_of_surrogate_pairs_end_at_the_reader(tmp_path, record):
    good = dict(prompt='q', answer='a')
    path = put(tmp_path/'a.jsonl', '\n'.join(map(json.dumps, (record, good))))
    [e] = read_instructions(path, report := Report())
    assert e == Example('q', 'a') and report.check() and 'surrogate' in str(report)
    e, _ = read_instructions(path, report := Report(), errors='replace')
    assert '\ufffd' in json.dumps(asdict(e), ensure_ascii=False).encode().decode()
    assert report.kept == 2 and 'halves of surrogate pairs, replaced' in report.notes
    encode_examples(tok, [e], 99)


@pytest.mark.parametrize('depth', [500, 100_000])
def test_a_record_nested_deeply_is_counted(tmp_path, depth):
    deep = '[' * depth + ']' * depth
    lines = [f'{{"prompt": "p", "answer": "a", "{name}": {deep}}}' for name in ('x', 'weight')]
    path = put(tmp_path/'a.jsonl', '\n'.join([*lines, '{"prompt": "p", "answer": "a"}']))
    got = list(read_instructions(path, report := Report()))
    assert (report.rows, report.kept) == (3, len(got)) and report.check() and str(report)


# ---- what is said when nothing is left

def test_the_reasons_are_the_message(tmp_path):
    rows = [dict(prompt='p', answer=''), dict(prompt='p')]*20 + [dict(prompt='p', answer='a', label=False)]
    good = put(tmp_path/'good.jsonl', '{"prompt": "p", "answer": "a"}')
    bad = put(tmp_path/'bad.jsonl', '\n'.join(map(json.dumps, rows)))
    for source in (bad, [good, bad], [bad, good]):
        with pytest.raises(UserError) as e: list(read_instructions(source))
        assert str(e.value) == (
            f'{bad}: no instruction to learn from: answer is empty (20), prompt without an answer to '
            'it (20), its label says that it is not to be learned (1); the fields of its last record '
            'are prompt, answer, label')


def test_many_reasons_are_summed_up(tmp_path):
    rows = [{'prompt': 'p', 'answer': v} for v in ('', None, 3, True, [], {})] + [{'x': 1}]
    path = put(tmp_path/'a.jsonl', '\n'.join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r'something else \(2\); the fields') as e:
        list(read_instructions(path))
    assert '\n' not in str(e.value)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.integers(4, 100))
def test_the_context_that_is_named_keeps_what_it_says(sizes, room):
    examples = [Example('q', 'a'*n, turns=(('q', 'a'),)*(n % 2)) for n in sizes]
    report = Report()
    kept = list(encode_each(tok, examples, room + 1, report))
    dropped = len(examples) - len(kept)
    for context, n in needed_context(report).items():
        again = list(encode_each(tok, examples, context + 1))
        assert len(again) >= len(kept) + n
    found = list(needed_context(report).values())
    assert found == sorted(found) and (found[-1] if found else 0) == dropped
    assert not found or found[0] >= .95*dropped
    if not kept:
        context = max(needed_context(report))
        with pytest.raises(NothingFits) as e: encode_examples(tok, examples, room + 1)
        assert str(e.value).startswith(f'none of the {len(sizes)} examples fits into {room + 1}')
        assert f'context={context} would keep all' in str(e.value)


# ---- hostile records

words = st.sampled_from(['', ' ', 'hello', '你好', 'None', 'Human:', 'Human: hi\nAssistant:',
                         '\nAssistant: x\nHuman: y', 'user', 'gpt', '\x00', '\ud800',
                         'system', '<s>', '</s><|user|>', 'مرحبا', '👩\u200d👩\u200d👧'])
keys = st.sampled_from(['from', 'value', 'role', 'content', 'input', 'output'])
leaves = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.just(float('nan')), words)
anything = st.recursive(leaves, lambda inner: st.one_of(
    st.lists(inner, max_size=2), st.dictionaries(keys, inner, max_size=2)), max_leaves=4)
roles = st.sampled_from(['user', 'assistant', 'human', 'gpt', 'system', 'tool', 'nobody'])
turn = st.one_of(st.builds(lambda r, t: {'from': r, 'value': t}, roles, words),
                 st.builds(lambda r, w: dict(role=r, content='x', weight=w), roles, anything),
                 st.builds(lambda r, t: dict(role=r, content=t), roles, anything), anything)
talk = st.lists(words.filter(str.strip), min_size=2, max_size=6).map(lambda said: turns(*said))
fields = ('instruction input output target prompt answer response chosen rejected history '
          'conversations messages conversation instances system task question context text '
          'label weight rating mask tools images system_prompt completion').split()
value = st.one_of(words, anything, st.lists(turn, max_size=4))
some = st.dictionaries(st.sampled_from(fields), value, max_size=2)
record = st.one_of(
    st.builds(lambda i, o, more: {**more, 'instruction': i, 'output': o}, words, value, some),
    st.builds(lambda c, more: {'conversations': c, **more},
              st.one_of(talk, st.lists(turn, max_size=4)), some),
    st.builds(lambda i, more: {'instruction': i, 'output': 'o', **more}, words, some),
    st.dictionaries(st.sampled_from(fields), value, max_size=4), anything)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(record, min_size=50, max_size=50))
def test_five_thousand_fuzzed_records(tmp_path_factory, records):
    file = tmp_path_factory.mktemp('fuzz')/'a.jsonl'
    file.write_text('\n'.join(map(json.dumps, [*records, dict(prompt='p', answer='a')])))
    report = Report()
    examples = list(read_instructions(file, report, errors='replace'))
    unfolded = [len(_unfold(r)) if isinstance(r, dict) else 1 for r in records]
    assert (report.rows, report.kept) == (1 + sum(unfolded), len(examples))
    assert report.rows == len(examples) + sum(rejected(report).values())
    for e in examples:
        texts = [e.prompt, e.answer, *(t for turn in e.turns for t in turn)]
        assert all(isinstance(t, str) and t.strip() for t in texts) and isinstance(e.system, str)
        json.dumps(asdict(e), ensure_ascii=False).encode()
    pairs = encode_examples(tok, examples, 60, report)
    assert report.kept == len(pairs)
    assert report.rows == report.kept + sum(rejected(report).values())
    for parts in pairs:
        _, y = _conversation_row(parts, bos=tok.bos, eos=tok.eos)
        assert (y != IGNORE).sum() == sum(len(a) + 2 for a in parts[1::2])
    assert str(report) and report._repr_markdown_()


GOOD = json.dumps(dict(prompt='问', answer='答'), ensure_ascii=False)

@pytest.mark.parametrize('text', ['', '\n\n \n', '[]', '{}', '{"instruction": ', '\ufeff',
                                  '\x00\x00'])
def test_files_without_a_record_give_one_line(tmp_path, text):
    (tmp_path/'a.jsonl').write_text(text)
    with pytest.raises(UserError, match='a.jsonl') as e: list(read_instructions(tmp_path/'a.jsonl'))
    assert '\n' not in str(e.value)


def test_broken_lines_are_counted(tmp_path):
    lines = ['\ufeff' + GOOD, GOOD[:9], '', '[1]', '7', '"text"', 'null', GOOD,
             GOOD.replace('答', '答'*10**6)]
    (tmp_path/'a.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    report = Report()
    assert [len(e.answer) for e in read_instructions(tmp_path/'a.jsonl', report)] == [1, 1, 10**6]
    assert report.rows == 8 == 3 + sum(rejected(report).values())


def test_a_truncated_archive_is_named(tmp_path):
    whole = bz2.compress('\n'.join([GOOD]*10_000 + [str(random.Random(0).random())]).encode())
    (tmp_path/'a.jsonl.bz2').write_bytes(whole[:-20])
    with pytest.raises(UserError, match='a.jsonl.bz2'):
        list(read_instructions(tmp_path/'a.jsonl.bz2'))


def test_none_never_becomes_an_answer():
    for record in (dict(instruction='i', output=None), dict(prompt=None, answer='a'),
                   dict(conversations=turns('q', None)),
                   dict(messages=turns(None, 'a', **openai)),
                   dict(instruction='i', instances=[dict(output=None)])):
        with pytest.raises(UserError): to_examples(record)
    the_word = dict(instruction='i', input=None, output='None', system=None)
    assert to_example(the_word) == Example('i', 'None')


def test_ten_thousand_strings_smuggle_nothing():
    seen = 'hello user system <s> </s> <|user|> <|system|> <pad> <unk> 你好'
    real = Tokenizer.train([seen], 300, kind='bpe')
    control = {real.pad, real.bos, real.eos, real.system, real.user, real.unk}
    forge = ['<s>', '</s>', '<|user|>', '<|system|>', '<pad>', '<unk>', '<', '|', '>', 's', '/',
             '▁', '\n', ' ', 'Human:', 'Assistant:', '\x02', '<0x02>', '你', 'user']
    r = random.Random(0)
    texts = [''.join(r.choices(forge, k=r.randint(1, 9))) for _ in range(10_000)]
    for some in real.encode_batch(texts): assert control.isdisjoint(some)
    for prompt, system in zip(texts[::2], texts[1::2]):
        got = prompt_ids(real, prompt, system)
        assert [t for t in got if t in control] == [real.bos, real.system, real.user]
    turns = [((texts[i+3], texts[i+4]),) for i in range(0, 10_000, 5)]
    examples = [Example(*texts[5*i:5*i+3], turns=some) for i, some in enumerate(turns)]
    a_turn = [real.user, real.bos, real.eos]
    for parts in encode_each(real, examples, 10**6):
        row = lay_out(parts, real.bos, real.eos)[0].tolist()
        assert [t for t in row if t in control] == [real.bos, real.system, *a_turn, *a_turn]


# ---- encoding

ROW = st.tuples(st.text(max_size=12).filter(str.strip), st.text(max_size=12),
                st.sampled_from(['', 'be brief']))


@settings(max_examples=100, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=12), st.integers(8, 50))
def test_encoding_keeps_or_counts(rows, max_length):
    examples, report = [Example(*row) for row in rows], Report()
    whole = [[*prompt_ids(tok, e.prompt, e.system), tok.bos, *tok.encode(e.answer), tok.eos]
             for e in examples]
    if all(len(w) > max_length for w in whole):
        with pytest.raises(UserError, match='none of the'):
            encode_examples(tok, examples, max_length, report)
        return
    pairs = encode_examples(tok, iter(examples), max_length, report)
    found = [[*p, tok.bos, *a, tok.eos] for p, a in pairs]
    assert found == [w for w in whole if len(w) <= max_length]
    assert report.rows == len(rows) and report.kept == len(pairs)
    assert sum(rejected(report).values()) == len(rows) - len(pairs)


def test_a_report_that_came_along_is_carried_on(tmp_path):
    records = [*RECORDS, dict(instruction='x'*99, output='y')]
    path = put(tmp_path/'a.jsonl', '\n'.join(map(json.dumps, records)))
    report = Report()
    pairs = encode_examples(tok, read_instructions(path, report), 40, report)
    assert (report.rows, report.kept, len(pairs)) == (21, 16, 16)


@settings(max_examples=150, deadline=None)
@given(parts_of, st.integers(0, 90))
def test_the_turns_that_fit(parts, room):
    k = _fitting(parts, room)
    size = lambda n: len(lay_out(parts[:n], 30, 31)[0]) if n else 0
    assert k % 2 == 0 and size(k) <= room and (k == len(parts) or size(k + 2) > room)


def test_a_long_conversation_keeps_its_first_turns_and_counts_the_others():
    talk = Example('q3', 'a'*50, system='s', turns=(('q1', 'a1'), ('q2', 'a2')))
    report = Report()
    [parts] = encode_examples(tok, [talk], 20, report)
    assert [tok.decode(p) for p in parts] == ['sq1', 'a1', 'q2', 'a2']
    assert parts[0][:3] == [tok.bos, tok.system, *tok.encode('s')]
    assert (report.rows, report.kept, report.rejected) == (1, 1, {})
    assert list(report.notes.values()) == [1]
    _, y = _conversation_row(parts, bos=tok.bos, eos=tok.eos)
    assert (y == tok.eos).sum() == 2  # whole answers only
    with pytest.raises(UserError, match='none of the 1 examples fits'):
        encode_examples(tok, [talk], 7)


def test_examples_stream_through():
    taken = []
    def source():
        for i in range(5000):
            taken.append(i)
            yield Example(f'q{i}', 'a', 's' if i % 3 else '', turns=(('x', 'y'),)*(i % 4))
    stream = encode_each(tok, source(), 30, report := Report())
    next(stream)
    assert len(taken) == 1000
    rest = list(stream)
    assert len(rest) == report.kept - 1 and report.rows == 5000
    [pair] = encode_each(tok, [Example('q', 'a', 's')], 30)
    assert list(pair) == _with_roles(tok, tok.encode_batch(['s', 'q', 'a']))


def test_the_prompt_is_what_was_trained():
    e = Example('q2', 'a2', 's', turns=(('q1', 'a1'),))
    [parts] = encode_examples(tok, [e], 60)
    x, _ = _conversation_row(parts, bos=tok.bos, eos=tok.eos)
    asked = prompt_ids(tok, e.prompt, e.system, e.turns)
    assert x.tolist() == [*asked, tok.bos, *tok.encode('a2')]


# ---- real sets

def real_set(name):
    file = REAL/name
    if not file.exists(): pytest.skip(f'needs the instruction set {file}')
    return file


SETS = {'alpaca_zh_demo.json': 1000, 'belle_zh_seed_tasks.jsonl': 175, 'dpo_zh_demo.json': 300}


@pytest.mark.parametrize('name', SETS)
def test_real_sets_are_read_whole(name):
    rows, report = SETS[name], Report()
    examples = list(read_instructions(real_set(name), report))
    assert len(examples) == report.kept == report.rows == rows and not report.rejected
    pairs = encode_examples(tok, examples, 4000, report)
    assert report.kept == len(pairs) >= .8*rows
    assert report.rows == report.kept + sum(rejected(report).values())


def test_preference_pairs_learn_the_reply_that_was_chosen():
    records = json.loads(real_set('dpo_zh_demo.json').read_text(encoding='utf-8'))
    for r, e in zip(records, read_instructions(real_set('dpo_zh_demo.json')), strict=True):
        assert e.answer == r['chosen']['value'].strip() and e.extra == dict(rejected=r['rejected'])
        assert bool(e.system) == (r['conversations'][0]['from'] == 'system')
