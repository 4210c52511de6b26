"""The plan search on images as a whole: reads the images, searches, prints the figures, writes plans and report."""

import os
import pathlib
from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

from absl import logging

from evit_jax.benchmarks import report
from evit_jax.checkpoints import model_digest
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.models.config import size_text
from evit_jax.planning import calibration, search_report, speed_up
from evit_jax.planning.calibration import CalibrationImages
from evit_jax.planning.fidelity_search import Found
from evit_jax.planning.search import Target
from evit_jax.planning.speed_up import SEARCHED, SearchResult, Settings, TargetResult
from evit_jax.reduction.plan_file import PlanFile

_FEW = 32  # number of images below which the errors are mostly noise
_JOURNAL = '.search'


class Files(NamedTuple):
    """The images of a search, as paths, Pillow images or arrays."""

    search: Sequence            # images of the search
    check: Sequence             # images of the check; (): those that the search does not use
    num_search: int = 64        # number of images that the search uses
    num_check: int = 128        # number of images that the check uses
    seed: int = 0               # seed of the draw

    def read(self, model: LoadedModel) -> tuple[CalibrationImages, CalibrationImages]:
        """Reads the images of the search and of the check. No image is in both.

        Raises:
          ValueError: there are not enough readable images.
        """
        if self.check:
            check = calibration.read(self.check, model, self.num_check, seed=self.seed)
            checked = {os.path.realpath(name) for name in check.names}
            others = [file for file in self.search
                      if not isinstance(file, str | os.PathLike) or os.path.realpath(file) not in checked]
            if not others:
                raise ValueError('all images of the search are images of the check: give other images')
            search = calibration.read(others, model, self.num_search, seed=self.seed)
            _warn_of_few(search)
            return search, check
        both = calibration.read(self.search, model, self.num_search + self.num_check, seed=self.seed)
        if len(both.names) < 2:
            raise ValueError('one image is not enough: the plan is searched on some images and checked on others')
        count = min(self.num_search, max(2 * len(both.names) // 3, 1))
        _warn_of_few(both.part(0, count))
        return both.part(0, count), both.part(count, len(both.names))


def _warn_of_few(search):
    if len(search.names) < _FEW:
        logging.warning('the plan is searched on %d images only: with fewer than %d, the figures depend on chance',
                        len(search.names), _FEW)


class OutputFiles(NamedTuple):
    """The files that a search writes. An empty path writes nothing."""

    plans: tuple[str, ...] = ()  # one file for each target
    report: str = ''
    journal: str = ''            # errors of evaluated plans, from which an interrupted search continues
    command: str = ''            # command line of the search, for the report; '': none

    @classmethod
    def of(cls, out: str | None, report_file: str | None, targets: Sequence[Target],
           command: str = '') -> 'OutputFiles':
        """Returns the files for the paths of a plan and a report. With several targets, a plan's name has its target.

        Raises:
          ValueError: a file cannot be written.
        """
        plans = ()
        if out:
            path = pathlib.Path(out)
            plans = (out,) if len(targets) == 1 else tuple(
                os.fspath(path.with_name(f'{path.stem}-{str(target).replace("/", "-per-")}{path.suffix}'))
                for target in targets)
        for name, file in (*(('--out', plan) for plan in plans), ('--report', report_file)):
            report.check_writable(name, file)
        return cls(plans, report_file or '', f'{out}{_JOURNAL}' if out else '', command)


def run(model: LoadedModel, files: Files, settings: Settings, outputs: OutputFiles) -> SearchResult:
    """Searches, and writes plans and report. A plan is written when it is found, and again with its figures."""
    images, check = files.read(model)
    paths = dict(zip(settings.targets, outputs.plans))

    def write(target, found, figures=MappingProxyType({})):
        if path := paths.get(target):
            report.write_json(path, plan_content(model, target, found) | figures)

    result = speed_up.search_plans(model, images, check, settings._replace(journal=outputs.journal), write)
    for each in result.targets:
        write(each.target, each.found, figures_content(result, each))
    if outputs.report:
        search_report.write(outputs.report, model, result, check, seed=files.seed, command=outputs.command)
    return result


def plan_content(model: LoadedModel, target: Target, found: Found) -> dict:
    """Returns the content of the plan file of a target: the plan, and how it was found."""
    plan_file = PlanFile.of(
        found.plan, model.name, model.image_size, reducer=found.plan.reducer.name,
        architecture=model_digest.digest_of_architecture(model.config),
        weights=model_digest.digest_of_weights(model.params))
    return plan_file.metadata() | {
        'target': str(target), 'weights_path': model.path,
        'search': {'error': found.error, 'plans': found.evaluated, 'seconds': found.seconds,
                   'finished': found.finished, 'methods': found.methods}}


def figures_content(result: SearchResult, target: TargetResult) -> dict:
    """Returns the figures of a target for its plan file."""
    return {'request': result.request.metadata(), 'error': result.error_name,
            'images': {'search': result.num_searched, 'check': result.num_checked},
            'figures': {name: {'plan': str(checked.plan), **checked.figures}
                        for name, checked in target.plans.items()}}


def summary(model: LoadedModel, result: SearchResult) -> str:
    """Returns a table of all plans as text."""
    columns = {'error': (result.error_name, '{:.3f}'), 'agreement': ('same class', '{:.1%}'),
               'top1': ('top-1', '{:.1%}'), 'macs_fraction': ('MACs', '{:.3f}'), 'tokens': ('tokens', '{:.1%}'),
               'predicted_speed_up': ('predicted', '{:.2f}x'), 'estimated_speed_up': ('estimated', '{:.2f}x'),
               'measured_speed_up': ('measured', '{:.2f}x'), 'measured_images_per_second': ('images/s', '{:,.1f}')}
    rows = [(f'{result_of.target}: {name}' if name != speed_up.DENSE else name, checked.figures)
            for result_of in result.targets for name, checked in result_of.plans.items()]
    rows = list(dict(rows).items())
    present = [key for key in columns if any(key in figures for _, figures in rows)]
    table = report.table(('', *(columns[key][0] for key in present)), [
        (name, *(columns[key][1].format(figures[key]) if key in figures else '' for key in present))
        for name, figures in rows])
    request, size = result.request, size_text(result.request.image_size)
    plans = '\n'.join(f'{each.target}: {each.plans[SEARCHED].plan}' for each in result.targets)
    return (f'{model.path or model.name}, {size} px, batch {request.batch}, {request.dtype}; searched on '
            f'{result.num_searched} images, checked on {result.num_checked} others\n{plans}\n{table}')
