"""A virtual environment that holds what the wheel asks for and nothing else: no editable install, no repository.

`borrowed` links the packages that the wheel names, and those that these name, from the environment of this interpreter:
nothing is fetched, it takes a second, and what the wheel forgot to name is not there. `fetched` lets pip do it: gigabytes.
"""
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


ALONE = dict(PIP_NO_DEPS='1', PIP_NO_INDEX='1')   # pip installs what it is given and nothing else


def run(*args, **kw): return subprocess.run([str(a) for a in args], check=True, **kw)


def clean(**more) -> dict:
    "The variables of this process without those that would lead Python, or the figures of a notebook, elsewhere"
    return {k: v for k, v in os.environ.items() if not k.startswith('PYTHON') and k != 'MPLBACKEND'} | {k: str(v) for k, v in more.items()}


def closure(wanted) -> dict:
    "Name -> installed distribution, for every requirement in `wanted` and all that they require"
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    def applies(r, extras): return r.marker is None or any(r.marker.evaluate(dict(extra=e)) for e in extras)
    found, asked, todo = {}, set(), [r for o in wanted if applies(r := Requirement(o), {''})]
    while todo:
        r = todo.pop()
        name, extras = canonicalize_name(r.name), {'', *r.extras}
        if (name, *sorted(extras)) in asked: continue
        asked.add((name, *sorted(extras)))
        try: found[name] = distribution(r.name)
        except PackageNotFoundError: raise SystemExit(f'{r}: is not installed here, so it cannot be lent; run `make venv`') from None
        todo += [q for o in found[name].requires or [] if applies(q := Requirement(o), extras)]
    return found


def environment(folder, pip=False) -> Path:
    "An empty virtual environment in `folder`; its interpreter"
    run(sys.executable, '-m', 'venv', *([] if pip else ['--without-pip']), folder)
    return Path(folder)/'bin'/'python'


def lend(python, wanted):
    "Link what `wanted` requires into the environment of `python`; run its pip with `ALONE`, or it would write through the links"
    to = Path(run(python, '-c', 'import site; print(site.getsitepackages()[0])', capture_output=True, text=True, env=clean()).stdout.strip())
    for d in closure(wanted).values():
        for top in {f.parts[0] for f in d.files} - {'..', '__pycache__'}:
            if not (to/top).exists(): (to/top).symlink_to(d.locate_file(top))


def install(python, wheel, *, fetch=False):
    "The wheel, with or without what it requires, by the pip of this interpreter"
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '-q', wheel, env=clean(**({} if fetch else ALONE)))
