"Programs and files made of a model do what the model does, at any batch, or say in a sentence why they cannot be made."
import json
import os

import numpy as np
import pytest
import torch

from restyle_nb import deploy, encoders
from restyle_nb.checkpoints import publish_restyle, save_restyle
from restyle_nb.cli import restyle_export
from restyle_nb.deploy import ExportError, check_onnx, export_onnx, loop_program, onnx_facts, save_inference, step_program
from restyle_nb.encoders import build_encoder
from restyle_nb.fast import keep_memory
from restyle_nb.generator import Generator
from restyle_nb.images import Geometry
from restyle_nb.restyle import ReStyle
from restyle_nb.zoo import load_model

ort = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')


def tiny(trunk='compact', head='simple', geometry=None, const=(4, 4), c=3, seed=0, single=False, **kw):
    torch.manual_seed(seed)
    g = Generator(2*max(const), 8, 1, channels={4: 8, 8: 8}, const_size=const, image_channels=c)
    for o in g.convs:
        o.noise_strength.data.fill_(.3)
        o.bias.data.normal_()
    g.estimate_latent_avg(100)
    geometry = geometry or Geometry.for_generator(g.shapes[-1])
    if trunk == 'compact': kw = dict(widths=(8, 8, 8)) | kw
    return ReStyle(build_encoder(trunk, head, g.n_styles, 8, c, c if single else None, input_size=geometry.encoder, **kw), g, geometry, passes=2).eval()


def pictures(net, n=3):
    return torch.rand(n, net.generator.image_channels, *net.geometry.encoder, generator=torch.Generator().manual_seed(1))*2 - 1


@pytest.fixture(scope='module')
def net(): return tiny(width=136)  # wide enough for the form that looks at the size of the batch


@pytest.fixture(scope='module')
def step(net, tmp_path_factory): return export_onnx(net, tmp_path_factory.mktemp('onnx')/'step', 'step')


def test_programs_are_the_loop_at_any_batch(net):
    one, loop = step_program(net).module(), loop_program(net, every=True).module()
    for n in (1, 2, 5):
        x = pictures(net, n)
        inv = net.invert(x)
        w, y, codes = loop(x)
        assert codes.shape == (n, 2, net.generator.n_styles, 8)
        torch.testing.assert_close(codes.transpose(0, 1), inv.codes[1:])
        torch.testing.assert_close((w, y), (inv.codes[-1], inv.images[-1]))
        torch.testing.assert_close(one(x, inv.codes[1], inv.images[1]), (inv.codes[2], inv.images[2], inv.deltas[1]))


@pytest.mark.parametrize('kw', [
    dict(trunk='irse50', head='fpn_progressive', const=(8, 8), geometry=Geometry((12, 16), (16, 16), (2, 0, 14, 16))),  # as the cars: a box of the picture
    dict(head='shared_progressive', const=(3, 4), c=1, geometry=Geometry((5, 7), (6, 8))),  # pooling that does not divide
    dict(single=True),
], ids=['fpn, box', 'shared, odd pooling', 'single pass'])
def test_every_kind_of_network(kw, tmp_path, monkeypatch):
    if kw.get('trunk') == 'irse50': monkeypatch.setitem(encoders.IR_UNITS, 50, (1, 1, 1, 1))
    net = tiny(**kw)
    form = net
    if kw.get('trunk') == 'irse50':
        form = net.fast()
        keep_memory(False)
    path = export_onnx(form, tmp_path/'a.onnx', 'step')
    assert max(check_onnx(path, net, pictures(net)).values()) < 1e-4, 'of the plain model, whatever form was written'
    facts = onnx_facts(path)
    assert Geometry.from_dict(facts['geometry']) == net.geometry and facts['kind'] == 'step'


def test_the_command_and_a_file_of_half_size(net, step, tmp_path, capsys):
    kw = ['--model', str(save_restyle(net, tmp_path/'model')), '--device', 'cpu']
    half = tmp_path/'half.onnx'
    assert restyle_export([str(half), '--what', 'step', '--dtype', 'float16'] + kw) == 0
    said = capsys.readouterr().out
    assert 'half.onnx: a step, differs from the model by at most' in said and 'MiB' in said
    assert max(check_onnx(step, net).values()) < 1e-4 < max(check_onnx(half, net).values()), 'float16 leaves a trace'
    with pytest.raises(ExportError, match='of the spread in .*dtype'): check_onnx(half, net, tol=1e-4)
    assert half.stat().st_size < .6*step.stat().st_size
    assert (onnx_facts(half)['half'], onnx_facts(step)['half']) == (True, False)
    assert b'restyle_nb/' not in step.read_bytes(), 'no path of this machine'


def test_the_command_without_onnx(net, tmp_path, capsys):
    kw = ['--model', str(save_restyle(net, tmp_path/'model')), '--device', 'cpu']
    assert restyle_export([str(tmp_path/'c.safetensors')] + kw) == 0
    assert torch.equal(load_model(tmp_path/'c.safetensors', 'cpu').latent_avg, net.latent_avg)
    (tmp_path/'file').write_text('')
    capsys.readouterr()
    assert restyle_export([str(tmp_path/'file'/'d.safetensors')] + kw) == 2
    err = capsys.readouterr().err
    assert err.startswith('restyle_export: ') and err.count('\n') == 1, err
    for words in (['x.pt'], ['x.safetensors', '--every'], ['x.onnx', '--what', 'step', '--steps', '2']):
        with pytest.raises(SystemExit): restyle_export(words)


def test_without_w_and_y_it_starts_from_the_average(net, step):
    how = ort.SessionOptions()
    how.log_severity_level = 3
    run, x = ort.InferenceSession(str(step), how), pictures(net)
    w, y, delta = run.run(None, dict(x=x.numpy()))
    inv = net.invert(x)
    np.testing.assert_allclose(w, inv.codes[1], atol=1e-4)
    np.testing.assert_allclose(y, inv.images[1], atol=1e-3)
    np.testing.assert_allclose(run.run(['w_next'], dict(x=x.numpy(), w=w, y=y))[0], inv.codes[2], atol=1e-4)
    assert [o.name for o in run.get_inputs()] == ['x'] and run.get_inputs()[0].shape[0] == 'batch'


def test_another_model_is_noticed(net, step):
    with pytest.raises(ExportError, match='written from this model'): check_onnx(step, tiny(seed=1, width=136), pictures(net))


def test_weights_beyond_one_file(net, tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, 'LARGEST', 1000)
    path = export_onnx(net, tmp_path/'big.onnx', batch=2, every=True)
    assert sorted(os.listdir(tmp_path)) == ['big.onnx', 'big.onnx.data'] and onnx_facts(path)['n_steps'] == 2
    assert deploy._session(path).get_inputs()[0].shape[0] == 2
    errors = check_onnx(path, net)
    assert set(errors) == {'w', 'y', 'codes'} and max(errors.values()) < 1e-4
    moves = []
    def replace(a, b, real=os.replace):
        moves.append(b)
        if len(moves) == 2: raise OSError('the disk went away')
        real(a, b)
    monkeypatch.setattr(os, 'replace', replace)
    import onnx_ir
    with pytest.raises(OSError, match='went away'): deploy._write(onnx_ir.load(path), path)
    assert os.listdir(tmp_path) == ['big.onnx.data'], 'no old model beside new weights, nothing else left behind'


class Numpy:
    "A generator whose pixels are made outside torch"
    def __init__(self, g): self.g, self.n_styles, self.style_dim, self.image_channels = g, g.n_styles, g.style_dim, g.image_channels
    def synthesize(self, w): return torch.from_numpy(self.g.synthesize(w).detach().numpy().copy()) if w.sum().item() < 1e9 else None


class Toy(torch.nn.Module):
    "A generator of somebody else's"
    n_styles, style_dim, image_channels = 4, 8, 3
    def __init__(self):
        super().__init__()
        self.register_buffer('latent_avg', torch.ones(4, 8))
        self.paint = torch.nn.Linear(32, 3*8*8)
    def synthesize(self, w): return self.paint(w.flatten(1)).view(-1, 3, 8, 8)


def test_foreign_generators(net):
    toy = ReStyle(build_encoder('compact', 'simple', 4, 8, input_size=(8, 8), widths=(8, 8, 8)), Toy(), Geometry((8, 8), (8, 8))).eval()
    x = pictures(toy, 3)
    torch.testing.assert_close(loop_program(toy, 2).module()(x)[0], toy.invert(x, 2).codes[-1])
    with pytest.raises(ExportError, match='Numpy and Encoder do not trace .*tensor operations'):
        loop_program(ReStyle(net.encoder, Numpy(net.generator), net.geometry, net.latent_avg), 1)


@pytest.mark.parametrize('kw, error, words', [
    (dict(what='film'), ValueError, "what is 'film', expected 'step' or 'loop'"),
    (dict(dtype='int8'), ValueError, "dtype is 'int8'.*float16"),
    (dict(batch=0), ValueError, 'batch is 0'),
    (dict(n_steps=0), ValueError, 'n_steps is 0'),
])
def test_wishes_that_cannot_be_granted(net, tmp_path, kw, error, words):
    with pytest.raises(error, match=words): export_onnx(net, tmp_path/'a.onnx', **kw)
    assert not os.listdir(tmp_path)


def test_what_is_not_there(net, step, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match='expected a ReStyle model, found Encoder'): step_program(net.encoder)
    with pytest.raises(FileNotFoundError, match='no such file'): onnx_facts(tmp_path/'none.onnx')
    (tmp_path/'bad.onnx').write_bytes(step.read_bytes()[:1000])
    with pytest.raises(ExportError, match='bad.onnx: onnxruntime cannot read it'): onnx_facts(tmp_path/'bad.onnx')
    with pytest.raises(ExportError, match="computes in torch.bfloat16.*dtype='float16'"): export_onnx(tiny().bfloat16(), tmp_path/'a.onnx')
    import onnx
    m = onnx.load(step)
    del m.metadata_props[:]
    onnx.save(m, tmp_path/'foreign.onnx')
    with pytest.raises(ExportError, match='foreign.onnx: .*not one that export_onnx wrote'): onnx_facts(tmp_path/'foreign.onnx')
    monkeypatch.setattr('importlib.util.find_spec', lambda n: None)
    with pytest.raises(ExportError, match=r'onnx, onnxscript missing; pip install'): export_onnx(net, tmp_path/'a.onnx')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_from_the_gpu(net, tmp_path):
    net = tiny(width=136).cuda()
    path = export_onnx(net, tmp_path/'gpu.onnx', n_steps=1)
    assert max(check_onnx(path, net.cpu(), pictures(net), tol=1e-3).values()) < 1e-3


def test_inference_file(tmp_path):
    net = tiny(trunk='resnet34', geometry=Geometry((16, 16), (8, 8)))
    torch.save(publish_restyle(net), tmp_path/'published.pt')
    x = pictures(net)
    small, full = save_inference(tmp_path/'published.pt', tmp_path/'small'), save_inference(net, tmp_path/'full', 'float32')
    a, b, c = net.invert(x, 2), load_model(small, 'cpu').invert(x, 2), load_model(full, 'cpu').invert(x, 2)
    assert torch.equal(a.codes, c.codes)
    assert 0 < (a.codes - b.codes).abs().max() < 5e-2*a.codes.std()
    assert small.stat().st_size < .51*full.stat().st_size
    assert json.dumps('optimizer') not in small.read_bytes()[:20000].decode('latin1')
    with pytest.raises(ValueError, match="dtype is 'int8'"): save_inference(net, tmp_path/'x', 'int8')
