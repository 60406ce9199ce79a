"""Sizes end to end, through the public calls only: build, invert, train a step. Every size of picture, crop, channel and head that is offered."""
import math, warnings
import pytest, torch
from PIL import Image
from torch.nn import functional as F
from restyle_nb.encoders import HEADS, build_encoder
from restyle_nb.generator import Generator
from restyle_nb.images import CARS, Geometry, to_pil
from restyle_nb.losses import Objective
from restyle_nb.metrics import per_step
from restyle_nb.restyle import Inversion, ReStyle
from restyle_nb.training import Trainer

CLOSE = dict(atol=1e-4, rtol=1e-3)

def generator(size, width=4, seed=0, **kw):
    torch.manual_seed(seed)
    g = Generator(size=size, style_dim=8, n_mlp=1, channels={2**k: width for k in range(1, 11)}, **kw)
    g.estimate_latent_avg(100)
    return g

def model(g, geometry=None, trunk='compact', head='simple', encoder=None, **kw):
    geometry = geometry or Geometry.for_generator(g.shapes[-1], encoder)
    if trunk == 'compact': kw = dict(widths=(8, 8, 8, 8)) | kw
    torch.manual_seed(1)
    e = build_encoder(trunk, head, n_styles=g.n_styles, style_dim=g.style_dim, image_channels=g.image_channels, input_size=geometry.encoder, width=8, **kw)
    return ReStyle(e, g, geometry).eval()

def photos(*size, n=2, seed=2): return torch.rand(n, *size, generator=torch.Generator().manual_seed(seed))*2 - 1

def pooled(y, size):
    "Box means, written without pooling calls; sizes must divide each other"
    (h, w), (H, W) = y.shape[-2:], size
    if h <= H: return y.repeat_interleave(H//h, -2).repeat_interleave(W//w, -1)
    return y.reshape(*y.shape[:2], H, h//H, W, w//W).mean((3, 5))

@torch.no_grad()
def by_hand(net, x, n, view):
    w = net.generator.latent_avg.expand(len(x), -1, -1)
    codes, images = [w], [net.generator.synthesize(w)]
    for _ in range(n):
        w = w + net.encoder(torch.cat([x, view(images[-1])], 1))
        codes.append(w); images.append(net.generator.synthesize(w))
    return torch.stack(codes), torch.stack(images)

def holds(net, x, view, n=2):
    "Inverts as the equations say; then one training step that changes the first and the last layer. Returns the inversion."
    inv = net.invert(x, n)
    codes, images = by_hand(net, net.geometry.fit(x), n, view)
    torch.testing.assert_close(inv.codes, codes, **CLOSE); torch.testing.assert_close(inv.images, images, **CLOSE)
    assert inv.x.shape[-2:] == net.geometry.encoder and inv.images.shape[2:] == (net.generator.image_channels, *net.geometry.output)
    assert inv.deltas.abs().max() > 0 and (len(x) == 1 or (inv.codes[-1, 0] - inv.codes[-1, 1]).abs().max() > 0)
    trains(net, inv.x)
    return inv

def trains(net, x, n=1):
    before = {k: p.detach().clone() for k, p in net.encoder.named_parameters()}
    frozen = {k: p.clone() for k, p in net.generator.state_dict().items()}
    h = Trainer(net, x, Objective(lpips=0), n_steps=n, batch_size=len(x), lr=1e-3, log_every=1).fit(1, progress=False)
    assert len(h[0]['l2']) == n and all(math.isfinite(o) for o in h[0]['l2'])
    still = [k for k, p in net.encoder.named_parameters() if torch.equal(p, before[k])]
    idle = {'head.latlayer1', 'head.latlayer2'} if net.generator.n_styles <= 3 else {'head.latlayer2'} if net.generator.n_styles <= 7 else set()
    assert {k.rpartition('.')[0] for k in still} <= idle, still                   # maps of styles that a small generator lacks
    assert all(torch.equal(p, frozen[k]) for k, p in net.generator.state_dict().items())

@pytest.mark.parametrize('size', [64, 128, 256, 512, 1024])
def test_sizes(size):
    g = generator(size)
    net = model(g)
    assert g.n_styles == 2*int(math.log2(size)) - 2 and net.geometry == Geometry((min(size, 256),)*2, (size, size))
    assert ReStyle(net.encoder, g).geometry == net.geometry                       # found without being told
    inv = holds(net, photos(3, 70, 90, n=1), lambda y: pooled(y, net.geometry.encoder))
    if size == 64: trains(net, inv.x, 3)
    assert isinstance(inv.strip(), Image.Image)

@pytest.mark.parametrize('size,encoder', [(32, 256), (64, 256), (256, 64), (512, 64), (64, 16)])
def test_encoder_and_generator_of_unlike_size(size, encoder):
    net = model(generator(size), encoder=encoder)
    holds(net, photos(3, 300, 200, n=1), lambda y: pooled(y, (encoder, encoder)))

@pytest.mark.parametrize('channels', [1, 2, 4])
@pytest.mark.parametrize('size,encoder', [(64, None), (256, 64), (32, 64)])
def test_other_channels(channels, size, encoder, tmp_path):
    net = model(generator(size, image_channels=channels), encoder=encoder)
    x = photos(channels, size, size)
    inv = holds(net, x, lambda y: pooled(y, net.geometry.encoder))
    assert isinstance(inv.strip(), Image.Image) and len(inv._repr_png_()) > 100
    assert torch.equal(Inversion.load(inv.save(tmp_path/'a')).codes, inv.codes)
    with pytest.raises(ValueError, match=f'{channels} image channels'): net.invert(photos(3 if channels != 3 else 1, 64, 64))

@pytest.mark.parametrize('channels', [1, 4])
def test_other_channels_with_lpips_and_from_files(channels, tmp_path):
    net = model(generator(64, image_channels=channels))
    x = photos(channels, 64, 64)
    to_pil(x[0]).save(tmp_path/'a.png')
    a = net.invert(tmp_path/'a.png', 1)
    assert (a.x[0] - x[0]).abs().max() < 1/120
    t = per_step(net, x, 1)
    assert all(math.isfinite(t[1][k]) for k in ('l2', 'lpips'))
    h = Trainer(net, x, Objective(), n_steps=1, batch_size=2, log_every=1).fit(1, progress=False)
    assert math.isfinite(h[0]['lpips'][0]) and h[0]['lpips'][0] > 0

def test_cars():
    g = generator(512); net = model(g, CARS)
    view = lambda y: pooled(y[:, :, 64:448], (192, 256))
    inv = holds(net, photos(3, 300, 500), view)
    assert inv.x.shape == (2, 3, 192, 256) and inv.images.shape == (3, 2, 3, 512, 512) and g.n_styles == 16
    assert net.geometry.crop(inv.images[0]).shape[-2:] == (384, 512)
    w, h = inv[:1].strip(scale=.25).size
    assert w > 4*h/2                                                             # four tiles of 4:3
    t = per_step(net, photos(3, 300, 500), 1)
    assert all(0 < t[1][k] < math.inf for k in ('l2', 'lpips')) and abs(t[1]['l2'] - net.invert(photos(3, 300, 500), 1).errors[1].mean()) < 1e-4
    y = inv.images[-1].clone().requires_grad_()
    net.geometry.feed(y).sum().backward()
    assert y.grad[:, :, 64:448].min() > 0 and not y.grad[:, :, :64].any() and not y.grad[:, :, 448:].any()

@pytest.mark.parametrize('head', ['simple', 'fpn', 'progressive', 'fpn_progressive'])
def test_cars_with_every_head(head):
    net = model(generator(512), CARS, head=head)
    holds(net, photos(3, 192, 256, n=1), lambda y: pooled(y[:, :, 64:448], (192, 256)), n=1)

def test_an_off_centre_box():
    geo = Geometry((32, 16), (64, 64), (0, 24, 64, 56))
    net = model(generator(64), geo)
    inv = holds(net, photos(3, 90, 40), lambda y: pooled(y[..., 24:56], (32, 16)))
    assert inv.x.shape == (2, 3, 32, 16)

@pytest.mark.parametrize('const,size', [((4, 8), 128), ((8, 4), 128), ((3, 4), 64), ((2, 4), 32), ((4, 8), 512), ((3, 4), 512)])
def test_oblong_generators(const, size):
    g = generator(size, const_size=const)
    h, w = g.shapes[-1]
    net = model(g)
    assert net.geometry.output == (h, w) and max(h, w) == size and h*const[1] == w*const[0]
    assert net.geometry.encoder[0]*const[1] == net.geometry.encoder[1]*const[0] and max(net.geometry.encoder) == min(size, 256)
    assert ReStyle(net.encoder, g).geometry == net.geometry
    holds(net, photos(3, 100, 150), lambda y: pooled(y, net.geometry.encoder))

@pytest.mark.parametrize('head', list(HEADS))
@pytest.mark.parametrize('trunk', ['compact', 'resnet34', 'irse50'])
def test_every_head_over_every_trunk(trunk, head):
    net = model(generator(64), trunk=trunk, head=head)
    holds(net, photos(3, 64, 64), lambda y: pooled(y, (64, 64)), n=1)

@pytest.mark.parametrize('head', list(HEADS))
@pytest.mark.parametrize('case', ['few styles', 'one style more than a group', 'oblong', 'odd', 'grey', 'rgba'])
def test_every_head_on_odd_sizes(head, case):
    g, encoder = {'few styles': lambda: (generator(8), (32, 32)), 'one style more than a group': lambda: (generator(16), (64, 64)),
                  'oblong': lambda: (generator(64, const_size=(3, 4)), (48, 64)), 'odd': lambda: (generator(64), (40, 40)),
                  'grey': lambda: (generator(32, image_channels=1), (32, 32)), 'rgba': lambda: (generator(32, image_channels=4), (32, 32))}[case]()
    net = model(g, encoder=encoder, head=head)
    holds(net, photos(g.image_channels, *encoder), lambda y: F.adaptive_avg_pool2d(y, encoder))

@pytest.mark.parametrize('head', list(HEADS))
def test_single_pass_forms(head):
    net = model(generator(64), head=head, in_channels=3)
    x = photos(3, 64, 64)
    assert not net.refines
    torch.testing.assert_close(net.invert(x, 1).codes[1], net.generator.latent_avg + net.encoder(x).detach(), **CLOSE)
    trains(net, x)

@pytest.mark.parametrize('head', ['progressive', 'fpn_progressive'])
def test_stage_0_stays_in_w(head):
    net = model(generator(64), head=head)
    net.encoder.stage = 0
    d = net.invert(photos(3, 64, 64), 2).deltas
    assert (d == d[:, :, :1]).all() and d.abs().max() > 0

def test_a_folded_encoder_inverts_the_same():
    net = model(generator(64), trunk='irse50', head='fpn')
    x = photos(3, 64, 64)
    want = net.invert(x, 2).codes
    net.encoder = net.encoder.fold()
    torch.testing.assert_close(net.invert(x, 2).codes, want, **CLOSE)

def test_a_squeezing_geometry_is_mentioned():
    with pytest.warns(UserWarning, match='aspect'): Geometry((256, 256), (256, 512))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for g in (CARS, Geometry(), Geometry((100, 133), (384, 512)), Geometry((17, 17), (1024, 1024))): pass
