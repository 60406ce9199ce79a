"What is drawn is what was measured: every line, bar and colour is read back from the figure."
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from restyle_nb.analysis import bands, change_maps, focus, gained, latent_change
from restyle_nb.images import Geometry
from restyle_nb.metrics import Table
from restyle_nb.plots import (MARKERS, PALETTE, compact, heat, plot_curves, plot_gained, plot_groups, plot_latent_change, plot_shares, plot_steps_needed,
                              show_focus, show_focus_rows)
from restyle_nb.restyle import Inversion

GROUPS = dict(coarse=slice(0, 2), medium=slice(2, 4), fine=slice(4, None))


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


def wander(b=6, n=3, k=5, size=(10, 14), channels=3, geometry=None):
    g = torch.Generator().manual_seed(0)
    codes = torch.randn(n + 1, b, k, 6, generator=g).cumsum(0)
    y = torch.rand(n + 1, b, channels, *size, generator=g)*2 - 1
    return Inversion(codes, codes.diff(dim=0), torch.rand(n + 1, b, generator=g).sort(0, descending=True)[0], torch.full((b,), n),
                     torch.zeros(b, channels, *size), y, geometry)


def lines(ax): return {l.get_label(): l.get_ydata() for l in ax.get_lines() if not l.get_label().startswith('_')}


def lightness(rgb):
    "L* of CIE Lab, of colours (n,3) in [0,1]: what is left for an eye without colour"
    c = np.where(rgb <= .04045, rgb/12.92, ((rgb + .055)/1.055)**2.4) @ [.2126, .7152, .0722]
    return 116*np.where(c > .008856, np.cbrt(c), 7.787*c + 16/116) - 16


def seen(rgb, kind):
    "Colours as a red-blind or green-blind eye sees them (Viénot, Brettel and Mollon 1999), linear RGB"
    rgb = np.where(rgb <= .04045, rgb/12.92, ((rgb + .055)/1.055)**2.4)
    m = dict(red=[[.11238, .88762, 0], [.11238, .88762, 0], [.00401, -.00401, 1]], green=[[.29275, .70725, 0], [.29275, .70725, 0], [-.02234, .02234, 1]])[kind]
    return (rgb @ np.array(m).T).clip(0, 1)**(1/2.2)


@pytest.mark.parametrize('kind', ['red', 'green'])
def test_the_first_six_colours_differ_to_every_eye(kind):
    c = seen(np.array([matplotlib.colors.to_rgb(o) for o in list(PALETTE.values())[:6]]), kind)
    apart = np.linalg.norm(c[:, None] - c[None], axis=-1) + np.eye(6)
    assert apart.min() > .1
    assert len(set(MARKERS)) == len(MARKERS) == len(PALETTE) == 8


def test_heat_is_brighter_where_there_is_more():
    for cmap in ('magma', 'cividis'):
        rgb = heat(torch.linspace(0, 1, 256)[None], cmap)[:, 0].T.numpy()/255
        assert (np.diff(lightness(rgb)) > -.5).all() and np.ptp(lightness(rgb)) > 75


def test_heat_shapes_and_odd_values():
    h = heat(torch.rand(2, 3, 4, 5))
    assert h.shape == (2, 3, 3, 4, 5) and h.dtype == torch.uint8
    low, high, over, under, nan = heat(torch.tensor([[0., 1., 7., -1., torch.nan]]))[:, 0].T
    assert torch.equal(over, high) and torch.equal(under, low) and torch.equal(nan, low)
    assert heat(torch.tensor([[True, False]])).shape == (3, 1, 2)


@pytest.mark.parametrize('within', [True, False])
def test_focus_draws_the_maps(within):
    inv = wander()
    axs = show_focus(inv, within)
    assert [a.get_title() for a in axs] == ['step 1', 'step 2', 'step 3']
    for ax, m in zip(axs, focus(inv, within)):
        im = ax.get_images()[0]
        np.testing.assert_allclose(im.get_array(), m)
        assert im.get_clim() == (0, 1) and im.cmap.name == 'magma'
    assert '6 pictures' in axs[0].get_xlabel()
    root = show_focus(inv, within, power=.5)
    np.testing.assert_allclose(root[0].get_images()[0].get_array(), focus(inv, within)[0].sqrt())


def test_focus_on_given_axes():
    mine = plt.subplots(1, 3)[1]
    assert show_focus(wander(b=1), axs=mine) is mine and mine[0].get_xlabel() == '1 picture'


def test_rows_pair_each_output_with_its_change():
    inv = wander(geometry=Geometry((6, 14), (10, 14), (2, 0, 8, 14)))
    axs = show_focus_rows(inv, n=2)
    assert axs.shape == (4, 5) and [a.get_title() for a in axs[0]] == ['input', 'step 0', 'step 1', 'step 2', 'step 3']
    maps = change_maps(inv[:2])
    change = lambda axs, i, t: np.asarray(axs[2*i+1, t+2].get_images()[0].get_array())
    for i in range(2):
        assert not axs[2*i+1, 0].get_images() and not axs[2*i+1, 1].get_images()   # nothing has changed yet
        for t in range(3):
            assert np.asarray(axs[2*i, t+2].get_images()[0].get_array()).shape == change(axs, i, t).shape == (6, 14, 3)
            assert change(axs, i, t).sum(-1, dtype=int).argmax() == maps[t, i].argmax().item()
    brightest = heat(torch.ones(1, 1)).flatten().tolist()
    reach = lambda axs: sum((change(axs, i, t) == brightest).all(-1).any() for i in range(2) for t in range(3))
    assert reach(show_focus_rows(inv, within=True, n=2)) == 6 and reach(axs) < 6   # each map has its own top, or the figure has one


@pytest.mark.parametrize('channels', [1, 3])
def test_rows_of_grey_and_colour(channels): assert show_focus_rows(wander(channels=channels), n=9).shape == (12, 5)


def test_latent_change_is_labelled_from_one():
    c = latent_change(wander())
    ax = plot_latent_change(c, GROUPS)
    np.testing.assert_allclose(ax.get_images()[0].get_array(), c.v.T)
    assert [t.get_text() for t in ax.get_xticklabels()] == ['1', '2', '3'] and ax.get_yticklabels()[0].get_text() == '1'
    said = [t.get_text() for t in ax.texts]
    assert f'{c.v[0, 0]:.3g}' in said and {'coarse', 'medium', 'fine'} <= set(said) and '6 pictures' in ax.get_xlabel()


def test_latent_change_of_nothing_can_be_drawn():
    inv = wander()
    inv.codes[2:] = inv.codes[1]
    plot_latent_change(latent_change(inv)).figure.canvas.draw()
    inv.codes[1:] = inv.codes[0]
    plot_latent_change(latent_change(inv)).figure.canvas.draw()


@pytest.mark.parametrize('log', [False, True])
def test_groups_draw_the_means(log):
    c = latent_change(wander())
    ax = plot_groups(c, GROUPS, log)
    drawn = lines(ax)
    assert [*drawn] == ['coarse', 'medium', 'fine'] and ax.get_yscale() == ('log' if log else 'linear')
    for k, (mean, low, high) in c.by_group(GROUPS).items(): np.testing.assert_allclose(drawn[k], mean)
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    _, low, high = c.by_group(GROUPS)['coarse']
    assert band.min() == pytest.approx(low.min().item()) and band.max() == pytest.approx(high.max().item())


def test_one_picture_is_drawn_without_a_band():
    ax = plot_groups(latent_change(wander(b=1)), GROUPS)
    ax.figure.canvas.draw()
    assert len(lines(ax)) == 3


def test_histogram_counts_every_picture_once():
    ax = plot_steps_needed({'a': torch.tensor([1, 2, 2, 6]), 'b': torch.tensor([0, 3])}, 5)
    heights = np.array([p.get_height() for p in ax.patches]).reshape(2, 7)
    assert heights.tolist() == [[0, 25, 50, 0, 0, 0, 25], [50, 0, 0, 50, 0, 0, 0]]
    assert [t.get_text() for t in ax.get_xticklabels()][-1] == '> 5'
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['a (4 pictures)', 'b (2 pictures)']
    single = plot_steps_needed(torch.tensor([1, 1]), 2)
    assert [p.get_height() for p in single.patches] == [0, 100, 0, 0]


def table(n=4, b=9, seed=0, names=('l2', 'id'), first=0):
    g = torch.Generator().manual_seed(seed)
    return Table({k: torch.rand(n, b, generator=g) for k in names}, first=first, higher=['id'])


def test_curves_leave_out_the_average_unless_asked():
    tables = dict(a=table(), b=table(2, seed=1))
    axs = plot_curves(tables)
    assert [a.get_title() for a in axs] == ['L2 (less is better)', 'identity (more is better)']
    np.testing.assert_allclose(lines(axs[0])['a'], [r['l2'] for r in tables['a'][1:]])
    assert len(lines(axs[0])['b']) == 1                          # a single pass is a point
    np.testing.assert_allclose(lines(plot_curves(tables, 'id', first=0)[0])['a'], [r['id'] for r in tables['a']])
    assert '9 pictures' in axs[0].get_xlabel()


def test_curves_of_tables_that_begin_at_step_one():
    t = table(first=1)
    ax = plot_curves(dict(a=t), ['l2'])[0]
    line = ax.get_lines()[0]
    assert line.get_xdata().tolist() == [1, 2, 3, 4]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(max(r['l2'] + r['l2_se'] for r in t))


def test_curves_name_the_table_that_lacks_a_score():
    with pytest.raises(KeyError, match="table 'b' has no score 'id'; it has l2"): plot_curves(dict(a=table(), b=table(names=('l2',))))


def test_shares_and_gains_are_drawn_in_per_cent():
    inv = wander()
    b = bands(inv)
    ax = plot_shares(b, title='cycles')
    np.testing.assert_allclose(lines(ax)['over 8' if 'over 8' in b.names else b.names[-1]], 100*b.share[:, -1])
    assert ax.get_title() == 'cycles' and '6 pictures' in ax.get_xlabel()
    ax = plot_gained({'L2': gained(inv.errors)})
    assert lines(ax)['L2'][0] == 0 and lines(ax)['L2'][-1] == pytest.approx(100)


def test_everything_draws_on_given_axes_and_returns_them():
    inv = wander()
    c = latent_change(inv)
    for f in (lambda ax: plot_groups(c, GROUPS, ax=ax), lambda ax: plot_latent_change(c, ax=ax), lambda ax: plot_steps_needed(torch.tensor([1]), 2, ax),
              lambda ax: plot_shares(bands(inv), ax), lambda ax: plot_gained({'e': gained(inv.errors)}, ax), lambda ax: plot_curves({'t': table()}, 'l2', axs=[ax])[0]):
        ax = plt.subplots()[1]
        before = len(plt.get_fignums())
        assert f(ax) is ax and len(plt.get_fignums()) == before


def test_compact_is_a_small_jpeg_and_closes_its_figure():
    for of in (lambda axs: axs, lambda axs: axs[0, 0], lambda axs: axs[0, 0].figure):
        picture = compact(of(show_focus_rows(wander(), n=1)))
        assert picture.format == 'jpeg' and not plt.get_fignums()
    from io import BytesIO
    assert Image.open(BytesIO(picture.data)).format == 'JPEG'
