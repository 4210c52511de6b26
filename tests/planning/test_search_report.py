"""The report of a plan search: figures, images and limits."""

import dataclasses
import re

import numpy as np
import pytest

import evit_jax
from evit_jax.planning import image_search, search_report, speed_up
from evit_jax.planning.calibration import CalibrationImages
from evit_jax.planning.search import parse_target
from evit_jax.planning.speed_up import DENSE, SEARCHED, Settings, search_plans
from tests.helpers import tiny

TARGETS = tuple(map(parse_target, ('0.8MACs', '0.6MACs')))


def calibration(count, seed, labels=None):
    return CalibrationImages(tuple(f'photos/{seed}/{number}.jpg' for number in range(count)),
                             tiny.images(count, seed=seed), labels)


@pytest.fixture(scope='module', params=['classes', 'features'])
def searched(request):
    """Returns a model, the result of a search with two targets, and the images of the check."""
    has_classes = request.param == 'classes'
    config = dataclasses.replace(tiny.CONFIG, depth=4, classes=3 if has_classes else 0)
    model = evit_jax.create_model(config, **({'class_names': tiny.NAMES} if has_classes else {})).loaded
    check = calibration(10, 1, np.arange(10, dtype=np.int32) % 3 if has_classes else None)
    settings = Settings(TARGETS, ('prune_merge',), 0.01, measure=False)
    return model, search_plans(model, calibration(6, 0), check, settings), check


@pytest.fixture(scope='module')
def page(searched):
    return search_report.content(*searched, seed=7, command='python <plan>')


def rows_of(page):
    """Returns the rows of all tables, as lists of cells."""
    rows = re.findall(r'<tr[^>]*>(.*?)</tr>', page)
    return [re.findall(r'<t[dh][^>]*>(.*?)</t[dh]>', row) for row in rows]


def test_report_table_has_the_figures_of_the_result(searched, page):
    rows, result = rows_of(page), searched[1]
    header = rows[0]
    for target in result.targets:
        begin = rows.index([str(target.target)])
        for row, name in zip(rows[begin + 1:], [name for name in target.plans if name != DENSE]):
            cells, figures = dict(zip(header, row, strict=True)), target.plans[name].figures
            assert row[0] == name
            assert cells['error'] == f'{figures["error"]:.3g}'
            assert cells['90 % quantile'] == f'{figures["error_90"]:.3g}'
            assert cells['of dense'] == f'{figures["macs_fraction"]:.1%}'
            assert ('top-1' in cells) == ('same class' in cells) == (result.error_name == 'KL divergence')
            if 'top-1' in cells:
                assert cells['top-1'] == f'{figures["top1"]:.1%}'
    assert rows[1][:2] == ['dense', '0']


def test_searched_plan_with_a_larger_error_than_a_baseline_warns(searched, caplog):
    target = searched[1].targets[0]
    better = {name: checked._replace(figures={'error': 0.5 if name.startswith('ToMe') else 1.0})
              for name, checked in target.plans.items()}
    speed_up._warn_of_better_baselines([target._replace(plans=better)])
    assert ('0.8MACs: the error of the searched plan is 1, and that of ToMe, constant r with equal MACs is 0.5: give '
            'the search more minutes') in caplog.text
    caplog.clear()
    better[SEARCHED] = better[SEARCHED]._replace(figures={'error': 0.5})
    speed_up._warn_of_better_baselines([target._replace(plans=better)])
    assert not caplog.text


def test_report_sentence_names_target_error_and_macs(searched, page):
    _, result, _ = searched
    for target in result.targets:
        figures = target.plans[SEARCHED].figures
        assert (f'target {target.target}: {result.error_name} = {figures["error"]:.3g} on 10 images that the search '
                f'has not seen; {figures["macs"] / 1e9:.3g} GMACs, {figures["macs_fraction"]:.1%} of the dense'
                ) in page


def test_report_shows_images_from_best_to_worst_with_their_errors(searched, page):
    for target in searched[1].targets:
        errors = target.plans[SEARCHED].errors
        assert errors.mean() == pytest.approx(target.plans[SEARCHED].figures['error'])
        for rank, error in (('best', errors.min()), ('worst', errors.max())):
            assert f'{rank}: error {error:.3g} <span>1/{np.flatnonzero(errors == error)[0]}.jpg</span>' in page
    assert page.count('<img ') == len(TARGETS) * 8 * 4


def test_report_tells_how_the_search_ran_and_escapes_the_command(searched, page):
    for text in ('6 of the search, 10 others of the check', '<dd>7</dd>', 'python &lt;plan&gt;', 'prune_merge',
                 'They are not the accuracy on a task', 'Speeds were not measured'):
        assert text in page
    assert ('Accuracy is unknown' in page) == (searched[2].labels is None)


def test_report_with_measured_speeds_has_a_curve_and_a_column_of_them(searched):
    model, result, check = searched
    result = result._replace(targets=tuple(target._replace(plans={
        name: plan._replace(figures=plan.figures | {'measured_speed_up': 1.25, 'predicted_speed_up': 1.5})
        for name, plan in target.plans.items()}) for target in result.targets[:1]))
    page = search_report.content(model, result, check)
    assert '1.25x as fast as dense (measured); 1.50x as fast as dense (predicted)' in page
    assert rows_of(page)[1][-2:] == ['1.50x', '1.25x']
    assert 'Error against measured speed' in page and 'were measured on this machine only' in page


def test_report_loads_nothing_and_links_to_nothing(page):
    assert "default-src 'none'" in page
    text = re.sub(r'data:image/jpeg;base64,[\w+/=]*', '', page)
    assert not re.findall(r'https?:|//\w|@import|<script|<link|<a |src="[^"]|(?<!xlink:)href', text)


def test_write_replaces_the_file_and_leaves_no_other(searched, tmp_path):
    path = tmp_path / 'fast.html'
    path.write_text('old')
    search_report.write(path, *searched)
    assert path.read_text(encoding='utf-8').startswith('<!doctype html>')
    assert list(tmp_path.iterdir()) == [path]


def test_report_path_that_cannot_be_written_is_refused_before_the_search(tmp_path):
    with pytest.raises(ValueError, match=r'--report=.*it is a folder'):
        image_search.OutputFiles.of(None, str(tmp_path), TARGETS)


@pytest.mark.parametrize('count', [1, 2, 5, 8, 9, 200])
def test_ranked_images_go_from_the_smallest_to_the_largest_error(count):
    errors = np.random.default_rng(count).random(count)
    ranked = search_report.ranked_images(errors)
    indices = [index for index, _ in ranked]
    assert len(set(indices)) == len(indices) == min(count, 8)
    assert errors[indices].tolist() == sorted(errors[indices])
    assert {indices[0], indices[-1]} == {int(errors.argmin()), int(errors.argmax())}
