"""Notebooks as Colab sees them: one file opened by itself, in an empty folder, where only the wheel is installed.

    python tools/colab.py [NOTEBOOK…]       run these; without names, the two that `make test` tries
    python tools/colab.py --all             run every notebook that carries the install cell
    python tools/colab.py --fetch …         let pip fetch what the wheel requires, instead of lending it (see tools/fresh.py)
    python tools/colab.py --add NOTEBOOK…   write the install cell into notebooks that lack it, or, with --options or --files, anew

The environment has pip, the packages that the wheel requires, those of Colab's own that a page uses (`COLAB`), and a stand-in
for `google.colab`, so that the install cell really runs; in the executed copy it finds the wheel just built, and a clone of this
repository, in place of those on GitHub. The rule of the badge is: a page carries it if it has the install cell (`installs`), and this file runs them all.
Cells that `tools/nbs.py run` leaves out are left out here too.
"""
import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from shlex import split

from fresh import ALONE, clean, environment, lend
from nbs import NBS, ROOT, left_out, notebooks, write
from wheel import copied, settings, wheel_of

QUICK = ['walkthroughs/1_residual_inversion.ipynb', 'analysis/film_strips.ipynb']   # what `make test` has time for
COLAB = ['ipykernel', 'nbformat', 'scikit-image']   # what pages use and Colab has, whatever the wheel asks for
MARK = "if 'google.colab' in sys.modules:\n    %pip install"
INSTALL = '''#| hide_output
#| hide
import sys
if 'google.colab' in sys.modules:
    %pip install -qq {what}'''
BESIDE = '''
    !git clone -q --depth 1 {url} repository && ln -s repository/{files} .'''   # for pages that read files of the repository


def installs(nb) -> bool:
    "Does this notebook bring what it needs when it is opened in Colab?"
    return any(c.cell_type == 'code' and MARK in c.source for c in nb.cells)


def read(path):
    import nbformat
    return nbformat.read(path, as_version=4)


def extras(nb) -> tuple:
    "The options of the package that the install cell asks for"
    found = re.search(r'restyle_nb\[([\w,]+)\] @', '\n'.join(c.source for c in nb.cells if c.cell_type == 'code' and MARK in c.source))
    return tuple(found[1].split(',')) if found else ()


def with_install(nb, options='', files=''):
    "The notebook with its install cell, below the title if there was none; `files` of the repository are linked into the folder"
    import nbformat
    url = settings()['git_url']
    source = (INSTALL + (BESIDE if files else '')).format(url=url, files=files, what=f"'restyle_nb[{options}] @ git+{url}'" if options else f'git+{url}')
    cell = nbformat.v4.new_code_cell(source, id=hashlib.sha1(source.encode()).hexdigest()[:8])
    old = next((i for i, c in enumerate(nb.cells) if c.cell_type == 'code' and MARK in c.source), None)
    if old is None: nb.cells.insert(next(i for i, c in enumerate(nb.cells) if c.cell_type == 'markdown') + 1, cell)
    else: nb.cells[old] = cell
    return nb


def kernel(python, where: Path) -> Path:
    "Note in `where` a kernel by the name of `colab`, which starts as Colab's do: `google.colab` is imported"
    stub, spec = where/'stub'/'google'/'colab', where/'kernels'/'colab'
    for o in (stub, spec): o.mkdir(parents=True)
    (stub/'__init__.py').touch()
    argv = [str(python), '-m', 'ipykernel_launcher', '-f', '{connection_file}', '--log-level=ERROR',
            f'--IPKernelApp.exec_lines=import sys; sys.path.append({str(where/"stub")!r}); import google.colab']
    (spec/'kernel.json').write_text(json.dumps(dict(argv=argv, display_name='colab', language='python')))
    return where


def prepared(nb, wheel):
    "A copy whose install cell finds the wheel and the repository of this machine"
    url = settings()['git_url']
    for c in nb.cells:
        if c.cell_type == 'code' and MARK in c.source:
            c.source = c.source.replace(f'@ git+{url}', f'@ file://{wheel}').replace(f'git+{url}', str(wheel)).replace(url, f'file://{ROOT}')
    nb.cells = [c for c in nb.cells if not (c.cell_type == 'code' and left_out(c))]
    return nb


def execute(path: Path, wheel: Path, python: Path, kernels: Path, here: Path, fetch=False):
    "Run one notebook in the empty folder `here`; raises where a cell fails, or where pip complains"
    from nbclient import NotebookClient
    nb = prepared(read(path), wheel)
    os.environ['JUPYTER_PATH'] = str(kernels)          # where the client looks for a kernel by this name; it ends it, too
    client = NotebookClient(nb, kernel_name='colab', timeout=900, resources=dict(metadata=dict(path=str(here))))
    client.execute(env=clean(HOME=here.parent, OMP_NUM_THREADS=1, CUDA_VISIBLE_DEVICES='', PATH=f"{python.parent}:{clean()['PATH']}", **({} if fetch else ALONE)))
    first = next(c for c in nb.cells if c.cell_type == 'code' and MARK in c.source)
    printed = ''.join(o.get('text', '') for o in first.outputs)
    if 'ERROR' in printed: raise RuntimeError(f'the install cell says {printed.strip()}')


def run_all(paths, fetch: bool) -> int:
    "Exit status after running the notebooks, one line each"
    bad, start = [], time.time()
    if lacking := [p.name for p in paths if not installs(read(p))]:
        print(f'no install cell in {", ".join(lacking)}: python tools/colab.py --add NOTEBOOK…')
        return 1
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        wheel = wheel_of(copied(tmp/'source'), tmp)

        @cache
        def machine(*options):
            "An environment with what Colab and the wheel, with these options, bring; its interpreter and where its kernel is noted"
            here = tmp/'-'.join(['machine', *options])
            python, ini = environment(here/'env', pip=True), settings()
            wanted = [] if fetch else [ini['requirements'], *(ini[f'{o}_requirements'] for o in options)]
            lend(python, [*COLAB, *split(' '.join(wanted))])
            return python, kernel(python, here)

        for path in paths:
            at, here = time.time(), tmp/'home'/f'{path.parent.name}_{path.stem}'
            here.mkdir(parents=True)
            try: execute(path, wheel, *machine(*extras(read(path))), here, fetch)
            except Exception as e:
                bad.append(path)
                print(f'{path.parent.name}/{path.name}: FAILED\n' + re.sub(r'\x1b\[[0-9;]*m', '', str(e)), flush=True)
            else: print(f'{path.parent.name}/{path.name} {time.time()-at:.0f}s ok', flush=True)
    print(f'{len(paths)-len(bad)} of {len(paths)} notebooks run where only the wheel is installed; {time.time()-start:.0f} s')
    return 1 if bad else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebooks', nargs='*', type=Path)
    parser.add_argument('--all', action='store_true')
    parser.add_argument('--fetch', action='store_true')
    parser.add_argument('--add', action='store_true')
    parser.add_argument('--options', default='', help='with --add: options of the package that the page needs, such as train,export')
    parser.add_argument('--files', default='', help='with --add: files or folders of the repository, to be linked beside the notebook')
    args = parser.parse_args()
    paths = [p.resolve() for p in args.notebooks] or [NBS/p for p in QUICK]
    if args.add:
        for p in paths:
            if args.options or args.files or not installs(read(p)): write(with_install(read(p), args.options, args.files), p)
        return 0
    return run_all([p for p in notebooks() if installs(read(p))] if args.all else paths, args.fetch)


if __name__ == '__main__': sys.exit(main())
