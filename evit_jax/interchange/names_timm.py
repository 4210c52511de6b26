"""Reads the array names of timm, of DINOv2's code and of DINOv3's code.

All readers return one set of names, those of `torch_weights`: the names of timm's VisionTransformer. They differ in one
point: a model with a bias for queries and values only has `attn.q_bias` and `attn.v_bias`, as timm's Eva.
"""

import re
from collections.abc import Mapping, Sequence

from evit_jax.interchange.lazy_array import LazyArray, concatenate
from evit_jax.interchange.restricted_pickle import printable

EVA, DINOV2 = 'EVA', 'DINOv2'  # timm's class Eva; the code of DINOv2 or DINOv3
_BLOCK = re.compile(r'blocks\.(\d+)\.(?:(\d+)\.)?(.+)')  # DINOv2 divides blocks into chunks: blocks.CHUNK.BLOCK
_IN_BLOCK = {'gamma_1': 'ls1.gamma', 'gamma_2': 'ls2.gamma'}
_PARTS = {'attn.q_proj': 'attn.q', 'attn.k_proj': 'attn.k', 'attn.v_proj': 'attn.v', 'mlp.w12': 'mlp.fc1',
          'mlp.w3': 'mlp.fc2', 'mlp.w1': 'mlp.fc1_g', 'mlp.w2': 'mlp.fc1_x'}
_TOP = {'register_tokens': 'reg_token', 'storage_tokens': 'reg_token'}
_EVA = re.compile(r'blocks\.\d+\.(?:gamma_[12]|attn\.(?:[qv]_bias|[qkv]_proj\.weight)|mlp\.fc1_g\.weight)')
_JOINED = re.compile(r'(blocks\.\d+)\.(attn\.[qkv]|mlp\.fc1_[gx])\.(weight|bias)')
_UNUSED = re.compile(r'mask_token|rope_embed\.periods|blocks\.\d+\.(?:\d+\.)?attn\.qkv\.bias_mask')
_MASK = '.attn.qkv.bias_mask'


def from_timm(arrays: Mapping[str, LazyArray]) -> tuple[dict[str, LazyArray], str]:
    """Renames arrays, and joins the parts of each block.

    Returns:
      The arrays, and the layout: 'timm', EVA or DINOV2. Arrays that only pretraining uses are left out.

    Raises:
      ValueError: two arrays have the same name afterwards.
    """
    layout = 'timm'
    if any(map(_EVA.fullmatch, arrays)):
        layout = EVA
    elif not arrays.keys().isdisjoint({*_TOP, 'mask_token'}) and 'blocks.0.ls1.gamma' in arrays.keys() | {
            _renamed(key) for key in arrays if key.startswith('blocks.0.0.')}:
        layout = DINOV2
    names = {key: _renamed(key) for key in arrays}
    has_ls = any(name.endswith('.ls1.gamma') for name in names.values())
    used = {key: name for key, name in names.items() if not (has_ls and _UNUSED.fullmatch(key))}
    if any(key.endswith(_MASK) for key in arrays):
        return join_parts(_without_key_bias(unique_names(arrays, used))), layout
    return join_parts(unique_names(arrays, used)), layout


def unique_names(arrays: Mapping[str, LazyArray], names: Mapping[str, str]) -> dict[str, LazyArray]:
    """Returns the arrays by new name.

    Args:
      names: old name -> new name, for the arrays to return.

    Raises:
      ValueError: two arrays have the same new name.
    """
    renamed: dict[str, LazyArray] = {}
    for key, name in names.items():
        if name in renamed:
            raise ValueError(f'two arrays have the timm name {name}, one of them {printable(key)}')
        renamed[name] = arrays[key]
    return renamed


def join_parts(arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """Joins query, key and value projections to `attn.qkv`, and gate and value of gated MLPs to `mlp.fc1`.

    Queries and values may have a bias without the keys: then the biases become `attn.q_bias` and `attn.v_bias`. Parts
    of different shapes, or without the others, keep their names.
    """
    out, groups = {}, {}
    for key, value in arrays.items():
        if match := _JOINED.fullmatch(key):
            block, part, kind = match.groups()
            groups.setdefault((block, part[:4].rstrip('.'), kind), {})[part[-1]] = key
        out[key] = value
    for (block, module, kind), parts in groups.items():
        for wanted in ('qkv', 'qv', 'gx'):
            keys = [parts[part] for part in wanted if part in parts]
            if len(keys) != len(wanted) or len({arrays[key].shape for key in keys}) > 1 or not arrays[keys[0]].shape:
                continue
            if wanted == 'qv' and kind == 'weight':
                continue
            values = [out.pop(key) for key in keys]
            if wanted == 'qv':
                out |= {f'{block}.attn.q_bias': values[0], f'{block}.attn.v_bias': values[1]}
            else:
                out[f'{block}.{module}.{"qkv" if wanted == "qkv" else "fc1"}.{kind}'] = concatenate(values)
            break
    return out


def _renamed(key: str) -> str:
    match = _BLOCK.fullmatch(key)
    if not match:
        return _TOP.get(key, key)
    first, second, rest = match.groups()
    module, _, kind = rest.rpartition('.')
    rest = f'{_PARTS[module]}.{kind}' if module in _PARTS else _IN_BLOCK.get(rest, rest)
    return f'blocks.{first if second is None else second}.{rest}'


def _without_key_bias(arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """Splits the packed biases of DINOv3's code, which masks the bias of the keys."""
    out = {}
    for key, value in arrays.items():
        if not key.endswith('.attn.qkv.bias'):
            out[key] = value
            continue
        attention, width = key.removesuffix('.qkv.bias'), value.shape[0] // 3
        out |= {f'{attention}.q_bias': value.rows(0, width), f'{attention}.v_bias': value.rows(2 * width, 3 * width)}
    return out


def to_eva(arrays: Mapping[str, Sequence], *, split_qkv: bool, split_mlp: bool) -> dict[str, Sequence]:
    """Renames arrays to the names of timm's Eva; the inverse of `from_timm`.

    Args:
      arrays: NumPy arrays by the names of `torch_weights`.
      split_qkv: write `q_proj`, `k_proj` and `v_proj` in place of `qkv`.
      split_mlp: write `fc1_g` and `fc1_x` in place of a gated `fc1`.
    """
    eva = {ours: theirs for theirs, ours in _IN_BLOCK.items()}
    out = {}
    for key, value in arrays.items():
        match = _BLOCK.fullmatch(key)
        block, rest = (f'blocks.{match[1]}.', match[3]) if match else ('', key)
        kind = rest.rpartition('.')[2]
        if split_qkv and rest == 'attn.qkv.weight':
            size = len(value) // 3
            out |= {f'{block}attn.{part}_proj.weight': value[index * size:(index + 1) * size]
                    for index, part in enumerate('qkv')}
        elif split_qkv and rest in ('attn.q_bias', 'attn.v_bias'):
            out[f'{block}attn.{rest[5]}_proj.bias'] = value
        elif split_mlp and rest in ('mlp.fc1.weight', 'mlp.fc1.bias'):
            size = len(value) // 2
            out |= {f'{block}mlp.fc1_g.{kind}': value[:size], f'{block}mlp.fc1_x.{kind}': value[size:]}
        else:
            out[block + eva.get(rest, rest)] = value
    return out
