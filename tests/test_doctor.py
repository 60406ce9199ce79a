"A doctor who never raises: every kind of breakage is a finding with a remedy, and the rest is still looked at."
import json, os, subprocess, sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
import pytest
from restyle_nb import cli, doctor as room
from restyle_nb.doctor import Check, Report, doctor

HERE = Path(room.__file__).parent


def named(checks): return {c.name: c for c in checks}


def only(checks):
    "The one finding of a question"
    (c,) = checks
    return c


def bad(checks): return {c.name: c for c in checks if c.status == 'problem'}


@pytest.fixture(scope='module')
def well(): return doctor('cpu', limit=600)


@pytest.fixture
def broken(tmp_path, monkeypatch):
    "Packages that shadow those installed, for the process that asks"
    def make(**sources):
        for name, text in sources.items(): (tmp_path/f'{name}.py').write_text(text)
        return list(room._inside('cpu', 600))
    monkeypatch.syspath_prepend(tmp_path)
    return make


# --- a machine that is well

def test_all_is_well(well):
    assert well.ok and not well.problems, str(well)
    assert {'python', 'processor', 'memory', 'packages', 'extras', 'weights', 'folder', 'imports', 'threads', 'device', 'precision', 'cache', 'picture'} <= set(named(well))
    assert f'{(n := len(json.loads((HERE/"weights"/"weights.json").read_text())["files"]))} of {n} files' in named(well)['weights'].found


def test_three_readers(well):
    data = json.loads(well.json())
    assert data['ok'] and [Check(**c) for c in data['checks']] == well and data['seconds'] > 0
    assert str(well).splitlines()[0] == well._repr_markdown_().splitlines()[0] and all(len(l) <= 110 for l in str(well).splitlines())
    rows = well._repr_markdown_().splitlines()[2:]
    assert len(rows) == len(well) + 2 and {r.replace('\\|', '').count('|') for r in rows} == {5}


def test_needs_nothing_but_python():
    "A torch that cannot be imported must not keep the doctor from saying so"
    code = 'import sys, restyle_nb.doctor; print(*sorted({m.split(".")[0] for m in sys.modules} - set(sys.stdlib_module_names)))'
    p = subprocess.run([sys.executable, '-S', '-c', code], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(HERE.parent)))
    assert p.returncode == 0 and set(p.stdout.split()) <= {'__main__', 'restyle_nb'}, p.stdout + p.stderr


# --- packages

def test_packages_that_cannot_be_imported(broken):
    "An error, a missing library, an exit: three findings, and a face is inverted all the same"
    checks = broken(torchvision='raise RuntimeError("operator torchvision::nms does not exist")', ipywidgets='raise OSError("libcudart.so.12: cannot open shared object file")',
                    matplotlib='import sys; sys.exit("no display")')
    assert set(bad(checks)) == {'torchvision', 'ipywidgets', 'matplotlib'}     # lpips needs torchvision: said once
    c = named(checks)['torchvision']
    assert 'RuntimeError: operator torchvision::nms does not exist' in c.found and c.remedy == 'pip install --upgrade "torch" "torchvision"'
    assert 'libcudart' in named(checks)['ipywidgets'].found and 'no display' in named(checks)['matplotlib'].found
    assert named(checks)['picture'].status == 'ok'


def test_torch_that_cannot_be_imported(broken):
    checks = named(broken(torch='raise ImportError("libcublas.so.12: undefined symbol")'))
    assert checks['torch'].status == 'problem' and 'undefined symbol' in checks['torch'].found and '(' in checks['torch'].found
    assert 'torchvision' not in checks and checks['device'].status == 'note' and 'not looked at' in checks['device'].found and 'picture' not in checks


def test_numpy_of_the_wrong_age(broken):
    "As with a numpy whose major version torch was not built for"
    checks = broken(numpy='raise ImportError("""\nA module that was compiled using NumPy 1.x cannot be run in\nNumPy 3.0.0""")')
    c = bad(checks)['numpy']
    assert set(bad(checks)) == {'numpy'} and 'NumPy 3.0.0' in c.found, checks and c.remedy.startswith('pip install --upgrade "numpy"')


def test_numpy_and_torch_that_do_not_fit(monkeypatch):
    import torch
    def refuse(a): raise RuntimeError('Numpy is not available')
    monkeypatch.setattr(torch, 'from_numpy', refuse)
    c = only(room._bridge())
    assert (c.name, c.status) == ('numpy', 'problem') and 'do not fit: RuntimeError: Numpy is not available' in c.found and 'pip install' in c.remedy


@pytest.mark.skipif(os.name == 'nt', reason='no signals there')
def test_torch_that_takes_python_down(broken):
    c = only(broken(torch='import os, signal; os.kill(os.getpid(), signal.SIGSEGV)'))
    assert (c.name, c.status) == ('imports', 'problem') and 'SIGSEGV' in c.found and 'torch.py:1' in c.found


@pytest.mark.skipif(os.name == 'nt', reason='no signals there')
def test_out_of_memory(broken):
    c = only(broken(torch='import os; os.kill(os.getpid(), 9)'))
    assert 'want of memory' in c.found and 'memory' in c.remedy


def test_torch_that_hangs(tmp_path, monkeypatch):
    (tmp_path/'torch.py').write_text('import time\ntime.sleep(60)')
    monkeypatch.syspath_prepend(tmp_path)
    for limit in (3, 12, 48):                       # on a busy machine Python itself may not have begun in time
        c = only(room._inside('cpu', limit))
        assert c.status == 'problem' and f'had not ended after {limit} s' in c.found
        if 'torch.py:2' in c.found: return
    raise AssertionError(c.found)


def test_what_packages_say_is_no_finding_lost(broken):
    checks = broken(tqdm='import sys, os; print("hello"); os.write(1, b"from below"); print("[1, 2]", file=sys.stderr)', torch='raise ImportError("gone")')
    assert 'hello' in named(checks)['warnings'].found and 'from below' in named(checks)['warnings'].found
    assert set(bad(checks)) == {'torch'} and checks[-1].name == 'warnings'


def versions(monkeypatch, **found):
    "Say of these packages that they have these versions"
    real = room._version
    monkeypatch.setattr(room, '_version', lambda name: found.get(name.replace('-', '_'), real(name)))


@pytest.mark.parametrize('name, version, said, remedy', [
    ('lpips', None, 'missing', 'pip install "lpips"'),
    ('torch', '2.5.1', '2.5.1, expected >=2.6', 'pip install "torch>=2.6"'),
    ('fastcore', '2.0', '2.0, expected <2,>=1.12.3', 'pip install "fastcore<2,>=1.12.3"'),
])
def test_versions(monkeypatch, name, version, said, remedy):
    versions(monkeypatch, **{name: version})
    c = bad(room._packages())[name]
    assert (c.found, c.remedy) == (said, remedy)
    assert name not in named(room._packages())['packages'].found.split()


def test_torch_and_torchvision_of_two_releases(monkeypatch):
    versions(monkeypatch, torch='2.6.0')
    c = bad(room._packages())['torchvision']
    assert 'is made for torch' in c.found and 'here is 2.6.0' in c.found and 'torchvision' in c.remedy


def test_a_build_for_a_device_is_the_same_version(monkeypatch):
    from importlib import metadata
    versions(monkeypatch, torch=metadata.version('torch').split('+')[0] + '+cu130')
    assert not bad(room._packages())


def test_extras(monkeypatch):
    versions(monkeypatch, huggingface_hub=None)
    c = named(room._packages())['extras']
    assert c.status == 'ok' and 'hub: huggingface_hub missing' in c.found and 'restyle_nb[' in c.remedy and 'hub' in c.remedy


def test_two_copies_and_none_installed(monkeypatch):
    monkeypatch.setattr(room, '__version__', '9.9')
    assert named(room._packages())['restyle_nb'].status == 'note'
    def gone(name): raise room.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(room.metadata, 'version', gone)
    c = only(room._packages())
    assert c.status == 'note' and 'not installed' in c.found and 'pip install -e .' in c.remedy


def test_a_question_that_fails_is_a_finding(monkeypatch):
    def lost(*a): raise ModuleNotFoundError("No module named 'packaging'", name='packaging')
    monkeypatch.setattr(room, '_wanted', lost)
    monkeypatch.setattr(room, '_inside', lambda *a: iter(()))
    monkeypatch.setattr(room, '_memory', lambda: 1/0)
    r = doctor('cpu')
    assert named(r)['packages'].remedy == 'pip install packaging' and 'ZeroDivisionError' in named(r)['machine'].found
    assert named(r)['weights'].status == 'ok' and not r.ok


# --- sliders

@pytest.mark.parametrize('name, version', [('jupyterlab_widgets', '1.1.0'), ('widgetsnbextension', None)])
def test_halves_of_a_slider(monkeypatch, name, version):
    monkeypatch.delenv('COLAB_RELEASE_TAG', raising=False)
    versions(monkeypatch, jupyterlab='4.0', **{name: version})
    c = only(room._jupyter())
    assert c.status == 'problem' and name in c.found.replace('-', '_') and 'jupyterlab_widgets' in c.remedy


def test_where_there_is_no_jupyter(monkeypatch):
    monkeypatch.delenv('COLAB_RELEASE_TAG', raising=False)
    versions(monkeypatch, jupyterlab=None, notebook=None, voila=None)
    assert only(room._jupyter()).status == 'note'
    monkeypatch.setenv('COLAB_RELEASE_TAG', 'release-colab')
    assert only(room._jupyter()).status == 'ok'


# --- machine

def test_container(monkeypatch):
    "Its share counts, not the machine's"
    files = {'/sys/fs/cgroup/cpu.max': '100000 100000\n', '/sys/fs/cgroup/memory.max': '2000000000\n', '/sys/fs/cgroup/memory.current': '1900000000\n',
             '/sys/fs/cgroup/memory.stat': 'anon 5\ninactive_file 300000000\n', '/proc/meminfo': 'MemTotal: 16000000 kB\nMemAvailable: 12000000 kB\n'}
    monkeypatch.setattr(room, '_read', lambda path: files.get(path, ''))
    monkeypatch.setattr(sys, 'platform', 'linux')
    assert room._cores() == 1 and room._memory() == (2*10**9, 4*10**8)
    checks = named(room._machine())
    assert checks['memory'].status == 'note' and checks['memory'].remedy
    files |= {'/sys/fs/cgroup/cpu.max': 'max 100000\n', '/sys/fs/cgroup/memory.max': 'max\n'}
    assert room._cores() >= 1 and room._memory() == (16000000*1024, 12000000*1024)


def test_more_threads_than_cores(monkeypatch):
    import torch
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 64)
    monkeypatch.setattr(room, '_cores', lambda: 2)
    c = named(room._devices('cpu'))['threads']
    assert c.status == 'note' and 'OMP_NUM_THREADS=2' in c.remedy


def test_device_that_is_not_there():
    checks = list(room._devices('cuda:7'))
    assert [c.name for c in bad(checks).values()] == ['device'] and checks[-1].found == 'cpu is used'


def test_cards(monkeypatch):
    "What is said of graphics cards, on a machine that need not have one"
    import torch
    card = SimpleNamespace(name='A card', major=8, minor=0)
    for name, f in dict(device_count=lambda: 1, is_available=lambda: True, get_device_properties=lambda i: card, mem_get_info=lambda i: (5*10**8, 8*10**9)).items():
        monkeypatch.setattr(torch.cuda, name, f)
    c = only(room._gpus())
    assert (c.name, c.status) == ('cuda:0', 'note') and 'A card, capability 8.0' in c.found and '8.0 GB, 500 MB free' in c.found


def test_driver_without_use(monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(room.shutil, 'which', lambda name: '/usr/bin/nvidia-smi')
    def old(): raise RuntimeError('The NVIDIA driver on your system is too old')
    monkeypatch.setattr(torch.cuda, 'init', old)
    c = only(room._gpus())
    assert c.status == 'note' and 'too old' in c.found and c.remedy


def test_products_that_are_wrong(monkeypatch):
    monkeypatch.setattr(room, '_product', lambda *a: (.02, 1.))
    assert only(room._precision('cpu')).status == 'problem'
    monkeypatch.setattr(room, '_product', lambda *a: (float('nan'), 1.))
    assert only(room._precision('cpu')).status == 'problem'


def test_formats_a_device_has_not(monkeypatch):
    import torch
    def product(a, b, device, kind):
        if kind == torch.bfloat16: raise RuntimeError('"addmm" not implemented for BFloat16')
        return 1e-7, 1.
    monkeypatch.setattr(room, '_product', product)
    c = only(room._precision('cpu'))
    assert c.status == 'ok' and 'bf16 not here ("addmm" not implemented' in c.found and 'fp16 off by' in c.found


def test_a_face_that_comes_out_wrong(monkeypatch):
    monkeypatch.setattr(room, 'EXPECTED', (.1322, .0165, .0133, .0151, .0160, .0266))
    c = only(room._smoke('cpu'))
    assert c.status == 'problem' and 'L2 of all steps 0.1322, 0.0165' in c.found and '--device cpu' in c.remedy


# --- files

@pytest.fixture
def weights(tmp_path):
    "A folder of weights like ours, of links"
    folder = tmp_path/'weights'
    folder.mkdir()
    for p in (HERE/'weights').iterdir(): (folder/p.name).symlink_to(p)
    return folder


def replace(path, data):
    path.unlink()
    path.write_bytes(data)


def test_damaged_weights(weights):
    name = 'faces64_heldout.json'
    whole = (weights/name).read_bytes()
    (weights/'earth64_train.png').unlink()
    replace(weights/name, whole[:-1])
    replace(weights/'toons64_heldout.json', b'[' + (weights/'toons64_heldout.json').read_bytes()[1:].replace(b'1', b'7', 1))
    checks = list(room._weights(weights))
    found = {k: c.found for k, c in bad(checks).items()}
    assert set(found) == {'earth64_train.png', name, 'toons64_heldout.json'}
    assert found['earth64_train.png'] == 'is missing' and found[name] == f'{len(whole) - 1} bytes, expected {len(whole)}'
    assert found['toons64_heldout.json'].startswith('was changed: sha256 ') and all('reinstall' in c.remedy for c in bad(checks).values())
    n = len(json.loads((weights/'weights.json').read_text())['files'])
    assert f'{n - 3} of {n} files' in checks[-1].found


@pytest.mark.parametrize('table', [b'', b'{"files": [1]}', b'[]', b'{"files": {"a.png": 3}}', b'\xff\xfe', None])
def test_damaged_table(weights, table):
    (weights/'weights.json').unlink()
    if table is not None: (weights/'weights.json').write_bytes(table)
    c = only(room._weights(weights))
    assert (c.name, c.status) == ('weights', 'problem') and 'cannot be read' in c.found and 'reinstall' in c.remedy


def test_a_card_that_says_too_little(weights):
    replace(weights/'weights.json', json.dumps(dict(files={'faces64_heldout.json': {}, 'weights.json': {}})).encode())
    checks = list(room._weights(weights))
    assert set(bad(checks)) == {'faces64_heldout.json', 'weights.json'} and '0 of 2 files' in checks[-1].found.replace('no of', '0 of')


def test_folder(tmp_path, monkeypatch):
    assert only(room._folder(tmp_path/'new'/'one')).status == 'ok' and not (tmp_path/'new').exists()
    (tmp_path/'file').write_text('')
    c = only(room._folder(tmp_path/'file'/'out'))
    assert c.status == 'problem' and 'cannot be written' in c.found and '--out' in c.remedy
    monkeypatch.setattr(room.shutil, 'disk_usage', lambda p: namedtuple('Usage', 'total used free')(10**9, 10**9, 5*10**6))
    c = only(room._folder(tmp_path))
    assert c.status == 'note' and '5 MB free' in c.found and 'make room' in c.remedy


@pytest.mark.skipif(os.name == 'nt', reason='no such limit there')
def test_no_space(tmp_path):
    "The system refuses to write; a limit on the size of files does as a full disk would"
    code = '''
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from restyle_nb.doctor import _folder
print(*next(_folder(sys.argv[1])), sep='|')'''
    out = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True).stdout.split('|')
    assert out[:2] == ['folder', 'problem'] and 'cannot be written' in out[2] and 'make room' in out[3]


def test_cache(tmp_path, monkeypatch):
    from restyle_nb.zoo import list_models
    monkeypatch.setenv('RESTYLE_NB_HOME', str(tmp_path/'cache'))
    assert 'not there' in only(room._cache('cpu')).found
    (tmp_path/'cache').mkdir()
    (tmp_path/'cache'/'model.pt.part').write_bytes(bytes(100))
    c = only(room._cache('cpu'))
    assert c.status == 'note' and 'model.pt.part' in c.found and 'goes on' in c.remedy
    card = list_models(released=True)[0]
    (tmp_path/'cache'/card.file).write_bytes(b'<html>quota</html>'.ljust(100))
    c = bad(room._cache('cpu'))[card.file]
    assert 'a web page, not weights' in c.found and 'remove it' in c.remedy
    (tmp_path/'cache'/card.file).write_bytes(b'PK\x03\x04'.ljust(100))
    assert not bad(room._cache('cpu'))
    monkeypatch.setattr(room.os, 'access', lambda *a: False)
    assert 'RESTYLE_NB_HOME' in list(room._cache('cpu'))[-1].remedy


# --- what strangers may read

def test_nobody_is_named(tmp_path, weights):
    "A copy of the package below a home, with a damaged model: the zoo's error and ours hold no name"
    home = tmp_path/'alice'
    package = home/'lib'/'restyle_nb'
    package.mkdir(parents=True)
    for p in HERE.glob('*.py'): (package/p.name).symlink_to(p)
    weights.rename(package/'weights')
    model = package/'weights'/'faces64_restyle.safetensors'
    replace(model, model.read_bytes()[:-1] + b'x')
    code = "from restyle_nb.doctor import doctor; r = doctor('cpu', '~/out', 600); print(r); print(r.json())"
    env = os.environ | dict(HOME=str(home), USERPROFILE=str(home), USER='alice', LOGNAME='alice', PYTHONPATH=str(home/'lib'))
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    text, _, data = p.stdout.partition('\n{\n')
    assert 'alice' not in p.stdout and str(tmp_path) not in p.stdout and '~/out' in text
    checks = {c['name']: c for c in json.loads('{\n' + data)['checks']}
    assert {k for k, c in checks.items() if c['status'] == 'problem'} == {model.name, 'picture'}
    assert 'CheckpointError' in checks['picture']['found'] and 'sha256' in checks['picture']['found']


@pytest.mark.parametrize('text, shown', [
    ('/home/bob/a.png', '~/a.png'), ('/home/bobby/a.png', '/home/bobby/a.png'), ('/data/bob/a.png', '/data/USER/a.png'), ('/home/bob', '~'), ('in /home/bob.', 'in ~.'),
    ('/mnt/home/bob/x', '/mnt/home/USER/x'), ('bob is a word', 'bob is a word'), ("('/home/bob/x', 1)", "('~/x', 1)"), ('two\nlines\tand\x1b[0m', 'two lines and [0m')])
def test_tidy(monkeypatch, text, shown):
    monkeypatch.setattr(room.os.path, 'expanduser', lambda p: '/home/bob')
    for k in ('USER', 'LOGNAME', 'USERNAME'): monkeypatch.delenv(k, raising=False)
    assert room._tidy(text) == shown


# --- the command

@pytest.mark.parametrize('status, code', [('ok', 0), ('note', 0), ('problem', 1)])
def test_command(monkeypatch, capsys, status, code):
    asked = []
    monkeypatch.setattr(room, 'doctor', lambda *a: asked.append(a) or Report([Check('weather', status, 'rain | sun', 'an umbrella')], 1.))
    assert cli.restyle_doctor(['--device', 'cpu', '--out', 'there']) == code and asked == [('cpu', 'there')]
    out = capsys.readouterr().out
    assert 'rain | sun' in out and 'remedy: an umbrella' in out and ('PROBLEM' in out) == bool(code)
    assert cli.restyle_doctor(['--json']) == code
    assert json.loads(capsys.readouterr().out)['ok'] == (not code)
