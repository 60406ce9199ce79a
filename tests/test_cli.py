"The commands, from the outside: what they write, and what they say when something is wrong"
import json, os, re, signal, subprocess, sys, time
import pytest
import torch
from PIL import Image
from restyle_nb.cli import restyle_demo, restyle_invert
from restyle_nb.images import load_image, save_image
from restyle_nb.restyle import Inversion
from restyle_nb.zoo import held_out, load_model

ROW = {'l2', 'l2_se', 'lpips', 'lpips_se', 'n'}


@pytest.fixture(scope='session')
def faces(): return held_out(2)


@pytest.fixture
def good(tmp_path, faces):
    "A folder with one good picture in it, and room for worse"
    folder = tmp_path/'pictures'
    folder.mkdir()
    save_image(faces[0], folder/'good.png')
    return folder


def invert(*words): return restyle_invert([str(w) for w in words]+['--device', 'cpu'])


def complaints(capsys):
    "Lines on stderr; none of them a traceback"
    err = capsys.readouterr().err
    assert 'Traceback' not in err
    return [l for l in err.splitlines() if l.strip()]


# --- what restyle_invert writes

def test_a_folder_is_inverted(good, faces, tmp_path, capsys):
    save_image(faces[1], good/'other.png')
    assert invert(good, '--out', tmp_path/'out', '--steps', 3) == 0
    assert complaints(capsys) == []
    report = json.loads((tmp_path/'out'/'metrics.json').read_text())
    assert report['n_images'] == 2 and [r['step'] for r in report['steps']] == [0, 1, 2, 3]
    assert all(ROW <= set(r) for r in report['steps'])
    for p in report['pictures']:
        inv = Inversion.load(tmp_path/'out'/p['codes'])
        assert inv.codes.shape[:2] == (4, 1)
        assert len(p['l2']) == len(p['lpips']) == 4 and p['steps_taken'] == 3
        assert Image.open(tmp_path/'out'/p['strip']).width > 5*64
        assert load_image(tmp_path/'out'/p['final']).shape == (3, *load_model('faces64', 'cpu').geometry.output)


def test_final_picture_is_the_last_step(good, tmp_path):
    invert(good/'good.png', '--out', tmp_path/'out')
    inv = Inversion.load(tmp_path/'out'/'good.safetensors')
    again = load_model('faces64', 'cpu').generator.synthesize(inv.codes[-1])[0].clamp(-1, 1)
    assert (load_image(tmp_path/'out'/'good_final.png')-again).abs().max() <= 1/127


def test_same_names_do_not_collide(good, faces, tmp_path):
    other = tmp_path/'elsewhere'
    other.mkdir()
    save_image(faces[1], other/'good.png')
    save_image(faces[1], other/'Good.webp')
    assert invert(good, other, good/'good.png', '--out', tmp_path/'out', '--steps', 1) == 0
    pictures = json.loads((tmp_path/'out'/'metrics.json').read_text())['pictures']
    assert len(pictures) == 3
    assert len({p[k].lower() for p in pictures for k in ('strip', 'final', 'codes')}) == 9


def test_inputs_are_never_overwritten(good, faces):
    save_image(faces[1], good/'good_strip.png')
    before = {p.name: p.read_bytes() for p in good.iterdir()}
    assert invert(good, '--out', good, '--steps', 1) == 0
    assert all((good/k).read_bytes() == v for k, v in before.items())


def test_early_stop(good, tmp_path):
    invert(good, '--out', tmp_path/'out', '--tol', 1e9)
    assert json.loads((tmp_path/'out'/'metrics.json').read_text())['pictures'][0]['steps_taken'] == 1


def test_foreign_picture_is_said_to_be_one(tmp_path, capsys):
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)).gt(.5)*2.-1
    save_image(noise, tmp_path/'noise.png')
    assert invert(tmp_path/'noise.png', '--out', tmp_path/'out') == 0
    assert 'does not look like a picture of this model' in capsys.readouterr().out


def test_held_out_pictures_are_not_foreign(faces, tmp_path, capsys):
    x = held_out()[-8:]
    (tmp_path/'in').mkdir()
    for i, o in enumerate(x): save_image(o, tmp_path/'in'/f'{i}.png')
    assert invert(tmp_path/'in', '--out', tmp_path/'out') == 0
    assert 'does not look' not in capsys.readouterr().out


# --- bad input: one line that names the file, exit code 2, the good picture done

def text_named_png(p): p.write_text('no picture at all\n'*20)
def truncated_jpeg(p):
    Image.linear_gradient('L').convert('RGB').resize((256, 256)).save(p, 'JPEG', quality=95)
    p.write_bytes(p.read_bytes()[:2000])
def one_pixel(p): Image.new('RGB', (1, 1)).save(p, 'PNG')
def nothing(p): p.write_bytes(b'')
def bomb(p): Image.new('1', (20000, 20000)).save(p, 'PNG')


@pytest.mark.parametrize('make,name', [(text_named_png, 'text.png'), (truncated_jpeg, 'cut.jpg'), (one_pixel, 'dot.png'), (nothing, 'nothing.png'),
                                       (bomb, 'bomb.png'), (text_named_png, 'two\nlines.png')])
def test_bad_picture_beside_a_good_one(good, tmp_path, capsys, make, name):
    make(good/name)
    assert invert(good, '--out', tmp_path/'out', '--steps', 1) == 2
    lines = complaints(capsys)
    assert len(lines) == 1 and name.replace('\n', ' ') in lines[0] and ';' in lines[0]
    assert (tmp_path/'out'/'good_final.png').exists()
    assert json.loads((tmp_path/'out'/'metrics.json').read_text())['n_images'] == 1


def test_missing_path(good, tmp_path, capsys):
    assert invert(tmp_path/'nowhere.png', good, '--out', tmp_path/'out', '--steps', 1) == 2
    lines = complaints(capsys)
    assert len(lines) == 1 and 'nowhere.png: no such file or folder' in lines[0]
    assert (tmp_path/'out'/'good_final.png').exists()


def test_empty_folder(good, tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    assert invert(tmp_path/'empty', good, '--out', tmp_path/'out', '--steps', 1) == 2
    lines = complaints(capsys)
    assert len(lines) == 1 and 'empty' in lines[0] and 'no pictures' in lines[0]
    assert (tmp_path/'out'/'good_final.png').exists()


def test_only_an_empty_folder(tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    assert invert(tmp_path/'empty', '--out', tmp_path/'out') == 2
    assert len(complaints(capsys)) == 1


def test_a_pipe_does_not_hang(tmp_path, capsys):
    os.mkfifo(tmp_path/'pipe.png')
    assert invert(tmp_path/'pipe.png', '--out', tmp_path/'out') == 2
    assert len(complaints(capsys)) == 1


@pytest.mark.parametrize('command', ['demo', 'invert'])
@pytest.mark.parametrize('where', ['below a file', 'a file', '/proc/restyle'])
def test_folder_that_cannot_be_written(good, tmp_path, capsys, command, where):
    if where.startswith('/proc') and not sys.platform.startswith('linux'): where = 'a file'
    file = tmp_path/'file'
    file.write_text('')
    out = {'below a file': file/'out', 'a file': file}.get(where, where)
    code = invert(good, '--out', out) if command == 'invert' else restyle_demo(['--out', str(out)])
    lines = complaints(capsys)
    assert code == 2 and len(lines) == 1 and str(out) in lines[0] and 'folder' in lines[0]


@pytest.mark.parametrize('words,says', [(['--model', 'no-such-model'], 'no-such-model'), (['--device', 'abacus'], 'abacus')])
def test_model_and_device_that_are_not_there(good, tmp_path, capsys, words, says):
    assert restyle_invert([str(good), '--out', str(tmp_path/'out'), *words]) == 2
    lines = complaints(capsys)
    assert len(lines) == 1 and says in lines[0]


def test_model_file_that_is_none(good, tmp_path, capsys):
    (tmp_path/'model.pt').write_text('<html>not found</html>'*10)
    assert invert(good, '--out', tmp_path/'out', '--model', tmp_path/'model.pt') == 2
    lines = complaints(capsys)
    assert len(lines) == 1 and 'model.pt' in lines[0]


def test_a_saved_model_is_read(good, tmp_path):
    from restyle_nb.checkpoints import save_restyle
    save_restyle(load_model('faces64', 'cpu'), tmp_path/'mine.safetensors')
    assert invert(good, '--out', tmp_path/'a', '--steps', 2, '--model', tmp_path/'mine.safetensors') == 0
    assert invert(good, '--out', tmp_path/'b', '--steps', 2) == 0
    a, b = (json.loads((tmp_path/o/'metrics.json').read_text())['steps'][2]['l2'] for o in 'ab')
    assert abs(a-b) < 1e-4


@pytest.mark.parametrize('words', [['--steps', '0'], ['--steps', 'many'], [], ['--tol']])
def test_words_that_make_no_sense(tmp_path, words, capsys):
    with pytest.raises(SystemExit) as e: restyle_invert((['x.png', '--out', str(tmp_path)] if words else [])+words)
    assert e.value.code == 2
    capsys.readouterr()


def test_too_many_pictures_asked_for(tmp_path, capsys):
    assert restyle_demo(['--out', str(tmp_path), '--n', '100000']) == 2
    lines = complaints(capsys)
    assert len(lines) == 1 and '100000' in lines[0]


# --- from a shell: exit codes and memory

MEASURED = '''
import sys
from restyle_nb.cli import restyle_demo, restyle_invert, peak_memory
code = {command}(sys.argv[1:])
print('peak', peak_memory())
sys.exit(code)
'''


def shell(command, *words):
    p = subprocess.run([sys.executable, '-c', MEASURED.format(command=command), *map(str, words)], capture_output=True, text=True, timeout=600)
    assert 'Traceback' not in p.stderr, p.stderr
    return p, float(p.stdout.split('peak')[-1]) if 'peak' in p.stdout else None


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_enormous_picture(tmp_path, kind):
    file = tmp_path/f'enormous.{kind.lower()}'
    Image.linear_gradient('L').resize((8000, 8000)).convert('RGB').save(file, kind, **({'compress_level': 1} if kind == 'PNG' else {}))
    p, peak = shell('restyle_invert', file, '--out', tmp_path/'out', '--steps', 1, '--device', 'cpu')
    assert p.returncode == 0, p.stderr
    assert (tmp_path/'out'/'enormous_final.png').exists()
    assert peak < 1500


def test_exit_code_reaches_the_shell(tmp_path):
    p, _ = shell('restyle_invert', tmp_path/'nowhere.png', '--out', tmp_path/'out')
    assert p.returncode == 2 and len(p.stderr.strip().splitlines()) == 1


# --- the demo

@pytest.fixture(scope='session')
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp('demo')
    p, peak = shell('restyle_demo', '--out', out, '--device', 'cpu')
    assert p.returncode == 0, p.stderr
    return out, p.stdout, peak, json.loads((out/'metrics.json').read_text())


def test_demo_writes_what_it_should(demo):
    out, text, peak, m = demo
    assert m['n_images'] == 256 and [r['step'] for r in m['steps']] == list(range(6))
    for row in m['steps']+[m['single_pass'], m['average_image']]: assert ROW <= set(row) and row['n'] == 256
    assert {k: m['steps'][0][k] for k in ROW} == m['average_image']
    assert len(list(out.glob('strip_*.png'))) == 8
    for name in m['pictures']: Image.open(out/name).verify()
    assert set(m['pictures']) | {'metrics.json'} == {p.name for p in out.iterdir()}
    assert {'torch', 'device', 'version', 'weights'} <= set(m)


def test_demo_prints_its_numbers(demo):
    _, text, _, m = demo
    for row in m['steps']+[m['single_pass']]:
        for k in ('l2', 'lpips'):    # the file has six digits, so a five at the end may have been rounded either way
            assert any(f'{row[k]+a:.4f} ± {row[k+"_se"]+b:.4f}' in text for a in (-5e-7, 5e-7) for b in (-5e-7, 5e-7))


def test_demo_prints_its_time(demo): assert re.search(r'^\d+\.\d s on cpu, \d+ threads?, ', demo[1], re.M)


def test_demo_fits_in_memory(demo): assert demo[2] < 1500


def test_refinement_refines(demo):
    "L2 and LPIPS fall at each of the first three steps"
    steps = demo[3]['steps']
    for k in ('l2', 'lpips'): assert steps[0][k] > steps[1][k] > steps[2][k] > steps[3][k]


def test_restyle_beats_a_single_pass_of_equal_iterations(demo):
    m = demo[3]
    assert m['steps'][5]['lpips'] <= .9*m['single_pass']['lpips']


def test_demo_is_repeatable(tmp_path):
    "Same seed, same machine: same pictures and numbers"
    runs = []
    for o in 'ab':
        assert restyle_demo(['--out', str(tmp_path/o), '--n', '8', '--strips', '2', '--device', 'cpu']) == 0
        m = json.loads((tmp_path/o/'metrics.json').read_text())
        runs.append((m['steps'], (tmp_path/o/'strip_00.png').read_bytes(), (tmp_path/o/'contact_sheet.png').read_bytes()))
    assert runs[0] == runs[1]


# --- models from elsewhere

def test_models_are_listed(capsys):
    from restyle_nb.cli import restyle_models
    assert restyle_models([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ('faces64', 'restyle-psp-faces', 'restyle-e4e-cars', 'irse50'))


def test_a_model_is_fetched_ahead(tmp_path, capsys, monkeypatch):
    from restyle_nb import zoo
    from restyle_nb.cli import restyle_models
    (tmp_path/'model_ir_se50.pth').write_bytes(b'\x80\x02'*99)
    assert restyle_models(['irse50', '--cache', str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path/'model_ir_se50.pth')
    def offline(url, *a, **k): raise zoo.DownloadError(f'{url}: no connection (offline)')
    monkeypatch.setattr(zoo, '_open', offline)
    assert restyle_models(['moco', '--cache', str(tmp_path)]) == 2
    lines = complaints(capsys)
    assert len(lines) == 1 and 'moco' in lines[0] and 'no connection' in lines[0] and 'save the file as' in lines[0]
    assert restyle_models(['mocco', '--cache', str(tmp_path)]) == 2
    assert 'did you mean moco?' in complaints(capsys)[0]


def test_released_names_reach_the_loader(good, tmp_path, capsys, monkeypatch):
    from restyle_nb import zoo
    from restyle_nb.checkpoints import save_restyle
    monkeypatch.setenv('RESTYLE_NB_HOME', str(tmp_path/'home'))
    def offline(url, *a, **k): raise zoo.DownloadError(f'{url}: no connection (offline)')
    monkeypatch.setattr(zoo, '_open', offline)
    assert invert(good, '--out', tmp_path/'out', '--model', 'restyle-psp-faces') == 2
    lines = complaints(capsys)
    assert len(lines) == 1 and 'restyle_psp_ffhq_encode.pt' in lines[0] and 'path=' in lines[0]
    save_restyle(load_model('faces64', 'cpu'), tmp_path/'home'/'restyle_psp_ffhq_encode.pt')   # saved by hand, but not what the card says
    assert invert(good, '--out', tmp_path/'out', '--model', 'restyle-psp-faces') == 2
    assert 'output is 64×64, and 1024×1024 on the card' in complaints(capsys)[0]


def test_a_generator_of_ones_own(good, tmp_path, capsys):
    from restyle_nb.checkpoints import save_encoder, save_generator
    net = load_model('faces64', 'cpu')
    save_encoder(net, tmp_path/'e.safetensors'); save_generator(net.generator, tmp_path/'g.safetensors')
    assert invert(good, '--out', tmp_path/'a', '--steps', 1, '--model', tmp_path/'e.safetensors') == 2
    assert len(complaints(capsys)) == 1
    codes = []
    for i, g in enumerate((tmp_path/'g.safetensors', 'faces64')):
        assert invert(good, '--out', tmp_path/f'b{i}', '--steps', 1, '--model', tmp_path/'e.safetensors', '--generator', g) == 0
        codes.append(Inversion.load(tmp_path/f'b{i}'/'good.safetensors').codes)
    assert torch.equal(*codes)


# --- quick to answer

COMMANDS = ('restyle_demo', 'restyle_invert', 'restyle_edit', 'restyle_models', 'restyle_train', 'restyle_evaluate', 'restyle_bench', 'restyle_export',
            'restyle_push', 'restyle_grade', 'restyle_doctor')
HELP = """
import sys, time
from restyle_nb.cli import {command}
try: {command}(['--help'])
finally: print('heavy', sorted({{'torch', 'numpy', 'PIL', 'restyle_nb.training', 'tqdm'}} & set(sys.modules)))
"""


@pytest.mark.parametrize('command', COMMANDS)
def test_help_is_there_at_once(command):
    "Under a second, the start of Python included (best of three), because nothing heavy is imported"
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        p = subprocess.run([sys.executable, '-c', HELP.format(command=command)], capture_output=True, text=True)
        seconds.append(time.perf_counter() - began)
    assert p.returncode == 0 and f'usage: {command}' in p.stdout and 'heavy []' in p.stdout, p.stderr
    assert min(seconds) < 1


# --- restyle_train and restyle_evaluate, on a generator of 16 pixels

@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    "A generator of 16 pixels, a folder of pictures, and the options of a run of a second"
    from restyle_nb.checkpoints import save_generator
    from restyle_nb.generator import Generator
    root = tmp_path_factory.mktemp('tiny')
    torch.manual_seed(0)
    g = Generator(size=16, style_dim=8, n_mlp=1, channels={4: 4, 8: 4, 16: 4})
    g.estimate_latent_avg(64)
    save_generator(g, root/'g.safetensors')
    (root/'p').mkdir()
    for i, x in enumerate(torch.rand(24, 3, 16, 16)*2 - 1): save_image(x, root/'p'/f'{i:02}.png')
    lines = dict(generator=root/'g.safetensors', data=root/'p', trunk='compact', widths='[4, 4, 4, 4]', width=4, init='random', lpips=0, n_steps=2, batch_size=4,
                 iterations=6, val=4, val_every=3, save_every=3, log_every=3, device='cpu')
    (root/'o.yaml').write_text(''.join(f'{k}: {v}\n' for k, v in lines.items()))
    return root


def trained(*words):
    from restyle_nb.cli import restyle_train
    return restyle_train([str(w) for w in words])


def evaluated(*words):
    from restyle_nb.cli import restyle_evaluate
    return restyle_evaluate([str(w) for w in words] + ['--device', 'cpu'])


@pytest.fixture(scope='session')
def run(tiny):
    assert trained('--config', tiny/'o.yaml', '--out', tiny/'run', '--quiet') == 0
    return tiny/'run'


def state(folder, name='last.pt'): return torch.load(folder/name, weights_only=True)


def equal(a, b): return all(torch.equal(v, b['encoder'][k]) for k, v in a['encoder'].items())


def test_train_and_use_what_came_out(run, tiny, tmp_path, capsys):
    for model in (run, run/'model.safetensors'):
        assert invert(tiny/'p'/'00.png', '--out', tmp_path/'a', '--steps', 2, '--model', model) == 0
    assert trained('--resume', run, '--quiet') == 0                        # nothing left to do
    assert trained('--config', run/'options.yaml', '--out', tmp_path/'again', '--quiet') == 0
    assert equal(state(tmp_path/'again'), state(run)) and complaints(capsys) == []


def test_a_warning_is_a_line(run, tiny, tmp_path, capsys):
    (tmp_path/'p').mkdir()
    for p in (tiny/'p').iterdir(): os.link(p, tmp_path/'p'/p.name)
    text_named_png(tmp_path/'p'/'notes.png')
    assert trained('--config', tiny/'o.yaml', '--data', tmp_path/'p', '--out', tmp_path/'r', '--quiet', '--set', 'on_error=skip') == 0
    lines = complaints(capsys)
    assert len(lines) == 1 and lines[0].startswith('restyle_train: 1 of ') and 'notes.png' in lines[0]


def test_a_mistake_of_ours_is_a_traceback(monkeypatch, tmp_path, capsys):
    from restyle_nb import cli
    monkeypatch.setattr(cli, '_options', lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): trained('--quiet')


def test_words_win_over_the_file(tiny, tmp_path):
    from restyle_nb.runs import read_options
    assert trained('--config', tiny/'o.yaml', '--out', tmp_path/'r', '--quiet', '--iterations', 2, '--set', 'lr=3e-3', '--set', 'clip = none', '--set', 'batch-size=2') == 0
    o = read_options(tmp_path/'r')
    assert (o.iterations, o.lr, o.clip, o.batch_size, o.val) == (2, 3e-3, None, 2, 4)


def test_options_are_printed_as_a_file(tiny, tmp_path, capsys):
    from restyle_nb.runs import options_for, read_options
    assert trained('--preset', 'cars-e4e', '--set', 'lr=1e-3', '--options') == 0
    (tmp_path/'cars.yaml').write_text(capsys.readouterr().out)
    assert read_options(tmp_path/'cars.yaml') == options_for('cars-e4e', lr=1e-3)
    assert trained('--presets') == 0 and 'cars-e4e' in capsys.readouterr().out


def test_text_while_it_trains(tiny, tmp_path, capsys):
    assert trained('--config', tiny/'o.yaml', '--out', tmp_path/'r', '--tensorboard') == 0
    out, err = capsys.readouterr()
    assert 'finish' in out and 'model.safetensors' in out and '6' in err and '\x1b' not in err
    assert list((tmp_path/'r').rglob('events.*'))


def test_look_ahead_without_a_step(tiny, tmp_path, capsys):
    assert trained('--config', tiny/'o.yaml', '--out', tmp_path/'r', '--plan') == 0
    assert 'memory' in capsys.readouterr().out and not (tmp_path/'r'/'last.pt').exists()


def test_check_says_stop(tiny, tmp_path, capsys):
    (tmp_path/'p').mkdir()
    for p in (tiny/'p').iterdir(): os.link(p, tmp_path/'p'/p.name)
    text_named_png(tmp_path/'p'/'notes.png')
    words = '--config', tiny/'o.yaml', '--data', tmp_path/'p', '--check'
    assert trained(*words) == 3
    assert 'notes.png' in capsys.readouterr().out
    assert trained(*words, '--set', 'on_error=skip', '--set', 'batch_size=64') == 3           # more than there are pictures
    assert '64' in capsys.readouterr().out


@pytest.mark.parametrize('words,says', [
    (['--set', 'learning_rate=1'], 'did you mean lr'), (['--set', 'lr=fast'], "found 'fast'"), (['--config', 'no.yaml'], 'no.yaml: no such file'),
    (['--resume', 'nowhere'], 'nowhere'), (['--preset', 'facess-psp'], 'did you mean faces-psp'), (['--data', 'x'], 'generator: not given'),
    (['--generator', 'faces64'], 'data: not given'), (['--generator', 'faces64', '--data', 'faces64'], 'out: not given'), (['--generator', 'no-such', '--data', 'x'], 'no-such'),
    (['--generator', 'faces64', '--data', 'no-folder'], 'no-folder'), (['--fine-tune', 'no-such'], 'no-such')])
def test_train_says_in_a_line_what_is_wrong(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert trained(*words, '--quiet') == 2
    lines = complaints(capsys)
    assert len(lines) == 1 and says in lines[0] and lines[0].startswith('restyle_train: ')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('words', [['--set', 'lr'], ['--resume', 'a', '--fine-tune', 'b'], ['--resume', 'a', '--out', 'b'], ['--resume', 'a', '--config', 'b'], ['--colour']])
def test_train_words_that_make_no_sense(words, capsys):
    with pytest.raises(SystemExit) as e: trained(*words)
    assert e.value.code == 2
    capsys.readouterr()


def test_another_run_is_left_alone(run, tiny, capsys):
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert trained('--config', tiny/'o.yaml', '--out', run, '--quiet') == 2
    assert 'holds a run already' in complaints(capsys)[0] and {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_fine_tune_a_run(run, tmp_path, capsys):
    assert trained('--fine-tune', run, '--out', tmp_path/'r', '--iterations', 1) == 0
    assert 'tensors taken; missing: 0' in capsys.readouterr().out


# --- signals, and several processes

def script(tmp_path, command):
    "What pip makes of a console script"
    (tmp_path/command).write_text(f'import sys\nfrom restyle_nb.cli import {command}\nsys.exit({command}())\n')
    return str(tmp_path/command)


@pytest.mark.parametrize('sig,code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_after_a_checkpoint_and_it_goes_on(tiny, tmp_path, sig, code):
    "Somewhere in the middle of 60 iterations; resumed, the weights are those of an uninterrupted run"
    words = '--config', str(tiny/'o.yaml'), '--iterations', '60', '--quiet', '--set', 'save_every=1000', '--set', 'log_every=1'
    slow = 'import sys, time\nfrom restyle_nb.training import Trainer\nfast = Trainer._iterate\ndef _iterate(self): time.sleep(.05); return fast(self)\nTrainer._iterate = _iterate\n'
    (tmp_path/'slow').write_text(slow + open(script(tmp_path, 'restyle_train')).read())
    p = subprocess.Popen([sys.executable, str(tmp_path/'slow'), *words, '--out', str(tmp_path/'r')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    rows = tmp_path/'r'/'history.jsonl'
    while not (rows.exists() and rows.read_text().count('\n') > 3) and p.poll() is None: time.sleep(.01)
    p.send_signal(sig)
    out, err = p.communicate(timeout=60)
    assert p.returncode == code and 'Traceback' not in err and f'go on with: restyle_train --resume {tmp_path/"r"}' in err, err
    assert 3 < state(tmp_path/'r')['iteration'] < 60 and not (tmp_path/'r'/'model.safetensors').exists()
    assert trained('--resume', tmp_path/'r', '--quiet') == 0 and trained(*words, '--out', tmp_path/'whole') == 0
    assert equal(state(tmp_path/'r'), state(tmp_path/'whole')) and state(tmp_path/'r')['iteration'] == 60


def test_stopped_before_it_began(tiny, tmp_path, monkeypatch, capsys):
    from restyle_nb import runs
    monkeypatch.setattr(runs, 'build', lambda *_: signal.raise_signal(signal.SIGTERM))
    assert trained('--config', tiny/'o.yaml', '--out', tmp_path/'r', '--quiet') == 143
    assert complaints(capsys) == ['restyle_train: stopped; no iteration had been done'] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_started_by_torchrun(tiny, tmp_path):
    "Two processes: one folder, one run, each line once"
    pytest.importorskip('accelerate')
    words = '--config', str(tiny/'o.yaml'), '--out', str(tmp_path/'r')
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', '0', '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'localhost:0',
                        script(tmp_path, 'restyle_train'), *words], capture_output=True, text=True, timeout=300, env=os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    assert p.returncode == 0, p.stderr
    assert p.stdout.count('done; restyle_invert') == 1 and p.stdout.count('parameters') == 1
    assert sorted(o.name for o in (tmp_path/'r').iterdir()) == ['best.pt', 'history.jsonl', 'last.pt', 'model.safetensors', 'options.yaml']
    assert state(tmp_path/'r')['iteration'] == 6


# --- many pictures

def test_bulk_codes_are_those_of_one_picture(good, faces, tmp_path, capsys):
    from restyle_nb.bulk import read_codes
    save_image(faces[1], good/'other.png')
    assert invert(good, '--out', tmp_path/'one') == 0
    assert invert(good, '--out', tmp_path/'many', '--bulk', '--dtype', 'float32', '--shard', 1, '--parquet', tmp_path/'t.parquet') == 0
    codes = read_codes(tmp_path/'many')
    for i, name in enumerate(codes.names):
        one = Inversion.load(tmp_path/'one'/f'{name[:-4]}.safetensors').codes[-1][0]
        assert (codes[i] - one).abs().max() < 1e-3
    assert (tmp_path/'t.parquet').stat().st_size > 0 and complaints(capsys) == []


def test_bulk_names_what_it_left_out(good, tmp_path, capsys):
    text_named_png(good/'notes.png')
    words = good, '--out', tmp_path/'many', '--bulk'
    assert invert(*words) == 2 and 'notes.png' in complaints(capsys)[0]
    before = (tmp_path/'many'/'codes-00000.safetensors').stat().st_mtime_ns
    assert invert(*words) == 2 and (tmp_path/'many'/'codes-00000.safetensors').stat().st_mtime_ns == before    # done is done
    capsys.readouterr()
    assert invert(*words, '--steps', 2) == 2 and len(complaints(capsys)) == 1                               # another run


def test_bulk_takes_shards_and_lists(good, faces, tmp_path):
    from restyle_nb.bulk import read_codes
    from restyle_nb.datasets import write_shards
    write_shards([good/'good.png'], tmp_path/'tar')
    assert invert(tmp_path/'tar', '--out', tmp_path/'a', '--bulk') == 0 and invert(good/'good.png', '--out', tmp_path/'b', '--bulk') == 0
    assert torch.equal(read_codes(tmp_path/'a')[0], read_codes(tmp_path/'b')[0])


# --- scores

def test_evaluate_is_per_step(tmp_path, capsys):
    from restyle_nb.metrics import per_step
    assert evaluated('faces64', '--n', 8, '--out', tmp_path/'s.json') == 0
    rows, table = json.loads((tmp_path/'s.json').read_text())['models']['faces64'], per_step(load_model('faces64', 'cpu'), held_out(8), 5)
    for a, b in zip(rows, table, strict=True):
        for k in ('l2', 'lpips'): assert abs(a[k] - b[k]) < 1e-4
    assert f'{table[5]["lpips"]:.4f}' in capsys.readouterr().out


def test_evaluate_sets_models_side_by_side(run, tiny, capsys):
    assert evaluated(run, run/'model.safetensors', '--pictures', tiny/'p', '--n', 5, '--steps', 2) == 0
    out = capsys.readouterr().out
    assert 'run, step 2' in out and 'last step of model.safetensors against run' in out and re.search(r'L2 [+-]?0\.0 %', out)


@pytest.mark.parametrize('words,says', [(['no-such'], 'no-such'), (['faces64', '--pictures', 'no-folder'], 'no-folder')])
def test_evaluate_says_what_is_wrong(words, says, capsys):
    assert evaluated(*words) == 2
    lines = complaints(capsys)
    assert len(lines) == 1 and says in lines[0]


def test_evaluate_names_bad_pictures(good, run, capsys):
    text_named_png(good/'notes.png')
    assert evaluated('faces64', '--pictures', good) == 2
    line, = complaints(capsys)
    assert 'notes.png' in line and 'go on without it with --skip' in line
    assert evaluated('faces64', '--pictures', good, '--skip') == 0 and 'notes.png' in complaints(capsys)[0]
    assert evaluated(run) == 2 and '--pictures' in complaints(capsys)[0]


# --- faces in photographs, and the way back

@pytest.fixture(scope='session')
def snapshot(tmp_path_factory):
    "A photograph with a face, in a folder of its own"
    from skimage.data import astronaut
    return save_image(Image.fromarray(astronaut()), tmp_path_factory.mktemp('snap')/'nasa.png')


def test_faces_are_cut_inverted_and_pasted_back(snapshot, tmp_path):
    from restyle_nb.align import TEMPLATES, Transform, align_faces
    assert invert(snapshot, '--align', '--out', tmp_path, '--steps', 2) == 0
    p, = json.loads((tmp_path/'metrics.json').read_text())['pictures']
    assert p['pasted'] == 'nasa_pasted.png' and p['cut'] == 'nasa-face1_cut.png' and p['foreign']
    face, = align_faces(snapshot, 64, template=TEMPLATES['faces64'])
    t = Transform.load(tmp_path/p['transform'])
    assert t == face.transform and t.file == 'nasa.png'
    inv = Inversion.load(tmp_path/p['codes'])
    assert (inv.x[0] - face.image).abs().max() < .01
    x, y = load_image(snapshot), load_image(tmp_path/p['pasted'])
    (left, top), (right, bottom) = t.corners.min(0), t.corners.max(0)
    h, w = torch.meshgrid(torch.arange(512), torch.arange(512), indexing='ij')
    outside = (h < top - 1) | (h > bottom + 1) | (w < left - 1) | (w > right + 1)
    changed = (x - y).abs().amax(0)
    assert changed[outside].max() < .01 and changed[~outside].mean() > .1


def test_every_face_has_its_files(snapshot, tmp_path):
    a, two = Image.open(snapshot), Image.new('RGB', (1024, 512))
    two.paste(a, (0, 0)); two.paste(a.resize((384, 384)), (560, 0))
    save_image(two, tmp_path/'in'/'two.png')
    assert invert(tmp_path/'in', '--align', '--out', tmp_path/'out', '--steps', 1) == 0
    r = json.loads((tmp_path/'out'/'metrics.json').read_text())
    assert r['n_images'] == 2 and [p['final'] for p in r['pictures']] == ['two-face1_final.png', 'two-face2_final.png']
    assert {p['pasted'] for p in r['pictures']} == {'two_pasted.png'} and all((tmp_path/'out'/p[k]).exists() for p in r['pictures'] for k in ('strip', 'final', 'codes', 'cut', 'transform', 'pasted'))


def test_no_face_costs_a_line(snapshot, good, tmp_path, capsys):
    save_image(torch.zeros(3, 200, 300), good/'grey.png')
    (good/'good.png').unlink()
    assert invert(good, snapshot, '--align', '--out', tmp_path/'out', '--steps', 1) == 2
    lines = complaints(capsys)
    assert len(lines) == 1 and 'grey.png: no face found in 300x200 pixels' in lines[0] and '--crop' in lines[0] and (tmp_path/'out'/'nasa_pasted.png').exists()


def test_crop_is_the_middle_and_goes_back(snapshot, tmp_path):
    from restyle_nb.align import Transform
    wide = save_image(Image.open(snapshot).crop((0, 100, 512, 400)), tmp_path/'wide.png')
    assert invert(wide, '--crop', '--out', tmp_path/'out', '--steps', 1, '--model', 'earth64') == 0
    t = Transform.load(tmp_path/'out'/'wide_cut.json')
    assert t.source == (300, 512) and abs(t.a - 300/64) < 1e-9 and abs(t.b - 106) < 1e-9
    x, y = load_image(wide), load_image(tmp_path/'out'/'wide_pasted.png')
    assert (x - y)[:, :, :106].abs().max() < .01 and (x - y)[:, :, 206:306].abs().mean() > .05


def test_align_without_the_extra_is_a_line(snapshot, tmp_path, capsys, monkeypatch):
    from restyle_nb import align
    align._dlib.cache_clear()
    monkeypatch.setattr(align.importlib.util, 'find_spec', lambda name: None)
    assert invert(snapshot, '--align', '--out', tmp_path) == 2
    lines = complaints(capsys)
    assert len(lines) == 1 and 'pip install "restyle_nb[align]"' in lines[0]


@pytest.mark.parametrize('words', [['--align', '--crop'], ['--bulk', '--align'], ['--upsample', '9']])
def test_cuts_that_make_no_sense(tmp_path, capsys, words):
    with pytest.raises(SystemExit) as e: invert('x.png', '--out', tmp_path, *words)
    assert e.value.code == 2
    capsys.readouterr()


def test_other_kinds_are_passed_by_aloud(good, tmp_path, capsys):
    for name in ('a.heic', 'b.TIFF', '.hidden'): (good/name).write_text('x')
    assert invert(good, '--out', tmp_path/'out', '--steps', 1) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith('1 done, 0 not; 2 of other kinds passed by (.TIFF, .heic): convert pictures among them to PNG or JPEG')


@pytest.mark.parametrize('data', ['p', '{}/p'])
def test_training_says_how_to_go_on_without_a_bad_file(data, tmp_path, capsys, monkeypatch):
    from restyle_nb.cli import restyle_train
    (tmp_path/'p').mkdir()
    for i, x in enumerate(held_out(4)): save_image(x, tmp_path/'p'/f'{i}.png')
    text_named_png(tmp_path/'p'/'notes.png')
    monkeypatch.chdir(tmp_path)
    assert restyle_train(['--data', data.format(tmp_path), '--generator', 'faces64', '--out', str(tmp_path/'run'), '--iterations', '1', '--quiet', '--device', 'cpu',
                          '--set', 'batch_size=4', '--set', 'n_steps=1']) == 2
    line, = complaints(capsys)
    assert 'notes.png' in line and '--check' in line and 'on_error=skip' in line


def test_edit_says_foreign_too(snapshot, ways, tmp_path, capsys):
    assert edited(snapshot, '--directions', ways, '--edit', 'turn=1', '--out', tmp_path, '--steps', 1) == 0
    assert 'does not look like a picture of this model' in capsys.readouterr().out


# --- restyle_edit

def edited(*words):
    from restyle_nb.cli import restyle_edit
    return restyle_edit([str(w) for w in words] + ['--device', 'cpu'])


@pytest.fixture(scope='session')
def ways(tmp_path_factory):
    "A file with three directions of faces64: one in W, one with a name fit for no file, one that nobody claims"
    from restyle_nb.editing import Direction, home_of, save_directions
    home, v = home_of(load_model('faces64', 'cpu')), torch.randn(3, 128, generator=torch.Generator().manual_seed(0))/4
    return save_directions([Direction('turn', v[0], home=home), Direction('a/b: strip', v[1], home=home), Direction('found', v[2])], tmp_path_factory.mktemp('ways')/'d.safetensors')


def tiles(path, n):
    "The n tiles of a strip of pictures of 64 pixels, each enlarged three times"
    x = load_image(path)
    return [x[:, -200:-8, 4 + 196*i:196 + 196*i][:, 1::3, 1::3] for i in range(n)]


def test_moves_are_those_of_edit(good, ways, tmp_path):
    "One strength: the picture that `edit` paints; a range: its strip begins and ends where `edit` does, from there on"
    from restyle_nb.editing import edit, read_directions
    assert edited(good, '--directions', ways, '--edit', 'turn=1.5', '--edit', 'a/b: strip=-2:2:5', '--out', tmp_path/'out', '--steps', 2) == 0
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['edits.json', 'good_a-b-strip.png', 'good_edited.png', 'good_strip.png']
    net, d = load_model('faces64-restyle-e4e', 'cpu'), read_directions(ways)
    inv = net.invert(good/'good.png', 2)
    def distance(y, *more): return (y - edit(net, inv, [(d['turn'], 1.5), *more]).y[0].clamp(-1, 1)).abs().max()
    assert distance(load_image(tmp_path/'out'/'good_edited.png')) <= 1/127
    for tile, a in zip(tiles(tmp_path/'out'/'good_a-b-strip.png', 6)[1:], range(-2, 3)): assert distance(tile, (d['a/b: strip'], a)) <= 1/127
    report = json.loads((tmp_path/'out'/'edits.json').read_text())
    assert report['n_images'] == 1 and [m['strengths'] for m in report['moves']] == [[1.5], [-2, -1, 0, 1, 2]] and 'turn' in report['moves'][0]['direction']


def test_layers_that_are_not_named_stay(good, ways, tmp_path):
    from restyle_nb.editing import edit, read_directions
    net, d = load_model('faces64-restyle-e4e', 'cpu'), read_directions(ways)['turn']
    inv, seen = net.invert(good/'good.png', 1), []
    for layers, meant in (('coarse', range(4)), ('6:8', range(6, 8)), ('5', 5), ('0,9', [0, 9])):
        assert edited(good, '--directions', ways, '--edit', 'turn=3', '--layers', layers, '--steps', 1, '--out', tmp_path/layers) == 0
        seen.append(load_image(tmp_path/layers/'good_edited.png'))
        assert (seen[-1] - edit(net, inv, {d.only(meant, net): 3.}).y[0].clamp(-1, 1)).abs().max() <= 1/127
    assert min((a - b).abs().max() for i, a in enumerate(seen) for b in seen[:i]) > .05


def test_embedded_directions_are_there(good, tmp_path, capsys):
    assert edited('--list') == 0
    assert {'smile', 'age', 'yaw'} <= {l.split(':')[0] for l in capsys.readouterr().out.splitlines()}
    assert edited(good, '--edit', 'smile=2', '--edit', 'smile=-1:1:2', '--edit', 'smile=0:1:2', '--out', tmp_path/'out', '--steps', 1) == 0
    assert {p.name for p in (tmp_path/'out').glob('*smile*')} == {'good_smile.png', 'good_smile-2.png'}


def test_list_says_what_is_in_a_file(ways, capsys):
    assert edited('--list', '--directions', ways) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith('turn: W') and 'faces64' in lines[0] and 'unknown' in lines[2]


@pytest.mark.parametrize('words,says', [(['turm=1'], 'did you mean turn'), (['found=1'], 'does not say'), (['turn=1', '--model', 'toons64'], 'faces64'),
                                        (['turn=1', '--layers', '9:12', '--model', 'no-such'], 'no-such'), (['turn=1', '--layers', '40:50'], '40'),
                                        (['turn=1', '--directions', 'no-file.npy'], 'no-file.npy'), (['turn=1', '--directions', 'no-world'], 'no-world')])
def test_edit_says_in_a_line_what_is_wrong(good, ways, tmp_path, capsys, words, says):
    assert edited(good, '--directions', ways, '--edit', *words, '--out', tmp_path/'out') == 2
    lines = complaints(capsys)
    assert len(lines) == 1 and says in lines[0] and lines[0].startswith('restyle_edit: ') and not list((tmp_path/'out').glob('*.png'))


@pytest.mark.parametrize('move,model,name', [('turn=1', 'toons64', 'faces64'), ('found=1', 'faces64', 'unknown')])
def test_a_stranger_is_allowed_by_name(good, ways, tmp_path, move, model, name):
    assert edited(good, '--directions', ways, '--edit', move, '--model', model, '--allow', name, '--out', tmp_path/'out', '--steps', 1) == 0
    assert (tmp_path/'out'/'good_edited.png').exists()


def test_edit_leaves_out_a_bad_picture(good, ways, tmp_path, capsys):
    text_named_png(good/'notes.png')
    assert edited(good, tmp_path/'nowhere.png', '--directions', ways, '--edit', 'turn=1', '--out', tmp_path/'out', '--steps', 1) == 2
    lines = complaints(capsys)
    assert len(lines) == 2 and any('notes.png' in l for l in lines) and (tmp_path/'out'/'good_edited.png').exists()


@pytest.mark.parametrize('words', [[], ['x.png'], ['x.png', '--edit', 'turn=1'], ['x.png', '--out', 'o'], ['x.png', '--out', 'o', '--edit', 'turn'],
                                   ['x.png', '--out', 'o', '--edit', 'turn=1:2:3:4'], ['x.png', '--out', 'o', '--edit', 'turn=inf'], ['x.png', '--out', 'o', '--edit', 'a=1', '--layers', 'middle']])
def test_edit_words_that_make_no_sense(words, capsys):
    with pytest.raises(SystemExit) as e: edited(*words)
    assert e.value.code == 2
    capsys.readouterr()
