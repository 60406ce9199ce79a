"The renderer: what must hold for every face, and what ships against what it draws"
import json
from importlib.resources import files
import numpy as np
import pytest
from restyle_nb.images import read_sheet
from restyle_nb.worlds import PASSING, Z_DIM, attributes, head_mesh, rasterize, render, render_faces, same_person, sample_z

SHIPPED = files('restyle_nb')/'weights'

@pytest.mark.parametrize('name,seed', [('faces64_heldout', 1), ('faces64_train', 0)])
def test_shipped_pictures_are_the_renderers(name, seed):
    "The sheets are what the recipe would draw today (a rounding step of difference between machines is allowed)"
    sheet = read_sheet(SHIPPED/f'{name}.png').numpy(); z = sample_z(4, seed)
    drawn = render_faces(z).transpose(0,3,1,2).astype(int)
    apart = abs(sheet[:4].astype(int)-drawn)
    assert (apart>1).mean()<1e-3
    known = json.loads((SHIPPED/f'{name}.json').read_text())
    assert len(known)==len(sheet) and abs(known[3]['yaw']-attributes(z[3])['yaw'])<1e-3

def test_held_out_and_training_crowds_are_disjoint():
    a,b = sample_z(256, 1),sample_z(512, 0)
    assert abs(a[:,None]-b[None]).max(-1).min()>.1

def test_extreme_faces_draw():
    for v in (-4., 4.):
        im = render(np.full(Z_DIM, v)); assert im.shape==(64,64,3) and im.std()>5
    for k in range(0, Z_DIM, 5):
        z = np.zeros(Z_DIM); z[k] = 5.; assert np.isfinite(render(z, 32, 1)).all()

def test_every_number_of_z_moves_something():
    "74 numbers are drawn from; number 57, baldness, waits for a man"
    middle = repr(attributes(np.zeros(Z_DIM)))
    still = [k for k in range(Z_DIM) if all(repr(attributes(s*np.eye(Z_DIM)[k]))==middle for s in (-2,2))]
    assert still==[57,74,75]

def test_nearest_triangle_wins():
    p = np.array([[0,0,0],[20,0,0],[0,20,0],[0,0,1],[20,0,1],[0,20,1.]])
    for tri in ([[0,1,2],[3,4,5]], [[3,4,5],[0,1,2]]):
        _,t,_,z = rasterize(p, np.array(tri), (16,16)); assert np.allclose(z, 1) and len(set(t))==1

def test_same_person_keeps_the_person():
    z = sample_z(2, 5); a = same_person(*z); one,two = attributes(z[0]),attributes(z[1])
    assert all(a[k]==(two if k in PASSING else one)[k] for k in a)

def test_mesh_is_small_and_sound():
    m = head_mesh(); assert m['tri'].max()<len(m['verts']) and np.isfinite(m['flat']).all()
    assert (SHIPPED/'faces_mesh.npz').stat().st_size<1_500_000

def test_wrong_z_says_what_was_expected():
    with pytest.raises(ValueError, match='76'): render(np.zeros(96))
