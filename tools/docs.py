"""Build the docs site and the README with pip packages alone.

    python tools/docs.py [--force]    README.md and the site in _docs/ (--force: every page anew)
    python tools/docs.py --readme     README.md only

nbdev prepares the notebooks (links, signatures, folded sources) and smalldocs renders them from the `_quarto.yml`
that Quarto would use; where Quarto is installed, plain `nbdev_docs` makes the same site.
"""
import argparse
import html
import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

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
        return f"![{option(source, 'fig-cap') or ''}](nbs/images/index-{len(figures)}.png)"
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
    "Notebooks link to each other by file name"
    return re.sub(r'\]\(([^()\s"]*?)([^()/\s"]+\.ipynb)', lambda m: f']({m[1]}{page(Path(m[2]))}', text)


def link_to_repository(text: str, blob: str) -> str:
    "LICENSE and its like are no pages: `../NAME` leads to the repository"
    return re.sub(r'\]\((?:\.\./)+([A-Z][\w.]*)\)', rf']({blob}/\1)', text)


def stage(processed: Path, dest: Path, home: str, blob: str, site_name: str):
    "Copy what nbdev processed to `dest`, under page names and with links relative to each page"
    shutil.rmtree(dest, ignore_errors=True)
    shutil.copytree(processed, dest, ignore=shutil.ignore_patterns(site_name, dest.name))
    configs = {p: p.read_text(encoding='utf-8') for p in (dest/'sidebar.yml', dest/'_quarto.yml')}
    for old in sorted(dest.rglob('*.ipynb')):
        new = page(old)
        old.rename(new)
        was, now = old.relative_to(dest).as_posix(), new.relative_to(dest).as_posix()
        configs = {p: re.sub(rf'(?<=[ "\']){re.escape(was)}\b', now, t) for p, t in configs.items()}
        up = '../'*now.count('/') or './'
        text = new.read_text(encoding='utf-8').replace(home, up)
        text = link_to_repository(link_between_pages(text), blob)
        new.write_text(re.sub(r'"output-file: [^"]*\\n",\s*', '', text), encoding='utf-8')
    for p, t in configs.items(): p.write_text(t, encoding='utf-8')


def typeset_maths(site: Path):
    "MathML in place of a script from elsewhere: the site needs no network"
    from latex2mathml.converter import convert
    for path in site.rglob('*.html'):
        text = path.read_text(encoding='utf-8')
        for kind, opening, closing, display in (('inline', r'\(', r'\)', 'inline'), ('display', r'\[', r'\]', 'block')):
            pattern = f'<span class="math {kind}">{re.escape(opening)}(.*?){re.escape(closing)}</span>'
            text = re.sub(pattern, lambda m: convert(html.unescape(m[1]).strip(), display=display), text, flags=re.S)
        text = re.sub(r'\s*<(?:link|script)[^>]*katex[^>]*>(?:</script>)?', '', text)
        path.write_text(text, encoding='utf-8')
    for path in site.rglob('*.css'):
        text = path.read_text(encoding='utf-8')
        path.write_text(re.sub(r'@import url\(https://fonts[^)]*\);', '', text), encoding='utf-8')


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
    stage(processed, work, home, f'{cfg.git_url}/blob/{cfg.branch}', cfg.doc_path.name)
    subprocess.run([Path(sys.executable).with_name('smalldocs'), 'render', '--quiet', work], check=True)
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(work/cfg.doc_path.name, cfg.doc_path)
    shutil.rmtree(work)
    typeset_maths(cfg.doc_path)
    print(f"{len(list(cfg.doc_path.rglob('*.html')))} pages in {cfg.doc_path.relative_to(ROOT)}/")


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--force', action='store_true')
    parser.add_argument('--readme', action='store_true')
    args = parser.parse_args()
    write_readme()
    if not args.readme: build(args.force)
