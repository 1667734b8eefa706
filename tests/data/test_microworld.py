"The microworld: grammar of every sentence, names as functions, splits, determinism, damaged lists"
import json, re, shutil
from collections import Counter
from itertools import chain

import pytest

from lm_nb.core import UserError, root, sha256
from lm_nb.data.microworld import (
    GROUPS, articles, _assign_splits, deal_groups, fact_probes, _fact_sentence,
    instruction_records, _load_lists, make_world, _plan_article, _questions, _render, _fill_pattern,
    _summaries, _summary_line, _write_bilingual, _translations, write_microworld)
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.training.recipe import load_recipe
from random import Random

SEEDS = (0, 1)
KINDS = ('person', 'town', 'thing')
TASKS = ('qa_zh', 'qa_en', 'translate_zh_en', 'translate_en_zh', 'summary_zh', 'summary_en')

@pytest.fixture(scope='module', params=SEEDS)
def world(request): return make_world(request.param)

def everything_said(world, lang):
    for e in world.entities:
        for key, f in e.kind.facts.items():
            for p in f.tell:
                pattern, value = getattr(p, lang), getattr(e.facts[key], lang)
                for named in (True, False): yield _fill_pattern(pattern, lang, e, value, named)
        yield _summary_line(e, lang)

def everything_asked(world, lang):
    for e in world.entities:
        for f in e.kind.facts.values():
            for p in f.ask + f.ask_unseen: yield _fill_pattern(getattr(p, lang), lang, e)

def test_english_is_well_formed(world):
    for s in chain(everything_said(world, 'en'), everything_asked(world, 'en')):
        assert s[0].isupper() and s.isascii(), s
        assert not any(odd in s for odd in ('  ', '{', "s's")), s
        wrong = r"(?<![-\w])([Aa] [aeiouAEIOU]|[Aa]n [^aeiouAEIOU]|([Tt]he|[Aa]n?) (the|an?)\b)"
        assert not re.search(wrong, s), s
    for s in everything_said(world, 'en'): assert s[-1] == '.', s
    requests = 'Please tell me', 'Tell me', 'I would like to know'
    for s in everything_asked(world, 'en'):
        assert s[-1] == ('.' if s.startswith(requests) else '?'), s

def test_chinese_is_well_formed(world):
    for s in everything_said(world, 'zh'):
        assert s[-1] == '。' and not re.search(r'[A-Za-z ,.?()？{]', s), s
    for s in everything_asked(world, 'zh'):
        assert s[-1] == ('。' if s.startswith(('我想知道', '说说')) else '？'), s
        assert not re.search(r'[A-Za-z ,.?(){]', s), s
        assert re.search('[什哪谁]|能告诉我|我想知道|说说', s), s

def test_names_are_unique_and_computable(world):
    for lang in (0, 1): assert len({e.name[lang] for e in world.entities}) == len(world.entities)
    for kind in KINDS:
        k = world.lists.kinds[kind]
        for options in k.parts.values():
            assert len({p.zh for p in options}) == len({p.en for p in options}) == len(options)
    parts = world.lists.kinds['person'].parts.values()
    syllable = {p.zh: p.en.lower() for options in parts for p in options}
    letter = {v: k for k, v in syllable.items()}
    for e in world.of('person'):
        spoken = re.split('[ -]', e.name.en.lower())
        assert [syllable[c] for c in e.name.zh] == spoken
        assert ''.join(letter[s] for s in spoken) == e.name.zh

def test_values_and_patterns_are_unambiguous():
    lists = _load_lists()
    for kind in KINDS:
        seen = {'zh': {}, 'en': {}}
        for key, f in lists.kinds[kind].facts.items():
            assert len({p.zh for p in f.tell}) == len({p.en for p in f.tell}) == len(f.tell)
            for p in f.ask + f.ask_unseen:
                for lang in seen: assert seen[lang].setdefault(getattr(p, lang), key) == key, p
            if isinstance(f.values, str): continue
            assert len({v.zh for v in f.values}) == len({v.en for v in f.values}) == len(f.values)

def test_every_prompt_has_one_answer(world):
    right = {}
    for e in world.entities:
        rows = chain.from_iterable(
            [*_questions(e, lang), *_translations(world, e, lang),
             *_summaries(world, e, lang, Random(e.id), 1)] for lang in ('zh', 'en'))
        for r in rows:
            answer = right.setdefault((r['instruction'], r['input']), r['output'])
            assert answer == r['output'], r

def test_splits(world):
    for kind in KINDS:
        n = len(world.of(kind))
        assert abs(len(world.of(kind, 'train')) - n/2) <= 2
        assert abs(len(world.of(kind, 'valid')) - n/4) <= 1
        learned = {(k, v) for e in world.of(kind, 'train') for k, v in e.facts.items()}
        assert {(k, v) for e in world.of(kind) for k, v in e.facts.items()} <= learned
    for where in (-3, -2, -1):  # family name, first and second character of the given name
        some = *world.of('person', 'train'), *(e for e in world.strangers if e.kind.id == 'person')
        trained = {e.name.zh[where] for e in some}
        assert {e.name.zh[where] for e in world.of('person')} == trained
    rows = {split: instruction_records(world, split, 60) for split in ('train', 'valid', 'test')}
    for a, b in (('train', 'valid'), ('train', 'test'), ('valid', 'test')):
        assert not {r['entity'] for r in rows[a]} & {r['entity'] for r in rows[b]}
    assert {r['wording'] for r in rows['train']} == {'seen'}
    for split in ('valid', 'test'):
        for task in TASKS:
            ours = [r for r in rows[split] if r['task'] == task]
            assert len(ours) == 60 and sum(r['wording'] == 'unseen' for r in ours) == 30

def test_values_are_shared(world):
    for kind in KINDS:
        for key in world.lists.kinds[kind].facts:
            counts = Counter(e.facts[key] for e in world.of(kind)).values()
            assert min(counts) >= 2 and max(counts) - min(counts) <= 1, (kind, key, counts)

def test_train_covers_rare_pieces():
    rows = [{('x', i % 20)} for i in range(40)]
    for seed in range(20):
        splits = _assign_splits(rows, Random(seed))
        assert len(set().union(*(r for r, s in zip(rows, splits) if s == 'train'))) == 20
        assert splits.count('train') == 20

def test_parallel_halves_say_the_same(world):
    for e in world.entities[::7]:
        zh, en = sorted(_write_bilingual(e, Random(1)).split('\n'), key=str.isascii)
        for v in e.facts.values(): assert (v.zh in zh) == (v.en.lower() in en.lower()), (zh, en)
        lines = _plan_article(e, Random(2), glossed=1)
        assert [l.gloss for l in lines][1:] == [False]*(len(lines) - 1)
        if lines[0].gloss: assert _render(e, lines, 'zh').startswith(f'{e.name.zh}（{e.name.en}）')

def test_files_repeat_to_the_byte(tmp_path):
    how = dict(paraphrases=2, people=40, towns=20, things=10)
    seeds = dict(a=5, b=5, c=6)
    a, b, c = (write_microworld(tmp_path/n, seed=seed, **how) for n, seed in seeds.items())
    for name in a:
        assert a[name].read_bytes() == b[name].read_bytes() != c[name].read_bytes()
        for line in a[name].read_text(encoding='utf-8').splitlines():
            assert isinstance(json.loads(line), dict)
    assert sorted(p.stem for p in (tmp_path/'a').iterdir()) == [
        'instructions-test', 'instructions-train', 'instructions-valid', 'text']

def test_tiny_worlds_work(tmp_path):
    assert len(make_world(people=1, towns=1, things=1).of(split='train')) == 3
    write_microworld(tmp_path/'w', people=6, towns=6, things=6, paraphrases=1)

@pytest.mark.parametrize('how, says', [
    (dict(people=0), 'people = 0'), (dict(towns=361), 'at most 360'), (dict(hubs=0), 'hubs = 0'),
    (dict(paraphrases=0), 'paraphrases = 0')])
def test_impossible_worlds(tmp_path, how, says):
    with pytest.raises(UserError, match=says): write_microworld(tmp_path, **how)

def test_out_is_a_file(tmp_path):
    (tmp_path/'f').write_text('precious')
    with pytest.raises(UserError, match='is a file'):
        write_microworld(tmp_path/'f', people=6, towns=6, things=6)
    assert (tmp_path/'f').read_text() == 'precious'

@pytest.mark.parametrize('old, new, says', [
    ('[name]', '[nam]', "towns.toml: no 'zh'"), ('{s}出产{v}。', '{s}出产{x}。', '出产'),
    ('kind = "town"', 'kind = town', 'towns.toml: not a TOML file'),
    ('丝绸 silk', '丝绸', 'towns.toml'), ('"{s} produces {v}."', '7', 'towns.toml')])
def test_damaged_lists_are_named(tmp_path, old, new, says):
    folder = tmp_path/'lists'
    shutil.copytree(root()/'data'/'microworld', folder)
    text = (folder/'towns.toml').read_text(encoding='utf-8')
    assert old in text
    (folder/'towns.toml').write_text(text.replace(old, new, 1), encoding='utf-8')
    with pytest.raises(UserError) as e: make_world(folder=folder)
    assert says in str(e.value) and '\n' not in str(e.value)

def test_missing_lists_are_named(tmp_path):
    with pytest.raises(UserError, match='people.toml: missing'): make_world(folder=tmp_path)

def test_canonical_line_names_the_entity(world):
    for e in world.entities:
        for key in e.facts:
            for i in range(6):
                assert e.name.zh in _fact_sentence(e, key, 'zh', i)
                assert e.name.en.removeprefix('the ') in _fact_sentence(e, key, 'en', i)

# groups at equal exposure

ALL = ' '.join(GROUPS)

@pytest.fixture(scope='module', params=range(3))
def dealt(request): return deal_groups(make_world(request.param), ALL)

@pytest.fixture(scope='module')
def told(dealt):
    "{entity: its documents}"
    out = {e.id: [] for e in (*dealt.entities, *dealt.strangers)}
    for d in articles(dealt): out[d['entity']].append(d)
    return out

def members(world, group, split=None): return [e for e in world.of(split=split) if e.group == group]

def test_groups_are_equally_exposed(dealt, told):
    "As many articles for each entity and language; bytes of a group within 2 %, tokens within 4 %"
    tok = Tokenizer.train([d['text'] for docs in told.values() for d in docs[:8]], 2048)
    tokens, size = {}, {}
    for group in GROUPS:
        for e in members(dealt, group):
            for lang in ('zh', 'en'): assert sum(lang in d['lang'] for d in told[e.id]) == 20
        texts = [d['text'] for e in members(dealt, group) for d in told[e.id]]
        tokens[group] = sum(map(len, tok.encode_batch(texts))) / len(members(dealt, group))
        size[group] = sum(len(t.encode()) for t in texts) / len(members(dealt, group))
    assert max(size.values()) < 1.02 * min(size.values()), size
    assert max(tokens.values()) < 1.04 * min(tokens.values()), tokens

def test_groups_are_of_one_size_in_each_split(dealt):
    for split in ('valid', 'test'):
        sizes = [len(members(dealt, group, split)) for group in GROUPS]
        assert max(sizes) - min(sizes) <= 1 and sum(sizes) == len(dealt.of(split=split))
        for kind in KINDS:
            n = Counter(e.group for e in dealt.of(kind, split)).values()
            assert max(n) - min(n) <= 2, (kind, n)
    assert not any(e.group for e in dealt.of(split='train'))

def test_splits_cover_what_is_asked(dealt):
    def values(split): return {(k, v) for e in dealt.of(split=split) for k, v in e.facts.items()}
    assert values('valid') | values('test') <= values('train')
    assert abs(len(dealt.of(split='valid')) - len(dealt.of(split='test'))) <= 3
    assert len(dealt.of(split='train')) == len(dealt.entities) // 2

@pytest.mark.parametrize('group', GROUPS)
def test_a_group_is_told_as_it_says(dealt, told, group):
    how = GROUPS[group]
    for e in members(dealt, group):
        docs = told[e.id]
        lines = [t for d in docs for t in d['text'].split('\n')]
        assert len(lines) == 40 and any('\n' in d['text'] for d in docs) == how.bilingual
        for lang in ('zh', 'en'):
            mine = [t for t in lines if t.isascii() == (lang == 'en')]
            assert len(mine) == 20 and len(set(mine)) <= (how.wordings or 20)
            assert len(set(mine)) == how.wordings if how.wordings else len(set(mine)) > 15
            assert not any(e.name[lang == 'zh'] in t for t in mine)  # no name in brackets
            for t in mine:
                for key, v in e.facts.items(): assert v[lang == 'en'].lower() in t.lower(), (key, t)
    def orders(e):  # the names of towns and the like occur in values; a town's own do not
        lines = [t for d in told[e.id] for t in d['text'].split('\n') if t.isascii()]
        return {tuple(sorted(e.facts, key=lambda k: t.lower().index(e.facts[k].en.lower())))
                for t in lines}
    for e in members(dealt, group):
        if e.kind.id == 'town': assert len(orders(e)) > 5 or not how.permuted or how.wordings

def test_nothing_leaks_into_training(dealt):
    train = instruction_records(dealt, 'train', 4500)
    asked = {e.id for split in ('valid', 'test') for e in dealt.of(split=split)}
    told = {e.id for e in dealt.entities}
    assert not asked & {r['entity'] for r in train}
    for r in train: assert (r['entity'] in told) == r['task'].startswith('qa_'), r
    assert {r['wording'] for r in train} == {'seen'}
    text = '\n'.join(r['instruction'] + r['input'] + r['output'] for r in train)
    for e in dealt.entities:
        if e.id not in asked or e.kind.id == 'town': continue
        assert e.name.zh not in text and not re.search(rf'{e.name.en}\b', text), e.name
    questions = {r['instruction'] for r in train}
    probes = {split: fact_probes(dealt, split) for split in ('valid', 'test')}
    assert not {r['entity'] for r in probes['valid']} & {r['entity'] for r in probes['test']}
    for r in chain(*probes.values()): assert not questions & {r['seen'], r['unseen']}

def test_probes_ask_for_what_was_told(dealt, told):
    for r in fact_probes(dealt, 'test'):
        value = r['values'][r['answer']]
        told_right, canonical = r['told'][r['answer']], r['canonical'][r['answer']]
        assert len(set(r['told'])) == len(set(r['canonical'])) == len(set(r['values'])) >= 8
        assert value.lower() in canonical.lower() and canonical == r['output']
        assert any(d['text'].startswith(told_right) and d['lang'] == r['lang']
                   for d in told[r['entity']])
        start, rest = r['cloze']
        assert canonical.removeprefix(start).strip().startswith(rest), r

def test_strangers_are_told_of_once(dealt, told):
    names = [e.name for e in dealt.entities] + [e.name for e in dealt.strangers]
    for lang in (0, 1): assert len({n[lang] for n in names}) == len(names)
    for e in dealt.strangers:
        doc, = told[e.id]
        text = doc['text'].lower()
        if doc['lang'] == 'zh+en': assert e.name.zh in text and e.name.en.lower() in text
        else: assert doc['text'].split('\n')[1] == _summary_line(e, doc['lang'])
    assert Counter(e.kind.id for e in dealt.strangers)['person'] == 4*len(dealt.of('person'))
    assert not make_world(people=4, towns=4, things=4, strangers=0).strangers

def test_groups_repeat_and_one_group_tells_all():
    make = lambda seed=3: deal_groups(make_world(seed), ALL)
    assert make() == make() != make(4)
    assert articles(make(), 5) == articles(make(), 5)
    assert {e.group for e in deal_groups(make_world(), 'one').entities} == {'one'}
    with pytest.raises(UserError, match='there is no on'): deal_groups(make_world(), 'one on')
    with pytest.raises(UserError, match='multiple of 5'): articles(make(), 7)

def test_held_out_text_is_about_training_entities(tmp_path):
    files = write_microworld(tmp_path, groups='one five', paraphrases=5)
    rows = {k: [json.loads(l) for l in p.open(encoding='utf-8')] for k, p in files.items()}
    about = {k: {r['entity'] for r in rows[k]} for k in rows if 'entity' in rows[k][0]}
    assert about['text_valid'] and not about['text_valid'] & (about['facts_test'] | about['valid'])
    strangers = {e for e in about['text'] if e.startswith('stranger-')}
    assert strangers and not strangers & {r['entity'] for r in rows['test'] + rows['valid']}
    told = about['text'] - strangers
    assert about['facts_test'] == told - about['facts_valid'] - about['text_valid']
    assert about['text_train'] == about['text_valid'] | strangers and len(about) == 8
    train = [d for d in rows['text'] if d['entity'] in about['text_train']]
    assert rows['text_train'] == train

def test_the_world_of_the_main_job_is_the_one_of_the_recorded_results(tmp_path):
    "Another list or draw makes another world: change these only with the results on the site"
    recipe = load_recipe('micro', path=root()/'settings.ini')
    files = write_microworld(tmp_path, recipe.seed, groups=recipe.data.groups)
    assert {name: sha256(path)[:16] for name, path in files.items()} == {
        'text': '09e6146a0cc95877', 'train': '6491a5bef8c1e2a6',
        'valid': '6616d0e6851036c3', 'test': '6ff42667f10e9aba',
        'text_valid': 'a80813afd9e23e95', 'text_train': '26af0f10272e2a2c',
        'facts_valid': '4f0edf2fde711976', 'facts_test': '618ce8d3caf08428'}
