"""The notebooks, run from the first to the last cell."""

import json

import pytest

import evit_jax
from tests.helpers import pages

NOTEBOOKS = sorted((pages.ROOT / 'notebooks').glob('*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_small_outputs_and_no_errors(path):
    outputs = [output for cell in json.loads(path.read_text())['cells'] for output in cell.get('outputs', ())]
    assert path.stat().st_size < 200_000
    assert not [output for output in outputs if output['output_type'] == 'error']


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_with_weights(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    pytest.importorskip('ipykernel')
    evit_jax.create_model('vit_digits', num_classes=10).save(tmp_path / 'weights')
    monkeypatch.setenv('EVIT_WEIGHTS', str(tmp_path / 'weights'))
    monkeypatch.setenv('PYTHONPATH', str(pages.ROOT))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, resources={'metadata': {'path': tmp_path}}).execute()
