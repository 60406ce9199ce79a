"""Notebooks and what they printed.

    python tools/nbs.py run [NOTEBOOK…]      execute, save the outputs in place
    python tools/nbs.py check [NOTEBOOK…]    execute a copy; fail where a cell fails or a saved output is stale
    python tools/nbs.py exports              fail where the package is not what the notebooks export

Without names, every notebook of `nbs/` counts, except drafts (`_name`) and those marked `- skip_exec: true` under their
title (the recipes). Cells that nbdev's flags leave out (`#| eval: false` and the `tst_flags` of settings.ini) are left
out here too and keep the output they have. `#| volatile` marks a cell whose numbers are measured times, are
rounding itself, or come of a training or search, which carries the last bit of one processor far from that of another:
of its outputs only the number and the kinds are compared. Everything runs on the CPU, so that saved outputs mean the same everywhere.
"""
import argparse
import difflib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from copy import deepcopy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
VIEW, STATE = (f'application/vnd.jupyter.widget-{o}+json' for o in ('view', 'state'))

RTOL = 2e-2         # of a printed number
PIXELS = 2.         # mean difference of two figures, in grey levels of 255
NUMBER = re.compile(r'[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?')


def settings() -> dict:
    "The values of settings.ini"
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return dict(ini['DEFAULT'])


# ---------------------------------------------------------------- which notebooks, which cells

def notebooks(folder=NBS) -> list[Path]:
    "Every notebook that is no draft"
    found = (p for p in Path(folder).rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(folder).parts))
    return sorted(found)


def flagged(nb, name: str) -> bool:
    "Is `- NAME: true` set under the title?"
    return any(c.cell_type == 'markdown' and re.search(rf'^- {name}:\s*true\s*$', c.source, re.M) for c in nb.cells[:3])


def skips_execution(nb) -> bool: return flagged(nb, 'skip_exec')
def reads_others(nb) -> bool: return flagged(nb, 'reads_notebooks')   # their saved outputs: such a notebook is run last


def directives(cell) -> set[str]:
    "Names of the `#|` lines at the top of a cell; `eval: false` counts as one name"
    names = set()
    for line in cell.source.splitlines():
        if line.strip() and not line.lstrip().startswith('#|'): break
        m = re.match(r'\s*#\|\s*(eval:\s*false|[\w-]+)', line)
        if m: names.add(re.sub(r'\s', '', m[1]))
    return names


def left_out(cell) -> bool:
    "Does nbdev_test pass this cell by?"
    return bool(directives(cell) & {'eval:false', *settings()['tst_flags'].split()}) or 'nbdev_export(' in cell.source


# ---------------------------------------------------------------- executing

def execute(path: Path):
    "The notebook with the outputs of a fresh kernel; raises where a cell fails"
    import nbformat
    from nbclient import NotebookClient
    from nbclient.util import run_sync
    from nbdev.clean import clean_nb

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, cell_index, **kw):
            if cell.cell_type == 'code' and left_out(cell): return cell
            return await super().async_execute_cell(cell, cell_index, **kw)
        execute_cell = run_sync(async_execute_cell)

    nb = nbformat.read(path, as_version=4)
    timeout = None if skips_execution(nb) else 900   # seconds a cell; a recipe takes what it takes
    Client(nb, timeout=timeout, kernel_name='python3', extra_arguments=['--log-level=ERROR'],
           resources={'metadata': {'path': str(path.parent)}}).execute()
    nb = without_run_marks(without_stderr(nb, path))
    clean_nb(nb)
    return nb


def without_stderr(nb, path):
    "Warnings are told to whoever runs the notebook and not saved"
    for c in nb.cells:
        if c.cell_type != 'code': continue
        for o in c.outputs:
            if o.output_type == 'stream' and o.name == 'stderr' and o.text.strip():
                print(f'{path.name}: stderr, not saved: {o.text.strip().splitlines()[-1][:150]}', file=sys.stderr)
        c.outputs = joined(c.outputs)
    return nb


def joined(outputs):
    "Outputs without stderr, neighbouring pieces of stdout as one: where they break is a matter of timing"
    res = []
    for o in outputs:
        if o.output_type == 'stream' and o.name == 'stderr': continue
        if o.output_type == 'stream' and res and res[-1].output_type == 'stream': res[-1].text += o.text
        else: res.append(o)
    return res


def without_run_marks(nb):
    "Widget identifiers differ in every run: number them; drop the views that have an HTML form anyway"
    import nbformat
    outputs = [o for c in nb.cells for o in c.get('outputs', [])]
    for o in outputs:
        if 'text/html' in o.get('data', {}): o['data'].pop(VIEW, None)
    if not any(VIEW in o.get('data', {}) for o in outputs): nb.metadata.pop('widgets', None)
    saved = nb.metadata.get('widgets', {}).get(STATE)
    if not saved: return nb
    saved['state'] = {k: v for k, v in saved['state'].items() if 'source' not in v['state']}   # links break the docs
    text = nbformat.writes(nb)
    for i, model in enumerate(saved['state']): text = text.replace(model, f'{i:032x}')
    return nbformat.reads(text, as_version=4)


def write(nb, path: Path):
    "Save in nbdev's own byte order, all or nothing"
    import nbformat
    tmp = path.with_suffix('.ipynb.tmp')
    nbformat.write(nb, tmp)
    os.replace(tmp, path)


# ---------------------------------------------------------------- comparing

def picture(data: str):
    "Pixels of a base64 picture"
    import numpy as np
    from PIL import Image
    return np.asarray(Image.open(io.BytesIO(b64decode(''.join(data)))).convert('RGB'), float)


def shown(cell):
    "What a reader sees of a cell: (kind, text or pixels) for each output"
    for o in joined(deepcopy(cell.get('outputs', []))):
        data = o.get('data', {})
        image = data.get('image/png') or data.get('image/jpeg')
        if image: yield 'picture', picture(image)
        elif 'text/html' in data:
            inline = re.compile(r'data:image/\w+;base64,([A-Za-z0-9+/=]+)')
            for b64 in inline.findall(data['text/html']): yield 'picture', picture(b64)
            text = inline.sub('', data['text/html'])
            yield 'html', re.sub(r'\b(?=[a-z]*\d)[a-z_]*[0-9a-f]{8,}\b', 'ID', text)   # ids made from hashes
        else:
            text = data.get('text/markdown') or data.get('text/plain') or o.get('text', '')
            yield 'text', re.sub(r' at 0x[0-9a-f]+', '', ''.join(text)).strip()


def close(a: str, b: str) -> bool:
    "Are two printed numbers equal up to RTOL, or to one unit of the last printed decimal?"
    x, y = float(a), float(b)
    m = re.fullmatch(r'[-+]?\d*\.?(\d*)(?:[eE]([-+]?\d+))?', a)
    last = 10.**(int(m[2] or 0)-len(m[1])) if '.' in a else 0.
    return abs(x-y) <= max(RTOL*abs(x), 1.001*last, 1e-6)


def same_text(a: str, b: str) -> bool:
    "Words exactly, numbers nearly, spaces (which align columns) not at all; a hash is a word, though parts of it look like numbers"
    if a == b: return True
    words = lambda s: re.sub(r'\s+', '', NUMBER.sub('#', s))
    xs, ys = NUMBER.findall(a), NUMBER.findall(b)
    return words(a) == words(b) and len(xs) == len(ys) and all(map(close, xs, ys))


def first_change(a: str, b: str) -> str:
    "The first differing line of two texts, for the message"
    pairs = zip(a.splitlines() or [''], b.splitlines() or [''])
    x, y = next(((x, y) for x, y in pairs if not same_text(x, y)), (a, b))
    return f'{x.strip()[:90]!r} saved, {y.strip()[:90]!r} now'


def stale(saved, now) -> str | None:
    "Why the outputs of a saved cell are not those of the cell just run; None if they are"
    import numpy as np
    old, new = list(shown(saved)), list(shown(now))
    if [k for k, _ in old] != [k for k, _ in new]:
        return f'outputs {[k for k, _ in old]} saved, {[k for k, _ in new]} now'
    if 'volatile' in directives(saved): return None
    for (kind, x), (_, y) in zip(old, new):
        if kind != 'picture':
            if not same_text(x, y): return first_change(x, y)
        elif x.shape != y.shape: return f'picture of {x.shape[:2]} saved, {y.shape[:2]} now'
        elif np.abs(x-y).mean() > PIXELS: return f'the picture changed by {np.abs(x-y).mean():.1f} grey levels'
    return None


# ---------------------------------------------------------------- the three commands

def process(path: Path, check: bool) -> bool:
    "Run one notebook and report in one line; True if all is well"
    import nbformat
    start = time.time()
    old = nbformat.read(path, as_version=4)
    try: new = execute(path)
    except Exception as e:
        print(f'{path.relative_to(ROOT)}: FAILED\n' + re.sub(r'\x1b\[[0-9;]*m', '', str(e)), flush=True)
        return False
    problems = []
    if check:
        cells = ((i, a, b) for i, (a, b) in enumerate(zip(old.cells, new.cells)) if a.cell_type == 'code')
        problems = [f'  cell {i}: {why}' for i, a, b in cells if (why := stale(a, b))]
    else: write(new, path)
    verdict = 'STALE' if problems else 'ok'
    print('\n'.join([f'{path.relative_to(ROOT)} {time.time()-start:.1f}s {verdict}', *problems]), flush=True)
    return not problems


def run_all(paths, check: bool, workers: int = 2) -> int:
    "Exit status after running `paths`, or every notebook that is meant to run"
    import nbformat
    os.environ.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONHASHSEED='0')
    os.environ.pop('MPLBACKEND', None)   # `agg` would take every figure out of the outputs
    paths = [Path(p).resolve() for p in paths] or \
            [p for p in notebooks() if not skips_execution(nbformat.read(p, as_version=4))]
    late = [p for p in paths if reads_others(nbformat.read(p, as_version=4))]
    good = []
    for part in ([p for p in paths if p not in late], late):
        with ThreadPoolExecutor(workers) as pool: good += pool.map(lambda p: process(p, check), part)
    if not all(good) and check: print('After a change: `make notebooks`, look at the difference, commit it.')
    return 0 if all(good) else 1


def stale_exports() -> list[str]:
    "Export into a copy of the repository; the names of the modules that come out differently, with the difference"
    ours = ROOT/settings()['lib_path']
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        shutil.copytree(NBS, tmp/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
        shutil.copytree(ours, tmp/ours.name, ignore=shutil.ignore_patterns('__pycache__', 'weights'))
        for name in ('settings.ini', 'setup.py'): shutil.copy(ROOT/name, tmp)
        subprocess.run([Path(sys.executable).with_name('nbdev_export')], cwd=tmp, check=True)
        before, after = ({p.relative_to(d): p.read_text(encoding='utf-8') for p in d.rglob('*.py')} for d in (ours, tmp/ours.name))
    names = sorted(before.keys() | after.keys())
    return [f'{n}\n' + '\n'.join(list(difflib.unified_diff(before.get(n, '').splitlines(), after.get(n, '').splitlines(),
                                                           'committed', 'exported', lineterm='', n=0))[:8])
            for n in names if before.get(n) != after.get(n)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=['run', 'check', 'exports'])
    parser.add_argument('notebooks', nargs='*')
    args = parser.parse_args()
    if args.command != 'exports': return run_all(args.notebooks, check=args.command == 'check')
    bad = stale_exports()
    print('\n'.join(bad + ['Run `make export`.']) if bad else 'the package is what the notebooks export')
    return 1 if bad else 0


if __name__ == '__main__': sys.exit(main())
