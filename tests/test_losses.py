"""LPIPS against the published package and the golden case; no download, no gradient where none belongs."""
import json, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from restyle_nb.losses import LPIPS, Objective, _package_lpips, l2, w_norm

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
