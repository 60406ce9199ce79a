"Rebuild the tensors of a golden case from their names, shapes and rules."
import json
from pathlib import Path
from zlib import crc32

import numpy as np

HERE = Path(__file__).parent

RULES = dict(
    unit=lambda n: n,
    he=lambda n: n * np.float32(np.sqrt(2 / np.prod(n.shape[1:]))),
    gain=lambda n: np.float32(1) + np.float32(.1) * n,
    small=lambda n: np.float32(.1) * n,
    tenth=lambda n: np.float32(.1) * n,
    hundred=lambda n: np.float32(100) * n,
    var=lambda n: np.float32(3) + np.abs(n),
    zero=lambda n: np.zeros(n.shape, np.int64),
)


def tensor(name, shape, rule='unit'):
    "The array called `name`: normal numbers seeded by the name, shaped by the rule"
    if rule not in RULES: raise ValueError(f'{name}: unknown rule {rule!r}, expected one of {sorted(RULES)}')
    normal = np.random.RandomState(crc32(name.encode())).standard_normal(tuple(shape))
    return RULES[rule](normal.astype(np.float32))


def case(name):
    "(tensors, inputs, expected) of the golden case `name`, as dicts of arrays; `fixed` tensors (blur kernels) are left out"
    spec = json.loads((HERE / f'{name}.json').read_text())
    tensors = {k: tensor(k, v['shape'], v['rule']) for k, v in spec['tensors'].items() if v['rule'] != 'fixed'}
    inputs = {}
    for k, shape in spec['inputs'].items():
        key, _, rule = k.removesuffix(')').partition(' (rule ')
        inputs[key] = tensor(key, shape, rule or 'unit')
    with np.load(HERE / f'{name}.npz') as expected: return tensors, inputs, dict(expected)
