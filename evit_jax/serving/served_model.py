"""A model as the server describes it: preprocessing, classes, and the token plans that it serves by name."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.data.names import in_one_line
from evit_jax.data.transforms.geometry import EvalTransform
from evit_jax.reduction.plan import TokenPlan, make_plan
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.serving import manifest as manifests

DEFAULT_RATES = 0.3, 0.5, 0.7, 1.0
DENSE = 'dense'


class ServedModel(NamedTuple):
    """The description of a served model."""

    name: str
    path: str
    engine: str                    # name of the engine that computes it
    class_names: tuple[str, ...]   # empty: the model returns features
    image_size: tuple[int, int]    # height and width of the input
    patch_size: int
    transform: EvalTransform
    plans: dict[str, dict[str, Any]]  # name -> entry of the manifest, with the keep rate or None as `rate`
    default: str                   # name of the default plan
    returns_kept: bool             # True if the programs return the kept patches and the class attention

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any], path: str, engine: str) -> 'ServedModel':
        """Returns the description of an exported model; see `manifests`."""
        image, plans = manifest['image'], manifest['plans']
        transform = EvalTransform(tuple(image['size']), crop=image['crop'], interpolation=image['interpolation'])
        return cls(manifest['model']['name'], path, engine, tuple(manifest['class_names']), tuple(image['size']),
                   manifest['model']['patch_size'], transform,
                   {name: {'rate': _rate(name, entry)} | {key: value for key, value in entry.items() if key != 'file'}
                    for name, entry in plans.items()},
                   manifest['default'], manifest['kept'])

    @classmethod
    def of_loaded(cls, loaded: LoadedModel, plans: Mapping[str, TokenPlan], engine: str) -> 'ServedModel':
        """Returns the description of a model in memory."""
        manifest = manifests.entries(loaded, weights='', kept=True, ema=False, packages=())
        manifest |= {'default': manifests.default_plan(loaded, plans),
                     'plans': {name: manifests.plan_entry(loaded, plan) for name, plan in plans.items()}}
        return cls.of_manifest(manifest, loaded.path, engine)

    @property
    def dense(self) -> str | None:
        """Name of the plan that drops nothing; None if it is not served."""
        return next((name for name, entry in self.plans.items() if not entry['reductions']), None)

    @property
    def reducer(self) -> str:
        """Reducer of the default plan."""
        return self.plans[self.default]['reducer']

    def find_plan(self, plan: str | None = None, rate: float | None = None, reducer: str | None = None) -> str:
        """Returns the name of a requested plan; without arguments, the default plan.

        Args:
          plan: name of the plan; excludes the other arguments.
          rate: keep rate. A rate of 1 is the dense plan.
          reducer: name of the reducer of the rate; None: the reducer of the default plan.

        Raises:
          ValueError: the model has no such plan.
        """
        names = ', '.join(self.plans)
        if plan is not None and (rate is not None or reducer is not None):
            raise ValueError('give either plan, or rate and reducer')
        if plan is not None:
            if plan not in self.plans:
                raise ValueError(f'there is no plan {in_one_line(plan)!r}, there are {names}')
            return plan
        if rate is None:
            if reducer not in (None, self.reducer):
                raise ValueError(f'reducer={in_one_line(reducer)} needs a rate: add rate=0.5')
            return self.default
        if rate == 1 and self.dense:
            return self.dense
        for name, entry in self.plans.items():
            if entry['rate'] == rate and entry['reducer'] == (reducer or self.reducer):
                return name
        raise ValueError(f'there is no plan of rate {rate:g} and reducer {in_one_line(reducer or self.reducer)}, '
                         f'there are the plans {names}')


def plans_of(loaded: LoadedModel, *, rates: Sequence[float] | None = None, reducers: Sequence[str] = (),
             files: Mapping[str, PlanFile] | None = None) -> dict[str, TokenPlan]:
    """Returns the plans that the server compiles, by name. The dense plan and the plan of training are always included.

    Args:
      rates: keep rates; None: `DEFAULT_RATES` that the reducers support, if the model reduces tokens at any block.
      reducers: reducers besides that of the model. Their plans are named 'tome-0.5'; rates that they do not support are
        left out with a warning.
      files: name -> plan file.

    Raises:
      ValueError: a rate is out of range, a reducer is unknown or does not fit, or a plan is for another model.
    """
    patches, depth = loaded.config.patches(loaded.image_size), loaded.config.depth
    plans = {}
    for reducer in dict.fromkeys((loaded.budget.reducer.name, *reducers)):
        own = reducer == loaded.budget.reducer.name
        model = loaded if own else loaded.with_reducer(reducer)
        least = model.budget.reducer.min_kept(patches) / patches
        for rate in _default_rates(loaded, least) if rates is None else rates:
            if rate < least and not own:
                logging.warning('--reducers: %s keeps at least %.3g of the tokens, rate %s is left out', reducer, least,
                                rate)
                continue
            plan = model.plan(keep_rate=rate)
            if own or plan.reductions:
                plans[str(rate) if own else f'{reducer}-{rate}'] = plan
    for name, file in (files or {}).items():
        if name in plans:
            raise ValueError(f'--plan={file.path} gives the name {name}, which another plan has: rename the file')
        plans[name] = loaded.plan(plan=file)
    trained, dense = manifests.plan_of_training(loaded), make_plan(patches, depth, reduce_at=())
    if trained is not None and trained not in plans.values():
        plans['trained'] = trained
    if all(plan.reductions for plan in plans.values()):
        plans[DENSE] = dense
    return plans


def _default_rates(loaded, least):
    if not loaded.budget.reduce_at:
        return ()
    rates = {*DEFAULT_RATES, loaded.budget.rate} - {None}
    return sorted(rate for rate in rates if rate >= least)


def _rate(name, entry):
    """Returns the keep rate in the name of a plan; None if it has none, as that of a plan file."""
    try:
        rate = float(name.removeprefix(f'{entry["reducer"]}-'))
    except ValueError:
        return None
    return rate if 0 < rate <= 1 else None
