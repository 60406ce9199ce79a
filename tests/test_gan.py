"Adversarial training: survival, what is refused, and the numbers against plain computations"
import json, os, signal, subprocess, sys
import numpy as np, pytest, torch
from restyle_nb.gan import FeatureCritic, FeatureDiscriminator, GanTrainer, LAYERS, alexnet_features, frechet, frechet_report, pixel_critic
from restyle_nb.generator import Generator
from restyle_nb.losses import LPIPS, Objective
from restyle_nb.training import TrainingError

SMALL = dict(size=16, style_dim=16, n_mlp=2, channels={4:8, 8:8, 16:8}, z_dim=16, mapping_lr=.1)
def small(seed=0):
    torch.manual_seed(seed)
    return Generator(**SMALL)
def pictures(n=24, size=16): return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))*2 - 1
def vectors(n=24): return torch.randn(n, 16, generator=torch.Generator().manual_seed(2))
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))

def test_same_seed_same_weights_another_seed_others():
    runs = [GanTrainer(small(), pictures(), batch_size=4, seed=s) for s in (0, 0, 1)]
    for t in runs: t.fit(3)
    assert same(runs[0].ema, runs[1].ema) and same(runs[0].generator, runs[1].generator)
    assert not same(runs[0].ema, runs[2].ema)

def critics(): return [FeatureCritic(layers=2, r1=1., r1_every=2), pixel_critic(small())]
def run(folder=None):
    return GanTrainer(small(), pictures(), critics(), folder, z=vectors(), anchor=Objective(l2=1., lpips=0.), batch_size=4, save_every=2, log_every=3, path=.5,
                      path_every=3, iterations=9, schedule='linear')

def test_killed_run_goes_on_to_the_bit(tmp_path):
    "SIGKILL after the first checkpoint; resumed, it ends where an undisturbed one ends, and tells the same history"
    whole = run()
    whole.fit()
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\nfrom test_gan import run\nimport os, signal\nt = run({str(tmp_path/'r')!r})\nsave = t.save\ndef kill():\n    save()\n    if t.iteration == 4: os.kill(os.getpid(), signal.SIGKILL)\nt.save = kill\nt.fit()"
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert p.returncode == -signal.SIGKILL, p.stderr[-2000:]
    t = GanTrainer.resume(tmp_path/'r', small(5), pictures(), critics(), z=vectors(), anchor=Objective(l2=1., lpips=0.))
    assert t.iteration == 4
    t.fit()
    assert t.iteration == 9 and same(t.ema, whole.ema) and same(t.generator, whole.generator)
    for a, b in zip(t.critics, whole.critics): assert same(a.net, b.net)
    assert json.dumps(t.history.rows) == json.dumps(whole.history.rows)
    assert [json.loads(l) for l in (tmp_path/'r'/'history.jsonl').read_text().splitlines()] == t.history.rows

def test_another_run_is_not_overwritten_nor_mixed_up(tmp_path):
    GanTrainer(small(), pictures(), folder=tmp_path, batch_size=4).fit(2)
    with pytest.raises(TrainingError, match='holds another run'): GanTrainer(small(), pictures(), folder=tmp_path, batch_size=4).fit(1)
    with pytest.raises(TrainingError, match='not those of the first run'): GanTrainer.resume(tmp_path, small(), pictures(25))
    with pytest.raises(TrainingError, match='does not fit this generator'): GanTrainer.resume(tmp_path, Generator(**SMALL | dict(style_dim=8)), pictures())
    (tmp_path/'last.pt').write_bytes(b'no')
    with pytest.raises(TrainingError, match='not a checkpoint'): GanTrainer.resume(tmp_path, small(), pictures())

def test_frozen_parts_do_not_move_and_the_rest_does():
    t, before = GanTrainer(small(), pictures(), batch_size=4, freeze=('mapping', 'convs.0')), small()
    t.fit(2)
    for (k, a), b in zip(t.generator.named_parameters(), before.parameters()):
        if k.startswith(('mapping', 'convs.0.')): assert torch.equal(a, b), k
        elif not k.endswith('noise_strength'): assert not torch.equal(a, b), k

def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path):
    t = GanTrainer(small(), pictures(), folder=tmp_path, batch_size=4, log_every=1, save_every=1)
    t.fit(2)
    with torch.no_grad(): t.generator.const.fill_(float('nan'))
    with pytest.raises(TrainingError, match='last good state is in'): t.fit(2)
    assert torch.load(tmp_path/'last.pt', weights_only=True)['iteration'] == 2

@pytest.mark.parametrize('bad, message', [(pictures(24, 32), 'the generator draws'), (pictures()*3, r'expected \[-1, 1\]'), (pictures()*float('nan'), r'expected \[-1, 1\]')])
def test_pictures_that_do_not_fit(bad, message):
    with pytest.raises(TrainingError, match=message): GanTrainer(small(), bad, batch_size=4).fit(1)

@pytest.mark.parametrize('kw, message', [(dict(z=torch.zeros(24, 3)), 'a row for each picture'), (dict(anchor=Objective(lpips=0.)), 'give z='), (dict(precision='fp8'), 'precision'),
                                         (dict(schedule='up'), 'schedule'), (dict(freeze=('mapping','const','convs','to_images')), 'nothing to train')])
def test_arguments_that_make_no_sense(kw, message):
    with pytest.raises(TrainingError, match=message): GanTrainer(small(), pictures(), **kw)
    with pytest.raises(TrainingError, match='how long'): GanTrainer(small(), pictures()).fit()

def test_bf16_runs_and_stays_near_fp32():
    a, b = (GanTrainer(small(), pictures(), batch_size=4, precision=p, log_every=1) for p in ('fp32', 'bf16'))
    for t in (a, b): t.fit(2)
    assert not same(a.generator, b.generator)
    for k in ('image', 'image real', 'image fake'): assert abs(a.history[0][k] - b.history[0][k]) < .05*abs(a.history[0][k]), k
    assert all(p.dtype == torch.float32 for p in b.ema.parameters())

def test_mixing_uses_two_codes_and_no_more():
    t = GanTrainer(small(), pictures(), mixing=1., batch_size=4)
    torch.manual_seed(0)
    w = t._codes(vectors(6))
    first = t.generator.map(vectors(6))
    for o, f in zip(w, first):
        assert torch.equal(o[0], f) and not torch.equal(o[-1], f) and len(o.unique(dim=0)) == 2
    t.mixing = 0.
    assert torch.equal(t._codes(vectors(6)), t.generator.broadcast(first))

def test_path_length_is_the_length_of_the_gradient():
    "against a finite difference along the direction that the gradient gives"
    t = GanTrainer(small().double(), pictures().double(), batch_size=4, path=1.)
    g, z = t.generator, vectors(2).double()
    torch.manual_seed(3)
    said = t._lengths(z)                      # one picture, half of the two
    g = small().double()
    torch.manual_seed(3)
    w = g.broadcast(g.map(z[:1]))
    noise = g.noises('random', 1)
    y = g.synthesize(w, noise)
    r = torch.randn_like(y)
    f = lambda w: (g.synthesize(w, noise)*r).sum()/16
    grad = torch.stack([(f(w + 1e-6*e) - f(w - 1e-6*e))/2e-6 for e in torch.eye(w.numel(), dtype=torch.double).reshape(-1, *w.shape)]).reshape(w.shape)
    assert abs(said - grad.square().sum(2).mean(1).sqrt().item()) < 1e-6

def test_average_is_the_running_mean_of_the_weights():
    t = GanTrainer(small(), pictures(), batch_size=4, half_life=40.)
    start = t.generator.const.detach().clone()
    mean = start.clone()
    for i in range(4):
        t.fit(1)
        keep = .5**(4/min(40, (i + 1)*4/20))
        mean = mean*keep + t.generator.const.detach()*(1 - keep)
    assert torch.allclose(t.ema.const, mean, atol=1e-6)

def test_alexnet_is_not_trained_not_saved_and_moves_along():
    d = FeatureDiscriminator(2)
    assert not any('slices' in k for k in d.state_dict()) and sum(p.numel() for p in d.parameters()) < 2e5
    before = [p.clone() for p in d._seen[0].parameters()]
    c = FeatureCritic(2)
    c.fight(0, pictures(4, 32), -pictures(4, 32))
    assert all(torch.equal(a, b) for a, b in zip(before, c.net._seen[0].parameters()))
    assert next(d.double()._seen[0].parameters()).dtype == torch.double

def test_the_scale_is_that_of_the_first_real_pictures():
    d, x = FeatureDiscriminator(1), pictures(8, 32)
    d.meet(x)
    h = next(iter(LPIPS().layers(x)))
    assert torch.allclose(d.mean0, h.mean((0,2,3), keepdim=True)) and torch.allclose(d.std0, h.std((0,2,3), keepdim=True) + 1e-3)
    d.meet(x*.1)
    assert torch.allclose(d.mean0, h.mean((0,2,3), keepdim=True))

def test_frechet_against_a_matrix_square_root_in_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 7)) @ rng.normal(size=(7, 7)), rng.normal(size=(200, 7)) @ rng.normal(size=(7, 7)) + 1
    ca, cb = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(ca @ cb).real.clip(0)).sum()
    plain = ((a.mean(0) - b.mean(0))**2).sum() + np.trace(ca) + np.trace(cb) - 2*root
    assert abs(frechet(torch.from_numpy(a), torch.from_numpy(b)) - plain) < 1e-8*plain
    assert abs(frechet(torch.from_numpy(a), torch.from_numpy(a))) < 1e-8*np.trace(ca)

def test_features_are_the_means_of_the_layers_and_do_not_depend_on_the_batch():
    x = pictures(6, 32)
    f = alexnet_features(x)
    assert f.shape == (6, 1152) and torch.allclose(alexnet_features(x, batch_size=4), f, atol=1e-5)
    hs = list(LPIPS().layers(x))
    for i, h in enumerate(hs, 1): assert torch.allclose(f[:, LAYERS[i]], h.mean((2,3)), atol=1e-5)

def test_report_of_a_generator_that_is_the_data():
    "Real pictures that the generator drew itself: samples are as far as halves are, within chance"
    g = small()
    with torch.no_grad(): real = g(torch.randn(400, 16, generator=torch.Generator().manual_seed(9)))
    r = frechet_report(g, real.clamp(-1, 1), seed=1)
    assert .6 < r['all']['ratio'] < 1.6
    assert frechet_report(small(1), real.clamp(-1, 1), seed=1)['all']['ratio'] > 3
