"""Checkpoints under their published names, built here from the published description, and what reading them costs."""
import os, subprocess, sys, time
from argparse import Namespace
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
sys.path.insert(0, str(Path(__file__).parent))
from restyle_nb.checkpoints import *
from restyle_nb.encoders import HEADS
from restyle_nb.generator import Generator
from restyle_nb.images import Geometry

GROUPS = dict(irse50=((64, 3), (128, 4), (256, 14), (512, 3)), resnet34=((64, 3), (128, 4), (256, 6), (512, 3)))
TAPS = dict(irse50=(6, 20, 23), resnet34=(6, 12, 15))
NAMES = {('irse50', 'simple'): 'BackboneEncoder', ('irse50', 'progressive'): 'ProgressiveBackboneEncoder', ('irse50', 'fpn'): 'GradualStyleEncoder',
         ('irse50', 'fpn_progressive'): 'Encoder4Editing', ('resnet34', 'simple'): 'ResNetBackboneEncoder', ('resnet34', 'fpn'): 'ResNetGradualStyleEncoder',
         ('resnet34', 'progressive'): 'ResNetProgressiveBackboneEncoder', ('resnet34', 'fpn_progressive'): 'Encoder4Editing'}


# The published layout, name by name

def norm(name, c): return {f'{name}.{k}': (c,) for k in ('weight', 'bias', 'running_mean', 'running_var')} | {f'{name}.num_batches_tracked': ()}

def units(trunk):
    "(number, channels in, channels out, stride) of every block"
    last, i = 64, 0
    for c, n in GROUPS[trunk]:
        for j in range(n):
            yield i, last, c, 2 if j == 0 and (trunk == 'irse50' or c > 64) else 1
            last, i = c, i + 1

def encoder_shapes(trunk='irse50', head='simple', k=18, d=512, channels=6, convs=4):
    s = {}
    if trunk == 'irse50': s |= {'input_layer.0.weight': (64, channels, 3, 3), **norm('input_layer.1', 64), 'input_layer.2.weight': (64,)}
    else: s |= {'conv1.weight': (64, channels, 7, 7), **norm('bn1', 64), 'relu.weight': (64,)}
    for i, a, c, _ in units(trunk):
        b = f'body.{i}'
        if trunk == 'irse50':
            if a != c: s |= {f'{b}.shortcut_layer.0.weight': (c, a, 1, 1), **norm(f'{b}.shortcut_layer.1', c)}
            s |= {**norm(f'{b}.res_layer.0', a), f'{b}.res_layer.1.weight': (c, a, 3, 3), f'{b}.res_layer.2.weight': (c,), f'{b}.res_layer.3.weight': (c, c, 3, 3),
                  **norm(f'{b}.res_layer.4', c), f'{b}.res_layer.5.fc1.weight': (c//16, c, 1, 1), f'{b}.res_layer.5.fc2.weight': (c, c//16, 1, 1)}
        else:
            s |= {f'{b}.conv1.weight': (c, a, 3, 3), **norm(f'{b}.bn1', c), f'{b}.conv2.weight': (c, c, 3, 3), **norm(f'{b}.bn2', c)}
            if a != c: s |= {f'{b}.downsample.0.weight': (c, a, 1, 1), **norm(f'{b}.downsample.1', c)}
    for j in range(k):
        n = convs + (0 if 'fpn' not in head or j < 3 else 1 if j < 7 else 2)
        for i in range(n): s |= {f'styles.{j}.convs.{2*i}.weight': (d, d if i else 512, 3, 3), f'styles.{j}.convs.{2*i}.bias': (d,)}
        s |= {f'styles.{j}.linear.weight': (d, d), f'styles.{j}.linear.bias': (d,)}
    if 'fpn' in head: s |= {f'latlayer{i}.{n}': v for i, c in ((1, 256), (2, 128)) for n, v in dict(weight=(512, c, 1, 1), bias=(512,)).items()}
    return s

def generator_shapes(size=1024, d=512, n_mlp=8, widths=None):
    ch = widths or {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128, 512: 64, 1024: 32}
    s = {f'style.{i+1}.{n}': v for i in range(n_mlp) for n, v in dict(weight=(d, d), bias=(d,)).items()} | {'input.input': (1, ch[4], 4, 4)}
    def conv(name, a, b, up=False):
        k = {f'{name}.conv.blur.kernel': (4, 4)} if up else {}
        return k | {f'{name}.conv.weight': (1, b, a, 3, 3), f'{name}.conv.modulation.weight': (a, d), f'{name}.conv.modulation.bias': (a,),
                    f'{name}.noise.weight': (1,), f'{name}.activate.bias': (b,)}
    def rgb(name, a): return {f'{name}.bias': (1, 3, 1, 1), f'{name}.conv.weight': (1, 3, a, 1, 1), f'{name}.conv.modulation.weight': (a, d), f'{name}.conv.modulation.bias': (a,)}
    s |= conv('conv1', ch[4], ch[4]) | rgb('to_rgb1', ch[4])
    L = size.bit_length() - 1
    for j in range(L - 2):
        a, b = ch[4 << j], ch[8 << j]
        s |= conv(f'convs.{2*j}', a, b, True) | conv(f'convs.{2*j+1}', b, b) | rgb(f'to_rgbs.{j}', b) | {f'to_rgbs.{j}.upsample.kernel': (4, 4)}
    return s | {f'noises.noise_{i}': (1, 1, 4 << (i+1)//2, 4 << (i+1)//2) for i in range(2*L - 3)}

def fill(shapes, seed=0):
    "Random values of a size that keeps a deep network's numbers near one"
    rng, out = torch.Generator().manual_seed(seed), {}
    for name, s in shapes.items():
        if name.endswith('num_batches_tracked'): out[name] = torch.tensor(7)
        elif name.endswith('running_var'): out[name] = torch.empty(s).uniform_(.5, 2, generator=rng)
        elif name.endswith('modulation.bias') or len(s) == 1 and name.endswith('weight'): out[name] = torch.empty(s).uniform_(.2, 1.2, generator=rng)
        elif len(s) == 4 and 'noise' not in name and 'input.input' not in name:
            out[name] = torch.empty(s).uniform_(-1, 1, generator=rng).mul_((3 / max(1, s[1]*s[2]*s[3]))**.5)
        elif name.endswith('bias') or 'running_mean' in name: out[name] = torch.empty(s).uniform_(-.1, .1, generator=rng)
        else: out[name] = torch.empty(s).uniform_(-1.7, 1.7, generator=rng)
    return out

def under(prefix, tensors): return {prefix + k: v for k, v in tensors.items()}

def checkpoint(trunk='irse50', head='simple', size=32, d=24, channels=6, convs=2, avg='kd', encoder_type=None, **opts):
    widths = {4 << j: max(8, 24 - 4*j) for j in range(9)}
    e, g = fill(encoder_shapes(trunk, head, 2*(size.bit_length() - 2), d, channels, convs)), fill(generator_shapes(size, d, 3, widths), 1)
    w = torch.empty(2*(size.bit_length() - 2), d).uniform_(-1, 1, generator=torch.Generator().manual_seed(2))
    opts = dict(dataset_type='ffhq_encode', encoder_type=encoder_type or NAMES[trunk, head], input_nc=channels, device='cuda:0', n_iters_per_batch=5) | opts
    return dict(state_dict=under('encoder.', e) | under('decoder.', g), latent_avg=w if avg == 'kd' else w[0], opts={k: v for k, v in opts.items() if v is not None})


# The published encoders, from their description, on the tensors themselves

def bn(s, name, x): return F.batch_norm(x, s[f'{name}.running_mean'], s[f'{name}.running_var'], s[f'{name}.weight'], s[f'{name}.bias'], False, 0, 1e-5)

def maps(s, trunk, x):
    "The maps after three of the blocks"
    if trunk == 'irse50': x = F.prelu(bn(s, 'input_layer.1', F.conv2d(x, s['input_layer.0.weight'], padding=1)), s['input_layer.2.weight'])
    else: x = F.prelu(bn(s, 'bn1', F.conv2d(x, s['conv1.weight'], stride=2, padding=3)), s['relu.weight'])
    taken = []
    for i, a, c, stride in units(trunk):
        b = f'body.{i}'
        if trunk == 'irse50':
            r = f'{b}.res_layer'
            short = x[..., ::stride, ::stride] if a == c else bn(s, f'{b}.shortcut_layer.1', F.conv2d(x, s[f'{b}.shortcut_layer.0.weight'], stride=stride))
            y = F.prelu(F.conv2d(bn(s, f'{r}.0', x), s[f'{r}.1.weight'], padding=1), s[f'{r}.2.weight'])
            y = bn(s, f'{r}.4', F.conv2d(y, s[f'{r}.3.weight'], stride=stride, padding=1))
            gate = F.conv2d(F.relu(F.conv2d(F.adaptive_avg_pool2d(y, 1), s[f'{r}.5.fc1.weight'])), s[f'{r}.5.fc2.weight']).sigmoid()
            x = y * gate + short
        else:
            short = x if a == c else bn(s, f'{b}.downsample.1', F.conv2d(x, s[f'{b}.downsample.0.weight'], stride=stride))
            y = bn(s, f'{b}.bn1', F.conv2d(x, s[f'{b}.conv1.weight'], stride=stride, padding=1)).relu()
            x = (bn(s, f'{b}.bn2', F.conv2d(y, s[f'{b}.conv2.weight'], padding=1)) + short).relu()
        if i in TAPS[trunk]: taken.append(x)
    return taken

def style(s, j, f):
    i = 0
    while f'styles.{j}.convs.{i}.weight' in s:
        f = F.leaky_relu(F.conv2d(f, s[f'styles.{j}.convs.{i}.weight'], s[f'styles.{j}.convs.{i}.bias'], stride=2, padding=1), .01)
        i += 2
    w = s[f'styles.{j}.linear.weight']
    return F.linear(f.flatten(1), w / w.shape[1]**.5, s[f'styles.{j}.linear.bias'])

def encode(s, trunk, head, x):
    "What the published encoder gives for x, in float64"
    s, x = {k: v.double() for k, v in s.items()}, x.double()
    c1, c2, c3 = maps(s, trunk, x)
    k = len({n.split('.')[1] for n in s if n.startswith('styles.')})
    if 'fpn' in head:
        up = lambda f, c, n: F.interpolate(f, size=c.shape[-2:], mode='bilinear', align_corners=True) + F.conv2d(c, s[f'latlayer{n}.weight'], s[f'latlayer{n}.bias'])
        p2 = up(c3, c2, 1)
        p1 = up(p2, c1, 2)
    codes = [style(s, j, c3 if 'fpn' not in head or j < 3 else p2 if j < 7 else p1) for j in range(k)]
    if 'progressive' in head: codes = [codes[0]] + [codes[0] + o for o in codes[1:]]
    return torch.stack(codes, 1)

def loop(src, trunk, head, x, n=2):
    "The published loop; pictures by our generator, which has golden numbers of its own"
    e, g = {k.removeprefix('encoder.'): v for k, v in src['state_dict'].items() if k.startswith('encoder.')}, read_generator(src).double()
    w = g.latent_avg[None].expand(len(x), -1, -1)
    for t in range(n):
        y = F.adaptive_avg_pool2d(g.synthesize(w), x.shape[-2:])
        w = w + encode(e, trunk, head, torch.cat([x.double(), y], 1) if e[('input_layer.0' if trunk == 'irse50' else 'conv1') + '.weight'].shape[1] == 6 else x)
    return w

def far(got, want):
    assert got.shape == want.shape
    return float((got.double() - want.double()).abs().max() / want.double().std())

def picture(size=(64, 64), n=2, channels=3): return torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1

@pytest.mark.parametrize('trunk,head', NAMES)
@torch.no_grad()
def test_whole_checkpoint(trunk, head):
    src, x = checkpoint(trunk, head), picture()
    net = read_restyle(src)
    assert (net.encoder.config['trunk'], net.encoder.config['head'], net.encoder.n_styles) == (trunk, head, 8)
    assert net.geometry == Geometry((64, 64), (32, 32)) and net.refines and torch.equal(net.latent_avg, src['latent_avg'])
    error = far(net.invert(x, 2).codes[-1] - net.latent_avg, loop(src, trunk, head, x) - net.latent_avg)
    print(f'\n{trunk} {head}: two steps, {error:.1e} of the spread')
    assert error <= 1e-4


# What else people have

@pytest.mark.parametrize('form,zipped', [('whole', False), ('Namespace', True), ('flat', False), ('bare', True), ('encoder alone', False), ('DataParallel', True), ('e4e coach', True)])
@pytest.mark.parametrize('head', ['simple', 'fpn_progressive'])
def test_forms(tmp_path, form, zipped, head):
    src = checkpoint('resnet34', head)
    e, told = {k: v for k, v in src['state_dict'].items() if k.startswith('encoder.')}, None if head != 'fpn_progressive' or form in ('whole', 'Namespace', 'e4e coach') else head
    extra = dict(global_step=7, optimizer=dict(state={0: dict(exp_avg=torch.zeros(3), step=torch.tensor(1.))}, param_groups=[dict(lr=1e-4)]), best_val_loss=torch.tensor(.1),
                 discriminator_state_dict={'mlp.0.weight': torch.zeros(2, 2)}, discriminator_optimizer_state_dict=dict(state={}))
    form_of = {'whole': src, 'Namespace': src | dict(opts=Namespace(**src['opts'])), 'flat': src['state_dict'], 'bare': {k[8:]: v for k, v in e.items()},
               'encoder alone': e, 'DataParallel': under('module.', src['state_dict']), 'e4e coach': src | extra}[form]
    want = read_encoder(src)
    torch.save(form_of, tmp_path/'c.pt', _use_new_zipfile_serialization=zipped)
    for o in (form_of, tmp_path/'c.pt'):
        got = read_encoder(o, head=told)
        assert got.config == want.config == dict(want.config, head=head)
        assert all(torch.equal(a, b) for a, b in zip(got.state_dict().values(), want.state_dict().values()))
    if form in ('whole', 'flat', 'e4e coach'):
        g = read_generator(tmp_path/'c.pt')
        assert torch.equal(g.const, src['state_dict']['decoder.input.input']) and g.config['n_mlp'] == 3

@pytest.mark.parametrize('trunk,head', [('irse50', 'fpn_progressive'), ('irse50', 'simple'), ('resnet34', 'progressive'), ('resnet34', 'fpn')])
def test_round_trip(tmp_path, trunk, head):
    src = checkpoint(trunk, head)
    out = publish_restyle(read_restyle(src))
    a, b = src['state_dict'], out['state_dict']
    assert out['opts']['encoder_type'] == NAMES[trunk, head] and torch.equal(out['latent_avg'], src['latent_avg'])
    assert a.keys() == b.keys()
    for k in a: assert k.endswith(('.kernel', 'num_batches_tracked')) or torch.equal(a[k], b[k]), k
    torch.save(out, tmp_path/'out.pt')
    again = read_restyle(tmp_path/'out.pt')
    for p, q in zip(again.state_dict().values(), read_restyle(out).state_dict().values()): assert torch.equal(p, q)
    mine = read_restyle(save_restyle(again, tmp_path/'own.safetensors'))
    assert mine.encoder.config == again.encoder.config and mine.geometry == again.geometry
    for p, q in zip(mine.state_dict().values(), again.state_dict().values()): assert torch.equal(p, q)

@torch.no_grad()
@pytest.mark.parametrize('head,start,absolute', [('fpn', False, True), ('fpn', True, False), ('fpn', None, False), ('fpn_progressive', False, False)])
def test_single_pass(tmp_path, head, start, absolute):
    "pSp may give codes themselves; e4e never does"
    src, x = checkpoint('irse50', head, channels=3, n_iters_per_batch=None, start_from_latent_avg=start, label_nc=0), picture()
    net = read_restyle(src)
    avg = src['latent_avg'] * (0 if absolute else 1)
    e = {k.removeprefix('encoder.'): v for k, v in src['state_dict'].items() if k.startswith('encoder.')}
    assert not net.refines and torch.equal(net.latent_avg, avg) and torch.equal(net.generator.latent_avg, src['latent_avg'])
    assert far(net.invert(x, 1).codes[-1], avg + encode(e, 'irse50', head, x)) <= 1e-4
    for again in (read_restyle(publish_restyle(net)), read_restyle(save_restyle(net, tmp_path/'n.safetensors'))):
        assert torch.equal(again.latent_avg, avg) and torch.equal(again.generator.latent_avg, src['latent_avg'])

def test_restyle_always_adds_the_average():
    "its flag start_from_latent_avg has no effect on the codes"
    src = checkpoint('resnet34', 'simple', start_from_latent_avg=False)
    assert torch.equal(read_restyle(src).latent_avg, src['latent_avg'])
    src = checkpoint('resnet34', 'simple', channels=3, start_from_latent_avg=False)
    assert torch.equal(read_restyle(src).latent_avg, src['latent_avg'])

@torch.no_grad()
@pytest.mark.parametrize('channels', [1, 6, 19])
def test_label_maps(channels):
    "Translation is no inversion; both halves can be had, and the message says how"
    src = checkpoint('irse50', 'fpn', channels=channels, n_iters_per_batch=None, label_nc=channels, start_from_latent_avg=True)
    with pytest.raises(CheckpointError, match=f'takes {channels} channels, the generator paints 3.*read_generator') as e: read_restyle(src)
    assert '\n' not in str(e.value)
    e, g, x = read_encoder(src), read_generator(src), picture(channels=channels)
    codes = {k.removeprefix('encoder.'): v for k, v in src['state_dict'].items() if k.startswith('encoder.')}
    assert far(e(x), encode(codes, 'irse50', 'fpn', x)) <= 1e-4
    assert g.synthesize(g.latent_avg + e(x)).shape == (2, 3, 32, 32)

def test_cars_of_every_head():
    for head in ('simple', 'fpn', 'fpn_progressive'):
        net = read_restyle(checkpoint('resnet34', head, convs=4, dataset_type='cars_encode', size=32))
        assert net.geometry == Geometry((192, 256), (32, 32), (4, 0, 28, 32))
        assert read_restyle(publish_restyle(net)).geometry == net.geometry

def test_one_average_for_all_styles():
    src = checkpoint('resnet34', 'simple', avg='d')
    assert torch.equal(read_restyle(src).latent_avg, src['latent_avg'].expand(8, 24))
    src.pop('latent_avg')
    net = read_restyle(src)
    notes = net.generator.provenance
    assert notes['latent_avg'] == 'estimated from 10000 samples, seed 0' and net.generator.has_latent_avg
    g, rng = net.generator.double(), torch.Generator().manual_seed(5)
    w = g.map(torch.randn(40000, 24, generator=rng, dtype=torch.double))
    error = w.std(0).square().mean().sqrt().item() / 100
    assert abs(notes['latent_avg_error'] / error - 1) < .05
    assert (g.latent_avg[0] - w.mean(0)).square().mean().sqrt() < 2 * error

def test_encoders_into_w_are_refused():
    for last in ({'linear.weight': torch.zeros(512, 512)}, {'output_layer_2.3.weight': torch.zeros(512, 512*49), 'linear.weight': torch.zeros(9, 9)}):
        src = {k: v for k, v in fill(encoder_shapes(k=1, channels=3)).items() if not k.startswith('styles')} | last
        for s in (src, {'state_dict': under('encoder.', src)}):
            with pytest.raises(CheckpointError, match='an encoder into W'): read_encoder(s)

def test_heads_that_cannot_be():
    bare = {k: v for k, v in checkpoint('resnet34', 'simple')['state_dict'].items() if k.startswith('encoder.')}
    for head, words in (('fpn', 'latlayer1'), ('fpn_progressive', 'latlayer1'), ('w', 'no head')):
        with pytest.raises(CheckpointError, match=words): read_encoder(bare, head=head)
    assert read_encoder(bare).config['head'] == 'simple' and read_encoder(bare, head='progressive').config['head'] == 'progressive'
    fpn = {k: v for k, v in checkpoint('resnet34', 'fpn')['state_dict'].items() if k.startswith('encoder.')}
    assert read_encoder(fpn).config['head'] == 'fpn' and read_encoder(fpn, head='progressive').config['head'] == 'fpn_progressive'
    for gone in ('encoder.latlayer2.bias', 'encoder.styles.4.convs.2.weight', 'encoder.styles.5.linear.bias'):
        with pytest.raises(CheckpointError, match=gone.removeprefix('encoder.')): read_encoder({k: v for k, v in fpn.items() if k != gone})


# Trunks

@pytest.mark.parametrize('trunk', ['irse50', 'resnet34'])
def test_read_trunk(tmp_path, trunk):
    src = checkpoint(trunk, 'fpn')
    want = {k.removeprefix('encoder.'): v for k, v in src['state_dict'].items() if k.startswith('encoder.') and 'styles' not in k and 'latlayer' not in k}
    own, torch_file = save_restyle(read_restyle(src), tmp_path/'n.safetensors'), tmp_path/'n.pt'
    torch.save(src, torch_file)
    for o in (src, own, torch_file, save_encoder(read_encoder(src), tmp_path/'e.safetensors'), under('encoder.', want), want):
        got = read_trunk(o)
        assert got.keys() == want.keys() and all(k.endswith('tracked') or torch.equal(got[k], want[k]) for k in want)

def test_read_trunk_of_recognition_networks():
    from torchvision.models import resnet34
    state = resnet34().state_dict()
    got = read_trunk(state)
    assert torch.equal(got['body.3.downsample.0.weight'], state['layer2.0.downsample.0.weight']) and torch.equal(got['body.15.conv2.weight'], state['layer4.2.conv2.weight'])
    assert (got['relu.weight'] == .25).all() and not any(k.startswith('fc') for k in got)
    face = {k: v for k, v in fill(encoder_shapes(k=1, channels=3)).items() if not k.startswith('styles')}
    assert read_trunk(face | {'output_layer.3.weight': torch.zeros(2, 2)}).keys() == face.keys()
    with pytest.raises(CheckpointError, match='trunk'): read_trunk({'const': torch.zeros(3)})


# Generators under NVIDIA's names

def nvidia_state_of(src):
    from restyle_nb.nvidia import publish_nvidia
    g = read_generator(src)
    g.latent_avg.copy_(g.latent_avg[:1].expand_as(g.latent_avg))
    return publish_nvidia(g), g

@torch.no_grad()
@pytest.mark.parametrize('form', ['bare', 'G_ema.', 'decoder.', 'pickle', 'torch file'])
def test_same_network_through_both_names(tmp_path, form):
    from test_hostile import nvidia_like
    src = checkpoint('resnet34', 'simple')
    theirs, g = nvidia_state_of(src)
    if form == 'pickle': nvidia_like(o := tmp_path/'net.pkl', dict(_parameters={}, _buffers=theirs, _modules={}, _init_kwargs=dict(z_dim=24, c_dim=0, w_dim=24, img_resolution=32, img_channels=3)))
    elif form == 'torch file': torch.save({'G_ema': theirs}, o := tmp_path/'net.pt')
    elif form == 'decoder.': o = under('encoder.', {k[8:]: v for k, v in src['state_dict'].items() if k.startswith('encoder.')}) | under('decoder.', theirs)
    else: o = theirs if form == 'bare' else under(form, theirs)
    got = read_generator(o)
    w = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(4))
    assert far(got.synthesize(w), g.synthesize(w)) <= 1e-5 and far(got.map(w[:, 0]), g.map(w[:, 0])) <= 1e-5
    assert torch.equal(got.latent_avg, g.latent_avg) and got.provenance == {'latent_avg': 'stored as mapping.w_avg'}
    if form == 'decoder.':
        net = read_restyle(o)
        assert torch.equal(net.generator.const, got.const) and torch.equal(net.latent_avg, got.latent_avg)

@pytest.mark.parametrize('change,words', [({'synthesis.input.weight': torch.zeros(3, 3)}, 'StyleGAN3'), ({'mapping.embed.weight': torch.zeros(24, 10)}, 'class-conditional')])
def test_relatives_are_refused(change, words):
    src = checkpoint('resnet34', 'simple')
    theirs, _ = nvidia_state_of(src)
    whole = {k: v for k, v in src['state_dict'].items() if k.startswith('encoder.')} | under('decoder.', theirs | change)
    for read, o in ((read_generator, theirs | change), (read_restyle, whole)):
        with pytest.raises(CheckpointError, match=words) as e: read(o)
        assert '\n' not in str(e.value)

def test_no_average_under_nvidias_names():
    theirs, g = nvidia_state_of(checkpoint('resnet34', 'simple'))
    del theirs['mapping.w_avg']
    notes = read_generator(theirs).provenance
    assert notes['latent_avg'].startswith('estimated') and notes['latent_avg_error'] > 0


# What is read, and what it costs

def test_only_what_is_asked_for(tmp_path, monkeypatch):
    "The generator of a checkpoint is read without its encoder and its optimiser"
    src = checkpoint('resnet34', 'simple') | dict(optimizer=dict(state={0: dict(exp_avg=torch.zeros(1000))}))
    torch.save(src, tmp_path/'c.pt')
    read, seen = Stored.read, []
    monkeypatch.setattr(Stored, 'read', lambda self: seen.append(self.nbytes) or read(self))
    read_generator(tmp_path/'c.pt')
    assert sum(seen) == sum(v.nbytes for k, v in src['state_dict'].items() if k.startswith('decoder.') and 'kernel' not in k) + src['latent_avg'].nbytes
    seen.clear()
    part = open_weights(tmp_path/'c.pt', part='optimizer.').tensors
    assert list(part) == ['optimizer.state.0.exp_avg'] and seen == [4000]
    assert 'optimizer.state.0.exp_avg' not in open_weights(tmp_path/'c.pt').tensors

def test_a_mapping_stays_whole():
    src = checkpoint('resnet34', 'fpn')
    before = {k: v.clone() for k, v in src['state_dict'].items()}
    net = read_restyle(src)
    with torch.no_grad():
        for p in net.parameters(): p.zero_()
    assert src['state_dict'].keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in src['state_dict'].items())

BUILD = '''
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_published import encoder_shapes, generator_shapes, NAMES
trunk, head, size, path, form = sys.argv[2:]
k, rng = 2*(int(size).bit_length() - 2), torch.Generator().manual_seed(0)
pool = torch.empty(2**23).uniform_(.01, .02, generator=rng)
def value(name, s): return torch.tensor(1) if name.endswith('tracked') else pool[:torch.Size(s).numel()].clone().view(s)
state = {p + n: value(n, s) for p, shapes in (('encoder.', encoder_shapes(trunk, head, k)), ('decoder.', generator_shapes(int(size)))) for n, s in shapes.items()}
out = dict(state_dict=state, latent_avg=torch.ones(k, 512), opts=dict(encoder_type=NAMES[trunk, head], dataset_type='ffhq_encode'))
if form == 'own':
    from restyle_nb.checkpoints import read_restyle, save_restyle
    save_restyle(read_restyle(out), path)
else: torch.save(out, path, _use_new_zipfile_serialization=form == 'zip')
'''
READ = '''
import os, resource, sys, time
import torch
from restyle_nb.checkpoints import read_generator, read_restyle
def status(key):
    with open('/proc/self/status') as f: return next(int(l.split()[1]) * 1024 for l in f if l.startswith(key))
try:
    with open('/proc/self/clear_refs', 'w') as f: f.write('5')
    before, peak = status('VmRSS'), lambda: status('VmHWM')
except OSError: # no such switch in this kernel: the highest so far
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = peak()
start = time.perf_counter()
net = (read_restyle if sys.argv[2] == 'whole' else read_generator)(sys.argv[1])
print((peak() - before) / os.path.getsize(sys.argv[1]), time.perf_counter() - start, net.latent_avg.shape[0])
'''

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='measures memory through /proc')
@pytest.mark.parametrize('trunk,head,size,form', [('irse50', 'simple', 1024, 'zip'), ('resnet34', 'simple', 256, 'legacy'), ('irse50', 'fpn', 64, 'own')])
def test_memory(tmp_path, trunk, head, size, form):
    "Reading takes little more memory than the file is long, and a part of a file takes a part of it"
    path, run = tmp_path/'big.pt', lambda *a: subprocess.run([sys.executable, '-c', *map(str, a)], check=True, capture_output=True, text=True).stdout
    try:
        run(BUILD, Path(__file__).parent, trunk, head, size, path, form)
        megabytes = path.stat().st_size / 1e6
        whole, part = [[float(o) for o in run(READ, path, what).split()] for what in ('whole', 'generator')]
    finally: path.unlink(missing_ok=True)
    print(f'\n{trunk} {head} {size} ({form}): {megabytes:.0f} MB read in {whole[1]:.1f} s, at most {whole[0]:.2f} of the file in memory; its generator: {part[1]:.1f} s, {part[0]:.2f}')
    assert whole[0] <= 1.3 and part[0] < .6 and whole[2] == part[2] == 2*(size.bit_length() - 2)
    if size == 1024: assert 940 < megabytes < 970


def test_a_mapping_with_another_learning_rate_is_published_whole():
    "rosinality's names have no place for `mapping_lr`, so it goes into the numbers"
    torch.manual_seed(0)
    g = Generator(size=16, style_dim=12, n_mlp=2, channels={4: 8, 8: 8, 16: 8}, mapping_lr=1.)
    g.estimate_latent_avg(100)
    z, h = torch.randn(5, 12), read_generator(publish_generator(g))
    assert h.config['mapping_lr'] == .01
    assert (h.map(z) - g.map(z)).abs().max() <= 1e-5*g.map(z).std()


def test_wrapped_in_data_parallel_with_its_optimiser():
    "What only training needs is set aside before the common `module.` is taken off"
    source = look(dict(state_dict={'module.a.weight': torch.ones(2)}, optimizer=dict(state={0: dict(exp_avg=torch.zeros(2))})))
    assert list(source.tensors) == ['a.weight'] and list(source.training) == ['optimizer.state.0.exp_avg']
