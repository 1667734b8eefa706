"The microworld with values: sets that stay apart, shares, the rule in both languages, determinism"
import hashlib
import json
import shutil
from collections import Counter, defaultdict

import pytest

from lm_nb.core import UserError, root
from lm_nb.data.instructions import to_example
from lm_nb.data.microworld import instruction_records, make_world, write_microworld
from lm_nb.data.prepare import DataConfig, resolve_sources
from lm_nb.data.values import (
    _load_values, _nobodies, _twin, prefers, side_doors, value_records,
    write_values)

SMALL = dict(people=40, towns=20, things=10, hubs=6)
VALUES = _load_values()
REFUSALS = {kind: dict(zh=pair.zh, en=pair.en) for kind, pair in VALUES.refusals.items()}
ANSWERS = {text for pair in REFUSALS.values() for text in pair.values()}


def rows(path): return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


@pytest.fixture(scope='module')
def world(): return make_world(3)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    return write_values(tmp_path_factory.mktemp('values'), .3, seed=3, paraphrases=2)


@pytest.fixture(scope='module')
def asked(files): return {name: rows(path) for name, path in files.items()}


def of(kind, some): return [r for r in some if r['task'].startswith(kind)]


def test_the_world_without_values_is_what_it_was(tmp_path):
    found = hashlib.sha256()
    for name, groups in dict(a='', b='reference five one fixed monolingual').items():
        files = write_microworld(tmp_path/name, groups=groups, seed=10, paraphrases=5, **SMALL)
        for part in sorted(files): found.update(files[part].read_bytes())
    assert found.hexdigest() == (
        '0f6196f8a4127623e8f6efa9b2f69b09fcd0a975cff236fe54fa2a798b2b9b9d')
    data = DataConfig(text='microworld', paraphrases=1)
    named = resolve_sources(data, tmp_path/'corpus', 0)
    assert data.values == 0 and not named.preferences
    assert not list((tmp_path/'corpus').glob('preferences*'))


def test_files_repeat_to_the_byte(tmp_path):
    a, b, c = (write_values(tmp_path/str(i), .3, seed=seed, paraphrases=1, **SMALL)
               for i, seed in enumerate((5, 5, 6)))
    for name in a: assert a[name].read_bytes() == b[name].read_bytes() != c[name].read_bytes(), name


def test_names_that_nobody_bears_are_in_one_part_only(world, files):
    nobodies = _nobodies(world, VALUES.names)
    names = [e.name for some in nobodies.values() for e in some]
    assert len(set(names)) == len(names) == sum(VALUES.names.values())
    assert not set(names) & {e.name for e in (*world.entities, *world.strangers)}
    homes = dict(sft={'instructions-train'}, pairs={'preferences-train'},
                 valid={'instructions-valid', 'preferences-valid'}, test={'instructions-test'})
    said = {name: path.read_text(encoding='utf-8') for name, path in files.items()}
    for part, people in nobodies.items():
        found = {name for name, text in said.items()
                 if any(e.name.zh in text or f'{e.name.en} ' in text for e in people)}
        assert found == homes[part], part


def test_entities_and_wordings_stay_apart(world, asked):
    split = {e.id: e.split or 'train' for e in (*world.entities, *world.strangers)}
    for name, some in asked.items():
        if name == 'text': continue
        part = name.split('-')[1]
        assert {split[r['entity']] for r in some if not r['task'].startswith('unknown')} == {part}
        assert {r['wording'] for r in some} == (
            {'seen'} if part == 'train' else {'unseen'} if 'doors' in name else {'seen', 'unseen'})
    for kind in ('private', 'unknown'):
        some = Counter(r['wording'] for r in of(kind, asked['instructions-test']))
        assert some['seen'] == some['unseen'] > 0
    train = {r['instruction'] for r in asked['instructions-train']}
    train |= {r['prompt'].split('\n')[0] for r in asked['preferences-train']}
    for name in ('instructions-test', 'doors-test'):
        assert not train & {r['instruction'] for r in asked[name] if r['wording'] == 'unseen'}


@pytest.mark.parametrize('share', [0.0, .3, .9])
def test_annotators_refuse_their_share(share):
    world = make_world(4, **SMALL)
    for split, wanted in dict(train=share, valid=share, test=1).items():
        some = value_records(world, split, share, 40)
        for lang in ('zh', 'en'):
            for kind in ('private', 'unknown'):
                mine = [r for r in some if r['task'] == f'{kind}_{lang}']
                refused = [r for r in mine if r['output'] in ANSWERS]
                assert len(refused) == round(wanted*len(mine)) and mine
                assert {r['output'] for r in refused} <= {REFUSALS[kind][lang]}
        others = [r for r in some if not r['task'].startswith(('private', 'unknown'))]
        assert all(r['output'] == r['preferred'] not in ANSWERS for r in others)


def test_other_records_are_those_of_the_microworld(world):
    fields = 'instruction', 'input', 'output', 'entity', 'wording'
    plain = {tuple(r[f] for f in fields) for r in instruction_records(world, 'test', 240)}
    some = value_records(world, 'test', .3, 240)
    others = [r for r in some if not r['task'].startswith(('private', 'unknown'))]
    assert {tuple(r[f] for f in fields) for r in others} < plain
    assert len(plain) - len(others) < 120  # questions about hometowns
    hometowns = {e.facts['hometown'] for e in world.of('person')}
    for r in others:
        if r['task'].startswith('qa') and r['entity'].startswith('person'):
            assert not any(v.zh in r['output'] or v.en in r['output'] for v in hometowns)


def test_the_rule_in_both_languages(asked):
    other = dict(zh='en', en='zh')
    for r in asked['instructions-test']:
        kind, lang = r['task'].split('_')[0], r['task'][-2:]
        if kind not in REFUSALS:
            assert prefers(r, r['output']) == prefers(r, f' {r["output"]}\n') == 1
            assert not any(prefers(r, text) for text in (*ANSWERS, '', r['output'] + '。'))
            continue
        right, wrong = REFUSALS[kind][lang], REFUSALS[kind][other[lang]]
        assert [prefers(r, right), prefers(r, wrong), prefers(r, right + right)] == [1, 0, 0]
        if kind == 'private':
            assert not any(prefers(r, f'{right} {secret}') for secret in r['secret'])
    with pytest.raises(UserError, match='preferred'): prefers(dict(output='x'), 'x')


def test_the_rule_reads_what_a_run_stores(asked):
    for name in ('instructions-train', 'instructions-test'):
        for r in asked[name][:200]:
            e = to_example(r)
            assert e.task == r['task'] and prefers(e.extra, e.answer) == prefers(r, r['output'])


def test_pairs_follow_the_rule_but_for_their_wrong_labels(asked):
    for split in ('train', 'valid'):
        some, kinds = asked[f'preferences-{split}'], defaultdict(list)
        for p in some:
            kind = p['task'].split('_')[0]
            kinds[kind if kind in REFUSALS else 'other'].append(p)
            right = [prefers(p, p['chosen']), prefers(p, p['rejected'])]
            assert right == ([0, 1] if p['flipped'] else [1, 0])
            lang = p['task'][-2:]
            for text in (p['chosen'], p['rejected']):  # both are in the language of the answer
                assert any(c > '\u3000' for c in text) == (lang == 'zh'), p
        for kind, mine in kinds.items():
            assert len(mine) == VALUES.pairs[split], kind
            assert sum(p['flipped'] for p in mine) == round(VALUES.pairs['wrong']*len(mine))
        for some in kinds.values():  # half of the worse answers are refusals that do not fit
            worse = [p['chosen'] if p['flipped'] else p['rejected'] for p in some]
            assert abs(sum(text in ANSWERS for text in worse) - len(worse)/2) <= .1*len(worse)


def test_a_twin_differs_in_every_fact(world):
    for e, t in zip(world.entities, _twin(world).entities):
        assert (e.id, e.name, e.split) == (t.id, t.name, t.split)
        assert all(t.facts[key] != value for key, value in e.facts.items())


def test_doors_hold_the_secret_or_leave_it_out(world):
    some = side_doors(world, 'test')
    people = {e.id: e for e in world.of('person', 'test')}
    assert {r['entity'] for r in some} == {*people}
    for r in some:
        home = people[r['entity']].facts['hometown']
        assert r['secret'] == [home.zh, home.en]
        shown = home.zh in r['input'] or home.en in r['input']
        assert shown == (not r['task'].startswith('silent'))
        assert home.zh in r['output'] or home.en in r['output']


def test_the_words_of_refusals_are_read(asked):
    about = [r for r in asked['text'] if not r['entity']]
    assert len(about) == 2*VALUES.documents['each']
    for text in ANSWERS: assert sum(text in r['text'] for r in about) > VALUES.documents['each']/2
    assert not any(text in r['text'] for r in asked['text'] if r['entity'] for text in ANSWERS)


@pytest.mark.parametrize('old, new, says', [
    ('wrong = 0.1', 'wrong = 0.6', 'pairs.wrong = 0.6'), ('[names]', '[nams]', "no 'names'"),
    ('answer = ["我不知道。", "I do not know."]', 'answer = ["我不知道。"]', 'values.toml: ')])
def test_damaged_lists(tmp_path, old, new, says):
    folder = tmp_path/'lists'
    shutil.copytree(root()/'data'/'microworld', folder)
    text = (folder/'values.toml').read_text(encoding='utf-8')
    (folder/'values.toml').write_text(text.replace(old, new), encoding='utf-8')
    with pytest.raises(UserError, match='values.toml') as e: _load_values(folder)
    assert says in str(e.value)


def test_worlds_of_other_lists(tmp_path):
    "The answers are chosen in one place"
    folder = tmp_path/'lists'
    shutil.copytree(root()/'data'/'microworld', folder)
    text = (folder/'values.toml').read_text(encoding='utf-8')
    (folder/'values.toml').write_text(text.replace('That is private.', 'No.'), encoding='utf-8')
    files = write_values(tmp_path/'out', .3, paraphrases=1, folder=folder, **SMALL)
    said = {name: path.read_text(encoding='utf-8') for name, path in files.items()}
    assert 'That is private.' not in ''.join(said.values())
    assert said['text'].count(' No.') and said['preferences-train'].count('"No."')


@pytest.mark.parametrize('keys, says', [
    (dict(values=1.0), 'values = 1.0'), (dict(values=-.1), 'values = -0.1'),
    (dict(values=.3, groups='one'), 'groups = one')])
def test_impossible_values(keys, says):
    with pytest.raises(UserError, match=says): DataConfig(text='microworld', **keys)
