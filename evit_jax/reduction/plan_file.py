"""JSON files with a token plan and the model that it was made for."""

import json
import os
import pathlib
from typing import Any, NamedTuple

from evit_jax.reduction.plan import TokenPlan, by_depth, make_plan


class PlanFile(NamedTuple):
    """The content of a plan file. `evit_jax.plan` writes plan files; other programs read them."""

    model: str
    image_size: int
    patches: int
    depth: int
    reduce_at: tuple[int, ...]
    tokens: tuple[int, ...]  # number of tokens kept at each reduction
    fuse: bool
    path: str = ''           # path of the file, for messages

    @classmethod
    def of(cls, plan: TokenPlan, model: str, image_size: int) -> 'PlanFile':
        """Returns the content of a plan file for a plan."""
        kept = tuple(plan.keep[block] for block in plan.reductions)
        return cls(model, image_size, plan.patches, len(plan.keep), plan.reductions, kept, plan.fused)

    def metadata(self) -> dict[str, Any]:
        """Returns the content as a dict for JSON."""
        return {name: value for name, value in self._asdict().items() if name != 'path'}

    def check(self, model: str, patches: int, depth: int) -> None:
        """Raises a ValueError if the plan was made for another model or image size."""
        if (self.model, self.patches, self.depth) != (model, patches, depth):
            raise ValueError(f'the plan {self.path} is for {self.model} with {self.patches} patches and {self.depth} '
                             f'blocks, and this is {model} with {patches} patches and {depth} blocks: make one with '
                             f'python -m evit_jax.plan --model={model}')


def read_plan_file(path: str | os.PathLike) -> PlanFile:
    """Reads a plan file.

    Raises:
      ValueError: the file cannot be read, or contains no plan.
    """
    hint = 'give a file that python -m evit_jax.plan --out FILE has written'
    try:
        content = json.loads(pathlib.Path(path).expanduser().read_text())
        plan = PlanFile(path=os.fspath(path), **{name: tuple(value) if isinstance(value, list) else value
                                                for name, value in content.items() if name in PlanFile._fields})
        if not isinstance(plan.fuse, bool):
            raise ValueError(f'"fuse": {json.dumps(plan.fuse)} is neither true nor false')
        by_depth(plan.reduce_at, plan.tokens, 'tokens')  # blocks without tokens would give a dense plan
        make_plan(plan.patches, plan.depth, tokens=plan.tokens, reduce_at=plan.reduce_at, fuse=plan.fuse)
    except OSError as error:
        raise ValueError(f'--plan={path} cannot be read ({error.strerror}): {hint}') from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'--plan={path} holds no plan ({error}): {hint}') from error
    return plan
