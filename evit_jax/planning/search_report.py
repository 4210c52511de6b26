"""Writes the report of a plan search: one HTML file with figures, curves and images."""

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from evit_jax.benchmarks import report
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.inference.compiled import CompiledModel
from evit_jax.models.config import size_text
from evit_jax.planning.calibration import CalibrationImages
from evit_jax.planning.cost_table import THIS_DEVICE
from evit_jax.planning.speed_up import DENSE, SEARCHED, SearchResult, TargetResult
from evit_jax.reduction.plan import TokenPlan
from evit_jax.runtime import storage
from evit_jax.viz.example import ReductionView
from evit_jax.viz.search_page import CheckedImage, PlanFigures, SearchPage, TargetPart, search_page

_NUM_IMAGES = 8  # number of images that the report shows for each target


def write(path: str | os.PathLike, model: LoadedModel, result: SearchResult, check: CalibrationImages, *,
          seed: int | None = None, command: str = '') -> None:
    """Writes the report atomically.

    Call `benchmarks.report.check_writable` before the search: a search takes minutes.

    Args:
      path: path of the HTML file.
      check: the images of the check of `search_plans`.
      seed: seed of the draw of images; None: not drawn at random.
      command: command line of the search; '': none.

    Raises:
      OSError: the file cannot be written.
    """
    storage.write_atomic(pathlib.Path(path).expanduser(), content(
        model, result, check, seed=seed, command=command).encode())


def content(model: LoadedModel, result: SearchResult, check: CalibrationImages, *, seed: int | None = None,
            command: str = '') -> str:
    """Returns the report as HTML; see `write`."""
    depth = model.config.depth
    after = sorted({max(depth // 4, 1), max(depth // 2, 1), depth})  # numbers of blocks
    name = _name_of(model)
    compiled = CompiledModel(model.fold_batchnorm(), _NUM_IMAGES)
    page = SearchPage(
        title=f'{name}: plan for {", ".join(str(each.target) for each in result.targets)}',
        error_name=result.error_name, dense=_plan_figures(result.targets[0].plans[DENSE]),
        targets=tuple(_target_part(name, result, each, _images(compiled, each, check, after))
                      for each in result.targets),
        stages=tuple(f'after block {blocks} of {depth}' for blocks in after), patch_size=model.config.patch_size,
        facts=_facts(model, result, seed, command), limits=_limits(result))
    return search_page(page)


def ranked_images(errors: np.ndarray) -> list[tuple[int, str]]:
    """Returns images spread over the errors, from the smallest to the largest: (index, name of the rank)."""
    order = np.argsort(errors, kind='stable')
    last = len(order) - 1
    ranks = np.linspace(0, last, min(_NUM_IMAGES, len(order))).round().astype(int)
    ranks[np.abs(ranks - last // 2).argmin()] = last // 2
    names = {last // 2: 'median', last: 'worst', 0: 'best'}
    return [(int(order[rank]), names.get(rank, f'rank {rank + 1} of {len(order)}')) for rank in ranks.tolist()]


def _images(compiled: CompiledModel, target: TargetResult, check: CalibrationImages,
            after: Sequence[int]) -> tuple[CheckedImage, ...]:
    """Returns the images to show. `after`: numbers of blocks after which the tokens are shown."""
    searched = target.plans[SEARCHED]
    ranked = ranked_images(searched.errors)
    indices = [index for index, _ in ranked]
    padded = np.resize(indices, _NUM_IMAGES)  # the compiled batch has a fixed size
    output = compiled.run('forward', check.images[padded], searched.plan)
    kept, token_of_patch = ([np.asarray(part) for part in parts] for parts in (output.kept, output.token_of_patch))
    return tuple(CheckedImage(
        '/'.join(pathlib.PurePath(check.names[index]).parts[-2:]), rank, float(searched.errors[index]),
        check.images[index],
        tuple(_tokens_after(blocks, searched.plan, kept, token_of_patch, number) for blocks in after))
        for number, (index, rank) in enumerate(ranked))


def _tokens_after(blocks: int, plan: TokenPlan, kept, token_of_patch, number: int) -> ReductionView:
    """Returns the tokens of an image after the first blocks."""
    reductions = sum(block < blocks for block in plan.reductions)
    if not reductions:
        return ReductionView(tuple(range(plan.patches)), None, None)
    return ReductionView(tuple(kept[reductions - 1][number].tolist()), None, None,
                         token_of_patch[reductions - 1][number])


def _target_part(name: str, result: SearchResult, target: TargetResult,
                 images: tuple[CheckedImage, ...]) -> TargetPart:
    plan = target.plans[SEARCHED].plan
    removed = [before - count for before, count in zip(plan.entering, plan.counts)]
    dropped = (plan.drop or (0,) * len(removed)) if plan.reducer.merges else removed
    merged = tuple(count - drop for count, drop in zip(removed, dropped))
    plans = {each: _plan_figures(checked) for each, checked in target.plans.items() if each != DENSE}
    return TargetPart(str(target.target), _sentence(name, result, target), f'Searched plan: {plan}.', plans, merged,
                      tuple(dropped), target.found.methods, images)


def _plan_figures(checked) -> PlanFigures:
    return PlanFigures(checked.figures, (checked.plan.patches, *checked.plan.counts))


def _sentence(name: str, result: SearchResult, target: TargetResult) -> str:
    figures = target.plans[SEARCHED].figures
    speeds = [f'{figures[key]:.2f}x as fast as dense ({kind})' for key, kind in (
        ('measured_speed_up', 'measured'), ('estimated_speed_up', 'estimate of the TPU compiler'),
        ('predicted_speed_up', 'predicted')) if key in figures]
    parts = [f'{result.error_name} = {figures["error"]:.3g} on {result.num_checked} images that the search has not '
             'seen',
             *speeds,
             f'{figures["macs"] / 1e9:.3g} GMACs, {figures["macs_fraction"]:.1%} of the dense model']
    return f'{name}, target {target.target}: {"; ".join(parts)}.'


def _facts(model: LoadedModel, result: SearchResult, seed: int | None, command: str) -> Mapping[str, str]:
    request, machine = result.request, report.machine()
    searches = '; '.join(
        f'{each.target}: {each.found.evaluated} plans in {each.found.seconds:.0f} s, '
        f'{"finished" if each.found.finished else "ended by the time limit"}, error {each.found.error:.3g}'
        for each in result.targets)
    facts = {
        'searches': searches,
        'images': f'{result.num_searched} of the search, {result.num_checked} others of the check',
        'seed': '' if seed is None else str(seed), 'time limit': f'{result.settings.minutes:g} minutes',
        'model': f'{model.path or model.name}, {size_text(model.image_size)} px, {request.patches} patches, '
                 f'{request.dtype}',
        'speeds': f'batch {request.batch}, ' + ('this machine' if request.device == THIS_DEVICE else request.device),
        'machine': f'{machine["processor"]}, {machine["cpus"]} CPUs, {machine["system"]}',
        'versions': ', '.join(f'{package} {version}' for package, version in machine['versions'].items())
                    + f', Python {machine["python"]}',
        'date': machine['date'], 'command': command}
    return {name: text for name, text in facts.items() if text}


def _limits(result: SearchResult) -> tuple[str, ...]:
    """Returns the restrictions of the figures, as sentences."""
    figures = result.targets[0].plans[SEARCHED].figures
    sentences = ['Errors compare the outputs with those of the dense model. They are not the accuracy on a task.']
    if 'top1' not in figures:
        sentences.append('Accuracy is unknown, because the images have no labels of classes of this model.')
    if 'measured_speed_up' in figures:
        sentences.append('Speeds were measured on this machine only, at one batch size. Other machines differ.')
    else:
        sentences.append('Speeds were not measured. MACs do not include all costs of a reduction.')
    sentences.append(f'The check has {result.num_checked} images. Images of another kind may have other errors.')
    if not all(each.found.finished for each in result.targets):
        sentences.append('The time limit ended a search. More minutes may find a better plan.')
    return tuple(sentences)


def _name_of(model: LoadedModel) -> str:
    return os.path.basename(os.path.normpath(model.path)) if model.path else model.name
