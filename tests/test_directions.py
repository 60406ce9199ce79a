"Directions: each way against a plain NumPy float64 computation or a generator whose answer is known, what else they do, and what does not fit."
from types import SimpleNamespace
import numpy as np, pytest, torch
from restyle_nb.directions import Samples, boundaries, boundary, effects, from_text, label, look, pca, readings, sefa, text_score
from restyle_nb.editing import ForeignDirection, edit, load_directions, mapped_codes, styles
from restyle_nb.generator import Generator
from restyle_nb.judges import AttributeNet, load_judge
from restyle_nb.zoo import card, load_generator


@pytest.fixture(scope='module')
def g():
    torch.manual_seed(0)
    g = Generator(size=16, style_dim=12, n_mlp=2, channels={4: 6, 8: 5, 16: 4}, mapping_lr=1.)
    g.estimate_latent_avg(500)
    return g.freeze()


class Ruler:
    "A generator whose pictures are its codes: pixel i is the i-th number of the mean style"
    n_styles, style_dim, z_dim, name, fingerprint = 3, 4, 4, 'ruler', 'ruler'
    latent_avg = torch.zeros(3, 4)
    def map(self, z): return z*torch.tensor([1., 2., 3., 4.]) + torch.tensor([0., 0., 5., 0.])
    def synthesize(self, w): return w.mean(1).view(-1, 1, 2, 2)/50

def first(x): return x[:, 0, 0, 0]
def numbers(x): return {f'pixel {i}': o for i, o in enumerate(x.flatten(1).unbind(1))}


# Reading

def test_scores_of_every_kind():
    x = torch.randn(5, 3, 8, 8)
    for score, names in ((first, ['first']), (lambda x: x.sum((1, 2, 3)), ['score']), (dict(a=first, b=lambda x: first(x)*2), ['a', 'b']),
                         (lambda x: dict(rgb=x.mean((2, 3))), ['rgb 0', 'rgb 1', 'rgb 2']), (SimpleNamespace(predict=lambda x: dict(p=first(x).numpy())), ['p'])):
        said = readings(score, x)
        assert list(said) == names and all(o.shape == (5,) and o.dtype == torch.float32 for o in said.values())
    with pytest.raises(ValueError, match=r"'bad' gave shape \(\) for 5 pictures, expected \(5,\)"): readings(dict(bad=lambda x: x.sum()), x)
    with pytest.raises(ValueError, match=r'\(5, 3, 8\)'): readings(lambda x: x.mean(3), x)

def test_the_judge_says_whether_glasses_are_worn():
    torch.manual_seed(0)
    net, x = AttributeNet().eval(), torch.rand(3, 3, 64, 64)
    with torch.no_grad(): said, p = readings(net, x), net.predict(x)
    assert torch.allclose(said['glasses'], 1 - p['glasses'][:, 0]) and torch.equal(said['gaze 1'], p['gaze'][:, 1]) and torch.equal(said['yaw'], p['yaw'])

def test_look_draws_the_mapped_codes_and_reads_each_once(g):
    calls = []
    def score(x): calls.append(len(x)); return x.mean((1, 2, 3))
    seen = look(g, score, n=10, seed=3, batch_size=4)
    assert calls == [4, 4, 2] and torch.equal(seen.w, mapped_codes(g, 10, 3))
    assert torch.allclose(seen.scores['score'], g.synthesize(seen.w).clamp(-1, 1).mean((1, 2, 3)), atol=1e-6)
    assert torch.equal(look(g, score, n=10, seed=3, batch_size=64).w, seen.w) and not torch.equal(look(g, score, n=10).w, seen.w)


# Boundaries

def test_a_boundary_is_the_axis_that_was_read():
    r = Ruler()
    d = boundary(r, numbers, 'pixel 2', n=2000)
    assert d.name == 'pixel 2' and d.made['method'] == 'boundary' and d.home['name'] == 'ruler' and d.unit == 'standard deviations'
    v = d.vector
    assert torch.cosine_similarity(v, torch.tensor([0., 0., 1., 0.]), 0) > .99
    assert v.norm() == pytest.approx(3, rel=.03)                                             # one standard deviation of that number
    on = torch.tensor([[0., 0., 5., 0.], [0., 0., 8., 0.]])                                  # its mean, and one standard deviation further
    assert d.where(on).tolist() == pytest.approx([0, 1], abs=.1)
    assert d.made['accuracy'] > .98 and (d.made['samples'], d.made['of']) == (800, 2000)

def test_the_plane_is_that_of_scikit_learn():
    from sklearn.svm import LinearSVC
    torch.manual_seed(0)
    w, y = torch.randn(200, 4).double(), torch.arange(200) >= 100
    w[y] += 1
    w = w*torch.tensor([1, 2, 3, 4.]) + 7
    d = boundary(Ruler(), codes=w, labels=y, C=.1)
    s = ((w - w.mean(0))**2).mean().sqrt()
    f = LinearSVC(C=.1, class_weight='balanced', dual=False).fit(((w - w.mean(0))/s).numpy(), y.numpy())
    side = f.decision_function(((w - w.mean(0))/s).numpy())
    assert np.allclose(d.where(w).numpy()/side, (d.where(w).numpy()/side).mean(), rtol=1e-3)  # zero, and in proportion, everywhere
    assert np.corrcoef(d.vector.numpy(), f.coef_[0])[0, 1] > 1 - 1e-6

def test_samples_labels_and_score_give_the_same(g):
    score = lambda x: x.mean((1, 2, 3))
    seen = look(g, score, n=200)
    a, b = boundary(g, score, n=200), boundary(g, samples=seen)
    c = boundary(g, codes=seen.w, labels=seen.scores['score'], name='score')
    assert torch.equal(a.vector, b.vector) and torch.equal(a.vector, c.vector) and a.offset == b.offset == c.offset
    many = boundaries(g, samples=Samples(seen.w, dict(x=seen.scores['score'], y=-seen.scores['score'])))
    assert list(many) == ['x', 'y'] and torch.allclose(many['x'].vector, -many['y'].vector, atol=1e-5)
    assert boundary(SimpleNamespace(generator=g), samples=seen, name='mine').name == 'mine'  # anything with a generator

def test_labels_of_two_values_are_all_used_and_unknown_ones_left_out(g):
    w = mapped_codes(g, 60)
    y = (w[:, 0] > w[:, 0].median()).float()
    y[:5] = torch.nan
    assert boundary(g, codes=w, labels=y).made['samples'] == 55
    assert boundary(g, codes=w, labels=w[:, 0]).made['samples'] == 24                        # a fifth on each side
    assert boundary(g, codes=w[:2], labels=[0, 1]).made['accuracy'] is None                 # nobody left to ask

def test_codes_of_every_style_give_w_plus(g):
    w = mapped_codes(g, 100)[:, None].repeat(1, g.n_styles, 1)
    w[:, 2] = mapped_codes(g, 100, seed=9)
    d = boundary(g, codes=w, labels=w[:, 2, 1], name='of style 2')
    assert d.space == 'w+' and d.vector.shape == (g.n_styles, g.style_dim)
    assert d.vector.norm(dim=1).argmax() == 2 and d.vector[2].abs().argmax() == 1
    assert d.where(mapped_codes(g)).std().item() == pytest.approx(1, abs=1e-3)

def test_style_space(g):
    w = mapped_codes(g, 300)
    s = torch.cat(styles(g, w), 1)
    d = boundary(g, codes=w, labels=s[:, 7], space='style')
    assert d.space == 'style' and d.vector.shape == (s.shape[1],)
    assert np.corrcoef((s.double() @ d.vector.double()).numpy(), s[:, 7].numpy())[0, 1] > .9
    assert d.where(mapped_codes(g), g).std().item() == pytest.approx(1, abs=1e-3)

def test_conditional_projection_leaves_the_other_alone():
    r, seen = Ruler(), look(Ruler(), lambda x: dict(sum=x.flatten(1)[:, 1] + x.flatten(1)[:, 2], part=x.flatten(1)[:, 2]), n=2000)
    both, part = boundary(r, name='sum', samples=seen), boundary(r, name='part', samples=seen)
    rest = boundary(r, name='sum', samples=seen, without=[part])
    assert abs(torch.cosine_similarity(both.vector, part.vector, 0)) > .5 and abs(torch.cosine_similarity(rest.vector, part.vector, 0)) < 1e-5
    assert rest.where(mapped_codes(r)).std().item() == pytest.approx(1, abs=1e-3) and rest.made['without'] == ['part'] and rest.name == 'sum'
    e = effects(dict(both=both, rest=rest), r, numbers)
    assert abs(e.change[1, 2]) < .05 < abs(e.change[0, 2]) and e.change[1, 1] == pytest.approx(2, abs=.1)
    with pytest.raises(ValueError, match='nothing is left'): boundary(r, name='part', samples=seen, without=[part])

@pytest.mark.parametrize('kw, words', [
    (dict(), 'nothing to go by'), (dict(codes=torch.zeros(3, 4)), '3 codes and 0 labels'), (dict(codes=torch.randn(3, 4), labels=[1, 1, 1]), 'the same for all 3'),
    (dict(samples=Samples(torch.randn(3, 4), dict(a=torch.arange(3.), b=torch.arange(3.)))), 'reads 2 things; name= one of a, b'),
    (dict(samples=Samples(torch.randn(3, 4), dict(a=torch.arange(3.), b=torch.arange(3.))), name='c'), "nothing reads 'c'; there are a, b"),
    (dict(codes=torch.randn(9, 4), labels=torch.arange(9.), keep=.7), 'keep is 0.7'), (dict(score=first, space='z'), "space is 'z'"),
    (dict(codes=torch.randn(9, 4), labels=torch.tensor([0.]*7 + [1, 2]), keep=.4), 'value 0 on both sides')])
def test_what_does_not_fit_is_said(kw, words):
    with pytest.raises(ValueError, match=words): boundary(Ruler(), **kw)


# Golden: plain NumPy in double precision

def test_pca_is_the_eigenvectors_of_the_covariance(g):
    w = mapped_codes(g, 3000, seed=4).double().numpy()
    values, V = np.linalg.eigh(np.cov(w.T))
    ds = pca(g, 12, samples=3000, seed=4)
    for k, d in enumerate(ds):
        v = V[:, -1-k]*np.sign(V[np.abs(V[:, -1-k]).argmax(), -1-k])
        assert np.allclose(d.vector.numpy(), v*np.sqrt(values[-1-k]), atol=1e-6) and d.offset == pytest.approx(w.mean(0) @ v/np.sqrt(values[-1-k]), abs=1e-6)
        assert d.made['share'] == pytest.approx(values[-1-k]/values.sum(), abs=1e-6) and d.name == f'PC {k+1}'
    assert d.where(torch.from_numpy(w)).mean().item() == pytest.approx(0, abs=1e-5)
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(ds, pca(g, 5, samples=3000, seed=4)))
    assert pca(g, 1, samples=200, layers='medium')[0].layers == (4, 5)
    with pytest.raises(ValueError, match='expected 1 to 12'): pca(g, 13)
    with pytest.raises(ValueError, match='expected 1 to 5'): pca(g, 6, samples=5)

@pytest.mark.parametrize('layers, rows', [(None, range(5)), ('coarse', range(4)), ([2, 5], [2])])
@pytest.mark.parametrize('normalise', [True, False])
def test_sefa_is_the_singular_vectors_of_the_affine_maps(g, layers, rows, normalise):
    A = np.concatenate([g.convs[i].affine.weight.double().numpy()/np.sqrt(g.style_dim) for i in rows])
    if normalise: A = A/np.sqrt((A**2).sum(1, keepdims=True))
    values, V = np.linalg.eigh(sum(a[:, None]*a for a in A))
    w = mapped_codes(g, 1000).double().numpy()
    n = 3
    for k, d in enumerate(sefa(g, n, layers, normalise, samples=1000)):
        v = V[:, -1-k]*np.sign(V[np.abs(V[:, -1-k]).argmax(), -1-k])
        assert np.allclose(d.vector.numpy(), v*(w @ v).std(ddof=1), atol=1e-6) and d.made['share'] == pytest.approx(values[-1-k]/values.sum(), abs=1e-6)
    assert d.layers == (None if layers is None else (0, 1, 2, 3) if layers == 'coarse' else (2, 5))
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(sefa(g, 2), sefa(g, 5)))

def test_sefa_finds_what_the_layers_react_to():
    torch.manual_seed(1)
    h = Generator(size=8, style_dim=6, n_mlp=1, channels={4: 8, 8: 8}, mapping_lr=1.)
    for o in h.convs: o.affine.weight.data[:, 3] *= 10
    d = sefa(h, 1, normalise=False)[0]
    assert d.vector.abs().argmax() == 3 and d.vector[3] > 0
    with pytest.raises(ValueError, match='styles .3,. feed no convolution; there are 3'): sefa(h, layers=[3])
    with pytest.raises(ValueError, match='no more eigenvectors'): sefa(h, 7)


# What they do

def test_effects_are_counted_in_the_spread_of_each_attribute():
    r = Ruler()
    e = effects(pca(r, 4), r, numbers, strength=2., n=100)
    assert e.names == ['PC 1', 'PC 2', 'PC 3', 'PC 4'] and e.targets == ['pixel 3', 'pixel 2', 'pixel 1', 'pixel 0']
    assert torch.allclose(e.change.flip(1).diagonal(), torch.full((4,), 2.), atol=.25) and (e.agree.flip(1).diagonal() == 1).all()
    assert e.best('pixel 1') == 'PC 3' and list(e.side('PC 3', 2)) and 'pixel 1' not in e.side('PC 3')
    back = effects(pca(r, 4), r, numbers, strength=-2., n=100)
    assert torch.allclose(back.moved, -e.moved, atol=1e-4)
    with pytest.raises(ValueError, match="no attribute 'mood'; there are pixel 0"): e.best('mood')
    with pytest.raises(ValueError, match="no direction 'PC 9'"): e.side('PC 9')

def test_effects_against_a_plain_loop(g):
    score = lambda x: dict(a=x[:, 0].mean((1, 2)), b=x.std((1, 2, 3)))
    ds = pca(g, 2, samples=500)
    e = effects(ds, g, score, strength=1.5, n=20, seed=7, batch_size=8)
    w = mapped_codes(g, 20, seed=7)
    for i, d in enumerate(ds):
        for j, k in enumerate('ab'):
            a, b = (score(g.synthesize(o).clamp(-1, 1))[k] for o in (w, w + 1.5*d.vector))
            assert torch.allclose(e.moved[i, j], (b - a)/a.std(), atol=1e-3)
            assert e.agree[i, j] == ((b > a) if (b - a).mean() > 0 else (b < a)).double().mean()

def test_effects_show_themselves():
    r = Ruler()
    e = effects(pca(r, 3), r, numbers, n=30)
    text = e._repr_markdown_()
    assert '| PC 1 | pixel 3 | +' in text and '100%' in text and '30 fresh samples' in text and len(text.splitlines()) == 7
    part = e.only(['PC 2'], ['pixel 0', 'pixel 2'])
    assert part.moved.shape == (1, 2, 30) and torch.equal(part.moved[0, 1], e.moved[1, 2]) and '| PC 2 | pixel 2 |' in part._repr_markdown_()
    assert '| – | – |' in e.only(['PC 1'], ['pixel 0'])._repr_markdown_()                  # its attribute was left out
    import matplotlib.pyplot as plt
    e.plot()
    ax = plt.gca()
    assert [t.get_text() for t in ax.get_xticklabels()] == e.attributes and ax.get_images()[0].get_array().shape == (3, 4)
    bold = {t.get_text() for t in ax.texts if t.get_weight() == 'bold'}
    assert bold and all(abs(float(t.replace('\N{MINUS SIGN}', '-'))) > 1 for t in bold)
    plt.close('all')

def test_a_score_that_never_varies_has_no_unit():
    with pytest.raises(ValueError, match="'flat' is 1 for all 10 samples"): effects(pca(Ruler(), 1), Ruler(), dict(flat=lambda x: torch.ones(len(x))), n=10)

def test_effects_of_a_foreign_direction_are_refused_or_allowed(g):
    torch.manual_seed(5)
    h = Generator(**g.config).freeze()
    d = pca(g, 1, samples=200)[0]
    with pytest.raises(ForeignDirection): effects(d, h, first, n=4)
    assert effects(d, h, first, n=4, allow=d.home['fingerprint']).moved.shape == (1, 1, 4)

def test_labels_say_more_not_less():
    r = Ruler()
    ds = [-d for d in pca(r, 3)]
    named = label(ds, effects(ds, r, numbers))
    assert [d.name for d in named] == ['-PC 1: pixel 3', '-PC 2: pixel 2', '-PC 3: pixel 1'] and all(d.vector.sum() > 0 for d in named)
    assert torch.equal(named[0].vector, -ds[0].vector) and named[0].offset == -ds[0].offset and named[0].made['change'] == pytest.approx(2, abs=.2)
    w = mapped_codes(r, 50)
    assert torch.allclose(named[0].where(w), -ds[0].where(w), atol=1e-5)
    noise = lambda x: torch.randn(len(x), generator=torch.Generator().manual_seed(int(1e6*x.abs().sum()) % 999))
    assert label(ds, effects(ds, r, dict(noise=noise)))[0].name == '-PC 1'                  # nothing that samples agree on
    with pytest.raises(ValueError, match="no direction"): label(pca(r, 4), effects(ds, r, numbers, n=10))


# Text

class Clip(torch.nn.Module):
    "Pictures and sentences as vectors of 4 numbers; a sentence names the pixel it is about"
    def __init__(self, side=2, mean=(0., 0., 0.), std=(1., 1., 1.)):
        super().__init__()
        self.visual, self.p = SimpleNamespace(image_size=side, image_mean=mean, image_std=std), torch.nn.Parameter(torch.zeros(()))
    def encode_image(self, x):
        assert x.shape[1:] == (3, 2, 2)
        self.saw = x
        return x[:, 0].flatten(1)
    def encode_text(self, tokens): return torch.nn.functional.one_hot(torch.tensor([int(t[-1]) for t in tokens]), 4).float()

class Hugging:
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=2))
    def get_image_features(self, pixel_values): return SimpleNamespace(pooler_output=pixel_values[:, 0].flatten(1)*.26862954 + .48145466)
    def get_text_features(self, input_ids, attention_mask): return torch.nn.functional.one_hot(input_ids, 4).float()

def test_a_sentence_is_a_score():
    x = torch.rand(5, 3, 4, 4)*2 - 1
    score = text_score(Clip(), 'more of 2', 'of 0')
    small = torch.nn.functional.interpolate(x, (2, 2), mode='bicubic', antialias=True).clamp(-1, 1)/2 + .5
    v = torch.nn.functional.normalize(small[:, 0].flatten(1), dim=1)
    assert torch.allclose(score(x), v[:, 2] - v[:, 0], atol=1e-6) and score.__name__ == 'more of 2'
    clip = Clip(mean=(.5, .5, .5), std=(.25, .5, 1.))
    text_score(clip, 'of 1', 'of 0')(x)
    assert torch.allclose(clip.saw, (small - .5)/torch.tensor([.25, .5, 1.]).view(3, 1, 1), atol=1e-6)
    h = text_score(Hugging(), 'more of 2', 'of 0', lambda texts: dict(input_ids=torch.tensor([int(t[-1]) for t in texts]), attention_mask=None))
    assert torch.allclose(h(x), score(x), atol=1e-5)
    with pytest.raises(TypeError, match='neither encode_image'): text_score(object(), 'a')

def test_a_sentence_is_a_direction():
    r = Ruler()
    r.synthesize = lambda w: (w.mean(1).view(-1, 1, 2, 2)/50).expand(-1, 3, -1, -1)
    d = from_text(r, Clip(), 'of 3', 'of 0', n=1500)
    assert d.name == 'of 3' and d.made['method'] == 'text' and d.made['neutral'] == 'of 0' and d.made['clip'] == 'Clip'
    assert d.vector.argmax() == 3 and d.vector[0] < 0
    assert d.where(mapped_codes(r)).std().item() == pytest.approx(1, abs=1e-3)


# The set that ships

@pytest.fixture(scope='module')
def faces(): return load_generator('faces64', device='cpu'), load_directions('faces64')

def test_the_embedded_directions_are_at_home_and_one_std_long(faces):
    g, ds = faces
    w = mapped_codes(g)
    for d in ds.values():
        d.check(g)
        assert d.where(w).std().item() == pytest.approx(1, abs=.01), d.name
        assert d.unit == 'standard deviations' and d.made['method'] in ('boundary', 'pca', 'sefa')
    assert list(ds)[:6] == ['smile', 'age', 'yaw', 'hair', 'beard', 'glasses']
    assert {'pca', 'sefa'} <= {d.made['method'] for d in ds.values()} and len(ds) < 80

def test_the_embedded_components_can_be_made_again(faces):
    g, ds = faces
    for again, word in ((pca(g, 3), 'PC'), (sefa(g, 3), 'SeFa')):
        for d in again:
            kept = next(v for k, v in ds.items() if k.split(':')[0] == d.name)
            assert torch.allclose(kept.vector.abs(), d.vector.abs(), atol=1e-4) and abs(torch.cosine_similarity(kept.vector, d.vector, 0)) > .9999

def test_at_least_six_attributes_three_ways(faces):
    "The judge agrees on at least 90 % of 200 samples that made none of them; what the card says is what is measured"
    g, ds = faces
    judge, metrics = load_judge('attributes', device='cpu'), card('faces64-directions').metrics
    assert set(metrics) == set(ds)
    by = lambda method, a: [k for k, d in ds.items() if d.made['method'] == method and d.made.get('attribute') == a and metrics[k]['agree'] >= .9]
    three = [a for a in 'yaw pitch roll zoom tx ty skin hair_volume fringe fade warm open'.split() if all(by(m, a) for m in ('boundary', 'pca', 'sefa'))]
    assert len(three) >= 6
    some = [by(m, three[0])[0] for m in ('boundary', 'pca', 'sefa')]
    e = effects({k: ds[k] for k in some}, g, lambda x: {three[0]: judge.predict(x)[three[0]]})
    for i, k in enumerate(some): assert e.agree[i, 0] >= .9 and e.agree[i, 0].item() == pytest.approx(metrics[k]['agree'], abs=.01), k
