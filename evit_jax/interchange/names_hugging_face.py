"""Reads and writes the array names of Hugging Face's vision transformers, in the style of transformers 4 and 5."""

import re
from collections.abc import Mapping

import numpy as np
from absl import logging

from evit_jax.interchange.lazy_array import LazyArray
from evit_jax.interchange.names_timm import join_parts, unique_names

_BASE = re.compile(r'(?:vit|deit|dinov2|dinov2_with_registers|vision_model|model)\.')  # attribute of the backbone
_BLOCK = re.compile(r'(?:encoder\.)?layers?\.(\d+)\.(.+)\.(\w+)')
_IN_BLOCK = {  # name of a module in a block -> ours
    'layernorm_before': 'norm1', 'layernorm_after': 'norm2',                       # ViT, DeiT
    'norm1': 'norm1', 'norm2': 'norm2', 'layer_norm1': 'norm1', 'layer_norm2': 'norm2',  # DINOv2 and 3; CLIP, SigLIP
    'attention.attention.query': 'attn.q', 'attention.attention.key': 'attn.k', 'attention.attention.value': 'attn.v',
    'attention.output.dense': 'attn.proj', 'attention.o_proj': 'attn.proj', 'self_attn.out_proj': 'attn.proj',
    **{f'{attention}.{part}_proj': f'attn.{part}' for attention in ('attention', 'self_attn') for part in 'qkv'},
    'layer_scale1': 'ls1', 'layer_scale2': 'ls2', 'intermediate.dense': 'mlp.fc1', 'output.dense': 'mlp.fc2',
    'mlp.fc1': 'mlp.fc1', 'mlp.fc2': 'mlp.fc2', 'mlp.weights_in': 'mlp.fc1', 'mlp.weights_out': 'mlp.fc2',
    'mlp.gate_proj': 'mlp.fc1_g', 'mlp.up_proj': 'mlp.fc1_x', 'mlp.down_proj': 'mlp.fc2'}
_TOP = {
    'embeddings.cls_token': 'cls_token', 'embeddings.class_embedding': 'cls_token',
    'embeddings.distillation_token': 'dist_token', 'embeddings.register_tokens': 'reg_token',
    'embeddings.position_embeddings': 'pos_embed', 'embeddings.position_embedding.weight': 'pos_embed',
    'head.probe': 'attn_pool.latent',
    **{f'{module}.{kind}': f'{ours}.{kind}' for kind in ('weight', 'bias') for module, ours in (
        ('embeddings.patch_embeddings.projection', 'patch_embed.proj'),
        ('embeddings.patch_embeddings', 'patch_embed.proj'), ('embeddings.patch_embedding', 'patch_embed.proj'),
        ('layernorm', 'norm'), ('norm', 'norm'), ('pre_layrnorm', 'norm_pre'), ('post_layernorm', 'norm'),
        ('head.attention.out_proj', 'attn_pool.proj'), ('head.layernorm', 'attn_pool.norm'),
        ('head.mlp.fc1', 'attn_pool.mlp.fc1'), ('head.mlp.fc2', 'attn_pool.mlp.fc2'), ('classifier', 'head'),
        ('cls_classifier', 'head'), ('distillation_classifier', 'head_dist'), ('visual_projection', 'head'))}}
_ATTENTION_POOL = re.compile(r'head\.attention\.in_proj_(weight|bias)')
_UNUSED = re.compile(  # arrays that the class token's or the patch tokens' output does not depend on
    r'(?:pooler|decoder|text_model|text_projection|rope_embeddings)\.|logit_(?:scale|bias)$|embeddings\.(?:mask_token|'
    r'position_ids)$|text_projection')


def is_hugging_face(arrays: Mapping[str, LazyArray]) -> bool:
    """Returns True if arrays have the names of Hugging Face, with or without the name of the base model."""
    return any(_without_base(key).startswith('embeddings.') for key in arrays)


def from_hugging_face(arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """Renames arrays to the names of `torch_weights`, and joins the parts of each block.

    Arrays that no output depends on are left out: a pooler, a text model, the decoder of MAE. Unknown arrays keep their
    names.

    Raises:
      ValueError: two arrays have the same name afterwards, or they are those of a CLIPForImageClassification.
    """
    bare = {key: _without_base(key) for key in arrays}
    if {'pre_layrnorm.weight', 'classifier.weight'} <= {*bare.values()}:
        raise ValueError('it is a CLIPForImageClassification (it has the arrays pre_layrnorm and classifier), whose '
                         'head reads the mean of the patch tokens before the last norm, which no model here does: give '
                         'a CLIP, a CLIPVisionModel or a CLIPVisionModelWithProjection')
    unused = [name for name in bare.values() if _UNUSED.match(name)]
    if unused:
        _log_unused(unused)
    arrays = unique_names(arrays, {key: _renamed(name, key) for key, name in bare.items() if not _UNUSED.match(name)})
    if not any('.mlp.fc1_g.' in name for name in arrays):  # DINOv3 without gates: up_proj is the first layer
        arrays = {name.replace('.mlp.fc1_x.', '.mlp.fc1.'): value for name, value in arrays.items()}
    return _with_usual_shapes(join_parts(arrays))


def _without_base(key):
    return key[match.end():] if (match := _BASE.match(key)) else key


def _renamed(name, key):
    """Returns our name of an array, or `key` if it is unknown.

    Args:
      name: the key without the name of the base model.
    """
    if match := _BLOCK.fullmatch(name):
        block, module, kind = match.groups()
        if module in _IN_BLOCK:
            return f'blocks.{block}.{_IN_BLOCK[module]}.{"gamma" if kind == "lambda1" else kind}'
    return name if _ATTENTION_POOL.fullmatch(name) else _TOP.get(name, key)


def _log_unused(names):
    groups = {}
    for name in names:
        groups.setdefault(name.split('.')[0], []).append(name)
    text = len([name for name in names if name.startswith('text_')])
    if text:
        logging.warning('it holds a vision and a text model: took the vision model; the text model (%d arrays) is left '
                        'out', text)
    logging.info('left out, as the features and logits do not depend on them: %s',
                 ', '.join(f'{group} ({len(members)} arrays)' for group, members in sorted(groups.items())))


def _with_usual_shapes(arrays):
    """Adds the leading axes that timm's tokens and positions have, and divides the input projection of a MAP head."""
    out = {}
    for key, value in arrays.items():
        if key in ('cls_token', 'pos_embed', 'reg_token') and len(value.shape) < 3:
            value = value.reshape(*(1,) * (3 - len(value.shape)), *value.shape)
        if (match := _ATTENTION_POOL.fullmatch(key)) and value.shape and value.shape[0] % 3 == 0:
            width = value.shape[0] // 3
            out[f'attn_pool.q.{match[1]}'] = value.rows(0, width)
            out[f'attn_pool.kv.{match[1]}'] = value.rows(width, 3 * width)
        else:
            out[key] = value
    return out


def to_hugging_face(arrays: Mapping[str, np.ndarray], model_type: str) -> dict[str, np.ndarray]:
    """Renames arrays to the names of transformers 4, which version 5 reads too.

    Args:
      arrays: NumPy arrays by the names of `torch_weights`.
      model_type: vit, deit, dinov2 or dinov2_with_registers.
    """
    is_dinov2 = model_type.startswith('dinov2')
    modules = {'norm1': 'norm1', 'norm2': 'norm2', 'mlp.fc1': 'mlp.fc1', 'mlp.fc2': 'mlp.fc2'} if is_dinov2 else {
        'norm1': 'layernorm_before', 'norm2': 'layernorm_after', 'mlp.fc1': 'intermediate.dense',
        'mlp.fc2': 'output.dense'}
    if is_dinov2 and len(arrays['blocks.0.mlp.fc1.bias']) == 2 * arrays['blocks.0.mlp.fc2.weight'].shape[1]:
        modules |= {'mlp.fc1': 'mlp.weights_in', 'mlp.fc2': 'mlp.weights_out'}
    modules |= {'attn.proj': 'attention.output.dense', 'ls1': 'layer_scale1', 'ls2': 'layer_scale2'}
    base = f'{model_type}.' if 'head.weight' in arrays else ''
    head = 'cls_classifier' if 'head_dist.weight' in arrays else 'classifier'
    top = {ours: f'{base}{theirs}' for theirs, ours in _TOP.items() if ours in (
        'cls_token', 'dist_token', 'reg_token', 'pos_embed') and 'class_embedding' not in theirs
        and not theirs.endswith('position_embedding.weight')}
    top |= {f'{ours}.{kind}': f'{theirs}.{kind}' for kind in ('weight', 'bias') for ours, theirs in (
        ('patch_embed.proj', f'{base}embeddings.patch_embeddings.projection'), ('norm', f'{base}layernorm'),
        ('head', head), ('head_dist', 'distillation_classifier'))}
    out = {}
    for key, value in arrays.items():
        if key in top:
            out[top[key]] = value
            continue
        _, block, name = key.split('.', 2)
        module, _, kind = name.rpartition('.')
        layer = f'{base}encoder.layer.{block}.'
        if module == 'attn.qkv':
            out |= {f'{layer}attention.attention.{part}.{kind}': rows
                    for part, rows in zip(('query', 'key', 'value'), np.split(value, 3))}
        else:
            out[f'{layer}{modules[module]}.{"lambda1" if kind == "gamma" else kind}'] = value
    return out
