"Memory: one step's worth whatever N is, and less if layers are run twice or in 16 bits."
import contextlib
import os, weakref
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from restyle_nb.encoders import build_encoder
from restyle_nb.generator import Generator
from restyle_nb.losses import Objective
from restyle_nb.restyle import ReStyle
from restyle_nb.training import Trainer, TrainingError
from test_processes import Server

class Alive(TorchDispatchMode):
    "Bytes of all tensors made inside that are still there: `now`, and at the worst moment `peak`"
    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
    def __torch_dispatch__(self, f, types, args=(), kw=None):
        out = f(*args, **(kw or {}))
        storages = lambda o: {s._cdata: s for t in tree_leaves(o) if isinstance(t, torch.Tensor) for s in [t.untyped_storage()]}
        known = storages((args, kw))
        for k, s in storages(out).items():
            if k in known or k in self.sizes: continue
            self.sizes[k] = s.nbytes()
            self.now += s.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(s, self.forget, k)
        return out
    def forget(self, k): self.now -= self.sizes.pop(k)

def generator(size=128, **kw):
    torch.manual_seed(0)
    g = Generator(size=size, style_dim=8, n_mlp=1, channels={4:16, 8:16, 16:16, 32:16, 64:16, 128:8}, **kw)
    for c in g.convs: c.noise_strength.data.fill_(.2)
    g.estimate_latent_avg(100)
    return g

def trainer(**kw):
    g = generator()
    e = build_encoder('compact', n_styles=g.n_styles, style_dim=8, input_size=(128, 128), widths=(8, 8, 8, 8))
    x = torch.rand(16, 3, 128, 128, generator=torch.Generator().manual_seed(1))*2 - 1
    return Trainer(ReStyle(e, g), x, Objective(lpips=0), **dict(dict(batch_size=8, lr=1e-3, noise='random'), **kw))

def resident(n_steps):
    "Largest memory of this process, in bytes, over two iterations of N steps: as the kernel sees it"
    t = trainer(n_steps=n_steps, keep_memory=False)
    before = int(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1])
    t.fit(2)
    return 1024*(int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) - before)

def peak(t):
    "Bytes alive at the worst moment of an iteration, the second one: the optimiser has its averages by then"
    t.fit(1)
    with Alive() as m: t._iterate()
    return m.peak

@pytest.mark.parametrize('update, steps', [('batch', (1, 5, 10)), ('step', (1, 5))])
def test_steps_do_not_add_up(update, steps):
    peaks = {n: peak(trainer(n_steps=n, update=update)) for n in steps}
    print(update, {n: f'{p/2**20:.1f} MiB' for n, p in peaks.items()})
    assert max(peaks.values()) < 1.05*min(peaks.values())

@pytest.mark.skipif(not os.path.exists('/proc/self/status') or not hasattr(os, 'fork'), reason='needs Linux')
def test_steps_do_not_add_up_for_the_kernel_either(tmp_path):
    with Server(tmp_path, MALLOC_MMAP_THRESHOLD_='500000') as s: # what is freed goes back at once, else one measures the gaps that malloc keeps
        peaks = {n: min(s(1, module='test_memory', job='resident', n_steps=n)[0] for _ in range(2)) for n in (1, 10)}
    print({n: f'{p/2**20:.1f} MiB' for n, p in peaks.items()})
    assert abs(peaks[10] - peaks[1]) < 30*2**20                     # pages and gaps, up to 20; a single step that was kept would bring more than 40

def test_all_steps_at_once_would_add_up():
    "What is measured is there: a loop that keeps its steps needs N times as much"
    t = trainer()
    x = t.batch(0)
    def kept(n):
        with Alive() as m: losses = [t.objective(t.objective.prepare(x), s)[0] for s in t.net.steps(x, n)]
        return m.peak
    assert kept(5) > 4*kept(1)

def run(g, w, frm=None, precision=None):
    "Picture, gradients of code and of weights, and what was kept and needed"
    g.recompute_from, w = frm, w.clone().requires_grad_()
    for p in g.parameters(): p.grad = None
    with Alive() as m:
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'): y = g.synthesize(w)
        kept = m.now
        y.float().square().mean().backward()
    return y.detach(), [w.grad, *(p.grad for p in g.parameters() if p.grad is not None)], kept, m.peak

@pytest.mark.parametrize('frozen', [True, False])
def test_layers_run_twice_give_the_same_with_less(frozen):
    g = generator().requires_grad_(not frozen)
    w = g.broadcast(torch.randn(4, 8, generator=torch.Generator().manual_seed(3)))
    y, grads, kept, most = run(g, w)
    before = kept
    for r in (128, 64, 8):
        again, same, less, top = run(g, w, r)
        print(frozen, r, f'kept {less/kept:.2f}, peak {top/most:.2f}')
        assert torch.equal(again, y) and len(same) == len(grads) and all(torch.equal(a, b) for a, b in zip(grads, same))
        assert less < .95*before and top < .85*most
        before = less
    assert before < .35*kept and top < .5*most

def test_nothing_is_run_twice_without_a_gradient():
    g, calls = generator().freeze(), []
    g.convs[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    w = g.broadcast(torch.randn(2, 8))
    g.recompute_from = 8
    with torch.no_grad(): y = g.synthesize(w)
    assert len(calls) == 1 and y.grad_fn is None
    g.synthesize(w.requires_grad_()).sum().backward()
    assert len(calls) == 3

@pytest.mark.parametrize('noise', ['fixed', 'random'])
def test_trainer_with_layers_run_twice(noise, monkeypatch):
    "Same weights to the last bit, random noise included: planes are drawn once, not again. Lean layers hold as little without it"
    plain, twice = trainer(n_steps=2, noise=noise), trainer(n_steps=2, noise=noise, recompute_from=32)
    a, b = peak(plain), peak(twice)
    with monkeypatch.context() as m:
        m.setattr('restyle_nb.training.slim', contextlib.nullcontext)
        full, less = peak(trainer(n_steps=2, noise=noise)), peak(trainer(n_steps=2, noise=noise, recompute_from=32))
    print(f'lean {a/full:.2f}, lean and twice {b/full:.2f}, twice {less/full:.2f}')
    assert a < .7*full and less < .7*full and b < 1.1*a
    assert all(torch.equal(p, q) for p, q in zip(plain.net.encoder.state_dict().values(), twice.net.encoder.state_dict().values()))
    with pytest.raises((TrainingError, ValueError), match='recompute_from.*48.*128'): trainer(recompute_from=48).fit(1)

def test_parts_of_a_batch_need_less():
    whole, parts = peak(trainer(n_steps=2)), peak(trainer(n_steps=2, micro_batch=2))
    print(f'parts of 2 of 8: {parts/whole:.2f}')
    assert parts < .4*whole

def test_sixteen_bits_stay_sixteen_bits():
    "Noise, bias and demodulation do not bring the maps back to 32: half the memory, and nearly the same picture"
    g = generator().freeze()
    w = g.broadcast(torch.randn(4, 8, generator=torch.Generator().manual_seed(3)))
    seen = []
    for c in g.convs: c.register_forward_hook(lambda m, i, y: seen.append(y.dtype))
    y, _, kept, most = run(g, w)
    half, _, less, top = run(g, w, precision='bf16')
    print(f'bf16: kept {less/kept:.2f}, peak {top/most:.2f}, off by {(half.float() - y).std()/y.std():.4f} of the spread')
    assert set(seen) == {torch.float32, torch.bfloat16} and len(seen) == 2*len(g.convs)
    assert less < .6*kept and (half.float() - y).std() < .03*y.std()
