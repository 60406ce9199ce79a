"""Network pickles: every number of an honest one comes through, and nothing of a dishonest one runs."""
import importlib.util, io, os, pickle, pickletools, random, struct, sys, types, warnings
from collections import OrderedDict
from pathlib import Path, PurePosixPath
import numpy as np, pytest, torch
from torch import nn
from restyle_nb.checkpoints import assemble, publish_generator, read_generator
from restyle_nb.generator import Generator
from restyle_nb.nvidia import *
from restyle_nb import nvidia

GOLDEN = Path(__file__).parent/'golden'

def golden(name):
    spec = importlib.util.spec_from_file_location('golden_fill', GOLDEN/'fill.py')
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    return [{k: torch.from_numpy(np.asarray(v)) for k, v in part.items()} for part in fill.case(name)]

def build(src, kwargs={}):
    config, tensors = nvidia_state(src, kwargs)
    avg = tensors.pop('latent_avg', torch.zeros(config['style_dim']))
    tensors['latent_avg'] = avg.expand(2*len(config['channels']), -1).clone()
    return assemble(lambda: Generator(**config), tensors, 'it', nvidia_name)

def small(size=32, z_dim=12, w_dim=16, n_mlp=2, channels=3, width=None, **kw):
    torch.manual_seed(0)
    g = Generator(size=size, style_dim=w_dim, z_dim=z_dim, n_mlp=n_mlp, image_channels=channels,
                  channels=width or {4 << j: 12 - 2*min(j, 4) for j in range(9)}, **kw).requires_grad_(False)
    for k, t in g.named_parameters():
        if k.endswith(('noise_strength', 'bias')): t.add_(.2*torch.randn(t.shape))
    g.estimate_latent_avg(500)
    return g.eval()

def refused(path, *words, read=read_pickle):
    with pytest.raises(CheckpointError) as e: read(path)
    text = str(e.value)
    assert '\n' not in text and len(text) < 600 and Path(str(path)).name in text
    for w in words: assert w in text, (w, text)
    return text


# A writer of such files, made the way theirs works: classes whose pickles hold their own source text

@pytest.fixture
def writer(monkeypatch):
    "`torch_utils.persistence` and `dnnlib.util`, as far as a pickle is concerned"
    persistence, util = types.ModuleType('torch_utils.persistence'), types.ModuleType('dnnlib.util')
    def _reconstruct_persistent_obj(meta): raise AssertionError('the reader called the code of the file')
    class EasyDict(dict):
        def __getattr__(self, name):
            try: return self[name]
            except KeyError: raise AttributeError(name)
        def __setattr__(self, name, value): self[name] = value
    for module, o in ((persistence, _reconstruct_persistent_obj), (util, EasyDict)):
        o.__module__, o.__qualname__ = module.__name__, o.__name__
        setattr(module, o.__name__, o)
        package = module.__name__.split('.')[0]
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return types.SimpleNamespace(rebuild=_reconstruct_persistent_obj, EasyDict=EasyDict, source='raise SystemExit("source was run")')

def classes(writer):
    "Modules with NVIDIA's class names, attributes and tensor names; they are only ever stored."
    def persistent(cls):
        class Stored(cls):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self._init_args, self._init_kwargs = args, kwargs
            def __reduce__(self):
                fields = list(super().__reduce__())
                return writer.rebuild, (dict(type='class', version=6, module_src=writer.source, class_name=cls.__name__, state=fields[2]),), None
        Stored.__name__ = cls.__name__
        return Stored

    filter = lambda: torch.outer(*[torch.tensor([1., 3., 3., 1.])/8]*2)

    @persistent
    class FullyConnectedLayer(nn.Module):
        def __init__(self, n_in, n_out, activation='linear', lr_multiplier=1, bias_init=0):
            super().__init__()
            self.activation, self.weight_gain, self.bias_gain = activation, lr_multiplier/np.sqrt(n_in), lr_multiplier
            self.weight = nn.Parameter(torch.randn([n_out, n_in])/lr_multiplier)
            self.bias = nn.Parameter(torch.full([n_out], np.float32(bias_init)))

    @persistent
    class MappingNetwork(nn.Module):
        def __init__(self, z_dim, c_dim, w_dim, num_ws, num_layers=8, activation='lrelu', lr_multiplier=.01, w_avg_beta=.995):
            super().__init__()
            self.num_layers, self.w_avg_beta = num_layers, w_avg_beta
            if c_dim: self.embed = FullyConnectedLayer(c_dim, w_dim)
            for i in range(num_layers):
                setattr(self, f'fc{i}', FullyConnectedLayer(w_dim if i else z_dim + (w_dim if c_dim else 0), w_dim, activation=activation, lr_multiplier=lr_multiplier))
            if w_avg_beta is not None: self.register_buffer('w_avg', torch.zeros([w_dim]))

    @persistent
    class SynthesisLayer(nn.Module):
        def __init__(self, n_in, n_out, w_dim, resolution, up=1, use_noise=True, activation='lrelu', channels_last=False, conv_clamp=None):
            super().__init__()
            self.up, self.use_noise, self.activation, self.conv_clamp, self.act_gain = up, use_noise, activation, conv_clamp, np.sqrt(2)
            self.register_buffer('resample_filter', filter())
            self.affine = FullyConnectedLayer(w_dim, n_in, bias_init=1)
            self.weight = nn.Parameter(torch.randn([n_out, n_in, 3, 3]).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format))
            if use_noise:
                self.register_buffer('noise_const', torch.randn([resolution]*2))
                self.noise_strength = nn.Parameter(torch.zeros([]))
            self.bias = nn.Parameter(torch.zeros([n_out]))

    @persistent
    class ToRGBLayer(nn.Module):
        def __init__(self, n_in, n_out, w_dim):
            super().__init__()
            self.conv_clamp, self.weight_gain = None, 1/np.sqrt(n_in)
            self.affine = FullyConnectedLayer(w_dim, n_in, bias_init=1)
            self.weight, self.bias = nn.Parameter(torch.randn([n_out, n_in, 1, 1])), nn.Parameter(torch.zeros([n_out]))

    @persistent
    class Conv2dLayer(nn.Module):
        def __init__(self, n_in, n_out, kernel_size, trainable=True):
            super().__init__()
            self.weight_gain = 1/np.sqrt(n_in*kernel_size**2)
            self.register_buffer('resample_filter', filter())
            weight = torch.randn([n_out, n_in, kernel_size, kernel_size])
            if trainable: self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros([n_out]))
            else:
                self.register_buffer('weight', weight)
                self.bias = None

    @persistent
    class SynthesisBlock(nn.Module):
        def __init__(self, n_in, n_out, w_dim, resolution, img_channels, is_last, architecture='skip', use_fp16=False, **kw):
            super().__init__()
            self.architecture, self.use_fp16, self.is_last = architecture, use_fp16, is_last
            self.register_buffer('resample_filter', filter())
            if n_in: self.conv0 = SynthesisLayer(n_in, n_out, w_dim, resolution, up=2, channels_last=use_fp16, **kw)
            else: self.const = nn.Parameter(torch.randn([n_out, resolution, resolution]))
            self.conv1 = SynthesisLayer(n_out, n_out, w_dim, resolution, channels_last=use_fp16, **kw)
            if is_last or architecture == 'skip': self.torgb = ToRGBLayer(n_out, img_channels, w_dim)
            if n_in and architecture == 'resnet': self.skip = Conv2dLayer(n_in, n_out, 1)

    @persistent
    class SynthesisNetwork(nn.Module):
        def __init__(self, w_dim, img_resolution, img_channels, widths, num_fp16_res=0, **kw):
            super().__init__()
            self.img_resolution_log2, self.block_resolutions = int(np.log2(img_resolution)), [4 << j for j in range(len(widths))]
            for j, r in enumerate(self.block_resolutions):
                setattr(self, f'b{r}', SynthesisBlock(widths[j-1] if j else 0, widths[j], w_dim=w_dim, resolution=r, img_channels=img_channels,
                        is_last=r == img_resolution, use_fp16=j >= len(widths) - num_fp16_res, **kw))

    @persistent
    class Generator(nn.Module):
        def __init__(self, z_dim, c_dim, w_dim, img_resolution, img_channels, mapping_kwargs={}, synthesis_kwargs={}):
            super().__init__()
            self.z_dim, self.c_dim, self.w_dim, self.img_resolution = z_dim, c_dim, w_dim, img_resolution
            self.synthesis = SynthesisNetwork(w_dim=w_dim, img_resolution=img_resolution, img_channels=img_channels, **synthesis_kwargs)
            self.mapping = MappingNetwork(z_dim=z_dim, c_dim=c_dim, w_dim=w_dim, num_ws=8, **mapping_kwargs)

    @persistent
    class Discriminator(nn.Module):
        def __init__(self, c_dim, img_resolution, block_kwargs={}, epilogue_kwargs={}):
            super().__init__()
            for r in (8, 16): setattr(self, f'b{r}', Conv2dLayer(4, 4, 3, trainable=r > 8))
            self.mapping = MappingNetwork(z_dim=0, c_dim=4, w_dim=4, num_ws=None, w_avg_beta=None, num_layers=2)
            self.register_buffer('counted', torch.tensor(7), persistent=False)

    @persistent
    class AugmentPipe(nn.Module):
        def __init__(self, xflip=0, imgfilter_bands=[1, 1, 1, 1], imgfilter_std=1):
            super().__init__()
            self.imgfilter_bands, self.xint_max, self.flag, self.table = list(imgfilter_bands), np.float64(.125), np.bool_(True), np.arange(6).reshape(2, 3)
            self.register_buffer('p', torch.ones([]))
            self.register_buffer('Hz_fbank', torch.as_tensor(np.random.randn(4, 10), dtype=torch.float32))

    return types.SimpleNamespace(**{o.__name__: o for o in (Generator, Discriminator, AugmentPipe)})

def stored(writer, g, c_dim=0, fp16=0, mapping={}, **synthesis):
    "Our generator `g` as a module of theirs"
    kw, c = writer.EasyDict, g.config
    net = classes(writer).Generator(z_dim=c['z_dim'], c_dim=c_dim, w_dim=c['style_dim'], img_resolution=c['size'], img_channels=c['image_channels'],
        mapping_kwargs=kw(num_layers=c['n_mlp'], **mapping), synthesis_kwargs=kw(widths=list(c['channels'].values()), num_fp16_res=fp16, **synthesis))
    if not (c_dim or synthesis): net.load_state_dict(publish_nvidia(g))
    return net.eval().requires_grad_(False)

def snapshot(writer, g, **kw):
    c = classes(writer)
    D = c.Discriminator(c_dim=0, img_resolution=32, block_kwargs=writer.EasyDict(freeze_layers=0), epilogue_kwargs=writer.EasyDict(mbstd_group_size=None))
    data = dict(class_name='training.dataset.ImageFolderDataset', path='x.zip', use_labels=False, max_size=np.int64(70), xflip=np.float32(.5), shape=torch.Size([3, 32]),
                where=PurePosixPath('a/b'), device=torch.device('cpu'), dtype=torch.float32, some={1, 2}, more=frozenset('a'), raw=b'123', name=np.str_('n'))
    return dict(training_set_kwargs=data, G=stored(writer, small()), D=D, G_ema=stored(writer, g, **kw), augment_pipe=c.AugmentPipe(xflip=1, imgfilter_std=1.5))


# Honest files

@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_every_number_comes_through(writer, tmp_path, protocol):
    g = small()
    path = tmp_path/'network-snapshot-000001.pkl'
    path.write_bytes(pickle.dumps(data := snapshot(writer, g, fp16=2), protocol=protocol))
    nets = read_pickle(path)
    assert list(nets) == ['G', 'D', 'G_ema', 'augment_pipe']
    assert [n.class_name for n in nets.values()] == ['Generator', 'Discriminator', 'Generator', 'AugmentPipe']
    for k, net in nets.items():
        want = dict(data[k].named_parameters()) | dict(data[k].named_buffers())
        assert net.tensors.keys() == want.keys()
        for name, t in want.items(): assert torch.equal(net.tensors[name], t) and net.tensors[name].dtype == t.dtype and net.tensors[name].is_contiguous()
    assert nets['G_ema'].kwargs == dict(z_dim=12, c_dim=0, w_dim=16, img_resolution=32, img_channels=3,
        mapping_kwargs=dict(num_layers=2, activation='lrelu', lr_multiplier=.01),
        synthesis_kwargs=dict(widths=[12, 10, 8, 6], num_fp16_res=2, architecture='skip', activation='lrelu'))
    again = build(read_nvidia(path))
    assert again.config == g.config | dict(channel_multiplier=2)
    for k, t in g.state_dict().items(): assert torch.equal(again.state_dict()[k], t)

def test_read_generator_reads_them(writer, tmp_path):
    "The same through the door that everybody uses: a pickle, a mapping, a mapping below a prefix, a mapping in a mapping"
    g = small(channels=1)
    (path := tmp_path/'g.pkl').write_bytes(pickle.dumps(snapshot(writer, g, fp16=1)))
    names = publish_nvidia(g)
    for src in (path, str(path), names, {f'G_ema.{k}': v for k, v in names.items()}, dict(G_ema=names)):
        got = read_generator(src)
        for k, t in g.state_dict().items(): assert torch.equal(got.state_dict()[k], t)
    (path := tmp_path/'g.pkl').write_bytes(pickle.dumps(dict(G_ema=stored(writer, small(), c_dim=3))))
    refused(path, 'class-conditional', read=read_generator)

def test_the_usual_ways_to_dump(writer, tmp_path):
    "EasyDict or nothing for the data set; one network alone; only G_ema; two names for one object"
    g = small()
    net, path = stored(writer, g), tmp_path/'g.pkl'
    for top in (dict(G_ema=net, training_set_kwargs=None, augment_pipe=None), net, dict(G=net), dict(G=net, D=net, G_ema=net, training_set_kwargs=writer.EasyDict(a=1))):
        with path.open('wb') as f: pickle.dump(top, f)
        assert torch.equal(build(read_nvidia(path)).synthesize(g.latent_avg[None]), g.synthesize(g.latent_avg[None]))

def test_arguments_given_by_position(writer, tmp_path):
    net = stored(writer, small())
    net._init_args, net._init_kwargs = tuple(net._init_kwargs.values()), {}
    (path := tmp_path/'g.pkl').write_bytes(pickle.dumps(net))
    assert read_nvidia(path).kwargs['img_resolution'] == 32

def test_other_learning_rate_of_the_mapping(writer, tmp_path):
    "The number that scales every mapping layer is in no tensor: it must come from the arguments, or from the layers"
    g = small(mapping_lr=.1)
    torch.manual_seed(1)
    net = stored(writer, g, mapping=dict(lr_multiplier=.1))
    for i in range(2): net.get_submodule(f'mapping.fc{i}').load_state_dict(g.mapping[i].state_dict())
    z = torch.randn(3, 12)
    for forget in (False, True):
        if forget: del net._init_kwargs['mapping_kwargs']['lr_multiplier']
        (path := tmp_path/'g.pkl').write_bytes(pickle.dumps(net))
        assert torch.equal(build(read_nvidia(path)).map(z), g.map(z))

def test_a_network_without_noise(writer, tmp_path):
    (path := tmp_path/'g.pkl').write_bytes(pickle.dumps(stored(writer, small(), use_noise=False)))
    g = build(read_nvidia(path))
    assert all(c.noise_strength == 0 for c in g.convs) and not any(o.any() for o in g.noises())

def test_parameters_with_attributes_and_plain_modules(tmp_path):
    "What newer PyTorch writes: parameters with a state, tensors with attributes, modules of PyTorch itself"
    m = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm2d(4))
    m[0].weight.note = 'kept by PyTorch'
    m.register_buffer('b', torch.arange(3.))
    m.b.note = 1
    for protocol in (2, 5):
        (path := tmp_path/'m.pkl').write_bytes(pickle.dumps(dict(m=m), protocol=protocol))
        found = read_pickle(path)['m'].tensors
        for k, t in m.state_dict().items(): assert torch.equal(found[k], t)

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
def test_types_and_views(tmp_path, dtype):
    base = (torch.randn(6, 5, generator=torch.Generator().manual_seed(0))*9).to(dtype)
    m = nn.Module()
    for k, t in dict(a=base, part=base[1:4, 2:], turned=base.T, one=base[2, 3], none=base[:0], step=base[::2, ::3], many=base[:1].expand(3, 5)).items(): m.register_buffer(k, t)
    (path := tmp_path/'m.pkl').write_bytes(pickle.dumps(dict(x=m)))
    found = read_pickle(path)['x'].tensors
    for k, t in m.state_dict().items(): assert torch.equal(found[k], t) and found[k].dtype == dtype


# The machine itself, against Python's

def test_same_values_as_pickle():
    rng = random.Random(0)
    def value(depth=0):
        kind = rng.randrange(14 if depth < 4 else 8)
        if kind == 0: return rng.choice([None, True, False])
        if kind == 1: return rng.choice([0, -1, 255, 256, -2**31, 2**31, 65536, 2**70, -2**900])
        if kind in (2, 3): return rng.choice(['', 'a', 'ä€😀', 'x'*300])
        if kind in (4, 5): return rng.random()
        if kind in (6, 7): return rng.choice([b'', b'abc', bytes(range(256))*3])
        if kind in (8, 9): return [value(depth+1) for _ in range(rng.randrange(5))]
        if kind in (10, 11): return tuple(value(depth+1) for _ in range(rng.randrange(5)))
        if kind == 12: return {rng.choice(['a', 'b', 1, None]): value(depth+1) for _ in range(rng.randrange(4))}
        return rng.choice([set, frozenset])(rng.sample(range(50), 3))
    for i in range(400):
        v = value()
        for protocol in (2, 3, 4, 5):
            got = Machine(pickle.dumps([v, v], protocol=protocol), 'it', nvidia.MAKERS, nvidia.WORDS).load()
            assert got == [v, v], (protocol, v)
    loop = []
    loop.append(loop)
    got = Machine(pickle.dumps(loop), 'it', {}, 'none').load()
    assert got[0] is got

def test_every_instruction_of_protocol_2_to_5_is_known_or_refused():
    "The instructions left out are the texts of protocol 0 and 1, registered extensions and buffers outside the file"
    known = {*nvidia.PUSH, *nvidia.DO, pickle.STOP}
    out = {o.name for o in pickletools.opcodes if o.code.encode('latin1') not in known}
    assert out == {'INT', 'LONG', 'STRING', 'BINSTRING', 'SHORT_BINSTRING', 'UNICODE', 'FLOAT', 'GET', 'PUT', 'EXT1', 'EXT2', 'EXT4', 'OBJ', 'INST',
                   'PERSID', 'NEXT_BUFFER', 'READONLY_BUFFER'}


# Hostile files

class Runs:
    "Pickled, this calls a function when it is read"
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

@pytest.mark.parametrize('f, args, name', [
    (os.system, ('touch {}',), 'posix.system'), (exec, ('open({!r}, "w")',), 'builtins.exec'), (eval, ('open({!r}, "w")',), 'builtins.eval'), (getattr, ('{}', 'x'), 'builtins.getattr'),
    (__import__, ('os',), 'builtins.__import__'), (open, ('{}', 'w'), 'open'), (torch.load, ('{}',), 'torch.serialization.load'), (torch.jit.load, ('{}',), 'torch.jit'),
    (np.load, ('{}',), 'numpy'), (pickle.loads, (b'',), 'pickle.loads'), (torch.hub.load, ('{}',), 'torch.hub'), (os.remove, ('{}',), 'remove'), (print, ('x',), 'builtins.print')])
@pytest.mark.parametrize('protocol', [2, 4])
def test_nothing_runs(tmp_path, capfd, f, args, name, protocol):
    mark, path = tmp_path/'ran', tmp_path/'bad.pkl'
    args = tuple(a.format(str(mark)) if isinstance(a, str) else a for a in args)
    path.write_bytes(pickle.dumps(dict(G_ema=Runs(f, *args)), protocol=protocol))
    refused(path, name if protocol > 2 else name.rpartition('.')[2], 'nothing was run')
    assert not mark.exists() and capfd.readouterr().out == '' and path.exists()

def test_source_text_is_never_run(writer, tmp_path, capfd):
    "The text of the class is there in every honest file; here it is dishonest"
    writer.source = f'import os; os.system("touch {tmp_path}/ran; echo ran")'
    (path := tmp_path/'g.pkl').write_bytes(pickle.dumps(snapshot(writer, small())))
    assert b'os.system' in path.read_bytes()
    read_pickle(path)
    assert not (tmp_path/'ran').exists() and capfd.readouterr().out == ''

def test_code_inside_a_storage(tmp_path):
    "The bytes of a storage are a pickle again"
    evil = pickle.dumps(nvidia.MAGIC, 2) + pickle.dumps(nvidia.VERSION, 2) + pickle.dumps(dict(little_endian=True), 2) + pickle.dumps(Runs(os.system, f'touch {tmp_path}/ran'), 2)
    for blob in (evil, evil + bytes(100), pickle.dumps(Runs(os.system, f'touch {tmp_path}/ran'), 2)):
        class Blob:
            def __reduce__(self): return torch.storage._load_from_bytes, (blob,)
        (path := tmp_path/'bad.pkl').write_bytes(pickle.dumps(dict(G=Blob())))
        refused(path, 'system')
    assert not (tmp_path/'ran').exists()

def test_names_that_look_allowed(tmp_path):
    "Dotted names, look-alikes and attributes of what is allowed"
    for module, name in [('collections', 'OrderedDict.__init__'), ('builtins', 'set.__init__'), ('torch_utils.persistence', '_src_to_module'), ('torch.nn.modules.module', 'Module.apply'),
                         ('torch._utils', '_rebuild_tensor_v2.__globals__'), ('numpy', 'dtype.__reduce__'), ('builtins', 'bytes.fromhex'), ('torch', 'FloatStorage'),
                         ('torch', 'classes'), ('torch.nn.modules.module.torch.os', 'system'), ('torch', 'float32\n'), ('torch', 'ops'), ('numpy', 'fromfile'), ('x', 'torch.device')]:
        data = b'\x80\x04' + b''.join(b'\x8c' + bytes([len(s)]) + s.encode() for s in (module, name)) + b'\x93)R.' + bytes(40)
        (path := tmp_path/'bad.pkl').write_bytes(data)
        refused(path)

def claim(op, fmt, n): return b'\x80\x04' + op + struct.pack(fmt, n) + b'x'*100 + b'.'

@pytest.mark.parametrize('data', [
    claim(pickle.BINBYTES8, '<Q', 100*2**30), claim(pickle.BINBYTES8, '<Q', 2**64 - 1), claim(pickle.BYTEARRAY8, '<Q', 100*2**30), claim(pickle.BINUNICODE8, '<Q', 100*2**30),
    claim(pickle.BINBYTES, '<I', 2**32 - 1), claim(pickle.BINUNICODE, '<I', 2**31), claim(pickle.FRAME, '<Q', 100*2**30), claim(pickle.LONG4, '<i', 2**31 - 1), claim(pickle.LONG4, '<i', -5),
    b'\x80\x04K\x01' + pickle.LONG_BINPUT + b'\xff\xff\xff\xff' + b'.' + bytes(40), b'\x80\x04' + b'('*100 + b't'*200 + b'.', b'\x80\x04' + b']'*60 + b'.' + bytes(9),
    b'\x80\x04.' + bytes(60), b'\x80\x04' + b'0'*70, b'\x80\x04a' + bytes(70), b'\x80\x09N.' + bytes(70), b'\x80\x04h\x07.' + bytes(70), b'\x80\x04cposix\nsystem\n.' + bytes(50),
    b'\x80\x04c' + b'a'*5000, b'\x80\x04\x97.' + bytes(60), b'\x80\x02}]Ns.' + bytes(60), b'\x80\x02]}R.' + bytes(60), b'\x80\x04(K\x01d.' + bytes(60), b'\x80\x04N}b.' + bytes(60),
    b'\x80\x04(NNoN.' + bytes(60), b'\x80\x04' + bytes(100), b'\x80\x04\x8c\x02\xff\xfe.' + bytes(60), b'\x80'])
def test_claims_and_nonsense(tmp_path, data):
    import tracemalloc
    (path := tmp_path/'bad.pkl').write_bytes(data)
    tracemalloc.start()
    refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20

def evil_tensor(*args, numbers=4):
    class Evil:
        def __reduce__(self): return torch._utils._rebuild_tensor_v2, args and (torch.zeros(numbers).storage(), *args, False, OrderedDict())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        m = nn.Module()
        m._buffers['t'] = Evil()
        return pickle.dumps(dict(G=m))

@pytest.mark.parametrize('args', [(0, (5,), (1,)), (1, (4,), (1,)), (-1, (2,), (1,)), (0, (-2,), (1,)), (0, (2, 2), (2, 2)), (0, (10**6, 10**6), (0, 0)), (0, (2,), (-1,)),
                                  (0, (2**62, 4), (1, 1)), (0, (2,), (1, 1)), (0, (1.5,), (1,)), (0, ('a',), (1,)), (0, (1,)*20, (1,)*20), (10**30, (1,), (1,)), ()])
def test_tensors_stay_inside_their_storage(tmp_path, args):
    (path := tmp_path/'bad.pkl').write_bytes(evil_tensor(*args))
    refused(path)

def test_a_storage_that_claims_more(tmp_path):
    def blob(claimed, counted, n=4):
        b = io.BytesIO()
        torch.save(torch.storage.TypedStorage(wrap_storage=torch.zeros(n).untyped_storage(), dtype=torch.float32), b, _use_new_zipfile_serialization=False)
        raw = b.getvalue()
        at = raw.index(b'K\x04Ntq')
        head = raw[:at] + b'\x8a\x08' + struct.pack('<q', claimed) + raw[at+2:-8-4*n]
        return head + struct.pack('<q', counted) + raw[-4*n:]
    for claimed, counted in ((100*2**30, 100*2**30), (4, 100*2**30), (100*2**30, 4), (-4, -4), (5, 5)):
        class Evil:
            def __reduce__(self): return torch.storage._load_from_bytes, (blob(claimed, counted),)
        (path := tmp_path/'bad.pkl').write_bytes(pickle.dumps(dict(G=Evil())))
        refused(path)
    class Good:
        def __reduce__(self): return torch.storage._load_from_bytes, (blob(4, 4),)
    assert Machine(pickle.dumps(Good()), 'it', nvidia.MAKERS, nvidia.WORDS).load().raw.nbytes == 16

def test_bombs(tmp_path):
    "Small files that unfold: sets of sets, tuples as names, trees that share branches, modules inside themselves, one storage under many names"
    path = tmp_path/'bomb.pkl'
    doubling = b'\x80\x04)' + b'2\x86'*60
    for data in (doubling + b'\x8c\x01aN(' + b'd.', b'\x80\x04}' + doubling[2:] + b'Ns.' + bytes(50), b'\x80\x04\x8f(' + doubling[2:] + b'\x90.' + bytes(50)):
        path.write_bytes(data)
        refused(path)
    m = nn.Module()
    m._modules['again'] = m
    path.write_bytes(pickle.dumps(dict(G=m)))
    refused(path, 'without end')
    tree = nn.Module()
    for _ in range(12):
        tree, below = nn.Module(), tree
        for k in 'abcd': tree._modules[k] = below
    path.write_bytes(pickle.dumps(dict(G=tree)))
    refused(path, 'without end')
    many, t = nn.Module(), torch.zeros(2**18)
    for i in range(1000): many._buffers[f't{i}'] = t
    path.write_bytes(pickle.dumps(dict(G=many)))
    refused(path, 'more than it holds')
    path.write_bytes(b'\x80\x04' + b'N0'*10**6 + b'.')
    refused(path, 'more steps')

def test_small_programs_that_want_much(tmp_path):
    """Each of these repeats, prints, compares or copies something that is short in the file and long outside of it"""
    word = lambda *names: b''.join(b'\x8c' + bytes([len(n)]) + n.encode() for n in names)
    deep, many = b')' + b'2\x86'*60, b'(' + b'K\x01'*5000 + b'l\x940'
    find = lambda module, name: word(module, name) + b'\x93'
    rebuild = find('torch_utils.persistence', '_reconstruct_persistent_obj')
    for body in (deep + word('x') + b'\x93.', word('x') + deep + b'\x93.',
                 rebuild + b'}(' + word('class_name') + deep + word('state') + b'}u\x85R.',
                 find('torch', 'device') + deep + b'\x85R.', find('pathlib', 'Path') + deep + b'\x85R.',
                 many + b'(' + (find('torch', 'Size') + b'h\x00\x85R')*3000 + b'l.', many + b'(' + (find('builtins', 'set') + b'h\x00\x85R')*3000 + b'l.',
                 many + find('collections', 'OrderedDict') + b'(' + b'h\x00'*5000 + b'l\x85R.', many + find('builtins', 'bytes') + b'h\x00\x85R.',
                 find('numpy._core.numeric', '_frombuffer') + b'C\x01x' + find('numpy', 'dtype') + word('f4') + b'\x85R' + b'(' + b'K\x01'*50000 + b't\x87R.'):
        (path := tmp_path/'bad.pkl').write_bytes(b'\x80\x04' + body + bytes(40))
        refused(path)
    nest = find('torch._tensor', '_rebuild_from_type_v2')
    again = b'\x80\x04' + nest + b'\x940' + b'(' + b'h\x00N('*5000 + b't'*5000 + b't\x940h\x00h\x01R.' + bytes(40)
    (path := tmp_path/'bad.pkl').write_bytes(again)
    refused(path)
    m, inner = nn.Module(), nn.Module()
    m._modules['x'*10**6] = inner
    for i in range(2000): inner._buffers[f't{i}'] = torch.zeros(1)
    path.write_bytes(pickle.dumps(dict(G=m)))
    refused(path, 'more than it holds')

def test_random_programs():
    "Any sequence of known instructions ends in a value or in a CheckpointError"
    rng, known = random.Random(0), [*nvidia.PUSH, *nvidia.DO]
    names = [b'\x8c' + bytes([len(n)]) + n for n in (b'torch', b'Size', b'_codecs', b'encode', b'numpy', b'dtype', b'f4', b'builtins', b'set', b'bytes', b'class_name', b'state',
             b'torch_utils.persistence', b'_reconstruct_persistent_obj', b'torch._utils', b'_rebuild_tensor_v2', b'torch.storage', b'_load_from_bytes')]
    calls = [a + b + b'\x93' for a, b in ((names[0], names[1]), (names[2], names[3]), (names[4], names[5]), (names[7], names[8]), (names[7], names[9]), (names[12], names[13]),
             (names[14], names[15]), (names[16], names[17]))]
    ended = 0
    for _ in range(4000):
        body = b''.join(rng.choice([rng.choice(known), rng.choice(names), rng.choice(calls), b'K\x01', b')', b'}', b']', b'\x85R', b'(', b'N', b'\x94', b'h\x00', b'0', b'b'])
                        for _ in range(rng.randrange(1, 25)))
        try: Machine(b'\x80\x04' + body + b'.' + bytes(60), 'it', nvidia.MAKERS, nvidia.WORDS).load()
        except CheckpointError: ended += 1
    assert 1000 < ended < 4000

def test_shared_arguments_do_not_unfold(writer, tmp_path):
    net, deep = stored(writer, small()), [1]
    for _ in range(60): deep = [deep, deep]
    net._init_kwargs['mapping_kwargs']['deep'] = deep
    (path := tmp_path/'g.pkl').write_bytes(pickle.dumps(net))
    refused(path)

def test_cut_short_anywhere(writer, tmp_path):
    whole, path = pickle.dumps(snapshot(writer, small(size=8, width={4: 4, 8: 4})), protocol=2), tmp_path/'cut.pkl'
    rng = random.Random(0)
    for n in [1, 2, 3, 10, 100, len(whole)//2, len(whole) - 1, *rng.sample(range(len(whole)), 40)]:
        path.write_bytes(whole[:n])
        refused(path)

def test_a_changed_byte_is_noticed_or_harmless(writer, tmp_path):
    whole, path = pickle.dumps(stored(writer, small(size=8, width={4: 4, 8: 4}))), tmp_path/'flip.pkl'
    rng = random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)): data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try: read_pickle(path)
        except CheckpointError: pass

@pytest.mark.parametrize('data, words', [(b'<!DOCTYPE html><html>'*9, 'web page'), (b'hello, I am a text\n'*9, 'not a pickle'), (b'', 'not a pickle'), (b'PK\x03\x04'*30, 'not a pickle'),
                                         (pickle.dumps([1, 2]*40), 'expected a dict of networks'), (pickle.dumps(dict(a=[1]*50)), 'no network'), (pickle.dumps({str(i): nn.Identity() for i in range(200)}), '200 networks')])
def test_other_files(tmp_path, data, words):
    (path := tmp_path/'x.pkl').write_bytes(data)
    refused(path, words)

def test_missing_and_folder(tmp_path):
    refused(tmp_path/'no.pkl', 'no such file')
    refused(tmp_path, 'no such file')


# Relatives

def test_tensorflow(monkeypatch, tmp_path):
    module = types.ModuleType('dnnlib.tflib.network')
    class Network: pass
    Network.__module__, Network.__qualname__ = module.__name__, 'Network'
    module.Network = Network
    for k in ('dnnlib', 'dnnlib.tflib', module.__name__): monkeypatch.setitem(sys.modules, k, module)
    (path := tmp_path/'stylegan2-ffhq.pkl').write_bytes(pickle.dumps((Network(), Network(), Network()), protocol=3))
    refused(path, 'TensorFlow', 'legacy.py')

@pytest.mark.parametrize('change, words', [
    (dict(c_dim=4), ('class-conditional',)), (dict(architecture='resnet'), ("'resnet'",)), (dict(architecture='orig'), ("'orig'",)),
    (dict(activation='relu'), ('activation',)), (dict(mapping=dict(activation='relu')), ('activation', 'mapping'))])
def test_relatives_are_refused_in_words(writer, tmp_path, change, words):
    (path := tmp_path/'g.pkl').write_bytes(pickle.dumps(dict(G_ema=stored(writer, small(), **change))))
    with pytest.raises(CheckpointError) as e: nvidia_state(read_nvidia(path), where='g.pkl')
    for w in words: assert w in str(e.value)
    assert str(e.value).startswith('g.pkl: ')

def test_relatives_without_arguments(writer):
    for change, word in ((dict(c_dim=4), 'class-conditional'), (dict(architecture='resnet'), 'resnet'), (dict(architecture='orig'), 'orig')):
        with pytest.raises(CheckpointError, match=word): nvidia_state(stored(writer, small(), **change).state_dict())
    names = {k: torch.zeros(3) for k in ('synthesis.input.weight', 'synthesis.L0_36_512.weight', 'mapping.fc0.weight')}
    assert is_nvidia(names)
    for prefix in ('', 'G_ema.'):
        with pytest.raises(CheckpointError, match='StyleGAN3.*synthesize'): nvidia_state({prefix + k: v for k, v in names.items()})
    scene = {f'backbone.{k}': v for k, v in publish_nvidia(small()).items()} | {'superresolution.block0.weight': torch.zeros(2)}
    with pytest.raises(CheckpointError, match='EG3D'): nvidia_state(scene)
    with pytest.raises(CheckpointError, match='no generator of NVIDIA'): nvidia_state(dict(a=torch.zeros(2)))

@pytest.mark.parametrize('taps, fits', [([1, 3, 3, 1], True), ((1., 3., 3., 1.), True), ([2, 6, 6, 2], True), ([1, 2, 1], False), ([1, 3, 3, 2], False), ('haar', False), ([1]*4, False)])
def test_blur(taps, fits):
    g = small()
    names, kwargs = publish_nvidia(g), dict(synthesis_kwargs=dict(resample_filter=taps))
    if fits: assert nvidia_state(names, kwargs)[0]['size'] == 32
    else:
        with pytest.raises(CheckpointError, match='resample_filter'): nvidia_state(names, kwargs)

def test_arguments_must_agree_with_tensors():
    for k, v in dict(img_resolution=64, img_channels=1, w_dim=512, z_dim=7).items():
        with pytest.raises(CheckpointError, match=k): nvidia_plan({k: t.shape for k, t in publish_nvidia(small()).items()}, {k: v})

@pytest.mark.parametrize('lr', [float('nan'), float('inf'), 0, -1, 'fast', None, [1], True])
def test_impossible_learning_rates(lr):
    with pytest.raises(CheckpointError, match='lr_multiplier'): nvidia_state(publish_nvidia(small()), dict(mapping_kwargs=dict(lr_multiplier=lr)))

def test_arguments_of_another_kind_are_ignored():
    assert nvidia_state(publish_nvidia(small()), dict(mapping_kwargs=[1], synthesis_kwargs='x'))[0]['mapping_lr'] == .01

def test_incomplete_mappings():
    whole = publish_nvidia(small())
    for k in whole:
        rest = {a: b for a, b in whole.items() if a != k}
        if k == 'mapping.w_avg' or k.endswith('resample_filter'): assert build(rest)
        else:
            with pytest.raises(CheckpointError): build(rest)
    with pytest.raises(CheckpointError, match='synthesis.b16.conv0.weight'): build(whole | {'synthesis.b16.conv0.weight': torch.zeros(2, 2, 3, 3)})
    with pytest.raises(CheckpointError, match='unknown'): build(whole | {'synthesis.b16.conv2.weight': torch.zeros(2, 2, 3, 3)})


# The same network under every name

def test_golden():
    tensors, x, want = golden('generator_nvidia_32')
    g = build(tensors)
    got = dict(ws=g.truncate(g.map(x['in.z']), .7), image=g(x['in.z'], truncation=.7), image_wplus=g.synthesize(x['in.wplus']))
    for k, y in got.items():
        e = ((y - want[k]).abs().max()/want[k].std()).item()
        print(f'{k}: {e:.1e}')
        assert y.shape == want[k].shape and e <= 1e-4, (k, e)

@pytest.mark.parametrize('kw', [dict(size=64, channels=3, width={4: 512, 8: 512, 16: 512, 32: 512, 64: 256}, n_mlp=2, w_dim=512, z_dim=512),
                                dict(size=64, width={4: 512, 8: 512, 16: 512, 32: 512, 64: 512}, n_mlp=8, w_dim=128, z_dim=128),
                                dict(size=8, channels=1, n_mlp=8), dict(size=16, channels=4, z_dim=64, n_mlp=1), dict(size=32, n_mlp=0, z_dim=16)])
def test_two_names_one_picture(kw):
    "NVIDIA's names and rosinality's"
    g = small(**kw)
    theirs, prefix = publish_nvidia(g), random.Random(str(kw)).choice(['', 'G_ema.', 'G.'])
    a, b = build({prefix + k: v for k, v in theirs.items()}), read_generator(publish_generator(g))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    w = b.broadcast(b.map(torch.randn(2, g.z_dim))) + .1*torch.randn(2, g.n_styles, g.style_dim)
    ya, yb = a.synthesize(w), b.synthesize(w)
    assert (ya - yb).abs().max() <= 1e-5*yb.std() and torch.equal(yb, g.synthesize(w))

def test_names_go_both_ways():
    g = small(size=64)
    for name, t in publish_nvidia(g).items():
        if (o := nvidia_tensor(name, t)) is None: assert name.endswith('resample_filter')
        else: assert nvidia_name(o[0]) == name and o[0] in g.state_dict()

def test_publishing_keeps_what_the_mapping_does():
    g = small(mapping_lr=.1)
    z = torch.randn(4, 12)
    assert torch.allclose(build(publish_nvidia(g)).map(z), g.map(z), atol=1e-5)
    g.latent_avg[1] += 1
    with pytest.raises(ValueError, match='one code'): publish_nvidia(g)

def test_only_the_wanted_network_is_in_memory(writer, tmp_path):
    "Reading the generator of a file of several networks touches no other"
    (path := tmp_path/'g.pkl').write_bytes(pickle.dumps(dict(D=nn.Linear(2048, 2048), G_ema=stored(writer, small()))))
    import tracemalloc
    tracemalloc.start()
    read_nvidia(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 2**24 and peak < 2**22


# Clipping

def test_activations_are_clipped_where_the_file_says_so():
    g = small()
    config, tensors = nvidia_state(publish_nvidia(g), dict(synthesis_kwargs=dict(conv_clamp=.4)))
    k = build(publish_nvidia(g), dict(synthesis_kwargs=dict(conv_clamp=.4)))
    assert config['conv_clamp'] == k.config['conv_clamp'] == .4 and build(publish_nvidia(g)).config['conv_clamp'] is None
    w, cut = torch.randn(2, g.n_styles, g.style_dim), lambda o: o.clamp(-.4, .4)
    from restyle_nb.generator import upsample
    x = cut(g.convs[0](g.const.expand(2, -1, -1, -1), w[:, 0], g.noise_0))
    y = cut(g.to_images[0](x, w[:, 1]))
    for j in range(1, len(g.to_images)):
        for i in (2*j-1, 2*j): x = cut(g.convs[i](x, w[:, i], getattr(g, f'noise_{i}')))
        y = upsample(y) + cut(g.to_images[j](x, w[:, 2*j+1]))
    assert torch.equal(k.synthesize(w), y) and not torch.allclose(g.synthesize(w), y, atol=1e-3)


def test_clipping_is_found_in_the_layers_of_a_pickle(writer, tmp_path):
    g = small()
    net = stored(writer, g)
    net.synthesis.b4.conv1.conv_clamp = 256
    (path := tmp_path/'n.pkl').write_bytes(pickle.dumps(dict(G_ema=net)))
    assert nvidia_state(read_nvidia(path))[0]['conv_clamp'] == 256


@pytest.mark.parametrize('limit', ['wide', -1, float('nan'), 1e9])
def test_a_strange_limit_is_refused(limit):
    with pytest.raises(CheckpointError, match='conv_clamp'): nvidia_state(publish_nvidia(small()), dict(synthesis_kwargs=dict(conv_clamp=limit)))
