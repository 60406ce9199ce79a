"The explorer as a dashboard: Voila runs the notebook and shows its results without the code."
import pytest
from browser import Part, browser, contrasts, latency, look, new_page, quick, serving, shot, until, until_changed, write_notebook
from restyle_nb.images import save_image
from restyle_nb.zoo import held_out


@pytest.fixture(scope='module')
def dashboard(tmp_path_factory):
    home = tmp_path_factory.mktemp('voila')
    write_notebook(home/'dashboard.ipynb', 'from restyle_nb.widgets import Explorer', 'Explorer()')
    with serving('voila', 'dashboard.ipynb', '--Voila.ip=127.0.0.1', folder=home, ready='/voila/static/voila.js') as url: yield url


def from_elsewhere(complaint): return 'Failed to load resource' in complaint and 'fontawesome' in complaint   # Voila's page asks the network for icons


def test_dashboard(browser, dashboard, tmp_path):
    "In the dark theme, where more can go wrong"
    page = new_page(browser)
    page.goto(f'{dashboard}/?theme=dark')
    explorer = Part(page, '.restyle-explorer')
    explorer.says('held-out 0: 5 steps with faces64')
    assert not page.get_by_text('from restyle_nb.widgets').count()
    assert not [(t, round(c, 1)) for t, c in contrasts(explorer.root) if c < 4.5]

    def moves():
        explorer.press('step', 'Home')
        until(lambda: explorer.step_shown() == 0, 'step 0')
        return [latency(explorer, 'reconstruction', 'ArrowRight') for _ in range(5)]
    quick(moves)
    assert explorer.step_shown() == 5

    before = look(explorer.image('input'))
    explorer.upload(save_image(held_out(12)[11], tmp_path/'face.png'))
    explorer.says('face.png: 5 steps')
    until_changed(explorer.image('input'), before)
    explorer.choose('model', 'faces64-restyle-e4e')
    explorer.says('with faces64-restyle-e4e')
    shot(page, 'voila')
    assert not [c for c in page.complaints if not from_elsewhere(c)]
    page.context.close()
