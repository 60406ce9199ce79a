"Files that come from elsewhere: what a bad line, a bad server and a bad file do, and what the zoo makes of it. No real network."
import hashlib, http.server, json, os, re, signal, subprocess, sys, threading, time, types
from pathlib import Path
import pytest, torch
import restyle_nb.zoo as zoo
from restyle_nb.checkpoints import CheckpointError, publish_generator, publish_restyle, save_restyle
from restyle_nb.encoders import build_encoder
from restyle_nb.generator import Generator
from restyle_nb.images import Geometry
from restyle_nb.restyle import ReStyle
from restyle_nb.zoo import DownloadError, cache_folder, download, fetch, list_models, load_generator, load_model

DATA = bytes(torch.randint(1, 256, (1_000_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).tolist())
SHA = hashlib.sha256(DATA).hexdigest()
HALF = 500_000


class Server(http.server.ThreadingHTTPServer):
    "Serves `files`; the settings say how well it behaves"
    daemon_threads, request_queue_size = True, 32
    def __init__(self):
        self.files, self.log, self.headers = {'/w.pt': DATA}, [], []
        self.ranges, self.if_range, self.etag, self.modified, self.length = True, True, '"v1"', None, None
        self.kind, self.cut, self.stall, self.status, self.redirect, self.drip, self.chunked, self.extra = 'application/octet-stream', None, None, None, None, 0, False, {}
        super().__init__(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()
    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}/w.pt'
    def handle_error(self, *a): pass


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def do_GET(self):
        s = self.server
        path = self.path.split('?')[0]
        s.log.append((path, self.headers.get('Range'))); s.headers.append(dict(self.headers))
        if s.redirect and path in s.redirect:
            self.send_response(302); self.send_header('Location', s.redirect[path]); self.send_header('Content-Length', '0'); self.end_headers()
            return
        if s.status or path not in s.files: return self.send_error(s.status or 404)
        data, want = s.files[path], self.headers.get('Range') if s.ranges else None
        changed = s.if_range and self.headers.get('If-Range') not in (None, s.etag, s.modified)
        start = int(want[6:-1]) if want and not changed else 0
        if want and not changed and start >= len(data):
            self.send_response(416); self.send_header('Content-Range', f'bytes */{len(data)}'); self.send_header('Content-Length', '0'); self.end_headers()
            return
        self.send_response(206 if want and not changed else 200)
        if want and not changed: self.send_header('Content-Range', f'bytes {start}-{len(data)-1}/{len(data)}')
        if not s.chunked: self.send_header('Content-Length', str(s.length or len(data) - start))
        for k, v in {'Content-Type': s.kind, 'ETag': s.etag, 'Last-Modified': s.modified, **s.extra}.items():
            if v is not None: self.send_header(k, v)
        self.end_headers()
        body = data[start:s.cut] if s.cut is not None else data[start:]
        for i in range(0, len(body), 50_000):
            self.wfile.write(body[i:i+50_000]); time.sleep(s.drip)
        if s.stall: s.stall.wait(20)


@pytest.fixture
def server():
    s = Server()
    yield s
    if s.stall: s.stall.set()
    s.shutdown(); s.server_close()

@pytest.fixture
def quick(monkeypatch): monkeypatch.setattr(zoo.time, 'sleep', lambda s: None)

def names(d): return sorted(p.name for p in d.iterdir())
def broken(server, path, cut=HALF, **kw):
    "Leave a part of `cut` bytes"
    server.cut = cut
    with pytest.raises(DownloadError): download(server.url, path, tries=1, **kw)
    server.cut = None; server.log.clear()


# --- whole files

def test_a_file_arrives(server, tmp_path):
    path = tmp_path/'deep'/'w.pt'
    assert download(server.url, path, len(DATA), SHA) == path and path.read_bytes() == DATA
    assert names(path.parent) == ['w.pt'] and server.log == [('/w.pt', None)]
    assert download(server.url, path, len(DATA), SHA[:8].upper()) == path and len(server.log) == 1   # it is there: only checked

def test_a_file_address(tmp_path):
    (tmp_path/'a b.bin').write_bytes(DATA)
    assert download((tmp_path/'a b.bin').as_uri(), tmp_path/'c.bin', sha256=SHA).read_bytes() == DATA
    with pytest.raises(DownloadError, match='(?i)no such file'): download((tmp_path/'none.bin').as_uri(), tmp_path/'d.bin')
    assert names(tmp_path) == ['a b.bin', 'c.bin']

def test_without_a_length(server, tmp_path):
    server.chunked, server.etag = True, None
    assert download(server.url, tmp_path/'w.pt', sha256=SHA).read_bytes() == DATA

def test_bar_only_when_asked(server, tmp_path, capfd):
    download(server.url, tmp_path/'a.pt')
    assert capfd.readouterr() == ('', '')
    download(server.url, tmp_path/'b.pt', progress=True)
    out, err = capfd.readouterr()
    assert not out and 'b.pt' in err and '100%' in err


# --- parts

def test_a_broken_line_is_taken_up_again(server, tmp_path):
    path = tmp_path/'w.pt'
    server.cut = HALF
    with pytest.raises(DownloadError, match='ended after 500000 of 1000000 bytes'): download(server.url, path, tries=1)
    assert names(tmp_path) == ['w.pt.lock', 'w.pt.part'] and (tmp_path/'w.pt.part').stat().st_size == HALF
    server.cut = None; server.log.clear()
    assert download(server.url, path, sha256=SHA).read_bytes() == DATA
    assert server.log == [('/w.pt', f'bytes={HALF - zoo.OVERLAP}-')] and names(tmp_path) == ['w.pt']

def test_it_goes_on_by_itself(server, tmp_path, quick):
    server.cut = HALF
    with pytest.raises(DownloadError, match='ended'): download(server.url, tmp_path/'w.pt', tries=3)
    assert [r for _, r in server.log] == [None] + [f'bytes={HALF - zoo.OVERLAP}-'] * 2

def test_a_server_without_ranges_starts_again(server, tmp_path):
    broken(server, tmp_path/'w.pt')
    server.ranges = False
    assert download(server.url, tmp_path/'w.pt').read_bytes() == DATA
    assert len(server.log) == 1

@pytest.mark.parametrize('how', ['etag', 'etag ignored', 'date ignored', 'nothing to tell', 'another size', 'shorter than the part', 'weak etag'])
def test_a_changed_file_starts_again(server, tmp_path, how):
    if 'date' in how: server.etag, server.modified = None, 'Mon, 01 Jan 2024 00:00:00 GMT'
    if how in ('nothing to tell', 'another size', 'shorter than the part'): server.etag = None
    if how == 'weak etag': server.etag = 'W/"v1"'
    broken(server, tmp_path/'w.pt')
    new = DATA[::-1] if how == 'nothing to tell' else b'\0' + DATA[1:]   # but for the first case, what is asked for again does not differ
    if how == 'another size': new += b'more'
    if how == 'shorter than the part': new = DATA[:400_000]
    server.files['/w.pt'] = new
    if 'ignored' in how or how == 'weak etag': server.if_range = False
    if server.etag: server.etag = server.etag.replace('v1', 'v2')
    if server.modified: server.modified = 'Tue, 02 Jan 2024 00:00:00 GMT'
    assert download(server.url, tmp_path/'w.pt').read_bytes() == new
    assert names(tmp_path) == ['w.pt'] and len(server.log) == (1 if how == 'etag' else 2)   # a server that knows If-Range is asked once

def test_a_part_of_another_address_is_not_continued(server, tmp_path):
    broken(server, tmp_path/'w.pt')
    server.files['/other.pt'] = DATA[::-1]
    assert download(server.url.replace('w.pt', 'other.pt'), tmp_path/'w.pt').read_bytes() == DATA[::-1]
    assert server.log == [('/other.pt', None)]

@pytest.mark.parametrize('note', ['', '{"url": ', '[1]', 'null'])
def test_a_damaged_note_starts_again(server, tmp_path, note):
    broken(server, tmp_path/'w.pt')
    (tmp_path/'w.pt.lock').write_text(note)
    assert download(server.url, tmp_path/'w.pt').read_bytes() == DATA
    assert server.log == [('/w.pt', None)]

def test_a_part_with_damage_at_its_end_starts_again(server, tmp_path):
    broken(server, tmp_path/'w.pt')
    with open(tmp_path/'w.pt.part', 'r+b') as f: f.seek(-10, 2); f.write(b'\0' * 10)
    assert download(server.url, tmp_path/'w.pt').read_bytes() == DATA

CHILD = "import sys; from restyle_nb.zoo import download; print(flush=True); download(sys.argv[1], sys.argv[2])"

def test_a_killed_download_resumes(server, tmp_path):
    server.drip, part = .1, tmp_path/'w.pt.part'
    p = subprocess.Popen([sys.executable, '-c', CHILD, server.url, str(tmp_path/'w.pt')], stdout=subprocess.PIPE)
    p.stdout.readline()
    end = time.time() + 60
    while not (part.exists() and part.stat().st_size > 200_000) and time.time() < end: time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    have = part.stat().st_size
    assert 200_000 < have < len(DATA) and not (tmp_path/'w.pt').exists()
    server.drip = 0; server.log.clear()
    assert download(server.url, tmp_path/'w.pt', sha256=SHA).read_bytes() == DATA   # the dead process holds no lock
    assert server.log == [('/w.pt', f'bytes={have - zoo.OVERLAP}-')]

@pytest.mark.parametrize('far', ['threads', 'processes'])
def test_two_at_once_fetch_once(server, tmp_path, far):
    server.drip, path = .02, tmp_path/'w.pt'
    if far == 'threads':
        work = [threading.Thread(target=download, args=(server.url, path)) for _ in range(4)]
        for t in work: t.start()
        for t in work: t.join(60)
    else:
        work = [subprocess.Popen([sys.executable, '-c', CHILD, server.url, str(path)], stdout=subprocess.DEVNULL) for _ in range(2)]
        assert [p.wait(120) for p in work] == [0, 0]
    assert path.read_bytes() == DATA and server.log == [('/w.pt', None)] and names(tmp_path) == ['w.pt']


# --- bad answers: one sentence each, and nothing kept that is not weights

def refuses(tmp_path, words, f):
    with pytest.raises(DownloadError, match=words) as e: f()
    assert '\n' not in str(e.value) and names(tmp_path) == []
    return str(e.value)

@pytest.mark.parametrize('kind', ['text/html; charset=utf-8', 'application/octet-stream'])
def test_a_page_is_not_weights(server, tmp_path, kind):
    server.kind, server.files['/w.pt'] = kind, b'\xef\xbb\xbf\n<!DOCTYPE html><html><title>Google\x1b Drive -\n Quota exceeded</title>' + b' ' * 100_000
    text = refuses(tmp_path, 'HTML page, not weights|HTML page .*, not weights', lambda: download(server.url, tmp_path/'w.pt'))
    assert 'Google Drive - Quota exceeded' in text and 'quota' in text and '\x1b' not in text

def test_a_page_in_place_of_the_rest(server, tmp_path):
    broken(server, tmp_path/'w.pt')
    server.kind, server.etag, server.files['/w.pt'] = 'text/html', None, b'<html>sign in</html>'
    with pytest.raises(DownloadError, match='HTML page'): download(server.url, tmp_path/'w.pt')
    assert b'<html' not in b''.join(p.read_bytes() for p in tmp_path.iterdir())

def test_a_pointer_is_not_weights(server, tmp_path):
    server.files['/w.pt'] = b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n'
    refuses(tmp_path, 'Git LFS pointer', lambda: download(server.url, tmp_path/'w.pt'))

def test_wrong_hash(server, tmp_path): refuses(tmp_path, 'sha256 .* expected 0000000000', lambda: download(server.url, tmp_path/'w.pt', sha256='0' * 64))
def test_a_hash_of_a_few_digits_proves_nothing(server, tmp_path): refuses(tmp_path, 'sha256', lambda: download(server.url, tmp_path/'w.pt', sha256=SHA[:7]))

def test_wrong_size_is_refused_before_the_first_byte(server, tmp_path):
    refuses(tmp_path, 'offers 1000000 bytes, expected 999999', lambda: download(server.url, tmp_path/'w.pt', size=999_999))

def test_wrong_size_without_a_length(server, tmp_path, quick):
    server.chunked, server.etag = True, None
    refuses(tmp_path, 'more than 999999 bytes', lambda: download(server.url, tmp_path/'w.pt', size=999_999))
    with pytest.raises(DownloadError, match='ended after 1000000 of 1000001'): download(server.url, tmp_path/'w.pt', size=1_000_001)

def test_a_claim_of_100_gb(server, tmp_path):
    server.length = 100 * 10**9
    refuses(tmp_path, 'claims 93 GiB', lambda: download(server.url, tmp_path/'w.pt'))

def test_an_endless_file_is_bounded(server, tmp_path):
    server.chunked = True
    refuses(tmp_path, 'more than 200000 bytes', lambda: download(server.url, tmp_path/'w.pt', most=200_000))

@pytest.mark.parametrize('claim', [2_000_000, 10**15 - 1])
def test_a_length_that_lies(server, tmp_path, claim, quick):
    server.length = claim
    with pytest.raises(DownloadError, match='ended after 1000000 of 2000000|claims'): download(server.url, tmp_path/'w.pt', timeout=5)
    assert not (tmp_path/'w.pt').exists()

@pytest.mark.parametrize('status,words', [(404, 'no such file'), (403, 'refuses access'), (401, 'password'), (429, 'too often'), (503, 'out of order'), (418, 'refuses')])
def test_status(server, tmp_path, status, words):
    server.status = status
    assert f'status {status}' in refuses(tmp_path, words, lambda: download(server.url, tmp_path/'w.pt'))

def test_a_stalled_line(server, tmp_path):
    server.cut, server.stall, start = HALF, threading.Event(), time.time()
    with pytest.raises(DownloadError, match='nothing came for 0.5 s'): download(server.url, tmp_path/'w.pt', timeout=.5, tries=1)
    assert time.time() - start < 10 and (tmp_path/'w.pt.part').stat().st_size == HALF

def test_a_server_that_says_nothing(tmp_path):
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen()
        refuses(tmp_path, 'no answer in time', lambda: download(f'http://127.0.0.1:{s.getsockname()[1]}/w.pt', tmp_path/'w.pt', timeout=.5))

def test_nobody_there(tmp_path):
    import socket
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    refuses(tmp_path, 'no connection', lambda: download(f'http://127.0.0.1:{port}/w.pt', tmp_path/'w.pt'))
    refuses(tmp_path, 'no connection', lambda: download('http://no-such-host.invalid/w.pt', tmp_path/'w.pt'))

@pytest.mark.parametrize('url', ['ftp://x.org/w.pt', 'w.pt', 'javascript:alert(1)', 'data:,x', 'http://[bad/w.pt', 'http://127.0.0.1:port/w.pt', 'http:///w.pt', 'http://127.0.0.1/a b\n'])
def test_addresses_that_are_none(tmp_path, url): refuses(tmp_path, 'not an address|no connection', lambda: download(url, tmp_path/'w.pt', timeout=2))

def test_coded_data_is_refused(server, tmp_path):
    server.extra = {'Content-Encoding': 'gzip'}
    refuses(tmp_path, 'gzip', lambda: download(server.url, tmp_path/'w.pt'))


# --- redirects and secrets

def test_redirects_are_followed_to_http_only(server, tmp_path):
    server.redirect = {'/a': '/w.pt', '/file': 'file:///etc/passwd', '/ftp': 'ftp://127.0.0.1/w.pt', '/loop': '/loop'}
    base = server.url[:-len('/w.pt')]
    assert download(base + '/a', tmp_path/'w.pt').read_bytes() == DATA
    (tmp_path/'w.pt').unlink()
    for o in ('/file', '/ftp', '/loop'): refuses(tmp_path, 'redirects', lambda: download(base + o, tmp_path/'w.pt'))

def test_a_part_is_continued_behind_a_redirect(server, tmp_path):
    server.redirect, url = {'/a': '/w.pt'}, server.url.replace('/w.pt', '/a')
    server.cut = HALF
    with pytest.raises(DownloadError): download(url, tmp_path/'w.pt', tries=1)
    server.cut = None; server.log.clear()
    assert download(url, tmp_path/'w.pt').read_bytes() == DATA
    assert server.log[-1] == ('/w.pt', f'bytes={HALF - zoo.OVERLAP}-')

def test_never_down_from_https():
    from urllib.request import Request
    with pytest.raises(DownloadError, match='never from https to http'):
        zoo._Redirects().redirect_request(Request('https://u:secret@x.org/a'), None, 302, '', {}, 'http://x.org/b')

def test_secrets_are_sent_and_not_told(server, tmp_path, capfd):
    other = Server()
    try:
        server.redirect = {'/a': other.url}
        url = server.url.replace('http://', 'http://me:s3cret%21@').replace('/w.pt', '/a') + '?token=t0ken'
        other.cut = HALF
        with pytest.raises(DownloadError) as e: download(url, tmp_path/'w.pt', tries=1, progress=True)
        assert server.headers[0]['Authorization'] == 'Basic bWU6czNjcmV0IQ==' and 'Authorization' not in other.headers[0]
        told = str(e.value) + ''.join(capfd.readouterr()) + (tmp_path/'w.pt.lock').read_text()
        assert not re.search('s3cret|t0ken|me:', told) and '127.0.0.1' in told
    finally: other.shutdown(); other.server_close()


# --- disks

def test_a_full_disk(server, tmp_path, monkeypatch):
    free = zoo.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(zoo.shutil, 'disk_usage', lambda p: free)
    refuses(tmp_path, r'1 MB are to come, and the disk has 0 MB free', lambda: download(server.url, tmp_path/'w.pt'))

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full here')
def test_a_disk_that_fills_up(server, tmp_path):
    (tmp_path/'w.pt.part').symlink_to('/dev/full')
    with pytest.raises(DownloadError, match='No space left'): download(server.url, tmp_path/'w.pt')
    assert not (tmp_path/'w.pt').exists()

def test_folders_that_cannot_be(server, tmp_path):
    (tmp_path/'file').touch(); (tmp_path/'dir').mkdir()
    with pytest.raises(DownloadError, match='file'): download(server.url, tmp_path/'file'/'w.pt')
    with pytest.raises(DownloadError, match='is a folder'): download(server.url, tmp_path/'dir')
    assert names(tmp_path) == ['dir', 'file']


# --- the cards

def test_the_table_of_released_models():
    cards = list_models(released=True)
    assert len({c.name for c in cards}) == len({c.file for c in cards}) == len({c.url for c in cards}) == len(cards)
    assert {c.name for c in cards if c.kind == 'restyle'} == {
        *(f'restyle-psp-{o}' for o in ('faces', 'cars', 'churches', 'wild', 'toonify')), *(f'restyle-e4e-{o}' for o in ('faces', 'cars', 'churches', 'wild', 'horses'))}
    assert {'irse50', 'moco', 'curricularface'} <= {c.name for c in cards}
    for c in cards:
        assert all(c.get(k) for k in ('kind', 'what', 'file', 'licence', 'origin', 'page', 'url', 'paper')), c.name
        assert c.url.startswith('https://') and c.page.startswith('https://') and '/' not in c.file and {'bytes', 'sha256'} <= set(c)
        if 'drive' in c.page: assert c.page.split('/')[-2] in c.url
        if c.kind in ('restyle', 'generator'): assert c.n_styles == 2 * (c.output[0].bit_length() - 1) - 2
    assert cards._repr_markdown_().count('\n') == len(cards) + 1 and 'restyle-psp-faces' in repr(cards)

@pytest.mark.parametrize('name', ['restyle-psp-cars', 'restyle-e4e-faces', 'restyle-psp-churches'])
def test_cards_agree_with_what_is_read(name, tmp_path):
    "A thin network in the published layout, with the trunk, head and sizes of the card"
    torch.manual_seed(0)
    c = next(c for c in list_models(released=True) if c.name == name)
    sizes = [4 * 2**i for i in range(c.output[0].bit_length() - 2)]
    g = Generator(size=c.output[0], style_dim=16, n_mlp=1, channels=dict.fromkeys(sizes, 4)); g.latent_avg.normal_()
    e = build_encoder(c.trunk, n_styles=c.n_styles, style_dim=16, width=4, head=c.head)
    o = dict(psp='', e4e='Progressive')[name.split('-')[1]] + 'BackboneEncoder'
    code = dict(cars='cars_encode', faces='ffhq_encode', churches='church_encode')[name.split('-')[2]]
    box = (64, 0, 448, 512) if 'cars' in name else None
    net = ReStyle(e, g, Geometry(tuple(c.encoder), tuple(c.output), box))
    torch.save(publish_restyle(net, dataset_type=code, encoder_type=('ResNet' if c.trunk == 'resnet34' else '') + o), tmp_path/c.file)
    again = load_model(name, 'cpu', cache=tmp_path)
    assert again.geometry == net.geometry and again.encoder.config['head'] == c.head and again.encoder.config['trunk'] == c.trunk
    assert names(tmp_path) == sorted([c.file, c.file + '.sha256'])


def test_embedded_models_stay_the_default(tmp_path):
    assert {'faces64', 'faces64-single', 'faces64-single-long', 'toons64', 'earth64'} <= {m.name for m in list_models()}
    assert not {m.name for m in list_models()} & {m.name for m in list_models(released=True)}
    assert list_models(tmp_path, released=True) == []
    (tmp_path/'released.json').write_text('{')
    with pytest.raises(CheckpointError, match='released.json'): list_models(tmp_path, released=True)

def test_cache_folder(monkeypatch, tmp_path):
    for k in ('RESTYLE_NB_HOME', 'XDG_CACHE_HOME', 'LOCALAPPDATA'): monkeypatch.delenv(k, raising=False)
    assert cache_folder().name == 'restyle_nb' and cache_folder().parent != Path.home()
    if sys.platform.startswith('linux'):
        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'x')); assert cache_folder() == tmp_path/'x'/'restyle_nb'
    monkeypatch.setenv('RESTYLE_NB_HOME', str(tmp_path/'home'))
    assert cache_folder() == tmp_path/'home' and cache_folder(tmp_path) == tmp_path


# --- from a name to a model

@pytest.fixture(scope='module')
def published(tmp_path_factory):
    "A random model with published names, and the bytes of its checkpoint and of its generator's"
    torch.manual_seed(0)
    g = Generator(size=32, style_dim=16, n_mlp=2, channels={4: 8, 8: 8, 16: 8, 32: 8}); g.estimate_latent_avg(200)
    net = ReStyle(build_encoder('resnet34', n_styles=8, style_dim=16, width=8), g, Geometry((256, 256), (32, 32)))
    with torch.no_grad():   # random heads ask for nothing to speak of
        for p in net.encoder.head.parameters(): p.mul_(3)
    d = tmp_path_factory.mktemp('published')
    torch.save(publish_restyle(net.eval(), dataset_type='ffhq_encode', encoder_type='ResNetBackboneEncoder'), d/'net.pt')
    torch.save(publish_generator(g), d/'gen.pt')
    return net, (d/'net.pt').read_bytes(), (d/'gen.pt').read_bytes()

@pytest.fixture
def world(server, published, tmp_path, monkeypatch):
    "A table of released models whose addresses are the local server; an empty cache"
    net, whole, gen = published
    server.files |= {'/net.pt': whole, '/gen.pt': gen}
    base = dict(list_models(released=True)[0], encoder=[256, 256], output=[32, 32], n_styles=8, sha256=None, bytes=None, licence='none', page='https://example.org/page')
    card = lambda f, **k: dict(base, url=server.url.replace('w.pt', f), file='published_' + f, **k)
    d = tmp_path/'table'; d.mkdir()
    (d/'released.json').write_text(json.dumps(dict(models={'restyle-toy': card('net.pt'), 'stylegan2-toy': card('gen.pt', kind='generator', encoder=None),
        'restyle-cars': card('net.pt', output=[512, 512]), 'facenet': card('w.pt', kind='face net')})))
    monkeypatch.setenv('RESTYLE_NB_HOME', str(tmp_path/'cache'))
    return d, tmp_path/'cache'

def test_a_released_model_end_to_end(world, server, published):
    d, cache = world
    x = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1)) * 2 - 1
    want = published[0].invert(x, 2)
    got = load_model('restyle-toy', 'cpu', folder=d).invert(x, 2)
    assert torch.equal(got.codes, want.codes) and (want.codes[1] - want.codes[0]).abs().max() > 1e-4
    assert names(cache) == ['published_net.pt', 'published_net.pt.sha256'] and len(server.log) == 1
    digest, name = (cache/'published_net.pt.sha256').read_text().split()
    assert (digest, name) == (hashlib.sha256(published[1]).hexdigest(), 'published_net.pt')
    again = load_model('restyle-toy', 'cpu', folder=d)
    assert len(server.log) == 1 and torch.equal(again.latent_avg, published[0].latent_avg)

def test_a_released_generator(world, published):
    d, cache = world
    for name in ('stylegan2-toy', 'restyle-toy'):
        g = load_generator(name, 'cpu', d)
        assert g.config == published[0].generator.config and not any(p.requires_grad for p in g.parameters())
    assert torch.equal(load_model('restyle-toy', 'cpu', 'stylegan2-toy', d).latent_avg, published[0].latent_avg)

def test_a_file_saved_by_hand_counts(world, server, published):
    d, cache = world
    cache.mkdir(); (cache/'published_net.pt').write_bytes(published[1])
    load_model('restyle-toy', 'cpu', folder=d)
    assert server.log == [] and (cache/'published_net.pt.sha256').exists()

def test_a_page_saved_by_hand_does_not(world, server):
    d, cache = world
    cache.mkdir(); (cache/'published_net.pt').write_text('<html>quota</html>' * 10); (cache/'published_w.pt').write_text('<html>quota</html>' * 10)
    with pytest.raises(CheckpointError, match='web page'): load_model('restyle-toy', 'cpu', folder=d)
    with pytest.raises(CheckpointError, match='web page'): fetch('facenet', folder=d)
    assert names(cache) == ['published_net.pt', 'published_w.pt']    # no hash was noted: the right file may still come

def test_a_later_change_is_noticed(world, published):
    d, cache = world
    load_model('restyle-toy', 'cpu', folder=d)
    f = cache/'published_net.pt'; raw = bytearray(published[1]); raw[len(raw)//2] ^= 1; f.write_bytes(raw)
    with pytest.raises(CheckpointError, match='when it was first used'): load_model('restyle-toy', 'cpu', folder=d)
    f.write_bytes(published[1])
    load_model('restyle-toy', 'cpu', folder=d)

def test_a_given_path_comes_first_and_stays_alone(world, server, published, tmp_path):
    d, cache = world
    mine = tmp_path/'mine'; mine.mkdir(); (mine/'published_net.pt').write_bytes(published[1])
    assert torch.equal(load_model('restyle-toy', 'cpu', folder=d, path=mine/'published_net.pt').latent_avg, published[0].latent_avg)
    assert fetch('restyle-toy', path=mine/'published_net.pt', folder=d) == mine/'published_net.pt'
    assert server.log == [] and not cache.exists() and names(mine) == ['published_net.pt']
    with pytest.raises(CheckpointError, match='no such file'): load_model('restyle-toy', 'cpu', folder=d, path=mine/'none.pt')

def test_another_models_file_is_noticed(world, published, tmp_path):
    d, cache = world
    with pytest.raises(CheckpointError, match='output is 32×32, and 512×512 on the card of restyle-cars'): load_model('restyle-cars', 'cpu', folder=d)
    assert names(cache) == ['published_net.pt']

def test_auxiliary_files(world, server):
    d, cache = world
    server.files['/w.pt'] = b'\x80\x02' + DATA
    assert fetch('facenet', folder=d) == cache/'published_w.pt' == fetch('facenet', folder=d)
    assert names(cache) == ['published_w.pt', 'published_w.pt.sha256'] and len(server.log) == 1
    with pytest.raises(CheckpointError, match='facenet'): fetch('facenets', folder=d)

def test_one_message_says_what_to_do(world, server):
    d, cache = world
    server.status = 404
    with pytest.raises(DownloadError) as e: load_model('restyle-toy', 'cpu', folder=d)
    text = str(e.value)
    for word in ('restyle-toy', 'status 404', 'https://example.org/page', str(cache/'published_net.pt'), 'path='): assert word in text
    assert '\n' not in text and names(cache) == []

def test_a_known_hash_is_held(world, server):
    d, cache = world
    table = json.loads((d/'released.json').read_text()); table['models']['facenet'] |= dict(sha256='0' * 64, bytes=len(DATA))
    (d/'released.json').write_text(json.dumps(table))
    with pytest.raises(DownloadError, match='sha256'): fetch('facenet', folder=d)
    assert names(cache) == []

def test_names_that_are_nearly_right():
    with pytest.raises(CheckpointError, match='did you mean restyle-psp-faces'): load_model('restyle-psp-face', 'cpu')
    with pytest.raises(CheckpointError, match='faces64-single, .*released=True'): load_model('cats', 'cpu')

def test_no_name_asks_the_network_unasked(monkeypatch):
    def refuse(*a, **k): raise AssertionError('asked the network')
    monkeypatch.setattr(zoo, '_open', refuse)
    load_model('faces64', 'cpu'); list_models(released=True)
    with pytest.raises(CheckpointError): load_model('cats', 'cpu')
    with pytest.raises(AssertionError): load_model('restyle-psp-faces', 'cpu', cache='/nonexistent/zoo' if os.name != 'nt' else None)


# --- the hub

@pytest.fixture
def hub(monkeypatch, published, tmp_path):
    "A stand-in for huggingface_hub"
    m, calls = types.ModuleType('huggingface_hub'), []
    def hf_hub_download(repo_id, filename, cache_dir=None):
        calls.append((repo_id, filename, cache_dir))
        if repo_id == 'me/none': raise RuntimeError('404 Client Error.\nRepository Not Found')
        p = tmp_path/'hub'/filename; p.parent.mkdir(parents=True, exist_ok=True); p.write_bytes(published[1])
        return str(p)
    m.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, 'huggingface_hub', m)
    return calls

def test_from_the_hub(world, server, hub, published, tmp_path):
    d, cache = world
    for kw in (dict(name='restyle-toy', hub='me/models/'), dict(hub='me/models/sub/net.pt'), dict(name='restyle-toy', hub='me/models/x.pt', cache=tmp_path/'c')):
        assert torch.equal(load_model(**kw, device='cpu', folder=d).latent_avg, published[0].latent_avg)
    assert hub == [('me/models', 'published_net.pt', None), ('me/models', 'sub/net.pt', None), ('me/models', 'x.pt', str(tmp_path/'c'/'hub'))]
    assert server.log == [] and not cache.exists()
    with pytest.raises(DownloadError, match='me/none: published_net.pt could not be fetched from the hub .*404 Client Error') as e: load_model('restyle-toy', 'cpu', folder=d, hub='me/none')
    assert '\n' not in str(e.value)
    for bad in ('models', '/', 'me/', ''):
        with pytest.raises(DownloadError, match='owner/repository'): load_model('restyle-toy', 'cpu', folder=d, hub=bad)

def test_the_cache_comes_before_the_hub(world, hub, published):
    d, cache = world
    cache.mkdir(); (cache/'published_net.pt').write_bytes(published[1])
    load_model('restyle-toy', 'cpu', folder=d, hub='me/models')
    assert hub == []

def test_without_the_hubs_package(world, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(DownloadError, match='pip install huggingface_hub'): load_model('restyle-toy', 'cpu', folder=world[0], hub='me/models')
