"A stage that trains adapters: the ordinary loop, less to store, and a model folder like any other"
import io

import pytest, torch

from desk import KEYS, curve, furnish, stages, stopping, weights, whole_run
from lm_nb.bench.plan import plan_run
from lm_nb.cli import main
from lm_nb.core import UserError, read_json, write_json
from lm_nb.inference.chat import answer
from lm_nb.model.hub import load_model
from lm_nb.model.lora import load_adapted, load_adapter, merge_lora
from lm_nb.training.checkpoint import _saved_tensors, checkpoints
from lm_nb.training.monitor import read_log
from lm_nb.training.recipe import load_recipe

LORA = 'sft.lora_rank=4',
PLUGIN = '''
from lm_nb.training.recipe import Stage, register_stage
from lm_nb.training.sft import sft_feed
register_stage(Stage('again', output='better', chat=True, start=lambda r: r.model_before('again'),
                     feed=lambda run, ranks: sft_feed(run, 'again', ranks)))
'''


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    folder = furnish(tmp_path_factory.mktemp('desk'), KEYS)
    (folder/'again.py').write_text(PLUGIN)
    return folder


@pytest.fixture(scope='module')
def whole(desk): return whole_run(desk, *LORA)


def stored(stage): return _saved_tensors(checkpoints(stage/'checkpoints')[0])


def test_it_learns_and_only_the_adapters_are_stored(whole):
    losses = [r['loss'] for r in read_log(whole/'sft') if 'loss' in r]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5])
    names = stored(whole/'sft')
    assert len([n for n in names if n.startswith('model.')]) == 2 * 7  # A and B of seven layers
    assert len(names) == 4 * 2 * 7  # with AdamW's two means and its count of steps
    assert all('.lora_' in name for name in names)
    size = lambda stage: sum(p.stat().st_size for p in (whole/stage).rglob('*.safetensors'))
    assert size('sft') < size('pretrain') / 2


def test_the_model_that_it_leaves_is_plain_and_equals_base_and_adapter(whole):
    chat, tok = load_model(whole/'chat')
    base, _ = load_model(whole/'base')
    assert list(chat.state_dict()) == list(base.state_dict())
    frozen = [n for n in base.state_dict() if '_proj' not in n]
    assert all(torch.equal(chat.state_dict()[n], base.state_dict()[n]) for n in frozen)
    adapted = load_adapter(base, whole/'sft'/'adapter').eval()
    ids = torch.randint(len(tok), (4, 30), generator=torch.Generator().manual_seed(1))
    assert (adapted(ids) - chat(ids)).abs().max() < 1e-5
    assert (load_model(whole/'base')[0](ids) - chat(ids)).abs().max() > 1e-3
    named, _ = load_adapted(whole/'sft'/'adapter')
    assert answer(named, tok, 'When did Ada come?') == answer(chat, tok, 'When did Ada come?')


def test_peft_gives_the_logits_of_the_model_that_it_leaves(whole):
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    config = read_json(whole/'sft'/'adapter'/'adapter_config.json')
    assert config['base_model_name_or_path'] == str((whole/'base').resolve())
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(whole/'sft'/'adapter').eval()
    chat, tok = load_model(whole/'chat')
    ids = torch.randint(len(tok), (4, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): assert (theirs(ids).logits - chat(ids)).abs().max() < 1e-5
    plain = transformers.AutoModelForCausalLM.from_pretrained(whole/'chat').eval()
    with torch.no_grad(): assert (plain(ids).logits - chat(ids)).abs().max() < 1e-5


def test_a_run_that_was_stopped_is_bitwise_the_run_that_was_not(
    whole, at_desk, tmp_path, monkeypatch):
    stages(tmp_path/'run', *LORA, which=['pretrain'])
    for after, step in {5: 5, 6: 11}.items():
        with stopping(monkeypatch, 'sft', after, step): stages(tmp_path/'run', *LORA, which=['sft'])
        assert not (tmp_path/'run'/'chat').exists()
    stages(tmp_path/'run', *LORA, which=['sft'])
    keys = 'loss', 'grad_norm', 'lr', 'valid_loss'
    assert curve(tmp_path/'run'/'sft', *keys) == curve(whole/'sft', *keys)
    assert weights(tmp_path/'run'/'chat') == weights(whole/'chat')
    adapters = [(f/'sft'/'adapter'/'adapter_model.safetensors').read_bytes()
                for f in (whole, tmp_path/'run')]
    assert adapters[0] == adapters[1]


def test_other_frozen_weights_are_noticed(at_desk, tmp_path, monkeypatch):
    run = tmp_path/'run'
    stages(run, *LORA, which=['pretrain'])
    with stopping(monkeypatch, 'sft', 5, 5): stages(run, *LORA, which=['sft'])
    stage = read_json(run/'sft'/'stage.json')
    assert len(stage['frozen']) == 64
    write_json(run/'sft'/'stage.json', stage | dict(frozen='0' * 64))
    with pytest.raises(UserError, match='was begun with something else: frozen'):
        stages(run, *LORA, which=['sft'])


def test_a_later_stage_trains_adapters_too(at_desk, tmp_path):
    keys = ('stages=pretrain sft again', 'plugins=again.py', 'again.tokens=1600', 'lora_rank=2',
            'sft.lora_on=q_proj v_proj')
    run = stages(tmp_path/'run', *keys, which=['pretrain', 'sft', 'again'])
    assert len(stored(run/'sft')) == 4 * 2 * 2 and len(stored(run/'again')) == 4 * 2 * 7
    better, tok = load_model(run/'better')
    ids = torch.randint(len(tok), (4, 30))
    two = merge_lora(load_adapter(load_model(run/'chat')[0], run/'again'/'adapter')).eval()
    assert (two(ids) - better(ids)).abs().max() < 1e-5


@pytest.mark.parametrize('keys, said', [
    (('sft.lora_rank=33',), 'sft.lora_rank = 33: must be at least 1 and at most 32'),
    (('lora_rank=4', 'lora_on=q_prj'), "sft.lora_on = q_prj: no layer .*did you mean 'q_proj'"),
    (('sft.lora_alpha=8',), 'has no effect: no adapters are trained'),
    (('sft.lora_rank=4', 'sft.lr=0.01'), 'no effect: AdamW moves adapters, at lora_lr'),
    (('sft.lora_rank=4', 'lora_lr=2'), 'lora_lr = 2'),
    (('sft.lora_rank=-1',), 'lora_rank = -1'), (('pretrain.lora_rank=4',), 'unknown key')])
def test_what_cannot_be_is_said_before_anything_trains(at_desk, tmp_path, keys, said):
    with pytest.raises(UserError, match=said) as e:
        stages(tmp_path/'run', *keys, which=['pretrain'])
    assert '\n' not in str(e.value) and not (tmp_path/'run'/'base').exists()


def test_generate_and_chat_take_an_adapter(whole, at_desk, capsys, monkeypatch):
    def said(*words):
        assert main([*map(str, words)]) == 0
        return capsys.readouterr().out
    where, adapter = f'run_dir={whole}', f'adapter={whole/"sft"/"adapter"}'
    of = lambda *words: said('generate', 'tiny', where, 'prompt=Ada came', 'max_new=9', *words)
    assert of(adapter) == of('model=chat') == of(adapter, 'model=base')
    def asked(*words):
        text = io.TextIOWrapper(io.BytesIO(b'When did Ada come?\nOakham\n'), 'utf-8')
        monkeypatch.setattr('sys.stdin', text)
        return said('chat', 'tiny', where, 'max_new=9', *words)
    assert asked(adapter) == asked() == asked('model=chat')
    assert main(['generate', 'tiny', where, 'prompt=A', 'adapter=nowhere']) == 2
    assert 'nowhere: no such adapter folder' in capsys.readouterr().err


def test_a_plan_knows_that_less_is_trained(at_desk):
    def stage(*keys):
        plan = plan_run(load_recipe('tiny', keys), budget=0)
        return next(s for s in plan.stages if s.name == 'sft')
    whole, thin = stage(), stage(*LORA)
    assert thin.flops < .9*whole.flops
    assert thin.memory.optimizer < whole.memory.optimizer/2
    assert thin.memory.total < whole.memory.total
