"From a recipe's sources to its token files: what is kept, what is held out, what is mixed"
import json
import random

import pytest

from lm_nb.core import UserError, read_json
from lm_nb.data.prepare import DataConfig, source_weights, stored_documents, tokenizer_texts
from lm_nb.training.pretrain import text_batches
from lm_nb.training.recipe import load_recipe
from lm_nb.training.run import Run

WORDS = ('river hill lantern green old stone bridge painter carpenter music winter summer market '
         'harbour tower garden').split()
SMALL = ['vocab_size=300', 'context=32', 'batch_tokens=256', 'n_layer=1', 'n_head=2', 'd_model=32',
         'pretrain.tokens=2560', 'sft.tokens=2560', 'device=cpu', 'dtype=fp32']


def write(path, texts):
    rows = (json.dumps(dict(text=t), ensure_ascii=False) + '\n' for t in texts)
    path.write_text(''.join(rows), encoding='utf-8')
    return str(path)


def articles(n, seed=0, words=WORDS):
    rng = random.Random(seed)
    return [f'Article {seed}-{i}: ' + ' '.join(rng.choice(words) for _ in range(60))
            for i in range(n)]


@pytest.fixture
def run(tmp_path):
    def make(*overrides, name='run'):
        return Run(load_recipe('own', [*SMALL, *overrides]), tmp_path/name)
    return make


def parts(run): return {p.stem: list(stored_documents(p)) for p in sorted(run.text.glob('*.jsonl'))}
def rejected(report): return sum(n for n, _ in report['rejected'].values())


def test_every_document_is_in_one_part_and_the_report_adds_up(tmp_path, run):
    texts = articles(200)
    got = parts(run(f'text={write(tmp_path/"a.jsonl", texts + texts[:20])}', 'valid_share=0.1'))
    assert sorted(got['train'] + got['valid']) == sorted(texts) and 5 < len(got['valid']) < 40
    report = read_json(tmp_path/'run'/'text'/'report.json')[0]
    assert (report['rows'], report['kept'], rejected(report)) == (220, 200, 20)


@pytest.mark.parametrize('dedup, left', [('near', 150), ('exact', 180), ('none', 180)])
def test_copies_of_held_out_documents_are_not_trained_on(tmp_path, run, dedup, left):
    "A validation file that was made of the training file: 20 copies, 30 near-copies"
    texts = articles(200)
    held = texts[:20] + [t.replace(': ', ': Once ') + ' End.' for t in texts[20:50]]
    here = run(f'text={write(tmp_path/"a.jsonl", texts)}',
               f'text_valid={write(tmp_path/"v.jsonl", held)}', f'dedup={dedup}', 'clean=light')
    got = parts(here)
    assert got['valid'] == held
    assert len(got['train']) == left and not set(got['train']) & set(held)
    report = read_json(here.folder/'text'/'report.json')[1]
    assert report['rows'] == 200 == report['kept'] + rejected(report)
    assert report['kept'] == len(got['train'])


def test_weighted_sources_are_mixed_in_every_batch(tmp_path, run):
    "The small source is read ten times as often as its size says"
    zh = ['字' + ''.join(random.Random(i).choices('山水田石火土木金', k=80)) for i in range(100)]
    en, zh = write(tmp_path/'en.jsonl', articles(900)), write(tmp_path/'zh.jsonl', zh)
    here = run(f'text={en} {zh}', 'weights=1 1')
    texts, held = here.shards
    assert [t.path.name for t in texts] == ['train-0', 'train-1']
    assert held.n_docs == 1000 - texts[0].n_docs - texts[1].n_docs
    batches = text_batches(here, texts, 'pretrain', 8, seed=0)
    rows = [here.tokenizer.decode(row.tolist()) for step in range(40) for b in batches(step)
            for row in b.x]
    chinese = sum(any(c > '\u3000' for c in r) for r in rows)
    assert abs(chinese - len(rows)/2) <= 0.03*len(rows)
    read = list(tokenizer_texts(['train-0', 'train-1'], here.text, None))
    assert len(read) == texts[0].n_docs + texts[1].n_docs


def test_weights_must_fit_the_sources():
    for weights in ('1', '1 2 3', '1 x', '1 0', '1 -1'):
        with pytest.raises(UserError, match='a positive number for each of the 2 sources'):
            DataConfig(text='a.txt b.txt', weights=weights)
    weighed = DataConfig(text='a.txt b.txt', weights='3,1')
    assert source_weights(weighed) == [('a.txt', 3), ('b.txt', 1)]


def test_max_documents_separator_and_shape(tmp_path, run):
    texts = [t.replace(': ', ':\n') for t in articles(40)]
    blank = tmp_path/'blank.txt'
    blank.write_text('\n\n'.join(texts))
    got = parts(run(f'text={blank}', 'separator=blank', 'max_documents=30', 'valid_share=0.2'))
    assert sorted(got['train'] + got['valid']) == sorted(texts[:30])
    wrong = run(f'text={blank}', 'format=bake', name='other')
    with pytest.raises(UserError, match='format'): wrong.prepared(wrong.data)


def test_an_interrupted_read_leaves_nothing_that_looks_whole(tmp_path, run):
    rows = [json.dumps(dict(text=t)).encode() for t in articles(50)]
    bad = b'{"text": "caf\xe9 with a byte of another encoding"}'
    (tmp_path/'a.jsonl').write_bytes(b'\n'.join([*rows, bad]))
    here = run(f'text={tmp_path/"a.jsonl"}')
    with pytest.raises(UserError, match='not UTF-8'): here.text  # noqa: B018
    assert not (here.folder/'text').exists()
    assert {p.name for p in here.folder.iterdir()} == {'recipe.json', 'sources.json'}


def test_instructions_alone_train_a_tokenizer(tmp_path, run):
    answer = lambda i: f'Number {i} is {i}. ' + articles(1, i)[0]
    asks = [dict(instruction=f'What is number {i}?', output=answer(i)) for i in range(60)]
    (tmp_path/'ask.json').write_text(json.dumps(asks))
    here = run('text=', 'valid_share=0.1', f'instructions={tmp_path/"ask.json"}')
    assert 40 < len(list(tokenizer_texts(['train'], None, here.record_folder))) < 60
    assert here.tokenizer.decode([]) == '' and not (here.folder/'text').exists()
    with pytest.raises(UserError, match='no text to read'): here.text  # noqa: B018


def test_one_sft_reads_and_packs_its_records_once(tmp_path, run, monkeypatch):
    "Artifacts are opened once: a stage, its measurements and the dialogues share them"
    import lm_nb.data.prepare as prepare
    import lm_nb.training.run as module
    from lm_nb.training.sft import sft_feed
    asks = [dict(instruction=f'What is {w}?', output=f'{w} it is.') for w in WORDS * 3]
    (tmp_path/'ask.json').write_text(json.dumps(asks))
    here = run(f'text={write(tmp_path/"a.jsonl", articles(60))}',
               f'instructions={tmp_path/"ask.json"}', 'valid_share=0.2', 'base=')
    counted = {'read': 0, 'packed': 0}
    def count(name, f):
        def counting(*a, **kw):
            counted[name] += 1
            return f(*a, **kw)
        return counting
    monkeypatch.setattr(prepare, 'read_instructions', count('read', prepare.read_instructions))
    monkeypatch.setattr(module, 'packed_records', count('packed', module.packed_records))
    (here.folder/'base').mkdir()
    (here.folder/'base'/'model.safetensors').write_bytes(b'weights')
    for _ in range(3): sft_feed(here, 'sft')
    assert counted == dict(read=1, packed=1), 'records are read once, and packed once'
