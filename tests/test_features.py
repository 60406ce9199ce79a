"""Networks that look: the golden cases, the layouts of the published files, and files that are something else."""
import sys
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from restyle_nb.checkpoints import CheckpointError
from restyle_nb.features import FACE_BOX, FaceNet, LatentDiscriminator, MoCoNet, as_rgb, face_crop, read_face_net, read_latent_discriminator, read_moco

sys.path.insert(0, str(Path(__file__).parent/'golden'))
from fill import case, tensor

BAR = 1e-4

def golden(name): return [{k: torch.as_tensor(v) for k, v in o.items()} for o in case(name)]
def error(got, want): return ((got.detach() - want).abs().max()/want.std()).item()

def rule(name, shape):
    "As the golden cases fill a tensor of this name"
    if name.endswith('num_batches_tracked'): return 'zero'
    if name.endswith('running_var'): return 'var'
    if len(shape) > 1: return 'he'
    return 'gain' if name.endswith('weight') else 'small'

def filled(make, prefix=''):
    "The tensors of a network under their names, random"
    with torch.device('meta'): shapes = {k: tuple(v.shape) for k, v in make().state_dict().items()}
    return {prefix + k: torch.as_tensor(tensor(k, s, rule(k, s))) for k, s in shapes.items()}

@pytest.fixture(scope='module')
def face_file(): return golden('arcface_irse50')[0]

@pytest.fixture(scope='module')
def face_net(face_file): return read_face_net(face_file)

@pytest.fixture(scope='module')
def moco_file(): return filled(MoCoNet)

def test_golden_face_net(face_net):
    _, inputs, want = golden('arcface_irse50')
    f = face_net(face_crop(inputs['in.y']))
    e, s = error(f, want['features']), abs((f[0] @ f[1]) - want['similarity']).item()
    print(f'features {e:.1e} of the spread, similarity off by {s:.1e}')
    assert e <= BAR and s <= BAR*want['features'].std()
    assert error(face_net(face_crop(inputs['in.y'][1:])), want['features'][1:]) <= BAR

def test_golden_latent_discriminator():
    tensors, inputs, want = golden('latent_discriminator')
    d = read_latent_discriminator(tensors)
    e = error(d(inputs['in.w']), want['logits'][:, 0])
    print(f'scores {e:.1e} of the spread')
    assert e <= BAR and d(inputs['in.w'][:, None]).shape == (4, 1)

def plain_face_net(t, x):
    "The face network written out from the names in its file, one operation after the other"
    def bn(h, n):
        return F.batch_norm(h, t[n + '.running_mean'], t[n + '.running_var'], t.get(n + '.weight'), t.get(n + '.bias'))
    h = F.prelu(bn(F.conv2d(x, t['input_layer.0.weight'], padding=1), 'input_layer.1'), t['input_layer.2.weight'])
    i = 0
    while f'body.{i}.res_layer.1.weight' in t:
        r, s = f'body.{i}.res_layer.', f'body.{i}.shortcut_layer.'
        stride = 2 if i == 0 or s + '0.weight' in t else 1
        short = bn(F.conv2d(h, t[s + '0.weight'], stride=2), s + '1') if s + '0.weight' in t else h[..., ::stride, ::stride]
        h = F.conv2d(bn(h, r + '0'), t[r + '1.weight'], padding=1)
        h = bn(F.conv2d(F.prelu(h, t[r + '2.weight']), t[r + '3.weight'], stride=stride, padding=1), r + '4')
        if r + '5.fc1.weight' in t:
            gate = F.conv2d(F.relu(F.conv2d(h.mean((2, 3), True), t[r + '5.fc1.weight'])), t[r + '5.fc2.weight'])
            h = h*gate.sigmoid()
        h, i = h + short, i + 1
    h = F.linear(bn(h, 'output_layer.0').flatten(1), t['output_layer.3.weight'], t['output_layer.3.bias'])
    h = bn(h, 'output_layer.4')
    return h/h.square().sum(1, keepdim=True).sqrt()

def curricular():
    "IR-101 as published: units 3, 13, 30, 3, no gates, a last norm without weight and bias"
    def bn(n, c, affine=True):
        names = dict(running_mean=(c,), running_var=(c,), num_batches_tracked=()) | (dict(weight=(c,), bias=(c,)) if affine else {})
        return {f'{n}.{k}': s for k, s in names.items()}
    shapes, last, i = {'input_layer.0.weight': (64, 3, 3, 3), 'input_layer.2.weight': (64,), **bn('input_layer.1', 64)}, 64, 0
    for c, n in ((64, 3), (128, 13), (256, 30), (512, 3)):
        for _ in range(n):
            r = f'body.{i}.res_layer.'
            shapes |= {**bn(r + '0', last), r + '1.weight': (c, last, 3, 3), r + '2.weight': (c,), r + '3.weight': (c, c, 3, 3), **bn(r + '4', c)}
            if last != c: shapes |= {f'body.{i}.shortcut_layer.0.weight': (c, last, 1, 1), **bn(f'body.{i}.shortcut_layer.1', c)}
            last, i = c, i + 1
    shapes |= {**bn('output_layer.0', 512), 'output_layer.3.weight': (512, 25088), 'output_layer.3.bias': (512,), **bn('output_layer.4', 512, False)}
    return {k: torch.as_tensor(tensor(k, s, rule(k, s))) for k, s in shapes.items()}

def test_curricular_face_layout():
    t = curricular()
    net, x = read_face_net({'state_dict': {'module.' + k: v for k, v in t.items()}}), torch.rand(1, 3, 112, 112)*2 - 1
    assert set(net.state_dict()) == set(t) and len(net.body) == 49
    assert error(net(x), plain_face_net(t, x)) <= BAR

def test_face_net_equals_its_definition_in_float64_with_gradient(face_file):
    t = {k: v.double() for k, v in face_file.items()}
    net, rng = read_face_net(face_file).double(), torch.Generator().manual_seed(0)
    x, v = torch.rand(1, 3, 112, 112, generator=rng).double()*2 - 1, torch.randn(1, 3, 112, 112, generator=rng).double()
    x.requires_grad_()
    f = net(x)
    torch.testing.assert_close(f, plain_face_net(t, x.detach()), rtol=1e-9, atol=1e-11)
    f[:, :256].sum().backward()
    with torch.no_grad(): slope = ((plain_face_net(t, x + 1e-6*v) - plain_face_net(t, x - 1e-6*v))[:, :256].sum()/2e-6)
    torch.testing.assert_close((x.grad*v).sum(), slope, rtol=1e-5, atol=1e-9)
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())

def test_a_file_on_disk_and_a_half_file(face_file, face_net, tmp_path):
    torch.save(face_file, tmp_path/'model_ir_se50.pth')
    state = torch.get_rng_state()
    net, x = read_face_net(tmp_path/'model_ir_se50.pth'), torch.rand(1, 3, 112, 112)*2 - 1
    torch.set_rng_state(state)
    read_face_net(tmp_path/'model_ir_se50.pth')
    assert torch.equal(state, torch.get_rng_state()), 'reading took random numbers'
    assert torch.equal(net(x), face_net(x))
    half = read_face_net({k: v.half() if v.is_floating_point() else v for k, v in face_file.items()})
    assert half.output_layer[3].weight.dtype == torch.float32 and (half(x) - net(x)).abs().max() < .01

def test_looking_networks_stay_still(face_net, moco_file):
    for net in (face_net, read_moco(moco_file)):
        before = {k: v.clone() for k, v in net.state_dict().items()}
        net.train()
        assert not net.training and not any(m.training for m in net.modules())
        net(torch.randn(2, 3, 112, 112))
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

def test_wrong_face_files(face_file, tmp_path):
    trunk = {k: v for k, v in face_file.items() if not k.startswith('output_layer')}
    encoder = trunk | {'input_layer.0.weight': torch.zeros(64, 6, 3, 3), 'styles.0.linear.weight': torch.zeros(512, 512)}
    bad = [(trunk, r"without its last layer \('output_layer.3.weight' is missing\)"),
           (encoder, 'an encoder, which looks for codes'),
           (dict(state_dict={'encoder.' + k: v for k, v in encoder.items()}, opts={}), 'an encoder, which looks for codes'),
           ({k: v for k, v in face_file.items() if k != 'output_layer.4.running_mean'}, "'output_layer.4.running_mean': missing"),
           (face_file | {'output_layer.3.weight': torch.zeros(512, 512)}, r"'output_layer.3.weight': expected \(512, 25088\), found \(512, 512\)"),
           (face_file | {'body.1.res_layer.1.weight': face_file['body.1.res_layer.1.weight']*float('nan')}, "'body.1.res_layer.1.weight': holds NaN"),
           (face_file | {'fc.weight': torch.zeros(3)}, "'fc.weight': unknown"),
           ({k: v for k, v in face_file.items() if not k.startswith('body.23')}, '23 units, expected 24'),
           ({'layer1.0.conv1.weight': torch.zeros(3)}, "no face network .* in it"),
           ({f'{p}.{k}': v for p in 'ab' for k, v in face_file.items()}, 'several of them: a., b.')]
    for src, message in bad:
        with pytest.raises(CheckpointError, match=message): read_face_net(src)
    (tmp_path/'page.pth').write_text('<!DOCTYPE html><html><body>' + 'Google Drive - Quota exceeded '*20)
    (tmp_path/'text.pth').write_text('weights '*20)
    (tmp_path/'cut.pth').write_bytes(b'PK\x03\x04' + bytes(200))
    for name, message in dict(page='a web page, not weights', text='neither safetensors nor a PyTorch file', cut='damaged', none='no such file').items():
        for read in (read_face_net, read_moco, read_latent_discriminator):
            with pytest.raises(CheckpointError, match=f'{name}.pth: .*{message}'): read(tmp_path/f'{name}.pth')

def test_crop():
    y = torch.randn(2, 3, 256, 256)
    assert FACE_BOX == (35, 223, 32, 220) and torch.equal(face_crop(y), F.adaptive_avg_pool2d(y[:, :, 35:223, 32:220], 112))
    for size in ((64, 64), (192, 256), (1024, 1024)):
        y = torch.arange(size[0])[:, None]/size[0]*256 + torch.zeros(1, 1, *size)
        assert face_crop(y).shape == (1, 1, 112, 112) and abs(face_crop(y).mean() - 129) < 256/min(size)
    for box in ((0, 257, 0, 10), (10, 10, 0, 5), (-1, 5, 0, 5), (0, 256, 200, 100)):
        with pytest.raises(ValueError, match='does not lie in'): face_crop(y, box)

@pytest.mark.parametrize('channels', [1, 3, 4])
def test_other_pictures(face_net, channels):
    x = torch.rand(1, channels, 64, 48)*2 - 1
    f = face_net(face_crop(as_rgb(x)))
    assert f.shape == (1, 512) and abs(f.norm() - 1) < 1e-5
    with pytest.raises(ValueError, match='got 2 channels'): as_rgb(x[:, :1].expand(-1, 2, -1, -1))
    with pytest.raises(ValueError, match='face_crop'): face_net(x)

def published_moco(file):
    "As the MoCo-v2 authors save it"
    query = {'module.encoder_q.' + k: v for k, v in file.items()}
    keys = {'module.encoder_k.' + k: v + 1 for k, v in file.items()}
    ends = {f'module.encoder_{o}.fc.{n}': torch.zeros(*s) for o in 'qk' for n, s in {'0.weight': (2048, 2048), '0.bias': (2048,), '2.weight': (128, 2048), '2.bias': (128,)}.items()}
    return dict(epoch=800, arch='resnet50', state_dict=query | keys | ends | {'module.queue': torch.randn(128, 65536), 'module.queue_ptr': torch.zeros(1, dtype=torch.long)},
                optimizer=dict(state={0: dict(momentum_buffer=torch.zeros(3))}, param_groups=[dict(lr=.03)]))

def test_moco_file(moco_file):
    from torchvision.models import resnet50
    net, x = read_moco(published_moco(moco_file)), torch.rand(3, 3, 96, 80)*2 - 1
    assert len(moco_file) == 318 and set(net.state_dict()) == set(moco_file)
    plain = resnet50()
    plain.load_state_dict(moco_file, strict=False)
    plain.fc = torch.nn.Identity()
    with torch.no_grad(): want = plain.eval()(F.interpolate(x, size=(224, 224)))
    assert error(net(x), want/want.norm(dim=1, keepdim=True)) <= BAR
    for i in range(3): assert net(x[i:i+1]).shape == (1, 2048) and error(net(x[i:i+1]), net(x)[i:i+1]) <= BAR
    assert torch.equal(read_moco(moco_file | {'fc.weight': torch.zeros(1000, 2048), 'fc.bias': torch.zeros(1000)})(x), net(x))

def test_wrong_moco_files(moco_file):
    bad = [({k: v for k, v in moco_file.items() if 'conv3' not in k}, 'no ResNet50 in it'),
           ({'encoder.' + k: v for k, v in moco_file.items()}, 'no ResNet50 in it'),
           ({'module.encoder_q.' + k: v for k, v in moco_file.items() if k != 'layer4.2.bn3.bias'}, "'encoder_q.layer4.2.bn3.bias': missing"),
           (moco_file | {'layer5.weight': torch.zeros(3)}, "'layer5.weight': unknown")]
    for src, message in bad:
        with pytest.raises(CheckpointError, match=message): read_moco(src)

def test_latent_discriminator_files(tmp_path):
    torch.manual_seed(0)
    d, w = LatentDiscriminator(12, 20, 3), torch.randn(5, 7, 12)
    torch.save(dict(state_dict={'encoder.input_layer.0.weight': torch.zeros(64, 6, 3, 3)}, opts={}, latent_avg=torch.zeros(7, 12), global_step=3,
                    discriminator_state_dict=d.state_dict(), discriminator_optimizer_state_dict=dict(state={}, param_groups=[])), tmp_path/'iteration_3.pt')
    torch.save({'discriminator.' + k: v for k, v in d.state_dict().items()}, tmp_path/'bare.pt')
    for src in (tmp_path/'iteration_3.pt', tmp_path/'bare.pt', d.state_dict()): assert torch.equal(read_latent_discriminator(src)(w), d(w))
    bad = [({'mlp.0.weight': torch.zeros(4, 4)}, "'mlp.0.bias': missing"), ({'mlp.0.weight': torch.zeros(4)}, 'expected a matrix'),
           ({'encoder.x': torch.zeros(1)}, 'no latent discriminator in it'),
           (d.state_dict() | {'mlp.2.weight': torch.zeros(20, 21)}, r"'mlp.2.weight': expected \(20, 20\), found \(20, 21\)")]
    for src, message in bad:
        with pytest.raises(CheckpointError, match=message): read_latent_discriminator(src)
