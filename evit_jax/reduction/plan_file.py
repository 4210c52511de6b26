"""A token plan in a file, with the model that it is for."""

import json
import os
import pathlib
from typing import Any, NamedTuple

from evit_jax.reduction.plan import TokenPlan, by_depth, make_plan


class PlanFile(NamedTuple):
    """What the planner writes and other programs follow."""

    model: str
    image_size: int
    patches: int
    depth: int
    reduce_at: tuple[int, ...]
    tokens: tuple[int, ...]  # kept at each reduction
    fuse: bool
    path: str = ''           # of the file

    @classmethod
    def of(cls, plan: TokenPlan, model: str, image_size: int) -> 'PlanFile':
        """A plan, to be written."""
        kept = tuple(plan.keep[block] for block in plan.reductions)
        return cls(model, image_size, plan.patches, len(plan.keep), plan.reductions, kept, plan.fused)

    def metadata(self) -> dict[str, Any]:
        """For JSON."""
        return {name: value for name, value in self._asdict().items() if name != 'path'}

    def check(self, model: str, patches: int, depth: int) -> None:
        """Raises a ValueError if it was made for another model, or for images of another size."""
        if (self.model, self.patches, self.depth) != (model, patches, depth):
            raise ValueError(f'the plan {self.path} is for {self.model} with {self.patches} patches and {self.depth} '
                             f'blocks, and this is {model} with {patches} patches and {depth} blocks: make one with '
                             f'python -m evit_jax.plan --model={model}')


def read_plan_file(path: str | os.PathLike) -> PlanFile:
    """Reads what the planner wrote.

    Raises:
      ValueError: it is not there, or no plan.
    """
    hint = 'give a file that python -m evit_jax.plan --out FILE has written'
    try:
        told = json.loads(pathlib.Path(path).expanduser().read_text())
        found = PlanFile(path=os.fspath(path), **{name: tuple(value) if isinstance(value, list) else value
                                                 for name, value in told.items() if name in PlanFile._fields})
        if not isinstance(found.fuse, bool):
            raise ValueError(f'"fuse": {json.dumps(found.fuse)} is neither true nor false')
        by_depth(found.reduce_at, found.tokens, 'tokens')  # no tokens beside blocks would be a dense plan
        make_plan(found.patches, found.depth, tokens=found.tokens, reduce_at=found.reduce_at, fuse=found.fuse)
    except OSError as error:
        raise ValueError(f'--plan={path} cannot be read ({error.strerror}): {hint}') from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'--plan={path} holds no plan ({error}): {hint}') from error
    return found
