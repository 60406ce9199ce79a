"""Files made to harm, to lie or to disappoint. Every reader gives one error of one line that names the file; nothing runs; memory stays small."""
import io, json, os, pickle, pickletools, struct, subprocess, sys, types, zipfile
from collections import OrderedDict
from pathlib import Path
import pytest, torch
from safetensors.torch import save_file
from restyle_nb.checkpoints import publish_restyle, read_restyle, save_generator, read_generator, save_restyle
sys.path.insert(0, str(Path(__file__).parent))
from test_published import checkpoint, fill, generator_shapes

GB100 = 100 * 2**30
MAGIC, VERSION = 0x1950a86a20f9469cfc6c, 1001

def zip_claims(path, big):
    "A torch zip whose directory says that one record is larger than it is"
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('archive/data.pkl', table(4)); z.writestr('archive/data/0', b'\0' * 16); z.writestr('archive/version', '3')
        z.infolist()[1].file_size = z.infolist()[1].compress_size = big

# A torch pickle by hand, so that it can lie

class Claim:
    "A storage of `count` numbers under the key '0'"
    def __init__(self, count): self.count = count

class Shape:
    def __init__(self, store, size, stride): self.args = store, 0, size, stride, False, OrderedDict()
    def __reduce__(self): return torch._utils._rebuild_tensor_v2, self.args

def table(count, size=None, stride=None, extra=None):
    out = io.BytesIO()
    class Writer(pickle.Pickler):
        def persistent_id(self, o): return ('storage', torch.FloatStorage, '0', 'cpu', o.count) if isinstance(o, Claim) else None
    size = (count,) if size is None else size
    Writer(out, 2).dump({'input.input': Shape(Claim(count), size, (1,) * len(size) if stride is None else stride), **(extra or {})})
    return out.getvalue()

def torch_zip(path, code, raw=b'\0' * 64):
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('archive/data.pkl', code); z.writestr('archive/data/0', raw); z.writestr('archive/version', '3')

def torch_chain(path, code, count, raw=b'\0' * 64):
    parts = [pickle.dumps(o, 2) for o in (MAGIC, VERSION, dict(protocol_version=VERSION, little_endian=True, type_sizes={}))]
    path.write_bytes(b''.join(parts) + code + pickle.dumps(['0'], 2) + struct.pack('<q', count) + raw)

def safetensors(path, header, raw=b'\0' * 64, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(header) if length is None else length) + header + raw)

class Command:
    "Pickled, this is an order to make the folder `path`"
    def __init__(self, path, call=os.mkdir): self.path, self.call = str(path), call
    def __reduce__(self): return self.call, (f'__import__("os").mkdir({self.path!r})' if self.call is eval else self.path,)

def nvidia_like(path, state, source='import os'):
    "A pickle as NVIDIA's persistence writes it"
    names = 'torch_utils', 'torch_utils.persistence'
    mods = {n: types.ModuleType(n) for n in names}
    def _reconstruct_persistent_obj(meta): raise AssertionError
    _reconstruct_persistent_obj.__module__, _reconstruct_persistent_obj.__qualname__ = names[1], '_reconstruct_persistent_obj'
    mods[names[1]]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    class Module:
        def __reduce__(self): return _reconstruct_persistent_obj, (dict(type='class', version=6, module_src=source, class_name='Generator', state=state),)
    sys.modules |= mods
    try: path.write_bytes(pickle.dumps(dict(G_ema=Module(), training_set_kwargs=None), 4))
    finally: [sys.modules.pop(n) for n in names]

def theirs(tensors):
    "A generator without noise under NVIDIA's names, roughly"
    from restyle_nb.checkpoints import generator_tensor
    from restyle_nb.nvidia import nvidia_name
    out = {nvidia_name(n): t for n, t in (generator_tensor(k, v) for k, v in tensors.items() if not k.endswith(('.kernel', 'noise.weight')))}
    return out | {'synthesis.b4.const': out['synthesis.b4.const'][0]}

def laughs(): # ten names for ten names for ten names …
    o = {'x': 1}
    for i in range(5): o = {f'a{j}': o for j in range(40)}
    return {'state_dict': o}

def nested(n=200_000):
    return b'\x80\x02' + b'(' * 0 + b']' * n + b'a' * (n - 1) + b'.'

def make(folder):
    mark = folder/'it_ran'
    f = lambda name: folder/name
    widths = {4: 24, 8: 20, 16: 16, 32: 12}
    g = fill(generator_shapes(32, 24, 3, widths))
    e = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in checkpoint('resnet34', 'fpn')['state_dict'].items()}
    # commands
    f('plain.pkl').write_bytes(pickle.dumps({'g_ema': Command(mark), 'more': b'x' * 100}))
    f('eval.pkl').write_bytes(pickle.dumps({'g_ema': Command(mark, eval), 'more': b'x' * 100}))
    torch.save({'state_dict': Command(mark)}, f('zip.pt'))
    torch.save({'state_dict': g, 'opts': {'device': Command(mark, eval)}}, f('zip_opts.pt'))
    torch.save({'g_ema': Command(mark)}, f('legacy.pt'), _use_new_zipfile_serialization=False)
    nvidia_like(f('nvidia.pkl'), dict(_parameters={}, _buffers={}, _modules={}, _init_kwargs={'z_dim': Command(mark)}))
    nvidia_like(f('nvidia_source.pkl'), dict(_parameters={}, _buffers={}, _modules={}, _init_kwargs={}), f'import os; os.mkdir({str(mark)!r})')
    torch.save(read_generator(g), f('module.pt'))
    # unfinished
    save_generator(read_generator(g), f('whole.safetensors')); torch.save(g, f('whole.pt')); torch.save(g, f('old.pt'), _use_new_zipfile_serialization=False)
    for name in ('whole.safetensors', 'whole.pt', 'old.pt'):
        raw = f(name).read_bytes()
        for part in (1, 50, 99): f(f'cut{part}_{name}').write_bytes(raw[:max(65, len(raw) * part // 100)])
        f(name).unlink()
    # something else
    f('text.pt').write_text('these are not the weights you are looking for\n' * 10); f('page.pt').write_text('<!DOCTYPE html><html><title>Quota exceeded</title>' + ' ' * 100)
    f('empty.pt').write_bytes(b''); f('zeros.pt').write_bytes(b'\0' * 1000); f('folder.pt').mkdir()
    with zipfile.ZipFile(f('photos.pt'), 'w') as z: z.writestr('a/b.txt', b'hello' * 50)
    with zipfile.ZipFile(f('bomb.pt'), 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('archive/data.pkl', b'\0' * 300_000_000)
    # tensors: in a generator, and in the encoder of a checkpoint
    def spoil(name, tensors, key, prefix=''):
        t = tensors[key]
        bad = t.clone(); bad.view(-1)[3] = torch.nan
        inf = t.clone(); inf.view(-1)[-1] = -torch.inf
        for how, new in dict(shape={key: t[:, :3]}, missing={key: None}, nan={key: bad}, inf={key: inf}, extra={prefix + 'surprise.weight': torch.zeros(3)}).items():
            torch.save({k: v for k, v in {**tensors, **new}.items() if v is not None}, f(f'{name}_{how}.pt'))
            if len(prefix) and how in ('inf', 'missing'): f(f'{name}_{how}.pt').unlink()
    spoil('generator', g, 'convs.1.conv.weight')
    spoil('encoder', e, 'encoder.body.5.conv1.weight', 'encoder.')
    # sizes
    n, shape = GB100 // 4, (1, 24, 4, 4)
    zip_claims(f('claim_zip.pt'), GB100)
    torch_zip(f('claim_storage.pt'), table(n)); torch_zip(f('claim_storage_4.pt'), table(32, (1, 2, 4, 4), (32, 16, 4, 1)))
    torch_zip(f('claim_strides.pt'), table(16, (1, 5, 5, 10**9), (0, 0, 0, 0))); torch_zip(f('claim_view.pt'), table(16, (10**5, 10**5, 4, 4), (1, 1, 1, 1)))
    torch_zip(f('claim_negative.pt'), table(16, (1, -5, 4, 4), (1, 1, 1, 1))); torch_zip(f('claim_overflow.pt'), table(16, (2**40, 2**40, 4, 4), (2**62,) * 4))
    torch_zip(f('shared.pt'), table(16, extra={f'noises.noise_{i}': Shape(Claim(16), (4, 4), (4, 1)) for i in range(1000)}))
    torch_chain(f('claim_legacy.pt'), table(n), n); torch_chain(f('claim_legacy_count.pt'), table(16), n); torch_chain(f('claim_legacy_strides.pt'), table(16, (1, 5, 5, 10**9), (0, 0, 0, 0)), 16)
    safetensors(f('claim_header.safetensors'), b'{' + b' ' * 100, length=GB100)
    safetensors(f('claim_shape.safetensors'), {'a': dict(dtype='F32', shape=[n], data_offsets=[0, GB100])}); safetensors(f('claim_shape2.safetensors'), {'a': dict(dtype='F32', shape=[n], data_offsets=[0, 64])})
    safetensors(f('claim_product.safetensors'), {'a': dict(dtype='F32', shape=[2**40, 2**40], data_offsets=[0, 64])}); safetensors(f('claim_negative.safetensors'), {'a': dict(dtype='F32', shape=[-4, -4], data_offsets=[0, 64])})
    safetensors(f('huge_header.safetensors'), b'{' + b'"a":1,' * 6_000_000 + b'"b":1}'); safetensors(f('deep_header.safetensors'), b'{"a":' + b'[' * 500_000 + b']' * 500_000 + b'}')
    safetensors(f('own_claim.safetensors'), {'__metadata__': {'restyle_nb': json.dumps(dict(format=1, kind='generator', config=dict(size=1024, style_dim=60000, n_mlp=1000)))}, 'a': dict(dtype='F32', shape=[16], data_offsets=[0, 64])})
    safetensors(f('list_header.safetensors'), b'{"a": [1, 2, 3], "b": "c"}' + b' ' * 100)
    # networks that would be larger than their files: a constant of 256² doubled eight times, its noise planes left to the reader
    wide = {k: v for k, v in fill(generator_shapes(1024, 4, 1, {4 << j: 1 for j in range(9)})).items() if 'noises' not in k} | {'input.input': torch.zeros(1, 1, 256, 256)}
    torch.save(wide, f('wide.pt')); torch.save({k: v for k, v in theirs(wide).items()}, f('wide_nvidia.pt'))
    # pickles that exhaust
    f('bytes.pkl').write_bytes(b'\x80\x04\x8e' + struct.pack('<Q', GB100) + b'x' * 100); torch_zip(f('bytes.pt'), b'\x80\x04\x8e' + struct.pack('<Q', GB100) + b'x' * 100)
    torch_zip(f('memo.pt'), b'\x80\x02}r\xff\xff\xff\xff.'); torch_zip(f('nested.pt'), nested()); torch_zip(f('list.pt'), pickle.dumps([1] * 1000, 2))
    torch_zip(f('laughs.pt'), pickle.dumps(laughs(), 2)); torch_zip(f('key.pt'), b'\x80\x02})' + b'\x85' * 200_000 + b'K\x01s.'); torch_zip(f('underflow.pt'), b'\x80\x02R.'); torch_zip(f('no_stop.pt'), b'\x80\x02}')
    return mark

RUN = '''
import json, os, resource, sys, time
from pathlib import Path
from restyle_nb.checkpoints import CheckpointError, read_encoder, read_generator, read_restyle
from restyle_nb.zoo import load_model
from restyle_nb.encoders import build_encoder
import torch
with torch.device('meta'): build_encoder('irse50')
def status(key): return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith(key)) if sys.platform.startswith('linux') else 0
if status('VmSize'): resource.setrlimit(resource.RLIMIT_AS, (status('VmSize') + 3 * 2**30, resource.RLIM_INFINITY))
for path in sorted(Path(sys.argv[1]).iterdir()):
    for read in (read_generator, read_encoder, read_restyle, load_model):
        if status('VmSize'): open('/proc/self/clear_refs', 'w').write('5')
        before, start = status('VmRSS'), time.perf_counter()
        try: kind, text = 'accepted', type(read(path)).__name__
        except CheckpointError as e: kind, text = 'CheckpointError', str(e)
        except BaseException as e: kind, text = type(e).__name__, str(e)
        print(json.dumps(dict(file=path.name, read=read.__name__, kind=kind, text=text, memory=status('VmHWM') - before, seconds=time.perf_counter() - start)), flush=True)
'''

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hostile')
    mark, sizes = make(folder), {}
    try:
        out = subprocess.run([sys.executable, '-c', RUN, str(folder)], capture_output=True, text=True, timeout=500)
        assert out.returncode == 0, (out.returncode, out.stdout[-500:], out.stderr[-2000:])
        return [json.loads(l) for l in out.stdout.splitlines()], {p.name: p.stat().st_size for p in folder.iterdir()}, mark.exists()
    finally:
        for p in folder.iterdir(): p.is_file() and p.unlink()

def healthy(r): # a half of a file may be whole
    return (r['file'].startswith('encoder_') or r['file'] == 'zip_opts.pt') and r['read'] == 'read_generator' and r['kind'] == 'accepted' and r['file'] != 'zip_opts.pt'

def test_nothing_runs(results): assert not results[2]

def test_one_error_each(results):
    "CheckpointError, one line, of readable length, naming the file"
    found, sizes, _ = results
    assert len(found) == 4 * len(sizes) > 200
    bad = [r for r in found if not healthy(r) and (r['kind'] != 'CheckpointError' or '\n' in r['text'] or len(r['text']) > 800 or r['file'] not in r['text'])]
    assert not bad, '\n'.join(str(r)[:600] for r in bad)

def test_memory_is_bounded(results):
    found, sizes, _ = results
    bad = [r for r in found if r['memory'] > 64 * 2**20 + 1.3 * sizes[r['file']] * (2 if 'encoder' in r['file'] else 1)]
    assert not bad, '\n'.join(str(r)[:300] for r in bad)

def test_time_is_bounded(results):
    assert not [r for r in results[0] if r['seconds'] > 60]

@pytest.mark.parametrize('file,words', [
    ('plain.pkl', ['mkdir', 'refused']), ('eval.pkl', ['eval', 'refused']), ('zip.pt', ['mkdir', 'refused']), ('zip_opts.pt', ['eval', 'refused']), ('legacy.pt', ['mkdir', 'refused']),
    ('nvidia.pkl', ['mkdir', 'refused']), ('module.pt', ['restyle_nb.generator.Generator', 'state_dict']), ('text.pt', ['neither']), ('page.pt', ['web page']), ('empty.pt', ['0 bytes']),
    ('folder.pt', ['folder']), ('photos.pt', ['none that PyTorch wrote']), ('bomb.pt', ['unpack']), ('generator_shape.pt', ['convs.1.conv.weight', 'expected', 'found']),
    ('generator_missing.pt', ['convs.1.conv.weight']), ('generator_nan.pt', ['convs.1.conv.weight', 'NaN']), ('generator_inf.pt', ['convs.1.conv.weight', 'infinity']),
    ('generator_extra.pt', ['surprise.weight', 'unknown']), ('claim_zip.pt', ['unpack']), ('claim_storage.pt', ['promises']), ('claim_strides.pt', ['input.input', 'not a plain tensor']),
    ('claim_legacy.pt', ['promises']), ('claim_header.safetensors', ['claims']), ('cut50_whole.pt', ['fetch']), ('cut50_old.pt', ['fetch']), ('cut50_whole.safetensors', ['fetch']),
    ('wide.pt', ['65536 pixels']), ('wide_nvidia.pt', ['65536 pixels'])])
def test_the_reason_is_given(results, file, words):
    text = next(r['text'] for r in results[0] if (r['file'], r['read']) == (file, 'read_generator'))
    assert all(w in text for w in words), text

@pytest.mark.parametrize('how,words', [('shape', ['body.5.conv1.weight', 'expected', 'found']), ('nan', ['body.5.conv1.weight', 'NaN']), ('extra', ['surprise.weight'])])
def test_the_reason_is_given_for_encoders(results, how, words):
    for read in ('read_encoder', 'read_restyle', 'load_model'):
        text = next(r['text'] for r in results[0] if (r['file'], r['read']) == (f'encoder_{how}.pt', read))
        assert all(w in text for w in words), text


# What is honest must come through: the same numbers as PyTorch's own reader

def honest():
    import numpy as np
    from argparse import Namespace
    t = torch.arange(24.).reshape(2, 3, 4)
    odd = nn_parameter = torch.nn.Parameter(torch.randn(3, 2))
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
    return dict(plain=t, part=t[1, 1:], turned=t.permute(2, 0, 1), strided=t[..., ::2], scalar=torch.tensor(3.), none=torch.zeros(0, 4), parameter=nn_parameter, state=state,
                half=t.half(), brain=t.bfloat16(), double=t.double(), whole=t.long(), small=t.to(torch.int8), yes=t > 5, byte=t.to(torch.uint8), short=t.short(), int=t.int(),
                nested=dict(a=dict(b=dict(c=torch.ones(2)))), array=np.arange(6, dtype=np.float32).reshape(2, 3),
                opts=Namespace(device=torch.device('cuda:0'), n=3, x=1.5, big=2**40, list=[1, 'a', None, True], tuple=(1, 2), path=Path('a') / 'b', set={1, 2}, size=torch.Size([1, 2]),
                               best=np.float64(.25), count=np.int64(3), dtype=torch.float16, sub=Namespace(a=1)), epoch=7)

@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('zipped', [True, False])
def test_honest_files(tmp_path, protocol, zipped):
    from restyle_nb.checkpoints import open_weights
    path = tmp_path/'honest.pt'
    torch.save(honest(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    want, got = torch.load(path, weights_only=False), open_weights(path)
    flat = {k: v for k, v in want.items() if isinstance(v, torch.Tensor)} | {f'state.{k}': v for k, v in want['state'].items()} | {
        'nested.a.b.c': want['nested']['a']['b']['c'], 'array': torch.from_numpy(want['array'])}
    assert got.tensors.keys() == flat.keys()
    for k, v in flat.items(): assert got.tensors[k].dtype == v.dtype and got.tensors[k].shape == v.shape and torch.equal(got.tensors[k], v.detach()), k
    o = got.opts
    assert (o['n'], o['x'], o['big'], o['list'], o['best'], o['count'], o['sub']) == (3, 1.5, 2**40, [1, 'a', None, True], .25, 3, {'a': 1})
    assert tuple(o['size']) == (1, 2) and 'cuda' in str(o['device'])

def test_broken_at_random(tmp_path):
    "A thousand files with a few bytes changed: an error of one line, or weights; nothing else"
    import random
    from restyle_nb.checkpoints import CheckpointError, open_weights
    rng, kept = random.Random(0), 0
    small = dict(a=torch.arange(4.), opts=honest()['opts'], state=honest()['state'])
    torch.save(small, tmp_path/'zip.pt'); torch.save(small, tmp_path/'old.pt', _use_new_zipfile_serialization=False); save_file({'a': torch.arange(4.), 'b': torch.ones(2, 2)}, tmp_path/'s.safetensors')
    for name in ('zip.pt', 'old.pt', 's.safetensors'):
        raw = (tmp_path/name).read_bytes()
        for i in range(340):
            bad = bytearray(raw)
            for _ in range(rng.randint(1, 4)): bad[rng.randrange(len(bad)) if name != 'zip.pt' or i % 2 else rng.randrange(1400)] = rng.choice((0, 1, 0x7f, 0xff, rng.randrange(256)))
            path = tmp_path/f'bad_{name}'; path.write_bytes(bad)
            try: kept += len(open_weights(path).tensors) > 0
            except CheckpointError as e: assert '\n' not in str(e) and path.name in str(e) and len(str(e)) < 800
    assert 20 < kept < 1000
