"""Facts about timm's vision transformers that array shapes do not show, by name of the model.

The facts are rules by family. tests/interchange/test_timm_models.py checks them against all models of timm.
"""

import re
from typing import Any

from evit_jax.models.config import ViTConfig

_PREFIX = re.compile(r'(?:(?:hf[-_]hub|local-dir):)?(?:\S*/)?')
_SUPPORTED = re.compile(r'(?:vit|deit|deit3|eva|eva02|flexivit)_|test_vit2?(?:$|\.)')
_SIZED = re.compile(r'_(tiny|small|base|large)(?:_|$)')
_WIDTHS = {'tiny': 192, 'small': 384, 'base': 768, 'large': 1024}
_HEAD_WIDTHS = {1152: 72, 1280: 80, 1408: 88, 1664: 104, 4096: 128}  # model width -> channels of a head; others: 64
_TANH_SIGLIP = re.compile(r'patch32_siglip|giantopt|so400m_patch16_siglip|large_patch16_siglip(_gap)?_512')
_UNSUPPORTED = {  # pattern of names -> property of these models
    r'vit_\w*_rpn_': 'its norms follow the branches (timm: ResPostBlock)',
    r'eva02_enormous': 'its norms follow the branches (timm: EvaBlockPostNorm)',
    r'vit_\w*_\d+x2_': 'attention and MLP of its blocks run in parallel',
    r'vit_d?p(wee|little)|vit_\w*_xp_': 'attention and MLP of its blocks run in parallel',
    r'vit_d(wee|little)': 'its attention is a difference of two softmax maps',
    r'vit_pe_|vit_\w*_patch\d+_rope_(224|ape|mixed)': 'its rotary positions count columns before rows, or are learned',
    r'vit_\w*_sapiens2|test_vit4|aimv2': 'its norms are RMSNorm',
    r'vit_\w*_radio|vit_intern': 'it has no norm after the last block',
    r'eva02_\w*_clip|beit3': 'its attention has an inner norm',
    r'test_vit3': 'its attention pool reads the prefix tokens',
    r'(test_)?vit_s?relpos': 'its attention has relative position biases',
    r'vit_\w*(_r_|_r26_|_r50_|_resnet|_mci_)': 'its patches are embedded by a convolutional network (a hybrid)'}


def bare_name(name: str) -> str:
    """Returns the name without source, organisation and tag: vit_s for hf-hub:timm/vit_s.augreg_in21k."""
    return _PREFIX.sub('', name, count=1).split('.')[0]


def is_timm_name(name: str) -> bool:
    """Returns True for the name of a vision transformer of timm, such as vit_base_patch16_224.augreg_in21k."""
    bare = bare_name(name)
    return bool(_SUPPORTED.match(bare)) and bool(re.search(r'_patch\d|flexivit|test_vit', bare))


def unsupported(name: str) -> str:
    """Returns the property because of which no `ViTConfig` computes a model; '' if there is none."""
    bare = bare_name(name)
    return next((reason for pattern, reason in _UNSUPPORTED.items() if re.match(pattern, bare)), '')


def unsupported_twin(config: ViTConfig, is_eva: bool) -> str:
    """Returns the unsupported model of timm whose arrays have these names and shapes; '' if there is none.

    No supported model of timm has such arrays.

    Args:
      config: config with the fields that shapes determine.
      is_eva: the arrays have the names of timm's class Eva.
    """
    if is_eva:
        return 'eva02_enormous_patch14_clip_224' if config.width == 1792 and not config.swiglu else ''
    is_bare = not (config.class_token or config.qkv_bias or config.layer_scale or config.pre_norm)
    return 'vit_base_patch16_rpn_224' if is_bare and config.pooling.startswith('avg') else ''


def default_heads(width: int, name: str = '') -> int:
    """Returns the number of heads of timm's models of a width."""
    bare = bare_name(name)
    channels = _HEAD_WIDTHS.get(width, 64) if width > 1280 or '_dinov3' not in bare else 64
    for pattern, special in (('vit_giantopt', 96), ('vit_base_patch16_gap', 48), ('test_vit', 32)):
        channels = special if bare.startswith(pattern) else channels
    return width // channels if width % channels == 0 else 1


def facts(name: str, config: ViTConfig) -> dict[str, Any]:
    """Returns fields of `ViTConfig` by the name of a model of timm or DeiT.

    Args:
      config: config with the fields that shapes determine.

    Returns:
      norm_epsilon, activation, rope, rope_base and rope_grid; heads, if the name has the size of the config; pooling,
      if the weights do not determine it; {} for other names.
    """
    bare = bare_name(name)
    if not is_timm_name(name):
        return {}
    size = _SIZED.search(bare)
    has_size = not size or '_plus_' in bare or _WIDTHS[size[1]] == config.width
    is_dinov3 = bool(re.search('_dinov3|_lingbot', bare))
    is_eva_rope = bare.startswith('eva02_') or '_rope_reg' in bare
    activation = 'silu' if config.swiglu else 'quick_gelu' if 'quickgelu' in bare else (
        'gelu_tanh' if _TANH_SIGLIP.search(bare) else 'gelu')
    pooling = {'pooling': 'avg' if '_dinov3' in bare else 'token'} if is_dinov3 else {}
    heads = {'heads': default_heads(config.width, name)} if has_size else {}
    return {'norm_epsilon': 1e-5 if is_dinov3 or re.match(r'vit_\w*_clip_', bare) else 1e-6,
            'activation': activation, 'rope': 'dinov3' if is_dinov3 else 'eva' if is_eva_rope else '',
            'rope_base': 100.0 if is_dinov3 else 10000.0, 'rope_grid': 16 if is_eva_rope else 0} | pooling | heads


def is_projection(name: str, classes: int) -> bool:
    """Returns True if the head of a model makes CLIP's embedding: a CLIP that was not fine-tuned to classify."""
    tag = name.rpartition('.')[2]
    return '_clip_' in bare_name(name) and classes > 0 and not re.search(r'_(in1k|in12k|in22k)', f'_{tag}') and (
        classes in (512, 640, 768, 1024, 1280))
