"Models that travel: what is in the folder, what is uploaded, what comes back, and what is refused. A small server speaks like the hub; no real network."
import hashlib, http.server, inspect, json, os, re, shutil, subprocess, sys, threading, types
from pathlib import Path
import pytest, torch, yaml
from PIL import Image
from torch import nn
from restyle_nb.checkpoints import CheckpointError, look, save_generator
from restyle_nb.encoders import build_encoder
from restyle_nb.generator import Generator
from restyle_nb.hub import HubError, model_card, push_folder, push_run, run_card
from restyle_nb.images import Geometry
from restyle_nb.metrics import Table
from restyle_nb.restyle import ReStyle
from restyle_nb.zoo import DownloadError, load_model

CARD = dict(licence='mit', generator_licence='cc-by-4.0', about='A toy.')


def toy(channels=3, passes=5, seed=0, **kw):
    "A small model with random weights, and numbers everywhere that a round trip could lose"
    torch.manual_seed(seed)
    g = Generator(32, 16, 2, {4: 8, 8: 8, 16: 8, 32: 4}, image_channels=channels)
    g.estimate_latent_avg(100)
    for p in g.parameters(): p.data.add_(.01*torch.randn_like(p))
    e = build_encoder('compact', 'simple', g.n_styles, 16, channels, channels if passes == 1 else None, input_size=32, width=8, widths=(4, 8, 8))
    for b in e.buffers():
        if b.is_floating_point(): b.add_(.1*torch.rand_like(b))
    return ReStyle(e, g, passes=passes, **kw).eval()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


@pytest.fixture(scope='module')
def net(): return toy()


@pytest.fixture(scope='module')
def saved(net, tmp_path_factory): return net.save_pretrained(tmp_path_factory.mktemp('models')/'toy', card=CARD)


# --- there and back

@pytest.mark.parametrize('make', [toy, lambda: toy(1), lambda: toy(4, passes=3), lambda: toy(passes=1), lambda: toy(latent_avg=torch.randn(16)),
                                  lambda: toy(geometry=Geometry((24, 32), (32, 32), (4, 0, 28, 32)))], ids=['rgb', 'grey', 'four', 'single', 'own-average', 'box'])
def test_a_model_comes_back_bit_for_bit(make, tmp_path):
    a = make()
    b = ReStyle.from_pretrained(a.save_pretrained(tmp_path/'m'), device='cpu')
    assert same(a, b) and (a.geometry, a.passes, a.refines) == (b.geometry, b.passes, b.refines) and not b.training
    x = torch.rand(2, a.generator.image_channels, *a.geometry.encoder)*2 - 1
    assert torch.equal(a.invert(x).images, b.invert(x).images) and torch.equal(a.invert(x).codes, b.invert(x).codes)


def test_a_generator_comes_back(net, saved, tmp_path):
    folder = net.generator.save_pretrained(tmp_path/'g')
    for b in (Generator.from_pretrained(folder, device='cpu'), Generator.from_pretrained(saved, device='cpu')):
        assert same(net.generator, b) and not any(p.requires_grad for p in b.parameters())
    assert sorted(p.name for p in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors', 'samples.png']
    with pytest.raises(CheckpointError, match=r'generator without an encoder; load it with Generator\.from_pretrained'): ReStyle.from_pretrained(folder)


def test_half_is_half_and_close(net, saved, tmp_path):
    folder = net.save_pretrained(tmp_path/'h', half=True)
    b, size = ReStyle.from_pretrained(folder, device='cpu'), lambda d: (d/'model.safetensors').stat().st_size
    assert size(folder) < .62*size(saved) and not same(net, b)
    assert torch.equal(net.latent_avg, b.latent_avg) and all(torch.allclose(v, b.state_dict()[k], rtol=1e-3, atol=1e-4) for k, v in net.state_dict().items())


def test_the_same_file_for_load_model(net, saved): assert same(load_model(saved/'model.safetensors', 'cpu'), net)


def test_an_encoder_alone_knows_its_generator(net, tmp_path):
    g = net.generator
    g.name = 'my-faces'
    try: folder = net.save_pretrained(tmp_path/'e', with_generator=False)
    finally: del g.name
    assert not [k for k in look(folder/'model.safetensors').tensors if 'mapping' in k or 'convs.0.modulat' in k]
    b = ReStyle.from_pretrained(folder, device='cpu', generator=g)
    assert same(net, b) and b.passes == net.passes and b.generator is g
    path = save_generator(g, tmp_path/'g.safetensors')
    assert same(net, ReStyle.from_pretrained(folder, device='cpu', generator=path))
    with pytest.raises(CheckpointError, match="without its generator; give generator=, which was called 'my-faces'"): ReStyle.from_pretrained(folder)
    with pytest.raises(CheckpointError, match='was trained for the generator my-faces .*codes mean something else'): ReStyle.from_pretrained(folder, generator=toy(seed=1).generator)
    with pytest.raises(CheckpointError, match=r'encoder without its generator; load it with ReStyle'): Generator.from_pretrained(folder)
    with pytest.raises(CheckpointError, match='average code of its own'): toy(latent_avg=torch.randn(16)).save_pretrained(tmp_path/'o', with_generator=False)


class Foreign(nn.Module):
    "A generator of somebody else"
    n_styles, style_dim, image_channels = 8, 16, 3
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 3*32*32)/50)
        self.register_buffer('latent_avg', torch.zeros(8, 16))
    def synthesize(self, w): return torch.tanh(w.mean(1) @ self.weight).view(-1, 3, 32, 32)


class Odd(Generator):
    "One of ours that paints in its own way: built again from its configuration it would paint otherwise"
    def synthesize(self, w, *args, **kw): return -super().synthesize(w, *args, **kw)


def test_foreign_generators_are_refused_and_their_encoders_are_not(net, tmp_path):
    a = ReStyle(net.encoder, Foreign()).eval()
    with pytest.raises(CheckpointError, match='the generator is a Foreign, not one of restyle_nb.*with_generator=False'): a.save_pretrained(tmp_path/'f')
    assert not (tmp_path/'f'/'model.safetensors').exists()
    b = ReStyle.from_pretrained(a.save_pretrained(tmp_path/'f', with_generator=False), device='cpu', generator=a.generator)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(a.invert(x).codes, b.invert(x).codes)
    odd = Odd(32, 16, 2, {4: 8, 8: 8, 16: 8, 32: 4})
    for save in (odd.save_pretrained, ReStyle(net.encoder, odd, latent_avg=torch.randn(16)).save_pretrained):
        with pytest.raises(CheckpointError, match='the generator is a Odd'): save(tmp_path/'odd')
    with pytest.raises(CheckpointError, match='the encoder is a Linear'): ReStyle(nn.Linear(2, 2), net.generator, net.geometry).save_pretrained(tmp_path/'l')


def test_what_was_made_fast_is_refused(net, tmp_path):
    import restyle_nb.fast
    with pytest.raises(CheckpointError, match='folded encoder'): net.fast().save_pretrained(tmp_path/'f')


# --- the folder

def test_the_configuration_is_the_header(saved):
    config, header = json.loads((saved/'config.json').read_text()), look(saved/'model.safetensors').header
    data = (saved/'model.safetensors').read_bytes()
    assert header.items() <= config.items() and config['library_name'] == 'restyle_nb' and config['licence'] == 'mit' and config['generator_licence'] == 'cc-by-4.0'
    assert (config['bytes'], config['sha256']) == (len(data), hashlib.sha256(data).hexdigest())


def header_of(text):
    _, top, body = text.split('---\n', 2)
    return yaml.safe_load(top), body


def test_the_hub_can_read_the_card(saved):
    from huggingface_hub import ModelCard
    c = ModelCard.load(saved/'README.md')
    assert c.data.library_name == 'restyle_nb' and c.data.pipeline_tag == 'image-to-image' and 'gan-inversion' in c.data.tags
    assert c.data.license == 'other' and c.data.to_dict()['license_name'] == 'mit-and-cc-by-4.0'
    for said in ('A toy.', '| licence | mit |', '| licence of the generator | cc-by-4.0 |', 'sees 32×32 pixels, trained for 5 steps', '8 styles of 16', 'Nobody has stated any measurement', 'no evidence'): assert said in c.text


@pytest.mark.parametrize('one, two, top', [
    ('mit', 'MIT', dict(license='mit')), ('Apache-2.0', 'apache-2.0', dict(license='apache-2.0')), ('unknown', 'unknown', dict(license='unknown')),
    ('mit', None, {}), (None, 'mit', {}), ('mit', 'Nvidia Source Code License-NC', dict(license='other', license_name='mit-and-nvidia-source-code-license-nc')),
    ('my own: ask', 'my own: ask', dict(license='other', license_name='my-own-ask'))])
def test_the_licence_on_top_covers_both(net, one, two, top):
    head, body = header_of(model_card(net, 'me/toy', dict(licence=one, generator_licence=two)))
    assert {k: v for k, v in head.items() if k.startswith('license')} == top
    assert body.count('not stated: ask before you use it') == (one is None) + (two is None)


def test_the_licence_of_an_embedded_generator_is_known_by_its_weights(tmp_path):
    a = load_model('faces64', 'cpu')
    said = lambda: header_of(model_card(a, 'x', dict(licence='apache-2.0')))[0].get('license')
    assert said() == 'apache-2.0'
    assert 'licence of the generator' not in model_card(a, 'x', with_generator=False) and "generator='faces64'" in model_card(a, 'x', with_generator=False)
    with torch.no_grad(): a.generator.const.add_(.1)      # tuned: another generator, whatever it is called
    assert said() is None


def test_numbers_on_the_card(net):
    scores = torch.tensor([[.5, .7], [.1, .3]])
    text = model_card(net, 'x', dict(metrics=Table(dict(l2=scores)), limits=['Toys only.']))
    assert 'Measured on 2 pictures, mean ± standard error' in text and '| average image | 0.6 ± 0.1 |' in text and '| step 1 | 0.2 ± 0.1 |' in text and '- Toys only.' in text
    assert '| note | two lines |' in model_card(net, 'x', dict(note='two\nlines'))
    text = model_card(net, 'x', dict(metrics={'step 5': {'L2': [.02, .001]}}, measured='on a Tuesday', seed=3))
    assert 'Measured on a Tuesday.' in text and '| step 5 | 0.02 ± 0.001 |' in text and '| seed | 3 |' in text


@pytest.mark.parametrize('kind', ['restyle', 'generator', 'encoder'])
def test_the_example_on_the_card_runs(kind, tmp_path, monkeypatch):
    a = load_model('faces64', 'cpu')
    monkeypatch.chdir(tmp_path)
    (a.generator if kind == 'generator' else a).save_pretrained('it', **({'with_generator': False} if kind == 'encoder' else {}))
    Image.new('RGB', (80, 70), 'olive').save('picture.png')
    code = re.search('```python\n(.*?)```', Path('it/README.md').read_text(encoding='utf-8'), re.S)[1]
    names = {}
    exec(code, names)
    if kind == 'restyle': assert Image.open('steps.png').width > 500
    assert names['images'].shape == (8, 3, 64, 64) if kind == 'generator' else len(names['inv'].codes) == 6


def test_pictures_of_the_card(net, tmp_path):
    folder = net.save_pretrained(tmp_path/'p')
    assert Image.open(folder/'average.png').size == (32, 32) and '](average.png)' in (folder/'README.md').read_text()
    net.save_pretrained(folder, x=torch.rand(2, 3, 32, 32))
    assert not (folder/'average.png').exists() and '](film_strip.png)' in (folder/'README.md').read_text() and Image.open(folder/'film_strip.png').width > 32*7
    for c in (1, 2, 4): assert Image.open(toy(c).generator.save_pretrained(tmp_path/str(c))/'samples.png').size == (32*4 + 3*2, 32*2 + 2)


def test_an_edited_card_is_its_editors(net, tmp_path):
    folder, readme = net.save_pretrained(tmp_path/'c', card=dict(about='First.')), tmp_path/'c'/'README.md'
    net.save_pretrained(folder, card=dict(about='Second.'))
    assert 'Second.' in readme.read_text() and 'First.' not in readme.read_text()
    readme.write_text('My own words.')
    net.save_pretrained(folder, card=dict(about='Third.'))
    net.save_pretrained(folder, x=torch.rand(1, 3, 32, 32))
    assert readme.read_text() == 'My own words.' and (folder/'average.png').exists() and not (folder/'film_strip.png').exists()    # it may show them


# --- what is refused

def broken(saved, tmp_path, change):
    d = Path(shutil.copytree(saved, tmp_path/'broken'))
    change(d)
    return d


def config(**new):
    def change(d): (d/'config.json').write_text(json.dumps(json.loads((d/'config.json').read_text()) | new))
    return change


def flipped(d):
    b = bytearray((d/'model.safetensors').read_bytes()); b[-5] ^= 1
    (d/'model.safetensors').write_bytes(b)


@pytest.mark.parametrize('change, said', [
    (lambda d: (d/'config.json').unlink(), r'has no config\.json, so it is no model that save_pretrained wrote.*load_model\('),
    (lambda d: (d/'config.json').write_text('{'), r'config\.json cannot be read \(JSONDecodeError\)'),
    (lambda d: (d/'config.json').write_bytes(b'\xff\xfe'), r'config\.json cannot be read \(UnicodeDecodeError\)'),
    (lambda d: (d/'config.json').write_text('[1]'), 'a model of another library'),
    (config(library_name='diffusers'), 'a model of diffusers, not of restyle_nb'),
    (config(format=2), 'of format 2, this version reads up to 1; upgrade'),
    (config(format=0, library_version='0.0.9'), r'of format 0, from before format 1.*load it with restyle_nb 0\.0\.9'),
    (config(format=None), 'of format None'), (config(kind='spaceship'), "speaks of a 'spaceship'"),
    (lambda d: (d/'model.safetensors').unlink(), r'has no model\.safetensors, though its config\.json speaks of one'),
    (lambda d: os.truncate(d/'model.safetensors', 5000), r'has 5000 bytes, expected \d+ bytes: it was changed or cut short'),
    (flipped, 'has sha256 .*…, expected sha256'),
], ids=str)
def test_what_is_not_a_whole_model_of_ours(saved, tmp_path, change, said):
    d = broken(saved, tmp_path, change)
    for cls in (ReStyle, Generator):
        with pytest.raises(CheckpointError, match=said) as e: cls.from_pretrained(d, device='cpu')
        assert str(d) in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('src, said', [('nowhere', "no such folder, and a repository on the hub is written 'owner/repository'"), ('a/b/c', 'no such folder'),
                                       ('../x', 'no such folder'), ('me/', 'no such folder'), ('-me/..', 'no such folder')])
def test_names_that_cannot_be(src, said):
    with pytest.raises(CheckpointError, match=said): ReStyle.from_pretrained(src)


def test_a_file_is_not_a_folder(saved):
    with pytest.raises(CheckpointError, match='is a file.*load_model'): ReStyle.from_pretrained(saved/'model.safetensors')


# --- the hub, in small

class Hub(http.server.ThreadingHTTPServer):
    "Repositories {'owner/name': {revision: {file: bytes}}}; `private` ones want a token"
    daemon_threads = True
    def __init__(self):
        self.repos, self.private, self.log = {}, set(), []
        super().__init__(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()
    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}'
    def handle_error(self, *a): pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *a): pass
    def answer(self, code, body=b'', **headers):
        self.send_response(code)
        for k, v in headers.items(): self.send_header(k.replace('_', '-'), v)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)
    def do_GET(self):
        s, m = self.server, re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', self.path.split('?')[0])
        if not m: return self.answer(404)          # the package asks for other things too
        s.log.append((self.command, self.path))
        repo, revision, file = m.groups()
        if repo not in s.repos or repo in s.private and self.headers.get('Authorization') != 'Bearer secret': return self.answer(401, X_Error_Code='RepoNotFound')
        tree = s.repos[repo].get(revision)
        if tree is None: return self.answer(404, X_Error_Code='RevisionNotFound')
        commit = hashlib.sha1(json.dumps([(k, hashlib.sha1(v).hexdigest()) for k, v in sorted(tree.items())]).encode()).hexdigest()
        if file not in tree: return self.answer(404, X_Error_Code='EntryNotFound', X_Repo_Commit=commit)
        self.answer(200, tree[file], ETag=f'"{hashlib.sha1(tree[file]).hexdigest()}"', X_Repo_Commit=commit)
    do_HEAD = do_GET


def tree(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def far(monkeypatch, tmp_path):
    "The hub's package, pointed at a server here"
    from huggingface_hub import constants
    s = Hub()
    monkeypatch.setattr(constants, 'ENDPOINT', s.url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', s.url + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    for k in ('no_proxy', 'NO_PROXY'): monkeypatch.setenv(k, '127.0.0.1')
    yield s
    s.shutdown(); s.server_close()


def test_from_the_hub_and_then_from_its_cache(far, net, saved, tmp_path):
    far.repos['me/toy'] = {'main': tree(saved)}
    get = lambda **kw: ReStyle.from_pretrained('me/toy', device='cpu', cache_dir=tmp_path/'kept', **kw)
    with pytest.raises(DownloadError, match='not in the cache'): get(local_files_only=True)
    assert not far.log
    assert same(get(), net) and {p for _, p in far.log} == {f'/me/toy/resolve/main/{f}' for f in ('config.json', 'model.safetensors')}
    far.log.clear()
    assert same(get(), net) and 'GET' not in {c for c, _ in far.log}          # asked whether it changed, and fetched nothing
    far.log.clear()
    assert same(get(local_files_only=True), net) and same(Generator.from_pretrained('me/toy', device='cpu', cache_dir=tmp_path/'kept', local_files_only=True), net.generator)
    assert not far.log
    assert same(get(force_download=True), net) and 'GET' in {c for c, _ in far.log}


def test_load_model_reads_it_there_too(far, net, saved, tmp_path):
    far.repos['me/toy'] = {'main': tree(saved)}
    assert same(load_model(hub='me/toy/model.safetensors', device='cpu', cache=tmp_path/'kept'), net)


def test_revisions(far, net, saved, tmp_path):
    other = toy(seed=3)
    far.repos['me/toy'] = {'main': tree(saved), 'v2': tree(other.save_pretrained(tmp_path/'v2'))}
    assert same(ReStyle.from_pretrained('me/toy', device='cpu', revision='v2'), other)
    assert same(ReStyle.from_pretrained('me/toy', device='cpu'), net)
    with pytest.raises(DownloadError, match='no such branch, tag or commit'): ReStyle.from_pretrained('me/toy', revision='v3')


def test_halves_of_two_revisions_are_noticed(far, saved, tmp_path):
    far.repos['me/toy'] = {'main': tree(saved) | {'model.safetensors': tree(toy(seed=3).save_pretrained(tmp_path/'v2'))['model.safetensors']}}
    with pytest.raises(CheckpointError, match='me/toy: model.safetensors has .*changed or cut short'): ReStyle.from_pretrained('me/toy')


def test_private_and_missing_repositories(far, net, saved):
    far.repos['me/toy'], far.private = {'main': tree(saved)}, {'me/toy'}
    assert same(ReStyle.from_pretrained('me/toy', device='cpu', token='secret'), net)
    for name in ('me/none', 'you/toy'):
        with pytest.raises(DownloadError, match=f'{name}: .*no such repository, or it is private.*hf auth login'): ReStyle.from_pretrained(name, token=False)
    with pytest.raises(DownloadError, match='private'): ReStyle.from_pretrained('me/toy', token='wrong', force_download=True)


def test_repositories_of_others(far):
    far.repos |= {'me/bert': {'main': {'config.json': b'{"model_type": "bert"}'}}, 'me/old': {'main': {'net.pt': b'x'*100}}, 'me/half': {'main': {'config.json': b'{"library_name": "restyle_nb", "format": 1, "kind": "restyle"}'}}}
    with pytest.raises(CheckpointError, match=r"me/bert: is a model of another library.*load_model\(hub='me/bert/FILE'\)"): ReStyle.from_pretrained('me/bert')
    with pytest.raises(CheckpointError, match=r"me/old: has no config\.json.*load_model\(hub='me/old/FILE'\)"): ReStyle.from_pretrained('me/old')
    with pytest.raises(CheckpointError, match=r'me/half: has no model\.safetensors'): ReStyle.from_pretrained('me/half')


def test_a_hub_out_of_order(far, saved, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda s: None)      # the package waits long between its tries
    far.shutdown(); far.server_close()
    with pytest.raises(DownloadError, match='me/toy: config.json could not be fetched') as e: ReStyle.from_pretrained('me/toy')
    assert '\n' not in str(e.value)


def test_offline_from_a_cache_that_was_copied(saved, tmp_path):
    "On a machine without network: the cache's layout, HF_HUB_OFFLINE, and nothing of the hub's package before it is needed"
    repo, commit = tmp_path/'models--me--toy', 'a'*40
    (repo/'refs').mkdir(parents=True); (repo/'refs'/'main').write_text(commit)
    shutil.copytree(saved, repo/'snapshots'/commit)
    code = f'''
import socket, sys
def refuse(*a, **k): raise OSError('asked for the network')
socket.socket.connect = socket.create_connection = refuse
from restyle_nb.hub import ReStyle
assert 'huggingface_hub' not in sys.modules
net = ReStyle.from_pretrained('me/toy', device='cpu', cache_dir={str(tmp_path)!r})
print(net.passes, net.geometry.encoder)
try: ReStyle.from_pretrained('me/other', cache_dir={str(tmp_path)!r})
except Exception as e: print(type(e).__name__, e)
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, env=os.environ | dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == '5 (32, 32)' and re.match('DownloadError me/other: config.json could not be fetched from the hub .*(cache|OFFLINE)', done.stdout.splitlines()[1])


# --- pushing

@pytest.fixture
def sent(monkeypatch):
    "In place of `HfApi`: records what would be uploaded"
    import huggingface_hub
    calls = types.SimpleNamespace(token=None, created=[], commits=[], fail=None)
    class Api:
        def __init__(self, token=None): calls.token = token
        def create_repo(self, repo_id, private=None, exist_ok=False):
            if calls.fail: raise calls.fail
            calls.created.append((repo_id, private, exist_ok)); return types.SimpleNamespace(repo_id=repo_id)
        def create_commit(self, repo_id, operations, **how):
            files = {}
            for o in operations:
                with o.as_file() as f: files[o.path_in_repo] = f.read()
            calls.commits.append((repo_id, files, how))
            return types.SimpleNamespace(commit_url=f'there/{repo_id}/commit/1', pr_url='there/pr/1' if how['create_pr'] else None)
    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    return calls


def test_the_stand_in_takes_what_the_library_takes(sent):
    "The names used here are arguments of the real `HfApi`"
    from huggingface_hub.hf_api import HfApi
    for f, names in ((HfApi.create_repo, {'repo_id', 'private', 'exist_ok'}), (HfApi.create_commit, {'repo_id', 'operations', 'commit_message', 'revision', 'create_pr'})):
        assert names <= set(inspect.signature(f).parameters)


def test_what_is_pushed_is_what_comes_back(far, sent, net):
    assert net.push_to_hub('me/toy', card=CARD, x=torch.rand(1, 3, 32, 32), private=True, token='t', commit_message='First') == 'there/me/toy/commit/1'
    (repo, files, how), = sent.commits
    assert sent.token == 't' and sent.created == [('me/toy', True, True)] and how == dict(commit_message='First', revision=None, create_pr=None)
    assert set(files) == {'config.json', 'model.safetensors', 'README.md', 'film_strip.png'}
    assert "from_pretrained('me/toy')" in files['README.md'].decode() and '# toy' in files['README.md'].decode()
    far.repos[repo] = {'main': files}
    assert same(ReStyle.from_pretrained('me/toy', device='cpu'), net)


def test_a_proposal_on_a_branch(sent, net):
    assert net.generator.push_to_hub('me/g', card=dict(licence='mit'), branch='next', create_pr=True, half=True) == 'there/pr/1'
    assert sent.commits[0][2] == dict(commit_message='Model saved by restyle_nb', revision='next', create_pr=True) and 'samples.png' in sent.commits[0][1]


def test_a_folder_is_pushed_with_its_edited_card_and_nothing_else(sent, net, tmp_path):
    folder = net.save_pretrained(tmp_path/'mine', card=CARD)
    (folder/'README.md').write_text("Edited. ReStyle.from_pretrained('mine')", encoding='utf-8')
    for name in ('secret.txt', 'last.pt', 'face.png'): (folder/name).write_bytes(b'private')
    push_folder(folder, 'me/toy')
    files = sent.commits[0][1]
    assert set(files) == {'config.json', 'model.safetensors', 'README.md', 'average.png'} and files['README.md'] == b"Edited. ReStyle.from_pretrained('me/toy')"
    flipped(folder)
    with pytest.raises(CheckpointError, match='changed or cut short'): push_folder(folder, 'me/toy')
    assert len(sent.commits) == 1


@pytest.mark.parametrize('facts, said', [({}, 'licence and generator_licence not stated'), (dict(licence='mit'), 'me/toy: generator_licence not stated'), (dict(generator_licence='mit'), 'licence not stated')])
def test_nothing_goes_out_without_a_licence(sent, net, facts, said):
    with pytest.raises(HubError, match=said + r'.*card=dict\('): net.push_to_hub('me/toy', card=facts)
    assert not sent.created and not sent.commits
    net.push_to_hub('me/toy', card=dict(licence='unknown'), with_generator=False)        # the encoder's licence is enough for the encoder
    assert len(sent.commits) == 1


def fault(name, status=None):
    e = type(name, (Exception,), {})('first line\nsecond line')
    if status: e.response = types.SimpleNamespace(status_code=status)
    return e


@pytest.mark.parametrize('e, said', [(fault('LocalTokenNotFoundError'), 'nobody is signed in; run `hf auth login`'), (fault('HfHubHTTPError', 403), r'may not do that \(status 403\)'),
    (fault('RepositoryNotFoundError', 401), 'no such repository, or it is private'), (fault('HFValidationError'), "write 'owner/repository'"), (fault('ConnectError'), 'ConnectError: first line')])
def test_pushing_fails_in_words(sent, net, e, said):
    sent.fail = e
    with pytest.raises(HubError, match=f'me/toy: could not be pushed .*{said}') as err: net.push_to_hub('me/toy', card=CARD)
    assert '\n' not in str(err.value)


def test_without_the_hubs_package(net, saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    assert same(ReStyle.from_pretrained(net.save_pretrained(tmp_path/'n'), device='cpu'), net)      # folders need nothing
    with pytest.raises(HubError, match=r'pip install "restyle_nb\[hub\]"'): push_folder(saved, 'me/toy')
    with pytest.raises(DownloadError, match='pip install huggingface_hub'): ReStyle.from_pretrained('me/toy')


def test_names_and_arguments_are_those_of_the_mixin():
    "Whoever calls a `ModelHubMixin` can call these: but for `config`, which the model knows, the card's facts, and patterns, since exactly the model's files are pushed"
    from huggingface_hub import ModelHubMixin
    given = lambda f: {k: p.default for k, p in inspect.signature(f).parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and k != 'self'}
    ours = dict(from_pretrained=given(ReStyle.from_pretrained), push_to_hub=given(push_folder) | given(ReStyle.push_to_hub), save_pretrained=given(ReStyle.save_pretrained))
    left_out = {'config', 'model_card_kwargs', 'push_to_hub', 'allow_patterns', 'ignore_patterns', 'delete_patterns'}
    for name, o in ours.items():
        theirs = given(getattr(ModelHubMixin, name))
        assert set(theirs) - left_out <= set(o), name
        assert {k: o[k] for k in theirs if k in o and k != 'commit_message'} == {k: v for k, v in theirs.items() if k in o and k != 'commit_message'}
    assert given(Generator.from_pretrained).keys() <= ours['from_pretrained'].keys()
    with pytest.raises(TypeError, match='revison'): Generator.from_pretrained('me/toy', revison='v2')


# --- runs

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    from restyle_nb.runs import Options, train
    out = tmp_path_factory.mktemp('private-place')/'run'
    return train(Options(data='faces64', generator='faces64', val=4, trunk='compact', widths=(8, 8, 8, 8), width=8, n_steps=2, lpips=0, w_norm=.01, batch_size=2,
                         iterations=2, val_every=1, out=str(out), device='cpu'), progress=False)


def test_a_run_is_pushed_with_what_it_knows(run, far, sent):
    from restyle_nb.runs import load
    push_run(run.folder, 'me/run', card=dict(licence='mit', limits=['Two batches.']), private=True)
    files = sent.commits[0][1]
    assert set(files) == {'config.json', 'model.safetensors', 'README.md', 'average.png'} and sent.created[0][1] is True
    text, best = files['README.md'].decode(), min(run.history.of('val'), key=lambda r: r['loss'][-1])
    assert '2 batches of 2, 2 steps each; L2 + 0.01 w norm; seed 0' in text and f"| step 2 | {best['loss'][-1]:.4g} | {best['l2'][-1]:.4g} |" in text
    assert f"after {best['iteration']} batches, on the validation pictures" in text and '| data | faces64 |' in text and '- Two batches.' in text
    assert not [k for k, v in files.items() if b'private-place' in v or os.path.expanduser('~').encode() in v and os.path.expanduser('~') != '/']
    far.repos['me/run'] = {'main': files}
    assert same(ReStyle.from_pretrained('me/run', device='cpu'), load(run.folder, 'cpu'))


def test_a_trainer_is_a_run(run, sent, tmp_path):
    push_run(run, 'me/run', card=dict(licence='mit'), with_generator=False)
    assert b'mapping' not in sent.commits[0][1]['model.safetensors'][:20000]
    with pytest.raises(HubError, match='has no options.yaml.*give the Trainer'): push_run(tmp_path, 'me/run')
    with pytest.raises(HubError, match='this Trainer has no folder'): push_run(types.SimpleNamespace(folder=None, net=run.net), 'me/run')
    assert run_card(tmp_path) == {}


# --- commands

def test_the_command_writes_first_and_pushes_then(sent, tmp_path, capsys):
    from restyle_nb.cli import restyle_push
    picture, folder = tmp_path/'p.png', tmp_path/'card'
    Image.new('RGB', (64, 64), 'teal').save(picture)
    assert restyle_push(['faces64', 'me/toy', '--folder', str(folder), '--licence', 'mit', '--about', 'A face.', '--limits', 'One.', '--limits', 'Two.', '--pictures', str(picture)]) == 0
    assert not sent.created and (folder/'film_strip.png').exists()
    assert restyle_push([str(folder), 'me/toy', '--private', '--message', 'Hello']) == 0
    (repo, files, how), = sent.commits
    assert repo == 'me/toy' and sent.created[0][1] is True and how['commit_message'] == 'Hello'
    assert all(o in files['README.md'].decode() for o in ('A face.', '- One.', '- Two.', "from_pretrained('me/toy')"))
    assert capsys.readouterr().out.splitlines() == [str(folder), 'there/me/toy/commit/1']
    assert restyle_push([str(folder), 'me/toy', '--licence', 'mit']) == 2 and 'is written already' in capsys.readouterr().err
    assert restyle_push(['faces64', 'me/toy']) == 2 and capsys.readouterr().err.startswith('restyle_push: me/toy: licence not stated')
    assert len(sent.commits) == 1


def test_the_command_takes_a_run(run, sent):
    from restyle_nb.cli import restyle_push
    assert restyle_push([str(run.folder), 'me/run', '--licence', 'mit', '--encoder-only']) == 0
    assert '2 batches of 2' in sent.commits[0][1]['README.md'].decode()


def test_commands_take_shared_models(far, net, saved):
    from restyle_nb.cli import Refused, _model
    far.repos['me/toy'] = {'main': tree(saved)}
    assert same(_model('hub:me/toy', 'cpu'), net) and same(_model(str(saved), 'cpu'), net)
    with pytest.raises(Refused, match='no such repository'): _model('hub:me/none', 'cpu')
