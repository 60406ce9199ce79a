"""A run as data: options are checked, written, read back, built, gone on with and built upon, and do what a dozen lines of Python do."""
import os, sys
from dataclasses import fields, replace
from types import NoneType
import pytest
import torch
from restyle_nb import runs
from restyle_nb.checkpoints import save_encoder, save_generator
from restyle_nb.encoders import build_encoder
from restyle_nb.generator import Generator
from restyle_nb.judges import load_judge
from restyle_nb.images import Geometry, ImageError, ImageFolder, load_folder, save_image
from restyle_nb.losses import Identity, LatentCritic, Objective
from restyle_nb.restyle import ReStyle
from restyle_nb.runs import (ALL, FILE, GROUPS, MODEL, OWN, OptionError, Options, as_text, build, carry_out, differences, fingerprint, hold_out, is_shards, load,
                             locate, open_pictures, options_for, options_like, read_options, settle, train, write_options)
from restyle_nb.training import PRESETS, Trainer, TrainingError
from restyle_nb.zoo import load_model

TINY = dict(trunk='compact', widths=(4, 4, 4, 4), width=4, init='random', lpips=0., n_steps=2, batch_size=4, iterations=6, device='cpu',
            val_every=3, save_every=3, log_every=3, val=4)


def tiny_generator(seed=0, **kw):
    torch.manual_seed(seed)
    g = Generator(**dict(size=16, style_dim=8, n_mlp=2, channels={4: 4, 8: 4, 16: 4}) | kw)
    g.estimate_latent_avg(64)
    return g


@pytest.fixture(scope='session')
def place(tmp_path_factory):
    "A generator file, and a folder with pictures of its size"
    root = tmp_path_factory.mktemp('place')
    save_generator(tiny_generator(), root/'g.safetensors')
    (root/'pictures').mkdir()
    x = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))*2 - 1
    for i, o in enumerate(x): save_image(o, root/'pictures'/f'{i:02}.png')
    return root


@pytest.fixture
def mine(place, tmp_path):
    "Options of a run of a second"
    return options_for('own', generator=str(place/'g.safetensors'), data=str(place/'pictures'), out=str(tmp_path/'run'), **TINY)


@pytest.fixture(scope='session')
def done(place, tmp_path_factory):
    "A finished run"
    out = tmp_path_factory.mktemp('runs')/'done'
    train(options_for('own', generator=str(place/'g.safetensors'), data=str(place/'pictures'), out=str(out), **TINY))
    return out


def weights(trainer): return torch.cat([p.flatten() for p in trainer.net.encoder.state_dict().values()])


# ---------------------------------------------------------------- values

@pytest.mark.parametrize('name,given,kept', [
    ('lr', '1e-4', 1e-4), ('lr', 1, 1.), ('lr', '0.5', .5), ('lr', 'none', None), ('batch_size', '16', 16), ('batch_size', 8., 8), ('iterations', '1e5', 100_000),
    ('flip', 'no', False), ('flip', 'On', True), ('flip', True, True), ('clip', 'null', None), ('val', '12', 12), ('val', 'a/folder', 'a/folder'), ('val', None, None),
    ('encoder_size', '192,256', (192, 256)), ('encoder_size', '[192, 256]', (192, 256)), ('encoder_size', [64, 32], (64, 32)), ('encoder_size', '64', 64),
    ('widths', '4, 8,16', (4, 8, 16)), ('box', '(1,2,3,4)', (1, 2, 3, 4)), ('progressive', [20, 2], (20, 2)), ('data', '12', '12'), ('precision', 'bf16', 'bf16')])
def test_values_become_what_the_option_is(name, given, kept):
    v = getattr(Options(**{name: given}), name)
    assert v == kept and type(v) is type(kept)


@pytest.mark.parametrize('name,given', [
    ('lr', 'fast'), ('lr', True), ('lr', 'nan'), ('lr', float('inf')), ('batch_size', 2.5), ('batch_size', '8 pictures'), ('batch_size', False), ('n_steps', None),
    ('flip', 'perhaps'), ('flip', 1), ('encoder_size', '1,2,3'), ('encoder_size', []), ('box', '1,2'), ('widths', '4,x'), ('data', 5), ('data', ['a', 'b']),
    ('head', 'simpel'), ('trunk', 'resnet'), ('optimizer', 'sgd'), ('update', 'steps'), ('noise', 'loud'), ('precision', 'fp8'), ('batchnorm', 'group'),
    ('on_error', 'ignore'), ('schedule', 'poly'), ('preset', 'faces'), ('l2', {'a': 1}), ('out', b'run')])
def test_wrong_values_are_refused_by_name(name, given):
    with pytest.raises(OptionError) as e: Options(**{name: given})
    text = str(e.value)
    assert text.startswith(f'{name} (') and 'found' in text and 'expected' in text and len(text) < 400


def test_a_monster_is_not_printed():
    with pytest.raises(OptionError) as e: Options(lr='9'*10**6 + 'x')
    assert len(str(e.value)) < 200


def test_every_option_says_what_it_is():
    assert set(ALL) == {f.name for g in GROUPS for f in fields(g)} | {'preset', 'out'}
    for k, f in ALL.items():
        assert f.metadata['doc'] and '#' not in f.metadata['doc'] and '\n' not in f.metadata['doc'], k
        if f.default is None: assert NoneType in f.type.__args__, k


@pytest.mark.parametrize('name', ALL)
def test_a_slip_of_the_finger_finds_its_option(name):
    slip = name[:-1] if len(name) > 3 else name + 'x'
    if slip in ALL: return
    with pytest.raises(OptionError, match=f'no option {slip!r}; did you mean'): options_for(**{slip: 1})


@pytest.mark.parametrize('foreign,ours', [('learning_rate', 'lr'), ('learning-rate', 'lr'), ('gradient_norm', 'clip')])
def test_foreign_names_find_theirs(foreign, ours):
    with pytest.raises(OptionError, match=f'did you mean {ours} '): options_for(**{foreign: 1})


# ---------------------------------------------------------------- presets

@pytest.mark.parametrize('name', PRESETS)
def test_the_papers_rows(name):
    o, p = options_for(name), PRESETS[name]
    same = [f.name for f in fields(p) if f.name in ALL]
    assert {'trunk', 'head', 'l2', 'lpips', 'identity', 'moco', 'w_norm', 'delta', 'adversarial', 'progressive', 'optimizer', 'lr', 'batch_size', 'n_steps',
            'update', 'noise', 'flip', 'iterations', 'encoder_size', 'box'} == set(same)
    for k in same: assert getattr(o, k) == getattr(p, k), k
    assert o.init == {'IR-SE50': 'irse50', 'ImageNet': 'imagenet'}[p.initial]
    assert (o.face_net, o.moco_net) == ('irse50' if p.identity else None, 'moco' if p.moco else None)
    assert options_for(name, lr=3e-3, moco=0, clip=1).lr == 3e-3


def test_own_needs_nothing_fetched():
    o = options_for('own')
    assert o.identity == o.moco == o.adversarial == 0 and o.lpips and o.face_net is None and o.moco_net is None
    for fill in OWN.values(): assert set(fill) <= set(ALL)
    assert {k for k, f in ALL.items() if getattr(o, k) is None and k in OWN['small']} == set(OWN['small'])  # nothing said beforehand, all of it filled


@pytest.mark.parametrize('size,kind', [(64, 'small'), (128, 'small'), (256, 'large')])
def test_own_goes_by_the_size_of_the_domain(size, kind):
    g = Generator(size=size, style_dim=8, n_mlp=1, channels={2**k: 2 for k in range(2, 9) if 2**k <= size})
    o = settle(options_for('own', lr=3e-3), g)
    assert o.encoder_size == (size, size) and o.trunk == OWN[kind]['trunk'] and o.init == OWN[kind]['init'] and o.lr == 3e-3
    assert settle(options_for('own', trunk='irse50'), g).init == 'random'               # first weights of another trunk would not fit
    assert settle(options_for('own', widths=(4, 4, 4, 4)), g).init == 'random'


def test_own_takes_channels_and_sides_from_the_generator(tmp_path):
    g = tiny_generator(image_channels=1, const_size=(2, 4), channels={4: 4, 8: 4, 16: 4, 32: 4}, size=32)
    save_generator(g, tmp_path/'g.safetensors')
    (tmp_path/'p').mkdir()
    for i in range(12): save_image(torch.rand(3, 40, 80)*2 - 1, tmp_path/'p'/f'{i}.png')
    t = build(options_for('own', generator=tmp_path/'g.safetensors', data=tmp_path/'p', **TINY))
    assert t.net.geometry == Geometry((16, 32), (16, 32)) and t.net.encoder.in_channels == 2
    assert tuple(t.batch(0).shape) == (4, 1, 16, 32) and t.options.encoder_size == (16, 32)
    t.fit(1, progress=False)


# ---------------------------------------------------------------- files

@pytest.mark.parametrize('end', ['yaml', 'yml', 'toml'])
@pytest.mark.parametrize('preset', ['own', *PRESETS])
def test_files_hold_everything(tmp_path, preset, end):
    if end == 'toml': pytest.importorskip('tomllib')
    o = options_for(preset, data='b\t"ü"\\ 🌍\x7f\u2028\U000e0001 # not a comment', lr=1e-12, l2=1e22, val=3, out="it's: [a, {b}]", encoder_size=(3, 4), clip=None)
    path = write_options(o, tmp_path/f'o.{end}')
    assert read_options(path) == o
    text = path.read_text(encoding='utf-8')
    for k, f in ALL.items(): assert sum(l.startswith((k + ': ', k + ' = ')) and f.metadata['doc'] in l for l in text.split('\n')) == 1


def test_none_wins_over_the_preset(tmp_path):
    o = options_for('cars-e4e', progressive=None, box=None, iterations=10)
    for end in ('yaml', 'toml'):
        if end == 'toml' and sys.version_info < (3, 11): continue
        assert read_options(write_options(o, tmp_path/f'o.{end}')).progressive is None


def test_three_lines_are_enough(tmp_path):
    (tmp_path/'a.yaml').write_text('preset: wild-psp\nlr: 1e-3   # YAML takes this for a word\ndata: photographs\n')
    o = read_options(tmp_path/'a.yaml')
    assert o == options_for('wild-psp', lr=1e-3, data='photographs')
    assert read_options(tmp_path/'a.yaml', lr='2e-3', out=tmp_path).lr == 2e-3


@pytest.mark.parametrize('text,says', [
    ('lrr: 1', 'did you mean lr'), ('lr: quick', "found 'quick', expected a number"), ('- lr\n- 1', 'holds no options'), ('just words', 'holds no options'),
    ('lr: [1, 2', 'not YAML'), ('lr: 1\nseed: 3\nlr: 2', 'lr is there twice'), ('a: &a [1]\nlr: *b', 'not YAML'), ('1: 2', 'no option 1'),
    ('lr: !!python/object/apply:os.mkdir [PLACE]', 'not YAML'), ('box: {a: 1}', 'expected 4 whole numbers'), ('lr: 2020-01-01', 'expected a number')])
def test_files_that_are_wrong(tmp_path, text, says):
    (tmp_path/'o.yaml').write_text(text.replace('PLACE', str(tmp_path/'made')))
    with pytest.raises(OptionError, match=says) as e: read_options(tmp_path/'o.yaml')
    assert str(e.value).startswith(f'{tmp_path/"o.yaml"}: ') and '\n' not in str(e.value)
    assert not (tmp_path/'made').exists()


def test_files_that_are_none(tmp_path):
    (tmp_path/'o.yaml').write_bytes(b'\xff\xfe\x00')
    (tmp_path/'o.txt').write_text('lr: 1')
    (tmp_path/'empty.yaml').write_text('')
    (tmp_path/'bad.toml').write_text('lr = ')
    for name, says in {'o.yaml': 'cannot be read', 'o.txt': 'expected .yaml or .toml', 'no.yaml': 'no such file', '.': 'no such file'}.items():
        with pytest.raises(OptionError, match=says): read_options(tmp_path/name)
    assert read_options(tmp_path/'empty.yaml') == options_for()
    if sys.version_info >= (3, 11):
        with pytest.raises(OptionError, match='not TOML'): read_options(tmp_path/'bad.toml')


def test_missing_packages_are_named(tmp_path, monkeypatch):
    for end in ('yaml', 'toml'): (tmp_path/f'o.{end}').write_text('')
    monkeypatch.setitem(sys.modules, 'yaml', None)
    monkeypatch.setitem(sys.modules, 'tomllib', None)
    with pytest.raises(OptionError, match=r"pip install 'restyle_nb\[train\]'"): read_options(tmp_path/'o.yaml')
    with pytest.raises(OptionError, match='write it as YAML'): read_options(tmp_path/'o.toml')


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_options(options_for(), tmp_path/'o.yaml')
    before = path.read_bytes()
    monkeypatch.setattr(runs, 'as_text', lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): write_options(options_for(seed=1), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['o.yaml']


# ---------------------------------------------------------------- pictures

def test_pictures_of_every_kind(place, tmp_path):
    from restyle_nb.datasets import PictureFiles, Shards, write_shards
    files = locate(place/'pictures')
    write_shards(files, tmp_path/'tar', per_shard=7)
    assert is_shards(tmp_path/'tar') and is_shards('a/{00..09}.tar') and is_shards('https://h/x.tar') and not is_shards(place/'pictures')
    kept, lazy, shards = (open_pictures(*a) for a in ((files, (16, 16)), (files, (16, 16), 3, 'raise', 0.), (locate(tmp_path/'tar'), (16, 16))))
    assert [type(o) for o in (kept, lazy, shards)] == [ImageFolder, PictureFiles, Shards]
    for i in range(20): assert torch.equal(kept[i], lazy[i])
    inside = lambda ds: {ds[i].numpy().tobytes() for i in range(20)}
    assert inside(shards) == inside(kept)
    world = open_pictures(locate('earth64')[:3], (16, 16))
    assert world.dtype == torch.uint8 and world.shape == (3, 3, 16, 16)


def test_a_world_does_not_hide_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'earth64').mkdir()
    with pytest.raises(ImageError, match='no pictures'): locate('earth64')


def test_folders_inside(place, tmp_path):
    (tmp_path/'a'/'b').mkdir(parents=True)
    save_image(torch.zeros(3, 16, 16), tmp_path/'a'/'b'/'x.png')
    with pytest.raises(ImageError, match='no pictures'): locate(tmp_path/'a')
    assert [p.name for p in locate(tmp_path/'a', recursive=True)] == ['x.png']


def test_held_out_pictures_are_held_out():
    names = [f'{i}.png' for i in range(30)]
    a, b = hold_out(names, 7)
    assert sorted(a + b) == sorted(names) and len(b) == 7 and (a, b) == hold_out(names, 7) != hold_out(names, 7, seed=1)
    x = torch.arange(30.).view(30, 1, 1, 1)
    assert [int(o) for o in hold_out(x, 7)[1].flatten()] == [int(n[:-4]) for n in b]


def test_held_out_by_itself_and_by_number(mine):
    t = build(replace(mine, val=None))
    assert (len(t.val), t.options.val, t.loader.n) == (2, 2, 18)
    assert build(replace(mine, val=0)).val is None
    for n in (20, -1):
        with pytest.raises(OptionError, match='cannot be held out'): build(replace(mine, val=n))


def test_validation_from_elsewhere_and_from_shards(mine, place, tmp_path):
    from restyle_nb.datasets import write_shards
    write_shards(locate(place/'pictures'), tmp_path/'tar', per_shard=10)
    t = build(replace(mine, val=str(place/'pictures')))
    assert (t.loader.n, len(t.val)) == (20, 20)
    with pytest.raises(OptionError, match='cannot be held out of shards'): build(replace(mine, data=str(tmp_path/'tar')))
    t = build(replace(mine, data=str(tmp_path/'tar'), val=None))
    assert (t.val, t.options.val, t.loader.n) == (None, 0, 20)
    t.fit(1, progress=False)


@pytest.mark.parametrize('memory', [1., 0.])
def test_a_broken_picture_ends_the_run_or_is_left_out(mine, place, tmp_path, memory):
    (tmp_path/'p').mkdir()
    for p in (place/'pictures').iterdir(): os.link(p, tmp_path/'p'/p.name)
    os.unlink(tmp_path/'p'/'03.png')
    (tmp_path/'p'/'03.png').write_bytes(b'\x89PNG and no more')
    o = replace(mine, data=str(tmp_path/'p'), memory=memory, val=0)
    with pytest.raises(ImageError, match='03.png'): train(o)
    with pytest.warns(UserWarning, match='03.png'): assert train(replace(o, on_error='skip', out=str(tmp_path/'other'))).iteration == 6


# ---------------------------------------------------------------- building

def test_it_is_what_a_dozen_lines_do(mine, place, tmp_path):
    "As in the walkthroughs and recipes: an encoder, a net, an objective, a trainer"
    o = replace(mine, w_norm=1e-3, delta=1e-4, adversarial=.1, critic_lr=1e-3, head='progressive', progressive=(1, 1), lr=2e-3, update='step', schedule='linear', warmup=2,
                clip=1., noise='random', seed=3, optimizer='ranger', val=4, ema=.9, micro_batch=2)   # the fifth style is free in the sixth iteration
    g = tiny_generator()
    torch.manual_seed(3)
    encoder = build_encoder('compact', 'progressive', g.n_styles, g.style_dim, input_size=(16, 16), widths=(4, 4, 4, 4), width=4)
    net = ReStyle(encoder, g, Geometry((16, 16), (16, 16)))
    x, val = hold_out(locate(place/'pictures'), 4, 3)
    objective = Objective(l2=1., lpips=0., w_norm=1e-3, delta=1e-4, latent_avg=net.latent_avg)
    plain = Trainer(net, load_folder(x, 16, as_uint8=True), objective, tmp_path/'plain', n_steps=2, batch_size=4, iterations=6, lr=2e-3, update='step', schedule='linear',
                    warmup=2, clip=1., noise='random', flip=True, seed=3, val=load_folder(val, 16), val_every=3, save_every=3, log_every=3, optimizer='ranger',
                    critics=[LatentCritic(g, weight=.1, lr=1e-3)], progressive=(1, 1), ema=.9, micro_batch=2)
    plain.fit(progress=False)
    t = train(o)
    assert torch.equal(weights(t), weights(plain)) and t.history.rows == plain.history.rows and t.config == plain.config


def test_every_argument_of_the_trainer_has_an_option():
    import inspect
    own = {k for k in inspect.signature(Trainer.__init__).parameters} - {'self', 'net', 'data', 'objective', 'folder', 'val', 'device', 'critics', 'team'}
    assert own == set(runs.TRAINER)


def test_the_random_state_stays(mine):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build(mine)
    assert torch.equal(torch.get_rng_state(), before)


def test_single_pass(mine):
    t = build(replace(mine, n_steps=1))
    assert t.net.encoder.in_channels == 3 and not t.net.refines and t.net.passes == 1
    t.fit(1, progress=False)


def test_identity_by_the_embedded_judge():
    o = options_for('own', generator='faces64', data='faces64', identity=.1, face_net='identity', iterations=1, batch_size=2, n_steps=1, device='cpu', lpips=0, val=2)
    t = build(o)
    assert isinstance(t.objective.identity, Identity) and t.net.geometry == load_model('faces64', 'cpu').geometry
    faces = load_model('faces64', 'cpu').encoder.trunk.state_dict()
    assert torch.equal(t.net.encoder.trunk.state_dict()['body.0.conv1.weight'], faces['body.0.conv1.weight'])   # where its trunk begins
    t.fit(progress=False)
    t = build(replace(o, init='attributes', identity=0))                                                       # as in the recipes
    assert torch.equal(t.net.encoder.trunk.state_dict()['body.0.conv1.weight'], load_judge('attributes', device='cpu').trunk.state_dict()['body.0.conv1.weight'])


@pytest.mark.parametrize('change,says', [
    (dict(generator=None), 'generator: not given'), (dict(data=None), 'data: not given'), (dict(generator='no-such'), 'no-such'), (dict(identity=.1), 'face_net: irse50'),
    (dict(moco=.5), 'restyle_models moco'), (dict(l2=-1), 'l2=-1'), (dict(box=(0, 0, 99, 99)), 'box'), (dict(init='no-such'), 'no-such'), (dict(data='/no/where'), 'no such'),
    (dict(trunk='irse50', init=None), 'takes widths'), (dict(init='faces64'), 'init_trunk'), (dict(batch_size=0), 'batch_size'), (dict(progressive=(1, 1)), 'progressive'),
    (dict(ema=2.), 'ema'), (dict(device='abacus'), 'abacus'), (dict(face_net='/no/file.pth', identity=1.), 'file.pth')])
def test_what_cannot_be_built_says_why(mine, change, says):
    with pytest.raises((OptionError, ImageError, TrainingError, ValueError), match=says) as e: build(replace(mine, **change))
    assert type(e.value).__module__.startswith('restyle_nb')


def test_first_weights_that_cannot_be_fetched(mine, monkeypatch):
    def offline(): raise ConnectionError('imagenet_trunk: no network')
    monkeypatch.setattr(runs, 'imagenet_trunk', offline)
    with pytest.raises(OptionError, match='init: imagenet_trunk: no network; or set init: random'): build(replace(mine, trunk='resnet34', widths=None, init='imagenet'))


def test_imagenet_reaches_the_trunk(mine, monkeypatch):
    torch.manual_seed(1)
    e = build_encoder('resnet34', in_channels=3, n_styles=2, style_dim=4, input_size=16, width=4).trunk.state_dict()
    monkeypatch.setattr(runs, 'imagenet_trunk', lambda: e)
    t = build(replace(mine, trunk='resnet34', widths=None, init='imagenet'))
    assert torch.equal(t.net.encoder.trunk.first.weight[:, :3].cpu(), e['conv1.weight'])


def test_nowhere_to_go(mine):
    with pytest.raises(OptionError, match='out: not given'): train(replace(mine, out=None))
    with pytest.raises(OptionError, match='iterations: not given'): train(options_for('horses-psp', generator=mine.generator, data=mine.data, out=mine.out, init='random', moco=0, lpips=0, trunk='compact', widths=(4, 4, 4, 4), width=4, encoder_size=16))
    assert not os.path.exists(mine.out)


# ---------------------------------------------------------------- a run and its folder

def test_the_folder_of_a_run(done):
    o = read_options(done)
    assert sorted(p.name for p in done.iterdir()) == ['best.pt', 'history.jsonl', 'last.pt', MODEL, FILE]
    assert all(os.path.isabs(getattr(o, k)) for k in ('data', 'generator', 'out')) and o.generator_sha256 == fingerprint(tiny_generator())
    assert [k for k in ALL if getattr(o, k) is None and k in (*OWN['small'], 'encoder_size', 'val', 'init')] == []


def test_the_model_is_the_best_encoder(done):
    a, b = load_model(done/MODEL, 'cpu'), load(done)
    x = torch.rand(2, 3, 16, 16)*2 - 1
    assert torch.equal(a.invert(x, 2).codes, b.invert(x, 2).codes)
    best, last = (torch.load(done/f'{k}.pt', weights_only=True)['encoder'] for k in ('best', 'last'))
    for best_one, state in ((True, best), (False, last)):
        for k, v in load(done, best=best_one).encoder.state_dict().items(): assert torch.equal(v, state[k])


def test_the_file_alone_does_it_again(done, tmp_path):
    t = train(read_options(done, out=tmp_path/'again'))
    assert all(torch.equal(v, load(done, best=False).encoder.state_dict()[k]) for k, v in t.net.encoder.state_dict().items())
    assert differences(read_options(done), read_options(tmp_path/'again')) == {'out': (str(done), str(tmp_path/'again'))}


def test_a_run_is_not_begun_in_the_folder_of_another(done):
    before = {p.name: p.read_bytes() for p in done.iterdir()}
    with pytest.raises(OptionError, match='holds a run already'): train(read_options(done))
    assert {p.name: p.read_bytes() for p in done.iterdir()} == before


# ---------------------------------------------------------------- resume

def test_resume_equals_the_uninterrupted_run(done, mine, tmp_path):
    t = build(mine)
    write_options(t.options, tmp_path/'run'/FILE)
    t.fit(3, progress=False)
    t = train(read_options(tmp_path/'run'), resume=tmp_path/'run')
    assert torch.equal(weights(t), torch.cat([p.flatten() for p in load(done, best=False).encoder.state_dict().values()]))
    assert (tmp_path/'run'/MODEL).exists() and t.changed == {}


@pytest.fixture
def begun(mine):
    t = build(mine)
    write_options(t.options, t.folder/FILE)
    t.fit(3, progress=False)
    return t.folder


def test_changes_are_listed_and_kept(begun):
    t = train(read_options(begun, iterations=8, lr=1e-3, micro_batch=2, log_every=1), resume=begun)
    assert t.changed == dict(iterations=(6, 8), lr=(2e-3, 1e-3), micro_batch=(None, 2), log_every=(3, 1))
    note = t.history.of('note')[0]['text']
    for k in t.changed: assert k in note
    o = read_options(begun)
    assert (o.iterations, o.lr, o.micro_batch, o.log_every, t.iteration) == (8, 1e-3, 2, 1, 8)


@pytest.mark.parametrize('change', [dict(trunk='resnet34'), dict(head='fpn'), dict(width=8), dict(widths=(8, 8, 8, 8)), dict(encoder_size=32), dict(box=(0, 0, 8, 8)),
                                    dict(init='faces64'), dict(l2=2), dict(lpips=.1), dict(w_norm=1.), dict(adversarial=.1), dict(preset='cars-psp'),
                                    dict(n_steps=3), dict(batch_size=8), dict(update='batch'), dict(noise='random'), dict(flip=False), dict(seed=1), dict(optimizer='ranger'),
                                    dict(progressive=(1, 1)), dict(ema=.5), dict(batchnorm='frozen')])
def test_what_belongs_to_the_run_is_refused_by_name(begun, change):
    before = {p.name: p.read_bytes() for p in begun.iterdir()}
    with pytest.raises((OptionError, TrainingError), match=next(iter(change))): train(read_options(begun, **change), resume=begun)
    assert {p.name: p.read_bytes() for p in begun.iterdir()} == before


def test_a_run_that_moved_goes_on(begun, place, tmp_path):
    for a, b in ((begun, tmp_path/'moved'), ): os.rename(a, b)
    (tmp_path/'p').mkdir()
    for p in (place/'pictures').iterdir(): os.link(p, tmp_path/'p'/p.name)
    save_generator(tiny_generator(), tmp_path/'other name.safetensors')
    t = train(read_options(tmp_path/'moved', data=tmp_path/'p', generator=tmp_path/'other name.safetensors'), resume=tmp_path/'moved')
    assert t.iteration == 6 and t.folder == tmp_path/'moved' and read_options(tmp_path/'moved').out == str(tmp_path/'moved')


def test_another_generator_is_refused(begun, tmp_path):
    save_generator(tiny_generator(1), tmp_path/'other.safetensors')
    with pytest.raises(OptionError, match='other.safetensors has weights'): build(read_options(begun, generator=tmp_path/'other.safetensors'), resume=begun)


def test_other_pictures_are_refused(begun):
    with pytest.raises(TrainingError, match='data or losses'): build(read_options(begun, val=5), resume=begun)


def test_a_finished_run_stays_as_it_is(done):
    before = (done/'last.pt').read_bytes()
    assert train(read_options(done), resume=done).iteration == 6 and (done/'last.pt').read_bytes() == before


# ---------------------------------------------------------------- fine-tune

def test_fine_tune_from_a_run_and_from_its_model(done, tmp_path):
    for i, src in enumerate((done, done/MODEL)):
        kw = {} if src == done else {k: v for k, v in TINY.items() if k not in ('trunk', 'widths', 'width', 'init')} | dict(data=read_options(done).data)
        o = options_like(src, out=tmp_path/str(i), **kw)
        assert (o.trunk, o.widths, o.width, o.encoder_size, o.n_steps) == ('compact', (4, 4, 4, 4), 4, (16, 16), 2)
        t = build(o, fine_tune=src)
        assert not (t.loaded.missing or t.loaded.unfit or t.loaded.unknown) and t.iteration == 0
        for k, v in load(done).encoder.state_dict().items(): assert torch.equal(t.net.encoder.state_dict()[k], v)
        assert carry_out(t).iteration == 6


def test_fine_tune_a_model_of_the_zoo_for_another_generator(tmp_path):
    o = options_like('faces64', generator='toons64', data='toons64', out=tmp_path/'t', iterations=1, batch_size=2, lpips=0, device='cpu', val=2)
    t = train(o, fine_tune='faces64')
    assert t.loaded.missing == t.loaded.unfit == t.loaded.unknown == [] and t.options.generator == 'toons64'
    assert options_like('faces64-e4e').head == 'fpn_progressive'


def test_an_encoder_file_wants_a_generator(done, place, tmp_path):
    save_encoder(load(done), tmp_path/'e.safetensors')
    with pytest.raises(Exception, match='e.safetensors'): build(options_like(tmp_path/'e.safetensors', data=str(place/'pictures'), **dict(lpips=0)), fine_tune=tmp_path/'e.safetensors')
    t = build(options_like(tmp_path/'e.safetensors', data=str(place/'pictures'), generator=place/'g.safetensors', lpips=0, device='cpu', val=4), fine_tune=tmp_path/'e.safetensors')
    assert not t.loaded.missing


def test_what_does_not_fit_is_listed(done, place, tmp_path):
    o = options_like(done, out=tmp_path/'wide', width=8)
    t = build(o, fine_tune=done)
    assert t.loaded.taken and t.loaded.unfit and all('head' in k for k in t.loaded.unfit)
    with pytest.raises(OptionError, match='holds a run'): build(options_like(done, out=done), fine_tune=done)
