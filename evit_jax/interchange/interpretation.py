"""Decides the values of a model that no array shows: by flags, the file, configs beside it, and names; else assumes."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import logging

from evit_jax.interchange import facts, folders, layouts, run_metadata
from evit_jax.interchange.facts import KEYS, Fact, Facts
from evit_jax.models.config import POOLINGS, ViTConfig
from evit_jax.models.layers import ACTIVATIONS

_MODEL_TYPES = ('vit', 'deit', 'vit_msn', 'vit_mae', 'timm_wrapper')  # they compute as the ViT here
_IN_SHAPE = ('heads', 'norm_epsilon', 'activation', 'pooling')
_SHAPES = {'hidden_size': 'width', 'embed_dim': 'width', 'num_features': 'width', 'num_hidden_layers': 'depth',
           'depth': 'depth', 'patch_size': 'patch_size', 'image_size': 'image_size'}  # in config.json: a field here


class Given(NamedTuple):
    """Everything that was read of a model but its arrays."""

    path: pathlib.Path                    # the file
    tree: Any                             # contents of a PyTorch file: weights, and settings beside them
    metadata: Mapping[str, str]           # metadata of a safetensors file
    configs: Mapping[str, Mapping[str, Any]]  # beside it, by file name

    @property
    def config(self) -> Mapping[str, Any]:
        """The config.json of Hugging Face or timm; {} where there is none."""
        return self.configs.get(folders.CONFIG, {})


def interpreted(name: str, config: ViTConfig, found: layouts.Found, given: Given,
                flags: Mapping[str, Any]) -> tuple[ViTConfig, dict[str, Any], layouts.Found]:
    """The shape with the values that no array shows, config keys of the preprocessing, and the arrays to be read.

    The log lists where each value was found, and in one WARNING those that are assumed.

    Args:
      name, shape: as detected from the arrays.
      flags: values from the command line by fact; they win, with a WARNING where another value was found.

    Raises:
      ValueError: a value that cannot be computed here, or a config of another model.
    """
    _check_config(given.config, config)
    names = _names(given)
    said = _with_flags(_said(config, found, given, names), flags)
    said, found = _with_pooling(said, found)
    assumed = {fact: value for fact, value in _assumed(name, config, found, names, given).items() if fact not in said}
    _check(said)
    if said:
        logging.info('%s: %s', given.path, _listed(said))
    if assumed:
        logging.warning('%s: nothing gives these values, so they are assumed: %s. Where the weights were trained with '
                        'others, every result is wrong: give %s', given.path, _listed(assumed),
                        ', '.join(f'--{fact}' for fact in assumed))
    resampling = facts.resampling(given.configs.get(folders.PREPROCESSOR, {}), given.config)
    if resampling not in ('', 'bicubic'):
        logging.warning('%s: its images were resized by the filter %s, and here they are by bicubic: results differ a '
                        'little', given.path, resampling)
    values = {fact: value for fact, (value, _) in (assumed | said).items()}
    config = dataclasses.replace(config, **{fact: values.pop(fact) for fact in _IN_SHAPE})
    return config, {KEYS[fact]: value for fact, value in values.items()}, found


def _names(given):
    """The names of the model that stand in the file and beside it."""
    held = facts.texts_as_values(given.metadata)
    return [*facts.names_in(given.tree), *facts.names_in(given.config), *facts.names_in(held)]


def _said(model_config, found, given, names) -> Facts:
    """The facts that are given, the first source before the others; contradictions are named."""
    config, _ = run_metadata.from_metadata(given.metadata)
    own = {fact: config[key] for fact, key in KEYS.items() if key in config}
    if run_metadata.METADATA in given.metadata:  # a file without these keys is of a model as it is named
        own = {fact: getattr(model_config, fact) for fact in _IN_SHAPE} | own
    held = {key: value for key, value in facts.texts_as_values(given.metadata).items() if key != run_metadata.METADATA}
    preprocessor = given.configs.get(folders.PREPROCESSOR)
    sources = [facts.said_in({_READ_AS.get(fact, fact): value for fact, value in own.items()}, 'its metadata'),
               facts.said_in(given.tree, 'the file'),
               facts.of_preprocessor(preprocessor, folders.PREPROCESSOR) if preprocessor else {},
               facts.said_in(given.config, folders.CONFIG), facts.said_in(held, 'its metadata')]
    known: Facts = {}
    for source in sources:
        for fact, new in source.items():
            old = known.setdefault(fact, new)
            if old.value != new.value:
                logging.warning('%s: %s is %s (%s), but %s (%s): took the first; --%s decides', given.path, fact,
                                *_shown(old), *_shown(new), fact)
    kind = given.config.get('model_type')
    by_name = facts.of_names(names, model_config.width)
    if by_name and 'fc_norm.weight' not in found.arrays:
        by_name['pooling'] = Fact('token', by_name['heads'].source)
    for source in (
            facts.of_hugging_face(kind, f'the default of {kind}') if kind in _MODEL_TYPES[:-1] else {},
            {'pooling': Fact('token', "Hugging Face's classifiers")} if found.layout == layouts.HUGGING_FACE else {},
            by_name, facts.of_moco(found.label, model_config.width)):
        known = source | known
    return known


_READ_AS = {'crop': 'crop_pct', 'heads': 'num_heads'}


def _with_flags(said, flags):
    for fact, value in flags.items():
        value = tuple(value) if isinstance(value, list | tuple) else value
        if fact in said and said[fact].value != value:
            logging.warning('--%s=%s, though it is %s by %s: the flag wins', fact, _text(value), *_shown(said[fact]))
        said = said | {fact: Fact(value, f'--{fact}')}
    return said


def _with_pooling(said, found):
    """The pooling that fits the norms there are; a lone fc_norm before a class token's head is the last norm."""
    alone = 'fc_norm.weight' in found.arrays and 'norm.weight' not in found.arrays
    pooling, source = said.get('pooling', Fact('avg' if alone else None, 'fc_norm, which stands in place of norm'))
    if alone and pooling == 'avg':
        said = said | {'pooling': Fact('avg_fc_norm', source)}
    elif alone and pooling == 'token':
        found = found._replace(arrays={key.removeprefix('fc_') if key.startswith('fc_norm.') else key: value
                                       for key, value in found.arrays.items()})
    elif pooling == 'avg_fc_norm' and not alone:
        raise ValueError(f'pooling=avg_fc_norm ({source}) is for weights with fc_norm in place of norm, and here '
                         f'{"both are" if "fc_norm.weight" in found.arrays else "norm is"}: give --pooling=avg or '
                         '--pooling=token')
    return said, found


def _assumed(name, config, found, names, given) -> Facts:
    """A value for each fact, where no source gives one."""
    usual = run_metadata.assumed(name, config)
    by_default = {fact: Fact(usual[key], 'as DeiT' if not name.startswith('lvvit') else 'as its authors')
                  for fact, key in KEYS.items() if key in usual}
    by_name = {fact: Fact(getattr(config, fact), f'as {name}') for fact in _IN_SHAPE}
    if found.layout == layouts.HUGGING_FACE:
        by_name['norm_epsilon'] = Fact(1e-12, "as Hugging Face's ViT")
    in_hugging_face = found.layout == layouts.HUGGING_FACE and not config.distilled
    is_vit = given.config.get('model_type', 'vit' if in_hugging_face else '') == 'vit'
    kind = facts.HALVES | {'crop': 0.0} if is_vit else {}  # the defaults of its image processor
    family = facts.of_family([*names, given.path.name]) if name.startswith('deit') else {}
    moco = facts.assumed_of_moco(given.tree.get('arch') if isinstance(given.tree, Mapping) else None, config.width)
    by_kind = {fact: Fact(value, "as Hugging Face's ViT") for fact, value in kind.items()}
    return by_default | by_name | moco | family | by_kind


def _check(said):
    for fact, known in (('activation', ACTIVATIONS), ('pooling', POOLINGS)):
        if fact in said and said[fact].value not in known:
            raise ValueError(f'{fact}={said[fact].value} ({said[fact].source}) is not computed here: there are '
                             f'{", ".join(known)}; if it is wrong, give --{fact}')
    for fact in [fact for fact in ('mean', 'std', 'crop') if fact in said]:
        value, source = said[fact]
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(0 <= number <= 1 for number in numbers) or (fact == 'std' and 0 in numbers):
            scale = '' if fact == 'crop' else 'pixels are in 0..1, so divide values of 0..255 by 255 and '
            raise ValueError(f'{fact}={_text(value)} ({source}) is outside {"(" if fact == "std" else "["}0, 1]: '
                             f'{scale}give --{fact}')


def _check_config(config, shape):
    """Raises a ValueError where config.json is of another model than the weights."""
    kind = config.get('model_type')
    if kind is not None and kind not in _MODEL_TYPES:
        raise ValueError(f'its {folders.CONFIG} is of the model type {kind}, which may compute otherwise: there are '
                         f'{", ".join(_MODEL_TYPES)}')
    for key, field in _SHAPES.items():
        value = config.get(key)
        if type(value) is int and value != getattr(shape, field):
            raise ValueError(f'its {folders.CONFIG} has {key}={value}, and the weights {getattr(shape, field)}: it is '
                             'of another model: move it away, or give the one that belongs to them')


def _listed(said):
    return ', '.join('{} {} ({})'.format(fact, *_shown(said[fact])) for fact in sorted(said))


def _shown(fact):
    return _text(fact.value), fact.source


def _text(value):
    return ','.join(f'{number:g}' for number in value) if isinstance(value, tuple) else (
        f'{value:g}' if isinstance(value, float) else str(value))
