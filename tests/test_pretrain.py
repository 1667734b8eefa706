"From a recipe's sources to its token files: what is kept, what is held out, what is mixed"
import json, random
import pytest

from lm_nb.core import UserError, read_json
from lm_nb.pretrain import DataConfig, documents, load_recipe, pretrain, run_folder, run_shards, run_text, run_tokenizer
from lm_nb.pretrain import shares, stage_main, pretrain_batches, tokenizer_texts
from lm_nb.sft import sft

WORDS = 'river hill lantern green old stone bridge painter carpenter music winter summer market harbour tower garden'.split()
SMALL = ['vocab_size=300', 'context=32', 'batch_tokens=256', 'n_layer=1', 'n_head=2', 'd_model=32', 'pretrain.tokens=2560', 'sft.tokens=2560',
         'device=cpu', 'dtype=fp32']


def write(path, texts):
    path.write_text(''.join(json.dumps(dict(text=t), ensure_ascii=False) + '\n' for t in texts), encoding='utf-8')
    return str(path)


def articles(n, seed=0, words=WORDS):
    rng = random.Random(seed)
    return [f'Article {seed}-{i}: ' + ' '.join(rng.choice(words) for _ in range(60)) for i in range(n)]


@pytest.fixture
def run(tmp_path):
    def make(*overrides, name='run'):
        recipe = load_recipe('own', [*SMALL, *overrides])
        return recipe, run_folder(recipe, tmp_path/name)
    return make


def parts(recipe, run): return {p.stem: list(documents(p)) for p in sorted(run_text(recipe, run).glob('*.jsonl'))}


def test_every_document_is_in_one_part_and_the_report_adds_up(tmp_path, run):
    texts = articles(200)
    got = parts(*run(f'text={write(tmp_path/"a.jsonl", texts + texts[:20])}', 'valid_share=0.1'))
    assert sorted(got['train'] + got['valid']) == sorted(texts) and 5 < len(got['valid']) < 40
    report = read_json(tmp_path/'run'/'text'/'report.json')[0]
    assert (report['rows'], report['kept']) == (220, 200) and sum(n for n, _ in report['rejected'].values()) == 20


@pytest.mark.parametrize('dedup, left', [('near', 150), ('exact', 180), ('none', 180)])
def test_copies_of_held_out_documents_are_not_trained_on(tmp_path, run, dedup, left):
    "A validation file that was made of the training file: 20 copies, 30 near-copies"
    texts = articles(200)
    held = texts[:20] + [t.replace(': ', ': Once ') + ' End.' for t in texts[20:50]]
    recipe, folder = run(f'text={write(tmp_path/"a.jsonl", texts)}', f'text_valid={write(tmp_path/"v.jsonl", held)}', f'dedup={dedup}', 'clean=light')
    got = parts(recipe, folder)
    assert got['valid'] == held
    assert len(got['train']) == left and not set(got['train']) & set(held)
    report = read_json(folder/'text'/'report.json')[1]
    assert report['rows'] == 200 == report['kept'] + sum(n for n, _ in report['rejected'].values()) and report['kept'] == len(got['train'])


def test_weighted_sources_are_mixed_in_every_batch(tmp_path, run):
    "The small source is read ten times as often as its size says"
    zh = ['字' + ''.join(random.Random(i).choices('山水田石火土木金', k=80)) for i in range(100)]
    sources = f'{write(tmp_path/"en.jsonl", articles(900))} {write(tmp_path/"zh.jsonl", zh)}'
    recipe, folder = run(f'text={sources}', 'weights=1 1')
    tok = run_tokenizer(recipe, folder)
    texts, held = run_shards(recipe, folder, tok)
    assert [t.path.name for t in texts] == ['train-0', 'train-1'] and held.n_docs == 1000 - texts[0].n_docs - texts[1].n_docs
    rows = [tok.decode(row.tolist()) for step in range(40) for b in pretrain_batches(recipe, texts, 8, seed=0)(step) for row in b.x]
    chinese = sum(any(c > '\u3000' for c in r) for r in rows)
    assert abs(chinese - len(rows)/2) <= 0.03*len(rows)
    assert len(list(tokenizer_texts(recipe, folder))) == texts[0].n_docs + texts[1].n_docs


def test_weights_must_fit_the_sources():
    for weights in ('1', '1 2 3', '1 x', '1 0', '1 -1'):
        with pytest.raises(UserError, match='a positive number for each of the 2 sources'): DataConfig(text='a.txt b.txt', weights=weights)
    assert shares(DataConfig(text='a.txt b.txt', weights='3,1')) == [('a.txt', 3), ('b.txt', 1)]


def test_max_documents_separator_and_shape(tmp_path, run):
    texts = articles(40)
    (tmp_path/'blank.txt').write_text('\n\n'.join(t.replace(': ', ':\n') for t in texts))
    got = parts(*run(f'text={tmp_path/"blank.txt"}', 'separator=blank', 'max_documents=30', 'valid_share=0.2'))
    assert sorted(got['train'] + got['valid']) == sorted(t.replace(': ', ':\n') for t in texts[:30])
    with pytest.raises(UserError, match='shape'): run_text(*run(f'text={tmp_path/"blank.txt"}', 'shape=bake', name='other'))


def test_an_interrupted_read_leaves_nothing_that_looks_whole(tmp_path, run):
    texts = [json.dumps(dict(text=t)).encode() for t in articles(50)]
    (tmp_path/'a.jsonl').write_bytes(b'\n'.join([*texts, b'{"text": "caf\xe9 with a byte of another encoding"}']))
    recipe, folder = run(f'text={tmp_path/"a.jsonl"}')
    with pytest.raises(UserError, match='not UTF-8'): run_text(recipe, folder)
    assert not (folder/'text').exists() and [p.name for p in folder.iterdir()] == ['recipe.json']


def test_instructions_alone_train_a_tokenizer(tmp_path, run):
    asks = [dict(instruction=f'What is number {i}?', output=f'Number {i} is {i}. ' + articles(1, i)[0]) for i in range(60)]
    (tmp_path/'ask.json').write_text(json.dumps(asks))
    recipe, folder = run('text=', f'instructions={tmp_path/"ask.json"}')
    assert 40 < len(list(tokenizer_texts(recipe, folder))) < 60
    assert run_tokenizer(recipe, folder).decode([]) == '' and not (folder/'text').exists()
    with pytest.raises(UserError, match='no text to read'): run_text(recipe, folder)


def test_a_stage_without_a_recipe_names_its_own_command(capsys):
    for stage in (pretrain, sft):
        assert stage_main(stage, []) == 2 and f'python -m lm_nb.{stage.__name__} micro' in capsys.readouterr().err
