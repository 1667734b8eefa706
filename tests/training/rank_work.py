"""What each rank does in the tests of several processes: a small model trained by the real loop.
Started by the launcher with one JSON argument"""
import hashlib, json, os, sys, time
from pathlib import Path

import torch

from lm_nb.training.checkpoint import Saver, _run_state
from lm_nb.core import UserError
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.model.lora import add_lora
from lm_nb.training.optim import _full_tensor, make_optimizers
from lm_nb.training.loop import Ranks, Runtime
from lm_nb.training.ranks import (
    agree, close_ranks, init_ranks, lost_ranks, unwrap, wrap)
from lm_nb.data.shards import IGNORE, Batch
from lm_nb.data.order import Order
from lm_nb.training.loop import TrainConfig
from lm_nb.training.recipe import Feed
from lm_nb.training.stage import train

CPU = torch.device('cpu')
# sizes that no number of ranks divides evenly
SHAPE = dict(vocab_size=101, context=16, n_layer=2, n_head=2, d_model=36, d_ff=70)
ROWS = 12


def batches(ranks, micro_rows=None, pause=0.):
    """Rows of a made-up language in which the next token depends on the last two; some targets are
    ignored"""
    order = Order(500, ROWS, 0, ranks.rank, ranks.world, micro_rows)
    def row(k):
        ids = [int(k) % 97 + 3, int(k) % 89 + 5]
        for _ in range(15): ids.append((3*ids[-1] + ids[-2]) % 101)
        y = torch.tensor(ids[1:])
        y[: int(k) % 7] = IGNORE
        return torch.tensor(ids[:-1]), y
    def at(step):
        time.sleep(pause)
        return [Batch(*(torch.stack(t) for t in zip(*map(row, micro))), None)
                for micro in order(step)]
    return at


def digest(tensors):
    "One fingerprint of named tensors, whole ones or spread over ranks"
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(name.encode())
        h.update(_full_tensor(tensors[name].detach()).cpu().contiguous().numpy().tobytes())
    return h.hexdigest()


def model(job):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**{**SHAPE, **job.get('model', {})}))
    return add_lora(gpt, job['lora']) if 'lora' in job else gpt


def settings(job):
    own = dict(optimizer='muon', lr=1e-3, muon_lr=0.01, warmup=4, cooldown=0.5, device='cpu',
               dtype='fp32', log_every=1, eval_every=0, save_every=0)
    return TrainConfig(**{**own, 'batch_tokens': ROWS*16, 'tokens': ROWS*16*job.get('steps', 20),
                          **job.get('cfg', {})})


def learn(job, ranks=Ranks()):
    "Train to step `until`"
    gpt, cfg, seen = model(job), settings(job), []
    feed = batches(ranks, cfg.micro_rows, job.get('pause', 0.))
    def watched(step):
        seen.append(step)
        return feed(step)
    until = job.get('until', cfg.steps)
    def stop(): return seen[-1] + 1 >= until
    try: train(gpt, Feed(watched), cfg, job['folder'], ranks=ranks, stop=stop)
    except UserError as e:
        if 'and saved' not in str(e): raise
    return dict(first=min(seen, default=None), weights=digest(unwrap(gpt, ranks).state_dict()),
                sharded=any(hasattr(p, 'full_tensor') for p in gpt.parameters()))


def peek(job, ranks=Ranks()):
    """Load the newest checkpoint on these ranks, and write it again elsewhere: what it holds, and
    what comes back"""
    def hold():
        gpt, cfg = model(job), settings(job)
        wrap(gpt, cfg.parallel, ranks, cfg.shard_group)
        return gpt, make_optimizers(gpt, cfg)
    own = hold()
    step, extra = Saver(Path(job['folder'])/'checkpoints', *own, ranks=ranks).load()
    with Saver(Path(job['folder'])/f'copy-{ranks.world}', *own, ranks=ranks) as saver:
        saver.save(step, extra)
    again = hold()
    Saver(Path(job['folder'])/f'copy-{ranks.world}', *again, ranks=ranks).load()
    return dict(step=step, weights=digest(unwrap(own[0], ranks).state_dict()),
                state=digest(_run_state(*own)), again=digest(_run_state(*again)))


def exchanges(job, ranks):
    """How often ranks exchange gradients in a step of so many micro-batches, and whether they do
    before the last one"""
    counts = {}
    for micros in 1, 3:
        gpt, cfg = model(job), settings(job)
        net = wrap(gpt, cfg.parallel, ranks, cfg.shard_group)
        parts = [b for step in range(micros) for b in batches(ranks)(step)]
        for _warm in True, False:  # the first step builds buckets
            before = []
            with torch.profiler.profile() as prof:
                for i, b in enumerate(parts):
                    with ranks.sync_on_last(net, i == micros - 1):
                        (net(b.x, targets=b.y) / 100).backward()
                    before.append(next(None if p.grad is None else _full_tensor(p.grad).clone()
                                       for p in gpt.parameters()))
            net.zero_grad()
        names = 'reduce_scatter', 'allreduce', 'all_reduce'
        counts[micros] = sum(e.count for e in prof.key_averages() if e.key.startswith('gloo:')
                             and any(n in e.key for n in names))
        if ranks.world > 1 and micros > 1:
            early = before[0]
            sums = None if early is None else [early.clone() for _ in range(ranks.world)]
            if sums: torch.distributed.all_gather(sums, early)
            apart = sums is None or not torch.equal(sums[0], sums[1])
    return dict(one=counts[1], three=counts[3], apart=apart)


def travels(job, ranks):
    "The dtypes of gathered blocks, and of what each rank holds and moves, after a sharded step"
    gpt, cfg, gathered = model(job), settings(job), set()
    net = wrap(gpt, 'fsdp', ranks, dtype=cfg.dtype)
    for b in gpt.blocks:
        b.attn.q_proj.register_forward_hook(lambda m, x, y: gathered.add(str(m.weight.dtype)))
    optimizers, runtime = make_optimizers(gpt, cfg), Runtime(ranks=ranks, dtype=cfg.dtype)
    for b in batches(ranks)(0):
        with runtime.autocast(): loss = net(b.x, targets=b.y) / 100
        loss.backward()
    gradients = {str(p.grad.dtype) for p in gpt.parameters()}
    for o in optimizers: o.step()
    means = {str(t.dtype) for o in optimizers for s in o.state.values() for t in s.values()}
    return dict(blocks=sorted(gathered), weights=sorted({str(p.dtype) for p in gpt.parameters()}),
                gradients=sorted(gradients), means=sorted(means))


def uneven(job, ranks):
    "Ranks that do not have the same number of micro-batches"
    agree(2 + ranks.rank, 'micro-batches in a step', ranks)


def main(job):
    torch.set_num_threads(1)
    ranks, status = init_ranks(CPU), 0
    pids = Path(job['folder'], 'pids')
    pids.mkdir(parents=True, exist_ok=True)
    (pids/f'{ranks.rank}-{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}').write_text(
        str(os.getpid()))
    try:
        with lost_ranks(ranks):
            got = [globals()[one.get('do', 'learn')](one, ranks) for one in job['jobs']]
        if ranks.first: Path(job['folder'], 'told.json').write_text(json.dumps(got))
    except UserError as e:
        if str(e): print(e, file=sys.stderr)
        status = e.status
    close_ranks(status)
    return status


if __name__ == '__main__': sys.exit(main(json.loads(sys.argv[1])))
