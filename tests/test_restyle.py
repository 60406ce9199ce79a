"What is no lesson of chapter 3: modes, bad input, files cut short, single-pass encoders, crops."
import copy, json, os
from types import SimpleNamespace
import pytest, torch
from PIL import Image
from safetensors.torch import save_file
from restyle_nb.encoders import build_encoder
from restyle_nb.generator import Generator
from restyle_nb.images import Geometry, ImageError, save_image
from restyle_nb.restyle import Clock, Inversion, ReStyle, Step, evaluating, naive_feedback, pick_device, residual_norm

class Toy:
    "The least that is a generator: two styles of three numbers, painted on 12 pixels; counts what it paints."
    n_styles, style_dim = 2, 3
    def __init__(self):
        self.a = torch.linalg.qr(torch.randn(12, 6, generator=torch.Generator().manual_seed(0)))[0]
        self.latent_avg, self.painted = torch.full((2, 3), .1), 0
    def synthesize(self, w, gain=1.):
        self.painted += len(w)
        return gain * (w.flatten(1) @ self.a.T).view(-1, 1, 3, 4)

class Part:
    "Closes a fraction of the gap, one fraction a picture (by the sign of its first pixel)."
    def __init__(self, toy): self.toy = toy
    def __call__(self, x, y):
        e = ((x - y).flatten(1) @ self.toy.a).view(-1, 2, 3)
        return torch.where(x[:, 0, 0, 0, None, None] > 0, .9, .3) * e

@pytest.fixture
def toy():
    t = Toy()
    return ReStyle(Part(t), t)

def targets(net, n=6):
    g = torch.Generator().manual_seed(1)
    return net.generator.synthesize(torch.randn(n, 2, 3, generator=g)) / 3

@pytest.fixture
def net():
    torch.manual_seed(0)
    g = Generator(size=16, style_dim=16, n_mlp=2, channels={4:16, 8:16, 16:16})
    g.estimate_latent_avg(200)
    return ReStyle(build_encoder('compact', n_styles=g.n_styles, style_dim=16, input_size=16, widths=(8, 16)), g)

@pytest.fixture
def x(): return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1

def test_loop_is_the_equations(net, x):
    net.eval()
    with torch.no_grad():
        w = net.generator.latent_avg[None].expand(5, -1, -1); y = net.generator.synthesize(w)
        inv = net.invert(x, 3)
        for t in range(3):
            d = net.encoder(torch.cat([x, y], 1)[:, :3], y); w = w + d; y = net.generator.synthesize(w)
            torch.testing.assert_close(inv.codes[t+1], w, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(inv.images[t+1], y, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(inv.errors, (inv.images - x).square().mean((2, 3, 4)))

def test_generator_semantics(net, x):
    net.eval()
    it = net.steps(x, 5)
    assert iter(it) is it
    seen = [next(it) for _ in range(2)]
    it.close()
    assert [s.t for s in seen] == [1, 2] and isinstance(seen[0], Step)
    assert [s.t for s in net.steps(x, 3)] == [1, 2, 3]

def test_send_narrows_the_batch(toy):
    x, rows = targets(toy), torch.tensor([1, 4])
    with torch.no_grad():
        it = toy.steps(x, 3); next(it)
        s = it.send(rows)
        torch.testing.assert_close(s.w, toy.invert(x[rows], 2).codes[2])

def test_weights_may_change_between_steps(net, x):
    opt = torch.optim.SGD(net.encoder.parameters(), 1e-3)
    for s in net.steps(x, 3):
        opt.zero_grad(); s.y.square().mean().backward(); opt.step()

def test_no_gradient_through_steps(net, x):
    last = None
    for s in net.steps(x, 3):
        assert s.w.requires_grad and s.delta.requires_grad
        if last is not None:
            assert torch.autograd.grad(s.y.sum(), [last.w, last.y], allow_unused=True, retain_graph=True) == (None, None)
        last = s

def test_first_layer_reuse(net, x, monkeypatch):
    net.eval(); calls = []
    first = net.encoder.first
    monkeypatch.setattr(net.encoder, 'first', lambda o: calls.append(1) or first(o))
    want = [s.w.detach() for s in net.steps(x, 4)]
    assert not calls
    got = net.invert(x, 4)
    assert len(calls) == 1
    torch.testing.assert_close(got.codes[1:], torch.stack(want), atol=1e-5, rtol=1e-4)

def test_loop_begun_without_gradients_still_learns(net, x):
    it = net.steps(x, 2)
    with torch.no_grad(): next(it)
    next(it).y.sum().backward()
    assert net.encoder.trunk.first.weight.grad[:, :3].abs().sum() > 0

def test_invert_restores_modes_and_makes_no_graph(net, x):
    net.train(); list(net.encoder.children())[0].eval()
    modes = [m.training for m in net.modules()]
    before = copy.deepcopy(net.state_dict())
    inv = net.invert(x)
    assert [m.training for m in net.modules()] == modes
    assert not inv.codes.requires_grad and all(torch.equal(a, before[k]) for k, a in net.state_dict().items())
    with pytest.raises(RuntimeError), evaluating(net): raise RuntimeError
    assert [m.training for m in net.modules()] == modes

def test_start_is_cached_and_follows_its_model(net):
    w, y = net.start(3)
    assert w.shape == (3, 6, 16) and y.shape == (3, 3, 16, 16) and not y.requires_grad
    assert net.start(2)[1].data_ptr() == y.data_ptr()
    state = {k: v + .1 for k, v in net.generator.state_dict().items()}
    net.generator.load_state_dict(state)
    assert not torch.equal(net.start(3)[1], y)
    assert net.double().start()[1].dtype == torch.float64

def test_start_survives_inference_mode(net, x):
    with torch.inference_mode(): net.start(); net.invert(x, 1)
    next(net.steps(x, 1)).y.sum().backward()

def test_average_of_its_own(net, x):
    own = ReStyle(net.encoder, net.generator, latent_avg=torch.zeros(16))
    assert own.latent_avg.shape == (6, 16) and own.invert(x, 1).codes[0].abs().sum() == 0
    assert 'own_avg' in own.state_dict() and 'own_avg' not in net.state_dict()
    with pytest.raises(ValueError, match='latent_avg has shape'): ReStyle(net.encoder, net.generator, latent_avg=torch.zeros(7))
    net.generator.latent_avg.zero_()
    with pytest.raises(ValueError, match='estimate_latent_avg'): net.invert(x)

def test_early_stop(toy):
    x = targets(toy)
    toy.generator.painted = 0
    inv = toy.invert(x, 30, tol=.05)
    assert toy.generator.painted == int(inv.stopped.sum()) + 1       # the one is the average
    assert len(inv.stopped.unique()) > 1 and (inv.stopped < 30).all()
    r = residual_norm(inv.deltas, inv.codes[1:], toy.latent_avg)
    full = toy.invert(x, 30)
    for i, n in enumerate(inv.stopped):
        assert r[n-1, i] <= .05 and (r[:n-1, i] > .05).all()
        torch.testing.assert_close(inv.codes[:n+1, i], full.codes[:n+1, i])
        assert (inv.deltas[n:, i] == 0).all() and (inv.codes[n:, i] == inv.codes[n, i]).all() and (inv.errors[n:, i] == inv.errors[n, i]).all()
    assert (full.stopped == 30).all()
    torch.testing.assert_close(toy.invert(x, 30, tol=.05, batch_size=4).codes, inv.codes)

def test_residual_norm():
    w = torch.full((2, 3), 3.)
    assert residual_norm(torch.zeros(2, 3), w, w) == 0
    torch.testing.assert_close(residual_norm(w[None], 2 * w[None], w), torch.ones(1))

def test_batched_equals_one_by_one(net, x):
    inv = net.invert(x, 3)
    for bs in (1, 2):
        torch.testing.assert_close(net.invert(x, 3, batch_size=bs).codes, inv.codes, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net.invert(x[1], 3).codes, inv[1].codes, atol=1e-5, rtol=1e-4)

def test_every_kind_of_start(net, x):
    inv = net.invert(x, 2)
    with torch.no_grad(): step = list(net.eval().steps(x, 2))[-1]
    for start in (inv, step, (step.w, step.y), step.w):
        torch.testing.assert_close(net.invert(x, 1, start=start).codes[1], net.invert(x, 3).codes[3], atol=1e-5, rtol=1e-4)
    assert torch.equal(net.invert(x, 1, start=step.w[:1]).codes[0, 4], step.w[0])
    for bad, why in ((step.w[:3], 'start code'), ((step.w, step.y[..., :8]), 'start picture'), ((step.w, step.y[:2]), 'start picture')):
        with pytest.raises(ValueError, match=why): net.invert(x, start=bad)

def test_best_step():
    class Over(Part):
        def __call__(self, x, y): return (2.2 if y.abs().sum() else 1) * ((x - y).flatten(1) @ self.toy.a).view(-1, 2, 3)
    t = Toy(); net = ReStyle(Over(t), t)
    inv = net.invert(targets(net), 4)
    assert (inv.best == 0).all() and torch.equal(inv.best_codes, inv.codes[0]) and torch.equal(inv.best_images, inv.images[0])

def test_single_pass_encoder(net, x):
    e = build_encoder('compact', in_channels=3, n_styles=6, style_dim=16, input_size=16, widths=(8, 16))
    one = ReStyle(e, net.generator)
    assert net.refines and not one.refines
    torch.testing.assert_close(one.invert(x, 1).deltas[0], e.eval()(x).detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match='single step'): one.invert(x, 2)
    assert naive_feedback(one, x, 3).codes.shape == (4, 5, 6, 16)

def test_naive_feedback_begins_like_a_single_pass(net, x):
    naive = naive_feedback(net, x, 3)
    torch.testing.assert_close(naive.codes[:2], net.invert(x, 1).codes)
    torch.testing.assert_close(naive.codes[0] + naive.deltas.sum(0), naive.codes[-1])

def test_content_box(net):
    geo = Geometry(encoder=(12, 16), output=(16, 16), box=(2, 0, 14, 16))
    e = build_encoder('compact', n_styles=6, style_dim=16, input_size=(12, 16), widths=(8, 16))
    inv = ReStyle(e, net.generator, geo).invert(torch.rand(2, 3, 30, 40), 2)
    assert inv.x.shape == (2, 3, 12, 16) and inv.images.shape[-2:] == (16, 16)
    w, h = inv.strip(scale=4).size
    assert w > h / 2 and isinstance(inv.strip(), Image.Image)

def test_pictures_of_every_kind(net, x, tmp_path):
    files = [save_image(o, tmp_path/f'{i}.png') for i, o in enumerate(x)]
    a = net.invert([*files], 1); b = net.invert(str(files[0]), 1); c = net.invert(Image.open(files[0]), 1)
    assert len(a) == 5 and torch.equal(b.x, a.x[:1]) and torch.equal(c.x, b.x)
    assert (a.x - x).abs().max() < 1 / 127
    assert net.invert([x, x[0]], 1).x.shape == (6, 3, 16, 16) and net.invert(torch.rand(3, 50, 70), 1).x.shape == (1, 3, 16, 16)
    (tmp_path/'text.png').write_text('no picture')
    with pytest.raises(ImageError, match='text.png'): net.invert(tmp_path/'text.png')

@pytest.mark.parametrize('bad,why', [(lambda x: x[:, :2], 'image channels'), (lambda x: x[0, 0], 'expected'), (lambda x: x[:0], 'expected'),
    (lambda x: (x * 100).byte(), 'to_float'), (lambda x: x.log(), r'NaN or infinite values in picture'), (lambda x: x * 255, 'scale it'), (lambda x: [], 'empty')])
def test_bad_pictures(net, x, bad, why):
    with pytest.raises(ValueError, match=why): net.invert(bad(x))

def test_broken_weights_are_named(net, x):
    next(net.encoder.parameters()).data.fill_(float('nan'))
    with pytest.raises(ValueError, match='step 1 .*encoder'): net.invert(x)

def test_save_and_load(net, x, tmp_path):
    inv = net.invert(x, 2, tol=.5)
    path = inv.save(tmp_path/'sub'/'a')
    assert path.name == 'a.safetensors' and os.listdir(path.parent) == [path.name]
    back = Inversion.load(path)
    for k in ('codes', 'deltas', 'errors', 'stopped', 'best'): assert torch.equal(getattr(back, k), getattr(inv, k))
    torch.testing.assert_close(back.images, inv.images, atol=2e-3, rtol=1e-3)
    assert back.geometry == inv.geometry and back.x.dtype == torch.float32
    small = Inversion.load(inv.save(path, images=False))
    assert small.images is None and small._repr_png_() is None and 'best' in repr(small) and len(small[1:3]) == 2
    for f in (small.show, small.strip, lambda: small.best_images):
        with pytest.raises(ValueError, match='redraw'): f()
    torch.testing.assert_close(small.redraw(net.generator).images, inv.images, atol=1e-5, rtol=1e-4)

def test_bad_files(net, x, tmp_path):
    with pytest.raises(FileNotFoundError, match='none'): Inversion.load(tmp_path/'none')
    good = net.invert(x, 1).save(tmp_path/'good')
    (tmp_path/'cut.safetensors').write_bytes(good.read_bytes()[:500])
    with pytest.raises(ValueError, match='cut.safetensors: not a safetensors'): Inversion.load(tmp_path/'cut.safetensors')
    save_file(dict(a=torch.zeros(1)), tmp_path/'other')
    with pytest.raises(ValueError, match='not an Inversion'): Inversion.load(tmp_path/'other')
    inv = net.invert(x, 1); meta = dict(restyle_nb=json.dumps(dict(kind='inversion', geometry=None)))
    ts = dict(codes=inv.codes, deltas=inv.deltas, errors=inv.errors[:1].clone(), stopped=inv.stopped, x=inv.x)
    save_file(ts, tmp_path/'wrong', meta)
    with pytest.raises(ValueError, match=r'tensor errors has shape \(1, 5\), expected \(2, 5\)'): Inversion.load(tmp_path/'wrong')
    save_file({k: v for k, v in ts.items() if k != 'deltas'}, tmp_path/'less', meta)
    with pytest.raises(ValueError, match='deltas'): Inversion.load(tmp_path/'less')

def test_a_failed_save_leaves_the_old_file(net, x, tmp_path, monkeypatch):
    inv = net.invert(x, 1); path = inv.save(tmp_path/'a'); was = path.read_bytes()
    monkeypatch.setattr(os, 'replace', lambda *a: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(ValueError, match='cannot be written'): inv[:2].save(path)
    assert path.read_bytes() == was and os.listdir(tmp_path) == [path.name]

def test_random_noise_reaches_the_generator(net, x):
    for c in net.generator.convs: c.noise_strength.data.fill_(1.)
    a, b = net.invert(x, 1, noise='random'), net.invert(x, 1)
    assert not torch.equal(a.images[1], b.images[1]) and torch.equal(a.images[0], b.images[0])

def test_items(toy):
    inv = toy.invert(targets(toy), 2)
    assert len(inv[-1]) == 1 and torch.equal(inv[-1].x[0], inv.x[5]) and len(inv[inv.best > 5]) == 0
    assert len(inv[torch.tensor(1)]) == 1 and torch.equal(inv[torch.tensor(1)].codes, inv[1].codes)
    assert len(list(inv)) == 6 and torch.equal(Inversion.cat(list(inv)).codes, inv.codes)
    with pytest.raises(IndexError): inv[6]

@pytest.fixture
def slow(toy, monkeypatch):
    "A model on whose clock every call of the encoder takes one second, and nothing else any time"
    class Slow(Part):
        now = 0.
        def __call__(self, x, y): Slow.now += 1; return super().__call__(x, y)
    monkeypatch.setattr('restyle_nb.restyle.time', SimpleNamespace(perf_counter=lambda: Slow.now))
    return ReStyle(Slow(toy.generator), toy.generator)

def test_seconds_are_those_of_the_batch(slow):
    x = targets(slow)
    inv = slow.invert(x, 3, timed=True)
    assert inv.seconds.dtype == torch.float64 and inv.seconds.tolist() == [0, 1, 2, 3]
    assert torch.equal(inv[2].seconds, inv.seconds) and torch.equal(inv.to('cpu').seconds, inv.seconds)
    parts = slow.invert(x, 3, timed=True, batch_size=2)                # three batches, one after the other
    assert parts.seconds.tolist() == [0, 3, 6, 9]
    torch.testing.assert_close(parts.codes, inv.codes)
    assert slow.invert(x, 3).seconds is None and Inversion.cat([inv, slow.invert(x, 3)]).seconds is None

def test_seconds_go_on_from_the_start(slow):
    x = targets(slow)
    one = slow.invert(x, 2, timed=True)
    assert slow.invert(x, 1, start=one, timed=True).seconds.tolist() == [2, 3]
    assert slow.invert(x, 1, start=one, timed=True, batch_size=3).seconds.tolist() == [2, 4]
    assert slow.invert(x, 1, start=slow.invert(x, 1), timed=True).seconds.tolist() == [0, 1]
    paint = slow.generator.synthesize
    def painted(w): type(slow.encoder).now += 10; return paint(w)
    slow.generator.synthesize = painted
    assert slow.invert(x, 1, start=one.codes[-1], timed=True).seconds.tolist() == [10, 21]  # painting the start counts

def test_stopped_pictures_cost_nothing(slow):
    inv = slow.invert(targets(slow), 12, tol=.5, timed=True)
    n = int(inv.stopped.max())
    assert n < 12 and inv.seconds.tolist() == [*range(n + 1), *[n]*(12 - n)]

def test_the_device_is_waited_for_only_when_timed(toy, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda d=None: seen.append(d))
    clock = Clock('cuda:0'); clock()
    assert len(seen) == 2 and all(d == torch.device('cuda:0') for d in seen)
    toy.invert(targets(toy), 3)
    assert len(seen) == 2

def optimised(toy, n=6):
    "What an optimiser hands back: snapshots with labels, times and noise"
    inv = toy.invert(targets(toy, n), 2, timed=True)
    inv.labels, inv.noise = [0, 10, 1000], [torch.randn(n, 1, 3, 4), torch.randn(n, 1, 6, 8)]
    return inv

def test_labels_and_noise_are_carried(toy, tmp_path):
    inv = optimised(toy)
    some = inv[[4, 1]]
    assert some.labels == [0, 10, 1000] and torch.equal(some.noise[1], inv.noise[1][[4, 1]]) and len(inv[inv.best > 5].noise[0]) == 0
    both = Inversion.cat([inv[:2], inv[2:]])
    assert all(torch.equal(a, b) for a, b in zip(both.noise, inv.noise)) and torch.equal(both.seconds, 2*inv.seconds)
    for images in (True, False):
        back = Inversion.load(inv.save(tmp_path/'a', images=images))
        assert back.labels == inv.labels and torch.equal(back.seconds, inv.seconds) and back.seconds.dtype == torch.float64
        assert all(torch.equal(a, b) for a, b in zip(back.noise, inv.noise))
    plain = Inversion.load(toy.invert(inv.x, 1).save(tmp_path/'b'))
    assert (plain.seconds, plain.noise, plain.labels) == (None, None, None)

def test_files_from_before_the_clock(toy, tmp_path):
    inv = toy.invert(targets(toy), 2)
    ts = {k: getattr(inv, k).contiguous() for k in ('codes', 'deltas', 'errors', 'stopped', 'x', 'images')}
    save_file(ts, tmp_path/'a', dict(restyle_nb=json.dumps(dict(kind='inversion', geometry=inv.geometry.to_dict()))))
    back = Inversion.load(tmp_path/'a')
    assert torch.equal(back.codes, inv.codes) and (back.seconds, back.noise, back.labels) == (None, None, None)

def test_more_than_ten_planes_keep_their_order(toy, tmp_path):
    inv = optimised(toy); inv.noise = [torch.full((6, 1, 1, 1), float(i)) for i in range(12)]
    assert [int(o[0]) for o in Inversion.load(inv.save(tmp_path/'a')).noise] == list(range(12))

def test_labels_name_the_columns(toy, monkeypatch):
    inv = optimised(toy); said = {}
    monkeypatch.setattr('restyle_nb.images.film_strip', lambda rows, **kw: said.update(kw))
    inv.strip()
    assert said['titles'] == ['step 0', 'step 10', 'step 1000'] and all(o.split()[2].strip(',') in ('0', '10', '1000') for o in said['names'])
    assert repr(inv).splitlines()[1].split() == ['step', '0', '10', '1000']

def test_unlike_inversions_are_not_joined(toy):
    inv = optimised(toy)
    for other in (toy.invert(inv.x, 2), toy.invert(inv.x, 1)):
        with pytest.raises(ValueError, match='expected equal steps'): Inversion.cat([inv, other])

def test_redraw_uses_its_own_noise(net, x):
    for c in net.generator.convs: c.noise_strength.data.fill_(1.)
    inv = net.invert(x, 1)
    inv.noise = net.generator.noises('random', batch=len(x), rng=torch.Generator().manual_seed(0))
    with torch.no_grad(): want = net.generator.synthesize(inv.codes[1], noise=inv.noise)
    torch.testing.assert_close(inv.redraw(net.generator).images[1], want)
    assert (inv.redraw(net.generator, noise='fixed').images[1] - want).abs().max() > .01

@pytest.mark.parametrize('tensors,labels,why', [(dict(seconds=torch.zeros(5)), None, r'tensor seconds has shape \(5,\), expected \(3,\)'),
    ({'noise.0': torch.zeros(2, 1, 4, 4)}, None, r'tensor noise.0 has shape'), ({'noise.1': torch.zeros(6, 1, 4, 4)}, None, 'noise.0'),
    ({}, [1, 2], 'expected 3 whole numbers'), ({}, ['a', 'b', 'c'], 'expected 3 whole numbers'), (dict(deltas=torch.zeros(2)), None, 'tensor deltas')])
def test_bad_extras_in_files(toy, tmp_path, tensors, labels, why):
    inv = toy.invert(targets(toy), 2)
    ts = {k: getattr(inv, k).contiguous() for k in ('codes', 'deltas', 'errors', 'stopped', 'x')} | tensors
    save_file(ts, tmp_path/'a', dict(restyle_nb=json.dumps(dict(kind='inversion', labels=labels))))
    with pytest.raises(ValueError, match=why): Inversion.load(tmp_path/'a')

def test_pick_device():
    assert pick_device() .type in ('cuda', 'mps', 'cpu') and pick_device('cpu') == pick_device(torch.device('cpu'))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='not available'): pick_device('cuda')
    with pytest.raises(ValueError, match='unknown device'): pick_device('abacus')
