"""The embedded models: present, unchanged, documented, and no better known than they are."""
import json, socket
from pathlib import Path
import pytest, torch
from restyle_nb.checkpoints import CheckpointError, save_encoder, save_generator, save_restyle
from restyle_nb.encoders import build_encoder
from restyle_nb.generator import Generator
from restyle_nb.images import write_sheet
from restyle_nb.restyle import ReStyle
from restyle_nb.zoo import (ModelCard, checked, held_out, held_out_attributes, list_files, list_models, load_generator, load_model,
                            training_attributes, training_sample, write_card)

WEIGHTS = Path(__file__).resolve().parents[1]/'restyle_nb'/'weights'
about = dict(origin='a test', licence='Apache-2.0', recipe='tests/test_zoo.py')

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A folder of stand-ins with the names of the real files"
    d = tmp_path_factory.mktemp('weights'); torch.manual_seed(0)
    g = Generator(size=64, style_dim=16, n_mlp=2, channels={4: 8, 8: 8, 16: 8, 32: 8, 64: 8}); g.estimate_latent_avg(200)
    write_card(save_generator(g, d/'toy_generator.safetensors', half=True), 'toy-generator', 'generator', **about)
    for file, name, kind in (('restyle', 'toy', 'restyle'), ('single', 'toy-single', 'single'), ('single_long', 'toy-single-long', 'single')):
        e = build_encoder('compact', n_styles=10, style_dim=16, input_size=64, widths=(8, 8, 8, 8))
        write_card(save_encoder(ReStyle(e, g), d/f'toy_{file}.safetensors', half=True), name, kind, **about, training='none')
    for part, n in (('heldout', 5), ('train', 3)):
        x = torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8)
        write_card(write_sheet(x, d/f'toy_{part}.png'), f'toy-{part}', 'pictures', **about)
        (d/f'toy_{part}.json').write_text(json.dumps([dict(yaw=i) for i in range(n)]))
        write_card(d/f'toy_{part}.json', f'toy-{part}-attributes', 'attributes', **about)
    return d

def test_models_share_a_generator_and_a_geometry(world):
    nets = [load_model(name, 'cpu', folder=world) for name in ('toy', 'toy-single', 'toy-single-long')]
    assert [m['name'] for m in list_models(world)] == ['toy', 'toy-single', 'toy-single-long']
    assert len({net.geometry for net in nets}) == 1 and len({type(net) for net in nets}) == 1
    assert all(torch.equal(net.latent_avg, nets[0].latent_avg) and net.encoder.in_channels == 6 for net in nets)
    assert not nets[0].training and not any(p.requires_grad for p in nets[0].generator.parameters())
    assert torch.equal(nets[0].latent_avg, load_generator('toy', 'cpu', world).latent_avg)

def test_pictures_and_attributes(world):
    x = held_out(name='toy', folder=world)
    assert x.shape == (5, 3, 64, 64) and x.min() >= -1 and x.max() <= 1 and x.dtype == torch.float32
    assert torch.equal(held_out(2, 'toy', world), x[:2]) and held_out_attributes(2, 'toy', world) == [dict(yaw=0), dict(yaw=1)]
    assert training_sample(name='toy', folder=world).shape[0] == 3 == len(training_attributes(name='toy', folder=world))
    with pytest.raises(ValueError, match='5 heldout'): held_out(6, 'toy', world)

def test_paths(world, tmp_path):
    net = load_model('toy', 'cpu', folder=world)
    x = held_out(1, 'toy', world)
    want = net.invert(x, 2).codes
    assert torch.equal(load_model(save_restyle(net, tmp_path/'m.safetensors'), 'cpu').invert(x, 2).codes, want)
    alone = save_encoder(net, tmp_path/'e.safetensors')
    assert torch.equal(load_model(str(alone), 'cpu', generator='toy', folder=world).invert(x, 2).codes, want)
    assert torch.equal(load_model(alone, 'cpu', generator=net.generator).invert(x, 2).codes, want)
    with pytest.raises(CheckpointError, match='without its generator'): load_model(alone, 'cpu')
    with pytest.raises(CheckpointError, match='no such file'): load_model(tmp_path/'none.safetensors', 'cpu')

def test_unknown_names(world):
    with pytest.raises(CheckpointError, match="no model 'cats'; there are toy, toy-single"): load_model('cats', 'cpu', folder=world)
    with pytest.raises(CheckpointError, match='toy-generator'): load_generator('cats', 'cpu', world)

@pytest.mark.parametrize('harm,words', [('flip', 'sha256'), ('cut', 'expected'), ('remove', 'missing')])
def test_damage_is_noticed(world, tmp_path, harm, words):
    import shutil
    d = shutil.copytree(world, tmp_path/'w'); f = d/'toy_generator.safetensors'; raw = f.read_bytes()
    if harm == 'flip': f.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif harm == 'cut': f.write_bytes(raw[:-1])
    else: f.unlink()
    with pytest.raises(CheckpointError, match=words) as e: load_model('toy', 'cpu', folder=d)
    assert 'toy_generator.safetensors' in str(e.value)

def test_table_missing_or_damaged(tmp_path):
    with pytest.raises(CheckpointError, match='weights.json'): list_models(tmp_path)
    (tmp_path/'weights.json').write_text('{"files": {"a": ')
    with pytest.raises(CheckpointError, match='weights.json'): list_models(tmp_path)

def test_cards(world, tmp_path):
    path = tmp_path/'a.bin'; path.write_bytes(b'abc')
    card = write_card(path, 'a', 'features', **about, minutes=3)
    assert card.sha256 == 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad' and card.bytes == 3 and card.minutes == 3
    path.write_bytes(b'abcd'); write_card(path, 'a', 'features', **about)
    (tmp_path/'b.bin').write_bytes(b''); write_card(tmp_path/'b.bin', 'b', 'features', **about)
    assert [c.file for c in list_files(tmp_path)] == ['a.bin', 'b.bin'] and list_files(tmp_path)[0].bytes == 4
    assert json.dumps(list_files(tmp_path)) and isinstance(list_files(tmp_path)[0], ModelCard)
    assert '| a |' in list_files(tmp_path)._repr_markdown_() and 'Apache-2.0' in repr(list_files(tmp_path))
    with pytest.raises(AttributeError, match='colour'): card.colour
    with pytest.raises(CheckpointError, match='no such file'): write_card(tmp_path/'c.bin', 'c', 'features', **about)


# The real ones

def test_every_embedded_file_has_a_card_and_every_card_a_file():
    cards = list_files()
    for c in cards:
        assert checked(c.file).stat().st_size == c.bytes
        assert all(c.get(k) for k in ('name', 'kind', 'origin', 'licence', 'recipe')), c.file
    on_disk = {p.name for p in WEIGHTS.iterdir() if p.suffix in ('.safetensors', '.png', '.json', '.npz')} - {'weights.json', 'released.json'}
    assert {c.file for c in cards} == on_disk

def test_embedded_models_are_offline(monkeypatch):
    def refuse(*a, **k): raise OSError('the zoo asked for the network')
    monkeypatch.setattr(socket.socket, 'connect', refuse); monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    assert {m['name'] for m in list_models()} >= {'faces64', 'faces64-single', 'faces64-single-long'}
    x = held_out()
    assert x.shape == (256, 3, 64, 64) and len(held_out_attributes()) == 256
    assert len(training_sample()) == len(training_attributes()) > 0
    errors = load_model('faces64', 'cpu').invert(x[:32], 5).errors.mean(1)
    assert errors[0] > errors[1] > errors[2] > errors[3]
    single = load_model('faces64-single', 'cpu')
    assert single.encoder.config == load_model('faces64', 'cpu').encoder.config
    assert single.invert(x[:32], 1).errors[1].mean() < errors[0]

def test_held_out_pictures_are_held_out():
    a, b = held_out().flatten(1), training_sample().flatten(1)
    assert torch.cdist(a, b).min() > 1
