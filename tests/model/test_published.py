"Published models: read as transformers reads them, fine-tuned, and handed back"
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('transformers')
pytest.importorskip('tokenizers')
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import logging

from lm_nb.core import UserError
from lm_nb.data.instructions import Example, conversation_ids, encode_examples, prompt_ids
from lm_nb.data.packing import packed_batch
from lm_nb.data.shards import IGNORE, Shards, write_token_shards
from lm_nb.data.order import PretrainBatches, eval_batches
from lm_nb.data.tokenizer import encode_stream, load_tokenizer
from lm_nb.inference.chat import Chat, example_prompts, stop_ids
from lm_nb.model.hub import _fetch, load_model, model_folder, read_shape, save_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from published import CONTROL, QWEN3, record, texts, write_published

logging.disable_progress_bar()
KINDS = 'qwen3', 'gpt2'


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('published')
    return {kind: write_published(tmp/kind, kind) for kind in KINDS}


def answer(call, *args):
    "The one line of a `UserError`"
    with pytest.raises(UserError) as e: call(*args)
    assert '\n' not in str(e.value)
    return str(e.value)


def their_tokenizer(folder, **how):
    return AutoTokenizer.from_pretrained(folder, **how)


# ------------------------------------------------------------------ tokenizer

@pytest.mark.parametrize('kind', KINDS)
def test_ids_are_those_of_the_other_library(folders, kind):
    ours, theirs = load_tokenizer(folders[kind]), their_tokenizer(folders[kind])
    some = texts(2500)
    got = theirs(some, split_special_tokens=True, add_special_tokens=False).input_ids
    rows = ours.encode_batch(some)
    assert rows == got and len(ours) == len(theirs)
    assert [ours.decode(row) for row in rows] == theirs.batch_decode(got)
    assert not {i for row in rows for i in row} & set(ours.controls), 'a text has forged a marker'
    forged = theirs(some, add_special_tokens=False).input_ids
    assert forged != rows, 'the texts hold no marker that could be forged'
    record('transformers', f'published {kind}: ids of texts', len(rows), len(got))


def test_what_is_written_comes_back(folders):
    for kind in KINDS:
        tok = load_tokenizer(folders[kind])
        same = [t for t in texts(300, 1) if kind == 'gpt2' or 'e\u0301' not in t]  # NFC composes
        assert [tok.decode(row) for row in tok.encode_batch(same)] == same
        assert ''.join(map(tok.piece, tok.encode('Paris lies'))) == 'Paris lies' and len(
            tok.pieces('春')) == len(tok.encode('春'))
        assert tok.decode([*stop_ids(tok), len(tok) + 50]) == ''


def test_worker_processes_give_the_same_ids(folders):
    tok, some = load_tokenizer(folders['qwen3']), texts(40)
    [(same, rows), *_] = encode_stream(tok, [some[:20], some[20:]], workers=2)
    assert same == some[:20] and [r.tolist() for r in rows] == tok.encode_batch(some[:20])


def test_names_of_tokens(folders):
    qwen, gpt2 = (load_tokenizer(folders[k]) for k in KINDS)
    text = lambda tok, *ids: [tok.model.id_to_token(i) for i in ids]
    assert text(qwen, qwen.bos, qwen.eos, qwen.pad, qwen.chat.answer[1]) == [
        *['<|endoftext|>']*3, '<|im_end|>']
    assert text(gpt2, gpt2.bos, gpt2.eos, gpt2.pad, gpt2.chat.answer[1]) == ['<|endoftext|>']*4
    assert {text(qwen, i)[0] for i in stop_ids(qwen)} == set(CONTROL)
    assert qwen.sha256 != gpt2.sha256 and len(qwen.sha256) == 64


TALKS = [([], 'What is the capital of France?', ''), ([], '春眠', 'Be brief.'),
         ([('1 + 1?', '2'), ('And 2 + 2?', 'It is 4.')], 'Thanks,  and 3?', '你是助手。')]


def messages(turns, question, system):
    said = [(r, t) for turn in turns for r, t in zip(('user', 'assistant'), turn)]
    said = [('system', system)]*bool(system) + said + [('user', question)]
    return [dict(role=r, content=t) for r, t in said]


def test_prompts_are_those_of_the_chat_template(folders, tmp_path):
    # a text that begins with a line break would be one token with the template's own
    some = [t.strip() or 'x' for t in texts(400, 2, marks=['<think>', '</tool_call>'])]
    talks = TALKS + [([(a, b)], c, d) for a, b, c, d in zip(*[iter(some)]*4)]
    for kind in KINDS:
        ours = load_tokenizer(folders[kind])
        save_model(tmp_path/kind, load_model(folders[kind])[0], ours)  # writes GPT-2's template
        theirs = their_tokenizer(tmp_path/kind)
        for talk in talks:
            want = theirs.apply_chat_template(messages(*talk), add_generation_prompt=True,
                                              return_dict=False)
            assert conversation_ids(ours, *talk) == want, talk
        answered = [*messages(*TALKS[2]), dict(role='assistant', content='6'),
                    dict(role='user', content='Ok')]
        want = theirs.apply_chat_template(answered, add_generation_prompt=True, return_dict=False)
        turns, question, system = TALKS[2]
        assert conversation_ids(ours, [*turns, (question, '6')], 'Ok', system) == want
        record('transformers', f'published {kind}: prompts by the template', len(talks), len(talks))


def test_rows_learn_answers_and_what_closes_them(folders):
    for kind in KINDS:
        tok = load_tokenizer(folders[kind])
        talk = Example('And 2 + 2?', 'It is 4.', 'Be brief.', turns=(('1 + 1?', '2'),))
        [parts] = encode_examples(tok, [talk], 200)
        batch = packed_batch(tok, [[parts]], 200)
        x, y, doc = batch.x[0], batch.y[0], batch.doc[0]
        asked = conversation_ids(tok, talk.turns, talk.prompt, talk.system)
        n = len(asked) + len(tok.encode(talk.answer))
        assert x[:n].tolist() == asked + tok.encode(talk.answer) and (doc[n:] == -1).all()
        learned = y[y != IGNORE].tolist()
        opens, closes = tok.chat.answer
        assert learned == [opens, *tok.encode('2'), closes, opens, *tok.encode('It is 4.'), closes]
        assert prompt_ids(tok, 'x') == conversation_ids(tok, [], 'x')[:-1]
        assert example_prompts(tok, [parts]) == ['1 + 1?']


def test_documents_are_separated_once(folders, tmp_path):
    tok = load_tokenizer(folders['qwen3'])
    docs = [t for t in texts(60, 3) if t]
    write_token_shards(docs, tok, tmp_path/'s')
    shards = Shards(tmp_path/'s', tok)
    ids = shards.tokens(0, len(shards))
    want = [i for t in docs for i in [tok.bos, *tok.encode(t)]]
    assert ids.tolist() == want
    batches = PretrainBatches(shards, 16, rows=2)
    for b in batches(0):
        assert (b.y != IGNORE).all(), 'the end of a document is learned'
        starts = b.x == tok.bos
        assert (b.doc.diff(dim=1) == starts[:, 1:]).all(), 'a document sees what opens it'
    every = torch.cat([b.y[b.y != IGNORE] for b in eval_batches(shards, 16, 4)])
    assert every.tolist() == want[1:]


def template(text): return lambda f: (f/'chat_template.jinja').write_text(text)


def config(**kw):
    def change(folder):
        path = folder/'tokenizer_config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | kw))
    return change


def no_specials(folder):
    path = folder/'tokenizer.json'
    table = json.loads(path.read_text())
    for t in table['added_tokens']: t['special'] = False
    path.write_text(json.dumps(table))


def spaces_lost(folder):
    path = folder/'tokenizer.json'
    lower = dict(normalizer={'type': 'Lowercase'})
    path.write_text(json.dumps(json.loads(path.read_text()) | lower))


def space_in_front(folder):
    path = folder/'tokenizer.json'
    table = json.loads(path.read_text())
    table['pre_tokenizer'] = dict(type='ByteLevel', add_prefix_space=True, trim_offsets=True,
                                  use_regex=True)
    path.write_text(json.dumps(table))


SYSTEM = "{{ '<|im_start|>system\\nYou are Q.<|im_end|>\\n' }}"
BAD_TOKENIZERS = dict(
    llama=(template("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"), 'ChatML'),
    own_system=(template(SYSTEM + QWEN3), 'without a system text of its own'),
    syntax=(template('{% oops %}'), 'the chat template fails'),
    attack=(template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), 'the chat template fails'),
    refuses=(template("{{ raise_exception('no') }}"), 'the chat template fails'),
    damaged=(lambda f: (f/'tokenizer.json').write_bytes(b'{'), 'tokenizer.json cannot be read'),
    no_text=(lambda f: (f/'tokenizer.json').write_bytes(b'\xff'), 'tokenizer.json cannot be read'),
    config=(lambda f: (f/'tokenizer_config.json').write_text('[]'), 'tokenizer_config.json'),
    no_text_template=(config(chat_template=3), 'chat_template is no text'),
    endless=(template('{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}'),
             'the chat template fails'),
    opened=(lambda f: (template('{{ bos_token }}' + QWEN3)(f),
                       config(bos_token='<|endoftext|>')(f)), 'not supported'),
    answers=(lambda f: (f/'generation_config.json').write_text('['), 'generation_config.json'),
    separator=(no_specials, 'names no token between documents'),
    prefix=(space_in_front, 'only byte-level tokenizers'),
    normal=(spaces_lost, 'only byte-level tokenizers'))


@pytest.mark.parametrize('how', BAD_TOKENIZERS)
def test_bad_tokenizers_get_one_line(folders, tmp_path, how):
    change, word = BAD_TOKENIZERS[how]
    shutil.copytree(folders['qwen3'], tmp_path/'m')
    change(tmp_path/'m')
    line = answer(load_model, tmp_path/'m')
    assert word in line and str(tmp_path/'m') in line


def test_templates_are_found_where_they_may_be(folders, tmp_path):
    tok = load_tokenizer(folders['qwen3'])
    said = "{{- m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}"
    assert said in QWEN3
    marked = QWEN3.replace(said, '{% generation %}' + said + '{% endgeneration %}')
    named = [dict(name='default', template=QWEN3)]
    for change in template(QWEN3), config(chat_template=named), template(marked):
        shutil.copytree(folders['qwen3'], tmp_path/'m', dirs_exist_ok=True)
        change(tmp_path/'m')
        assert load_tokenizer(tmp_path/'m').chat == tok.chat


# ------------------------------------------------------------------ model folders

@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
def test_logits_are_those_of_the_other_library(folders, kind):
    assert len(list(folders[kind].glob('*.safetensors'))) > 1
    gpt, tok = load_model(folders[kind])
    theirs = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32).eval()
    for p in theirs.parameters(): assert p.dtype == torch.float32
    ids = torch.randint(512, (3, 60), generator=torch.Generator().manual_seed(0))
    want = theirs(ids).logits
    near = (gpt(ids) - want).abs() <= 1e-5
    assert near.all() and want.std() > .05
    record('transformers', f'published {kind}: logits within 1e-5', int(near.sum()), near.numel())
    assert gpt.cfg.context == (40960 if kind == 'qwen3' else 128) and gpt.cfg.vocab_size == 512


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
def test_what_leaves_is_complete_and_comes_back(folders, tmp_path, kind):
    gpt, tok = load_model(folders[kind])
    save_model(tmp_path/'m', gpt, tok)
    again, same = load_model(tmp_path/'m')
    ids = torch.randint(512, (2, 50), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path/'m').eval()
    assert torch.equal(again(ids), gpt(ids)) and same.sha256 == tok.sha256
    assert (theirs(ids).logits - gpt(ids)).abs().max() <= 1e-5
    for name in 'tokenizer.json', 'tokenizer_config.json':
        assert (tmp_path/'m'/name).read_bytes() == (folders[kind]/name).read_bytes()
    assert set(theirs.generation_config.eos_token_id) == {tok.chat.answer[1], tok.eos}
    asked = conversation_ids(tok, [], 'What is the capital of France?')
    want = theirs.generate(torch.tensor([asked]), max_new_tokens=12, do_sample=False)
    chat = Chat(gpt, tok, max_new=12, temperature=0)
    assert chat.ask('What is the capital of France?') == tok.decode(want[0, len(asked):].tolist())


@pytest.mark.parametrize('kind', KINDS)
def test_the_card_of_what_leaves_holds(folders, tmp_path, kind):
    gpt, tok = load_model(folders[kind])
    card = (save_model(tmp_path/'m', gpt, tok)/'README.md').read_text()
    assert 'the licences of its training text and of the published model allow' in card
    write = pipeline('text-generation', str(tmp_path/'m'))  # up to 256 tokens; gpt2 has 128 places
    assert write([dict(role='user', content='Hello!')])[0]['generated_text'][-1]['content']


def remove(name): return lambda f: next(f.glob(name)).unlink()


def index(change):
    def write(folder):
        path = folder/'model.safetensors.index.json'
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return write


def moved(table, to):
    name = next(iter(table['weight_map']))
    table['weight_map'][name] = to
    return table


def elsewhere(table):
    name, file = next(iter(table['weight_map'].items()))
    other = next(f for f in table['weight_map'].values() if f != file)
    return moved(table, other)


def model_config(**kw):
    def change(folder):
        path = folder/'config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | kw))
    return change


BAD_FOLDERS = dict(
    part=(remove('model-00002*'), 'has no model-00002'),
    architecture=(model_config(model_type='llama'), 'model_type = llama: only gpt2 and qwen3'),
    tokenizer=(remove('tokenizer.json'), 'has no tokenizer'),
    no_map=(index(lambda t: {}), 'has no weight_map'),
    outside=(index(lambda t: moved(t, '../x.safetensors')), 'no name of a safetensors file'),
    elsewhere=(index(elsewhere), 'which model.safetensors.index.json names'),
    sizes=(model_config(vocab_size=300), 'config.json asks for another'),
    kind=(model_config(model_type=['qwen3']), 'only gpt2 and qwen3'),
    number=(model_config(rms_norm_eps='small'), 'does not describe a model'),
    scaled=(model_config(rope_parameters=None, rope_scaling=dict(type='yarn', factor=4.)), 'yarn'),
    bias=(model_config(attention_bias=True), 'attention_bias'),
    yarn=(model_config(rope_parameters=dict(rope_type='yarn')), 'yarn'))


@pytest.mark.parametrize('how', BAD_FOLDERS)
def test_bad_folders_get_one_line(folders, tmp_path, how):
    change, word = BAD_FOLDERS[how]
    shutil.copytree(folders['qwen3'], tmp_path/'m')
    change(tmp_path/'m')
    line = answer(load_model, tmp_path/'m')
    assert word in line and str(tmp_path/'m') in line
    if how in ('kind', 'number', 'scaled'):  # what a recipe reads
        assert word in answer(read_shape, tmp_path/'m'/'config.json')


def test_a_tokenizer_of_another_model_is_noticed(tmp_path):
    write_published(tmp_path/'m', vocab=300)
    assert 'do not belong together' in answer(load_model, tmp_path/'m')


def test_a_name_on_the_hub(tmp_path, monkeypatch, folders):
    "A model in the hub's cache is found without a network; another gives one line"
    from huggingface_hub import constants
    at = tmp_path/'models--someone--small'
    shutil.copytree(folders['qwen3'], at/'snapshots'/'abc')
    (at/'refs').mkdir()
    (at/'refs'/'main').write_text('abc')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub._snapshot_download.constants.HF_HUB_CACHE', str(tmp_path))
    _fetch.cache_clear()
    assert model_folder('hf:someone/small') == at/'snapshots'/'abc'
    assert load_model(model_folder('hf:someone/small'))[1].sha256 == load_tokenizer(
        folders['qwen3']).sha256
    line = answer(model_folder, 'hf:someone/else')
    assert line.startswith('hf:someone/else: cannot be fetched') and 'give its folder' in line
    _fetch.cache_clear()
