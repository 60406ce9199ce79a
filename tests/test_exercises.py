"The exercises: answers get all points, typical mistakes none and the right hint; a sheet cannot harm the one who grades it by accident."
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from restyle_nb.exercises import COLUMNS, EXERCISES, _mark, answer, check, find_sheets, grade, new_seed, write_grades

ROOT = Path(__file__).resolve().parent.parent
SHEETS = sorted((ROOT/'nbs'/'teaching').glob('*.ipynb'))
HEAD = 'import torch\nimport torch.nn.functional as F\nfrom torch import nn'


def made(source, name):
    "The function of that name in some source"
    space = dict(torch=torch, F=F)
    exec(source, space)
    return space[name]


def body(id, text): return made(f'{signature(answer(id))}\n{text if text.startswith("    ") else "    " + text}', EXERCISES[id].name)
def signature(source): return next(l for l in source.splitlines() if l.startswith('def '))


WRONG = {   # exercise -> (body of the function, what its hint must say)
    '1.1': [('return torch.cat([F.adaptive_avg_pool2d(y, x.shape[-2:]), x], 1)', 'other order'),
            ('return torch.cat([x, F.adaptive_avg_pool2d(y, x.shape[-2:])])', 'behind each other'),
            ('return torch.cat([x, F.adaptive_avg_pool2d(y, x.shape[-2:])], 2)', 'beside or below'),
            ('return torch.cat([x, F.interpolate(y, x.shape[-2:])], 1)', 'thrown away'),
            ("return torch.cat([x, F.interpolate(y, x.shape[-2:], mode='bilinear')], 1)", 'nearest four'),
            ('return torch.cat([F.interpolate(x, y.shape[-2:]), y], 1)', 'target was enlarged'),
            ('return torch.cat([x, y], 1)', 'RuntimeError in line')],
    '1.2': [('d = encoder(x, y); return d, generator.synthesize(d)', 'a *difference*'),
            ('w = w + encoder(y, x); return w, generator.synthesize(w)', 'wrong order'),
            ('w = w - encoder(x, y); return w, generator.synthesize(w)', 'taken off'),
            ('return w + encoder(x, y), generator.synthesize(w)', 'picture of the old code'),
            ('d = encoder(x, y); return w + d, generator.synthesize(d)', 'which is no code'),
            ('w += encoder(x, y); return w, generator.synthesize(w)', 'handed in has changed'),
            ('return w + encoder(x, y)', 'two things')],
    '1.3': [('w = torch.zeros(len(x), generator.n_styles, generator.style_dim); y, o = generator.synthesize(w), [w]\n'
             '    for _ in range(n): w = w.detach() + encoder(x, y.detach()); y = generator.synthesize(w); o.append(w)\n    return o', 'begins at zero'),
            ('w = generator.latent_avg[None].repeat(len(x), 1, 1); y, o = generator.synthesize(w), [w]\n'
             '    for _ in range(n): w = w + encoder(x, y); y = generator.synthesize(w); o.append(w)\n    return o', 'runs back through all earlier'),
            ('w = generator.latent_avg[None].repeat(len(x), 1, 1); y, o = generator.synthesize(w), [w]\n'
             '    for _ in range(n): w = w.detach() + encoder(x, y); y = generator.synthesize(w); o.append(w)\n    return o', 'runs back through all earlier'),
            ('w = generator.latent_avg[None].repeat(len(x), 1, 1); y, o = generator.synthesize(w), [w]\n'
             '    for _ in range(n): w = w + encoder(x, y); o.append(w)\n    return o', 'picture of the start again'),
            ('w = generator.latent_avg[None].repeat(len(x), 1, 1); y, o = generator.synthesize(w), []\n'
             '    for _ in range(n): w = w.detach() + encoder(x, y.detach()); y = generator.synthesize(w); o.append(w)\n    return o', 'where one begins'),
            ('w = generator.latent_avg[None].repeat(len(x), 1, 1); y, o = generator.synthesize(w), [w]\n    with torch.no_grad():\n'
             '        for _ in range(n): w = w + encoder(x, y); y = generator.synthesize(w); o.append(w)\n    return o', 'no gradient reaches'),
            ('w = generator.latent_avg[None].repeat(len(x), 1, 1); y, o = generator.synthesize(w), [w]\n    with torch.no_grad():\n'
             '        for _ in range(n): w += encoder(x, y); y = generator.synthesize(w); o.append(w)\n    return o', 'one and the same'),
            ('w = generator.latent_avg.expand(len(x), -1, -1); y, o = generator.synthesize(w), [w]\n    with torch.no_grad():\n'
             '        generator.latent_avg += 1\n    return o', 'overwritten')],
    '1.4': [('e = (images - x).square().mean((2, 3, 4)); return e, e.argmax(0)', 'worst step'),
            ('e = (images - x).abs().mean((2, 3, 4)); return e, e.argmin(0)', 'absolute'),
            ('e = (images - x).square().mean((1, 2, 3, 4)); return e, e.argmin(0)', 'thrown together'),
            ('e = (images - x).square().mean((2, 3, 4)); return e, e.argmin(1)', 'best *picture*'),
            ('e = (images - x).square().mean((2, 3, 4)).sqrt(); return e, e.argmin(0)', 'root'),
            ('e = (images - x).square().mean((2, 3, 4)); return e, e.mean(1).argmin()', 'one step for all'),
            ('e = (images - x).square().mean((2, 3, 4)); return e, e.min(0).values', 'errors there'),
            ('e = (images - x).mean((2, 3, 4)).square(); return e, e.argmin(0)', 'cancel'),
            ('return (images - x).square().mean((2, 3, 4))', 'two things')],
    '1.5': [('s = deltas.flatten(2).norm(dim=2) <= tol*(codes[1:] - codes[0]).flatten(2).norm(dim=2); return torch.where(s.any(0), s.int().argmax(0), len(deltas) - 1)', 'counted from 1'),
            ('s = deltas.flatten(2).norm(dim=2) <= tol; return torch.where(s.any(0), s.int().argmax(0) + 1, len(deltas))', 'way come so far'),
            ('s = deltas.flatten(2).norm(dim=2) <= tol*codes[1:].flatten(2).norm(dim=2); return torch.where(s.any(0), s.int().argmax(0) + 1, len(deltas))', 'measured against the code'),
            ('s = deltas.flatten(2).norm(dim=2) <= tol*(codes[1:] - codes[0]).flatten(2).norm(dim=2); return torch.where(s.any(0), s.int().argmax(0) + 1, 0)', 'never comes to rest'),
            ('s = deltas.norm(dim=3) <= tol*(codes[1:] - codes[0]).norm(dim=3); return s.int().argmax(0) + 1', 'shape')],
    '2.1': [('return generator.map(z.mean(0, keepdim=True)).expand(generator.n_styles, -1)', 'before the mapping'),
            ('return generator.map(z).mean(0)', 'for one style'),
            ('return generator.latent_avg', 'stored in the generator'),
            ('return generator.map(z).sum(0).expand(generator.n_styles, -1)', 'the sum'),
            ('return generator.map(z).mean(1)', 'numbers of a code')],
    '2.2': [('return psi*w', 'towards zero'), ('return w + psi*(w_avg - w)', 'wrong way round'), ('return psi*(w - w_avg)', 'where does it begin'),
            ('return w_avg + psi*w', 'way from the average')],
    '2.3': [('return weight[None]*s[:, None, :, None, None]', 'not yet demodulated'),
            ('v = weight[None]*s[:, :, None, None, None]; return v/v.square().sum((2, 3, 4), keepdim=True).sqrt()', 'comes *out*'),
            ('v = weight[None]*s[:, None, :, None, None]; return v/v.square().sum((3, 4), keepdim=True).sqrt()', 'little kernel'),
            ('v = weight[None]*s[:, None, :, None, None]; return v/v.square().sum((1, 2, 3, 4), keepdim=True).sqrt()', 'come out as well'),
            ('v = weight[None]*s[:, None, :, None, None]; return v/v.square().sum((2, 3, 4), keepdim=True)', 'square of the size'),
            ('v = weight[None]*s[:, None, :, None, None]; return v/v.flatten(2).std(2)[..., None, None, None]', 'standard deviation'),
            ('return weight*s', 'RuntimeError in line')],
    '2.4': [('return a + (torch.arange(n)/n)[:, None, None]*(b - a)', 'one short'),
            ('return b + torch.linspace(0, 1, n)[:, None, None]*(a - b)', 'from b to a'),
            ('return a + torch.linspace(0, 1, n + 1)[:, None, None]*(b - a)', 'one code too many'),
            ('return torch.stack([a + t/(n + 1)*(b - a) for t in range(1, n + 1)])', 'two ends are missing')],
    '3.1': [('return (w - w[:, :1]).square().sum(2).mean(1).sqrt()', 'first style'),
            ('return (w - w.mean(1, keepdim=True)).square().sum(2).mean(1)', 'root is missing'),
            ('return (w - w.mean((0, 1))).square().sum(2).mean(1).sqrt()', 'average of all codes'),
            ('return (w - w.mean(1, keepdim=True)).norm(dim=2).mean(1)', 'average of the distances'),
            ('return (w - w.mean(1, keepdim=True)).flatten(1).norm(dim=1)', 'summed over the styles')],
    '3.2': [('v = F.normalize(codes[labels].mean(0) - codes[~labels].mean(0), dim=0); return v, (codes @ v).median()', 'difference of two averages'),
            ('n = torch.linalg.lstsq(torch.cat([codes, torch.ones(len(codes), 1)], 1), 2*labels.float()[:, None] - 1).solution[:, 0]; s = n[:-1].norm(); return -n[:-1]/s, n[-1]/s', 'points away'),
            ('n = torch.linalg.lstsq(torch.cat([codes, torch.ones(len(codes), 1)], 1), 2*labels.float()[:, None] - 1).solution[:, 0]; s = n[:-1].norm(); return n[:-1]/s, n[-1]/s', 'offset has the wrong sign'),
            ('n = torch.linalg.lstsq(torch.cat([codes, torch.ones(len(codes), 1)], 1), 2*labels.float()[:, None] - 1).solution[:, 0]; return n[:-1], -n[-1]', 'expected 1'),
            ('n = torch.linalg.lstsq(torch.cat([codes, torch.ones(len(codes), 1)], 1), 2*labels.float()[:, None] - 1).solution[:, 0]; return n[:-1]/n[:-1].norm(), torch.tensor(0.)', 'offset does not'),
            ('return codes[labels].mean(0)', 'two things')],
    '3.3': [('return w + strength*direction', 'every style'), ('w = w.clone(); w[:, layers] += direction; return w', 'strength 1'),
            ('w[:, layers] += strength*direction; return w', 'handed in is changed'), ('return w[:, layers] + strength*direction', 'others belong'),
            ('o = torch.zeros_like(w); o[:, layers] = strength*direction; return o', 'these are the changes')],
    '3.4': [('return d - (d @ s)/(s @ s)*s', 'but for its length'), ('v = d - (d @ s)*s; return v/v.norm()', 'too much'), ('v = d - s; return v/v.norm()', 'as it is'),
            ('return d/d.norm()', 'nothing was taken'), ('v = (d @ s)*s; return v/v.norm()', 'have in common')]}


@pytest.mark.parametrize('id', EXERCISES)
def test_answers_get_all_points(id):
    assert len(answer(id).splitlines()) <= 15
    for seed in (0, 1, 23):
        said = check(id, made(answer(id), EXERCISES[id].name), seed)
        assert said.ok and said.points == EXERCISES[id].points, said


@pytest.mark.parametrize('id, text, hint', [(k, *o) for k, os in WRONG.items() for o in os])
def test_mistakes_get_none_and_the_right_hint(id, text, hint):
    for seed in (0, 1, 23):
        said = check(id, body(id, text), seed)
        assert said.points == 0 and hint in said.hint, said


def test_another_way_is_as_good():
    source = answer('3.2').splitlines()[0] + """
    a = torch.cat([codes, torch.ones(len(codes), 1)], 1)
    n = torch.linalg.lstsq(a, 2*labels.float()[:, None] - 1).solution[:, 0]
    return n[:-1]/n[:-1].norm(), -n[-1].item()/n[:-1].norm().item()"""
    for seed in range(8): assert check('3.2', made(source, 'boundary'), seed).ok


def test_every_exercise_has_mistakes():
    assert set(WRONG) == set(EXERCISES) and min(map(len, WRONG.values())) >= 2 and len(EXERCISES) >= 8
    assert {e.id.split('.')[0] for e in EXERCISES.values()} == {'1', '2', '3'}


@pytest.mark.parametrize('id', EXERCISES)
def test_hints_do_not_give_the_answer_away(id):
    "No line of the answer stands in a hint"
    lines = [l.strip() for l in answer(id).splitlines()[1:]]
    code = ''.join(check(id, body(id, text)).hint.split('`')[0] for text, _ in WRONG[id])
    assert not [l for l in lines if len(l) > 20 and l in code]


@pytest.mark.parametrize('id', EXERCISES)
@pytest.mark.parametrize('f, verdict, hint', [
    (lambda *a: None, 'not answered', 'returns nothing'), (lambda *a: 3, 'wrong', 'expected'), (lambda: 3, 'error', 'as on the sheet'), (5, 'wrong', 'without calling'),
    (lambda *a: [None, None], 'wrong', 'expected'), (lambda *a: sys.exit(), 'error', 'ends the whole program'), (lambda *a: 1/0, 'error', 'ZeroDivisionError'),
    (lambda *a: torch.full((2, 2), torch.nan), 'wrong', '')])
def test_nonsense_is_told_in_words(id, f, verdict, hint):
    said = check(id, f)
    assert said.points == 0 and said.verdict == verdict and hint in said.hint and said.hint, said


def test_check_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    a = torch.rand(1)
    torch.manual_seed(3)
    check('1.1', lambda x, y: torch.rand(3))
    assert torch.equal(a, torch.rand(1))
    assert check('1.1', lambda x, y: torch.set_grad_enabled(False)).points == 0 and torch.is_grad_enabled()


def test_unknown_exercises_are_refused():
    for f in (answer, lambda id: check(id, answer)):
        with pytest.raises(ValueError, match=r"no exercise '9\.9'; there are 1\.1, "): f('9.9')


# ---------------------------------------------------------------- sheets

def sheet(path, cells):
    "A notebook of these code cells"
    cell = lambda s: dict(cell_type='code', execution_count=1, id=str(abs(hash(s)))[:8], metadata={}, source=s, outputs=[dict(output_type='stream', name='stdout', text='right, 99 of 99 points\n')])
    path.write_text(json.dumps(dict(cells=[cell(c) for c in cells], metadata={}, nbformat=4, nbformat_minor=5)), encoding='utf-8')
    return path


def cell(id, source=None): return f'#| exercise: {id}\n{source or answer(id)}'
def verdicts(marks): return {o.id: o.verdict for o in marks.answers}


@pytest.fixture(scope='module')
def marked(tmp_path_factory):
    "Nearly everything that can happen to a grader, in one sheet"
    folder = tmp_path_factory.mktemp('class')
    path = sheet(folder/'=anna.ipynb', [HEAD + '\nimport no_such_thing\nfrom restyle_nb.exercises import check', 'print("9 points")\nraise SystemExit',
        cell('1.2', '%matplotlib inline\n' + answer('1.2') + '\ncheck("1.1", step)\nshow_me(somewhere_else)\ntorch.Tensor.repeat = None\nexit()'),
        cell('1.3', 'open("mine.txt", "w").write("x")\nprint("x"*10**8)\n' + answer('1.3')),
        cell('1.4', 'import os\n' + signature(answer('1.4')) + '\n    os._exit(5)'),
        cell('1.5', signature(answer('1.5')) + '\n    return torch.zeros(10**12)')])
    return folder, grade(path, 7, seconds=90)


def test_one_spoilt_answer_spoils_no_other(marked):
    "After 1.2 `repeat` is gone, which 1.3 needs; 1.4 leaves"
    _, m = marked
    assert verdicts(m) == {'1.1': 'missing', '1.2': 'right', '1.3': 'right', '1.4': 'ended', '1.5': 'error'} and (m.points, m.of) == (5, 10)
    hints = {o.id: o.hint for o in m.answers}
    assert 'code 5' in hints['1.4'] and not hints['1.2'] and '#| exercise: 1.1' in hints['1.1']
    if sys.platform.startswith('linux'): assert 'more memory' in hints['1.5'] and 'line 3, `return torch.zeros' in hints['1.5']


def test_a_loop_without_end(tmp_path):
    "It is ended, and the next exercise is asked"
    m = grade(sheet(tmp_path/'b.ipynb', [HEAD, cell('2.1', signature(answer('2.1')) + '\n    while True: print("x"*10**6)'), cell('2.2')]), 1, seconds=4)
    assert verdicts(m) == {'2.1': 'time', '2.2': 'right', '2.3': 'missing', '2.4': 'missing'} and 'never ends' in m.answers[0].hint


def test_a_pupil_writes_into_a_folder_that_goes_away(marked): assert [p.name for p in marked[0].iterdir()] == ['=anna.ipynb'] and not Path('mine.txt').exists()


def test_what_was_printed_does_not_count(marked): assert '99' not in str(marked[1])


@pytest.mark.parametrize('source, verdict, hint', [
    ('def truncate(w, w_avg, psi):\n    return (', 'error', 'cell cannot be read in line 3, `return (`'),
    ('def other(w, w_avg, psi): return w', 'error', 'no function truncate, but other'),
    ('x = 3', 'error', 'no function truncate'),
    ('def truncate(w, w_avg, psi): return helper*w', 'error', 'nothing from other cells'),
    ('def truncate(w, w_avg, psi): return no_such_thing.f(w)', 'error', '`import no_such_thing` fails with ModuleNotFoundError'),
    ('def truncate(w, w_avg, psi): return truncate(w, w_avg, psi)', 'error', 'RecursionError'),
    ('!pip list\n\ndef truncate(w, w_avg, psi): return w_avg.lerp(w, psi)', 'right', ''),
    ('truncate = 5', 'wrong', 'expected a function')])
def test_cells_are_read_with_patience(source, verdict, hint):
    said = _mark('2.2', f'#| exercise: 2.2\n{source}', [*HEAD.splitlines(), 'import no_such_thing'], 3)
    assert said[0] == verdict and hint in said[1], said


def test_table(marked, tmp_path):
    folder, one = marked
    bad = grade(ROOT/'LICENSE', 7)
    assert bad.problem and not bad.answers and bad.of == 0
    rows = list(csv.DictReader(write_grades([one, bad], tmp_path/'grades.csv').open(encoding='utf-8-sig')))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 5 + 1 and {r['seed'] for r in rows} == {'7'}
    assert sum(int(r['points']) for r in rows) == one.points and rows[-1]['verdict'] == 'unreadable'
    assert not [v for r in rows for v in r.values() if v[:1] in '=+@' and v], 'a spreadsheet would take it for a formula'


@pytest.mark.parametrize('text', ['', 'not json', '[]', '{}', '{"cells": [{}]}', '{"cells": []}', '[' * 100_000, '{"cells": 5}', '{"cells": [{"cell_type": "code", "source": 7}]}'])
def test_what_is_no_sheet_is_told_in_words(tmp_path, text):
    (tmp_path/'x.ipynb').write_text(text)
    m = grade(tmp_path/'x.ipynb')
    assert re.search('not a notebook|no cell that begins', m.problem) and str(tmp_path/'x.ipynb') in str(m)


def test_a_missing_file_is_told_in_words(tmp_path): assert 'cannot be read' in grade(tmp_path/'gone.ipynb').problem


def test_which_sheets(tmp_path):
    for name in 'b.ipynb', 'a.ipynb', '.ipynb_checkpoints/a.ipynb', 'notes.txt':
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).touch()
    ab = [tmp_path/'a.ipynb', tmp_path/'b.ipynb']
    assert find_sheets([tmp_path]) == find_sheets([tmp_path/'*.ipynb']) == find_sheets([tmp_path, ab[0]]) == ab
    with pytest.raises(FileNotFoundError): find_sheets([tmp_path/'c.ipynb'])


def test_seeds_differ(): assert len({new_seed() for _ in range(20)}) > 15


# ---------------------------------------------------------------- the sheets of the lessons

def code(path): return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
def exercise(source): return (m := re.search(r'^#\|\s*exercise:\s*(\S+)', source, re.M)) and m[1]


def test_every_exercise_is_on_one_sheet():
    found = [i for p in SHEETS for s in code(p) if (i := exercise(s))]
    assert sorted(found) == sorted(EXERCISES) and len(SHEETS) == 3
    for p in SHEETS: assert {exercise(s)[0] for s in code(p) if exercise(s)} == {p.stem[-1]}


@pytest.mark.parametrize('path', SHEETS, ids=lambda p: p.stem)
def test_stubs_have_the_signature_of_the_answer(path):
    for s in code(path):
        if i := exercise(s):
            assert signature(s) == signature(answer(i)) and made(s, EXERCISES[i].name).__doc__
            assert check(i, made(s, EXERCISES[i].name)).verdict == 'not answered'
            assert any(f"check('{i}', {EXERCISES[i].name})" in o for o in code(path))


def test_solved_sheets_run_from_top_to_bottom(tmp_path):
    "Every cell, those that show what was made among them; and the grade is full"
    solved = [cell(i) if (i := exercise(s)) else s for p in SHEETS for s in code(p)]
    script = tmp_path/'solved.py'
    assert '\n'.join(solved).count('torch.randn(1000, ') == 1
    script.write_text('\n'.join(re.sub(r'^(\s*)%.*$', r'\1pass', s, flags=re.M) for s in solved).replace('torch.randn(1000, ', 'torch.randn(200, '), encoding='utf-8')
    subprocess.run([sys.executable, script], check=True, timeout=300, env=os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg'), cwd=tmp_path)
    m = grade(sheet(tmp_path/'solved.ipynb', solved))
    assert m.points == m.of == sum(e.points for e in EXERCISES.values()), m


def test_sheets_are_saved_unsolved():
    for p in SHEETS:
        said = json.dumps([c.get('outputs') for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code'], ensure_ascii=False)
        assert '○' in said and '✔' not in said


# ---------------------------------------------------------------- the pages around them

PAGES = [ROOT/'nbs'/f'{o}.ipynb' for o in ('teaching', 'glossary', '18_exercises')] + SHEETS
HEADING = re.compile(r'^(#{1,6})\s+(.+?)(?:\s*\{#([\w-]+)\})?\s*$', re.M)


def prose(path): return [re.sub(r'```.*?```', '', ''.join(c['source']), flags=re.S) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown']


def anchors(path):
    "Addresses of the headings of a page, by the rule of Pandoc"
    out = []
    for _, text, given in HEADING.findall('\n'.join(prose(path))):
        text = re.sub(r'\[([^]]*)\]\([^)]*\)|[`*$]', r'\1', text)
        kept = ''.join(c.lower() for c in text if c.isalnum() or c.isspace() or c in '_-.')
        out.append(given or re.sub(r'^[^a-z]+', '', '-'.join(kept.split())) or 'section')
    return out


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_every_link_leads_somewhere(path):
    links = [o for text in prose(path) for o in re.findall(r'\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)', text)]
    assert links
    for file, anchor in links:
        target = (path.parent/file).resolve() if file else path
        assert target.is_file(), f'{path.name} links to {file}, which is not there'
        if anchor: assert anchor in anchors(target), f'{path.name} links to {file}#{anchor}; there is {anchors(target)}'


def test_glossary_is_whole():
    "Every word of the design has an address and a way to its chapter, in one or two sentences"
    text = '\n'.join(prose(ROOT/'nbs'/'glossary.ipynb'))
    terms, here = re.findall(r'^### (.+?)\n\n(.+?)$', text, re.M), anchors(ROOT/'nbs'/'glossary.ipynb')
    assert len(terms) == text.count('\n### ') + text.startswith('### ') >= 60 and len(set(here)) == len(here)
    assert not [h for h, t in terms if '→ [' not in t or not 20 < len(t.split('→')[0]) < 250]
    words = 'target reconstruction code residual step start average-code trunk head direction style w w-plus encoder generator inversion lpips identity truncation bootstrapping toonify distortion-editability'
    assert set(words.split()) <= set(here)
    assert {o for o in re.findall(r'\]\(#([^)]+)\)', text)} >= set(here) - {'glossary'} - {h for h in here if h in anchors_of_sections(text)}


def anchors_of_sections(text): return {re.sub(r'[^a-z-]', '', h.lower().replace(' ', '-')) for h in re.findall(r'^## (.+)$', text, re.M)}


def test_grade_command(tmp_path, capsys):
    from restyle_nb.cli import restyle_grade
    (tmp_path/'in').mkdir()
    sheet(tmp_path/'in'/'a.ipynb', [HEAD, cell('3.4'), cell('3.3', 'def edit(w, direction, strength, layers): ...')])
    (tmp_path/'in'/'b.ipynb').write_text('torn')
    assert restyle_grade([str(tmp_path/'in'), '--out', str(tmp_path/'out.csv'), '--seed', '4']) == 0
    said, rows = capsys.readouterr().out, list(csv.DictReader((tmp_path/'out.csv').open(encoding='utf-8-sig')))
    assert 'questions of seed 4' in said and '2 of 9 points' in said and 'damaged' in said and len(rows) == 5
    assert restyle_grade([str(tmp_path/'nothing')]) == 2 and 'no notebook there' in capsys.readouterr().err
