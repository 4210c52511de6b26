"""Methods of dropping and merging tokens, as values: a token plan carries one, and the model asks it.

A reducer is told what a block knows of its tokens and how many are to stay. It is made of pure functions and compares
by them, so that a plan stays a static argument of `jax.jit`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from evit_jax.reduction.merging import fewest_of_matching, merge_matched, merge_runs
from evit_jax.reduction.tokens import Tokens, keep_top, keep_top_and_fuse, remap
from evit_jax.runtime.names import get_by_name


class ReducerInputs(NamedTuple):
    """What is known of the N tokens that enter a reduction. Under `jax.jit`, what nobody reads costs nothing."""

    attention: Array | None   # [B, N] float32, class attention; None in front of a block
    keys: Array | None        # [B, N, d] float32, mean over the heads of the attention's keys; likewise
    prediction: Array | None  # [B, N, 2] float32, log-probabilities of staying and of going, where a predictor is asked
    draws: Array              # [B] random keys, one for each image
    training: bool            # draws may be noise; False: what comes out is a function of the image
    gather_impl: str = ''        # how what stays is moved: see `gather_impl.chosen`


class Reducer(NamedTuple):
    """One method."""

    name: str
    reduce: Callable[[Tokens, ReducerInputs, int, int | None], Tokens]
    """(tokens, evidence, keep, stage) -> the tokens that stay: `keep`, and one more fused from the rest where `stage`
    is the number of reductions before this one (None: nothing is fused)."""
    kept: Callable[[int, int, Sequence[float]], int]
    """(patches of the image, tokens that enter, rates so far with this one last) -> tokens that stay."""
    fuses: bool = False     # can blend what it drops into one token
    merges: bool = False    # tokens stand for several patches: attention counts each by its size
    predicts: bool = False  # asks a learned predictor, in front of the block; others stand between attention and MLP
    masks: bool = False     # what goes stays in its place, unseen by the others: nothing gets fewer
    training: 'Reducer | None' = None  # what a model is trained with in its place, where that is another
    everywhere: bool = False  # reduces in every block, where a plan is free to choose
    min_kept: Callable[[int], int] = lambda entering: 1  # of so many tokens that enter, how many must stay at least

    def __str__(self) -> str:
        return self.name


def get_reducer(name: str) -> Reducer:
    """The reducer of a name.

    Raises:
      ValueError: there is none; names the nearest.
    """
    return get_by_name('reducer', name, REDUCERS)


def ceil_rate(patches: int, entering: int, rates: Sequence[float]) -> int:
    """EViT's count: of the tokens that enter, a fused one among them, rounded up."""
    return math.ceil(rates[-1] * entering)


def floor_rate(patches: int, entering: int, rates: Sequence[float]) -> int:
    """DynamicViT's count: of all patches, rounded down, by the rates so far; at least one."""
    return min(max(int(patches * math.prod(rates)), 1), entering)


def _by_rank(score_of: Callable[[ReducerInputs], Array]) -> Callable[..., Tokens]:
    """Keeps the tokens of highest score; what is fused is blended by class attention."""

    def reduce(tokens, evidence, keep, stage):
        score, how = score_of(evidence), (evidence.gather_impl, evidence.training)
        if stage is None:
            return keep_top(tokens, score, keep, *how)
        return keep_top_and_fuse(tokens, score, keep, stage, evidence.attention, *how)

    return reduce


def _random(evidence):
    tokens = evidence.attention.shape[1]
    return jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))(evidence.draws)


def _match(tokens, evidence, keep, stage):
    return merge_matched(tokens, evidence.keys, keep)


def _decide(tokens, evidence, keep, stage):
    """DynamicViT in training: as many stay as the predictor says, whatever `keep`; the loss draws it there.

    A straight-through hard Gumbel-softmax, tau 1; without the noise where it is no training.
    """
    logits = evidence.prediction
    if evidence.training:
        logits += jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(evidence.draws)
    soft = jax.nn.softmax(logits)[..., 0]
    hard = (logits[..., 0] >= logits[..., 1]).astype(soft.dtype)
    decision = hard + (soft - jax.lax.stop_gradient(soft))
    mask = decision if tokens.mask is None else decision * tokens.mask
    place = jnp.where(mask > 0, jnp.arange(mask.shape[1], dtype=jnp.int32), -1)
    return tokens._replace(mask=mask, token_of_patch=remap(tokens.token_of_patch, place))


EVIT = Reducer('evit', _by_rank(lambda evidence: evidence.attention), ceil_rate, fuses=True)
TOME = Reducer('tome', _match, ceil_rate, merges=True, everywhere=True,
               min_kept=fewest_of_matching)

# Controls: dropping at random, dropping what is attended most, and means of neighbours. What they are told of the
# tokens is nothing, the wrong way round, and nothing. POOL differs from TOME in what is merged and in nothing else.
RANDOM = Reducer('random', _by_rank(_random), ceil_rate, fuses=True)
LEAST = Reducer('least', _by_rank(lambda evidence: -evidence.attention), ceil_rate, fuses=True)
POOL = Reducer('pool', lambda tokens, evidence, keep, stage: merge_runs(tokens, keep), ceil_rate, merges=True)
MASKED = Reducer('dynamicvit', _decide, floor_rate, predicts=True, masks=True)
DYNAMICVIT = Reducer('dynamicvit', _by_rank(lambda evidence: evidence.prediction[..., 0]), floor_rate,
                     predicts=True, training=MASKED)

REDUCERS = {reducer.name: reducer for reducer in (EVIT, TOME, DYNAMICVIT, RANDOM, LEAST, POOL)}
