"What the notebooks of nbs/analysis measure with: costs, times and the point at which a search has caught up."
import math
import time
from types import SimpleNamespace

import matplotlib
import pytest
import torch

from restyle_nb.metrics import QualityTime, operations, plot_quality_time, steady, time_ratio

matplotlib.use('agg')
F64 = torch.float64


def timed(seconds, labels=None):
    "As much of an Inversion as a table of times needs"
    return SimpleNamespace(seconds=torch.tensor(seconds, dtype=F64), labels=labels, codes=torch.zeros(1))


def table(encoder=(32., 4.), search=(32., 16., 8., 4., 2.), spread=(.5, 1., 1.5), higher=()):
    scores = {k: dict(l2=torch.tensor(v)[:, None]*torch.tensor(spread)) for k, v in dict(encoder=encoder, search=search).items()}
    return QualityTime(dict(encoder=timed([0, 1]), search=timed([0, 1, 2, 4, 8], [0, 10, 20, 40, 80])), scores, higher=higher)


def test_a_search_catches_up_where_its_curve_crosses():
    assert table().times_as_long('search', 'encoder', metric='l2')[0] == pytest.approx(4)
    assert table(encoder=(32., 6.)).times_as_long('search', 'encoder', metric='l2')[0] == pytest.approx(2*2**.5)   # half the way, on a log axis
    assert table(encoder=(32., 20.)).times_as_long('search', 'encoder', metric='l2')[0] == pytest.approx(1)        # log 0 cannot be shared out
    assert table(encoder=(32., 64.)).times_as_long('search', 'encoder', metric='l2')[0] == 0                       # there before it began


def test_a_search_that_never_catches_up_takes_for_ever():
    assert table(encoder=(32., 1.)).times_as_long('search', 'encoder', metric='l2') == (math.inf,)*3


def test_more_may_be_better():
    t = table(encoder=(0., 6.), search=(0., 2., 4., 6., 8.), higher=['l2'])
    assert t.times_as_long('search', 'encoder', metric='l2')[0] == pytest.approx(4)


def test_the_interval_is_over_pictures():
    "Pictures that fare alike leave no doubt; those that differ between methods do"
    value, low, high = table().times_as_long('search', 'encoder', metric='l2')
    assert low == pytest.approx(value) and high == pytest.approx(value)
    t = table()
    t.scores['encoder']['l2'] = torch.tensor([[32., 32., 32.], [6., 4., 2.]])
    value, low, high = t.times_as_long('search', 'encoder', metric='l2')
    assert low < value < high


def test_another_cost_in_place_of_seconds():
    t = table().recount(dict(search=[0, 1, 2, 3, 4], encoder=[0, 3]))
    assert t.times_as_long('search', 'encoder', metric='l2')[0] == pytest.approx(1) and t.unit == 'search'
    assert [r['step'] for r in t.of('search')] == [0, 10, 20, 40, 80]
    assert table().recount(dict(encoder=[0, 3])).names == ['encoder']


def test_steady_believes_the_shortest_stretch():
    inv = steady(timed([3, 3 + 10, 3 + 12, 3 + 30], [0, 5, 10, 20]))    # 2, .4 and 1.8 seconds an iteration
    torch.testing.assert_close(inv.seconds, torch.tensor([3, 5, 7, 11], dtype=F64))
    torch.testing.assert_close(steady(inv, start=0).seconds, torch.tensor([0, 2, 4, 8], dtype=F64))
    with pytest.raises(ValueError, match='timed=True'): steady(SimpleNamespace(seconds=None, labels=None))
    with pytest.raises(ValueError, match='several kinds'): steady(timed([3, 4, 6], [0, 5, 'search 10']))


def test_operations_are_those_of_the_formulas():
    conv, x = torch.nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 10, 10)
    forward = 2*10*10*8*3*9
    assert operations(lambda: conv(x)) == forward
    assert operations(lambda: conv(x).sum().backward()) == 2*forward          # x needs no gradient, the weight does


def test_time_ratio_sees_who_waits_longer():
    value, low, high = time_ratio(lambda: time.sleep(.004), lambda: time.sleep(.016), rounds=5)
    assert low <= value <= high and value < .8


def test_both_axes_may_be_logarithmic():
    t = table(encoder=(0., .9), search=(0., .2, .5, .8, .99), spread=(1., 1., 1.), higher=['l2'])
    ax = plot_quality_time(t, log=True, styles=dict(search=dict(color='#123456')), legend=False)[0]
    assert ax.get_xscale() == ax.get_yscale() == 'log' and ax.get_legend() is None and '1 −' in ax.get_title()
    encoder, search = (c.lines[0] for c in ax.containers)
    assert encoder.get_ydata()[-1] == pytest.approx(.1) and search.get_color() == '#123456'
    assert plot_quality_time(t)[0].get_yscale() == 'linear'
