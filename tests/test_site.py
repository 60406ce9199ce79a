"""The docs site in a real browser: nothing fails, nothing comes from elsewhere, everybody can read and reach it.

It looks at the site that `make docs` left in _docs/ where that is newer than the notebooks, else at a small one built for the occasion.
"""
import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading

import pytest
from browser import ROOT, browser, contrasts, new_page, shot, until
from test_repo import tool

FEW = ['index.ipynb', '03_restyle.ipynb', '05_zoo.ipynb', '14_widgets.ipynb', 'analysis/focus.ipynb', 'walkthroughs/1_residual_inversion.ipynb']
KINDS = ['index.html', 'restyle.html', 'zoo.html', 'widgets.html', 'analysis/focus.html', 'walkthroughs/residual_inversion.html',
         'claims.html', 'faq.html', 'glossary.html', 'teaching.html', 'cli.html']   # landing, API, lesson, …
docs = tool('docs')


# ---------------------------------------------------------------- the site

def fresh(site):
    "Was the site built after the last change of what it is made of?"
    sources = [p for p in (ROOT/'nbs').rglob('*') if p.is_file() and not any(o[0] in '._' and o != '_quarto.yml' for o in p.relative_to(ROOT/'nbs').parts)]
    index = site/'index.html'
    return index.exists() and index.stat().st_mtime > max(p.stat().st_mtime for p in [*sources, ROOT/'tools'/'docs.py'])


def small(folder):
    "A site of a few pages, built in a folder of its own"
    for name in 'settings.ini', 'setup.py', 'tools', 'nbs/_quarto.yml', 'nbs/styles.css', 'nbs/images', *(f'nbs/{p}' for p in FEW):
        here, there = ROOT/name, folder/name
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(here, there) if here.is_dir() else shutil.copy(here, there)
    (folder/'nbs'/'sidebar.yml').write_text('website:\n  sidebar:\n    contents:\n' + ''.join(f'      - {p}\n' for p in FEW))
    (folder/'nbs'/'_quarto.yml').write_text(re.sub(r'^ +- \{text: .*\.ipynb\}\n', '', (folder/'nbs'/'_quarto.yml').read_text(), flags=re.M))
    made = subprocess.run([sys.executable, 'tools/docs.py', '--force'], cwd=folder, capture_output=True, text=True)   # its links to other pages are broken: no matter
    assert (folder/'_docs'/'index.html').exists(), made.stdout + made.stderr
    return folder/'_docs'


@pytest.fixture(scope='module')
def site(tmp_path_factory): return ROOT/'_docs' if fresh(ROOT/'_docs') else small(tmp_path_factory.mktemp('site'))


@pytest.fixture(scope='module')
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()


@pytest.fixture
def visit(browser, address):
    "Open a page of the site; whatever fails, or asks another server, is a complaint"
    pages = []
    def go(name, **context):
        page = new_page(browser, **context)
        page.on('request', lambda r: r.url.startswith((address, 'data:', 'blob:')) or page.complaints.append(f'asks {r.url}'))
        page.on('response', lambda r: r.status >= 400 and page.complaints.append(f'{r.status} {r.url}'))
        page.goto(address + name)
        pages.append(page)
        return page
    yield go
    for page in pages:
        page.context.close()
        assert not page.complaints


def names(site): return sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html'))
def kinds(site): return [p for p in KINDS if (site/p).exists()]


# ---------------------------------------------------------------- read as files

def test_whole(site):
    "No broken link or anchor, no picture without words, no heading out of order, nothing from elsewhere"
    if site != ROOT/'_docs': pytest.skip('_docs is older than the notebooks: `make docs` builds and checks the whole site')
    assert not docs.problems(site)


@pytest.mark.parametrize('body, fault', [
    ('<a href="nowhere.html">x</a>', 'broken link: nowhere.html'),
    ('<a href="b.html#nowhere">x</a>', 'broken anchor: b.html#nowhere'),
    ('<a href="#nowhere">x</a>', 'broken anchor: #nowhere'),
    ('<img src="b.png">', 'picture without alternative text: b.png'),
    ('<img src="https://example.org/b.png" alt="b">', 'from elsewhere: https://example.org/b.png'),
    ('<script src="//example.org/b.js"></script>', 'from elsewhere: //example.org/b.js'),
    ('<h3>x</h3>', 'heading of level 3 after level 1'),
    ('<h1>x</h1>', '2 main headings'),
    ('<i id="x"></i><i id="x"></i>', 'id twice: x'),
    ('<p>see [<code>x</code>](b.html)</p>', 'Markdown that was not understood: ](b.html)'),
    (r'<math><mi>\nonsense</mi></math>', 'a command of a formula was not understood'),
])
def test_the_check_sees(tmp_path, body, fault):
    "What is wrong on a page is named, and nothing else"
    (tmp_path/'b.html').write_text('<h1 id="here">b</h1>')
    (tmp_path/'b.png').write_bytes(b'')
    good = '<h1>a</h1><a href="b.html#here">b</a><a href="https://example.org">elsewhere</a><img src="b.png" alt="b">'
    (tmp_path/'a.html').write_text(good)
    assert not docs.problems(tmp_path)
    (tmp_path/'a.html').write_text(good + body)
    assert docs.problems(tmp_path) == [f'a.html: {fault}']


def test_the_check_reads_styles(tmp_path):
    (tmp_path/'a.css').write_text('@import url(https://example.org/font.css); p {background: url(data:image/png;base64,)}')
    assert docs.problems(tmp_path) == ['a.css: from elsewhere: https://example.org/font.css']


def cell(kind, source, **more): return dict(cell_type=kind, source=source, **more)
PICTURE = [dict(output_type='display_data', data={'image/png': ''})]


def test_figures_are_described():
    "By their own words, else by the heading and the sentence above"
    cells = [cell('markdown', '# T'), cell('markdown', '## How far?\n\nFirst. Here is [the map](a.html) of `x`:'), cell('code', 'f()', outputs=PICTURE),
             cell('code', '#| fig-cap: "Six faces"\nf()', outputs=PICTURE), cell('code', '#| fig-alt: "mine"\nf()', outputs=PICTURE), cell('code', 'f()', outputs=[])]
    docs.describe(cells)
    assert [docs.option(c['source'], 'fig-alt') for c in cells[2:]] == ['Figure: How far?: Here is the map of x', 'Six faces', 'mine', None]


def test_links_stay_one():
    assert docs.links_once('[see [`invert`](restyle.html#invert), [`x`](x.html) here](b.ipynb), [`x`](x.html), [1] [`y`](y.html)') == \
        '[see `invert`, `x` here](b.ipynb), [`x`](x.html), [1] [`y`](y.html)'


def test_one_badge_at_most(monkeypatch):
    "A page carries a badge if its notebook installs what it needs in Colab, and has none in its own text"
    monkeypatch.syspath_prepend(str(ROOT/'tools'))
    install = cell('code', "import sys\nif 'google.colab' in sys.modules:\n    %pip install -qq restyle_nb")
    assert docs.runs_in_colab(dict(cells=[install])) and not docs.runs_in_colab(dict(cells=[cell('code', 'x')]))
    assert not docs.runs_in_colab(dict(cells=[install, cell('markdown', '![Open in Colab](images/open-in-colab.svg)')]))


def test_badges_lead_to_notebooks(site):
    "Never two on a page, and each opens the notebook of its page"
    seen = 0
    for name in names(site):
        found = re.findall(r'href="https://colab\.research\.google\.com/github/restyle-nb/restyle_nb/blob/main/nbs/([^"]+)"', (site/name).read_text(encoding='utf-8'))
        if name != 'index.html': assert len(found) <= 1, name
        for notebook in found:
            assert (ROOT/'nbs'/notebook).exists()
            if name != 'index.html': assert docs.page(ROOT/'nbs'/notebook).with_suffix('.html') == ROOT/'nbs'/name
        seen += len(found)
    assert seen


def test_pages_lead_to_their_source(site):
    for name in names(site):
        notebook = re.search(r'href="https://github\.com/restyle-nb/restyle_nb/blob/main/(nbs/[^"#]+\.ipynb)" class="toc-action"', (site/name).read_text(encoding='utf-8'))
        assert notebook and (ROOT/notebook[1]).exists(), name


# ---------------------------------------------------------------- in the browser

def test_every_page_opens(site, visit):
    "Quietly, and as wide as a phone. One window for all of them, which is quicker"
    page = visit('index.html', viewport=dict(width=390, height=844), reduced_motion='reduce')
    wide = []
    for name in names(site):
        page.goto(page.url.split('/', 3)[0] + '//' + page.url.split('/', 3)[2] + '/' + name)
        if (w := page.evaluate('document.documentElement.scrollWidth')) > 390: wide.append((name, w))
        assert not page.complaints, name
    assert not wide


def faint(page): return sorted({(t, round(c, 1)) for t, c in contrasts(page.locator('body')) if c < 4.5})


def test_readable(site, visit):
    "Contrast AA for every text of one page of each kind, light and dark"
    page, bad = visit(kinds(site)[0], reduced_motion='reduce'), {}
    root = page.url.removesuffix(kinds(site)[0])
    for name in kinds(site):
        page.goto(root + name)
        for scheme in 'light', 'dark':
            page.emulate_media(color_scheme=scheme, reduced_motion='reduce')
            page.wait_for_function("d => document.documentElement.classList.contains('quarto-dark') == d", arg=scheme == 'dark')
            if found := faint(page): bad[name, scheme] = found[:8]
            shot(page, f"site_{name.replace('/', '_').removesuffix('.html')}_{scheme}")
    assert not bad


CONTROLS = '''() => [...document.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex]')].filter(e =>
    e.tabIndex >= 0 && !e.disabled && e.checkVisibility({visibilityProperty: true}) && !e.closest('[aria-hidden=true]') && e.getClientRects().length)'''

@pytest.mark.parametrize('name', ['index.html', 'widgets.html'])
def test_keyboard(visit, name):
    "Tab reaches every control, each has a name and shows that it is the one"
    page = visit(name)
    n = page.evaluate(f'() => {{ window.left = new Set(({CONTROLS})()); return left.size }}')
    assert n > 40
    dim = page.evaluate('''() => { const name = e => (e.getAttribute('aria-label') || e.title || e.innerText || e.textContent || [...(e.labels || [])].map(l => l.innerText).join() || [...e.querySelectorAll('img')].map(i => i.alt).join() || e.placeholder || '').trim();
                                   return [...left].filter(e => !name(e)).map(e => e.outerHTML.slice(0, 120)) }''')
    assert not dim, 'without a name'
    page.evaluate("""() => { window.unseen = []; document.addEventListener('focusin', ({target}) => {
        left.delete(target);
        const s = getComputedStyle(target);
        if (s.outlineStyle == 'none' && s.boxShadow == 'none') unseen.push(target.outerHTML.slice(0, 120)) }) }""")
    for i in range(2*n + 200):   # code that can be scrolled is a stop, too
        page.keyboard.press('Tab')
        if i >= n - 1 and i % 10 == 0 and not page.evaluate('left.size'): break
    assert not page.evaluate('() => [...left].map(e => e.outerHTML.slice(0, 120))'), 'never reached'
    assert not page.evaluate('unseen'), 'focus cannot be seen'


def test_sections_open_and_close(visit):
    "By keyboard, and they say so"
    page = visit('restyle.html')
    closed = page.locator('#quarto-sidebar button[aria-expanded=false]').first
    if not closed.count(): pytest.skip('the small site has no sections')
    section = page.locator(closed.get_attribute('data-bs-target'))
    assert not section.is_visible()
    closed.focus()
    page.keyboard.press('Enter')
    section.wait_for(state='visible')


@pytest.mark.parametrize('query, where', [('invert', 'restyle.html'), ('latent_avg', ''), ('cars', '')])
def test_search(visit, query, where):
    "Finds what is asked, and the keyboard opens it"
    page = visit('index.html')
    page.keyboard.press('Tab')
    page.locator('input[type=search]').fill(query)
    results = page.locator('.search-result')
    results.first.wait_for()
    found = results.evaluate_all('es => es.map(e => [e.getAttribute("href"), e.innerText])')
    assert query in found[0][1].lower() and any(where in h for h, _ in found), found
    page.keyboard.press('ArrowDown')
    page.keyboard.press('Enter')
    page.wait_for_url(lambda u: 'index.html' not in u or '#' in u)
    assert query in page.locator('main').inner_text().lower()


def test_dark_is_remembered(visit):
    "The switch works by keyboard, and the next page knows"
    page = visit('index.html', color_scheme='light')
    page.locator('.quarto-color-scheme-toggle').first.focus()
    page.keyboard.press('Enter')
    dark = "document.documentElement.classList.contains('quarto-dark')"
    page.wait_for_function(dark)
    page.goto(page.url.split('index.html')[0] + 'restyle.html')
    page.wait_for_function(dark)


def test_phone_menus(visit):
    "Both menus open, and lead on"
    page = visit('restyle.html', viewport=dict(width=390, height=844))
    page.locator('.navbar-toggler').click()
    page.get_by_role('link', name='GitHub').first.wait_for(state='visible')
    shot(page, 'site_phone_menu')
    page.locator('.navbar-toggler').click()
    page.locator('.quarto-btn-toggle').first.click()
    page.locator('#quarto-sidebar a.sidebar-link.active').wait_for(state='visible')
    shot(page, 'site_phone_sidebar')
    assert page.evaluate('document.documentElement.scrollWidth') <= 390


def test_film_moves_and_stops(visit):
    "The film of the landing page: moving, paused by a checkbox, still where little motion is asked for"
    page = visit('index.html')
    film = page.locator('.restyle-film')
    moving, still = film.locator('img.moving'), film.locator('img.still')
    assert moving.is_visible() and not still.is_visible() and moving.evaluate('e => e.complete && e.naturalWidth > 300')
    film.locator('input').focus()
    page.keyboard.press('Space')
    assert still.is_visible() and not moving.is_visible()
    quiet = visit('index.html', reduced_motion='reduce').locator('.restyle-film')
    assert quiet.locator('img.still').is_visible() and not quiet.locator('img.moving').is_visible()


def test_players_play(site, visit):
    "Whatever can be moved on a page moves without a kernel, and nothing on it waits for one"
    dead = re.compile(r'application/vnd\.jupyter\.widget|<code>\w*Box\(|Error displaying widget|A Jupyter Widget')
    with_players = [n for n in names(site) if 'restyle-player' in (text := (site/n).read_text(encoding='utf-8')) or dead.search(text)]
    assert with_players
    page, moved = visit('index.html'), 0
    root = page.url.removesuffix('index.html')
    for name in with_players:
        assert not dead.search((site/name).read_text(encoding='utf-8')), name
        page.goto(root + name)
        for film in page.locator('.restyle-player').all()[:2]:   # test_player.py sees all of the chapter
            slider, pictures = film.locator('input[type=range]'), film.locator('.restyle-row img')
            shown = lambda: pictures.evaluate_all('es => es.map(e => e.src + (e.style.objectPosition || "") + (e.style.transform || ""))')
            slider.press('Home')
            before = shown()
            slider.press('End')
            assert slider.input_value() != slider.get_attribute('min') and shown() != before, name
            moved += 1
    assert moved
