"Fast: every shortcut equals the plain form, in every size, head, precision and mode."
import copy, platform, shutil, subprocess, sys
import pytest, torch
from torch import nn
from restyle_nb.editing import fingerprint, moved_styles, style_sizes
from restyle_nb.encoders import HEADS, build_encoder
from restyle_nb.fast import FoldedGenerator, View, keep_memory, plain
import restyle_nb.fast as fast_module
from restyle_nb.generator import Generator
from restyle_nb.images import Geometry
from restyle_nb.restyle import ReStyle, residual_norm
from restyle_nb.zoo import held_out, load_model

def spread(a, b): return ((a-b).abs().max()/b.std()).item()      # largest difference, in spreads of b
SMALL = dict(size=32, style_dim=16, n_mlp=1, channels={4:24, 8:24, 16:16, 32:8})

def generator(**kw):
    torch.manual_seed(0)
    g = Generator(**SMALL|kw).eval()
    for c in g.convs: nn.init.normal_(c.bias, std=.1); nn.init.constant_(c.noise_strength, .2)
    for o in g.to_images: nn.init.normal_(o.bias, std=.1)
    g.estimate_latent_avg(100)
    return g

def model(trunk='compact', head='simple', geometry=None, **kw):
    g = generator(**kw)
    e = build_encoder(trunk, head, n_styles=g.n_styles, style_dim=16, image_channels=g.image_channels, spatial=2)
    for m in e.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.normal_(m.running_mean, std=.1); nn.init.uniform_(m.running_var, .5, 2); nn.init.uniform_(m.weight, .5, 1.5); nn.init.normal_(m.bias, std=.1)
    return ReStyle(e, g, geometry).eval()

def targets(net, b=3): return torch.rand(b, net.generator.image_channels, *net.geometry.encoder, generator=torch.Generator().manual_seed(1))*2-1
def codes(g, b=3): return torch.randn(b, g.n_styles, g.style_dim, generator=torch.Generator().manual_seed(2))

@pytest.fixture(scope='module')
def faces(): return load_model('faces64')

@pytest.mark.parametrize('trunk,head', [('compact', o) for o in HEADS]+[('irse50', 'simple'), ('resnet34', 'fpn_progressive')])
def test_fast_equals_plain(trunk, head):
    net = model(trunk, head)
    x = targets(net)
    a,b,c = plain(net).invert(x, 3),net.invert(x, 3),net.fast().invert(x, 3)
    for o in (b, c): assert spread(o.codes, a.codes)<1e-4 and spread(o.images, a.images)<1e-4
    assert not a.images.equal(c.images) and a.deltas.std()>.01          # another way, and not a loop that stands still

@pytest.mark.parametrize('kw', [dict(const_size=(4, 8), size=64), dict(image_channels=1), dict(image_channels=4), dict(conv_clamp=.5), dict(size=32, style_dim=16, channels={4:8, 8:20, 16:4, 32:5})])
@pytest.mark.parametrize('noise', ['fixed', None, 'random', 'planes'])
def test_folded_generator(kw, noise, monkeypatch):
    g = generator(**kw|({} if 'size' not in kw else dict(channels={4:24, 8:24, 16:16, 32:8, 64:8}) if kw['size']==64 else {}))
    w,f = codes(g),g.fold()
    if noise=='planes': noise = [None if i==1 else torch.randn(3 if i%2 else 1, 1, *g.shapes[(i+1)//2]) for i in range(len(g.convs))]
    def draw(g, **kw): return g.synthesize(w, noise=noise, rng=torch.Generator().manual_seed(3), **kw)
    with torch.no_grad():
        for room in (1<<25, 3000, 1):                                   # all together; some levels in groups of pictures; one by one
            monkeypatch.setattr(fast_module, 'CACHE', room)
            assert spread(draw(f), draw(g))<1e-4 and draw(f).dtype==torch.float
            assert spread(draw(f, stop=16), draw(g, stop=16))<1e-4
            for i in range(3): assert spread(f.synthesize(w[i:i+1]), g.synthesize(w[i:i+1]))<1e-4

def test_folded_generator_keeps_its_name_and_words():
    g = generator()
    g.name = 'mine'
    f = g.fold()
    assert f.name=='mine' and fingerprint(f)==fingerprint(g)==fingerprint(g.fold(torch.bfloat16)) and f.config==g.config
    assert list(f.state_dict())==list(g.state_dict()) and all(a.equal(b) for a,b in zip(f.state_dict().values(), g.state_dict().values()))
    z = torch.randn(2, g.z_dim)
    with torch.no_grad():
        assert f.map(z).equal(g.map(z)) and spread(f(z, .7), g(z, .7))<1e-4
        assert spread(copy.deepcopy(f).synthesize(codes(g)), g.synthesize(codes(g)))<1e-4
    assert type(g) is Generator and not any(p.requires_grad for p in f.parameters()) and all(p.requires_grad for p in g.parameters())
    assert g.fold(inplace=True) is g and type(g) is FoldedGenerator and len(list(g.state_dict()))==len(list(f.state_dict()))
    for bad in (dict(noise='loud'), dict(noise=[None]), dict(stop=7)):
        with pytest.raises(ValueError): f.synthesize(codes(g), **bad)
    with pytest.raises(ValueError, match='code has shape'): f.synthesize(torch.randn(2, 3, 4))

def test_moved_styles_move_a_folded_generator(monkeypatch):
    g = generator()
    w,f,offsets = codes(g),g.fold(),[torch.randn(3, n) if i%2 else None for i,n in enumerate(style_sizes(g))]
    for room in (1<<25, 1):
        monkeypatch.setattr(fast_module, 'CACHE', room)
        with torch.no_grad(), moved_styles(g, offsets), moved_styles(f, offsets): assert spread(f.synthesize(w), g.synthesize(w))<1e-4

def test_gradients_through_a_folded_generator_are_right():
    g = generator()
    grads = []
    for o in (g, g.fold(), g.fold(torch.bfloat16)):
        w = codes(g).requires_grad_()
        o.synthesize(w).square().mean().backward()
        grads.append(w.grad)
    assert grads[0].any() and all(spread(o, grads[0])<1e-4 for o in grads[1:])

def test_a_folded_generator_follows_its_weights():
    g,f = generator(),generator().fold()
    with torch.no_grad():
        before = f.synthesize(codes(g))
        for o in (g, f):
            o.convs[2].weight.mul_(torch.linspace(.5, 2, 24)[:,None,None]); o.convs[1].bias.add_(.3); o.noise_3.mul_(-2); o.convs[4].noise_strength.zero_()
        assert spread(f.synthesize(codes(g)), g.synthesize(codes(g)))<1e-4 and spread(f.synthesize(codes(g)), before)>.01
        f.load_state_dict(generator().state_dict())
        assert spread(f.synthesize(codes(g)), before)<1e-5

def test_folding_under_inference_mode():
    with torch.inference_mode(): f = generator().fold(); y = f.synthesize(codes(f))
    assert y.isfinite().all() and f.synthesize(codes(f)).isfinite().all()

@pytest.mark.parametrize('dtype,limit', [('bf16', .15), ('fp16', .02)])
def test_sixteen_bits(faces, dtype, limit):
    x = held_out(4)
    a,f = faces.invert(x, 3),faces.fast(dtype)
    b = f.invert(x, 3)
    assert b.codes.dtype==b.images.dtype==torch.float and 1e-5<spread(b.codes, a.codes)<limit
    assert ((b.images-a.images).square().mean().sqrt()/a.images.std()).item()<limit
    assert abs(b.errors[-1].mean()/a.errors[-1].mean()-1)<.02           # as good an inversion as before

def test_sixteen_bits_of_large_styles():
    g = generator()
    with torch.no_grad():
        for o in g.convs: o.affine.bias.mul_(2e4)
        y,z = g.synthesize(codes(g)),g.fold(torch.half).synthesize(codes(g))
    assert z.isfinite().all() and spread(z, y)<.05

def test_dtypes_are_words(faces):
    assert faces.fast('fp32').generator.dtype==faces.fast(torch.float32).generator.dtype==torch.float
    assert faces.fast('auto').generator.dtype==torch.float              # too small to gain on a processor
    for bad in ('int8', torch.float64, 16):
        with pytest.raises(ValueError, match='dtype'): faces.fast(bad)

def test_early_stop_compacts_the_batch(faces):
    net,x = faces.fast(),held_out(6)
    inv = net.invert(x, 5)
    tol = residual_norm(inv.deltas[2], inv.codes[3], net.latent_avg).median().item()
    seen = []
    read = type(net.encoder).read
    net.encoder.read = lambda h: (seen.append(len(h)), read(net.encoder, h))[1]
    early,plainly = net.invert(x, 5, tol=tol),faces.invert(x, 5, tol=tol)
    assert early.stopped.equal(plainly.stopped) and early.stopped.unique().numel()>1
    assert seen==[int((early.stopped>=t).sum()) for t in range(1, early.stopped.max()+1)] and seen[-1]<6
    assert spread(early.codes, plainly.codes)<1e-4

def test_seen_pictures_are_the_full_ones_pooled():
    net = model(geometry=Geometry((16, 16), (32, 32)))
    x = targets(net)
    full,fast = net.invert(x, 3),net.fast(images='seen')
    inv = fast.invert(x, 3)
    pooled = torch.stack([net.geometry.feed(y) for y in full.images])
    assert inv.images.shape[-2:]==(16, 16) and fast.geometry.output==(16, 16)
    assert spread(inv.images, pooled)<1e-4 and spread(inv.codes, full.codes)<1e-4 and spread(inv.errors, full.errors)<1e-4
    assert spread(fast.paint(inv), full.images[-1])<1e-4 and spread(fast.paint(inv.codes[1]), full.images[1])<1e-4
    assert fast.refines and fingerprint(fast)==fingerprint(net) and fast.generator.config==net.generator.config
    on = fast.invert(x, 1, start=inv)                                   # goes on from its own pictures, and from a code alone
    assert spread(on.codes[0], full.codes[-1])<1e-4 and spread(fast.invert(x, 1, start=inv.codes[-1]).codes[1], on.codes[1])<1e-4

def test_stop_paints_at_the_feed_resolution():
    net = model(geometry=Geometry((8, 16), (32, 32), (8, 0, 24, 32)))   # a box like that of cars
    fast = net.fast(images='stop')
    x = targets(net)
    with torch.no_grad(): want = Geometry((8, 16), (16, 16), (4, 0, 12, 16)).feed(net.generator.synthesize(codes(net.generator), stop=16))
    assert spread(fast.generator.synthesize(codes(net.generator)), want)<1e-4
    assert fast.invert(x, 2).images.shape==(3, 3, 3, 8, 16) and fast.paint(fast.invert(x, 2)).shape==(3, 3, 32, 32)
    for geometry in (None, Geometry((24, 24), (32, 32)), Geometry((8, 16), (32, 32), (9, 0, 25, 32))):
        with pytest.raises(ValueError, match='no resolution below'): model(geometry=geometry).fast(images='stop')
    with pytest.raises(ValueError, match='images'): net.fast(images='some')

def test_foreign_generators_and_single_pass_encoders():
    class Foreign:
        n_styles,style_dim = 4,8
        latent_avg = torch.zeros(4, 8)
        def synthesize(self, w): return w.mean((1, 2))[:,None,None,None].expand(-1, 3, 16, 16)
    torch.manual_seed(0)
    net = ReStyle(build_encoder('compact', n_styles=4, style_dim=8, spatial=1), Foreign(), Geometry((16, 16), (16, 16)))
    x = torch.randn(2, 3, 16, 16)
    assert net.fast().generator is net.generator and spread(net.fast().invert(x, 2).codes, net.invert(x, 2).codes)<1e-4
    assert net.fast(images='seen').invert(x, 2).images.shape==(3, 2, 3, 16, 16) and spread(plain(net).invert(x, 2).codes, net.invert(x, 2).codes)<1e-4
    g = generator()
    once = ReStyle(build_encoder('compact', n_styles=g.n_styles, style_dim=16, image_channels=3, in_channels=3, spatial=2), g)
    x = targets(once)
    assert not once.fast().refines and spread(once.fast().invert(x).codes, once.invert(x).codes)<1e-4
    class Own(Generator):
        def synthesize(self, w, **kw): return super().synthesize(-w, **kw)
    own = Own(**SMALL)
    with pytest.raises(TypeError, match='synthesize of its own'): own.fold()

def test_fast_leaves_the_net_alone_unless_told(faces):
    net = model('irse50')
    before = {k:o.clone() for k,o in net.state_dict().items()}
    fast = net.fast()
    assert all(o.equal(before[k]) for k,o in net.state_dict().items()) and not net.encoder.folded and type(net.generator) is Generator
    again,short = fast.fast(),fast.fast('bf16')                         # folding twice is folding once
    assert short.generator.dtype==torch.bfloat16 and fast.generator.dtype==torch.float and short.encoder.dtype==torch.bfloat16
    x = targets(net)
    assert spread(again.invert(x, 2).codes, fast.invert(x, 2).codes)<1e-5
    e,g = net.encoder,net.generator
    fast = net.fast(inplace=True)
    assert fast.encoder is e and fast.generator is g and e.folded
    with pytest.raises(ValueError, match='folded'): plain(net)

def test_plain_keeps_nothing(faces):
    p = plain(faces)
    counts = []
    synthesize = p.generator.synthesize
    p.generator.synthesize = lambda *a, **kw: (counts.append(1), synthesize(*a, **kw))[1]
    for _ in range(2): p.invert(held_out(1), 1)
    assert len(counts)==4 and p.first(held_out(1)) is None              # the average picture is drawn at each call
    assert spread(p.invert(held_out(2), 5).images, faces.invert(held_out(2), 5).images)<1e-4

def test_keep_memory_says_and_undoes():
    code = ('from restyle_nb.fast import keep_memory; import torch, resource\n'
            'def faults(n):\n'
            '    for m in (2*n, *[n]*9): torch.empty(m).fill_(1.)\n'             # until there are gaps that fit: one of exactly n is too small for n and its alignment
            '    a = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
            '    for _ in range(3): torch.empty(n).fill_(1.)\n'
            '    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt-a\n'
            'torch.set_num_threads(1)\n'
            'a = faults(9<<20); on = keep_memory(), keep_memory(); b = faults(9<<20); off = keep_memory(False); print(a, b, faults(1<<25), on, off)')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    if platform.libc_ver()[0]!='glibc': assert '(False, False) False' in out; return
    before,kept,after = map(int, out.split()[:3])                       # the last with blocks for which there is no gap of old
    assert '(True, True) False' in out and after>before and kept<before/10, out

def test_compile_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda *_: None)
    with pytest.raises(RuntimeError, match='install g'): model().fast(compile=True)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('kw', [dict(), dict(compile='reduce-overhead'), dict(dtype='bf16')])
def test_on_a_gpu(kw):
    net = model('irse50').cuda()
    x = targets(net).cuda()
    a,b = plain(net).invert(x, 3),net.fast(**kw).invert(x, 3)
    assert spread(b.codes, a.codes)<(.2 if 'dtype' in kw else 1e-2) and b.images.std()>.01
