"The measuring instrument, on clocks and programs whose truth is known, however long anything took"
import inspect
import json
import sys
from dataclasses import asdict
from itertools import count

import numpy as np
import pytest

import lm_nb.bench.measure as bench
from lm_nb.bench.measure import (
    BENCHMARKS, Line, Measure, Result, in_turn, load_benchmarks, paired, peak_rss, plot_goals,
    read_result, run_benchmarks, summary_table)
from lm_nb.core import Table, UserError

load_benchmarks()


class Clock:
    "Time that passes only when somebody works, at a pace of its own"
    def __init__(self, pace=lambda now: 1.): self.now, self.pace = 0., pace
    def __call__(self): return self.now
    def work(self, seconds): self.now += seconds*self.pace(self.now)


@pytest.mark.parametrize('truth', [.5, 1., 3.])
@pytest.mark.parametrize('pace', [lambda t: 1., lambda t: 1 + t/100, lambda t: 1 + .3*np.sin(t)],
                         ids=['even', 'slowing', 'waves'])
def test_the_ratio_survives_a_drifting_machine(truth, pace):
    clock = Clock(pace)
    found = paired(lambda: clock.work(1), lambda: clock.work(truth), rounds=15, clock=clock)
    assert found.ratio.median == pytest.approx(truth, rel=.12)


def test_a_linear_drift_cancels_where_plain_order_would_not():
    starts = count(100)
    clock = Clock()
    def side(): clock.now += next(starts)  # each call takes one unit longer than the one before
    found = paired(side, side, rounds=4, clock=clock)
    assert found.ratio.values == pytest.approx((1, 1, 1, 1))
    assert found.a.values == found.b.values == (103.5, 107.5, 111.5, 115.5)


def test_one_bad_moment_moves_no_median_but_is_told():
    turn = count()
    clock = Clock()
    def a(): clock.now += 50 if next(turn) == 5 else 1
    def b(): clock.now += 2
    found = paired(a, b, rounds=5, clock=clock)
    assert found.ratio.median == 2 and found.ratio.noisy and not found.b.noisy
    assert 'noisy' in str(Line('x', found.ratio))


def test_the_device_is_waited_for_before_each_reading_of_the_clock():
    seen = []
    def note(sign): return lambda: seen.append(sign)
    def clock():
        seen.append('t')
        return float(len(seen))
    paired(note('a'), note('b'), rounds=1, wait=note('|'), clock=clock)
    assert ''.join(seen) == 'ab' + ''.join(f'|t{side}|t' for side in 'abba')


@pytest.mark.parametrize('pace', [lambda t: 1., lambda t: 1 + t/100], ids=['even', 'slowing'])
def test_many_sides_go_there_and_back_and_each_pair_has_its_ratio(pace):
    clock, order = Clock(pace), []
    def side(name, seconds):
        def work():
            order.append(name)
            clock.work(seconds)
            return name
        return work
    truth = dict(zip('abcd', (1., 2., .5, 4.)))
    found = in_turn({n: side(n, s) for n, s in truth.items()}, rounds=7, clock=clock)
    assert ''.join(order) == 'abcd' + 7*'abcddcba'
    for a, b in (('a', 'b'), ('d', 'c'), ('b', 'd')):
        ratio = found.ratio(a, b)
        assert ratio.median == pytest.approx(truth[b]/truth[a], rel=.02)
        low, high = ratio.interval
        assert low <= ratio.median <= high
    assert found.fastest('abd') == 'a' and found.fastest('abcd') == 'c'
    with pytest.raises(UserError, match='b gave a different result than a'):
        in_turn({n: side(n, 1.) for n in 'ab'}, same=str.__eq__)


@pytest.mark.parametrize('n, ends', [(1, None), (5, None), (6, (0, 5)), (8, (0, 7)), (9, (1, 7)),
                                     (20, (5, 14))])
def test_the_interval_of_a_median_counts_from_both_ends(n, ends):
    values = tuple(np.random.default_rng(0).permutation(n).tolist())
    assert Measure(values).interval == ends
    told = str(Line('x', Measure(values, 's')))
    assert (ends is None) == (' to ' not in told)


def test_what_was_saved_is_read_back(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, 'BENCHMARKS', two_benchmarks())
    results = run_benchmarks(log=None, save=str(tmp_path), n=7)
    for result in results:
        again = read_result(tmp_path/f'{result.name}.json')
        assert (again, str(again)) == (result, str(result))
    assert results[1].options == {'n': 7} and results[1]['y'].median == 7
    assert {'commit', 'lm_nb', 'torch', 'dtype', 'date'} <= results[0].where.keys()


def test_wrong_answers_are_not_timed():
    calls = []
    with pytest.raises(UserError, match='a different result'):
        paired(lambda: calls.append(1) or 1, lambda: calls.append(1) or 2, same=lambda x, y: x == y)
    assert len(calls) == 2


@pytest.mark.parametrize('values, spread, noisy', [
    ((1, 1), 1, False), ((1, 1.5), 1.5, False), ((1, 1.51), 1.51, True), ((0, 0), 1, False),
    ((0, 1), float('inf'), True)])
def test_spread(values, spread, noisy):
    m = Measure(values)
    assert (m.spread, m.noisy) == (spread, noisy)


@pytest.mark.parametrize('value, goal, met', [
    (25, '≥ 25', True), (24.9, '≥ 25', False), (1, '≤ 1', True), (1.01, '≤ 1', False),
    (0, '≤ 1', True)])
def test_goals(value, goal, met):
    line = Line('x', Measure((value,)), goal)
    assert (line.margin >= 1) == met
    assert line.cells[-1] == f'{goal} {"met" if met else "not met"}'


def test_memory_is_the_childs_own():
    big = np.ones(40_000_000)  # 320 MB in this process
    code = 'x = bytearray({}); [x.__setitem__(i, 1) for i in range(0, len(x), 4096)]'
    def peak(n): return peak_rss([sys.executable, '-c', code.format(n)]).bytes
    small, large = peak(0), peak(150_000_000)
    assert small < 100e6 and 145e6 < large - small < 165e6
    assert big.sum() == len(big)


def test_what_a_program_gives_and_how_it_fails(capfd):
    assert peak_rss([sys.executable, '-c', 'print("one"); print("two")']).returned == 'one\ntwo'
    assert peak_rss('json:dumps', {'a': [1]}).returned == '{"a": [1]}'
    with pytest.raises(UserError, match='status 1'): peak_rss('json:loads', '{')
    with pytest.raises(UserError, match='status 1'): peak_rss('json:no_such_function')
    with pytest.raises(UserError, match='no such command'): peak_rss(['no-such-command-at-all'])
    killed = [sys.executable, '-c', 'import os; os.kill(os.getpid(), 9)']
    with pytest.raises(UserError, match='status -9'): peak_rss(killed)


@pytest.mark.parametrize('name', BENCHMARKS)
def test_each_benchmark_says_what_it_does(name):
    f = BENCHMARKS[name]
    assert f.__doc__ and '\n' not in f.__doc__ and len(f.__doc__) < 120
    for p in inspect.signature(f).parameters.values():
        told = f'{name}: {p} cannot be given on a command line'
        assert p.default is not p.empty and isinstance(p.default, p.annotation), told


@pytest.mark.parametrize('call, message', [
    (lambda: run_benchmarks(['tokenising']), "did you mean 'tokenizing'"),
    (lambda: run_benchmarks(['packing'], contxt=3), "did you mean 'context'"),
    (lambda: run_benchmarks(['packing'], context='long'), 'expected int'),
    (lambda: run_benchmarks(['packing'], gb=1), "'gb' is no option")])
def test_mistakes_are_told_before_anything_runs(call, message):
    with pytest.raises(UserError, match=message): call()


def two_benchmarks():
    def one():
        "A line"
        yield Line('x', Measure((1., 2.), 's'), '≤ 3')
    def two(n=1):
        "A line"
        yield Line('y', Measure((n,)))
    return dict(one=one, two=two)


def test_results_can_be_kept(monkeypatch):
    monkeypatch.setattr(bench, 'BENCHMARKS', two_benchmarks())
    told = []
    results = run_benchmarks(log=told.append)
    assert told == ['one (1 of 2): A line', '  x: 1.5 s  spread 2.00 noisy  (goal ≤ 3 met)',
                    'two (2 of 2): A line', '  y: 1']
    kept = json.loads(json.dumps([asdict(r) for r in results]))
    assert kept[0]['lines'][0][1]['values'] == [1., 2.]
    assert {'name', 'torch', 'date', 'dtype', 'versions'} <= kept[0]['where'].keys()
    assert {tuple(k) for k in kept} == {('name', 'about', 'lines', 'where', 'seconds', 'options',
                                              'remarks')}


def test_a_result_is_a_table_with_its_origin(monkeypatch):
    monkeypatch.setattr(bench, 'BENCHMARKS', two_benchmarks())
    results = run_benchmarks(log=None)
    assert all(isinstance(r, Result) and isinstance(r, Table) for r in results)
    one = results[0]
    assert one.rows == [['x', '1.5 s', '', '2.00 noisy', '≤ 3 met']]
    assert str(one).splitlines()[0] == 'A line' and str(one).splitlines()[-1] == one.place
    assert one._repr_markdown_().startswith('A line\n\n| one | median |')
    both = summary_table(results)
    assert [row[0] for row in both.rows] == ['one: x', 'two: y']
    assert both.notes == [results[1].place]
    assert summary_table([]).notes == []
    assert len(plot_goals(results).axes[0].patches) == 1


def test_what_is_left_out_is_told_and_kept(monkeypatch, tmp_path):
    def some():
        "A line"
        yield 'nothing is there to compare'
        yield Line('x', Measure((1.,)))
    monkeypatch.setattr(bench, 'BENCHMARKS', dict(some=some))
    told = []
    result, = run_benchmarks(log=told.append, save=tmp_path)
    assert told[1:] == ['  nothing is there to compare', '  x: 1']
    again = read_result(tmp_path/'some.json')
    assert [line.what for line in again.lines] == ['x']
    assert again.notes == [*result.remarks, again.place] == ['nothing is there to compare',
                                                             result.place]


@pytest.mark.parametrize('said,shown', [('AVX512', 'p, AVX512, 2 cores'),
                                        ('held to AVX2', 'p held to AVX2, 2 cores'),
                                        (None, 'p, 2 cores')])
def test_a_speed_stands_with_the_instructions_of_its_cpu(said, shown):
    where = dict(name='p', cpu_cores=2, device='cpu', torch='2', python='3', date='2030-01-01',
                 instructions=said)
    assert Result('x', 'y', [], where).place.startswith(shown)
    assert Result('x', 'y', [], dict(where, device='cuda')).place.startswith('p, 2 cores')


def test_where_says_what_was_not_recorded():
    old = dict(name='p', cpu_cores=2, device='cpu', torch='2', python='3', date='2030-01-01')
    assert 'dtype not recorded' in Result('x', 'y', [], old).place
    assert 'dtype' not in Result('x', 'y', [], dict(old, dtype='bf16')).place
