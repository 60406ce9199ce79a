"""Somebody else's generator: the four names of the protocol are enough, for a plain object, for a module, and for a network shaped like StyleGAN3."""
import math
import pytest, torch
from torch import nn
from restyle_nb.encoders import build_encoder
from restyle_nb.images import Geometry, film_strip
from restyle_nb.losses import Objective, l2
from restyle_nb.metrics import per_step, quality_time
from restyle_nb.restyle import Inversion, ReStyle, bootstrap, naive_feedback, pick_device
from restyle_nb.training import Trainer

N, D, SIZE = 5, 7, (24, 32)

class Plain:
    "Four names and nothing else, no tensor registered anywhere"
    n_styles, style_dim = N, D
    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.a, self.latent_avg = torch.randn(N*D, 3*6*8, generator=g)/6, torch.randn(N, D, generator=g)/10
    def synthesize(self, w): return nn.functional.interpolate((w.flatten(1)@self.a).view(-1, 3, 6, 8), SIZE, mode='bilinear').tanh()

class Module(nn.Module):
    "The same as a module, whose weights could be trained and are counted by its batch norm if it is left in training mode"
    n_styles, style_dim, image_channels = N, D, 3
    def __init__(self, seed=0):
        super().__init__()
        p = Plain(seed)
        self.a, self.norm = nn.Parameter(p.a), nn.BatchNorm2d(3)
        self.register_buffer('latent_avg', p.latent_avg)
    def synthesize(self, w): return nn.functional.interpolate(self.norm((w.flatten(1)@self.a).view(-1, 3, 6, 8)), SIZE, mode='bilinear').tanh()

class StyleGAN3Like(nn.Module):
    "The attributes of NVIDIA's generator classes, around a toy"
    z_dim, c_dim, w_dim, num_ws, img_resolution, img_channels = D, 0, D, N, 32, 3
    def __init__(self):
        super().__init__()
        self.mapping, self.synthesis = nn.Module(), Synthesis()
        self.mapping.register_buffer('w_avg', torch.full((D,), .1))

class Synthesis(nn.Module):
    def __init__(self): super().__init__(); self.layer = nn.Linear(N*D, 3*32*32)
    def forward(self, ws, **kw):
        assert ws.shape[1:] == (N, D) and not kw
        return self.layer(ws.flatten(1)).view(-1, 3, 32, 32).tanh()

class Plug(nn.Module):
    "As chapter 3 has it"
    def __init__(self, G):
        super().__init__()
        self.G, self.n_styles, self.style_dim, self.image_channels = G, G.num_ws, G.w_dim, G.img_channels
        self.register_buffer('latent_avg', G.mapping.w_avg.expand(G.num_ws, -1).clone())
    def synthesize(self, w): return self.G.synthesis(w)

def stylegan3():
    torch.manual_seed(3)
    return Plug(StyleGAN3Like())

KINDS = dict(plain=Plain, module=Module, stylegan3=stylegan3)

@pytest.fixture(params=list(KINDS))
def generator(request): return KINDS[request.param]()

def model(g, seed=1, **kw):
    size = (32, 32) if isinstance(g, Plug) else SIZE
    torch.manual_seed(seed)
    return ReStyle(build_encoder('compact', n_styles=N, style_dim=D, input_size=size, widths=(8, 8, 8), **kw), g)

@pytest.fixture
def x(): return torch.rand(4, 3, 50, 60, generator=torch.Generator().manual_seed(2))*2 - 1

def test_invert(generator, x, tmp_path):
    net = model(generator)
    size = net.geometry.output
    assert net.geometry == Geometry(size, size) and net.device.type == 'cpu' and net.refines
    inv = net.invert(x, 3)
    assert inv.codes.shape == (4, 4, N, D) and inv.images.shape == (4, 4, 3, *size) and not inv.codes.requires_grad
    assert torch.equal(inv.codes[0, 2], generator.latent_avg)
    with torch.no_grad():
        net.eval()
        w = inv.codes[1] + net.encoder(torch.cat([inv.x, inv.images[1]], 1))
        torch.testing.assert_close(inv.codes[2], w, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(inv.images[2], generator.synthesize(w), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net.invert(x, 3, batch_size=3).codes, inv.codes, atol=1e-5, rtol=1e-4)
    small = Inversion.load(inv.save(tmp_path/'a', images=False)).redraw(generator)
    torch.testing.assert_close(small.images, inv.images, atol=1e-5, rtol=1e-4)
    assert inv.strip().width > 100
    early = net.invert(x, 6, tol=.5, timed=True)
    assert (early.stopped <= 6).all() and early.seconds.shape == (7,)

def test_other_starts(generator, x):
    net = model(generator)
    inv = net.invert(x, 2)
    torch.testing.assert_close(net.invert(x, 1, start=inv.codes[1]).codes[1], inv.codes[2], atol=1e-5, rtol=1e-4)
    own = ReStyle(net.encoder, generator, latent_avg=torch.ones(D))
    assert (own.invert(x, 1).codes[0] == 1).all()
    assert naive_feedback(net, x, 2).codes.shape == (3, 4, N, D)

def test_single_pass_encoders_are_recognised(generator, x):
    net = model(generator, in_channels=3)
    assert not net.refines and net.invert(x, 1).codes.shape == (2, 4, N, D)
    with pytest.raises(ValueError, match='single step'): net.invert(x, 2)

def test_train(generator, x, tmp_path):
    net = model(generator)
    before = {k: v.clone() for k, v in generator.state_dict().items()} if isinstance(generator, nn.Module) else {'a': generator.a.clone()}
    with torch.no_grad(): targets = generator.synthesize(generator.latent_avg + torch.randn(4, N, D, generator=torch.Generator().manual_seed(8)))
    t = Trainer(net, targets, Objective(lpips=0), folder=tmp_path, n_steps=2, batch_size=4, lr=3e-3, log_every=5, val=targets, val_every=10, save_every=10)
    h = t.fit(30, progress=False)
    losses = [r['l2'][-1] for r in h.of('train')]
    assert all(map(math.isfinite, losses)) and losses[-1] < .9*losses[0]
    after = generator.state_dict() if isinstance(generator, nn.Module) else {'a': generator.a}
    assert all(torch.equal(after[k], v) for k, v in before.items())               # weights, average and running statistics
    fresh = model(KINDS[next(k for k, f in KINDS.items() if type(f()) is type(generator))](), seed=9)
    again = Trainer.resume(tmp_path, fresh, targets, Objective(lpips=0), val=targets)
    assert again.iteration == 30
    torch.testing.assert_close(again.net.invert(x, 2).codes, net.invert(x, 2).codes)

def test_metrics(generator, x):
    net = model(generator)
    t = per_step(net, x, 2, dict(l2=l2), batch_size=3)
    torch.testing.assert_close(t.scores['l2'], net.invert(x, 2).errors, atol=1e-5, rtol=1e-4)
    q = quality_time(dict(a=net), dict(l2=l2), x=x, n_steps=2, repeats=1)
    assert [r['step'] for r in q] == [0, 1, 2]
    torch.testing.assert_close(q.scores['a']['l2'], t.scores['l2'], atol=1e-5, rtol=1e-4)

def test_bootstrap(generator, x):
    net, other = model(generator), model(generator, seed=5)
    inv = bootstrap(net, other, x, 2)
    torch.testing.assert_close(inv.codes[0], net.invert(x, 1).codes[1])
    torch.testing.assert_close(inv.codes[1:], other.invert(x, 2, start=net.invert(x, 1)).codes[1:])

def test_a_plain_one_beside_a_module(x):
    inv = bootstrap(model(Plain()), model(Module()), x, 1)
    assert inv.codes.shape == (2, 4, N, D) and isinstance(film_strip(inv.images), object)

def test_a_module_is_frozen_and_moves(x):
    g = Module().train(); net = model(g)
    assert not g.training and not any(p.requires_grad for p in g.parameters())
    net.double()
    assert net.invert(x, 2).codes.dtype == torch.float64 and net.to(pick_device('cpu')).invert(x, 1).codes.device.type == 'cpu'

def test_the_average_follows_the_module(x):
    g = Module(); net = model(g)
    a = net.start()[1].clone()
    with torch.no_grad(): g.a.mul_(2)
    assert not torch.equal(net.start()[1], a)

def test_a_plain_generator_that_changes_is_painted_anew():
    g = Plain(); net = model(g)
    a = net.start()[1].clone()
    g.latent_avg = g.latent_avg + 1
    assert not torch.equal(net.start()[1], a)

@pytest.mark.parametrize('lacks', ['n_styles', 'style_dim', 'latent_avg', 'synthesize'])
def test_what_is_missing_is_named(lacks):
    names = dict(n_styles=N, style_dim=D, latent_avg=torch.zeros(N, D), synthesize=lambda self, w: w)
    del names[lacks]
    g = type('Half', (), names)()
    with pytest.raises(TypeError, match=f'no {lacks}'): ReStyle(lambda x, y: x, g)

def test_an_average_may_be_one_style(x):
    g = Plain(); g.latent_avg = g.latent_avg[0]
    assert torch.equal(model(g).invert(x, 1).codes[0, 0], g.latent_avg.expand(N, D))

def test_a_given_average_replaces_a_missing_one(x):
    g = Plain(); avg = g.latent_avg; del g.latent_avg
    e = build_encoder('compact', n_styles=N, style_dim=D, input_size=SIZE, widths=(8, 8, 8))
    assert torch.equal(ReStyle(e, g, latent_avg=avg).invert(x, 1).codes[0, 0], avg)

def test_an_average_of_another_shape_is_refused():
    g = Plain(); g.latent_avg = torch.zeros(N + 1, D)
    with pytest.raises(ValueError, match='latent_avg has shape'): ReStyle(lambda x, y: x, g)
