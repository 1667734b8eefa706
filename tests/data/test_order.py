"""The order of samples and the batches made from it, for odd sizes and many ranks"""
import threading, time
from itertools import chain

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

import lm_nb.data.order
from batch_tools import Bytes, assert_same
from lm_nb.core import UserError
from lm_nb.data.order import (
    MixtureBatches, _MixtureOrder, Order, Prefetcher, PretrainBatches, _mixture_at, _quotas,
    _sample_at, _window_batch, eval_batches, permute)
from lm_nb.data.shards import (
    IGNORE, Batch, Shards, concat_batches, pretrain_pair, write_token_shards)
from lm_nb.model.gpt import GPT, GPTConfig

tok = Bytes()


def learned(ids): return [IGNORE if i == tok.bos else i for i in map(int, ids)] # of targets


@pytest.fixture
def shards(tmp_path):
    docs = [f'document {i} ' + 'x'*(i*7 % 40) for i in range(50)]
    write_token_shards(docs, tok, tmp_path/'s', shard_tokens=300)
    return Shards(tmp_path/'s', tok)


# ------------------------------------------------------------------ the order

@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(-2**70, 2**70))
def test_permute_is_a_bijection(n, key):
    out = permute(np.arange(n), n, key)
    assert (np.sort(out) == np.arange(n)).all()
    assert permute(n - 1, n, key) == out[-1] and isinstance(permute(0, n, key), int)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**60), st.integers(0, 2**64 - 1), st.data())
def test_permute_of_large_ranges(n, key, data):
    i = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=20))))
    out = permute(i, n, key)
    assert len(set(out.tolist())) == len(i) and 0 <= out.min() and out.max() < n
    assert (permute(i.reshape(1, -1), n, key) == out).all()


@pytest.mark.parametrize('i,n', [(-1, 5), (5, 5), ([], 5), (0, 0)])
def test_permute_outside_its_range(i, n):
    with pytest.raises(UserError, match='range'): permute(i, n, 0)


@pytest.mark.parametrize('n', [5, 8, 17])
def test_every_sample_is_equally_likely_everywhere(n):
    trials = 90*n
    counts = np.zeros((n, n))
    for key in range(trials): counts[np.arange(n), permute(np.arange(n), n, key)] += 1
    expected = trials/n
    chi2 = ((counts - expected)**2/expected).sum()
    free = (n - 1)**2
    assert abs(chi2 - free) < 5*(2*free)**.5


def test_neighbours_do_not_stay_neighbours():
    order = permute(np.arange(20000), 20000, 11).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < .03
    assert abs(np.corrcoef(np.arange(20000), order)[0, 1]) < .03


def test_epochs_and_seeds_have_orders_of_their_own():
    n = 500
    runs = {seed: _sample_at(np.arange(3*n), n, seed).reshape(3, n) for seed in range(-1, 4)}
    orders = [tuple(epoch) for run in runs.values() for epoch in run]
    assert len(set(orders)) == len(orders)
    assert all(sorted(o) == list(range(n)) for o in orders)
    shared = [(np.array(a) == np.array(b)).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert max(shared) < 15


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(1, 30),
       st.integers(0, 2**40), st.integers(0, 10**9))
def test_ranks_partition_a_step(n, share, world, micro, seed, step):
    rows = share*world
    whole = np.concatenate(Order(n, rows, seed)(step))
    parts = [Order(n, rows, seed, r, world, micro)(step) for r in range(world)]
    assert np.concatenate(list(chain(*parts))).tolist() == whole.tolist()
    # as many micro-batches of the same sizes on every rank
    assert len({tuple(map(len, p)) for p in parts}) == 1
    assert max(map(len, parts[0])) <= micro and len(whole) == rows


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 99))
def test_an_epoch_visits_every_sample_once(n, rows, seed):
    order = Order(n, rows, seed)
    stream = np.concatenate([b for step in range(2*n) for b in order(step)])
    epochs = stream[:len(stream)//n*n].reshape(-1, n)
    assert (np.sort(epochs, 1) == np.arange(n)).all()
    assert (order.steps_per_epoch - 1)*rows < n <= order.steps_per_epoch*rows


@pytest.mark.parametrize('kw', [
    dict(n=0, rows=1), dict(n=5, rows=0), dict(n=5, rows=1, world=2),
    dict(n=5, rows=2, rank=2, world=2), dict(n=5, rows=2, micro_rows=0)])
def test_impossible_orders(kw):
    with pytest.raises(UserError): Order(**kw)


def counted(call):
    "How many numbers went through a Feistel network in `call`, and in how many goes"
    sizes, real = [], lm_nb.data.order._feistel
    def watched(i, half, keys):
        sizes.append(len(i))
        return real(i, half, keys)
    lm_nb.data.order._feistel = watched
    try: call()
    finally: lm_nb.data.order._feistel = real
    return sum(sizes), len(sizes)


@pytest.mark.parametrize('world', [1, 2, 3, 4, 8])
def test_a_million_samples_each_once_an_epoch(world):
    n, rows = 10**6, 7993  # neither divides the other: steps cross epochs, ranks get unequal shares
    ranks = [Order(n, rows, 5, r, world) for r in range(world)]
    read = np.concatenate([b for step in range(-(-2*n//rows)) for o in ranks for b in o(step)])
    read = read[:2*n].reshape(2, n)
    for epoch in read: assert (np.bincount(epoch, minlength=n) == 1).all()
    assert (read[0] == read[1]).sum() < 20


def test_step_a_million_costs_what_step_zero_costs():
    order = Order(10**6, 512, 3)
    (first, goes), (late, late_goes) = counted(lambda: order(0)), counted(lambda: order(10**6))
    # 32 steps are worked out together
    assert first < 4*32*512 and late < 4*32*512 and max(goes, late_goes) < 40
    mixed = _MixtureOrder([10**6, 5000, 10**9], [5, 1, 9], 512, 3)
    (first, _), (late, _) = counted(lambda: mixed(0)), counted(lambda: mixed(10**6))
    assert first < 4*(512 + 2*1000) and late < 4*(512 + 2*1000)  # a step touches two blocks at most
    start = time.perf_counter()
    for step in range(10**6, 10**6 + 5): order(step)
    assert (time.perf_counter() - start)/5 < .05


@pytest.mark.parametrize('make', [
    lambda r, w: Order(1000, 24, 1, r, w),
    lambda r, w: _MixtureOrder([500, 100], [1, 2], 24, 1, r, w, 5)])
def test_the_number_of_ranks_changes_on_the_way(make):
    def read(worlds):
        micros = [m for step, w in enumerate(worlds) for r in range(w) for m in make(r, w)(step)]
        return [tuple(np.atleast_1d(i)) for m in micros for i in m]
    assert read([1]*12) == read([4]*3 + [1]*2 + [8]*3 + [3]*4)


# ------------------------------------------------------------------ mixtures

weights = st.lists(st.floats(.02, 1), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(weights, st.integers(300, 2000))
def test_quotas_are_the_weights_to_the_nearest(w, block):
    q, exact = _quotas(w, block), np.array(w)/sum(w)*block
    assert q.sum() == block and (abs(q - exact) < 1).all() and q.min() > 0
    near_a_half = min(abs(exact - np.round(exact*2)/2)) < 1e-6
    assert near_a_half or (_quotas(np.array(w)*7.5, block) == q).all()


@pytest.mark.parametrize('w', [
    [], [0], [1, -1], [1, float('nan')], [1, float('inf')], [[1]], [1, 1e-9], [1]*1001])
def test_impossible_weights(w):
    with pytest.raises(UserError, match='weights|smallest'): _quotas(w)


@settings(max_examples=25, deadline=None)
@given(weights, st.integers(0, 10**6), st.integers(-5, 5), st.data())
def test_blocks_hold_their_quota_and_sources_count_on(w, k, seed, data):
    q = _quotas(w)
    source, turn = _mixture_at(np.arange(k*1000, k*1000 + 2000), q, seed)
    for s in range(len(q)):
        assert (source[:1000] == s).sum() == (source[1000:] == s).sum() == q[s]
        assert (turn[source == s] == k*q[s] + np.arange(2*q[s])).all()
    at = np.array(data.draw(st.lists(st.integers(0, 1999), min_size=1, max_size=20)))
    got = _mixture_at(k*1000 + at, q, seed)
    assert (got[0] == source[at]).all() and (got[1] == turn[at]).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.integers(1, 40),
       st.integers(1, 5), st.integers(1, 9), st.integers(0, 10**7))
def test_ranks_partition_a_mixed_step(sizes, rows, world, micro, step):
    rows += world
    weights = [1 + s for s in range(len(sizes))]
    whole = [row for m in _MixtureOrder(sizes, weights, rows, 9)(step) for row in m]
    orders = [_MixtureOrder(sizes, weights, rows, 9, r, world, micro) for r in range(world)]
    parts = [row for order in orders for m in order(step) for row in m]
    assert parts == whole and len(whole) == rows
    assert all(0 <= k < sizes[s] for s, k in whole)


def test_each_source_is_read_out_before_it_comes_again():
    mixed = _MixtureOrder([3000, 70, 450], [.6, .1, .3], 100, 2)
    rows = np.array([row for step in range(120) for m in mixed(step) for row in m])
    for s, n in enumerate(mixed.sizes):
        mine = rows[rows[:, 0] == s, 1]
        epochs = mine[:len(mine)//n*n].reshape(-1, n)
        assert len(epochs) and (np.sort(epochs, 1) == np.arange(n)).all()
        assert abs(mixed.epochs(120)[s] - len(mine)/n) < 1e-9
    assert (np.bincount(rows[:, 0])/len(rows)).round(3).tolist() == [.6, .1, .3]


def test_a_mixed_batch_holds_the_windows_it_names(tmp_path):
    for name in 'ab':
        write_token_shards([name*(5 + i) for i in range(90)], tok, tmp_path/name, shard_tokens=500)
    parts = [Shards(tmp_path/name, tok) for name in 'ab']
    mixed = MixtureBatches(parts, [1, 3], 20, rows=6, seed=4, micro_rows=4)
    for step in (0, 3, 10**5):
        for named, batch in zip(mixed.order(step), mixed(step), strict=True):
            assert batch.weight is None
            for (s, k), x, y, doc in zip(named, batch.x, batch.y, batch.doc, strict=True):
                want = pretrain_pair(parts[s].tokens(20*k, 20*k + 21))
                assert (x == want[0]).all() and y.tolist() == learned(want[1])
                assert doc.tolist() == [want[0][:i].tolist().count(tok.eos) for i in range(20)]
    assert mixed(0)[0].doc is not None
    assert MixtureBatches(parts, [1, 1], 20, rows=6, doc_mask=False)(0)[0].doc is None


@pytest.mark.parametrize('sources,w', [([], []), ('a', [1, 2]), ('ab', [1])])
def test_impossible_mixtures(tmp_path, sources, w):
    for name in 'ab': write_token_shards([name*50], tok, tmp_path/name)
    with pytest.raises(UserError):
        MixtureBatches([Shards(tmp_path/s) for s in sources], w, 8, rows=2)


def test_a_mixture_of_tokenizers_names_the_folder(tmp_path):
    for name in 'ab': write_token_shards([name*50], Bytes(sha=name*64), tmp_path/name)
    sources = [Shards(tmp_path/name) for name in 'ab']
    with pytest.raises(UserError, match='b: written with another tokenizer'):
        MixtureBatches(sources, [1, 1], 8, rows=2)


# ------------------------------------------------------------------ prefetching

def test_prefetched_batches_are_the_same(shards):
    plain = PretrainBatches(shards, 16, rows=6, micro_rows=2)
    prefetched = Prefetcher(plain)
    for step in (0, 1, 2, 2, 9, 10, 4):
        for a, b in zip(prefetched(step), plain(step), strict=True): assert_same(a, b)
    assert prefetched.steps_per_epoch == plain.steps_per_epoch


def test_weights_survive_prefetching():
    def batches(step):
        ids = torch.full((1, 2), step)
        return [Batch(ids, ids, weight=ids/2)]
    doubled = Prefetcher(batches, lambda micros: [b.map(lambda t: 2*t) for b in micros])
    for step in (1, 2, 7): assert doubled(step)[0].weight.tolist() == [[step, step]]


def test_prefetching_works_while_the_model_does():
    asked, slow = [], threading.Event()
    def batches(step):
        asked.append((step, threading.current_thread()))
        if step == 1: slow.wait(5)
        return step
    prefetched = Prefetcher(batches)
    assert prefetched(0) == 0  # comes back although step 1 is not ready
    slow.set()
    assert prefetched(1) == 1 and [s for s, _ in asked][:2] == [0, 1]
    assert asked[0][1] is threading.main_thread() and asked[1][1] is not threading.main_thread()


def test_what_went_wrong_is_reported_at_its_step():
    def batches(step):
        if step == 1: raise UserError('the disk went away')
        return step
    prefetched = Prefetcher(batches)
    assert prefetched(0) == 0
    with pytest.raises(UserError, match='went away'): prefetched(1)


# ------------------------------------------------------------------ documents that share a row

@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
def test_documents_in_a_row_are_as_if_alone(tmp_path, arch):
    "The logits of a packed row are those of its documents, each in a row of its own"
    torch.manual_seed(0)
    cfg = GPTConfig(arch=arch, vocab_size=len(tok), context=64, n_layer=2, n_head=2, d_model=32,
                    zero_init=False)
    gpt = GPT(cfg).eval()
    docs = ['alpha beta', 'x', '天地玄黃', 'one two three four five', 'a'*30]
    write_token_shards(docs, tok, tmp_path/'s')
    s = Shards(tmp_path/'s', tok)
    packed = _window_batch([s.tokens(0, 65)], s.bos, s.eos)
    with torch.no_grad():
        got, blind = gpt(packed.x, doc=packed.doc)[0], gpt(packed.x)[0]
        numbers = packed.doc[0].unique().tolist()
        assert numbers == [0, 1, 2, 3, 4] and (packed.x == tok.bos).sum() == 5
        for d in numbers:
            here = packed.doc[0] == d
            alone = gpt(packed.x[:, here])[0]
            torch.testing.assert_close(got[here], alone, atol=1e-5, rtol=1e-5)
            # without the mask they do see each other
            assert d == 0 or (blind[here] - alone).abs().max() > 1e-3


# ------------------------------------------------------------------ batches

@pytest.mark.parametrize('context', [1, 7, 64])
@pytest.mark.parametrize('world,micro', [(1, None), (2, 2), (3, 1)])
def test_batches_are_the_same_for_any_number_of_ranks(shards, context, world, micro):
    one = PretrainBatches(shards, context, rows=6, seed=3)
    many = [PretrainBatches(shards, context, rows=6, seed=3, rank=r, world=world, micro_rows=micro)
            for r in range(world)]
    for step in (0, 5, one.steps_per_epoch):
        assert_same(concat_batches([b for m in many for b in m(step)]), one(step)[0])


def test_an_epoch_covers_the_corpus(shards):
    c = 13
    b = PretrainBatches(shards, c, rows=1)
    n = b.steps_per_epoch
    got = sorted(tuple(b(step)[0].y[0].tolist()) for step in range(n))
    ids = shards.tokens(0, len(shards))
    assert got == sorted(tuple(learned(ids[k*c + 1 : (k + 1)*c + 1])) for k in range(n))
    assert 0 <= len(shards) - 1 - n*c < c


def test_document_numbers_follow_the_documents(shards):
    sizes = np.concatenate([np.diff(o) for o in shards.offsets])
    owner = np.repeat(np.arange(shards.n_docs), sizes)
    b = PretrainBatches(shards, 40, rows=4)
    for step in range(b.steps_per_epoch):
        for k, doc in zip(b.order(step)[0], b(step)[0].doc):
            want = owner[k*40 : k*40 + 40]
            assert doc.tolist() == (want - want[0]).tolist()


def test_no_document_numbers_without_the_mask(shards):
    assert PretrainBatches(shards, 8, rows=2, doc_mask=False)(0)[0].doc is None
    assert all(b.doc is None for b in eval_batches(shards, 8, 2, doc_mask=False))


def test_too_short_a_text_says_what_to_lower(tmp_path):
    write_token_shards(['abcdefg'], tok, tmp_path/'s')
    s = Shards(tmp_path/'s')
    says = '9 tokens, but one window of context 9 takes 10; lower context to at most 8'
    with pytest.raises(UserError, match=says):
        PretrainBatches(s, 9, rows=1)
    assert PretrainBatches(s, 8, rows=1)(0)[0].x.shape == (1, 8)
    with pytest.raises(UserError): PretrainBatches(s, 0, rows=1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 5), st.booleans())
def test_eval_batches_cover_every_target_once(tmp_path_factory, size, context, rows, doc_mask):
    path = tmp_path_factory.mktemp('shards')/'s'
    docs = ['ab']*(size//3) + ['x'*(size % 3 or 1)]
    write_token_shards(docs, tok, path, shard_tokens=10)
    s = Shards(path)
    ids, batches = s.tokens(0, len(s)), list(eval_batches(s, context, rows, doc_mask))
    y, x = (torch.cat([getattr(b, k).flatten() for b in batches]) for k in 'yx')
    real = torch.arange(len(y)) < len(s) - 1
    assert y[real].tolist() == learned(ids[1:]) and (y[~real] == IGNORE).all()
    spelled = s.n_docs + len(''.join(docs))  # a document's targets are its pieces and `eos`
    assert (y != IGNORE).sum() == spelled
    assert x[real].tolist() == ids[:-1].tolist() and (x[~real] == tok.pad).all()
    for b in batches: assert b.x.shape == b.y.shape and b.x.shape[1] == context and len(b.x) <= rows
    assert len(y) - (len(s) - 1) < context
    if doc_mask: assert ((torch.cat([b.doc.flatten() for b in batches]) == -1) == ~real).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text('ab天', min_size=1, max_size=9), min_size=8, max_size=20),
       st.integers(1, 23), st.sampled_from(['windows', 'mixture', 'in order']))
def test_a_document_begins_from_bos_alone_and_bos_is_never_a_target(
        tmp_path_factory, docs, context, how):
    path = tmp_path_factory.mktemp('shards')/'s'
    write_token_shards(docs, tok, path, shard_tokens=20)
    s = Shards(path)
    if how == 'windows': of = PretrainBatches(s, context, rows=2)
    if how == 'mixture': of = MixtureBatches([s, s], [1, 2], context, rows=2)
    batches = list(eval_batches(s, context, 2)) if how == 'in order' else [
        b for step in range(of.steps_per_epoch) for b in of(step)]
    begun = 0
    for b in batches:
        assert not (b.y == tok.bos).any()
        for x, y, doc in zip(b.x.tolist(), b.y.tolist(), b.doc.tolist(), strict=True):
            for t, target in enumerate(y):
                if target == IGNORE: continue
                assert x[t] != tok.eos  # what follows a document cannot be foretold from it
                if x[t] == tok.bos:
                    begun += 1
                    assert t == 0 or x[t-1] == tok.eos and doc[t-1] == doc[t] - 1
    if how == 'in order': assert begun == len(docs)  # each of them, once


def test_first_pieces_have_the_loss_of_a_text_alone(tmp_path):
    "Packed, the first piece of each document is as probable as behind `bos` and nothing else"
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=len(tok), context=32, n_layer=2, n_head=2, d_model=32,
                        zero_init=False)).eval()
    docs = ['alpha', 'b', '天地玄黃', 'one two three', 'x'*30]
    write_token_shards(docs, tok, tmp_path/'s')
    with torch.no_grad():
        alone, found = gpt(torch.tensor([[tok.bos]]))[0, 0], []
        for b in eval_batches(Shards(tmp_path/'s'), 32, 2):
            logits = gpt(b.x, doc=b.doc)
            for row, t in zip(*(b.x == tok.bos).nonzero(as_tuple=True)):
                found.append(b.y[row, t].item())
                torch.testing.assert_close(logits[row, t], alone, atol=1e-5, rtol=1e-5)
    assert found == [tok.encode_batch([d])[0][0] for d in docs]


# ------------------------------------------------------------------ what recorded runs rest on


def test_the_order_of_samples_is_the_one_of_the_recorded_runs(tmp_path):
    "Another order would be as good, but a run that is resumed would skip samples and repeat others"
    assert _sample_at(np.arange(8, 16), 12, seed=5).tolist() == [2, 3, 8, 0, 2, 11, 0, 8]
    order = Order(10**9, 5, 3, rank=0, world=2, micro_rows=2)
    assert [m.tolist() for m in order(10**7)] == [[529488246, 924087443], [274408375]]
    mixed = _MixtureOrder([900, 100, 400], [.7, .2, .1], rows=6, seed=2)
    assert mixed(400) == [[(0, 874), (0, 826), (0, 217), (0, 740), (1, 54), (0, 233)]]
