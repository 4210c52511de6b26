"""The reducers of this package, one file per method. Importing the package registers them."""

from evit_jax.reduction.reducers.ats import ATS
from evit_jax.reduction.reducers.baselines import LEAST, POOL, RANDOM
from evit_jax.reduction.reducers.clustering import DPCKNN, KMEDOIDS
from evit_jax.reduction.reducers.dynamicvit import DYNAMICVIT
from evit_jax.reduction.reducers.evit import EVIT
from evit_jax.reduction.reducers.heuristic import HEURISTIC
from evit_jax.reduction.reducers.patchmerger import PATCHMERGER
from evit_jax.reduction.reducers.pitome import PITOME
from evit_jax.reduction.reducers.prune_merge import PRUNE_MERGE
from evit_jax.reduction.reducers.sinkhorn import SINKHORN
from evit_jax.reduction.reducers.sit import SIT
from evit_jax.reduction.reducers.tofu import TOFU
from evit_jax.reduction.reducers.tome import TOME
from evit_jax.reduction.reducers.topk import TOPK
from evit_jax.reduction.reducers.ward import WARD

__all__ = ['ATS', 'DPCKNN', 'DYNAMICVIT', 'EVIT', 'HEURISTIC', 'KMEDOIDS', 'LEAST', 'PATCHMERGER', 'PITOME', 'POOL',
           'PRUNE_MERGE', 'RANDOM', 'SINKHORN', 'SIT', 'TOFU', 'TOME', 'TOPK', 'WARD']
