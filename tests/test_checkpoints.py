"""Files that are right in odd ways, and files that are wrong: the reader must tell them apart and say why."""
import io, json, os, pickle, struct, zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from restyle_nb.checkpoints import *
from restyle_nb.encoders import build_encoder
from restyle_nb.generator import Generator
from restyle_nb.images import CARS, Geometry
from restyle_nb.restyle import ReStyle


def small_generator(size=32, channels=None, **kw):
    torch.manual_seed(0)
    channels = channels or {4 << j: max(8, 24 - 4*j) for j in range(9)}
    g = Generator(size=size, style_dim=24, n_mlp=2, channels=channels, **kw).requires_grad_(False)
    for c in g.convs: c.noise_strength.fill_(.3); c.bias.normal_()
    g.estimate_latent_avg(500)
    return g

def compact_net(g=None):
    g = g or small_generator()
    return ReStyle(build_encoder('compact', n_styles=g.n_styles, style_dim=24, image_channels=g.image_channels,
                                 input_size=32, widths=(8, 8, 8, 8)), g).eval()

@pytest.fixture(scope='module')
def g(): return small_generator()

@pytest.fixture(scope='module')
def net(): return compact_net()

@pytest.fixture(scope='module')
def published(g): return publish_generator(g)

@pytest.fixture(scope='module')
def released(g):
    "A whole checkpoint with a real trunk and narrow codes"
    e = build_encoder('resnet34', n_styles=8, style_dim=24, width=24)
    return publish_restyle(ReStyle(e, g, Geometry((256, 256), (32, 32))), dataset_type='church_encode', encoder_type='ResNetBackboneEncoder')

def picture(g, seed=1): return g(torch.randn(2, g.z_dim, generator=torch.Generator().manual_seed(seed)))

def refused(read, *words):
    with pytest.raises(CheckpointError) as e: read()
    text = str(e.value)
    assert '\n' not in text and len(text) < 800
    for w in words: assert w in text, (w, text)
    return text


def test_what_is_no_model_is_called_what_it_is(g, published, net, tmp_path):
    save_generator(g, tmp_path/'g.safetensors')
    for src in (tmp_path/'g.safetensors', published):
        for read in (read_restyle, read_encoder): refused(lambda: read(src), 'a generator without an encoder', 'restyle_train')
    torch.save(dict(encoder=net.encoder.state_dict(), iteration=3), tmp_path/'best.pt')
    for read in (read_restyle, read_encoder): refused(lambda: read(tmp_path/'best.pt'), 'a checkpoint of a training', 'the folder of the run')
    refused(lambda: read_restyle(tmp_path), 'is a folder', 'model.safetensors')


# Our own files

@pytest.mark.parametrize('half', [False, True])
def test_own_files_come_back(net, tmp_path, half):
    path = save_restyle(net, tmp_path/'new'/'net.safetensors', half, note='x')
    save_encoder(net, tmp_path/'e.safetensors', half=half); save_generator(net.generator, tmp_path/'g.safetensors', half)
    x = torch.rand(2, 3, 32, 32)*2 - 1
    want = net.invert(x, 2).codes
    for n in (read_restyle(path), read_restyle(tmp_path/'e.safetensors', generator=tmp_path/'g.safetensors')):
        got = n.invert(x, 2).codes
        assert torch.equal(got, want) if not half else (got - want).abs().max() < 5e-3*want.std() + 5e-3
        assert n.geometry == net.geometry and torch.equal(n.latent_avg, net.latent_avg)
        assert all(p.dtype == torch.float32 for p in n.parameters())
    assert open_weights(path).header['note'] == 'x'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['e.safetensors', 'g.safetensors', 'new']

def test_same_model_same_bytes(net, tmp_path):
    a, b = save_restyle(net, tmp_path/'a.safetensors'), save_restyle(net, tmp_path/'b.safetensors')
    assert a.read_bytes() == b.read_bytes()

def test_own_average_of_a_net_survives(net, tmp_path):
    mine = ReStyle(net.encoder, net.generator, latent_avg=net.latent_avg + 1)
    again = read_restyle(save_restyle(mine, tmp_path/'n.safetensors'))
    assert torch.equal(again.latent_avg, net.latent_avg + 1)

def test_failed_write_keeps_the_old_file(g, tmp_path, monkeypatch):
    path = save_generator(g, tmp_path/'g.safetensors'); before = path.read_bytes()
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setitem(write_weights.__globals__, 'save_file', full)
    refused(lambda: save_generator(g, path), 'g.safetensors', 'No space left')
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['g.safetensors']

def test_folder_that_cannot_be(g, tmp_path):
    (tmp_path/'file').write_text('x')
    refused(lambda: save_generator(g, tmp_path/'file'/'g.safetensors'), 'cannot be written')

def test_wrong_kind(net, tmp_path):
    p = save_encoder(net, tmp_path/'e.safetensors')
    refused(lambda: read_generator(p), "holds 'encoder'", 'read_encoder')
    refused(lambda: read_restyle(p), 'generator=')

def test_folded_encoder_is_not_saved(tmp_path):
    e = build_encoder('resnet34', n_styles=2, style_dim=8, width=8).fold()
    refused(lambda: save_encoder(e, tmp_path/'e.safetensors'), 'folded')

@pytest.mark.parametrize('header', ['no json', '[]', '{}', '{"format":1,"kind":"virus","config":{}}', '{"format":1,"kind":"generator","config":3}',
                                    '{"format":99,"kind":"generator","config":{}}', '{"format":1,"kind":"generator","config":{"size":1e30}}',
                                    '{"format":1,"kind":"generator","config":{"n_mlp":1000000000}}', '{"format":1,"kind":"generator","config":{"exec":1}}',
                                    '{"format":1,"kind":"restyle","config":{}}'])
def test_bad_headers(tmp_path, header):
    save_file({'const': torch.zeros(20)}, tmp_path/'g.safetensors', metadata={'restyle_nb': header})
    refused(lambda: read_generator(tmp_path/'g.safetensors'), 'g.safetensors')

def test_never_silently_zero(tmp_path):
    g = small_generator(); g.latent_avg.zero_()
    again = read_generator(save_generator(g, tmp_path/'g.safetensors'))
    assert again.has_latent_avg and again.provenance['latent_avg'].startswith('estimated')
    third = read_generator(save_generator(again, tmp_path/'h.safetensors'))
    assert third.provenance == again.provenance and torch.equal(third.latent_avg, again.latent_avg)


# Published generators

@pytest.mark.parametrize('kw', [dict(size=8), dict(size=64), dict(image_channels=1), dict(image_channels=4), dict(z_dim=10), dict(size=48, const_size=(4, 6)),
                                dict(size=32, channels={4: 5, 8: 9, 16: 3, 32: 7})])
def test_architecture_is_read(kw):
    g = small_generator(**kw)
    again = read_generator(publish_generator(g))
    keys = 'size', 'style_dim', 'n_mlp', 'channels', 'z_dim', 'image_channels', 'const_size'
    assert {k: again.config[k] for k in keys} == {k: g.config[k] for k in keys}
    assert torch.equal(picture(again), picture(g)) and torch.equal(again.latent_avg, g.latent_avg)

@pytest.mark.parametrize('form', ['nested', 'flat', 'prefixed', 'decoder', 'DataParallel', 'trainer', 'numpy'])
def test_layouts(g, published, form):
    ema, avg = published['g_ema'], published['latent_avg']
    other = {k: v + 1 for k, v in ema.items()}
    src = dict(nested=published, flat={**ema, 'latent_avg': avg}, prefixed={**{f'g_ema.{k}': v for k, v in ema.items()}, 'latent_avg': avg},
               decoder={**{f'decoder.{k}': v for k, v in ema.items()}, 'latent_avg': avg}, DataParallel={**{f'module.{k}': v for k, v in ema.items()}, 'latent_avg': avg},
               trainer=dict(g=other, d={'convs.0.0.weight': torch.zeros(1)}, g_ema=ema, g_optim={'state': {0: {'step': torch.zeros(1)}}}, args=Namespace(size=32), ada_aug_p=0., latent_avg=avg),
               numpy={'g_ema': {k: v.numpy() for k, v in ema.items()}, 'latent_avg': avg.numpy()})[form]
    again = read_generator(src)
    assert torch.equal(picture(again), picture(g)) and torch.equal(again.latent_avg, avg)

def test_reading_does_not_share_memory(published):
    again = read_generator(published)
    again.const.data.zero_(); again.latent_avg.zero_()
    assert published['g_ema']['input.input'].any() and published['latent_avg'].any()

@pytest.mark.parametrize('shape', ['d', '1d', 'kd', '1kd'])
def test_average_shapes(g, published, shape):
    w = torch.randn(24)
    avg = dict(d=w, kd=w.expand(8, 24)); avg |= {'1d': avg['d'][None], '1kd': avg['kd'][None]}
    assert torch.equal(read_generator(published | dict(latent_avg=avg[shape])).latent_avg, w.expand(8, 24))

def test_average_missing_or_wrong(g, published):
    a = read_generator(published['g_ema'])
    assert a.provenance['latent_avg'].startswith('estimated') and torch.equal(a.latent_avg, read_generator(published['g_ema']).latent_avg)
    assert read_generator(published | dict(latent_avg=torch.zeros(24))).provenance['latent_avg'].startswith('estimated')
    refused(lambda: read_generator(published | dict(latent_avg=torch.ones(18, 24))), 'latent_avg', '(18, 24)', '(8, 24)')
    refused(lambda: read_generator(published | dict(latent_avg=torch.full((24,), torch.nan))), 'latent_avg', 'NaN')

def test_no_noise_planes(published):
    ema = {k: v for k, v in published['g_ema'].items() if 'noises' not in k}
    a, b = read_generator(ema), read_generator(ema)
    assert torch.equal(a.noise_3, b.noise_3) and 'seed 0' in a.provenance['noise']

def test_blur_kernels_do_not_matter(g, published):
    ema = {k: v for k, v in published['g_ema'].items() if not k.endswith('.kernel')}
    assert torch.equal(picture(read_generator(ema)), picture(g))

@pytest.mark.parametrize('name,change,words', [
    ('convs.1.conv.weight', lambda t: t[:, :3], ('expected', 'found')), ('convs.1.activate.bias', lambda t: None, ('missing',)),
    ('to_rgbs.0.conv.weight', lambda t: t[:, :, :1], ('expected', 'found')), ('input.input', lambda t: t[0], ('4 dimensions',)),
    ('convs.2.conv.weight', lambda t: None, ('5 dimensions',)), ('conv1.noise.weight', lambda t: t*torch.nan, ('NaN',)),
    ('style.2.bias', lambda t: t[:1], ('style.2.bias', '(24,)', '(1,)')), ('surprise.weight', lambda t: torch.zeros(2), ('unknown',))])
def test_damage_is_named(published, name, change, words):
    ema = {f'g_ema.{k}': v for k, v in published['g_ema'].items()}
    new = change(ema.get(f'g_ema.{name}'))
    ema.pop(f'g_ema.{name}', None)
    if new is not None: ema[f'g_ema.{name}'] = new
    refused(lambda: read_generator(ema), name, *words)

def test_not_a_generator():
    refused(lambda: read_generator({}), 'no tensors')
    refused(lambda: read_generator({'synthesis.b4.const': torch.zeros(2), 'synthesis.b4.torgb.weight': torch.zeros(2)}), 'synthesis.b4.const', '3 dimensions')
    refused(lambda: read_generator({'conv1.weight': torch.zeros(64, 3, 7, 7)}), 'no generator')
    refused(lambda: read_generator(3), 'int')


# Released checkpoints

def test_released(released, g):
    net = read_restyle(released)
    assert net.geometry == Geometry((256, 256), (32, 32)) and net.encoder.config['trunk'] == 'resnet34'
    assert torch.equal(net.latent_avg, g.latent_avg) and not net.training
    flat = {**released['state_dict'], 'latent_avg': released['latent_avg']}
    x = torch.rand(1, 3, 256, 256)
    assert torch.equal(read_restyle(flat).invert(x, 1).codes, net.invert(x, 1).codes)

def test_trainer_state_is_no_stranger(released):
    more = dict(global_step=7, optimizer={'state': {0: {'exp_avg': torch.zeros(3)}}}, best_val_loss=torch.zeros(()), discriminator_state_dict={'mlp.0.weight': torch.zeros(2)})
    assert read_restyle({**released, **more}).encoder.n_styles == 8
    refused(lambda: read_restyle({**released, 'extra': {'weight': torch.zeros(2)}}), 'extra.weight', 'unknown use')

def test_cars(released):
    net = read_restyle({**released, 'opts': {'dataset_type': 'cars_encode'}})
    assert net.geometry == Geometry((192, 256), (32, 32), (4, 0, 28, 32))
    assert net.invert(torch.rand(1, 3, 192, 256), 1).codes.shape == (2, 1, 8, 24)
    class Big: shapes = [(512, 512)]
    assert published_geometry(Big, net.encoder, {'dataset_type': 'cars_encode'}) == CARS

def test_heads(released):
    progressive = {**released, 'opts': Namespace(encoder_type='ResNetProgressiveBackboneEncoder')}
    from restyle_nb.encoders import HEADS
    if 'progressive' not in HEADS:
        refused(lambda: read_restyle(progressive), "'progressive' head", "'simple'")
        refused(lambda: read_encoder(released, head='progressive'), 'progressive')
        assert read_encoder(progressive, head='simple').n_styles == 8
    if 'fpn' not in HEADS:
        fpn = {**released, 'state_dict': {**released['state_dict'], 'encoder.latlayer1.weight': torch.zeros(512, 256, 1, 1)}}
        refused(lambda: read_restyle(fpn), "'fpn' head")

def test_single_pass_encoder_of_three_channels():
    g = small_generator()
    e = build_encoder('irse50', n_styles=8, style_dim=24, width=24, in_channels=3)
    src = publish_restyle(ReStyle(e, g, Geometry((256, 256), (32, 32))))
    net = read_restyle(src)
    assert net.encoder.in_channels == 3 and net.encoder.config['trunk'] == 'irse50'
    assert read_encoder(src).image_channels == 3

def test_halves_that_do_not_belong_together(released):
    refused(lambda: read_restyle(released, generator=small_generator(64)), 'n_styles', '8', '10')
    refused(lambda: read_restyle(released, generator=small_generator(image_channels=4)), 'channels')

def test_encoder_damage(released):
    sd = dict(released['state_dict']); sd.pop('encoder.styles.3.convs.2.weight')
    refused(lambda: read_restyle({'state_dict': sd}), 'styles.3.convs.2.weight')
    sd = dict(released['state_dict']); sd['encoder.body.5.bn1.weight'] = torch.zeros(3)
    refused(lambda: read_restyle({'state_dict': sd}), "'encoder.body.5.bn1.weight'", '(128,)', '(3,)')
    sd = {k: v for k, v in released['state_dict'].items() if k.startswith('encoder.')}
    refused(lambda: read_restyle({'state_dict': sd}), 'generator=')
    assert read_restyle({'state_dict': sd}, generator=small_generator()).encoder.n_styles == 8

def test_face_recognition_trunk_is_told_apart():
    refused(lambda: read_encoder({'input_layer.0.weight': torch.zeros(64, 3, 3, 3), 'output_layer.3.weight': torch.zeros(2, 2)}), 'face-recognition')


# Files

@pytest.mark.parametrize('zipped', [True, False])
def test_from_disk_with_namespace(released, tmp_path, zipped):
    path = tmp_path/'restyle.pt'
    torch.save({**released, 'state_dict': OrderedDict(released['state_dict']), 'opts': Namespace(dataset_type='cars_encode', device='cuda:0')},
               path, _use_new_zipfile_serialization=zipped)
    assert read_restyle(path).geometry.box == (4, 0, 28, 32)
    assert read_restyle(str(path)).encoder.n_styles == 8

def test_foreign_safetensors(g, published, tmp_path):
    save_file({f'g_ema.{k}': v for k, v in published['g_ema'].items()} | {'latent_avg': published['latent_avg']}, tmp_path/'g.safetensors')
    assert torch.equal(picture(read_generator(tmp_path/'g.safetensors')), picture(g))

class Evil:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)

@pytest.mark.parametrize('how', ['zip', 'legacy', 'pickle', 'nested in opts'])
def test_nothing_in_a_file_is_run(released, tmp_path, how):
    mark, path = tmp_path/'mark', tmp_path/'gift.pt'
    if how == 'pickle': path.write_bytes(pickle.dumps({'g_ema': Evil(mark), 'more': b'x'*100}))
    elif how == 'nested in opts': torch.save({**released, 'opts': Namespace(device=Evil(mark))}, path)
    else: torch.save({'state_dict': Evil(mark)}, path, _use_new_zipfile_serialization=how == 'zip')
    for read in (read_generator, read_encoder, read_restyle):
        refused(lambda: read(path), 'gift.pt', *(() if how == 'pickle' else ('mkdir', 'refused')))
    assert not mark.exists()

class Persistent: pass
Persistent.__module__, Persistent.__qualname__ = 'torch_utils.persistence', 'Persistent'

@pytest.mark.parametrize('protocol', [2, 4])
def test_unknown_nvidia_class_is_refused(tmp_path, protocol):
    import sys, types
    m = types.ModuleType('torch_utils.persistence'); m.Persistent = Persistent
    sys.modules |= {'torch_utils': types.ModuleType('torch_utils'), 'torch_utils.persistence': m}
    try: (tmp_path/'net.pkl').write_bytes(pickle.dumps({'G_ema': Persistent(), 'more': b'x'*100}, protocol=protocol))
    finally: del sys.modules['torch_utils'], sys.modules['torch_utils.persistence']
    refused(lambda: read_generator(tmp_path/'net.pkl'), 'net.pkl', 'Persistent', 'refused')

def test_whole_modules_are_refused(g, tmp_path):
    torch.save(g, tmp_path/'module.pt')
    refused(lambda: read_generator(tmp_path/'module.pt'), 'restyle_nb.generator.Generator', 'state_dict')

@pytest.mark.parametrize('content,words', [
    (b'', ('0 bytes',)), (b'<!DOCTYPE html><html>' + b' '*100, ('web page',)), (b'\n\n<html>' + b' '*100, ('web page',)),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345678\n', ('git lfs pull',)),
    (b'just some text that is not weights, named .pt' * 3, ('neither',)), (b'\x80\x04' + b'\x00'*200, ('instruction',)),
    (b'PK\x03\x04' + b'\x00'*200, ('damaged',)), (struct.pack('<Q', 80) + b'{' + b'x'*200, ('damaged',))])
def test_things_that_are_not_weights(tmp_path, content, words):
    path = tmp_path/'weights.pt'; path.write_bytes(content)
    refused(lambda: read_restyle(path), 'weights.pt', *words)

@pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors'])
@pytest.mark.parametrize('keep', [.1, .5, .99])
def test_unfinished_downloads(g, published, tmp_path, kind, keep):
    path = tmp_path/'g.pt'
    if kind == 'safetensors': save_generator(g, path)
    else: torch.save(published, path, _use_new_zipfile_serialization=kind == 'zip')
    raw = path.read_bytes(); path.write_bytes(raw[:int(len(raw)*keep)])
    refused(lambda: read_generator(path), 'g.pt', 'fetch')

def test_no_file(tmp_path):
    refused(lambda: read_generator(tmp_path/'nothing.pt'), 'no such file')
    refused(lambda: read_generator(tmp_path), 'folder')

def test_zip_bomb(tmp_path):
    path = tmp_path/'bomb.pt'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('archive/data/0', b'\0'*30_000_000)
    refused(lambda: read_generator(path), 'bomb.pt', 'unpack')

def test_tensor_larger_than_its_numbers(published, tmp_path):
    ema = {**published['g_ema'], 'input.input': torch.zeros(1).expand(1, 24, 4, 4)}
    torch.save(ema, tmp_path/'g.pt')
    refused(lambda: read_generator(tmp_path/'g.pt'), 'input.input', 'contiguous')

def test_pickled_list(tmp_path):
    torch.save([torch.zeros(40)], tmp_path/'list.pt')
    refused(lambda: read_generator(tmp_path/'list.pt'), 'list', 'state_dict')

def test_half_stays_finite():
    assert stored('w', torch.tensor([[7e4]]), True).dtype == torch.float32
    assert stored('w', torch.zeros(2, 2, dtype=torch.int64), True).dtype == torch.int64


@pytest.mark.parametrize('passes, ok', [(2, True), (0, False), ('many', False)])
def test_a_model_knows_how_many_steps_it_was_trained_for(net, tmp_path, passes, ok):
    path = save_restyle(net, tmp_path/'net.safetensors', passes=passes)
    if ok: assert read_restyle(path).passes == passes and read_restyle(save_restyle(net, path)).passes == net.passes
    else:
        with pytest.raises(CheckpointError, match='passes'): read_restyle(path)
