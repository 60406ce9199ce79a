"""A training run survives kill -9 at any moment, damaged checkpoints and broken pictures."""
import json, os, pickle, subprocess, sys, textwrap
import pytest
import torch
from restyle_nb.encoders import build_encoder
from restyle_nb.generator import Generator
from restyle_nb.losses import Objective
from restyle_nb.restyle import ReStyle
from restyle_nb.training import History, Trainer, TrainingError

def world():
    torch.manual_seed(0)
    g = Generator(size=32, style_dim=8, n_mlp=2, channels={4:8, 8:8, 16:8, 32:8})
    for c in g.convs: c.noise_strength.data.fill_(.2)
    g.estimate_latent_avg(500)
    with torch.no_grad(): x = g.synthesize(g.map(torch.randn(40, 8))).clamp(-1, 1)
    e = build_encoder('compact', n_styles=g.n_styles, style_dim=8, input_size=(32, 32), widths=(4, 8, 8, 8))
    return ReStyle(e, g), x

def trainer(folder=None, **kw):
    net, x = world()
    kw = dict(dict(n_steps=2, batch_size=6, iterations=20, lr=2e-3, schedule='cosine', clip=1., noise='random', flip=True, val=x[:8],
                   val_every=7, save_every=3, log_every=2), **kw)
    return Trainer(net, x[8:], Objective(lpips=0), folder, **kw)

def go_on(folder):
    net, x = world()
    return Trainer.resume(folder, net, x[8:], Objective(lpips=0), val=x[:8])

def weights(t): return torch.cat([p.detach().flatten() for p in t.net.encoder.state_dict().values()])

CHILD = '''
import os, random, signal, sys, time, traceback
import torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from {module} import trainer, go_on

def run(folder):
    "In a process of its own: start, or resume if something was saved."
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        t = {again} if os.path.exists(folder + '/last.pt') else {new}
        t.fit(progress=False)
        code = 0
    except BaseException: traceback.print_exc()
    finally: os._exit(code)

def size(f): return os.path.getsize(f) if os.path.exists(f) else 0

assert os.waitpid(run({whole!r}), 0)[1] == 0
killed, rng = 0, random.Random(0)
while killed < {kills}:
    pid, seen = run({torn!r}), size({torn!r} + '/history.jsonl')
    while size({torn!r} + '/history.jsonl') <= seen and os.waitpid(pid, os.WNOHANG) == (0, 0): time.sleep(.001)
    time.sleep(rng.random()*.05)
    try: os.kill(pid, signal.SIGKILL)
    except ProcessLookupError: break
    killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
assert os.waitpid(run({torn!r}), 0)[1] == 0
print('killed', killed)
'''

def killed_and_resumed(tmp_path, module, new, again, kills, iterations):
    "The last checkpoints of a run that was left alone and of one that was killed, whose histories agree to every digit"
    whole, torn = str(tmp_path/'whole'), str(tmp_path/'torn')
    code = CHILD.format(here=os.path.dirname(os.path.abspath(__file__)), whole=whole, torn=torn, module=module, new=new, again=again, kills=kills)
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-2000:]
    assert int(p.stdout.split()[-1]) >= 2, 'the run was over before it could be killed'
    a, b = History.read(f'{whole}/history.jsonl'), History.read(f'{torn}/history.jsonl')
    assert a.rows == b.rows and a.rows[-1]['iteration'] == iterations
    return [torch.load(f'{o}/last.pt', weights_only=True) for o in (whole, torn)]

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
@pytest.mark.parametrize('update', ['batch', 'step'])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, update):
    a, b = killed_and_resumed(tmp_path, 'test_training', f'trainer(folder, update={update!r})', 'go_on(folder)', 5, 20)
    assert all(torch.equal(a['encoder'][k], b['encoder'][k]) for k in a['encoder'])
    assert all(torch.equal(v['exp_avg_sq'], b['optimizer']['state'][k]['exp_avg_sq']) for k, v in a['optimizer']['state'].items())

def test_resume_in_the_middle_of_a_row(tmp_path):
    a, b = trainer(log_every=8), trainer(tmp_path, log_every=8, save_every=3)
    a.fit()
    with pytest.raises(KeyboardInterrupt):
        b.loader.batch = lambda i, f=b.loader.batch: f(i) if i < 11 else (_ for _ in ()).throw(KeyboardInterrupt)
        b.fit()
    c = go_on(tmp_path)
    assert c.iteration == 9 and c.since == 1
    c.fit()
    assert c.history.rows == a.history.rows and torch.equal(weights(a), weights(c))
    assert go_on(tmp_path).fit().rows == a.history.rows                # nothing left to do

def test_same_seed_same_run_other_seed_other_run():
    a, b, c = trainer(), trainer(), trainer(seed=1)
    assert a.fit(4).rows == b.fit(4).rows != c.fit(4).rows

def test_training_leaves_generator_and_random_state_alone():
    t = trainer()
    before, state = {k: v.clone() for k, v in t.net.generator.state_dict().items()}, torch.get_rng_state()
    t.fit(3)
    assert all(torch.equal(v, before[k]) for k, v in t.net.generator.state_dict().items())
    assert all(p.grad is None for p in t.net.generator.parameters())
    assert torch.equal(torch.get_rng_state(), state)

def test_checkpoint_survives_a_crash_while_writing(tmp_path):
    t = trainer(tmp_path)
    t.fit(3)
    (tmp_path/'last.pt.part').write_bytes((tmp_path/'last.pt').read_bytes()[:100])
    with open(tmp_path/'history.jsonl', 'a') as f: f.write('{"iteration": 99')
    assert len(History.read(tmp_path/'history.jsonl')) == len(t.history)
    assert go_on(tmp_path).iteration == 3

class Evil:
    def __reduce__(self): return os.system, ('touch EVIL',)

@pytest.mark.parametrize('damage', ['cut', 'text', 'pickle', 'other', 'gone'])
def test_damaged_checkpoint_is_one_clear_error(tmp_path, damage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path/'run'
    trainer(run).fit(1)
    last = run/'last.pt'
    if damage == 'cut': last.write_bytes(last.read_bytes()[:5000])
    if damage == 'text': last.write_text('hello')
    if damage == 'pickle': last.write_bytes(pickle.dumps(Evil()))
    if damage == 'other': torch.save({'a': 1}, last)
    if damage == 'gone': last.unlink()
    with pytest.raises(TrainingError, match='last.pt'): go_on(run)
    assert not (tmp_path/'EVIL').exists()

def test_resume_refuses_other_pictures_losses_and_networks(tmp_path):
    trainer(tmp_path).fit(1)
    net, x = world()
    with pytest.raises(TrainingError, match='data or losses'): Trainer.resume(tmp_path, net, x[9:], Objective(lpips=0))
    with pytest.raises(TrainingError, match='data or losses'): Trainer.resume(tmp_path, net, x[8:], Objective(l2=.5, lpips=0))
    net.encoder = build_encoder('compact', n_styles=8, style_dim=8, input_size=(32, 32), widths=(4, 8, 8, 16))
    with pytest.raises(TrainingError, match='does not fit this encoder'): Trainer.resume(tmp_path, net, x[8:], Objective(lpips=0))
    with pytest.raises(TrainingError, match='another run'): trainer(tmp_path).fit(1)

def test_not_a_number_stops_and_keeps_the_last_good_state(tmp_path):
    t = trainer(tmp_path)
    t.fit(6)
    good = (tmp_path/'last.pt').read_bytes()
    t.loader.data = t.loader.data.clone()
    t.preflight = lambda: None
    t.loader.data[:] = float('nan')
    with pytest.raises(TrainingError, match='last.pt.*Lower lr'): t.fit(6)
    assert (tmp_path/'last.pt').read_bytes() == good
    assert go_on(tmp_path).iteration == 6

def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(TrainingError, match='cannot be written'): trainer(tmp_path/'file'/'run').fit(1)

def test_best_weights_come_back(tmp_path):
    t = trainer(tmp_path)
    t.fit()
    rows = t.history.of('val')
    best = min(rows, key=lambda r: r['loss'][-1])
    assert t.restore_best() == best['iteration']
    assert t.validate()['loss'] == best['loss']

def test_one_batch_update_is_the_mean_of_what_the_loop_sees():
    "'batch' adds up the gradients of N steps at fixed weights; 'step' moves the weights in between."
    sgd = lambda params, lr: torch.optim.SGD(params, lr)
    kw = dict(optimizer=sgd, schedule='constant', clip=None, noise='fixed', flip=False, lr=1e-3)
    t = trainer(**kw)
    t.net.encoder.train()
    x, before = t.batch(0), [p.detach().clone() for p in t.params]
    target, grads = t.objective.prepare(x), 0
    for s in t.net.steps(x, 2):
        g = torch.autograd.grad(t.objective(target, s)[0], t.params, allow_unused=True)
        grads = grads + torch.cat([(torch.zeros_like(p) if o is None else o).flatten() for p, o in zip(t.params, g)])
    t.train_batch(x)
    moved = torch.cat([(b - p.detach()).flatten() for p, b in zip(t.params, before)])
    torch.testing.assert_close(moved, 1e-3*grads, atol=1e-6, rtol=1e-3)
    u = trainer(update='step', **kw)
    u.net.encoder.train()
    u.train_batch(x)
    assert not torch.equal(weights(t), weights(u))

def test_ranger_is_that_of_the_library():
    "As `pytorch_optimizer` has it, with plain steps while the averages are young; only stacks of linear layers are centred otherwise"
    from pytorch_optimizer import Ranger as Library
    from restyle_nb.training import Ranger
    def trained(make):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 5))
        x, y, optimizer = torch.randn(16, 3, 8, 8), torch.randn(16, 5), make(net.parameters(), lr=1e-2)
        for i in range(60):
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])
    ours, theirs = trained(Ranger), trained(lambda ps, lr: Library(ps, lr, degenerated_to_sgd=True))
    assert (ours - theirs).norm() < 1e-5*theirs.norm()
    assert (ours - trained(lambda ps, lr: Library(ps, lr))).norm() > 1e-3*theirs.norm()
