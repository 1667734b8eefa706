"Checkpoints under hostile conditions: killed processes, changed bits, foreign files; exchanged models against transformers"
import json, os, random, signal, time
from pathlib import Path
import pytest, torch
from torch import nn
from safetensors.torch import save_file
import lm_nb.checkpoint as C
from lm_nb.checkpoint import (STATE_FILES, checkpoints, damage, differing, load_checkpoint, load_model, open_run, replacing, save_checkpoint,
                              save_model, seal, unique_state)
from lm_nb.core import UserError, atomic, read_json, write_json
from lm_nb.model import GPT, GPTConfig
from lm_nb.optim import OptimConfig, make_optimizers
from lm_nb.tokenizer import Tokenizer

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore:.*fork.*')

def fresh(seed=0, optimizer='muon', **kw):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(vocab_size=19, context=16, n_layer=1, n_head=2, d_model=16, d_ff=32, dropout=0.2), **kw}))
    return model, make_optimizers(model, OptimConfig(optimizer=optimizer))

def train(model, optimizers, steps):
    out = []
    for s in steps:
        x = torch.randint(0, 19, (4, 17), generator=torch.Generator().manual_seed(s))
        loss = nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        for o in optimizers: o.step(), o.zero_grad()
        out.append(loss.item())
    return out

def same(a, b): return all(torch.equal(x, y) for x, y in zip(unique_state(a).values(), unique_state(b).values(), strict=True))

def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << (at % 8)
    path.write_bytes(data)

def told(call, *args, **kw):
    with pytest.raises(UserError) as e: call(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)

@pytest.fixture(scope='module')
def tok(): return Tokenizer.train(['one two three ' * 5, '一二三' * 5], vocab_size=275)

# -- resuming

@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
@pytest.mark.parametrize('shape', [dict(arch='gpt2'), dict(arch='qwen3'), dict(arch='qwen3', tie=False)])
def test_resume_is_bitwise(tmp_path, optimizer, shape):
    a, oa = fresh(optimizer=optimizer, **shape)
    train(a, oa, range(4))
    save_checkpoint(tmp_path, 4, a, oa, extra=dict(best=1.5, 名='甲'))
    unbroken = train(a, oa, range(4, 8))
    torch.manual_seed(99)
    b, ob = fresh(seed=5, optimizer=optimizer, **shape)
    assert load_checkpoint(tmp_path, b, ob) == (4, dict(best=1.5, 名='甲'))
    assert train(b, ob, range(4, 8)) == unbroken and same(a, b)

def test_saving_changes_nothing_in_the_run(tmp_path):
    (a, oa), (b, ob) = fresh(), fresh()
    torch.manual_seed(1)
    one = train(a, oa, range(6))
    torch.manual_seed(1)
    two = train(b, ob, range(3))
    save_checkpoint(tmp_path, 3, b, ob)
    assert two + train(b, ob, range(3, 6)) == one

def test_a_scaler_goes_along(tmp_path):
    model, optimizers = fresh()
    scaler = torch.amp.GradScaler('cpu', init_scale=8.0, growth_interval=1)
    scaler.load_state_dict({**scaler.state_dict(), 'scale': 1234.0})
    save_checkpoint(tmp_path, 1, model, optimizers, scaler)
    again = torch.amp.GradScaler('cpu')
    load_checkpoint(tmp_path, *fresh(), again)
    assert again.get_scale() == 1234.0
    off = torch.amp.GradScaler('cpu', enabled=False)
    assert load_checkpoint(tmp_path, *fresh(), off)[0] == 1 and load_checkpoint(tmp_path, *fresh())[0] == 1
    save_checkpoint(tmp_path, 2, model, optimizers, off)
    assert load_checkpoint(tmp_path, *fresh(), off)[0] == 2

def test_buffers_and_tied_tensors(tmp_path):
    class Odd(nn.Module):
        def __init__(self, fill):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight
            self.register_buffer('count', torch.tensor(fill))
            nn.init.constant_(self.a.weight, fill)
    save_checkpoint(tmp_path, 1, Odd(7.), [])
    m = Odd(0.)
    load_checkpoint(tmp_path, m, [])
    assert m.count == 7 and (m.b.weight == 7).all() and m.a.weight is m.b.weight

def test_newest_k_stay_and_order_is_by_number(tmp_path):
    model, _ = fresh()
    for step in (5, 99, 100, 12): save_checkpoint(tmp_path, step, model, [], keep=3)
    assert [p.name for p in checkpoints(tmp_path)] == ['step-00000100', 'step-00000099', 'step-00000012']
    save_checkpoint(tmp_path, 101, model, [], keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000101']
    save_checkpoint(tmp_path, 123456789, model, [])
    assert load_checkpoint(tmp_path, model, []) == (123456789, {})

def test_saving_a_step_again_replaces_it(tmp_path):
    (a, _), (b, _) = fresh(0), fresh(1)
    save_checkpoint(tmp_path, 3, a, [])
    save_checkpoint(tmp_path, 3, b, [])
    load_checkpoint(tmp_path, a, [])
    assert same(a, b) and [p.name for p in tmp_path.iterdir()] == ['step-00000003']

def test_another_model_or_optimizer_is_refused_and_nothing_set_aside(tmp_path):
    save_checkpoint(tmp_path, 3, *fresh())
    assert 'another model' in told(load_checkpoint, tmp_path, *fresh(d_ff=48))
    assert 'another model' in told(load_checkpoint, tmp_path, *fresh(n_layer=2))
    assert 'other optimizers' in told(load_checkpoint, tmp_path, *fresh(optimizer='adamw'))
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000003']

def test_nothing_to_load(tmp_path):
    assert load_checkpoint(tmp_path/'none', *fresh()) is None and load_checkpoint(tmp_path, *fresh()) is None

def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, *fresh())
    monkeypatch.setattr(C.shutil, 'disk_usage', lambda p: type('', (), dict(free=1000)))
    assert 'the disk has 0 MiB left' in told(save_checkpoint, tmp_path, 2, *fresh())
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000001'] and damage(tmp_path/'step-00000001') == ''

# -- damage

@pytest.mark.parametrize('name', STATE_FILES)
def test_any_flipped_bit_is_noticed(tmp_path, name):
    path = save_checkpoint(tmp_path, 1, *fresh())
    whole = (path/name).read_bytes()
    for at in [0, len(whole) - 1, *random.Random(0).sample(range(len(whole)), min(10, len(whole)))]:
        flip(path/name, at)
        assert 'sha256' in damage(path, STATE_FILES)
        (path/name).write_bytes(whole)
    assert damage(path, STATE_FILES) == ''

def cut(path): path.write_bytes(path.read_bytes()[:-1])
BREAK = dict(cut=lambda p: cut(p/'optimizer.pt'), gone=lambda p: (p/'state.json').unlink(), empty=lambda p: (p/'model.safetensors').write_bytes(b''),
             no_manifest=lambda p: (p/'manifest.json').unlink(), garbage=lambda p: (p/'manifest.json').write_bytes(b'\xff{'),
             nothing_sealed=lambda p: write_json(p/'manifest.json', {}),
             a_list=lambda p: write_json(p/'manifest.json', [1]), odd=lambda p: write_json(p/'manifest.json', {'state.json': 3}))

@pytest.mark.parametrize('how', BREAK)
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_is_taken(tmp_path, capsys, how):
    a, oa = fresh(0)
    save_checkpoint(tmp_path, 1, a, oa)
    BREAK[how](save_checkpoint(tmp_path, 2, *fresh(1)))
    m, om = fresh(2)
    assert load_checkpoint(tmp_path, m, om)[0] == 1 and same(m, a)
    line = capsys.readouterr().out
    assert line.startswith('step-00000002: ') and line.endswith('set aside as step-00000002.bad\n') and line.count('\n') == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ['step-00000001', 'step-00000002.bad']
    save_checkpoint(tmp_path, 2, a, oa)  # the name is free again, and may break again
    BREAK[how](tmp_path/'step-00000002')
    load_checkpoint(tmp_path, m, om)
    assert (tmp_path/'step-00000002.bad2').is_dir() and (tmp_path/'step-00000002.bad').is_dir()

def test_all_broken_means_none(tmp_path, capsys):
    for step in (1, 2): cut(save_checkpoint(tmp_path, step, *fresh())/'model.safetensors')
    assert load_checkpoint(tmp_path, *fresh()) is None and len(list(tmp_path.glob('*.bad'))) == 2

class Payload:
    def __reduce__(self): return Path.touch, (Path(os.environ['PAYLOAD']),)

def test_a_pickle_with_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv('PAYLOAD', str(tmp_path/'ran'))
    path = save_checkpoint(tmp_path/'c', 1, *fresh())
    torch.save(dict(optimizers=[Payload()], scaler={}, rng={}), path/'optimizer.pt')
    seal(path)  # whoever can write the folder can also seal it
    assert 'nothing of it is run' in told(load_checkpoint, tmp_path/'c', *fresh())
    assert not (tmp_path/'ran').exists()

# -- dying

def in_a_child(work):
    "Run `work` in a process of its own; its id"
    pid = os.fork()
    if pid == 0:
        try: work()
        finally: os._exit(1)
    return pid

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_at_random_moments_there_is_always_a_whole_checkpoint(tmp_path):
    "Processes save step after step and are killed with -9 in between; what is left must verify each time, and at most one save is lost"
    model, optimizers = fresh(d_model=64, d_ff=256)
    train(model, optimizers, range(1))
    save_checkpoint(tmp_path/'c', 1, model, optimizers)
    start = time.perf_counter()
    save_checkpoint(tmp_path/'c', 1, model, optimizers)
    took = time.perf_counter() - start
    rng, last, kills = random.Random(0), 1, 0
    def work():
        step = checkpoints(tmp_path/'c')[0].name
        step = int(step[5:])
        while True:
            for _ in range(2):  # each step twice: the second time replaces
                save_checkpoint(tmp_path/'c', step + 1, model, optimizers)
            step += 1
    while kills < 20 or (last < 4 and kills < 100):  # a busy disk may need more tries to get ahead
        pid = in_a_child(work)
        time.sleep(rng.uniform(0.01, 0.02 + 6*took))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])  # it was still saving, not stopped by an error
        kills += 1
        found = checkpoints(tmp_path/'c')
        assert found and all(damage(p, STATE_FILES) == '' for p in found)
        assert int(found[0].name[5:]) >= last - 1  # between the two renames of a replacement the newest may be absent
        last = int(found[0].name[5:])
    assert last >= 4
    save_checkpoint(tmp_path/'c', last + 1, model, optimizers)
    assert not list((tmp_path/'c').glob('.*')) and len(checkpoints(tmp_path/'c')) == 2

def test_an_exchange_that_died_between_its_renames_is_undone(tmp_path):
    with replacing(tmp_path/'m') as t: (t/'f').write_text('old')
    (tmp_path/'m').rename(tmp_path/'.m.old')  # here it died
    with pytest.raises(KeyboardInterrupt):
        with replacing(tmp_path/'m') as t: raise KeyboardInterrupt
    assert (tmp_path/'m'/'f').read_text() == 'old'
    with replacing(tmp_path/'m') as t: (t/'f').write_text('new')
    assert (tmp_path/'m'/'f').read_text() == 'new' and [p.name for p in tmp_path.iterdir()] == ['m']

def test_an_error_inside_a_save_leaves_the_others(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, *fresh())
    monkeypatch.setattr(C, 'seal', lambda folder: 1/0)
    for step in (1, 2):
        with pytest.raises(ZeroDivisionError): save_checkpoint(tmp_path, step, *fresh())
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000001'] and damage(tmp_path/'step-00000001', STATE_FILES) == ''

# -- models for others

@pytest.mark.parametrize('shape', [dict(arch='gpt2'), dict(arch='qwen3', n_kv_head=1), dict(arch='qwen3', tie=False)])
def test_transformers_loads_what_is_saved_and_back(tmp_path, tok, shape):
    transformers = pytest.importorskip('transformers')
    gpt, optimizers = fresh(vocab_size=len(tok), zero_init=False, **shape)
    train(gpt, optimizers, range(2))
    save_model(tmp_path/'m', gpt, tok)
    ids = torch.randint(0, len(tok), (2, 16), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'m').eval()
    ours, tok2 = load_model(tmp_path/'m')
    with torch.no_grad():
        want = gpt.eval()(ids)
        assert torch.equal(ours(ids), want) and (theirs(ids).logits - want).abs().max() < 1e-4
        assert theirs.config.eos_token_id == tok.eos and theirs.config.bos_token_id == tok.bos and theirs.config.pad_token_id == tok.pad
        theirs.save_pretrained(tmp_path/'back')
        tok.save(tmp_path/'back'/'tokenizer.model')
        assert torch.equal(load_model(tmp_path/'back')[0](ids), want)
    assert tok2.sha256 == tok.sha256 == read_json(tmp_path/'m'/'tokenizer_note.json')['sha256'] and not ours.training

def test_a_model_is_replaced_but_nothing_else_is(tmp_path, tok):
    (a, _), (b, _) = fresh(0, vocab_size=len(tok)), fresh(1, vocab_size=len(tok))
    save_model(tmp_path/'m', a, tok)
    save_model(tmp_path/'m', b, tok)
    assert same(load_model(tmp_path/'m')[0], b) and [p.name for p in tmp_path.iterdir()] == ['m']
    (tmp_path/'thesis').mkdir()
    (tmp_path/'thesis'/'draft.tex').write_text('x')
    assert 'choose another folder' in told(save_model, tmp_path/'thesis', a, tok)
    (tmp_path/'file').write_text('x')
    assert 'choose another folder' in told(save_model, tmp_path/'file', a, tok)
    assert (tmp_path/'thesis'/'draft.tex').read_text() == 'x' and (tmp_path/'file').read_text() == 'x'

def broken_model(how, folder, tok):
    if how == 'config': (folder/'config.json').unlink()
    if how == 'tokenizer': (folder/'tokenizer.model').unlink()
    if how == 'pickle': (folder/'model.safetensors').rename(folder/'pytorch_model.bin')
    if how == 'cut': cut(folder/'model.safetensors')
    if how == 'bit': flip(folder/'tokenizer.model', 1000)
    if how == 'json': (folder/'config.json').write_text('{'), seal(folder)
    if how == 'array': (folder/'config.json').write_text('[]'), seal(folder)
    if how == 'tensors': (folder/'model.safetensors').write_bytes(b'12345678'), (folder/'manifest.json').unlink()
    if how == 'architecture': write_json(folder/'config.json', {**read_json(folder/'config.json'), 'model_type': 'llama'}), seal(folder)
    if how == 'weights': save_file(dict(w=torch.zeros(2)), folder/'model.safetensors'), seal(folder)
    if how == 'vocabulary':
        (folder/'tokenizer.model').unlink()
        Tokenizer.train(['abcdefghijklmnopqrstuvwxyz' * 3], 285).save(folder/'tokenizer.model'), seal(folder)
    if how == 'foreign tokenizer': (folder/'tokenizer.model').write_bytes(b'no model'), seal(folder)

@pytest.mark.parametrize('how, word', [
    ('config', 'config.json'), ('tokenizer', 'has no tokenizer.model'), ('pickle', 'pickled weights are not read'), ('cut', 'bytes instead of'),
    ('bit', 'sha256'), ('json', 'not valid JSON'), ('array', 'config.json'), ('tensors', 'model'), ('architecture', 'llama'), ('weights', 'weights'),
    ('vocabulary', 'do not belong together'), ('foreign tokenizer', 'tokenizer')])
def test_bad_model_folders_get_one_line(tmp_path, tok, how, word):
    folder = save_model(tmp_path/'m', fresh(vocab_size=len(tok))[0], tok)
    broken_model(how, folder, tok)
    assert word in told(load_model, folder) and str(folder) in told(load_model, folder)

def test_no_folder_at_all(tmp_path):
    assert 'no such model folder' in told(load_model, tmp_path/'none')
    assert 'found nothing' in told(load_model, tmp_path)

# -- whose run

RECIPE = dict(seed=0, model=dict(n_layer=4, tie=True, d_ff=None), pretrain=dict(lr=1e-3), path=Path('a/b'), shape=(1, 2))

def test_a_run_is_created_and_found_again(tmp_path):
    assert open_run(tmp_path/'a'/'b', RECIPE) is False and open_run(tmp_path/'a'/'b', RECIPE) is True
    assert read_json(tmp_path/'a'/'b'/'recipe.json')['model'] == RECIPE['model']

def test_another_recipe_is_refused_with_every_difference(tmp_path):
    open_run(tmp_path/'r', RECIPE)
    (tmp_path/'r'/'base').mkdir()
    line = told(open_run, tmp_path/'r', {**RECIPE, 'seed': 1, 'model': dict(n_layer=6, tie=True), 'new': 'x'})
    odd = 'seed: 0 there, 1 now', 'model.n_layer: 4 there, 6 now', 'model.d_ff: null there, absent now', 'new: absent there, "x" now'
    for part in (*odd, 'run_dir=', 'remove the folder'): assert part in line
    assert 'tie' not in line and 'lr' not in line and open_run(tmp_path/'r', RECIPE) is True

def test_a_recipe_from_which_nothing_came_may_be_corrected(tmp_path):
    open_run(tmp_path/'r', RECIPE)
    assert open_run(tmp_path/'r', {**RECIPE, 'seed': 1}) is False
    assert read_json(tmp_path/'r'/'recipe.json')['seed'] == 1

def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path/'photos').mkdir()
    (tmp_path/'photos'/'a.jpg').write_bytes(b'1')
    assert 'no recipe.json' in told(open_run, tmp_path/'photos', RECIPE)
    assert 'is a file' in told(open_run, tmp_path/'photos'/'a.jpg', RECIPE)
    assert [p.name for p in (tmp_path/'photos').iterdir()] == ['a.jpg']
    (tmp_path/'odd').mkdir()
    (tmp_path/'odd'/'recipe.json').write_text('{oh')
    assert 'not valid JSON' in told(open_run, tmp_path/'odd', RECIPE)

def test_ranks_that_arrive_while_the_recipe_is_being_written(tmp_path):
    with atomic(tmp_path/'r'/'recipe.json') as t:
        t.write_text('half')
        assert open_run(tmp_path/'r', RECIPE) is False
        t.write_text(json.dumps(read_json(tmp_path/'r'/'recipe.json')))
    assert open_run(tmp_path/'r', RECIPE) is True

def test_one_and_one_point_nought_and_true_are_told_apart():
    assert differing(dict(a=1, b=1), dict(a=True, b=1)) == ['a: 1 there, true now']
    assert differing(dict(a=dict(b=1)), dict(a=3)) == ['a.b: 1 there, absent now', 'a: absent there, 3 now']
    assert differing(RECIPE | dict(path=''), RECIPE | dict(path='')) == []
