"Widgets without a browser: hostile uploads, threads, speed, and pages that play without a kernel."
import io
import json
import re
import subprocess
import sys
import threading
import time
from base64 import b64decode
from datetime import datetime, timezone
from html.parser import HTMLParser
import numpy as np
import pytest
import torch
from PIL import Image
from restyle_nb import widgets
from restyle_nb.generator import Generator
from restyle_nb.images import Geometry, to_uint8
from restyle_nb.restyle import ReStyle
from restyle_nb.widgets import Blender, Comparison, Explorer, Frame, LatentEditor, Latest, Player, data_uri, player, png
from restyle_nb.zoo import held_out, load_model


def send(widget, name, content):
    "What the browser does with a chosen file"
    file = dict(name=name, type='', size=len(content), content=memoryview(content), last_modified=datetime.now(timezone.utc))
    widget.upload.value = [file]
    return widget


def encoded(im, kind, **kw):
    f = io.BytesIO()
    im.save(f, kind, **kw)
    return f.getvalue()


def pixels(uri):
    "A data URI as uint8 (C,H,W)"
    im = Image.open(io.BytesIO(b64decode(uri.partition(',')[2]))).convert('RGB')
    return torch.from_numpy(np.array(im)).permute(2, 0, 1)


def sources(html): return re.findall(r'<img src="([^"]+)"', html)


@pytest.fixture(scope='module')
def faces(): return held_out(8)

@pytest.fixture(scope='module')
def explorer(): return Explorer().wait()

@pytest.fixture(scope='module')
def net(): return load_model('faces64')


def tiny(size=16, channels=1, **kw):
    "A small model of another kind: grey pictures, an untrained encoder"
    torch.manual_seed(0)
    g = Generator(size, 8, 2, {4 << i: 8 for i in range(5)}, image_channels=channels, **kw)
    g.estimate_latent_avg(50)
    return ReStyle(lambda x, y: (x - y).mean((1, 2, 3))[:, None, None].expand(-1, g.n_styles, 8), g)


# ---------------------------------------------------------------- what is shown

def test_frames_are_the_pictures_of_the_inversion(explorer, net, faces):
    "Bit by bit: input and reconstruction of every step, as PNG, made once"
    explorer.load(faces[2], 'two').wait()
    inv = net.invert(faces[2:3], 5)
    for t, child in enumerate(explorer.stack.children):
        x, y, _ = map(pixels, sources(child.value))
        assert torch.equal(x, to_uint8(faces[2])) and torch.equal(y, to_uint8(inv.images[t, 0])), t
    made = [o.value for o in explorer.stack.children]
    for t in (0, 3, 5):
        explorer.step = t
        assert explorer.shown is explorer.stack.children[t].value
    assert [o.value for o in explorer.stack.children] == made


def test_inversion_is_plain(explorer):
    assert not explorer.inversion.codes.requires_grad and not explorer.inversion.codes.is_inference()
    assert torch.is_grad_enabled()


def test_table_marks_the_step_and_holds_the_scores(explorer):
    explorer.step = 3
    rows = re.findall(r'<tr[^>]*>.*?</tr>', explorer.shown)
    marked = [r for r in rows if 'aria-current' in r]
    assert len(marked) == 1 and marked[0].startswith('<tr aria-current=step><td>3</td>')
    assert f'{explorer.inversion.errors[3, 0]:.4f}' in marked[0]


def test_change_maps_own_or_common_scale(explorer):
    own = [sources(o.value)[2] for o in explorer.stack.children]
    explorer.scale.value = 'one scale for all steps'
    explorer.wait()
    one = [sources(o.value)[2] for o in explorer.stack.children]
    brightest = lambda uris: [pixels(o).int().sum(0).max().item() for o in uris[1:]]
    assert len(set(brightest(own))) == 1                 # each reaches the top of its own scale
    assert brightest(one)[0] == brightest(own)[0] and max(brightest(one)[2:]) < brightest(one)[0]
    explorer.scale.value = 'each step to its own scale'
    explorer.wait()


def test_models_of_other_worlds_and_of_one_pass(explorer):
    explorer.picture.value = 'held-out 1'
    explorer.step = explorer.slider.max
    explorer.model.value = 'faces64-single'
    explorer.wait()
    assert explorer.slider.max == explorer.play.max == explorer.step == 1 and explorer.inversion.n_steps == 1
    explorer.model.value = 'earth64'
    explorer.wait()
    assert explorer.slider.max == explorer.step == 5
    assert torch.equal(pixels(sources(explorer.shown)[0]), to_uint8(held_out(2, 'earth64')[1]))
    assert 'identity' not in explorer.shown and 'L2' in explorer.shown
    explorer.model.value = 'faces64'
    explorer.wait()
    assert 'identity' in explorer.shown


def test_a_model_that_does_not_load_costs_a_message(faces):
    e = Explorer('faces64', models=['faces64', 'nobody64']).wait()
    before = e.shown
    e.model.value = 'nobody64'
    e.wait()
    assert 'nobody64' in e.status and 'restyle-error' in e.message.value
    assert e.model.value == 'faces64' and e.shown == before
    e.picture.value = 'held-out 3'
    assert e.wait().status.startswith('held-out 3: 5 steps')


def test_models_given_as_networks_know_their_world(net):
    assert Explorer(net).wait().status.startswith('held-out 0: 5 steps with your model')
    with pytest.raises(ValueError, match='give pictures='): Explorer(tiny())
    with pytest.raises(ValueError, match='at least 1'): Explorer(net, n_steps=0)
    with pytest.raises(ValueError, match='expected two'): Comparison(dict(a=net))


@pytest.mark.parametrize('kw', [dict(), dict(channels=3), dict(size=32, const_size=(4, 2))])
def test_small_models_of_any_kind(kw):
    m = tiny(**kw)
    x = torch.rand(3, m.generator.image_channels, *m.geometry.encoder, generator=torch.Generator().manual_seed(1))*2 - 1
    e = Explorer(m, x, 2).wait()
    assert e.status.startswith('picture 0: 2 steps'), e.status
    assert Explorer(m, {'one': x[0], 'two': x[1]}, 2).wait().status.startswith('one: ')
    c = Comparison({'a': m, 'b': m}, x, {'a': 3, 'b': 1}).wait()
    assert c.slider.max == 3 and 'after its 1 step' in c.shown
    l = LatentEditor(m, pictures=x, n_steps=2).wait()
    l.sliders['PC 1'].value = 1.
    assert l.wait().status.startswith('picture 0: inverted') and (l.code != l._done[1][0]).any()
    b = Blender(m, m.generator, x, 2).wait()
    assert torch.equal(b.frame.pictures[0], b.frame.pictures[1])
    for w in (e, c, l, b): assert '<img' in w._repr_mimebundle_()['text/html']


def test_pictures_from_files(tmp_path, net, faces):
    paths = []
    for i, x in enumerate(faces[:2]):
        (tmp_path/f'{i}.png').write_bytes(png(x))
        paths.append(tmp_path/f'{i}.png')
    e = Explorer(net, paths, 1).wait()
    assert list(e.picture.options) == ['0.png', '1.png']
    assert e.load(tmp_path/'none.png').wait().status.endswith('none.png: no such file; check the path')
    assert torch.equal(pixels(sources(e.shown)[0]), to_uint8(faces[0]))


# ---------------------------------------------------------------- uploads

BAD = {
    'letter.txt':    (b'Dear reader,\n' * 50, 'not a picture we can read'),
    'empty.png':     (b'', 'the file is empty'),
    'cut.png':       (lambda x: png(x)[:900], 'damaged or cut short'),
    'cut.jpg':       (lambda x: encoded(Image.open(io.BytesIO(png(x))), 'JPEG')[:700], 'damaged or cut short'),
    'drawing.svg':   (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>', 'not a picture we can read'),
    'dot.png':       (lambda x: encoded(Image.new('RGB', (3, 3)), 'PNG'), 'too small'),
    'huge.png':      (lambda x: encoded(Image.new('1', (20000, 12000)), 'PNG'), 'million pixels'),
    '<b onload=x>':  (b'?', 'not a picture we can read'),
}

@pytest.mark.parametrize('name', BAD)
def test_bad_upload_is_a_message_and_the_next_one_works(explorer, faces, name, capfd):
    content, said = BAD[name]
    content = content(faces[0]) if callable(content) else content
    send(explorer, 'good.png', png(faces[4])).wait()
    before, status = explorer.shown, explorer.status
    send(explorer, name, content)
    assert explorer.upload.value == ()                     # ready for the same file again
    explorer.wait()
    assert explorer.status.startswith(name) and said in explorer.status and '\n' not in explorer.status
    assert 'memory' not in explorer.status                 # the file is named, not how we held it
    assert 'restyle-error' in explorer.message.value and '<b' not in explorer.message.value and '<script' not in explorer.message.value
    assert explorer.shown == before and explorer.picture.value == 'good.png' and name not in explorer.picture.options
    send(explorer, 'good.png', png(faces[4])).wait()       # the same file again
    assert explorer.status == status and explorer.shown == before
    assert capfd.readouterr() == ('', '')


def test_too_many_bytes(explorer, monkeypatch, faces):
    monkeypatch.setattr(widgets, 'MAX_UPLOAD', 2**20)
    assert 'more than the 1 MB taken here' in send(explorer, 'scan.png', bytes(3*2**20)).wait().status


def test_a_photograph_of_50_megapixels_works(explorer):
    photo = encoded(Image.linear_gradient('L').convert('RGB').resize((8660, 5774)), 'JPEG', quality=80)
    start = time.perf_counter()
    send(explorer, 'photo.jpg', photo)
    assert time.perf_counter() - start < .2 and explorer.status == 'inverting photo.jpg …'   # at once
    explorer.step = 1                                                                        # and the slider lives
    explorer.wait()
    assert explorer.status.startswith('photo.jpg: 5 steps with')


def test_animated_gif_shows_its_first_frame_and_says_so(explorer, faces):
    ims = [Image.open(io.BytesIO(png(o))) for o in faces[:3]]
    gif = encoded(ims[0], 'GIF', save_all=True, append_images=ims[1:], duration=100)
    assert 'Animated: only its first frame is used.' in send(explorer, 'party.gif', gif).wait().status
    first = torch.from_numpy(np.array(Image.open(io.BytesIO(gif)).convert('RGB'))).permute(2, 0, 1)
    assert torch.equal(pixels(sources(explorer.shown)[0]), first)
    assert 'Animated' not in send(explorer, 'still.gif', encoded(ims[0], 'GIF')).wait().status


@pytest.mark.parametrize('mode, kind', [('RGBA', 'PNG'), ('LA', 'PNG'), ('P', 'PNG'), ('CMYK', 'JPEG'), ('I;16', 'PNG'), ('1', 'BMP'), ('RGB', 'WEBP')])
def test_pictures_of_any_kind(explorer, faces, mode, kind):
    im = Image.open(io.BytesIO(png(faces[5])))
    im = im.convert('L').convert('I').point(lambda v: v*256).convert('I;16') if mode == 'I;16' else im.convert(mode)
    send(explorer, f'{mode}.{kind}', encoded(im, kind)).wait()
    assert explorer.status.startswith(f'{mode}.{kind}: 5 steps')


def test_names_of_uploads(explorer, faces):
    "A name that is taken is not overwritten; only the last few are kept"
    send(explorer, 'held-out 0', png(faces[6])).wait()
    assert explorer.picture.value == 'held-out 0 (yours)'
    for i in range(widgets.KEEP + 2): send(explorer, f'{i}.png', png(faces[i % 8])).wait()
    mine = [o for o in explorer.picture.options if not o.startswith('held-out')]
    assert mine == [f'{i}.png' for i in range(2, widgets.KEEP + 2)] and explorer.picture.value == mine[-1]
    explorer.picture.value = '4.png'
    explorer.wait()
    assert torch.equal(pixels(sources(explorer.shown)[0]), to_uint8(faces[4]))


def test_foreign_pictures_are_told_apart(explorer, faces):
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))*2 - 1
    assert 'does not look like' in send(explorer, 'noise.png', png(noise)).wait().status
    assert 'does not look like' not in send(explorer, 'face.png', png(faces[1])).wait().status


# ---------------------------------------------------------------- threads

class Slow(ReStyle):
    "A model that inverts when it is told to"
    def invert(self, x, *args, **kw):
        self.seen.append(x)
        self.gate.wait(20)
        return super().invert(x, *args, **kw)

@pytest.fixture
def slow(net):
    m = Slow(net.encoder, net.generator, net.geometry)
    m.seen, m.gate = [], threading.Event()
    yield m
    m.gate.set()


def test_latest_input_wins(slow, faces):
    e, said = Explorer(slow, faces), []
    e.message.observe(lambda c: said.append(e.status), 'value')
    while not slow.seen: time.sleep(.01)
    for i in range(1, 8): e.picture.value = f'picture {i}'          # all while the first is being inverted
    assert e.status == 'inverting picture 7 …' and e.inversion is None
    e.step = 2                                                      # stays responsive
    slow.gate.set()
    e.wait()
    assert len(slow.seen) == 2                                      # the first, and the last
    assert torch.equal(e.inversion.x, faces[7:8]) and e.step == 2
    assert [o for o in said if ': 5 steps' in o] == [e.status] and e.status.startswith('picture 7')


def test_a_slider_does_not_repeat_the_inversion(slow, faces):
    e = Explorer(slow, faces)
    while not slow.seen: time.sleep(.01)
    e.scale.value = 'one scale for all steps'
    slow.gate.set()
    e.wait()
    e.scale.value = 'each step to its own scale'
    e.wait()
    assert len(slow.seen) == 1 and e.status.startswith('picture 0: 5 steps')


def test_a_failing_worker_is_told_and_goes_on(slow, faces, capfd):
    slow.gate.set()
    e = Explorer(slow, faces).wait()
    before, invert = e.shown, slow.invert
    slow.invert = lambda *a, **kw: 1/0
    e.picture.value = 'picture 2'
    e.wait()
    assert e.status == 'ZeroDivisionError: division by zero' and e.shown == before and e.picture.value == 'picture 0'
    slow.invert = invert
    e.picture.value = 'picture 2'
    assert e.wait().status.startswith('picture 2: 5 steps')
    assert capfd.readouterr() == ('', '')


def test_no_thread_is_left_behind(explorer):
    explorer.wait()
    time.sleep(.05)
    assert not [t for t in threading.enumerate() if t.name == 'restyle_nb widget']


def test_latest_under_fire():
    "Thousands of wishes: only newest ones are shown, in order, and the last one is"
    shown = []
    worker = Latest(shown.append)
    def job(i):
        def work():
            yield lambda: shown.append((i, worker.generation))
            yield lambda: shown.append((i, worker.generation))
        return work
    for i in range(3000): worker(job(i))
    assert worker.wait(20)
    assert all(g == i + 1 for i, g in shown)               # wish i has number i+1: nothing stale
    assert shown == sorted(shown) and shown[-2:] == [(2999, 3000)]*2


def test_wait_gives_up_in_time():
    gate = threading.Event()
    def job():
        gate.wait(10)
        yield None
    worker = Latest(lambda e: None)
    worker(job)
    start = time.perf_counter()
    assert worker.wait(.1) is False and time.perf_counter() - start < 2
    gate.set()
    assert worker.wait() is True


# ---------------------------------------------------------------- speed

def best_of(n, f):
    times = []
    for i in range(n):
        start = time.perf_counter()
        f(i)
        times.append(time.perf_counter() - start)
    return min(times)

def test_a_step_is_only_another_index(explorer):
    "Python's part of a slider move; what the browser adds is measured in test_lab"
    explorer.wait()
    def move(i): explorer.step = i % (explorer.slider.max + 1); explorer.shown
    assert best_of(20, move) < .005

def test_editing_and_blending_keep_up():
    "From the slider's new value to the frame that is handed to the browser"
    l, b = LatentEditor().wait(), Blender().wait()
    def edit(i): l.sliders['PC 1'].value = .1 + i/10; l.wait()
    def swap(i): b.strength.value = i/10; b.wait()
    assert best_of(8, edit) < .1
    assert best_of(8, swap) < .15
    for i in range(30): b.strength.value = i/30; b.wait()
    assert len(b._cache) <= 24


# ---------------------------------------------------------------- pages without kernel

class Page(HTMLParser):
    "Tags, identifiers and texts of an HTML piece; fails where tags are not closed"
    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.script, self.texts = [], [], '', []
        self.feed(html)
        self.close()
        assert not self.open, self.open
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ('img', 'input', 'meta', 'br'): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data):
        if self.open and self.open[-1] == 'script': self.script += data
        else: self.texts.append(data)
    def all(self, tag): return [a for t, a in self.tags if t == tag]

def data(html): return json.JSONDecoder().raw_decode(html[html.index('const d=') + 8:])[0]


@pytest.fixture(scope='module')
def walk(net, faces): return net.invert(faces[:2], 5)


def test_player_of_an_inversion(walk):
    p = player(walk, i=1)
    page, d = Page(p.html), data(p.html)
    assert len(d['frames']) == 6 and d['start'] == 5
    assert [f['text'].split(':')[0] for f in d['frames']] == ['average'] + [f'step {t} of 5' for t in range(1, 6)]
    images = {i: u for i, u in enumerate(d['pictures'])} | dict(zip(d['frames'][5]['show'], (a['src'] for a in page.all('img'))))
    for t, f in enumerate(d['frames']):
        x, y, _ = (pixels(images[i]) for i in f['show'])
        assert torch.equal(x, to_uint8(walk.x[1])) and torch.equal(y, to_uint8(walk.images[t, 1]))
    assert len({f['show'][0] for f in d['frames']}) == 1    # the input is stored once


def test_every_part_is_labelled(walk):
    page = Page(player(walk).html)
    assert all(a['alt'] and a['width'] == a['height'] == '192' for a in page.all('img'))
    (root, *_), (slider,), (button,) = page.all('div'), page.all('input'), page.all('button')
    assert root['role'] == 'group' and root['aria-label'] and slider['aria-label'] == 'step'
    assert slider['type'] == 'range' and button['type'] == 'button' and button['aria-pressed'] == 'false'
    assert 'tabindex' not in str(page.tags)


def test_identifiers_are_stable_and_unique(walk):
    mark = lambda p: Page(p.html).all('div')[0]['id']
    a, b = player(walk), player(walk, i=1)
    assert mark(a) == mark(player(walk)) and mark(a) != mark(b)
    assert mark(a) != mark(player(walk, start=0)) != mark(player(walk, titles=['a', 'b', 'c']))
    # tools/nbs.py takes identifiers made from hashes out of what it compares
    assert all(re.fullmatch(r'(?=[a-z]*\d)[a-z_]*[0-9a-f]{8,}', mark(p)) for p in (a, b))


def test_nothing_comes_from_the_network(explorer, walk):
    for html in (player(walk).html, explorer.wait().static().html, explorer.shown, widgets.STYLE):
        assert not re.search(r'https?:|//[a-z]|@import|url\(', re.sub(r'base64,[\w+/=]+', '', html)), html[:200]


def test_texts_cannot_break_out(faces):
    nasty = '</script><img src=x onerror=alert(1)> & "quotes"'
    p = Player([Frame((faces[0],), nasty), Frame((faces[1],), 'ID and DATA')], [nasty], name=nasty, label=nasty)
    page = Page(p.html)
    assert len(page.all('img')) == 1 and len(page.all('script')) == 1
    assert data(p.html)['frames'][0]['text'] == nasty and data(p.html)['frames'][1]['text'] == 'ID and DATA'
    assert page.all('div')[0]['aria-label'] == nasty


def test_colours_suit_light_and_dark_pages():
    "Text takes the colour of the page; the only fixed colours are of bars and marks"
    rules = re.findall(r'(?<![-\w])(?:color|background):([^;}]+)', widgets.STYLE)
    assert rules and all(re.search(r'inherit|currentColor|transparent|rgba\(128,128,128', r) for r in rules), rules
    assert 'prefers-reduced-motion' in widgets.SCRIPT


def test_player_refuses_what_does_not_fit(faces):
    with pytest.raises(ValueError, match='no frames'): player([])
    with pytest.raises(ValueError, match='2 texts for 1 frames'): player([faces[0]], ['a', 'b'])
    with pytest.raises(ValueError, match='a frame has 2 pictures, expected 1'): player([(faces[0], faces[1])], titles=['one'])


def test_player_takes_all_kinds_of_pictures(faces, tmp_path):
    large = torch.zeros(3, 700, 1400)
    p = player([faces[0], to_uint8(faces[1]), png(faces[2]), Image.new('LA', (20, 10)), large], name='kind')
    page = Page(p.save(tmp_path/'page.html').read_text(encoding='utf-8'))
    assert page.all('img')[0]['width'] == '192' and page.all('img')[0]['height'] == '96'
    assert Image.open(io.BytesIO(b64decode(data_uri(large).partition(',')[2]))).size == (384, 192)
    assert data(p.html)['frames'][1]['text'] == 'kind 1 of 4'


def test_static_form_of_every_widget(explorer):
    for w in (explorer, Comparison(), LatentEditor(), Blender()):
        bundle = w.wait()._repr_mimebundle_()
        assert {'application/vnd.jupyter.widget-view+json', 'text/html', 'text/plain'} <= set(bundle)
        page = Page(bundle['text/html'])
        assert len(data(bundle['text/html'])['frames']) >= 2 and len(page.all('img')) == 3
        assert len(bundle['text/html']) < 110_000
        assert w._repr_mimebundle_()['text/html'] == bundle['text/html']
    assert [f['text'] for f in data(LatentEditor().wait()._repr_mimebundle_()['text/html'])['frames']][2].startswith('PC 1 +0.0')


def test_static_form_follows_the_sliders():
    b = Blender().wait()
    a = b.static().html
    b.strength.value = .5
    b.wait()
    assert b.static().html != a and 'strength 0.5' in b.static().html


def test_importing_needs_no_ipywidgets():
    code = "import sys, restyle_nb.widgets; print([m for m in ('ipywidgets', 'matplotlib', 'sklearn', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
