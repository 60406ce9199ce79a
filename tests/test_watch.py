"What a run says of itself: before it, while it runs, when it goes wrong; and that looking on changes nothing."
import io
import json
import math
import random
import re
import sys
import time
import warnings
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from browser import browser, contrasts, new_page
from restyle_nb import watch
from restyle_nb.datasets import PictureFiles
from restyle_nb.encoders import build_encoder
from restyle_nb.generator import Generator
from restyle_nb.images import save_image, to_uint8
from restyle_nb.losses import LatentCritic, Objective
from restyle_nb.plots import PALETTE
from restyle_nb.restyle import ReStyle
from restyle_nb.training import History, Trainer, TrainingError
from restyle_nb.watch import Board, Finding, Panel, Text, at_clock, check, diagnose, in_words, plan, spark, summary


# ---------------------------------------------------------------- a small world

def generator(seed=0):
    torch.manual_seed(seed)
    g = Generator(size=32, style_dim=8, n_mlp=2, channels={4: 8, 8: 8, 16: 8, 32: 8})
    for c in g.convs: c.noise_strength.data.fill_(.2)
    g.estimate_latent_avg(500)
    return g


@torch.no_grad()
def drawn(g, n, seed=1): return g.synthesize(g.map(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)))).clamp(-1, 1)


def trainer(folder=None, data=None, val=None, head='simple', in_channels=6, critic=False, objective=None, **kw):
    g = generator()
    x = drawn(g, 72)
    torch.manual_seed(0)
    e = build_encoder('compact', head, n_styles=g.n_styles, style_dim=8, input_size=(32, 32), widths=(4, 8, 8, 8), in_channels=in_channels)
    kw = dict(n_steps=2, batch_size=8, iterations=40, lr=5e-3, val_every=10, log_every=5, save_every=1000) | kw
    return Trainer(ReStyle(e, g), x[:64] if data is None else data, objective or Objective(lpips=0), folder, val=x[64:] if val is None else val,
                   critics=LatentCritic(g, .01, seed=3) if critic else (), **kw)


FULL = dict(head='progressive', critic=True, progressive=(2, 2), noise='random', flip=True, clip=1., ema=.9, optimizer='ranger', schedule='cosine', warmup=3)


def flat(o):
    "All that a nested state holds, as comparable items"
    if isinstance(o, dict): return [(k, v) for key in o for k, v in [(str(key), None), *flat(o[key])]]
    if isinstance(o, (list, tuple)): return [i for v in o for i in flat(v)]
    return [('', o.detach().cpu().numpy().tobytes() if isinstance(o, torch.Tensor) else o)]


def whole(t):
    "Everything a checkpoint holds, and what lies around it"
    t.save()
    saved = torch.load(t.folder/'last.pt', weights_only=True)
    del saved['spent']
    modes = [m.training for m in t.net.modules()]
    return flat(saved), modes, torch.get_rng_state().tolist(), random.getstate(), [p.grad for p in t.params], sorted(vars(t)), t.folder, t.stage, t.net.encoder.stage


# ---------------------------------------------------------------- before the first step

@pytest.mark.filterwarnings('ignore:progressive')
@pytest.mark.parametrize('kw', [{}, FULL], ids=['plain', 'all options'])
@pytest.mark.parametrize('done', [0, 5])
def test_plan_and_check_leave_no_trace(tmp_path, kw, done):
    t = trainer(tmp_path/'a', **kw)
    if done: t.fit(done, progress=False)
    before, files = whole(t), sorted(p.name for p in (tmp_path/'a').iterdir())
    plan(t, .1)
    assert whole(t) == before
    check(t, reach=1, overfit=2, seconds=2)
    assert whole(t) == before and sorted(p.name for p in (tmp_path/'a').iterdir()) == files
    u = trainer(tmp_path/'b', **kw)
    if done: u.fit(done, progress=False)
    for o in (t, u): o.fit(4, progress=False)
    assert whole(t)[0] == whole(u)[0]


def test_plan_counts():
    t = trainer()
    p = plan(t, .1)
    count = sum(o.numel() for o in t.net.encoder.parameters())
    assert p.parameters['encoder'] == p.parameters['of which learn'] == p.parameters['trunk'] + p.parameters['head'] == count
    assert p.memory['gradients'] == 4*count and 8*count <= p.memory['optimiser'] <= 8*count + 1000
    assert p.memory['weights'] >= 4*(count + p.parameters['generator']) and p.peak == sum(p.memory.values())
    assert p.left == 40 and p.exams == 4 and p.total == pytest.approx(40*p.seconds + 4*p.exam) and 0 < p.reading <= p.seconds
    assert p.pictures_per_second == pytest.approx(8/p.seconds) and 'finish' in str(p) and '| memory |' in p._repr_markdown_()


def kept(**kw): return plan(trainer(**kw), .05).memory['for the backward pass']


def test_planned_memory_is_that_of_one_step_and_of_the_pictures_at_a_time():
    one, five, twice, half = kept(n_steps=1), kept(n_steps=5), kept(batch_size=16), kept(micro_batch=4)
    assert five == pytest.approx(one, rel=.05) and twice == pytest.approx(2*one, rel=.15) and half == pytest.approx(one/2, rel=.15)


def test_plan_says_when_memory_is_short(tmp_path):
    t = trainer(tmp_path)
    draw = t.net.generator.synthesize
    def short(w, **kw):
        if torch.is_grad_enabled() and len(w) > 2: raise torch.OutOfMemoryError('CUDA out of memory')
        return draw(w, **kw)
    t.net.generator.synthesize = short
    with pytest.warns(UserWarning, match='out of memory'): p = plan(t, .05)
    assert '8 pictures at a time do not fit; it went on with 2' in str(p)
    assert t.micro_batch is t.config['micro_batch'] is None and not t.history.rows and not (tmp_path/'history.jsonl').exists()


def test_plan_is_for_a_run_that_can_begin():
    with pytest.raises(TrainingError, match='64 pictures are fewer than batch_size=100'): plan(trainer(batch_size=100))


def test_plan_without_an_end(): assert 'no end is set' in str(plan(trainer(iterations=None), .05))


@pytest.mark.parametrize('s, words', [(0, '0 s'), (45.4, '45 s'), (60, '1 min'), (90, '1 min 30 s'), (3600, '1 h'), (7500, '2 h 5 min'), (100_000, '1 d 3 h'), (86400, '1 d'), (None, 'unknown'), (math.inf, 'unknown')])
def test_time_in_words(s, words): assert in_words(s) == words


def test_time_of_the_clock():
    from datetime import datetime
    now = datetime(2024, 5, 6, 14, 5)
    assert [at_clock(s, now) for s in (60, 86400, 200_000)] == ['14:06', 'tomorrow 14:05', 'Wed 08 May 21:38']


def test_good_run_passes_every_check(tmp_path):
    found = check(trainer(tmp_path), reach=2, overfit=4, seconds=20)
    assert found.worst == 'ok', found
    assert {'ready', 'pixels', 'doubles', 'average code', 'reach', 'learning by heart'} <= {f.what for f in found}
    assert found._repr_markdown_().count('\n') == len(found) + 1


def with_norm(**kw):
    t = trainer(**kw)
    t.net.encoder.extra = torch.nn.BatchNorm2d(3)
    return t


def found(what, **kw):
    "Level and words of what `check` says of this"
    hits = [f for f in check(trainer(**kw), reach=0, overfit=0, seconds=5) if f.what == what]
    return [(f.level, f'{f.text}. {f.advice}') for f in hits]


def test_check_names_what_is_wrong(tmp_path):
    x = drawn(generator(), 72)
    assert found('ready', data=x[:64]/2 + .5)[0][0] == 'stop'
    assert 'fewer than batch_size=8' in found('ready', data=x[:5])[0][1]
    assert 'resize them' in found('ready', data=x[:64, :, :16, :16])[0][1]
    assert found('encoder', in_channels=3) == [('stop', 'it sees the target only, and 2 steps are asked for. build it with in_channels=6, or set n_steps=1')]
    assert 'also in training' in found('doubles', val=x[60:68])[0][1] and found('doubles', val=x[60:68])[0][0] == 'stop'
    assert 'also in training' in found('doubles', val=x[60:64].flip(-1), flip=True)[0][1]
    assert found('doubles', val=x[60:64].flip(-1))[0][0] == 'ok'
    assert '2 pictures in training are there already' in found('doubles', data=torch.cat([x[:64], x[:2]]))[0][1]
    assert '1 picture of 65' in found('pixels', data=torch.cat([x[:64], torch.full((1, 3, 32, 32), .5)]))[0][1]
    assert 'narrow part' in found('pixels', data=x[:64]/20 - .9)[0][1]
    assert '64 pictures of 64 are grey' in found('colour', data=x[:64].mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous())[0][1]
    assert found('pictures for the length', iterations=40_000)[0][0] == 'warn' and 'only' in found('pictures for the length', iterations=4)[0][1]
    norm = lambda **kw: next((f.level for f in check(with_norm(batch_size=2, **kw), 0, 0, 5) if f.what == 'BatchNorm'), None)
    assert norm() == 'warn' and norm(batchnorm='frozen') is None
    assert found('folder')[0][0] == 'warn' and not found('folder', folder=tmp_path/'new')


def test_check_knows_a_run_without_validation():
    t = trainer()
    t.val = None
    assert [f.what for f in check(t, 0, 0, 5).of('warn')] == ['validation', 'folder']


def test_check_finds_a_folder_that_holds_a_run(tmp_path):
    trainer(tmp_path).fit(1, progress=False)
    f = next(f for f in check(trainer(tmp_path), 0, 0, 5) if f.what == 'ready')
    assert f.level == 'stop' and 'holds another run' in f.text


def test_check_finds_a_wrong_average_code():
    t = trainer()
    t.net.generator.latent_avg.copy_(torch.full_like(t.net.generator.latent_avg, 5.))
    assert next(f for f in check(t, 0, 0, 5) if f.what == 'average code').level == 'warn'


def test_check_finds_pictures_that_the_generator_cannot_draw():
    "Noise of single pixels is nothing this generator has ever made"
    x = torch.rand(72, 3, 32, 32, generator=torch.Generator().manual_seed(0))*2 - 1
    f = next(f for f in check(trainer(data=x[:64], val=x[64:]), 2, 0, 20) if f.what == 'reach')
    assert f.level == 'stop' and 'cannot draw these pictures' in f.advice
    start, end, own = (float(o) for o in re.search(r'L2 ([\d.e-]+) .* to ([\d.e-]+), .* to ([\d.e-]+)', f.text).groups())
    assert start > end > 3*own


def test_check_finds_an_encoder_that_cannot_learn():
    t = trainer()
    class Deaf(torch.nn.Module):
        "Looks at nothing: all its gradients are 0"
        in_channels = 6
        def __init__(self): super().__init__(); self.a = torch.nn.Parameter(torch.zeros(t.net.generator.n_styles, 8))
        def forward(self, x, y): return (self.a*0.).expand(len(x), -1, -1)
    u = Trainer(ReStyle(Deaf(), t.net.generator), t.data, t.objective, val=t.val, n_steps=2, iterations=40, batch_size=8)
    f = next(f for f in check(u, 0, 4, 10) if f.what == 'learning by heart')
    assert f.level == 'stop' and 'it learns nothing' in f.advice


def test_check_of_a_run_that_learns_from_critics_alone():
    with pytest.warns(UserWarning, match='nothing to learn from'): nothing = Objective(l2=0., lpips=0.)
    f = next(f for f in check(trainer(objective=nothing, critic=True), 0, 4, 5) if f.what == 'learning by heart')
    assert f.level == 'warn' and 'not tried' in f.text


def test_check_says_what_it_had_no_time_for():
    t = trainer()
    draw = t.net.generator.synthesize
    t.net.generator.synthesize = lambda w, **kw: (time.sleep(.05), draw(w, **kw))[1]
    began = time.monotonic()
    f = next(f for f in check(t, 2, 0, 1.) if f.what == 'reach')
    assert f.level == 'warn' and 'no time to try' in f.text and time.monotonic() - began < 5


def test_check_opens_the_files(tmp_path):
    x = drawn(generator(), 20)
    for i, o in enumerate(x): save_image(o, tmp_path/f'{i:02}.png')
    (tmp_path/'07.png').write_text('not a picture')
    say = lambda on_error: [f for f in check(trainer(data=PictureFiles(tmp_path, 32, on_error=on_error)), 0, 0, 20) if f.what in ('files', 'ready')]
    bad = next(f for f in say('raise') if f.what == 'files')
    assert bad.level == 'stop' and '07.png' in bad.text and "on_error='skip'" in bad.advice
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert [f.level for f in say('skip') if f.what == 'files'] == ['warn']
    (tmp_path/'07.png').unlink()
    assert [f.level for f in say('raise')] == ['ok', 'ok']


# ---------------------------------------------------------------- diagnoses

def rows(*losses, split='val', every=100, **more):
    "A history: one list of losses a row"
    return [dict(iteration=(i + 1)*every, split=split, first_step=int(split == 'train'), loss=list(o), l2=list(o), **(dict(lr=1e-3) if split == 'train' else {}),
                 **{k: v[i] for k, v in more.items()}) for i, o in enumerate(losses)]


def said(*parts, **kw): return [f.what for f in diagnose(History([r for p in parts for r in p]), **kw)]


FALLING = [.2, .12, .08, .06, .05, .045, .042, .04, .038, .036]


class Painter:
    "Blurred squares: place, side and colour"
    n_styles, style_dim, latent_avg = 3, 2, torch.zeros(3, 2)
    def synthesize(self, w):
        place, side, colour = w.unbind(1)
        g = torch.linspace(-1.5, 1.5, 32)
        far = torch.maximum((g - .5*place[:, :1, None]).abs(), (g[:, None] - .5*place[:, 1:, None]).abs())
        inside = torch.sigmoid(6*(.6*(.3*side[:, :1, None]).exp() - far))[:, None]
        return inside*torch.tanh(torch.cat([colour, -colour.sum(1, keepdim=True)], 1))[:, :, None, None]


def test_a_good_run_is_left_in_peace():
    "At no moment of it is anything found"
    x = Painter().synthesize(torch.randn(600, 3, 2, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    e = build_encoder('compact', n_styles=3, style_dim=2, input_size=(32, 32), widths=(12, 16, 24, 32))
    t = Trainer(ReStyle(e, Painter()), x[64:], Objective(lpips=0), val=x[:64], n_steps=3, iterations=160, batch_size=16, lr=3e-3, schedule='linear', val_every=10, log_every=5)
    t.fit(progress=False)
    average, first, _, last = t.history.of('val')[-1]['loss']
    assert last < .4*average and last < .9*first
    for n in range(len(t.history) + 1): assert not diagnose(History(t.history.rows[:n]), 160), n
    assert not said(rows(*[(.3, v*1.2, v) for v in FALLING]), rows(*[(v*1.1, v*.9) for v in FALLING], split='train'))


def test_no_better_than_the_average_image():
    f, = diagnose(History(rows((.3, .35, .34), (.3, .31, .305), (.3, .31, .30))))
    assert f.what == 'no better than the average image' and '0.3000' in f.text and 'check(trainer)' in f.advice
    assert not said(rows((.3, .35, .34), (.3, .31, .305), (.3, .31, .30)), iterations=100_000)      # it has only just begun


def test_step_three_undoes_step_two():
    v = [(.3, .2, .1, .13), (.3, .18, .09, .11), (.3, .17, .09, .1)]
    assert said(rows(*v)) == ['step 3 undoes step 2'] and said(rows(*[o[1:] for o in v], split='train')) == ['step 3 undoes step 2']
    assert not said(rows(*v[:2], (.3, .17, .09, .08))) and not said(rows(*v), iterations=10_000)
    assert said(rows(*v, *v), iterations=10_000) == ['step 3 undoes step 2']     # early, but it does not pass


def test_learning_by_heart():
    up = [.2, .1, .08, .07, .075, .08, .085, .09]
    val, train = rows(*[(.3, v, v*.9) for v in up]), lambda last: rows(*[(v, v) for v in (.2, .1, .08, .06, .05, .04, .03, last)], split='train')
    assert said(val, train(.02)) == ['learns by heart'] and said(val, train(.2)) != ['learns by heart']
    assert 'since iteration 400' in diagnose(History(val + train(.02)))[0].text


def test_the_loss_jumps():
    assert said(rows(*[(v,) for v in (.2, .15, .12, .5, .14, .12, .1, .6, .2)], split='train')) == ['the loss jumps']
    assert said(rows(*[(v,) for v in (.2, .15, .12, .1, .1, .1, .3, .3)], split='train')) == ['the loss jumps']
    noisy = random.Random(0)
    assert not said(rows(*[(v*noisy.uniform(.8, 1.25),) for v in FALLING], split='train'))


def test_stuck_and_settled():
    flat, train = [.25, .2, .19, .19, .19, .191, .19, .19, .19, .19], rows(*[(.2,)]*10, split='train')
    assert said(rows(*[(.2, v) for v in flat]), train) == ['stuck']
    assert said(rows(*[(.2, v/3) for v in flat]), train) == ['settled'] and diagnose(History(rows(*[(.2, v/3) for v in flat]) + train))[0].level == 'ok'
    train[-1]['lr'] = 1e-5
    assert not said(rows(*[(.2, v/3) for v in flat]), train)               # the schedule is at its end


def test_further_steps_that_add_nothing():
    assert said(rows(*[(.3, v, v, v) for v in FALLING])) == ['further steps add nothing']
    assert not said(rows(*[(.3, v, .9*v, .8*v) for v in FALLING]))


def test_the_critic_wins():
    r = rows(*[(v,) for v in FALLING[:4]], split='train', **{'latent real': [.5, .05, .04, .03], 'latent fake': [.6, .06, .05, .04]})
    assert said(r) == ['the critic latent wins']
    assert not said(rows(*[(v,) for v in FALLING[:4]], split='train', **{'latent real': [.5]*4, 'latent fake': [.05]*4}))


def test_not_finite_names_the_last_good_checkpoint(tmp_path):
    poison = [0.]
    objective = Objective(lpips=0).add('poison', 1., lambda x: None, lambda _, y, w: y.mean((1, 2, 3))*poison[0])
    t = trainer(tmp_path, objective=objective, save_every=6, log_every=1)
    lines = io.StringIO()
    class Late:
        def tick(self, t): poison[0] = math.nan if t.iteration == 7 else 0.
    with pytest.raises(TrainingError) as e: t.fit(progress=False, watch=[Text(file=lines), Late()])
    f, = diagnose(t, error=e.value)
    assert f.level == 'stop' and f'last good checkpoint at iteration 6, {tmp_path}' in f.text and 'Trainer.resume' in f.advice
    assert 'last good checkpoint at iteration 6' in lines.getvalue() and 'stopped at iteration 8' in lines.getvalue()
    assert 'and nothing was saved' in diagnose(trainer(), error=e.value)[0].text


def test_diagnose_reads_a_file(tmp_path):
    (tmp_path/'history.jsonl').write_text('\n'.join(map(json.dumps, rows((.3, .35), (.3, .31), (.3, .3)))))
    assert [f.what for f in diagnose(tmp_path/'history.jsonl')] == ['no better than the average image']


def test_own_diagnosis(monkeypatch):
    monkeypatch.setattr(watch, 'DIAGNOSES', [])
    @watch.diagnosis
    def slow(run): return Finding('warn', 'slow', f'{run.at} iterations') if run.at < 500 else None
    assert said(rows((.3, .2))) == ['slow'] and not said(rows(*[(.3, v) for v in FALLING]))


def test_a_sentence_on_how_far_it_is():
    assert summary(History()) == 'nothing measured yet'
    assert summary(History(rows((.4, .2, .1)))) == "2 steps take away 75% of the average image's loss; those after the first take away 50% of what step 1 leaves"
    assert 'not below' in summary(History(rows((.4, .5, .45)))) and summary(History(rows((.4, .2)))) == "1 step takes away 50% of the average image's loss"


# ---------------------------------------------------------------- text

class Terminal(io.StringIO):
    encoding = 'utf-8'
    def isatty(self): return True


def run_with(*watchers, **kw):
    t = trainer(**kw)
    with warnings.catch_warnings():
        warnings.simplefilter('error')                     # a watcher that stumbles is left out with a warning
        t.fit(progress=False, watch=list(watchers))
    return t


def test_text_without_a_terminal_is_plain():
    out = io.StringIO()
    t = run_with(Text(file=out))
    s = out.getvalue()
    assert '\x1b' not in s and '\r' not in s
    lines = s.splitlines()
    assert lines[0] == '0 of 40 iterations done; 2 steps on 8 pictures each, cpu, ' + lines[0].split(', cpu, ')[1]
    val = [l for l in lines if 'loss by step' in l]
    assert len(val) == 4 and all('average image' in l and 'val' in l for l in val) and f"{t.history.of('val')[-1]['loss'][-1]:.4f}" in val[-1]
    assert ' 10 of 40 (25%)' in s and 'left (' in s and 'pictures/s' in s and lines[-1].startswith('done at iteration 40: 2 steps take away')


def test_text_on_a_terminal_moves(monkeypatch):
    monkeypatch.delenv('NO_COLOR', raising=False)
    out = Terminal()
    run_with(Text(file=out))
    assert '\r\x1b[2K' in out.getvalue() and '\x1b[1m' in out.getvalue()
    monkeypatch.setenv('NO_COLOR', '1')
    out = Terminal()
    run_with(Text(file=out))
    assert '\x1b[1m' not in out.getvalue()


def test_text_where_blocks_cannot_be_printed():
    out = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    run_with(Text(file=out))
    out.seek(0)
    assert 'done at iteration 40' in out.read()


def test_text_tells_a_diagnosis_once(monkeypatch):
    monkeypatch.setattr(watch, 'DIAGNOSES', [lambda run: Finding('warn', 'odd', 'from iteration 20 on', 'look') if run.at >= 20 else None])
    out = io.StringIO()
    run_with(Text(file=out))
    assert out.getvalue().count('! odd: from iteration 20 on. look') == 1 and out.getvalue().index('20 of 40') < out.getvalue().index('! odd')


def test_sparks(): assert spark([0, 1]) == '▁█' and spark([]) == '' and spark([2, 2]) == '▁▁' and len(spark(range(500))) == 24 and spark([1, math.nan, 2]) == '▁█'


# ---------------------------------------------------------------- the panel

class Page:
    "A notebook's page: what was displayed, and every state it was in"
    def __init__(self, monkeypatch, cell=1):
        self.views, self.shell = [], SimpleNamespace(kernel=1, execution_count=cell)
        monkeypatch.setattr(watch, '_notebook', lambda: self.shell)
        monkeypatch.setattr(watch, '_display', self.display)
    def display(self, o, display_id):
        view = SimpleNamespace(states=[])
        view.update = lambda o: view.states.append(o._repr_html_())
        self.views.append(view)
        return view


@pytest.fixture
def page(monkeypatch): return Page(monkeypatch)


def test_panel_shows_the_run(page):
    single = trainer(n_steps=1, in_channels=3)
    single.fit(progress=False)
    panel = Panel({'single pass': single, 'published': dict(loss=.1, l2=.1)}, every=0., title='A <small> world')
    t = run_with(panel)
    html = page.views[0].states[-1]
    assert len(page.views) == 2 and len(page.views[0].states) > 5
    for words in ('iteration 40</b> of 40 (100%)', 'done', 'learning rate 5.0e-03', 'average image', 'single pass', 'published', 'step 1', 'step 2', 'A &lt;small&gt; world', 'held-out pictures', summary(t)[1:].replace("'", '&#x27;')):
        assert words in html, words
    assert 'left, until' in page.views[0].states[3]
    strips = page.views[1].states
    assert strips and 'data:image/jpeg;base64,' in strips[-1] and all(o in strips[-1] for o in ('input', 'average', 'step 1', 'step 2', 'last step, before'))
    assert panel._repr_html_().count('<div class="restyle-watch">') == 2 and 'iteration 40 of 40, done' in repr(panel)


def drawings(html): return [ET.fromstring(s) for s in re.findall(r'<svg.*?</svg>', html, re.S)]


def test_panel_takes_its_ink_from_the_page(page):
    "Readable on light and on dark: nothing is black or white, and lines differ by more than colour"
    panel = Panel(every=0.)
    run_with(panel, n_steps=4)
    html = panel._repr_html_()
    assert drawings(html)
    ink = {v for s in drawings(html) for e in s.iter() for k, v in e.attrib.items() if k in ('fill', 'stroke')}
    assert ink <= {'none', 'currentColor', *(PALETTE[c] for c in ('blue', 'vermillion', 'purple', 'green', 'sky'))} and 'background:#' not in html.replace('background:#0072B2', '')
    chart = next(s for s in drawings(html) if s.get('role') == 'img')
    lines = [(e.get('stroke-dasharray'), e.get('stroke-width')) for e in chart.iter('polyline') if e.get('stroke', '').startswith('#')]
    assert len(lines) == 4 == len(set(lines))


def test_panel_can_be_read_in_light_and_dark(page, browser, tmp_path):
    panel = Panel(every=0.)
    run_with(panel)
    file = tmp_path/'page.html'
    file.write_text(f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>panel</title><body>{panel._repr_html_()}</body></html>', encoding='utf-8')
    for scheme in ('light', 'dark'):
        opened = new_page(browser, color_scheme=scheme)
        opened.goto(file.as_uri())
        texts = contrasts(opened.locator('.restyle-watch').first)
        assert len(texts) > 5 and not [o for o in texts if o[1] < 4.5]
        assert opened.evaluate("getComputedStyle(document.querySelector('.restyle-watch text')).fill") == ('rgb(0, 0, 0)' if scheme == 'light' else 'rgb(255, 255, 255)')
        assert not opened.complaints
        opened.context.close()


@pytest.mark.parametrize('kw', [dict(val=None), dict(n_steps=1, in_channels=3), dict(n_steps=7), FULL, dict(objective=Objective(l2=0., lpips=.5))], ids=['no validation', 'single pass', 'seven steps', 'all options', 'LPIPS only'])
@pytest.mark.filterwarnings('ignore:progressive')
def test_panel_for_any_run(page, kw):
    t = trainer(**kw)
    if 'val' in kw: t.val = None
    panel = Panel(every=0., axis='passes')
    t.fit(12, progress=False, watch=panel)
    assert drawings(panel._repr_html_()) and 'passes of the encoder' in panel.html() and len(page.views[0].states) > 5 and page.views[1].states


def test_panel_over_several_fits(page):
    "In one cell it stays where it is and goes on; another cell gets its own"
    panel, t = Panel(every=0.), trainer()
    for n in (10, 10): t.fit(n, progress=False, watch=panel)
    assert len(page.views) == 2 and [i for i, _ in panel.moments] == sorted({i for i, _ in panel.moments}) and panel.moments[0][0] == 0
    assert 'paused' in page.views[0].states[-1]
    page.shell.execution_count += 1
    t.fit(progress=False, watch=panel)
    assert len(page.views) == 4 and 'done' in page.views[2].states[-1] and 'paused' in page.views[0].states[-1]


def test_panel_says_why_a_run_stopped(page):
    panel, t = Panel(every=0.), trainer()
    class Break:
        def tick(self, t):
            if t.iteration == 7: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): t.fit(progress=False, watch=[panel, Break()])
    assert 'stopped' in panel.html() and 'KeyboardInterrupt' in panel.html()
    t.history.rows.append(dict(iteration=7, split='note', text='out of memory with 8 pictures'))
    assert 'out of memory with 8 pictures' in panel.html()


def test_panel_elsewhere_than_in_a_notebook_is_text(capsys):
    panel = Panel()
    run_with(panel)
    assert 'done at iteration 40' in capsys.readouterr().err and drawings(panel._repr_html_())


def test_looking_on_changes_nothing(page):
    "The same weights to the bit, with everything that looks"
    a, b = trainer(**dict(FULL, progressive=None)), trainer(**dict(FULL, progressive=None))
    a.fit(12, progress=False)
    b.fit(12, progress=False, watch=[Panel(every=0., share=1.), Text(every=0., file=Terminal())])
    state = lambda t: flat([t.net.encoder.state_dict(), t.average.state_dict(), t.optimizer.state_dict(), t.history.rows])
    assert state(a) == state(b)


def test_a_tick_costs_nothing_and_asks_nothing_of_the_device(page):
    t, panel = trainer(), Panel(every=1e9)
    panel.begin(t, 40)
    panel.trainer = SimpleNamespace(iteration=1)           # whatever else it asked for would fail
    began = time.monotonic()
    for _ in range(10_000): panel.tick(panel.trainer)
    assert time.monotonic() - began < .5


def test_drawing_keeps_to_its_share(page, monkeypatch):
    "Slow pictures (here a fifth of a second) are drawn seldom, and none the less at the end"
    drawn = Panel.strips
    monkeypatch.setattr(Panel, 'strips', lambda self: (time.sleep(.2), drawn(self))[1])
    panel, t = Panel(every=0., share=.05), trainer(iterations=1000, val_every=1)
    began = time.monotonic()
    class Enough:
        def tick(self, t):
            if time.monotonic() - began > 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): t.fit(progress=False, watch=[panel, Enough()])
    assert panel.spent < .05*3.5 + .5 + .5 and len(panel.moments) < 8 and len(t.history) > 20


def test_curves_stay_short(page):
    t = trainer()
    t.history.rows += rows(*[(.3, .2, .1)]*5000, every=1)
    panel = Panel()
    panel.begin(t, 5000)
    assert len(panel.html()) < 60_000


def test_panel_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="'other' is a ReStyle, expected a Trainer"): Panel({'other': trainer().net})
    with pytest.raises(ValueError, match="'iterations' or 'passes'"): Panel(axis='hours')


def test_pictures_of_one_channel(page):
    g = Generator(size=32, style_dim=8, n_mlp=2, channels={4: 8, 8: 8, 16: 8, 32: 8}, image_channels=1)
    g.estimate_latent_avg(200)
    e = build_encoder('compact', n_styles=g.n_styles, style_dim=8, input_size=(32, 32), widths=(4, 8, 8, 8), image_channels=1, in_channels=2)
    x = drawn(g, 24)
    panel = Panel(every=0.)
    Trainer(ReStyle(e, g), x[:16], Objective(lpips=0), val=x[16:], n_steps=2, iterations=4, val_every=2).fit(progress=False, watch=panel)
    assert panel.now[0].shape == (3, 1, 32, 32) and 'data:image/jpeg' in panel.pictures_html()


# ---------------------------------------------------------------- TensorBoard

def test_board(tmp_path):
    event_accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    t = run_with(Board(), folder=tmp_path/'run')
    e = event_accumulator.EventAccumulator(str(tmp_path/'run'/'board'))
    e.Reload()
    tags = e.Tags()
    assert {'loss/val step 2', 'l2/val average image', 'loss/train step 1', 'learning rate/train'} <= set(tags['scalars']) and tags['images']
    last = e.Scalars('loss/val step 2')[-1]
    assert last.step == 40 and last.value == pytest.approx(t.history.of('val')[-1]['loss'][2], rel=1e-5)
    image = Image.open(io.BytesIO(e.Images(tags['images'][0])[-1].encoded_image_string))
    assert image.size == (32*4, 32*3)                       # input, average, two steps


def test_board_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(ImportError, match=r"pip install 'restyle_nb\[train\]'"): Board().begin(trainer(tmp_path), 40)


def test_board_needs_a_place():
    with pytest.raises(ValueError, match='give Board'): Board().begin(trainer(), 40)
