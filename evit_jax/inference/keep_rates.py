"""Predicts images at several keep rates, and returns the results as examples that `viz` draws."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evit_jax.data.progress import Progress
from evit_jax.inference.model import VisionModel
from evit_jax.inference.pictures import Picture
from evit_jax.inference.prediction import Prediction
from evit_jax.reduction.plan import TokenPlan
from evit_jax.viz.example import Example, ReductionView, Setting, View

_GUESSES = 3


class LabelledImage(NamedTuple):
    """An image to predict and draw."""

    name: str
    picture: Picture
    truth: str | None  # name of the true class; None if unknown


def settings_of(model: VisionModel, rates: Sequence[float]) -> list[tuple[TokenPlan, Setting]]:
    """Returns the plan of each keep rate, and its description for the page.

    Raises:
      ValueError: a rate is out of range, or the model reduces at no block.
    """
    loaded = model.loaded
    dense = loaded.config.macs(loaded.plan(keep_rate=1.0))
    settings = []
    for rate in rates:
        plan = loaded.plan(keep_rate=rate)
        counts = (plan.patches, *(plan.counts[block] for block in sorted(loaded.budget.reduce_at)))
        macs = loaded.config.macs(plan)
        settings.append((plan if plan.reductions else ranking_plan(plan, loaded.budget.reduce_at),
                         Setting(f'{rate:g}', counts, macs, macs / dense, trained=plan == loaded.plan())))
    return settings


def ranking_plan(plan: TokenPlan, reduce_at: Sequence[int]) -> TokenPlan:
    """Returns a plan that ranks the tokens at the blocks and keeps them all. The logits equal the dense model's."""
    return TokenPlan(plan.patches, tuple(plan.patches if block in reduce_at else None
                                         for block in range(len(plan.keep))), fused=False, reducer=plan.reducer)


def predict_examples(model: VisionModel, images: Sequence[LabelledImage],
         rates: Sequence[float]) -> tuple[list[Example], list[Setting], list[str]]:
    """Predicts every image at every keep rate.

    Returns:
      An example for each readable image, the setting of each rate, and a message for each unreadable image.

    Raises:
      ValueError: see `settings_of`.
    """
    plans = settings_of(model, rates)
    progress = Progress('predicting', len(images) * len(rates), 'pictures')
    by_plan: list[list[Prediction]] = []
    for plan, _ in plans:
        by_plan.append([])
        pictures = (labelled.picture for labelled in images)
        for prediction in model.with_plan(plan=plan).stream(pictures, top=_GUESSES):
            by_plan[-1].append(prediction)
            progress.add(1)
    examples, problems = [], []
    for labelled, *predictions in zip(images, *by_plan, strict=True):
        if problem := next((prediction.problem for prediction in predictions if prediction.problem), ''):
            problems.append(f'{labelled.name}: {problem}')
            continue
        views = tuple(_view(prediction, plan, model.loaded.budget.reduce_at, labelled.truth)
                      for prediction, (plan, _) in zip(predictions, plans))
        examples.append(Example(labelled.name, predictions[0].image, labelled.truth, views))
    return examples, [setting for _, setting in plans], problems


def _view(prediction: Prediction, plan: TokenPlan, reduce_at: Sequence[int], truth: str | None) -> View:
    """Returns the view of one image at one keep rate. A block that drops nothing shows the tokens it receives."""
    stages, kept = [], tuple(range(plan.patches))
    token_of_patch = np.arange(plan.patches) if plan.reducer.merges else None
    for block in sorted(reduce_at):
        if block not in plan.reductions:
            stages.append(ReductionView(kept, None, None, token_of_patch))
            continue
        reduction = plan.reductions.index(block)
        kept = tuple(prediction.kept[reduction].tolist())
        token_of_patch = prediction.token_of_patch[reduction] if plan.reducer.merges else None
        stages.append(ReductionView(kept, prediction.attention[reduction] if prediction.attention else None,
                            prediction.fused_weights[reduction] if plan.fused else None, token_of_patch))
    best = prediction.top[0].name
    return View(tuple((guess.name, guess.probability) for guess in prediction.top), tuple(stages),
                None if truth is None else best == truth)
