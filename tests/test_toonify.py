"Blends that are made of what they say, fine-tuning that can be killed, and a verdict that strangers cannot pass."
import copy

import pytest
import torch

from restyle_nb.encoders import build_encoder
from restyle_nb.generator import Generator
from restyle_nb.losses import Objective
from restyle_nb.restyle import ReStyle, bootstrap
from restyle_nb.toonify import (Alignment, NotAligned, StyleScale, agreement, alignment, blend, blend_shares, fine_tune, known_alignment, layout_features,
                                paired_objective, same_mapping, show_twins, toonify)
from restyle_nb.training import TrainingError

WIDTHS = {4: 12, 8: 10, 16: 8, 32: 6, 64: 5, 128: 4, 256: 4, 512: 4, 1024: 4}


def tiny(size=32, seed=0, **kw):
    torch.manual_seed(seed)
    g = Generator(**{**dict(size=size, style_dim=16, n_mlp=2, channels=WIDTHS, mapping_lr=1.), **kw})
    for c in g.convs: c.noise_strength.data.fill_(.1)
    g.estimate_latent_avg(100)
    return g.freeze()


def relative(g, seed=1, part=('convs.', 'to_images.', 'const')):
    "The same mapping, other synthesis: what fine-tuning with a frozen mapping leaves"
    torch.manual_seed(seed)
    h = copy.deepcopy(g)
    for k, p in h.named_parameters():
        if k.startswith(part): p.data += .3*torch.randn_like(p)*(p.std() if p.numel() > 1 else p.abs())
    return h


def codes(g, n=3, seed=0): return g.map(torch.randn(n, g.z_dim, generator=torch.Generator().manual_seed(seed)))


# ---------------------------------------------------------------- shares

def test_shares_of_a_clean_cut():
    assert blend_shares([4, 8, 16, 32], 16) == {4: 0., 8: 0., 16: 1., 32: 1.} == blend_shares([4, 8, 16, 32], 16, width=1)
    assert set(blend_shares([4, 8, 16], 4).values()) == {1.} and set(blend_shares([4, 8, 16], 32).values()) == {0.}


def test_shares_of_a_ramp():
    s = blend_shares([4, 8, 16, 32, 64], 16, width=2)
    assert s == {4: 0., 8: .25, 16: .75, 32: 1., 64: 1.}
    wide = list(blend_shares([4, 8, 16, 32, 64, 128], 32, width=6).values())
    assert wide == pytest.approx([1/12, 3/12, 5/12, 7/12, 9/12, 11/12])


@pytest.mark.parametrize('swap, width, words', [(12, 0, 'expected one of [4, 8, 16, 32]'), (64, 0, 'or 32 for none'), (8, -1, 'width is -1'), (8, float('nan'), 'width is nan')])
def test_shares_that_make_no_sense(swap, width, words):
    with pytest.raises(ValueError) as e: blend_shares([4, 8, 16], swap, width)
    assert words in str(e.value)


# ---------------------------------------------------------------- blend

ODD = dict(plain={}, wide=dict(const_size=(3, 4), image_channels=1), clamp=dict(conv_clamp=256.), zdim=dict(z_dim=5), full=dict(size=1024))
each_build = pytest.mark.parametrize('kw', ODD.values(), ids=ODD)


@each_build
def test_ends_are_the_originals(kw):
    a = tiny(**kw)
    b = relative(a)
    w = codes(a, 1)
    for noise in ('fixed', None):
        first, second = a.synthesize(w, noise), b.synthesize(w, noise)
        assert not torch.equal(first, second)
        assert torch.equal(blend(a, b, a.resolutions[0]).synthesize(w, noise), second)
        assert torch.equal(blend(a, b, 2*a.resolutions[-1]).synthesize(w, noise), first)


@pytest.mark.parametrize('swap', [8, 16, 32])
def test_low_resolutions_are_those_of_the_base(swap):
    "Up to the swap the picture is the base's, number for number; from there on it is nobody's but the blend's"
    a = tiny()
    b = relative(a)
    w, g = codes(a), blend(a, b, swap)
    for r in a.resolutions:
        assert torch.equal(g.synthesize(w, stop=r), a.synthesize(w, stop=r)) == (r < swap)
        assert not torch.equal(g.synthesize(w, stop=r), b.synthesize(w, stop=r))


@pytest.mark.parametrize('swap', [4, 8, 16, 32, 64])
def test_every_tensor_goes_with_its_resolution(swap):
    "Names spelled out here by hand, so that a slip in `_level` shows"
    at = {4: ['const', 'convs.0.', 'noise_0', 'to_images.0.'], 8: ['convs.1.', 'convs.2.', 'noise_1', 'noise_2', 'to_images.1.'],
          16: ['convs.3.', 'convs.4.', 'noise_3', 'noise_4', 'to_images.2.'], 32: ['convs.5.', 'convs.6.', 'noise_5', 'noise_6', 'to_images.3.']}
    a, b = tiny(), tiny(seed=5)
    g = blend(a, b, swap).state_dict()
    a, b = a.state_dict(), b.state_dict()
    seen = set()
    for r, names in at.items():
        for k in g:
            if k.startswith(tuple(names)):
                seen.add(k)
                assert torch.equal(g[k], (b if r >= swap else a)[k]), k
    assert {k.split('.')[0] for k in set(g) - seen} == {'mapping', 'latent_avg'}


def test_ramp_is_a_straight_line():
    a = tiny()
    b = relative(a)
    g, s = blend(a, b, 16, width=2), blend_shares(a.resolutions, 16, 2)
    for i, r in enumerate([4, 8, 8, 16, 16, 32, 32]):
        p, q = a.convs[i].weight, b.convs[i].weight
        torch.testing.assert_close(g.convs[i].weight, (1 - s[r])*p + s[r]*q)
    half = blend(a, b, shares=dict.fromkeys(a.resolutions, .5))
    torch.testing.assert_close(half.const, (a.const + b.const)/2)


def test_noise_planes_keep_their_strength():
    "The mean of two independent planes would be weaker than either"
    a, b = tiny(), tiny(seed=5)
    g = blend(a, b, shares={4: .4, 8: .4, 16: .6, 32: .6})
    assert torch.equal(g.noise_1, a.noise_1) and torch.equal(g.noise_5, b.noise_5) and not torch.equal(a.noise_1, b.noise_1)


@pytest.mark.parametrize('mapping', ['base', 'other'])
def test_mapping_and_average_go_together(mapping):
    a, b = tiny(), tiny(seed=5)
    assert not same_mapping(a, b) and same_mapping(a, relative(a))
    g, owner = blend(a, b, 16, mapping=mapping), dict(base=a, other=b)[mapping]
    assert same_mapping(g, owner) and torch.equal(g.latent_avg, owner.latent_avg)


def test_speed_of_the_mapping_is_part_of_it():
    a, b = tiny(mapping_lr=1.), tiny(mapping_lr=.5)
    b.mapping.load_state_dict(a.mapping.state_dict())
    z = torch.randn(2, 16)
    assert not torch.equal(a.map(z), b.map(z)) and not same_mapping(a, b)
    g = blend(a, b, 16, mapping='other')
    assert torch.equal(g.map(z), b.map(z)) and g.config['mapping_lr'] == .5


def test_blend_leaves_its_parents_alone():
    a = tiny()
    b = relative(a)
    before = [{k: v.clone() for k, v in o.state_dict().items()} for o in (a, b)]
    g = blend(a, b, 16, width=3)
    for p in g.parameters(): p.data.zero_()
    for buffer in g.buffers(): buffer.zero_()
    for o, was in zip((a, b), before): assert all(torch.equal(v, was[k]) for k, v in o.state_dict().items())
    assert not any(p.requires_grad for p in g.parameters()) and not g.training


def test_blend_survives_a_file(tmp_path):
    from restyle_nb.checkpoints import read_generator, save_generator
    a = tiny()
    g = blend(a, relative(a), 16, width=2)
    again = read_generator(save_generator(g, tmp_path/'g.safetensors'))
    w = codes(a)
    assert torch.equal(again.synthesize(w), g.synthesize(w))


@pytest.mark.parametrize('kw, words', [
    (dict(size=16), 'size (base: 32, other: 16)'), (dict(style_dim=8, z_dim=16), 'style_dim (base: 16, other: 8)'),
    (dict(n_mlp=3), 'n_mlp (base: 2, other: 3)'), (dict(channels=WIDTHS | {8: 11}), 'channels (base: {4: 12, 8: 10'),
    (dict(image_channels=1), 'image_channels (base: 3, other: 1)'), (dict(const_size=(3, 4)), 'const_size (base: (4, 4), other: (3, 4))'),
    (dict(conv_clamp=1.), 'conv_clamp (base: None, other: 1.0)')])
def test_strangers_cannot_be_blended(kw, words):
    with pytest.raises(ValueError) as e: blend(tiny(), tiny(**kw), 16)
    assert words in str(e.value) and 'same build' in str(e.value)


@pytest.mark.parametrize('kw, words', [
    (dict(), 'either swap='), (dict(swap=8, shares={}), 'either swap='), (dict(swap=8, mapping='both'), "mapping is 'both'"),
    (dict(swap=10), 'swap is 10'), (dict(shares={4: 1.}), 'expected one for each of [4, 8, 16, 32]'),
    (dict(shares={4: 0., 8: 0., 16: 2., 32: 0.}), 'found {16: 2.0}'), (dict(shares={4: 0., 8: 0., 16: float('nan'), 32: 0.}), 'found {16: nan}')])
def test_blends_that_make_no_sense(kw, words):
    a = tiny()
    with pytest.raises(ValueError) as e: blend(a, a, **kw)
    assert words in str(e.value)


def test_blend_wants_generators():
    with pytest.raises(ValueError, match='other is a str, expected a Generator'): blend(tiny(), 'toons64', 8)


# ---------------------------------------------------------------- fine_tune

def world(g, n=24, tint=.5):
    "Pictures of another world that belong to z: the generator's own, in another colour"
    z = torch.randn(n, g.z_dim, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(): y = g(z).tanh()
    return torch.cat([y[:, :1]*.3 + tint, y[:, 1:]], 1).clamp(-1, 1), z


FAST = dict(batch_size=4, progress=False, anchor=None, every=4, iterations=12)


@pytest.fixture(scope='module')
def paired():
    g = tiny(mapping_lr=1.)
    return g, *world(g)


def test_fine_tune_learns_and_keeps_the_mapping(paired):
    g, x, z = paired
    before = {k: v.clone() for k, v in g.state_dict().items()}
    t = fine_tune(g, x, z, iterations=30, every=10, valid=(x[:8], z[:8]), critic=0., lr=1e-2, batch_size=8, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in g.state_dict().items()), 'the teacher was changed'
    assert same_mapping(t.best, g) and torch.equal(t.best.latent_avg, g.latent_avg)
    gap = lambda o: (o(z) - x).square().mean().item()
    assert gap(t.best) < .7*gap(g)
    assert [i for i, _ in t.looks] == [10, 20, 30] and not t.best.training and not any(p.requires_grad for p in t.best.parameters())


def test_without_pairs_a_critic_teaches(paired):
    g, x, _ = paired
    t = fine_tune(g, x, iterations=4, every=2, valid=x[:12], critic=1., batch_size=4, progress=False)
    assert 'features' in t.history.rows[-1] and 'anchor' not in t.history.rows[-1] and len(t.looks) == 2
    assert not torch.equal(t.best.const, g.const)


def test_a_mapping_that_learns_gets_a_new_average(paired):
    g, x, z = paired
    t = fine_tune(g, x, z, critic=0., freeze=('const',), **FAST)
    assert not same_mapping(t.best, g) and torch.equal(t.best.const, g.const)
    assert not torch.equal(t.best.latent_avg, g.latent_avg)
    assert torch.equal(t.best.latent_avg, copy.deepcopy(t.best).estimate_latent_avg())


def test_stops_early_and_keeps_the_best(paired, tmp_path, monkeypatch):
    g, x, z = paired
    scores = iter([3., 1., 2., 2.5, .5])
    monkeypatch.setattr('restyle_nb.toonify._judge', lambda *a: lambda g: next(scores))
    kw = FAST | dict(critic=0., iterations=100, schedule='constant')
    t = fine_tune(g, x, z, tmp_path/'run', patience=2, **kw)
    assert t.looks == [(4, 3.), (8, 1.), (12, 2.), (16, 2.5)] and t.iteration == 16
    monkeypatch.setattr('restyle_nb.toonify._judge', lambda *a: None)
    eight = fine_tune(g, x, z, **kw | dict(iterations=8)).best
    assert torch.equal(t.best.const, eight.const) and not torch.equal(t.ema.const, eight.const)


def test_killed_and_taken_up_again(paired, tmp_path):
    "Killed after the weights were written and before the look was: the same run, the same looks, the same best"
    g, x, z = paired
    kw = dict(valid=(x[:8], z[:8]), critic=.1) | FAST
    whole = fine_tune(g, x, z, **kw)
    import restyle_nb.toonify as m
    look, calls = m._look, []
    def die(t, score):
        calls.append(t.iteration)
        if len(calls) == 2: raise KeyboardInterrupt
        look(t, score)
    m._look = die
    try:
        with pytest.raises(KeyboardInterrupt): fine_tune(g, x, z, tmp_path/'run', **kw)
    finally: m._look = look
    t = fine_tune(g, x, z, tmp_path/'run', **kw)
    assert t.looks == whole.looks and t.iteration == 12
    for k, v in whole.best.state_dict().items(): assert torch.equal(t.best.state_dict()[k], v), k
    again = fine_tune(g, x, z, tmp_path/'run', **kw)          # finished: nothing more is done
    assert again.looks == whole.looks and torch.equal(again.best.const, whole.best.const)


def test_fine_tune_refuses(paired):
    g, x, z = paired
    with pytest.raises(TrainingError, match='nothing to learn from'): fine_tune(g, x, critic=0., iterations=1)
    with pytest.raises(TrainingError, match='give z='): fine_tune(g, x, anchor=paired_objective(), critic=1., iterations=1)
    with pytest.raises(TrainingError, match='a row for each picture'): fine_tune(g, x, z[:-1], critic=0., iterations=1)


def test_the_anchor_is_recipe_02s():
    from restyle_nb.losses import LPIPS
    from restyle_nb.training import _Start
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, 3, 32, 32, generator=rng)*2 - 1 for _ in range(2))
    o = paired_objective()
    want = 4*(y - x).square().mean() + (y - x).abs().mean() + LPIPS()(y, x).mean()
    torch.testing.assert_close(o(o.prepare(x), _Start(None, y))[0], want)


# ---------------------------------------------------------------- alignment

class Painter:
    "A generator that can be reasoned about: a picture is its code, seen through a matrix"
    style_dim = z_dim = 24

    def __init__(self, seed, offset=0.):
        rng = torch.Generator().manual_seed(seed)
        self.A, self.latent_avg, self.offset = torch.randn(24, 3*16, generator=rng)/5, torch.zeros(4, 24), offset

    def map(self, z): return z
    def synthesize(self, w): return (w @ self.A).tanh().view(-1, 3, 4, 4)*.5 + self.offset


def pixels(y): return y.flatten(1)


def test_twins_and_strangers():
    twin = alignment(Painter(0), Painter(0, offset=.4), n=100, judge=pixels)
    assert twin.aligned and twin.share == twin.low == twin.high == twin.first == 1. and twin.same == pytest.approx(1., abs=1e-4)
    stranger = alignment(Painter(0), Painter(1), n=100, judge=pixels)
    assert not stranger.aligned and stranger.low < .5 < stranger.high and abs(stranger.same) < .1 and stranger.first < .1
    assert 'two latent spaces' in str(stranger) and str(twin).startswith('one latent space')


def test_in_between_is_called_so():
    half = Painter(1)
    half.A = .45*Painter(0).A + .55*Painter(1).A
    a = alignment(Painter(0), half, n=100, judge=pixels)
    assert .5 < a.low < a.share < a.high <= 1
    assert 'related, but not' in str(Alignment(**{**a.__dict__, 'bar': 1.01}))


def test_the_interval_covers():
    "Sixty small samples: nearly all of their 95 % intervals hold what a large sample finds"
    half = Painter(1)
    half.A = .3*Painter(0).A + .7*Painter(1).A
    true = alignment(Painter(0), half, n=2000, judge=pixels, n_boot=2).share
    assert .9 < true < .99
    hits = [a.low <= true <= a.high for a in (alignment(Painter(0), half, n=60, judge=pixels, n_boot=200, seed=s) for s in range(1, 61))]
    assert sum(hits) >= 50


def test_share_by_hand():
    "The same count as plain loops, on features that are neither twins nor strangers"
    rng = torch.Generator().manual_seed(4)
    f = torch.randn(9, 5, generator=rng)
    g = f + 1.5*torch.randn(9, 5, generator=rng)
    even = lambda f: torch.nn.functional.normalize((f - f.mean(0))/f.std(0))
    c = (even(f) @ even(g).T).tolist()
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    won = [(c[i][i] > c[i][j]) + (c[i][i] > c[j][i]) for i, j in pairs]
    v = agreement(f, g, n_boot=50)
    assert v.share == pytest.approx(sum(won)/2/len(pairs)) and .5 < v.share < 1
    assert v.same == pytest.approx(sum(c[i][i] for i in range(9))/9, abs=1e-5)
    assert v.shuffled == pytest.approx(sum(c[i][j] for i, j in pairs)/72, abs=1e-5)
    assert v.first == pytest.approx(sum(max(range(9), key=c[i].__getitem__) == i for i in range(9))/9)


def test_agreement_wants_pairs():
    with pytest.raises(ValueError, match='4 rows and 5'): agreement(torch.randn(4, 2), torch.randn(5, 2))
    with pytest.raises(ValueError, match='at least 3'): agreement(torch.randn(2, 2), torch.randn(2, 2))


def test_pictures_that_are_all_alike_are_no_twins():
    "Ties count one half: whoever says the same of every picture recognises nobody"
    v = agreement(torch.ones(20, 3), torch.ones(20, 3))
    assert v.share == .5 == v.low == v.high and not v.aligned


def test_w_or_z():
    "A stranger that permutes the code's numbers draws other pictures for the same w, and the same z means the same again after unpermuting"
    a = tiny()
    p = torch.randperm(a.style_dim, generator=torch.Generator().manual_seed(2))
    b = copy.deepcopy(a)
    last = b.mapping[-1]
    last.weight.data, last.bias.data = last.weight[p].clone(), last.bias[p].clone()          # codes come out permuted ...
    for m in b.modules():
        if hasattr(m, 'affine'): m.affine.weight.data = m.affine.weight[:, p].clone()         # ... and are read so
    z = torch.randn(4, 16)
    torch.testing.assert_close(a(z), b(z), atol=1e-4, rtol=1e-4)
    assert alignment(a, b, n=64, judge=pixels, by='z').share > .99
    assert alignment(a, b, n=64, judge=pixels, by='w').share < .9


def test_alignment_says_what_is_wrong():
    a = tiny()
    with pytest.raises(ValueError, match="compare by='z'"): alignment(a, tiny(style_dim=8, z_dim=16), n=4, judge=pixels)
    with pytest.raises(ValueError, match="by is 'y'"): alignment(a, a, by='y')


def test_a_judge_may_be_an_object():
    class Judge: features = staticmethod(pixels)
    assert alignment(Painter(0), Painter(1), n=20, judge=Judge()) == alignment(Painter(0), Painter(1), n=20, judge=pixels)


def test_layout_is_blind_to_a_tint():
    "The same shapes in other colours are nearer than other shapes in the same colours"
    rng = torch.Generator().manual_seed(0)
    shapes = torch.nn.functional.interpolate(torch.rand(2, 1, 4, 4, generator=rng).round(), 64)*2 - 1
    x = shapes.expand(2, 3, 64, 64)*.8
    tinted = x*torch.tensor([.5, .9, .7]).view(3, 1, 1)
    f, t = layout_features(x), layout_features(tinted)
    assert f.shape == (2, 16*(192 + 384 + 256))
    assert (f[0] - t[0]).norm() < .9*(f[0] - f[1]).norm()


def test_twins_are_shown():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    a = tiny()
    show_twins(dict(photo=a, toon=relative(a)), codes(a, 5))
    assert [ax.get_ylabel() for ax in plt.gcf().axes] == ['photo', 'toon']
    plt.close('all')


# ---------------------------------------------------------------- names

def test_a_mixture_has_a_name_of_its_own():
    a = tiny()
    b = relative(a)
    assert blend(a, b, 16).name == 'unnamed below 16, unnamed from 16'
    a.name, b.name = 'photo', 'toon'
    assert blend(a, b, 16).name == 'photo below 16, toon from 16' and blend(a, b, 4).name == 'photo below 4, toon from 4'
    assert blend(a, b, 16, mapping='other').name == 'photo below 16, toon from 16, mapping of toon'
    assert blend(a, b, 16, width=2).name == 'photo with 25% toon at 8, 75% toon at 16, 100% toon at 32'
    assert blend(a, b, shares={32: 1., 4: 0., 16: 0., 8: 0.}).name == 'photo below 32, toon from 32'
    assert blend(a, b, shares={4: 1., 8: 0., 16: 0., 32: 0.}).name == 'photo with 100% toon at 4'
    assert (a.name, b.name) == ('photo', 'toon')


def test_a_pupil_has_a_name_of_its_own(paired, tmp_path, monkeypatch):
    g, x, z = paired
    g = copy.deepcopy(g)
    g.name = 'photo'
    monkeypatch.setattr('restyle_nb.toonify._judge', lambda *a: lambda g: 1.)
    kw = FAST | dict(critic=0., iterations=4, anchor=Objective(lpips=0.))
    for folder in (None, tmp_path/'run', tmp_path/'run'): assert fine_tune(g, x, z, folder, **kw).best.name == 'photo, fine-tuned'
    assert g.name == 'photo'


# ---------------------------------------------------------------- toonify

def model(g, seed):
    torch.manual_seed(seed)
    return ReStyle(build_encoder('compact', n_styles=g.n_styles, style_dim=g.style_dim, input_size=32, widths=(8, 16)), g).eval()


@pytest.fixture
def pair():
    a = tiny()
    b = relative(a)
    a.name, b.name = 'photo', 'toon'
    return model(a, 1), model(b, 2)


@pytest.fixture
def x(): return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))*2 - 1


def found(low=.95): return Alignment(max(low, .5), low, 1., .6, 0., 1., 64, .95, .9)


@pytest.fixture
def asked(monkeypatch):
    "What `alignment` is asked, and what it shall answer"
    import restyle_nb.toonify as m
    calls = []
    def answer(a, b, n):
        calls.append((getattr(a, 'name', None), getattr(b, 'name', None), n))
        return asked.answer
    asked = type('Asked', (), dict(calls=calls, answer=found()))
    monkeypatch.setattr(m, '_asked', {})
    monkeypatch.setattr(m, 'alignment', answer)
    return asked


def same(a, b):
    for k in ('codes', 'deltas', 'errors', 'stopped', 'x', 'images'): assert torch.equal(getattr(a, k), getattr(b, k)), k


def test_toonify_is_the_bootstrap(pair, x, asked, recwarn):
    toon = toonify(*pair, x, 3)
    want = bootstrap(*pair, x, 3)
    same(toon.inversion, want)
    assert torch.equal(toon.images, want.images[-1]) and torch.equal(toon.codes, want.codes[-1]) and len(toon) == 3
    assert toon.alignment == found() and toon.generator is pair[1].generator and asked.calls == [('photo', 'toon', 64)] and not recwarn.list
    assert 'drawn by toon; one latent space' in repr(toon)


def test_toonify_passes_on(pair, x, asked):
    toon = toonify(*pair, x, 2, batch_size=2, timed=True, noise=None).inversion
    want = bootstrap(*pair, x, 2, batch_size=2, noise=None)
    same(toon, want)
    assert len(toon.seconds) == 3 and not torch.equal(toon.images, bootstrap(*pair, x, 2).images)
    assert len(toonify(*pair, x[0], 1)) == 1


@pytest.mark.parametrize('swap', [4, 16, 64])
def test_toonify_swaps_layers(pair, x, asked, swap):
    first, second = pair
    mixed = blend(first.generator, second.generator, swap)
    toon = toonify(first, second, x, 2, swap=swap)
    same(toon.inversion, bootstrap(first, ReStyle(second.encoder, mixed, second.geometry), x, 2))
    assert toon.generator.name == f'photo below {swap}, toon from {swap}' and second.generator.name == 'toon'
    if swap == 4: same(toon.inversion, bootstrap(first, second, x, 2))


def test_the_mixture_starts_where_its_model_does(pair, asked, x):
    "An average of the model's own is not lost with the generator's"
    first, second = pair
    own = ReStyle(second.encoder, second.generator, second.geometry, latent_avg=second.latent_avg + .1, passes=3)
    assert torch.equal(toonify(first, own, x, 1, swap=4).inversion.codes, toonify(first, own, x, 1).inversion.codes)


def test_asked_once_until_a_weight_changes(pair, x, asked):
    first, second = pair
    for _ in range(2): toonify(first, second, x, 1, swap=16)
    toonify(first, copy.deepcopy(second), x, 1)
    assert len(asked.calls) == 1
    second.generator.const.data += .5
    toonify(first, second, x, 1)
    assert len(asked.calls) == 2
    toonify(second, first, x, 1)                                   # who makes the codes matters
    assert len(asked.calls) == 3
    assert toonify(second, second, x, 1, check=False).alignment is None and len(asked.calls) == 3


@pytest.mark.parametrize('low', [.3, .7])
def test_strangers_are_warned_of(pair, x, asked, low):
    asked.answer = found(low)
    for _ in range(2):                                             # what is remembered is said again
        with pytest.warns(NotAligned) as said: toon = toonify(*pair, x, 1)
        text = str(said[0].message)
        assert len(said) == 1 and said[0].filename == __file__
        for word in ('photo and toon', f'{max(low, .5):.0%} of strangers', 'expected 90%', 'fine_tune', 'second.invert(x)'): assert word in text, word
        assert not toon.alignment.aligned
    for net in pair: del net.generator.name
    with pytest.warns(NotAligned, match='the first generator and the second generator do not share'): toonify(*pair, x, 1)


def test_a_real_stranger_is_found_out(x):
    "Not what `alignment` is made to say, but what it says: a relative passes, other codes do not"
    a = tiny()
    b = relative(a, part=('to_images.',))
    strange = copy.deepcopy(b)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    for m in strange.modules():
        if hasattr(m, 'affine'): m.affine.weight.data = m.affine.weight[:, order].clone()
    assert known_alignment(a, a).share == 1. and known_alignment(a, b) is known_alignment(a, b)
    assert known_alignment(a, b).share > known_alignment(a, strange).share + .2
    with pytest.warns(NotAligned): toonify(model(a, 1), model(strange, 2), x, 1)


class Plain:
    "A generator of the contract and no more"
    n_styles, style_dim, image_channels = 8, 16, 3
    def __init__(self, g): self.g, self.latent_avg = g, g.latent_avg
    def synthesize(self, w, **kw): return self.g.synthesize(w, **kw)


def test_no_mapping_no_question(pair, x, asked):
    first, second = pair
    plain = ReStyle(first.encoder, Plain(first.generator), first.geometry)
    toon = toonify(plain, second, x, 2)
    same(toon.inversion, bootstrap(first, second, x, 2))
    assert toon.alignment is None and 'alignment not asked' in repr(toon) and not asked.calls


def test_codes_that_do_not_fit(pair, x, asked):
    with pytest.raises(ValueError, match='style_dim is 16 in the first model and 8 in the second'): toonify(pair[0], model(tiny(style_dim=8, z_dim=8), 3), x)
    with pytest.raises(ValueError, match='swap is 12'): toonify(*pair, x, swap=12)


def test_models_by_name(monkeypatch, pair, x, asked):
    import restyle_nb.toonify as m
    named = dict(zip(('a', 'b'), pair))
    devices = []
    monkeypatch.setattr(m, 'load_model', lambda name, device: devices.append(str(device)) or named[name])
    same(toonify('a', 'b', x, 1).inversion, toonify(*pair, x, 1).inversion)
    toonify(pair[0], 'b', x, 1)
    assert devices == ['auto', 'auto', 'cpu']


def test_a_toon_shows_itself(pair, x, asked):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    toon = toonify(*pair, x, 2)
    toon.show(2)
    assert [ax.get_title() for ax in plt.gcf().axes if ax.get_title()] == ['input', 'inverted', 'toon 1', 'toon 2']
    plt.close('all')
    wide, tall = toon.strip(2).size, toon.strip(3).size
    assert wide[0] == tall[0] and wide[1] < tall[1] and toon._repr_png_().startswith(b'\x89PNG')


# ---------------------------------------------------------------- style

def ink(n, hatched, seed=0):
    "Blobs somewhere, in some colours; hatched or not"
    rng = torch.Generator().manual_seed(seed)
    y = torch.nn.functional.interpolate(torch.rand(n, 3, 4, 4, generator=rng), 64, mode='bilinear')*1.4 - .7
    return (y + .3*hatched*((torch.arange(64)//2 % 2)*2. - 1)).clamp(-1, 1)


def test_style_knows_worlds_and_not_people():
    from restyle_nb.losses import LPIPS
    net = LPIPS()
    style = StyleScale(ink(40, 0, 1), ink(40, 1, 2), net)
    plain, mid, hatched = (style(ink(40, h, 3)) for h in (0, .5, 1))
    assert abs(plain.mean()) < .1 and abs(hatched.mean() - 1) < .1 and (plain < .5).all() and (hatched > .5).all()
    assert .05 < mid.mean() < .95
    turned = style(ink(40, 1, 3).flip(2))
    assert (turned - hatched).abs().mean() < .1                     # upside down: where what is does not count
    assert torch.equal(style(ink(40, 1, 3), ink(40, 0, 4)), hatched) # nor does a target
    bytes_ = [((o + 1)*127.5).round().byte() for o in (ink(40, 0, 1), ink(40, 1, 2))]
    torch.testing.assert_close(StyleScale(*bytes_, net)(ink(40, 1, 3)), hatched, atol=.05, rtol=0)


def test_style_refuses():
    with pytest.raises(ValueError, match='3 and 40 pictures'): StyleScale(ink(3, 0), ink(40, 1))
    with pytest.raises(ValueError, match='cannot be told apart'): StyleScale(ink(8, 0), ink(8, 0))
