"""The embedded models: present, unchanged, documented, and no better known than they are."""
import json, socket
from pathlib import Path
import pytest, torch
from restyle_nb.checkpoints import CheckpointError, save_encoder, save_generator, save_restyle
from restyle_nb.encoders import build_encoder
from restyle_nb.generator import Generator
from restyle_nb.images import write_sheet
from restyle_nb.restyle import ReStyle
from restyle_nb.zoo import (ModelCard, annotate, card, checked, domains, held_out, held_out_attributes, list_files, list_models, load_generator, load_model,
                            training_attributes, training_sample, write_card)

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT/'restyle_nb'/'weights'
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

def test_two_worlds_keep_to_themselves(world, tmp_path):
    import shutil
    d = shutil.copytree(world, tmp_path/'w'); torch.manual_seed(1)
    g = Generator(size=64, style_dim=16, n_mlp=2, channels={4: 8, 8: 8, 16: 8, 32: 8, 64: 8}); g.estimate_latent_avg(200)
    write_card(save_generator(g, d/'moon_generator.safetensors'), 'moon-generator', 'generator', **about)
    for file, name, head in (('moon_restyle', 'moon', 'simple'), ('moon_restyle_e4e', 'moon-restyle-e4e', 'progressive')):
        e = build_encoder('compact', head, n_styles=10, style_dim=16, input_size=64, widths=(8, 8, 8, 8))
        write_card(save_encoder(ReStyle(e, g), d/f'{file}.safetensors'), name, 'restyle', **about)
    write_card(write_sheet(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), d/'moon_heldout.png'), 'moon-heldout-pictures', 'pictures', **about)
    (d/'moon_identity.safetensors').write_bytes(b'judge'); write_card(d/'moon_identity.safetensors', 'moon-identity', 'judge', **about)
    assert [c.name for c in list_models(d)] == ['moon', 'moon-restyle-e4e', 'toy', 'toy-single', 'toy-single-long'] and domains(d) == ['moon', 'toy']
    moon, toy = load_model('moon', 'cpu', folder=d), load_model('toy', 'cpu', folder=d)
    assert torch.equal(moon.latent_avg, g.latent_avg) and not torch.equal(moon.latent_avg, toy.latent_avg)
    assert type(load_model('moon-restyle-e4e', 'cpu', folder=d).encoder.head).__name__ != type(moon.encoder.head).__name__
    assert len(held_out(name='moon', folder=d)) == 2 and len(held_out(name='toy', folder=d)) == 5
    with pytest.raises(CheckpointError, match='moon-identity'): load_model('moon-identity', 'cpu', folder=d)   # a judge is no model
    with pytest.raises(CheckpointError, match='moon_train.png'): training_sample(name='moon', folder=d)

def test_facts_stay_with_their_file(tmp_path):
    path = tmp_path/'a.bin'; path.write_bytes(b'one'); write_card(path, 'a', 'features', **about, minutes=3)
    first = annotate('a.bin', tmp_path, metrics={'step 1': dict(L2=[.031, .002], n=256)}, measured='on nothing', limits=['none known', 'a | b'])
    assert first.minutes == 3 and card('a', tmp_path) == first == card('a.bin', tmp_path)
    assert write_card(path, 'a', 'features', **about).metrics == {'step 1': dict(L2=[.031, .002], n=256)}   # the same bytes
    assert 'minutes' not in annotate('a.bin', tmp_path, minutes=None)
    text = str(card('a', tmp_path))
    for part in ('| step 1 | 0.031 ± 0.002 | 256 |', '*Measured* on nothing:', '- none known', first.sha256, about['origin']): assert part in text, part
    with pytest.raises(ValueError, match='bytes, sha256'): annotate('a.bin', tmp_path, sha256='0', bytes=1)
    path.write_bytes(b'two')
    with pytest.raises(CheckpointError, match='sha256'): annotate('a.bin', tmp_path, more=1)    # what was measured, if the file is another?
    assert 'metrics' not in write_card(path, 'a', 'features', **about) and 'metrics' not in card('a', tmp_path)
    with pytest.raises(CheckpointError, match='no card'): annotate('b.bin', tmp_path, more=1)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ['a.bin', 'weights.json']

def test_a_broken_note_leaves_the_table(tmp_path):
    path = tmp_path/'a.bin'; path.write_bytes(b'one'); write_card(path, 'a', 'features', **about)
    before = (tmp_path/'weights.json').read_bytes()
    with pytest.raises(TypeError): annotate('a.bin', tmp_path, metrics=torch.zeros(2))   # no JSON
    assert (tmp_path/'weights.json').read_bytes() == before and len(list(tmp_path.iterdir())) == 2

def _write_cards(args):
    folder, k = args
    for i in range(12):
        path = Path(folder)/f'{k}_{i}.bin'; path.write_bytes(b'x'); write_card(path, path.stem, 'features', **about)
        annotate(path.name, folder, made_by=k)

def test_several_processes_write_one_table(tmp_path):
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    with ProcessPoolExecutor(3, mp_context=get_context('fork')) as pool: list(pool.map(_write_cards, [(tmp_path, k) for k in 'abc']))
    cards = list_files(tmp_path)
    assert len(cards) == 36 and all(c.made_by == c.file[0] for c in cards)

def test_the_pictures_of_a_world_have_one_card(world):
    annotate('toy_heldout.png', world, about='Noise.', limits=['nothing is seen'])
    c = card('toy-pictures', world)
    assert set(c.files) == {'toy_heldout.png', 'toy_heldout.json', 'toy_train.png', 'toy_train.json'}
    assert c.bytes == sum((world/f).stat().st_size for f in c.files) and 'sha256' not in c and c.limits == ['nothing is seen']
    text = c._repr_markdown_()
    assert all(o.sha256[:16] in text for o in list_files(world) if o.file in c.files) and 'Noise.' in text
    with pytest.raises(CheckpointError, match='did you mean toy-pictures'): card('toy-picture', world)
    assert card('restyle-psp-faces').url                                        # one that others published


# The real ones

def test_every_embedded_file_has_a_card_and_every_card_a_file():
    cards = list_files()
    for c in cards:
        assert checked(c.file).stat().st_size == c.bytes
        assert all(c.get(k) for k in ('name', 'kind', 'origin', 'licence', 'recipe')), c.file
    names = [c.name for c in cards]
    assert len(set(names)) == len(names) and all(c.name in str(card(c.name)) and c.sha256 in str(c) for c in cards)
    on_disk = {p.name for p in WEIGHTS.iterdir() if p.suffix in ('.safetensors', '.png', '.json', '.npz')} - {'weights.json', 'released.json'}
    assert {c.file for c in cards} == on_disk

def test_every_card_says_what_it_is_and_what_it_is_not():
    "Rerun recipe 11 with CARDS=1 after a weight file was replaced: what was measured on the old file went with it"
    for c in list_files():
        if c.kind in ('pictures', 'attributes') and not c.file.endswith('_heldout.png'): continue       # part of the card of their world
        assert c.get('about') and c.get('limits'), c.file
        if c.kind in ('restyle', 'single', 'generator', 'judge'): assert c.get('training') and c.get('metrics') and c.get('measured'), c.file
        if c.kind == 'restyle': assert {'step 1', 'step 5'} <= set(c.metrics), c.file

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

@pytest.mark.parametrize('name', domains())
def test_held_out_pictures_are_held_out(name):
    a, b = held_out(name=name).flatten(1), training_sample(name=name).flatten(1)
    assert len(a) == len(held_out_attributes(name=name)) == 256 and len(b) == len(training_attributes(name=name))
    assert torch.cdist(a, b).min() > 1
    assert len(a.unique(dim=0)) == 256

def test_every_world_has_what_its_cards_promise():
    assert domains() == ['earth64', 'faces64', 'toons64']
    for c in list_models():
        net = load_model(c.name, 'cpu')
        domain = c.name.split('-')[0]
        inv = net.invert(held_out(4, domain), 5 if c.kind == 'restyle' else 1)
        assert inv.errors[-1].mean() < inv.errors[0].mean(), c.name
        assert c.generator == f'{domain}_generator.safetensors' and torch.equal(net.latent_avg, load_generator(domain, 'cpu').latent_avg), c.name

def test_toons_are_the_faces():
    "Toon i shows the person of face i: the same attributes, and pictures that agree more than those of two persons"
    assert held_out_attributes(name='toons64') == held_out_attributes(name='faces64')
    a, b = (o.flatten(1) - o.flatten(1).mean(0) for o in (held_out(name='toons64'), held_out(name='faces64')))
    near = torch.cdist(a, b)
    assert (near.diagonal() < near.median(1).values).float().mean() > .9


@pytest.mark.parametrize('name, steps', [('faces64', 5), ('faces64-restyle-e4e', 5), ('faces64-single', 1), ('faces64-e4e', 1)])
def test_a_model_takes_as_many_steps_as_it_was_trained_for(name, steps):
    net, x = load_model(name, device='cpu'), held_out(1)
    assert net.invert(x).n_steps == steps and net.invert(x, 2).n_steps == 2


def test_encoders_of_another_folder_share_the_embedded_generators():
    "nbs/analysis/models holds encoders that the wheel has no room for"
    folder = ROOT/'nbs'/'analysis'/'models'
    for c in list_models(folder):
        net = load_model(c.name, device='cpu', folder=folder)
        assert net.passes == (1 if c.kind == 'single' else 5)
        assert torch.equal(net.generator.latent_avg, load_generator(c.name.split('-')[0], device='cpu').latent_avg)


def test_the_folder_of_a_run_is_a_model_and_its_name(tmp_path, monkeypatch):
    "Every run calls its file `model.safetensors`: the folder says which it is"
    save_restyle(load_model('faces64', 'cpu'), file := tmp_path/'mine'/'model.safetensors')
    monkeypatch.chdir(tmp_path)
    for src in (tmp_path/'mine', 'mine', file): assert load_model(src, 'cpu').generator.name == 'mine', src
