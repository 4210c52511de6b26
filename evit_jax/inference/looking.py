"""What a model makes of images at several keep rates, ready to be drawn."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evit_jax.data.progress import Progress
from evit_jax.inference.predictor import Picture, Prediction, Predictor
from evit_jax.reduction.plan import TokenPlan
from evit_jax.viz.example import Example, Setting, Stage, View

_GUESSES = 3


class Subject(NamedTuple):
    """An image to look at."""

    name: str
    picture: Picture
    truth: str | None  # name of its class


def settings_of(predictor: Predictor, rates: Sequence[float]) -> list[tuple[TokenPlan, Setting]]:
    """The plan of each rate, and what is said of it.

    Raises:
      ValueError: a rate out of range, or a model that drops nothing at any block.
    """
    trained = predictor.trained
    dense = trained.config.macs(trained.plan(rate=1.0))
    found = []
    for rate in rates:
        plan = trained.plan(rate=rate)
        counts = (plan.patches, *(plan.counts[block] for block in sorted(trained.budget.reduce_at)))
        macs = trained.config.macs(plan)
        found.append((plan if plan.reductions else ranking_plan(plan, trained.budget.reduce_at),
                      Setting(f'{rate:g}', counts, macs, macs / dense, trained=plan == trained.plan())))
    return found


def ranking_plan(plan: TokenPlan, at: Sequence[int]) -> TokenPlan:
    """A plan that ranks all tokens at these blocks and keeps every one: nothing is computed but what dense does."""
    return TokenPlan(plan.patches, tuple(plan.patches if block in at else None for block in range(len(plan.keep))),
                     fused=False, reducer=plan.reducer)


def look(predictor: Predictor, subjects: Sequence[Subject],
         rates: Sequence[float]) -> tuple[list[Example], list[Setting], list[str]]:
    """Runs every image at every rate.

    Returns:
      What was seen of each image that could be read, what the rates mean, and why the others could not be read.

    Raises:
      ValueError: as `settings_of`.
    """
    plans = settings_of(predictor, rates)
    progress = Progress('looking', len(subjects) * len(rates), 'pictures')
    views: list[list[Prediction]] = []
    for plan, _ in plans:
        views.append([])
        for prediction in predictor.stream((subject.picture for subject in subjects), plan=plan, top=_GUESSES):
            views[-1].append(prediction)
            progress.add(1)
    examples, problems = [], []
    for subject, *seen in zip(subjects, *views, strict=True):
        if problem := next((prediction.problem for prediction in seen if prediction.problem), ''):
            problems.append(f'{subject.name}: {problem}')
            continue
        of_rates = tuple(_view(prediction, plan, predictor.trained.budget.reduce_at, subject.truth)
                         for prediction, (plan, _) in zip(seen, plans))
        examples.append(Example(subject.name, seen[0].image, subject.truth, of_rates))
    return examples, [setting for _, setting in plans], problems


def _view(prediction: Prediction, plan: TokenPlan, at: Sequence[int], truth: str | None) -> View:
    """One image at one rate; where a reduction drops nothing, what came to it stays."""
    stages, kept = [], tuple(range(plan.patches))
    token_of_patch = np.arange(plan.patches) if plan.reducer.merges else None
    for block in sorted(at):
        if block not in plan.reductions:
            stages.append(Stage(kept, None, None, token_of_patch))
            continue
        number = plan.reductions.index(block)
        kept = tuple(prediction.kept[number].tolist())
        token_of_patch = prediction.token_of_patch[number] if plan.reducer.merges else None
        stages.append(Stage(kept, prediction.attention[number] if prediction.attention else None,
                            prediction.origin[number] if plan.fused else None, token_of_patch))
    best = prediction.top[0].name
    return View(tuple((guess.name, guess.probability) for guess in prediction.top), tuple(stages),
                None if truth is None else best == truth)
