"""Encoders against the golden cases, and in odd sizes."""
import importlib.util, json, sys
from pathlib import Path

import numpy as np, pytest, torch

from restyle_nb.encoders import build_encoder, stack_head, unstack_head, Encoder, SimpleHead, Compact, IRSE50, ResNet34

GOLDEN = Path(__file__).parent/'golden'
LIMIT = 1e-4 # of the spread of the expected array


def fill(*args):
    spec = importlib.util.spec_from_file_location('golden_fill', GOLDEN/'fill.py')
    mod = importlib.util.module_from_spec(spec); spec.loader.exec_module(mod)
    return torch.from_numpy(np.asarray(mod.tensor(*args)))


def case(name):
    "Tensors under published names, inputs, expected outputs"
    d = json.loads((GOLDEN/f'{name}.json').read_text())
    state = {k:fill(k, v['shape'], v['rule']) for k,v in d['tensors'].items()}
    ins = {k:fill(k, shape, 'unit') for k,shape in d['inputs'].items()}
    return state, ins, {k:torch.from_numpy(v) for k,v in np.load(GOLDEN/f'{name}.npz').items()}


def by_hand(state, trunk):
    "Published names to ours, without the reader"
    state = {k.removeprefix('encoder.'):v for k,v in state.items()}
    head = stack_head(state)
    with torch.device('meta'):
        enc = build_encoder(trunk, n_styles=len(head['head.linear.weight']), input_size=256)
    enc.load_state_dict({**{f'trunk.{k}':v for k,v in state.items() if not k.startswith('styles.')}, **head}, assign=True)
    return enc.eval()


def error(got, want): return ((got-want).abs().max()/want.std()).item()


@pytest.mark.parametrize('trunk', ['irse50', 'resnet34'])
@torch.no_grad()
def test_golden(trunk, capsys):
    state, ins, want = case(f'encoder_backbone_{trunk}')
    enc, x = by_hand(state, trunk), ins['in.x']
    got = {'forward': enc(x), 'forward_from': enc.forward_from(enc.first(x[:,:3]), x[:,3:]), 'folded': enc.fold()(x)}
    errs = {k:error(v, want['delta']) for k,v in got.items()}
    with capsys.disabled(): print(f'\n{trunk}: ' + ', '.join(f'{k} {v:.1e}' for k,v in errs.items()))
    assert max(errs.values()) <= LIMIT
    back = unstack_head(enc.state_dict(), 'encoder.styles.')
    assert back and all(torch.equal(state[k], v) for k,v in back.items())


@pytest.mark.parametrize('trunk', ['irse50', 'resnet34'])
@torch.no_grad()
def test_golden_through_the_reader(trunk):
    checkpoints = pytest.importorskip('restyle_nb.checkpoints')
    state, ins, want = case(f'encoder_backbone_{trunk}')
    enc = checkpoints.read_encoder(state).eval()
    assert enc.config['trunk']==trunk and enc.n_styles==want['delta'].shape[1]
    assert error(enc(ins['in.x']), want['delta']) <= LIMIT


@pytest.mark.parametrize('trunk', ['irse50', 'resnet34', 'compact'])
@torch.no_grad()
def test_cars_shape_and_odd_widths(trunk):
    "Flat pictures, batch 1, a style width that is not 512; forward_from and fold give the same"
    torch.manual_seed(0)
    enc = build_encoder(trunk, n_styles=3, style_dim=40, width=24, input_size=(192,256)).eval()
    x, y = torch.rand(2, 1, 3, 192, 256)*2-1
    want = enc(x, y)
    assert want.shape==(1,3,40) and enc.head.spatial==(12,16) and len(enc.head.convs)==4
    fast = enc.fold()
    for got in (enc.forward_from(enc.first(x), y), fast(x, y), fast.forward_from(fast.first(x), y), fast.fold()(x, y)):
        assert error(got, want) <= 1e-4


@pytest.mark.parametrize('channels', range(2, 9))
@torch.no_grad()
def test_in_channels(channels):
    for trunk,kw in (('compact', dict(widths=(8,8,8,8))), ('irse50', {}), ('resnet34', {})):
        enc = build_encoder(trunk, n_styles=2, style_dim=8, width=8, in_channels=channels, image_channels=channels//2, input_size=32, **kw).eval()
        x, y = torch.randn(2, channels//2, 32, 32), torch.randn(2, channels-channels//2, 32, 32)
        assert enc(x, y).shape==(2,2,8)
        assert error(enc.forward_from(enc.first(x), y), enc(x, y)) <= 1e-4


@pytest.mark.parametrize('width', [16, 160])
def test_head_equals_its_plain_form(width):
    torch.manual_seed(0)
    head = SimpleHead(4, 12, 20, (6,9), width).double()
    f = torch.randn(3, 12, 6, 9, dtype=torch.double, requires_grad=True)
    a, b = ([y, *torch.autograd.grad(y.square().sum(), [f, *head.parameters()])] for y in (head(f), head.plain(f)))
    for p,q in zip(a, b): torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_fold_leaves_the_original_alone():
    torch.manual_seed(0)
    enc = build_encoder('resnet34', n_styles=2, style_dim=8, width=8, input_size=32)
    before = {k:v.clone() for k,v in enc.state_dict().items()}
    fast = enc.fold()
    assert enc.training and not enc.folded and fast.folded and not fast.training
    assert all(torch.equal(v, before[k]) for k,v in enc.state_dict().items()) and not any(p.requires_grad for p in fast.parameters())
    assert all(p.requires_grad for p in enc.parameters()) and enc.fold(inplace=True) is enc


def test_compact_is_small_and_learns():
    torch.manual_seed(0)
    enc = build_encoder('compact', n_styles=10, style_dim=128, width=64, input_size=64)
    assert 1.3e6 < sum(p.numel() for p in enc.parameters()) < 1.7e6
    opt, losses = torch.optim.Adam(enc.parameters(), lr=1e-3), []
    x = torch.randn(8, 3, 64, 64)
    target = torch.randn(8, 10, 128)
    for _ in range(30):
        loss = (enc(x, 0*x)-target).square().mean()
        opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
    assert losses[-1] < .6*losses[0]
