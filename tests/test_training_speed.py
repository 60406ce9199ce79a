"""What makes training fast changes no number: gradients, runs, batches."""
import copy, os, threading, time
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from restyle_nb.datasets import PictureFiles
from restyle_nb.encoders import build_encoder
from restyle_nb.features import FaceNet, MoCoNet
from restyle_nb.generator import Generator, StyledConv, ToImage
from restyle_nb.images import ImageFolder, Kept, ImageError, loader, save_image, to_float
from restyle_nb.losses import Identity, MoCo, Objective
from restyle_nb.machines import PictureNoise
from restyle_nb.restyle import ReStyle
from restyle_nb.runs import OptionError, Options, open_pictures, options_for
from restyle_nb.training import LeanConv, LeanImage, Trainer, TrainingError, slim, spare

def generator(clamp=None, const=(4, 4), **kw):
    torch.manual_seed(0)
    g = Generator(32, style_dim=8, n_mlp=2, channels={4: 8, 8: 8, 16: 6, 32: 4}, conv_clamp=clamp, const_size=const, **kw)
    for c in g.convs:
        c.noise_strength.data.normal_()
        c.bias.data.normal_()
    g.estimate_latent_avg(200)
    return g.freeze()

def world(trunk='compact', size=32, **kw):
    g = generator(**kw)
    with torch.no_grad(): x = g.synthesize(g.map(torch.randn(24, 8))).clamp(-1, 1)
    more = dict(widths=(4, 8, 8, 8)) if trunk == 'compact' else {}
    return ReStyle(build_encoder(trunk, n_styles=g.n_styles, style_dim=8, image_channels=g.image_channels, input_size=(size, size), **more), g), x

def trainer(net, x, **kw): return Trainer(net, x, kw.pop('objective', None) or Objective(lpips=0), **dict(n_steps=2, batch_size=4, iterations=4, lr=1e-3) | kw)

def gap(a, b): return ((a - b).abs().max()/b.std().clamp_min(1e-12)).item()

@pytest.mark.parametrize('noise', ['fixed', 'random', None])
@pytest.mark.parametrize('clamp', [None, .8])
@pytest.mark.parametrize('recompute_from', [None, 16])
def test_a_slim_generator_has_the_same_pictures_and_gradients(noise, clamp, recompute_from):
    g = generator(clamp, image_channels=2)
    g.recompute_from = recompute_from
    w0, r = torch.randn(3, g.n_styles, 8), torch.randn(3, 2, 32, 32)
    def run():
        w = w0.clone().requires_grad_()
        y = g.synthesize(w, noise=noise, rng=torch.Generator().manual_seed(1))
        (y*r).sum().backward()
        return y.detach(), w.grad
    plain = run()
    with slim(g) as same:
        assert same is g and {type(o) for o in (*g.convs, *g.to_images)} == {LeanConv, LeanImage}
        lean = run()
        with torch.no_grad(): assert torch.equal(g.synthesize(w0, noise='fixed'), copy.deepcopy(g).synthesize(w0, noise='fixed'))
    assert {type(o) for o in (*g.convs, *g.to_images)} == {StyledConv, ToImage}
    assert max(gap(a, b) for a, b in zip(lean, plain)) < 1e-4

def test_a_slim_generator_that_learns_still_does():
    g, grads = generator().requires_grad_(True), []
    w = torch.randn(2, g.n_styles, 8)
    for on in (False, True):
        with slim(g if on else None): g.synthesize(w).square().sum().backward()
        grads.append([p.grad.clone() for p in g.convs.parameters()])
        g.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and grads[0][0].abs().sum() > 0

def test_numbers_against_differences():
    g = generator().double()
    c, x, w, n = g.convs[1], torch.randn(2, 8, 4, 4).double(), torch.randn(2, 8).double(), torch.randn(1, 1, 8, 8).double()
    with slim(g): assert torch.autograd.gradcheck(lambda x, w: c(x, w, n), (x.requires_grad_(), w.requires_grad_()))

def kept_for_backward(f):
    "Bytes that autograd remembers, each storage once"
    seen = {}
    def note(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): out = f()
    return sum(seen.values()), out

def test_a_slim_generator_remembers_a_third():
    torch.manual_seed(0)
    g = Generator(64, style_dim=16, n_mlp=1, channels={r: 16 for r in (4, 8, 16, 32, 64)}).freeze()
    w = torch.randn(4, g.n_styles, 16, requires_grad=True)
    plain, y = kept_for_backward(lambda: g.synthesize(w))
    with slim(g): lean, z = kept_for_backward(lambda: g.synthesize(w))
    assert lean < plain/3

@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('precision', [None, torch.bfloat16])
def test_a_sparing_trunk_has_the_same_gradients_and_counts(training, precision):
    got = []
    for on in (False, True):
        torch.manual_seed(0)
        trunk = build_encoder('irse50', n_styles=2, style_dim=8, width=8, input_size=(32, 32)).trunk.train(training).to(memory_format=torch.channels_last)
        x = torch.randn(2, 6, 32, 32).requires_grad_()
        with spare(trunk if on else torch.nn.Identity()), torch.autocast('cpu', precision or torch.bfloat16, enabled=precision is not None): y = trunk(x)
        y.float().square().mean().backward()
        got.append([x.grad, *(p.grad for p in trunk.parameters()), *trunk.buffers()])
        assert {type(m) for m in trunk.modules() if isinstance(m, torch.nn.Sequential)} == {torch.nn.Sequential}
    assert all(torch.equal(a, b) for a, b in zip(*got))

def test_a_sparing_chain_keeps_less():
    "Maps alive between forward and backward: what a norm or PReLU gave a convolution is not among them"
    nn, alive = torch.nn, []
    for on in (False, True):
        chain = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.PReLU(4), nn.Conv2d(4, 4, 3, padding=1))
        refs = []
        for m in chain: m.register_forward_hook(lambda m, i, o: refs.append(StorageWeakRef(o.untyped_storage())))
        with spare(chain if on else nn.Identity()): y = chain(torch.randn(2, 4, 8, 8))
        alive.append([not r.expired() for r in refs])
    assert alive == [[True]*4, [False, True, False, True]]

def test_the_trainer_slims_only_while_it_trains():
    net, x = world()
    t, seen = trainer(net, x), []
    t.objective.add('spy', 1., lambda x: None, lambda _, y, w: (seen.append(type(net.generator.convs[0])), y.mean()*0)[1])
    t.fit(1, progress=False)
    assert set(seen) == {StyledConv, LeanConv} and seen[-1] is LeanConv and type(net.generator.convs[0]) is StyledConv

def test_gradients_of_an_iteration_are_those_of_the_plain_form(monkeypatch):
    "Against the same loop by hand: no slimming, no merging, targets looked at anew at every step"
    (net, x), (net2, _) = world(), world()
    face = FaceNet()
    lively(face)
    make = lambda **nets: Objective(l2=1, lpips=.8, identity=.1, w_norm=.01, **nets)
    t = trainer(net, x, objective=make(face_net=face), batch_size=2)
    grads = []
    monkeypatch.setattr(t, '_update', lambda: grads.extend(p.grad.clone() for p in t.params))
    t.net.encoder.train()
    losses = t.train_batch(t.batch(0))
    net2.encoder.train()
    objective = make(face_net=Bare(face))
    told = []
    for s in net2.steps(t.batch(0), 2):
        loss, _ = objective(objective.prepare(t.batch(0)), s)
        loss.backward()
        told.append(loss.item())
    assert torch.allclose(losses[0], torch.tensor(told), rtol=1e-4)
    whole = torch.cat([p.grad.flatten() for p in net2.encoder.parameters()])
    assert gap(torch.cat([g.flatten() for g in grads]), whole) < 1e-3 and whole.abs().max() > 0

class Bare(torch.nn.Module):
    "Hides what kind of network it holds, so that nothing is folded"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x)

def lively(net):
    "Norms that do something"
    rng = torch.Generator().manual_seed(0)
    for k, t in net.state_dict().items():
        if t.is_floating_point() and t.ndim == 1: t.copy_(.8 + .4*torch.rand(t.shape, generator=rng))

@pytest.mark.parametrize('make, size', [(FaceNet, 112), (MoCoNet, 64)])
def test_folded_networks_see_the_same(make, size):
    "In double precision, where no rounding turns a ReLU"
    torch.manual_seed(0)
    net = make()
    lively(net)
    norms = lambda net: sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    loss = (Identity if make is FaceNet else MoCo)(net)
    assert loss.net is not net and norms(net) and not norms(loss)
    was, fold = {k: v.clone() for k, v in net.state_dict().items()}, net.fold().double()           # moved without the one it was made from
    assert all(torch.equal(v, was[k]) and v.dtype == was[k].dtype for k, v in net.state_dict().items())
    x, r, got = torch.rand(1, 3, size, size).double()*2 - 1, torch.randn(1, 512 if make is FaceNet else 2048), []
    for n in (net.double(), net.fold(), fold):
        z = x.clone().requires_grad_()
        y = n(z)
        (y*r).sum().backward()
        got.append((y.detach(), z.grad))
        assert not n.train().training and not any(p.requires_grad for p in n.parameters())
    assert max(gap(a, b) for a, b in zip(got[1], got[0])) < 1e-9
    assert gap(got[2][0], got[0][0]) < 1e-4                                                    # folded in single precision

class NoReading(TorchDispatchMode):
    "Refuses whatever brings a number from the device to the host"
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default): raise AssertionError(f'{f} waits for the device')
        return f(*args, **kwargs or {})

@pytest.mark.parametrize('kw', [dict(), dict(update='step', noise='random'), dict(precision='bf16', clip=1.), dict(ema=.9, micro_batch=2), dict(trunk='irse50')])
def test_an_iteration_never_waits_for_the_device(kw):
    net, x = world(kw.pop('trunk', 'compact'))
    t = trainer(net, x, objective=Objective(identity=.1, face_net=Bare(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()))), **kw)
    t._iterate()                                              # the optimiser makes its state
    b = t.batch(1)
    with NoReading(): t.train_batch(b)
    with pytest.raises(AssertionError, match='waits'), NoReading(): b.sum().item()

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_an_iteration_never_waits_for_a_gpu():
    net, x = world()
    t = trainer(net.to('cuda'), x, noise='random')
    t._iterate()
    b = t.batch(1)
    torch.cuda.set_sync_debug_mode('error')
    try: t.train_batch(b)
    finally: torch.cuda.set_sync_debug_mode('default')

def test_compiled_training_has_the_same_numbers_and_names(tmp_path, monkeypatch):
    "Encoder and the first two layers are really traced; the code that would be written from it is not, for want of minutes"
    compiled, runs, real = [], [], torch.compile
    def tracing(f, mode=None, **kw):
        compiled.append(mode)
        return real(f, backend='eager') if len(compiled) in (2, 3, 4) else f
    monkeypatch.setattr(torch, 'compile', tracing)
    for kw in ({}, dict(compile='default')):
        net, x = world()
        t = trainer(net, x, folder=tmp_path/str(len(runs)), save_every=1, iterations=2, n_steps=1, **kw)
        t.fit(1, progress=False)
        runs.append(net.encoder.state_dict())
    a, b = runs
    assert compiled == ['default']*(2 + len(net.generator.convs) + len(net.generator.to_images))   # a trial, the encoder, the layers
    assert list(a) == list(b) and max(gap(b[k], a[k]) for k in a if a[k].numel() > 8) < 1e-3
    net, x = world()
    again = Trainer.resume(tmp_path/'1', net, x, Objective(lpips=0), compile=False)
    assert again.iteration == 1 and again.changed == dict(compile=('default', False))

def test_without_a_compiler_one_sentence(monkeypatch):
    def broken(*a, **kw): raise RuntimeError('No working C++ compiler found in the cpp.cxx config option\nand much more')
    monkeypatch.setattr(torch, 'compile', broken)
    with pytest.raises(TrainingError, match='compile=True: .*No working C.*leave compile out') as e: trainer(*world(), compile=True)
    assert '\n' not in str(e.value)

def test_options_say_so_too():
    assert Options().compile is False and Options(compile='yes').compile is True and Options(compile='reduce-overhead').compile == 'reduce-overhead'
    assert Options().keep_memory is True and options_for(cache='x').cache == 'x'
    with pytest.raises(OptionError, match='keep_memory'): Options(keep_memory='perhaps')

def folder(tmp_path, n=9, size=24, suffix='.png'):
    torch.manual_seed(0)
    for i in range(n): save_image(torch.rand(3, size, size)*2 - 1, tmp_path/f'{i:02}{suffix}')
    return tmp_path

@pytest.mark.parametrize('suffix', ['.png', '.jpg'])
def test_batches_are_the_same_however_they_are_read(tmp_path, suffix):
    src = folder(tmp_path/'a', suffix=suffix)
    lazy = PictureFiles(src, 16)
    kept = lambda: Kept(PictureFiles(src, 16), tmp_path/'kept')
    how = dict(memory=loader(ImageFolder(src, 16), 4, 3, True), lazy=loader(lazy, 4, 3, True), kept=loader(kept(), 4, 3, True), again=loader(kept(), 4, 3, True),
               workers=loader(lazy, 4, 3, True, workers=2), kept_workers=loader(kept(), 4, 3, True, workers=1), thread=loader(lazy, 4, 3, True))
    for p in (0, 1, 2, 3, 1, 9):
        want = how['memory'].batch(p)
        for name, it in how.items():
            if name == 'thread': it.soon(p if p != 3 else 7)
            assert torch.equal(it.batch(p), want), (name, p)
    for name in ('workers', 'kept_workers'): how[name].ahead.stop()

def test_reading_ahead_happens_meanwhile_and_tells_of_errors(tmp_path):
    class Slow(torch.utils.data.Dataset):
        who = set()
        def __len__(self): return 8
        def __getitem__(self, i):
            self.who.add(threading.current_thread().name)
            if i == 7: raise ImageError('picture 7 is broken')
            return torch.full((3, 4, 4), float(i)/8)
    it = loader(Slow(), 2)
    it.soon(0)
    it.batch(0) if 7 not in it.indices(0) else None
    assert any(o.startswith('pictures') for o in Slow.who)
    bad = next(p for p in range(4) if 7 in it.indices(p))
    it.soon(bad)
    with pytest.raises(ImageError, match='picture 7'): it.batch(bad)
    it.soon(bad)                                              # read, broken, and not what is asked for
    good = (bad + 1) % 4
    assert it.batch(good).shape == (2, 3, 4, 4)

def test_kept_pictures_outlive_damage_other_sets_and_full_disks(tmp_path, monkeypatch):
    src = folder(tmp_path/'a')
    ds, path = PictureFiles(src, 16), tmp_path/'kept'
    want, reads = [ds[i] for i in range(9)], []
    read = PictureFiles.read
    monkeypatch.setattr(PictureFiles, 'read', lambda self, i: (reads.append(i), read(self, i))[1])
    kept = Kept(ds, path, 'a')
    for _ in range(2): assert all(torch.equal(kept[i], want[i]) for i in range(9))
    assert reads == [0, *range(9)]
    data = bytearray(path.read_bytes())
    data[64 + 36 + 16*16*3*4 + 5] ^= 1                        # a bit of picture 4
    path.write_bytes(data[:-100])                             # and picture 8 cut short
    assert all(torch.equal(kept[i], want[i]) for i in range(9)) and reads[10:] == [4, 8]
    assert torch.equal(Kept(ds, path, 'b')[2], want[2]) and reads[-1] == 2
    monkeypatch.setattr('builtins.open', lambda *a, **kw: (_ for _ in ()).throw(OSError(28, 'No space left on device')) if a[1] == 'r+b' else io_open(*a, **kw))
    full = Kept(ds, path, 'c') if False else kept
    with pytest.warns(UserWarning, match='No space left'): assert torch.equal(full[1], want[1])

from io import open as io_open

def test_pictures_that_stand_in_for_others_are_not_kept(tmp_path):
    src = folder(tmp_path/'a')
    (src/'03.png').write_bytes(b'nothing')
    with pytest.warns(UserWarning, match='03.png'): kept = Kept(PictureFiles(src, 16, on_error='skip'), tmp_path/'kept'); kept[3]
    save_image(torch.zeros(3, 16, 16), src/'03.png')
    again = Kept(PictureFiles(src, 16, on_error='skip'), tmp_path/'kept')
    assert torch.equal(again[3], PictureFiles(src, 16)[3])

def test_open_pictures_keeps_large_sets(tmp_path):
    src = folder(tmp_path/'a')
    files = sorted(src.iterdir())
    assert type(open_pictures(files, (16, 16))) is ImageFolder
    assert type(open_pictures(files, (16, 16), memory=1e-9)) is PictureFiles
    a, b = (open_pictures(files, (16, 16), memory=1e-9, cache=tmp_path/'c') for _ in range(2))
    assert type(a) is Kept and a.path == b.path and a.path.parent == tmp_path/'c'
    os.utime(files[0], ns=(1, 1))
    assert open_pictures(files, (16, 16), memory=1e-9, cache=tmp_path/'c').path != a.path

def test_a_run_of_a_lazy_set_equals_one_in_memory_and_hardly_waits(tmp_path):
    src, ends = folder(tmp_path/'a', 12, 32), []
    for data in (ImageFolder(src, 32), PictureFiles(src, 32), Kept(PictureFiles(src, 32), tmp_path/'kept')):
        net, _ = world()
        t = trainer(net, data, flip=True)
        assert t.waiting == 0
        t.fit(progress=False)
        assert 0 < t.waiting < 1
        ends.append(torch.cat([p.detach().flatten() for p in net.encoder.parameters()]))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
