"""The weights of one model among all that a file holds: in dicts within dicts, and behind a prefix of their names."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from absl import logging

from evit_jax.interchange.pickles import shown
from evit_jax.interchange.stored import Stored

_WEIGHTS = ('model', 'state_dict', 'model_state_dict')
_AVERAGES = ('model_ema', 'state_dict_ema', 'ema', 'ema_model', 'ema_state_dict')
_PREFIXES = ('module.', 'model.', '_orig_mod.')  # added by DataParallel, by a wrapping model, by torch.compile
_HEADS = 'head.', 'classifier.', 'fc.'  # names of a class token's head
_COUNTER = 'n_averaged'  # beside module.*: an AveragedModel of PyTorch
_DEEPEST = 8
# A vision transformer has one of these arrays; the group is the prefix of its names.
_MARKS = [re.compile(r'((?:[^.]+\.)*?)(?:(?:vit|deit)\.)?embeddings\.(cls_token|position_embeddings)'),
          re.compile(r'((?:(?!embeddings\.)[^.]+\.)*)(cls_token|pos_embed)')]


class Weights(NamedTuple):
    """The arrays of one model, without their prefix."""

    arrays: dict[str, Stored]
    label: str  # dicts and prefix that they were taken from


class _Candidate(NamedTuple):
    """A dict and a prefix in it that have a vision transformer's arrays."""

    path: tuple[str, ...]
    prefix: str
    node: Mapping

    @property
    def label(self) -> str:
        return '.'.join([*self.path, *self.prefix.split('.')[:-1]]) or '.'

    @property
    def is_average(self) -> bool:
        return bool({*self.label.split('.')} & {*_AVERAGES}) or _COUNTER in self.node


def take(tree: Any, *, ema: bool, key: str) -> Weights:
    """The weights of a model in what a file held; the log lists the rest.

    Args:
      tree: nested dicts, with arrays somewhere in them.
      ema: take the moving average of the weights.
      key: names of dicts, then of a prefix, joined by dots: '' where there is one model alone.

    Raises:
      ValueError: there are no weights, no average, more than one model, or none at the key; lists what there is.
    """
    if candidates := list(_candidates(tree)):
        chosen = _chosen(candidates, ema, key)
        deeper = tuple(other.prefix for other in candidates if other.node is chosen.node
                       and len(other.prefix) > len(chosen.prefix))
        held = arrays_of(chosen.node)
        arrays = {name: value for name, value in held.items()
                  if name.startswith(chosen.prefix) and not name.startswith(deeper)}
        head = _head_beside(held, arrays, chosen.prefix)
        _log(tree, chosen.label, chosen.is_average, chosen.node)
        if others := [shown(name) for name in held if name not in arrays and name not in head]:
            has_head = head or _has_head(arrays, chosen.prefix)
            logging.log(logging.INFO if has_head else logging.WARNING,
                        'left out %d arrays that are not behind the prefix %s: %s%s', len(others), chosen.prefix,
                        _some(others), '' if has_head else '. No head is behind it; if one is among these, it is lost')
        arrays = {name.removeprefix(chosen.prefix): value for name, value in arrays.items()}
        return Weights(arrays | {f'head.{name.rpartition(".")[2]}': value for name, value in head.items()},
                       chosen.label)
    node, path = _at_key(tree, key) if key else _descended(tree, ema)
    arrays = arrays_of(node)
    if not arrays:
        held = [shown(str(name)) for name in node] if isinstance(node, Mapping) else [f'one {type(node).__name__}']
        raise ValueError(f'it holds no weights by name, but {_some(held) or "nothing"}')
    is_average = bool({*path} & {*_AVERAGES})
    if ema and not is_average:
        raise ValueError(_no_average())
    _log(tree, '.'.join(path) or '.', is_average, node)
    return Weights(_without_prefixes(arrays), '.'.join(path))


def _has_head(arrays, prefix):
    return any(name.removeprefix(prefix).startswith((*_HEADS, 'cls_classifier.')) for name in arrays)


def _head_beside(held, arrays, prefix):
    """The arrays of a linear head that stands beside a backbone without one, as `net.head` beside `net.backbone`."""
    parent = ''.join(f'{part}.' for part in prefix.split('.')[:-2])
    widths = {value.shape[-1] for name, value in arrays.items()
              if value.shape and name.endswith(('cls_token', 'pos_embed', 'position_embeddings'))}
    found = [head for head in _HEADS if (weight := held.get(f'{parent}{head}weight')) is not None
             and len(weight.shape) == 2 and weight.shape[1] in widths]
    if not prefix or len(found) != 1 or _has_head(arrays, prefix):
        return {}
    head = {name: held[name] for part in ('weight', 'bias') if (name := f'{parent}{found[0]}{part}') in held}
    logging.warning('took %s, beside the weights behind %s, as the head. Where the other program feeds it with more '
                    'than their output, logits are others', ', '.join(map(shown, head)), shown(prefix))
    return head


def arrays_of(node: Any) -> dict[str, Stored]:
    """The arrays of a dict, without the dicts in it."""
    items = node.items() if isinstance(node, Mapping) else ()
    return {key: value for key, value in items if isinstance(value, Stored) and isinstance(key, str)}


def _candidates(tree) -> Iterator[_Candidate]:
    """Those with a class token, or, where no dict has one, those with position embeddings."""
    found, seen = [], set()

    def visit(node, path):
        if not isinstance(node, Mapping) or id(node) in seen or len(path) > _DEEPEST:
            return
        seen.add(id(node))
        matches = [match for name in arrays_of(node) for mark in _MARKS if (match := mark.fullmatch(name))]
        for prefix in dict.fromkeys(match[1] for match in matches):
            marks = {match[2] for match in matches if match[1] == prefix}
            found.append((_Candidate(path, prefix, node), 'cls_token' in marks))
        for name, below in node.items():
            visit(below, (*path, str(name)))

    visit(tree, ())
    has_token = any(token for _, token in found)
    return (candidate for candidate, token in found if token or not has_token)


def _chosen(candidates, ema, key):
    pool = [candidate for candidate in candidates if f'.{key}.' in f'.{candidate.label}.'] if key else candidates
    if key == '.':
        pool = [candidate for candidate in candidates if candidate.label == '.']
    if not pool:
        raise ValueError(f'--key={key}: there are no weights of a vision transformer; there are some in '
                         f'{_labels(candidates)}')
    averages = [candidate for candidate in pool if candidate.is_average]
    if ema and not averages:
        raise ValueError(_no_average())
    pool = averages if ema else [candidate for candidate in pool if candidate not in averages] or averages
    if len(pool) > 1:
        raise ValueError(f'it holds the weights of {len(pool)} models, in {_labels(pool)}: give one of these as --key')
    return pool[0]


def _labels(candidates):
    return _some([shown(candidate.label) for candidate in candidates])


def _no_average():
    return f'it holds no moving average ({", ".join(_AVERAGES)}): leave out --ema'


def _log(tree, label, is_average, node):
    if label != '.':
        logging.info('took %s%s; there are: %s', shown(label), ', a moving average' * is_average,
                     _some([shown(str(key)) for key in tree]))
    arrays = arrays_of(node)
    if others := [shown(str(key)) for key in node if key not in arrays]:
        logging.info('left out what is no array: %s', _some(others))


def _at_key(tree, key):
    """The dict at a path, and the path."""
    node, path = tree, key.split('.')
    for name in path:
        if not isinstance(node, Mapping) or not isinstance(node.get(name), Mapping):
            held = [shown(str(name)) for name in node] if isinstance(node, Mapping) else []
            raise ValueError(f'--key={key}: there is no dict {shown(name)}; there are: {_some(held) or "none"}')
        node = node[name]
    return node, path


def _descended(tree, ema):
    """The dict of arrays under the usual names, and its path."""
    node, path = tree, []
    while name := _inner(node, ema and not {*path} & {*_AVERAGES}):
        path, node = [*path, name], node[name]
        if len(path) > _DEEPEST:
            raise ValueError(f'its weights are nested more than {_DEEPEST} deep')
    return node, path


def _inner(node, average):
    """Name of the dict in which to look on; an average only if it is wanted, or there is nothing else."""
    dicts = [name for name in (*_AVERAGES, *_WEIGHTS)
             if isinstance(node, Mapping) and isinstance(node.get(name), Mapping)]
    wanted = dicts if average else [name for name in dicts if name not in _AVERAGES]
    return next(iter(wanted or ([] if arrays_of(node) else dicts)), None)


def _without_prefixes(arrays):
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in arrays)), None):
        arrays = {key.removeprefix(prefix): value for key, value in arrays.items()}
    return arrays


def _some(words, most=12):
    return ', '.join(words[:most]) + (f' and {len(words) - most} more' if len(words) > most else '')
