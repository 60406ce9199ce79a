"Widgets without a browser: what is shown, edits, toons, hostile uploads, threads, speed, and pages that play without a kernel."
import copy
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
from restyle_nb.directions import pca, readings, sefa
from restyle_nb.editing import Direction, edit, home_of, style_sizes, sweep
from restyle_nb.generator import Generator
from restyle_nb.images import to_uint8
from restyle_nb.judges import load_judge
from restyle_nb.restyle import ReStyle, bootstrap
from restyle_nb.toonify import toonify
from restyle_nb.widgets import (Blender, Comparison, Explorer, Frame, LatentEditor, Latest, Player, Toonifier, data_uri,
                                player, png)
from restyle_nb.zoo import held_out, load_generator, load_model


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


# ---------------------------------------------------------------- the editor

@pytest.fixture(scope='module')
def ways(net): return pca(net, 9) + sefa(net, 4)

@pytest.fixture
def editor(net, ways): return LatentEditor(net, ways).wait()

def patiently(test, seconds=20):
    end = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < end
        time.sleep(.01)

def move(l, **strengths):
    for k, a in strengths.items(): l.sliders[k.replace('_', ' ')].value = a
    return l.wait()


def test_the_editor_shows_the_edit(editor, net, ways):
    "Bit by bit what `edit` draws, in the chosen layers, with moves in style space too; at rest the picture itself"
    code = net.invert(held_out(1), 5).codes[-1]
    assert torch.equal(editor.code, code) and torch.equal(*editor.frame.pictures[:2])
    move(editor, PC_1=1.5, PC_3=-2.)
    e = edit(net, code, {ways[0]: 1.5, ways[2]: -2.})
    assert torch.equal(editor.now.w, e.w) and torch.equal(editor.code, e.w)
    assert torch.equal(editor.frame.pictures[1], e.y[0].clamp(-1, 1)) and torch.equal(editor.frame.pictures[0], edit(net, code, {}).y[0].clamp(-1, 1))
    assert editor.frame.text.startswith('PC 1 +1.5, PC 3 -2.0 standard deviations: layers all')
    editor.layers.value = 'coarse + medium'
    editor.wait()
    assert torch.equal(editor.now.w, edit(net, code, {ways[0].only('coarse+medium', net): 1.5, ways[2].only('coarse+medium', net): -2.}).w)
    channels = Direction('paint', torch.randn(sum(style_sizes(net)), generator=torch.Generator().manual_seed(0)), space='style', home=home_of(net))
    l = move(LatentEditor(net, [channels]).wait(), paint=.5)
    assert torch.equal(l.code, code) and torch.equal(l.frame.pictures[1], edit(net, code, {channels: .5}).y[0].clamp(-1, 1))
    assert not torch.equal(*l.frame.pictures[:2])


def test_only_as_many_sliders_as_fit(editor, ways):
    "What is in use stays; what rests makes place"
    names = [d.name for d in ways]
    assert list(editor.sliders) == names[:6] and [o for o, _ in editor.add.options[1:]] == names[6:9]
    move(editor, PC_2=1.)
    for k in names[6:9]: editor.add.value = k
    assert len(editor.sliders) == editor.most == 8 and 'PC 1' not in editor.sliders and editor.add.label == '…'
    assert tuple(editor.sliders.values()) == editor.box.children
    editor.set.value = 'closed form'
    assert list(editor.sliders) == ['PC 2'] + names[9:] and editor.sliders['PC 2'].value == 1.
    assert editor.wait().frame.text.startswith('PC 2 +1.0 ')


def test_undo_and_reset(editor, monkeypatch):
    now = [0.]
    monkeypatch.setattr(widgets.time, 'monotonic', lambda: now[0])
    assert editor.undo.disabled
    for t, a in enumerate((.5, .7, 1.)): now[0] = .1*t; move(editor, PC_1=a)   # one drag
    now[0] = 5.
    move(editor, PC_1=2.)
    editor.layers.value = 'fine'
    move(editor, PC_4=-1.)
    editor.set.value = 'closed form'                       # an unused slider goes, and undo brings it back
    editor.reset.click()
    states = [editor._state()]
    for _ in range(5):
        editor.undo.click()
        states.append(editor._state())
    assert states == [({}, 'all'), ({'PC 1': 2., 'PC 4': -1.}, 'fine'), ({'PC 1': 2.}, 'fine'), ({'PC 1': 2.}, 'all'), ({'PC 1': 1.}, 'all'), ({}, 'all')]
    assert editor.undo.disabled and torch.equal(*editor.wait().frame.pictures[:2])


def test_foreign_directions(net, ways):
    "Refused with the sentence of `check`, allowed by name; those without a home too"
    there = load_generator('toons64')
    with pytest.raises(ValueError) as e: ways[0].check(there)
    l = LatentEditor('toons64', ways[:3]).wait()
    assert l.status == str(e.value) and 'restyle-error' in l.message.value and not l.sliders
    assert l.permit.description == 'allow faces64' and l.permit.layout.display is None and torch.equal(*l.frame.pictures[:2])
    assert '<img' in l._repr_mimebundle_()['text/html']
    l.permit.click()
    assert list(l.wait().sliders) == ['PC 1', 'PC 2', 'PC 3'] and l.permit.layout.display == 'none' and 'inverted with' in l.status
    move(l, PC_2=1.)
    assert torch.equal(l.code, edit(there, l._done[1][0], {ways[1]: 1.}, allow='faces64').w)
    assert list(LatentEditor('toons64', ways[:3], allow='faces64').sliders) == ['PC 1', 'PC 2', 'PC 3']
    mixed = {'here': torch.randn(128), 'lost': Direction('lost', torch.randn(128))}
    l = LatentEditor('toons64', mixed).wait()
    assert list(l.sliders) == ['here'] and "allow='unknown'" in l.status and l.permit.description == 'allow unknown'
    l.permit.click()
    assert list(l.wait().sliders) == ['here', 'lost']
    short = LatentEditor('toons64', [Direction('short', torch.randn(7), home=home_of(net) | dict(style_dim=7))], allow='faces64').wait()
    assert 'does not fit' in short.status and not short.sliders


def test_directions_in_any_form(net, tmp_path):
    v, full = torch.randn(128), torch.randn(net.generator.n_styles, 128)
    class Holder: vector = v
    l = LatentEditor(net, dict(a=v, b=full, c=Holder())).wait()
    assert list(l.sliders) == list('abc') and [l.directions[k].space for k in 'abc'] == ['w', 'w+', 'w']
    move(l, b=2.)
    assert torch.allclose(l.code - l._done[1][0], 2*full, atol=1e-5) and 'b +2.0 times the vector' in l.frame.text
    l.directions['a'].save(tmp_path/'a.safetensors')
    assert torch.equal(LatentEditor(net, tmp_path/'a.safetensors').directions['a'].vector, v)
    for wrong, said in ((dict(x=torch.zeros(3)), r'x: a direction has shape \(3,\)'), ({}, 'no directions')):
        with pytest.raises(ValueError, match=said): LatentEditor(net, wrong)


def test_what_the_judge_reads(editor, net):
    "Before, after and the change in standard deviations over held-out people; a judge of one's own reads too"
    move(editor, PC_2=2.)
    rows = re.findall(r'<tr><td[^>]*>(.*?)</td><td>(.*?)</td><td>(.*?)</td>.*?</span>(.*?)</td></tr>', editor.frame.panel)
    judge, people = load_judge('attributes'), held_out(128)
    said, over = readings(judge, torch.stack(editor.frame.pictures[:2])), readings(judge, people)
    assert len(rows) == 6 and rows[0][0] in ('yaw', 'dark eyes')
    assert [abs(float(r[3])) for r in rows] == sorted((abs(float(r[3])) for r in rows), reverse=True)
    for k, before, after, change in rows:
        p, q = said[k.replace(' ', '_')].tolist()
        assert abs(float(before) - p) < .006 and abs(float(after) - q) < .006
        assert abs(float(change)) <= abs(q - p)/over[k.replace(' ', '_')].std() + .06 and float(change)*(q - p) >= 0
    def redness(y): return y[:, 0].mean((1, 2))
    l = move(LatentEditor(tiny(channels=3), pictures=torch.rand(1, 3, 16, 16), n_steps=1, judge=redness).wait(), PC_1=1.)
    assert 'redness' in l.frame.panel


def test_sweep_of_the_slider_moved_last(editor, net, ways):
    move(editor, PC_3=1., PC_2=-1.)
    shown = [pixels(o) for o in sources(editor.strip.value)]
    s = sweep(net, edit(net, editor._done[1][0], {ways[2]: 1.}).w, ways[1])
    assert len(shown) == 7 and all((a.int() - to_uint8(b[0].clamp(-1, 1)).int()).abs().max() <= 1 for a, b in zip(shown, s.images))
    assert 'PC 2, in standard deviations' in editor.strip.value
    at = [('aria-current' in o) for o in re.findall('<figure[^>]*>', editor.strip.value)]
    assert at == [i == 2 for i in range(7)]
    before = sources(editor.strip.value)
    move(editor, PC_2=3.)                                   # the same strip, another mark
    assert sources(editor.strip.value) == before and re.findall('<figure[^>]*>', editor.strip.value)[6] == '<figure aria-current=true>'


def test_a_move_need_not_wait_for_the_sweep(net, ways):
    "Of a sweep under way no more than the picture at hand is painted"
    m = ReStyle(net.encoder, copy.deepcopy(net.generator), net.geometry)
    l, drawn, gate = LatentEditor(m, pca(m, 4), held_out(1), judge=lambda y: y.mean((1, 2, 3))).wait(), [], threading.Event()
    draw = m.generator.synthesize
    def slow(w, **kw):
        drawn.append(w)
        if len(drawn) == 2: gate.wait(20)                   # the first picture of the sweep
        return draw(w, **kw)
    m.generator.synthesize = slow
    l.sliders['PC 2'].value = 1.
    patiently(lambda: len(drawn) == 2)
    assert l.frame.text.startswith('PC 2 +1.0')             # the picture came before its sweep
    l.sliders['PC 3'].value = 1.
    gate.set()
    l.wait()
    assert len(drawn) == 2 + 1 + 7 and 'PC 3' in l.strip.value and l.frame.text.startswith('PC 2 +1.0, PC 3 +1.0')


def test_kept_pictures(net, ways):
    l = LatentEditor(net, ways)
    assert l.wait().kept == []
    move(l, PC_1=1.)
    l.keep.click()
    move(l, PC_1=-1.)
    e = l.put_aside()
    assert len(l.kept) == 2 and l.kept[1] is e and torch.equal(e.w, l.code) and not torch.equal(l.kept[0].w, e.w)
    links = re.findall(r'<a download="([^"]+)" href="([^"]+)"', l.shelf.value)
    assert [o for o, _ in links] == ['held-out 0, PC 1 +1.0 standard deviations.png', 'held-out 0, PC 1 -1.0 standard deviations.png']
    assert torch.equal(pixels(links[1][1]), to_uint8(l.frame.pictures[1]))


# ---------------------------------------------------------------- toons

@pytest.fixture(scope='module')
def toonifier(): return Toonifier().wait()


def test_three_ways_to_a_toon(toonifier, net, faces):
    "Bit by bit the inversions they are made of, and the true toon beside them"
    toonifier.picture.value = 'held-out 2'
    toonifier.wait()
    toons, x = load_model('toons64-toonify'), faces[2:3]
    swap, plain, booted = toonifier.toons.ways.values()
    assert torch.equal(swap.codes, net.invert(x, 5).codes) and torch.equal(swap.images[3], toons.generator.synthesize(swap.codes[3]))
    assert torch.equal(plain.codes, toons.invert(x, 5).codes) and torch.equal(booted.images, bootstrap(net, toons, x, 5).images)
    for t in (0, 1, 5):
        toonifier.step = t
        shown = [pixels(o) for o in sources(toonifier.shown)]
        want = [x[0], swap.images[t, 0], plain.images[t, 0], booted.images[t, 0], held_out(3, 'toons64')[2]]
        assert all(torch.equal(a, to_uint8(b.clamp(-1, 1))) for a, b in zip(shown, want)) and len(shown) == 5
    assert 'one latent space' in toonifier.verdict.value and 'restyle-error' not in toonifier.verdict.value
    assert 'LPIPS C' in toonifier.shown and 'identity A' in toonifier.shown


def test_layers_of_the_face_stay(toonifier, net, faces):
    toonifier.picture.value = 'held-out 1'
    toonifier.swap.value = 16
    toonifier.wait()
    want = toonify(net, load_model('toons64-toonify'), faces[1:2], 5, swap=16)
    assert torch.allclose(toonifier.toons.ways['bootstrapped'].images, want.inversion.images, atol=1e-5)
    assert 'layers below 16² of faces64' in toonifier.status
    toonifier.swap.value = 4
    assert 'layers below' not in toonifier.wait().status and toonifier._toon_model(4) is toonifier.second


def test_a_toon_of_a_picture_of_ones_own(toonifier, faces):
    "There is no true toon, and the table tells style in its place"
    send(toonifier, 'me.png', png(faces[3])).wait()
    assert toonifier.status.startswith('me.png: 5 steps') and len(sources(toonifier.shown)) == 4
    assert 'style B' in toonifier.shown and 'LPIPS' not in toonifier.shown and len(toonifier.static().titles) == 4
    send(toonifier, 'letter.txt', b'Dear reader').wait()
    assert 'not a picture we can read' in toonifier.status and toonifier.picture.value == 'me.png'
    toonifier.picture.value = 'held-out 0'
    assert len(sources(toonifier.wait().shown)) == 5


def test_two_latent_spaces_are_told(net, faces):
    "The same generator with the numbers of its codes shuffled"
    toons = load_model('toons64')
    g, order = copy.deepcopy(toons.generator), torch.randperm(128, generator=torch.Generator().manual_seed(0))
    for m in g.modules():
        if hasattr(m, 'affine'): m.affine.weight.data = m.affine.weight.data[:, order].clone()
    t = Toonifier(net, ReStyle(toons.encoder, g, toons.geometry), faces[:1], 1).wait()
    assert 'restyle-error' in t.verdict.value and 'Do not expect' in t.verdict.value


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
    slider = next(iter(l.sliders.values()))
    def edit(i): slider.value = .1 + i/10; l.wait()
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


def test_static_form_of_every_widget(explorer, toonifier):
    for w in (explorer, Comparison(), LatentEditor(), Blender(), toonifier):
        bundle = w.wait()._repr_mimebundle_()
        assert {'application/vnd.jupyter.widget-view+json', 'text/html', 'text/plain'} <= set(bundle)
        page = Page(bundle['text/html'])
        assert len(data(bundle['text/html'])['frames']) >= 2 and len(page.all('img')) == (5 if isinstance(w, Toonifier) else 3)
        assert len(bundle['text/html']) < (180_000 if isinstance(w, Toonifier) else 110_000)
        assert w._repr_mimebundle_()['text/html'] == bundle['text/html']
    l = LatentEditor().wait()
    texts = [f['text'] for f in data(l._repr_mimebundle_()['text/html'])['frames']]
    k = next(iter(l.sliders))
    assert texts[3].startswith(f'{k} +0.0: the code itself') and texts[0].startswith(f'{k} -3.0') and texts[6].startswith(f'{k} +3.0')


def test_static_form_follows_the_sliders():
    b = Blender().wait()
    a = b.static().html
    b.strength.value = .5
    b.wait()
    assert b.static().html != a and 'strength 0.5' in b.static().html


def test_importing_needs_no_ipywidgets():
    code = "import sys, restyle_nb.widgets; print([m for m in ('ipywidgets', 'matplotlib', 'sklearn', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
