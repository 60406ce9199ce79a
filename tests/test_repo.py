"What the notebooks cannot say about themselves: clean, fresh, readable, and nothing of one machine in them."
import ast
import importlib.util
import json
import re
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tool(name):
    "The script tools/NAME.py as a module"
    spec = importlib.util.spec_from_file_location(f'tools_{name}', ROOT/'tools'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nbs = tool('nbs')
each_notebook = pytest.mark.parametrize('path', nbs.notebooks(), ids=lambda p: p.relative_to(nbs.NBS).as_posix())


@cache
def read(path): return json.loads(path.read_text(encoding='utf-8'))
def source(cell): return ''.join(cell['source'])
def code_cells(path): return [c for c in read(path)['cells'] if c['cell_type'] == 'code']
def outputs(path): return [o for c in code_cells(path) for o in c['outputs']]


def has(cell, *names):
    "Does the cell carry one of these `#|` directives?"
    return any(re.search(rf'^#\|\s*{n}\s*$', source(cell), re.M) for n in names)


def printed(output):
    "The text of an output, pictures left out"
    texts = [output.get('text', '')] + [v for k, v in output.get('data', {}).items() if k.startswith('text/')]
    return re.sub(r'base64,[A-Za-z0-9+/=]+', '', '\n'.join(''.join(t) for t in texts))


def test_exports_are_fresh():
    assert not (bad := nbs.stale_exports()), '\n'.join(['run `make export`', *bad])


@pytest.mark.parametrize('saved, now, same', [
    ('lpips 0.1234', 'lpips 0.1236', True),           # another processor
    ('lpips 0.1234', 'lpips 0.1334', False),
    ('error 3.1e-08', 'error 8.9e-08', True),         # both are zero
    ('step  5 of 5', 'step 5 of 5', True),            # columns moved
    ('step 4 of 5', 'step 5 of 5', False),
    ('0.01 s', '0.02 s', True),                       # one unit of the last decimal printed
    ('True', 'False', False),
    ('(4, 18, 512)', '(4, 18, 256)', False),
    ('sha256 59e7812345', 'sha256 59e7812345', True), # part of a hash reads as infinity
])
def test_what_counts_as_stale(saved, now, same): assert nbs.same_text(saved, now) == same


def test_readme_is_fresh():
    text, figures = tool('docs').readme()
    saved = [p.read_bytes() for p in sorted((ROOT/'nbs'/'images').glob('index-*.png'), key=lambda p: int(p.stem[6:]))]
    assert (ROOT/'README.md').read_text(encoding='utf-8') == text and saved == figures, \
        'README.md is not what nbs/index.ipynb makes: run `python tools/docs.py --readme`'


@each_notebook
def test_notebook_is_clean(path):
    "As nbdev_clean leaves it: no execution counts, no cell metadata, unique ids, a kernel name for Lab"
    nb = read(path)
    assert 'kernelspec' in nb['metadata'] and set(nb['metadata']) <= {'kernelspec', 'widgets'}
    ids = [c['id'] for c in nb['cells']]
    assert len(set(ids)) == len(ids)
    assert not [c['id'] for c in nb['cells'] if c['metadata'] or c.get('execution_count')]
    assert not [o for o in outputs(path) if o.get('execution_count')]


@each_notebook
def test_outputs_are_fit_to_show(path):
    "No error, no stderr, no path of the machine they were made on"
    assert not [o for o in outputs(path) if o['output_type'] == 'error' or o.get('name') == 'stderr']
    paths = re.compile(r'(?<![\w./])/(?:work|tmp|root|home|Users)/\S*')
    assert not [m[0] for o in outputs(path) for m in paths.finditer(printed(o))]


@each_notebook
def test_notebook_is_small(path):
    assert path.stat().st_size < 1.5e6
    long = {c['id']: n for c in code_cells(path) if (n := len(source(c).splitlines())) > 40}
    assert not long, f'cells of more than 40 lines: {long}'


@each_notebook
def test_first_words(path):
    "A title and a summary in a cell of their own: nbdev makes front matter of it and drops everything else"
    first = next(c for c in read(path)['cells'] if c['cell_type'] == 'markdown')
    lines = [l for l in source(first).splitlines() if l.strip()]
    assert lines[0].startswith('# ') and len(lines) > 1 and lines[1].startswith('> ')
    assert not [l for l in lines[1:] if not re.match(r'> |- [\w-]+: ', l)]


@each_notebook
def test_prose_between_code(path):
    "At most eight code cells in a row; cells hidden from the docs do not count"
    kinds = [c['cell_type'] for c in read(path)['cells'] if not (c['cell_type'] == 'code' and has(c, 'hide', r'default_exp.*'))]
    runs = [len(list(g)) for kind, g in groupby(kinds) if kind == 'code']
    assert max(runs, default=0) <= 8


@each_notebook
def test_imports_stand_alone(path):
    "Building the docs runs every cell with an import, without the cells above it: such a cell may do nothing else"
    for cell in code_cells(path):
        if has(cell, 'export', 'exports', 'exporti', r'eval:\s*false'): continue
        try: tree = ast.parse(source(cell))
        except SyntaxError: continue   # magics
        kinds = {type(n) for n in ast.walk(tree)}
        assert not (kinds & {ast.Import, ast.ImportFrom} and kinds & {ast.Expr, ast.Assign}), source(cell)


def test_every_page_is_in_the_sidebar():
    "Once each: the sidebar is written by hand, so that it can be read"
    listed = re.findall(r'^\s*- (\S+\.ipynb)$', (nbs.NBS/'sidebar.yml').read_text(encoding='utf-8'), re.M)
    assert sorted(listed) == sorted(p.relative_to(nbs.NBS).as_posix() for p in nbs.notebooks())


@each_notebook
def test_recipes_are_not_run(path):
    "Recipes take hours: nbdev_test and `tools/nbs.py` pass them by"
    import nbformat
    in_recipes = 'recipes' in path.relative_to(nbs.NBS).parts
    assert nbs.skips_execution(nbformat.read(path, as_version=4)) == in_recipes


def test_nothing_left_undone():
    words = re.compile('|'.join(['TO' + 'DO', 'FIX' + 'ME', 'XX' + 'X']))
    files = [p for folder in ('restyle_nb', 'tools', 'tests', 'nbs') for p in (ROOT/folder).rglob('*')
             if p.suffix in ('.py', '.md', '.yml') and '_proc' not in p.parts]
    found = [p.relative_to(ROOT) for p in files if words.search(p.read_text(encoding='utf-8'))]
    found += [p.relative_to(ROOT) for p in nbs.notebooks() if any(words.search(source(c)) for c in read(p)['cells'])]
    assert not found


@each_notebook
def test_notebook_leaves_gradients_on(path):
    "Several notebooks share a process: what one switches off it switches on again"
    text = '\n'.join(source(c) for c in code_cells(path))
    assert text.rfind('set_grad_enabled(False)') <= text.rfind('set_grad_enabled(True)')
