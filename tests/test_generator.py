"The generator against the published numbers, against its own plain form, and in odd shapes."
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from restyle_nb.generator import (Discriminator, Generator, ModulatedConv, blur, d_loss, default_channels, g_loss, minibatch_std,
                                  modulated_conv_plain, r1_penalty, upsample)

GOLDEN = Path(__file__).parent / 'golden'
LIMIT = 1e-4  # of the spread of the expected array
WIDTHS = {4: 12, 8: 10, 16: 8, 32: 6, 64: 5, 128: 4}


def golden(name):
    spec = importlib.util.spec_from_file_location('golden_fill', GOLDEN / 'fill.py')
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    return [{k: torch.as_tensor(v) for k, v in part.items()} for part in fill.case(name)]


def tiny(size=16, **kw):
    torch.manual_seed(0)
    return Generator(**{**dict(size=size, style_dim=16, n_mlp=2, channels=WIDTHS), **kw})


def codes(g, n=2, seed=0): return torch.randn(n, g.n_styles, g.style_dim, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def published():
    from restyle_nb.checkpoints import read_generator
    tensors, inputs, expected = golden('generator_rosinality_32')
    return read_generator({**tensors, 'latent_avg': inputs['in.wmean'][0]}).freeze(), inputs, expected


@pytest.mark.parametrize('name', ['w', 'image', 'wplus_trunc07', 'image_trunc07'])
def test_golden(published, name):
    g, i, expected = published
    got = dict(w=lambda: g.map(i['in.z']), image=lambda: g.synthesize(i['in.wplus']),
               wplus_trunc07=lambda: g.truncate(g.map(i['in.z']), .7), image_trunc07=lambda: g(i['in.z'], .7))[name]()
    assert got.shape == expected[name].shape
    error = ((got - expected[name]).abs().max() / expected[name].std()).item()
    print(f'{name}: largest error {error:.1e} of the spread')
    assert error <= LIMIT


def test_golden_average(published):
    g, i, _ = published
    assert g.has_latent_avg and torch.equal(g.latent_avg, i['in.wmean'].expand(8, 512))
    assert g.config['channels'] == default_channels(32)


@pytest.mark.parametrize('prefix', ['', 'G_ema.'])
def test_golden_under_nvidias_names(prefix):
    from restyle_nb.checkpoints import read_generator
    tensors, i, expected = golden('generator_nvidia_32')
    g = read_generator({prefix + k: v for k, v in tensors.items()}).freeze()
    ws = g.truncate(g.map(i['in.z']), .7)
    for got, name in ((ws, 'ws'), (g.synthesize(ws), 'image'), (g.synthesize(i['in.wplus']), 'image_wplus')):
        assert ((got - expected[name]).abs().max() / expected[name].std()).item() <= LIMIT, name


@pytest.mark.parametrize('kernel,up,demodulate', [(3, False, True), (3, True, True), (1, False, False), (3, False, False)])
def test_dense_is_plain(kernel, up, demodulate):
    torch.manual_seed(0)
    conv = ModulatedConv(6, 9, kernel, 16, up, demodulate).double()
    x, w = torch.randn(3, 6, 5, 7, dtype=torch.double, requires_grad=True), torch.randn(3, 16, dtype=torch.double, requires_grad=True)
    leaves = [x, w, *conv.parameters()]
    outs = [conv(x, w), modulated_conv_plain(conv, x, w)]
    seed = torch.randn_like(outs[0])
    grads = [torch.autograd.grad((o * seed).sum(), leaves) for o in outs]
    assert outs[0].shape == ((3, 9, 10, 14) if up else (3, 9, 5, 7))
    torch.testing.assert_close(*outs)
    for a, b in zip(*grads): torch.testing.assert_close(a, b)


def test_blur_and_upsample_are_one_filter():
    k = torch.tensor([1., 3., 3., 1.]) / 8
    x = torch.randn(2, 3, 5, 6)
    full = torch.outer(k, k).expand(3, 1, 4, 4)
    for pad in (1, 2): torch.testing.assert_close(blur(x, pad, gain=4), 4 * F.conv2d(x, full, groups=3, padding=pad))
    torch.testing.assert_close(upsample(x), F.conv_transpose2d(x, 4 * full, stride=2, padding=1, groups=3))


@pytest.mark.parametrize('size', [8, 16, 32, 64, 128])
@pytest.mark.parametrize('planes,z_dim,n_mlp', [(1, 5, 1), (2, None, 8), (3, 24, 2), (4, None, 0)])
def test_sizes(size, planes, z_dim, n_mlp):
    g = tiny(size, image_channels=planes, z_dim=z_dim, n_mlp=n_mlp)
    assert g.n_styles == 2 * (size.bit_length() - 1) - 2 and len(g.mapping) == n_mlp
    w = g.map(torch.randn(2, z_dim or 16))
    y = g.synthesize(w)
    assert w.shape == (2, 16) and y.shape == (2, planes, size, size) and y.isfinite().all()
    assert Discriminator(size, channels=WIDTHS, image_channels=planes)(y).shape == (2,)


@pytest.mark.parametrize('size', [256, 512, 1024])
@pytest.mark.parametrize('multiplier', [1, 2])
def test_published_sizes_on_paper(size, multiplier):
    with torch.device('meta'): g = Generator(size, channel_multiplier=multiplier)
    assert g.n_styles == {256: 14, 512: 16, 1024: 18}[size]
    assert g.convs[-1].weight.shape[0] == {256: 64, 512: 32, 1024: 16}[size] * multiplier
    assert g.to_images[-1].weight.shape[:2] == (3, g.convs[-1].weight.shape[0])
    if (size, multiplier) == (1024, 2): assert sum(p.numel() for p in g.parameters()) == 30370060


@pytest.mark.parametrize('const,size,out', [((3, 4), 32, (24, 32)), ((4, 2), 16, (16, 8)), ((8, 8), 16, (16, 16)), ((1, 4), 8, (2, 8))])
def test_wide_pictures(const, size, out):
    g = tiny(size, const_size=const)
    assert g.synthesize(codes(g)).shape == (2, 3, *out)
    D = Discriminator(size, channels=WIDTHS, const_size=const)
    assert D(g.synthesize(codes(g))).shape == (2,)


def test_same_seed_same_picture():
    a, b = tiny(), tiny()
    w = codes(a)
    assert torch.equal(a.synthesize(w), a.synthesize(w)) and torch.equal(a.synthesize(w), b.synthesize(w))
    twin = Generator(**a.config)
    twin.load_state_dict(a.state_dict())
    assert torch.equal(twin.synthesize(w), a.synthesize(w))


def test_a_picture_does_not_depend_on_its_batch():
    g = tiny(32)
    w = codes(g, 5)
    torch.testing.assert_close(g.synthesize(w)[3:4], g.synthesize(w[3:4]))


def test_channels_last_is_the_same():
    g = tiny(32)
    w = codes(g, 3)
    y = g.synthesize(w)
    torch.testing.assert_close(g.to(memory_format=torch.channels_last).synthesize(w), y)


def test_noise():
    g = tiny()
    with torch.no_grad():
        for conv in g.convs: conv.noise_strength.fill_(.5)
        w, rng = codes(g), lambda s: torch.Generator().manual_seed(s)
        y = {k: g.synthesize(w, k) for k in ('fixed', None)}
        r = [g.synthesize(w, 'random', rng=rng(s)) for s in (1, 1, 2)]
        assert torch.equal(r[0], r[1]) and not torch.equal(r[0], r[2]) and not torch.equal(y['fixed'], y[None])
        assert torch.equal(g.synthesize(w, g.noises('fixed')), y['fixed'])
        assert torch.equal(g.synthesize(w, [None] * 5), y[None])
        same = g.synthesize(w[:1].expand(2, -1, -1), 'random', rng=rng(3))
        assert not torch.equal(same[0], same[1])
        for conv in g.convs: conv.noise_strength.zero_()
        assert torch.equal(g.synthesize(w), g.synthesize(w, None))


def test_stop():
    g = tiny(32)
    w = codes(g)
    assert [tuple(g.synthesize(w, stop=r).shape[2:]) for r in g.resolutions] == [(r, r) for r in (4, 8, 16, 32)]
    assert torch.equal(g.synthesize(w, stop=32), g.synthesize(w))
    changed = w.clone()
    changed[:, 4:] += 1
    assert torch.equal(g.synthesize(w, stop=8), g.synthesize(changed, stop=8))


def test_truncation():
    g, z = tiny(), torch.randn(3, 16)
    with pytest.raises(ValueError, match='estimate_latent_avg'): g(z, truncation=.5)
    avg = g.estimate_latent_avg(1000, seed=1).clone()
    assert g.has_latent_avg and torch.equal(avg, g.estimate_latent_avg(1000, seed=1))
    assert not torch.equal(avg, g.estimate_latent_avg(1000, seed=2))
    g.latent_avg.copy_(avg)
    w = g.broadcast(g.map(z))
    torch.testing.assert_close(g.truncate(w, .3) - avg, .3 * (w - avg))
    assert torch.equal(g.truncate(w, 1), w) and torch.equal(g(z), g.synthesize(w))
    assert torch.equal(g.truncate(w, 0.), avg.expand(3, -1, -1))
    torch.testing.assert_close(avg[0], g.map(torch.randn(20000, 16)).mean(0), atol=.1, rtol=0)


def test_groups_cover_all_styles():
    for size in (8, 16, 64, 128):
        g = tiny(size)
        styles = list(range(g.n_styles))
        assert sum((styles[s] for s in g.groups.values()), []) == styles


def test_frozen_still_passes_gradients_to_the_code():
    g = tiny().freeze()
    w = codes(g).requires_grad_()
    g.synthesize(w).square().mean().backward()
    assert (w.grad.abs().sum((0, 2)) > 0).all() and all(p.grad is None for p in g.parameters()) and not g.training


@pytest.mark.parametrize('call,message', [
    (lambda g: Generator(20), r'size is 20, expected one of \[8, 16'),
    (lambda g: Generator(4), 'expected one of'),
    (lambda g: Generator(2048), 'expected one of'),
    (lambda g: Generator(8, image_channels=5), 'expected 1 to 4'),
    (lambda g: Generator(8, channels={4: 3}), r'resolution \[8\]'),
    (lambda g: Generator(8, n_mlp=0, z_dim=3), 'z_dim'),
    (lambda g: g.map(torch.zeros(2, 3)), r'expected \(batch, 16\)'),
    (lambda g: g.synthesize(torch.zeros(2, 5, 16)), r'\(2, 5, 16\), expected \(batch, 6, 16\)'),
    (lambda g: g.synthesize(codes(g), 'none'), "'none', expected"),
    (lambda g: g.synthesize(codes(g), [None]), '1 planes, expected 5'),
    (lambda g: g.synthesize(codes(g), [torch.zeros(1, 1, 5, 5)] + [None] * 4), r'plane 0 is \(5, 5\)'),
    (lambda g: g.synthesize(codes(g), stop=64), 'stop is 64'),
])
def test_refused_with_the_reason(call, message):
    with pytest.raises(ValueError, match=message): call(tiny())


def test_discriminator_learns_from_every_weight():
    torch.manual_seed(0)
    D, g = Discriminator(16, channels=WIDTHS), tiny()
    real, fake = torch.randn(6, 3, 16, 16), g(torch.randn(6, 16), noise='random')
    (d_loss(D(real), D(fake.detach())) + r1_penalty(D, real)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in D.parameters())
    for name, p in D.named_parameters(): assert name == 'score.bias' or p.grad.abs().sum() > 0, name
    g_loss(D(fake)).backward()
    used = {n: p.grad for n, p in g.named_parameters()}
    assert all(v is not None and v.isfinite().all() and v.abs().sum() > 0 for v in used.values())


def test_r1_is_the_squared_gradient():
    torch.manual_seed(0)
    D, x, h = Discriminator(8, channels=WIDTHS).double(), torch.randn(1, 3, 8, 8, dtype=torch.double), 1e-5
    slopes = [(D(x + h*d) - D(x - h*d)).item() / (2*h) for d in torch.eye(192, dtype=torch.double).view(192, 3, 8, 8)]
    assert r1_penalty(D, x).item() == pytest.approx(sum(s*s for s in slopes), rel=1e-4)


@pytest.mark.parametrize('batch,group', [(1, 4), (4, 4), (6, 4), (7, 4), (8, 2)])
def test_minibatch_std(batch, group):
    x = torch.randn(batch, 3, 4, 5)
    y = minibatch_std(x, group)
    assert y.shape == (batch, 4, 4, 5) and torch.equal(y[:, :3], x)
    assert (minibatch_std(x[:1].expand(batch, -1, -1, -1), group)[:, 3] < 1e-3).all()


def test_error_of_the_average():
    "What is reported is the root mean square, over styles' coordinates, of what other seeds differ by; other precisions of the network give the same average"
    g = tiny(z_dim=9)
    w = g.map(torch.randn(200_000, 9, generator=torch.Generator().manual_seed(9))).double()
    means = []
    for seed in range(20):
        means.append(g.estimate_latent_avg(500, seed=seed)[0].clone())
        want = (w.var(0).mean() / 500).sqrt().item()
        assert abs(g.latent_avg_error / want - 1) < .15
    off = (torch.stack(means).double() - w.mean(0)).square().mean().sqrt().item()
    assert abs(off / want - 1) < .25
    first = g.estimate_latent_avg(500, seed=3).clone()
    assert torch.equal(first, g.double().estimate_latent_avg(500, seed=3).float())
