"What is no lesson about pictures: every kind of file, bad input, limits of memory, resuming."
import io, os, struct, subprocess, sys, zlib
from pathlib import Path
import numpy as np, pytest, torch
import torch.nn.functional as F
from PIL import Image
from restyle_nb import images as I
from restyle_nb.images import (CARS, Geometry, ImageError, ImageFolder, atomic_write, film_strip, grid, image_files, load_folder, load_image,
    loader, make_folder, read_sheet, save_image, to_float, to_pil, to_uint8, write_sheet)


def packed(im, fmt='PNG', **kw):
    b = io.BytesIO()
    im.save(b, fmt, **kw)
    return b.getvalue()

def one_line(f, *needles):
    with pytest.raises(ImageError) as e: f()
    assert '\n' not in str(e.value) and len(str(e.value)) < 400
    for n in needles: assert n in str(e.value), str(e.value)

@pytest.fixture
def rgb(): return Image.fromarray(np.stack([np.tile(np.linspace(0, 250, 56), (40,1)), np.tile(np.linspace(0, 250, 40)[:,None], (1,56)), np.full((40,56), 90)], -1).astype(np.uint8))

@pytest.fixture
def folder(tmp_path):
    g = torch.Generator().manual_seed(3)
    for i in range(7): save_image(torch.rand(3, 20+i, 24, generator=g)*2-1, tmp_path/f'{i}.png')
    return tmp_path


@pytest.mark.parametrize('fmt,kw,tol', [('PNG',{},0), ('BMP',{},0), ('WEBP',dict(lossless=True),0), ('WEBP',dict(quality=95),.15), ('JPEG',dict(quality=95),.1)])
def test_formats(rgb, tmp_path, fmt, kw, tol):
    want = to_float(torch.from_numpy(np.array(rgb)).permute(2,0,1))
    p = tmp_path/f'a.{fmt.lower()}'
    p.write_bytes(packed(rgb, fmt, **kw))
    for src in (p, str(p), p.read_bytes(), io.BytesIO(p.read_bytes()), Image.open(p), np.array(Image.open(p))):
        x = load_image(src)
        assert x.shape == (3,40,56) and x.dtype == torch.float32 and x.is_contiguous()
        assert (x-want).abs().mean() <= tol
    assert load_image(p, channels=1).shape == (1,40,56)
    assert load_image(p, channels=4)[3].eq(1).all()

def test_grey_and_bilevel(rgb):
    x = load_image(packed(rgb.convert('L')))
    assert torch.equal(x[0], x[1]) and torch.equal(x[:1], load_image(packed(rgb.convert('L')), channels=1))
    b = load_image(packed(rgb.convert('1')))
    assert set(b.unique().tolist()) == {-1., 1.}

@pytest.mark.parametrize('size', [None, (40,56), 24])
def test_16_bits_keep_their_levels(size):
    a = (np.arange(40*56).reshape(40,56)*29).astype(np.uint16)
    x = load_image(packed(Image.fromarray(a)), size=size)
    assert x.shape == (3, *((24,24) if size == 24 else (40,56)))
    if size == 24: return
    assert torch.allclose(x[0].double(), torch.from_numpy(a/65535*2-1), atol=1e-6)
    assert len(x[0].unique()) > 2000
    assert load_image(a, channels=4)[3].eq(1).all()

def test_16_bits_colour_array():
    a = np.full((10,12,3), 65535, np.uint16)
    assert load_image(a).eq(1).all()

def test_palette_with_transparency(rgb):
    p = rgb.quantize(16)
    top = p.getpixel((0,0))
    x = load_image(packed(p, transparency=top))
    clear = torch.from_numpy(np.array(p) == top)
    assert x[:, clear].eq(1).all() and not x[:, ~clear].eq(1).all()

def test_rgba_on_white():
    a = np.zeros((16,16,4), np.uint8)
    a[:8,:,3] = 255
    a[8:,:,3] = 51
    for im in (Image.fromarray(a), Image.fromarray(a).convert('LA')):
        x = load_image(packed(im))
        assert x[:,:8].eq(-1).all()
        assert torch.allclose(x[:,8:], torch.tensor(204/127.5-1), atol=.01)
    assert load_image(packed(Image.fromarray(a)), channels=4)[3,8:].sub(51/127.5-1).abs().max() < 1e-6

def test_rgb_with_transparent_colour(rgb):
    x = load_image(packed(rgb, transparency=rgb.getpixel((5,5))))
    assert x[:,5,5].eq(1).all()

def test_cmyk(rgb):
    x = load_image(packed(rgb.convert('CMYK'), 'JPEG', quality=98))
    want = to_float(torch.from_numpy(np.array(rgb)).permute(2,0,1))
    assert (x-want).abs().mean() < .05

@pytest.mark.parametrize('o', range(1, 9))
@pytest.mark.parametrize('fmt,kw', [('PNG',{}), ('WEBP',dict(lossless=True)), ('JPEG',dict(quality=100, subsampling=0))])
@pytest.mark.parametrize('size', [None, (20,28), 17])
def test_exif(rgb, o, fmt, kw, size):
    stored = {1:lambda a:a, 2:np.fliplr, 3:lambda a:np.rot90(a,2), 4:np.flipud, 5:lambda a:a.transpose(1,0,2), 6:lambda a:np.rot90(a,1),
              7:lambda a:np.rot90(a.transpose(1,0,2),2), 8:lambda a:np.rot90(a,-1)}[o](np.array(rgb))
    exif = Image.Exif()
    exif[274] = o
    x = load_image(packed(Image.fromarray(np.ascontiguousarray(stored)), fmt, exif=exif, **kw), size=size)
    y = load_image(rgb, size=size)
    assert x.shape == y.shape and (x-y).abs().max() <= (.13 if fmt == 'JPEG' else .009)

def test_bad_exif_is_ignored(rgb): assert load_image(packed(rgb, 'JPEG', exif=b'Exif\x00\x00rubbish')).shape == (3,40,56)

def test_first_frame_of_an_animation(rgb):
    b = packed(rgb, 'WEBP', save_all=True, append_images=[rgb.transpose(Image.Transpose.ROTATE_180)], lossless=True)
    assert torch.equal(load_image(b), load_image(rgb))

def test_users_picture_is_left_alone():
    im = Image.open(io.BytesIO(packed(Image.new('RGB', (2400,2000)), 'JPEG')))
    load_image(im, 64)
    assert im.size == (2400,2000)

def test_large_jpeg_in_draft():
    a = np.kron(np.random.default_rng(0).integers(0, 255, (24,32,3)), np.ones((100,100,1))).astype(np.uint8)
    x,y = load_image(packed(Image.fromarray(a), 'JPEG', quality=95), 64), load_image(packed(Image.fromarray(a), compress_level=1), 64)
    assert (x-y).abs().mean() < .05

def test_sizes(rgb):
    assert load_image(rgb, (10,40)).shape == (3,10,40)
    assert load_image(rgb, 100).shape == (3,100,100)
    assert load_image(rgb, (40,56)).equal(load_image(rgb))
    assert (load_image(rgb, 16) - I.fit_to(load_image(rgb), 16)).abs().max() < .01

def test_tensors():
    x = torch.rand(3,20,20)*2-1
    assert load_image(x).equal(x) and load_image(x[None], 10).shape == (3,10,10)
    assert load_image(to_uint8(x)).sub(x).abs().max() < .005
    assert load_image(x[:1]).shape == (3,20,20)
    one_line(lambda: load_image(torch.rand(4,3,20,20)), '(4, 3, 20, 20)')
    one_line(lambda: load_image(torch.rand(3,1,1)), 'too small')


def test_bad_files(tmp_path, rgb):
    (tmp_path/'text.png').write_text('Dear diary')
    (tmp_path/'empty.jpg').write_bytes(b'')
    (tmp_path/'cut.jpg').write_bytes(packed(rgb, 'JPEG')[:700])
    (tmp_path/'cut.png').write_bytes(packed(rgb)[:-60])
    (tmp_path/'cut.webp').write_bytes(packed(rgb, 'WEBP')[:150])
    (tmp_path/'dot.png').write_bytes(packed(Image.new('RGB', (1,1))))
    for name,why in [('text.png','PNG, JPEG or WebP'), ('empty.jpg','PNG, JPEG or WebP'), ('cut.jpg','cut short'), ('cut.png','cut short'),
                     ('cut.webp',''), ('dot.png','at least 8x8'), ('missing.png','no such file')]:
        for size in (None, 16): one_line(lambda: load_image(tmp_path/name, size), name, why)
    one_line(lambda: load_image(tmp_path), 'folder')
    one_line(lambda: load_image('x'*300), 'xxx')
    one_line(lambda: load_image('a\0b'), '')

def test_every_cut_of_a_file_is_an_imageerror(rgb):
    for fmt in ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP'):
        b = packed(rgb, fmt)
        for n in range(0, len(b), 37):
            try: load_image(b[:n], 16)
            except ImageError: pass

def test_too_many_pixels(tmp_path, capfd):
    for side in (10_100, 20_000):
        b = bytearray(packed(Image.new('1', (8,8))))
        b[16:24] = struct.pack('>II', side, side)
        b[29:33] = struct.pack('>I', zlib.crc32(b[12:29]))
        (tmp_path/'huge.png').write_bytes(b)
        one_line(lambda: load_image(tmp_path/'huge.png', 64), 'huge.png', '100 million')
    assert capfd.readouterr().err == ''

def test_8000_square_fits_in_memory(tmp_path):
    "Under 1.5 GB with everything imported; a few seconds."
    for mode in ('RGB', 'RGBA'): Image.new(mode, (8000,8000)).save(tmp_path/f'{mode}.png', compress_level=1)
    code = f'''import re
from restyle_nb.images import load_image
print(load_image({str(tmp_path/'RGBA.png')!r}, 256).shape[-1], load_image({str(tmp_path/'RGB.png')!r}).shape[-1])
try: print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])
except OSError: print(0)'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(I.__file__).parent.parent, check=True).stdout.split()
    assert out[:2] == ['256', '4096']
    if sys.platform == 'linux': assert int(out[2]) < 1.5e6, f'{int(out[2])/1e6:.2f} GB'

def test_long_pictures_shrink_without_a_size(tmp_path):
    assert load_image(packed(Image.new('L', (8192,100)))).shape == (3,50,4096)
    assert load_image(packed(Image.new('L', (4096,10)))).shape == (3,10,4096)
    assert load_image(packed(Image.new('L', (10_000,8)))).shape == (3,8,4096)
    exif = Image.Exif()
    exif[274] = 6
    assert load_image(packed(Image.new('L', (8192,100)), exif=exif)).shape == (3,4096,50)

def test_webp_bound(tmp_path):
    Image.new('RGB', (6400,6400)).save(tmp_path/'a.webp', method=0, quality=1)
    one_line(lambda: load_image(tmp_path/'a.webp', 64), 'a.webp', '40 million', 'JPEG')

def test_8000_square_jpeg(tmp_path):
    p = tmp_path/'big.jpg'
    Image.new('RGB', (8000,8000), (10,20,30)).save(p)
    assert load_image(p, 64).shape == (3,64,64)


def test_image_files(tmp_path, rgb):
    one_line(lambda: image_files(tmp_path), tmp_path.name, 'no pictures')
    one_line(lambda: image_files(tmp_path/'nowhere'), 'nowhere', 'no such')
    (tmp_path/'in').mkdir()
    for n in ('b.PNG', 'a.jpeg', '.hidden.png', 'notes.txt', 'in/c.webp'): (tmp_path/n).write_bytes(packed(rgb))
    assert [p.name for p in image_files(tmp_path)] == ['a.jpeg', 'b.PNG']
    assert len(image_files(tmp_path, recursive=True)) == 3
    assert image_files(tmp_path/'b.PNG') == [tmp_path/'b.PNG']

def test_load_folder(folder):
    x = load_folder(folder, 16)
    assert x.shape == (7,3,16,16) and torch.equal(x[2], to_float(to_uint8(load_image(folder/'2.png', 16))))
    assert load_folder(folder, 16, as_uint8=True).dtype == torch.uint8
    (folder/'3.png').write_text('no')
    one_line(lambda: load_folder(folder, 16), '3.png')
    assert torch.equal(load_folder(folder, 16, on_error='skip'), x[[0,1,2,4,5,6]])
    heard = []
    load_folder(folder, 16, on_error=lambda p,e: heard.append((p.name, str(e))))
    assert heard[0][0] == '3.png' and '3.png' in heard[0][1]
    one_line(lambda: load_folder([folder/'3.png'], 16, on_error='skip'), 'no picture could be read')
    one_line(lambda: load_folder([], 16), 'no picture')

def test_decoded_once(folder, monkeypatch):
    n = []
    real = I.load_image
    monkeypatch.setattr(I, 'load_image', lambda *a, **k: n.append(1) or real(*a, **k))
    ds = ImageFolder(folder, 16)
    for _ in range(3): [ds[i] for i in range(len(ds))]
    assert len(n) == 7

def test_cache(folder, tmp_path_factory, monkeypatch):
    c = tmp_path_factory.mktemp('c')/'deep'/'x.safetensors'
    ds = ImageFolder(folder, 16, cache=c)
    with monkeypatch.context() as m:
        m.setattr(I, 'load_image', lambda *a, **k: pytest.fail('decoded again'))
        again = ImageFolder(folder, 16, cache=c)
    assert torch.equal(ds.data, again.data) and again.paths == ds.paths
    assert ImageFolder(folder, 12, cache=c).data.shape[-1] == 12
    save_image(torch.ones(3,20,20), folder/'0.png')
    os.utime(folder/'0.png', (1,1))
    assert ImageFolder(folder, 16, cache=c)[0].eq(1).all()
    c.write_bytes(b'damaged')
    assert torch.equal(ImageFolder(folder, 16, cache=c).data[1:], ds.data[1:])
    (folder/'3.png').write_text('no')
    ImageFolder(folder, 16, cache=c, on_error='skip')
    assert '3.png' not in [p.name for p in ImageFolder(folder, 16, cache=c, on_error='skip').paths]
    one_line(lambda: ImageFolder(folder, 16, cache=c), '3.png')

def test_folder_items(folder):
    ds = ImageFolder(folder, 16, flip=True)
    assert len(ds) == 14 and len(list(ds)) == 14
    assert torch.equal(ds[-1], ds[6].flip(-1))
    with pytest.raises(IndexError): ds[14]
    b = next(iter(torch.utils.data.DataLoader(ds, 5)))
    assert b.shape == (5,3,16,16)


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('batch', [1, 3, 7, 20])
def test_loader_resumes(folder, flip, batch):
    ds = ImageFolder(folder, 16)
    a = loader(ds, batch, seed=5, flip=flip)
    run = [next(a) for _ in range(9)]
    for p in (0, 4, 8):
        b = loader(ds, batch, seed=5, flip=flip, position=p)
        torch.rand(3)
        assert all(torch.equal(next(b), x) for x in run[p:])
        assert b.position == a.position == 9
    assert torch.equal(loader(ds, batch, seed=5, flip=flip).batch(6), run[6])

def test_loader_is_fair(folder):
    ds = ImageFolder(folder, 16)
    l = loader(ds, 4, seed=1)
    assert torch.cat([l.indices(p) for p in range(7)]).bincount().tolist() == [4]*7
    orders = {tuple(torch.cat([loader(ds, 7, seed=s).indices(p)]).tolist()) for s in range(3) for p in range(3)}
    assert len(orders) == 9
    flips = torch.cat([loader(torch.arange(4.).expand(50,1,1,4), 50, flip=True).batch(p)[:,0,0,0] for p in range(4)])
    assert 60 < (flips > 0).sum() < 140

def test_loader_takes_tensors_and_datasets(folder):
    ds = ImageFolder(folder, 16)
    batches = [next(loader(d, 3, seed=2)) for d in (ds, ds.data, to_float(ds.data), [ds[i] for i in range(7)])]
    assert all(torch.equal(b, batches[0]) for b in batches)
    assert next(loader(ImageFolder(folder, 16, flip=True), 14)).shape == (14,3,16,16)
    one_line(lambda: loader(ds.data[:0], 3), 'empty')


def test_rounding_not_truncation(tmp_path):
    x = torch.linspace(-1, 1, 3*64*64).reshape(3,64,64)
    y = load_image(save_image(x, tmp_path/'a.png'))
    assert (y-x).abs().max() <= .501/127.5
    assert (y-x).mean().abs() < 1e-4
    assert to_uint8(torch.tensor([-1., 0.999, 1., 9.])).tolist() == [0, 255, 255, 255]
    assert to_uint8(torch.tensor(.999, dtype=torch.float16)).item() == 255

@pytest.mark.parametrize('c,mode', [(1,'L'), (2,'LA'), (3,'RGB'), (4,'RGBA')])
def test_channels_round_trip(tmp_path, c, mode):
    x = to_float(to_uint8(torch.rand(c,12,14)*2-1))
    assert to_pil(x).mode == mode
    assert torch.equal(load_image(save_image(x, tmp_path/'x'), channels=c), x)
    assert load_image(save_image(x, tmp_path/'x.jpg')).shape == (3,12,14)
    with pytest.raises(ValueError, match='one picture'): to_pil(torch.zeros(2,c,8,8))

def test_cannot_write(tmp_path):
    (tmp_path/'file').write_text('I am no folder')
    x = torch.zeros(3,8,8)
    one_line(lambda: save_image(x, tmp_path/'file'/'sub'/'a.png'), 'file/sub', 'choose another')
    one_line(lambda: make_folder(tmp_path/'file'), 'file', 'choose another')
    one_line(lambda: write_sheet(x[None], tmp_path/'file'/'a.png'), 'choose another')
    one_line(lambda: save_image(x, tmp_path/'a.xyz'), '.xyz')
    (tmp_path/'b.png').mkdir()
    one_line(lambda: save_image(x, tmp_path/'b.png'), 'b.png')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['b.png', 'file']

def test_atomic(tmp_path):
    p = tmp_path/'a.txt'
    p.write_text('old')
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(p) as tmp:
            tmp.write_text('half')
            raise KeyboardInterrupt
    assert p.read_text() == 'old' and len(list(tmp_path.iterdir())) == 1
    with atomic_write(p) as tmp: tmp.write_text('new')
    assert p.read_text() == 'new' and len(list(tmp_path.iterdir())) == 1
    assert p.stat().st_mode & 0o777 == 0o666 & ~I._umask


@pytest.mark.parametrize('c', [1, 2, 3, 4])
@pytest.mark.parametrize('n', [1, 5, 16, 17])
def test_sheets(tmp_path, n, c):
    u = torch.randint(0, 256, (n,c,8,12), dtype=torch.uint8)
    p = write_sheet(u, tmp_path/'s.png', cols=4)
    assert torch.equal(read_sheet(p), u)
    assert torch.equal(read_sheet(p, (8,12), n), u)

def test_sheets_of_others(tmp_path):
    Image.new('RGB', (128,192)).save(tmp_path/'s.png')
    assert read_sheet(tmp_path/'s.png').shape == (6,3,64,64)
    one_line(lambda: read_sheet(tmp_path/'s.png', 100), 's.png', 'tile size')
    one_line(lambda: read_sheet(tmp_path/'t.png'), 't.png')


def test_geometry_cars_as_published():
    y = torch.rand(2,3,512,512)
    y[:,:,:64] = y[:,:,448:] = -1
    assert torch.allclose(CARS.feed(y), F.adaptive_avg_pool2d(y, 256)[:,:,32:224], atol=1e-6)
    assert CARS.feed(y).shape == (2,3,192,256)

@pytest.mark.parametrize('out', [64, 256, 300, 512, 1024])
def test_geometry_faces_as_published(out):
    y = torch.rand(1,3,out,out)
    assert torch.equal(Geometry(256, out).feed(y), F.adaptive_avg_pool2d(y, 256))

def test_geometry_rest():
    assert Geometry.from_dict(CARS.to_dict()) == CARS and hash(CARS) and Geometry() == Geometry.from_dict(Geometry().to_dict())
    assert Geometry.for_generator(64).encoder == (64,64) and Geometry.for_generator(1024).encoder == (256,256)
    y = torch.rand(1,3,512,512, requires_grad=True)
    CARS.feed(y).sum().backward()
    assert y.grad[:,:,:64].eq(0).all() and y.grad[:,:,64:448].gt(0).all()
    with pytest.raises(ValueError, match='output'): CARS.feed(torch.rand(1,3,256,256))
    with pytest.raises(ValueError, match='box'): Geometry(64, 64, (0,0,65,64))
    for shape in [(3,100,30), (2,3,30,100), (1,1,9,9)]: assert CARS.fit(torch.rand(shape)).shape == (*shape[:-2],192,256)


@pytest.mark.parametrize('c', [1, 3, 4])
@pytest.mark.parametrize('side', [16, 64, 300])
def test_film_strip(c, side):
    rows = torch.rand(3,2,c,side,side)*2-1
    im = film_strip(rows, rows[0], names=['a.png', 'b.png'])
    assert im.mode == 'RGB' and 4*100 < im.width < 4*300
    assert film_strip(list(rows), scale=1).width == 4 + 3*(side+4)
    assert film_strip(rows[:,0]).height < film_strip(rows).height
    film_strip(rows, rows[0], titles=['in', 'a', 'b', 'c'], smooth=False)

def test_film_strip_pixels():
    rows = torch.stack([torch.full((1,3,16,16), v) for v in (-1., 1.)])
    im = np.array(film_strip(rows, scale=2, smooth=False, pad=0))
    assert (im[-32:,:32] == 0).all() and (im[-32:,32:] == 255).all()

def test_strip_needs_no_matplotlib():
    code = '''import sys, torch
from restyle_nb.images import film_strip
film_strip(torch.zeros(2,1,3,16,16))
assert not [m for m in sys.modules if m.split('.')[0] in ('matplotlib', 'torchvision', 'lpips', 'sklearn')]'''
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(I.__file__).parent.parent)

def test_grid():
    x = torch.rand(5,3,6,8)
    assert grid(x).shape == (3, 2*8-2, 3*10-2)
    assert grid(list(x), cols=5, pad=0).shape == (3,6,40)
    assert grid(to_uint8(x), cols=2).dtype == torch.uint8
