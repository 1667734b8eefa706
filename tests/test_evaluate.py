"Evaluation: what is too heavy or too dull for the chapter"
import json, math
from contextlib import contextmanager
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from lm_nb.core import UserError
from lm_nb.evaluate import Answer, choice_score, cloze, exact_match, heldout, interval, plain_ids, shots_for, surprise, tally
from lm_nb.instructions import Example, encode_examples, prompt_ids
from lm_nb.packing import SFTBatches
from lm_nb.model import GPT, GPTConfig
from lm_nb.shards import IGNORE, Batch, Shards, eval_batches, write_shards
from lm_nb.tokenizer import Tokenizer

TEXTS = ['The river is green.', '河是绿色的。', 'The hill is blue,\nand so is the sky.', '山是蓝色的。'] * 5

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope='module')
def tok(): return Tokenizer.train(TEXTS, vocab_size=290)

@pytest.fixture(scope='module')
def model(tok):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=len(tok), context=64, n_layer=2, n_head=2, d_model=32, zero_init=False, dropout=.2))

@pytest.fixture(scope='module')
def shards(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp('evaluate')/'shards'
    write_shards(TEXTS, tok, folder)
    return Shards(folder, tok)

class Scripted(torch.nn.Module):
    "A model that answers from a table: (ids asked, ids to say)"
    def __init__(self, tok, replies):
        super().__init__()
        self.cfg, self.reads = GPTConfig(vocab_size=len(tok), context=64, n_layer=1, n_head=1, d_model=2), 0
        self.one, self.replies = torch.nn.Parameter(torch.ones(1)), [(list(p), [*r, tok.eos]) for p, r in replies]

    def hidden(self, ids):
        self.reads += 1
        out = torch.full((*ids.shape, self.cfg.vocab_size), -9.)
        for b, row in enumerate(ids.tolist()):
            for t in range(len(row)):
                for p, r in self.replies:
                    said = row[len(p):t+1]
                    if t + 1 >= len(p) and row[:len(p)] == p and said == r[:len(said)] and len(said) < len(r): out[b, t, r[len(said)]] = 9.
        return out

    def head(self, h): return h

# loss

def test_heldout_is_the_mean_over_targets(model, shards):
    model.eval()
    batches = list(eval_batches(shards, 64, 4))
    total = sum(F.cross_entropy(model(x, doc).flatten(0, 1), y.flatten(), ignore_index=IGNORE, reduction='sum').item() for x, y, doc in batches)
    got = heldout(model, batches, shards.text_bytes)
    assert got['targets'] == len(shards) - 1
    assert math.isclose(got['loss'], total/(len(shards) - 1), rel_tol=1e-5)
    assert math.isclose(got['bits_per_byte'], total/math.log(2)/sum(len(t.encode()) for t in TEXTS), rel_tol=1e-5)
    assert math.isclose(math.log(got['perplexity']), got['loss'], rel_tol=1e-6)
    json.dumps(got)                                                    # plain numbers, ready for results.json

def test_heldout_weighs_targets_not_batches(model, tok):
    "One long and one short batch: the mean of batch means would be another number"
    rows = [torch.tensor([tok.encode(t)]) for t in ('The river is green.', '山')]
    both = [Batch(r[:, :-1], r[:, 1:], None) for r in rows if r.shape[1] > 1]
    each = [heldout(model, [b]) for b in both]
    n = [e['targets'] for e in each]
    assert math.isclose(heldout(model, both)['loss'], sum(e['loss']*e['targets'] for e in each)/sum(n), rel_tol=1e-6)

def test_heldout_is_repeatable_and_leaves_no_trace(model, shards):
    model.train()                                                      # dropout would show
    a, b = (heldout(model, eval_batches(shards, 64, 4)) for _ in range(2))
    assert a == b and model.training and a['bits_per_byte'] is None
    assert all(p.grad is None for p in model.parameters())

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
    with pytest.raises(UserError, match='nothing to measure'): heldout(model, [Batch(x, torch.full_like(x, IGNORE), None)])

def test_a_hopeless_loss_does_not_overflow(tok):
    class Wrong(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(1))
        def forward(self, x, doc=None, targets=None):
            return F.cross_entropy(F.one_hot(torch.zeros_like(x), len(tok)).float().flatten(0, 1) * 1e6, targets.flatten(), reduction='sum')
    x = torch.ones(1, 5, dtype=torch.long)
    assert math.isfinite(heldout(Wrong(), [Batch(x, x, None)])['perplexity'])

# intervals

@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 3000), data=st.data())
def test_interval_holds_the_share_and_mirrors(n, data):
    k = data.draw(st.integers(0, n))
    low, high = interval(k, n)
    assert 0 <= low <= k/n <= high <= 1 and low < high
    mirror = interval(n - k, n)
    assert math.isclose(low, 1 - mirror[1], abs_tol=1e-12) and math.isclose(high, 1 - mirror[0], abs_tol=1e-12)

def test_interval_solves_its_equation():
    "The ends are the p for which the measured share lies exactly z standard deviations away"
    for p in interval(37, 50): assert math.isclose(abs(37/50 - p), 1.959964*math.sqrt(p*(1 - p)/50), rel_tol=1e-9)

# exact match

def test_chat_questions_are_asked_as_in_training(tok):
    examples = [Example('The river?', 'green', task='en'), Example('河?', '绿色', task='zh'), Example('hill', 'blue', system='sky', task='en')]
    ids = [[*prompt_ids(tok, e.prompt, e.system), tok.bos] for e in examples]
    robot = Scripted(tok, [(ids[0], tok.encode(' green ')), (ids[1], tok.encode('蓝色')), (ids[2], tok.encode('blue'))])
    scores, answers = exact_match(robot, tok, examples)
    assert [a.got for a in answers] == [' green ', '蓝色', 'blue'] and [a.exact for a in answers] == [True, False, True]
    assert {t: (s['exact'], s['n'], s['share']) for t, s in scores.items()} == {'en': (2, 2, 1.), 'zh': (0, 1, 0.)}
    pairs = encode_examples(tok, examples, 64)
    x = SFTBatches(tok, pairs, 64, 1, packed=False)(0)[0].x[0].tolist()
    assert any(x[:len(i)] == i for i in ids)                           # the very ids that a training row begins with

def test_plain_answer_is_the_first_line(tok):
    e = Example('The river?', 'green')
    start = tok.encode('The river?\n')
    robot = Scripted(tok, [(start, tok.encode('green\nblue'))])
    scores, answers = exact_match(robot, tok, [e], chat=False)
    assert answers == [Answer('The river?', 'green', 'green')] and answers[0].exact
    assert robot.reads <= len(tok.encode('green')) + 1            # it stops at the line break

def test_few_shot_text(tok):
    shots = [Example('hill', 'blue', task='a'), Example('sky', 'blue', task='b'), Example('river', 'green', task='a')]
    asked = Example('hill', 'blue', task='a')
    robot = Scripted(tok, [(tok.encode('river\ngreen\n\nhill\n'), tok.encode('blue'))])
    assert exact_match(robot, tok, [asked], shots=shots, chat=False)[1][0].exact
    assert shots_for(asked, shots) == [shots[2]]                       # same task, and never its own answer

def test_shots_that_do_not_fit_are_left_out(tok):
    shots = [Example(f'{"The river " * 3}{i}', 'green') for i in range(8)]
    ids = plain_ids(tok, Example('hill', 'blue'), shots, room=60)
    assert len(ids) <= 60 and tok.decode(ids).endswith('7\ngreen\n\nhill\n') and '0\n' not in tok.decode(ids)

def test_unread_questions_count_as_wrong(model, tok):
    long = Example('The river ' * 80, '', task='a')
    for chat in (True, False):
        scores, answers = exact_match(model, tok, [Example('hill', 'never said by chance'), Example(long.prompt, 'x')], chat=chat)
        assert answers[1].got == '' and scores['all']['n'] == 2 and scores['all']['exact'] == 0

def test_long_answers_get_room(tok):
    "An answer is never wrong only because it was cut"
    e = Example('hill', 'The river is green.' * 3)
    assert exact_match(Scripted(tok, [([*prompt_ids(tok, 'hill'), tok.bos], tok.encode(e.answer))]), tok, [e])[1][0].exact

def test_no_questions(model, tok): assert exact_match(model, tok, []) == ({}, [])

def test_order_and_batches_do_not_matter(model, tok):
    examples = [Example(t * n, 'x', task=str(n % 2)) for n, t in enumerate(TEXTS[:6], 1) if len(tok.encode(t * n)) < 60]
    whole = exact_match(model, tok, examples, max_new=6)
    assert whole == exact_match(model, tok, examples, max_new=6, batch_size=1)
    back = exact_match(model, tok, examples[::-1], max_new=6)
    assert back == (whole[0], whole[1][::-1])

@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from('abc'), st.booleans()), max_size=30))
def test_tally_counts_everything_once(rows):
    scores = tally([Example('q', 'yes', task=t) for t, _ in rows], [Answer('q', 'yes', 'yes' if ok else 'no') for _, ok in rows])
    assert sum(s['n'] for s in scores.values()) == len(rows) and sum(s['exact'] for s in scores.values()) == sum(ok for _, ok in rows)

def test_tally_refuses_unequal_lists():
    with pytest.raises(ValueError): tally([Example('q', 'a')], [])

# cloze and choices

def test_cloze(tok):
    rows = [('The river is', 'green', 'en', ' green.'), ('The hill is', 'blue', 'en', ' green'), ('河是', '绿', 'zh', '绿色的')]
    records = [dict(prompt=prompt, answer=answer, lang=lang) for prompt, answer, lang, _ in rows]
    robot = Scripted(tok, [(tok.encode(prompt), tok.encode(says)) for prompt, _, _, says in rows])
    scores, answers = cloze(robot, tok, records)
    assert {k: (s['exact'], s['n']) for k, s in scores.items()} == {'en': (1, 2), 'zh': (1, 1)}
    assert answers[1].got == 'green'

def test_choice_score_is_the_likelihood(model, tok):
    model.eval()
    choices = ['green.', 'blue, and so is the sky', '绿']
    got = choice_score(model, tok, 'The river is ', choices)
    for c, score in zip(choices, got):
        start, ids = tok.encode('The river is '), tok.encode('The river is ') + tok.encode(c)
        logp = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
        assert math.isclose(score, sum(logp[i, ids[i+1]].item() for i in range(len(start) - 1, len(ids) - 1)), rel_tol=1e-4)
    for chat in (True, False): assert all(s < 0 for s in choice_score(model, tok, 'hill', choices, chat=chat))

def test_choices_of_all_texts_sum_to_one(model, tok):
    "Over all single tokens the likelihoods are a distribution"
    pieces = [tok.decode([i]) for i in range(6, len(tok)) if tok.encode(tok.decode([i])) == [i]]
    scores = choice_score(model, tok, 'hill', pieces)
    assert .1 < sum(map(math.exp, scores)) < 1 + 1e-4

@pytest.mark.parametrize('prompt, choices, words', [('', ['a'], 'empty'), ('hill', ['river ' * 80], 'context = 64')])
def test_choice_mistakes(model, tok, prompt, choices, words):
    with pytest.raises(UserError, match=words): choice_score(model, tok, prompt, choices)

def test_surprise_adds_up_to_the_loss(model, tok):
    pieces, bits = surprise(model, tok, TEXTS[0])
    ids = torch.tensor([tok.encode(TEXTS[0])])
    got = heldout(model, [Batch(ids[:, :-1], ids[:, 1:], None)])
    assert len(pieces) == len(bits) + 1 and math.isclose(sum(bits)*math.log(2), got['loss']*got['targets'], rel_tol=1e-4)
    with pytest.raises(UserError, match='1 tokens'): surprise(model, tok, 'T')
