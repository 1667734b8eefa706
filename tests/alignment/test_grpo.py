"""Policy gradient: each estimator against the truth on answers that can all be listed, what must
not count, and runs that are stopped, killed and shared by two ranks"""
import json, math, os, signal, subprocess, sys, time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest, torch
from torch import nn

import lm_nb, pairs
from desk import furnish
from published import record
from lm_nb.alignment.dpo import token_logprobs
from lm_nb.alignment.reward import score_answers
from lm_nb.alignment.grpo import (
    GRPOConfig, PolicyBatch, Rollouts, _answer_text, _policy_rows, advantages, grpo_feed, grpo_loss,
    kl_estimate, quatrain_score, write_answers)
from lm_nb.core import UserError
from lm_nb.data.shards import IGNORE
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.model.hub import load_model
from lm_nb.training.loop import Ranks
from lm_nb.training.monitor import Interrupted, read_log
from lm_nb.training.ranks import launch
from lm_nb.training.recipe import find_stage, load_recipe
from lm_nb.training.run import Run
from lm_nb.training.stage import run_stage, train

HERE, PACKAGE = Path(__file__).resolve().parent, Path(lm_nb.__file__).resolve().parent.parent
ANSWERS = torch.cartesian_prod(*[torch.arange(6)]*3)
EVERY = PolicyBatch(torch.cat([torch.zeros(216, 1).long(), ANSWERS[:, :2]], 1), ANSWERS, None,
                    torch.zeros(216))


# --------------------------------------------------------------- against all answers of a model

def small(seed, away=0.):
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(vocab_size=6, context=4, n_layer=1, n_head=1, d_model=8, d_ff=8)).double()
    for p in gpt.parameters(): nn.init.normal_(p, std=.5)
    with torch.no_grad():
        for p in gpt.parameters(): p += away * torch.randn_like(p)
    return gpt


def logprobs(model, batch=EVERY): return model(batch.x).log_softmax(-1).gather(
    -1, batch.y[..., None])[..., 0]


@pytest.fixture(scope='module')
def world():
    "Policy, reference, the gradient of each log-probability, and a reward"
    policy, ref = small(0), small(0, .15)
    each = logprobs(policy).flatten()
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(
        lp, [*policy.parameters()], retain_graph=True)]) for lp in each]
    logp, ref = logprobs(policy).detach(), logprobs(ref).detach()
    reward = torch.randn(216, generator=torch.Generator().manual_seed(1)).double()
    return dict(policy=policy, J=torch.stack(rows).view(216, 3, -1), logp=logp, ref=ref,
                p=logp.sum(1).exp(), d=logp - ref, reward=reward)


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])


def far(g, true): return ((g - true).norm() / true.norm()).item()
def mean(w, weight): return torch.einsum('a,at,atw->w', w['p'], weight.expand(216, 3), w['J'])


@pytest.fixture(scope='module')
def true(world):
    policy, ref = world['policy'], world['ref'].sum(1)
    def said(): return logprobs(policy).sum(1)
    return dict(reward=gradient((said().exp() * world['reward']).sum(), policy),
                reverse=gradient((said().exp() * (said() - ref)).sum(), policy),
                forward=gradient(-(ref.exp() * said()).sum(), policy))


def test_probabilities_add_up_and_reinforce_is_the_gradient(world, true):
    assert abs(world['p'].sum() - 1) < 1e-12
    assert far(mean(world, world['reward'][:, None]), true['reward']) < 1e-10


def test_a_group_of_two_as_its_own_baseline_is_exactly_half_the_gradient(world, true):
    p, r = world['p'], world['reward']
    pairs = torch.cartesian_prod(r, r)
    a = advantages(pairs).view(216, 216, 2)
    weight = (p[None] * a[..., 0]).sum(1)  # of the first of the two, whatever the second is
    assert far(mean(world, weight[:, None]), true['reward'] / 2) < 1e-10
    a = advantages(pairs, 'scaled').view(216, 216, 2)
    scaled = mean(world, (p[None] * a[..., 0]).sum(1)[:, None])
    assert torch.cosine_similarity(scaled, true['reward'], 0) < .99


def test_kl_as_reward_and_as_loss_follow_the_direction_that_they_should(world, true):
    d, D = world['d'], world['d'].sum(1, keepdim=True)
    assert far(mean(world, D), true['reverse']) < 1e-10           # k1 as a reward, k2 as a loss
    assert far(mean(world, 1 - (-D).exp()), true['forward']) < 1e-10  # k3 as a loss
    assert far(mean(world, D), true['forward']) > .1
    assert far(mean(world, 1 - (-D).exp()), true['reverse']) > .1
    assert mean(world, torch.ones(216, 1).double()).norm() < 1e-10  # k1 as a loss: nothing
    assert .05 < far(mean(world, d), true['reverse']) < .5        # token by token: not the whole


def test_the_mean_of_k1_and_k3_is_the_kl(world):
    logp, ref, p = (world[k] for k in ('logp', 'ref', 'p'))
    kl = (p * (logp.sum(1) - ref.sum(1))).sum()
    of = lambda k: (p * kl_estimate(logp.sum(1), ref.sum(1), k)).sum()
    assert abs(of('k1') - kl) < 1e-12 and abs(of('k3') - kl) < 1e-10 and abs(of('k2') - kl) > .01
    assert (kl_estimate(logp, ref, 'k3') >= 0).all()


@pytest.mark.parametrize('kl', ['none', 'k2_loss', 'k3_loss', 'k1_reward'])
@pytest.mark.parametrize('per', ['answer', 'token', 'constant'])
def test_the_gradient_of_the_loss_is_the_sum_that_it_should_be(world, kl, per):
    mine = torch.multinomial(world['p'], 16, True, generator=torch.Generator().manual_seed(2))
    ended = (ANSWERS[mine, :2] == 0).long().cumsum(1)
    real = torch.cat([torch.ones(16, 1).bool(), ended == 0], 1)
    a = advantages(world['reward'][mine].view(2, 8)).flatten()
    batch = PolicyBatch(EVERY.x[mine], EVERY.y[mine].where(real, IGNORE), None, a,
                        ref=world['ref'][mine].where(real, 0.))
    cfg = GRPOConfig(kl=kl, per=per, beta=.3, max_new=5)
    total, count = grpo_loss(world['policy'], batch, cfg)
    d = world['d'][mine]
    weight = -a[:, None] + dict(k2_loss=.3 * d, k3_loss=.3 * (1 - (-d).exp())).get(kl, 0.)
    size = real.sum(1, keepdim=True)
    weight = weight * real / dict(answer=16 * size, token=size.sum(), constant=16 * 5)[per]
    wanted = torch.einsum('bt,btw->w', weight, world['J'][mine])
    assert far(gradient(total / count, world['policy']), wanted) < 1e-5


def test_the_clip_stops_only_what_goes_on_outwards(world):
    a = torch.tensor([1., 1, -1, -1])
    batch = PolicyBatch(EVERY.x[:4], EVERY.y[:4], None, a)
    logp = world['logp'][:4]
    for moved, kept in ((.5, [0, 0, 1, 1]), (-.5, [1, 1, 0, 0]), (.1, [1, 1, 1, 1])):
        seen = []
        cfg = GRPOConfig(kl='none', max_new=3)
        total, count = grpo_loss(world['policy'], batch._replace(old=logp - moved), cfg,
                                 lambda batch, logp, clipped, seen=seen: seen.append(clipped))
        weight = -a[:, None] * math.exp(moved) * torch.tensor(kept)[:, None]
        wanted = torch.einsum('bt,btw->w', weight.expand(4, 3).double() / count, world['J'][:4])
        assert (gradient(total / count, world['policy']) - wanted).norm() < 1e-5
        assert seen[0].float().mean(1).tolist() == [1. - k for k in kept]


# -------------------------------------------------------------------- rows, and what must not count

class Tok:
    "Six ids; 5 closes an answer"
    pad, controls = 4, (4, 5)
    class chat: answer = 0, 5
    def decode(self, ids): return ''.join(map(str, ids))


@pytest.mark.parametrize('temperature', [.5, 1., 2.])
def test_answers_are_drawn_from_the_distribution_that_is_learned(temperature):
    gpt, n = small(0).float(), 20_000
    cfg = GRPOConfig(temperature=temperature, max_new=2)
    drawn = Counter(map(tuple, write_answers(gpt, Tok(), [[0]] * n, cfg, seed=3)))
    assert all(len(a) == 2 or a[-1] == 5 for a in drawn)          # eos where it was written
    x, y = _policy_rows([[0]] * len(drawn), [*drawn], 4, 3)
    with torch.no_grad(): p = token_logprobs(gpt, PolicyBatch(x, y, None, None), temperature)
    p = p.sum(1).exp()
    counts = torch.tensor([*drawn.values()])
    chi2 = ((counts - n * p)**2 / (n * p))[n * p > 5].sum()
    assert p.sum() > .99 and chi2 < 60                            # 30 kinds of answers at most
    if temperature != 1:                                          # one side alone is noticed
        with torch.no_grad(): q = token_logprobs(gpt, PolicyBatch(x, y, None, None)).sum(1).exp()
        assert ((counts - n * q)**2 / (n * q))[n * q > 5].sum() > 600


def test_the_first_token_of_an_answer_counts_and_only_what_was_drawn_does():
    x, y = _policy_rows([[1, 2, 0], [0]], [[3, 5], [3, 3, 3]], 4)
    assert x.shape == y.shape == (2, 32)
    assert x[0, :5].tolist() == [1, 2, 0, 3, 4] and y[0, :5].tolist() == [-100, -100, 3, 5, -100]
    assert y[1, :4].tolist() == [3, 3, 3, -100]                   # cut: no eos was made up
    assert _policy_rows([[0]], [[3, 3]], 4, longest=20)[0].shape == (1, 20)
    assert _answer_text(Tok(), [3, 5]) == '3' and _answer_text(Tok(), [3, 3]) == '33'
    assert _answer_text(Tok(), [3, 4, 2]) == '3'


@pytest.mark.parametrize('per', ['answer', 'token', 'constant'])
def test_padding_and_prompt_never_count(per):
    gpt, ref = small(0), torch.randn(2, 4).double()
    def batch(pad, wide):
        x, y = torch.full((2, wide), pad), torch.full((2, wide), IGNORE)
        x[0, :3], y[0, 1:3] = torch.tensor([1, 0, 2]), torch.tensor([2, 5])
        x[1, :2], y[1, 1] = torch.tensor([2, 0]), 5
        r = torch.zeros(2, wide).double()
        r[0, 1:3], r[1, 1] = ref[0, :2], ref[1, 0]
        return PolicyBatch(x, y, None, torch.tensor([1., -.5]), ref=r)
    cfg = GRPOConfig(per=per, max_new=4, beta=.1)
    one, n = grpo_loss(gpt, batch(4, 3), cfg)
    two, m = grpo_loss(gpt, batch(1, 4), cfg)
    assert n == m and abs(one - two) < 1e-6 and n == dict(answer=2, token=3, constant=8)[per]
    assert far(gradient(one, gpt), gradient(two, gpt)) < 1e-5


def test_the_mean_of_an_answer_is_over_its_own_tokens():
    gpt, x = small(0), torch.zeros(2, 4).long()
    y = torch.tensor([[2, IGNORE, IGNORE, IGNORE], [2, 3, 5, IGNORE]])
    total, n = grpo_loss(gpt, PolicyBatch(x, y, None, torch.tensor([1., 1.])),
                         GRPOConfig(per='answer', kl='none'))
    assert total == -2 and n == 2


def test_groups_of_equal_rewards_have_exactly_no_advantage():
    equal = torch.full((1, 8), .1)
    for how in ('centred', 'scaled'): assert advantages(equal, how).tolist() == [[0.] * 8]
    mixed = advantages(torch.cat([equal, torch.arange(8.)[None]]), 'scaled')
    assert not mixed[0].any() and abs(mixed[1].std() - 1) < 1e-3 and abs(mixed[1].sum()) < 1e-5


def test_micro_batches_add_up_to_the_whole(world):
    a = torch.linspace(-1, 1, 8)
    batch = PolicyBatch(EVERY.x[:8], EVERY.y[:8], None, a, ref=world['ref'][:8])
    cfg = GRPOConfig(max_new=3)
    whole = grpo_loss(world['policy'], batch, cfg)
    parts = [grpo_loss(world['policy'], b, cfg) for b in batch.split(3)]
    for i in range(2): assert abs(sum(p[i] for p in parts) - whole[i]) < 1e-5


def test_the_form_of_a_quatrain():
    poem = '春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少。'
    known = {frozenset('鳥少')}
    assert quatrain_score(poem, known) == 1 and quatrain_score(poem, set()) == 2/3
    assert quatrain_score(poem.replace('花', '花花'), known) == .75/3
    assert quatrain_score('', known) == 0 and quatrain_score(poem.replace('少', '鳥'), known) == 2/3


# -------------------------------------------------------------------------------------- whole runs

KEYS = {'stages': 'pretrain sft grpo', 'pretrain.tokens': 4800, 'sft.tokens': 3200, 'dropout': .1,
        'replay': 0, 'eval_every': 0, 'save_every': 0, 'sample_every': 0, 'plugins': 'vowels.py',
        'grpo.batch_tokens': 512, 'grpo.tokens': 512 * 6, 'grpo.max_new': 6, 'grpo.group': 4,
        'grpo.lr': .003, 'grpo.reward': 'vowels', 'context': 64, 'batch_tokens': 320,
        'grpo.warmup': 1, 'grpo.eval_every': 3}
PLUGIN = '''
from lm_nb.alignment.grpo import register_reward
@register_reward('vowels')
def _(run): return lambda examples, answers: [sum(c in 'aeiou' for c in a) / 9 for a in answers]
@register_reward('flat')
def _(run): return lambda examples, answers: [.1 for a in answers]
@register_reward('broken')
def _(run): return lambda examples, answers: [float('nan') for a in answers]
@register_reward('short')
def _(run): return lambda examples, answers: [1.]
'''


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    before = {k: v for k, v in KEYS.items() if 'grpo' not in k} | dict(stages='pretrain sft')
    folder = furnish(tmp_path_factory.mktemp('desk'), before)
    (folder/'vowels.py').write_text(PLUGIN)
    here = os.getcwd()
    os.chdir(folder)
    try:
        run = Run(load_recipe('tiny'), folder/'start')
        for name in ('pretrain', 'sft'): run_stage(run, name)
    finally: os.chdir(here)
    return furnish(folder, KEYS)


@pytest.fixture
def at_desk(desk, monkeypatch):
    monkeypatch.chdir(desk)
    return desk


def begun(desk, folder, *keys):
    "A run whose first two stages are done"
    if not folder.exists(): subprocess.run(['cp', '-r', desk/'start', folder], check=True)
    return Run(load_recipe('tiny', keys), folder)


def aligned(desk, folder, *keys):
    run_stage(begun(desk, folder, *keys), 'grpo')
    return folder


def weights(folder): return (folder/'aligned'/'model.safetensors').read_bytes()
def points(folder): return [r for r in read_log(folder/'grpo') if 'reward' in r]
def curve(folder):
    keys = 'step loss grad_norm lr reward kl kl_k3 length clipped entropy valid_reward'.split()
    return [[r.get(k) for k in keys] for r in read_log(folder/'grpo')]


@contextmanager
def stopping(monkeypatch, after):
    asked = []
    with monkeypatch.context() as m:
        m.setattr(sys.modules['lm_nb.training.stage'], 'train',
                  partial(train, stop=lambda: asked.append(1) or len(asked) >= after))
        with pytest.raises(Interrupted): yield


WAYS = {'one update': (), 'two updates': ('grpo.updates=2',),
        'k1': ('grpo.kl=k1_reward', 'grpo.micro_rows=3'),
        'adapters': ('grpo.lora_rank=2', 'grpo.lora_lr=0.01'), 'bf16': ('grpo.dtype=bf16',)}


@pytest.fixture(scope='module')
def whole(desk, tmp_path_factory):
    made = {}
    def make(way):
        if way not in made:
            made[way] = aligned(desk, tmp_path_factory.mktemp('whole')/'run', *WAYS[way])
        return made[way]
    return make


@pytest.mark.parametrize('way', WAYS)
def test_a_run_that_was_stopped_is_bitwise_the_run_that_was_not(
    whole, way, desk, at_desk, tmp_path, monkeypatch):
    with stopping(monkeypatch, 1): aligned(desk, tmp_path/'run', *WAYS[way])
    with stopping(monkeypatch, 1): aligned(desk, tmp_path/'run', *WAYS[way])
    aligned(desk, tmp_path/'run', *WAYS[way])
    assert weights(tmp_path/'run') == weights(whole(way))
    assert curve(tmp_path/'run') == curve(whole(way))
    assert weights(tmp_path/'run') != (desk/'start'/'chat'/'model.safetensors').read_bytes()


def test_steps_that_share_answers_are_not_parted(desk, at_desk, tmp_path, monkeypatch):
    keys = 'grpo.updates=3', 'save_every=2'
    with stopping(monkeypatch, 1): aligned(desk, tmp_path/'run', *keys)
    saved = (tmp_path/'run'/'grpo'/'checkpoints').glob('step-*')
    assert [p.name for p in saved] == ['step-00000003']


def test_killed_while_it_saves_at_every_step(whole, desk, at_desk, tmp_path):
    begun(desk, tmp_path/'run')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(PACKAGE), 'IN_TEST': '1'}
    words = [sys.executable, '-m', 'lm_nb.cli', 'run', 'tiny', f'run_dir={tmp_path}/run',
             'save_every=1']
    for step in (2, 4):
        p = subprocess.Popen(words, cwd=desk, env=env, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
        until = time.time() + 120
        while p.poll() is None and time.time() < until:
            saved = (tmp_path/'run'/'grpo'/'checkpoints').glob('step-*')
            if any(int(s.name[-8:]) >= step for s in saved if s.name[-8:].isdigit()): break
            time.sleep(.01)
        p.send_signal(signal.SIGKILL)
        p.wait()
    done = subprocess.run(words, cwd=desk, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert weights(tmp_path/'run') == weights(whole('one update'))


def feed_of(desk, folder, *keys):
    run = begun(desk, folder, *keys)
    feed = grpo_feed(run, 'grpo')
    return run, feed, find_stage('grpo').start(run).train()


def test_the_ratio_is_exactly_one_before_the_first_update(desk, at_desk, tmp_path):
    run, feed, gpt = feed_of(desk, tmp_path/'run', 'grpo.updates=2')
    assert all(getattr(m, 'p', 0.) == 0 for m in gpt.modules())   # the recipe says 0.1
    assert all(getattr(b.attn, 'dropout', 0.) == 0 for b in gpt.blocks)
    first, = feed.batches(0, gpt)
    assert first.old is None                                      # what training itself computes
    again, = feed.batches(1, gpt)                                 # the weights have not moved yet
    logp = token_logprobs(gpt, again).detach()
    assert (again.x == first.x).all() and (logp - again.old).abs().max() < 1e-6
    assert (logp - again.ref).abs().max() < 1e-6                  # nor away from the reference
    cfg = run.recipe.configs['grpo']
    one, two = (gradient(grpo_loss(gpt, b, cfg)[0], gpt) for b in (first, again))
    assert far(one, two) < 1e-4
    other, = feed.batches(2, gpt)
    assert other.x.shape != first.x.shape or (other.x != first.x).any()


class Some(Ranks):
    "One of several processes, without the others"


def test_a_rollout_is_a_function_of_seed_step_rank_and_weights(
    desk, at_desk, tmp_path, monkeypatch):
    module, seen = sys.modules['lm_nb.alignment.grpo'], []
    def noting(*args, plain=module.generate_batch, **kw):
        seen.append(torch.get_num_threads())
        return plain(*args, **kw)
    monkeypatch.setattr(module, 'generate_batch', noting)
    run, _, gpt = feed_of(desk, tmp_path/'run')
    cfg = replace(run.recipe.configs['grpo'], kl='none')
    def rollouts(rank=0, world=1, n=1):
        runtime = replace(run.runtime('grpo'), ranks=Some(rank=rank, world=world))
        return Rollouts(run.tokenizer, run.records('train')[:n],
                        lambda examples, answers: [0.] * len(answers), cfg, 64, runtime=runtime)
    def written(step, rank=0, world=1):
        rows = rollouts(rank, world)
        rows(step, gpt)
        return [w.answer for w in rows.written]
    here, threads = written(4), torch.get_num_threads()
    torch.manual_seed(99)
    torch.set_num_threads(2)  # where the decoder would try both, by the clock
    try: assert here == written(4)
    finally: torch.set_num_threads(threads)
    assert {*seen} == {1}
    assert here != written(3) and written(4, 0, 2) != written(4, 1, 2)
    def asked(rank, world): return [e.prompt for e, _ in rollouts(rank, world, 60).asked(5)]
    assert asked(0, 2) + asked(1, 2) == asked(0, 1) and len(asked(0, 1)) == 8


def test_rewards_that_are_all_equal_move_nothing(desk, at_desk, tmp_path):
    run = aligned(desk, tmp_path/'run', 'grpo.reward=flat', 'grpo.kl=none', 'grpo.weight_decay=.1')
    assert weights(run) == (run/'chat'/'model.safetensors').read_bytes()
    assert all(r['equal_groups'] == 1 and r['empty_steps'] == 1 for r in points(run))
    pulled = aligned(desk, tmp_path/'pulled', 'grpo.reward=flat', 'grpo.updates=2')
    assert not any('empty_steps' in r for r in points(pulled))    # the KL pulls all the same


def test_the_curves_and_samples_say_what_happens(whole):
    first, *_, last = points(whole('two updates'))
    assert {*'reward equal_groups length cut kl kl_k3 clipped entropy'.split()} <= {*first}
    assert abs(first['kl']) < 1e-5 and first['clipped'] == 0 and 0 < first['length'] <= 6
    assert 0 < first['entropy'] < math.log(400) and last['kl_k3'] > 1e-4
    assert sum('valid_reward' in r for r in read_log(whole('two updates')/'grpo')) == 2
    text = (whole('one update')/'grpo'/'samples.md').read_text()
    assert text.count('(reward ') >= 8 and '> When did' in text


def test_it_learns(desk, at_desk, tmp_path):
    run = aligned(desk, tmp_path/'run', 'grpo.tokens=15360', 'grpo.beta=0', 'grpo.lr=.01')
    got = [r['reward'] for r in points(run)]
    assert sum(got[-5:]) > 2 * sum(got[:5]) and sum(got[-5:]) > .5
    noise = aligned(desk, tmp_path/'noise', 'grpo.beta=0', 'grpo.reward=random')
    assert all(.2 < r['reward'] < .8 for r in points(noise))


def test_a_reward_model_is_the_reward_and_pairs_give_the_prompts(tmp_path, monkeypatch):
    keys = {'stages': 'pretrain sft reward grpo', 'grpo.tokens': 1024, 'grpo.batch_tokens': 512,
            'grpo.max_new': 12, 'grpo.group': 4, 'reward.tokens': 7680}
    others = {k: v for k, v in pairs.KEYS.items() if 'dpo' not in k}
    desk = furnish(pairs.furnish_pairs(tmp_path/'desk'), others | keys)
    monkeypatch.chdir(desk)
    run = Run(load_recipe('tiny'), desk/'run')
    for name in ('pretrain', 'sft'): run_stage(run, name)
    with pytest.raises(UserError, match='lm-nb reward tiny'): run_stage(run, 'grpo')
    for name in ('reward', 'grpo'): run_stage(run, name)
    assert run.folder_before('grpo').name == 'chat'
    first = points(run.folder)[0]
    model = run.model(find_stage('reward').output)
    feed = grpo_feed(run, 'grpo')
    feed.batches(0, find_stage('grpo').start(run).train())
    texts, examples = ([w[k] for w in feed.batches.written] for k in (3, 0))
    assert {e.prompt for e in examples} <= {p.prompt for p in run.preferences('train')}
    scores = score_answers(model, run.tokenizer, examples, texts)
    assert abs(sum(scores) / len(scores) - first['reward']) < 1e-4
    assert len({*scores}) > 1 and len(feed.fingerprints['reward']) == 64
    assert (run.folder/'aligned'/'model.safetensors').exists()


@pytest.mark.parametrize('keys, said', [
    (('grpo.kl=k2',), 'kl = k2: expected k1_reward, k2_loss, k3_loss or none'),
    (('grpo.per=tokens',), "per = tokens.*did you mean 'token'"),
    (('grpo.advantage=scale',), "advantage = scale.*did you mean 'scaled'"),
    (('grpo.group=1',), 'group = 1: expected 2'), (('grpo.updates=0',), 'updates = 0'),
    (('grpo.temperature=0',), 'temperature = 0'), (('grpo.clip_ratio=1',), 'clip_ratio = 1'),
    (('grpo.beta=-1',), 'beta = -1'), (('grpo.max_new=0',), 'max_new = 0'),
    (('grpo.parallel=fsdp',), 'grpo.parallel=ddp'), (('grpo.parallel=hsdp',), 'grpo.parallel=ddp'),
    (('grpo.reward=vowel',), "reward = vowel.*did you mean 'vowels'"),
    (('grpo.reward=values',), 'do not say which answer is preferred'),
    (('grpo.tasks=riddle',), 'tasks = riddle: no prompt is of the kind riddle; there are: none'),
    (('grpo.reward=quatrain',), 'no quatrain'), (('grpo.reward=broken',), 'no finite number'),
    (('grpo.reward=short',), 'gave 1 numbers for 8 answers'),
    (('grpo.max_new=60',), 'leaves room for grpo.max_new = 60 in 64 tokens'),
    (('grpo.max_length=99',), 'max_length = 99 is longer than context = 64'),
    (('grpo.group=16',), '1 groups of 16 rows of 64 tokens take 1024'),
    (('grpo.reward=model',), 'no stage before grpo trains one')])
def test_what_cannot_be_is_one_line(desk, at_desk, tmp_path, keys, said):
    with pytest.raises(UserError, match=said) as e: aligned(desk, tmp_path/'run', *keys)
    assert '\n' not in str(e.value)


def test_prompts_that_leave_no_room_are_left_out_and_counted(desk, at_desk, tmp_path, capsys):
    run = begun(desk, tmp_path/'run', 'grpo.max_new=30')
    cfg, examples = run.recipe.configs['grpo'], run.records('train')
    prompts = Rollouts(run.tokenizer, examples, None, cfg, 64).prompts
    sizes = sorted(len(ids) for _, ids in prompts)
    assert sizes[0] < sizes[-1] <= 34
    fits = sum(n < sizes[-1] for n in sizes)
    tight = begun(desk, tmp_path/'tight', f'grpo.max_new={65 - sizes[-1]}')
    cfg = tight.recipe.configs['grpo']
    assert len(Rollouts(run.tokenizer, examples, None, cfg, 64).prompts) == fits
    run_stage(tight, 'grpo')
    said = capsys.readouterr()
    assert f'grpo: {len(sizes) - fits} of {len(sizes)} prompts leave no room' in said.out + said.err


WORK = '''
import json, sys
from pathlib import Path
import torch
from lm_nb.training.ranks import close_ranks, init_ranks
from lm_nb.training.recipe import load_recipe
from lm_nb.training.run import Run
from lm_nb.training import stage
ranks, job = init_ranks(torch.device('cpu')), json.loads(sys.argv[1])
run = Run(load_recipe('tiny', job['keys']), job['folder'])
if job['last']:
    plain, n = stage.train, []
    stage.train = lambda *a, **k: plain(*a, stop=lambda: n.append(1) or len(n) >= job['last'], **k)
try: stage.run_stage(run, 'grpo', ranks)
except stage.Interrupted: pass
close_ranks()
'''


@pytest.mark.skipif(not torch.distributed.is_available(), reason='this torch cannot run two ranks')
def test_two_ranks_go_on_bitwise_and_ask_what_one_asks(desk, at_desk, tmp_path, monkeypatch, whole):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('PYTHONPATH', str(PACKAGE))
    (desk/'work.py').write_text(WORK)
    def ranks(name, last=0, *keys):
        begun(desk, tmp_path/name)
        lines, job = [], dict(folder=str(tmp_path/name), last=last, keys=keys)
        status = launch(desk/'work.py', [json.dumps(job)], 2, max_restarts=0, timeout=60,
                        show=lines.append)
        assert status == 0, '\n'.join(lines[-30:])
        return tmp_path/name
    calm = ranks('calm')
    ranks('hurt', 2)
    assert not (tmp_path/'hurt'/'aligned').exists()
    assert weights(ranks('hurt')) == weights(calm) and curve(tmp_path/'hurt') == curve(calm)
    one, two = points(whole('one update'))[0], points(calm)[0]
    assert abs(two['kl']) < 1e-5 and len(points(calm)) == 6 and one.keys() == two.keys()
    gpt, _ = load_model(calm/'aligned')
    assert all(p.isfinite().all() for p in gpt.parameters())


# --------------------------------------------------------------------------------- another library

class Trainer:
    "What trl's loss asks of its trainer; whatever else it asks for is off"
    def __init__(self, **known): vars(self).update(known)
    def __getattr__(self, name): return None


def trl_loss(logp, real, a, old, ref, kind):
    "That of its `GRPOTrainer`, on log-probabilities that are known"
    from trl import GRPOTrainer
    same = Trainer(gather=lambda t: t, reduce=lambda t, reduction: t, num_processes=1)
    me = Trainer(
        _get_per_token_logps_and_entropies=lambda *some, **how: (logp, logp.detach() * 0, None),
        top_entropy_quantile=1., importance_sampling_level='token', beta=.1, loss_type=kind,
        epsilon_low=.2, epsilon_high=.2, max_completion_length=5, args=Trainer(),
        current_gradient_accumulation_steps=1, model=Trainer(training=True), accelerator=same,
        _metrics=defaultdict(lambda: defaultdict(list)))
    mask = real.long()
    return GRPOTrainer._compute_loss(me, None, dict(
        prompt_ids=mask[:, :1], prompt_mask=mask[:, :1], completion_ids=mask, advantages=a,
        completion_mask=mask, old_per_token_logps=old, ref_per_token_logps=ref))


@pytest.mark.parametrize('per, kind', [('answer', 'grpo'), ('token', 'bnpo'),
                                       ('constant', 'dr_grpo')])
def test_the_loss_is_that_of_trl(world, per, kind):
    "On the same rows, with its k3 as a loss, after a step and before one"
    pytest.importorskip('trl')
    policy, real = small(0).float(), torch.ones(8, 3).bool()
    real[::2, 2], real[3, 1:] = False, False
    x, y, a = EVERY.x[40:48], EVERY.y[40:48], torch.linspace(-1, 1, 8)
    ref, old = world['ref'][40:48].float(), world['logp'][40:48].float()
    old = old + torch.linspace(-.5, .5, 24).view(8, 3)
    cfg = GRPOConfig(per=per, kl='k3_loss', beta=.1, max_new=5)
    for before in (old, None):
        batch = PolicyBatch(x, y.where(real, IGNORE), None, a, before, ref.where(real, 0.))
        total, count = grpo_loss(policy, batch, cfg)
        theirs = trl_loss(logprobs(policy, PolicyBatch(x, y, None, a)), real, a, before, ref, kind)
        assert abs(total / count - theirs) < 1e-5
        assert far(gradient(total / count, policy), gradient(theirs, policy)) < 1e-5
    record('trl', f'GRPO loss and gradient within 1e-5, {kind}', 2, 2)
