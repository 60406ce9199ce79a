"Two models, one after the other (section 5.5): by hand, between unlike encoders, and what is refused."
import sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from torch.nn import functional as F
from restyle_nb.encoders import build_encoder
from restyle_nb.generator import Generator
from restyle_nb.images import Geometry, save_image
from restyle_nb.restyle import ReStyle, bootstrap

CLOSE = dict(atol=1e-5, rtol=1e-4)

def generator(seed=0, size=32, style_dim=16, **kw):
    torch.manual_seed(seed)
    g = Generator(size=size, style_dim=style_dim, n_mlp=2, channels={s: 8 for s in (4, 8, 16, 32, 64)}, **kw)
    g.estimate_latent_avg(200)
    return g

def model(g, seed, input_size=32, geometry=None, **kw):
    torch.manual_seed(seed)
    e = build_encoder('compact', n_styles=g.n_styles, style_dim=g.style_dim, input_size=input_size, widths=(8, 16), **kw)
    return ReStyle(e, g, geometry).eval()

@pytest.fixture
def pair(): return model(generator(0), 1), model(generator(5), 2)   # two generators with averages of their own

@pytest.fixture
def x(): return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))*2 - 1

@torch.no_grad()
def by_hand(first, second, x, n):
    "The published inference, written out: code and picture of model 1 after one step, then model 2 from these."
    w = first.generator.latent_avg.expand(len(x), -1, -1)
    w = w + first.encoder(torch.cat([x, first.generator.synthesize(w)], 1))
    codes, images = [w], [first.generator.synthesize(w)]
    for _ in range(n):
        w = w + second.encoder(torch.cat([x, images[-1]], 1))
        codes.append(w); images.append(second.generator.synthesize(w))
    return torch.stack(codes), torch.stack(images)

@pytest.mark.parametrize('n', [1, 3])
def test_is_the_two_models_by_hand(pair, x, n):
    codes, images = by_hand(*pair, x, n)
    inv = bootstrap(*pair, x, n_steps=n)
    torch.testing.assert_close(inv.codes, codes, **CLOSE); torch.testing.assert_close(inv.images, images, **CLOSE)
    torch.testing.assert_close(inv.errors, (images - x).square().mean((2, 3, 4)), **CLOSE)
    assert (inv.codes[0] - pair[1].generator.latent_avg).abs().max() > .01       # the second average has no part in it

def test_published_code_agrees():
    "With itself for a second model, bootstrapping is the published loop from its second step on"
    golden = Path(__file__).parent/'golden'
    sys.path.insert(0, str(golden))
    from fill import case
    from restyle_nb.checkpoints import read_restyle
    tensors, inputs, want = case('restyle_psp_loop')
    net = read_restyle({k: torch.as_tensor(np.asarray(v)) for k, v in tensors.items()})
    inv = bootstrap(net, net, torch.from_numpy(inputs['in.image']), n_steps=3)
    for got, k in ((inv.codes, 'latents'), (inv.images, 'images')):
        e = np.abs(got.transpose(0, 1).numpy() - want[k]).max()/want[k].std()
        assert e <= 1e-4, (k, e)

def test_five_steps_unless_told(pair, x): assert bootstrap(*pair, x).n_steps == 5

def test_batches_files_and_one_picture(pair, x, tmp_path):
    inv = bootstrap(*pair, x, 2)
    torch.testing.assert_close(bootstrap(*pair, x, 2, batch_size=2).codes, inv.codes, **CLOSE)
    torch.testing.assert_close(bootstrap(*pair, x[1], 2).codes, inv[1].codes, **CLOSE)
    files = [save_image(o, tmp_path/f'{i}.png') for i, o in enumerate(x)]
    assert (bootstrap(*pair, files, 2).codes - inv.codes).abs().max() < .1

def test_a_model_with_itself_is_one_more_step(x):
    net = model(generator(), 1)
    torch.testing.assert_close(bootstrap(net, net, x, 2).codes, net.invert(x, 3).codes[1:], **CLOSE)

def test_first_may_be_a_single_pass(x):
    g = generator(); one, two = model(g, 1, in_channels=3), model(g, 2)
    inv = bootstrap(one, two, x, 2)
    torch.testing.assert_close(inv.codes[0], g.latent_avg + one.encoder(x).detach(), **CLOSE)
    with pytest.raises(ValueError, match='second model sees x only'): bootstrap(two, one, x, 1)

def test_unlike_inputs(x):
    "First: the whole square at 24²; second: a box of it at 12x16, as for cars"
    g = generator()
    first = model(g, 1, 24, Geometry((24, 24), (32, 32)))
    second = model(g, 2, (12, 16), Geometry((12, 16), (32, 32), (4, 0, 28, 32)))
    big = F.interpolate(x, (40, 56), mode='bilinear')
    inv = bootstrap(first, second, big, 2)
    by_first = first.invert(big, 1)
    torch.testing.assert_close(inv.codes[0], by_first.codes[1], **CLOSE)
    with torch.no_grad():
        y = F.adaptive_avg_pool2d(by_first.images[1][..., 4:28, :], (12, 16))
        w = by_first.codes[1] + second.encoder(torch.cat([second.geometry.fit(big), y], 1))
    torch.testing.assert_close(inv.codes[1], w, **CLOSE)
    assert inv.x.shape == (3, 3, 12, 16) and inv.geometry == second.geometry and isinstance(inv.strip(), Image.Image)

def test_time_includes_the_first_model(pair, x):
    s = bootstrap(*pair, x, 2, timed=True).seconds
    assert s.shape == (3,) and s[0] > 0 and (s.diff() > 0).all()
    assert bootstrap(*pair, x, 2).seconds is None

def test_noise_reaches_both(pair, x):
    for net in pair:
        for c in net.generator.convs: c.noise_strength.data.fill_(1.)
    a, b = bootstrap(*pair, x, 1, noise='random'), bootstrap(*pair, x, 1)
    assert (a.images[0] - b.images[0]).abs().max() > .01 and (a.images[1] - b.images[1]).abs().max() > .01

@pytest.mark.parametrize('other,what', [(dict(size=16), 'n_styles is 8 in the first model and 6 in the second'),
    (dict(style_dim=8), 'style_dim is 16 in the first model and 8'), (dict(image_channels=1), 'image_channels is 3 in the first model and 1'),
    (dict(size=64, const_size=(4, 8)), r'output is \(32, 32\) in the first model and \(32, 64\)')])
def test_unlike_spaces_are_refused(x, other, what):
    a, g = model(generator(), 1), generator(2, **other)
    b = model(g, 2, tuple(g.shapes[-1]), image_channels=g.image_channels)
    with pytest.raises(ValueError, match=what): bootstrap(a, b, x, 1)

def test_the_second_average_may_be_unknown(pair, x):
    want = bootstrap(*pair, x, 2).codes
    pair[1].generator.latent_avg.zero_()
    torch.testing.assert_close(bootstrap(*pair, x, 2).codes, want, **CLOSE)
