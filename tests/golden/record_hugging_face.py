"""Records tiny models of transformers: their config files, array names and outputs. `record.py` calls it."""

import json
import pathlib
import re
import tempfile

import torch
import transformers

from tests.golden.recording import Case, read_files

SMALL = {'image_size': 64, 'patch_size': 16, 'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 4,
         'intermediate_size': 128}
LABELS = {'id2label': {number: f'label {number}' for number in range(7)}}
TEXT = {'hidden_size': 32, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 32, 'vocab_size': 20,
        'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0, 'max_position_embeddings': 4}
ROTARY = SMALL | {'num_attention_heads': 2, 'num_register_tokens': 4, 'layerscale_value': 0.1}
# case -> class of the model, prefix tokens, arguments of its config
CASES = {
    'hf_vit': ('ViTModel', 1, SMALL),
    'hf_vit_classifier': ('ViTForImageClassification', 1, SMALL | LABELS),
    'hf_deit': ('DeiTModel', 2, SMALL),
    'hf_deit_classifier': ('DeiTForImageClassification', 2, SMALL | LABELS),
    'hf_deit_teacher': ('DeiTForImageClassificationWithTeacher', 2, SMALL | LABELS),
    'hf_dinov2': ('Dinov2Model', 1, SMALL),
    'hf_dinov2_classifier': ('Dinov2ForImageClassification', 1, SMALL | LABELS),
    'hf_dinov2_giant': ('Dinov2Model', 1, SMALL | {'use_swiglu_ffn': True, 'hidden_size': 48}),
    'hf_dinov2_registers': ('Dinov2WithRegistersModel', 5, SMALL),
    'hf_dinov2_registers_classifier': ('Dinov2WithRegistersForImageClassification', 5, SMALL | LABELS),
    'hf_dinov3': ('DINOv3ViTModel', 5, ROTARY),
    'hf_dinov3_gated': ('DINOv3ViTModel', 5, ROTARY | {'use_gated_mlp': True, 'hidden_act': 'silu'}),
    'hf_clip': ('CLIPModel', 1, {'vision_config': SMALL, 'text_config': TEXT, 'projection_dim': 24}),
    'hf_clip_vision': ('CLIPVisionModel', 1, SMALL),
    'hf_clip_projection': ('CLIPVisionModelWithProjection', 1, SMALL | {'projection_dim': 24}),
    'hf_siglip': ('SiglipModel', 0, {'vision_config': SMALL, 'text_config': TEXT}),
    'hf_siglip_vision': ('SiglipVisionModel', 0, SMALL),
    'hf_siglip_classifier': ('SiglipForImageClassification', 0, LABELS | {'vision_config': SMALL, 'text_config': TEXT}),
    'hf_vit_msn': ('ViTMSNModel', 1, SMALL),
    'hf_mae': ('ViTMAEModel', 1, SMALL | {'mask_ratio': 0.0}),
}
SIZES = [(64, 64), (96, 96), (64, 96)]
PREPROCESSORS = {  # published values: google/vit-base-patch16-224, facebook/dinov2-base, openai/clip-vit-base-patch16
    'ViT': {'do_normalize': True, 'do_resize': True, 'image_mean': [0.5, 0.5, 0.5], 'image_std': [0.5, 0.5, 0.5],
            'size': {'height': 64, 'width': 64}},
    'Dinov2': {'do_center_crop': True, 'do_normalize': True, 'do_resize': True, 'resample': 3,
               'crop_size': {'height': 64, 'width': 64}, 'size': {'shortest_edge': 73},
               'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.229, 0.224, 0.225]},
    'CLIP': {'crop_size': 64, 'do_center_crop': True, 'do_normalize': True, 'do_resize': True, 'resample': 3, 'size': 64,
             'image_mean': [0.48145466, 0.4578275, 0.40821073], 'image_std': [0.26862954, 0.26130258, 0.27577711]}}
UNUSED = r'pooler|mask_token|text_model|text_projection|logit_'
UNUSED_BY_HEAD = {'SiglipForImageClassification': r'|vision_model\.head\.'}  # the head reads the mean of the patches
NEVER_RESIZED = ('Dinov2', 'DINOv3')  # models that take images of any size without an argument


def record(name):
    """Returns the case of a name of CASES, and the functions that load its weights and compute its outputs."""
    kind, prefix, arguments = CASES[name]
    model_class = getattr(transformers, kind)
    with tempfile.TemporaryDirectory() as folder:
        model_class(model_class.config_class(**arguments)).save_pretrained(folder)
        configs, arrays = read_files(pathlib.Path(folder))
    if preprocessor := next((value for key, value in PREPROCESSORS.items() if kind.startswith(key)), None):
        configs['preprocessor_config.json'] = preprocessor

    def load(weights):
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / 'config.json').write_text(json.dumps(configs['config.json']))
            transformers.modeling_utils.safe_save_file(weights, f'{folder}/model.safetensors', {'format': 'pt'})
            model, report = model_class.from_pretrained(folder, output_loading_info=True, attn_implementation='eager')
        assert not any(report.values()), report
        return model.eval()

    def run(model, images):
        return run_model(model, images, prefix)

    unused = UNUSED + UNUSED_BY_HEAD.get(kind, '')
    return Case(name, configs, arrays, SIZES, unused=[key for key in arrays if re.search(unused, key)]), load, run


def run_model(model, images, prefix):
    """Returns features, logits (the features of a model without a head) and patch tokens after the last norm."""
    kind = type(model).__name__
    resize = {} if kind.startswith(NEVER_RESIZED) else {'interpolate_pos_encoding': True}
    if kind == 'ViTMAEModel':  # rising noise keeps the order of the patches
        patches = images.shape[2] * images.shape[3] // model.config.patch_size**2
        resize['noise'] = torch.arange(patches).expand(len(images), -1)
    base = next((getattr(model, part) for part in (
        'vision_model', 'vit', 'deit', 'dinov2', 'dinov2_with_registers') if hasattr(model, part)), model)
    outputs = base(images, **resize)
    tokens = outputs.last_hidden_state
    if kind.startswith('CLIP'):  # it normalises the class token alone
        tokens = base.post_layernorm(tokens)
    patches, features = tokens[:, prefix:], tokens[:, 0]
    if kind.startswith('Siglip'):
        features = patches.mean(1) if kind.endswith('Classification') else outputs.pooler_output
    elif kind.startswith('Dinov2') and kind.endswith('Classification'):
        features = torch.cat([features, patches.mean(1)], 1)
    logits = features
    if kind.endswith('Classification') or kind.endswith('WithTeacher'):
        logits = model(images, **resize).logits
    elif kind in ('CLIPModel', 'CLIPVisionModelWithProjection'):
        logits = model.visual_projection(features)
    return {'features': features, 'logits': logits, 'patch_tokens': patches}


def other_names(case, weights, model):
    """Returns the names of the arrays in other versions of transformers.

    They are the module names of version 5, if `save_pretrained` writes others, and the prefix that version 4 writes
    for vision models of CLIP and SigLIP.

    Returns:
      layout -> {name: saved name, or [saved name, first row, row after the last]}.
    """
    if type(model).__name__ in ('CLIPVisionModel', 'SiglipVisionModel'):
        return {'version 4': {f'vision_model.{name}': name for name in case.arrays}}
    modules = {name: find_rows(value.numpy(), weights) for name, value in model.state_dict().items()}
    return {} if all(name == saved for name, saved in modules.items()) else {'version 5': modules}


def find_rows(value, weights):
    """Returns the name of an equal array, or the name and rows of an array that contains the values."""
    for name, saved in weights.items():
        if saved.shape == value.shape and (saved == value).all():
            return name
        for start in range(0, len(saved) if saved.ndim else 0, len(value) if value.ndim else 1):
            rows = saved[start:start + len(value)] if value.ndim else None
            if rows is not None and rows.shape == value.shape and (rows == value).all():
                return [name, start, start + len(value)]
    raise ValueError(f'no array of the file has the values of shape {value.shape}')
