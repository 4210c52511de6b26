"""JSON files with a token plan and the model that it was made for."""

import json
import os
import pathlib
from typing import Any, NamedTuple

from absl import logging

from evit_jax.reduction.plan import TokenPlan, make_plan
from evit_jax.reduction.plan_checks import by_depth
from evit_jax.reduction.reducer import Reducer
from evit_jax.reduction.reducers import EVIT
from evit_jax.reduction.registry import get_reducer

_TEXTS = 'model', 'reducer', 'architecture', 'weights'


class PlanFile(NamedTuple):
    """The content of a plan file. `evit_jax.plan` writes plan files; other programs read them."""

    model: str                         # name of the model
    image_size: int | tuple[int, int]  # side of the images, or (height, width), in pixels
    patches: int
    depth: int
    reduce_at: tuple[int, ...]
    tokens: tuple[int, ...]     # number of tokens kept at each reduction
    fuse: bool
    reducer: str = ''           # name of the reducer; '': the reducer of the model or run
    drop: tuple[int, ...] = ()  # number of tokens dropped at each reduction before others merge; (): none
    architecture: str = ''      # `digest_of_architecture` of the model; '': unknown, the names are compared
    weights: str = ''           # `digest_of_weights` of the parameters; '': unknown
    path: str = ''              # path of the file, for messages

    @classmethod
    def of(cls, plan: TokenPlan, model: str, image_size: int | tuple[int, int], *, reducer: str = '',
           architecture: str = '', weights: str = '') -> 'PlanFile':
        """Returns the content of a plan file for a plan. Give the reducer if the plan was searched for it."""
        return cls(model, image_size, plan.patches, len(plan.keep), plan.reductions, plan.tokens, plan.fused, reducer,
                   plan.dropped, architecture, weights)

    def metadata(self) -> dict[str, Any]:
        """Returns the content as a dict for JSON."""
        return {name: value for name, value in self._asdict().items() if name != 'path'}

    def plan(self) -> TokenPlan:
        """Returns the token plan. A file that names no reducer gives a plan of EViT.

        Raises:
          ValueError: a count is out of range, there is no such reducer, or it cannot drop tokens.
        """
        return make_plan(self.patches, self.depth, tokens=self.tokens, drop=self.drop, reduce_at=self.reduce_at,
                         fuse=self.fuse, reducer=self._reducer())

    def is_for(self, model: str, architecture: str) -> bool:
        """Returns True if the plan was made for this architecture; for this model name if the file has no digest."""
        return self.architecture == architecture if self.architecture else self.model == model

    def for_model(self, model: str, patches: int, depth: int, architecture: str) -> 'PlanFile':
        """Checks that the plan fits a model, and rescales a searched plan to another number of patches.

        Args:
          model: name of the model.
          patches: number of patches of an image.
          depth: number of blocks.
          architecture: `model_digest.digest_of_architecture` of the model.

        Returns:
          This plan, or the rescaled plan; a warning names both numbers of patches.

        Raises:
          ValueError: the plan was made for another model; or for another number of patches, and names no reducer.
        """
        is_size = self.patches == patches or self.reducer
        if not (self.is_for(model, architecture) and self.depth == depth and is_size):
            own, other = ((f' (architecture {self.architecture})', f' (architecture {architecture})')
                          if self.architecture else ('', ''))
            raise ValueError(f'the plan {self.path} is for {self.model}{own} with {self.patches} patches and '
                             f'{self.depth} blocks, and this is {model}{other} with {patches} patches and {depth} '
                             f'blocks: make one with python -m evit_jax.plan --model={model}')
        if self.patches == patches:
            return self
        logging.warning('the plan %s was searched for %d patches, and an image has %d: its counts are scaled; a search '
                        'for this image size may find a better plan', self.path, self.patches, patches)
        return self.for_patches(patches)

    def for_patches(self, patches: int) -> 'PlanFile':
        """Returns this plan for another number of patches; `image_size` is unchanged.

        All counts are multiplied by the ratio of the patches, rounded, and limited to what the reducer can do.
        """
        ratio, reducer, n, counts = patches / self.patches, self._reducer(), patches, []
        for block, keep, drop in sorted(zip(self.reduce_at, self.tokens, self.drop or (0,) * len(self.tokens),
                                            strict=True)):
            keep = min(max(round(ratio * keep), 1), n)
            drop = min(round(ratio * drop), n - keep)
            keep = max(keep, reducer.min_kept(n - drop))
            counts.append((block, keep, drop))
            n = keep + (self.fuse and reducer.can_fuse) if keep < n else n
        blocks, kept, dropped = zip(*counts) if counts else ((), (), ())
        return self._replace(patches=patches, reduce_at=blocks, tokens=kept, drop=dropped if any(dropped) else ())

    def check_reducer(self, given: Reducer | str) -> None:
        """Raises a ValueError if the file names another reducer than one that the user chose."""
        if self.reducer and self.reducer != str(given):
            raise ValueError(f'the plan {self.path} is for the reducer {self.reducer}, and {given} is given: leave the '
                             f'reducer out, or search a plan for {given}')

    def warn_of_other_weights(self, weights: str) -> None:
        """Logs a warning if the plan was searched for other weights.

        Args:
          weights: `model_digest.digest_of_weights` of the parameters.
        """
        if self.weights and self.weights != weights:
            logging.warning('the plan %s was searched for other weights of %s, on which the figures in the file were '
                            'measured: a new search may find a better plan', self.path, self.model)

    def _reducer(self):
        return get_reducer(self.reducer) if self.reducer else EVIT


def read_plan_file(path: str | os.PathLike) -> PlanFile:
    """Reads a plan file.

    Raises:
      ValueError: the file cannot be read, or contains no plan.
    """
    hint = 'give a file that python -m evit_jax.plan --out FILE has written'
    try:
        content = json.loads(pathlib.Path(path).expanduser().read_text())
        plan = PlanFile(path=os.fspath(path), **{name: tuple(value) if isinstance(value, list) else value
                                                for name, value in content.items() if name in PlanFile._fields[:-1]})
        _check(plan)
    except OSError as error:
        raise ValueError(f'--plan={path} cannot be read ({error.strerror}): {hint}') from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'--plan={path} holds no plan ({error}): {hint}') from error
    return plan


def _check(plan: PlanFile) -> None:
    if not isinstance(plan.fuse, bool):
        raise ValueError(f'"fuse": {json.dumps(plan.fuse)} is neither true nor false')
    if bad := [name for name in _TEXTS if not isinstance(getattr(plan, name), str)]:
        raise ValueError(f'"{bad[0]}": {json.dumps(getattr(plan, bad[0]))} is no text')
    sides = plan.image_size if isinstance(plan.image_size, tuple) else (plan.image_size,) * 2
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f'"image_size": {json.dumps(plan.image_size)} is neither a side nor [height, width] in pixels')
    by_depth(plan.reduce_at, plan.tokens, 'tokens')  # blocks without tokens would give a dense plan
    plan.plan()
