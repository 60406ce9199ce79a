"What an inversion did, checked against plain NumPy, hand-worked cases and every shape an Inversion can have."
import subprocess
import sys

import numpy as np
import pytest
import torch

from restyle_nb.analysis import (Shares, bands, change_maps, face_regions, focus, gained, latent_change, mean_interval, regions, steps_needed,
                                 unit_range)
from restyle_nb.images import CARS, Geometry
from restyle_nb.restyle import Inversion
from restyle_nb.worlds import attributes, render, sample_z
from restyle_nb.zoo import held_out, load_model

GROUPS = dict(coarse=slice(0, 2), medium=slice(2, 4), fine=slice(4, None))


def random_inversion(b=7, n=3, k=5, dim=6, size=(8, 12), seed=0, geometry=None, channels=3, images=True):
    "Codes and pictures that wander, of no model"
    g = torch.Generator().manual_seed(seed)
    codes = torch.randn(n + 1, b, k, dim, generator=g).cumsum(0)
    y = torch.rand(n + 1, b, channels, *size, generator=g)*2 - 1 if images else None
    return Inversion(codes, codes.diff(dim=0), torch.rand(n + 1, b, generator=g), torch.full((b,), n), torch.zeros(b, channels, *size), y, geometry)


@pytest.fixture(scope='module')
def net(): return load_model('faces64', 'cpu')


@pytest.fixture(scope='module')
def inv(net): return net.invert(held_out(12), 4)


# Equations 5 and 6

@pytest.mark.parametrize('b, n, k, dim', [(1, 1, 1, 1), (2, 1, 3, 4), (7, 3, 5, 6), (33, 5, 18, 8)])
def test_equations_5_and_6_as_sums(b, n, k, dim):
    inv = random_inversion(b, n, k, dim, images=False)
    c, w = latent_change(inv, n_boot=10), inv.codes.numpy().astype(np.float64)
    for t in range(1, n + 1):
        for l in range(k):
            d = np.zeros(dim)
            for i in range(b): d += (w[t, i, l] - w[t-1, i, l])**2
            d /= b
            np.testing.assert_allclose(c.d[t-1, l], d, rtol=1e-12)
            np.testing.assert_allclose(c.v[t-1, l], np.sqrt((d**2).sum()), rtol=1e-12)
    assert c.v.dtype == torch.float64 and c.d.shape == (n, k, dim)


def test_equation_6_is_of_the_codes_not_of_the_residuals():
    "An Inversion of a search has labelled entries; what counts is how far the code went"
    inv = random_inversion(images=False)
    inv.deltas = torch.zeros_like(inv.deltas)
    assert (latent_change(inv, n_boot=10).v > 0).all()


def test_large_codes_lose_no_digits():
    inv = random_inversion(images=False)
    far = Inversion(inv.codes.double() + 1e4, inv.deltas, inv.errors, inv.stopped, inv.x)
    torch.testing.assert_close(latent_change(far, n_boot=2).v, latent_change(inv, n_boot=2).v, rtol=1e-5, atol=1e-5)


def test_batches_of_different_sizes_are_weighted_by_their_pictures():
    inv = random_inversion(9)
    parts = [inv[:2], inv[2:3], inv[3:]]
    mean = sum(len(p)*latent_change(p, n_boot=2).d for p in parts)/9
    torch.testing.assert_close(latent_change(inv, n_boot=2).d, mean)
    joined = Inversion.cat(parts)
    torch.testing.assert_close(latent_change(joined).v, latent_change(inv).v)
    torch.testing.assert_close(change_maps(joined), change_maps(inv))
    torch.testing.assert_close(bands(joined).share, bands(inv).share)


def test_groups_are_means_of_v():
    c = latent_change(random_inversion(20))
    g = c.by_group(GROUPS)
    for name, s in GROUPS.items():
        mean, low, high = g[name]
        torch.testing.assert_close(mean, c.v[:, s].mean(1))
        assert (low < mean).all() and (mean < high).all() and mean.shape == (3,)
    r, low, high = c.ratio(GROUPS, 'fine', 'coarse')
    torch.testing.assert_close(r, c.v[:, 4:].mean(1)/c.v[:, :2].mean(1))
    assert (low < r).all() and (r < high).all()
    torch.testing.assert_close(c.ratio(GROUPS, 'fine', 'fine')[1], torch.ones(3, dtype=torch.double))   # the same draws cancel


def test_groups_of_a_generator_and_of_a_short_one(net, inv):
    c = latent_change(inv)
    assert [*c.by_group(net.generator)] == ['coarse', 'medium', 'fine']
    assert [*latent_change(random_inversion(k=3)).by_group(GROUPS)] == ['coarse', 'medium']   # no style is fine
    with pytest.raises(KeyError, match='there are coarse, medium'): latent_change(random_inversion(k=3)).ratio(GROUPS, 'fine', 'coarse')


# Intervals

def test_intervals_hold_the_truth_as_often_as_they_say():
    x = torch.randn(300, 50, generator=torch.Generator().manual_seed(1))
    for level in (.8, .95):
        _, low, high = mean_interval(x, level=level)
        held = ((low < 0) & (high > 0)).double().mean()
        assert abs(held - level) < .05


def test_intervals_of_a_mean_stay_where_the_values_are():
    "An error below 0 or a likeness above 1 is none, however few and uneven the pictures"
    few = torch.rand(500, 8, generator=torch.Generator().manual_seed(2))**6
    for x in (few, 1 - few):
        mean, low, high = mean_interval(x)
        assert (low >= 0).all() and (high <= 1).all() and (low < mean).all() and (mean < high).all()


def test_intervals_of_v_hold_the_truth():
    "Equal steps of 64 numbers: v of few pictures is too large, and the interval must know it"
    held = 0
    for s in range(80):
        step = torch.randn(1, 30, 1, 64, generator=torch.Generator().manual_seed(s))
        inv = Inversion(torch.cat([torch.zeros_like(step), step]), step, torch.zeros(2, 30), torch.ones(30).long(), torch.zeros(30, 3, 2, 2))
        c = latent_change(inv, n_boot=200)
        held += bool(c.low[0, 0] < 8 < c.high[0, 0])
    assert held/80 > .85


def test_intervals_narrow_with_more_pictures():
    wide, narrow = (latent_change(random_inversion(b, images=False)) for b in (10, 160))
    assert ((narrow.high - narrow.low)/(wide.high - wide.low)).mean() < .5


def test_a_seed_gives_the_same_draws():
    inv = random_inversion()
    a, b, other = latent_change(inv, seed=3), latent_change(inv, seed=3), latent_change(inv, seed=4)
    assert torch.equal(a.low, b.low) and not torch.equal(a.low, other.low)


@pytest.mark.parametrize('call', [
    lambda i: latent_change(i, n_boot=1), lambda i: mean_interval(i.errors, n_boot=0), lambda i: mean_interval(i.errors, level=95)])
def test_impossible_intervals_are_refused(call):
    with pytest.raises(ValueError, match='expected'): call(random_inversion())


def test_a_single_picture_has_values_but_no_interval():
    inv = random_inversion(1)
    c, b = latent_change(inv), bands(inv)
    assert c.v.isfinite().all() and c.low.isnan().all() and c.high.isnan().all()
    assert b.share.isfinite().all() and b.low.isnan().all() and '(' not in b._repr_markdown_().splitlines()[-1]
    assert focus(inv).shape == (3, 8, 12) and steps_needed(inv).shape == (1,)


# Maps

def test_change_maps_as_sums():
    inv = random_inversion()
    y = inv.images.numpy().astype(np.float64)
    np.testing.assert_allclose(change_maps(inv), ((y[1:] - y[:-1])**2).mean(2), rtol=1e-5)


def test_content_box_of_cars():
    geometry = Geometry((6, 8), (16, 16), (2, 0, 14, 16))   # as cars: wide pictures on a square canvas
    inv = random_inversion(size=(16, 16), geometry=geometry)
    whole = random_inversion(size=(16, 16))
    assert change_maps(inv).shape == (3, 7, 12, 16)
    assert torch.equal(change_maps(inv), change_maps(whole)[..., 2:14, :])
    inv.images[:, :, :, :2], inv.images[:, :, :, 14:] = 9., -9.   # what happens in the bars is nobody's business
    inv.images[2, :, :, :2] = 0
    assert torch.equal(change_maps(inv), change_maps(whole)[..., 2:14, :])
    assert focus(inv).shape == (3, 12, 16) and bands(inv).energy.shape == (3, 7, 5)
    assert CARS.box[0] and CARS.crop(torch.zeros(1, 512, 512)).shape == (1, 384, 512)


def test_normalisation_within_and_across():
    inv = random_inversion()
    mean = change_maps(inv).mean(1)
    own, shared = focus(inv), focus(inv, within=False)
    for o, m in zip(own, mean):
        assert o.min() == 0 and o.max() == 1
        torch.testing.assert_close(o, (m - m.min())/(m.max() - m.min()))
    torch.testing.assert_close(shared, (mean - mean.min())/(mean.max() - mean.min()))
    assert torch.equal(unit_range(torch.full((2, 4, 4), 3.)), torch.zeros(2, 4, 4))


def test_pictures_that_stopped_early(net):
    inv = net.invert(held_out(8), 5, tol=.2)
    assert 1 < inv.stopped.min() and inv.stopped.max() < 5   # else this shows nothing
    m = change_maps(inv).mean((2, 3))
    for i, t in enumerate(inv.stopped): assert (m[:t, i] > 0).all() and (m[t:, i] == 0).all()
    assert focus(inv)[-1].max() == 0 and latent_change(inv).v[-1].max() == 0
    assert bands(inv).share[:int(inv.stopped.max())].isfinite().all()


def test_without_pictures_it_says_what_to_do(tmp_path, inv):
    bare = Inversion.load(inv.save(tmp_path/'codes', images=False))
    for f in (change_maps, focus, bands):
        with pytest.raises(ValueError, match=r'\.redraw\(generator\)'): f(bare)
    assert torch.equal(latent_change(bare).v, latent_change(inv).v)   # needs codes only
    assert torch.equal(steps_needed(bare), steps_needed(inv))


@pytest.mark.parametrize('f', [change_maps, focus, bands, latent_change])
def test_no_pictures_at_all(f):
    with pytest.raises(ValueError, match='no pictures'): f(random_inversion()[:0])


def test_half_precision_and_grey():
    inv = random_inversion(channels=1)
    inv.images = inv.images.half()
    assert change_maps(inv).dtype == torch.float32 and change_maps(inv).shape == (3, 7, 8, 12)


# Steps

@pytest.mark.parametrize('tol', [.3, .2, .15, .12])
def test_steps_needed_is_where_invert_stops(net, tol):
    x = held_out(16)
    found = steps_needed(net.invert(x, 5), tol)
    assert torch.equal(found.clamp(max=5), net.invert(x, 5, tol=tol).stopped)


def test_the_average_code_can_be_given(net):
    "After bootstrapping, step 0 is not the average"
    x = held_out(6)
    whole = net.invert(x, 4)
    later = net.invert(x, 3, start=whole[:].codes[1])
    assert torch.equal(steps_needed(later, .2, latent_avg=net.latent_avg) + 1, steps_needed(whole, .2).clamp(min=2))


def test_by_error_counts_from_the_start():
    inv = random_inversion(3)
    inv.errors = torch.tensor([[1., 5., 5.], [2., 1.04, 3.], [2., 1., 1.], [2., 2., 2.]])
    assert steps_needed(inv, .05, by='error').tolist() == [0, 1, 2]
    assert steps_needed(inv, 0., by='error').tolist() == [0, 2, 2]


# Bands, regions, gains

@pytest.mark.parametrize('size', [(8, 8), (9, 14), (32, 20)])
def test_bands_add_up_to_the_change(size):
    inv = random_inversion(size=size)
    b = bands(inv, (1, 3))
    torch.testing.assert_close(b.energy.sum(-1), change_maps(inv).sum((2, 3)).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.share.sum(1), torch.ones(3, dtype=torch.double))
    assert b.names == ['under 1', '1 to 3', 'over 3']


@pytest.mark.parametrize('cycles, band', [(.5, 0), (1, 1), (1.5, 1), (2, 2), (3.5, 2), (5, 3), (12, 4)])
@pytest.mark.parametrize('turned', [False, True])
def test_a_wave_is_found_in_its_band(cycles, band, turned):
    wave = (2*torch.pi*cycles*(torch.arange(32) + .5)/32).cos().expand(32, 32)
    if turned: wave = wave.T
    y = torch.stack([torch.zeros(1, 3, 32, 32), wave.expand(1, 3, 32, 32)])
    inv = Inversion(torch.zeros(2, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.zeros(2, 1), torch.ones(1).long(), torch.zeros(1, 3, 32, 32), y)
    assert bands(inv).share[0, band] > .999


def test_white_noise_fills_bands_by_their_area():
    "Noise has no scale: every one of the 64² waves has the same share"
    b = bands(random_inversion(40, 1, size=(64, 64)), (16,))
    inside = torch.pi*32**2/4/64**2   # quarter of a circle of radius 32 in a square of side 64, in half cycles
    assert abs(b.share[0, 0] - inside) < .01


def test_shift_is_a_difference_of_shares():
    e = torch.rand(3, 30, 4, generator=torch.Generator().manual_seed(0)).double()
    e[2, :, 1] *= 3
    s = Shares(list('abcd'), e)
    d, low, high = s.shift('b')
    assert d == pytest.approx((s.share[2, 1] - s.share[0, 1]).item()) and low < d < high and low > 0
    assert s.shift(['a', 'b', 'c', 'd'])[0] == pytest.approx(0, abs=1e-12)
    assert s.shift('b', 3, 1)[0] == pytest.approx(-d)
    with pytest.raises(KeyError, match='there are a, b, c, d'): s.shift('e')


def test_nothing_changed_is_no_share():
    inv = random_inversion()
    inv.images[2] = inv.images[1]
    assert bands(inv).share[1].isnan().all() and bands(inv).share[[0, 2]].isfinite().all()


def test_regions_add_up_and_mind_their_masks():
    inv = random_inversion()
    left, corner = torch.zeros(7, 8, 12), torch.zeros(7, 8, 12)
    left[..., :6], corner[:, 0, 11] = 1, .5
    r = regions(inv, dict(left=left, corner=corner))
    m = change_maps(inv).double()
    assert r.names == ['left', 'corner', 'rest']
    torch.testing.assert_close(r.energy.sum(-1), m.sum((2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(r.energy[..., 1], m[..., 0, 11]/2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(regions(inv, dict(left=left.bool())).share[:, 0], r.share[:, 0])
    with pytest.raises(ValueError, match='overlap'): regions(inv, dict(a=left, b=left))
    with pytest.raises(ValueError, match='one for each picture'): regions(inv, dict(a=left[:3]))


def test_face_regions_are_where_the_renderer_paints_them():
    rows = [attributes(z) for z in sample_z(6, seed=11)]
    masks = face_regions(rows)
    assert [*masks] == ['eyes', 'hair', 'background'] and not (masks['hair'] & masks['background']).any()
    for i, a in enumerate(rows):
        red, blue = (render(a|dict(background=c), oversample=1).astype(int) for c in ([1, 0, 0], [0, 0, 1]))
        differs = torch.from_numpy(abs(red - blue).max(-1) > 60)
        assert (masks['background'][i] == differs).double().mean() > .98
        if a['glasses'] != 2: assert masks['eyes'][i].any()


def test_gained_by_hand_and_on_a_crowd():
    share, low, high, draws = gained(torch.tensor([[10., 10.], [4., 6.], [0., 4.]]))
    torch.testing.assert_close(share, torch.tensor([0, 10/16, 1], dtype=torch.double))
    assert (draws[:, 0] == 0).all() and (draws[:, -1] == 1).all() and low[1] < share[1] < high[1]
    with pytest.raises(ValueError, match='no gain'): gained(torch.tensor([[1., 1.], [2., 2.]]))


def test_import_is_light():
    code = "import sys, restyle_nb.analysis, restyle_nb.plots; print([m for m in ('matplotlib', 'sklearn', 'torchvision', 'ipywidgets', 'lpips') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
