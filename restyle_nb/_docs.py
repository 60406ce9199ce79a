"How the docs show an exported function or class (`renderer` in settings.ini)."
import inspect
import re

from fastcore.docments import docments
from nbdev.showdoc import BasicMarkdownRenderer

MISSING = inspect.Parameter.empty


def annotation(kind) -> str:
    "The name a reader would write for a type"
    if isinstance(kind, type) and not getattr(kind, '__args__', None): return kind.__name__
    return re.sub(r'\b(?:\w+\.)+(\w+)', r'\1', str(kind))


def parameter(name, p) -> str:
    "`name:type=default`, leaving out what is not there"
    kind = '' if p.annotation is MISSING else f':{annotation(p.annotation)}'
    stars = {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '')
    if p.default is MISSING: default = ''
    else: default = '=' + (getattr(p.default, '__name__', None) or repr(p.default))
    return f'{stars}{name}{kind}{default}'


def signature_line(sym, name) -> str:
    "One line for short signatures, one parameter a line for long ones"
    sig = inspect.signature(sym)
    args = [parameter(k, p) for k, p in sig.parameters.items() if k not in ('self', 'cls')]
    word = 'class ' if inspect.isclass(sym) else ''
    returns = '' if inspect.isclass(sym) or sig.return_annotation is MISSING else f' -> {annotation(sig.return_annotation)}'
    line = f"{word}{name}({', '.join(args)}){returns}"
    if len(line) <= 100: return line
    inner = ',\n    '.join(args)
    return f'{word}{name}(\n    {inner},\n){returns}'


class TableRenderer(BasicMarkdownRenderer):
    "Heading and source link, the signature, the docstring, a table of the parameters"
    def _repr_markdown_(self):
        plain = super()._repr_markdown_()
        try: code = signature_line(self.sym, self.nm)
        except (TypeError, ValueError):
            if not inspect.isclass(self.sym): return plain
            code = f"class {self.nm}({', '.join(o.__name__ for o in self.sym.__bases__)})"   # an error, say: its signature is that of its base
        head = plain.split('```python')[0].replace('#LNone', '')   # the line is not always known
        parts = [f'{head}```python\n{code}\n```', inspect.cleandoc(self.docs or ''), self.table()]
        return re.sub(r' at 0x[0-9a-f]+', '', '\n\n'.join(p for p in parts if p))

    def table(self) -> str:
        "The docments as a Markdown table; nothing where there are none"
        try: described = docments(self.sym, full=True)
        except Exception: return ''   # an annotation that cannot be evaluated must not stop the site
        if not described.get('return', {}).get('docment') and (said := returns(self.sym)): described['return'] = dict(docment=said)
        return markdown_table(described) if any(d.get('docment') for d in described.values()) else ''


def returns(sym) -> str:
    "What is said of the result behind the closing parenthesis of a signature without annotation, which docments leaves out"
    try: found = re.search(r'^\)\s*:\s*#\s*(.+)$', inspect.getsource(sym), re.M)
    except (OSError, TypeError): return ''   # no source: built in, or made on the spot
    return found[1] if found and not inspect.isclass(sym) else ''


def markdown_table(described: dict) -> str:
    "One row a parameter: name, type, default, what it is"
    rows = [['', 'Type', 'Default', 'Details']]
    for name, d in described.items():
        if name in ('self', 'cls'): continue
        kind, default = d.get('anno', MISSING), d.get('default', MISSING)
        kind = '' if kind in (MISSING, None, type(None)) else annotation(kind)
        default = '' if default is MISSING or name == 'return' else getattr(default, '__name__', None) or repr(default)
        label = '**Returns**' if name == 'return' else f'<code>{name}</code>'   # no backticks: nbdev would link a parameter to a function of that name
        rows.append([label, kind, default, ' '.join((d.get('docment') or '').split())])
    if rows[-1] == ['**Returns**', '', '', '']: rows.pop()
    keep = [j for j in range(4) if j == 0 or any(r[j] for r in rows[1:])]
    lines = ['| ' + ' | '.join(r[j].replace('|', r'\|') for j in keep) + ' |' for r in rows]
    return '\n'.join([lines[0], '|' + '---|'*len(keep), *lines[1:]])
