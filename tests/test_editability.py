"What edits do, measured where the answer is known: a generator of six numbers, whose pictures can be worked out by hand."
import math

import pytest
import torch

from restyle_nb.editability import Editability, at_change, editability, round_trip
from restyle_nb.editing import Direction, ForeignDirection, edit, fingerprint


class Small:
    "Six numbers a picture, at most 1 large: codes far from the average hardly react"
    n_styles, style_dim, z_dim, shapes, image_channels = 2, 6, 6, [(1, 2)], 3
    def __init__(self, squash=torch.tanh): self.latent_avg, self.squash = torch.zeros(2, 6), squash
    def map(self, z): return z
    def synthesize(self, w, **kw): return self.squash(w.mean(1)/4).reshape(-1, 3, 1, 2)


def parts(y): return {k: y.flatten(1)[:, i] for i, k in enumerate('abcdef')}
def near(y, x): return -(y - x).flatten(1).norm(dim=1)


def home(g): return dict(name='small', fingerprint=fingerprint(g), n_styles=2, style_dim=6)


def way(g, k='a', also=(), length=1.):
    v = torch.zeros(6)
    v['abcdef'.index(k)] = length
    for o, much in also: v['abcdef'.index(o)] = much
    return Direction(name=k, vector=v, space='w', home=home(g))


def measure(codes, g, directions=None, **kw):
    return editability(codes, g, directions or {'a': way(g)}, attributes=parts, identity=near, **dict(n=4000, strengths=(-2, -1, 0, 1, 2)) | kw)


def some(g, n=8, scale=1., seed=5):
    w = scale*torch.randn(n, 1, 6, generator=torch.Generator().manual_seed(seed)).expand(-1, 2, -1).clone()
    return w


@pytest.fixture(scope='module')
def straight(): return Small(squash=lambda o: o)


@pytest.fixture(scope='module')
def bent(): return Small()


# ---------------------------------------------------------------- at equal change

def test_the_first_crossing_counts():
    r = torch.tensor([0., .6, .2, .9])[:, None]
    assert at_change(r, torch.arange(4.)[:, None], .3).tolist() == pytest.approx([.5])
    assert at_change(r, torch.arange(4.)[:, None], .7).tolist() == pytest.approx([2 + 5/7])


def test_an_edit_that_goes_the_wrong_way_never_gets_there():
    r = torch.tensor([0., -.6, -2.])[:, None]
    assert at_change(r, r, .3).isnan().all()


def test_axes_before_strengths_and_pictures_are_kept():
    r = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)).cumsum(1)
    r = r - r[:, :1]
    v = torch.rand(3, 4, 5)
    one_by_one = torch.stack([torch.stack([at_change(r[i, :, j:j+1], v[i, :, j:j+1], .4)[0] for j in range(5)]) for i in range(3)])
    torch.testing.assert_close(at_change(r, v, .4), one_by_one, equal_nan=True)


# ---------------------------------------------------------------- editability

def test_numbers_worked_out_by_hand(straight):
    w = some(straight)
    m = measure({'one': w}, straight, {'a': way(straight, also=[('b', .5)])}, others='ab')
    unit = {k: v.std() for k, v in parts(straight.synthesize(straight.map(samples(4000))[:, None])).items()}
    torch.testing.assert_close(m.response['one'][0], (torch.tensor([-2., -1, 0, 1, 2])/4/unit['a'])[:, None].expand(-1, 8), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(m.side['one'][0], (torch.tensor([1., .5, 0, .5, 1])/4/unit['b'])[:, None].expand(-1, 8), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(m.slope('one')[0], (1/4/unit['a']).expand(8), rtol=1e-3, atol=1e-4)
    assert m.mean('one', 'response')[0] == pytest.approx(1, abs=1e-3)                  # straight: everybody reacts like samples
    size = .5*unit['a'].item()*4                                                        # the strength that makes half a standard deviation
    assert m.mean('one', 'identity')[0] == pytest.approx(-size/4*math.hypot(1, .5), rel=1e-3)
    assert m.mean('one', 'side')[0] == pytest.approx(size/4*.5/unit['b'].item(), rel=1e-3)
    assert m.mean('one', 'reached')[0] == 1


def samples(n, seed=1): return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def test_the_samples_are_those_of_the_generator(bent):
    m = measure({'own': samples(4000)[:8]}, bent)                                       # the very codes that are compared with
    assert torch.equal(m.response['own'], m.samples)
    assert m.mean('own', 'response')[0] == pytest.approx(1, abs=1e-5)
    assert m.mean('own', 'distance')[0] == pytest.approx(1, abs=1e-5)


def test_codes_far_out_react_less_and_lie_far(bent):
    m = measure({'near': some(bent), 'far': some(bent, scale=6.)}, bent)
    assert m.mean('far', 'response')[0] < .6 < .9 < m.mean('near', 'response')[0]
    assert m.mean('far', 'distance')[0] == pytest.approx(6*m.mean('near', 'distance')[0], rel=1e-4)
    d = m.compare('far', 'near', 'response')
    assert d.high < 0 and not d.better and d.n == 8
    assert m.mean('far', 'reached')[0] < m.mean('near', 'reached')[0]


def test_who_does_not_react_wins_nothing(bent):
    m = measure({'near': some(bent), 'deaf': some(bent, scale=1e4)}, bent)
    assert m.identity['deaf'].abs().max() == 0                                          # at equal strength a triumph
    assert m.mean('deaf', 'reached')[0] == 0 and math.isnan(m.mean('deaf', 'identity')[0])
    assert '| deaf |' in m._repr_markdown_() and 'never' in m._repr_markdown_()
    with pytest.raises(ValueError, match='no picture reaches a change of 0.5'): m.compare('near', 'deaf')


def test_only_cells_that_both_reach_are_compared():
    r = torch.tensor([[-1., 0, 1], [-.2, 0, .2]]).T[None]                               # (1,3,2): the second picture never gets there
    full = torch.tensor([[-1., 0, 1], [-1, 0, 1]]).T[None]
    likeness = torch.tensor([[.5, 1, .5], [.1, 1, .1]]).T[None]
    m = Editability(dict(a=full, b=r), dict(a=likeness, b=likeness), dict(a=full.abs(), b=r.abs()), dict(a=torch.ones(2), b=torch.ones(2)),
                    full, ['k'], torch.tensor([-1., 0, 1]), [], .5)
    assert m.mean('a')[0] == pytest.approx((.75 + .55)/2)
    d = m.compare('a', 'b')
    assert d.n == 1 and d.diff == 0 and d.a == pytest.approx(.75)


def test_identity_with_the_input_or_else_with_the_unedited(straight):
    w = some(straight)
    x = straight.synthesize(w) + .1
    assert measure({'one': w}, straight).identity['one'][0, 2].abs().max() == 0
    assert measure({'one': w}, straight, x=x).identity['one'][0, 2].tolist() == pytest.approx([-.1*6**.5]*8, rel=1e-4)


def test_each_attribute_is_also_a_side_effect_of_the_others(straight):
    m = measure({'one': some(straight)}, straight, {'a': way(straight), 'b': way(straight, 'b', also=[('a', 1.)])}, others='ab')
    assert m.side['one'][0].abs().max() < 1e-6 and m.side['one'][1][-1].min() > 1


def test_a_single_attribute(bent):
    m = measure({'near': some(bent), 'far': some(bent, scale=3.)}, bent, {'a': way(bent), 'b': way(bent, 'b', length=.01)})
    assert m.mean('near', 'reached', 'a')[0] > .9 and m.mean('near', 'reached', 'b')[0] == 0
    assert m.by_attribute('reached').splitlines()[0] == '|  | a | b |'
    assert set(m.curve('near', 'a')) == {'response', 'identity', 'side'} and len(m.curve('near', 'a')['side']) == 5


def test_figure(bent):
    import matplotlib
    matplotlib.use('Agg')
    axs = measure({'near': some(bent), 'far': some(bent, scale=3.)}, bent).plot()
    assert axs.shape == (2, 1) and [t.get_text() for t in axs[0, 0].figure.legends[0].get_texts()] == ['near', 'far']


def test_a_foreign_direction_is_refused_or_allowed_by_name(bent, straight):
    other = Small()
    other.latent_avg = torch.ones(2, 6)
    with pytest.raises(ForeignDirection): measure({'one': some(bent)}, bent, {'a': way(other)})
    allowed, own = measure({'one': some(bent)}, bent, {'a': way(other)}, allow='small'), measure({'one': some(bent)}, bent)
    assert torch.equal(allowed.response['one'], own.response['one'])


@pytest.mark.parametrize('wrong, words', [
    (dict(directions={}), 'at least one method'), (dict(directions='beauty'), 'the judge says nothing of beauty'), (dict(strengths=(0, 1)), 'around a 0'),
    (dict(strengths=(1, 0, -1)), 'rising'), (dict(target=0), 'expected a change above 0'), (dict(codes=5), 'are of')])
def test_errors_in_words(bent, wrong, words):
    directions = {} if wrong.get('directions') == {} else {wrong.pop('directions', 'a'): way(bent)}
    codes = {'one': some(bent)} | ({'two': some(bent, wrong.pop('codes'))} if 'codes' in wrong else {})
    wrong.pop('directions', None)
    with pytest.raises(ValueError, match=words):
        editability(codes, bent, directions, attributes=parts, identity=near, n=50, **dict(strengths=(-1, 0, 1)) | wrong)


def test_an_attribute_in_which_nobody_differs(bent):
    with pytest.raises(ValueError, match='samples do not differ in a'):
        editability({'one': some(bent)}, bent, {'a': way(bent)}, attributes=lambda y: parts(y)|{'a': torch.ones(len(y))}, identity=near, n=50)


def test_codes_in_w_and_inversions_are_codes_too(bent):
    from restyle_nb.restyle import Inversion
    w = some(bent)
    inv = Inversion(w[None], w[:0][None], torch.zeros(1, 8), torch.zeros(8), bent.synthesize(w))
    m = measure({'w+': w, 'w': w[:, 0], 'inversion': inv}, bent)
    for k in ('w', 'inversion'):
        assert torch.equal(m.response[k], m.response['w+']) and torch.equal(m.distance[k], m.distance['w+'])


def test_unknown_names(bent):
    m = measure({'one': some(bent)}, bent, n=50)
    for args, words in ((('two',), 'no method'), (('one', 'beauty'), 'no measure'), (('one', 'side', 'b'), 'no attribute')):
        with pytest.raises(ValueError, match=words): m.mean(*args)


# ---------------------------------------------------------------- round trip

def test_a_perfect_method_gets_back(straight):
    g, w = straight, some(straight)
    x = g.synthesize(w)
    inverse = lambda y: 4*y.reshape(-1, 1, 6).expand(-1, 2, -1)
    t = round_trip({'perfect': inverse}, g, x, way(g), 1., metrics=dict(near=near), attribute=lambda y: parts(y)['a'])
    assert all(v.abs().max() < 1e-5 for v in t.scores['perfect'].values())
    assert all(v.tolist() == pytest.approx([1]*8, abs=1e-4) for v in t.found['perfect'].values())
    assert t.images['perfect'].shape == (5, 8, 3, 1, 2)


def test_a_method_that_sees_no_edits(straight):
    "It finds the same code whatever it is shown, so that undoing the edit moves away from where one was"
    g, w = straight, some(straight)
    t = round_trip({'blind': lambda y: w}, g, g.synthesize(w), way(g), 1., metrics=dict(near=near), attribute=lambda y: parts(y)['a'])
    assert all(v.abs().max() == 0 for v in t.found['blind'].values())
    s = t.scores['blind']
    assert s['near, edited back and reconstruction'].tolist() == pytest.approx([-.25]*8, rel=1e-4)
    assert s['near, inverted twice and reconstruction'].abs().max() == 0


def test_what_a_method_always_adds_is_not_the_edit(straight):
    g, w = straight, some(straight, scale=.3)
    drifts = lambda y: 4*(y.reshape(-1, 1, 6).expand(-1, 2, -1) + .1)
    t = round_trip({'drifts': drifts}, g, g.synthesize(w), way(g), 1., metrics=dict(near=near), attribute=lambda y: parts(y)['a'])
    assert all(v.tolist() == pytest.approx([1]*8, abs=1e-3) for v in t.found['drifts'].values())


def test_undoing_in_the_code_is_exact_whatever_it_is_worth(bent):
    w, d = some(bent, scale=50.), way(bent)
    torch.testing.assert_close(edit(bent, edit(bent, w, {d: 3.}).w, {d: -3.}).w, w, rtol=1e-6, atol=1e-5)


def test_round_trip_shows_itself(straight):
    g, w = straight, some(straight)
    t = round_trip({'blind': lambda y: w}, g, g.synthesize(w), way(g), 2., metrics=dict(near=near))
    assert t.compare('blind', 'blind', 'near, edited back and input').diff == 0
    assert '| edit found, along the direction | 0% (0% to 0%) |' in t._repr_markdown_() and 'strength 2' in repr(t)
