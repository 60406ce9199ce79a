"Verdicts: computed, kept in saved notebooks, read back as they were, and none of them missing from the report."
import json
from pathlib import Path

import pytest

from restyle_nb.replication import CLAIMS, MIME, Report, Verdict, read_verdicts, verdict

NBS = Path(__file__).resolve().parent.parent/'nbs'
KEY = 'C-naive'


def saved(folder, name, *verdicts):
    "A notebook that was saved with these verdicts"
    cells = [dict(cell_type='markdown', source=['# title']), dict(cell_type='code', source=[], outputs=[dict(output_type='stream', text=['hi'])])]
    cells += [dict(cell_type='code', source=[], outputs=[dict(output_type='execute_result', data=v._repr_mimebundle_())]) for v in verdicts]
    path = folder/'analysis'/f'{name}.ipynb'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(cells=cells)), encoding='utf-8')


@pytest.mark.parametrize('held, expected', [((True, True), 'reproduced'), ((True, False), 'partly'), ((False, False), 'not at this scale')])
def test_the_verdict_follows_from_the_checks(held, expected):
    assert verdict(KEY, 't', dict(zip('ab', held)), {}).verdict == expected


def test_tensors_and_arrays_count_as_computed():
    import numpy as np
    import torch
    v = verdict(KEY, 't', dict(a=torch.tensor(True), b=np.bool_(True)), dict(x=torch.tensor(2.), y=(np.float64(1), 0, torch.tensor(3.))))
    assert v.verdict == 'reproduced' and v.numbers == dict(x=(2.,), y=(1., 0., 3.))
    json.dumps(v._repr_mimebundle_())


@pytest.mark.parametrize('kw, says', [
    (dict(claim='C-naiv'), 'no claim'), (dict(checks={}), 'no check'), (dict(checks=dict(a='yes')), 'expected true or false'),
    (dict(numbers=dict(a=(1., 2.))), '2 parts'), (dict(numbers=dict(a=(5., 1., 2.))), 'interval'), (dict(numbers=dict(a=(float('nan'), 0., 1.))), 'interval'),
])
def test_what_was_not_measured_is_refused(kw, says):
    with pytest.raises(ValueError, match=says): verdict(**(dict(claim=KEY, test='t', checks=dict(a=True), numbers={}) | kw))


def test_a_notebook_gives_back_what_it_was_saved_with(tmp_path):
    v = verdict(KEY, 'a test', {'moves away': True, 'and on': False}, {'L2': (.5, .4, .6), 'n': 3}, 'because')
    saved(tmp_path, 'one', v)
    [back] = read_verdicts(tmp_path).values()
    assert back == Verdict(**{**v.__dict__, 'page': 'analysis/one.ipynb'}) and back.verdict == 'partly'


def test_one_claim_on_two_pages_is_refused(tmp_path):
    v = verdict(KEY, 't', dict(a=True), {})
    saved(tmp_path, 'one', v)
    saved(tmp_path, 'two', v)
    with pytest.raises(ValueError, match='one.ipynb and in analysis/two.ipynb'): read_verdicts(tmp_path)


def test_the_report_has_a_row_for_every_claim():
    v = verdict(KEY, 't', dict(a=True), {'L2': (.5, .4, .6)})
    v.page = 'analysis/naive_feedback.ipynb'
    report = Report({KEY: v})
    rows = report._repr_markdown_().splitlines()[2:]
    assert len(rows) == len(CLAIMS) and sum('not tested' in o for o in rows) == len(CLAIMS) - 1
    row = rows[list(CLAIMS).index(KEY)]
    assert '0.5 (0.4 to 0.6)' in row and f'[{CLAIMS[KEY][1]}](analysis/naive_feedback.ipynb)' in row


def test_every_claim_of_the_paper_was_tested():
    found = read_verdicts(NBS)
    assert set(found) == set(CLAIMS)
    assert all(v.numbers and v.why for v in found.values())


def test_the_report_says_what_the_notebooks_say():
    "claims.ipynb is not stale: its saved table is the one the saved notebooks make now"
    cells = json.loads((NBS/'claims.ipynb').read_text(encoding='utf-8'))['cells']
    tables = [''.join(o['data']['text/markdown']) for c in cells for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})]
    assert Report(read_verdicts(NBS))._repr_markdown_() in tables
