"Bad folders named, broken pictures replaced, workers killed, shards fetched, cut and hostile: the batches stay what they were."
import http.server, io, json, multiprocessing, os, pickle, signal, struct, subprocess, sys, tarfile, threading, time, warnings, zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from restyle_nb import datasets as D
from restyle_nb.datasets import KINDS, PictureFiles, ShardError, Shards, look_over, write_shards
from restyle_nb.images import ImageError, ImageFolder, load_image, loader, save_image, to_float, to_uint8


def packed(im, fmt='PNG', **kw):
    b = io.BytesIO()
    im.save(b, fmt, **kw)
    return b.getvalue()

def picture(i, side=40): return Image.fromarray(np.random.default_rng(i).integers(0, 256, (side//4, side//4, 3), dtype=np.uint8)).resize((side, side))

def fill(folder, n, side=40):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): picture(i, side).save(folder/f'g{i:03d}.png')
    return folder

def bomb(side):
    b = bytearray(packed(Image.new('1', (8,8))))
    b[16:24] = struct.pack('>II', side, side)
    b[29:33] = struct.pack('>I', zlib.crc32(b[12:29]))
    return bytes(b)

def damaged():
    "A PNG whose compressed pixels are wrong in the middle"
    b = bytearray(packed(picture(7)))
    at = b.index(b'IDAT') + 200
    b[at:at+40] = bytes(40)
    return bytes(b)

BAD = dict(empty=('empty.png', lambda: b''), text=('page.jpg', lambda: b'<html>404 not found</html>'), cut=('cut.jpg', lambda: packed(picture(0), 'JPEG')[:700]),
    cutpng=('cut.png', lambda: packed(picture(0))[:-60]), cutwebp=('cut.webp', lambda: packed(picture(0), 'WEBP')[:100]), damaged=('wrong.png', damaged),
    tiff=('nan.png', lambda: packed(Image.fromarray(np.full((20,20), np.nan, np.float32)), 'TIFF')), ownname=('photo.tif', lambda: packed(picture(0), 'TIFF')),
    heic=('phone.jpg', lambda: b'\0\0\0\x18ftypheic\0\0\0\0mif1heic'+bytes(900)), noise=('noise.png', lambda: np.random.default_rng(0).bytes(900)),
    bomb=('bomb.png', lambda: bomb(20_000)), huge=('huge.png', lambda: bomb(10_100)), dot=('dot.png', lambda: packed(Image.new('RGB', (1,1)))),
    jfif=('photo.jfif', lambda: packed(picture(0), 'JPEG')))
WORDS = dict(empty='empty', text='text', cut='cut short', cutpng='cut short', cutwebp='cut short', damaged='damaged', tiff='foreign', ownname='foreign', heic='foreign',
    noise='no picture', bomb='huge', huge='huge', dot='tiny', jfif='passed over')

@pytest.fixture
def hostile(tmp_path):
    "200 good pictures among bad ones of every kind that needs no rights"
    folder = fill(tmp_path/'pics', 200)
    for name,make in BAD.values(): (folder/name).write_bytes(make())
    (folder/'folder.png').mkdir()
    (folder/'gone.png').symlink_to(tmp_path/'nowhere.png')
    os.mkfifo(folder/'pipe.png')
    (folder/'labels.csv').write_text('a,b')
    (folder/'.hidden.png').write_text('no')
    return folder


def test_every_bad_file_is_named(hostile):
    r = look_over(hostile)
    found = {o.path.name: o.kind for o in r.bad}
    assert found == {name: WORDS[k] for k,(name,_) in BAD.items()} | {'folder.png': 'folder', 'gone.png': 'broken link', 'pipe.png': 'no file'}
    assert len(set(found.values())) >= 12
    assert [p.name for p in r.good] == [f'g{i:03d}.png' for i in range(200)] and r.others == 1
    for o in r.bad:
        line = str(o)
        assert o.path.name in line and KINDS[o.kind][1] in line and KINDS[o.kind][2] in line and '\n' not in line
    for text in (repr(r), r._repr_markdown_()):
        assert '200 can be used, 17 cannot' in text and all(k in text for k in found.values()) and 'nan.png (TIFF)' in text
    assert 'TIFF' in str(next(o for o in r.bad if o.path.name == 'nan.png')) and '20000x20000' not in str(r.bad[0])
    with pytest.raises(ImageError, match='17 of 217') as e: r.insist()
    assert str(hostile) in str(e.value)

def test_training_runs_on_the_rest_or_refuses(hostile):
    from restyle_nb.losses import Objective
    from restyle_nb.training import Trainer
    from test_training import world
    net,_ = world()
    r = look_over(hostile)
    sets = dict(report=PictureFiles(r.good, 32), lazy=PictureFiles(hostile, 32, on_error='skip'), folder=ImageFolder(hostile, 32, on_error='skip'))
    assert [len(o) for o in sets.values()] == [200, 212, 201]  # decoders do not see that bytes of a PNG are wrong
    for data in sets.values():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            t = Trainer(net, data, Objective(lpips=0), batch_size=50, n_steps=1, iterations=5, log_every=1)
            t.fit(progress=False)
        assert t.iteration == 5 and all(np.isfinite(row['loss']).all() for row in t.history.of('train'))
    assert {Path(k).name for k in sets['lazy'].skipped} == {o.path.name for o in r.bad} - {'folder.png', 'gone.png', 'pipe.png', 'photo.tif', 'photo.jfif', 'wrong.png'}
    with pytest.raises(ImageError, match='bomb.png'): ImageFolder(hostile, 32)
    lazy = loader(PictureFiles(hostile, 32), 50)
    with pytest.raises(ImageError, match='png|jpg|webp'): [lazy.batch(p) for p in range(5)]

def test_no_permission(tmp_path):
    import shutil, tempfile
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        fill(folder, 2)
        (folder/'g000.png').chmod(0)
        (folder/'g001.png').chmod(0o644)
        root = os.geteuid() == 0
        if root: os.seteuid(65534)
        try: r = look_over(folder)
        finally:
            if root: os.seteuid(0)
        assert [(o.path.name, o.kind) for o in r.bad] == [('g000.png', 'no permission')] and len(r.good) == 1
    finally: shutil.rmtree(folder)

def test_odd_pictures_are_named_and_used(tmp_path):
    folder, im = fill(tmp_path, 12), picture(99)
    clear = im.copy()
    clear.putalpha(100)
    odd = {'named.png': (packed(im, 'JPEG'), 'wrong suffix'), 'film.gif': (packed(im, 'GIF', save_all=True, append_images=[picture(3)]), 'animated'),
        'film.webp': (packed(im, 'WEBP', save_all=True, append_images=[picture(3)]), 'animated'),
        'deep.png': (packed(Image.fromarray((np.random.default_rng(5).integers(0, 65535, (40,40))).astype(np.uint16))), '16 bit'),
        'ink.jpg': (packed(picture(5).convert('CMYK'), 'JPEG'), 'CMYK'), 'clear.png': (packed(clear), 'alpha'),
        'grey.png': (packed(picture(6).convert('L')), 'grey'), 'blank.png': (packed(Image.new('RGB', (40,40), 'red')), 'blank'),
        'small.png': (packed(picture(8, 16)), 'small'), 'long.png': (packed(picture(9).resize((40,200))), 'long'), 'zcopy.png': ((folder/'g000.png').read_bytes(), 'copy')}
    for name,(b,_) in odd.items(): (folder/name).write_bytes(b)
    r = look_over(folder)
    assert not r.bad and len(r.good) == 23 and r.insist() is r
    assert (r.size, r.channels) == (32, 3)
    for name,(_,kind) in odd.items(): assert name in [p.name for p in r.odd[kind]], (name, kind, r.odd)
    assert [p.name for p in r.odd['copy']] == ['zcopy.png'] and [p.name for p in r.odd['small']] == ['small.png']
    assert len(look_over(folder, size=64).odd['small']) == 23
    everywhere = {p.name for paths in r.odd.values() for p in paths}
    assert everywhere == set(odd)

def test_an_iphone_jpeg_is_no_film(tmp_path):
    picture(1).save(tmp_path/'a.jpg', 'MPO', save_all=True, append_images=[picture(2)])
    r = look_over(tmp_path)
    assert len(r.good) == 1 and not r.odd

def test_grey_sets_ask_for_one_channel(tmp_path):
    for i in range(20): picture(i).convert('L').convert('RGB' if i % 2 else 'L').save(tmp_path/f'{i:02d}.png')
    picture(3).save(tmp_path/'z.png')
    r = look_over(tmp_path)
    assert r.channels == 1 and [p.name for p in r.odd['colour']] == ['z.png'] and 'grey' not in r.odd

def test_look_over_says_the_same_from_workers_and_lists(hostile):
    r = look_over(hostile)
    assert repr(look_over(hostile, workers=2)) == repr(r)
    again = look_over(r.good)
    assert again.good == r.good and not again.bad
    with pytest.raises(ImageError, match='no such folder'): look_over(hostile/'nobody')
    (hostile/'deep').mkdir()
    (hostile/'deep'/'a.png').write_bytes(packed(picture(500)))
    assert len(look_over(hostile, recursive=True).good) == 201 and len(look_over(hostile).good) == 200

def test_turned_pictures_are_measured_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path/'a.jpg').write_bytes(packed(picture(0).resize((40,80)), 'JPEG', exif=exif))
    o = look_over(tmp_path).looks[0]
    assert (o.height, o.width) == (40, 80)

def test_shared_pictures(tmp_path):
    a,b = look_over(fill(tmp_path/'a', 5)),look_over(fill(tmp_path/'b', 3))
    assert [(x.name, y.name) for x,y in b.shared(a)] == [(f'g{i:03d}.png',)*2 for i in range(3)]
    (tmp_path/'c').mkdir()
    picture(77).save(tmp_path/'c'/'x.png')
    assert look_over(tmp_path/'c').shared(a) == []

def test_empty_folder(tmp_path):
    r = look_over(tmp_path)
    assert r.good == [] and r.size is None and '0 picture files' in repr(r) and r._repr_markdown_() == r.summary


def test_files_equal_the_folder_in_memory(tmp_path):
    fill(tmp_path/'p', 7)
    picture(50).save(tmp_path/'p'/'deep.webp')
    a,b = PictureFiles(tmp_path/'p', 24),ImageFolder(tmp_path/'p', 24)
    assert len(a) == 8 and torch.equal(torch.stack(list(a)), to_float(b.data)) and torch.equal(a[-1], b[-1])
    with pytest.raises(IndexError): a[8]
    for p in range(5): assert torch.equal(loader(a, 3, seed=2, flip=True).batch(p), loader(b, 3, seed=2, flip=True).batch(p))
    with pytest.raises(ImageError, match='empty'): PictureFiles([], 24)

@pytest.mark.parametrize('workers', [0, 2])
def test_a_picture_that_breaks_or_vanishes_during_the_run(tmp_path, workers):
    fill(tmp_path, 10)
    want = ImageFolder(tmp_path, 24)
    data = PictureFiles(tmp_path, 24, on_error='skip')
    it = loader(data, 5, seed=1, workers=workers)
    assert torch.equal(it.batch(0), loader(want, 5, seed=1).batch(0))
    (tmp_path/'g003.png').unlink()
    (tmp_path/'g004.png').write_bytes(b'broken')
    (tmp_path/'g009.png').write_bytes(b'broken')
    moved = to_float(want.data)[[0,1,2,5,5,5,6,7,8,0]]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        for p in range(10, 16): assert torch.equal(it.batch(p), loader(moved, 5, seed=1).batch(p))
    assert {Path(k).name for k in data.skipped} == {'g003.png', 'g004.png', 'g009.png'}
    assert 'no such file' in data.skipped[str(tmp_path/'g003.png')]
    assert len(heard) == 1 and 'takes its place' in str(heard[0].message)

    strict = loader(PictureFiles(sorted(tmp_path.iterdir()) + [tmp_path/'g003.png'], 24), 5, workers=workers)
    with pytest.raises(ImageError, match='g003|g004|g009'): [strict.batch(p) for p in range(2)]

def test_a_function_hears_of_each_bad_picture_once(tmp_path):
    fill(tmp_path, 6)
    (tmp_path/'g001.png').write_bytes(b'x')
    (tmp_path/'g002.png').write_bytes(b'x')
    for workers in (0, 2):
        heard = []
        it = loader(PictureFiles(tmp_path, 24, on_error=lambda p,e: heard.append((Path(p).name, str(e)))), 6, workers=workers)
        for p in range(6): it.batch(p)
        assert sorted(n for n,_ in heard) == ['g001.png', 'g002.png'] and all(n in e for n,e in heard)

def test_a_lost_disk_is_no_bad_picture(tmp_path):
    fill(tmp_path, 3)
    data = PictureFiles(tmp_path, 24, on_error='skip')
    for p in tmp_path.iterdir(): p.unlink()
    with pytest.warns(UserWarning, match='takes its place'), pytest.raises(ImageError, match='is their disk still there'): data[1]


@pytest.mark.parametrize('batch', [1, 3, 9])
def test_workers_give_the_same_batches(tmp_path, batch):
    data = PictureFiles(fill(tmp_path, 7), 24)
    a,b = loader(data, batch, seed=4, flip=True),loader(data, batch, seed=4, flip=True, workers=3)
    for p in (0, 1, 2, 3, 4, 2, 9, 10, 0): assert torch.equal(a.batch(p), b.batch(p))
    assert torch.equal(b.batch(3, slice(0, 1)), a.batch(3)[:1]) and torch.equal(b.batch(4), a.batch(4))
    b.position = 5
    assert torch.equal(next(b), a.batch(5)) and b.position == 6

def test_rows_read_no_other_picture(tmp_path, monkeypatch):
    data = PictureFiles(fill(tmp_path, 9), 24)
    it = loader(data, 8, flip=True)
    whole, n = it.batch(1), []
    monkeypatch.setattr(D, 'load_image', lambda *a: n.append(1) or load_image(*a))
    parts = [it.batch(1, slice(k, k + 2)) for k in range(0, 8, 2)]
    assert torch.equal(torch.cat(parts), whole) and len(n) == 8

def test_floats_that_are_no_levels_pass_workers_unharmed():
    data = list(torch.randn(5, 1, 8, 8))
    assert torch.equal(loader(data, 3, workers=1).batch(2), loader(data, 3).batch(2))

def test_tensors_need_no_workers():
    it = loader(torch.zeros(4, 1, 8, 8), 2, workers=2)
    it.batch(0)
    assert it.workers == 0 and it.ahead is None

def test_killed_workers_lose_nothing(tmp_path):
    data = PictureFiles(fill(tmp_path, 7, 120), 24)
    a,b = loader(data, 3, seed=4, flip=True),loader(data, 3, seed=4, flip=True, workers=2)
    rng = np.random.default_rng(0)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        for p in range(40):
            assert torch.equal(b.batch(p), a.batch(p))
            if p % 4 == 0:
                time.sleep(rng.random()*.01)
                os.kill(b.ahead.crew[rng.integers(2)][0].pid, signal.SIGKILL)
    assert sum('killed' in str(o.message) for o in heard) == 1

def test_training_with_workers_is_training(tmp_path):
    from restyle_nb.losses import Objective
    from restyle_nb.training import Trainer
    from test_training import weights, world
    fill(tmp_path, 9)
    ends = []
    for workers in (0, 2):
        t = Trainer(world()[0], PictureFiles(tmp_path, 32), Objective(lpips=0), batch_size=4, n_steps=2, iterations=6, log_every=2, flip=True, workers=workers)
        t.fit(progress=False)
        ends.append(weights(t))
    assert t.loader.ahead is not None and torch.equal(*ends)

def test_workers_that_always_die_are_told_of():
    class Deadly(list):
        def __getitem__(self, i): os._exit(1)
    with pytest.warns(UserWarning, match='killed'), pytest.raises(ImageError, match='three times'): loader(Deadly([0]*4), 2, workers=1).batch(0)

def test_errors_of_workers_arrive(tmp_path):
    class Wrong(list):
        def __getitem__(self, i): raise KeyError('my own mistake')
    it = loader(Wrong([0]*4), 2, workers=1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match='my own mistake'): it.batch(0)

def test_no_worker_outlives_its_run(tmp_path):
    code = f'''
import os, sys, time
from restyle_nb.datasets import PictureFiles
from restyle_nb.images import loader
it = loader(PictureFiles({str(fill(tmp_path, 4))!r}, 24), 2, workers=3)
it.batch(0)
print(*[c[0].pid for c in it.ahead.crew], flush=True)
time.sleep(60)'''
    run = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, cwd=Path(D.__file__).parent.parent)
    pids = [int(o) for o in run.stdout.readline().split()]
    assert len(pids) == 3
    run.kill()
    run.wait()
    alive = lambda pid: os.path.exists(f'/proc/{pid}') and open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[0] != 'Z'
    for _ in range(100):
        if not any(map(alive, pids)): return
        time.sleep(.05)
    pytest.fail('workers are still there')


@pytest.fixture
def shards(tmp_path):
    fill(tmp_path/'pics', 23)
    write_shards(tmp_path/'pics', tmp_path/'shards', per_shard=5)
    return tmp_path/'shards'

def test_shards_hold_every_picture_once(tmp_path, shards):
    assert sorted(p.name for p in shards.iterdir()) == ['index.json'] + [f'shard-{i:05d}.tar' for i in range(5)]
    data,want = Shards(shards, 24),ImageFolder(tmp_path/'pics', 24)
    names = [data.name(i) for i in range(23)]
    assert len(data) == 23 and sorted(n.split('/')[1] for n in names) == [p.name for p in want.paths]
    for i,n in enumerate(names): assert torch.equal(data[i], want[int(n[-7:-4])])
    assert torch.equal(data[-1], data[22])
    for src in (shards/'index.json', str(shards/'shard-*.tar'), sorted(shards.glob('*.tar')), str(shards)+'/shard-{00000..00004}.tar'):
        again = Shards(src, 24)
        assert len(again) == 23 and [again.name(i) for i in range(23)] == names
    assert len(Shards(shards/'shard-00004.tar', 24)) == 3
    kept = Shards(write_shards(tmp_path/'pics', tmp_path/'inorder', per_shard=10, seed=None), 24)
    assert [kept.name(i).split('/')[1] for i in range(23)] == [p.name for p in want.paths]

def test_webdataset_reads_ours_and_we_read_its(tmp_path, shards):
    wds = pytest.importorskip('webdataset')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        there = {s['__key__']: s['png'] for s in wds.WebDataset(sorted(map(str, shards.glob('*.tar'))), shardshuffle=False)}
    assert there == {p.stem: p.read_bytes() for p in (tmp_path/'pics').iterdir()}
    with wds.TarWriter(str(tmp_path/'its.tar')) as t:
        for i in range(4): t.write({'__key__': f'a/{i}', 'jpg': packed(picture(i), 'JPEG'), 'json': {'i': i}, 'cls': i})
    data = Shards(tmp_path/'its.tar', 24)
    assert len(data) == 4 and torch.equal(data[2], to_float(to_uint8(load_image(packed(picture(2), 'JPEG'), 24))))

def test_writing_is_repeatable_and_names_are_kept_apart(tmp_path):
    fill(tmp_path/'a', 1)
    for n in ('x.1.png', 'x_1.png', 'x.1.jpg', 'sub/x.1.png'):
        (tmp_path/'a'/n).parent.mkdir(exist_ok=True)
        (tmp_path/'a'/n).write_bytes(packed(picture(3)))
    one,two = (write_shards(tmp_path/'a', tmp_path/k, recursive=True) for k in 'bc')
    assert (tmp_path/'b'/'shard-00000.tar').read_bytes() == (tmp_path/'c'/'shard-00000.tar').read_bytes() and one.read_text() == two.read_text()
    names = {Shards(one, 24).name(i).split('/', 1)[1] for i in range(5)}
    assert len(names) == 5 and {'g000.png', 'sub/x_1.png'} < names and len({n.rsplit('.', 1)[0] for n in names}) == 5
    with pytest.raises(ImageError, match='nobody.png: cannot be read'): write_shards([tmp_path/'nobody.png'], tmp_path/'d')
    assert not list((tmp_path/'d').iterdir())

def test_order_keeps_shards_together(tmp_path):
    fill(tmp_path/'pics', 60, 16)
    data = Shards(write_shards(tmp_path/'pics', tmp_path/'s', per_shard=5), 16, mix=3)
    orders = [data.order(0, e) for e in range(3)] + [data.order(1, 0)]
    for o in orders: assert o.sort().values.tolist() == list(range(60))
    assert len({tuple(o.tolist()) for o in orders}) == 4 and torch.equal(orders[0], data.order(0, 0))
    for o in orders: assert all(len(set((part//5).tolist())) == 3 for part in o.split(15))
    it = loader(data, 4, seed=0)
    assert torch.equal(torch.cat([it.indices(p) for p in range(15)]), orders[0])
    assert torch.equal(loader(data, 4, seed=0, workers=2, flip=True).batch(3), loader(data, 4, seed=0, flip=True).batch(3))

def test_bad_members_are_pictures_like_others(tmp_path):
    fill(tmp_path/'p', 5)
    (tmp_path/'p'/'g002.png').write_bytes(b'broken')
    index = write_shards(tmp_path/'p', tmp_path/'s', seed=None)
    with pytest.raises(ImageError, match='shard-00000.tar/g002.png: not a picture'): Shards(index, 24)[2]
    data = Shards(index, 24, on_error='skip')
    with pytest.warns(UserWarning, match='takes its place'): x = data[2]
    assert torch.equal(x, data[3]) and list(data.skipped) == ['shard-00000.tar/g002.png']

def test_shards_are_only_looked_at(tmp_path):
    "Pickles, links, devices and hidden members are no pictures; a path that climbs out of the folder is a name like any other."
    class Trap:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/trapped',)
    with tarfile.open(tmp_path/'t.tar', 'w') as t:
        def put(name, b=b'', **kw):
            info = tarfile.TarInfo(name)
            info.size = len(b)
            for k,v in kw.items(): setattr(info, k, v)
            t.addfile(info, io.BytesIO(b))
        for n in ('a.pyd', 'a.pkl', 'a.pickle', 'a.pth', 'a.npy'): put(n, pickle.dumps(Trap()))
        put('../../out.png', packed(picture(1)))
        put('.hidden.png', packed(picture(1)))
        put('link.png', type=tarfile.SYMTYPE, linkname='/etc/passwd')
        put('hard.png', type=tarfile.LNKTYPE, linkname='../../out.png')
        put('dev.png', type=tarfile.CHRTYPE)
        put('trap.png', pickle.dumps(Trap()))
    data = Shards(tmp_path/'t.tar', 24)
    assert [data.name(i) for i in range(len(data))] == ['t.tar/../../out.png', 't.tar/trap.png']
    assert torch.equal(data[0], to_float(to_uint8(load_image(picture(1), 24))))
    with pytest.raises(ImageError, match='not a picture'): data[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['t.tar']

def test_a_tar_that_points_back_ends(tmp_path):
    b = bytearray(tarfile.TarInfo('a.png').tobuf())
    b[124:136] = b'\xff'*10 + (2**16 - 512).to_bytes(2, 'big')  # -512
    b[148:156] = b'%06o\0 ' % (sum(b[:148]) + sum(b[156:512]) + 8*32)
    (tmp_path/'a.tar').write_bytes(bytes(b) + bytes(1024))
    with pytest.raises(ShardError, match='a.tar: not a whole'): Shards(tmp_path/'a.tar', 24)

@pytest.mark.parametrize('src', ['pipe:touch {}/ran', 'pipe:cat x.tar', 's3://bucket/a.tar', 'file:///etc/passwd'])
def test_no_command_is_run(tmp_path, src):
    index = tmp_path/'index.json'
    index.write_text(json.dumps(dict(shardlist=[dict(url=src.format(tmp_path), nsamples=3)])))
    for s in (src.format(tmp_path), index):
        with pytest.raises(ShardError, match='give fetch'): Shards(s, 24, cache=tmp_path/'c')[0]
    assert not (tmp_path/'ran').exists()

def test_broken_shards_are_named_and_never_skipped(tmp_path, shards):
    tar = shards/'shard-00001.tar'
    whole = tar.read_bytes()
    tar.write_bytes(whole[:2000])
    with pytest.raises(ShardError, match='shard-00001.tar'): [Shards(shards, 24, on_error='skip')[i] for i in range(23)]
    tar.write_bytes(whole)
    tar.rename(shards/'gone')
    with pytest.raises(ShardError, match='shard-00001.tar: cannot be opened'): [Shards(shards, 24, on_error='skip')[i] for i in range(23)]
    (shards/'shard-00002.tar').rename(tar)
    (shards/'shard-00004.tar').rename(shards/'shard-00002.tar')
    with pytest.raises(ShardError, match='index says 5 pictures, the shard holds 3'): [Shards(shards, 24)[i] for i in range(23)]
    (shards/'index.json').write_text('{"shardlist": 3')
    with pytest.raises(ShardError, match='no index'): Shards(shards, 24)
    with pytest.raises(ShardError, match='no shards here'): Shards(tmp_path/'pics', 24)
    with tarfile.open(tmp_path/'z.tar', 'w:gz') as t: t.add(tmp_path/'pics'/'g000.png', 'g.png')
    with pytest.raises(ShardError, match='uncompressed'): Shards(tmp_path/'z.tar', 24)
    with tarfile.open(tmp_path/'e.tar', 'w'): pass
    with pytest.raises(ShardError, match='no pictures'): Shards(tmp_path/'e.tar', 24)


class Quiet(http.server.SimpleHTTPRequestHandler):
    asked, cut = [], set()
    def log_message(self, *a): pass
    def do_GET(self):
        name = self.path.rsplit('/', 1)[-1]
        self.asked.append(name)
        if name not in self.cut: return super().do_GET()
        self.cut.discard(name)
        self.send_response(200)
        self.send_header('Content-Length', '99999')
        self.end_headers()
        self.wfile.write(b'x'*1000)

@pytest.fixture
def served(shards):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=shards))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Quiet.asked, Quiet.cut = [], set()
    yield f'http://127.0.0.1:{server.server_port}', Quiet
    server.shutdown()
    server.server_close()

def test_remote_shards_come_once_and_the_cache_stays_small(tmp_path, shards, served):
    url,web = served
    local,size = Shards(shards, 24),(shards/'shard-00000.tar').stat().st_size
    data = Shards(f'{url}/index.json', 24, mix=2, cache=tmp_path/'c', limit=3*size)
    assert len(data) == 23 and web.asked == ['index.json']
    for i in data.order(3, 0).tolist():
        assert torch.equal(data[i], local[i])
        assert sum(f.stat().st_size for f in (tmp_path/'c').glob('*.tar')) <= 3*size
    assert sorted(web.asked[1:]) == [f'shard-{i:05d}.tar' for i in range(5)] and data.fetched == 5
    again = Shards(f'{url}/index.json', 24, mix=2, cache=tmp_path/'c', limit=3*size)
    held = {p.name[13:] for p in (tmp_path/'c').glob('*.tar')}
    for k in range(5):
        if f'shard-{k:05d}.tar' in held: again[5*k]
    assert again.fetched == 0 and held
    with pytest.warns(UserWarning, match='again and again'): Shards(f'{url}/index.json', 24, mix=3, cache=tmp_path/'c', limit=3*size)

def test_workers_share_one_cache(tmp_path, shards, served):
    url,web = served
    data = Shards(f'{url}/index.json', 24, cache=tmp_path/'c')
    a,b = loader(data, 5, seed=3, workers=3),loader(Shards(shards, 24), 5, seed=3)
    for p in range(9): assert torch.equal(a.batch(p), b.batch(p))
    assert sorted(web.asked) == ['index.json'] + [f'shard-{i:05d}.tar' for i in range(5)]

def test_a_download_that_breaks_off_is_tried_again(tmp_path, shards, served, monkeypatch):
    url,web = served
    monkeypatch.setattr(D.time, 'sleep', lambda s: None)
    web.cut = {'shard-00000.tar'}
    data = Shards(f'{url}/index.json', 24, cache=tmp_path/'c')
    assert torch.equal(data[0], Shards(shards, 24)[0]) and web.asked.count('shard-00000.tar') == 2
    (shards/'shard-00001.tar').unlink()
    with pytest.raises(ShardError, match='shard-00001.tar: cannot be fetched'): data[5]
    assert web.asked.count('shard-00001.tar') == 3 and not list((tmp_path/'c').glob('*.part'))

def test_shards_do_with_what_windows_has(tmp_path, shards, served, monkeypatch):
    "No `pread`, no lock between processes, no touching of an open file, and none of them can be deleted"
    url,unlink = served[0],Path.unlink
    def kept(path, **kw):
        if path.suffix == '.tar': raise PermissionError(13, 'somebody reads it', str(path))
        return unlink(path, **kw)
    monkeypatch.delattr(os, 'pread', raising=False)
    monkeypatch.setattr(os, 'supports_fd', os.supports_fd - {os.utime})
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    monkeypatch.setattr(Path, 'unlink', kept)
    want = [o.clone() for o in Shards(shards, 24)]
    data = Shards(f'{url}/index.json', 24, mix=3, cache=tmp_path/'c', limit=5*(shards/'shard-00000.tar').stat().st_size - 1)
    for i in range(23): assert torch.equal(data[i], want[i])
    assert data.fetched == 5 and len(list((tmp_path/'c').glob('*.tar'))) == 5   # more than the limit, since none could go
    with ThreadPoolExecutor(4) as pool: assert all(pool.map(lambda i: torch.equal(data[i % 23], want[i % 23]), range(230)))

def test_remote_shards_without_an_index_are_counted(tmp_path, shards, served):
    url,web = served
    with pytest.warns(UserWarning, match='no index'): data = Shards(url+'/shard-{00000..00004}.tar', 24, cache=tmp_path/'c')
    assert len(data) == 23 and torch.equal(data[22], Shards(shards, 24)[22])

def test_any_store_by_a_function(tmp_path, shards):
    with pytest.warns(UserWarning, match='no index'): data = Shards([f's3://mine/shard-{i:05d}.tar' for i in range(5)], 24, cache=tmp_path/'c', fetch=lambda u: open(shards/u.rsplit('/', 1)[1], 'rb'))
    assert len(data) == 23 and torch.equal(data[9], Shards(shards, 24)[9])

def test_import_is_light():
    code = 'import sys, restyle_nb.datasets; print([m for m in ("webdataset", "braceexpand", "matplotlib", "concurrent.futures.process") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=Path(D.__file__).parent.parent).stdout.strip() == '[]'
