"What is no lesson of chapter 9: going on from an inversion, by search and by pivotal tuning, against plain re-computations; labels on one axis, files, bad input."
import pytest, torch
from restyle_nb.editing import Direction, ForeignDirection, edit, home_of
from restyle_nb.encoders import build_encoder
from restyle_nb.generator import Generator
from restyle_nb.losses import LPIPS
from restyle_nb.metrics import quality_time
from restyle_nb.optimize import PTI, REFINE, code_spread, descend, downhill, neighbours, project, refine, tune
from restyle_nb.restyle import Inversion, ReStyle

PLAIN = dict(lpips=0., l2=1.)
FAST = dict(lpips=0., l2=1., stop=None, locality=0., lr=1e-2)

def seeded(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

@pytest.fixture
def net():
    torch.manual_seed(0)
    g = Generator(size=16, style_dim=8, n_mlp=2, channels={4: 8, 8: 8, 16: 8})
    for c in g.convs: c.noise_strength.data.fill_(.3)
    g.estimate_latent_avg(500)
    g.name = 'small16'
    return ReStyle(build_encoder('compact', n_styles=g.n_styles, style_dim=8, input_size=(16, 16), widths=(8, 16), in_channels=6), g)

@pytest.fixture
def x(net):
    with torch.no_grad(): return net.generator.synthesize(net.generator.map(seeded(4, 8, seed=3)), noise='random', rng=torch.Generator().manual_seed(5))

@pytest.fixture
def inv(net, x): return net.invert(x, 3, timed=True)

def state(m): return {k: v.clone() for k, v in m.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- the loop

def test_downhill_is_adam_by_hand():
    p, goal, lr = torch.tensor([1., -2., .5], dtype=torch.float64), torch.tensor([0., 1., 2.], dtype=torch.float64), .05
    q, m, v = p.clone(), 0., 0.
    rates, found = [], p.clone()
    def rate(t): rates.append(t); return lr*(1 + t)
    for i, left in downhill([found], lambda t: (found - goal).square()[None].sum(1), rate, 4):
        assert left.item() == pytest.approx((q - goal).square().sum().item())
        grad = 2*(q - goal)
        m, v = .9*m + .1*grad, .999*v + .001*grad**2
        q = q - lr*(1 + (i - 1)/4)*(m/(1 - .9**i))/((v/(1 - .999**i)).sqrt() + 1e-8)
        torch.testing.assert_close(found.detach(), q)
    assert i == 4 and rates == [0, .25, .5, .75]

def test_downhill_stops_before_it_steps():
    p, calls = torch.ones(1), []
    def loss(t):
        calls.append(t)
        return None if len(calls) > 2 else p.square()
    assert [i for i, _ in downhill([p], loss, lambda t: .1, 10)] == [1, 2]
    assert p.item() == pytest.approx(.8, abs=1e-2)


# ---------------------------------------------------------------- search

def test_refine_is_project_from_there(net, inv):
    old = Inversion(**vars(inv))
    out = refine(net, inv, steps=6, keep=[2, 4], **PLAIN)
    plain = project(net, inv.x, steps=6, keep=[2, 4], start=inv.codes[-1], **REFINE | dict(noise='fixed') | PLAIN)
    assert out.labels == [0, 1, 2, 3, 'search 2', 'search 4', 'search 6'] and out.titles[3:5] == ['step 3', 'search 2']
    assert torch.equal(out.codes[:4], inv.codes) and torch.equal(out.codes[4:], plain.codes[1:]) and torch.equal(out.images[4:], plain.images[1:])
    torch.testing.assert_close(out.errors, torch.stack([(y - inv.x).square().mean((1, 2, 3)) for y in out.images]))
    assert torch.equal(out.deltas, out.codes.diff(dim=0)) and out.stopped.tolist() == [6]*4
    assert torch.equal(out.seconds[:4], inv.seconds) and (out.seconds.diff() > 0).all()
    assert vars(inv).keys() == vars(old).keys() and all(a is b for a, b in zip(vars(inv).values(), vars(old).values()))

def test_constant_rate_makes_a_prefix(net, inv):
    long, short = (refine(net, inv, steps=n, keep=[4], **PLAIN) for n in (8, 4))
    assert torch.equal(long.codes[4], short.codes[-1])

def test_each_picture_as_if_alone(net, inv):
    torch.testing.assert_close(refine(net, inv[2], steps=6, keep=1, **PLAIN).codes[-1], refine(net, inv, steps=6, keep=1, **PLAIN).codes[-1, 2:3], atol=1e-5, rtol=0.)

def test_from_the_best(net, inv):
    inv.errors[1, :2] = 0.
    out = refine(net, inv, steps=1, best=True, lr=0., keep=1, **PLAIN)
    assert torch.equal(out.codes[-1, :2], inv.codes[1, :2]) and torch.equal(out.codes[-1], inv.best_codes) and torch.equal(out.deltas[-1], inv.best_codes - inv.codes[-1])

def test_searching_on_counts_on(net, inv):
    once = refine(net, inv, steps=4, keep=1, **PLAIN)
    out = refine(net, once, steps=3, keep=1, **PLAIN)
    assert out.labels[-2:] == ['search 4', 'search 7'] and out.n_steps == 5
    assert tune(net, out, steps=2, keep=1, **FAST)[1].labels[-2:] == ['search 7', 'tune 2']
    assert refine(net, project(net, inv.x, steps=2, keep=1, noise='fixed', **PLAIN), steps=2, keep=1, **PLAIN).labels == [0, 2, 'search 2']

def test_nothing_to_do(net, inv):
    out = refine(net, inv, steps=0, **PLAIN)
    assert torch.equal(out.codes, inv.codes) and out.labels == [0, 1, 2, 3]

def test_own_planes_are_searched_on(net, inv):
    out = refine(net, inv, steps=4, keep=1, noise='optimize', **PLAIN)
    assert out.noise is not None
    again = refine(net, out, steps=2, keep=1, **PLAIN)
    assert again.noise is not None and (again.noise[-1] - out.noise[-1]).abs().max() > 0
    with torch.no_grad(): torch.testing.assert_close(net.generator.synthesize(again.codes[-1], noise=again.noise), again.images[-1])
    assert refine(net, inv, steps=2, **PLAIN).noise is None

def test_without_clock_and_without_pictures(net, inv):
    inv.seconds, images, inv.images = None, inv.images, None
    out = refine(net, inv, steps=2, keep=1, **PLAIN)
    assert out.seconds is None and inv.images is None
    torch.testing.assert_close(out.images[:4], images)

def test_files_and_strips(net, inv, tmp_path):
    out = tune(net, refine(net, inv, steps=2, keep=1, **PLAIN), steps=2, keep=1, **FAST)[1]
    back = Inversion.load(out.save(tmp_path/'a'))
    assert back.labels == [0, 1, 2, 3, 'search 2', 'tune 2'] and torch.equal(back.codes, out.codes) and torch.equal(back.seconds, out.seconds)
    assert back.strip().size == out.strip().size and back[1:3].titles == out.titles
    lines = repr(out).splitlines()[1:]
    assert lines[0].split()[1:] == ['0', '1', '2', '3', 'search', '2', 'tune', '2'] and len({len(o) for o in lines if not o.startswith('delta ')}) == 1
    with pytest.raises(ValueError, match='equal steps'): Inversion.cat([out, inv])
    assert [r['step'] for r in quality_time({'all': out}, dict(l2=lambda y, x: (y - x).square().mean((1, 2, 3))))] == out.labels


# ---------------------------------------------------------------- tuning

def test_tuning_is_adam_on_a_copy(net, inv):
    "Two iterations against torch.optim.Adam on a second copy, LPIPS and L2"
    import copy
    g, out = tune(net, inv, steps=2, stop=None, locality=0., keep=2)
    h, judge = copy.deepcopy(net.generator).requires_grad_(True), LPIPS()
    adam = torch.optim.Adam(h.parameters(), lr=PTI['lr'])
    for t in (1, 2):
        adam.zero_grad()
        y = h.synthesize(inv.codes[-1])
        ((y - inv.x).square().mean((1, 2, 3)) + judge(y, inv.x)).sum().backward()
        adam.step()
        with torch.no_grad(): torch.testing.assert_close(out.images[3 + t], h.synthesize(inv.codes[-1]), atol=1e-5, rtol=1e-4)
    for (k, a), b in zip(g.state_dict().items(), h.state_dict().values()): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=k)

def test_original_is_untouched_bit_for_bit(net, inv):
    net.generator.train(); net.generator.convs[0].bias.requires_grad_(True)
    before, flags = state(net), [p.requires_grad for p in net.parameters()]
    g, out = tune(net, inv, steps=3, stop=None, reach=1.)
    assert same(state(net), before) and [p.requires_grad for p in net.parameters()] == flags and all(p.grad is None for p in net.parameters())
    assert all(m.training for m in net.generator.modules()) and net.generator.name == 'small16'
    after = g.state_dict()
    assert not torch.equal(after['convs.0.weight'], before['generator.convs.0.weight']) and g is not net.generator
    assert all(torch.equal(v, before[f'generator.{k}']) for k, v in after.items() if k.startswith(('mapping', 'latent_avg', 'noise_')))   # codes and planes mean what they meant
    assert g.name == 'small16, tuned' and not g.training and all(not p.requires_grad and p.grad is None for p in g.parameters())

def test_pivots_stand_still(net, inv):
    g, out = tune(net, inv, steps=20, keep=2, **FAST)
    assert out.labels[-2:] == ['tune 10', 'tune 20'] and out.deltas[-2:].count_nonzero() == 0 and torch.equal(out.codes[-1], inv.codes[-1])
    assert (out.errors[-1] < out.errors[3]).all() and (out.seconds.diff() > 0).all() and out.stopped.tolist() == [5]*4
    with torch.no_grad(): torch.testing.assert_close(g.synthesize(out.codes[-1]), out.images[-1])

def test_directions_know_that_it_is_another_generator(net, inv):
    d = Direction('wider', seeded(8, seed=2), home=home_of(net))
    g, out = tune(net, inv, steps=3, keep=1, **FAST)
    with pytest.raises(ForeignDirection, match='small16 .* small16, tuned'): edit(g, out, {d: 1.})
    found = edit(g, out, {d: 1.}, allow='small16')
    torch.testing.assert_close(found.w, out.codes[-1] + d.vector)
    with torch.no_grad(): torch.testing.assert_close(found.y, g.synthesize(out.codes[-1] + d.vector))
    edit(net, refine(net, inv, steps=1, **PLAIN), {d: 1.})              # searched codes are the generator's own

def test_own_planes_stay(net, inv):
    searched = refine(net, inv, steps=2, keep=1, noise='optimize', **PLAIN)
    g, out = tune(net, searched, steps=3, keep=1, **FAST)
    assert all(torch.equal(a, b) for a, b in zip(out.noise, searched.noise))
    with torch.no_grad(): torch.testing.assert_close(g.synthesize(out.codes[-1], noise=out.noise), out.images[-1])

def test_stops_when_near_enough(net, inv):
    far = LPIPS()(inv.images[-1], inv.x).max().item()
    _, at_once = tune(net, inv, steps=5, stop=far + 1e-4, locality=0.)
    assert at_once.labels == [0, 1, 2, 3] and torch.equal(at_once.images, inv.images)
    _, soon = tune(net, inv, steps=200, stop=.9*far, locality=0., lr=1e-2, keep=[100])
    n = int(soon.labels[-1].split()[1])
    assert 0 < n < 100 and soon.n_steps == 4 and LPIPS()(soon.images[-1], inv.x).max() <= .9*far
    _, less = tune(net, inv, steps=n - 1, stop=.9*far, locality=0., lr=1e-2, keep=1)
    assert LPIPS()(less.images[-1], inv.x).max() > .9*far          # no sooner than it was

def test_a_generator_for_each(net, inv):
    gs, out = tune(net, inv[:2], steps=4, keep=2, each=True, **FAST)
    for i, g in enumerate(gs):
        alone, one = tune(net, inv[i], steps=4, keep=2, **FAST)
        assert same(state(alone), state(g)) and torch.equal(out.images[4:, i:i+1], one.images[4:]) and g.name == 'small16, tuned'
    assert out.labels == [0, 1, 2, 3, 'tune 2', 'tune 4'] and len(out) == 2 and not same(state(gs[0]), state(gs[1]))

def test_who_stops_early_waits(net, inv):
    left = LPIPS()(inv.images[-1], inv.x)
    easy, hard = left.argmin().item(), left.argmax().item()
    stop = ((left.min() + left.max())/2).item()
    gs, out = tune(net, inv[[easy, hard]], steps=300, stop=stop, locality=0., lr=1e-2, keep=3, each=True)
    n = out.n_steps - 3
    assert n >= 1 and out.stopped.tolist() == [3, 3 + n]
    torch.testing.assert_close(out.images[-1, 0], inv.images[-1, easy])
    assert (out.images[-1, 1] - inv.images[-1, hard]).abs().max() > .01

def test_neighbours(net):
    g, w = net.generator, net.generator.broadcast(net.generator.map(seeded(3, 8, seed=9))).detach()
    v = neighbours(g, w, 2.5, torch.Generator().manual_seed(1))
    torch.testing.assert_close((v - w).flatten(1).norm(dim=1), torch.full((3,), 2.5))
    with torch.no_grad(): person = .5*(g.latent_avg + g.broadcast(g.map(seeded(3, 8, seed=1))))
    torch.testing.assert_close(torch.cosine_similarity((v - w).flatten(1), (person - w).flatten(1)), torch.ones(3))
    assert torch.equal(v, neighbours(g, w, 2.5, torch.Generator().manual_seed(1))) and not torch.equal(v, neighbours(g, w, 2.5, torch.Generator().manual_seed(2)))

def test_locality_holds_the_neighbourhood(net, inv):
    w, g = inv.codes[-1], net.generator
    reach = code_spread(g)*g.n_styles**.5
    def moved(**kw):
        h = tune(net, inv, steps=40, keep=1, **FAST | kw)[0]
        with torch.no_grad(): return torch.stack([(h.synthesize(v) - g.synthesize(v)).square().mean() for v in (neighbours(g, w, reach, torch.Generator().manual_seed(50 + i)) for i in range(8))]).mean()
    assert moved(locality=3.) < .7*moved()
    a, b = (tune(net, inv, steps=2, keep=1, seed=s, **FAST | dict(locality=1.))[0] for s in (0, 1))
    assert not same(state(a), state(b)) and same(state(a), state(tune(net, inv, steps=2, keep=1, **FAST | dict(locality=1.))[0]))

def test_inside_no_grad_and_inference_mode(net, inv):
    want = tune(net, inv, steps=2, keep=1, **FAST)[1].images[-1]
    with torch.no_grad(): assert torch.equal(tune(net, inv, steps=2, keep=1, **FAST)[1].images[-1], want)
    with torch.inference_mode(): assert torch.equal(tune(net, inv, steps=2, keep=1, **FAST)[1].images[-1], want)
    with torch.inference_mode(): refine(net, inv, steps=2, keep=1, **PLAIN)

def test_published_settings():
    import inspect
    given = {k: p.default for k, p in inspect.signature(tune).parameters.items()}
    assert {k: given[k] for k in PTI if k not in ('sources', 'reach')} == dict(steps=350, lr=3e-4, l2=1., lpips=1., stop=.06, locality=.1) and PTI['reach'] == 30
    assert all(PTI[k] == given[k] for k in PTI if k not in ('sources', 'reach'))


# ---------------------------------------------------------------- errors

def test_errors_in_words(net, inv, x):
    class Toy:
        n_styles, style_dim, latent_avg = 2, 3, torch.zeros(2, 3)
        def synthesize(self, w): return w.flatten(1).view(-1, 1, 6, 1).expand(-1, 1, 6, 4)
    toy = ReStyle(None, Toy())
    for f in (refine, tune):
        with pytest.raises(TypeError, match='expected an Inversion, found Tensor'): f(net, x)
        with pytest.raises(ValueError, match='no pictures'): f(net, inv[:0])
        with pytest.raises(ValueError, match='start code has shape'): f(net, Inversion(**vars(inv) | dict(codes=inv.codes[:, :, :2])))
        with pytest.raises(ValueError, match='expected .batch, channels, 16, 16'): f(net, Inversion(**vars(inv) | dict(x=inv.x[..., :8])))
    with pytest.raises(TypeError, match='Toy is no torch Module'): tune(toy, inv)
    with pytest.raises(ValueError, match='stop is a bound on LPIPS'): tune(net, inv, lpips=0.)
    with pytest.raises(ValueError, match='lower lr'): tune(net, inv, steps=20, **FAST | dict(lr=1e30))
    class NoMap(torch.nn.Module):
        n_styles, style_dim = 6, 8
        def __init__(self, g): super().__init__(); self.g, self.latent_avg = g, g.latent_avg
        def synthesize(self, w): return self.g.synthesize(w)
    own = ReStyle(net.encoder, NoMap(net.generator), net.geometry)
    with pytest.raises(ValueError, match='locality=0'): tune(own, inv, steps=1)
    g, out = tune(own, inv, steps=2, keep=1, **FAST)
    assert not hasattr(g, 'name') and (out.images[-1] - inv.images[-1]).abs().max() > 0

@pytest.mark.parametrize('label', ['search', 'search -1', 'Search 1', 'search 1 2', '', 'tune 1\n', 1.5, None])
def test_foreign_labels_in_files(inv, tmp_path, label):
    inv.labels = [0, 1, 2, label]
    with pytest.raises(ValueError, match='expected 4 whole numbers'): Inversion.load(inv.save(tmp_path/'a'))
