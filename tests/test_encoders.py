"""Encoders against the golden cases, and in odd sizes."""
import copy, importlib.util, json, re, weakref
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F

from restyle_nb.encoders import (HEADS, TRUNKS, build_encoder, imagenet_trunk, init_trunk, stack_head, trunk_names, unstack_head,
                                 fpn_groups, FPNHead, IRSE50, ProgressiveHead, SharedHead, SimpleHead)

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


def by_hand(state, trunk, head='simple'):
    "Published names to ours, without the reader"
    state = {k.removeprefix('encoder.'):v for k,v in state.items()}
    part = stack_head(state, head=head, consume=True)
    k = sum(len(v) for n,v in part.items() if n.endswith('linear.weight'))
    with torch.device('meta'): enc = build_encoder(trunk, head, n_styles=k, input_size=256)
    enc.load_state_dict({**{f'trunk.{k}':v for k,v in state.items()}, **part}, assign=True)
    return enc.eval()


def error(got, want): return ((got-want).abs().max()/want.std()).item()


GOLDENS = dict(encoder_backbone_irse50=('irse50', 'simple'), encoder_backbone_resnet34=('resnet34', 'simple'),
               encoder_fpn_irse50=('irse50', 'fpn'), encoder_progressive_irse50=('irse50', 'progressive'))
STAGES = dict(delta=None, WTraining=0, Delta3Training=3, Inference=None)


@pytest.mark.parametrize('name', GOLDENS)
@torch.no_grad()
def test_golden(name, capsys):
    state, ins, want = case(name)
    enc, x, errs = by_hand(state, *GOLDENS[name]), ins['in.x'], {}
    def check(form, forward):
        for k,v in want.items():
            enc.stage = STAGES[k]
            errs[f'{form} {k}'] = error(forward(x), v)
    check('forward', enc)
    check('forward_from', lambda x: enc.forward_from(enc.first(x[:,:3]), x[:,3:]))
    back = unstack_head(enc.state_dict(), 'encoder.styles.')
    assert {k for k in state if '.styles.' in k or 'latlayer' in k}==set(back) and all(torch.equal(state[k], v) for k,v in back.items())
    del state, back
    enc.fold(inplace=True)
    check('folded', enc)
    with capsys.disabled(): print(f'\n{name}: ' + ', '.join(f'{k} {v:.1e}' for k,v in errs.items()))
    assert len(errs)==3*len(want) and max(errs.values()) <= LIMIT


@pytest.mark.parametrize('name', GOLDENS)
@torch.no_grad()
def test_golden_through_the_reader(name):
    checkpoints = pytest.importorskip('restyle_nb.checkpoints')
    trunk, head = GOLDENS[name]
    state, ins, want = case(name)
    enc = checkpoints.read_encoder(state, head=head).eval()
    assert enc.config['trunk']==trunk and enc.config['head']==head
    for k,v in want.items():
        enc.stage = STAGES[k]
        assert enc.n_styles==v.shape[1] and error(enc(ins['in.x']), v) <= LIMIT


# The other heads and trunks have no golden case here. They are held to the definition, written out below over the published names.

def random_published(enc, seed=0):
    "A random encoder under the published names, with statistics as training leaves them"
    g = torch.Generator().manual_seed(seed)
    state = {k.removeprefix('trunk.'):v for k,v in enc.state_dict().items() if k.startswith('trunk.')} | unstack_head(enc.state_dict())
    def fresh(k, t):
        if not t.is_floating_point(): return t
        n = torch.randn(t.shape, generator=g)
        if k.endswith('running_var'): return 3+n.abs() # as in the golden cases: keeps the spread of a deep sum bounded
        if t.ndim==1: return .1*n + (1. if k.endswith('weight') else 0.)
        return n if 'linear' in k else n*(2/t[0].numel())**.5
    return {k:fresh(k, t) for k,t in state.items()} if 'shared' not in enc.config['head'] else tied({k:fresh(k, t) for k,t in state.items()})


def tied(state):
    "The same, with styles 1-2, 4-6 and 8 to the end given the convolutions of styles 0, 3 and 7"
    first = lambda m: f'styles.{max(j for j in (0,3,7) if j<=int(m[1]))}.convs.'
    return {k:state[re.sub(r'^styles[.](\d+)[.]convs[.]', first, k)] for k in state}


def definition(state, maps, head, stage=None):
    "Codes of the published heads from three maps, one style at a time, by the published names"
    def block(j, f):
        i = 0
        while f'styles.{j}.convs.{i}.weight' in state:
            f, i = F.leaky_relu(F.conv2d(f, state[f'styles.{j}.convs.{i}.weight'], state[f'styles.{j}.convs.{i}.bias'], stride=2, padding=1), .01), i+2
        w = state[f'styles.{j}.linear.weight']
        return f.flatten(1) @ w.T / w.shape[1]**.5 + state[f'styles.{j}.linear.bias']
    def add(f, layer, c):
        up = F.interpolate(f, size=c.shape[-2:], mode='bilinear', align_corners=True)
        return up + F.conv2d(c, state[f'{layer}.weight'], state[f'{layer}.bias'])
    c1, c2, c3 = maps
    p2 = add(c3, 'latlayer1', c2) if 'fpn' in head else None
    p1 = add(p2, 'latlayer2', c1) if 'fpn' in head else None
    k = 1 + max(int(n.split('.')[1]) for n in state if n.startswith('styles.'))
    codes = [block(j, c3 if j<3 or 'fpn' not in head else p2 if j<7 else p1) for j in range(k)]
    if 'progressive' in head: codes = codes[:1] + [codes[0]+(c if stage is None or j<=stage else 0) for j,c in enumerate(codes) if j]
    return torch.stack(codes, 1)


@pytest.mark.parametrize('channels,size', [(3,(64,64)), (6,(40,52))])
@pytest.mark.parametrize('head', list(HEADS))
@pytest.mark.parametrize('trunk', list(TRUNKS))
@torch.no_grad()
def test_every_head_over_every_trunk(trunk, head, channels, size):
    "Forward, plain, cached first layer and folded against the definition; single-pass and ReStyle forms"
    torch.manual_seed(0)
    kw = dict(n_styles=9, style_dim=20, width=12, in_channels=channels, input_size=size)
    kw |= dict(widths=(8,12,16,20)) if trunk=='compact' else {}
    state = random_published(build_encoder(trunk, head, **kw))
    enc = build_encoder(trunk, head, **kw).eval()
    part = stack_head(state, head=head)
    enc.load_state_dict({f'trunk.{k}':v for k,v in state.items() if not k.startswith(('styles.', 'latlayer'))} | part)
    assert all(torch.equal(v, state[k]) for k,v in unstack_head(part).items()) and build_encoder(**enc.config).config==enc.config
    x = torch.randn(2, channels, *size)
    maps = enc.trunk.pyramid(enc.trunk.first(x))
    assert [m.shape[1] for m in maps]==list(enc.trunk.pyramid_channels) and torch.equal(maps[-1], enc.trunk(x))
    sizes = [tuple(-(-s//(enc.trunk.stride//n)) for s in size) for n in (4,2,1)]
    assert [tuple(m.shape[-2:]) for m in maps]==sizes
    fast = enc.fold()
    for stage in (None, 0, 3, 7) if 'progressive' in head else (None,):
        enc.stage = fast.stage = stage
        want = definition(state, maps, head, stage)
        assert error(enc(x), want) < 1e-5 and error(fast(x), want) < LIMIT
        assert error(enc.head.plain(maps if 'fpn' in head else maps[-1]), want) < 1e-5
        if channels==6:
            a, b = x.chunk(2, 1)
            for e in (enc, fast): assert error(e.forward_from(e.first(a), b), want) < LIMIT and error(e(a, b), want) < LIMIT


@pytest.mark.parametrize('n_styles', [1, 2, 3, 4, 6, 7, *range(8, 19)])
@pytest.mark.parametrize('head', list(HEADS))
@torch.no_grad()
def test_any_number_of_styles(head, n_styles):
    torch.manual_seed(0)
    channels = (6,8,10)
    for width in (5, 130):
        for hw in ((4,4), (3,4), (1,1)) if width<100 else ((4,4),):
            h = HEADS[head](n_styles, channels if 'fpn' in head else 10, 7, hw, width)
            state = {f'head.{k}':v for k,v in h.state_dict().items()}
            flat = unstack_head(state)
            back = stack_head(flat, head=head)
            assert set(back)==set(state) and all(torch.equal(v, state[k]) for k,v in back.items())
            maps = [torch.randn(2, c, hw[0]*m, hw[1]*m) for c,m in zip(channels, (4,2,1))]
            for stage in {None, 0, n_styles//2, n_styles-1} if 'progressive' in head else {None}:
                h.stage = stage
                got = h(maps if 'fpn' in head else maps[-1])
                assert got.shape==(2,n_styles,7) and error(got, definition(flat, maps, head, stage)) < 1e-5


@pytest.mark.parametrize('head', list(HEADS))
@pytest.mark.parametrize('trunk', ['irse50', 'resnet34'])
def test_published_names_and_cars(trunk, head):
    "As published for 192x256 cars: 4, 5 and 6 convolutions, square or not"
    with torch.device('meta'): enc = build_encoder(trunk, head, n_styles=16, input_size=(192,256))
    flat = unstack_head(enc.state_dict())
    depth = lambda j: sum(k.startswith(f'styles.{j}.convs.') and k.endswith('.weight') for k in flat)
    assert [depth(j) for j in range(16)]==([4]*3+[5]*4+[6]*9 if 'fpn' in head else [4]*16)
    assert flat['styles.15.convs.2.weight'].shape==(512,512,3,3)
    assert ('latlayer1.weight' in flat)==('fpn' in head) and (not 'fpn' in head or flat['latlayer2.weight'].shape==(512,128,1,1))
    assert sum(k.startswith('latlayer') for k in flat)==4*('fpn' in head)
    maps = enc.trunk.pyramid(enc.trunk.first(torch.zeros(1, 6, 192, 256, device='meta')))
    assert [tuple(m.shape[1:]) for m in maps]==[(128,48,64), (256,24,32), (512,12,16)]
    assert enc(torch.zeros(1, 6, 192, 256, device='meta')).shape==(1,16,512)


@pytest.mark.parametrize('trunk,taps', [('irse50', (6,20,23)), ('resnet34', (6,12,15))])
@torch.no_grad()
def test_taps(trunk, taps):
    t = TRUNKS[trunk](3).eval()
    h = t.enter(t.first(torch.randn(1, 3, 32, 32)))
    maps, want = t.pyramid(t.first(torch.ones(1, 3, 32, 32))), []
    h = t.enter(t.first(torch.ones(1, 3, 32, 32)))
    for unit in t.body: want.append(h := unit(h))
    assert all(torch.equal(m, want[i]) for m,i in zip(maps, taps, strict=True))


def test_deep_and_plain_ir_trunks():
    "The trunk of CurricularFace: 100 layers, no squeeze and excitation"
    with torch.device('meta'): deep, face = IRSE50(3, layers=100, se=False), IRSE50(3)
    names = set(deep.state_dict())
    assert len(deep.body)==49 and 'body.48.res_layer.4.weight' in names and not any('.fc' in k or 'res_layer.5' in k for k in names)
    assert [i for i in range(49) if f'body.{i}.shortcut_layer.0.weight' in names]==[3, 16, 46] and deep.taps==[15, 45, 48]
    assert len(face.body)==24 and 'body.23.res_layer.5.fc2.weight' in face.state_dict()
    assert deep(torch.zeros(1, 3, 112, 112, device='meta')).shape==(1,512,7,7)
    with torch.device('meta'): again = build_encoder('irse50', layers=100, se=False, n_styles=8)
    assert again.config['layers']==100 and again.config['se'] is False
    with torch.device('meta'): assert build_encoder(**again.config).config==again.config
    with pytest.raises(ValueError, match='layers=34, expected one of .50, 100.'): IRSE50(3, layers=34)


def test_stages():
    torch.manual_seed(0)
    for head in ('progressive', 'fpn_progressive'):
        enc = build_encoder('compact', head, n_styles=9, style_dim=6, width=5, input_size=32, widths=(4,4,4))
        x, y = torch.randn(2, 2, 3, 32, 32)
        assert enc.stage is None
        full = enc(x, y)
        for stage in range(9):
            enc.stage = stage
            w = enc(x, y)
            assert torch.allclose(w[:,:stage+1], full[:,:stage+1], atol=1e-6) and (w[:,stage+1:]==w[:,:1]).all() and (w[:,1:stage+1]!=w[:,:1]).any(-1).all()
            assert copy.deepcopy(enc).stage==enc.fold().stage==stage
        enc.stage = 3
        enc.zero_grad(); enc(x, y).square().sum().backward()
        grads = unstack_head({k:p.grad if p.grad is not None else torch.zeros_like(p) for k,p in enc.named_parameters()})
        moved = {int(k.split('.')[1]) for k,g in grads.items() if k.startswith('styles.') and g.abs().max()>0}
        assert moved=={0,1,2,3}
        for bad in (-1, 9):
            with pytest.raises(ValueError, match='expected 0 .* to 8, or None'): enc.stage = bad
        with pytest.raises(TypeError): enc.stage = 1.5
        enc.stage = None
        assert torch.equal(enc(x, y), full) and 'stage' not in str(sorted(enc.state_dict()))
    plain = build_encoder('compact', 'simple', n_styles=3, style_dim=6, width=5, input_size=32)
    plain.stage = None
    with pytest.raises(ValueError, match='has no stages'): plain.stage = 1


def test_consume_frees_each_block():
    class Watched(dict):
        "A state that checks, at each pop, that what was popped before is gone"
        def pop(self, k):
            assert all(r() is None for r in refs), 'a copied block is still held'
            refs.append(weakref.ref(self[k]))
            return super().pop(k)
    for head in HEADS:
        refs, h = [], HEADS[head](9, (6,8,10) if 'fpn' in head else 10, 7, 4, 5)
        flat = unstack_head({f'head.{k}':v for k,v in h.state_dict().items()}, 'encoder.styles.')
        state = Watched({**flat, 'encoder.body.0.weight': torch.zeros(1)})
        want = stack_head(flat, 'encoder.styles.', head)
        n = len(flat); del flat
        got = stack_head(state, 'encoder.styles.', head, consume=True)
        assert list(state)==['encoder.body.0.weight'] and len(refs)==n and all(r() is None for r in refs)
        assert set(got)==set(want) and all(torch.equal(v, want[k]) for k,v in got.items())


def test_stack_head_says_what_is_wrong():
    flat = {head: unstack_head({f'head.{k}':v for k,v in HEADS[head](9, (6,8,10) if 'fpn' in head else 10, 7, 4, 5).state_dict().items()}) for head in HEADS}
    def without(head, *names): return {k:v for k,v in flat[head].items() if not k.startswith(names)}
    for state,head,message in (
        (flat['fpn'], 'simple', 'styles.0.convs.4.weight is missing.*FPN head'),
        (flat['simple'], 'fpn', 'styles.3 has 2 convolutions, expected 3'),
        (without('fpn', 'latlayer2.bias'), 'fpn', 'latlayer2.bias is missing'),
        (without('fpn', 'styles.8.linear.bias'), 'fpn', 'styles.8.linear.bias is missing'),
        (without('simple', 'styles.4.'), 'simple', r'styles.4.\* is missing'),
        ({**flat['simple'], 'styles.123456789.linear.bias': torch.zeros(7)}, 'simple', r'styles.9.\* is missing'),
        ({**flat['simple'], 'styles.2.linear.weight': torch.zeros(7, 4)}, 'progressive', 'styles.2.linear.weight is .7, 4., expected .7, 5.'),
        ({**flat['simple'], 'styles.2.convs.1.weight': torch.zeros(7)}, 'simple', 'styles.0.convs.1.weight has no place'),
        ({'x': torch.zeros(1)}, 'simple', r'no tensor named styles.J.\*; found x'),
        (flat['simple'], 'gradual', "no head 'gradual'; there are simple, fpn"),
    ):
        before = dict(state)
        with pytest.raises(ValueError, match=message): stack_head(state, head=head, consume=True)
        assert list(state)==list(before) # nothing was taken


@pytest.mark.parametrize('trunk', ['irse50', 'resnet34', 'compact'])
@torch.no_grad()
def test_cars_shape_and_odd_widths(trunk):
    "Flat pictures, batch 1, a style width that is not 512; forward_from and fold give the same"
    torch.manual_seed(0)
    enc = build_encoder(trunk, n_styles=3, style_dim=40, width=24, input_size=(192,256)).eval()
    x, y = torch.rand(2, 1, 3, 192, 256)*2-1
    want = enc(x, y)
    assert want.shape==(1,3,40) and enc.head.spatial==(12,16) and len(enc.head.convs)==4
    fast = enc.fold()
    for got in (enc.forward_from(enc.first(x), y), fast(x, y), fast.forward_from(fast.first(x), y), fast.fold()(x, y)):
        assert error(got, want) <= 1e-4


@pytest.mark.parametrize('channels', range(2, 9))
@torch.no_grad()
def test_in_channels(channels):
    for trunk,kw in (('compact', dict(widths=(8,8,8,8))), ('irse50', {}), ('resnet34', {})):
        enc = build_encoder(trunk, n_styles=2, style_dim=8, width=8, in_channels=channels, image_channels=channels//2, input_size=32, **kw).eval()
        x, y = torch.randn(2, channels//2, 32, 32), torch.randn(2, channels-channels//2, 32, 32)
        assert enc(x, y).shape==(2,2,8)
        assert error(enc.forward_from(enc.first(x), y), enc(x, y)) <= 1e-4


@pytest.mark.parametrize('width', [16, 160])
def test_head_equals_its_plain_form(width):
    torch.manual_seed(0)
    head = SimpleHead(4, 12, 20, (6,9), width).double()
    f = torch.randn(3, 12, 6, 9, dtype=torch.double, requires_grad=True)
    a, b = ([y, *torch.autograd.grad(y.square().sum(), [f, *head.parameters()])] for y in (head(f), head.plain(f)))
    for p,q in zip(a, b): torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


# The shared head

def shared_pair(width, n_styles=9, progressive=False):
    "A shared head, and the head with a block for each style that it stands for"
    names = ('shared_progressive', 'progressive') if progressive else ('shared', 'simple')
    torch.manual_seed(0)
    small = HEADS[names[0]](n_styles, 10, 7, (6,9), width).double()
    for p in small.parameters(): p.data.normal_()
    full = HEADS[names[1]](n_styles, 10, 7, (6,9), width).double()
    full.load_state_dict({k.removeprefix('head.'):v for k,v in stack_head(unstack_head({f'head.{k}':v for k,v in small.state_dict().items()}), head=names[1]).items()})
    return small, full


@pytest.mark.parametrize('progressive', [False, True])
@pytest.mark.parametrize('width', [16, 160])
def test_a_shared_head_is_a_full_one_with_equal_blocks(width, progressive):
    "In value, and in gradient: a stack's is the sum of those of the blocks it stands for"
    small, full = shared_pair(width, progressive=progressive)
    f = torch.randn(3, 10, 6, 9, dtype=torch.double, requires_grad=True)
    want, got = full(f), small(f)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(small.plain(f), want, rtol=1e-10, atol=1e-10)
    a, b = (torch.autograd.grad(y.square().sum(), [f, *h.parameters()]) for h,y in ((small, got), (full, want)))
    sums = [q if p.shape==q.shape else torch.stack([q.unflatten(0, (9,-1))[js.start:js.stop].sum(0) for js in fpn_groups(9)]).flatten(0, 1) for p,q in zip(a, b)]
    assert sum(p.shape!=q.shape for p,q in zip(a, b))==2*len(small.convs)
    for p,q in zip(a, sums): torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8*q.abs().max().item())


def test_a_shared_head_has_three_stacks():
    with torch.device('meta'): count = {h: sum(p.numel() for k,p in HEADS[h]().named_parameters() if k.startswith('convs')) for h in ('simple', 'shared', 'shared_progressive')}
    assert count['simple']==6*count['shared']==6*count['shared_progressive']==18*4*(9*512*512+512)
    for n in (1, 3, 4, 7, 8): assert len(HEADS['shared'](n, 4, 5, 2, 6).convs[0].weight)==6*len(fpn_groups(n))
    assert not HEADS['shared'].stages and HEADS['shared_progressive'].stages


def test_stack_head_does_not_share_what_differs():
    flat = unstack_head({f'head.{k}':v for k,v in HEADS['shared'](9, 10, 7, 4, 5).state_dict().items()})
    flat['styles.4.convs.2.bias'] = flat['styles.4.convs.2.bias']+1
    before = dict(flat)
    with pytest.raises(ValueError, match='styles.4.convs.2.bias differs from styles.3.convs.2.bias.*head="simple"'): stack_head(flat, head='shared', consume=True)
    assert list(flat)==list(before) and stack_head(flat, head='simple')['head.convs.1.bias'].shape==(45,)


@torch.no_grad()
def test_a_shared_head_in_a_file(tmp_path):
    from restyle_nb.checkpoints import read_encoder, save_encoder
    for head in ('shared', 'shared_progressive'):
        torch.manual_seed(0)
        enc = build_encoder('compact', head, n_styles=9, style_dim=6, width=5, input_size=(32,48), widths=(4,4,4)).eval()
        got = read_encoder(save_encoder(enc, tmp_path/f'{head}.safetensors')).eval()
        x, y = torch.randn(2, 2, 3, 32, 48)
        assert got.config==enc.config and got.config['head']==head and torch.equal(got(x, y), enc(x, y))
        fast = got.fold()
        assert error(fast.forward_from(fast.first(x), y), enc(x, y)) < 1e-5


@pytest.mark.parametrize('head', ['shared', 'shared_progressive'])
@torch.no_grad()
def test_a_shared_head_in_a_published_file(head):
    "Written out as full blocks, for published code; read as those, or as shared again"
    from restyle_nb.checkpoints import publish_restyle, read_restyle
    from restyle_nb.generator import Generator
    from restyle_nb.restyle import ReStyle
    torch.manual_seed(0)
    g = Generator(64, style_dim=16, channels={4:8, 8:8, 16:8, 32:8, 64:8})
    g.estimate_latent_avg(64)
    net = ReStyle(build_encoder('resnet34', head, n_styles=g.n_styles, style_dim=16, width=8, input_size=64), g).eval()
    x = torch.rand(2, 3, 64, 64)*2-1
    want, file = net.invert(x, 2).codes, publish_restyle(net)
    assert file['state_dict']['encoder.styles.9.convs.2.weight'].shape==(8,8,3,3)
    for name in (None, head):
        got = read_restyle(copy.deepcopy(file), head=name)
        assert got.encoder.config['head']==(name or head.replace('shared_', '').replace('shared', 'simple'))
        assert error(got.invert(x, 2).codes, want) < 1e-4


@torch.no_grad()
def test_a_head_of_ones_own(monkeypatch):
    "One stack for all styles: three lines, and everything else goes on working"
    class One(SharedHead): stacks = staticmethod(lambda n: [range(n)])
    monkeypatch.setitem(HEADS, 'one', One)
    enc = build_encoder('compact', 'one', n_styles=9, style_dim=6, width=5, input_size=32, widths=(4,4,4)).eval()
    assert enc.config['head']=='one' and build_encoder(**enc.config).config==enc.config and len(enc.head.convs[0].weight)==5
    f = torch.randn(2, 4, *enc.head.spatial)
    assert error(enc.head(f), enc.head.plain(f)) < 1e-5
    state = {f'head.{k}':v for k,v in enc.head.state_dict().items()}
    assert all(torch.equal(v, state[k]) for k,v in stack_head(unstack_head(state), head='one').items())


@pytest.mark.parametrize('head', ['simple', 'shared', 'shared_progressive'])
@torch.no_grad()
def test_an_exported_head_takes_any_batch(head):
    "Wide blocks choose their form by the batch; under torch.export they may not"
    m = HEADS[head](5, 16, 24, 8, 160).eval()
    p = torch.export.export(m, (torch.randn(3, 16, 8, 8),), dynamic_shapes=({0: torch.export.Dim('batch', max=64)},)).module()
    for b in (1, 2, 7): assert error(p(f := torch.randn(b, 16, 8, 8)), m(f)) < 1e-5


def test_fold_leaves_the_original_alone():
    torch.manual_seed(0)
    enc = build_encoder('resnet34', n_styles=2, style_dim=8, width=8, input_size=32)
    before = {k:v.clone() for k,v in enc.state_dict().items()}
    fast = enc.fold()
    assert enc.training and not enc.folded and fast.folded and not fast.training
    assert all(torch.equal(v, before[k]) for k,v in enc.state_dict().items()) and not any(p.requires_grad for p in fast.parameters())
    assert all(p.requires_grad for p in enc.parameters()) and enc.fold(inplace=True) is enc


def test_compact_is_small_and_learns():
    torch.manual_seed(0)
    enc = build_encoder('compact', n_styles=10, style_dim=128, width=64, input_size=64)
    assert 1.3e6 < sum(p.numel() for p in enc.parameters()) < 1.7e6
    opt, losses = torch.optim.Adam(enc.parameters(), lr=1e-3), []
    x = torch.randn(8, 3, 64, 64)
    target = torch.randn(8, 10, 128)
    for _ in range(30):
        loss = (enc(x, 0*x)-target).square().mean()
        opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
    assert losses[-1] < .6*losses[0]


# First weights

def picture_trunk(trunk, channels=3, seed=0):
    "A trunk that sees one picture, as a face network or an ImageNet network does"
    torch.manual_seed(seed)
    t = TRUNKS[trunk](channels).eval()
    with torch.no_grad():
        for k,v in t.state_dict().items():
            if k.endswith('running_var'): v.uniform_(.5, 2)
            elif k.endswith('running_mean'): v.uniform_(-.5, .5)
    return t


@pytest.mark.parametrize('trunk', list(TRUNKS))
@torch.no_grad()
def test_init_trunk_three_ways(trunk):
    net = picture_trunk(trunk)
    x, y, d = torch.randn(3, 2, 3, 32, 32)
    e = {extra: build_encoder(trunk, n_styles=2, style_dim=4, width=4, input_size=32, init=net.state_dict(), extra=extra).eval() for extra in ('difference', 'zero', 'noise')}
    first = {k: (lambda x, y, v=v: v.trunk.first(torch.cat([x, y], 1))) for k,v in e.items()}
    assert torch.allclose(e['zero'].trunk(torch.cat([x, y], 1)), net(x), atol=1e-4)
    bias = net.first.bias.view(1,-1,1,1) if net.first.bias is not None else 0
    assert torch.allclose(first['difference'](x, x), bias+0*net.first(x), atol=1e-4)
    assert torch.allclose(first['difference'](x+d, y+d), first['difference'](x, y), atol=1e-4)
    noise = e['noise'].trunk.first.weight[:,3:]
    assert abs(noise.std()-1) < .1 and abs(noise.mean()) < .1 and torch.equal(e['noise'].trunk.first.weight[:,:3], net.first.weight)
    for enc in e.values():
        own = enc.trunk.state_dict()
        assert all(torch.equal(v, own[k]) for k,v in net.state_dict().items() if v.shape==own[k].shape)


@pytest.mark.parametrize('trunk', ['irse50', 'resnet34'])
@torch.no_grad()
def test_init_trunk_other_pictures(trunk):
    net = picture_trunk(trunk)
    make = lambda c, n=None: build_encoder(trunk, n_styles=2, style_dim=4, width=4, input_size=32, image_channels=c, in_channels=n, init=net.state_dict()).eval()
    grey, rgb, alpha = torch.randn(2, 1, 32, 32), torch.randn(2, 3, 32, 32), torch.randn(2, 2, 32, 32)
    assert torch.allclose(make(1, 1).trunk(grey), net(grey.expand(-1, 3, -1, -1)), atol=1e-4)      # grey: as if painted in three equal channels
    assert torch.allclose(make(4, 4).trunk(torch.cat([rgb, alpha[:,:1]], 1)), net(rgb), atol=1e-4) # alpha: not looked at
    assert torch.allclose(make(3, 3).trunk(rgb), net(rgb), atol=1e-5)                              # single pass: the same network
    for c in (1, 4):
        e = make(c)
        x = torch.randn(2, c, 32, 32)
        assert e.trunk.first(torch.cat([x, x], 1)).abs().max() < 1e-4 and e(x, -x).shape==(2,2,4)
    mask = make(3, 7)                                                                              # and a mask beside the two
    assert mask.trunk.first.weight[:,6].abs().max()==0 and torch.equal(mask.trunk.first.weight[:,3:6], -net.first.weight)
    six = make(3)
    again = init_trunk(make(3), six.trunk.state_dict(), 'zero')                                    # a file that has all channels
    assert torch.equal(again.trunk.first.weight, six.trunk.first.weight)


def test_init_trunk_says_what_is_wrong():
    net = picture_trunk('resnet34')
    state = net.state_dict()
    enc = build_encoder('resnet34', n_styles=2, style_dim=4, width=4, input_size=32)
    before = copy.deepcopy(enc.state_dict())
    for bad,message in (
        ({k:v for k,v in state.items() if k!='body.3.bn1.weight'}, "'body.3.bn1.weight' is missing"),
        ({**state, 'body.99.x': torch.zeros(1)}, "'body.99.x' is unknown"),
        ({**state, 'body.3.bn1.weight': torch.zeros(3)}, r"'body.3.bn1.weight' is \(3,\), expected \(128,\)"),
        ({**state, 'conv1.weight': torch.zeros(64, 3, 3, 3)}, "'conv1.weight' is .64, 3, 3, 3., expected .64, 6, 7, 7."),
        (picture_trunk('irse50').state_dict(), 'are these the weights of a ResNet34 trunk'),
    ):
        with pytest.raises(ValueError, match=message): init_trunk(enc, bad)
        assert all(torch.equal(v, before[k]) for k,v in enc.state_dict().items())
    with pytest.raises(ValueError, match='expected one of difference, zero, noise'): init_trunk(enc, state, 'ones')
    with pytest.raises(ValueError, match='folded'): init_trunk(enc.fold(), state)
    with pytest.raises(ValueError, match='checkpoints.read_trunk'): build_encoder('resnet34', init='weights.pth')
    with pytest.raises(ValueError, match="not for 'irse50'"): build_encoder('irse50', init='imagenet', n_styles=1, width=4)


@torch.no_grad()
def test_imagenet_trunk(monkeypatch):
    "The blocks of torchvision's network, in their places; its classifier left out"
    from torchvision.models import resnet34, ResNet34_Weights
    torch.manual_seed(0)
    theirs = resnet34().eval()
    monkeypatch.setattr(ResNet34_Weights, 'get_state_dict', lambda self, *a, **kw: theirs.state_dict())
    enc = build_encoder('resnet34', n_styles=2, style_dim=4, width=4, input_size=32, init='imagenet', extra='zero').eval()
    assert not any(k.startswith('fc') for k in imagenet_trunk()) and (enc.trunk.relu.weight==.25).all()
    x, y = torch.randn(2, 1, 3, 64, 64)
    h = theirs.bn1(theirs.conv1(x))
    want = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(F.leaky_relu(h, .25)))))
    assert torch.allclose(enc.trunk(torch.cat([x, y], 1)), want, atol=1e-4)


def test_imagenet_trunk_without_a_network(monkeypatch, tmp_path):
    from urllib.error import URLError
    def nothing(*a, **kw): raise URLError('no route to host')
    monkeypatch.setattr('torch.hub.urlopen', nothing)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(ConnectionError, match='resnet34.*could not be fetched.*no route to host.*or give the tensors themselves'): imagenet_trunk()
    with pytest.raises(ConnectionError): build_encoder('resnet34', n_styles=2, width=4, init='imagenet')


def test_face_file_as_a_trunk():
    "An IR-SE50 recognition file also holds an output layer, which is left out"
    net = picture_trunk('irse50')
    state = {**net.state_dict(), 'output_layer.0.weight': torch.zeros(512), 'output_layer.3.weight': torch.zeros(512, 2)}
    enc = build_encoder('irse50', n_styles=2, style_dim=4, width=4, input_size=32, init=state)
    assert set(trunk_names(state))==set(net.state_dict()) and torch.equal(enc.trunk.first.weight[:,:3], net.first.weight)


@pytest.mark.parametrize('trunk,head,k,millions,gmac', [('irse50','simple',18,205.6,36.6), ('irse50','progressive',18,205.6,36.6), ('irse50','fpn',18,267.1,72.6),
    ('resnet34','simple',14,157.1,21.6), ('resnet34','simple',16,176.5,22.0), ('resnet34','fpn',16,228.6,52.0)])
def test_as_heavy_as_published(trunk, head, k, millions, gmac):
    "Parameters and multiply-adds at 256x256, as counted on the published encoders"
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device('meta'):
        enc = build_encoder(trunk, head, n_styles=k).eval()
        with FlopCounterMode(display=False) as counter: enc(torch.zeros(1, 6, 256, 256))
    assert abs(sum(p.numel() for p in enc.parameters())/1e6-millions) < .06 and abs(counter.get_total_flops()/2e9-gmac) < .06
