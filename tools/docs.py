"""Build the docs site and the README with pip packages alone.

    python tools/docs.py [--force]    README.md and the site in _docs/ (--force: every page anew)
    python tools/docs.py --readme     README.md only

nbdev prepares the notebooks (links, signatures, folded sources) and smalldocs renders them from the `_quarto.yml`
that Quarto would use; where Quarto is installed, plain `nbdev_docs` makes the same site. What is built is then read again:
a broken link or anchor, a picture without words, a heading out of order, or anything from elsewhere is an error.
"""
import argparse
import html
import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
NUMBERED = re.compile(r'^\d+[a-zA-Z0-9]*_')


# ---------------------------------------------------------------- README

def front(source: str) -> tuple[str, str]:
    "Title and summary of a notebook's first Markdown cell"
    title, summary = (re.search(rf'^{mark}\s+(.+?)\s*$', source, re.M) for mark in ('#', '>'))
    return title[1], summary[1] if summary else ''


def callout(m) -> str:
    "A Quarto callout as a GitHub alert"
    kind = m[1].upper()
    kind = kind if kind in ('NOTE', 'TIP', 'IMPORTANT', 'WARNING', 'CAUTION') else 'NOTE'
    return f'> [!{kind}]\n> ' + m[2].strip().replace('\n', '\n> ')


def prose(source: str) -> str:
    "Markdown of the index page as GitHub understands it, its links seen from the repository root"
    s = re.sub(r':::+ *\{\.callout-(\w+)[^}]*\}\n(.*?)\n:::+', callout, source, flags=re.S)
    s = re.sub(r'^:::+.*\n?', '', s, flags=re.M)
    s = re.sub(r'(\]\([^)]*\))\{[^}]*\}', r'\1', s)   # attributes of a link or picture
    inside = lambda m: f'](nbs/{m[1]})' if not m[1].startswith('../') else f']({m[1][3:]})'
    return re.sub(r'\]\((?!https?:|#|mailto:)([^)]+)\)', inside, s)


def option(source: str, name: str) -> str | None:
    "Value of a Quarto cell option, `#| name: value`"
    m = re.search(rf'^#\|\s*{name}:\s*"?(.*?)"?\s*$', source, re.M)
    return m[1] if m else None


def result(output: dict, source: str, figures: list) -> str:
    "One output of a code cell; pictures are appended to `figures` and linked by number"
    data = output.get('data', {})
    if 'image/png' in data:
        figures.append(b64decode(''.join(data['image/png'])))
        return f"![{option(source, 'fig-alt') or option(source, 'fig-cap') or ''}](nbs/images/index-{len(figures)}.png)"
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    text = ''.join(output.get('text', data.get('text/plain', ''))).rstrip()
    return '\n'.join(f'    {line}'.rstrip() for line in text.splitlines())


def readme() -> tuple[str, list[bytes]]:
    "Text of README.md and the pictures it shows, from the saved index notebook"
    cells = json.loads((NBS/'index.ipynb').read_text(encoding='utf-8'))['cells']
    parts, figures, started = [], [], False
    for cell in cells:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown' and not started:
            parts.append('# {}\n\n{}'.format(*front(source)))
            started = True
        elif cell['cell_type'] == 'markdown': parts.append(prose(source))
        elif cell['cell_type'] == 'code':
            if re.search(r'^#\|\s*(hide|export|exporti|default_exp|include:\s*false)\b(?!s)', source, re.M): continue
            code = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
            if code and option(source, 'echo') != 'false': parts.append(f'```python\n{code}\n```')
            parts += [result(o, source, figures) for o in cell['outputs'] if o.get('name') != 'stderr']
    return '\n\n'.join(p.strip('\n') for p in parts if p.strip()) + '\n', figures


def write_readme():
    text, figures = readme()
    (NBS/'images').mkdir(exist_ok=True)
    for old in (NBS/'images').glob('index-*.png'): old.unlink()
    for i, png in enumerate(figures, 1): (NBS/'images'/f'index-{i}.png').write_bytes(png)
    (ROOT/'README.md').write_text(text, encoding='utf-8')
    print(f'README.md: {len(text)} characters, {len(figures)} pictures')


# ---------------------------------------------------------------- site

def page(path: Path) -> Path:
    "`03_restyle.ipynb` makes the page `restyle.html`, as nbdev's own links expect"
    return path.with_name(NUMBERED.sub('', path.name.lower()))


def link_between_pages(text: str) -> str:
    "Notebooks link to each other by file name; what lies elsewhere keeps its own"
    return re.sub(r'\]\((?!\w+:)([^()\s"]*?)([^()/\s"]+\.ipynb)', lambda m: f']({m[1]}{page(Path(m[2]))}', text)


def links_once(text: str) -> str:
    "nbdev links names in backticks, also where they are already the text of a link; that link stays"
    inner = r'\[(`[^`\n]+`)\]\([^()\s]*\)'
    return re.sub(rf'\[(?:[^\[\]\n]*{inner})+[^\[\]\n]*\](?=\()', lambda m: f'[{re.sub(inner, lambda n: n[1], m[0][1:-1])}]', text)


def link_to_repository(text: str, blob: str) -> str:
    "LICENSE and its like are no pages: `../NAME` leads to the repository"
    return re.sub(r'\]\((?:\.\./)+([A-Z][\w.]*)\)', rf']({blob}/\1)', text)


def words(source: str) -> str:
    "The last sentence of a Markdown cell, without marks"
    source = re.sub(r'```.*?```|^(?:[|:#]|\* )[^\n]*', '', source, flags=re.M | re.S)
    text = re.sub(r'\s+', ' ', re.sub(r'!?\[([^\]]*)\]\([^)]*\)|[*`$]', r'\1', source)).strip()
    return re.split(r'(?<=[.?!:]) ', text)[-1].rstrip(':')


def describe(cells: list):
    """Every figure gets a text alternative: its `fig-alt`, else its caption, else the heading it is under and the sentence above it.
    Functions shown before the first section are sections themselves: no level of heading is left out"""
    heading = above = ''
    for c in cells:
        source = ''.join(c['source'])
        if not heading:
            for o in c.get('outputs', []):
                if text := ''.join(o.get('data', {}).get('text/markdown', '')): o['data']['text/markdown'] = re.sub(r'^###(?= )', '##', text, flags=re.M)
        if c['cell_type'] == 'markdown':
            headings = re.findall(r'^#+ +(.+?)(?: *\{.*\})?$', re.sub(r'```.*?```', '', source, flags=re.S), re.M)
            if headings: heading, above = headings[-1].replace('`', ''), ''
            above = words(source) or above
        pictures = [o for o in c.get('outputs', []) if any(k.startswith('image/') for k in o.get('data', {}))]
        if pictures and not option(source, 'fig-alt'):
            alt = option(source, 'fig-cap') or ': '.join(filter(None, ('Figure', heading, above)))
            alt = alt.replace('"', "'").replace('\\', '')
            c['source'] = f'#| fig-alt: "{alt}"\n{source}'


def badge(name: str, repo: str, branch: str) -> dict:
    "A cell that opens the notebook in Colab"
    url = f"https://colab.research.google.com/github/{repo}/blob/{branch}/nbs/{name}"
    return dict(cell_type='markdown', id='badge', metadata={}, source=f"[![Open in Colab]({'../'*name.count('/')}images/open-in-colab.svg)]({url})")


def runs_in_colab(nb: dict) -> bool:
    "Has the notebook an install cell for Colab, and no badge in its own text?"
    from colab import MARK
    text = '\n'.join(''.join(c['source']) for c in nb['cells'])
    return MARK in text and 'open-in-colab' not in text


def stage(processed: Path, dest: Path, home: str, cfg) -> dict[str, str]:
    "Copy what nbdev processed to `dest`, under page names and with links relative to each page. Which notebook each page is"
    shutil.rmtree(dest, ignore_errors=True)
    shutil.copytree(processed, dest, ignore=shutil.ignore_patterns(cfg.doc_path.name, dest.name))
    configs = {p: p.read_text(encoding='utf-8') for p in (dest/'sidebar.yml', dest/'_quarto.yml')}
    blob, repo, origin = f'{cfg.git_url}/blob/{cfg.branch}', '/'.join(cfg.git_url.split('/')[-2:]), {}
    for old in sorted(dest.rglob('*.ipynb')):
        new = page(old)
        old.rename(new)
        was, now = old.relative_to(dest).as_posix(), new.relative_to(dest).as_posix()
        if now in origin: raise SystemExit(f'{was} and {origin[now]} would both be the page {now}: rename one of them')
        origin[now] = was
        configs = {p: re.sub(rf'(?<=[ "\']){re.escape(was)}\b', now, t) for p, t in configs.items()}
        up = '../'*now.count('/') or './'
        text = new.read_text(encoding='utf-8').replace(home, up)
        nb = json.loads(re.sub(r'"output-file: [^"]*\\n",\s*', '', link_to_repository(link_between_pages(links_once(text)), blob)))
        describe(nb['cells'])
        if runs_in_colab(json.loads((NBS/was).read_text(encoding='utf-8'))): nb['cells'].insert(1, badge(was, repo, cfg.branch))
        new.write_text(json.dumps(nb, ensure_ascii=False), encoding='utf-8')
    for p, t in configs.items(): p.write_text(t, encoding='utf-8')
    return origin


# ---------------------------------------------------------------- what smalldocs leaves to be done

def mathml(m) -> str:
    "MathML in place of a script from elsewhere: the site needs no network"
    from latex2mathml.converter import convert
    inline = m[1] == 'inline'
    source = html.unescape(m[2])[2:-2].strip()
    for ours, theirs in FORMS: source = re.sub(ours, theirs, source)
    return convert(source, display='inline' if inline else 'block')


FORMS = [(r'(?:\\[bB]igg?[lr]?)?\\(?:[lr]Vert(?![a-zA-Z])|\|)', r'\\|'), (r'\\arg(?![a-zA-Z])', r'\\operatorname{arg}'), (r'\\\*', '*')]   # for latex2mathml


def button(m) -> str:
    "A heading of the sidebar that opens and closes: the keyboard reaches it once, by its words"
    attributes = re.sub(r' role="navigation"', '', m[1])
    twice = '' if 'menu-text' in m[2] else ' tabindex="-1" aria-hidden="true"'
    return f'<button type="button"{attributes}{twice}>{m[2]}</button>'


def mend_anchors(site: Path):
    "nbdev links `Class.method` and private names, whose headings are `method` and none: those links lead to the heading there is, or to the page"
    anchors = {p.relative_to(site).as_posix(): set(re.findall(r' id="([^"]+)"', p.read_text(encoding='utf-8'))) for p in site.rglob('*.html')}
    for path in site.rglob('*.html'):
        def mended(m):
            there = anchors.get((path.parent/m[1]).resolve().relative_to(site.resolve()).as_posix(), ())
            anchor = next((a for a in (m[2], m[2].rpartition('.')[2]) if a in there), None)
            return f'<a href="{m[1]}{"#" + anchor if anchor else ""}"><code>'
        path.write_text(re.sub(r'<a href="([^":#]+\.html)#([^"]+)"><code>', mended, path.read_text(encoding='utf-8')), encoding='utf-8')


def finish(site: Path, origin: dict[str, str], blob: str):
    "Maths without a script, controls that the keyboard reaches, links to the notebooks under their own names, no font from elsewhere"
    shown = {k: v for k, v in origin.items() if k != v}
    for path in site.rglob('*.html'):
        text = path.read_text(encoding='utf-8')
        text = re.sub(r'<span class="math (inline|display)">(.*?)</span>', mathml, text, flags=re.S)
        text = re.sub(r'\s*<(?:link|script)[^>]*katex[^>]*>(?:</script>)?', '', text)
        text = re.sub(r'<a( class="sidebar-item-\w+[^>]*data-bs-toggle="collapse"[^>]*)>(.*?)</a>', button, text)
        text = re.sub(rf'(?<={re.escape(blob)}/nbs/)([^"#]+\.ipynb)', lambda m: shown.get(m[1], m[1]), text)
        text = text.replace('<a onclick="window.scrollTo(0, 0); return false;"', '<a href="#" onclick="window.scrollTo(0, 0); return false;"')
        text = re.sub(r'(class="quarto-color-scheme-toggle[^>]*)title="Toggle dark mode"', r'\1role="button" title="Light or dark" aria-label="Light or dark"', text)
        path.write_text(text, encoding='utf-8')
    mend_anchors(site)
    script = site/'site_libs'/'smalldocs.js'   # a word of four letters is found as it is written: "cars" is not "cards"
    script.write_text(script.read_text(encoding='utf-8').replace('threshold: 0.3', 'threshold: 0.15'), encoding='utf-8')
    for path in site.rglob('*.css'):
        text = path.read_text(encoding='utf-8')
        path.write_text(re.sub(r'@import url\(https://fonts[^)]*\);', '', text), encoding='utf-8')


# ---------------------------------------------------------------- is it whole?

VERBATIM = ('code', 'pre', 'script', 'style', 'title', 'annotation')


class Page(HTMLParser):
    "What a page names, points at and shows"
    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.needs, self.levels, self.faults, self._verbatim = [], [], [], [], [], 0
        text = path.read_text(encoding='utf-8')
        self.feed(text)
        if re.search(r'<m[io][^>]*>\\', text): self.faults.append('a command of a formula was not understood')
        self.faults += [f'id twice: {i}' for i, n in Counter(self.ids).items() if n > 1]
        if self.levels.count(1) != 1: self.faults.append(f'{self.levels.count(1)} main headings')
        self.faults += [f'heading of level {b} after level {a}' for a, b in zip(self.levels, self.levels[1:]) if b > a + 1]

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.append(a['id'])
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag == 'img' and not (a.get('alt') or '').strip() and a.get('role') != 'presentation' and a.get('aria-hidden') != 'true':
            self.faults.append(f"picture without alternative text: {a.get('src', '')[:60]}")
        if tag in ('img', 'script', 'iframe', 'source', 'video', 'link'):
            self.needs += [v for k in ('src', 'href') if (v := a.get(k)) and not v.startswith(('data:', '#'))]
        if re.fullmatch('h[1-6]', tag): self.levels.append(int(tag[1]))
        self._verbatim += tag in VERBATIM

    def handle_endtag(self, tag): self._verbatim -= tag in VERBATIM

    def handle_data(self, text):
        if not self._verbatim and (m := re.search(r'\]\([^)\s]*\)|^:::', text, re.M)): self.faults.append(f'Markdown that was not understood: {m[0]}')


def problems(site: Path) -> list[str]:
    "Every broken link or anchor, thing from elsewhere, picture without words, and heading out of order"
    pages = {p: Page(p) for p in sorted(site.rglob('*.html'))}
    found = []
    for path, page in pages.items():
        faults = list(page.faults)
        for link in page.links + page.needs:
            scheme = re.match(r'(\w+):|//', link)
            if scheme:
                if link in page.needs: faults.append(f'from elsewhere: {link}')
                continue
            file, _, anchor = unquote(link).partition('#')
            target = (path.parent/file.partition('?')[0]).resolve() if file else path
            if not target.is_file(): faults.append(f'broken link: {link}')
            elif anchor and target in pages and anchor not in pages[target].ids: faults.append(f'broken anchor: {link}')
        found += [f'{path.relative_to(site).as_posix()}: {f}' for f in dict.fromkeys(faults)]
    for path in site.rglob('*.css'):
        found += [f'{path.name}: from elsewhere: {u}' for u in re.findall(r'(?:url\(|@import )["\']?((?:https?:)?//[^"\')]+)', path.read_text(encoding='utf-8'))]
    return found


def build(force: bool):
    from nbdev.config import get_config
    from nbdev.doclinks import _build_modidx
    from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
    from nbdev.serve import proc_nbs
    cfg = get_config()
    refresh_quarto_yml()
    _build_modidx()
    nbdev_sidebar.__wrapped__()
    processed = proc_nbs(force=force, n_workers=2)
    work = processed/'.site'
    home = f"{cfg.doc_host.rstrip('/')}{cfg.doc_baseurl.rstrip('/')}/"
    origin = stage(processed, work, home, cfg)
    subprocess.run([Path(sys.executable).with_name('smalldocs'), 'render', '--quiet', work], check=True)
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(work/cfg.doc_path.name, cfg.doc_path)
    shutil.rmtree(work)
    finish(cfg.doc_path, origin, f'{cfg.git_url}/blob/{cfg.branch}')
    found = problems(cfg.doc_path)
    print(f"{len(list(cfg.doc_path.rglob('*.html')))} pages in {cfg.doc_path.relative_to(ROOT)}/: {len(found) or 'no'} problems", *found, sep='\n  ')
    if found: raise SystemExit(1)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--force', action='store_true')
    parser.add_argument('--readme', action='store_true')
    args = parser.parse_args()
    write_readme()
    if not args.readme: build(args.force)
