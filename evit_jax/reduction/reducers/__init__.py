"""The reducers of this package, one file per method. Importing the package registers them."""

from evit_jax.reduction.reducers.baselines import LEAST, POOL, RANDOM
from evit_jax.reduction.reducers.dynamicvit import DYNAMICVIT
from evit_jax.reduction.reducers.evit import EVIT
from evit_jax.reduction.reducers.tome import TOME

__all__ = ['DYNAMICVIT', 'EVIT', 'LEAST', 'POOL', 'RANDOM', 'TOME']
