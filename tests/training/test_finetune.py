"A published model is fine-tuned by the command line, and what comes out is still one"
import io
import json
import random
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

pytest.importorskip('transformers')
pytest.importorskip('tokenizers')
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lm_nb.bench.plan import plan_run
from lm_nb.bench.sizes import sized_recipe
from lm_nb.cli import main
from lm_nb.core import UserError, read_json
from lm_nb.data.instructions import conversation_ids
from lm_nb.inference.chat import Chat
from lm_nb.model.estimate import flops_per_token
from lm_nb.model.gpt import GPTConfig
from lm_nb.model.hub import _fetch, load_model
from lm_nb.model.lora import load_adapted
from lm_nb.training.monitor import read_log
from lm_nb.training.recipe import Feed, load_recipe
from lm_nb.training.run import Run
from lm_nb.training.stage import _fastest_kernel, run_stage

sys.path.insert(0, str(Path(__file__).parents[1]))
from published import record, texts, write_published

logging.disable_progress_bar()
PLACES = ['Paris', 'Rome', 'Oslo', 'Lima', 'Bern', 'Kyiv']


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Two published models, records and a text"
    tmp, dice = tmp_path_factory.mktemp('finetune'), random.Random(0)
    asks = [dict(instruction=f'Say {p} {n}.', output=f'{p}!') for n in range(30) for p in PLACES]
    dice.shuffle(asks)
    asks.append(dict(messages=[dict(role=r, content=t) for r, t in (
        ('system', 'Shout.'), ('user', 'Say Rome.'), ('assistant', 'ROME!'), ('user', 'Again'),
        ('assistant', 'ROME!'))]))
    (tmp/'asks.jsonl').write_text(''.join(json.dumps(a) + '\n' for a in asks))
    docs = [dict(text=t) for t in texts(200, 5, marks=[])]
    (tmp/'text.jsonl').write_text(''.join(json.dumps(d) + '\n' for d in docs))
    for kind in 'qwen3', 'gpt2': write_published(tmp/kind, kind)
    return tmp


def words(made, kind='qwen3', **more):
    pairs = dict(base=made/kind, instructions=made/'asks.jsonl', context=96, batch_tokens=480,
                 device='cpu', dtype='fp32', lr=.01, valid_share=.1, warmup=2, log_every=1,
                 save_every=5, eval_every=10, sample_every=1000) | {'sft.tokens': 60*480} | more
    return [f'{k}={v}' for k, v in pairs.items() if v is not None]


@pytest.mark.parametrize('kind', ['qwen3', 'gpt2'])
def test_from_the_command_line(made, tmp_path, kind, capsys, monkeypatch):
    run, steps = tmp_path/kind, 60 if kind == 'qwen3' else 150
    more = words(made, kind, **{'sft.tokens': steps*480, 'save_every': 1000})
    assert main(['sft', 'finetune', *more, f'run_dir={run}']) == 0, capsys.readouterr()
    points = [r['loss'] for r in read_log(run/'sft') if 'loss' in r]
    assert points[-1] < points[0] - 2, 'the loss has hardly fallen'
    gpt, tok = load_model(run/'chat')
    theirs, their_tok = AutoModelForCausalLM.from_pretrained(run/'chat').eval(), \
        AutoTokenizer.from_pretrained(run/'chat')
    assert gpt.cfg.context == (40960 if kind == 'qwen3' else 128)
    for name in 'tokenizer.json', 'tokenizer_config.json':
        assert (run/'chat'/name).read_bytes() == (made/kind/name).read_bytes()
    got = [Chat(gpt, tok, temperature=0, max_new=12).ask(f'Say {p} 99.') for p in PLACES]
    assert sum(a == f'{p}!' for a, p in zip(got, PLACES)) >= 4, got
    for place, ours in zip(PLACES, got):
        said = [dict(role='user', content=f'Say {place} 99.')]
        ids = their_tok.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        assert ids == conversation_ids(tok, [], said[0]['content'])
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids):]
        assert their_tok.decode(out, skip_special_tokens=True) == ours
    record('transformers', f'published {kind}, fine-tuned: greedy answers', len(got), len(got))
    monkeypatch.setattr(sys, 'stdin', io.StringIO('Say Rome 99.\n'))
    capsys.readouterr()
    assert main(['chat', 'finetune', f'run_dir={run}', 'device=cpu', 'temperature=0']) == 0
    assert got[1] in capsys.readouterr().out
    (tmp_path/'q.csv').write_text('question,A,B,answer\nWhere?,Rome,Oslo,A\n')
    assert main(['choice', str(run), f'file={tmp_path/"q.csv"}', 'device=cpu']) == 0
    assert f'what {made/kind} was trained on is not here' in capsys.readouterr().err
    assert main(['generate', str(run), 'prompt=Rome', 'max_new=2', 'device=cpu']) == 0
    assert capsys.readouterr().out.startswith('Rome')


def test_a_stopped_run_goes_on_to_the_same_weights(made, tmp_path):
    recipe = load_recipe('finetune', words(made))
    whole = run_stage(Run(recipe, tmp_path/'whole'), 'sft')
    for _ in range(3):
        with suppress(KeyboardInterrupt): _stopping(Run(recipe, tmp_path/'parts'), 5*12)
    assert 25 < max(r['step'] for r in read_log(tmp_path/'parts'/'sft')) < 60
    parts = run_stage(Run(recipe, tmp_path/'parts'), 'sft')
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))


def _stopping(run, after):
    "Run the stage, and break off in the middle of a step after so many micro-batches"
    from lm_nb.training.recipe import find_stage, register_stage
    from dataclasses import replace
    sft, seen = find_stage('sft'), []
    def loss(model, batch):
        seen.append(1)
        if len(seen) > after: raise KeyboardInterrupt
        return sft.loss(model, batch)
    register_stage(replace(sft, loss=loss))
    try: run_stage(run, 'sft')
    finally: register_stage(sft)


def test_speed_is_that_of_the_rows_and_not_of_all_that_the_base_could_read(made, tmp_path):
    run = Run(load_recipe('finetune', words(made, **{'sft.tokens': 3*480})), tmp_path/'run')
    run_stage(run, 'sft')
    point = next(p for p in read_log(run.folder/'sft') if 'mfu' in p)
    cfg = load_model(made/'qwen3')[0].cfg
    rate = point['mfu'] * point['peak_tflops'] * 1e12
    assert cfg.context == 40960
    assert rate == pytest.approx(point['tokens_per_s'] * flops_per_token(cfg, 96), rel=1e-6)


def test_attention_is_chosen_for_rows_as_they_are(monkeypatch):
    seen = []
    monkeypatch.setattr('lm_nb.training.stage.pick_attention',
                        lambda cfg, rows, *how: seen.append((cfg.context, rows)) or 'auto')
    x = torch.zeros(2, 8, dtype=torch.int64)
    feed = Feed(lambda step: [(x, x)])
    _fastest_kernel(GPTConfig(context=40960), feed, torch.device('cuda'), 'bf16')
    assert seen == [(8, 2)]


def adapter_words(made, kind, **more):
    return words(made, kind, **dict(lora_rank=8, lora_lr=.03, lr=None) | more)


def adapter(run): return run/'sft'/'adapter'


@pytest.fixture(scope='module', params=['qwen3', 'gpt2'])
def adapted(request, made, tmp_path_factory):
    "(kind, run) of a published model with adapters, from the command line"
    kind, run = request.param, tmp_path_factory.mktemp('adapted')/'run'
    assert main(['sft', 'finetune', *adapter_words(made, kind), f'run_dir={run}']) == 0
    return kind, run


def far(a, b): return (a - b).abs().max().item()


def test_adapters_learn_and_the_published_weights_stay(made, adapted):
    kind, run = adapted
    points = [r['loss'] for r in read_log(run/'sft') if 'loss' in r]
    # not by much: the head is random, small and frozen
    assert points[-1] < points[0] - .15, 'the loss has hardly fallen'
    was, now = (load_model(f)[0].state_dict() for f in (made/kind, run/'chat'))
    changed = {n for n in was if not torch.equal(was[n], now[n])}
    assert changed == {n for n in was if n.endswith('_proj.weight')}
    for name in 'tokenizer.json', 'tokenizer_config.json':
        assert (run/'chat'/name).read_bytes() == (made/kind/name).read_bytes()


def test_peft_puts_the_adapter_on_the_published_folder(made, adapted):
    peft, (kind, run) = pytest.importorskip('peft'), adapted
    assert len(list((made/kind).glob('model-*.safetensors'))) > 1
    config = read_json(adapter(run)/'adapter_config.json')
    assert config['base_model_name_or_path'] == str((made/kind).resolve())
    other = peft.AutoPeftModelForCausalLM.from_pretrained(adapter(run), dtype=torch.float32).eval()
    ids = torch.randint(400, (4, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): want, plain = other(ids).logits, other.unload()(ids).logits
    here, chat = load_adapted(adapter(run))[0](ids), load_model(run/'chat')[0](ids)
    record('peft', f'logits of an adapter on a published {kind} (bf16, several files)',
           int(((here - want).abs() < 1e-5).sum()), want.numel())
    assert far(here, want) < 1e-5 and far(chat, want) < 1e-5 and far(plain, want) > .1


def test_a_stopped_run_goes_on_to_the_same_adapter(made, adapted, tmp_path):
    kind, run = adapted
    recipe = load_recipe('finetune', adapter_words(made, kind))
    for _ in range(2):
        with suppress(KeyboardInterrupt): _stopping(Run(recipe, tmp_path/'parts'), 5*12)
    assert 10 < max(r['step'] for r in read_log(tmp_path/'parts'/'sft')) < 60
    run_stage(Run(recipe, tmp_path/'parts'), 'sft')
    for file in 'sft/adapter/adapter_model.safetensors', 'chat/model.safetensors':
        assert (tmp_path/'parts'/file).read_bytes() == (run/file).read_bytes()


def test_chat_and_serve_take_the_adapter_of_a_published_model(
    made, adapted, capsys, monkeypatch):
    kind, run = adapted
    def said(*more):
        monkeypatch.setattr(sys, 'stdin', io.StringIO('Say Rome 99.\nSay Oslo 99.\n'))
        assert main(['chat', 'finetune', f'run_dir={run}', 'device=cpu', 'temperature=0',
                     'max_new=12', *more]) == 0
        return capsys.readouterr().out
    assert said(f'adapter={adapter(run)}') == said()
    served = []
    monkeypatch.setattr('lm_nb.use.serve.serve_models',
                        lambda models, *rest, **kw: served.extend(models))
    assert main(['serve', str(made/kind), 'device=cpu', f'adapter={adapter(run)}']) == 0
    names, ids = [s.name for s in served], torch.arange(20)[None]
    assert [n.rpartition('/')[2] for n in names] == [kind, 'adapter']
    assert far(served[1].gpt(ids), load_model(run/'chat')[0](ids)) < 1e-5
    assert far(served[0].gpt(ids), served[1].gpt(ids)) > .1


def test_an_adapter_of_a_model_on_the_hub_names_it_as_the_hub_does(made, tmp_path, monkeypatch):
    def download(name, **kw):
        assert name == 'someone/small'
        return str(made/'qwen3')
    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    monkeypatch.setattr('lm_nb.model.hub._fetch', _fetch.__wrapped__)  # nothing is remembered
    keys = adapter_words(made, 'qwen3', base='hf:someone/small', **{'sft.tokens': 4800})
    run_stage(Run(load_recipe('finetune', keys), tmp_path/'r'), 'sft')
    config = read_json(adapter(tmp_path/'r')/'adapter_config.json')
    assert config['base_model_name_or_path'] == 'someone/small'
    ids, chat = torch.arange(20)[None], load_model(tmp_path/'r'/'chat')[0]
    assert far(load_adapted(adapter(tmp_path/'r'))[0](ids), chat(ids)) < 1e-5
    def gone(name, **kw): raise OSError('no network')
    monkeypatch.setattr('huggingface_hub.snapshot_download', gone)
    with pytest.raises(UserError, match='/adapter: hf:someone/small: cannot be fetched') as e:
        load_adapted(adapter(tmp_path/'r'))
    assert '\n' not in str(e.value)


def test_text_is_read_again_by_the_tokenizer_of_the_base(made, tmp_path):
    more = dict(text=made/'text.jsonl', replay=.5, clean='none', dedup='none')
    recipe = load_recipe('finetune', words(made, **more, **{'sft.tokens': 4800}))
    run = Run(recipe, tmp_path/'r')
    run_stage(run, 'sft')
    assert run.shards.train[0].index['tokenizer'] == load_model(made/'qwen3')[1].sha256
    assert not (tmp_path/'r'/'tokenizer').exists()


def test_the_recipe_has_the_shape_of_its_base(made):
    recipe = load_recipe('finetune', words(made))
    c = recipe.model
    assert (c.vocab_size, c.d_model, c.n_layer, c.kv_heads, c.context) == (512, 32, 2, 2, 96)
    plan = plan_run(recipe, budget=0)
    assert 'embedding 16,384' in str(plan), plan
    sized = sized_recipe('own', [f'base={made/"qwen3"}', f'instructions={made/"asks.jsonl"}',
                                 'minutes=1', 'device=cpu', 'dtype=fp32'], log=lambda line: None)
    assert sized.model.d_model == 32 and sized.model.context <= 512


@pytest.mark.parametrize('change, said', [
    (dict(n_layer=3), 'the model is that of base='), (dict(context=256), ''),
    (dict(vocab_size=300), 'vocab_size = 300 has no effect: the tokenizer is that of base='),
    (dict(base='nowhere'), 'base='), (dict(base='hf:someone/nothing'), 'cannot be fetched')])
def test_mistakes_get_one_line(made, tmp_path, monkeypatch, change, said):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    kind = 'gpt2' if 'context' in change else 'qwen3'
    with pytest.raises(UserError) as e:
        run_stage(Run(load_recipe('finetune', words(made, kind, **change)), tmp_path/'r'), 'sft')
    said = said or "context = 256 is longer than the base model's 128"
    assert said in str(e.value) and '\n' not in str(e.value)


def test_the_kind_of_a_tokenizer_is_held_against_the_base(made, tmp_path):
    load_recipe('finetune', words(made, **{'tokenizer.kind': 'bpe'}))  # what it has: nothing to say
    for f in (made/'qwen3').iterdir(): (tmp_path/f.name).symlink_to(f)
    (tmp_path/'tokenizer.json').unlink()
    other = read_json(made/'qwen3'/'tokenizer.json')
    other['model']['type'] = 'Unigram'
    (tmp_path/'tokenizer.json').write_text(json.dumps(other))
    with pytest.raises(UserError, match='kind = bpe has no effect: the tokenizer is that of base='):
        load_recipe('finetune', words(made, base=tmp_path, **{'tokenizer.kind': 'bpe'}))


def test_an_architecture_that_is_not_read_is_named_at_once(made, tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(
        read_json(made/'qwen3'/'config.json') | dict(model_type='llama')))
    with pytest.raises(UserError, match=r'base = .*model_type = llama: only gpt2 and qwen3'):
        load_recipe('finetune', words(made, base=tmp_path))
