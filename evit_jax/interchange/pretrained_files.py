"""Makes the files of a model folder that timm or transformers load: arrays, config.json, preprocessor_config.json."""

from typing import Any, NamedTuple

import numpy as np

from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.data.transforms.geometry import FILTERS
from evit_jax.interchange import timm_calls, torch_weights
from evit_jax.interchange.names_hugging_face import to_hugging_face
from evit_jax.models.config import ViTConfig, as_hw

_CLASSES = {'vit': 'ViT', 'deit': 'DeiT', 'dinov2': 'Dinov2', 'dinov2_with_registers': 'Dinov2WithRegisters'}
_ACTIVATIONS = {'gelu': 'gelu', 'gelu_tanh': 'gelu_pytorch_tanh', 'quick_gelu': 'quick_gelu'}


class PretrainedFiles(NamedTuple):
    """The contents of a model folder."""

    arrays: dict[str, np.ndarray]       # contents of model.safetensors
    configs: dict[str, dict[str, Any]]  # file name -> JSON content
    code: str                           # Python code that loads the folder {folder}


def timm_files(model: LoadedModel) -> PretrainedFiles:
    """Returns the files that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads.

    timm computes the dense model: it knows neither the reducer nor its learned modules.

    Raises:
      ValueError: timm has no such model. The message gives the reason.
    """
    params, config = torch_weights.resized(model.params, model.config, model.image_size)
    timm = timm_calls.timm_model(config, torch_weights.to_torch(params, config))
    if isinstance(timm, str):
        raise ValueError(f'the model cannot be written for timm: {timm}')
    height, width = as_hw(config.image_size)
    pretrained = {
        'input_size': [3, height, width], 'fixed_input_size': True, 'interpolation': model.interpolation,
        'crop_pct': model.eval_crop or 1.0, 'crop_mode': 'center' if model.eval_crop else 'squash',
        'mean': list(model.mean), 'std': list(model.std), 'num_classes': config.classes, 'pool_size': None,
        'first_conv': 'patch_embed.proj', 'classifier': ['head', 'head_dist'] if config.distilled else 'head',
        'custom_load': False}
    content = {
        'architecture': timm.name, 'num_classes': config.classes, 'num_features': config.width,
        'global_pool': timm_calls.global_pool(config),
        'model_args': {key: value for key, value in timm.arguments.items() if key != 'num_classes'},
        'pretrained_cfg': pretrained}
    if model.class_names:
        content['label_names'] = list(model.class_names)
    return PretrainedFiles(timm.arrays, {'config.json': content},
                           "timm.create_model('local-dir:{folder}', pretrained=True)")


def hugging_face_files(model: LoadedModel) -> PretrainedFiles:
    """Returns the files that the ViT, DeiT and DINOv2 classes of transformers load.

    Raises:
      ValueError: transformers has no such model. The message gives the reason.
    """
    params, config = torch_weights.resized(model.params, model.config, model.image_size)
    model_type = _model_type(config)
    if reason := _misfit(config, model_type, model.eval_crop):
        raise ValueError(f'the model cannot be written for transformers: its {_CLASSES[model_type]} has no {reason}')
    arrays = torch_weights.to_torch(params, config)
    wanted = 1 + config.distilled  # transformers has positions for the class and distillation tokens
    if absent := wanted - config.num_prefix_positions:
        zeros = np.zeros((1, absent, config.width), np.float32)
        arrays['pos_embed'] = np.concatenate([zeros, arrays['pos_embed']], axis=1)
    kind = 'Model' if not config.classes else 'ForImageClassification' + 'WithTeacher' * (
        config.distilled and not config.one_head)
    content = {
        'model_type': model_type, 'architectures': [_CLASSES[model_type] + kind], 'hidden_size': config.width,
        'num_hidden_layers': config.depth, 'num_attention_heads': config.heads, 'patch_size': config.patch_size,
        'image_size': config.image_size if isinstance(config.image_size, int) else list(config.image_size),
        'num_channels': 3, 'hidden_act': _ACTIVATIONS.get(config.activation, 'gelu'),
        'layer_norm_eps': config.norm_epsilon, 'qkv_bias': config.qkv_bias, 'hidden_dropout_prob': 0.0,
        'attention_probs_dropout_prob': 0.0}
    content |= {'mlp_ratio': round(config.mlp_ratio * (1.5 if config.swiglu else 1)), 'use_swiglu_ffn': config.swiglu,
                'use_mask_token': False} if config.layer_scale else {'intermediate_size': config.mlp_hidden}
    content |= {'num_register_tokens': config.registers} if config.registers else {}
    if config.classes:
        names = model.class_names or [f'LABEL_{label}' for label in range(config.classes)]
        content |= {'id2label': {str(label): name for label, name in enumerate(names)},
                    'label2id': {name: label for label, name in enumerate(names)}}
    code = f"transformers.{content['architectures'][0]}.from_pretrained('{{folder}}')"
    return PretrainedFiles(to_hugging_face(arrays, model_type),
                           {'config.json': content, 'preprocessor_config.json': _preprocessor(model, config)}, code)


def _model_type(config: ViTConfig) -> str:
    if config.layer_scale:
        return 'dinov2_with_registers' if config.registers else 'dinov2'
    return 'deit' if config.distilled else 'vit'


def _misfit(config: ViTConfig, model_type: str, crop: float | None) -> str:
    """Returns a property of a model that the model type of transformers lacks; '' if there is none."""
    is_dinov2, rectangle = model_type.startswith('dinov2'), not isinstance(config.image_size, int)
    pooling = 'token_avg' if is_dinov2 and config.classes else 'token'
    ratio = config.mlp_ratio * (1.5 if config.swiglu else 1)
    properties = {
        'convolutions before the patches': bool(config.convolutions), 'scaled branches': config.residual_scale != 1,
        'model without a class token': not config.class_token, f'pooling {config.pooling}': config.pooling != pooling,
        'registers': config.registers > 0 and not is_dinov2, 'rotary positions': bool(config.rope),
        'distillation token': is_dinov2 and config.distilled, 'norm of queries and keys': config.qk_norm,
        'bias for queries and values only': config.qkv_bias and not config.k_bias,
        'norm before the blocks': config.pre_norm, 'patch projection without a bias': not config.patch_bias,
        'positions of registers': config.num_prefix_positions > 1 + config.distilled,
        'rectangular images': is_dinov2 and rectangle,  # it reads the positions as those of a square
        'central crop of a rectangle (crop=0 leaves it out)': rectangle and bool(crop),
        'projection': config.projection or not config.head_bias,
        'gated MLP of this width': config.swiglu and (not is_dinov2 or config.mlp_norm or config.mlp_hidden != (
            int(int(config.width * round(ratio)) * 2 / 3) + 7) // 8 * 8),
        f'MLP ratio {config.mlp_ratio:g}': is_dinov2 and not config.swiglu and ratio != round(ratio),
        f'activation {config.activation}': not config.swiglu and config.activation not in _ACTIVATIONS}
    return next((name for name, holds in properties.items() if holds), '')


def _preprocessor(model, config):
    """Returns the content of preprocessor_config.json."""
    (height, width), crop = as_hw(config.image_size), model.eval_crop
    size = {'height': height, 'width': width}
    sizes = {'image_processor_type': 'BitImageProcessor', 'size': {'shortest_edge': round(height / crop)},
             'do_center_crop': True, 'crop_size': size} if crop else {
        'image_processor_type': 'ViTImageProcessor', 'size': size}
    return sizes | {'do_resize': True, 'resample': FILTERS.index(model.interpolation),
                    'do_rescale': True, 'rescale_factor': 1 / 255, 'do_normalize': True,
                    'image_mean': list(model.mean), 'image_std': list(model.std)}
