"Adapters: what they change and leave, and that the peft library reads and writes the same"
import datetime, os, warnings
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file, save_file

from lm_nb.core import UserError, read_json, write_json
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.inference.sampling import generate
from lm_nb.model.fused import chunked_nll, reference_ops
from lm_nb.model.gpt import _nll
from lm_nb.model.hub import save_model, to_transformers
from lm_nb.model.lora import (
    add_lora, load_adapted, load_adapter, lora_layers, merge_lora, meta_copy, n_trained,
    save_adapter)
from lm_nb.training.optim import OptimConfig, make_optimizers
from tiny_models import SHAPES, close_all, disturbed, targets, tokens

BOTH = {'gpt2': SHAPES['gpt2 tied'], 'qwen3': SHAPES['qwen3 grouped']}


@pytest.fixture(params=BOTH.values(), ids=BOTH.keys())
def cfg(request): return request.param


def trained(cfg, rank=4, on='all', seed=0, **kw):
    "A model whose adapters change much"
    gpt = add_lora(disturbed(cfg), rank, on=on, seed=seed, **kw)
    torch.manual_seed(seed)
    for m in lora_layers(gpt).values(): torch.nn.init.normal_(m.lora_B, std=.2)
    return gpt


def logits(gpt): return gpt(tokens(3, 20))
def far(a, b): return (a - b).abs().max().item()


# --------------------------------------------------------- what learns

def test_it_begins_as_the_model_was_and_only_the_thin_matrices_learn(cfg):
    gpt, plain = add_lora(disturbed(cfg), 4), disturbed(cfg)
    assert torch.equal(logits(gpt), logits(plain))
    ids = tokens(2, 30)
    gpt(ids, targets=targets(ids)).backward()
    learned = {n for n, p in gpt.named_parameters() if p.grad is not None}
    assert learned == {n for n, _ in gpt.named_parameters() if '.lora_' in n}
    grads = {n: p.grad for n, p in gpt.named_parameters() if p.grad is not None}
    assert all((g != 0).any() == n.endswith('B') for n, g in grads.items()), 'B is zero: A waits'
    inside = {id(p) for o in make_optimizers(gpt, OptimConfig()) for g in o.param_groups
              for p in g['params']}
    assert inside == {id(p) for n, p in gpt.named_parameters() if n in learned}


def test_merging_gives_a_plain_model_with_the_same_logits(cfg):
    gpt = trained(cfg)
    want, before = logits(gpt), logits(disturbed(cfg))
    assert far(want, before) > .1
    merged = merge_lora(gpt)
    assert far(logits(merged), want) < 1e-5 and not lora_layers(merged)
    assert n_trained(merged) == merged.n_params() == disturbed(cfg).n_params()
    assert list(merged.state_dict()) == list(disturbed(cfg).state_dict())


def test_fast_equals_plain_and_generates_what_the_merged_model_does(cfg):
    gpt, ids = trained(cfg).train(), tokens(2, 30)
    def loss_and_gradients():
        loss = gpt(ids, targets=targets(ids))
        return [loss.detach(), *torch.autograd.grad(
            loss, [p for p in gpt.parameters() if p.requires_grad])]
    fast = loss_and_gradients()
    with reference_ops(): plain = loss_and_gradients()
    close_all(fast, plain, 1e-4)
    gpt.eval()
    assert torch.equal(generate(gpt, ids, 12), generate(merge_lora(deepcopy(gpt)), ids, 12))


def test_the_loss_of_a_frozen_head_makes_no_gradient_for_it():
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 8, generator=g) for n in (20, 31))
    y, kept = torch.randint(31, (20,), generator=g), []
    def hook(t):
        kept.append(tuple(t.shape))
        return t
    for learns in True, False:
        a = h.clone().requires_grad_()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
            loss = chunked_nll(a, w.clone().requires_grad_(learns), y, rows=8)
        assert ((31, 8) in kept) == learns
        want, = torch.autograd.grad(_nll(x := h.clone().requires_grad_(), w, y, 31), x)
        assert torch.allclose(torch.autograd.grad(loss, a)[0], want, atol=1e-5)


def test_a_copy_without_memory_takes_the_weights():
    gpt = trained(BOTH['qwen3'], on='q_proj down_proj')
    empty = meta_copy(gpt)
    empty.load_state_dict(gpt.state_dict(), assign=True)
    assert torch.equal(logits(empty.eval()), logits(gpt)) and n_trained(empty) == n_trained(gpt)


# --------------------------------------------------------- the peft library

def near(what, ours, got):
    "Logits agree within 1e-5; written down for the table of other programs if LM_NB_RECORD is set"
    equal, of = int(((ours - got).abs() < 1e-5).sum()), ours.numel()
    if os.environ.get('LM_NB_RECORD'):
        path = Path(__file__).parents[2]/'nbs'/'6_use'/'results'/'peft.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        was = read_json(path)['compared'] if path.exists() else []
        rows = {row[0]: row for row in was} | {what: [what, equal, of]}
        write_json(path, dict(program='peft', version=version('peft'),
                              compared=[*rows.values()], date=f'{datetime.date.today()}'))
    assert equal == of, f'{what}: {of - equal} of {of} logits differ'


def theirs(folder):
    "The model of a folder as the transformers library has it"
    transformers = pytest.importorskip('transformers')
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def base(cfg, tmp_path):
    "A folder with the weights of `disturbed(cfg)`"
    config, state = to_transformers(disturbed(cfg))
    (tmp_path/'base').mkdir()
    write_json(tmp_path/'base'/'config.json', config)
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path/'base'/'model.safetensors',
              metadata={'format': 'pt'})
    return tmp_path/'base'


@pytest.mark.parametrize('on', ['all', 'q_proj v_proj', 'o_proj down_proj', 'k_proj'])
def test_peft_loads_what_is_saved_here_and_gives_the_same_logits(cfg, base, on):
    peft = pytest.importorskip('peft')
    gpt = trained(cfg, on=on)
    folder = save_adapter(base.parent/'adapter', gpt, str(base))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)  # as of keys that are missing
        other = peft.PeftModel.from_pretrained(theirs(base), folder)
    with torch.no_grad():
        ours, got = logits(gpt), other(tokens(3, 20)).logits
        near(f'logits of an adapter made here, {cfg.arch}, {on}', ours, got)
        assert far(ours, logits(disturbed(cfg))) > .05
        assert far(ours, other.merge_and_unload()(tokens(3, 20)).logits) < 1e-5
        back = load_adapter(disturbed(cfg), folder)
        assert far(ours, logits(back)) < 1e-5


PEFT = dict(
    plain=dict(r=4, lora_alpha=10),
    rslora=dict(r=4, lora_alpha=3, use_rslora=True),
    patterns=dict(r=4, rank_pattern={'LAST': 2}, alpha_pattern={'FIRST': 3}))

@pytest.mark.parametrize('how', PEFT)
def test_what_peft_saves_loads_here_and_gives_the_same_logits(cfg, base, how):
    peft = pytest.importorskip('peft')
    names = dict(gpt2=['c_attn', 'attn.c_proj', 'mlp.c_proj'],
                 qwen3=['q_proj', 'v_proj', 'down_proj'])[cfg.arch]
    own = {k: {names[-1 if n == 'LAST' else 0]: x for n, x in v.items()} if type(v) is dict else v
           for k, v in PEFT[how].items()}
    config = peft.LoraConfig(task_type='CAUSAL_LM', target_modules=names,
                             fan_in_fan_out=cfg.arch == 'gpt2', **own)
    model = peft.get_peft_model(theirs(base), config).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if 'lora_B' in n: p.normal_(std=.2)
        model.save_pretrained(base.parent/'theirs')
        want = model(tokens(3, 20)).logits
    gpt = load_adapter(disturbed(cfg), base.parent/'theirs')
    near(f'logits of an adapter made there, {cfg.arch}, {how}', logits(gpt), want)
    assert far(want, logits(disturbed(cfg))) > .05
    assert far(logits(merge_lora(gpt)), want) < 1e-5


def test_an_adapter_finds_the_model_that_it_stands_on(tmp_path):
    tok = Tokenizer.train(['The river is green.', '河是绿色的。'] * 9, 270)
    cfg = replace(BOTH['qwen3'], vocab_size=len(tok))
    save_model(tmp_path/'base', disturbed(cfg), tok)
    folder = save_adapter(tmp_path/'adapter', trained(cfg), str(tmp_path/'base'))
    gpt, same = load_adapted(folder)
    assert far(logits(gpt), logits(trained(cfg))) < 1e-5 and same.sha256 == tok.sha256
    (tmp_path/'base').rename(tmp_path/'moved')
    with pytest.raises(UserError, match='stands on the model .*/base, which is no folder here'):
        load_adapted(folder)
    assert far(logits(load_adapted(folder, tmp_path/'moved')[0]), logits(gpt)) == 0


# --------------------------------------------------------- mistakes

def test_asking_for_what_cannot_be_is_one_line(cfg):
    for words, said in {
        (0,): 'lora_rank = 0: must be at least 1', (4, None, 'q_prj'): "did you mean 'q_proj'",
        (33,): 'at most', (4, None, ''): 'there are: all, q_proj', (4, None, 'lm_head'): 'no layer',
    }.items():
        with pytest.raises(UserError, match=said) as e: add_lora(disturbed(cfg), *words)
        assert '\n' not in str(e.value)
    with pytest.raises(UserError, match='has adapters already'):
        add_lora(add_lora(disturbed(cfg)))


def test_a_model_folder_takes_no_adapters(cfg, tmp_path):
    tok = Tokenizer.train(['The river is green.', '河是绿色的。'] * 9, 270)
    cfg = replace(cfg, vocab_size=len(tok))
    folder = save_model(tmp_path/'model', disturbed(cfg), tok)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for where in 'model', 'other':
        with pytest.raises(UserError, match='merge_lora makes .*, save_adapter writes them') as e:
            save_model(tmp_path/where, trained(cfg), tok)
        assert '\n' not in str(e.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ['model']
    save_model(tmp_path/'other', merge_lora(trained(cfg)), tok)


def shorter(cfg):
    return disturbed(replace(cfg, n_layer=1))
def wider(cfg):
    return disturbed(replace(cfg, d_model=64, d_head=cfg.d_head and 16))
def other(cfg): return disturbed(BOTH['gpt2' if cfg.arch == 'qwen3' else 'qwen3'])
def deeper(cfg):
    return disturbed(replace(cfg, n_layer=3))


@pytest.mark.parametrize('model, said', [
    (shorter, 'no linear layer in the 1 blocks of this model'),
    (deeper, 'in 2 layers, the model has 3'), (wider, 'made for another model'),
    (other, 'no linear layer in the 2 blocks of this model')])
def test_an_adapter_of_another_model_is_refused_in_one_line(cfg, tmp_path, model, said):
    folder = save_adapter(tmp_path/'adapter', trained(cfg))
    with pytest.raises(UserError, match=said) as e: load_adapter(model(cfg), folder)
    assert str(e.value).startswith(f'{folder}: ') and '\n' not in str(e.value)


WRONG = [(dict(use_dora=True), 'use_dora = True is not supported'), (dict(peft_type='IA3'), 'IA3'),
         (dict(bias='all'), 'bias = all'), (dict(modules_to_save=['lm_head']), 'modules_to_save'),
         (dict(init_lora_weights='pissa'), 'pissa'), (dict(lora_alpha='big'), 'lora_alpha = big'),
         (dict(alpha_pattern={'(a+)+$': 3}), 'is not the name of a layer')]

@pytest.mark.parametrize('change, said', WRONG)
def test_what_would_be_computed_differently_is_refused(tmp_path, change, said):
    folder = save_adapter(tmp_path/'adapter', trained(BOTH['qwen3']))
    write_json(folder/'adapter_config.json', read_json(folder/'adapter_config.json') | change)
    with pytest.raises(UserError, match=said) as e: load_adapter(disturbed(BOTH['qwen3']), folder)
    assert '\n' not in str(e.value)


def test_files_that_are_missing_or_foreign(tmp_path):
    gpt, folder = disturbed(BOTH['qwen3']), save_adapter(tmp_path/'a', trained(BOTH['qwen3']))
    with pytest.raises(UserError, match='no such adapter folder'): load_adapter(gpt, tmp_path/'x')
    tensors = load_file(folder/'adapter_model.safetensors')
    some = {n: t for n, t in tensors.items() if 'layers.0.self_attn.q_proj.lora_B' not in n}
    more = {**tensors, 'base_model.model.lm_head.lora_A.weight': torch.ones(4, 32)}
    for wrong, said in ((some, 'has no base_model.model.model.layers.0.self_attn.q_proj.lora_B'),
                        (more, 'adapts base_model.model.lm_head.lora_A'),
                        ({'x': torch.ones(2)}, 'adapts x')):
        save_file(wrong, folder/'adapter_model.safetensors')
        with pytest.raises(UserError, match=said): load_adapter(gpt, folder)
    (folder/'adapter_model.safetensors').write_bytes(b'no')
    with pytest.raises(UserError, match='not a safetensors file'): load_adapter(gpt, folder)
    (folder/'adapter_model.safetensors').unlink()
    with pytest.raises(UserError, match='has no adapter_model.safetensors'):
        load_adapter(gpt, folder)
    (tmp_path/'mine').mkdir()
    with pytest.raises(UserError, match='is not an adapter'):
        save_adapter(tmp_path/'mine', trained(BOTH['qwen3']))
    with pytest.raises(UserError, match='has no adapters'): save_adapter(tmp_path/'b', gpt)
    assert not lora_layers(gpt) and gpt.embed.weight.requires_grad, 'the model is as it was'
