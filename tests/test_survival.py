"A run loses nothing: killed at any moment, disk full, told to leave, pictures and workers gone, memory too small, options changed."
import json, os, random, signal, subprocess, time, warnings
from pathlib import Path
import pytest
import torch
from PIL import Image
from restyle_nb import training
from restyle_nb.datasets import PictureFiles
from restyle_nb.images import ImageError, to_uint8
from restyle_nb.losses import Objective
from restyle_nb.training import History, Trainer, TrainingError
from test_processes import Server, alike, apart, critics, world

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')

def trainer(folder=None, resume=False, data=None, judged=False, **kw):
    net, x = world()
    more = dict(critics=critics(net)) if judged else {}
    data = x[13:] if data is None else PictureFiles(data, 32, on_error='skip') if isinstance(data, str) else data
    if resume: return Trainer.resume(folder, net, data, Objective(lpips=0), val=x[:6], **more | kw)
    kw = dict(dict(n_steps=2, batch_size=4, iterations=20, lr=2e-3, schedule='cosine', clip=1., noise='random', flip=True, val=x[:6],
                   val_every=9, save_every=3, log_every=4), **kw)
    return Trainer(net, data, Objective(lpips=0), folder, **more | kw)

DEATHS = 'half', 'before', 'after', 'history'

def die(how, when):
    "Be killed at the `when`-th checkpoint: half of it written, before it takes its place, just after; or with half a line in the history"
    left, pack, put, opened = [when], torch.save, os.replace, open
    def now(f):
        if (name := getattr(f, 'name', f)) and 'last.pt' in str(name): left[0] -= 1
        return left[0] == 0
    def end(): os.kill(os.getpid(), signal.SIGKILL)
    def save(o, f):
        pack(o, f)
        if how == 'half' and now(f): f.truncate(f.tell()//2); f.flush(); end()
    def replace(a, b):
        last = how != 'half' and now(b)
        if last and how == 'before': end()
        put(a, b)
        if last and how == 'after': end()
        if last and how == 'history':
            with opened(Path(b).parent/'history.jsonl', 'a') as f: f.write('{"iteration": 12, "spl')
            end()
    torch.save, os.replace = save, replace

def live(folder, death=None, **kw):
    "One life of a run: it begins or is taken up again, and ends by itself or by `death`"
    signal.signal(signal.SIGINT, signal.default_int_handler)   # who was started in the background would ignore it
    if death: die(*death)
    begun = (Path(folder)/'last.pt').exists()
    t = trainer(folder, resume=begun, judged=kw.get('judged', False)) if begun else trainer(folder, **kw)
    t.fit(progress=False)
    return t.iteration

@pytest.fixture(scope='module')
def processes(tmp_path_factory):
    with Server(tmp_path_factory.mktemp('survival')) as s: yield s

def begin(processes, **kw): return processes.start(1, module='test_survival', job='live', wait=False, **kw)[1][0]

def ended(pid):
    "Wait for the process; the server takes the dead away when it is next asked for something"
    while Path(f'/proc/{pid}').exists() and '(zombie)' not in Path(f'/proc/{pid}/status').read_text(): time.sleep(.002)

def lines(folder): return len(p.read_text().splitlines()) if (p := Path(folder)/'history.jsonl').exists() else 0

def same_end(a, b, rows=True):
    "Two runs ended alike, to the last bit: weights, average, optimiser, critics and their pools, history"
    a, b = [torch.load(Path(o)/'last.pt', weights_only=True) for o in (a, b)]
    flat = lambda o: [t for k in ('encoder', 'average', 'optimizer', 'critics', 'scaler', 'sums', 'heard') for t in training._tensors(o[k])]
    assert len(flat(a)) == len(flat(b)) > 20 and all(torch.equal(s, t) for s, t in zip(flat(a), flat(b)))
    assert a['iteration'] == b['iteration'] and (not rows or (a['history'], a['best']) == (b['history'], b['best']))

def test_twenty_kills(processes, tmp_path):
    "Twelve at any moment, eight while a checkpoint or the history is being written"
    kw = dict(iterations=95, save_every=2, log_every=1, judged=True, ema=.9)
    processes(1, module='test_survival', job='live', folder=str(tmp_path/'whole'), **kw)
    torn, rng, killed = str(tmp_path/'torn'), random.Random(1), 0
    deaths = [None]*12 + [(how, n) for how in DEATHS for n in (1, 3)]
    rng.shuffle(deaths)
    for death in deaths:
        at, want = lines(torn), rng.randrange(1, 5)
        pid = begin(processes, folder=torn, death=death, **kw)
        if death is None:
            while lines(torn) < at + want and Path(f'/proc/{pid}').exists(): time.sleep(.001)
            time.sleep(rng.random()*.03)
            os.kill(pid, signal.SIGKILL)
        ended(pid)
        killed += 1
        assert death is None or (Path(torn)/'last.pt.part').exists() == (death[0] in ('half', 'before'))
    state = torch.load(Path(torn)/'last.pt', weights_only=True)
    assert killed == 20 and 20 < state['iteration'] < 95, 'the run was over before it was killed often enough'
    assert processes(1, module='test_survival', job='live', folder=torn, **kw) == [95]
    same_end(tmp_path/'whole', torn)
    assert History.read(tmp_path/'torn'/'history.jsonl').rows == History.read(tmp_path/'whole'/'history.jsonl').rows

def tiny_disk(folder, size):
    "A file system of `size` bytes there, or a reason why not"
    folder.mkdir()
    p = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)], capture_output=True, text=True)
    if p.returncode: pytest.skip(f'mount is not allowed here: {p.stderr.strip()}')

def fill_and_train(folder, how):
    "Train until the first checkpoint is there; leave room for a third of another; go on. What was said"
    folder = Path(folder)
    t = trainer(folder, val_every=100, ema=.9)
    t.fit(3)
    size, before = (folder/'last.pt').stat().st_size, (folder/'last.pt').read_bytes()
    if how == 'limit':
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size//3, resource.RLIM_INFINITY))
    else:
        room = os.statvfs(folder).f_bavail*os.statvfs(folder).f_frsize
        (folder/'other').write_bytes(b'x'*(room - size//3))
    try: t.fit(9)
    except TrainingError as e: said = str(e)
    assert (folder/'last.pt').read_bytes() == before and not (folder/'last.pt.part').exists()
    if how == 'limit': resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,)*2)
    else: (folder/'other').unlink()
    u = trainer(folder, resume=True)
    at = u.iteration
    u.fit()
    return said, at

@pytest.mark.parametrize('how', ['full', 'limit'])
def test_disk_full_while_saving(processes, tmp_path, how):
    "A real file system of four megabytes; or, where none may be mounted, a limit on the size of files"
    whole, run = tmp_path/'whole', tmp_path/'run'
    processes(1, module='test_survival', job='live', folder=str(whole), val_every=100, ema=.9)
    if how == 'full': tiny_disk(run, 1 << 22)
    try:
        (said, at), = processes(1, module='test_survival', job='fill_and_train', folder=str(run), how=how)
        print(said)
        assert 'No space left' in said or 'File too large' in said or 'the disk may be full' in said
        for words in ('last.pt: could not be written', 'intact', 'Make room'): assert words in said
        assert at == 3
        same_end(whole, run, rows=False)    # `fit(3)` ends with rows of its own
    finally:
        if how == 'full': subprocess.run(['umount', str(run)], check=True)

def test_history_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    t = trainer(tmp_path)
    t.fit(3)
    (tmp_path/'history.jsonl').unlink()
    (tmp_path/'history.jsonl').mkdir()
    with pytest.raises(TrainingError, match=r'history.jsonl: could not be written \(Is a directory\)'): t.fit(3)

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_told_to_leave(processes, tmp_path, number):
    "The iteration is finished, the checkpoint written, and the process ends by that very signal"
    kw = dict(iterations=200, val_every=1000, save_every=1000, log_every=2)
    whole, torn = tmp_path/'whole', tmp_path/'torn'
    processes(1, module='test_survival', job='live', folder=str(whole), **kw)
    pid = begin(processes, folder=str(torn), **kw)
    while lines(torn) < 3: time.sleep(.001)
    os.kill(pid, number)
    ended(pid)
    state = torch.load(torn/'last.pt', weights_only=True)
    assert 6 <= state['iteration'] < 200
    processes(1, module='test_survival', job='live', folder=str(torn), **kw)
    same_end(whole, torn)

def leave(folder):
    class Nervous:
        def tick(self, t): os.kill(os.getpid(), signal.SIGTERM)
    trainer(folder, save_every=1000).fit(progress=False, watch=Nervous())
    Path(folder, 'unreached').touch()

def test_how_it_ends_when_told_to_leave(processes, tmp_path):
    "As a process ends that SIGTERM ends: 143 in a shell, and nothing after `fit` is done"
    _, status = processes.start(1, module='test_survival', job='leave', folder=str(tmp_path))
    assert os.WIFSIGNALED(status[0]) and os.WTERMSIG(status[0]) == signal.SIGTERM and not (tmp_path/'unreached').exists()
    assert torch.load(tmp_path/'last.pt', weights_only=True)['iteration'] == 2       # the one that was running is finished

def folder_of_pictures(path, n=24):
    path.mkdir()
    for i, o in enumerate(to_uint8(world()[1][13:13+n])): Image.fromarray(o.permute(1, 2, 0).numpy()).save(path/f'{i:02d}.png')
    return path

@pytest.mark.parametrize('harm, workers', [('gone', 0), ('cut short', 2), ('text', 0), ('gone', 2)])
def test_a_picture_that_breaks_during_the_run(tmp_path, harm, workers):
    "Refused with its name, and the run goes on when it is mended; or, as asked, its neighbour takes its place and it is listed"
    pictures = folder_of_pictures(tmp_path/'pictures')
    victim = pictures/'05.png'
    whole = victim.read_bytes()
    strict = trainer(tmp_path/'strict', data=PictureFiles(pictures, 32), workers=workers, iterations=12)
    lax = trainer(tmp_path/'lax', data=PictureFiles(pictures, 32, on_error='skip'), workers=workers, iterations=12)
    for t in (strict, lax): t.fit(3)
    if harm == 'gone': victim.unlink()
    else: victim.write_bytes(whole[:len(whole)//2] if harm == 'cut short' else b'moved to the archive')
    with pytest.raises(ImageError, match='05.png'): strict.fit()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        lax.fit()
    assert lax.iteration == 12 and list(lax.data.skipped) == [str(victim)] and [w for w in told if '05.png' in str(w.message)]
    victim.write_bytes(whole)
    trainer(tmp_path/'strict', resume=True, data=PictureFiles(pictures, 32), workers=workers).fit()
    trainer(tmp_path/'whole', data=PictureFiles(pictures, 32), iterations=12).fit()
    same_end(tmp_path/'whole', tmp_path/'strict', rows=False)

def test_a_killed_worker_costs_nothing(tmp_path):
    "Those who read ahead are started again; weights are those of a run without them"
    pictures = folder_of_pictures(tmp_path/'pictures')
    plain, helped = trainer(tmp_path/'plain', data=PictureFiles(pictures, 32)), trainer(tmp_path/'helped', data=PictureFiles(pictures, 32), workers=2)
    plain.fit()
    class Killer:
        def tick(self, t):
            if t.iteration in (4, 11): os.kill(t.loader.ahead.crew[t.iteration % 2][0].pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match='was killed'): helped.fit(watch=Killer())
    same_end(tmp_path/'plain', tmp_path/'helped')

class Small:
    "Makes a generator that runs out of memory with more than `room` pictures, forwards or backwards, from its `calm`-th painting on"
    def __init__(self, g, room, calm=0, when='forward'):
        self.paint, self.room, self.calm, self.when = g.synthesize, room, calm, when
        g.synthesize = self
    def __call__(self, w, *args, **kw):
        y = self.paint(w, *args, **kw)
        self.calm -= torch.is_grad_enabled()
        if self.calm >= 0 or len(w) <= self.room or not torch.is_grad_enabled(): return y
        if self.when == 'forward': self.fail()
        y.register_hook(lambda _: self.fail())
        return y
    def fail(self, *_): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')

def notes(t): return [r['text'] for r in t.history.of('note')]

@pytest.mark.parametrize('when', ['forward', 'backward'])
@pytest.mark.parametrize('update', ['batch', 'step'])
def test_out_of_memory_halves_the_parts_and_keeps_the_batch(tmp_path, update, when):
    "From the first iteration on: the very weights of a run with parts of that size. Later, at a step of its own: those up to rounding"
    kw = dict(update=update, batchnorm='frozen', ema=.9, batch_size=8, iterations=10)
    want, got, late = trainer(micro_batch=2, **kw), trainer(tmp_path, **kw), trainer(**kw)
    Small(got.net.generator, 3, when=when)
    Small(late.net.generator, 3, calm=9, when=when)
    for t in (want, got, late):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            t.fit()
    state = lambda t: dict(state={f'encoder.{k}': v for k, v in t.net.encoder.state_dict().items()})
    assert alike(state(want), state(got)) and apart(state(want), state(late)) < 1e-5
    assert got.micro_batch == late.micro_batch == 2 and [o.split(';')[0] for o in notes(got)] == [f'out of memory with {n} pictures at a time' for n in (8, 4)]
    assert 'a batch stays 8' in notes(got)[0] and notes(late)[0].startswith('out of memory') and late.history.of('note')[0]['iteration'] == 4
    again = trainer(tmp_path, resume=True)
    assert again.micro_batch == 2 and notes(again) == notes(got)                      # and it is remembered

def test_out_of_memory_with_one_picture_says_what_helps(tmp_path):
    t = trainer(tmp_path, batchnorm='local')
    Small(t.net.generator, 0, calm=8)
    with pytest.warns(UserWarning, match='BatchNorm now counts over that many'), pytest.raises(TrainingError, match='single picture.*last.pt.*recompute_from=64'): t.fit()
    assert trainer(tmp_path, resume=True).iteration == 3

def test_changed_options_are_listed_applied_or_refused(tmp_path):
    trainer(tmp_path).fit(3)
    t = trainer(tmp_path, resume=True, lr=5e-4, save_every=7, iterations=20)
    assert t.changed == dict(lr=(2e-3, 5e-4), save_every=(3, 7)) and t.lr == 5e-4 and t.save_every == 7
    assert notes(t)[-1] == 'resumed with lr 0.002 → 0.0005, save_every 3 → 7'
    t.fit(1)
    assert t.history.of('train')[-1]['lr'] == pytest.approx(t.learning_rate(3)) and t.learning_rate(0) == 5e-4
    assert [json.loads(l)['text'] for l in (tmp_path/'history.jsonl').read_text().splitlines() if 'note' in l] == notes(t)
    for k, v in dict(n_steps=3, batch_size=8, update='step', noise='fixed', flip=False, seed=1, optimizer='ranger', ema=.9, batchnorm='frozen').items():
        with pytest.raises(TrainingError, match=f'{k}.*Trainer.fine_tune'): trainer(tmp_path, resume=True, **{k: v})
    with pytest.raises(TypeError, match='no_such_option'): trainer(tmp_path, resume=True, no_such_option=1)

@pytest.mark.parametrize('kw', [dict(precision='bf16'), dict(precision='fp16'), dict(optimizer='ranger', ema=.9, update='step'), dict(batchnorm='local', micro_batch=3)],
                         ids=lambda kw: ' '.join(map(str, kw.values())))
def test_interrupted_equals_whole(tmp_path, kw):
    "Precision scaler, average, slow weights of Ranger, what BatchNorm counted"
    trainer(tmp_path/'whole', iterations=12, **kw).fit()
    trainer(tmp_path/'torn', iterations=12, **kw).fit(7)
    trainer(tmp_path/'torn', resume=True).fit()
    same_end(tmp_path/'whole', tmp_path/'torn', rows=False)
