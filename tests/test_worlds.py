"The renderer: what must hold for every face, and what ships against what it draws"
import json
from importlib.resources import files
import numpy as np
import pytest
from restyle_nb.images import read_sheet
from restyle_nb.worlds import (PASSING, STYLES, WORN, Z_DIM, _geometry, attributes, head_mesh, occasions, people, rasterize, render, render_faces,
                               same_person, sample_z)

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

# ---------------------------------------------------------------- toons

def silhouette(z, style):
    dark,bright = (render(attributes(z)|dict(background=[v]*3, fade=0.), style=style).astype(int) for v in (0.,1.))
    return abs(bright-dark).max(-1)<64

@pytest.mark.parametrize('name,seed', [('toons64_heldout', 1), ('toons64_train', 0)])
def test_shipped_toons_are_the_renderers(name, seed):
    sheet = read_sheet(SHIPPED/f'{name}.png').numpy(); assert sheet.shape==(256,3,64,64)
    drawn = render_faces(sample_z(2, seed, 100), style='toon').transpose(0,3,1,2).astype(int)
    assert (abs(sheet[100:102].astype(int)-drawn)>1).mean()<1e-3

def test_toon_and_photo_of_one_name_are_one_person():
    "Sheets agree in order and in what is known; the training sheet of faces64 is longer"
    for part in ('heldout','train'):
        photo,toon = (json.loads((SHIPPED/f'{d}64_{part}.json').read_text()) for d in ('faces','toons'))
        assert len(toon)==256 and photo[:256]==toon

def test_photos_did_not_change_when_toons_came():
    "Held-out faces that were drawn before there was a second style"
    sheet = read_sheet(SHIPPED/'faces64_heldout.png').numpy()[200:202].astype(int)
    assert (abs(sheet-render_faces(sample_z(2, 1, 200)).transpose(0,3,1,2))>1).mean()<1e-3

def test_toons_are_drawn_twice_the_same_and_differ_from_photos():
    z = sample_z(2, 9); a,b,c = render_faces(z, style='toon'),render_faces(z, style='toon'),render_faces(z)
    assert (a==b).all() and (a!=c).mean()>.9

def test_toons_stand_where_their_photos_stand():
    z = sample_z(6, 21); p,t = ([silhouette(o, s) for o in z] for s in STYLES)
    shared = np.array([[(a&b).sum()/(a|b).sum() for b in t] for a in p])
    assert shared.diagonal().min()>.8 and (shared.argmax(1)==np.arange(6)).mean()>.6

def test_toons_have_the_same_mesh_and_larger_eyes():
    for o in sample_z(3, 22):
        a = attributes(o)|dict(blink=0.); (v,_,tri,mat,*_),(w,_,tri2,mat2,*_) = _geometry(a),_geometry(a, toon=True)
        assert len(v)==len(w) and (tri==tri2).all() and (mat==mat2).all()
        for k in (1,2):
            e = np.unique(tri[mat==k]); assert 1.2<np.ptp(w[e,0])/np.ptp(v[e,0])<2.2 and 1.2<np.ptp(w[e,1])/np.ptp(v[e,1])<2.5

def test_extreme_toons_draw():
    for v in (-4., 4.): assert render(np.full(Z_DIM, v), style='toon').std()>5
    assert render(np.zeros(Z_DIM), 32, 1, 'toon').shape==(32,32,3)

def test_toon_background_is_flat():
    a = attributes(np.zeros(Z_DIM))|dict(fade=.5); im = render(a, style='toon')
    assert (im[:4,:8]==im[0,0]).all() and not (render(a)[:4,:8]==render(a)[0,0]).all()

def test_unknown_style_says_which_there_are():
    with pytest.raises(ValueError, match="'oil'.*'photo', 'toon'"): render(np.zeros(Z_DIM), style='oil')

# ---------------------------------------------------------------- people

def test_worn_things_come_from_the_other_and_nothing_else_does():
    z = sample_z(2, 5); a,b,two = same_person(*z),same_person(*z, worn=True),attributes(z[1])
    assert all(b[k]==two[k] for k in WORN) and all(a[k]==b[k] for k in a if k not in WORN)

def test_people_do_not_depend_on_how_many_are_asked_for():
    x,who = people(3, 2, seed=40); y,then = people(1, 2, seed=40, start=2)
    assert (x[4:]==y).all() and list(who)==[0,0,1,1,2,2] and list(then)==[2,2]
    assert people(1, 2, seed=40, size=32, style='toon')[0].shape==(2,32,32,3)

def test_occasions_are_the_stated_crowds():
    o = occasions(2, 3, seed=2, start=4)
    who,when = sample_z(2, 2, 4),sample_z(6, 3, 12)
    assert o==[same_person(who[i//3], when[i], worn=True) for i in range(6)]
