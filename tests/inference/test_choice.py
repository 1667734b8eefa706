"Test files of the field: what is read, what is said of it, and lm-evaluation-harness's numbers"
import csv
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch

from lm_nb.cli import main
from lm_nb.core import Table, UserError, write_json
from lm_nb.data.instructions import prompt_ids
from lm_nb.data.microworld import deal_groups, fact_probes, make_world
from lm_nb.data.shards import IGNORE
from lm_nb.data.sources import Report
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.inference import choice as C
from lm_nb.inference.choice import (
    ask_questions, choice_score, choice_table, plot_choice, read_questions, score_files,
    score_outcomes, training_documents)
from lm_nb.inference.evaluate import surprisal
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.model.hub import load_model, save_model

RESULTS = Path(__file__).resolve().parents[2]/'nbs'/'6_use'/'results'


def padded(tok, texts):
    rows = [torch.tensor([tok.bos, *ids, tok.eos]) for ids in tok.encode_batch(texts)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tok.pad)
    return ids[:, :-1], ids[:, 1:].masked_fill(ids[:, 1:] == tok.pad, IGNORE)


def learn_by_heart(model, tok, groups, steps):
    "A few seconds of training on each group of texts"
    batches = [padded(tok, texts) for texts in groups]
    opt = torch.optim.AdamW(model.parameters(), lr=.01, betas=(.9, .95), weight_decay=0)
    for step in range(steps):
        opt.param_groups[0]['lr'] = .01 * min((step + 1)/5, 1, 2*(1 - step/steps))
        for x, y in batches: (model(x, targets=y) / (y != IGNORE).sum()).backward()
        opt.step()
        opt.zero_grad()
    return model.eval()


@pytest.fixture(scope='module')
def facts():
    world = deal_groups(make_world(people=12, towns=8, things=4, hubs=2), 'reference')
    return [f for part in ('valid', 'test') for f in fact_probes(world, part)]


def choices(fact, n=4):
    "Values of a fact, the right one among them, and its place"
    rng, right = random.Random(fact['output']), fact['values'][fact['answer']]
    others = [v for v in fact['values'] if v != right]
    values = [right, *rng.sample(others, min(n - 1, len(others)))]
    rng.shuffle(values)
    return values, values.index(right)


def sums(n=11):
    for i in range(n):
        a, b = 3 + i*7 % 11, 2 + i*5 % 9
        yield dict(question=f'What do {b} fans of {a} coins cost?',
                   answer=f'{b} * {a}\n#### {1000*a*b:,}')


def solved(s): return f'Question: {s["question"]}\nAnswer: {s["answer"]}'


def lettered(facts, question, key):
    for i, f in enumerate(f for f in facts if len(f['values']) > 3):
        values, at = choices(f)
        yield {'id': i, question: f['seen'], **dict(zip('ABCD', values)), key: 'ABCD'[at]}


def arc(facts):
    for f in facts:
        values, at = choices(f)
        names = 'ABCD' if at % 2 else '1234'
        yield dict(id=f['fact'], question=f['seen'], answerKey=names[at],
                   choices=dict(text=values, label=[*names[:len(values)]]))


def hellaswag(facts):
    for f in facts:
        values, at = choices(f)
        yield dict(activity_label='Fact', ctx_a=f['cloze'][0].strip(), ctx_b='', label=str(at),
                   endings=[f'{v} [x] and no other' if i == at and len(v) % 3 == 0 else v
                            for i, v in enumerate(values)])


def jsonl(path, rows):
    path.write_text(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows), 'utf-8')
    return path


def table(path, rows, header=True):
    rows = list(rows)
    with path.open('w', newline='', encoding='utf-8') as f:
        writer = csv.writer(f)
        writer.writerows([[*rows[0]]]*header + [[*r.values()] for r in rows])
    return path


@pytest.fixture(scope='module')
def tests(facts, tmp_path_factory):
    "A test file and a dev file of each layout: {name: (test, dev)}"
    folder = tmp_path_factory.mktemp('tests')
    en, zh = ([f for f in facts if f['lang'] == lang] for lang in ('en', 'zh'))
    def mmlu(rows): return [{k: v for k, v in r.items() if k != 'id'} for r in rows]
    def both(name, write, rows, **kw):
        rows = list(rows)
        return tuple(write(folder/f'{name}_{part}', some, **kw)
                     for part, some in ((f'test.{end}', rows[3:27]), (f'dev.{end}', rows[:3]))
                     ) if (end := 'csv' if write is table else 'jsonl') else None
    return dict(
        ceval=both('ceval', table, lettered(zh, 'question', 'answer')),
        cmmlu=both('cmmlu', table, lettered(zh, 'Question', 'Answer')),
        mmlu=both('mmlu', table, mmlu(lettered(en, 'question', 'answer')), header=False),
        arc=both('arc', jsonl, arc(en)), hellaswag=both('hellaswag', jsonl, hellaswag(en)),
        gsm8k=both('gsm8k', jsonl, sums()))


@pytest.fixture(scope='module')
def tok(facts):
    more = [solved(s) for s in sums()]
    return Tokenizer.train([f['output'] for f in facts] + more, 900, kind='bpe')


@pytest.fixture(scope='module')
def model(tok, facts, tests):
    "Knows all facts by heart, and half of the sums behind another"
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=len(tok), context=640, n_layer=2, n_head=2, d_model=48))
    first, *others = map(solved, sums())
    known = [f'{first}\n\n{other}' for other in others[::2]]
    letters = [q.solved for name in ('ceval', 'mmlu') for q in read_questions(tests[name][1])]
    told = [f'Fact: {f["output"]}' for f in facts if f['lang'] == 'en']
    learn_by_heart(gpt, tok, [known, letters[::3], told], 100)
    # less sure of itself: it writes the same, and fp32 holds its likelihoods to 2e-5 nats
    with torch.no_grad(): gpt.norm.weight.mul_(.3)
    return gpt

# likelihoods

@pytest.mark.parametrize('prompt', ['The river is', 'The river is ', ''])
def test_choice_score_is_the_likelihood(model, tok, prompt):
    "Of prompt and choice as one text; a blank at the prompt's end is the choice's"
    for c, score in zip(some := ['green.', 'blue, and so is the sky', '绿'],
                        choice_score(model, tok, prompt, some)):
        ids, start = [tok.bos, *tok.encode(prompt + c)], 1 + len(tok.encode(prompt.rstrip()))
        logp = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
        want = sum(logp[i, ids[i+1]].item() for i in range(start - 1, len(ids) - 1))
        assert math.isclose(score, want, rel_tol=1e-4)


def test_chat_choices_begin_and_end_as_in_training(model, tok):
    "In a chat the choice follows `bos`, and its `eos` counts"
    ids = [*prompt_ids(tok, 'hill'), tok.bos, *tok.encode('blue'), tok.eos]
    logp = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
    first = len(prompt_ids(tok, 'hill')) # the second `bos`: the first one opens the conversation
    assert ids[first] == tok.bos
    want = sum(logp[i, ids[i+1]].item() for i in range(first, len(ids) - 1))
    [got] = choice_score(model, tok, 'hill', ['blue'], chat=True)
    assert math.isclose(got, want, rel_tol=1e-4)


def test_choices_of_all_texts_sum_to_one(model, tok):
    "Over all single tokens the likelihoods are a distribution"
    start = tok.encode('hill')
    pieces = [tok.decode([i]) for i in range(6, len(tok))
              if tok.encode('hill' + tok.decode([i])) == [*start, i]]
    assert .1 < sum(map(math.exp, choice_score(model, tok, 'hill', pieces))) < 1 + 1e-4


def test_a_choice_without_a_prompt_is_a_text(model, tok, facts):
    "Nothing stands before it but `bos`, so its likelihood is that of the text"
    texts = [f['output'] for f in facts[:4]]
    for text, nats in zip(texts, choice_score(model, tok, '', texts)):
        assert math.isclose(-nats, sum(surprisal(model, tok, text)[1])*math.log(2), rel_tol=1e-4)


def test_choice_mistakes(model, tok):
    for prompt in ('hill', ''):
        with pytest.raises(UserError, match='context = 640'):
            choice_score(model, tok, prompt, ['river ' * 640])

# files

def test_each_layout_is_recognised(tests):
    for name, (test, dev) in tests.items():
        found = read_questions(test)
        assert {q.layout for q in found} == {name} and len(found) == (8 if name == 'gsm8k' else 24)
        assert [q.layout for q in read_questions(dev)] == [name]*3
        assert all(q.prompt.endswith(('答案：', 'Answer:')) or name == 'hellaswag' for q in found)


def test_hub_rows_are_the_same_questions(tests, tmp_path):
    "On the hub ARC's and MMLU's columns are lists, and numbers stand for letters"
    theirs = read_questions(tests['arc'][0])
    rows = [json.loads(line) for line in tests['arc'][0].read_text('utf-8').splitlines()]
    ours = [dict(answerKey=r['answerKey'], question=dict(stem=r['question'], choices=[
        dict(text=t, label=l) for t, l in zip(r['choices']['text'], r['choices']['label'])]))
        for r in rows]
    assert read_questions(jsonl(tmp_path/'old.jsonl', ours)) == theirs
    theirs = read_questions(tests['mmlu'][0])
    rows = list(csv.reader(tests['mmlu'][0].open(encoding='utf-8')))
    hub = [dict(question=r[0], subject='x', choices=r[1:-1], answer='ABCD'.index(r[-1]))
           for r in rows]
    assert read_questions(jsonl(tmp_path/'mmlu.jsonl', hub)) == theirs


def test_a_data_set_by_its_hub_name(tests, tmp_path):
    (tmp_path/'mine').mkdir()
    jsonl(tmp_path/'mine'/'test.jsonl', map(json.loads, tests['arc'][0].open(encoding='utf-8')))
    found = read_questions(f'hf:{tmp_path/"mine"}::test')
    assert found == read_questions(tests['arc'][0])


def test_what_cannot_be_used_is_counted(tmp_path):
    head, report = ['question', 'A', 'B', 'C', 'D', 'answer'], Report()
    rows = [('q1', 'a', 'b', 'c', 'd', 'A'), ('q2', 'a', '', 'c', 'd', 'A'),
            ('q3', 'a', 'b', 'c', 'd', 'E'), ('', 'a', 'b', 'c', 'd', 'A'),
            ('q5', 'a', 'b', 'c', 'd', ''), ('q6', 'a', 'b', 'c', 'd', 'D')]
    file = table(tmp_path/'t.csv', [dict(zip(head, r)) for r in rows])
    assert [q.answer for q in read_questions(file, report=report)] == [0, 3]
    assert {why: n for why, (n, _) in report.check().rejected.items()} == {
        'an empty choice': 1, 'answer out of range: E, where there are A, B, C, D': 1,
        'no question': 1, 'no answer is given': 1}
    headless, report = tmp_path/'h.csv', Report()
    headless.write_text('q,a,b,c,d,B\nq,a,b,c\nq,a,b,c,d,x\n')
    assert len(read_questions(headless, report=report)) == 1
    assert report.check().rows == 3 and len(report.rejected) == 2


ODD = [
    ('t.csv', 'question,A,B,answer\nq,a,b,C\n', None, 'out of range: C, where there are A, B'),
    ('t.csv', 'question,A,B,answer\nq,a,,A\n', None, 'an empty choice'),
    ('t.csv', 'question,A,answer\nq,a,A\n', 'ceval', 'no column B, which format=ceval needs'),
    ('t.csv', 'frage,A,B,answer\nq,a,b,A\n', None, 'its columns are frage, A, B, answer'),
    ('t.txt', 'Once upon a time.\n', None, 'fits none of the layouts ceval'),
    ('t.pdf', '%PDF', None, "unknown kind of file '.pdf'"),
    ('t.csv', '', None, 'the file is empty'),
    ('t.jsonl', '{"question": "q", "answer": "42"}\n', None, 'no number behind ####'),
    ('t.jsonl', '{"question": "q", "choices": [], "answer": 0}\n', None, 'fewer than two choices'),
    ('t.jsonl', '{"question": "q", "choices": ["a", "b"], "answer": 2}\n', None, 'range: C, where'),
    ('t.jsonl', '{"question": "q", "choices": ["a", "b"], "answer": -1}\n', None, 'no answer is'),
    ('t.jsonl', '{"question": null, "answerKey": "A"}\n', None, 'fewer than two choices'),
    ('t.jsonl', '{"question": {"choices": 3}, "answerKey": "A"}\n', None, 'none of its 1 rows'),
    ('t.jsonl', '{"activity_label": "a", "ctx_a": "b", "ctx_b": 0, "endings": null, "label": ""}\n',
     None, 'fewer than two choices'),
    ('t.jsonl', '{"a": 1}\n', 'mmul', "no such layout (did you mean 'mmlu'?)"),
]


@pytest.mark.parametrize('name, content, format, says', ODD, ids=[o[-1][:20] for o in ODD])
def test_mistakes_are_one_line(tmp_path, name, content, format, says):
    (tmp_path/name).write_text(content, 'utf-8')
    with pytest.raises(UserError) as e: read_questions(tmp_path/name, format)
    assert says in str(e.value) and '\n' not in str(e.value)
    assert format == 'mmul' or name in str(e.value)


def test_a_hub_name_has_a_split():
    with pytest.raises(UserError, match='which split'): read_questions('hf:openai/gsm8k')
    with pytest.raises(UserError, match='which split'): read_questions('hf:openai/gsm8k:main')

# asking

def test_shots_are_the_first_of_dev_and_never_the_question(model, tok, tests):
    dev = read_questions(tests['arc'][1])
    assert [o.shots for o in ask_questions(model, tok, dev, dev, shots=3)] == [2, 2, 2]
    two = ask_questions(model, tok, read_questions(tests['arc'][0])[:2], dev, shots=2)
    prompt = '\n\n'.join([*(d.solved for d in dev[:2]), two[0].question.prompt])
    want = choice_score(model, tok, prompt, [f' {c}' for c in two[0].question.choices])
    assert np.allclose(two[0].scores, want, atol=1e-4)


def test_shots_that_do_not_fit_are_left_off(tok, tests):
    torch.manual_seed(0)
    small = GPT(GPTConfig(vocab_size=len(tok), context=110, n_layer=1, n_head=1, d_model=8))
    dev, questions = (read_questions(tests['arc'][i]) for i in (1, 0))
    long = questions[0]._replace(prompt='word ' * 200)
    out = ask_questions(small, tok, [questions[0], long], dev*4, shots=12)
    assert len(out) == 1 and 0 < out[0].shots < 12
    with pytest.raises(UserError, match='no question fits'): score_outcomes([])


def test_scores_and_verdicts(model, tok, tests):
    scores = {}
    for name in ('hellaswag', 'mmlu', 'gsm8k'):
        test, dev = map(read_questions, tests[name])
        scores[name] = score_outcomes(ask_questions(model, tok, test, dev))
    assert scores['mmlu']['chance'] == .25 and scores['gsm8k']['chance'] is None
    assert scores['mmlu']['acc'] == scores['mmlu']['acc_norm'] == scores['mmlu']['acc_bytes']
    for s in scores.values():
        for metric in ('acc', 'acc_norm', 'acc_bytes', 'exact_match', 'last_number'):
            if metric not in s: continue
            got = s[metric]
            assert got['low'] <= got['share'] == got['right']/s['n'] <= got['high']
            inside = s['chance'] is not None and got['low'] <= s['chance'] <= got['high']
            assert (got['verdict'] == 'at chance') == inside
    assert 'at chance' in str(choice_table(scores)) and isinstance(choice_table(scores), Table)
    assert len(plot_choice(mine=scores).axes[0].collections) == 2


def test_verdicts():
    assert C._verdict(.2, .3, .25) == 'at chance' and C._verdict(.26, .3, .25) == 'above chance'
    assert C._verdict(.1, .2, .25) == 'below chance' and C._verdict(.1, .2, None) == ''


def test_guessing_is_at_chance_as_often_as_promised():
    "95 of 100 times, whatever the numbers of choices"
    rng, at = np.random.default_rng(0), 0
    sizes = np.array([2]*30 + [4]*50 + [5]*20)
    for _ in range(400):
        s = C._share((rng.random(100) < 1/sizes).tolist(), float((1/sizes).mean()))
        at += s['verdict'] == 'at chance'
    assert .92 < at/400 <= .99


def test_a_question_that_is_asked_twice_is_found_twice(model, tok, tmp_path):
    known = 'Which of these statements about the old river and the town beside it is a true one?'
    other = 'Which of these valleys in the north is known for apples, and which for its plums?'
    rows = [dict(question=q, choices=['a', 'b'], answer=0) for q in (known, known, other)]
    scores = score_files(model, tok, jsonl(tmp_path/'t.jsonl', rows), documents=iter([known]))
    assert scores['t']['contamination'] == dict(questions=3, found=2, unjudged=0, documents=1)
    assert scores['questions that do not occur']['n'] == 1


def test_a_choice_that_makes_one_piece_with_the_prompt_is_not_certain():
    words = Tokenizer.train(['春眠早春眠 '*50], 268, kind='bpe')
    assert len(words.encode('春眠')) == len(words.encode('春')) == 1
    gpt = GPT(GPTConfig(vocab_size=len(words), context=16, n_layer=1, n_head=1, d_model=8))
    assert max(choice_score(gpt, words, '春', ['眠', '早'])) < -1


def test_training_documents_leave_validation_out(tmp_path):
    (tmp_path/'text').mkdir()
    (tmp_path/'records').mkdir()
    jsonl(tmp_path/'text'/'train.jsonl', [dict(text='a')])
    jsonl(tmp_path/'text'/'valid.jsonl', [dict(text='b')])
    jsonl(tmp_path/'records'/'train.jsonl', [dict(prompt='c', answer='d')])
    jsonl(tmp_path/'records'/'test.jsonl', [dict(prompt='e', answer='f')])
    assert list(training_documents(tmp_path)) == ['a', 'c\nd']

# lm-evaluation-harness: its published tasks, with our files in place of theirs

PUBLISHED = dict(ceval='ceval/_default_ceval_yaml', cmmlu='cmmlu/_default_template_yaml',
                 mmlu='mmlu/default/_default_template_yaml', arc='arc/arc_easy.yaml',
                 hellaswag='hellaswag/hellaswag.yaml', gsm8k='gsm8k/gsm8k.yaml')
SHOTS = dict(ceval=2, cmmlu=0, mmlu=3, arc=2, hellaswag=0, gsm8k=1)
DESCRIPTION = dict(ceval='以下是单项选择题。\n\n', mmlu='Questions about a small world.\n\n')


def task(name, files, home):
    "A YAML task: the published one, but for where its data are"
    test, dev = files
    if name == 'mmlu':  # the hub's columns, of which the task speaks
        test, dev = (jsonl(f.with_suffix('.hub.jsonl'), [
            dict(question=r[0], choices=r[1:-1], answer='ABCD'.index(r[-1]))
            for r in csv.reader(f.open(encoding='utf-8'))]) for f in (test, dev))
    kind = 'csv' if test.suffix == '.csv' else 'json'
    more = dict(
        include=str(home/'tasks'/PUBLISHED[name]), task=f'our_{name}', dataset_path=kind,
        dataset_name=None, tag=None,
        dataset_kwargs=dict(data_files=dict(test=str(test), dev=str(dev))),
        test_split='test', training_split=None, validation_split=None, fewshot_split='dev',
        fewshot_config=dict(sampler='first_n'), num_fewshot=SHOTS[name],
        description=DESCRIPTION.get(name, ''))
    if name == 'gsm8k':
        more['generation_kwargs'] = dict(
            until=['Question:', '</s>', '<|im_end|>'], do_sample=False, max_gen_toks=40)
    else: more['metric_list'] = [dict(metric=m) for m in ('acc', 'acc_norm', 'acc_bytes')]
    return json.dumps(more, ensure_ascii=False)  # which is YAML too


@pytest.fixture(scope='module')
def theirs(model, tok, tests, tmp_path_factory):
    "{task: samples} as lm-evaluation-harness logs them, in a process without a network"
    if not importlib.util.find_spec('lm_eval'):
        pytest.skip("lm-evaluation-harness is not installed: pip install 'lm_nb[others]'")
    folder = tmp_path_factory.mktemp('lm_eval')
    save_model(folder/'model', model, tok)
    home, names = Path(importlib.util.find_spec('lm_eval').origin).parent, list(tests)
    (folder/'tasks').mkdir()
    for name in names:
        (folder/'tasks'/f'{name}.yaml').write_text(task(name, tests[name], home), 'utf-8')
    env = {**os.environ, 'HF_DATASETS_OFFLINE': '1', 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1',
           'HF_HOME': str(folder/'hf'), 'TOKENIZERS_PARALLELISM': 'false'}
    args = f'pretrained={folder/"model"},add_bos_token=True,dtype=float32'
    words = ['--model', 'hf', '--model_args', args, '--include_path', folder/'tasks',
             '--tasks', ','.join(f'our_{n}' for n in names), '--device', 'cpu',
             '--batch_size', '8', '--log_samples', '--output_path', folder/'out']
    done = subprocess.run([sys.executable, '-m', 'lm_eval', *map(str, words)], env=env, cwd=folder,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for name in names:
        [file] = (folder/'out').rglob(f'samples_our_{name}_*.jsonl')
        found[name] = [json.loads(line) for line in file.open(encoding='utf-8')]
    return found


@pytest.fixture(scope='module')
def ours(model, tok, tests):
    return {name: ask_questions(model, tok, read_questions(test), read_questions(dev), SHOTS[name],
                                DESCRIPTION.get(name, ''), max_new=40)
            for name, (test, dev) in tests.items()}


def test_lm_eval_reads_the_same_prompts(theirs, ours):
    for name, outcomes in ours.items():
        got = {s['doc_id']: s for s in theirs[name]}
        assert len(got) == len(outcomes)
        for i, o in enumerate(outcomes):
            prompt = got[i]['arguments']['gen_args_0']['arg_0']
            assert prompt.endswith(o.question.prompt) and o.shots == SHOTS[name]
            assert prompt.startswith(DESCRIPTION.get(name, ''))


def test_lm_eval_scores_the_same(theirs, ours, record):
    "Each log-likelihood within 2e-5 nats, and each choice and count equal"
    far, n, questions = 0., 0, 0
    for name, outcomes in ours.items():
        if name == 'gsm8k': continue
        got = {s['doc_id']: s for s in theirs[name]}
        for i, o in enumerate(outcomes):
            nats = [float(r[0][0]) for r in got[i]['resps']]
            far = max(far, np.abs(np.subtract(nats, o.scores)).max())
            n, questions = n + len(nats), questions + 1
            assert {m: float(got[i][m]) for m in o.hits} == {m: float(h) for m, h in o.hits.items()}
    assert far < 2e-5
    shares = {score_outcomes(o)['acc']['share'] for name, o in ours.items() if name != 'gsm8k'}
    assert len(shares) > 2 and max(shares) > .5  # something was measured
    record['log-likelihoods of choices, within 2e-5 nats'] = n
    record['questions: right by acc, acc_norm, acc_bytes'] = questions


def test_lm_eval_writes_the_same(theirs, ours, record):
    right = 0
    names = {'strict-match': 'exact_match', 'flexible-extract': 'last_number'}
    for s in theirs['gsm8k']:
        o = ours['gsm8k'][s['doc_id']]
        assert s['resps'][0][0] == o.said
        assert bool(s['exact_match']) == o.hits[names[s['filter']]]
        right += o.hits['exact_match']
    assert 0 < right < len(theirs['gsm8k'])  # some are right, some wrong
    record['written answers, character by character'] = len(ours['gsm8k'])


@pytest.fixture(scope='module')
def record():
    "What was compared, for the page; written down if LM_NB_RECORD asks for it"
    counts = {}
    yield counts
    if not os.environ.get('LM_NB_RECORD'): return
    write_json(RESULTS/'lm_eval.json', dict(
        program='lm-evaluation-harness', version=importlib.metadata.version('lm_eval'),
        compared=[[what, n, n] for what, n in counts.items()], date=f'{date.today()}'))


@pytest.mark.parametrize('kind', ['qwen3', 'gpt2'])
def test_a_published_model_is_scored_as_the_harness_does(tmp_path, kind):
    "Which puts no token in front of a text where the model's makers did not"
    pytest.importorskip('lm_eval')
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from published import write_published
    folder = write_published(tmp_path/'m', kind)
    theirs = HFLM(pretrained=str(folder), dtype='float32', device='cpu', batch_size=4)
    gpt, words = load_model(folder)
    asked = {'Question: Where?\nAnswer:': [' Paris', ' on the Seine'], '答案：': [' A', ' B']}
    for prompt, choices in asked.items():
        calls = [Instance('loglikelihood', {}, (prompt, c), 0) for c in choices]
        want = [nats for nats, _ in theirs.loglikelihood(calls, disable_tqdm=True)]
        assert choice_score(gpt, words, prompt, choices) == pytest.approx(want, abs=2e-5)


# whole files, and the command line

def test_each_subject_has_its_dev_file(model, tok, tests, tmp_path):
    for part in ('val', 'dev'): (tmp_path/part).mkdir()
    for subject in ('law', 'art'):
        shutil.copy(tests['ceval'][0], tmp_path/'val'/f'{subject}_val.csv')
        shutil.copy(tests['ceval'][1], tmp_path/'dev'/f'{subject}_dev.csv')
    scores = score_files(model, tok, tmp_path/'val', tmp_path/'dev')
    assert list(scores) == ['art', 'law', 'all'] and scores['all']['n'] == 48
    assert scores['all']['shots'] == 3 and scores['law']['acc'] == scores['art']['acc']
    (tmp_path/'dev'/'law_dev.csv').unlink()
    shutil.copy(tests['ceval'][1], tmp_path/'dev'/'sea_dev.csv')
    with pytest.raises(UserError, match='has no file for law_val.csv'):
        score_files(model, tok, tmp_path/'val', tmp_path/'dev')
    with pytest.raises(UserError, match='two files of one subject, art_dev.csv and art_val.csv'):
        score_files(model, tok, f'{tmp_path}/*/*.csv')


@pytest.fixture(scope='module')
def run(model, tok, tests, tmp_path_factory):
    "A run's folder: a model, and a text that holds one of the questions"
    folder = tmp_path_factory.mktemp('choice')/'run'
    save_model(folder/'base', model, tok)
    (folder/'text').mkdir()
    known = read_questions(tests['arc'][0])[0].text
    jsonl(folder/'text'/'train.jsonl', [dict(text='It is so.'), dict(text=f'They ask: {known}')])
    (folder/'recipe.json').write_text('{}')
    return folder


def said(capsys, *words):
    status = main(['choice', *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_says_what_was_found(run, tests, capsys):
    test, dev = tests['arc']
    words = f'file={test}', f'dev={dev}', 'shots=2', 'device=cpu'
    status, out, err = said(capsys, run/'base', *words)
    assert status == 0 and not err, err
    assert re.search(r'^arc +arc +24 +2 ', out, re.M) and 'chance' in out
    assert 'arc: 1 of 24 questions occur in 2 training documents' in out
    assert re.search(r'^questions that do not occur +arc +23', out, re.M)
    status, out, err = said(capsys, run/'base', f'file={tests["gsm8k"][0]}', 'json=true',
                            'contamination=false', 'max_new=8', 'device=cpu')
    got = json.loads(out)['gsm8k']
    assert status == 0 and not err and got['n'] == 8 and got['layout'] == 'gsm8k'
    assert 'contamination' not in got and got['chance'] is None
    shutil.copytree(run/'base', run.parent/'alone', dirs_exist_ok=True)
    status, out, err = said(capsys, run.parent/'alone', f'file={test}', 'device=cpu')
    assert status == 0 and 'no training text is here' in err


def test_mistakes_of_the_command_are_one_line(run, tests, capsys):
    file, dev = (f'{key}={f}' for key, f in zip(('file', 'dev'), tests['mmlu']))
    for words, says in [
            ([file, 'shots=3'], 'set dev=FILE'), ([file, dev, 'shots=9'], 'has 3 solved examples'),
            ([], 'which questions?'), ([file, 'sots=1'], "did you mean 'shots'"),
            ([file, 'max_new=0'], 'max_new = 0: expected 1 or more'),
            ([file, 'shots=-1'], 'shots = -1'),
            ([file, f'dev={tests["arc"][1]}'], 'which format=mmlu needs'),
            (['file=nowhere.csv'], 'no such file'), ([f'file={run/"recipe.json"}'], 'fits none')]:
        status, out, err = said(capsys, run/'base', *words, 'device=cpu')
        assert status == 2 and says in err and err.count('\n') == 1 and not out, err
