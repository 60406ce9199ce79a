"The player in a page without kernel: on its own, in the saved chapter, and in the built docs; light and dark."
import json
from datetime import datetime

import pytest
import torch
from browser import ROOT, Part, boxes, browser, contrasts, look, new_page, shot
from restyle_nb.images import to_uint8
from restyle_nb.widgets import player
from restyle_nb.zoo import held_out, load_model

CHAPTER, DOCS = ROOT/'nbs'/'14_widgets.ipynb', ROOT/'_docs'/'widgets.html'
PAGE = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>players</title><body>{}</body></html>'


@pytest.fixture(scope='module')
def inv(): return load_model('faces64').invert(held_out(2))


@pytest.fixture(scope='module')
def alone(inv, tmp_path_factory):
    "A page with a player twice, and another one"
    html = [player(inv, i=i)._repr_html_() for i in (0, 0, 1)]
    return write(tmp_path_factory.mktemp('player')/'page.html', html)


def write(path, parts):
    path.write_text(PAGE.format('<hr>'.join(parts)), encoding='utf-8')
    return path


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "What the saved outputs of the chapter show where there is no kernel"
    outputs = [o for c in json.loads(CHAPTER.read_text(encoding='utf-8'))['cells'] for o in c.get('outputs', [])]
    html = [''.join(o['data']['text/html']) for o in outputs if 'text/html' in o.get('data', {})]
    return write(tmp_path_factory.mktemp('saved')/'page.html', [h for h in html if 'restyle-player' in h])


@pytest.fixture
def opened(browser):
    "Open a file as a page; nothing on it may fail or ask the network"
    pages = []
    def open_it(path, **context):
        page, asked = new_page(browser, **context), []
        page.on('request', lambda r: asked.append(r.url) if not r.url.startswith(('file:', 'data:', 'blob:')) else None)
        page.goto(path.as_uri())
        pages.append((page, asked))
        return page
    yield open_it
    for page, asked in pages:
        assert not page.complaints and not asked
        page.context.close()


class Film(Part):
    "A player on a page"
    def __init__(self, page, nth=0): super().__init__(page, '.restyle-player', nth)
    @property
    def slider(self): return self.root.locator('input[type=range]')
    @property
    def button(self): return self.root.locator('button.restyle-play')
    def picture(self, nth): return self.root.locator('.restyle-row img').nth(nth)
    def text(self): return self.root.locator('output').text_content()
    def at(self): return int(self.slider.input_value())
    def last(self): return int(self.slider.get_attribute('max'))


def exact(img, x):
    "Does an <img> show just these pixels (C,H,W)?"
    shown = img.evaluate('''async e => { await e.decode(); const c = new OffscreenCanvas(e.naturalWidth, e.naturalHeight), x = c.getContext('2d');
                                         x.drawImage(e, 0, 0); return [c.height, c.width, ...x.getImageData(0, 0, c.width, c.height).data] }''')
    h, w, *levels = shown
    return torch.equal(torch.tensor(levels, dtype=torch.uint8).view(h, w, 4)[..., :3].permute(2, 0, 1), to_uint8(x))


def stop_clock(page):
    "From here on, time passes only when the test says so"
    page.clock.install(time=datetime(2026, 1, 1))
    page.clock.pause_at(datetime(2026, 1, 2))


def test_slider_shows_every_step(opened, alone, inv):
    film = Film(opened(alone))
    assert film.at() == film.last() == 5
    film.slider.focus()
    for t in 5, 4, 3, 2, 1, 0:
        assert film.at() == t and f'step {t}' in film.slider.get_attribute('aria-valuetext').replace('average', 'step 0')
        assert exact(film.picture(0), inv.x[0]) and exact(film.picture(1), inv.images[t, 0])
        film.page.keyboard.press('ArrowLeft')


def test_play(opened, alone, inv):
    "From the last step play begins at the first, and stops at the last"
    page = opened(alone)
    stop_clock(page)
    film = Film(page)
    film.button.click()
    assert film.at() == 0 and exact(film.picture(1), inv.images[0, 0]) and film.button.text_content() == 'stop'
    for t in 1, 2, 3, 4, 5:
        page.clock.run_for(700)
        assert film.at() == t and exact(film.picture(1), inv.images[t, 0])
    assert film.button.text_content() == 'play' and film.button.get_attribute('aria-pressed') == 'false'
    page.clock.run_for(3000)
    assert film.at() == 5


def test_stop(opened, alone):
    "By the button, or by moving the slider"
    page = opened(alone)
    stop_clock(page)
    film = Film(page)
    for stop in film.button.click, lambda: film.slider.press('ArrowRight'):
        film.slider.press('Home')
        film.button.click()
        page.clock.run_for(1400)
        stop()
        here = film.at()
        page.clock.run_for(3000)
        assert film.at() == here < 5 and film.button.text_content() == 'play'


def test_several_on_a_page(opened, alone, inv):
    "Each goes its own way, though two of them are the same"
    page = opened(alone)
    films = [Film(page, i) for i in range(3)]
    films[1].slider.press('Home')
    films[2].slider.press('ArrowLeft')
    assert [f.at() for f in films] == [5, 0, 4]
    assert exact(films[0].picture(1), inv.images[5, 0]) and exact(films[1].picture(1), inv.images[0, 0]) and exact(films[2].picture(1), inv.images[4, 1])


def test_without_script(opened, alone, inv):
    "The result is there, and no control that would do nothing"
    film = Film(opened(alone, java_script_enabled=False))
    assert film.picture(1).is_visible() and film.text().startswith('step 5')
    assert not film.button.is_visible() and not film.slider.is_visible()


def test_little_motion(opened, alone):
    "Where the reader's system asks for little motion, play is slow"
    page = opened(alone, reduced_motion='reduce')
    stop_clock(page)
    film = Film(page)
    film.button.click()
    page.clock.run_for(1400)
    assert film.at() == 0
    page.clock.run_for(200)
    assert film.at() == 1


def where(name, request):
    if name == 'docs' and not DOCS.exists(): pytest.skip('no docs here: `make docs` builds them')
    return DOCS if name == 'docs' else request.getfixturevalue(name)


@pytest.mark.parametrize('name', ['alone', 'saved', 'docs'])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_readable_and_at_rest(opened, request, name, scheme):
    "Every player of the page: all text can be read, moving it changes pictures and moves nothing else"
    page = opened(where(name, request), color_scheme=scheme)
    n = page.locator('.restyle-player').count()
    assert n >= {'alone': 3, 'saved': 4, 'docs': 4}[name]
    for i in range(n):
        film = Film(page, i)
        texts = contrasts(film.root)
        assert len(texts) >= 3 and not [(t, round(c, 1)) for t, c in texts if c < 4.5]
        still, seen = boxes(film.root, 'img, button, input, table, .restyle-text'), set()
        film.slider.focus()
        for key in ['Home'] + ['ArrowRight']*film.last():
            page.keyboard.press(key)
            seen.add(tuple(look(img, 8).tobytes() for img in film.root.locator('.restyle-row img').all()))
            assert boxes(film.root, 'img, button, input, table, .restyle-text') == still
        assert film.at() == film.last() and len(seen) > film.last()//2
    Film(page).root.scroll_into_view_if_needed()
    shot(page, f'player_{name}_{scheme}')


def test_controls_have_names(opened, saved):
    page = opened(saved)
    for i in range(page.locator('.restyle-player').count()):
        film = Film(page, i)
        assert film.slider.get_attribute('aria-label') and film.button.text_content() == 'play'
        assert all(img.get_attribute('alt') for img in film.root.locator('.restyle-row img').all())
        film.button.focus()
        page.keyboard.press('Enter')
        assert film.button.text_content() == 'stop'
        page.keyboard.press('Enter')
        assert film.button.text_content() == 'play'
