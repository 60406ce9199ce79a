"""Critics and progressive training: what they add to a run, and that a killed run with them equals an uninterrupted one to the bit."""
import math, os, sys, warnings
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from restyle_nb.encoders import build_encoder
from restyle_nb.generator import Generator
from restyle_nb.images import Geometry
from restyle_nb.losses import Objective, ImageCritic, LatentCritic
from restyle_nb.restyle import ReStyle
from restyle_nb.training import Ranger, Trainer, TrainingError, stage_at
from test_training import killed_and_resumed

class Judge:
    "A critic in ten lines: what the protocol asks for and no more."
    def __init__(self, d=8, weight=.1, name='judge', every=4):
        torch.manual_seed(5)
        self.name, self.weight, self.every, self.net, self.calls = name, weight, every, nn.Linear(d, 1), []
        self.optimizer, self.pool = torch.optim.SGD(self.net.parameters(), 1e-2, momentum=.5), torch.zeros(4, d)
    def styles(self, w, stage): return w if stage is None else w[:, :stage + 1]
    def loss(self, y, w, stage=None):
        return F.softplus(-F.linear(self.styles(w, stage), self.net.weight.detach(), self.net.bias.detach()))[..., 0].mean(1)
    def learn(self, i, x, steps, stage=None):
        self.calls.append((i, stage, [tuple(s.y.shape) for s in steps], any(o.requires_grad for s in steps for o in s[1:])))
        self.pool = .5*self.pool + .5*torch.cat([s.w[:2].mean(1) for s in steps])[:4]
        real, fake = self.net(torch.randn(4, self.pool.shape[1])), self.net(self.pool)
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        self.optimizer.zero_grad(); loss.backward(); self.optimizer.step()
        out = dict(real=real.mean().detach(), fake=fake.mean().detach())
        return out | dict(seldom=torch.tensor(float(i))) if i % self.every == 0 else out
    def to(self, device): return self
    def state_dict(self): return dict(net=self.net.state_dict(), optimizer=self.optimizer.state_dict(), pool=self.pool)
    def load_state_dict(self, s):
        self.net.load_state_dict(s['net']); self.optimizer.load_state_dict(s['optimizer']); self.pool = s['pool'].clone()

def world(head='progressive'):
    torch.manual_seed(0)
    g = Generator(size=32, style_dim=8, n_mlp=2, channels={4:8, 8:8, 16:8, 32:8})
    for c in g.convs: c.noise_strength.data.fill_(.2)
    g.estimate_latent_avg(500)
    with torch.no_grad(): x = F.avg_pool2d(g.synthesize(g.map(torch.randn(40, 8))).clamp(-1, 1), 2)
    e = build_encoder('compact', head, n_styles=g.n_styles, style_dim=8, input_size=(16, 16), widths=(4, 8, 8, 8))
    return ReStyle(e, g, Geometry((16, 16), (32, 32))), x

def parts(kind, net):
    "Objective and critics, freshly made."
    torch.manual_seed(7)
    critics = dict(judge=lambda: [Judge()], latent=lambda: [LatentCritic(net.generator, weight=.1, lr=1e-3, r1_every=4, pool=5)],
                   published=lambda: [LatentCritic(net.generator, weight=.1, lr=1e-3, r1_every=4, pool=5, fakes='published')],
                   image=lambda: [ImageCritic(16, weight=.1, lr=1e-3, r1_every=4, channels={4:8, 8:8, 16:8})])
    made = [c for k in kind.split('+') if k in critics for c in critics[k]()]
    return Objective(lpips=0, delta=1e-2 if 'delta' in kind else 0), made

def trainer(kind='judge', folder=None, head='progressive', **kw):
    net, x = world(head)
    objective, critics = parts(kind, net)
    kw = dict(dict(n_steps=2, batch_size=6, iterations=18, lr=2e-3, clip=1., noise='random', flip=True, val=x[:8], val_every=7, save_every=3, log_every=2,
                   progressive=(4, 2) if 'progressive' in head else None), **kw)
    return Trainer(net, x[8:], objective, folder, **(dict(critics=critics) | kw))

def go_on(kind, folder, head='progressive'):
    net, x = world(head)
    for p in net.encoder.parameters(): p.data.fill_(.1)
    objective, critics = parts(kind, net)
    return Trainer.resume(folder, net, x[8:], objective, val=x[:8], critics=critics)

def weights(t): return torch.cat([p.detach().flatten().float() for p in t.net.encoder.state_dict().values()])

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
@pytest.mark.parametrize('kind, update, optimizer', [('latent+delta', 'batch', 'ranger'), ('latent+delta', 'step', 'adam'), ('image+judge', 'batch', 'adam')])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, kind, update, optimizer):
    a, b = killed_and_resumed(tmp_path, 'test_critics_training', f'trainer({kind!r}, folder, update={update!r}, optimizer={optimizer!r})', f'go_on({kind!r}, folder)', 3, 18)
    assert all(same(a[k], b[k]) for k in ('encoder', 'optimizer', 'critics', 'stage', 'history'))
    assert len(a['critics']) == len(kind.removesuffix('+delta').split('+'))

@pytest.mark.parametrize('kind, at', [('judge', 11), ('latent+delta', 11), ('published+delta', 5), ('latent+image', 5)])
def test_resume_in_the_middle_of_a_row_and_of_a_stage(tmp_path, kind, at):
    a, b = trainer(kind, log_every=8, optimizer='ranger'), trainer(kind, tmp_path, log_every=8, optimizer='ranger')
    a.fit()
    with pytest.raises(KeyboardInterrupt):
        b.loader.batch = lambda i, f=b.loader.batch: f(i) if i < at else (_ for _ in ()).throw(KeyboardInterrupt)
        b.fit()
    c = go_on(kind, tmp_path)
    assert c.iteration == at//3*3 and c.since == c.iteration % 8
    c.fit()
    assert c.history.rows == a.history.rows and torch.equal(weights(a), weights(c))
    assert all(same(o.state_dict(), p.state_dict()) for o, p in zip(a.critics, c.critics))

# ---------------------------------------------------------------- critics

def test_a_critic_that_only_watches_changes_nothing():
    a, b, c = trainer(critics=()), trainer(critics=[Judge(weight=0.)]), trainer()
    for t in (a, b, c): t.fit(6)
    assert torch.equal(weights(a), weights(b)) and not torch.equal(weights(a), weights(c))
    assert all(p[k] == q[k] for p, q in zip(a.history.rows, b.history.rows) for k in p)
    assert 'judge real' in b.history[0] and len(b.history[0]['judge']) == 2

def test_what_a_critic_is_given():
    t = trainer(progressive=(2, 1), n_steps=3)
    calls, forward = [], t.net.encoder.forward
    t.net.encoder.forward = lambda *a: calls.append(1) or forward(*a)
    t.preflight = lambda: None
    t.val = None
    t.fit(4)
    seen = t.critics[0].calls
    assert [c[:2] for c in seen] == [(0, 0), (1, 0), (2, 1), (3, 2)]
    assert all(c[2] == [(6, 3, 16, 16)]*3 and not c[3] for c in seen)      # as the encoder sees it, detached
    assert len(calls) == 4*3                                               # no pass of the encoder more

def test_the_total_is_the_weighted_sum_and_its_gradient_reaches_the_encoder():
    sgd = lambda params, lr: torch.optim.SGD(params, lr)
    t = trainer('judge+delta', optimizer=sgd, clip=None, noise='fixed', flip=False, lr=1e-3)
    t._enter(3)
    t.net.encoder.train()
    x, before, judge = t.batch(0), [p.detach().clone() for p in t.params], t.critics[0]
    target, grads, totals = t.objective.prepare(x), 0, []
    for s in t.net.steps(x, 2):
        y = t.net.geometry.feed(s.y)
        delta = (s.w[:, 1:4] - s.w[:, :1]).norm(dim=2).sum(1).mean()
        critic = F.softplus(-judge.net(s.w[:, :4]))[..., 0].mean()
        total = (y - x).square().mean() + 1e-2*delta + .1*critic
        g = torch.autograd.grad(total, t.params, allow_unused=True)
        grads, totals = grads + torch.cat([(torch.zeros_like(p) if o is None else o).flatten() for p, o in zip(t.params, g)]), totals + [total.detach()]
    rows = t.train_batch(x)
    torch.testing.assert_close(rows[0], torch.stack(totals), atol=1e-6, rtol=1e-5)
    assert t.names == ['loss', 'l2', 'delta', 'judge'] and len(rows) == 4
    moved = torch.cat([(b - p.detach()).flatten() for p, b in zip(t.params, before)])
    torch.testing.assert_close(moved, 1e-3*grads, atol=1e-6, rtol=1e-3)

@pytest.mark.parametrize('kind', ['latent', 'published', 'image'])
def test_the_encoder_s_loss_leaves_the_critic_alone_and_the_other_way_round(kind):
    t = trainer(kind)
    t._enter(2)
    c = t.critics[0]
    before = [o.clone() for o in _state_tensors(c)]
    s = next(t.net.steps(t.batch(0), 1))
    s = s._replace(y=t.net.geometry.feed(s.y))
    v = c.loss(s.y, s.w, 2)
    assert v.shape == (6,) and v.isfinite().all()
    v.mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in t.params)
    assert all(torch.equal(a, b) for a, b in zip(before, _state_tensors(c)))
    grads = [None if p.grad is None else p.grad.clone() for p in t.params]
    told = c.learn(0, t.batch(0), [type(s)(s.t, *(o.detach() for o in s[1:]))], 2)
    assert told and all(not torch.as_tensor(o).requires_grad and math.isfinite(float(o)) for o in told.values())
    assert all((a is None and p.grad is None) or torch.equal(a, p.grad) for a, p in zip(grads, t.params))
    assert not all(torch.equal(a, b) for a, b in zip(before, _state_tensors(c)))

def _state_tensors(o):
    o = o.state_dict() if hasattr(o, 'state_dict') else o
    if isinstance(o, torch.Tensor): yield o
    elif isinstance(o, (dict, list, tuple)):
        for v in o.values() if isinstance(o, dict) else o: yield from _state_tensors(v)

def test_history_holds_means_over_the_interval():
    said = []
    judge = Judge(every=3)
    learn = judge.learn
    judge.learn = lambda *a: said.append(learn(*a)) or said[-1]
    t = trainer(critics=[judge], log_every=4, val=None)
    t.fit(8)
    for row, part in zip(t.history.of('train'), (said[:4], said[4:])):
        for k in ('real', 'fake', 'seldom'):
            values = [float(o[k]) for o in part if k in o]
            assert row[f'judge {k}'] == pytest.approx(sum(values)/len(values), rel=1e-5)
    assert t.history.table('train', 'judge real', as_dicts=True)[1]['judge real'] == t.history[1]['judge real']
    assert 'step 2' in t.history.table('train', 'judge') and 'step' not in t.history.table('train', 'judge real')

@pytest.mark.parametrize('kind', ['judge', 'latent+image+delta'])
def test_nothing_is_read_from_the_device_inside_an_iteration(kind, monkeypatch):
    t, read = trainer(kind, clip=1.), []
    t._enter(3)
    x = t.batch(0)
    t.net.start(1)
    for name in ('item', 'tolist', '__float__', '__bool__', '__int__', 'cpu', 'numpy', 'nonzero'):
        def spy(self, *a, _f=getattr(torch.Tensor, name), _n=name, **k):
            f = sys._getframe(1)
            drawn = f.f_code.co_name in ('learn', 'query') and not self.is_floating_point()    # lots of the critics' own, drawn on the CPU
            if not drawn and not f.f_globals.get('__name__', '').startswith('torch'): read.append(f'{_n} in {f.f_code.co_name}')
            return _f(self, *a, **k)
        monkeypatch.setattr(torch.Tensor, name, spy)
    t.train_batch(x)
    assert not read, read
    t.sums, t.since = torch.zeros(len(t.names), 2), 1
    t._log()
    assert read                                                            # the spy works

def test_several_processes_of_a_critic_have_names(tmp_path):
    with pytest.raises(TrainingError, match='judge names two terms'): trainer(critics=[Judge(), Judge()])
    with pytest.raises(TrainingError, match='l2 names two terms'): trainer(critics=[Judge(name='l2')])
    with pytest.raises(TrainingError, match='object has no name, weight, loss'): trainer(critics=[object()])
    t = trainer(critics=Judge())
    t.fit(1)
    assert [c.name for c in t.critics] == ['judge']

def test_resume_refuses_other_critics(tmp_path):
    trainer('judge', tmp_path).fit(3)
    net, x = world()
    with pytest.raises(TrainingError, match=r"critics \['judge'\], found \[\]"): Trainer.resume(tmp_path, net, x[8:], parts('judge', net)[0])
    with pytest.raises(TrainingError, match='a critic does not fit'):
        Trainer.resume(tmp_path, net, x[8:], parts('judge', net)[0], critics=[Judge(d=9)])

def test_a_critic_that_is_not_a_number_stops_the_run(tmp_path):
    t = trainer('judge', tmp_path)
    t.fit(6)
    good = (tmp_path/'last.pt').read_bytes()
    learn = t.critics[0].learn
    t.critics[0].learn = lambda *a: learn(*a) | dict(fake=torch.tensor(math.nan))
    with pytest.raises(TrainingError, match='judge fake is nan.*last.pt'): t.fit(6)
    t = go_on('judge', tmp_path)
    t.log_every = 1000
    t.critics[0].weight = 0.
    t._hear = lambda *a: t.critics[0].pool.fill_(math.inf)
    with pytest.raises(TrainingError, match='a weight of the judge is not finite'): t.fit(9)
    assert (tmp_path/'last.pt').read_bytes() == good

def test_only_critics_and_nothing_at_all():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        t = trainer(val=None)
        t.objective = Objective(l2=0, lpips=0)
        assert t.fit(2)[0]['loss'] == pytest.approx([.1*v for v in t.history[0]['judge']], rel=1e-5)
        t = trainer(critics=(), val=None)
        t.objective = Objective(l2=0, lpips=0)
        with pytest.raises(TrainingError, match='nothing to learn from'): t.fit(2)

# ---------------------------------------------------------------- stages

def test_the_published_schedule():
    stages = [stage_at(i, 18) for i in range(60_000)]
    assert stages[:20_000] == [0]*20_000 and stages[20_000] == 1 and stages.index(17) == 52_000 and max(stages) == 17
    assert all(b - a in (0, 1) for a, b in zip(stages, stages[1:]))

def test_stages_over_a_run():
    t = trainer('judge+delta', progressive=(3, 2), log_every=1, iterations=20)
    t.fit(3)
    assert t.net.encoder.head.stage == t.objective.stage == t.stage == 0
    with torch.no_grad(): w = next(t.net.steps(t.batch(0), 1)).w - t.net.latent_avg
    torch.testing.assert_close(w, w[:, :1].expand_as(w))                   # W only
    t.fit()
    assert [r['stage'] for r in t.history.of('train')] == [stage_at(i, 8, 3, 2) for i in range(20)]
    assert t.history.of('train')[2]['delta'][0]  < 1e-5 < t.history.of('train')[9]['delta'][0]
    assert t.net.encoder.head.stage is t.objective.stage is t.stage is None

def test_styles_that_are_not_free_do_not_learn():
    t = trainer('judge', progressive=(2, 3), iterations=24)
    before = t.net.encoder.head.linear.weight.detach().clone()
    t.fit(7)                                                               # stages 0, 0, 1, 1, 1, 2, 2
    moved = (t.net.encoder.head.linear.weight.detach() - before).abs().flatten(1).sum(1) > 0
    assert moved.tolist() == [True]*3 + [False]*5

@pytest.mark.parametrize('head', ['progressive', 'fpn_progressive'])
def test_a_style_that_joins_late_starts_like_any_other(head):
    "Adam's first step is lr long, whenever it comes; its count of steps is that of the style."
    t = trainer('judge', head=head, critics=(), progressive=(30, 1), n_steps=1, lr=1e-3, clip=None, val=None, iterations=40)
    t.fit(30)
    linears = [g.linear.weight for g in getattr(t.net.encoder.head, 'groups', [t.net.encoder.head])]
    before = torch.cat([w.detach().clone() for w in linears])
    t.fit(1)                                                               # style 1 joins
    moved = (torch.cat([w.detach() for w in linears]) - before).abs().flatten(1).amax(1)
    assert moved[1] == pytest.approx(1e-3, rel=1e-2) and not moved[2:].any()
    steps = {(j, int(t.optimizer.state[o]['step'])) for of in t._own.values() for o, j, _ in of if o in t.optimizer.state}
    assert steps == {(0, 31), (1, 1)}
    assert all(o.data_ptr() == p[rows].data_ptr() for p, of in t._own.items() for o, _, rows in of)

def test_plain_heads_are_optimised_as_they_are():
    t = trainer(progressive=None)
    assert not t._own and [id(p) for g in t.optimizer.param_groups for p in g['params']] == [id(p) for p in t.params]

def test_a_run_too_short_for_its_stages_says_so_and_keeps_its_stage(tmp_path):
    with pytest.warns(UserWarning, match='only 2 of 7 styles are free'): t = trainer('judge', tmp_path, progressive=(4, 4), iterations=10)
    t.fit()
    assert t.net.encoder.head.stage == 2
    with pytest.warns(UserWarning): assert go_on('judge', tmp_path).net.encoder.head.stage == 2

def test_best_weights_come_back_with_their_stage(tmp_path):
    t = trainer('judge', tmp_path, progressive=(2, 2), val_every=2, iterations=20)
    t.fit(6)
    state = torch.load(tmp_path/'best.pt', weights_only=True)
    assert t.restore_best() == state['iteration'] and t.net.encoder.head.stage == state['stage'] == stage_at(state['iteration'] - 1, 8, 2, 2)

def test_progressive_needs_a_head_with_stages():
    with pytest.raises(TrainingError, match="SimpleHead gives all styles at once.*head='progressive'"): trainer(head='simple', progressive=(1, 1))
    for bad in (3, (1,), (1, 0), (-1, 2), (1.5, 2), 'soon'):
        with pytest.raises(TrainingError, match='progressive must be'): trainer(progressive=bad)

@pytest.mark.parametrize('head', ['fpn_progressive', 'progressive'])
def test_a_stage_fixed_by_hand_is_kept(head):
    t = trainer('judge', head=head, progressive=None, val=None)
    t.net.encoder.head.stage = 1
    t.fit(2)
    assert t.net.encoder.head.stage == t.objective.stage == 1 and {c[1] for c in t.critics[0].calls} == {1}

# ---------------------------------------------------------------- the optimiser of the published code

def plain_ranger(p, grads, lr, b1=.95, b2=.999, eps=1e-5, k=6, alpha=.5):
    "As written in the papers of its three ideas, in float64: one tensor, a list of gradients."
    p, m, v, slow = p.double().clone(), 0, 0, p.double().clone()
    for t, g in enumerate(grads, 1):
        g = g.double()
        if g.ndim > 1: g = g - g.mean(tuple(range(1, g.ndim)), keepdim=True)
        m, v = b1*m + (1 - b1)*g, b2*v + (1 - b2)*g*g
        longest = 2/(1 - b2) - 1
        length = longest - 2*t*b2**t/(1 - b2**t)
        if length > 5:
            rect = math.sqrt((length - 4)*(length - 2)*longest/((longest - 4)*(longest - 2)*length))
            p = p - lr*rect*math.sqrt(1 - b2**t)/(1 - b1**t)*m/(v.sqrt() + eps)
        else: p = p - lr/(1 - b1**t)*m
        if t % k == 0: slow = slow + alpha*(p - slow); p = slow.clone()
    return p

@pytest.mark.parametrize('shape', [(5,), (4, 3), (4, 3, 3, 3)])
def test_ranger_is_its_formula(shape):
    torch.manual_seed(0)
    p, grads = torch.randn(shape), [torch.randn(shape) for _ in range(20)]
    q = nn.Parameter(p.clone())
    o = Ranger([q], lr=1e-2)
    for i, g in enumerate(grads):
        q.grad = g.clone()
        o.step()
        if i == 8:                                                         # into another one, in the middle of a turn
            state, q, last = o.state_dict(), nn.Parameter(q.detach().clone()), q
            o = Ranger([q], lr=1e-2)
            o.load_state_dict(state)
    torch.testing.assert_close(q.detach().double(), plain_ranger(p, grads, 1e-2), atol=1e-6, rtol=1e-5)

def test_ranger_treats_stacked_linear_layers_one_by_one():
    torch.manual_seed(0)
    p, g = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    whole, parts = nn.Parameter(p.clone()), [nn.Parameter(o.clone()) for o in p]
    whole.grad = g.clone()
    for q, o in zip(parts, g): q.grad = o.clone()
    Ranger([whole]).step(), Ranger(parts).step()
    torch.testing.assert_close(whole.detach(), torch.stack(parts).detach(), atol=1e-8, rtol=1e-6)

def test_an_optimiser_by_name():
    assert isinstance(trainer(optimizer='ranger').optimizer, Ranger)
    with pytest.raises(TrainingError, match='adam, ranger or a function'): trainer(optimizer='lion')
