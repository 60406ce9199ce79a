"""Build the wheel from the files MANIFEST.in names and try it away from the repository.

Its dependencies are several gigabytes, so the environment of this interpreter lends them; what is checked is that the
wheel itself is whole: the weights are inside, it is small enough, it imports, and its command starts.
"""
import os
import shutil
import site
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = 'restyle_nb'
MAX_MB = 60
SOURCES = ['setup.py', 'settings.ini', 'MANIFEST.in', 'README.md', 'LICENSE', 'THIRD_PARTY.md']


def run(*args, **kw): return subprocess.run([str(a) for a in args], check=True, **kw)


def build(into: Path) -> Path:
    "The wheel, built from a copy so that no leftover `build/` gets into it"
    source = into/'source'
    shutil.copytree(ROOT/PACKAGE, source/PACKAGE, ignore=shutil.ignore_patterns('__pycache__'))
    for name in SOURCES: shutil.copy(ROOT/name, source)
    run(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', into, source)
    return next(into.glob('*.whl'))


def check_contents(wheel: Path):
    "Every weight file of the repository is in the wheel, byte for byte, and the wheel is small"
    with zipfile.ZipFile(wheel) as z:
        weights = [p for p in (ROOT/PACKAGE/'weights').rglob('*') if p.is_file() and '__pycache__' not in p.parts]
        assert weights, f'no files in {PACKAGE}/weights'
        missing = [p.name for p in weights if (n := p.relative_to(ROOT).as_posix()) not in z.namelist() or z.read(n) != p.read_bytes()]
    assert not missing, f'weights missing from the wheel: {missing}; see MANIFEST.in'
    mb = wheel.stat().st_size/1e6
    assert mb < MAX_MB, f'the wheel has {mb:.1f} MB, at most {MAX_MB} are allowed'
    print(f'{wheel.name}: {mb:.1f} MB, {len(weights)} weight files')


def try_it(wheel: Path, into: Path):
    "Install without dependencies, import and start the command, all from the root directory"
    env = into/'env'
    run(sys.executable, '-m', 'venv', '--without-pip', env)
    python = env/'bin'/'python'
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '-q', '--no-deps', '--no-index', wheel)
    target = run(python, '-c', 'import site; print(site.getsitepackages()[0])', capture_output=True, text=True).stdout.strip()
    Path(target, 'borrowed.pth').write_text('\n'.join(site.getsitepackages()) + '\n')
    clean = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}
    run(python, '-c', f'import {PACKAGE}, sys; f={PACKAGE}.__file__; assert f.startswith(sys.prefix), f', cwd='/', env=clean)
    for command, word in dict(restyle_demo='--out', restyle_invert='--out', restyle_edit='--edit', restyle_models='usage').items():
        out = run(env/'bin'/command, '--help', cwd='/', env=clean, capture_output=True, text=True).stdout
        assert word in out, f'{command} --help says nothing of {word}:\n{out}'
    print('installed from the wheel: imports, and its commands start')


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        wheel = build(tmp)
        check_contents(wheel)
        try_it(wheel, tmp)
