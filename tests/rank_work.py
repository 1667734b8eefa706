"""What each rank does in the tests of several processes: a small model trained by the real loop. Started by the launcher with one JSON argument"""
import hashlib, json, os, sys, time
from pathlib import Path

import torch

from lm_nb.core import UserError
from lm_nb.model import GPT, GPTConfig
from lm_nb.ranks import Ranks, close_ranks, init_ranks, lost_ranks, unwrap
from lm_nb.shards import IGNORE, Batch, Order
from lm_nb.train import TrainConfig, train

CPU = torch.device('cpu')
SHAPE = dict(vocab_size=101, context=16, n_layer=2, n_head=2, d_model=36, d_ff=70)  # sizes that no number of ranks divides evenly
ROWS = 12


def batches(ranks, micro_rows=None, pause=0.):
    "Rows of a made-up language in which the next token depends on the last two; some targets are left out"
    order = Order(500, ROWS, 0, ranks.rank, ranks.world, micro_rows)
    def row(k):
        ids = [int(k) % 97 + 3, int(k) % 89 + 5]
        for _ in range(15): ids.append((3*ids[-1] + ids[-2]) % 101)
        y = torch.tensor(ids[1:])
        y[: int(k) % 7] = IGNORE
        return torch.tensor(ids[:-1]), y
    def at(step):
        time.sleep(pause)
        return [Batch(*(torch.stack(t) for t in zip(*map(row, micro))), None) for micro in order(step)]
    return at


def digest(gpt, ranks):
    "One fingerprint of all weights"
    whole = unwrap(gpt, ranks).state_dict()
    return hashlib.sha256(b''.join(t.detach().cpu().numpy().tobytes() for t in whole.values())).hexdigest()


def settings(job):
    own = dict(optimizer='muon', lr=1e-3, muon_lr=0.01, warmup=4, cooldown=0.5, device='cpu', dtype='fp32', log_every=1, eval_every=0, save_every=0)
    return TrainConfig(**{**own, 'batch_tokens': ROWS*16, 'tokens': ROWS*16*job.get('steps', 20), **job.get('cfg', {})})


def work(job, ranks=Ranks()):
    "Train to `until` of the job's steps; what the test wants to know as JSON"
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**{**SHAPE, **job.get('model', {})}))
    cfg, folder, seen = settings(job), Path(job['folder']), []
    feed = batches(ranks, cfg.micro_rows, job.get('pause', 0.))
    def watched(step):
        seen.append(step)
        return feed(step)
    until = job.get('until', cfg.steps)
    try: train(gpt, watched, cfg, folder, ranks=ranks, stop=lambda: len(seen) > 0 and max(seen) + 1 >= until)
    except UserError as e:
        if 'and saved' not in str(e): raise
    return dict(first=min(seen, default=None), weights=digest(gpt, ranks), sharded=any(hasattr(p, 'full_tensor') for p in gpt.parameters()))


def main(job):
    torch.set_num_threads(1)
    ranks, status = init_ranks(CPU), 0
    Path(job['folder'], 'pids').mkdir(parents=True, exist_ok=True)
    Path(job['folder'], 'pids', f'{ranks.rank}-{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}').write_text(str(os.getpid()))
    try:
        for one in job.get('jobs', [job]):
            with lost_ranks(ranks): got = work(one, ranks)
            if ranks.first: Path(one['folder'], f'told-{ranks.world}.json').write_text(json.dumps(got))
    except UserError as e:
        if str(e): print(e, file=sys.stderr)
        status = e.status
    close_ranks(status)
    return status


if __name__ == '__main__': sys.exit(main(json.loads(sys.argv[1])))
