"""Every public name is documented, and this is what documented means.

Public: what stands in a module's `__all__`, with its public methods, properties, `__init__` and `__call__`. An override with no
parameters of its own says what the method of its base class in this package says. For each of them:

doc     a docstring that says it in one line (for a property: what it is)
param   each parameter says what it is, by a docment (the comment beside it) or, in a method, a class or a function that has no other,
        named in `backticks` in the docstring; fields of dataclasses likewise, and fields made by `opt` carry their text there
return  what comes back is said: by a docment on the return, by a docstring with a shape or a name in backticks, or by an annotation
        whose name says it (a class of ours, str, bool, Path, …) beside the docstring
shape   a tensor comes with its shape, or a name that has one
choice  where a body refuses all but some words, the docment names each of them
raise   an exception raised in the body, or in a private helper that the body calls by name, is named, or a sentence says that there is one
source  what is the paper's or the published code's says where it stands there (`SOURCED` lists it)

`python tests/test_docs.py [module …]` lists what is missing.
"""
import ast
import io
import re
import sys
import tokenize
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parent.parent/'restyle_nb'
MODULES = sorted(p.stem for p in PACKAGE.glob('*.py') if not p.stem.startswith('_'))
SHAPE = re.compile(r'\([^()]*[A-Z\dn…][^()]*,[^()]*\)|\(([A-Z]|\d+|n|n\+1|…),?\)|\bshape\b|as large|\bvalue\b|->|\bscalar\b')
CONTAINERS = {'Tensor', 'dict', 'list', 'tuple', 'set', 'object', 'float', 'int', 'ndarray', 'callable', 'None'}
ERRORS = re.compile(r'\b(raises?|refus\w+|errors?|fails?)\b', re.I)
SOURCE = re.compile(r'(§|\b(sections?|equations?|eqs?\.|Figs?\.|Tables?|App\.)) ?\d|App\. [A-H]\b|\bpublished\b|\b(19|20)\d\d\b', re.I)
SOURCED = dict(   # module: names that come from the paper, its published code, or another paper
    generator='unit_norm EqualLinear ModulatedConv StyledConv ToImage Generator Generator.truncate minibatch_std Discriminator g_loss d_loss r1_penalty',
    encoders='SimpleHead IRSE50 ResNet34 fpn_groups FPNHead ProgressiveHead Encoder Encoder.forward',
    restyle='ReStyle ReStyle.step ReStyle.steps ReStyle.start ReStyle.invert bootstrap naive_feedback',
    features='face_crop FaceNet MoCoNet LatentDiscriminator',
    losses='l2 LPIPS Identity MoCo w_norm delta_norm CodePool LatentCritic ImageCritic',
    training='Trainer Trainer.train_batch Ranger stage_at Preset preset',
    gan='FeatureDiscriminator GanTrainer pixel_critic frechet',
    metrics='default_metrics identity_metric per_step quality_time plot_quality_time',
    optimize='ramp shake noise_correlation descend project hybrid in_domain tune',
    editing='Direction.without mix styles moved_styles',
    directions='boundary pca sefa',
    editability='editability',
    toonify='show_twins blend_shares blend fine_tune alignment toonify',
    analysis='change_maps unit_range focus LatentChange latent_change steps_needed bands',
    plots='show_focus show_focus_rows plot_latent_change plot_groups',
    judges='ArcFace contrast',
)


# ---------------------------------------------------------------- reading

class Module(NamedTuple):
    name: str
    tree: ast.Module
    lines: list
    comments: dict    # line -> text of the comment in it
    alone: set        # lines that hold nothing else


def parse(text, name='sample'):
    comments, alone = {}, set()
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        if t.type != tokenize.COMMENT: continue
        comments[t.start[0]] = t.string.lstrip('#').strip()
        if not t.line[:t.start[1]].strip(): alone.add(t.start[0])
    return Module(name, ast.parse(text), text.split('\n'), comments, alone)


@cache
def module(name): return parse((PACKAGE/f'{name}.py').read_text(encoding='utf-8'), name)


class Public(NamedTuple):
    name: str         # 'l2' or 'LPIPS.forward'
    kind: str         # function, class, method or property
    node: ast.AST
    doc: str          # its docstring; that of the class for `__init__` and `__call__`


def decorators(node): return [ast.unparse(d) for d in node.decorator_list]
def docstring(node): return ast.get_docstring(node) or ''
def words(node): return re.findall(r'\w+', ast.unparse(node)) if node else []


def patched(node):
    "Classes that a `@patch`ed function belongs to"
    return words(node.args.args[0].annotation) if any(d.split('(')[0] == 'patch' for d in decorators(node)) else []


def exported(tree):
    return next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__'), [])


def publics(m):
    classes = {n.name: n for n in m.tree.body if isinstance(n, ast.ClassDef)}
    for n in m.tree.body:
        if isinstance(n, ast.FunctionDef):
            if not patched(n) and n.name in exported(m.tree): yield Public(n.name, 'function', n, docstring(n))
            for c in patched(n): yield from member(c, n, classes.get(c))
        if isinstance(n, ast.ClassDef) and n.name in exported(m.tree):
            yield Public(n.name, 'class', n, docstring(n))
            for k in n.body:
                if isinstance(k, ast.FunctionDef): yield from member(n.name, k, n)


def member(cls, node, owner):
    special = node.name in ('__init__', '__call__')
    if cls.startswith('_') or node.name.startswith('_') and not special or any(d.endswith('.setter') for d in decorators(node)): return
    prop = any('property' in d or 'as_prop' in d for d in decorators(node))
    doc = docstring(node) or (docstring(owner) if special and owner else '')
    yield Public(f'{cls}.{node.name}', 'property' if prop else 'method', node, doc)


@cache
def bases():
    "Class -> names of its bases in this package"
    classes = [n for name in MODULES for n in module(name).tree.body if isinstance(n, ast.ClassDef)]
    return {n.name: [ast.unparse(b).split('.')[-1] for b in n.bases] for n in classes}


@cache
def everything(): return {p.name: {o.arg for o in parameters(p)} for name in MODULES for p in publics(module(name)) if p.kind != 'class'}


def inherited(p):
    "Does a base class of ours have the method, and all of its parameters?"
    if '.' not in p.name or p.name.endswith('__'): return False
    cls, method = p.name.split('.')
    todo = list(bases().get(cls, []))
    while todo:
        base = todo.pop()
        if f'{base}.{method}' in everything(): return {o.arg for o in parameters(p)} <= everything()[f'{base}.{method}']
        todo += bases().get(base, [])
    return False


# ---------------------------------------------------------------- rules

def parameters(p):
    a = p.node.args
    args = sorted([*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))], key=lambda o: (o.lineno, o.col_offset))
    return args if p.kind == 'function' or 'staticmethod' in decorators(p.node) else args[1:]


def docments(p, m):
    "Parameter -> its comment, as fastcore reads it; 'return' -> that of the result"
    args, body = parameters(p), p.node.body[0].lineno
    found = {}
    for o, following in zip(args, [*args[1:], None]):
        line = o.end_lineno
        shared = following is not None and following.lineno == line or line >= body
        found[o.arg] = m.comments.get(line, '') if not shared else ''
        if not found[o.arg] and o.lineno - 1 in m.alone: found[o.arg] = m.comments[o.lineno - 1]
    ends = [l for l in range(p.node.lineno, body) if re.search(r'\)\s*(->[^#]*)?:\s*(#.*)?$', m.lines[l - 1])]
    if ends and not (args and args[-1].end_lineno == ends[-1]): found['return'] = m.comments.get(ends[-1], '')
    return found


def inside(node):
    "What a function does itself, without the functions that it makes"
    for k in ast.iter_child_nodes(node):
        if not isinstance(k, (ast.FunctionDef, ast.Lambda, ast.ClassDef)): yield k; yield from inside(k)


def raised(node):
    excs = [k.exc.func if isinstance(k.exc, ast.Call) else k.exc for k in inside(node) if isinstance(k, ast.Raise) and k.exc]
    return {n for e in excs if (n := ast.unparse(e).split('.')[-1])[0].isupper()}


def helpers(node, m):
    "Private functions of the module that the body calls"
    called = {k.func.id for k in inside(node) if isinstance(k, ast.Call) and isinstance(k.func, ast.Name)}
    return [n for n in m.tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith('_') and n.name in called]


def choices(node):
    "(parameter, word) for `p in ('a', 'b')`, `p == 'a'` and their opposites, where another word is refused"
    tests = [k.test for k in inside(node) if isinstance(k, ast.If) and isinstance(k.body[0], ast.Raise)]
    for k in (k for t in tests for k in ast.walk(t) if isinstance(k, ast.Compare) and isinstance(k.left, ast.Name)):
        for c in k.comparators:
            for e in c.elts if isinstance(c, (ast.Tuple, ast.List, ast.Set)) else [c]:
                if isinstance(e, ast.Constant) and isinstance(e.value, str) and e.value: yield k.left.id, e.value


def returns(node): return [k for k in inside(node) if isinstance(k, (ast.Yield, ast.YieldFrom)) or isinstance(k, ast.Return) and k.value and ast.unparse(k.value) != 'None']


def said(p, found):
    "Is what comes back described?"
    kinds, args = set(words(p.node.returns)), {o.arg for o in parameters(p)}
    named = [k for k in re.findall(r'`\**(\w+)[^`]*`', p.doc) if k not in args and not k.endswith('Error')]
    return found.get('return') or SHAPE.search(p.doc) or named or p.doc and kinds and not kinds & CONTAINERS


def fields(p, m):
    for k in p.node.body:
        if not isinstance(k, ast.AnnAssign) or k.target.id.startswith('_') or 'ClassVar' in ast.unparse(k.annotation): continue
        text = isinstance(k.value, ast.Call) and ast.unparse(k.value.func) in ('opt', '_opt') and len(k.value.args) > 1
        if not (text or m.comments.get(k.end_lineno) or m.comments.get(k.lineno) or f'`{k.target.id}`' in p.doc): yield k.target.id


def missing(p, m):
    "(rule, what) for each rule that `p` breaks"
    if p.kind == 'class':
        if not p.doc: yield 'doc', 'no docstring'
        if any('dataclass' in d for d in decorators(p.node)) or any('NamedTuple' in words(b) for b in p.node.bases):
            for k in fields(p, m): yield 'param', k
        return
    found = docments(p, m)
    if not p.doc: yield 'doc', 'no docstring'
    for o in parameters(p):
        if not found[o.arg] and (p.kind == 'function' and len(parameters(p)) > 1 or not re.search(rf'`\**{o.arg}\b', p.doc)): yield 'param', o.arg
        if found[o.arg] and 'Tensor' in words(o.annotation) and not ('`' in found[o.arg] or SHAPE.search(found[o.arg])):
            yield 'shape', f'{o.arg}: {found[o.arg]}'
    if p.kind == 'method' and p.name.endswith('__init__') or p.kind == 'property': pass
    elif returns(p.node) and not said(p, found): yield 'return', p.doc
    text = ' '.join([p.doc, *found.values()])
    for name, word in choices(p.node):
        if name in found and word not in text: yield 'choice', f'{name} may be {word!r}'
    for error in raised(p.node).union(*map(raised, helpers(p.node, m))):
        if error not in text and not ERRORS.search(text): yield 'raise', error


def defects(m):
    return [(p.name, *bad) for p in publics(m) if not inherited(p) for bad in missing(p, m)]


# ---------------------------------------------------------------- tests

@pytest.mark.parametrize('name', MODULES)
def test_public_names_are_documented(name):
    bad = defects(module(name))
    assert not bad, f'{len(bad)} in {name}; the rules stand at the top of this file:\n' + '\n'.join(f'  {who}: {rule}: {what}' for who, rule, what in bad)


@pytest.mark.parametrize('name', SOURCED)
def test_what_comes_from_the_paper_says_where(name):
    m = module(name)
    docs = {p.name: ' '.join([p.doc, *([] if p.kind == 'class' else docments(p, m).values())]) for p in publics(m)}
    asked = SOURCED[name].split()
    assert not (gone := set(asked) - set(docs)), f'{name} has no {gone}'
    assert not (bad := [k for k in asked if not SOURCE.search(docs[k])]), f'{name}: say section, equation, figure, year or published code for {bad}'


GOOD = '''
__all__ = ['f', 'C']
def f(
    x:torch.Tensor, # Pictures (B,C,H,W) in [-1,1]
    how='a',        # 'a' or 'b'
)->torch.Tensor:    # (B,)
    "Brightness. ValueError for another `how`."
    if how not in ('a', 'b'): raise ValueError(how)
    return x.mean((1, 2, 3))
class C:
    "A thing of `size` pixels."
    def __init__(self, size): self.size = size
    @property
    def area(self):
        "Square pixels."
        return self.size**2
    def grow(self, by):
        "The same, `by` pixels larger, as a `C`."
        return C(self.size + by)
def _refuse(how): raise TypeError(how)
'''


def test_nothing_is_missing_in_a_good_sample(): assert defects(parse(GOOD)) == []


@pytest.mark.parametrize('old, new, expected', [
    ('"Brightness. ValueError for another `how`."', '# said nothing', ('f', 'doc', 'no docstring')),
    (" # 'a' or 'b'", '', ('f', 'param', 'how')),
    ("how='a',        # 'a' or 'b'", "how='a', more=0, # 'a' or 'b'", ('f', 'param', 'how')),
    ('Pictures (B,C,H,W) in [-1,1]', 'Pictures', ('f', 'shape', 'x: Pictures')),
    ('    # (B,)', '', ('f', 'return', 'Brightness. ValueError for another `how`.')),
    ("# 'a' or 'b'", "# 'a' and others", ('f', 'choice', "how may be 'b'")),
    (' ValueError for another `how`.', '', ('f', 'raise', 'ValueError')),
    ("if how not in ('a', 'b'): raise ValueError(how)", '_refuse(how)', ('f', 'raise', 'TypeError')),
    ('A thing of `size` pixels.', 'A thing.', ('C.__init__', 'param', 'size')),
    ('"Square pixels."', '', ('C.area', 'doc', 'no docstring')),
    ('`by` pixels', 'some pixels', ('C.grow', 'param', 'by')),
    (', as a `C`.', '.', ('C.grow', 'return', 'The same, `by` pixels larger.')),
])
def test_each_rule_finds_what_it_is_for(old, new, expected):
    text = GOOD.replace(old, new)
    assert text != GOOD and expected in defects(parse(text))


if __name__ == '__main__':
    for name in sys.argv[1:] or MODULES:
        bad = defects(module(name))
        print(f'== {name}: {len(bad)}')
        for who, rule, what in bad: print(f'   {who}: {rule}: {what}')
