"""Selects the weights of one model in a checkpoint of nested dicts. The array names of a model may share a prefix."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from absl import logging

from evit_jax.interchange.lazy_array import LazyArray
from evit_jax.interchange.restricted_pickle import printable

_WEIGHTS = ('model', 'state_dict', 'model_state_dict')
_EMA_NAMES = ('model_ema', 'state_dict_ema', 'ema', 'ema_model', 'ema_state_dict')
_PREFIXES = ('module.', 'model.', '_orig_mod.')  # added by DataParallel, a wrapping model, and torch.compile
_HEADS = 'head.', 'classifier.', 'fc.'  # prefixes of the class token's head
_COUNTER = 'n_averaged'  # array in the state of torch.optim.swa_utils.AveragedModel, next to module.*
_MAX_DEPTH = 8
# Every vision transformer has one of these arrays. The first group is the prefix of its array names.
_MARKERS = [re.compile(r'((?:[^.]+\.)*?)(?:(?:vit|deit|dinov2|dinov2_with_registers|vision_model)\.)?embeddings\.'
                       r'(cls_token|position_embeddings|class_embedding|patch_embedding\.weight)'),
            re.compile(r'((?:(?!embeddings\.)[^.]+\.)*)(cls_token|pos_embed|reg_token)')]
_MARKER_ENDS = ('cls_token', 'position_embeddings', 'class_embedding', 'patch_embedding.weight', 'pos_embed',
                'reg_token')
_CLASS_TOKENS = {'cls_token', 'class_embedding'}


class SelectedWeights(NamedTuple):
    """The arrays of one model. The common prefix is removed from their names."""

    arrays: dict[str, LazyArray]
    path: str  # location in the checkpoint: dict names and prefix, joined by dots


class _Candidate(NamedTuple):
    """Location of a vision transformer: a dict, and a prefix of the array names in it."""

    dict_names: tuple[str, ...]
    prefix: str
    node: Mapping

    @property
    def path(self) -> str:
        return '.'.join([*self.dict_names, *self.prefix.split('.')[:-1]]) or '.'

    @property
    def is_ema(self) -> bool:
        return bool({*self.path.split('.')} & {*_EMA_NAMES}) or _COUNTER in self.node


def select_weights(tree: Any, *, ema: bool, key: str) -> SelectedWeights:
    """Selects the weights of one model, and logs the names of the other contents of the checkpoint.

    Args:
      tree: nested dicts with arrays.
      ema: select the moving average of the weights.
      key: names of nested dicts and then a prefix of array names, joined by dots; '' if the checkpoint holds one model.

    Raises:
      ValueError: the checkpoint has no weights (or none at the key), no moving average, or several models. The message
        lists its contents.
    """
    if candidates := list(_candidates(tree)):
        candidate = _select_candidate(candidates, ema, key)
        return SelectedWeights(_arrays_of_candidate(tree, candidate, candidates), candidate.path)
    node, path = _at_key(tree, key) if key else _descend(tree, ema)
    arrays = arrays_of(node)
    if not arrays:
        names = [printable(str(name)) for name in node] if isinstance(node, Mapping) else [f'one {type(node).__name__}']
        raise ValueError(f'it holds no weights by name, but {_shortened(names) or "nothing"}')
    is_ema = bool({*path} & {*_EMA_NAMES})
    if ema and not is_ema:
        raise ValueError(_no_ema())
    _log_selection(tree, '.'.join(path) or '.', is_ema, node)
    return SelectedWeights(_without_prefixes(arrays), '.'.join(path))


def arrays_of(node: Any) -> dict[str, LazyArray]:
    """Returns the arrays of a dict by name. Arrays in nested dicts are not included."""
    items = node.items() if isinstance(node, Mapping) else ()
    return {key: value for key, value in items if isinstance(value, LazyArray) and isinstance(key, str)}


def _arrays_of_candidate(tree, candidate, candidates):
    """Returns the arrays of a candidate, by names without the prefix, and logs the arrays that are left out."""
    prefix = candidate.prefix
    nested = tuple(other.prefix for other in candidates
                   if other.node is candidate.node and len(other.prefix) > len(prefix))
    all_arrays = arrays_of(candidate.node)
    arrays = {name: value for name, value in all_arrays.items()
              if name.startswith(prefix) and not name.startswith(nested)}
    head = _sibling_head(all_arrays, arrays, prefix)
    _log_selection(tree, candidate.path, candidate.is_ema, candidate.node)
    if others := [printable(name) for name in all_arrays if name not in arrays and name not in head]:
        has_head = head or _has_head(arrays, prefix)
        logging.log(logging.INFO if has_head else logging.WARNING,
                    'left out %d arrays without the prefix %s: %s%s', len(others), prefix, _shortened(others),
                    '' if has_head else '. No array with the prefix is a head; if one of these is, it is lost')
    arrays = {name.removeprefix(prefix): value for name, value in arrays.items()}
    return arrays | {f'head.{name.rpartition(".")[2]}': value for name, value in head.items()}


def _has_head(arrays, prefix):
    return any(name.removeprefix(prefix).startswith((*_HEADS, 'cls_classifier.')) for name in arrays)


def _sibling_head(all_arrays, arrays, prefix):
    """Returns the arrays of a linear head that is a sibling of a headless backbone, such as net.head and net.backbone.
    """
    parent = ''.join(f'{part}.' for part in prefix.split('.')[:-2])
    widths = {value.shape[-1] for name, value in arrays.items()
              if value.shape and name.endswith(('cls_token', 'pos_embed', 'position_embeddings'))}
    heads = [head for head in _HEADS if (weight := all_arrays.get(f'{parent}{head}weight')) is not None
             and len(weight.shape) == 2 and weight.shape[1] in widths]
    if not prefix or len(heads) != 1 or _has_head(arrays, prefix):
        return {}
    head = {name: all_arrays[name] for part in ('weight', 'bias')
            if (name := f'{parent}{heads[0]}{part}') in all_arrays}
    logging.warning('took %s as the head of the weights with the prefix %s. If the input of the head in the other '
                    'program is not their output, logits differ', ', '.join(map(printable, head)), printable(prefix))
    return head


def _candidates(tree) -> Iterator[_Candidate]:
    """Yields the models with a class token. If no model has one, yields those with position embeddings."""
    candidates, visited = [], set()

    def visit(node, dict_names):
        if not isinstance(node, Mapping) or id(node) in visited or len(dict_names) > _MAX_DEPTH:
            return
        visited.add(id(node))
        markers: dict[str, set[str]] = {}
        for name in arrays_of(node):
            if name.endswith(_MARKER_ENDS):
                for match in filter(None, (marker.fullmatch(name) for marker in _MARKERS)):
                    markers.setdefault(match[1], set()).add(match[2])
        candidates.extend((_Candidate(dict_names, prefix, node), bool(found & _CLASS_TOKENS))
                          for prefix, found in markers.items())
        for name, child in node.items():
            visit(child, (*dict_names, str(name)))

    visit(tree, ())
    any_class_token = any(has_class_token for _, has_class_token in candidates)
    return (candidate for candidate, has_class_token in candidates if has_class_token or not any_class_token)


def _select_candidate(candidates, ema, key):
    pool = [candidate for candidate in candidates if f'.{key}.' in f'.{candidate.path}.'] if key else candidates
    if key == '.':
        pool = [candidate for candidate in candidates if candidate.path == '.']
    if not pool:
        raise ValueError(f'--key={key}: there are no weights of a vision transformer; there are some in '
                         f'{_paths(candidates)}')
    emas = [candidate for candidate in pool if candidate.is_ema]
    if ema and not emas:
        raise ValueError(_no_ema())
    pool = emas if ema else [candidate for candidate in pool if candidate not in emas] or emas
    if len(pool) > 1:
        raise ValueError(f'it holds the weights of {len(pool)} models, in {_paths(pool)}: give one of these as --key')
    return pool[0]


def _paths(candidates):
    return _shortened([printable(candidate.path) for candidate in candidates])


def _no_ema():
    return f'it holds no moving average ({", ".join(_EMA_NAMES)}): leave out --ema'


def _log_selection(tree, path, is_ema, node):
    if path != '.':
        logging.info('took %s%s; there are: %s', printable(path), ', a moving average' * is_ema,
                     _shortened([printable(str(key)) for key in tree]))
    arrays = arrays_of(node)
    if others := [printable(str(key)) for key in node if key not in arrays]:
        logging.info('left out entries that are not arrays: %s', _shortened(others))


def _at_key(tree, key):
    """Returns the dict at a dotted key, and the names in the key."""
    node, path = tree, key.split('.')
    for name in path:
        if not isinstance(node, Mapping) or not isinstance(node.get(name), Mapping):
            names = [printable(str(name)) for name in node] if isinstance(node, Mapping) else []
            raise ValueError(f'--key={key}: there is no dict {printable(name)}; there are: '
                             f'{_shortened(names) or "none"}')
        node = node[name]
    return node, path


def _descend(tree, ema):
    """Descends through nested dicts with common names. Returns the innermost dict and the list of names."""
    node, path = tree, []
    while name := _child_name(node, ema and not {*path} & {*_EMA_NAMES}):
        path, node = [*path, name], node[name]
        if len(path) > _MAX_DEPTH:
            raise ValueError(f'its weights are nested more than {_MAX_DEPTH} deep')
    return node, path


def _child_name(node, use_ema):
    """Returns the name of the nested dict to descend into. A moving average is used if requested, or if alone."""
    dicts = [name for name in (*_EMA_NAMES, *_WEIGHTS)
             if isinstance(node, Mapping) and isinstance(node.get(name), Mapping)]
    preferred = dicts if use_ema else [name for name in dicts if name not in _EMA_NAMES]
    return next(iter(preferred or ([] if arrays_of(node) else dicts)), None)


def _without_prefixes(arrays):
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in arrays)), None):
        arrays = {key.removeprefix(prefix): value for key, value in arrays.items()}
    return arrays


def _shortened(names, most=12):
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
