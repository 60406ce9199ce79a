"""Build the wheel and the source archive, look into both, and try the wheel away from the repository.

    python tools/wheel.py           build in a temporary folder and try the wheel in a borrowed environment (see tools/fresh.py)
    python tools/wheel.py --fetch   let pip fetch what the wheel requires (several GB), as on a machine that has nothing
    python tools/wheel.py --out DIR build only, and leave wheel and source archive in DIR
"""
import argparse
import json
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from configparser import ConfigParser
from pathlib import Path
from shlex import split

from fresh import clean, environment, install, lend, run

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = 'restyle_nb'
MAX_MB = 60
SOURCES = ['setup.py', 'settings.ini', 'MANIFEST.in', 'README.md', 'LICENSE', 'THIRD_PARTY.md', 'CHANGELOG.md', 'CITATION.cff']
SKIP_MODULES = {'_modidx', '_docs'}   # for nbdev, which builds the site


def settings() -> dict:
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return dict(ini['DEFAULT'])


def copied(to: Path) -> Path:
    "The files that make the package, apart from what lies around in the working tree"
    shutil.copytree(ROOT/PACKAGE, to/PACKAGE, ignore=shutil.ignore_patterns('__pycache__'))
    for name in SOURCES: shutil.copy(ROOT/name, to)
    return to


def wheel_of(source: Path, into: Path) -> Path:
    "The wheel of a source folder or archive"
    into.mkdir(exist_ok=True)
    run(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', into, source, env=clean())
    return next(into.glob('*.whl'))


def build(into: Path) -> tuple[Path, Path]:
    "The wheel, and the source archive that makes the same wheel"
    source, again = copied(into/'source'), into/'again'
    run(sys.executable, 'setup.py', '-q', 'sdist', '-d', into, cwd=source, env=clean())
    wheel, archive = wheel_of(source, into), next(into.glob('*.tar.gz'))
    with zipfile.ZipFile(wheel) as a, zipfile.ZipFile(wheel_of(archive, again)) as b:
        one, two = ({i.filename: i.CRC for i in z.infolist() if not i.filename.endswith('RECORD')} for z in (a, b))
    differ = sorted(k for k in one.keys() | two.keys() if one.get(k) != two.get(k))
    assert not differ, f'the source archive makes another wheel: {differ[:5]}; see MANIFEST.in'
    shutil.rmtree(source)
    shutil.rmtree(again)
    return wheel, archive


def check_contents(wheel: Path, archive: Path):
    "Every file of the package is in the wheel, byte for byte, with licence, extras and commands, and the wheel is small"
    ini, files = settings(), [p for p in (ROOT/PACKAGE).rglob('*') if p.is_file() and '__pycache__' not in p.parts]
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        missing = [p.name for p in files if (n := p.relative_to(ROOT).as_posix()) not in names or z.read(n) != p.read_bytes()]
        info = next(n for n in names if n.endswith('.dist-info/METADATA')).rpartition('/')[0]
        about, entries = (z.read(f'{info}/{n}').decode() for n in ('METADATA', 'entry_points.txt'))
    assert not missing, f'missing from the wheel: {missing}; see MANIFEST.in'
    assert not (strange := {n.partition('/')[0] for n in names} - {PACKAGE, info}), f'{strange}: does not belong in the wheel'
    assert {f'{PACKAGE}/py.typed', *(f'{PACKAGE}/weights/{n}' for n in json.loads((ROOT/PACKAGE/'weights'/'weights.json').read_text())['files'])} <= names
    assert all(any(n.endswith(o) for n in names) for o in ('LICENSE', 'THIRD_PARTY.md')), 'the licences are not in the wheel'
    for extra in (k[:-13] for k in ini if k.endswith('_requirements')): assert f'Provides-Extra: {extra}\n' in about, f'no extra {extra!r}'
    for command in split(ini['console_scripts']): assert command.replace('=', ' = ') in entries, f'{command}: not in the wheel'
    assert f"Version: {ini['version']}\n" in about and f"Requires-Python: >={ini['min_python']}\n" in about
    mb, mb_source = (p.stat().st_size/1e6 for p in (wheel, archive))
    assert mb < MAX_MB, f'the wheel has {mb:.1f} MB, at most {MAX_MB} are allowed'
    weights = sum('weights' in p.parts for p in files)
    print(f'{wheel.name}: {mb:.1f} MB of at most {MAX_MB}, {len(files)} files, {weights} of them weights; {archive.name}: {mb_source:.1f} MB, makes the same wheel')


def try_it(wheel: Path, into: Path, fetch: bool):
    "Install, import every module, start every command, invert pictures: in an empty folder and with an empty home"
    ini, here, start = settings(), into/'empty', time.time()
    here.mkdir()
    python = environment(into/'env')
    if not fetch: lend(python, split(ini['requirements']))
    install(python, wheel, fetch=fetch)
    at = time.time()
    env = clean(HOME=here, OMP_NUM_THREADS=1)
    ask = lambda *o: run(*o, cwd=here, env=env, capture_output=True, text=True).stdout
    modules = sorted(p.stem for p in (ROOT/PACKAGE).glob('*.py') if p.stem not in SKIP_MODULES | {'__init__'})
    ask(python, '-c', f'import {", ".join(f"{PACKAGE}.{m}" for m in modules)}, sys; f={PACKAGE}.__file__; assert f.startswith(sys.prefix), f')
    commands = [c.partition('=')[0] for c in split(ini['console_scripts'])]
    for c in commands: assert f'usage: {c}' in (out := ask(python.with_name(c), '--help')), f'{c} --help says no usage:\n{out}'
    demo = time.time()
    ask(python.with_name('restyle_demo'), '--out', 'strips', *([] if fetch else ['--n', '64']))
    took = time.time() - demo
    strips = list((here/'strips').rglob('*strip*.png'))
    assert strips and (here/'strips'/'metrics.json').is_file(), 'restyle_demo wrote no film strips'
    if 'restyle_doctor' in commands: ask(python.with_name('restyle_doctor'))
    how = 'fetched' if fetch else 'lent'
    print(f'installed from the wheel ({at - start:.0f} s, what it requires was {how}): {len(modules)} modules import, {len(commands)} commands start; '
          f'restyle_demo drew {len(strips)} film strips in {took:.1f} s')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--fetch', action='store_true')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        files = build(tmp)
        check_contents(*files)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            for f in files: shutil.copy(f, args.out)
        else: try_it(files[0], tmp, args.fetch)


if __name__ == '__main__': main()
