"""The paper's settings as data: every preset builds, has the published sizes and weights, and trains a small world of its shape."""
import dataclasses, inspect, math
import pytest
import torch
from restyle_nb import training
from restyle_nb.encoders import HEADS, TRUNKS, build_encoder
from restyle_nb.generator import Generator
from restyle_nb.images import CARS, Geometry
from restyle_nb.losses import LatentCritic, Objective
from restyle_nb.restyle import ReStyle
from restyle_nb.training import PRESETS, Preset, Ranger, Trainer, TrainingError, preset

NAMES = [f'{d}-{m}' for d in ('faces', 'cars', 'churches', 'horses', 'wild', 'toonify') for m in ('psp', 'e4e')]
# App. A.2 and section 5.1; published training code and its readme, pSp's readme for toonify
SIZE = dict(faces=1024, cars=512, churches=256, horses=256, wild=512, toonify=1024)
COUNTS = dict(faces=(70_000, 2_824), cars=(8_144, 1_000), churches=(126_227, 300), horses=(10_000, 2_215), wild=(4_738, 500), toonify=(70_000, 2_824))
LENGTH = {'faces-psp': 110_000, 'cars-psp': 75_000, 'wild-psp': 40_000, 'churches-psp': 150_000, 'toonify-psp': 6_000}

def test_all_are_there_and_frozen():
    assert sorted(PRESETS) == sorted(NAMES) and all(isinstance(p, Preset) and p.name == n for n, p in PRESETS.items())
    with pytest.raises(dataclasses.FrozenInstanceError): PRESETS['cars-psp'].lr = 1
    assert len(PRESETS._repr_markdown_().splitlines()) == 2 + len(NAMES) and 'cars-e4e' in repr(PRESETS)

@pytest.mark.parametrize('name', NAMES)
def test_published_numbers(name):
    p, (domain, method) = PRESETS[name], name.split('-')
    face = domain in ('faces', 'toonify')
    assert p.size == SIZE[domain] and (p.train[1], p.test[1]) == COUNTS[domain]
    assert (p.trunk, p.initial) == (('irse50', 'IR-SE50') if face else ('resnet34', 'ImageNet'))
    assert (p.l2, p.lpips, p.moco) == (1., .8, 0. if face else .5)
    assert p.identity == dict(faces=.1, toonify=1.).get(domain, 0.) and p.w_norm == (.025 if domain == 'toonify' else 0.)
    assert (p.head, p.delta, p.adversarial, p.progressive) == (('progressive', 2e-4, .1, (20_000, 2_000)) if method == 'e4e' else ('simple', 0., 0., None))
    assert (p.optimizer, p.lr, p.batch_size, p.n_steps, p.update, p.noise, p.flip) == ('ranger', 1e-4, 8, 5, 'batch', 'random', True)
    assert p.iterations == LENGTH.get(name)
    assert not (p.iterations and not p.note)                               # a length has a source

@pytest.mark.parametrize('name', NAMES)
def test_geometry_and_full_size_encoder(name):
    p, domain = PRESETS[name], name.split('-')[0]
    g = p.geometry
    assert g == (CARS if domain == 'cars' else Geometry((256, 256), (p.size, p.size)))
    with torch.device('meta'): e = p.encoder(width=16)                     # full trunk, thin heads
    assert (e.n_styles, e.style_dim, e.in_channels) == (2*int(math.log2(p.size)) - 2, 512, 6)
    assert type(e.trunk) is TRUNKS[p.trunk] and type(e.head) is HEADS[p.head] and e.head.spatial == (p.encoder_size[0]//16, 16)
    y = g.feed(torch.zeros(1, 3, p.size, p.size))
    assert tuple(y.shape[-2:]) == p.encoder_size

def test_parameters_of_the_full_encoders():
    "Counts of the published classes: 205.6 M for faces, 176.5 M for 512, 157.1 M for 256."
    for name, millions in {'faces-psp': 205.6, 'faces-e4e': 205.6, 'cars-psp': 176.5, 'churches-e4e': 157.1}.items():
        with torch.device('meta'): e = PRESETS[name].encoder()
        assert sum(o.numel() for o in e.parameters())/1e6 == pytest.approx(millions, abs=.1)

def test_any_head_and_single_pass():
    p = PRESETS['churches-psp']
    with torch.device('meta'):
        for head in HEADS: assert type(p.encoder(head=head, width=16).head) is HEADS[head]
        e = preset('churches-psp', n_steps=1, head='fpn').encoder(width=16)
    assert e.in_channels == 3 and type(e.head) is HEADS['fpn']
    g = Generator(size=16, style_dim=8, n_mlp=1, channels={4:4, 8:4, 16:4})
    e = preset('churches-psp', trunk='compact', size=16, encoder_size=(16, 16)).encoder(g, widths=(4, 4, 4, 4))
    assert (e.n_styles, e.style_dim) == (6, 8)

def test_initial_weights_reach_the_trunk():
    p = preset('cars-psp', trunk='compact')
    torch.manual_seed(0)
    one = build_encoder('compact', n_styles=4, style_dim=8, in_channels=3, input_size=(192, 256), widths=(4, 4, 4, 4))
    state = {k.removeprefix('trunk.'): v for k, v in one.state_dict().items() if k.startswith('trunk.')}
    e = p.encoder(4, 8, init=state, widths=(4, 4, 4, 4))
    assert torch.equal(e.trunk.stem.weight[:, :3], one.trunk.stem.weight)
    assert torch.equal(e.trunk.body[0].conv1.weight, one.trunk.body[0].conv1.weight)

def test_changes_and_unknown_names():
    p = preset('cars-e4e', lr=1e-3, iterations=10)
    assert (p.lr, p.iterations, p.moco) == (1e-3, 10, .5) and PRESETS['cars-e4e'].lr == 1e-4
    with pytest.raises(TrainingError, match="no preset 'cats'; there are faces-psp"): preset('cats')
    with pytest.raises(TypeError, match='colour'): preset('cars-psp', colour=1)

# ---------------------------------------------------------------- losses and their networks

@pytest.mark.parametrize('name', NAMES)
def test_a_missing_network_is_an_error_and_leaving_it_out_is_said(name):
    p, avg = PRESETS[name], torch.zeros(4, 8)
    what, arg, file = ('identity', 'face_net', 'model_ir_se50.pth') if p.identity else ('moco', 'moco_net', 'moco_v2_800ep_pretrain')
    with pytest.raises(TrainingError, match=f'{name}: {what} has weight.*{file}.*{arg}=.*drop_missing=True'): p.objective(avg)
    with pytest.warns(UserWarning, match=f'{what} .* is left out'): o = p.objective(avg, drop_missing=True)
    assert {k: v[0] for k, v in o.terms.items()} == {k: getattr(p, k) for k in ('l2', 'lpips', 'w_norm', 'delta') if getattr(p, k)}

def test_w_norm_needs_the_average():
    with pytest.warns(UserWarning), pytest.raises(TrainingError, match='give latent_avg='): PRESETS['toonify-psp'].objective(drop_missing=True)

@pytest.mark.parametrize('name', ['faces-e4e', 'toonify-psp', 'wild-e4e'])
def test_with_its_networks_the_objective_is_the_table(name):
    from restyle_nb.features import FaceNet, MoCoNet
    p = PRESETS[name]
    nets = dict(face_net=FaceNet()) if p.identity else dict(moco_net=MoCoNet())
    o = p.objective(torch.zeros(4, 8), **nets)
    assert {k: v[0] for k, v in o.terms.items()} == {k: getattr(p, k) for k in training.LOSSES if getattr(p, k)}
    del o, nets

# ---------------------------------------------------------------- end to end

def small(name, **changes):
    "The preset at an eighth of its size, or a sixteenth: same shape, box and losses, a generator of its own."
    p = PRESETS[name]
    k = p.size//64
    box = p.box and tuple(o//k for o in p.box)
    p = preset(name, size=64, encoder_size=(24, 32) if p.box else (32, 32), box=box, trunk='compact', progressive=p.progressive and (2, 1), **changes)
    torch.manual_seed(0)
    g = Generator(size=64, style_dim=8, n_mlp=2, channels={4:4, 8:4, 16:4, 32:4, 64:4})
    g.estimate_latent_avg(200)
    net = ReStyle(p.encoder(g, widths=(4, 4, 4, 4), width=8), g, p.geometry)
    with torch.no_grad(): x = p.geometry.feed(g.synthesize(g.map(torch.randn(24, 8))).clamp(-1, 1))
    return p, net, x

@pytest.mark.filterwarnings('ignore:.*is left out')
@pytest.mark.parametrize('name', ['cars-psp', 'cars-e4e', 'toonify-psp', 'wild-e4e'])
def test_end_to_end(name, tmp_path):
    p, net, x = small(name, iterations=14, lpips=0.)
    assert tuple(x.shape[1:]) == ((3, 24, 32) if name.startswith('cars') else (3, 32, 32))
    t = p.trainer(net, x[8:], tmp_path, drop_missing=True, val=x[:8], val_every=7, log_every=1, n_steps=2, save_every=7)
    assert isinstance(t.optimizer, Ranger) and (t.lr, t.batch_size, t.update, t.noise, t.flip) == (1e-4, 8, 'batch', 'random', True)
    assert [type(c) for c in t.critics] == [LatentCritic]*bool(p.adversarial) and all(c.weight == p.adversarial for c in t.critics)
    t.fit()
    row = t.history.of('train')[-1]
    assert math.isfinite(row['loss'][-1]) and set(t.names) <= set(row) and ('latent real' in row) == bool(p.adversarial)
    if p.progressive: assert [r['stage'] for r in t.history.of('train')] == [0, 0, *range(1, 10), 9, 9, 9]
    inv = net.invert(x[:2], n_steps=2)
    assert tuple(inv.images.shape) == (3, 2, 3, 64, 64) and torch.isfinite(inv.codes).all()
    if name == 'cars-psp':                                                 # nothing outside the box is ever looked at
        y = inv.images[-1].clone()
        y[..., :8, :] = y[..., 56:, :] = 9.
        assert torch.equal(net.geometry.feed(y), net.geometry.feed(inv.images[-1]))

def test_the_adversarial_term_needs_a_mapping_network():
    class Toy:
        n_styles, style_dim, latent_avg = 2, 4, torch.zeros(2, 4)
    with pytest.raises(TrainingError, match='Toy lacks.*adversarial=0'): PRESETS['cars-e4e'].critics(Toy())
    assert preset('cars-e4e', adversarial=0.).critics(Toy()) == [] == PRESETS['cars-psp'].critics(Toy())

def test_arguments_win_over_the_preset():
    p, net, x = small('wild-e4e')
    t = p.trainer(net, x, objective=Objective(lpips=0), critics=(), progressive=None, optimizer='adam', iterations=3, batch_size=4)
    assert not t.critics and t.progressive is None and isinstance(t.optimizer, torch.optim.Adam) and (t.iterations, t.batch_size) == (3, 4)
    with pytest.raises(TrainingError, match='how long'): p.trainer(net, x, objective=Objective(lpips=0), critics=()).fit()

def test_the_name_of_a_domain_decides_nothing():
    "Renamed, a preset builds the same things; and no line of the package compares with a domain's name."
    import restyle_nb
    from pathlib import Path
    a, b = PRESETS['cars-psp'], dataclasses.replace(PRESETS['cars-psp'], name='spoons')
    assert a.geometry == b.geometry
    with torch.device('meta'): assert a.encoder(width=16).config == b.encoder(width=16).config
    code = '\n'.join(inspect.getsource(o) for o in (Preset, training.Trainer, Preset.encoder, Preset.objective, Preset.trainer, Preset.critics, training.preset))
    assert not any(f"'{d}" in code for d in SIZE)
