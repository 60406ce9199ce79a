"Scores and tables, checked against sums done by hand"
import json, time
from types import SimpleNamespace
import pytest
import torch
from restyle_nb.images import Geometry
from restyle_nb.losses import LPIPS, l2
from restyle_nb.metrics import QualityTime, Table, compare, default_metrics, identity_metric, markdown_table, per_step, plot_quality_time, quality_time, score, summary, text_table
from restyle_nb.restyle import Inversion, ReStyle


class Halving:
    "A net of the loop's shape that removes half of the error at every step"
    geometry, latent_avg = Geometry((16, 16), (32, 32)), torch.zeros(2, 4)
    def start(self, n): return self.latent_avg.expand(n, -1, -1), torch.zeros(n, 3, 32, 32)
    def steps(self, x, n, start):
        x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        for t in range(1, n+1): yield SimpleNamespace(t=t, y=x*(1-.5**t))


@pytest.fixture
def x(): return torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))*2-1


def test_per_step_follows_the_loop(x):
    t = per_step(Halving(), x, 4, dict(l2=l2), batch_size=3)
    assert [r['step'] for r in t] == [0, 1, 2, 3, 4] and t[0]['n'] == 7
    want = x.pow(2).mean((1, 2, 3))*torch.tensor([.25**s for s in range(5)])[:, None]
    torch.testing.assert_close(t.scores['l2'], want)
    assert abs(t[2]['l2']-want[2].mean().item()) < 1e-7
    assert abs(t[2]['l2_se']-want[2].std().item()/7**.5) < 1e-7


def test_pictures_of_another_size_and_type_are_fitted(x):
    big = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    a, b = (per_step(Halving(), o, 1, dict(l2=l2)).scores['l2'] for o in (big, Halving.geometry.fit(big)))
    torch.testing.assert_close(a, b)
    u8 = (x.add(1)*127.5).round().to(torch.uint8)
    a, b = (per_step(Halving(), o, 1, dict(l2=l2)).scores['l2'] for o in (x, u8))
    torch.testing.assert_close(a, b, rtol=.02, atol=1e-4)


def test_images_are_kept_when_asked_for(x):
    kept = []
    per_step(Halving(), x, 2, dict(l2=l2), batch_size=4, keep=kept)
    assert [tuple(k.shape) for k in kept] == [(3, 4, 3, 32, 32), (3, 3, 3, 32, 32)]


def test_lpips_is_that_of_the_losses(x):
    t = per_step(Halving(), x, 1)
    assert set(t.scores) == {'l2', 'lpips'}
    with torch.no_grad(): want = LPIPS()(x*.5, x)
    torch.testing.assert_close(t.scores['lpips'][1], want, rtol=1e-4, atol=1e-6)


def test_lpips_is_built_once(): assert default_metrics('cpu')['lpips'] is default_metrics('cpu')['lpips']


def test_one_picture_has_no_spread():
    t = Table(dict(l2=torch.ones(2, 1)))
    assert t[0]['l2_se'] is None and '±' not in text_table(t)
    json.dumps(t, allow_nan=False)


def test_tables_say_the_same(x):
    t = per_step(Halving(), x, 2, dict(l2=l2))
    for text in (text_table(t), markdown_table(t)):
        for r in t: assert f'{r["l2"]:.4f} ± {r["l2_se"]:.4f}' in text
    assert 'average image' in text_table(t)
    s = summary(t)['l2']
    assert s['best_step'] == 2 and s['improved'] == 1 and s['first'] > s['last']


def test_comparison_is_paired():
    g = torch.Generator().manual_seed(0)
    hard = torch.rand(1, 300, generator=g)
    a, b = Table(dict(l2=hard*.99+.001*torch.randn(1, 300, generator=g))), Table(dict(l2=hard))
    d = compare(a, b)['l2']
    assert d.low < d.diff < d.high < 0 and d.n == 300
    assert abs(d.percent+1) < .2 and d.percent_low < d.percent < d.percent_high
    assert compare(a, b) == compare(a, b)
    with pytest.raises(ValueError, match='same pictures'): compare(a, Table(dict(l2=hard[:, :10])))


def test_bootstrap_interval_covers():
    "An interval of 90 % holds the truth about nine times in ten"
    g, hits = torch.Generator().manual_seed(1), 0
    for s in range(100):
        d = torch.randn(1, 60, generator=g)+.3
        c = compare(Table(dict(m=d+2)), Table(dict(m=torch.full((1, 60), 2.))), n_boot=400, level=.9, seed=s)['m']
        hits += c.low < .3 < c.high
    assert 80 <= hits <= 97


def test_no_pictures_is_an_error(x):
    with pytest.raises(ValueError, match='no pictures'): per_step(Halving(), x[:0])


def test_scores_do_not_track_gradients(x):
    x = x.requires_grad_()
    assert not score([x], x, SimpleNamespace(feed=lambda y: y), dict(l2=l2))['l2'].requires_grad


class Id(torch.nn.Module):
    "A stand-in for a face network: a fixed linear map of a coarse view"
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(3*7*7, 16, generator=torch.Generator().manual_seed(0)))
    def forward(self, x): return torch.nn.functional.adaptive_avg_pool2d(x, 7).flatten(1)@self.a


def test_identity_metric(x):
    m = identity_metric(Id())
    torch.testing.assert_close(m(x, x), torch.ones(7))
    torch.testing.assert_close(m(x.flip(0), m.features(x)), m(x.flip(0), x))
    assert (m(-x, x) < -.9).all() and m(x.flip(0), x)[0] < .99 and not m(x.requires_grad_(), x).requires_grad
    with pytest.raises(ValueError, match='FaceNet'): identity_metric(torch.zeros(3))


def test_more_is_better_where_it_is(x):
    class Nearness:
        higher = True
        def __call__(self, y, x): return -l2(y, x)
    a = per_step(Halving(), x, 3, dict(near=Nearness(), l2=l2))
    b = per_step(Halving(), x, 2, dict(near=Nearness(), l2=l2))
    assert a.higher == {'near'}
    assert [summary(a)[k]['best_step'] for k in ('near', 'l2')] == [3, 3] and all(summary(a)[k]['improved'] == 1 for k in a.scores)
    d = compare(a, b)
    assert d['near'].better == d['l2'].better == 1 and d['near'].diff > 0 > d['l2'].diff
    assert 'higher on 100%' in str(d['near']) and 'lower on 100%' in str(d['l2'])


GEO = Geometry((16, 16), (32, 32))


def inversion(x, seconds, left, labels=None):
    "An inversion that leaves a share `left` of each picture at each entry"
    big = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    n = len(left)
    return Inversion(torch.zeros(n, len(x), 2, 3), torch.zeros(n-1, len(x), 2, 3), torch.zeros(n, len(x)), torch.zeros(len(x), dtype=torch.long), x,
                     torch.stack([big*(1-f) for f in left]), GEO, seconds=None if seconds is None else torch.tensor(seconds, dtype=torch.float64), labels=labels)


@pytest.fixture
def table(x):
    return quality_time(dict(one=inversion(x, [0, .5], [1, .5]), search=inversion(x, [0, 5, 50], [1, .8, .1], [0, 100, 1000])), dict(l2=l2))


def test_quality_time_rows(table, x):
    assert [(r['name'], r['step'], r['seconds'], r['times']) for r in table] == [
        ('one', 0, 0, 0), ('one', 1, .5, 1), ('search', 0, 0, 0), ('search', 100, 5, 10), ('search', 1000, 50, 100)]
    m = x.square().mean().item()
    for r, f in zip(table, (1, .5, 1, .8, .1)): assert r['l2'] == pytest.approx(m*f*f, rel=1e-4) and r['n'] == 7
    assert table.scores['search']['l2'].shape == (3, 7) and table.unit == 'one' and [r['step'] for r in table.of('search')] == [0, 100, 1000]
    text = table._repr_markdown_()
    assert 'time (one = 1)' in text and '| search | 1000 | 100.00 |' in text and len(text.splitlines()) == 7
    json.dumps(table)


def test_another_unit(x):
    a, b = inversion(x, [0, .5], [1, .5]), inversion(x, [0, 5], [1, .2])
    assert [r['times'] for r in quality_time(dict(a=a, b=b), dict(l2=l2), unit='b')] == [0, .1, 0, 1]
    with pytest.raises(ValueError, match="no method 'c'"): quality_time(dict(a=a), dict(l2=l2), unit='c')


def test_when_is_it_as_good(table):
    one = table.of('one')[1]['l2']
    assert table.reaches('search', one, 'l2') == (10, 100) and table.reaches('one', one, 'l2') == (0, 1)
    assert table.reaches('search', 0., 'l2') == (100, None) and table.reaches('search', 9., 'l2') == (None, 0)
    table.higher = {'l2'}
    assert table.reaches('search', 9., 'l2') == (100, None)


class Third(torch.nn.Module):
    "A generator that paints its code, and an encoder that closes a third of the gap; both count and take their time"
    n_styles, style_dim, image_channels, calls, nap = 2, 192, 1, 0, .01
    def __init__(self): super().__init__(); self.register_buffer('latent_avg', torch.zeros(2, 192))
    def synthesize(self, w): return w.mean(1).view(-1, 3, 8, 8)[:, :1].repeat(1, 1, 2, 2)
    def encode(self, x, y):
        self.calls += 1; time.sleep(self.nap)
        return torch.nn.functional.pad((x-y)[:, :, :8, :8].flatten(1)/3, (0, 128))[:, None].expand(-1, 2, -1)


def test_models_and_functions_are_run(x):
    g = Third(); net = ReStyle(g.encode, g)
    x = x[:, :1, :8, :8].repeat(1, 1, 2, 2)
    seen = []
    def search(x): seen.append(len(x)); return net.invert(x, 1, timed=True)
    t = quality_time(dict(a=net, b=net, c=search), dict(l2=l2), x=x, n_steps=dict(b=2), repeats=2)
    assert [len(t.of(k)) for k in 'abc'] == [6, 3, 2] and seen == [7]*3
    assert g.calls == 3*(5+2+1)                                       # once to warm up, then twice
    s = torch.tensor([r['seconds'] for r in t.of('a')], dtype=torch.float64)
    assert (s.diff() >= g.nap).all()
    torch.testing.assert_close(torch.stack([t.scores['b']['l2'][i+1]/t.scores['b']['l2'][i] for i in range(2)]), torch.full((2, 7), 4/9), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="'a' is to be run"): quality_time(dict(a=net), dict(l2=l2))


@pytest.mark.parametrize('other,why', [(lambda x: inversion(x, None, [1, .5]), "'b' has no times"), (lambda x: inversion(x[:3], [0, 1], [1, .5]), 'not of the same pictures'),
    (lambda x: inversion(x.flip(0), [0, 1], [1, .5]), 'not of the same pictures')])
def test_what_cannot_share_an_axis(x, other, why):
    with pytest.raises(ValueError, match=why): quality_time(dict(a=inversion(x, [0, 1], [1, .5]), b=other(x)), dict(l2=l2))


def test_without_pictures(x):
    a = inversion(x, [0, 1], [1, .5]); a.images = None
    with pytest.raises(ValueError, match='redraw'): quality_time(dict(a=a), dict(l2=l2))


def test_a_saved_inversion_is_of_the_same_pictures(x, tmp_path):
    a = inversion(x, [0, 1], [1, .5])
    assert len(quality_time(dict(a=a, b=Inversion.load(a.save(tmp_path/'a'))), dict(l2=l2))) == 4


def test_plot(table, x):
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    (ax,) = plot_quality_time(table)
    assert ax.get_xscale() == 'log' and ax.get_xlabel() == 'time (one = 1)' and ax.get_title() == 'L2'
    shown = [list(c.lines[0].get_xdata()) for c in ax.containers]
    assert shown == [[1], [10, 100]]                                   # starts that cost nothing are left out
    (ax,) = table.plot(seconds=True)
    assert [list(c.lines[0].get_xdata()) for c in ax.containers] == [[.5], [5, 50]] and table.device in ax.get_xlabel() and '7 pictures' in ax.get_xlabel()
    lone = quality_time(dict(a=inversion(x[:1], [0, 1], [1, .5])), dict(l2=l2))
    fig, axs = plt.subplots(1, 1); assert lone.plot(axs=[axs])[0] is axs
    plt.close('all')
