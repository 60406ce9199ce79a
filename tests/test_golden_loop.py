"""The whole loop, held to the published code: a checkpoint under its published names, four steps, two pictures."""
import json, sys
from pathlib import Path
import numpy as np, pytest, torch
from restyle_nb.checkpoints import read_restyle
from restyle_nb.images import Geometry

golden = Path(__file__).parent/'golden'
sys.path.insert(0, str(golden))
from fill import tensor

KERNEL = np.outer([1, 3, 3, 1], [1, 3, 3, 1])/16

@pytest.fixture(scope='module')
def case():
    tensors = json.loads((golden/'restyle_psp_loop.json').read_text())['tensors']
    fill = lambda k, shape, rule: KERNEL.astype(np.float32) if rule == 'fixed' else tensor(k, shape, rule)
    mapping = {k: torch.from_numpy(np.asarray(fill(k, **v))) for k, v in tensors.items()}
    x = torch.from_numpy(tensor('in.image', (2, 3, 256, 256), 'small'))
    return read_restyle(mapping), x, np.load(golden/'restyle_psp_loop.npz')

def error(got, want):
    "Largest difference, in standard deviations of what is expected."
    assert got.shape == want.shape
    return float(np.abs(got.numpy() - want).max()/want.std())

def test_everything_is_read_off_the_names(case):
    net, _, _ = case
    assert net.geometry == Geometry((256, 256), (32, 32))
    assert net.encoder.config['trunk'] == 'resnet34' and net.encoder.n_styles == 8
    assert net.generator.config['n_mlp'] == 8 and net.generator.provenance == {'latent_avg': 'stored'}

def test_average_image(case):
    net, _, want = case
    y = net.geometry.feed(net.start()[1])[0, :, ::8, ::8]
    assert (e := error(y, want['avg_image'])) <= 1e-4, e

def test_four_steps(case):
    net, x, want = case
    inv = net.invert(x, n_steps=4)
    codes, images = error(inv.codes[1:].transpose(0, 1), want['latents']), error(inv.images[1:].transpose(0, 1), want['images'])
    print(f'\nloop: codes {codes:.1e}, images {images:.1e} of the spread')
    assert codes <= 1e-4 and images <= 1e-4, (codes, images)

def test_steps_is_the_same_loop(case):
    net, x, want = case
    with torch.no_grad(): s = [s for s in net.steps(x[:1], 2)][-1]
    assert error(s.w, want['latents'][:1, 1]) <= 1e-4
    assert error(s.y, want['images'][:1, 1]) <= 1e-4
