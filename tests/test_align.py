"Faces cut out of photographs, and put back: the frame by hand-made numbers, the way back, and whatever people feed it."
import importlib.util
import json
import subprocess
import sys
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut
from restyle_nb import align
from restyle_nb.align import (FFHQ, TEMPLATES, NoDetector, NoFace, Template, Transform, align_face, align_faces, center_crop, dlib_faces,
                              face_frame, has_detector, looks_aligned, paste_back, points_file, template_of)
from restyle_nb.images import ImageError, load_image, save_image
from restyle_nb.zoo import held_out, load_model

POINTS = np.array([(203, 102), (247, 104), (202, 140), (246, 142)])   # eyes and corners of the mouth, by hand


@pytest.fixture(scope='module')
def photo(): return load_image(astronaut())


@pytest.fixture(scope='module')
def net(): return load_model('faces64', 'cpu')


def around(points, turn, scale=1., middle=(255.5, 255.5)):
    "Points turned about the middle of a picture, clockwise on the screen"
    c, s = np.cos(turn), np.sin(turn)
    return (np.asarray(points) - middle) @ np.array([[c, s], [-s, c]])*scale + middle


# --- the frame

@pytest.mark.parametrize('points, corners', [
    # e = (40, 0), m = (0, 40): both agree on "right"; 2·40 > 1.8·40, so half a side is 80 around (120, 104)
    ([(100, 100), (140, 100), (108, 140), (132, 140)], [(40, 24), (40, 184), (200, 184), (200, 24)]),
    # e = (20, 0), m = (0, 40): now 1.8·40 = 72 > 40, around (110, 104)
    ([(100, 100), (120, 100), (100, 140), (120, 140)], [(38, 32), (38, 176), (182, 176), (182, 32)]),
    # e = (30, 40), m = (-24, 18): e - im = (48, 64), half a side is 100 along (.6, .8), around (12.6, 21.8)
    ([(0, 0), (30, 40), (-9, 38), (-9, 38)], [(32.6, -118.2), (-127.4, 1.8), (-7.4, 161.8), (152.6, 41.8)]),
])
def test_frame_by_hand(points, corners):
    "Pixels are squares: a landmark (100, 100) is the centre of a pixel, half a pixel further in from the corner of the picture"
    a = align_face(np.zeros((300, 300, 3), np.uint8), points, 64)
    np.testing.assert_allclose(a.transform.corners, np.array(corners) + .5, atol=1e-9)


def test_68_points_are_averaged():
    p = np.random.default_rng(0).normal(size=(68, 2))
    four = [p[36:42].mean(0), p[42:48].mean(0), p[48], p[54]]
    five = [*four[:2], (9, 9), *four[2:]]
    assert face_frame(p) == pytest.approx(face_frame(four)) and face_frame(five) == pytest.approx(face_frame(four))


def test_templates_move_along_the_face():
    c, h = face_frame(POINTS)
    d, k = face_frame(POINTS, Template(1.5, .1, .2))
    assert k == pytest.approx(1.5*h) and d - c == pytest.approx(2*h*(.1 + .2j))


@pytest.mark.parametrize('bad', [np.zeros((7, 2)), np.zeros((4, 3)), np.full((4, 2), np.nan), [[1, 2]]])
def test_points_that_are_none(bad, photo):
    with pytest.raises(ValueError, match='expected .68,2.'): align_face(photo, bad)


def test_points_that_coincide(photo):
    with pytest.raises(ValueError, match='coincide'): align_face(photo, np.ones((4, 2)))


# --- transform

def test_the_way_back_is_exact():
    rng = np.random.default_rng(0)
    for _ in range(100):
        t = Transform(complex(*rng.normal(size=2))*10**rng.uniform(-2, 2), complex(*rng.normal(size=2))*1000, (64, 48), (300, 400))
        p = rng.uniform(-500, 500, (20, 2))
        np.testing.assert_allclose(t.to_crop(t.to_photo(p)), p, atol=1e-8)
        d = json.loads(json.dumps(t.to_dict()))
        m, n = (np.vstack([d[k], (0, 0, 1)]) for k in ('matrix', 'inverse'))
        np.testing.assert_allclose(m @ n, np.eye(3), atol=1e-9)
        np.testing.assert_allclose(m @ (48, 64, 1), [*t.corners[2], 1])
        assert Transform.from_dict(d) == t


def test_a_transform_is_stored(tmp_path):
    t = Transform(1.5 - .2j, 3 + 4j, (64, 64), (100, 120), 'me.jpg')
    assert Transform.load(t.save(tmp_path/'t.json')) == t


@pytest.mark.parametrize('text', ['', '{}', '[]', 'null', '{"kind": "transform"}', '{"kind": "transform", "matrix": [[1, 0, 0], [0, 2, 0]], "size": [8, 8], "source": [8, 8]}',
                                  '{"kind": "transform", "matrix": [[0, 0, 0], [0, 0, 0]], "size": [8, 8], "source": [8, 8]}', '{"kind": "transform", "matrix": [[NaN, 0, 0], [0, NaN, 0]], "size": [8, 8], "source": [8, 8]}'])
def test_a_transform_that_is_none(tmp_path, text):
    (tmp_path/'t.json').write_text(text)
    with pytest.raises(ImageError, match='t.json'): Transform.load(tmp_path/'t.json')


# --- cutting

@pytest.mark.parametrize('degrees, scale', [(20, 1), (-35, 1), (90, 1), (0, 1.7), (180, 1)])
def test_crop_follows_the_face(photo, degrees, scale):
    "A photograph turned or enlarged gives the same crop, to what resampling costs (in levels of 255)"
    pil = Image.fromarray(astronaut())
    if scale != 1: other, points = pil.resize([round(512*scale)]*2, Image.Resampling.BICUBIC), (POINTS + .5)*round(512*scale)/512 - .5
    else: other, points = pil.rotate(-degrees, Image.Resampling.BICUBIC), around(POINTS, np.radians(degrees))
    a, b = align_face(photo, POINTS, 96), align_face(other, points, 96)
    assert abs(np.angle(b.transform.a/a.transform.a, deg=True) - degrees) % 360 < .01 or abs(degrees) == 180
    d = (a.image - b.image).abs()*127.5
    assert d.mean() < 2 and d.mean() < .1*(a.image - a.image.flip(-1)).abs().mean()*127.5


def test_nothing_is_skipped_when_it_shrinks():
    "Stripes of one pixel become grey, not black or white"
    x = torch.ones(3, 1024, 1024); x[:, :, ::2] = -1
    a = center_crop(x, 64).image
    assert a.abs().max() < .05
    turned = align_face(x, around(POINTS*2, .4, 3, (511.5, 511.5)), 64)
    assert abs(turned.transform.a) > 4 and turned.image.abs().max() < .1


def test_beyond_the_edge_is_mirrored_and_fades(photo):
    face = np.array([(0, 200), (60, 200), (10, 260), (50, 260)])
    a = align_face(photo, face, 128)
    x = a.transform.to_photo(np.stack(np.meshgrid(np.arange(128) + .5, np.arange(128) + .5), -1))[..., 0]
    inside, far = torch.from_numpy(x > 3), torch.from_numpy(x < -30)
    assert a.image.isfinite().all() and far.any()
    whole = align_face(torch.nn.functional.pad(photo, (200, 0, 0, 0)), face + (200, 0), 128)
    assert (a.image - whole.image)[:, inside].abs().max() < .02          # what is in the photograph stays as it is
    rough = lambda y, m: (y[:, :, 1:] - y[:, :, :-1]).abs()[:, m[:, 1:]].mean()
    assert rough(a.image, far) < .5*rough(a.image, inside)


def test_center_crop_is_what_the_reader_of_pictures_cuts(tmp_path):
    x = load_image(astronaut())[:, :300]
    a = center_crop(x, (48, 64))
    assert (a.image - load_image(x, (48, 64))).abs().mean() < .03 and a.transform.source == (300, 512)


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_kinds_of_pictures(tmp_path, channels):
    "Transparent, grey, turned by the camera: as `load_image` reads them"
    im = Image.fromarray(astronaut()).convert('RGBA')
    im.putalpha(Image.linear_gradient('L').resize((512, 512)))
    im.save(tmp_path/'me.png')
    a = align_face(tmp_path/'me.png', POINTS, 32, channels=channels)
    assert a.image.shape == (channels, 32, 32) and a.transform.file == 'me.png'
    assert (paste_back(tmp_path/'me.png', a, a.image) - load_image(tmp_path/'me.png', channels=channels)).abs().mean() < .02


def test_a_camera_held_sideways(tmp_path):
    exif = Image.Exif()
    exif[274] = 6                                          # to be turned clockwise before it is looked at
    Image.fromarray(np.rot90(astronaut()).copy()).save(tmp_path/'side.jpg', exif=exif, quality=95)
    a, = align_faces(tmp_path/'side.jpg', 64)
    b, = align_faces(astronaut(), 64)
    assert (a.image - b.image).abs().mean() < .05


@pytest.mark.parametrize('shape', [(8, 8, 3), (8, 4000, 3), (3000, 5000, 3), (20, 20)])
def test_tiny_and_huge(shape):
    picture = np.full(shape, 90, np.uint8)
    a = align_face(picture, POINTS, 64)
    assert a.image.isfinite().all() and max(a.transform.source) <= 4096
    back = paste_back(picture, a, a.image)
    assert tuple(back.shape[-2:]) == a.transform.source


# --- pasting

def test_an_unchanged_crop_changes_nothing(photo):
    "Mean difference inside the frame, levels of 255; with one crop pixel for a pixel of the photograph, and with three"
    side = 2*abs(face_frame(POINTS)[1])
    for size, most in ((round(side), 1.5), (round(3*side), 1.5), (64, 8.)):
        a = align_face(photo, POINTS, size)
        d = (paste_back(photo, a, a.image) - photo).abs().mean(0)*127.5
        (left, top), (right, bottom) = a.transform.corners.min(0), a.transform.corners.max(0)
        outside = torch.ones_like(d, dtype=bool); outside[int(top):int(bottom) + 1, int(left):int(right) + 1] = False
        assert d[~outside].mean() < most and d[outside].max() == 0


def test_the_edge_is_soft(photo):
    a = align_face(photo, POINTS, 128)
    white = torch.ones(3, 32, 32)
    assert paste_back(photo, a, white, 0)[:, 120, 200].min() > .9999 and paste_back(photo, a, white)[:, 120, 200].min() > .99
    step = lambda soft: (paste_back(torch.zeros_like(photo), a, white, soft)[0, 110].diff().abs().max())
    assert step(0) > .9 and step(.1) < .15 and step(.3) < step(.1)


def test_sizes_of_results(photo):
    "A result of any size goes into the same place"
    a = align_face(photo, POINTS, 128)
    outs = [paste_back(photo, a, torch.full((3, s, s), .3)) for s in (16, 64, 300)]
    assert max((o - outs[0]).abs().max() for o in outs) < 1e-4
    u = paste_back(photo, a, torch.full((3, 16, 16), 166, dtype=torch.uint8))
    assert (u - outs[0]).abs().max() < .01


def test_the_first_is_on_top(photo):
    a = align_face(photo, POINTS, 32)
    y = torch.stack([torch.ones(3, 32, 32), -torch.ones(3, 32, 32)])
    assert paste_back(photo, [a, a.transform], y)[0, 120, 224] == 1


def test_what_does_not_belong_together(photo):
    a = align_face(photo, POINTS, 32)
    with pytest.raises(ValueError, match='511x512.*512x512'): paste_back(photo[:, :, 1:], a, a.image)
    with pytest.raises(ValueError, match='aspect'): paste_back(photo, a, a.image[:, :16])
    with pytest.raises(ValueError, match='2 results for 1'): paste_back(photo, a, torch.stack([a.image]*2))


# --- the detector

def test_it_finds_her(photo):
    a, = align_faces(photo, 64)
    c, h = face_frame(POINTS)
    d, k = face_frame(a.points)
    assert abs(c - d) < 5 and abs(abs(k/h) - 1) < .05 and abs(np.angle(k/h)) < .05


@pytest.mark.parametrize('side', [200, 512, 2500])
def test_it_finds_her_at_any_size(side):
    a, = align_faces(Image.fromarray(astronaut()).resize((side, side), Image.Resampling.BICUBIC), 64)
    b, = align_faces(astronaut(), 64)
    assert abs(a.transform.b*512/side - b.transform.b) < 6 and abs(abs(a.transform.a)*512/side/abs(b.transform.a) - 1) < .06


def test_several_faces_largest_first():
    im = Image.new('RGB', (1100, 600), 'gray')
    a = Image.fromarray(astronaut())
    im.paste(a.resize((300, 300)), (0, 0)); im.paste(a.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (320, 40)); im.paste(a.resize((220, 220)), (850, 300))
    faces = align_faces(im, 48)
    assert len(faces) == 3 and [round(f.transform.b.real) for f in faces] == sorted([round(f.transform.b.real) for f in faces], key=lambda x: (not 320 < x < 832, x > 832))
    sizes = [abs(f.transform.a) for f in faces]
    assert sizes == sorted(sizes, reverse=True)
    x = load_image(im)
    y = paste_back(x, faces, [torch.ones(3, 48, 48)]*3)
    for f in faces:
        r, d = f.transform.to_photo([(24, 24)])[0].astype(int)
        assert y[:, d, r].min() > .99
    assert (paste_back(x, faces, [f.image for f in faces]) - x).abs().mean() < .02


@pytest.mark.parametrize('name', ['china.jpg', 'flower.jpg'])
def test_no_face_is_a_sentence(tmp_path, name):
    from sklearn.datasets import load_sample_image
    save_image(Image.fromarray(load_sample_image(name)), tmp_path/name)
    with pytest.raises(NoFace, match=f'{name}: no face found in 640x427 pixels.*upsample.*--crop'): align_faces(tmp_path/name)


def test_what_is_no_picture(tmp_path):
    (tmp_path/'a.png').write_text('no')
    with pytest.raises(ImageError, match='a.png'): align_faces(tmp_path/'a.png')


def test_points_of_ones_own_need_no_detector():
    "Without dlib and its file: everything but the detector works, and that says what to install"
    code = f'''
import importlib.util, sys
import numpy as np
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in ('dlib', 'face_recognition_models') else real(name, *a)
sys.modules['dlib'] = None
from restyle_nb.align import *
x, points = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8), {POINTS.tolist()}
a = align_face(x, points, 32)
assert paste_back(x, align_faces(x, 32, lambda picture: [points])[0], a.image).shape == (3, 200, 200)
assert not has_detector() and looks_aligned(x).ok is None and 'pip install' in str(looks_aligned(x))
try: align_faces(x)
except ImportError as e: print(type(e).__name__, e)
'''
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert p.returncode == 0, p.stderr
    assert p.stdout.startswith('NoDetector ') and 'pip install "restyle_nb[align]"' in p.stdout and 'points of your own' in p.stdout


def test_a_file_that_is_not_the_one(tmp_path, monkeypatch):
    "Damaged or swapped, the file of the points never reaches dlib"
    package = tmp_path/'face_recognition_models'
    (package/'models').mkdir(parents=True)
    (package/'__init__.py').write_text('raise SystemError("imported")')
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    file = package/align.POINTS['file']
    for content in (None, b'short', b'as long as it should be'):
        if content: file.write_bytes(content)
        if content and content.startswith(b'as'): monkeypatch.setitem(align.POINTS, 'size', len(content))
        with pytest.raises(NoDetector, match='shape_predictor_68.*pip install --force-reinstall'): points_file()
        align._dlib.cache_clear()
        with pytest.raises(NoDetector): dlib_faces()


def test_the_file_is_the_one(): assert has_detector() and points_file().stat().st_size == align.POINTS['size']


def test_importing_loads_no_detector():
    code = 'import sys, restyle_nb.align; print({"dlib", "sklearn", "matplotlib", "torchvision", "skimage", "face_recognition_models"} & set(sys.modules))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120).stdout.strip() == 'set()'


# --- does it look aligned?

def test_an_aligned_face_looks_aligned(photo):
    "Cut once, it would be cut the same way again"
    a, = align_faces(photo, 256)
    assert looks_aligned(a.image).ok
    v = looks_aligned(photo)
    assert v.ok is False and 'times too small' in str(v) and 'too far up' in str(v)


@pytest.mark.parametrize('how, says', [(dict(right=.3), 'too far right'), (dict(right=-.3), 'too far left'), (dict(down=.2), 'too far down'), (dict(side=1.6), 'times too small'), (dict(side=.6), 'times too large')])
def test_it_says_in_words_what_is_off(photo, how, says):
    "A frame that lies too far left shows the face too far right"
    t = FFHQ._replace(**{k: v if k == 'side' else -v for k, v in how.items()})
    a = align_face(photo, align_faces(photo)[0].points, 256, t)
    assert says in str(looks_aligned(a.image))


def test_a_turned_head(photo):
    a = align_face(photo, POINTS, 256).image
    from torchvision.transforms.functional import rotate
    v = looks_aligned(rotate(a[None], 20, fill=0)[0])
    assert 'turned by' in str(v) and abs(abs(v.numbers['turned']) - 20) < 6


def test_the_model_alone_knows_its_own(net):
    "Without a detector: most pictures of its world pass, blown-up or shifted ones do not"
    x, usual, deaf = held_out(72)[64:], held_out(32), lambda picture: []
    good = [looks_aligned(o, net, usual, deaf).ok for o in x]
    bad = [looks_aligned(o.roll(26, -1), net, usual, deaf).ok for o in x]
    assert sum(good) >= 6 and sum(bad) <= 3


def test_a_model_of_ones_own_brings_its_pictures(net):
    "A generator that the zoo does not know: usual= says what is usual"
    net.generator.name, kept = 'mine', net.generator.name
    try:
        x = held_out(1)[0]
        assert looks_aligned(x, net).ok is None and 'usual=' in str(looks_aligned(x, net))
        assert looks_aligned(x, net, held_out(16)[1:]).ok is not None
        assert looks_aligned(torch.rand(3, 64, 64)*2 - 1, net, held_out(16)).ok is False
    finally: net.generator.name = kept


def test_templates_are_measured():
    "Pictures cut by a template give that template back, and those of faces64 the one that is kept"
    people, rng = [], np.random.default_rng(0)
    photo = load_image(astronaut())
    points = align_faces(photo)[0].points
    for _ in range(10): people.append(align_face(photo, points + rng.normal(0, 1, 2), 160, Template(1.2, .05, -.06)).image)
    t = template_of(people)
    assert abs(t.side - 1.2) < .06 and abs(t.right - .05) < .03 and abs(t.down + .06) < .03
    m = template_of(held_out(48))
    assert abs(m.side - TEMPLATES['faces64'].side) < .08 and abs(m.down - TEMPLATES['faces64'].down) < .05
    with pytest.raises(NoFace): template_of(held_out(8, 'earth64'))


# --- under the hand

def test_the_widget_cuts_the_face_out(net, tmp_path):
    from restyle_nb.widgets import Explorer
    save_image(Image.fromarray(astronaut()), tmp_path/'her.png')
    e = Explorer(net, held_out(2), 1).wait()
    e.load(tmp_path/'her.png').wait()
    middle = e.inversion.x.clone()
    e.face.value = True
    assert 'Its face' in e.wait().status
    face, = align_faces(tmp_path/'her.png', 64, template=TEMPLATES['faces64'])
    assert (e.inversion.x[0] - face.image).abs().max() < 1e-5 and (e.inversion.x - middle).abs().mean() > .1
    e.load(np.zeros((90, 90, 3), np.uint8), 'array').wait()
    save_image(torch.zeros(3, 90, 120), tmp_path/'grey.png')
    assert 'No face found' in e.load(tmp_path/'grey.png').wait().status
    (tmp_path/'bad.png').write_text('no')
    assert 'bad.png' in e.load(tmp_path/'bad.png').wait().status


def test_the_widget_says_what_is_missing(net, monkeypatch):
    from restyle_nb import widgets
    monkeypatch.setattr(widgets, 'has_detector', lambda: False)
    e = widgets.Explorer(net, held_out(1), 1).wait()
    assert e.face.disabled and 'pip install "restyle_nb[align]"' in e.face.description
