"Importing is quick, silent and offline."
import json
import os
import subprocess
import sys
from functools import cache

OFFLINE = '''
import socket
def refuse(*args, **kw): raise OSError(f'an import asked for the network: {args}')
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
'''

EVERY_MODULE = '''
import importlib, json, pkgutil, sys, time
import torch
start = time.perf_counter()
import restyle_nb
for m in pkgutil.iter_modules(restyle_nb.__path__):
    if not m.name.startswith('_'): importlib.import_module(f'restyle_nb.{m.name}')
seconds = time.perf_counter() - start
print(json.dumps(dict(seconds=seconds, modules=sorted(sys.modules))))
'''

LOOP_AND_ZOO = '''
import json, sys
import restyle_nb.restyle, restyle_nb.zoo
print(json.dumps(dict(modules=sorted(sys.modules))))
'''


def fresh(code: str) -> dict:
    "What the last line of `code` prints, in a new interpreter without network"
    env = {**os.environ, 'PYTHONWARNINGS': 'error::DeprecationWarning:restyle_nb', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', OFFLINE + code], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and not done.stderr.strip(), f'an import printed: {done.stdout}{done.stderr}'
    return json.loads(done.stdout)


@cache
def all_modules(n: int = 3) -> list[dict]: return [fresh(EVERY_MODULE) for _ in range(n)]


def test_every_module_imports_offline():
    loaded = {m for m in all_modules()[0]['modules'] if m.startswith('restyle_nb.')}
    assert {'restyle_nb.images', 'restyle_nb.generator', 'restyle_nb.encoders', 'restyle_nb.restyle'} <= loaded


def test_imports_are_quick():
    "The whole package costs less than half a second beyond torch (best of three)"
    best = min(all_modules(), key=lambda r: r['seconds'])
    assert best['seconds'] < .5, f"{best['seconds']:.2f} s; loaded: " + ' '.join(sorted({m.split('.')[0] for m in best['modules']}))


def test_heavy_packages_wait_until_used():
    "The loop and the embedded models load neither plotting, nor learning, nor perceptual-metric packages"
    loaded = {m.split('.')[0] for m in fresh(LOOP_AND_ZOO)['modules']}
    assert not loaded & {'lpips', 'matplotlib', 'sklearn', 'torchvision', 'scipy', 'IPython', 'nbdev'}


def test_nothing_is_compiled():
    "No extension is built at import"
    assert 'torch.utils.cpp_extension' not in all_modules()[0]['modules']
