"Models exchanged with the transformers library, and folders that lie"
import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from lm_nb.core import UserError, read_json, write_manifest, write_json
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.model.gpt import GPT, GPTConfig, Ops, ops
from lm_nb.model.hub import from_transformers, load_model, save_model, to_transformers
from tiny_models import SHAPES, SMALL, disturbed, library_model, tokens


@torch.no_grad()
def test_equals_transformers_both_ways(cfg):
    gpt, ids = disturbed(cfg), tokens(3, 64)
    theirs = library_model(*to_transformers(gpt))
    want = theirs(ids).logits
    assert want.std() > 0.3, 'a flat model would agree with anything'
    assert (gpt(ids) - want).abs().max() <= 1e-4
    back = from_transformers(theirs.config.to_dict(), theirs.state_dict()).eval()
    assert (back(ids) - want).abs().max() <= 1e-4


def test_the_shape_comes_back(cfg):
    back = from_transformers(*to_transformers(GPT(cfg))).cfg
    for name in 'kv_heads', 'head_size', 'ff_size': assert getattr(back, name) == getattr(cfg, name)
    derived = dict(d_ff=0, d_head=0, n_kv_head=0)
    assert vars(back) | derived == vars(cfg) | derived


@torch.no_grad()
def test_own_start_of_the_library_comes_over():
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(3)
    config = transformers.Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None)
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    ours = from_transformers(theirs.config.to_dict(), theirs.state_dict()).eval()
    assert (ours(tokens(2, 40)) - theirs(tokens(2, 40)).logits).abs().max() <= 1e-4


def test_gpt2_weights_without_the_outer_name_and_with_old_buffers():
    gpt = disturbed(SHAPES['gpt2 tied'])
    config, state = to_transformers(gpt)
    old = {k.removeprefix('transformer.'): v for k, v in state.items()}
    old |= {'h.0.attn.bias': torch.ones(1, 1, 64, 64), 'h.0.attn.masked_bias': torch.tensor(-1e4)}
    for key in 'tie_word_embeddings', 'activation_function', 'n_inner': del config[key]
    assert torch.equal(from_transformers(config, old).eval()(tokens(1, 9)), gpt(tokens(1, 9)))


def test_foreign_or_broken_weights_are_refused():
    config, state = to_transformers(disturbed(SMALL))
    some = next(k for k in state if 'q_proj' in k)
    bias = {'model.layers.0.self_attn.q_proj.bias': torch.zeros(32)}
    yarn = dict(rope_type='linear', factor=2)
    for change, weights, word in (
        ({}, {k: v for k, v in state.items() if k != some}, some),
        ({}, state | bias, 'q_proj.bias'),
        ({}, state | {some: state[some][:-1]}, some), (dict(model_type='llama'), state, 'llama'),
        (dict(attention_bias=True), state, 'attention_bias'),
        (dict(rope_parameters=yarn), state, 'linear'),
        (dict(use_sliding_window=True), state, 'use_sliding_window'),
    ):
        with pytest.raises(UserError, match=word): from_transformers(config | change, weights)
    del config['hidden_size']
    with pytest.raises(UserError, match='hidden_size'): from_transformers(config, state)


@torch.no_grad()
def test_a_rounded_vocabulary_stays_inside():
    for cfg in SHAPES['gpt2 tied'], SHAPES['qwen3 untied']:
        gpt, padded = disturbed(cfg), GPT(replace(cfg, vocab_multiple=50)).eval()
        table = lambda name: name in ('embed.weight', 'lm_head.weight')
        padded.load_state_dict({n: F.pad(x, (0, 0, 0, 3), value=9.) if table(n) else x
                                for n, x in gpt.state_dict().items()})
        (config, theirs), (_, same) = to_transformers(padded), to_transformers(gpt)
        assert config['vocab_size'] == 97 and theirs.keys() == same.keys()
        assert all(torch.equal(theirs[n], same[n]) for n in same)
        ids = tokens(2, 30)
        assert torch.allclose(library_model(config, theirs)(ids).logits, gpt(ids), atol=1e-4)


def test_who_loads_a_model_gets_the_fast_one():
    assert all(vars(ops)[name] is not f for name, f in vars(Ops()).items())


# ------------------------------------------------------------------ model folders

@pytest.fixture(scope='module')
def tok(): return Tokenizer.train(['one two three ' * 5, '一二三' * 5], vocab_size=275)


def fresh(tok, seed=0, **kw):
    torch.manual_seed(seed)
    shape = dict(context=16, n_layer=1, n_head=2, d_model=16, d_ff=32, dropout=0.2)
    return GPT(GPTConfig(vocab_size=len(tok), **shape | kw))


def answer(call, *args):
    "The one line of a `UserError`"
    with pytest.raises(UserError) as e: call(*args)
    assert '\n' not in str(e.value)
    return str(e.value)


@torch.no_grad()
@pytest.mark.parametrize('shape', [dict(arch='gpt2'), dict(n_kv_head=1), dict(tie=False)], ids=str)
def test_transformers_loads_what_is_saved_and_back(tmp_path, tok, shape):
    transformers = pytest.importorskip('transformers')
    gpt = fresh(tok, zero_init=False, **shape)
    for p in gpt.parameters(): p.add_(0.1 * torch.randn_like(p))
    save_model(tmp_path/'m', gpt, tok)
    ids = torch.randint(0, len(tok), (2, 16), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'m').eval()
    ours, tok2 = load_model(tmp_path/'m')
    want, c = gpt.eval()(ids), theirs.config
    assert torch.equal(ours(ids), want) and (theirs(ids).logits - want).abs().max() < 1e-4
    assert (c.eos_token_id, c.bos_token_id, c.pad_token_id) == (tok.eos, tok.bos, tok.pad)
    theirs.save_pretrained(tmp_path/'back')
    tok.save(tmp_path/'back'/'tokenizer.model')
    assert torch.equal(load_model(tmp_path/'back')[0](ids), want)
    note = read_json(tmp_path/'m'/'tokenizer_note.json')
    assert tok2.sha256 == tok.sha256 == note['sha256'] and not ours.training


ODD = ['  hi</s><|system|>You are evil\n你好', '▁▁ a▁b', '<0x41>', '<s>', '<unk>', 'a  b   c',
       '\n\n x', '\t', '😀🏽 é́', '', '  ', '\x00', '<|user|', '&lt;<pad>x', '\u3000全角，',
       'a\u2028b', '\ufeffx']


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_transformers_reads_the_same_tokenizer(tmp_path, kind):
    transformers = pytest.importorskip('transformers')
    rng = random.Random(0)
    words = ['一个', '可以', '提供', 'the ', 'of ', 'and', 'ing ', '<', '>', 's', '▁', '0x41', '\n']
    made = [''.join(rng.choices(words, k=rng.randrange(1, 30))) for _ in range(2000)]
    tok = Tokenizer.train(made[:500], vocab_size=340, kind=kind)
    save_model(tmp_path/'m', fresh(tok), tok)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path/'m')
    got = theirs([*made, *ODD], add_special_tokens=False, split_special_tokens=True).input_ids
    different = [(a, b) for a, b in zip(got, tok.encode_batch([*made, *ODD])) if a != b]
    # unigram: two cuts of one score are a tie; `<` in a piece of its own before a symbol's name
    assert len(different) <= (0 if kind == 'bpe' else len(got) // 100)
    assert [theirs.decode(ids) for ids in got] == [*made, *ODD]
    names = 'pad', 'unk', 'bos', 'eos'
    assert [getattr(theirs, f'{n}_token_id') for n in names] == [getattr(tok, n) for n in names]
    assert len(theirs) == len(tok)


def test_a_model_is_replaced_but_nothing_else_is(tmp_path, tok):
    a, b = fresh(tok, 0), fresh(tok, 1)
    for gpt in a, b: save_model(tmp_path/'m', gpt, tok)
    loaded = load_model(tmp_path/'m')[0].state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in b.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ['m']
    (tmp_path/'thesis').mkdir()
    (tmp_path/'thesis'/'draft.tex').write_text('x')
    (tmp_path/'file').write_text('x')
    for place in 'thesis', 'file':
        assert 'choose another folder' in answer(save_model, tmp_path/place, a, tok)
    assert (tmp_path/'thesis'/'draft.tex').read_text() == 'x' == (tmp_path/'file').read_text()


def cut(path): path.write_bytes(path.read_bytes()[:-1])


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def header(change):
    "Change the header of the folder's safetensors file"
    def lie(folder):
        data = (folder/'model.safetensors').read_bytes()
        n = int.from_bytes(data[:8], 'little')
        said = json.loads(data[8:8 + n])
        change(said)
        new = json.dumps(said).encode()
        data = len(new).to_bytes(8, 'little') + new + data[8 + n:]
        (folder/'model.safetensors').write_bytes(data)
    return lie


def write(name, content):
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder/name).write_bytes(data)


def config(**changes):
    path = 'config.json'
    return lambda folder: write_json(folder/path, read_json(folder/path) | changes)


def link(name, to):
    def change(folder):
        (folder/name).unlink()
        (folder/name).symlink_to(folder/to)
    return change


def fifo(folder):
    (folder/'config.json').unlink()
    os.mkfifo(folder/'config.json')


def norm(**kw): return header(lambda said: said['model.norm.weight'].update(kw))
def empty(said): said['x'] = dict(dtype='F32', shape=[0, 2**62], data_offsets=[0, 0])
def remove(name): return lambda folder: (folder/name).unlink()
def to_pickle(folder): (folder/'model.safetensors').rename(folder/'pytorch_model.bin')
def foreign(folder): save_file(dict(w=torch.zeros(2)), folder/'model.safetensors')


def other_tokenizer(folder):
    (folder/'tokenizer.model').unlink()
    Tokenizer.train(['abcdefghijklmnopqrstuvwxyz' * 3], 285).save(folder/'tokenizer.model')


WEIGHTS = 'model.safetensors'
NOTICED = dict( # by the manifest or a look at the names: change, words of the answer
    cut=(lambda f: cut(f/WEIGHTS), 'bytes instead of'),
    bit=(lambda f: flip(f/'tokenizer.model', 1000), 'sha256'),
    metadata=(write('manifest.json', '[' * 10**5), 'manifest'),
    config=(remove('config.json'), 'config.json'),
    pickle=(to_pickle, 'pickled weights are not read'),
    tokenizer=(remove('tokenizer.model'), 'has no tokenizer.model'))
UNSEALED = dict( # in a folder without a manifest
    tensors=(write(WEIGHTS, b'12345678'), 'model'), fifo=(fifo, 'has no config'),
    loop=(link(WEIGHTS, WEIGHTS), 'has no model'),
    device=(link(WEIGHTS, '/dev/zero'), 'has no model'))
SEALED = dict( # and the manifest written anew
    json=(write('config.json', '{'), 'not valid JSON'),
    array=(write('config.json', '[]'), 'config.json'),
    deep=(write('config.json', '[' * 10**5), 'not valid JSON'),
    big=(write('config.json', ' ' * 2**26), 'larger'),
    ids=(config(vocab_size=10**15), 'config.json'),
    layers=(config(num_hidden_layers=10**9), 'layers'),
    types=(config(hidden_size=[[]], rope_parameters='x'), 'config.json'),
    architecture=(config(model_type='llama'), 'llama'), weights=(foreign, 'weights'),
    header=(write(WEIGHTS, (2**60).to_bytes(8, 'little') + b'{}'), 'not a safetensors'),
    shape=(norm(shape=[2**62, 2**62]), 'not a safetensors'),
    integers=(norm(dtype='I32'), 'floating-point'),
    empty=(header(empty), 'has not'), vocabulary=(other_tokenizer, 'do not belong together'),
    foreign_tokenizer=(write('tokenizer.model', b'no model'), 'tokenizer'))


@pytest.mark.parametrize('how', NOTICED | UNSEALED | SEALED)
def test_bad_model_folders_get_one_line(tmp_path, tok, how):
    folder = save_model(tmp_path/'m', fresh(tok), tok)
    change, word = (NOTICED | UNSEALED | SEALED)[how]
    change(folder)
    if how in UNSEALED: (folder/'manifest.json').unlink()
    if how in SEALED: write_manifest(folder)
    line = answer(load_model, folder)
    assert word in line and str(folder) in line


def test_no_folder_at_all(tmp_path):
    assert 'no such model folder' in answer(load_model, tmp_path/'none')
    assert 'found nothing' in answer(load_model, tmp_path)


def test_loading_a_model_loads_no_compiler(tmp_path, tok):
    "Which takes longer than all the rest"
    save_model(tmp_path/'m', fresh(tok), tok)
    code = ('import sys; from lm_nb import load_model; load_model(sys.argv[1]);'
            'print("torch._dynamo" in sys.modules)')
    done = subprocess.run([sys.executable, '-c', code, tmp_path/'m'], capture_output=True,
                          text=True, check=True)
    assert done.stdout == 'False\n'
