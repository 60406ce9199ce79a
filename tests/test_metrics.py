"Scores and tables, checked against sums done by hand"
import json
from types import SimpleNamespace
import pytest
import torch
from restyle_nb.images import Geometry
from restyle_nb.losses import LPIPS, l2
from restyle_nb.metrics import Table, compare, default_metrics, markdown_table, per_step, score, summary, text_table


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
