"Measured speed: that the plain form is the published algorithm, that turns are taken fairly, and that what is written can be trusted"
import json, os, signal
import pytest
import torch
from copy import deepcopy
from torch import nn
from restyle_nb import bench as module
from restyle_nb.bench import (FORMS, Bench, BenchError, Shape, _Worker, _error, _rounds, bench, ceilings, check, device_name, find_model, growth, plain_iteration,
                              plain_training, random_model, random_pictures, work)
from restyle_nb.cli import restyle_bench
from restyle_nb.losses import Identity, Objective
from restyle_nb.metrics import operations
from restyle_nb.training import Trainer

torch.set_num_threads(1)
SMALL = dict(channels={4: 16, 8: 16, 16: 16, 32: 8}, style_dim=16, n_mlp=2)


class Face(nn.Module):
    "A face network small enough for a test"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, 4)
    def features(self, x): return self.conv(x).tanh().mean((2, 3))
    def forward(self, x): return self.features(x)


def small(trunk='compact'):
    kw = SMALL | (dict(widths=(8, 16, 16), width=16) if trunk == 'compact' else dict(width=16))
    return random_model(trunk, 32, **kw)


def objective():
    torch.manual_seed(5)
    return Objective(identity=.5, face_net=Identity(Face()))


def pictures(n=2, side=32):
    torch.manual_seed(7)
    return random_pictures(n, side)


# --- the published algorithm

@pytest.mark.parametrize('trunk', ['compact', 'resnet34'])
def test_the_published_iteration_has_the_gradients_of_the_trainer(trunk):
    "In 64 bits: BatchNorm over few cells magnifies rounding, how much depends on the processor"
    net, x, o = small(trunk), pictures(4).double(), objective()
    p = plain_training(net, o).double()
    p.average = tuple(a.detach() for a in p.start())
    told = plain_iteration(p, x, o.double(), torch.optim.SGD(p.encoder.parameters(), 1.), n_steps=2)
    t = Trainer(deepcopy(net).double().requires_grad_(True), x, objective().double(), batch_size=4, n_steps=2, lr=1., optimizer=lambda ps, lr: torch.optim.SGD(ps, lr))
    t.net.encoder.train()
    losses = t.train_batch(x)
    torch.testing.assert_close(torch.tensor([[s[k] for s in told] for k in t.names], dtype=losses.dtype), losses, rtol=1e-9, atol=1e-12)
    moved = [torch.cat([(a - b).flatten() for a, b in zip(net.encoder.parameters(), m.encoder.parameters())]).detach() for m in (p, t.net)]
    assert moved[1].norm() > 0 and (moved[0] - moved[1]).norm() < 1e-8*moved[1].norm()
    norms = [[b for k, b in m.encoder.named_buffers() if 'running' in k] for m in (p, t.net)]
    for a, b in zip(*norms): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_published_iteration_wastes_what_the_published_code_wastes():
    net, x = small(), pictures()
    p, o = plain_training(net, o := objective()), o
    seen = []
    o.identity.net.conv.register_forward_hook(lambda *_: seen.append(1))
    plain_iteration(p, x, o, torch.optim.SGD(p.encoder.parameters(), 1.), n_steps=2)
    assert len(seen) == 2*3
    assert all(c.weight.grad is not None for c in p.generator.convs) and o.identity.net.conv.weight.grad is not None
    assert not any(q.requires_grad for q in o.lpips.parameters())
    assert not any(q.grad is not None for q in net.parameters()), 'the model itself is left alone'


def test_random_models_are_the_same_every_time_and_do_something():
    a, b = small(), small()
    assert all(torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values()))
    x = pictures()
    inv = a.invert(x, 2)
    assert inv.images.isfinite().all() and inv.deltas.std() > 1e-3
    assert (a.generator.synthesize(inv.codes[-1]) - a.generator.synthesize(inv.codes[-1], noise=None)).abs().max() > 1e-3


def test_published_shapes():
    with torch.device('meta'): g = random_model.__globals__['Generator'](256)
    assert g.config['channels'] == {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128} and g.n_styles == 14


def test_unknown_models_and_forms_are_refused():
    for name in ('faces65', 'irse50-100', 'irse51-256', 'irse50', '-64'):
        with pytest.raises(BenchError, match='irse50-256'): find_model(name)
    with pytest.raises(BenchError, match='ladder'): bench(Shape(), ('plain', 'quick'))
    with pytest.raises(BenchError, match='training'): bench(Shape(what='learning'))
    with pytest.raises(BenchError, match='irse50-256'): growth('faces65')


def test_forms_of_each_kind():
    assert check(('ladder', 'bf16'), Shape()) == ['plain', 'scaled', 'net', 'folded', 'generator', 'fast', 'bf16']
    assert check(('plain', 'net', 'fast', 'seen'), Shape(what='training')) == ['plain', 'fast']


def test_every_rung_of_the_ladder_has_the_same_numbers():
    net, x = small('resnet34'), pictures()
    want = net.invert(x, 3)
    for k in module.LADDER + ('seen',):
        inv = FORMS[k][1](deepcopy(net)).invert(x, 3)
        assert _error([inv.codes[-1], inv.images[-1]], [want.codes[-1], want.images[-1]]) < 1e-4, k


# --- counting

def test_work_is_what_the_counter_says():
    net, s = find_model('faces64'), Shape('faces64', 2, 3)
    x, w = pictures(2, 64), work(s)
    with torch.no_grad(): net.start(1); counted = operations(lambda: list(net.steps(x, 3)))
    assert w['total'] == w['encoder'] + w['generator'] and w['losses'] == 0
    assert abs(counted/w['total'] - 1) < .05                         # the first convolution of x once, not three times


def test_error_is_in_units_of_spread():
    a = torch.randn(1000)
    assert _error([a], [a]) == 0 and .9 < _error([a + a.std()], [a]) < 1.1
    assert _error([a[:3]], [a]) is None


def test_ceilings():
    c = ceilings(work=1e8, repeats=1)
    assert c.product == max(c.products.values()) and c.stream == max(c.streams.values()) and min(*c.products.values(), *c.streams.values()) > 1e7
    assert {'a @ b', '1 × 1 convolution'} <= set(c.products) and 'GB/s' in str(c)
    assert device_name()


# --- turns

def test_turns_are_taken_in_changing_order():
    asked = []
    turns = {k: lambda k=k: asked.append(k) or k for k in 'abc'}
    assert _rounds(turns, 3, 1e9) == dict(a=['a']*3, b=['b']*3, c=['c']*3)
    assert ''.join(asked) == 'abc' 'cba' 'abc'


def test_two_rounds_however_short_the_time(): assert len(_rounds(dict(a=lambda: 1), 9, 0.)['a']) == 2


def test_a_worker_says_what_is_wrong_and_may_die():
    with _Worker('faces64, fast', 1) as w:
        with pytest.raises(BenchError, match="faces64, fast: .*no model 'faces65'"): w.ask('build', shape=Shape('faces65'), form='fast', device='cpu', threads=1).hear()
        os.kill(w.process.pid, signal.SIGKILL)
        with pytest.raises(BenchError, match='its process ended'): w.ask('time').hear()


# --- what is written

def row(form, t, batch=1): return dict(model='faces64', batch=batch, n_steps=5, what='inference', form=form, label=form, seconds=t, times=[t, t], speedup=2/t, low=2/t, high=2/t,
                                       rate=1/t, memory=None, weights=8, macs=dict(encoder=1, generator=2, losses=0, total=3), share=.5, read=.1, error=1e-6)
FACTS = dict(device='cpu', name='a processor', threads=2, torch='2', restyle_nb='0', wait='', ceilings=dict(float32=dict(products={'a @ b': 1e9}, streams=dict(copy=1e9))))


def test_tables_and_files(tmp_path):
    grown = [dict(model='faces64', axis='steps', value=n, form='fast', seconds=.5 + .25*n) for n in (1, 2, 4)]
    b = Bench([row('plain', 2), row('fast', 1)], FACTS, grown)
    b.save(tmp_path/'a.json')
    c = Bench.load(tmp_path/'a.json')
    assert (c.rows, c.facts, c.growth) == (b.rows, b.facts, b.growth)
    assert '2.00 (2.00 to 2.00)' in c._repr_markdown_() and 'a processor' in repr(c)
    line = c.line()
    assert abs(line.once - .5) < 1e-9 and abs(line.each - .25) < 1e-9 and abs(line.r2 - 1) < 1e-9
    with pytest.raises(BenchError, match='resolution'): c.line('fast', 'resolution')


def test_runs_are_put_together_only_where_that_means_something():
    a, b = Bench([row('plain', 2)], FACTS), Bench([row('plain', 3), row('fast', 1)], FACTS)
    assert (a + b).rows == b.rows, 'the newer rows of a shape win'
    assert len((a + Bench([row('plain', 3, batch=8)], FACTS)).rows) == 2
    with pytest.raises(BenchError, match='no ratio across'): a + Bench([], FACTS | dict(threads=3))


@pytest.mark.parametrize('text', ['', '[]', '{"rows": []}', '{"rows": [], "facts": {}, "code": 1}'])
def test_foreign_files_are_refused(tmp_path, text):
    (tmp_path/'a.json').write_text(text)
    with pytest.raises(BenchError, match='a.json'): Bench.load(tmp_path/'a.json')


# --- the command, alive

def test_the_command_measures_writes_and_draws(tmp_path, capsys):
    out, words = tmp_path/'speed.json', '--forms plain fast --steps 2 --rounds 2 --seconds 1 --threads 1'.split()
    Bench([row('plain', 2, batch=7)], FACTS | dict(name=device_name(), threads=1)).save(out)
    assert restyle_bench(['--shapes', 'embedded:4', *words, '--out', str(out), '--append', '--figure', str(tmp_path/'speed.png')]) == 0
    assert 'net.fast()' in capsys.readouterr().out
    data = json.loads(out.read_text())
    old, plain, fast = data['rows']
    assert old['batch'] == 7 and (plain['form'], fast['form'], fast['batch']) == ('plain', 'fast', 4)
    assert fast['error'] < 1e-4 and len(fast['times']) == 2 and fast['seconds'] > 0 and 0 < fast['share'] < 1.5
    assert plain['speedup'] == 1 and fast['low'] <= fast['speedup'] <= fast['high']
    assert fast['memory'] is None or 1e6 < fast['memory'] < 4e9
    assert (tmp_path/'speed.png').stat().st_size > 1000


@pytest.mark.parametrize('words', ['--shapes faces64', '--shapes faces64:0', '--append', '--shapes faces65:1', '--shapes faces64:1 --forms quick', '--device abacus'])
def test_the_command_refuses_in_one_line(words, capsys):
    assert restyle_bench(words.split()) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
