"Evaluation: what is too heavy or too dull for the chapter"
import copy
import json
import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_nb.core import UserError
from lm_nb.data.instructions import Example, encode_examples, prompt_ids
from lm_nb.data.packing import SFTBatches
from lm_nb.data.shards import IGNORE, Batch, Shards, write_token_shards
from lm_nb.data.order import eval_batches
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.inference import evaluate as E
from lm_nb.inference.evaluate import (
    Answer, cloze_match, evaluation, evaluations, exact_match, heldout, surprisal,
    tally, wilson_interval)
from lm_nb.model.gpt import GPT, GPTConfig

TEXTS = ['The river is green.', '河是绿色的。',
         'The hill is blue,\nand so is the sky.', '山是蓝色的。'] * 5


@pytest.fixture(scope='module')
def tok(): return Tokenizer.train(TEXTS, vocab_size=290)


@pytest.fixture(scope='module')
def model(tok):
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tok), context=64, n_layer=2, n_head=2, d_model=32)
    return GPT(GPTConfig(zero_init=False, dropout=.2, **shape))


@pytest.fixture(scope='module')
def shards(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp('evaluate')/'shards'
    write_token_shards(TEXTS, tok, folder)
    return Shards(folder, tok)


class Scripted(torch.nn.Module):
    "A model that answers from a table: (ids asked, ids to say)"
    def __init__(self, tok, replies):
        super().__init__()
        self.cfg = GPTConfig(vocab_size=len(tok), context=64, n_layer=1, n_head=1, d_model=2)
        self.one, self.reads = torch.nn.Parameter(torch.ones(1)), 0
        self.replies = [(list(p), [*r, tok.eos]) for p, r in replies]

    def forward(self, ids, doc=None, cache=None):
        self.reads += 1
        out = torch.full((*ids.shape, self.cfg.vocab_size), -9.)
        for b, row in enumerate(ids.tolist()):
            row = row if doc is None else [t for t, d in zip(row, doc[b].tolist()) if d >= 0]
            for asked, reply in self.replies:
                said = row[len(asked):]
                told = row[:len(asked)] == asked and said == reply[:len(said)]
                if told and len(said) < len(reply): out[b, -1, reply[len(said)]] = 9.
        return out

# loss

def test_heldout_is_the_mean_over_targets(model, tok, shards):
    model.eval()
    batches = list(eval_batches(shards, 64, 4))
    def nll(b):
        logits = model(b.x, b.doc).flatten(0, 1)
        return F.cross_entropy(logits, b.y.flatten(), ignore_index=IGNORE, reduction='sum').item()
    total, size = sum(map(nll, batches)), sum(len(t.encode()) for t in TEXTS)
    got = heldout(model, batches, shards.text_bytes)
    targets = sum(len(tok.encode(t)) + 1 for t in TEXTS) # the pieces of each document and its `eos`
    assert got['targets'] == targets == len(shards) - len(TEXTS)
    assert math.isclose(got['loss'], total/targets, rel_tol=1e-5)
    assert math.isclose(got['bits_per_byte'], total/math.log(2)/size, rel_tol=1e-5)
    assert math.isclose(math.log(got['perplexity']), got['loss'], rel_tol=1e-6)
    json.dumps(got)                            # plain numbers, ready for results.json

def test_the_bits_of_a_document_add_up_from_bos(model, tok, tmp_path):
    "Packed or alone, the bits of texts are those of their pieces, the first too, and of `eos`"
    docs = ['河是绿色的。', 'The river', 'T']
    write_token_shards(docs, tok, tmp_path/'s')
    valid, want = Shards(tmp_path/'s'), 0.
    assert len(valid) <= 64 # a window cuts none of them
    model.eval()
    for text in docs:
        ids = [tok.bos, *tok.encode(text), tok.eos]
        with torch.no_grad(): logp = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
        end = -logp[-1, tok.eos].item()/math.log(2)
        first = -logp[0, ids[1]].item()/math.log(2)
        pieces, bits = surprisal(model, tok, text)
        assert len(pieces) == len(bits) and math.isclose(bits[0], first, rel_tol=1e-4)
        want += sum(bits) + end
    got = heldout(model, eval_batches(valid, 64, 2), valid.text_bytes)
    assert math.isclose(got['bits_per_byte']*valid.text_bytes, want, rel_tol=1e-5)


def test_heldout_weighs_targets_not_batches(model, tok):
    "One long and one short batch: the mean of batch means would be another number"
    rows = [torch.tensor([tok.encode(t)]) for t in ('The river is green.', '山')]
    both = [Batch(r[:, :-1], r[:, 1:], None) for r in rows if r.shape[1] > 1]
    each = [heldout(model, [b]) for b in both]
    n = [e['targets'] for e in each]
    want = sum(e['loss']*e['targets'] for e in each)/sum(n)
    assert len(set(n)) > 1 and math.isclose(heldout(model, both)['loss'], want, rel_tol=1e-6)

def test_heldout_is_repeatable_and_leaves_no_trace(model, shards):
    model.train()                              # dropout would show
    a, b = (heldout(model, eval_batches(shards, 64, 4)) for _ in range(2))
    assert a == b and model.training and a['bits_per_byte'] is None
    assert all(p.grad is None for p in model.parameters())

@pytest.mark.parametrize('context, want', [
    (None, 'fp32'), (torch.autocast('cpu', torch.bfloat16), 'bf16'),
    (torch.autocast('cpu', torch.float16), 'fp16'), (torch.autocast('cpu', enabled=False), 'fp32')])
def test_heldout_says_in_which_dtype(model, shards, context, want):
    assert heldout(model, eval_batches(shards, 64, 4), context=context)['dtype'] == want


def test_heldout_knows_the_dtype_around_it_and_of_the_weights(model, shards):
    with torch.autocast('cpu', torch.bfloat16): got = heldout(model, eval_batches(shards, 64, 4))
    low = heldout(copy.deepcopy(model).bfloat16(), eval_batches(shards, 64, 4))
    assert got['dtype'] == low['dtype'] == 'bf16'


def test_heldout_uses_the_context(model, shards):
    used = []
    @contextmanager
    def mark():
        used.append('in')
        yield
        used.append('out')
    heldout(model, eval_batches(shards, 64, 4), shards.text_bytes, mark())
    assert used == ['in', 'out']

def test_nothing_to_measure(model):
    x = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(UserError, match='nothing to measure'):
        heldout(model, [Batch(x, torch.full_like(x, IGNORE), None)])


@pytest.mark.parametrize('world', [2, 4])
def test_ranks_share_the_batches(model, shards, world):
    "As many passes on each rank, every batch once, and the sums of all are the whole"
    batches, sums, passes = [*eval_batches(shards, 64, 3)], [], []
    assert len(batches) % world                # one rank runs out of batches
    forward = model.forward
    for rank in range(world):
        def keep(t):
            sums.append(t)
            return torch.ones_like(t)          # as if others had added theirs
        counted = []
        def counting(*args, counted=counted, **kw):
            counted.append(1)
            return forward(*args, **kw)
        model.forward = counting
        try: heldout(model, batches, ranks=SimpleNamespace(rank=rank, world=world, sum=keep))
        finally: del model.forward
        passes.append(len(counted))
    total, n = sum(sums).tolist()
    want = heldout(model, batches)
    assert len(set(passes)) == 1 and n == want['targets']
    assert math.isclose(total/n, want['loss'], rel_tol=1e-6)

def test_a_hopeless_loss_does_not_overflow(tok):
    class Wrong(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(1))
        def forward(self, x, doc=None, targets=None):
            sure = F.one_hot(torch.zeros_like(x), len(tok)).float().flatten(0, 1) * 1e6
            return F.cross_entropy(sure, targets.flatten(), reduction='sum')
    x = torch.ones(1, 5, dtype=torch.long)
    assert math.isfinite(heldout(Wrong(), [Batch(x, x, None)])['perplexity'])

# intervals

@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 3000), data=st.data())
def test_interval_holds_the_share_and_mirrors(n, data):
    k = data.draw(st.integers(0, n))
    low, high = wilson_interval(k, n)
    assert 0 <= low <= k/n <= high <= 1 and low < high
    mirrored = wilson_interval(n - k, n)
    assert math.isclose(low, 1 - mirrored[1], abs_tol=1e-12)
    assert math.isclose(high, 1 - mirrored[0], abs_tol=1e-12)


def test_interval_solves_its_equation():
    "At its ends the measured share lies exactly z standard deviations away"
    for p in wilson_interval(37, 50):
        assert math.isclose(abs(37/50 - p), 1.959964*math.sqrt(p*(1 - p)/50), rel_tol=1e-9)

# exact match

def test_chat_questions_are_asked_as_in_training(tok):
    examples = [Example('The river?', 'green', task='en'), Example('河?', '绿色', task='zh'),
                Example('hill', 'blue', system='sky', task='en')]
    ids = [[*prompt_ids(tok, e.prompt, e.system), tok.bos] for e in examples]
    says = ' green ', '蓝色', 'blue'
    robot = Scripted(tok, [(i, tok.encode(s)) for i, s in zip(ids, says)])
    scores, answers = exact_match(robot, tok, examples)
    assert [a.got for a in answers] == [*says] and [a.exact for a in answers] == [True, False, True]
    shares = {t: (s['exact'], s['n'], s['share']) for t, s in scores.items()}
    assert shares == {'en': (2, 2, 1.), 'zh': (0, 1, 0.)}
    pairs = encode_examples(tok, examples, 64)
    x = SFTBatches(tok, pairs, 64, rows=1, packed=False)(0)[0].x[0].tolist()
    assert any(x[:len(i)] == i for i in ids)   # the very ids that a training row begins with


def test_earlier_turns_are_part_of_the_question(tok):
    e = Example('And the hill?', 'blue', turns=(('The river?', 'green'),))
    ids = [*prompt_ids(tok, e.prompt, '', e.turns), tok.bos]
    assert exact_match(Scripted(tok, [(ids, tok.encode('blue'))]), tok, [e])[1][0].exact


def test_plain_answer_is_the_first_line(tok):
    e = Example('The river?', 'green')
    asked = [tok.bos, *tok.encode('The river?\n')]
    robot = Scripted(tok, [(asked, tok.encode('green\nblue'))])
    scores, answers = exact_match(robot, tok, [e], chat=False)
    assert answers == [Answer('The river?', 'green', 'green')] and answers[0].exact
    assert robot.reads <= len(tok.encode('green')) + 1 # it stops at the line break


def test_few_shot_text(tok):
    shots = [Example('hill', 'blue', task='a'), Example('sky', 'blue', task='b'),
             Example('river', 'green', task='a')]
    asked = Example('hill', 'blue', task='a')
    ids = [tok.bos, *tok.encode('river\ngreen\n\nhill\n')]
    robot = Scripted(tok, [(ids, tok.encode('blue'))])
    assert exact_match(robot, tok, [asked], shots=shots, chat=False)[1][0].exact
    assert E._shots_for(asked, shots) == [shots[2]] # same task, and never its own answer


def test_shots_that_do_not_fit_are_left_out(tok):
    shots = [Example(f'{"The river " * 3}{i}', 'green') for i in range(8)]
    ids, shown = E._plain_ids(tok, Example('hill', 'blue'), shots, room=60)
    text = tok.decode(ids)
    assert shown == text.count('green') < len(shots)
    assert len(ids) <= 60 and text.endswith('7\ngreen\n\nhill\n') and '0\n' not in text


@pytest.mark.parametrize('chat', [True, False])
def test_unread_questions_count_as_wrong(model, tok, chat):
    asked = [Example('hill', 'never said by chance'), Example('The river ' * 80, 'x')]
    scores, answers = exact_match(model, tok, asked, chat=chat)
    assert answers[1].got == '' and scores['all']['n'] == 2 and scores['all']['exact'] == 0


def test_long_answers_get_room(tok):
    "An answer is never wrong only because it was cut"
    e = Example('hill', 'The river is green.' * 3)
    robot = Scripted(tok, [([*prompt_ids(tok, 'hill'), tok.bos], tok.encode(e.answer))])
    assert exact_match(robot, tok, [e])[1][0].exact


def test_no_questions(model, tok): assert exact_match(model, tok, []) == ({}, [])


def test_order_and_batches_do_not_matter(model, tok):
    rows = [(t * n, str(n % 2)) for n, t in enumerate(TEXTS[:6], 1)]
    examples = [Example(t, 'x', task=task) for t, task in rows if len(tok.encode(t)) < 60]
    whole = exact_match(model, tok, examples, max_new=6)
    assert whole == exact_match(model, tok, examples, max_new=6, batch_size=1)
    back = exact_match(model, tok, examples[::-1], max_new=6)
    assert back == (whole[0], whole[1][::-1])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from('abc'), st.booleans()), max_size=30))
def test_tally_counts_everything_once(rows):
    examples = [Example('q', 'yes', task=t) for t, _ in rows]
    scores = tally(examples, [Answer('q', 'yes', 'yes' if ok else 'no') for _, ok in rows])
    assert sum(s['n'] for s in scores.values()) == len(rows)
    assert sum(s['exact'] for s in scores.values()) == sum(ok for _, ok in rows)


def test_tally_refuses_unequal_lists():
    with pytest.raises(ValueError): tally([Example('q', 'a')], [])

# cloze

def test_cloze(tok):
    rows = [('The river is', 'green', 'en', ' green.'), ('The hill is', 'blue', 'en', ' green'),
            ('河是', '绿', 'zh', '绿色的')]
    records = [dict(prompt=prompt, answer=answer, lang=lang) for prompt, answer, lang, _ in rows]
    script = [([tok.bos, *tok.encode(prompt)], tok.encode(says)) for prompt, _, _, says in rows]
    scores, answers = cloze_match(Scripted(tok, script), tok, records)
    assert {k: (s['exact'], s['n']) for k, s in scores.items()} == {'en': (1, 2), 'zh': (1, 1)}
    assert answers[1].got == 'green'


def test_surprisal_adds_up_to_the_loss(model, tok):
    pieces, bits = surprisal(model, tok, TEXTS[0])
    ids = torch.tensor([[tok.bos, *tok.encode(TEXTS[0])]])
    got = heldout(model, [Batch(ids[:, :-1], ids[:, 1:], None)])
    assert len(pieces) == len(bits) == got['targets']
    assert math.isclose(sum(bits)*math.log(2), got['loss']*got['targets'], rel_tol=1e-4)
    assert len(surprisal(model, tok, 'T')[1]) == 1
    for text, n in ('', 0), ('T'*65, 65):
        with pytest.raises(UserError, match=f'{n} tokens; expected 1 to 64'):
            surprisal(model, tok, text)
    assert len(surprisal(model, tok, 'T'*64)[1]) == 64 # as many as the context

# the registry

def test_measurements_register_with_their_stage(monkeypatch):
    monkeypatch.setattr(E, '_evaluations', {})
    @evaluation(after='sft')
    def first(run, gpt, tok): return dict(n=run + 1)
    @evaluation(after='sft')
    def second(run, gpt, tok): return {}
    @evaluation(after='pretrain')
    def third(run, gpt, tok): return {}
    assert [*evaluations('sft')] == ['first', 'second'] and [*evaluations('pretrain')] == ['third']
    assert evaluations('sft')['first'](1, None, None) == dict(n=2) and evaluations('dpo') == {}
    evaluations('sft').clear()                 # a copy: the registry stays
    assert [*evaluations('sft')] == ['first', 'second']
