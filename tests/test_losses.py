"""Every loss against a second, plain computation in float64; gradients, critics, and no gradient where none belongs."""
import itertools, json, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from restyle_nb.features import FaceNet, LatentDiscriminator, MoCoNet
from restyle_nb.generator import Discriminator, Generator, d_loss, g_loss, r1_penalty
from restyle_nb.images import Geometry
from restyle_nb.losses import CodePool, ImageCritic, LPIPS, LatentCritic, MoCo, Identity, Objective, _package_lpips, delta_norm, l2, w_norm
from restyle_nb.restyle import Step

sys.path.insert(0, str(Path(__file__).parent/'golden'))
from fill import tensor

GOLDEN = Path(__file__).parent/'golden'

@pytest.fixture(scope='module')
def lp(): return LPIPS()

@pytest.mark.parametrize('size', [64, 256])
def test_golden_lpips(lp, size):
    case, expected = json.loads((GOLDEN/'lpips_alex.json').read_text()), np.load(GOLDEN/'lpips_alex.npz')
    a, b = (torch.tanh(torch.as_tensor(tensor(k, case['inputs'][k], 'unit'))) for k in (f'in.a{size}', f'in.b{size}'))
    m = (a + .3*b).clamp(-1, 1)
    for name, y in (('ab', b), ('am', m)):
        want = expected[f'{name}_{size}'].ravel()
        error = np.abs(lp(a, y).numpy() - want).max()/want.std()
        print(f'{name}_{size}: {error:.1e} of the spread')
        assert error <= 1e-4

@pytest.mark.parametrize('shape', [(2,3,31,31), (1,3,64,48), (3,3,96,96), (1,3,192,256)])
def test_equals_the_package_with_its_gradient(lp, shape):
    package, rng = _package_lpips(), torch.Generator().manual_seed(0)
    x, y = (torch.rand(shape, generator=rng)*2 - 1 for _ in range(2))
    ya, yb = y.clone().requires_grad_(), y.clone().requires_grad_()
    a, b = lp(ya, lp.features(x)), package(yb, x).flatten()
    torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7)
    a.sum().backward()
    b.sum().backward()
    assert (ya.grad - yb.grad).norm() <= 1e-4*yb.grad.norm()

def test_flat_pictures_have_finite_gradients(lp):
    for v in (-1., 0., 1.):
        y = torch.full((1,3,64,64), v, requires_grad=True)
        lp(y, torch.full((1,3,64,64), -v)).sum().backward()
        assert y.grad.isfinite().all()

@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('size', [(8,8), (9,40), (32,32)])
def test_small_and_other_pictures(lp, channels, size):
    x = torch.rand(2, channels, *size)*2 - 1
    assert lp(x, -x).shape == (2,) and (lp(x, x) == 0).all() and (lp(x, -x) > 0).all()

def test_objective_builds_only_what_it_weighs():
    code = ("import sys; from restyle_nb.losses import Objective; Objective(lpips=0); assert 'lpips' not in sys.modules; "
            "import socket; socket.socket.connect = None; Objective(); assert 'lpips' in sys.modules")
    p = subprocess.run([sys.executable, '-W', 'error::UserWarning', '-c', code], capture_output=True, text=True)
    assert (p.returncode, p.stdout, p.stderr) == (0, '', ''), p.stderr

def test_building_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    LPIPS()
    assert torch.equal(state, torch.get_rng_state())

def test_missing_or_wrong_weights_are_named(tmp_path):
    from safetensors.torch import save_file
    with pytest.raises(FileNotFoundError, match='nowhere.safetensors'): LPIPS(weights=tmp_path/'nowhere.safetensors')
    save_file({'0.weight': torch.zeros(1)}, tmp_path/'wrong.safetensors')
    with pytest.raises(ValueError, match=r'wrong.safetensors: tensor 0.weight should have shape \(64, 3, 11, 11\)'): LPIPS(weights=tmp_path/'wrong.safetensors')
    with pytest.raises(ValueError, match='vgg'): LPIPS('vgg')

def test_objective_sums_and_feeds():
    class S: w, y = torch.randn(2,4,8), torch.rand(2,3,64,64)*2 - 1
    x = torch.rand(2,3,32,32)*2 - 1
    o = Objective(l2=2., lpips=0, w_norm=.1, latent_avg=torch.ones(4,8))
    half = lambda y: torch.nn.functional.avg_pool2d(y, 2)
    total, terms = o(o.prepare(x), S, half)
    torch.testing.assert_close(total, 2*l2(half(S.y), x).mean() + .1*w_norm(S.w, torch.ones(4,8)).mean())
    with pytest.raises(ValueError, match='differ in shape'): o(o.prepare(x), S)

# Every loss against its definition, written out in float64

def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def pictures(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)*2 - 1
def softplus(x): return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)
def close(a, b, tol=1e-12): np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)

def slope_fits(f, x, tol=1e-6, directions=3):
    "Does the gradient of the scalar f at x give the slope along random directions?"
    x = x.detach().clone().requires_grad_()
    g, = torch.autograd.grad(f(x), x)
    for i in range(directions):
        v = rand(*x.shape, seed=100 + i)
        slope = (f((x + 1e-6*v).detach()) - f((x - 1e-6*v).detach())).item()/2e-6
        assert abs((g*v).sum().item() - slope) <= tol*max(abs(slope), 1e-3)

class Tiny(nn.Module):
    "A smooth network in the place of the large ones; deliberately not of unit length"
    def __init__(self, n=5):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, n, 3)
    def forward(self, x): return torch.tanh(self.conv(F.adaptive_avg_pool2d(x, 6))).flatten(1)

def test_l2_by_definition():
    x, y = pictures(3,3,7,5), pictures(3,3,7,5, seed=1)
    close(l2(y, x), [sum((a - b)**2 for a, b in zip(p.ravel(), q.ravel()))/p.size for p, q in zip(y.numpy(), x.numpy())])
    assert gradcheck(lambda o: l2(o, x[:1, :, :3, :3]), y[:1, :, :3, :3].clone().requires_grad_())

def plain_lpips(a, b):
    "LPIPS from the weights of its two files, layer by layer"
    package = _package_lpips()
    w, lins = {k: v.double() for k, v in package.net.state_dict().items()}, [o.model[-1].weight.double() for o in package.lins]
    mean, std = torch.tensor([-.030, -.088, -.188]).double(), torch.tensor([.458, .448, .450]).double()
    def maps(x):
        h, out = (x - mean[:, None, None])/std[:, None, None], []
        for i, (stride, pad) in enumerate(((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))):
            if i in (1, 2): h = F.max_pool2d(h, 3, 2)
            name = [k for k in w if k.startswith(f'slice{i+1}.')]
            h = F.relu(F.conv2d(h, *[w[k] for k in name], stride=stride, padding=pad))
            out.append(h)
        return out
    total = 0
    for f, g, lin in zip(maps(a), maps(b), lins):
        f, g = (o/(o.square().sum(1, keepdim=True).sqrt() + 1e-10) for o in (f, g))
        total = total + ((f - g).square()*lin).sum(1).mean((1, 2))
    return total

def test_lpips_by_definition(lp):
    x, y = pictures(2,3,64,48), pictures(2,3,64,48, seed=1)
    close(lp(y.float(), x.float()), plain_lpips(y, x), 1e-5)
    exact = LPIPS().double()
    for k, v in plain_scales().items(): getattr(exact, k).copy_(v)
    torch.testing.assert_close(exact(y, x), plain_lpips(y, x), rtol=1e-7, atol=1e-9)
    slope_fits(lambda y: exact(y, x).sum(), y, 1e-4)

def plain_scales():
    return dict(shift=torch.tensor([-.030, -.088, -.188]).double().view(1,3,1,1), scale=torch.tensor([.458, .448, .450]).double().view(1,3,1,1)) | {
        f'gain{i}': o.model[-1].weight.double().sqrt() for i, o in enumerate(_package_lpips().lins)}

@pytest.mark.parametrize('cls', [Identity, MoCo])
def test_similarities_by_definition(cls):
    net, x, y = Tiny().double(), pictures(3,3,256,256), pictures(3,3,256,256, seed=1)
    loss = cls(net)
    def features(p):
        if cls is Identity: p = F.adaptive_avg_pool2d(p[:, :, 35:223, 32:220], 112)
        return net(p).detach().numpy()
    def cosine(a, b): return sum(i*j for i, j in zip(a, b))/sum(i*i for i in a)**.5/sum(j*j for j in b)**.5
    want = [cosine(a, b) for a, b in zip(features(y), features(x))]
    close(loss.similarity(y, x), want)
    close(loss(y, x), [1 - o for o in want])
    close(loss(y, loss.features(x)), loss(y, x))
    close(loss(y[1:2], x[1:2]), loss(y, x)[1:2])
    close(loss(x, x), [0., 0., 0.])
    slope_fits(lambda y: loss(y, x).sum(), y, 1e-6)
    small = pictures(1,3,8,8, seed=2)
    assert gradcheck(lambda o: loss(o, small.flip(3)), small.clone().requires_grad_())
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters()) and not loss.train().net.training

def test_identity_box_and_real_networks():
    torch.manual_seed(0)
    x = pictures(2,3,64,64).float()
    face, moco = FaceNet(), MoCoNet()
    for loss in (Identity(face), MoCo(moco)):
        y = x.flip(0).clone().requires_grad_()
        loss(y, loss.features(x)).sum().backward()
        assert y.grad.isfinite().all() and y.grad.any() and not any(p.grad is not None or p.requires_grad for p in loss.net.parameters())
        assert loss(x[:1], x[1:]).shape == (1,)
        assert torch.allclose(loss(x[:, :1], x[:, :1].expand(-1,3,-1,-1)), torch.zeros(2), atol=1e-5)
    boxed = Identity(face, box=(0, 128, 0, 128))
    y = x.clone().requires_grad_()
    boxed.features(y).sum().backward()
    assert y.grad[:, :, :32, :32].any() and not y.grad[:, :, 32:].any() and not y.grad[:, :, :, 32:].any()
    for cls, what in ((Identity, 'FaceNet'), (MoCo, 'MoCoNet')):
        with pytest.raises(ValueError, match=f'{cls.__name__}: expected a {what} or the path of one, found int'): cls(3)
        with pytest.raises(ValueError, match='nowhere.pth: no such file'): cls('nowhere.pth')

def test_norms_by_definition():
    w, avg = rand(3,6,4), rand(6,4, seed=1)
    n, a = w.numpy(), avg.numpy()
    close(w_norm(w, avg), [sum(v*v for v in (o - a).ravel())**.5 for o in n])
    close(w_norm(w, avg[0]), [sum(v*v for v in (o - a[0]).ravel())**.5 for o in n])
    for stage in (None, *range(6)):
        k = 6 if stage is None else stage + 1
        close(delta_norm(w, stage), [sum(sum((o[i] - o[0])**2)**.5 for i in range(1, k)) for o in n])
        assert gradcheck(lambda w: delta_norm(w, stage), w.clone().requires_grad_())
    assert gradcheck(lambda w: w_norm(w, avg), w.clone().requires_grad_())
    for stage in (-1, 6):
        with pytest.raises(ValueError, match=f'stage is {stage}, expected 0 to 5'): delta_norm(w, stage)
    flat = w[:, :1].repeat(1, 6, 1).requires_grad_()
    delta_norm(flat).sum().backward()
    assert (flat.grad == 0).all()

WEIGHTS = dict(l2=1., lpips=.8, identity=.1, moco=.5, w_norm=.025, delta=2e-4)

@pytest.mark.parametrize('names', [c for n in range(1, 7) for c in itertools.combinations(WEIGHTS, n)], ids='+'.join)
def test_any_combination_of_losses(names, lp, monkeypatch):
    monkeypatch.setattr('restyle_nb.losses.LPIPS', lambda: lp)
    avg, x = rand(6,4, seed=1).float(), pictures(2,3,64,64).float()
    o = Objective(**{k: WEIGHTS[k] if k in names else 0 for k in WEIGHTS}, latent_avg=avg, face_net=Tiny(), moco_net=Tiny(7))
    o.stage = 3
    w, y = rand(2,6,4).float().requires_grad_(), pictures(2,3,64,64, seed=1).float().requires_grad_()
    class S: pass
    S.w, S.y = w, y
    total, terms = o(o.prepare(x), S)
    alone = dict(l2=lambda: l2(y, x), lpips=lambda: lp(y, x), identity=lambda: Identity(Tiny())(y, x), moco=lambda: MoCo(Tiny(7))(y, x),
                 w_norm=lambda: w_norm(w, avg), delta=lambda: delta_norm(w, 3))
    assert list(terms) == [k for k in WEIGHTS if k in names] and not any(v.requires_grad for v in terms.values())
    torch.testing.assert_close(total, sum(WEIGHTS[k]*alone[k]().mean() for k in names))
    total.backward()
    assert (y.grad is not None) == bool({'l2', 'lpips', 'identity', 'moco'} & set(names)) and (w.grad is not None) == bool({'w_norm', 'delta'} & set(names))
    assert not any(p.requires_grad or p.grad is not None for p in o.parameters())

def test_targets_are_looked_at_once_a_batch():
    seen = dict(face=0, moco=0)
    def count(name):
        net = Tiny()
        net.register_forward_pre_hook(lambda m, args: seen.__setitem__(name, seen[name] + len(args[0])))
        return net
    o, x = Objective(lpips=0, identity=1, moco=1, face_net=count('face'), moco_net=count('moco')), pictures(4,3,64,64).float()
    class S: w, y = torch.zeros(4,6,4), pictures(4,3,64,64, seed=1).float()
    target = o.prepare(x)
    for _ in range(5): o(target, S)
    assert seen == dict(face=4 + 5*4, moco=4 + 5*4)

def test_objective_says_what_it_lacks():
    for kw, message in ((dict(identity=.1), 'identity=0.1 needs face_net=.*set identity=0'), (dict(moco=.5), 'moco=0.5 needs moco_net=.*set moco=0'),
                        (dict(delta=-1), 'delta=-1, expected a weight of 0 or more'), (dict(l2=float('nan')), 'l2=nan')):
        with pytest.raises(ValueError, match=message): Objective(**dict(dict(lpips=0), **kw))
    o = Objective(lpips=0, identity=1, face_net=Tiny())
    assert not hasattr(o, 'moco') and not hasattr(o, 'lpips')
    shared = Identity(Tiny())
    assert Objective(lpips=0, identity=1, face_net=shared).identity is shared
    with pytest.warns(UserWarning, match='every weight is 0'): Objective(l2=0, lpips=0)

# Critics

def small_generator(**kw):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        g = Generator(size=32, style_dim=6, n_mlp=2, channels={4:8, 8:8, 16:8, 32:8}, **kw)
        g.estimate_latent_avg(100)
    return g.freeze()

def steps(g, n=3, b=5, seed=0):
    w = [g.latent_avg + .3*rand(b, g.n_styles, g.style_dim, seed=seed + t).float() for t in range(n)]
    return [Step(t + 1, o, g.synthesize(o), o - g.latent_avg) for t, o in enumerate(w)]

def latent(g, **kw): return LatentCritic(g, **dict(dict(net=LatentDiscriminatorFor(g)), **kw))
def LatentDiscriminatorFor(g, seed=5):
    torch.manual_seed(seed)
    return LatentDiscriminator(g.style_dim, 7, 3)

def scores(net, w):
    "The latent discriminator in numpy, one layer after the other"
    h, layers = w, sorted({int(k.split('.')[1]) for k in net.state_dict()})
    t = {k: v.double().numpy() for k, v in net.state_dict().items()}
    for i in layers:
        h = h @ t[f'mlp.{i}.weight'].T + t[f'mlp.{i}.bias']
        if i != layers[-1]: h = np.where(h > 0, h, .2*h)
    return h[..., 0]

def slopes(net, w):
    "Gradient of the score, by the chain rule"
    t, h, gates = {k: v.double().numpy() for k, v in net.state_dict().items()}, w, []
    layers = sorted({int(k.split('.')[1]) for k in t})
    for i in layers[:-1]:
        h = h @ t[f'mlp.{i}.weight'].T + t[f'mlp.{i}.bias']
        gates.append(np.where(h > 0, 1., .2))
        h = h*gates[-1]
    g = np.broadcast_to(t[f'mlp.{layers[-1]}.weight'], (len(w), h.shape[1]))
    for i, gate in zip(layers[-2::-1], gates[::-1]): g = (g*gate) @ t[f'mlp.{i}.weight']
    return g

def test_latent_term_by_definition():
    g = small_generator()
    c, w = latent(g), rand(3, g.n_styles, 6)
    c.net.double()
    for stage in (None, *range(g.n_styles)):
        k = g.n_styles if stage is None else stage + 1
        close(c.loss(None, w, stage), [np.mean([softplus(-scores(c.net, o[i])) for i in range(k)]) for o in w.numpy()], 1e-10)
    assert gradcheck(lambda w: c.loss(None, w, 4), w.clone().requires_grad_())
    close(c.loss(None, w).mean(), g_loss(c.net(w)))
    with pytest.raises(ValueError, match='stage is 8'): c.loss(None, w, 8)
    w.requires_grad_()
    c.loss(None, w).sum().backward()
    assert w.grad.any() and not any(p.requires_grad or p.grad is not None for p in c.net.parameters())

def test_penalty_by_definition_and_through_the_network():
    net, w = LatentDiscriminatorFor(small_generator()).double(), rand(4, 6)
    of = lambda net: r1_penalty(lambda o: net(o.reshape(w.shape)), w.reshape(4, -1, 1, 1))
    close(of(net).detach(), np.mean(np.sum(slopes(net, w.numpy())**2, 1)), 1e-10)
    for name, p in net.named_parameters():
        if name.startswith('mlp.0') or name.endswith('weight'):
            slope_fits(lambda v: r1_penalty(lambda o: torch.func.functional_call(net, {name: v}, o.reshape(w.shape)), w.reshape(4, -1, 1, 1)) + 0*v.sum(), p, 1e-5)

def image_discriminator(h=8, w=8):
    torch.manual_seed(2)
    return Discriminator(size=8, channels={4:3, 8:3}, image_channels=1).double()

def test_image_penalty_by_differences():
    net, x = image_discriminator(), pictures(2,1,8,8)
    g = np.zeros(x.shape)
    with torch.no_grad():
        for i in itertools.product(*map(range, x.shape)):
            e = torch.zeros_like(x)
            e[i] = 1e-6
            g[i] = (net(x + e).sum() - net(x - e).sum()).item()/2e-6
    close(r1_penalty(net, x).detach(), (g**2).sum((1, 2, 3)).mean(), 1e-6)
    for name, p in net.named_parameters():
        if name in ('from_image.weight', 'blocks.0.conv2.weight', 'last.weight', 'hidden.weight', 'score.weight'):
            slope_fits(lambda v: r1_penalty(lambda o: torch.func.functional_call(net, {name: v}, o), x), p, 1e-4, 2)

def test_image_term_by_definition():
    net, y = image_discriminator(), pictures(3,1,8,8)
    c = ImageCritic(net)
    close(c.loss(y).detach(), softplus(-net(y).detach().numpy()), 1e-10)
    slope_fits(lambda y: c.loss(y).sum(), y)
    y.requires_grad_()
    c.loss(y).sum().backward()
    assert y.grad.any() and not any(p.requires_grad or p.grad is not None for p in net.parameters())

def test_critic_losses_by_definition():
    real, fake = rand(5), rand(7, seed=1)
    close(d_loss(real, fake), softplus(-real.numpy()).mean() + softplus(fake.numpy()).mean())
    close(g_loss(fake), softplus(-fake.numpy()).mean())
    assert gradcheck(d_loss, (real.requires_grad_(), fake.requires_grad_())) and gradcheck(g_loss, fake)

def adam(p, g, state, lr, betas=(.9, .999)):
    "One step of Adam, from its paper"
    t, m, v = state.get('t', 0) + 1, betas[0]*state.get('m', 0) + (1 - betas[0])*g, betas[1]*state.get('v', 0) + (1 - betas[1])*g*g
    state.update(t=t, m=m, v=v)
    return p - lr*(m/(1 - betas[0]**t))/(torch.sqrt(v/(1 - betas[1]**t)) + 1e-8)

def plain_fight(net, real, fake, i, lr, r1, every, betas, memory):
    "One update of a critic written out: the logistic loss, then by itself the lazy penalty"
    p = {k: v.detach().clone().requires_grad_() for k, v in net.named_parameters()}
    def D(x): return torch.func.functional_call(net, p, x)
    def update(loss):
        for (k, v), g in zip(p.items(), torch.autograd.grad(loss, list(p.values()))):
            p[k] = adam(v.detach(), g.detach(), memory.setdefault(k, {}), lr, betas).requires_grad_()
    a, b = torch.log(1 + torch.exp(-D(real))).mean(), torch.log(1 + torch.exp(D(fake))).mean()
    if every > 1: update(a + b)
    if i % every == 0:
        x = real.clone().requires_grad_()
        g, = torch.autograd.grad(D(x).sum(), x, create_graph=True)
        penalty = r1/2*every*sum(g.flatten()**2)/len(x) + 0*sum(o.sum() for o in p.values())
        update(penalty if every > 1 else a + b + penalty)
    return p, a.item(), b.item()

@pytest.mark.parametrize('every', [2, 1])
@pytest.mark.parametrize('kind', ['latent', 'image'])
def test_learning_by_definition(kind, every):
    if kind == 'latent': c, shape = latent(small_generator(), lr=1e-2, r1=3., r1_every=every), (4, 6)
    else: c, shape = ImageCritic(image_discriminator(), lr=1e-2, r1=3., r1_every=every), (4, 1, 8, 8)
    c.net.double()
    twin, memory = type(c.net)(**c.net.config).double(), {}
    twin.load_state_dict(c.net.state_dict())
    for i in range(5):
        real, fake = rand(*shape, seed=i), rand(*shape, seed=50 + i) + 1
        want, a, b = plain_fight(twin, real, fake, i, 1e-2, 3., every, (.9, .999) if kind == 'latent' else (.9, .99), memory)
        got = c.fight(i, real, fake)
        assert ('r1' in got) == (i % every == 0) and not any(v.requires_grad for v in got.values())
        close(got['real'], a, 1e-8); close(got['fake'], b, 1e-8)
        twin.load_state_dict({k: v.detach() for k, v in want.items()}, strict=False)
        for k, v in c.net.named_parameters(): torch.testing.assert_close(v.detach(), want[k].detach(), rtol=1e-6, atol=1e-9)
    assert not any(p.requires_grad or p.grad is not None for p in c.net.parameters())

def shown(c, monkeypatch, *args):
    "What a critic is shown as real and as fake"
    seen = []
    monkeypatch.setattr(type(c), 'fight', lambda self, i, real, fake: seen.append((real, fake)))
    c.learn(*args)
    return seen[0]

def among(rows, table): return all((table - r).abs().sum(-1).min() < 1e-6 for r in rows)

def test_fakes_include_the_average(monkeypatch):
    g = small_generator()
    s, x = steps(g), torch.zeros(5,3,32,32)
    codes, residuals = torch.cat([o.w.flatten(0, 1) for o in s]), s[0].delta.flatten(0, 1)
    real, fake = shown(latent(g), monkeypatch, 0, x, s)
    assert real.shape == fake.shape == (5, 6) and among(fake, codes) and not among(fake, residuals)
    _, fake = shown(latent(g, fakes='published'), monkeypatch, 0, x, s)
    assert among(fake, residuals) and not among(fake, codes)
    for stage in (0, 2):
        for fakes, table in (('codes', torch.cat([o.w[:, :stage+1].flatten(0, 1) for o in s])), ('published', s[0].delta[:, :stage+1].flatten(0, 1))):
            for seed in range(5): assert among(shown(latent(g, fakes=fakes, seed=seed), monkeypatch, 0, x, s, stage)[1], table)
    seen = [shown(latent(g, seed=k), monkeypatch, 0, x, s)[1] for k in range(20)]
    assert all(any(among(f[j:j+1], o.w[j]) for f in seen for j in range(5)) for o in s), 'every step should be shown sometimes'
    z = torch.randn(2000, 6)
    assert (torch.cat([shown(latent(g, seed=k), monkeypatch, 0, x, s)[0] for k in range(400)]).mean(0) - g.map(z).mean(0)).abs().max() < .2*g.map(z).std()

def test_latent_critic_refuses():
    g = small_generator()
    with pytest.raises(ValueError, match="fakes is 'both'"): LatentCritic(g, fakes='both')
    with pytest.raises(ValueError, match='no map'): LatentCritic(nn.Identity())
    with pytest.raises(ValueError, match='style vectors \\(B,6\\)'): LatentCritic(g, net=LatentDiscriminator(512))
    with pytest.raises(ValueError, match='r1_every is 0'): LatentCritic(g, r1_every=0)
    c = LatentCritic(g, net=LatentDiscriminator(6, 9, 2).state_dict())
    assert c.net.config == dict(style_dim=6, width=9, n_layers=2)

def test_pool_fills_then_swaps_half():
    pool, out, n = CodePool(50, seed=3), [], 0
    for _ in range(10):
        w = torch.arange(n, n + 5.)[:, None]
        assert torch.equal(pool.query(w), w)            # filling: what goes in comes out
        n += 5
    new = swaps = 0
    for _ in range(400):
        w = torch.arange(n, n + 5.)[:, None]
        before, got = pool.codes.flatten().tolist(), pool.query(w)
        assert got.shape == (5, 1) and pool.codes.shape == (50, 1)
        after = pool.codes.flatten().tolist()
        # nothing is lost, nothing doubled: what was or came in is now in the pool or came out, a code shown as it was is not kept
        assert sorted(after + got.flatten().tolist()) == sorted(before + w.flatten().tolist())
        swaps += sum(o < n for o in got.flatten().tolist())
        n += 5
    assert abs(swaps/2000 - .5) < .05
    assert len(set(pool.codes.flatten().tolist())) == 50 and torch.equal(CodePool(0).query(w), w)

def test_pool_takes_random_styles_and_goes_on_to_the_bit():
    w = torch.arange(8.)[None, :, None].repeat(1000, 1, 2)
    share = CodePool(0, seed=1).query(w)[:, 0].long().bincount(minlength=8)/1000
    assert share.min() > .08 and share.max() < .17
    a = CodePool(6, seed=2)
    for i in range(7): a.query(rand(4, 3, 2, seed=i))
    b = CodePool(6, seed=99)
    b.load_state_dict(a.state_dict())
    for i in range(7, 20): assert torch.equal(a.query(rand(4, 3, 2, seed=i)), b.query(rand(4, 3, 2, seed=i)))
    w = rand(4, 3, 2).requires_grad_()
    assert not a.query(w).requires_grad

def critics(g, lr=1e-3): return latent(g, lr=lr, pool=8), ImageCritic((32, 32), lr=lr, channels={4:4, 8:4, 16:4, 32:4})

@pytest.mark.parametrize('which', [0, 1])
def test_critics_resume_to_the_bit(which, tmp_path):
    g = small_generator()
    x = pictures(5,3,32,32).float()
    def run(c, a, b): return [{k: v.item() for k, v in c.learn(i, x, steps(g, seed=i), i % 8).items()} for i in range(a, b)]
    whole, torn, later = critics(g)[which], critics(g)[which], critics(g)[which]
    numbers = run(whole, 0, 24)
    run(torn, 0, 11)
    torch.save(torn.state_dict(), tmp_path/'state.pt')
    run(later, 0, 3)                       # its own past must not matter
    later.load_state_dict(torch.load(tmp_path/'state.pt', weights_only=True))
    assert run(later, 11, 24) == numbers[11:]
    assert all(torch.equal(v, whole.net.state_dict()[k]) for k, v in later.net.state_dict().items())
    assert [i for i, n in enumerate(numbers) if 'r1' in n] == [0, 16] and all(np.isfinite(list(n.values())).all() for n in numbers)

def test_critics_leave_the_random_state_alone():
    g, x = small_generator(), pictures(5,3,32,32).float()
    s = steps(g)
    state = torch.get_rng_state()
    for c in (LatentCritic(g), ImageCritic((32, 32), channels={4:4, 8:4, 16:4, 32:4})):
        c.learn(0, x, s)
        c.loss(s[0].y, s[0].w, None)
    assert torch.equal(state, torch.get_rng_state())
    a, b = LatentCritic(g), LatentCritic(g, seed=1)
    assert torch.equal(a.net.mlp[0].weight, LatentCritic(g).net.mlp[0].weight) and not torch.equal(a.net.mlp[0].weight, b.net.mlp[0].weight)

@pytest.mark.parametrize('size, const', [((256, 256), (4, 4)), ((192, 256), (3, 4)), ((64, 128), (2, 4)), ((48, 80), (3, 5)), (16, (4, 4)), ((100, 100), (25, 25))])
def test_image_critic_of_any_size(size, const):
    widths = {4 << i: 2 for i in range(9)}
    c = ImageCritic(size, channels=widths, image_channels=4)
    assert tuple(c.net.config['const_size']) == const
    h, w = (size, size) if isinstance(size, int) else size
    x = torch.rand(2, 4, h, w)
    assert c.loss(x).shape == (2,) and c.learn(0, x, [Step(1, None, -x, None)])['r1'] > 0
    with pytest.raises(ValueError, match='cannot be halved'): ImageCritic((33, 64))

def test_image_critic_sees_what_the_encoder_sees():
    geometry, widths = Geometry((24, 32), (64, 64), (8, 0, 56, 64)), {4: 2, 8: 2, 16: 2, 32: 2}
    c = ImageCritic(geometry=geometry, channels=widths)
    y, x = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 24, 32)
    assert torch.equal(c.loss(y), c.loss(geometry.feed(y))) and c.loss(y).shape == (2,)
    c.learn(0, x, [Step(1, None, x, None), Step(2, None, y, None)])
    with pytest.raises(ValueError, match='geometry='): ImageCritic((24, 32), channels=widths).learn(0, x, [Step(1, None, y, None)])
    with pytest.raises(ValueError, match='give a discriminator, the size'): ImageCritic()

def test_critics_win_against_a_clumsy_encoder():
    g, x = small_generator(), pictures(5,3,32,32).float()
    for c in critics(g, lr=1e-2):
        told = []
        for i in range(80): told.append(c.learn(i, x, [o._replace(w=o.w + 1, y=o.y + 1) for o in steps(g, seed=i)]))
        first, last = (sum(o['real'] + o['fake'] for o in part)/10 for part in (told[:10], told[-10:]))
        assert last < .9*first
