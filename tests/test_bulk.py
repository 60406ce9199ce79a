"Bulk inversion: killed anywhere, each picture exactly once; nothing mixed, nothing lost silently, memory that does not grow."
import json, os, pickle, subprocess, sys, tarfile
from pathlib import Path
import pytest
import torch
from restyle_nb import bulk
from restyle_nb.bulk import BulkError, evaluate, invert_all, read_codes, space
from restyle_nb.datasets import PictureFiles, Shards, write_shards
from restyle_nb.encoders import build_encoder
from restyle_nb.generator import Generator
from restyle_nb.images import ImageFolder, image_files, load_folder, save_image
from restyle_nb.losses import l2
from restyle_nb.metrics import per_step
from restyle_nb.restyle import ReStyle

N = 61

def model(seed=0, in_channels=6):
    torch.manual_seed(seed)
    g = Generator(size=16, style_dim=8, n_mlp=2, channels={4:8, 8:8, 16:8})
    g.estimate_latent_avg(200)
    e = build_encoder('compact', n_styles=g.n_styles, style_dim=8, input_size=(16, 16), widths=(4, 8, 8), in_channels=in_channels)
    e.head.linear.weight.data.mul_(5)   # steps long enough that the last is not always the best
    return ReStyle(e, g, passes=3).eval()

def pictures(n=N): return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))*2 - 1

@pytest.fixture(scope='session')
def faces(tmp_path_factory):
    "A tree of files with names that give trouble, one of them no picture"
    root = tmp_path_factory.mktemp('bulk')/'faces'
    odd = ['zwölf.png', 'two\nlines.PNG', 'a.b.c.png', "quote's.png", ' space .png']
    for i, o in enumerate(pictures()):
        name = odd[i] if i < len(odd) else f'{"abc"[i%3]}/{i:03d}.png' if i%2 else f'a-b{i}.png'
        save_image(o, root/name)
    os.rename(root/'c'/'005.png', os.fsencode(root/'c') + b'/\xff.png')
    (root/'b'/'text.png').write_text('none')
    return root

KW = dict(shard=8, batch_size=3, recursive=True)
def done(folder): return {p.name: p.read_bytes() for p in sorted(Path(folder).glob('*-*.*'))}

SERVER = """
import json, os, pickle, random, resource, signal, sys, time, traceback
import torch, torch.distributed as dist
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
import test_bulk
from restyle_nb import bulk
from restyle_nb.losses import l2
from restyle_nb.machines import Team
faces, tmp, save = {faces!r}, {tmp!r}, bulk.save_file

def fork(f):
    if pid := os.fork(): return pid
    try:
        f()
        sys.stdout.flush()
        os._exit(0)
    except BaseException: traceback.print_exc()
    finally: os._exit(1)

def team(rank, size, meet):
    if size == 1: return Team()
    dist.init_process_group('gloo', init_method=f'file://{{meet}}', rank=rank, world_size=size)
    return Team(rank, size, 'cpu')

def slowly(tensors, path, meta):
    "Half of the file, a pause to be killed in, all of it"
    save(tensors, path, meta)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:len(data)//2])
    time.sleep(.01)
    Path(path).write_bytes(data)

def life(out, rank, size, meet):
    bulk.save_file = slowly
    bulk.invert_all(test_bulk.model(), faces, out, team=team(rank, size, meet), images=True, progress=False, **test_bulk.KW)

def kill(size, kills):
    "Lives of a program that is killed at random, on one folder after another, until the last one may end by itself"
    rng, killed, torn, lives, outs, over = random.Random(size), 0, 0, 0, 0, True
    parts = lambda: len(list(out.glob('.*.part')))
    while killed < kills or not over:
        if over: outs, over, seen, out = outs + 1, False, {{}}, Path(f'{{tmp}}/{{size}}-{{outs + 1}}')
        lives += 1
        last, before = killed == kills, parts()
        pids = [fork(lambda: life(str(out), r, size, f'{{tmp}}/meet-{{size}}-{{lives}}')) for r in range(size)]
        if not last:
            end = time.time() + 1
            while lives%2 and parts() <= before and time.time() < end: time.sleep(.0005) # every other time: while it writes
            time.sleep(rng.random()*(.005 if lives%2 else .12))
            for p in rng.sample(pids, size):
                os.kill(p, signal.SIGKILL)
                time.sleep(rng.random()*.02)
        ends = [os.waitpid(p, 0)[1] for p in pids]
        fell = any(map(os.WIFSIGNALED, ends))                      # who talks to one that is gone ends with an error
        assert all(o == 0 or os.WIFSIGNALED(o) or fell and size > 1 for o in ends) and not (last and any(ends)), ends
        over = not any(ends)
        killed += not over
        torn += parts() > 0
        now = {{p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.glob('codes-*')}}
        assert all(now.get(k) == v for k, v in seen.items()), 'a finished file was done again'
        seen = now
    return killed, torn, outs

def full():
    "A file may not grow over 5000 bytes, a shard of 32 takes more"
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    try: bulk.invert_all(test_bulk.model(), faces, tmp + '/full', shard=32, batch_size=8, recursive=True, dtype='float32')
    except bulk.BulkError as e: Path(tmp + '/full.txt').write_text(str(e))

def together(rank, size):
    t, net, said = team(rank, size, tmp + '/meet'), test_bulk.model(), []
    table = bulk.evaluate(net, faces, 2, dict(l2=l2), 7, team=t, on_error='skip', recursive=True)
    codes = bulk.invert_all(net, faces, tmp + '/together', team=t, images=True, **test_bulk.KW)
    for f in (lambda: bulk.evaluate(net, test_bulk.pictures(4 + rank), 1, dict(l2=l2), team=t),
              lambda: bulk.invert_all(net, faces, tmp + '/together', team=t, n_steps=1, **test_bulk.KW)):
        try: f()
        except bulk.BulkError as e: said.append(str(e))
    Path(f'{{tmp}}/r{{rank}}').write_bytes(pickle.dumps((table.scores['l2'], table.bad, len(codes), said)))

results = [kill(size, 10) for size in (1, 2)]
ends = [os.waitpid(p, 0)[1] for p in [fork(full), *(fork(lambda: together(r, 3)) for r in range(3))]]
assert not any(ends), ends
print(json.dumps(results))
"""

@pytest.fixture(scope='session')
def trials(faces, tmp_path_factory):
    "Folder with what many forked processes left behind; [killed, with a torn file, folders] for one process and for two"
    if not hasattr(os, 'fork'): pytest.skip('needs os.fork')
    tmp = tmp_path_factory.mktemp('trials')
    code = SERVER.format(here=os.path.dirname(os.path.abspath(__file__)), faces=str(faces), tmp=str(tmp))
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert p.returncode == 0, p.stderr[-3000:]
    return tmp, json.loads(p.stdout.splitlines()[-1])

@pytest.fixture(scope='session')
def whole(faces, tmp_path_factory):
    out = tmp_path_factory.mktemp('whole')/'out'
    invert_all(model(), faces, out, images=True, **KW)
    return out

def check_names(codes, faces):
    want = [os.fsdecode(os.path.relpath(os.fsencode(p), os.fsencode(faces))) for p in image_files(faces, recursive=True)]
    bad = [b['name'] for b in codes.bad]
    assert bad == ['b/text.png'] and len(want) == N + 1
    assert list(codes.names) == [n for n in want if n not in bad]
    assert codes.index.tolist() == [i for i, n in enumerate(want) if n not in bad]

@pytest.mark.parametrize('size', [1, 2])
def test_killed_at_random_each_picture_once(faces, whole, trials, size):
    "SIGKILL in the middle of everything, writing included; the same bytes come out, and finished files were never touched again"
    tmp, results = trials
    killed, torn, outs = results[size - 1]
    assert killed == 10 and torn >= 3, 'too few kills fell into the writing of a file'
    want = done(whole)
    assert len(want) == 2*8
    for i in range(1, outs + 1):
        assert done(tmp/f'{size}-{i}') == want
        assert not list((tmp/f'{size}-{i}').glob('.*.part'))
        check_names(read_codes(tmp/f'{size}-{i}'), faces)

def test_codes_are_those_of_invert(faces, whole, tmp_path):
    "In the order of the folder, whatever is kept, at full precision exact"
    net, codes = model(), read_codes(whole)
    check_names(codes, faces)
    x = load_folder([os.path.join(faces, n) for n in codes.names], 16)
    inv = net.invert(x)
    torch.testing.assert_close(codes[:], inv.codes[-1], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(codes.errors, inv.errors.T)
    assert codes.steps.tolist() == [3]*N
    for keep, want, steps in [('best', inv.best_codes, inv.best), ('all', inv.codes.transpose(0, 1), inv.best)]:
        c = invert_all(net, x, tmp_path/keep, keep=keep, dtype='float32', shard=20, workers=2)
        torch.testing.assert_close(c[:], want, atol=1e-5, rtol=1e-5)
        assert c.steps.tolist() == steps.tolist() and c.shape == tuple(want.shape)
    assert (inv.best != 3).any(), 'best and last do not differ here'

def test_threads_lists_and_processes_change_nothing(faces, whole, tmp_path):
    a = invert_all(model(), faces, tmp_path/'a', workers=3, images=True, **KW)
    assert done(tmp_path/'a') == done(whole)
    files = PictureFiles(faces, 16, recursive=True)
    for i, src in enumerate([image_files(faces, recursive=True), files]):
        assert torch.equal(invert_all(model(), src, tmp_path/f'l{i}', **KW)[:], a[:])
    loaded = ImageFolder([p for p in files.paths if p.name != 'text.png'], 16)
    torch.testing.assert_close(invert_all(model(), loaded, tmp_path/'f', shard=8)[:], a[:], atol=2e-3, rtol=2e-3)

def test_streamed_shards(faces, whole, tmp_path):
    "Tar files as a source; a bad member is listed, a bad tar stops everything"
    index = write_shards(faces, tmp_path/'tars', per_shard=10, seed=None, recursive=True)
    codes = read_codes(whole)
    for workers in (0, 3):
        c = invert_all(model(), Shards(index, 16), tmp_path/f'out{workers}', workers=workers, **KW)
        assert torch.equal(c[:], codes[:]) and c.index.tolist() == codes.index.tolist()
        assert [b['name'].split('/')[-1] for b in c.bad] == ['text.png'] and c.names[0].startswith('shard-00000.tar/')
    data = Shards(index, 16)
    (tmp_path/'tars'/'shard-00003.tar').write_bytes(b'0'*2000)
    with pytest.raises(BulkError, match='shard-00003.tar'): invert_all(model(), data, tmp_path/'torn', **KW)
    assert len(read_codes(tmp_path/'torn', partial=True)) == 24

def test_images_are_those_of_the_codes(whole):
    net, codes = model(), read_codes(whole)
    seen = {}
    for p in sorted(whole.glob('images-*.tar')):
        with tarfile.open(p) as t: names = t.getnames()
        seen |= {int(n[:8]): n for n in names}
    assert list(seen) == codes.index.tolist()
    back = torch.stack([Shards(whole, 16).read(i) for i in range(N)])
    with torch.no_grad(): y = net.generator.synthesize(codes[:])
    assert (back - y.clamp(-1, 1)).abs().max() < .03

@pytest.mark.parametrize('change, words', [
    (dict(n_steps=2), 'n_steps=3'), (dict(keep='best'), "keep='last'"), (dict(shard=9), 'shard=8'), (dict(dtype='float32'), "dtype='float16'"),
    (dict(images=False), 'images=True'), (dict(net=1), 'another model'), (dict(recursive=False), 'other pictures')])
def test_changed_settings_are_refused(faces, whole, change, words):
    before = done(whole)
    with pytest.raises(BulkError, match=words): invert_all(model(change.pop('net', 0)), faces, whole, **{**KW, 'images': True, **change})
    assert done(whole) == before

def test_changed_pictures_are_refused_or_gone_on_with(tmp_path):
    for i, o in enumerate(pictures(20)): save_image(o, tmp_path/'in'/f'{i:02d}.png')
    whole = invert_all(model(), tmp_path/'in', tmp_path/'whole', shard=5)
    def stop(n, total):
        if n > 8: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): invert_all(model(), tmp_path/'in', tmp_path/'out', shard=5, batch_size=5, progress=stop)
    assert len(read_codes(tmp_path/'out', partial=True)) == 5
    with pytest.raises(BulkError, match='1 of 4 files'): read_codes(tmp_path/'out')
    save_image(pictures(1)[0, :, :9], tmp_path/'in'/'03.png')
    with pytest.raises(BulkError, match="'03.png' had .* bytes and has"): invert_all(model(), tmp_path/'in', tmp_path/'out', shard=5)
    (tmp_path/'in'/'17.png').unlink()
    with pytest.raises(BulkError, match='20 then, 19 now'): invert_all(model(), tmp_path/'in', tmp_path/'out', shard=5)
    c = invert_all(model(), None, tmp_path/'out', shard=5)
    assert json.loads((tmp_path/'out'/'bad.json').read_text()) == c.bad == [dict(number=17, name='17.png', why='no such file; check the path')]
    assert c.index.tolist() == [i for i in range(20) if i != 17]
    assert torch.equal(c[:3], whole[:3])

def test_moved_folders_go_on(tmp_path):
    for i, o in enumerate(pictures(6)): save_image(o, tmp_path/'in'/f'{i}.png')
    invert_all(model(), tmp_path/'in', tmp_path/'out', shard=2)
    os.rename(tmp_path/'in', tmp_path/'there'); os.rename(tmp_path/'out', tmp_path/'here')
    (tmp_path/'here'/'codes-00001.safetensors').unlink()
    assert len(invert_all(model(), tmp_path/'there', tmp_path/'here', shard=2)) == 6
    assert len(invert_all(model(), None, tmp_path/'here', shard=2)) == 6

def test_pictures_that_go_while_it_runs(tmp_path):
    "One that vanishes is listed; a disk that goes away stops everything instead of making a million bad pictures"
    for i, o in enumerate(pictures(12)): save_image(o, tmp_path/'in'/f'{i:02d}.png')
    told = []
    def lose(n, total):
        if n == 4: (tmp_path/'in'/'05.png').unlink()
    c = invert_all(model(), tmp_path/'in', tmp_path/'out', shard=4, batch_size=4, progress=lose, on_error=lambda name, e: told.append(name))
    assert [b['name'] for b in c.bad] == told == ['05.png'] and len(c) == 11
    def unmount(n, total):
        if n == 4 and (tmp_path/'in').exists(): os.rename(tmp_path/'in', tmp_path/'away')
    with pytest.raises(BulkError, match='gone; bring it back'): invert_all(model(), tmp_path/'in', tmp_path/'out2', shard=4, batch_size=4, progress=unmount)
    assert len(read_codes(tmp_path/'out2', partial=True)) == 4
    os.rename(tmp_path/'away', tmp_path/'in')
    assert len(invert_all(model(), tmp_path/'in', tmp_path/'out2', shard=4)) == 11
    with pytest.raises(BulkError, match='00.png: .*on_error'):
        (tmp_path/'in'/'00.png').write_bytes(b'')
        invert_all(model(), tmp_path/'in', tmp_path/'out3', shard=4, on_error='raise')

def test_disk_full(faces, trials):
    tmp, _ = trials
    said = (tmp/'full.txt').read_text()
    assert 'codes-00000.safetensors' in said and 'make room and run the same again' in said
    assert not list((tmp/'full').glob('.*.part')) and not list((tmp/'full').glob('codes*'))
    assert len(invert_all(model(), faces, tmp/'full', shard=32, batch_size=8, recursive=True, dtype='float32')) == N

def test_too_small_a_disk_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(bulk.shutil, 'disk_usage', lambda p: type('', (), dict(free=1000)))
    with pytest.raises(BulkError, match='are free'): invert_all(model(), pictures(), tmp_path/'out')
    assert not (tmp_path/'out'/'manifest.json').exists()

def test_damaged_and_foreign_files_are_done_again(tmp_path):
    net, x = model(), pictures(30)
    invert_all(net, x, tmp_path/'a', shard=10)
    invert_all(net, x.flip(0), tmp_path/'b', shard=10)
    want = done(tmp_path/'a')
    f = tmp_path/'a'/'codes-00001.safetensors'
    f.write_bytes(f.read_bytes()[:700])
    (tmp_path/'a'/'codes-00002.safetensors').write_bytes((tmp_path/'b'/'codes-00002.safetensors').read_bytes())
    (tmp_path/'a'/'codes-00000.safetensors').write_bytes(b'')
    (tmp_path/'a'/'.x.part').write_bytes(b'torn')
    invert_all(net, x, tmp_path/'a', shard=10)
    assert done(tmp_path/'a') == want and not (tmp_path/'a'/'.x.part').exists()
    os.unlink(tmp_path/'a'/'manifest.json')
    with pytest.raises(BulkError, match='without a manifest'): invert_all(net, x, tmp_path/'a', shard=10)
    (tmp_path/'b'/'manifest.json').write_text('{')
    with pytest.raises(BulkError, match='manifest.json: cannot be read'): read_codes(tmp_path/'b')

def test_one_program_a_folder(tmp_path):
    net, x = model(), pictures(8)
    def second(n, total):
        with pytest.raises(BulkError, match='another process is at work'): invert_all(net, x, tmp_path/'out', shard=4)
    assert len(invert_all(net, x, tmp_path/'out', shard=4, progress=second)) == 8

def test_out_of_memory_halves(tmp_path):
    net, x = model(), pictures(20)
    want, paint, most = invert_all(net, x, tmp_path/'a', dtype='float32', batch_size=8)[:], net.generator.synthesize, []
    def tight(w, **kw):
        if len(w) > 3: raise torch.OutOfMemoryError('full')
        most.append(len(w))
        return paint(w, **kw)
    net.generator.synthesize = tight
    with pytest.warns(UserWarning, match='pictures at a time: going on with') as said:
        got = invert_all(net, x, tmp_path/'b', dtype='float32', batch_size=8)[:]
    assert len(said) == 2 and max(most) == 2
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    net.generator.synthesize = lambda w, **kw: (_ for _ in ()).throw(torch.OutOfMemoryError('full'))
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning): invert_all(net, x, tmp_path/'c')

def test_not_finite(tmp_path):
    "A picture that ends as NaN is bad; a model that makes nothing else is broken"
    net, x = model(), pictures(9)
    encode = net.encoder.forward_from
    def sick(first, y):
        w = encode(first, y)
        return torch.where((x[4].mean() - first.new_tensor(marks['x'][:len(w)])).abs().view(-1, 1, 1) < 1e-6, torch.nan, w)
    marks, steps = {}, net.steps
    def noted(x, n, *a, **kw):
        marks['x'] = x.mean((1, 2, 3)).tolist()
        return steps(x, n, *a, **kw)
    net.steps, net.encoder.forward_from = noted, sick
    c = invert_all(net, x, tmp_path/'a', shard=4)
    assert c.index.tolist() == [0, 1, 2, 3, 5, 6, 7, 8] and c.bad[0]['number'] == 4 and 'NaN' in c.bad[0]['why']
    assert torch.isfinite(c[:]).all()
    assert [b['number'] for b in invert_all(net, x, tmp_path/'one', shard=4, batch_size=1).bad] == [4]
    net.encoder.forward_from = lambda first, y: encode(first, y)*torch.nan
    with pytest.raises(BulkError, match='step 1 gave NaN .* all'): invert_all(net, x, tmp_path/'b', shard=4)

def test_codes_that_half_precision_cannot_hold(tmp_path):
    net = model()
    net.encoder.head.linear.bias.data[2] = 1e5
    with pytest.raises(BulkError, match='too large for float16'): invert_all(net, pictures(4), tmp_path/'a')
    assert invert_all(net, pictures(4), tmp_path/'b', dtype='float32')[:].max() > 65504

def test_wrong_arguments(faces, tmp_path):
    net, out = model(), tmp_path/'out'
    for kw, words in [(dict(keep='first'), 'keep must be one of last, best, all'), (dict(dtype='int8'), 'dtype must'), (dict(shard=0), 'shard must be at least 1'),
                      (dict(n_steps=0), 'n_steps must'), (dict(on_error='ignore'), 'on_error must')]:
        with pytest.raises(BulkError, match=words): invert_all(net, faces, out, **kw)
    for src, words in [('nowhere', 'no such file or folder'), (tmp_path, 'no pictures in this folder'), ([], 'empty'), (pictures(0), 'empty')]:
        with pytest.raises(BulkError, match=words): invert_all(net, src, out)
    with pytest.raises(BulkError, match='nothing was begun here'): invert_all(net, None, out)
    with pytest.raises(BulkError, match='no codes of invert_all here'): read_codes(tmp_path)
    single = model(in_channels=3)
    with pytest.raises(BulkError, match='n_steps=1'): invert_all(single, faces, out, n_steps=2)
    assert invert_all(single, pictures(4), out).n_steps == 1
    with pytest.raises(BulkError, match='another model|n_steps'): invert_all(net, pictures(4), out)
    with pytest.raises(BulkError, match='give them again'): invert_all(single, None, out)
    with pytest.raises(BulkError, match='3 image channels'): invert_all(net, torch.zeros(4, 1, 16, 16), tmp_path/'grey')
    with pytest.raises(BulkError, match='tuple'): invert_all(net, torch.utils.data.TensorDataset(pictures(4)), tmp_path/'pairs')
    c = invert_all(net, torch.cat([pictures(2), pictures(1)*torch.nan]), tmp_path/'nan')
    assert len(c) == 2 and 'NaN' in c.bad[0]['why']

def test_all_bad(tmp_path):
    for i in range(5): (tmp_path/f'{i}.png').write_text('x')
    c = invert_all(model(), tmp_path, tmp_path/'out', shard=2)
    assert len(c) == 0 == len(list(c.iterate())) and len(c.bad) == 5 and c[:].shape == (0, *model().latent_avg.shape) and list(c.names) == []
    for i in range(150): (tmp_path/f'{i}.png').write_text('x')
    with pytest.raises(BulkError, match='110 pictures in a row .* not a picture'): invert_all(model(), tmp_path, tmp_path/'out2', shard=70, batch_size=40)
    assert len(read_codes(tmp_path/'out2', partial=True).bad) == 70
    assert len(invert_all(model(), tmp_path, tmp_path/'out2', shard=70, batch_size=40, on_error=lambda name, e: None).bad) == 150
    with pytest.raises(BulkError, match='none of the 150'): evaluate(model(), tmp_path, metrics=dict(l2=l2), on_error='skip')

def test_reading(whole):
    c = read_codes(whole)
    assert len(c) == N and c.shape == (N, *model().latent_avg.shape)
    every = c[:]
    assert every.dtype == torch.float32 and torch.equal(c[-1], every[-1]) and torch.equal(c[torch.tensor([40, 3])], every[[40, 3]])
    assert torch.equal(c[50:3:-7], every[torch.arange(50, 3, -7)])
    assert c.names[-1] == list(c.names)[-1] and c.names[5:8] == list(c.names)[5:8]
    for i in (N, -N - 1):
        with pytest.raises(IndexError): c[i]
        with pytest.raises(IndexError): c.names[i]
    parts = list(c.iterate(5))
    assert max(len(p.codes) for p in parts) == 5 and torch.equal(torch.cat([p.codes for p in parts]), every)
    assert [n for p in parts for n in p.names] == list(c.names)
    assert torch.equal(pickle.loads(pickle.dumps(c))[7], every[7])
    assert f'{N} codes' in repr(c) and '1 bad' in repr(c)

def test_parquet(whole, tmp_path):
    pq = pytest.importorskip('pyarrow.parquet')
    c = read_codes(whole)
    t = pq.read_table(c.to_parquet(tmp_path/'c.parquet'))
    assert t['picture'].to_pylist() == c.index.tolist() and t['step'].to_pylist() == c.steps.tolist()
    assert t['name'].to_pylist() == [n.encode('utf-8', 'replace').decode() for n in c.names]
    flat = torch.tensor(t['code'].combine_chunks().flatten().to_numpy()).float()
    assert torch.equal(flat.view(c.shape), c[:]) and json.loads(t.schema.metadata[b'shape']) == list(c.shape[1:])
    assert torch.equal(torch.tensor(t['errors'].combine_chunks().flatten().to_numpy()).view(N, 4), c.errors)

def test_bytes_are_counted_right(tmp_path):
    net, x = model(), pictures(40)
    for keep, dtype in [('last', 'float16'), ('all', 'float32')]:
        invert_all(net, x, tmp_path/keep, keep=keep, dtype=dtype, shard=20)
        s, real = space(net, 40, 3, keep, dtype, 20, name=8), sum(len(b) for b in done(tmp_path/keep).values())
        assert s.shards == 2 and s.picture*40 <= real <= s.picture*40 + 2*1500, (s, real)

class Endless(torch.utils.data.Dataset):
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.full((3, 16, 16), (i%100)/100)

def peak():
    return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])*1024

@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='needs /proc')
def test_memory_does_not_grow(tmp_path):
    "Twenty times as many pictures in the same memory, the reading of all codes included; a picture takes 3 kB"
    net = model()
    def measure(n):
        Path('/proc/self/clear_refs').write_text('5')
        before = peak()
        c = invert_all(net, Endless(n), tmp_path/str(n), shard=100, batch_size=50, n_steps=1, workers=2)
        assert sum(len(p.codes) for p in c.iterate()) == n
        return peak() - before
    measure(300)
    used = [measure(400), measure(8000)]
    assert used[1] - used[0] < 8e6, used

def test_evaluate(faces, tmp_path):
    net, metrics = model(), dict(l2=l2)
    x = pictures(30)
    a, b = per_step(net, x, 3, metrics, 8), evaluate(net, x, metrics=metrics, batch_size=8, workers=2)
    assert torch.equal(a.scores['l2'], b.scores['l2']) and list(a) == list(b) and b.bad == []
    files = [p for p in image_files(faces, recursive=True) if p.name != 'text.png']
    c = evaluate(net, faces, 2, metrics, 7, on_error='skip', recursive=True)
    torch.testing.assert_close(c.scores['l2'], per_step(net, load_folder(files, 16), 2, metrics).scores['l2'])
    assert [o['name'] for o in c.bad] == ['b/text.png'] and c[0]['n'] == N
    with pytest.raises(BulkError, match='text.png'): evaluate(net, faces, metrics=metrics, recursive=True)
    assert net.train().training and evaluate(net, x[:2], metrics=metrics) and net.training

def test_three_processes_equal_one(faces, whole, trials):
    tmp, _ = trials
    want = evaluate(model(), faces, 2, dict(l2=l2), 7, on_error='skip', recursive=True)
    for r in range(3):
        scores, bad, n, (differ, refused) = pickle.loads((tmp/f'r{r}').read_bytes())
        assert torch.equal(scores, want.scores['l2']) and bad == want.bad and n == N
        assert 'different pictures' in differ and ('n_steps=3' if r == 0 else 'process 0 could not begin') in refused
    assert done(tmp/'together') == done(whole)

def test_fast_gives_the_same_codes_and_goes_on_where_the_plain_one_stopped(faces, tmp_path):
    net = model()
    a = invert_all(net, faces, tmp_path/'a', **KW)
    b = invert_all(net, faces, tmp_path/'b', fast=True, **KW)
    w = a[:]
    assert (b[:] - w).abs().max() <= 1e-3*w.std()
    torch.testing.assert_close(b.errors, a.errors, rtol=1e-3, atol=1e-6)
    (tmp_path/'a'/'codes-00001.safetensors').unlink()
    assert len(invert_all(net, faces, tmp_path/'a', fast=True, **KW)) == len(a)
