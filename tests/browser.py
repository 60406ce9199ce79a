"""What the browser tests share: a Chromium, servers of their own, notebooks written on the spot, and eyes for a page.

The tests run where there is a Chromium: at $CHROMIUM, or in PATH. $SHOTS names a folder for screenshots to look at.
"""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = '--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
PATIENCE = float(os.environ.get('PATIENCE', 60))   # seconds for anything to happen; a busy machine is no failure


# ---------------------------------------------------------------- the browser

def chromium() -> str | None:
    "Where the browser is"
    named = os.environ.get('CHROMIUM')
    if named: return shutil.which(named)
    return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.fixture(scope='module')
def browser():
    "A running Chromium. It ends with its module: Playwright keeps an event loop, which other tests could not share"
    path = chromium()
    if path is None: pytest.skip('no Chromium in PATH or at $CHROMIUM: install one with `apt-get install chromium`')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=FLAGS)
        yield b
        b.close()


def new_page(browser, **context):
    "A page that keeps what goes wrong on it in `page.complaints`"
    page = browser.new_context(**dict(viewport=dict(width=1280, height=1000)) | context).new_page()
    page.set_default_timeout(PATIENCE*1000)
    page.complaints = []
    page.on('console', lambda m: m.type == 'error' and page.complaints.append(f'{m.text} {m.location.get("url", "")}'))
    page.on('pageerror', lambda e: page.complaints.append(str(e)))
    page.on('filechooser', lambda _: None)   # somebody always listens: Playwright asks the browser for choosers without waiting for its answer, and a key press can be quicker
    return page


def shot(page, name):
    "A screenshot for a person, where $SHOTS asks for it"
    if folder := os.environ.get('SHOTS'): page.screenshot(path=Path(folder)/f'{name}.png')


# ---------------------------------------------------------------- servers and notebooks

def write_notebook(path, *cells):
    "A notebook of these code cells"
    cells = [dict(cell_type='code', id=f'cell{i}', metadata={}, execution_count=None, outputs=[], source=s) for i, s in enumerate(cells)]
    kernel = dict(display_name='Python 3', language='python', name='python3')
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    return path


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextmanager
def serving(module, *options, folder, ready='/'):
    "The address of `python -m MODULE` at work in `folder`, with Jupyter's settings, data and runtime files kept there"
    port, log = free_port(), folder/'server.log'
    own = dict(JUPYTER_CONFIG_DIR='config', JUPYTER_DATA_DIR='data', JUPYTER_RUNTIME_DIR='runtime',
               JUPYTERLAB_SETTINGS_DIR='settings', JUPYTERLAB_WORKSPACES_DIR='workspaces', IPYTHONDIR='ipython')
    env = dict(os.environ, OMP_NUM_THREADS='1', JUPYTER_PREFER_ENV_PATH='1') | {k: str(folder/v) for k, v in own.items()}
    env.pop('MPLBACKEND', None)
    command = [sys.executable, '-m', module, *options, f'--port={port}', '--no-browser']
    with log.open('w') as f: server = subprocess.Popen(command, cwd=folder, env=env, stdout=f, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}{ready}', timeout=5).close(); break
            except OSError: assert server.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(.1)
        yield f'http://127.0.0.1:{port}'
    finally:
        server.terminate()
        try: server.wait(15)
        except subprocess.TimeoutExpired: server.kill(); server.wait()


# ---------------------------------------------------------------- eyes

LOOK = '''async (e, n) => {
    await e.decode();
    const c = Object.assign(document.createElement('canvas'), {width: n, height: n}), x = c.getContext('2d');
    x.drawImage(e, 0, 0, n, n);
    return [...x.getImageData(0, 0, n, n).data]
}'''

def look(img, n=24):
    "What an <img> shows now, (n,n,3) levels"
    return np.array(img.evaluate(LOOK, n), float).reshape(n, n, 4)[..., :3]


def differ(a, b):
    "Mean difference of two looks, in levels of 255"
    return np.abs(a - b).mean()


def until(test, what, seconds=PATIENCE):
    "The first true value of `test()`, asked again and again"
    end = time.monotonic() + seconds
    while not (value := test()):
        assert time.monotonic() < end, f'{what}: not within {seconds} s'
        time.sleep(.03)
    return value


def until_changed(img, before, least=1.):
    "What an <img> shows once that differs from `before`"
    def changed():
        now = look(img)
        return (now,) if differ(now, before) > least else None
    return until(changed, 'another picture')[0]


class Part:
    "A widget on a page, named as a person sees it: the classes of `restyle_nb.widgets` without their `restyle-`"
    def __init__(self, page, selector, nth=0): self.page, self.root = page, page.locator(selector).nth(nth)
    def part(self, name, nth=0): return self.root.locator(f'.restyle-{name}').nth(nth)
    def image(self, name): return self.root.locator(f'.restyle-{name} img')
    def handle(self, name, nth=0): return self.part(name, nth).locator('[role=slider]')
    def chosen(self, name): return self.part(name).locator('option:checked').text_content().replace('\xa0', ' ')
    def choose(self, name, label): self.part(name).locator('select').select_option(label=label)
    def step_shown(self): return int(self.root.locator('tr[aria-current=step]').evaluate('e => e.sectionRowIndex'))

    def status(self): return self.part('status').text_content().strip()
    def options(self, name): return [o.replace('\xa0', ' ') for o in self.part(name).locator('option').all_text_contents()]

    def says(self, text):
        "Wait until the status line holds `text`; all of it"
        from playwright.sync_api import expect
        expect(self.part('status').locator('[role=status]')).to_contain_text(text, timeout=PATIENCE*1000)
        return self.status()

    def press(self, name, key, nth=0):
        "A key on a slider"
        self.handle(name, nth).focus()
        self.page.keyboard.press(key)

    def upload(self, *files):
        with self.page.expect_file_chooser() as chooser: self.part('upload').click()
        chooser.value.set_files([str(f) for f in files])


# Light between what is drawn: colours as the canvas understands them, each over the ones below, paler where there is opacity
CONTRAST = '''root => {
    const x = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d', {willReadFrequently: true});
    const page = document.body.appendChild(Object.assign(document.createElement('div'), {style: 'background: Canvas'})), paper = getComputedStyle(page).backgroundColor;
    page.remove();
    const over = (colours) => { x.fillStyle = paper; x.fillRect(0, 0, 1, 1);
        for (const c of colours) { x.fillStyle = c; x.fillRect(0, 0, 1, 1) }
        return [...x.getImageData(0, 0, 1, 1).data].slice(0, 3) };
    const light = rgb => { const [r, g, b] = rgb.map(v => (v /= 255) <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4); return .2126*r + .7152*g + .0722*b };
    const below = e => { const cs = []; for (; e; e = e.parentElement ?? e.getRootNode().host) cs.unshift(getComputedStyle(e).backgroundColor); return cs };
    const seen = e => { let o = 1; for (; e; e = e.parentElement) o *= getComputedStyle(e).opacity; return o };
    const found = [], walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const text = walk.currentNode.textContent.trim(), e = walk.currentNode.parentElement, r = e.getBoundingClientRect(), s = getComputedStyle(e);
        if (!text || !r.width || !r.height || s.visibility != 'visible' || e.closest('script,style,:disabled,[aria-disabled=true]')) continue;
        const under = over(below(e)), ink = over([...below(e), s.color]), o = seen(e);
        const [a, b] = [light(under), light(ink.map((v, i) => o*v + (1 - o)*under[i]))].sort((a, b) => b - a);
        found.push([text.slice(0, 40), (a + .05)/(b + .05)]);
    }
    return found
}'''

def contrasts(root):
    "Each text inside `root` with the contrast it is drawn in (WCAG: 4.5 is readable)"
    return root.evaluate(CONTRAST)


def boxes(root, selector='img, button, select, table, .jupyter-widgets'):
    "Where the parts of `root` are, relative to it, and its own size; whole pixels"
    return root.evaluate('''(root, selector) => {
        const o = root.getBoundingClientRect(), put = r => [r.x - o.x, r.y - o.y, r.width, r.height].map(Math.round);
        return [o, ...[...root.querySelectorAll(selector)].map(e => e.getBoundingClientRect())].map(put)
    }''', selector)


LATENCY = '''(root, selector) => {
    window.shown = null;
    const before = root.querySelector(selector).src;
    let pressed = null;
    addEventListener('keydown', e => pressed ??= e.timeStamp, {once: true, capture: true});
    const o = new MutationObserver(async () => {
        const img = root.querySelector(selector);
        if (pressed === null || !img || img.src === before) return;
        o.disconnect();
        await img.decode();
        requestAnimationFrame(() => setTimeout(() => window.shown = performance.now() - pressed))   // after that frame
    });
    o.observe(root, {subtree: true, childList: true, attributes: true, attributeFilter: ['src']})
}'''

def latency(widget, name, key):
    "Milliseconds from a key press until the page has decoded another picture and drawn a frame with it"
    widget.root.evaluate(LATENCY, f'.restyle-{name} img')
    widget.page.keyboard.press(key)
    return widget.page.wait_for_function('() => window.shown').json_value()


def quick(measure, bar=100, rounds=6):
    "Times of several moves, in milliseconds, once half of them are below `bar`; a busy machine has some rounds for that"
    for _ in range(rounds):
        times = measure()
        print('slider to picture:', ', '.join(f'{t:.0f}' for t in times), 'ms')
        if sorted(times)[len(times)//2] < bar: return times
    raise AssertionError(f'slider to picture: never below {bar} ms')
