"""Records tiny models of timm: their config files, array names and outputs. `record.py` calls it."""

import pathlib
import tempfile

import timm

from tests.golden import record_timm_models
from tests.golden.recording import Case, read_files

SMALL = {'embed_dim': 32, 'num_heads': 4}
ROPE = {'embed_dim': 32, 'num_heads': 2}  # heads of 16 values: rotary positions take a multiple of 4
# case -> name in timm, side of a patch, grids (the first is native), arguments. Grids are (rows, columns).
SQUARE, SIZES = (4, 4), ((4, 4), (6, 6), (4, 6))
CASES = {
    'vit_augreg': ('vit_tiny_patch16_224.augreg_in21k_ft_in1k', 16, SIZES, {'num_classes': 7}),
    'vit_patch8_dino': ('vit_small_patch8_224.dino', 8, ((4, 4), (6, 6), (5, 3)), {}),
    'vit_patch14': ('vit_base_patch14_reg4_dinov2.lvd142m', 14, SIZES, {'reg_tokens': 0, 'no_embed_class': False}),
    'vit_patch32': ('vit_base_patch32_224.augreg_in21k_ft_in1k', 32, ((4, 4), (3, 3), (5, 4)), {'num_classes': 7}),
    'vit_rectangle': ('vit_base_patch16_224.augreg_in21k_ft_in1k', 16, ((6, 4), (5, 5), (4, 6)), {'num_classes': 7}),
    'vit_mae_gap': ('vit_base_patch16_224.mae', 16, SIZES, {'num_classes': 7, 'global_pool': 'avg'}),
    'vit_avg': ('vit_base_patch16_224.augreg_in21k', 16, SIZES,
                {'num_classes': 7, 'global_pool': 'avg', 'fc_norm': False}),
    'vit_gap': ('vit_medium_patch16_gap_256.sw_in12k_ft_in1k', 16, SIZES, {'num_classes': 7}),
    'vit_reg4_gap': ('vit_little_patch16_reg4_gap_256.sbb_in1k', 16, SIZES, {'num_classes': 7}),
    'vit_qk_norm': ('vit_base_patch16_224.augreg_in21k', 16, SIZES, {'num_classes': 7, 'qk_norm': True}),
    'vit_clip': ('vit_base_patch16_clip_quickgelu_224.openai', 16, SIZES, {'num_classes': 512}),
    'vit_clip_classifier': ('vit_base_patch16_clip_224.laion2b_ft_in12k_in1k', 16, SIZES, {'num_classes': 7}),
    'vit_siglip': ('vit_base_patch16_siglip_224.webli', 16, SIZES, {}),
    'vit_siglip2': ('vit_base_patch32_siglip_256.v2_webli', 32, ((4, 4), (5, 5), (3, 4)), {}),
    'vit_siglip_so400m': ('vit_so400m_patch14_siglip_378.webli_ft_in1k', 14, SIZES, {'num_classes': 7}),
    'vit_siglip_gap': ('vit_base_patch16_siglip_gap_224.webli', 16, SIZES, {}),
    'flexivit': ('flexivit_small.1200ep_in1k', 16, SIZES, {'num_classes': 7}),
    'deit': ('deit_tiny_patch16_224.fb_in1k', 16, SIZES, {'num_classes': 7}),
    'deit_distilled': ('deit_tiny_distilled_patch16_224.fb_in1k', 16, SIZES, {'num_classes': 7}),
    'deit3': ('deit3_small_patch16_224.fb_in22k_ft_in1k', 16, SIZES, {'num_classes': 7}),
    'dinov2': ('vit_small_patch14_dinov2.lvd142m', 14, SIZES, {}),
    'dinov2_registers': ('vit_small_patch14_reg4_dinov2.lvd142m', 14, SIZES, {}),
    'dinov2_giant': ('vit_giant_patch14_dinov2.lvd142m', 14, SIZES, {}),
    'dinov3': ('vit_small_patch16_dinov3.lvd1689m', 16, SIZES, ROPE),
    'dinov3_qkv_bias': ('vit_small_patch16_dinov3_qkvb.lvd1689m', 16, SIZES, ROPE),
    'dinov3_swiglu': ('vit_small_plus_patch16_dinov3.lvd1689m', 16, SIZES, ROPE),
    'eva02_tiny': ('eva02_tiny_patch14_336.mim_in22k_ft_in1k', 14, SIZES, ROPE | {'num_classes': 7}),
    'eva02_base': ('eva02_base_patch14_448.mim_in22k_ft_in22k_in1k', 14, ((5, 5), (4, 4), (6, 4)),
                   ROPE | {'num_classes': 7, 'ref_feat_shape': [3, 3]}),
    'vit_rope': ('vit_medium_patch16_rope_reg1_gap_256.sbb_in1k', 16, SIZES, ROPE | {'num_classes': 7}),
}


def record(name):
    """Returns the case of a name of CASES, and the function that computes its outputs."""
    variant, patch, grids, arguments = CASES[name]
    sizes = [(patch * rows, patch * columns) for rows, columns in grids]
    arguments = SMALL | {'depth': 3, 'img_size': sizes[0]} | arguments
    native = timm.create_model(variant, **arguments).eval()
    with tempfile.TemporaryDirectory() as folder:
        timm.models.save_for_hf(native, folder, safe_serialization=True)
        configs, arrays = read_files(pathlib.Path(folder))
    model = timm.create_model(variant, **arguments, dynamic_img_size=True).eval()
    prefix = model.num_prefix_tokens

    def load(weights):
        model.load_state_dict(weights)
        return model

    def run(model, images):
        tokens = model.forward_features(images)
        pooled = tokens[:, 0] if name == 'deit_distilled' else model.forward_head(tokens, pre_logits=True)
        return {'features': pooled, 'logits': model.forward_head(tokens), 'patch_tokens': tokens[:, prefix:]}

    config = record_timm_models.read_config(native, variant)
    return Case(name, configs, arrays, sizes, config=config), load, run
