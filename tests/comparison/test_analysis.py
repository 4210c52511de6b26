"""The analysis of a comparison from recorded cells, and its report."""

import html.parser
import json

import numpy as np
import pytest

from evit_jax.comparison import analysis, recording
from evit_jax.comparison.recording import Record
from tests.helpers import program_modules

compare = program_modules.module_fixture('compare')
IMAGES, PATCHES = 8, 16
METHODS = ('EViT', 'random', 'ToMe', 'pooling', 'least')


def groups_of(method, rng):
    if method in ('ToMe', 'pooling'):
        return rng.integers(0, 6, (2, IMAGES, PATCHES))
    kept = np.stack([rng.permutation(PATCHES) for _ in range(2 * IMAGES)]).reshape(2, IMAGES, PATCHES)
    return np.where(kept < 8, kept, -1)


@pytest.fixture
def folder(tmp_path):
    """Returns the folder of a comparison with a dense cell and five methods without training."""
    rng, rows = np.random.default_rng(0), []
    dense = rng.normal(size=(IMAGES, 5))
    for number, method in enumerate(('dense', *METHODS)):
        cell = analysis.Cell('untrained', method, 0.5 if number else 1.0, 0)
        rows.append(cell._asdict() | {'top1': 0.9 - 0.1 * number})
        groups = groups_of(method, rng) if number else np.zeros((0, IMAGES, PATCHES))
        recording.write(Record(groups.astype(np.int16), np.asarray([1, 2][:len(groups)], int),
                               dense + 0.3 * number * rng.normal(size=dense.shape), np.asarray([4, 4]), np.asarray(3)),
                        tmp_path / cell.name)
    rows.append({'setting': 'finetuned', 'method': 'EViT', 'share': 0.5, 'seed': 0, 'top1': 0.9})  # without a record
    (tmp_path / 'compare.json').write_text(json.dumps({'rows': rows}))
    return tmp_path


def test_analyse_compares_methods_that_hide_and_methods_that_merge(folder):
    result, = analysis.analyse(folder)
    assert result.setting == 'untrained' and list(result.figures) == [f'{method} 50' for method in METHODS]
    assert set(result.overlaps) == {('EViT 50', 'random 50'), ('EViT 50', 'least 50'), ('random 50', 'least 50')}
    assert list(result.groups) == [('ToMe 50', 'pooling 50')]
    assert set(result.depths) == {'EViT 50', 'random 50', 'least 50'}
    assert 0 < result.figures['EViT 50']['overlap'] < 1 and 'nmi' not in result.figures['EViT 50']
    assert result.correlations['cka'] == (pytest.approx(1), 5) and result.correlations['procrustes'][0] < -0.5
    assert 'nmi' not in result.correlations  # two cells are too few


def test_analyse_of_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'holds no compare\.json'):
        analysis.analyse(tmp_path)
    (tmp_path / 'compare.json').write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r'no cell with recorded tokens: run the comparison with config\.record=256'):
        analysis.analyse(tmp_path)


def test_analyse_without_scikit_learn_is_refused_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis.similarity.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"--analyse needs .* scikit-learn: pip install 'evit_jax\[analysis\]'"):
        analysis.analyse(tmp_path)


def test_write_analysis_writes_tables_json_and_an_offline_page(folder, compare):
    text = compare.write_analysis(folder)
    assert '| EViT 50 | 0.800 |' in text and 'rank correlation with top1' in text
    assert (folder / 'analysis.md').read_text() == text
    content = json.loads((folder / 'analysis.json').read_text())['settings'][0]
    assert content['groups']['ToMe 50 | pooling 50'].keys() == {'homogeneity', 'completeness', 'nmi'}
    page = (folder / 'analysis.html').read_text()
    html.parser.HTMLParser().feed(page)
    assert page.count('<figure>') == 3 and '://' not in page and 'Overlap (IoU) of the kept patches' in page
