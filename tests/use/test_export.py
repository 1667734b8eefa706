"Exports, each opened by the program that it is for: the same ids, logits and answers"
import json
import os
import stat
import urllib.request

import pytest
import torch

from lm_nb.cli import main
from lm_nb.core import UserError
from lm_nb.data.instructions import conversation_ids
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.inference.chat import answer
from lm_nb.inference.sampling import generate
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.model.hub import load_model, save_model
from lm_nb.training.recipe import load_recipe
from lm_nb.training.run import Run
from lm_nb.use.export import export_model, write_gguf

from taught import FACTS
from published import write_published
from foreign import record, texts

ARCHS = 'qwen3', 'gpt2'
ASKED = [*FACTS][:20]


@pytest.fixture(scope='module')
def folders(tmp_path_factory, trained, tok):
    "arch -> a model folder"
    tmp = tmp_path_factory.mktemp('m')
    return {arch: save_model(tmp/arch, trained(arch), tok) for arch in ARCHS}


class Llama:
    "llama.cpp with a model, asked through its server"
    def __init__(self, path):
        xllamacpp = pytest.importorskip('xllamacpp')
        p = xllamacpp.CommonParams()
        p.model.path, p.n_ctx, p.n_parallel, p.port, p.verbosity = str(path), 0, 1, 0, 0
        p.cpuparams.n_threads, p.warmup, p.use_jinja = 1, False, True
        self.server = xllamacpp.Server(p)

    def __call__(self, what, **body):
        url, data = f'{self.server.listening_address}/{what}', json.dumps(body).encode()
        request = urllib.request.Request(url, data, {'Content-Type': 'application/json'})
        return json.load(urllib.request.urlopen(request))


# ------------------------------------------------------------------ llama.cpp

def test_llama_cpp_reads_the_same_ids(tmp_path, tok):
    pytest.importorskip('gguf')
    shape = dict(n_layer=1, n_head=1, d_model=32, d_ff=32, context=64)
    gpt = GPT(GPTConfig(vocab_size=len(tok) + 3, **shape))
    ask = Llama(write_gguf(tmp_path/'m.gguf', gpt, tok, 'f32'))
    some = [t for t in texts()[::3] if len(t) < 3000]
    plain = [t for t in some if '▁' not in t]
    got = [ask('tokenize', content=t, add_special=False, parse_special=False)['tokens']
           for t in plain]
    same = sum(a == b for a, b in zip(got, tok.encode_batch(plain)))
    assert same == len(plain) >= 1500
    assert ask('tokenize', content='hi', add_special=True)['tokens'] == [tok.bos, *tok.encode('hi')]
    record('xllamacpp', 'ids of texts without a literal ▁', same, len(plain))


@pytest.mark.parametrize('quant', ['f32', 'f16', 'q8_0'])
@pytest.mark.parametrize('arch', ARCHS)
def test_llama_cpp_gives_the_same_answers(tmp_path, folders, arch, quant):
    pytest.importorskip('gguf')
    gpt, tok = load_model(folders[arch])
    path, = export_model(folders[arch], 'gguf', tmp_path, quant)
    assert path == tmp_path/f'{arch}-{quant}.gguf'
    ask, same = Llama(path), 0
    for q in ASKED:
        said = ask('v1/chat/completions', messages=[dict(role='user', content=q)], temperature=0,
                   max_tokens=60)
        assert said['usage']['prompt_tokens'] == len(conversation_ids(tok, [], q))
        same += said['choices'][0]['message']['content'] == answer(gpt, tok, q) == FACTS[q]
    assert same == len(ASKED) or quant == 'q8_0'
    record('xllamacpp', f'greedy answers, {arch}, {quant}', same, len(ASKED))


@pytest.mark.parametrize('arch', ARCHS)
def test_llama_cpp_lays_out_a_whole_conversation_and_continues_a_text(tmp_path, folders, arch):
    pytest.importorskip('gguf')
    gpt, tok = load_model(folders[arch])
    ask = Llama(export_model(folders[arch], 'gguf', tmp_path, 'f32')[0])
    (q, a), *_ = FACTS.items()
    said = [dict(role='system', content='Be brief.'), dict(role='user', content=q),
            dict(role='assistant', content=a), dict(role='user', content=q)]
    prompt = ask('apply-template', messages=said)['prompt']
    ids = ask('tokenize', content=prompt, add_special=True, parse_special=True)['tokens']
    assert ids == conversation_ids(tok, [(q, a)], q, 'Be brief.')
    row = torch.tensor([[tok.bos, *tok.encode('What is')]])
    ours = tok.decode(generate(gpt, row, 6, eos=tok.eos)[0])
    assert 'What is' + ask('completion', prompt='What is', temperature=0,
                           n_predict=6)['content'] == ours


def test_a_base_model_says_nothing_of_conversations(tmp_path, trained, tok):
    gguf = pytest.importorskip('gguf')
    base = save_model(tmp_path/'base', trained('qwen3'), tok, chat=False)
    modelfile, file = export_model(base, 'ollama', tmp_path)
    assert 'tokenizer.chat_template' not in gguf.GGUFReader(file).fields
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile.read_text()


# ------------------------------------------------------------------ ollama, onnx

def test_a_modelfile_names_what_lies_beside_it(tmp_path, folders):
    pytest.importorskip('gguf')
    modelfile, file = export_model(folders['qwen3'], 'ollama', tmp_path)
    lines = modelfile.read_text().splitlines()
    assert lines[0] == f'FROM ./{file.name}' and file.parent == modelfile.parent == tmp_path
    assert 'PARAMETER num_ctx 96' in lines and 'PARAMETER stop "</s>"' in lines
    assert 'generation' not in modelfile.read_text()
    other, _ = export_model(folders['qwen3'], 'ollama', tmp_path, 'q8_0')  # beside the first
    assert other != modelfile and 'q8_0' in other.read_text()


@torch.no_grad()
@pytest.mark.parametrize('arch', ARCHS)
def test_onnxruntime_computes_the_same(tmp_path, folders, arch):
    pytest.importorskip('onnx'), pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    gpt, tok = load_model(folders[arch])
    path, = export_model(folders[arch], 'onnx', tmp_path)
    session, gap, n = onnxruntime.InferenceSession(path), 0., 0
    def logits(ids, mask):
        feed = dict(input_ids=ids.numpy(), attention_mask=mask.numpy())
        return torch.from_numpy(session.run(None, feed)[0])
    for i, shape in enumerate(((1, 1), (1, 2), (3, 5), (5, 33), (2, 96))):
        ids = torch.randint(6, 480, shape, generator=torch.Generator().manual_seed(i))
        want, pad = gpt(ids), min(3, 96 - shape[1])
        row, mask = (torch.nn.functional.pad(x, (pad, 0)) for x in (ids, torch.ones_like(ids)))
        for got in logits(ids, torch.ones_like(ids)), logits(row, mask)[:, pad:]:
            gap, n = max(gap, (got - want).abs().max().item()), n + got.numel()
    assert gap <= 1e-4 and want.std() > 1
    assert b'/lm_nb' not in path.read_bytes(), 'a file that tells where it was made'
    record('onnxruntime', f'logits within 1e-4, {arch}', n, n)
    same = 0
    for q in ASKED:
        ids = conversation_ids(tok, [], q)
        asked = len(ids)
        while ids[-1] != tok.eos and len(ids) < 90:
            row = torch.tensor([ids])
            ids.append(int(logits(row, torch.ones_like(row))[0, -1].argmax()))
        same += tok.decode(ids[asked:]) == answer(gpt, tok, q) == FACTS[q]
    assert same == len(ASKED)
    record('onnxruntime', f'greedy answers, {arch}', same, len(ASKED))


# ------------------------------------------------------------------ files and mistakes

def refusal(*args, **kw):
    with pytest.raises(UserError) as e: export_model(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)


def test_nothing_is_overwritten_and_nothing_is_left_half_done(tmp_path, folders, monkeypatch):
    gguf = pytest.importorskip('gguf')
    file, = export_model(folders['qwen3'], 'gguf', tmp_path)
    before = file.read_bytes()
    assert export_model(folders['qwen3'], 'gguf', tmp_path) == [file]  # the same is no harm
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask()
    file.write_bytes(b'mine')
    assert 'exists already' in refusal(folders['qwen3'], 'gguf', tmp_path)
    assert 'exists already' in refusal(folders['qwen3'], 'ollama', tmp_path)
    assert file.read_bytes() == b'mine' and [p.name for p in tmp_path.iterdir()] == [file.name]
    file.unlink()
    monkeypatch.setattr(gguf.GGUFWriter, 'write_tensors_to_file', lambda self: 1/0)
    with pytest.raises(ZeroDivisionError): export_model(folders['qwen3'], 'gguf', tmp_path)
    assert not [*tmp_path.iterdir()] and before


def umask():
    os.umask(mask := os.umask(0))
    return mask


def test_mistakes_get_one_line(tmp_path, folders, tok):
    folder = folders['qwen3']
    assert "did you mean 'gguf'" in refusal(folder, 'guff', tmp_path)
    assert 'f32, f16, q8_0' in refusal(folder, 'gguf', tmp_path, 'q4')
    assert 'float32' in refusal(folder, 'onnx', tmp_path, 'f16')
    odd = GPT(GPTConfig(vocab_size=len(tok), n_layer=1, n_head=1, d_model=40, context=8))
    save_model(tmp_path/'odd', odd, tok)
    assert 'rows of 40' in refusal(tmp_path/'odd', 'gguf', tmp_path, 'q8_0')
    assert 'no such model folder' in refusal(tmp_path/'none', 'gguf')
    (tmp_path/'odd'/'tokenizer.model').unlink()
    assert 'has no tokenizer.model' in refusal(tmp_path/'odd', 'gguf')
    small = GPT(GPTConfig(vocab_size=len(tok), n_layer=1, d_model=32))
    old = save_model(tmp_path/'old', small, tok)
    for name in ('generation_config.json', 'manifest.json'): (old/name).unlink()
    assert 'save it again' in refusal(old, 'gguf', tmp_path)
    uni = Tokenizer.train(FACTS, 320)
    save_model(tmp_path/'uni', GPT(GPTConfig(vocab_size=320, n_layer=1, d_model=32)), uni)
    assert 'kind=bpe' in refusal(tmp_path/'uni', 'gguf', tmp_path)
    assert 'kind=bpe' in refusal(tmp_path/'uni', 'ollama', tmp_path)


@pytest.mark.parametrize('form', ['gguf', 'ollama'])
def test_a_published_tokenizer_is_refused_for_llama_cpp(tmp_path, form):
    pytest.importorskip('gguf')
    folder = write_published(tmp_path/'m', 'gpt2')
    with pytest.raises(UserError, match='came with a published model.*export to onnx'):
        export_model(folder, form)
    assert not (tmp_path/'export').exists()


def test_a_missing_package_is_named(tmp_path, folders, monkeypatch):
    for name, form in (('gguf', 'gguf'), ('onnxscript', 'onnx')):
        monkeypatch.setitem(__import__('sys').modules, name, None)
        assert "lm_nb[export]" in refusal(folders['qwen3'], form, tmp_path)


# ------------------------------------------------------------------ the command

@pytest.fixture
def run(tmp_path, trained, tok):
    "A run with both models"
    folder = tmp_path/'mine'
    Run(load_recipe('micro'), folder)
    for name, chat in (('base', False), ('chat', True)):
        save_model(folder/name, trained('qwen3'), tok, chat)
    return folder


def test_the_command_takes_a_run_or_a_model(run, capsys):
    pytest.importorskip('gguf')
    for words, made in (([run, 'gguf'], ['mine-chat-f16.gguf']),
                        ([run, 'gguf', 'model=base', 'quant=q8_0'], ['mine-base-q8_0.gguf']),
                        (['micro', 'gguf', f'run_dir={run}'], ['mine-chat-f16.gguf']),
                        ([run/'base', 'ollama'],
                         ['mine-base-f16.Modelfile', 'mine-base-f16.gguf'])):
        assert main(['export', *map(str, words)]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said == [str(run/'export'/name) for name in made]


@pytest.mark.parametrize('words, said', [
    ((), 'as in  lm-nb export'), (('gguf', 'onnx'), 'as in  lm-nb export'), (('ggml',), 'gguf'),
    (('gguf', 'quant=4'), 'f32, f16, q8_0'), (('gguf', 'qant=f16'), "did you mean 'quant'"),
    (('gguf', 'model=aligned'), 'no aligned model')])
def test_a_mistake_in_the_command_is_one_line(run, capsys, words, said):
    assert main(['export', str(run), *words]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count('\n') == 1 and line.startswith('lm-nb: ')
