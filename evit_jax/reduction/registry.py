"""Registers reducers and finds them by name."""

import inspect
from collections.abc import Callable
from typing import Any

from absl import logging
from flax import nnx

from evit_jax.reduction.reducer import FunctionReducer, LearnedFunctionReducer, Reducer
from evit_jax.runtime.names import get_by_name

_REDUCERS: dict[str, Reducer] = {}
_OPTIONS = ('can_fuse', 'can_drop', 'before_block', 'merges', 'every_block', 'same_in_all_blocks', 'importance',
            'num_kept', 'min_kept')


def register_reducer(name: str, *, module: Callable[[int, nnx.Rngs], nnx.Module] | None = None,
                     **options: Any) -> Callable[[Any], Reducer]:
    """Returns a decorator that registers a function or a `Reducer` class, and returns the reducer.

    Example::

        @register_reducer('l2')
        def l2(tokens, inputs, keep):
            return keep_top(tokens, jnp.linalg.norm(tokens.patches, axis=-1), keep)

    A second registration of a name replaces the first and is logged. Plans with the new reducer compile new programs,
    even if the code is the same, because its globals may have changed. Existing plans keep the old reducer.

    Args:
      name: name of the reducer; not empty.
      module: only for a function: (width, rngs) -> learned module of one reduction, passed as `inputs.module`. Its
        parameters are trained and saved with the model.
      options: only for a function: attributes and methods of `Reducer` by name (can_fuse, can_drop, before_block,
        merges, every_block, same_in_all_blocks, importance, num_kept, min_kept).

    Raises:
      ValueError: an unknown option; or a function that does not take (tokens, inputs, keep).
    """
    if not name or ':' in name:
        problem = f'{name!r}: a colon separates reducer and importance' if name else 'empty'
        raise ValueError(f"the name of a reducer is {problem}: give another, as register_reducer('l2')")
    if unknown := [option for option in options if option not in _OPTIONS]:
        raise ValueError(f'{unknown[0]}={options[unknown[0]]!r} is no option of a reducer: there are '
                         f'{", ".join(("module", *_OPTIONS))}')

    def register(reduce: Any) -> Reducer:
        reducer = _make(name, reduce, module, options)
        reducer.name = name
        if name in _REDUCERS:
            reducer.registration = _REDUCERS[name].registration + 1
            logging.info('reducer %r is registered anew (%d times so far): its programs are compiled anew', name,
                         reducer.registration)
        _REDUCERS[name] = reducer
        return reducer

    return register


def get_reducer(name: str | Reducer) -> Reducer:
    """Returns the reducer with a name; returns a `Reducer` unchanged.

    Args:
      name: a registered name, or NAME:IMPORTANCE with a key of `inputs.IMPORTANCES`, as 'evit:mean'.

    Raises:
      ValueError: no reducer has this name (the message gives the nearest name), it reads no importance, or `name` is a
        function.
    """
    if isinstance(name, Reducer):
        return name
    if not isinstance(name, str):
        raise ValueError(f'{name!r} is neither a reducer nor the name of one: decorate a function with '
                         "@evit_jax.register_reducer('name') and give the result")
    _register_own()
    base, colon, importance = name.partition(':')
    reducer = get_by_name('reducer', base, _REDUCERS)
    return reducer.with_importance(importance) if colon else reducer


def list_reducers() -> list[str]:
    """Lists the names of all registered reducers."""
    _register_own()
    return list(_REDUCERS)


def _register_own():
    import evit_jax.reduction.reducers  # noqa: F401


def _make(name, reduce, module, options):
    if inspect.isclass(reduce) and issubclass(reduce, Reducer):
        if module or options:
            raise ValueError(f'reducer {name!r} is a class: define its module and options there')
        return reduce()
    try:
        inspect.signature(reduce).bind('tokens', 'inputs', 'keep')
    except TypeError as error:
        raise ValueError(f'reducer {name!r} must take (tokens, inputs, keep): {error}') from error
    if module is None:
        return FunctionReducer(reduce, **options)
    return LearnedFunctionReducer(reduce, module=module, **options)
