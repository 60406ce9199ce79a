"What is no lesson of chapter 9: the search against a plain re-computation, independence of pictures, crops, strange generators, bad input."
import math
import numpy as np
import pytest, torch
from restyle_nb.encoders import build_encoder
from restyle_nb.generator import Generator
from restyle_nb.images import Geometry
from restyle_nb.optimize import IN_DOMAIN, code_spread, descend, encode, frozen, hybrid, in_domain, noise_correlation, project, ramp, shake, standardize_
from restyle_nb.restyle import Inversion, ReStyle


def seeded(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def generator(size=16, **kw):
    torch.manual_seed(0)
    g = Generator(size=size, style_dim=8, n_mlp=2, channels={4: 8, 8: 8, 16: 8, 32: 8}, **kw)
    for c in g.convs: c.noise_strength.data.fill_(.3)
    g.estimate_latent_avg(500)
    return g

@pytest.fixture
def g(): return generator()

@pytest.fixture
def x(g):
    with torch.no_grad(): return g.synthesize(g.map(seeded(4, 8, seed=3)), noise='random', rng=torch.Generator().manual_seed(5))

def net_of(g, single=False):
    torch.manual_seed(1)
    size = g.shapes[-1]
    return ReStyle(build_encoder('compact', n_styles=g.n_styles, style_dim=8, input_size=size, widths=(8, 16), in_channels=g.image_channels*(1 if single else 2)), g)

PLAIN = dict(lpips=0., l2=1.)

class Toy:
    "The least that is a generator: two styles of three numbers, each number one pixel of a row of its own."
    n_styles, style_dim = 2, 3
    def __init__(self): self.latent_avg = torch.full((2, 3), .1)
    def synthesize(self, w): return w.flatten(1).view(-1, 1, 6, 1).expand(-1, 1, 6, 4)


# ---------------------------------------------------------------- the pieces

@pytest.mark.parametrize('h, w', [(4, 4), (8, 8), (16, 16), (32, 32), (12, 16), (24, 32)])
def test_noise_correlation_is_its_equation(h, w):
    plane = seeded(2, 1, h, w)
    for b, found in enumerate(noise_correlation(plane.double())):
        n, total = plane[b, 0].double().numpy(), 0.
        while True:
            rows, cols = n.shape
            right = sum(n[i, j]*n[i, j - 1] for i in range(rows) for j in range(cols))/n.size
            down = sum(n[i, j]*n[i - 1, j] for i in range(rows) for j in range(cols))/n.size
            total += right**2 + down**2
            if min(rows, cols) <= 8: break
            n = np.array([[n[2*i:2*i+2, 2*j:2*j+2].mean() for j in range(cols//2)] for i in range(rows//2)])
        assert found.item() == pytest.approx(total, rel=1e-12)
        assert noise_correlation(plane)[b].item() == pytest.approx(total, rel=1e-4)

def test_noise_correlation_gradient():
    assert torch.autograd.gradcheck(noise_correlation, seeded(2, 1, 10, 12).double().requires_grad_(True))

def test_standardize():
    planes = [seeded(3, 1, 4, 4)*5 + 2, seeded(3, 1, 6, 8, seed=1) - 1]
    want = [(o.double() - o.double().mean((1, 2, 3), keepdim=True)) for o in planes]
    want = [o/o.square().mean((1, 2, 3), keepdim=True).sqrt() for o in want]
    standardize_(planes)
    for o, t in zip(planes, want): torch.testing.assert_close(o.double(), t, atol=1e-6, rtol=1e-5)
    flat = [torch.ones(1, 1, 4, 4)]
    standardize_(flat)
    assert flat[0].isfinite().all()

@pytest.mark.parametrize('t, factor', [(0, 0), (.0125, .25), (.05, 1), (.4, 1), (.75, 1), (.8, .5 - .5*math.cos(.8*math.pi)), (.875, .5), (.999, .5 - .5*math.cos(.004*math.pi))])
def test_ramp(t, factor): assert ramp(t) == pytest.approx(factor, abs=1e-12)

@pytest.mark.parametrize('t, strength', [(0, .05), (.375, .0125), (.75, 0), (.9, 0)])
def test_shake(t, strength): assert shake(t) == pytest.approx(strength, abs=1e-12)

def test_spread(g):
    z = torch.randn(10_000, 8, generator=torch.Generator().manual_seed(123))
    w = g.map(z).detach().double().numpy()
    assert code_spread(g) == pytest.approx(math.sqrt(((w - w.mean(0))**2).sum()/10_000), rel=1e-5)
    assert code_spread(Toy()) == 0


# ---------------------------------------------------------------- the search

def by_hand(g, x, steps, space, seed=4, lr=.1, weight=1e5):
    "One picture in float64, with Adam written out."
    w = g.latent_avg.clone()[:1 if space == 'w' else None][None]
    params = [w] + [o.clone() for o in g.noises('fixed')]
    m, v = [torch.zeros_like(o) for o in params], [torch.zeros_like(o) for o in params]
    rng, std = torch.Generator().manual_seed(seed), code_spread(g)
    for i in range(steps):
        t = i/steps
        rate = lr*(.5 - .5*math.cos(math.pi*min(1, (1 - t)/.25)))*min(1, t/.05)
        noise = std*.05*max(0, 1 - t/.75)**2*torch.randn(1, *w.shape[1:], generator=rng).double()
        live = [o.detach().requires_grad_(True) for o in params]
        y = g.synthesize((live[0] + noise).expand(1, g.n_styles, -1), noise=live[1:])
        loss = (y - x).square().mean() + weight*sum(noise_correlation(o)[0] for o in live[1:])
        for k, grad in enumerate(torch.autograd.grad(loss, live)):
            m[k], v[k] = .9*m[k] + .1*grad, .999*v[k] + .001*grad**2
            step = rate*(m[k]/(1 - .9**(i + 1)))/((v[k]/(1 - .999**(i + 1))).sqrt() + 1e-8)
            o = live[k].detach() - step
            params[k] = o if k == 0 else (o - o.mean())/(o - o.mean()).square().mean().sqrt()
    return params

@pytest.mark.parametrize('space', ['w', 'w+'])
def test_equals_a_plain_recomputation(g, x, space):
    g, x = g.double(), x.double()
    found = project(g, x[:2], space=space, steps=12, seed=4, keep=1, **PLAIN)
    for b in range(2):
        w, *planes = by_hand(g, x[b:b+1], 12, space)
        moved = (w - g.latent_avg[None]).abs().max()
        assert (found.codes[-1][b] - w[0]).abs().max() < 1e-4*moved
        for o, n in zip(found.noise, planes): torch.testing.assert_close(o[b], n[0], atol=1e-4, rtol=0.)

@pytest.mark.parametrize('kw', [dict(), dict(space='w'), dict(noise='fixed'), dict(noise='fixed', space='w', l2=1., lpips=.8)])
def test_loss_falls(g, x, kw):
    inv = project(g, x, steps=40, keep=2, **dict(PLAIN, **kw))
    assert (inv.errors[-1] < .8*inv.errors[0]).all()

def test_lpips_falls(g, x):
    from restyle_nb.metrics import score
    inv = project(g, x, steps=30, keep=1)
    s = score(inv.images, inv.x, inv.geometry)['lpips']
    assert (s[-1] < .8*s[0]).all()

@pytest.mark.parametrize('kw', [dict(), dict(space='w'), dict(noise='fixed')])
def test_a_picture_is_alone_in_its_batch(g, x, kw):
    g, x = g.double(), x.double()
    run = lambda x: project(g, x, steps=15, keep=3, **dict(PLAIN, **kw))
    whole, alone, turned = run(x), run(x[2:3]), run(x.flip(0))
    assert (whole.codes[-1] - whole.codes[0]).abs().max() > .01
    for other, rows in ((alone, slice(2, 3)), (turned, [3, 2, 1, 0])):
        torch.testing.assert_close(other.codes, whole.codes[:, rows], atol=1e-5, rtol=0.)
        for a, b in zip(other.noise or [], whole.noise or []): torch.testing.assert_close(a, b[rows], atol=1e-4, rtol=0.)

def test_seeded(g, x):
    run = lambda **kw: project(g, x[:1], steps=5, keep=1, **PLAIN, **kw).codes
    torch.manual_seed(1); a = run()
    torch.manual_seed(2); b = run()
    assert torch.equal(a, b) and not torch.equal(a, run(seed=1))
    assert torch.equal(run(initial_noise=0.), run(initial_noise=0., seed=1))

def test_spaces(g, x):
    w, wp = (project(g, x, space=s, steps=10, noise='fixed', **PLAIN).codes[-1] for s in ('w', 'w+'))
    assert w.shape == wp.shape == (4, g.n_styles, 8)
    assert torch.equal(w, w[:, :1].expand_as(w)) and not torch.equal(wp, wp[:, :1].expand_as(wp))

def test_without_map_nothing_shakes():
    toy, x = Toy(), torch.linspace(-1, 1, 6).view(1, 1, 6, 1).expand(1, 1, 6, 4)
    run = lambda **kw: project(toy, x, steps=50, noise='fixed', keep=1, **PLAIN, **kw)
    a = run()
    assert a.errors[-1].item() < .05*a.errors[0].item()
    assert torch.equal(a.codes, run(seed=7).codes)              # no `map`: nothing is drawn on the code …
    assert not torch.equal(a.codes, run(w_std=1.).codes)        # … unless the spread is given


# ---------------------------------------------------------------- what comes back

def test_snapshots(g, x):
    inv = project(g, x, steps=12, keep=[3, 7], **PLAIN)
    assert inv.labels == [0, 3, 7, 12] and inv.n_steps == 3
    assert inv.seconds.dtype == torch.float64 and len(inv.seconds) == 4 and (inv.seconds.diff() > 0).all() and inv.seconds[0] > 0
    assert torch.equal(inv.stopped, torch.full((4,), 3)) and inv.images.shape == (4, 4, 3, 16, 16)
    torch.testing.assert_close(inv.deltas, inv.codes[1:] - inv.codes[:-1])
    torch.testing.assert_close(inv.errors, (inv.images - x).square().mean((2, 3, 4)))
    assert torch.equal(inv.codes[0], g.latent_avg.expand(4, -1, -1)) and not inv.codes.requires_grad and not inv.images.requires_grad
    assert project(g, x, steps=12, keep=3, **PLAIN).labels == [0, 4, 8, 12]
    assert project(g, x, steps=2, keep=10, **PLAIN).labels == [0, 1, 2]

def test_snapshots_change_nothing(g, x):
    a, b = (project(g, x, steps=8, keep=k, **PLAIN) for k in (1, 8))
    assert torch.equal(a.codes[-1], b.codes[-1]) and torch.equal(a.images[-1], b.images[-1])

def test_clock_stands_still_during_snapshots():
    import time
    class Slow(Toy):
        pause = 0.
        def synthesize(self, w):
            if not torch.is_grad_enabled(): time.sleep(self.pause)
            return super().synthesize(w)
    toy, x = Slow(), torch.zeros(1, 1, 6, 4)
    project(toy, x, steps=1, noise='fixed', **PLAIN)
    Slow.pause = .05
    inv = project(toy, x, steps=8, keep=8, noise='fixed', **PLAIN)
    assert .05 < inv.seconds[-1] < .25                          # one picture of its own, not nine

def test_redraw(g, x):
    fixed = project(g, x, steps=5, noise='fixed', **PLAIN)
    images, fixed.images = fixed.images, None
    assert fixed.noise is None and torch.equal(fixed.redraw(g).images, images)
    free = project(g, x, steps=5, **PLAIN)
    images = free.images
    assert [tuple(o.shape) for o in free.noise] == [(4, 1, *g.shapes[(i + 1)//2]) for i in range(len(g.convs))]
    torch.testing.assert_close(free.redraw(g).images[-1], images[-1], atol=1e-6, rtol=0.)
    plain = g.synthesize(free.codes[-1])
    assert (plain - images[-1]).abs().max() > 1e-3              # the planes matter
    for o in free.noise:
        assert o.mean((1, 2, 3)).abs().max() < 1e-5 and (o.square().mean((1, 2, 3)) - 1).abs().max() < 1e-4

def test_file_round_trip(g, x, tmp_path):
    inv = project(g, x, steps=4, keep=2, **PLAIN)
    back = Inversion.load(inv.save(tmp_path/'inv'))
    assert back.labels == inv.labels and torch.equal(back.codes, inv.codes) and torch.equal(back.seconds, inv.seconds)
    assert all(torch.equal(a, b) for a, b in zip(back.noise, inv.noise))
    assert all(torch.equal(a[:1], b) for a, b in zip(inv.noise, inv[:1].noise))

def test_generator_is_left_as_it_was(g, x):
    g.train()
    g.convs[0].weight.requires_grad_(False)
    before, flags = {k: v.clone() for k, v in g.state_dict().items()}, [p.requires_grad for p in g.parameters()]
    project(g, x, steps=5, keep=2)
    assert all(torch.equal(v, before[k]) for k, v in g.state_dict().items())
    assert [p.requires_grad for p in g.parameters()] == flags and any(flags) and all(p.grad is None for p in g.parameters())
    assert g.training and all(m.training for m in g.modules())
    with pytest.raises(ZeroDivisionError), frozen(g): 1/0
    assert [p.requires_grad for p in g.parameters()] == flags and g.training

def test_inside_no_grad_and_inference_mode(g, x):
    want = project(g, x, steps=3, **PLAIN)
    with torch.no_grad(): a = project(g, x, steps=3, **PLAIN)
    with torch.inference_mode(): b = project(g, x.clone(), steps=3, **PLAIN)
    assert torch.equal(a.codes, want.codes) and torch.equal(b.codes, want.codes)


# ---------------------------------------------------------------- sizes and crops

def test_only_the_content_box_counts():
    toy = Toy()
    inv = project(toy, torch.ones(1, 1, 2, 2), steps=30, noise='fixed', geometry=Geometry((2, 2), (6, 4), (1, 0, 3, 4)), **PLAIN)
    moved = (inv.codes[-1] - inv.codes[0])[0].flatten().abs() > 1e-6
    assert moved.tolist() == [False, True, True, False, False, False]
    assert inv.images.shape[-2:] == (6, 4) and inv.errors[-1] < inv.errors[0]

def test_not_square_and_other_channels():
    g = generator(32, const_size=(3, 4), image_channels=1)
    x = torch.zeros(2, 1, 12, 16)
    inv = project(g, x, steps=5, keep=1, geometry=Geometry((12, 16), g.shapes[-1]))
    assert inv.images.shape[1:] == (2, 1, *g.shapes[-1]) and inv.x.shape == x.shape and inv.images.isfinite().all()

def test_four_channels():
    g = generator(image_channels=4)
    assert project(g, torch.zeros(1, 4, 16, 16), steps=2).images.shape[2] == 4


# ---------------------------------------------------------------- starts

def test_starts(g, x):
    kw = dict(steps=3, noise='fixed', keep=1, **PLAIN)
    w = g.map(seeded(4, 8, seed=9)).detach()
    for start in (w, g.broadcast(w)):
        inv = project(g, x, start=start, **kw)
        assert torch.equal(inv.codes[0], g.broadcast(w)) and torch.equal(inv.images[0], g.synthesize(w).detach())
    assert torch.equal(project(g, x, start=w[:1, None].expand(-1, g.n_styles, -1), **kw).codes[0], g.broadcast(w[:1]).expand(4, -1, -1))
    mixed = g.broadcast(w) + seeded(1, g.n_styles, 1)
    torch.testing.assert_close(project(g, x, space='w', start=mixed, **kw).codes[0], mixed.mean(1, keepdim=True).expand_as(mixed))
    kept = w.clone()
    project(g, x, start=w, **kw)
    assert torch.equal(w, kept)

def test_goes_on_where_another_stopped(g, x):
    a = project(g, x, steps=5, keep=1, **PLAIN)
    b = project(g, x, steps=0, start=a, **PLAIN)
    assert torch.equal(b.codes[0], a.codes[-1]) and torch.equal(b.images[0], a.images[-1]) and b.seconds[0] > a.seconds[-1]
    c = project(g, x, steps=3, start=g.latent_avg[None], noise=[o.clone() for o in a.noise], **PLAIN)
    torch.testing.assert_close(c.images[0], g.synthesize(c.codes[0], noise=a.noise).detach())

@pytest.mark.parametrize('single', [False, True])
def test_hybrid(g, x, single):
    net = net_of(g, single)
    n = 1 if single else 3
    inv = net.invert(x, n)
    kw = dict(n_steps=n, noise='fixed', **PLAIN)
    none = hybrid(net, x, steps=0, **kw)
    assert torch.equal(none.codes[-1], inv.codes[-1]) and torch.equal(none.images[-1], inv.images[-1]) and none.labels == [0] and none.n_steps == 0
    some = hybrid(net, x, steps=30, initial_noise=0., keep=1, **kw)
    assert torch.equal(some.codes[0], inv.codes[-1]) and (some.errors[1] < some.errors[0]).all()
    assert 0 < some.seconds[0] < some.seconds[1]
    assert all(p.grad is None for p in net.parameters())

def test_hybrid_steps_by_kind(g, x):
    assert torch.equal(hybrid(net_of(g), x, steps=0, **PLAIN).codes[0], net_of(g).invert(x, 5).codes[-1])
    assert torch.equal(hybrid(net_of(g, True), x, steps=0, **PLAIN).codes[0], net_of(g, True).invert(x, 1).codes[-1])


# ---------------------------------------------------------------- in-domain

@pytest.mark.parametrize('single', [False, True])
def test_encode_is_one_step(g, x, single):
    net = net_of(g, single).eval()
    torch.testing.assert_close(encode(net, x).detach(), net.invert(x, 1).codes[-1], atol=1e-5, rtol=1e-4)
    net.double()
    assert torch.autograd.gradcheck(lambda o: encode(net, o), x[:1].double()[..., :16, :16].requires_grad_(True), eps=1e-6, atol=1e-5, fast_mode=True)

def test_in_domain_keeps_near_the_encoder(g, x):
    net = net_of(g, True)
    for p in net.encoder.parameters(): p.requires_grad_(True)
    net.encoder.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    far = lambda inv: (inv.codes[-1] - encode(net.eval(), inv.images[-1])).square().mean().item()
    free, held = (in_domain(net, x, steps=40, domain_weight=k, keep=1, **PLAIN) for k in (0., 50.))
    assert net.encoder.training and all(p.requires_grad and p.grad is None for p in net.encoder.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(free.codes[0], held.codes[0]) and far(held) < .8*far(free)

def test_in_domain_term_and_its_gradient(g, x):
    "The first step of Adam goes by the sign of the gradient; the sign is that of the whole sum, encoder and generator included."
    net = net_of(g, True).eval().double()
    x = x.double()
    inv = in_domain(net, x, steps=1, lr=1e-3, keep=1, l2=0., lpips=0.)
    w, eps, seen = inv.codes[0], 1e-5, 0
    def value(w):
        with torch.no_grad(): return 2*(w - encode(net, g.synthesize(w))).square().mean((1, 2))
    for i in range(g.n_styles):
        for k in range(8):
            d = torch.zeros_like(w); d[:, i, k] = eps
            slope = (value(w + d) - value(w - d))/(2*eps)
            for b in (slope.abs() > 1e-5).nonzero().flatten().tolist():
                assert (inv.codes[1] - w)[b, i, k].item() == pytest.approx(-1e-3*math.copysign(1, slope[b]), rel=1e-2)
                seen += 1
    assert seen > 100

def test_in_domain_settings(g, x):
    s = IN_DOMAIN['search']
    assert (s['steps'], s['lr'], s['ramp_up'], s['ramp_down'], s['initial_noise'], s['noise'], IN_DOMAIN['domain_weight']) == (100, .01, 0, 0, 0, 'fixed', 2)
    inv = in_domain(net_of(g, True), x, steps=2, keep=2, lpips=0.)
    step = (inv.codes[1] - inv.codes[0]).abs()
    assert step.max().item() == pytest.approx(.01, rel=1e-3) and inv.noise is None  # full rate at once


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize('kw, words', [
    (dict(space='z'), "'w' or 'w\\+'"), (dict(noise='random'), "'fixed', 'optimize'"), (dict(lpips=0.), 'nothing to minimise'),
    (dict(keep=[5, 99]), 'from 1 to'), (dict(steps=-1), 'at least 0'), (dict(start=torch.zeros(3, 6, 8)), 'start code has shape'),
    (dict(start=torch.zeros(4, 7)), 'start code has shape'), (dict(noise=[None]*5), 'None in place of a plane'), (dict(noise=[torch.zeros(1, 1, 4, 4)]), 'expected 5'),
])
def test_errors_in_words(g, x, kw, words):
    with pytest.raises(ValueError, match=words): project(g, x, **dict(dict(steps=3), **kw))

def test_more_errors(g, x):
    with pytest.raises(ValueError, match='3 image channels'): project(g, x[:, :1], steps=1)
    with pytest.raises(ValueError, match='NaN'): project(g, x*math.nan, steps=1)
    with pytest.raises(ValueError, match="noise='fixed'"): project(Toy(), torch.zeros(1, 1, 6, 4), steps=1)
    with pytest.raises(ValueError, match='start=…'): hybrid(net_of(g), x, start=g.latent_avg[None])
    class Cut(Toy):
        def synthesize(self, w): return super().synthesize(w).detach()
    with pytest.raises(ValueError, match='without a gradient'): project(Cut(), torch.zeros(1, 1, 6, 4), steps=1, noise='fixed')
    g.latent_avg.zero_()
    with pytest.raises(ValueError, match='average'): project(g, x, steps=1)

def test_a_search_that_explodes_says_so(g, x):
    with pytest.raises(ValueError, match='lower lr'): project(g, x, steps=20, lr=1e30, keep=2, **PLAIN)
    bad = lambda w, view: torch.tensor([0., 0., math.nan, 0.]) + 0*w.sum()
    with pytest.raises(ValueError, match='picture 2'): project(g, x, steps=4, keep=2, penalty=bad, **PLAIN)
    g.to_images[0].bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match='NaN'): project(g, x, steps=1, **PLAIN)
