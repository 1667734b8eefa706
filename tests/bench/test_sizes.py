"Sizes from data and time: what holds for any files, and what was said stays"
import json

import pytest

from lm_nb.bench import sizes
from lm_nb.bench.sizes import (
    Need, Part, choose_context, choose_shape, choose_share, choose_vocabulary, share_out,
    sized_recipe)
from lm_nb.cli import main
from lm_nb.core import UserError
from lm_nb.data.cleaning import CleanConfig
from lm_nb.data.dedup import held_out
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.model.hub import save_model
from lm_nb.training.recipe import load_recipe

FIVE = 'd_model=32 n_layer=1 n_head=1 context=64 vocab_size=300'.split()


@pytest.fixture
def files(tmp_path, monkeypatch):
    "Text and records; the device is a rule"
    text = [f'Town {i} lies on river {i % 7}, {i} miles from the sea.' for i in range(120)]
    asks = [dict(instruction=f'Where is {i}?', output=f'On river {i % 7}.') for i in range(120)]
    (tmp_path/'t.txt').write_text('\n'.join(text) + '\n')
    (tmp_path/'a.jsonl').write_text('\n'.join(map(json.dumps, asks)) + '\n')
    calls = []
    def rate(cfg, stage, doc_mask):
        calls.append(cfg)
        return 1e9 / (12 * cfg.n_layer * cfg.d_model**2 + cfg.vocab_size * cfg.d_model)
    monkeypatch.setattr(sizes.choose_sizes, '__defaults__', (rate,))
    sources = f'text={tmp_path/"t.txt"}', f'instructions={tmp_path/"a.jsonl"}'
    return [*sources, 'separator=line'], calls


@pytest.mark.parametrize('n', [2, 3, 7, 30, 99, 100, 150, 1000, 5000])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_some_are_held_out_and_some_are_left(n, seed):
    docs = [f'document {i} of {n}' for i in range(n)]
    share, why = choose_share([(Part(docs), str)], seed)
    held = sum(held_out(d, share, seed) for d in docs)
    assert 0 < held < n and f'{held} of {n:,}' in why
    if n >= 100: assert 20 <= held <= max(20, n / 50) + 1 + n / 250  # the share has three digits


def test_a_long_source_holds_out_no_more_than_it_needs():
    docs = [f'document {i}' for i in range(2000)]
    share, why = choose_share([(Part(docs, more=1000), str)], 0)
    assert share <= .002  # 500 of two million would do; one of those that were looked at is least


def test_the_held_out_file_is_measured_and_no_share_is_chosen(tmp_path, files):
    words, _ = files
    (tmp_path/'v.txt').write_text((tmp_path/'t.txt').read_text() * 2)
    (tmp_path/'w.jsonl').write_text((tmp_path/'a.jsonl').read_text())
    named = [f'text_valid={tmp_path/"v.txt"}', f'instructions_valid={tmp_path/"w.jsonl"}']
    data = load_recipe('own', [*words, *named]).data
    parts = sizes.look(data, CleanConfig())
    assert parts['pretrain'].held == 2 and parts['sft'].held == 1
    said = []
    sized_recipe('own', [*words, *named], log=said.append)
    assert said and 'valid_share' not in str(said)


@pytest.mark.parametrize('lengths', [[5], [10] * 99 + [9999], list(range(1, 700)), [9999] * 9])
def test_a_row_holds_nineteen_of_twenty_or_is_as_long_as_it_may_be(lengths):
    context, why = choose_context(lengths, 'records')
    kept = sum(n <= context for n in lengths) / len(lengths)
    assert 64 <= context <= 512 and context % 32 == 0
    assert kept >= .95 or context == 512
    assert f'{kept:.0%}' in why


def test_a_vocabulary_is_one_that_the_text_supports():
    for texts in ['a b'], ['Who? Me. ' * 9] * 3, [f'word{i} ' * 12 for i in range(900)]:
        size, _ = choose_vocabulary(texts, 1, 'bpe')
        assert 264 < size <= 8192


def test_a_long_corpus_has_use_for_more_pieces():
    texts = [f'word{i} {i * 7919 % 1000} ' * 12 for i in range(900)]
    size, _ = choose_vocabulary(texts, 1e4, 'bpe', 512)
    assert size == 2048


def test_tokens_fit_the_time_and_the_passes():
    needs = dict(pretrain=Need(16e5, None), sft=Need(6e4, None))
    for total in (1e3, 1e5, 1e6, 1e9):
        got = share_out(total, needs)
        assert sum(got.values()) <= total
        assert all(got[k] <= needs[k].most for k in needs)
    assert share_out(1e6, dict(needs, sft=Need(6e4, 777)))['sft'] == 777


def test_more_time_never_chooses_a_smaller_model():
    ladder = [GPTConfig(n_layer=l, d_model=d) for l, d in sizes.SHAPES]
    rate = lambda cfg: 1e10 / (12 * cfg.n_layer * cfg.d_model**2)
    for have in (1e4, 1e6, 1e9):
        needs = dict(pretrain=Need(16 * have, None))
        widths = [choose_shape(ladder, needs, s, rate)[0].d_model for s in (1, 60, 600, 1e5, 1e7)]
        assert widths == sorted(widths)
    assert widths[-1] > widths[0]


def test_a_recipe_of_ones_own_files_has_sizes_and_says_why(files):
    words, _ = files
    said = []
    recipe = sized_recipe('own', words, log=said.append)
    again = sized_recipe('own', words, log=lambda line: None)
    assert recipe == again and recipe.as_dict()['minutes'] == 10
    pretrain, sft = recipe.configs['pretrain'], recipe.configs['sft']
    assert pretrain.tokens % pretrain.batch_tokens == 0 and sft.steps > 0
    assert recipe.model.context <= 96 and 0 < recipe.data.valid_share < .5
    keys = [line.split()[0] for line in said[1:]]
    assert {'vocab_size', 'context', 'd_model', 'sft.tokens', 'valid_share'} <= set(keys)


@pytest.mark.parametrize('word', ['d_model=96', 'n_layer=5', 'context=128', 'vocab_size=310',
                                  'sft.tokens=6400', 'valid_share=0.3', 'n_head=8',
                                  'pretrain.batch_tokens=1024', 'pretrain.lr=0.5'])
def test_what_was_said_stays(files, word):
    words, _ = files
    flat = sized_recipe('own', [*words, word], log=lambda line: None).flat()
    key, _, value = word.partition('=')
    found = [v for k, v in flat.items() if k == key or k.endswith('.' + key)]
    assert float(value) in found


def test_nothing_is_tried_where_everything_was_said(files):
    words, calls = files
    words = [*words, *FIVE, 'tokens=6400', 'valid_share=0.2']
    said = []
    assert sized_recipe('own', words, log=said.append) == load_recipe('own', words) and not calls
    assert said == ['minutes = 10 chooses nothing: every size is set']


def test_other_recipes_are_as_they_were(files):
    assert sized_recipe('micro', log=pytest.fail) == load_recipe('micro')
    assert 'minutes' not in load_recipe('micro').as_dict()  # folders of earlier runs stay theirs
    with pytest.raises(UserError, match='recipe micro has its sizes'):
        sized_recipe('micro', ['minutes=5'])


def test_several_processes_do_not_choose_each_for_itself(files, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UserError, match='one process chooses'): sized_recipe('own', files[0])


def test_validation_takes_a_tenth_of_the_time_at_most(files):
    words, _ = files
    for share in '0.02', '0.2', '0.6':
        recipe = sized_recipe('own', [*words, f'valid_share={share}'], log=lambda line: None)
        for stage in recipe.stage_configs().values():
            times = -(-stage.steps // stage.eval_every)
            assert 1 <= times <= 10
    assert sizes._validations(1e5, 10**6) * 1e5 / 3 <= 10**5


@pytest.mark.parametrize('minutes', ['0', '-1', 'soon'])
def test_a_time_that_is_none_is_named(files, minutes):
    with pytest.raises(UserError, match='minutes'):
        sized_recipe('own', [*files[0], f'minutes={minutes}'])


def test_only_the_beginning_of_a_huge_file_is_read(tmp_path):
    path, lines = tmp_path/'huge.txt', 200_000
    path.write_text(''.join(f'Line {i} of the file, as long as others.\n' for i in range(lines)))
    read = 0
    def documents(tick):
        nonlocal read
        with path.open() as f:
            for line in f:
                read += 1
                tick(len(line))
                yield line
    part = sizes._beginning(documents, (str(path), ''), str, 100_000)
    assert read < lines / 50
    assert abs(part.more * len(part.items) / lines - 1) < .1  # later lines are longer
    part = sizes._beginning(lambda tick: iter(['abc'] * 99), ('hf:owner/name', ''), str, 100)
    assert part.more == sizes._UNKNOWN and len(part.items) == 34


def test_max_documents_bounds_what_there_is(files):
    words, _ = files
    parts = sizes.look(load_recipe('own', [*words, 'max_documents=9']).data, CleanConfig())
    assert [len(p.items) * p.more for p in parts.values()] == [9, 9]


@pytest.mark.parametrize('text, asks', [(10, 0), (0, 10), (10, 10), (2, 2)])
def test_tiny_files(tmp_path, files, text, asks):
    words = ['separator=line']
    for key, name, n in ('text', 't.txt', text), ('instructions', 'a.jsonl', asks):
        if not n: continue
        some = (tmp_path/name).read_text().splitlines(keepends=True)[:n]
        (tmp_path/f'few-{name}').write_text(''.join(some))
        words.append(f'{key}={tmp_path/f"few-{name}"}')
    recipe = sized_recipe('own', words, log=lambda line: None)
    assert all(stage.steps >= 10 for stage in recipe.stage_configs().values())


def test_a_base_gives_the_shape_and_is_fine_tuned_gently(tmp_path, files):
    words, calls = files
    tok = Tokenizer.train(['Where is 7? On river 7. '] * 9, 300, kind='bpe')
    gpt = GPT(GPTConfig(vocab_size=len(tok), context=64, n_layer=1, d_model=32))
    save_model(tmp_path/'b', gpt, tok)
    words = [w for w in words if not w.startswith('text=')]
    recipe = sized_recipe('own', [*words, f'base={tmp_path/"b"}'], log=lambda line: None)
    assert {c.d_model for c in calls} == {32} and recipe.model.context == 64
    assert recipe.configs['sft'].muon_lr == pytest.approx(.3 * .02)
    with pytest.raises(UserError, match='no model folder'):
        sized_recipe('own', [*words, f'base={tmp_path}'])


def test_a_run_that_has_begun_keeps_what_was_chosen(tmp_path, files, monkeypatch, capsys):
    words, _ = files
    here = f'run_dir={tmp_path/"r"}'
    quick = ['minutes=0.001', 'device=cpu', 'dtype=fp32', 'n_layer=1', 'd_model=16', 'n_head=1']
    assert main(['pretrain', 'own', *words, *quick, here]) == 0
    assert 'vocab_size' in capsys.readouterr().err
    chosen = (tmp_path/'r'/'recipe.json').read_text()
    monkeypatch.setattr(sizes, 'choose_sizes', lambda *a: pytest.fail('sizes are chosen anew'))
    for command in ['sft', 'run', 'plan', 'evaluate', 'tokenizer']:
        assert main([command, 'own', here]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert 'settings.ini has other values' not in err and '• base ' in out
    assert (tmp_path/'r'/'recipe.json').read_text() == chosen
    assert main(['run', 'own', 'minutes=5', here]) == 2 and 'minutes' in capsys.readouterr().err


def test_records_alone_are_refused_before_sizes_are_chosen(files, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sizes, 'choose_sizes', lambda *a: pytest.fail('sizes are chosen'))
    words = [w for w in files[0] if not w.startswith('text=')]
    assert main(['run', 'own', *words, f'run_dir={tmp_path/"r"}']) == 2
    assert 'set text= to train one' in capsys.readouterr().err
