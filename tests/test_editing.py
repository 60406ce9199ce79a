"Directions that know where they belong, edits that equal plain arithmetic, and files of others that cannot do harm."
import copy
import io
import json
import os
import pickle
import re
import struct
import types
import zipfile

import numpy as np
import pytest
import torch

from restyle_nb.checkpoints import CheckpointError, read_generator, save_generator
from restyle_nb.editing import (FACTS, STD, Direction, Edited, ForeignDirection, Sweep, edit, fingerprint, home_of, interpolate, layers_of, load_directions,
                                mapped_codes, mix, moved_styles, read_directions, save_directions, show_rows, style_sizes, styles, sweep)
from restyle_nb.generator import Generator
from restyle_nb.images import Geometry
from restyle_nb.restyle import Inversion, ReStyle
from restyle_nb.zoo import load_generator, load_model

WIDTHS = {4: 12, 8: 10, 16: 8, 32: 6}
DIM = 16


def tiny(seed=0, **kw):
    torch.manual_seed(seed)
    g = Generator(**{**dict(size=32, style_dim=DIM, n_mlp=2, channels=WIDTHS, mapping_lr=1.), **kw})
    for c in g.convs: c.noise_strength.data.fill_(.1)
    g.estimate_latent_avg(100)
    return g.freeze()


@pytest.fixture(scope='module')
def g(): return tiny()


def draws(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def at_home(g, name='some', seed=0, shape=(DIM,), **kw): return Direction(name, draws(*shape, seed=seed), home=home_of(g), **kw)
def in_styles(g, seed=0, **kw): return at_home(g, 'channels', seed, (sum(style_sizes(g)),), space='style', **kw)


# ---------------------------------------------------------------- who is this generator?

@pytest.mark.parametrize('half', [False, True])
def test_fingerprint_survives_a_file(g, tmp_path, half):
    again = read_generator(save_generator(g, tmp_path/'g.safetensors', half=half))
    assert fingerprint(again) == fingerprint(g) == fingerprint(ReStyle(torch.nn.Identity(), g)) and re.fullmatch('[0-9a-f]{64}', fingerprint(g))


def test_fingerprint_is_of_the_weights_alone(g):
    other = copy.deepcopy(g)
    other.latent_avg += 1; other.noise_0 += 1
    assert fingerprint(other) == fingerprint(g) == fingerprint(copy.deepcopy(g).double()) == fingerprint(copy.deepcopy(g).half())


@pytest.mark.parametrize('name', ['mapping.1.weight', 'convs.2.affine.bias', 'to_images.0.weight', 'const', 'convs.0.noise_strength'])
@pytest.mark.parametrize('how', ['in place', 'by .data', 'replaced'])
def test_fingerprint_sees_every_weight_however_it_was_written(g, name, how):
    other = copy.deepcopy(g)
    before = fingerprint(other)                               # cached from here on
    p = other.get_parameter(name)
    with torch.no_grad():
        if how == 'in place': p.mul_(1.01)
        elif how == 'by .data': p.data *= 1.01
        else: p.data = p.data*1.01
    assert fingerprint(other) != before == fingerprint(g)


def test_fingerprint_of_what_is_no_module():
    class Stranger: n_styles, style_dim, latent_avg = 8, DIM, torch.zeros(8, DIM)
    assert fingerprint(Stranger()) == fingerprint(Stranger())
    known, other = Stranger(), Stranger()
    known.fingerprint, other.latent_avg = 'f00', torch.ones(8, DIM)
    assert fingerprint(known) == 'f00' and fingerprint(other) != fingerprint(Stranger()) and home_of(other)['name'] == 'unnamed'


def test_the_zoo_gives_names(tmp_path):
    assert load_generator('toons64', 'cpu').name == 'toons64' and load_model('faces64-restyle-e4e', 'cpu').generator.name == 'faces64'
    path = save_generator(tiny(), tmp_path/'my_cats_generator.safetensors')
    assert load_generator(path, 'cpu').name == 'my-cats' and not hasattr(read_generator(path), 'name')


# ---------------------------------------------------------------- layers

@pytest.mark.parametrize('said, want', [(None, range(8)), ('all', range(8)), ('coarse', range(4)), ('medium', range(4, 8)), ('coarse + medium', range(8)),
                                        (slice(2, 4), (2, 3)), (range(1, 8, 3), (1, 4, 7)), (3, (3,)), (-1, (7,)), ([5, 0, 5], (0, 5)), (np.int64(2), (2,))])
def test_layers(g, said, want): assert layers_of(g, said) == tuple(want)


@pytest.mark.parametrize('said', ['rough', 'fine', 'coarse,medium', 8, [0, 9], [], slice(3, 3), 'coarse+', 1.5])
def test_layers_that_are_none(g, said):                       # 8 styles have no fine ones
    with pytest.raises(ValueError, match='expected .all., .coarse.'): layers_of(g, said)


# ---------------------------------------------------------------- directions

@pytest.mark.parametrize('shape, space', [((DIM,), 'w'), ((1, DIM), 'w'), ((1, 1, DIM), 'w'), ((8, DIM), 'w+'), ((1, 8, DIM), 'w+')])
def test_shapes(g, shape, space):
    d = at_home(g, shape=shape)
    assert d.space == space and d.vector.dtype == torch.float32 and d.full(g).shape == (8, DIM)
    assert torch.equal(d.full(g)[3], d.vector if space == 'w' else d.vector[3])


@pytest.mark.parametrize('kw, words', [(dict(vector=torch.zeros(DIM)), 'no direction'), (dict(vector=torch.tensor([1., float('nan')])), 'no direction'),
                                       (dict(vector=torch.ones(2, 3, 4)), 'shape (2, 3, 4)'), (dict(vector=torch.ones(4), space='z'), "space is 'z'"),
                                       (dict(vector=torch.ones(2, 4), space='style'), 'expected 1 dimension'), (dict(vector=torch.ones(4), offset=float('inf')), 'no direction'),
                                       (dict(vector=torch.ones(4), home='faces64'), 'expected what home_of')])
def test_what_is_no_direction(kw, words):
    with pytest.raises(ValueError, match=re.escape(words)): Direction('x', **kw)


def test_a_direction_is_its_own(g):
    v = draws(DIM)
    d = Direction('x', v)
    v += 1
    assert torch.equal(d.vector, draws(DIM))


def test_only_moves_those_styles(g):
    d = at_home(g)
    f = d.only('medium', g).full(g)
    assert not f[:4].any() and torch.equal(f[4:], d.vector.expand(4, -1))
    assert d.only('medium', g).only('all', g).layers is None and d.layers is None
    assert 'styles 4–7' in repr(d.only('medium', g)) and 'styles 0–1, 5' in repr(d.only([0, 1, 5], g))


def test_it_says_what_it_is(g):
    d = at_home(g, 'smile', made=dict(method='boundary', samples=600))
    assert 'smile' in repr(d) and fingerprint(g)[:8] in repr(d) and '| method | boundary |' in d._repr_markdown_()
    assert 'unknown generator' in repr(Direction('x', draws(4)))


@pytest.mark.parametrize('a', [2., -1, .25, -3])
def test_scaled(g, a):
    d, w = at_home(g, offset=.7), mapped_codes(g, 20)
    torch.testing.assert_close((a*d).where(w), d.where(w)/a)
    torch.testing.assert_close((d*a).vector, a*d.vector)
    torch.testing.assert_close((d/a).vector, d.vector/a)
    torch.testing.assert_close((-d).where(w), -d.where(w))
    assert (a*d).name == ('-some' if a < 0 else 'some') and (STD in (a*d).unit)


def test_conditional_projection(g):
    d, a, b, w = at_home(g, offset=.3), at_home(g, 'a', 1), at_home(g, 'b', 2), mapped_codes(g, 20)
    left = d.without(a, b)
    v, m = d.vector.double().numpy(), np.stack([a.vector.numpy(), b.vector.numpy()], 1).astype(float)
    np.testing.assert_allclose(left.vector.numpy(), v - m @ np.linalg.inv(m.T @ m) @ m.T @ v, atol=1e-5)
    moved = edit(g, w, {left.in_std(g): 2.}).w
    for o in (a, b): torch.testing.assert_close(o.where(moved), o.where(g.broadcast(w)), atol=1e-4, rtol=1e-4)
    assert 'before projection' in left.unit and left.in_std(g).unit == STD and left.made['without'] == ['a', 'b'] and left.offset == d.offset
    torch.testing.assert_close(d.without(a, a).vector, d.without(a).vector, atol=1e-5, rtol=1e-4)  # one said twice
    with pytest.raises(ValueError, match='nothing is left without a, b'): a.without(a, b)


def test_conditional_projection_keeps_to_the_styles(g):
    d, a, w = at_home(g).only('coarse', g), at_home(g, 'a', 1, (8, DIM)), mapped_codes(g, 5)
    left = d.without(a)
    assert left.space == 'w+' and not left.full(g)[4:].any()
    torch.testing.assert_close(a.where(edit(g, w, {left: 3}).w), a.where(w), atol=1e-4, rtol=1e-4)
    wide, half = at_home(g), at_home(g, 'a', 1).only('medium', g)
    torch.testing.assert_close(half.where(edit(g, w, {wide.without(half): 3}).w), half.where(w), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match='no common space'): d.without(in_styles(g))
    with pytest.raises(ValueError, match='how many styles'): Direction('x', draws(DIM)).without(Direction('y', draws(DIM, seed=1), layers=(0,)))


# ---------------------------------------------------------------- units

def test_where_is_a_plain_projection(g):
    d, w = at_home(g, offset=.5), mapped_codes(g, 30)
    want = (w.double() @ d.vector.double())/d.vector.double().square().sum() - .5
    torch.testing.assert_close(d.where(w), want.float())
    torch.testing.assert_close(d.where(g.broadcast(w)), d.where(w))
    torch.testing.assert_close(d.only('coarse', g).where(g.broadcast(w)), d.where(w))   # one code for all styles
    s = in_styles(g, offset=.5)
    torch.testing.assert_close(s.where(w, g), (torch.cat(styles(g, w), 1) @ s.vector)/s.vector.square().sum() - .5, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='give the generator'): s.where(w)
    with pytest.raises(ValueError, match='codes have shape'): d.where(torch.zeros(2, 5))


@pytest.mark.parametrize('kind', ['w', 'w+', 'layers', 'style'])
def test_one_unit_is_one_standard_deviation(g, kind):
    d = dict(w=lambda: at_home(g, offset=2.), layers=lambda: at_home(g, offset=2., layers=(1, 5)), style=lambda: in_styles(g, offset=2.),
             **{'w+': lambda: at_home(g, shape=(8, DIM), offset=2.)})[kind]()
    e, w = d.in_std(g, n=500, seed=3), mapped_codes(g, 500, seed=3)
    assert abs(e.where(w, g).std().item() - 1) < 1e-4 and e.unit == STD
    spread = d.where(w, g).std().item()
    torch.testing.assert_close(e.where(w, g), d.where(w, g)/spread, rtol=1e-3, atol=1e-4)     # the origin stays where it is


@pytest.mark.parametrize('shape, layers', [((DIM,), None), ((DIM,), (0, 3)), ((8, DIM), None), ((8, DIM), (2, 6, 7))])
def test_an_edit_adds_its_strength_to_the_coordinate(g, shape, layers):
    d, w = at_home(g, shape=shape, layers=layers, offset=1.), draws(6, 8, DIM, seed=5)
    a = torch.linspace(-3, 3, 6)
    torch.testing.assert_close(d.where(edit(g, w, {d: a}).w) - d.where(w), a, atol=1e-4, rtol=1e-4)


def test_mapped_codes(g):
    want = g.map(torch.randn(1500, g.z_dim, generator=torch.Generator().manual_seed(4)))
    torch.testing.assert_close(mapped_codes(g, 1500, seed=4), want)
    with pytest.raises(TypeError, match='no mapping network'): mapped_codes(types.SimpleNamespace())
    flat = copy.deepcopy(g); flat.mapping[-1].weight.data.zero_()
    with pytest.raises(ValueError, match='do not vary along it'): at_home(flat).in_std(flat)


# ---------------------------------------------------------------- at home, and elsewhere

def sibling(g):
    "Fine-tuned with a frozen mapping"
    o = copy.deepcopy(g)
    o.convs[4].weight.data += .1
    o.name = 'sibling'
    return o


def test_foreign_is_refused_in_one_sentence(g):
    home = copy.deepcopy(g); home.name = 'cats'
    d = at_home(home, 'smile')
    for use in (lambda o, **kw: d.check(o, **kw), lambda o, **kw: edit(o, torch.zeros(1, DIM), {d: 1}, **kw), lambda o, **kw: sweep(o, torch.zeros(1, DIM), d, (1,), **kw)):
        with pytest.raises(ForeignDirection) as e: use(sibling(g))
        said = str(e.value)
        assert all(k in said for k in ("'smile'", 'cats', 'sibling', "allow='cats'", d.home['fingerprint'][:8])) and '\n' not in said and said.count('. ') == 0
        for allow in ('cats', d.home['fingerprint'], ['dogs', 'cats'], ('cats',)): use(sibling(g), allow=allow)
        for allow in ('sibling', 'dogs', (), 'unknown', 'cat'):
            with pytest.raises(ForeignDirection): use(sibling(g), allow=allow)
    with pytest.raises(ForeignDirection): d.in_std(sibling(g))
    with pytest.raises(ValueError, match='name the generators'): d.check(g, allow=True)
    assert d.check(g) is d and d.check(ReStyle(torch.nn.Identity(), g)) is d      # the name does not matter at home


@pytest.mark.parametrize('other, words', [(dict(style_dim=12), 'takes (12,)'), (dict(size=16), 'moves style 7 and that generator has 6 styles')])
def test_what_does_not_fit_cannot_be_allowed(g, other, words):
    d, o = at_home(g, layers=(7,)), tiny(**other)
    with pytest.raises(ForeignDirection, match=re.escape(words)): d.check(o, allow='unnamed')
    wide, channels = at_home(g, shape=(8, DIM)), in_styles(g)
    for k in (wide, channels):
        with pytest.raises(ForeignDirection, match='does not fit'): k.check(tiny(size=16), allow='unnamed')


def test_without_a_home(g):
    d = Direction('stray', draws(DIM))
    with pytest.raises(ForeignDirection, match="does not say .* allow='unknown'"): d.check(g)
    assert d.check(g, allow='unknown') is d
    with pytest.raises(ForeignDirection): d.check(g, allow='unnamed')


# ---------------------------------------------------------------- edits

def test_edit_is_plain_arithmetic(g):
    w, d, e = draws(3, 8, DIM), at_home(g).only('coarse', g), at_home(g, 'b', 1, (8, DIM))
    got = edit(g, w, [(d, 2), (e, torch.tensor([0., 1., -1.])), (d, .5)])
    want = w.clone()
    want[:, :4] += 2.5*d.vector
    want += torch.tensor([0., 1., -1.])[:, None, None]*e.vector
    torch.testing.assert_close(got.w, want)
    torch.testing.assert_close(got.y, g.synthesize(want), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_no_strength_is_no_change_to_the_bit(g, dtype):
    o, w = copy.deepcopy(g).to(dtype), draws(3, 8, DIM).to(dtype)
    same = edit(o, w, {at_home(g): 0, in_styles(g): 0., at_home(g, 'b', 1): [0, 0, 0]})
    assert torch.equal(same.w, w) and torch.equal(same.y, o.synthesize(w)) and same.w.dtype == same.y.dtype == dtype and same.styles is None


def test_undo(g):
    w, d, s = draws(3, 8, DIM), at_home(g), in_styles(g)
    there = edit(g, w, {d: 2.5, s: 1.5})
    back = edit(g, there, {d: -2.5, s: -1.5})
    torch.testing.assert_close(back.w, w, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(back.y, g.synthesize(w), atol=1e-4, rtol=1e-4)
    assert (there.y - back.y).abs().max() > .01


def test_half_precision(g):
    o, w, d = copy.deepcopy(g).half(), draws(2, 8, DIM).half(), at_home(g)
    got = edit(o, w, {d: 3})
    torch.testing.assert_close(got.w.float(), w.float() + 3*d.vector, atol=1e-2, rtol=1e-3)
    assert got.w.dtype == got.y.dtype == torch.float16 and got.y.isfinite().all()


def test_in_parts_and_at_once(g):
    w, d, s = draws(7, 8, DIM), at_home(g), in_styles(g)
    moves = {d: torch.linspace(-1, 1, 7), s: torch.linspace(1, 3, 7)}
    torch.testing.assert_close(edit(g, w, moves, batch_size=3).y, edit(g, w, moves).y, atol=1e-5, rtol=1e-5)
    one = torch.cat([edit(g, w[[i]], {d: moves[d][i], s: moves[s][i]}).y for i in range(7)])
    torch.testing.assert_close(one, edit(g, w, moves).y, atol=1e-5, rtol=1e-5)


def inversion(g, n=2, noise=True):
    codes = draws(3, n, 8, DIM)
    planes = [draws(n, 1, *g.shapes[(i+1)//2], seed=i) for i in range(len(g.convs))] if noise else None
    return Inversion(codes, codes[1:] - codes[:-1], torch.rand(3, n), torch.full((n,), 2), torch.zeros(n, 3, 32, 32), noise=planes)


def test_an_inversion_keeps_its_own_noise(g):
    inv, d, s = inversion(g), at_home(g), in_styles(g)
    got = edit(g, inv, {d: 1})
    want = g.synthesize(inv.codes[-1] + d.full(g), noise=inv.noise)
    torch.testing.assert_close(got.y, want, atol=1e-5, rtol=1e-5)
    assert (want - g.synthesize(inv.codes[-1] + d.full(g))).abs().max() > 1e-3            # the planes do something
    walk = sweep(g, inv, s, (0, 2, 4), batch_size=4)
    torch.testing.assert_close(walk.images[0], g.synthesize(inv.codes[-1], noise=inv.noise), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(walk.images[2], edit(g, inv, {s: 4}).y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(edit(g, got, {d: -1}).y, walk.images[0], atol=1e-4, rtol=1e-4)  # an edit hands the planes on
    assert torch.equal(walk.x, inv.x) and edit(g, inversion(g, noise=False), {}).noise is None


def test_a_stand_in_generator_can_be_edited():
    class Stranger:
        n_styles, style_dim, latent_avg = 4, 3, torch.zeros(4, 3)
        def synthesize(self, w): return w[:, None].expand(-1, 3, -1, -1)
    o = Stranger()
    d = Direction('up', torch.ones(3), home=home_of(o))
    assert torch.equal(edit(o, torch.zeros(2, 3), {d: 2}).y, torch.full((2, 3, 4, 3), 2.))
    with pytest.raises(TypeError, match='style space needs a Generator'): styles(o, torch.zeros(2, 3))


@pytest.mark.parametrize('moves, error, words', [({'smile': 1}, TypeError, 'Direction -> strength'), ([1, 2], TypeError, 'Direction -> strength'),
                                                 (lambda d: {d: [1, 2]}, ValueError, 'one for each of 3'), (lambda d: {d: float('nan')}, ValueError, 'one finite number')])
def test_moves_that_make_no_sense(g, moves, error, words):
    with pytest.raises(error, match=words): edit(g, draws(3, 8, DIM), moves(at_home(g)) if callable(moves) else moves)


@pytest.mark.parametrize('shape', [(3, 7, DIM), (3, 8, 9), (3, 12), (8,)])
def test_codes_that_do_not_fit(g, shape):
    with pytest.raises(ValueError, match='expected'): edit(g, torch.zeros(shape), {})


# ---------------------------------------------------------------- style space

def restyled(g, w, offsets):
    "Synthesis, word for word, with other styles"
    def run(m, x, s):
        weight = (m.weight*m.scale)[None]*s[:, None, :, None, None]
        if m.demodulate: weight = weight*torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        return torch.cat([m.filter(x[i:i+1], k) for i, k in enumerate(weight)])
    s = [a + o for a, o in zip(plain_styles(g, w), offsets)]
    x, y, k = g.const.expand(len(w), -1, -1, -1), None, 0
    for j in range(len(g.resolutions)):
        for i in ([0] if not j else [2*j-1, 2*j]):
            c, x = g.convs[i], run(g.convs[i], x, s[k]) + g.convs[i].noise_strength*getattr(g, f'noise_{i}')
            x, k = torch.nn.functional.leaky_relu(x + c.bias[:, None, None], .2)*2**.5, k + 1
        image = run(g.to_images[j], x, s[k]) + g.to_images[j].bias[:, None, None]
        from restyle_nb.generator import upsample
        y, k = image if y is None else upsample(y) + image, k + 1
    return y


def plain_styles(g, w):
    lin = lambda m, o: o @ m.affine.weight.T*m.affine.scale + m.affine.bias
    out = []
    for j, t in enumerate(g.to_images): out += [lin(g.convs[i], w[:, i]) for i in ([0] if not j else [2*j-1, 2*j])] + [lin(t, w[:, 2*j+1])]
    return out


def test_styles_are_what_the_affine_layers_say(g):
    w = draws(3, 8, DIM)
    for a, b in zip(styles(g, w), plain_styles(g, w), strict=True): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert [o.shape[1] for o in styles(g, w)] == style_sizes(g) and len(style_sizes(g)) == len(g.convs) + len(g.to_images)


@pytest.mark.parametrize('layers', [None, (0, 1), (5,)])
def test_a_style_space_edit_is_a_plain_recomputation(g, layers):
    w, d = draws(3, 8, DIM), in_styles(g, layers=layers)
    a = torch.tensor([2., 0., -1.])
    fed = [i for j in range(4) for i in ([0, 1] if not j else [2*j-1, 2*j, 2*j+1])]
    offsets = [a[:, None]*o*(layers is None or i in layers) for i, o in zip(fed, d.vector.split(style_sizes(g)), strict=True)]
    got = edit(g, w, {d: a})
    torch.testing.assert_close(got.y, restyled(g, w, offsets), atol=1e-4, rtol=1e-4)
    assert torch.equal(got.w, w) and (got.y[0] - g.synthesize(w)[0]).abs().max() > 1e-3
    before, after = d.where(w, g), None
    with moved_styles(g, got.styles): after = d.where(w, g)
    torch.testing.assert_close(after - before, a, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match='moves channels'): d.full(g)


def test_hooks_are_gone_afterwards(g):
    w = draws(2, 8, DIM)
    y, some = g.synthesize(w), [None]*len(style_sizes(g))
    some[3] = torch.ones(1, style_sizes(g)[3])
    with pytest.raises(RuntimeError, match='on the way'):
        with moved_styles(g, some):
            assert not torch.equal(g.synthesize(w), y)
            raise RuntimeError('on the way')
    assert torch.equal(g.synthesize(w), y) and not any(m._forward_hooks for m in g.modules())
    with pytest.raises(ValueError, match='one per modulated convolution'):
        with moved_styles(g, some[1:]): pass


# ---------------------------------------------------------------- sweeps, mixing, walking

def test_sweep(g):
    w, d = draws(2, 8, DIM), at_home(g).in_std(g, 200)
    s = sweep(g, w, d, (-2, 0, 1.5))
    assert s.images.shape == (3, 2, 3, 32, 32) and s.strengths == (-2, 0, 1.5) and s.titles == ['-2 s.d.', '0', '+1.5 s.d.']
    for y, a in zip(s.images, s.strengths): torch.testing.assert_close(y, g.synthesize(w + a*d.full(g)), atol=1e-5, rtol=1e-5)
    assert s._repr_png_().startswith(b'\x89PNG') and s.strip(1).height < s.strip(2).height and 'some' in repr(s)
    assert sweep(g, w, at_home(g, unit='as published'), (1,)).titles == ['+1']
    cars = Geometry((24, 32), (32, 32), (4, 0, 28, 32))
    cut = sweep(g, inversion(g), d, (0, 1))
    cut.geometry = cars
    assert cut._columns(2, {})[0][0].shape == (2, 3, 24, 32) and sweep(ReStyle(torch.nn.Identity(), g, cars), w, d, (0,)).geometry == cars
    assert edit(g, w, {d: 1})._repr_png_().startswith(b'\x89PNG')


def test_rows_of_walks(g):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    w, d = draws(1, 8, DIM), at_home(g)
    show_rows([sweep(g, w, o, (-1, 0, 1)) for o in (d, -d)])
    ax = plt.gca()
    assert [t.get_text() for t in ax.get_yticklabels()] == ['some', '-some'] and [t.get_text() for t in ax.get_xticklabels()] == ['-1 s.d.', '0', '+1 s.d.']
    show_rows([torch.zeros(2, 1, 8, 4)], ['a', 'b'], ['c'])
    plt.close('all')
    with pytest.raises(ValueError, match=r'found \[2, 1\]'): show_rows([torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 8, 8)])


def test_mix(g):
    a, b = draws(3, 8, DIM), draws(1, 8, DIM, seed=1)
    m = mix(a, b, 'coarse', g)
    assert torch.equal(m[:, :4], b[:, :4].expand(3, -1, -1)) and torch.equal(m[:, 4:], a[:, 4:]) and torch.equal(a, draws(3, 8, DIM))
    assert torch.equal(mix(draws(2, DIM), inversion(g), 'all', g), inversion(g).codes[-1])


def test_interpolate():
    a, b = draws(3, 8, DIM), draws(3, 8, DIM, seed=1)
    s = interpolate(a, b, 5)
    assert torch.equal(s[0], a) and torch.equal(s[-1], b)
    torch.testing.assert_close(s[1], .75*a + .25*b)


# ---------------------------------------------------------------- files

def all_kinds(g):
    return [at_home(g, 'a', offset=.25), at_home(g, 'b ä', 1, (8, DIM), layers=(1, 2)), in_styles(g, 2, layers=(0,)),
            Direction('stray', draws(DIM, seed=3), unit='as published', made=dict(method='by hand', n=[1, 2], nested=dict(x=None)))]


def test_saved_and_read_exactly(g, tmp_path):
    ds = all_kinds(g)
    path = save_directions(ds, tmp_path/'some')
    got = read_directions(path)
    assert path.suffix == '.safetensors' and [*got] == [d.name for d in ds]
    for d in ds:
        o = got[d.name]
        assert torch.equal(o.vector, d.vector) and all(getattr(o, k) == getattr(d, k) for k in FACTS)
    one = Direction.load(ds[1].save(tmp_path/'one.safetensors'))
    assert torch.equal(one.vector, ds[1].vector) and one.layers == (1, 2)
    assert [*read_directions(save_directions(dict(x=ds[0], y=ds[0]), tmp_path/'two'))] == ['x', 'y']
    with pytest.raises(ValueError, match='holds 4 directions'): Direction.load(path)
    with pytest.raises(ValueError, match='each under a name of its own'): save_directions([ds[0], ds[0]], tmp_path/'twice')
    claimed = read_directions(path, generator=g)
    assert claimed['a'].home == ds[0].home and 'claimed' in claimed['stray'].made and 'claimed' not in claimed['a'].made


def published(path, o, legacy=False):
    torch.save(o, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('shape, space', [((1, DIM), 'w'), ((DIM,), 'w'), ((8, DIM), 'w+'), ((1, 8, DIM), 'w+')])
def test_published_tensors(g, tmp_path, shape, space, legacy):
    v = draws(*shape)
    for path in (published(tmp_path/'age.pt', v.double(), legacy), tmp_path/'age.npy'):
        if path.suffix == '.npy': np.save(path, v.numpy())
        d = read_directions(path)['age']
        assert d.space == space and torch.equal(d.vector, v.reshape(d.vector.shape)) and d.unit == 'as published' and d.home is None and d.made['source'] == path.name
        mine = read_directions(path, generator=g, name='older')['older']
        assert mine.home == home_of(g) and mine.check(g) is mine and abs(mine.in_std(g, 300).where(mapped_codes(g, 300)).std() - 1) < 1e-3
    assert Direction.load(path).name == 'age'


def test_published_with_gradient_order_and_half(tmp_path):
    p = torch.nn.Parameter(draws(3, DIM).half())
    assert torch.equal(read_directions(published(tmp_path/'a.pt', p))['a'].vector, draws(3, DIM).half().float())
    np.save(tmp_path/'f.npy', np.asfortranarray(draws(3, DIM).numpy()))
    assert torch.equal(read_directions(tmp_path/'f.npy')['f'].vector, draws(3, DIM))
    assert read_directions(published(tmp_path/'t.pt', draws(DIM, 3).T))['t'].vector.equal(draws(DIM, 3).T)


@pytest.mark.parametrize('keys, suffix', [(('lat_comp', 'lat_mean', 'lat_stdev'), '.npz'), (('comp', 'mean', 'std'), '.pt')])
def test_ganspace(g, tmp_path, keys, suffix):
    w = mapped_codes(g, 2000).numpy().astype(float)
    mean, (_, s, v) = w.mean(0), np.linalg.svd(w - w.mean(0), full_matrices=False)
    comp, std = v[:3, None].astype('f4'), (s[:3]/len(w)**.5).astype('f4')                  # (3,1,DIM), as GANSpace writes them
    file = dict(zip(keys, (comp, mean[None, None].astype('f4'), std)))
    path = tmp_path/f'pca{suffix}'
    np.savez_compressed(path, act_comp=np.zeros((3, 2, 4, 4), 'f4'), **file) if suffix == '.npz' else torch.save({k: torch.from_numpy(o) for k, o in file.items()}, path)
    ds = read_directions(path, generator=g)
    assert [*ds] == ['PC 1', 'PC 2', 'PC 3']
    for i, d in enumerate(ds.values()):
        c = d.where(mapped_codes(g, 2000))
        assert d.unit == STD and abs(c.std() - 1) < 1e-2 and abs(c.mean()) < 1e-2
        np.testing.assert_allclose(c.numpy(), (w - mean) @ comp[i, 0]/std[i], atol=1e-3)
    assert [*read_directions(path, name='way')] == ['way 1', 'way 2', 'way 3']


def test_ganspace_of_styles(tmp_path):
    comp = draws(2, 8, DIM)
    np.savez(tmp_path/'p.npz', lat_comp=comp, lat_mean=np.zeros((1, 8, DIM), 'f4'), lat_stdev=np.array([2., 3.]))
    d = read_directions(tmp_path/'p.npz')['PC 2']
    assert d.space == 'w+' and torch.allclose(d.vector, 3*comp[1])
    np.savez(tmp_path/'q.npz', lat_comp=comp, lat_stdev=np.ones(3))
    with pytest.raises(CheckpointError, match='q.npz: components of shape'): read_directions(tmp_path/'q.npz')


def test_sefa_of_rosinality(g, tmp_path):
    v = torch.linalg.qr(draws(DIM, DIM))[0]
    ds = read_directions(published(tmp_path/'factor.pt', dict(ckpt='stylegan2-ffhq.pt', eigvec=v)))
    assert len(ds) == DIM and torch.equal(ds['SeFa 3'].vector, v[:, 2]) and ds['SeFa 1'].made['method'] == 'SeFa'


def test_mappings_and_lists(g, tmp_path):
    o = dict(smile=draws(DIM), pose=draws(1, 8, DIM))
    for src in (published(tmp_path/'m.pt', o), o):
        ds = read_directions(src, generator=g)
        assert [*ds] == ['smile', 'pose'] and ds['pose'].space == 'w+' and ds['smile'].home == home_of(g)
    from safetensors.torch import save_file
    save_file(o, tmp_path/'m.safetensors')
    assert {*read_directions(tmp_path/'m.safetensors')} == {*o}
    assert [*read_directions(published(tmp_path/'l.pt', [draws(DIM), draws(DIM, seed=1)]), name='w')] == ['w 0', 'w 1']


@pytest.mark.parametrize('shape', [(12,), (7, DIM)])
def test_a_claim_must_fit(g, tmp_path, shape):
    with pytest.raises(CheckpointError, match='a.pt: .* that generator takes'): read_directions(published(tmp_path/'a.pt', draws(*shape)), generator=g)


# ---------------------------------------------------------------- files made to harm, to lie or to disappoint

class Command:
    "Pickled, this is an order to make a folder"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def npy(shape, raw=b'\0'*64, descr='<f4'):
    head = repr(dict(descr=descr, fortran_order=False, shape=shape)).encode()
    head += b' '*((-len(head) - 11) % 64) + b'\n'
    return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(head)) + head + raw


def members(path, **files):
    with zipfile.ZipFile(path, 'w') as z:
        for k, v in files.items(): z.writestr(f'{k}.npy', v)


def of(dump, *a, **kw):
    f = io.BytesIO()
    dump(f, *a, **kw)
    return f.getvalue()


def header(**o): return json.dumps(dict(__metadata__=dict(restyle_nb=json.dumps(o)), x=dict(dtype='F32', shape=[16], data_offsets=[0, 64]))).encode()
def ours(path, **o): path.write_bytes(struct.pack('<Q', len(header(**o))) + header(**o) + b'\0\0\x80?'*16)


BAD = dict(
    object_npy=('a.npy', lambda p: np.save(p, np.array([dict(a=1)]), allow_pickle=True), 'Python objects'),
    harm_npy=('a.npy', lambda p: np.save(p, np.array([Command(p.parent/'harm')]), allow_pickle=True), 'Python objects'),
    harm_npz=('a.npz', lambda p: np.savez(p, lat_comp=np.array([Command(p.parent/'harm')], dtype=object)), 'Python objects'),
    text_npy=('a.npy', lambda p: np.save(p, np.array(['smile'*20])), 'expected numbers'),
    huge_npy=('a.npy', lambda p: p.write_bytes(npy((2**40,))), 'claims shape'),
    huge_npz=('a.npz', lambda p: members(p, comp=npy((2**40,))), 'claims shape'),
    short_npy=('a.npy', lambda p: p.write_bytes(npy((1, 512)) ), 'claims shape (1, 512)'),
    negative=('a.npy', lambda p: p.write_bytes(npy((-4, -4))), 'a.npy'),
    code_npy=('a.npy', lambda p: p.write_bytes(npy('__import__("os").mkdir("harm")')), 'header cannot be read'),
    cut_npy=('a.npy', lambda p: p.write_bytes(npy((16,))[:40]), 'header cannot be read'),
    future_npy=('a.npy', lambda p: p.write_bytes(b'\x93NUMPY\x09\x00' + b' '*80), 'header cannot be read'),
    cut_npz=('a.npz', lambda p: p.write_bytes(of(np.savez, comp=np.zeros(100))[:200]), 'a.npz'),
    scalar=('a.npy', lambda p: np.save(p, np.float64(3)), 'shape ()'),
    empty_npy=('a.npy', lambda p: np.save(p, np.zeros((0, 512))), 'claims shape'),
    nan=('a.npy', lambda p: np.save(p, np.full(64, np.nan)), 'no direction'),
    zero=('a.pt', lambda p: torch.save(torch.zeros(1, 64), p), 'no direction'),
    four=('a.pt', lambda p: torch.save({'convs.0.weight': torch.ones(2, 3, 3, 3)}, p), 'shape (2, 3, 3, 3)'),
    harm_pt=('a.pt', lambda p: torch.save(Command(p.parent/'harm'), p), 'a.pt'),
    harm_in=('a.pt', lambda p: torch.save(dict(smile=torch.ones(64), x=Command(p.parent/'harm')), p), 'a.pt'),
    bare=('a.pkl', lambda p: p.write_bytes(pickle.dumps(Command(p.parent/('harm'*20)), 2)), 'a.pkl'),
    nothing=('a.pt', lambda p: torch.save(dict(a=1, b='x'*80), p), 'holds no tensors'),
    number=('a.pt', lambda p: torch.save(3.5, p), 'a.pt'),
    page=('a.pt', lambda p: p.write_text('<html>' + ' '*80), 'a web page'),
    missing=('a.pt', lambda p: None, 'no such file'),
    kind=('a.safetensors', lambda p: ours(p, kind='generator', format=1, config={}), "a 'generator'"),
    newer=('a.safetensors', lambda p: ours(p, kind='directions', format=99, config={}), 'upgrade'),
    renamed=('a.safetensors', lambda p: ours(p, kind='directions', format=1, directions=[dict(name='y')]), 'a.safetensors'),
    lacking=('a.safetensors', lambda p: ours(p, kind='directions', format=1, directions=[dict(name='x')]), 'a.safetensors'),
    listed=('a.safetensors', lambda p: ours(p, kind='directions', format=1, directions=7), 'a.safetensors'),
    odd=('a.safetensors', lambda p: ours(p, kind='directions', format=1, directions=[dict(name='x', space='w', layers=['a'], unit='u', offset='z', home=3, made=[])]), 'a.safetensors'),
)


@pytest.mark.parametrize('name, make, words', BAD.values(), ids=BAD)
def test_bad_files(tmp_path, monkeypatch, name, make, words):
    monkeypatch.chdir(tmp_path)
    make(tmp_path/name)
    with pytest.raises(CheckpointError) as e: read_directions(tmp_path/name)
    assert words in str(e.value) and name in str(e.value) and '\n' not in str(e.value)
    assert not list(tmp_path.glob('harm*'))


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    import restyle_nb.editing as E
    monkeypatch.setattr(E, 'MOST_BYTES', 10**5)
    np.savez_compressed(tmp_path/'b.npz', comp=np.zeros(10**5))
    with pytest.raises(CheckpointError, match='would unpack to more'): read_directions(tmp_path/'b.npz')


def test_a_hostile_home_is_no_home(g, tmp_path):
    ours(tmp_path/'a.safetensors', kind='directions', format=1, directions=[dict(name='x', space='w', layers=None, unit='u', offset=0, home=dict(name='faces64'), made={})])
    with pytest.raises(CheckpointError, match='home'): read_directions(tmp_path/'a.safetensors')


def test_ready_made_directions(tmp_path):
    ready, g = load_directions('faces64'), load_generator('faces64', 'cpu')
    assert len(ready) >= 6 and all(d.check(g) is d for d in ready.values())
    with pytest.raises(CheckpointError, match='some for faces64'): load_directions('nowhere')
