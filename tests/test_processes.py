"Several processes train one encoder: same global batch, same training up to rounding, whoever does the work."
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path
import pytest
import torch
from torch import nn
from restyle_nb.generator import Generator
from restyle_nb.losses import LatentCritic, Objective, l2
from restyle_nb.restyle import ReStyle
from restyle_nb.training import History, Trainer

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
HERE = os.path.dirname(os.path.abspath(__file__))
LIMIT = 1e-5 # of the length of all weights

class Normed(nn.Module):
    "A small encoder with BatchNorm, whose running statistics are not those of a fresh layer"
    in_channels = 6
    def __init__(self, n_styles=8, d=8, c=8):
        super().__init__()
        layer = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU(.2))
        self.trunk, self.head, self.shape = nn.Sequential(layer(6, c), layer(c, c), layer(c, 2*c)), nn.Linear(2*c*16, n_styles*d), (n_styles, d)
        self.head.weight.data.mul_(.1)
        for m in self.trunk.modules():
            if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .1); m.running_var.uniform_(.2, .6)
    def forward(self, x, y): return self.head(self.trunk(torch.cat([x, y], 1)).flatten(1)).unflatten(1, self.shape)

def world():
    torch.manual_seed(0)
    g = Generator(size=32, style_dim=8, n_mlp=2, channels={4:8, 8:8, 16:8, 32:8})
    for c in g.convs: c.noise_strength.data.fill_(.2)
    g.estimate_latent_avg(500)
    with torch.no_grad(): x = g.synthesize(g.map(torch.randn(45, 8))).clamp(-1, 1)
    return ReStyle(Normed(), g), x

def critics(net):
    torch.manual_seed(7)
    return [LatentCritic(net.generator, lr=1e-4, r1_every=4, pool=5)]

def trainer(folder=None, judged=False, resume=False, **kw):
    net, x = world()
    more = dict(critics=critics(net)) if judged else {}
    if resume: return Trainer.resume(folder, net, x[13:], Objective(lpips=0), val=x[:13], **more | kw)
    kw = dict(dict(n_steps=2, batch_size=8, iterations=20, lr=2e-3, schedule='cosine', clip=1., noise='random', flip=True, batchnorm='frozen',
                   val=x[:13], val_every=10, save_every=20, log_every=10), **kw)
    return Trainer(net, x[13:], Objective(lpips=0), folder, **more | kw)

def train(until=None, **kw):
    "What a process tells when it is done"
    t = trainer(**kw)
    t.fit(None if until is None else until - t.iteration, progress=False)
    state = {f'encoder.{k}': v for k, v in t.net.encoder.state_dict().items()} | {f'{c.name}.{k}': v for c in t.critics for k, v in c.net.state_dict().items()}
    if t.average is not None: state |= {f'average.{k}': v for k, v in t.average.state_dict().items()}
    return dict(state=state, rows=t.history.rows, size=t.team.size, rank=t.team.rank, val=t.validate())

SERVER = '''
import importlib, json, os, sys, traceback
sys.path.insert(0, {here!r})
import torch, accelerate, torch.distributed.nn.functional, test_processes
torch.set_num_threads(1)
t = test_processes.trainer() # imports what is imported late
t.validate()
t.optimizer.step()
for line in sys.stdin:
    o, pids = json.loads(line), []
    for rank in range(o['size']):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            if o['size'] > 1: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(o['size']), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(o['port']))
            job = getattr(importlib.import_module(o['module']), o['job'])
            torch.save(job(**o['kw']), f"{{o['out']}}.{{rank}}")
            code = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    if o['wait']: print(json.dumps([os.waitpid(p, 0)[1] for p in pids]), flush=True)
    else: print(json.dumps(pids), flush=True)
'''

class Server:
    "A process that has imported everything and forks those who work: starting two of them takes no time"
    def __init__(self, tmp, **env):
        self.tmp, self.n, self.log = tmp, 0, open(tmp/'stderr', 'w')
        env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')} | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='') | env
        self.p = subprocess.Popen([sys.executable, '-c', SERVER.format(here=HERE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env)

    def start(self, size, job='train', module='test_processes', wait=True, **kw):
        self.n += 1
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        out = str(self.tmp/f'out{self.n}')
        self.p.stdin.write(json.dumps(dict(size=size, job=job, module=module, kw=kw, out=out, port=port, wait=wait)) + '\n')
        self.p.stdin.flush()
        return out, json.loads(self.p.stdout.readline() or 'null')

    def __enter__(self): return self
    def __exit__(self, *_):
        self.p.stdin.close()
        self.p.wait(60)

    def said(self): return (self.tmp/'stderr').read_text()

    def __call__(self, size, **kw):
        "The job in `size` processes at once; what each of them tells"
        out, codes = self.start(size, **kw)
        assert codes == [0]*size, self.said()[-3000:]
        return [torch.load(f'{out}.{r}', weights_only=False) for r in range(size)]

@pytest.fixture(scope='module')
def processes(tmp_path_factory):
    with Server(tmp_path_factory.mktemp('processes')) as s: yield s

def apart(a, b, part='encoder'):
    "Distance of all weights, relative to their length"
    flat = lambda o: torch.cat([v.double().flatten() for k, v in o['state'].items() if k.startswith(part) and 'num_batches' not in k])
    return ((flat(a) - flat(b)).norm()/flat(a).norm()).item()

def alike(a, b): return all(torch.equal(v, b['state'][k]) for k, v in a['state'].items())

@pytest.mark.parametrize('kw', [dict(iterations=50), dict(update='step'), dict(judged=True), dict(micro_batch=3, ema=.9, optimizer='ranger')],
                         ids=['50 iterations', 'update each step', 'latent critic', 'parts, average, Ranger'])
def test_two_processes_train_as_one(processes, kw):
    (one,), two = processes(1, **kw), processes(2, **kw)
    assert [(o['rank'], o['size']) for o in two] == [(0, 2), (1, 2)] and alike(*two)
    parts = ['encoder', *(['latent'] if kw.get('judged') else []), *(['average'] if kw.get('ema') else [])]
    off = {p: apart(one, two[0], p) for p in parts}
    print(kw, off)
    assert max(off.values()) < LIMIT
    for a, b in zip(one['rows'], two[0]['rows'], strict=True):
        assert (a['iteration'], a['split']) == (b['iteration'], b['split']) and b['loss'] == pytest.approx(a['loss'], rel=1e-4)
    assert two[0]['val'] == two[1]['val'] and two[0]['val']['loss'] == pytest.approx(one['val']['loss'], rel=1e-5)

def test_what_batchnorm_counts(processes):
    "'sync' counts the whole batch, as one process does; 'local' only a process's part, which is another training; the running means agree in any case"
    (one,), sync, local = processes(1, batchnorm='local'), processes(2, batchnorm='sync'), processes(2, batchnorm='local')
    off = [apart(one, o[0]) for o in (sync, local)]
    print('sync, local:', off)
    assert off[0] < LIMIT and off[1] > 100*LIMIT
    assert alike(*sync) and alike(*local)

@pytest.mark.parametrize('first, then', [(1, 2), (2, 1)])
def test_resumed_by_another_number_of_processes(processes, tmp_path, first, then):
    "Critics, pools and rows of the history included"
    kw, run = dict(judged=True, log_every=6), str(tmp_path/'run')
    whole, = processes(1, **kw)
    processes(first, folder=run, until=12, save_every=5, **kw)
    end = processes(then, folder=run, resume=True, judged=True)
    assert apart(whole, end[0]) < LIMIT and apart(whole, end[0], 'latent') < LIMIT
    rows = [[r for r in o['rows'] if r['split'] == 'train'] for o in (whole, end[0])]
    for a, b in zip(*rows, strict=True): assert a['iteration'] == b['iteration'] and b['loss'] == pytest.approx(a['loss'], rel=1e-4)
    assert History.read(tmp_path/'run'/'history.jsonl').rows == end[0]['rows']        # one process writes, and each row once

@pytest.fixture(scope='module')
def whole(processes, tmp_path_factory):
    kw = dict(iterations=120, val_every=1000, save_every=1000)                        # long enough for a busy machine to be heard in time
    return kw, processes(2, folder=str(tmp_path_factory.mktemp('whole')), **kw)

@pytest.mark.parametrize('who, times', [('all', 1), ('all', 2), ('one', 1)])
def test_sigterm_saves_once_and_ends_all(processes, whole, tmp_path, who, times):
    "From a scheduler all hear it, and from torchrun once more; or one alone does. All end, and the run goes on from there to the same bits"
    (kw, end), torn, before = whole, tmp_path/'torn', len(processes.said())
    out, pids = processes.start(2, folder=str(torn), wait=False, **kw)
    while not (torn/'history.jsonl').exists() or len((torn/'history.jsonl').read_text()) < 50: time.sleep(.005)
    for _ in range(times):
        for p in pids if who == 'all' else pids[1:]: os.kill(p, signal.SIGTERM)
        time.sleep(.002)
    while any(Path(f'/proc/{p}').exists() and '(zombie)' not in Path(f'/proc/{p}/status').read_text() for p in pids): time.sleep(.005)
    assert 0 < torch.load(torn/'last.pt', weights_only=True)['iteration'] < 120
    assert not any(Path(f'{out}.{r}').exists() for r in range(2))                     # nobody went on after `fit`
    assert 'Traceback' not in (log := processes.said()[before:]), log
    b = processes(2, folder=str(torn), resume=True)
    assert alike(end[0], b[0])
    for r, q in zip(end[0]['rows'], b[0]['rows'], strict=True): assert r['iteration'] == q['iteration'] and q['loss'] == pytest.approx(r['loss'])

def evaluated():
    from restyle_nb.bulk import evaluate
    net, x = world()
    return list(evaluate(net.eval(), x, n_steps=3, metrics=dict(l2=l2), batch_size=8))

def test_two_processes_evaluate_as_one(processes):
    "45 pictures, which 2 does not divide: every one counts once"
    (one,), two = processes(1, job='evaluated'), processes(2, job='evaluated')
    assert two[0] == two[1] and len(one) == 4
    for a, b in zip(one, two[0], strict=True): assert b == pytest.approx(a, rel=1e-5)

def test_batches_that_cannot_be_shared_are_refused(processes):
    _, codes = processes.start(2, batch_size=7)
    assert codes == [256, 256]
    assert 'TrainingError: batch_size: a batch of 7 pictures cannot be cut into 2 equal parts; take 8' in processes.said()

SHORT = '''
import os, sys
sys.path.insert(0, {here!r})
import test_processes
from accelerate import PartialState
t = test_processes.trainer(batchnorm='sync')
t.fit(2, progress=False)
PartialState().destroy_process_group()                # what Team.find leaves to the end of Python
print(sorted({{open(f'/proc/self/task/{{o}}/comm').read().strip() for o in os.listdir('/proc/self/task')}}))
'''

@pytest.mark.skipif(not os.path.isdir('/proc/self/task'), reason='looks at the threads in /proc')
def test_the_group_ends_before_python(tmp_path):
    "Nobody may keep the group: a thread of it that drops a tensor while Python ends aborts the process"
    pytest.importorskip('accelerate')
    (tmp_path/'short.py').write_text(SHORT.format(here=HERE))
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(tmp_path/'short.py')],
                       capture_output=True, text=True, timeout=300, env=os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    assert p.returncode == 0, p.stderr[-4000:]
    assert len(p.stdout.splitlines()) == 2 and 'gloo' not in p.stdout, p.stdout
    assert 'deprecated' not in p.stderr
