"""Encoders against the golden cases, and in odd sizes."""
import importlib.util, json, sys
from pathlib import Path

import numpy as np, pytest, torch

from restyle_nb.encoders import build_encoder, stack_head, unstack_head, Encoder, SimpleHead, Compact, IRSE50, ResNet34

GOLDEN = Path(__file__).parent/'golden'
LIMIT = 1e-4 # of the spread of the expected array


def fill(*args):
    spec = importlib.util.spec_from_file_location('golden_fill', GOLDEN/'fill.py')
    mod = importlib.util.module_from_spec(spec); spec.loader.exec_module(mod)
    return torch.from_numpy(np.asarray(mod.tensor(*args)))


def case(name):
    "Tensors under published names, inputs, expected outputs"
    d = json.loads((GOLDEN/f'{name}.json').read_text())
    state = {k:fill(k, v['shape'], v['rule']) for k,v in d['tensors'].items()}
    ins = {k:fill(k, shape, 'unit') for k,shape in d['inputs'].items()}
    return state, ins, {k:torch.from_numpy(v) for k,v in np.load(GOLDEN/f'{name}.npz').items()}


def by_hand(state, trunk):
    "Published names to ours, without the reader"
    state = {k.removeprefix('encoder.'):v for k,v in state.items()}
    head = stack_head(state)
    with torch.device('meta'):
        enc = build_encoder(trunk, n_styles=len(head['head.linear.weight']), input_size=256)
    enc.load_state_dict({**{f'trunk.{k}':v for k,v in state.items() if not k.startswith('styles.')}, **head}, assign=True)
    return enc.eval()


def error(got, want): return ((got-want).abs().max()/want.std()).item()


@pytest.mark.parametrize('trunk', ['irse50', 'resnet34'])
@torch.no_grad()
def test_golden(trunk, capsys):
    state, ins, want = case(f'encoder_backbone_{trunk}')
    enc, x = by_hand(state, trunk), ins['in.x']
    got = {'forward': enc(x), 'forward_from': enc.forward_from(enc.first(x[:,:3]), x[:,3:]), 'folded': enc.fold()(x)}
    errs = {k:error(v, want['delta']) for k,v in got.items()}
    with capsys.disabled(): print(f'\n{trunk}: ' + ', '.join(f'{k} {v:.1e}' for k,v in errs.items()))
    assert max(errs.values()) <= LIMIT
    back = unstack_head(enc.state_dict(), 'encoder.styles.')
    assert back and all(torch.equal(state[k], v) for k,v in back.items())


@pytest.mark.parametrize('trunk', ['irse50', 'resnet34'])
@torch.no_grad()
def test_golden_through_the_reader(trunk):
    checkpoints = pytest.importorskip('restyle_nb.checkpoints')
    state, ins, want = case(f'encoder_backbone_{trunk}')
    enc = checkpoints.read_encoder(state).eval()
    assert enc.config['trunk']==trunk and enc.n_styles==want['delta'].shape[1]
    assert error(enc(ins['in.x']), want['delta']) <= LIMIT
