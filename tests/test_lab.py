"The widgets in a real JupyterLab with a live kernel: what a person does, and what the page shows then."
import json
from functools import cache

import numpy as np
import pytest
import torch
from browser import (PATIENCE, Part, boxes, browser, contrasts, differ, latency, look, new_page, quick, serving, shot, until,
                     until_changed, write_notebook)
from PIL import Image
from restyle_nb.editing import edit, load_directions
from restyle_nb.images import save_image, to_pil
from restyle_nb.zoo import held_out, load_model

CELLS = '''
import time
from restyle_nb.editing import load_directions
from restyle_nb.widgets import Explorer, Comparison, LatentEditor, Toonifier, Blender
from restyle_nb.zoo import load_model''', '''
Explorer()''', '''
Comparison({'ReStyle': load_model('faces64'), 'one pass': load_model('faces64-single')}, n_steps={'ReStyle': 5, 'one pass': 1})''', '''
LatentEditor('faces64')''', '''
LatentEditor('toons64', load_directions('faces64'))''', '''
Toonifier()''', '''
Blender()''', '''
slow = load_model('faces64')
at_once = slow.step
def step(*args, **kw):
    time.sleep(.4)
    return at_once(*args, **kw)
slow.step = step
Explorer(slow)'''

# Lab's badge says idle before the kernel is connected
IDLE = '''() => { const k = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
                  return k?.connectionStatus === 'connected' && k.status === 'idle' }'''


@pytest.fixture(scope='module')
def page(browser, tmp_path_factory):
    "A notebook with every widget, run in a Lab of its own"
    home = tmp_path_factory.mktemp('lab')
    write_notebook(home/'widgets.ipynb', *CELLS)
    news = home/'settings'/'@jupyterlab'/'apputils-extension'/'notification.jupyterlab-settings'
    news.parent.mkdir(parents=True)
    news.write_text(json.dumps(dict(fetchNews='false', checkForUpdates=False)))
    options = ('--allow-root', '--ServerApp.ip=127.0.0.1', '--ServerApp.port_retries=0', '--ServerApp.terminals_enabled=False',
               '--IdentityProvider.token=lab', f'--ServerApp.root_dir={home}', '--LabApp.expose_app_in_browser=True')
    with serving('jupyterlab', *options, folder=home, ready='/api/status?token=lab') as url:
        page = new_page(browser)
        page.goto(f'{url}/lab/tree/widgets.ipynb?reset&token=lab')
        page.wait_for_function(IDLE)
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        page.locator('.restyle-explorer').nth(1).or_(page.locator('.jp-OutputArea-output[data-mime-type*=error]').first).wait_for(timeout=3000*PATIENCE)
        assert page.locator('.jp-OutputArea-output[data-mime-type*=error]').all_text_contents() == []
        yield page


@pytest.fixture(autouse=True)
def no_complaints(page):
    "Nothing that happens in a test is an error on the console"
    page.complaints.clear()
    yield
    assert not page.complaints


@pytest.fixture
def explorer(page): return settled(Part(page, '.restyle-explorer'), picture='held-out 0', model='faces64')
@pytest.fixture
def comparison(page): return settled(Part(page, '.restyle-comparison'), picture='held-out 0')
@pytest.fixture
def editor(page):
    e = settled(Part(page, '.restyle-editor'))
    e.part('reset').click()
    until(lambda: e.root.locator('.restyle-text').text_content().startswith('not moved'), 'all at rest')
    return e
@pytest.fixture
def toonifier(page): return settled(Part(page, '.restyle-toonifier'), picture='held-out 0')
@pytest.fixture
def blender(page): return settled(Part(page, '.restyle-blender'))


def settled(widget, picture=None, model=None):
    "The widget after its work, with this picture and model chosen, whatever the tests before did"
    widget.root.scroll_into_view_if_needed()
    if model: widget.choose('model', model)
    if picture:
        if picture not in widget.status(): widget.choose('source', 'held-out 7')   # after a failed upload, to choose what is chosen does nothing
        widget.choose('source', picture)
        widget.says(f'{picture}:')
    if model: widget.says(f'with {model},')
    return widget


# ---------------------------------------------------------------- what must be on the page, from the models themselves

@cache
def truth(model, picture=0, world='faces64', n=5):
    "Pictures of every step (n+1,H,W,3), levels, as small as `look` makes them"
    images = load_model(model).invert(held_out(picture + 1, world)[picture], n).images[:, 0]
    return torch.stack([small(o) for o in images])


def read_image(path): return torch.from_numpy(np.array(Image.open(path).convert('RGB'))).permute(2, 0, 1)/127.5 - 1

def small(x, n=24):
    return torch.nn.functional.interpolate((x[None].clamp(-1, 1) + 1)*127.5, (n, n), mode='area')[0].permute(1, 2, 0)


def nearest(img, candidates):
    "Which of the candidates the page shows, and how far from it: mean difference in levels"
    seen = torch.from_numpy(look(img))
    d = (candidates - seen).abs().flatten(1).mean(1)
    return d.argmin().item(), d.min().item()


# ---------------------------------------------------------------- the explorer: slider, play, model

def test_slider_shows_every_step(page, explorer):
    steps, x = truth('faces64'), small(held_out(1)[0])
    before = look(explorer.image('input'))
    assert nearest(explorer.image('input'), x[None])[1] < 3
    explorer.press('step', 'Home')
    for t in range(6):
        until(lambda: explorer.step_shown() == t, f'step {t}')
        found, far = until(lambda: (n := nearest(explorer.image('reconstruction'), steps))[0] == t and n, f'picture of step {t}')
        assert far < 3
        page.keyboard.press('ArrowRight')
    assert differ(look(explorer.image('input')), before) == 0
    shot(page, 'explorer')


def test_slider_by_mouse(page, explorer):
    explorer.press('step', 'End')
    until(lambda: explorer.step_shown() == 5, 'step 5')
    before, map_before = look(explorer.image('reconstruction')), look(explorer.image('change'))
    box = explorer.handle('step').bounding_box()
    x, y = box['x'] + box['width']/2, box['y'] + box['height']/2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 500, y, steps=8)
    page.mouse.up()
    until(lambda: explorer.step_shown() == 0, 'step 0')
    assert differ(until_changed(explorer.image('reconstruction'), before), before) > 3
    until_changed(explorer.image('change'), map_before)


def test_slider_is_quick(page, explorer):
    def moves():
        explorer.press('step', 'Home')
        until(lambda: explorer.step_shown() == 0, 'step 0')
        return [latency(explorer, 'reconstruction', key) for key in ['ArrowRight']*5 + ['ArrowLeft']*4]
    quick(moves)


def test_play(page, explorer):
    explorer.press('step', 'Home')
    until(lambda: explorer.step_shown() == 0, 'step 0')
    explorer.root.evaluate('''e => { window.seen = new Set(); new MutationObserver(() => window.seen.add(e.querySelector('.restyle-reconstruction img')?.src))
        .observe(e, {subtree: true, childList: true, attributes: true, attributeFilter: ['src']}) }''')
    explorer.part('play').locator('button').first.click()
    until(lambda: explorer.step_shown() == 5, 'the last step')
    assert nearest(explorer.image('reconstruction'), truth('faces64'))[0] == 5
    assert page.evaluate('() => window.seen.size') >= 5


def test_heat_map_scale(page, explorer):
    explorer.press('step', 'End')
    until(lambda: explorer.step_shown() == 5, 'step 5')
    before = look(explorer.image('change'))
    explorer.choose('scale', next(o for o in explorer.options('scale') if o != explorer.chosen('scale')))
    until_changed(explorer.image('change'), before)


def test_another_model(page, explorer):
    explorer.press('step', 'End')
    models = 'faces64', 'faces64-restyle-e4e'
    ends = torch.stack([truth(m)[-1] for m in models])
    for i in 1, 0:
        explorer.choose('model', models[i])
        explorer.says(f'with {models[i]},')
        assert nearest(explorer.image('reconstruction'), ends)[0] == i


def test_single_pass_model(page, explorer):
    explorer.choose('model', 'faces64-single')
    assert '1 step with' in explorer.says('with faces64-single,')
    explorer.press('step', 'End')
    until(lambda: explorer.step_shown() == 1, 'step 1')
    found, far = nearest(explorer.image('reconstruction'), truth('faces64-single', n=1))
    assert found == 1 and far < 3


def test_another_world(page, explorer):
    explorer.choose('model', 'earth64')
    explorer.says('with earth64,')
    assert nearest(explorer.image('input'), small(held_out(1, 'earth64')[0])[None])[1] < 3
    explorer.press('step', 'End')
    until(lambda: nearest(explorer.image('reconstruction'), truth('earth64', world='earth64'))[0] == 5, 'the Earth')


# ---------------------------------------------------------------- a picture of one's own

@pytest.fixture
def face(tmp_path): return save_image(held_out(12)[11], tmp_path/'face.png')


def test_upload(page, explorer, face):
    explorer.upload(face)
    explorer.says('face.png: 5 steps with faces64, L2')
    assert explorer.chosen('source') == 'face.png'
    assert nearest(explorer.image('input'), small(held_out(12)[11])[None])[1] < 3
    explorer.press('step', 'End')
    found, far = until(lambda: (n := nearest(explorer.image('reconstruction'), truth('faces64', 11)))[0] == 5 and n, 'the result')
    assert far < 3
    shot(page, 'explorer_upload')


def text_file(path): path.write_text('shopping: bread, milk')
def cut_short(path):
    save_image(held_out(1)[0], path)
    path.write_bytes(path.read_bytes()[:3000])
def long_text(path): path.write_bytes(b'bread, milk, '*10**6)
def big_photo(path):
    "50 megapixels, 20 MB: more than a message to the kernel may hold"
    grain = np.random.default_rng(0).integers(0, 256, (578, 866, 3), dtype=np.uint8)
    Image.fromarray(np.tile(grain, (10, 10, 1))).save(path, quality=60)
    assert path.stat().st_size > 15e6
def animation(path):
    frames = [to_pil(o).resize((128, 128)) for o in held_out(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)


@pytest.mark.parametrize('name, make, words', [
    ('notes.txt', text_file, ['not a picture we can read', 'PNG']),
    ('long.txt', long_text, ['no picture']),
    ('half.png', cut_short, ['damaged or cut short']),
    ('photo.jpg', big_photo, ['5 steps with']),
    ('film.gif', animation, ['5 steps with', 'only its first frame']),
])
def test_bad_upload(page, explorer, face, tmp_path, name, make, words):
    "A message in the widget; then a good picture works"
    make(tmp_path/name)
    explorer.upload(tmp_path/name)
    said = explorer.says(name + ':')
    for w in words: assert w in said
    refused = name in ('notes.txt', 'long.txt', 'half.png')
    assert (explorer.root.locator('.restyle-status.restyle-error, .restyle-status .restyle-error').count() > 0) == refused
    if refused: assert explorer.chosen('source') == 'held-out 0' and nearest(explorer.image('input'), small(held_out(1)[0])[None])[1] < 3
    shot(page, f'upload_{name[:4]}')
    explorer.upload(face)
    explorer.says('face.png: 5 steps')
    assert explorer.root.locator('.restyle-status.restyle-error, .restyle-status .restyle-error').count() == 0
    assert nearest(explorer.image('input'), small(held_out(12)[11])[None])[1] < 3


def test_same_file_again(page, explorer, face):
    "A file can be given once more, as it was or changed on the disk"
    shows = lambda i: nearest(explorer.image('input'), small(held_out(12)[i])[None])[1] < 3
    for i in 11, 11, 4:
        if i == 4: save_image(held_out(12)[i], face)
        explorer.upload(face)
        until(lambda: shows(i), f'picture {i}')
        explorer.says('face.png: 5 steps')
        explorer.choose('source', 'held-out 0')
        until(lambda: shows(0), 'the first picture')


# ---------------------------------------------------------------- while it computes

@pytest.fixture
def slow(page):
    "Takes two seconds for a picture"
    w = Part(page, '.restyle-explorer', 1)
    w.root.scroll_into_view_if_needed()
    w.says('5 steps')
    return w


def test_says_that_it_computes(page, slow):
    other = 'held-out 1' if slow.chosen('source') != 'held-out 1' else 'held-out 2'
    before = look(slow.image('reconstruction'))
    slow.choose('source', other)
    slow.says(f'inverting {other}')
    shot(page, 'computing')
    slow.says(f'{other}: 5 steps')
    slow.press('step', 'End')
    until_changed(slow.image('reconstruction'), before)


def test_latest_input_wins(page, slow):
    "Of three wishes only the last is shown, and nothing comes after it"
    log = slow.part('status').evaluate_handle('''e => { const log = []; new MutationObserver(() => log.push(e.textContent))
                                              .observe(e, {subtree: true, childList: true, characterData: true}); return log }''')
    for name in 'held-out 3', 'held-out 4', 'held-out 5': slow.choose('source', name)
    slow.says('held-out 5: 5 steps')
    page.wait_for_function(IDLE)
    slow.press('step', 'End')
    ends = torch.stack([truth('faces64', i)[-1] for i in range(8)])
    until(lambda: nearest(slow.image('reconstruction'), ends)[0] == 5, 'held-out 5')
    said = [o.strip() for o in log.json_value()]
    assert [o for o in said if 'steps with' in o and 'held-out 5' not in o] == [] and 'held-out 5: 5 steps' in said[-1]
    assert slow.chosen('source') == 'held-out 5'


def test_responds_while_it_computes(page, slow, explorer):
    "The slider of another widget moves, and so does its own"
    slow.choose('source', 'held-out 6')
    slow.says('inverting held-out 6')
    now = explorer.step_shown()
    explorer.press('step', 'Home' if now else 'End')
    until(lambda: explorer.step_shown() != now, 'another step')
    assert 'inverting held-out 6' in slow.status()
    slow.says('held-out 6: 5 steps')


# ---------------------------------------------------------------- the other widgets

def test_comparison(page, comparison):
    "Each model shows its own step; the single pass stays at its only one"
    first, second = comparison.image('first'), comparison.image('second')
    shows = lambda img, truths, t: (n := nearest(img, truths))[0] == t and n[1] < 3
    comparison.press('step', 'End')
    until(lambda: shows(first, truth('faces64'), 5), 'five steps')
    assert shows(second, truth('faces64-single', n=1), 1)
    comparison.press('step', 'Home')
    until(lambda: shows(first, truth('faces64'), 0), 'the start')
    comparison.choose('source', 'held-out 2')
    comparison.press('step', 'End')
    until(lambda: shows(first, truth('faces64', 2), 5), 'another face')
    assert shows(second, truth('faces64-single', 2, n=1), 1)
    shot(page, 'comparison')


AGE = 1   # the second slider

def test_editor(page, editor):
    "A slider shows the edit, some layers less of it, and reset nothing"
    before, after = editor.image('before'), editor.image('after')
    start, kept = look(after), look(before)
    editor.press('direction', 'End', AGE)
    edited = until_changed(after, start, 2)
    code = load_model('faces64').invert(held_out(1), 5).codes[-1]
    want = small(edit(load_model('faces64'), code, {load_directions()['age']: 3.}).y[0])
    assert nearest(after, want[None])[1] < 3 and differ(look(before), kept) == 0
    assert 'age' in editor.root.locator('.restyle-view, .restyle-panel').first.text_content()
    assert {'coarse', 'medium', 'fine'} <= set(editor.options('layers'))
    editor.choose('layers', 'fine')
    until_changed(after, edited)
    shot(page, 'editor')
    editor.part('reset').click()
    until(lambda: differ(look(after), start) < 1, 'the picture before all edits')


def test_sweep_keep_and_undo(page, editor, tmp_path):
    after, tiles = editor.image('after'), editor.root.locator('.restyle-strip img')
    start = look(after)
    editor.press('direction', 'End', AGE)
    edited = until_changed(after, start, 2)
    until(lambda: tiles.count() == 7 and differ(look(tiles.last), edited) == 0, 'a sweep that ends where the slider stands')
    assert editor.root.locator('.restyle-strip figure[aria-current]').text_content() == '+3'
    editor.part('keep').click()
    with page.expect_download() as d: editor.root.locator('.restyle-shelf a').first.click()
    d.value.save_as(tmp_path/'kept.png')
    assert d.value.suggested_filename.startswith('held-out 0, age +3.0') and nearest(after, small(read_image(tmp_path/'kept.png'))[None])[1] < 3
    editor.part('undo').click()
    until(lambda: differ(look(after), start) < 1, 'the picture before')
    shot(page, 'editor_kept')


def test_editor_is_quick(page, editor):
    "The picture follows the slider, though the kernel paints it"
    editor.press('direction', 'Home', AGE)
    quick(lambda: [latency(editor, 'after', key) for key in ['ArrowRight']*5 + ['ArrowLeft']*4], 300)


def test_other_directions(page, editor):
    labels = lambda: editor.root.locator('.restyle-direction .widget-label').all_text_contents()
    before = labels()
    editor.choose('add', 'skin')
    until(lambda: labels() == before + ['skin'], 'one more slider')
    until(lambda: editor.chosen('add') == '…', 'a menu that waits for another wish')
    editor.part('reset').click()
    page.wait_for_function(IDLE)
    assert editor.chosen('add') == '…' and labels() == before + ['skin']
    editor.choose('set', 'closed form')
    until(lambda: len(labels()) == 6 and all(o.startswith('SeFa') for o in labels()), 'those of the other set')
    editor.choose('set', 'attributes')
    until(lambda: labels() == before, 'the first again')


def test_foreign_directions(page):
    "Refused in words; the button that allows them is reached by keyboard"
    editor = Part(page, '.restyle-editor', 1)
    editor.root.scroll_into_view_if_needed()
    assert 'was made for faces64' in editor.says('is applied to toons64') and editor.root.locator('.restyle-direction').count() == 0
    shot(page, 'foreign')
    start = look(editor.image('after'))
    editor.part('keep').focus()
    page.keyboard.press('Tab')
    page.keyboard.press('Enter')
    editor.says('inverted with toons64')
    until(lambda: editor.root.locator('.restyle-direction').count() == 6, 'sliders')
    editor.press('direction', 'End', AGE)
    until_changed(editor.image('after'), start, 2)


def test_toonifier(page, toonifier):
    "Three ways and the truth, step by step; with layers of the face, another toon"
    ends = torch.stack([small(load_model('toons64-toonify').invert(held_out(1), 5).images[t, 0]) for t in range(6)])
    toonifier.press('step', 'End')
    until(lambda: nearest(toonifier.image('plain'), ends)[0] == 5, 'the last step')
    assert nearest(toonifier.image('truth'), small(held_out(1, 'toons64')[0])[None])[1] < 3
    toonifier.press('step', 'Home')
    until(lambda: nearest(toonifier.image('plain'), ends)[0] == 0, 'the average toon')
    assert toonifier.step_shown() == 0
    toonifier.press('step', 'End')
    until(lambda: toonifier.step_shown() == 5, 'the last step')
    full = look(toonifier.image('swapped'))
    toonifier.press('swap', 'End')
    toonifier.says('layers below 64² of faces64')
    until_changed(toonifier.image('swapped'), full)
    assert 'one latent space' in toonifier.part('alignment').text_content()
    toonifier.press('swap', 'Home')
    until(lambda: differ(look(toonifier.image('swapped')), full) < 1, 'the toon again')
    shot(page, 'toonifier')


def test_blender(page, blender):
    blend = blender.image('blend')
    base, other, now = (look(blender.image(o)) for o in ('base', 'other', 'blend'))
    assert differ(base, other) > 5
    blender.press('strength', 'Home')
    until(lambda: differ(look(blend), base) < 3, 'the base at strength 0')
    blender.press('strength', 'End')
    until(lambda: differ(look(blend), base) > 3, 'a blend')
    full = look(blend)
    blender.press('swap', 'End')
    until_changed(blend, full)
    shot(page, 'blender')
    blender.part('reset').click()
    until(lambda: differ(look(blend), now) < 1, 'the start again')


# ---------------------------------------------------------------- for everybody

FOCUS = '''() => {
    const e = document.activeElement, w = e.closest('.restyle-explorer [class*="restyle-"]');
    const name = e.ariaLabel || e.labels?.[0]?.textContent || e.textContent.trim() || e.closest('.jupyter-widgets').querySelector('.widget-label')?.textContent || e.closest('[title]')?.title;
    return e.closest('.restyle-explorer') && [[...w.classList].find(o => o.startsWith('restyle-')), name, e.matches(':focus-visible')]
}'''

def test_keyboard_reaches_everything(page, explorer):
    "Tab goes to every control in the order of reading; each has a name, and it shows where one is"
    explorer.part('source').locator('select').focus()
    seen = []
    while (here := page.evaluate(FOCUS)) and len(seen) < 20:
        seen.append(here)
        page.keyboard.press('Tab')
    assert list(dict.fromkeys(part for part, name, visible in seen)) == ['restyle-' + o for o in ('source', 'upload', 'face', 'model', 'scale', 'step', 'play')]
    assert all(name for part, name, visible in seen)


def test_keyboard_in_the_editor(page, editor):
    "The same; a slider says its name once it is reached, for those who hear the page"
    editor.part('source').locator('select').focus()
    seen = []
    while (here := page.evaluate(FOCUS.replace('explorer', 'editor'))) and len(seen) < 30:
        seen.append(here)
        page.keyboard.press('Tab')
    parts = [part for part, name, visible in seen]
    assert list(dict.fromkeys(parts))[:10] == ['restyle-' + o for o in ('source', 'upload', 'face', 'set', 'add', 'direction', 'layers', 'undo', 'reset', 'keep')]
    assert parts.count('restyle-direction') >= 6 and all(name for part, name, visible in seen)
    assert editor.handle('direction', AGE).get_attribute('aria-label') == 'age'


def test_keyboard_works(page, explorer, face):
    explorer.part('source').locator('select').focus()
    for key in 'Space', 'ArrowDown', 'Enter': page.keyboard.press(key)   # on a closed list, Lab takes the arrow as its own: next cell
    explorer.says('held-out 1: 5 steps')
    explorer.part('upload').focus()
    with page.expect_file_chooser() as chooser: page.keyboard.press('Enter')
    chooser.value.set_files(str(face))
    explorer.says('face.png: 5 steps')


def test_no_layout_jump(page, explorer, tmp_path):
    "Nothing moves when a step, a picture, a model or a message changes, be it short or long"
    text_file(tmp_path/'notes.txt')
    save_image(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))*2 - 1, tmp_path/'noise.png')
    still = boxes(explorer.root)
    for act, said in [(lambda: explorer.press('step', 'Home'), 'held-out 0'), (lambda: explorer.press('step', 'End'), 'held-out 0'),
                      (lambda: explorer.choose('source', 'held-out 1'), 'held-out 1: 5 steps'),
                      (lambda: explorer.upload(tmp_path/'notes.txt'), 'not a picture'),
                      (lambda: explorer.upload(tmp_path/'noise.png'), "does not look like a picture of this model's world"),
                      (lambda: explorer.choose('model', 'faces64-restyle-e4e'), 'with faces64-restyle-e4e')]:
        act()
        assert boxes(explorer.root) == still
        explorer.says(said)
        assert boxes(explorer.root) == still


def test_no_layout_jump_in_the_editor(page, editor):
    "Sliders, pictures and sweep stay where they are, whatever the judge says"
    parts = 'select, .restyle-upload, .restyle-undo, .restyle-keep, .restyle-sliders, .restyle-row img, .restyle-strip img'
    until(lambda: editor.root.locator('.restyle-strip img').count() == 7 and editor.root.locator('.restyle-table').count(), 'everything')
    still = boxes(editor.root, parts)
    for nth, key in (0, 'End'), (AGE, 'Home'), (2, 'ArrowRight'):
        editor.press('direction', key, nth)
        until(lambda: 'not moved' not in editor.root.locator('.restyle-text').text_content(), 'a move')
        assert boxes(editor.root, parts) == still


@pytest.mark.parametrize('theme', ['JupyterLab Dark', 'JupyterLab Light'])
def test_readable(page, explorer, theme):
    page.evaluate("theme => { window.jupyterapp.commands.execute('apputils:change-theme', {theme}) }", theme)
    page.locator(f'[data-jp-theme-name="{theme}"]').wait_for(state='attached')
    page.locator('#jupyterlab-splash').wait_for(state='detached')
    for kind in 'explorer', 'comparison', 'editor', 'toonifier', 'blender':
        root = page.locator(f'.restyle-{kind}').first
        root.scroll_into_view_if_needed()
        texts = contrasts(root)
        assert len(texts) > 4
        assert not [(text, round(c, 1)) for text, c in texts if c < 4.5]
        shot(page, f'{kind}_{theme[11:].lower()}')
