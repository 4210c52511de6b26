"""Array names of every vision transformer of Hugging Face, versions 4 and 5, become those of timm."""

import logging

import numpy as np
import pytest

from evit_jax.interchange.checkpoint_layouts import find_weights
from evit_jax.interchange.lazy_array import LazyArray
from evit_jax.interchange.names_hugging_face import to_hugging_face

WIDTH = 4
LINEAR, VECTOR = (WIDTH, WIDTH), (WIDTH,)
TIMM_BLOCK = {
    'norm1.weight': VECTOR, 'attn.qkv.weight': (12, WIDTH), 'attn.qkv.bias': (12,), 'attn.proj.weight': LINEAR,
    'norm2.weight': VECTOR, 'mlp.fc1.weight': (8, WIDTH), 'mlp.fc2.weight': (WIDTH, 8)}
FIRST, SECOND = (8, WIDTH), (WIDTH, 8)
ATTENTION_4 = {f'attention.attention.{part}.{kind}': shape for part in ('query', 'key', 'value')
               for kind, shape in (('weight', LINEAR), ('bias', VECTOR))} | {'attention.output.dense.weight': LINEAR}
ATTENTION_5 = {f'attention.{part}_proj.{kind}': shape for part in 'qkv'
               for kind, shape in (('weight', LINEAR), ('bias', VECTOR))} | {'attention.o_proj.weight': LINEAR}
SELF_ATTENTION = {f'self_attn.{part}_proj.{kind}': shape for part in 'qkv'
                  for kind, shape in (('weight', LINEAR), ('bias', VECTOR))} | {'self_attn.out_proj.weight': LINEAR}
VIT_NORMS = {'layernorm_before.weight': VECTOR, 'layernorm_after.weight': VECTOR}
DINO_NORMS = {'norm1.weight': VECTOR, 'norm2.weight': VECTOR}
CLIP_NORMS = {'layer_norm1.weight': VECTOR, 'layer_norm2.weight': VECTOR}
MLP = {'mlp.fc1.weight': FIRST, 'mlp.fc2.weight': SECOND}
BLOCKS = {  # name -> (prefix of a block, its arrays)
    'ViT 4': ('vit.encoder.layer.0.', ATTENTION_4 | VIT_NORMS | {
        'intermediate.dense.weight': FIRST, 'output.dense.weight': SECOND}),
    'ViT 5': ('vit.layers.0.', ATTENTION_5 | VIT_NORMS | MLP),
    'DINOv2 4': ('dinov2.encoder.layer.0.', ATTENTION_4 | DINO_NORMS | MLP),
    'DINOv2 5': ('encoder.layer.0.', ATTENTION_5 | DINO_NORMS | MLP),
    'DINOv3 4': ('layer.0.', ATTENTION_5 | DINO_NORMS | {
        'mlp.up_proj.weight': FIRST, 'mlp.down_proj.weight': SECOND}),
    'DINOv3 5': ('model.layer.0.', ATTENTION_5 | DINO_NORMS | {
        'mlp.up_proj.weight': FIRST, 'mlp.down_proj.weight': SECOND}),
    'CLIP': ('vision_model.encoder.layers.0.', SELF_ATTENTION | CLIP_NORMS | MLP),
    'SigLIP': ('encoder.layers.0.', SELF_ATTENTION | CLIP_NORMS | MLP)}


def lazy(*shape, value=0.0):
    return LazyArray(shape, np.dtype(np.float32), lambda: np.full(shape, value, np.float32))


def found(shapes, **others):
    weights = find_weights({key: lazy(*shape) for key, shape in (shapes | others).items()}, ema=False)
    return {key: value.shape for key, value in weights.arrays.items()}, weights


@pytest.mark.parametrize('name', BLOCKS)
def test_find_weights_block_of_hugging_face_has_the_names_of_timm(name):
    prefix, block = BLOCKS[name]
    base = prefix.split('.')[0] + '.' if prefix.startswith(('vit.', 'dinov2.', 'vision_model.')) else ''
    arrays, weights = found({f'{base}embeddings.cls_token': (1, 1, WIDTH)} | {
        prefix + key: shape for key, shape in block.items()})
    assert arrays == {'cls_token': (1, 1, WIDTH)} | {f'blocks.0.{key}': shape for key, shape in TIMM_BLOCK.items()}
    assert weights.layout == 'Hugging Face'


@pytest.mark.parametrize('gate', [
    {'mlp.weights_in.weight': (16, WIDTH), 'mlp.weights_out.weight': SECOND},
    {'mlp.gate_proj.weight': FIRST, 'mlp.up_proj.weight': FIRST, 'mlp.down_proj.weight': SECOND}])
def test_find_weights_gated_mlp_is_packed_with_the_gate_first(gate):
    arrays, _ = found({'embeddings.cls_token': (1, 1, WIDTH)} | {f'encoder.layer.0.{key}': shape
                                                                 for key, shape in gate.items()})
    assert arrays == {'cls_token': (1, 1, WIDTH), 'blocks.0.mlp.fc1.weight': (16, WIDTH),
                      'blocks.0.mlp.fc2.weight': SECOND}


def test_find_weights_missing_key_bias_gives_biases_of_queries_and_values():
    arrays, _ = found({'embeddings.cls_token': (1, 1, WIDTH)} | {
        f'layer.0.{key}': shape for key, shape in ATTENTION_5.items() if key != 'attention.k_proj.bias'})
    assert arrays['blocks.0.attn.q_bias'] == arrays['blocks.0.attn.v_bias'] == VECTOR
    assert 'blocks.0.attn.qkv.bias' not in arrays


@pytest.mark.parametrize('prefix', ['', 'vision_model.'])
def test_find_weights_siglip_has_an_attention_pool(prefix):
    arrays, _ = found({prefix + key: shape for key, shape in {
        'embeddings.patch_embedding.weight': (WIDTH, 3, 2, 2), 'embeddings.position_embedding.weight': (9, WIDTH),
        'post_layernorm.weight': VECTOR, 'head.probe': (1, 1, WIDTH), 'head.attention.in_proj_weight': (12, WIDTH),
        'head.attention.in_proj_bias': (12,), 'head.attention.out_proj.weight': LINEAR, 'head.layernorm.bias': VECTOR,
        'head.mlp.fc1.weight': FIRST}.items()})
    assert arrays == {
        'patch_embed.proj.weight': (WIDTH, 3, 2, 2), 'pos_embed': (1, 9, WIDTH), 'norm.weight': VECTOR,
        'attn_pool.latent': (1, 1, WIDTH), 'attn_pool.q.weight': LINEAR, 'attn_pool.kv.weight': (8, WIDTH),
        'attn_pool.q.bias': VECTOR, 'attn_pool.kv.bias': (8,), 'attn_pool.proj.weight': LINEAR,
        'attn_pool.norm.bias': VECTOR, 'attn_pool.mlp.fc1.weight': FIRST}


def test_find_weights_clip_leaves_out_the_text_model_with_a_warning(caplog):
    with caplog.at_level(logging.INFO, 'absl'):
        arrays, weights = found({
            'vision_model.embeddings.class_embedding': VECTOR, 'vision_model.pre_layrnorm.bias': VECTOR,
            'vision_model.embeddings.patch_embedding.weight': (WIDTH, 3, 2, 2), 'visual_projection.weight': (2, WIDTH),
            'text_model.embeddings.position_embedding.weight': (7, WIDTH), 'text_projection.weight': (2, WIDTH),
            'text_model.embeddings.token_embedding.weight': (9, WIDTH), 'logit_scale': ()})
    assert arrays == {'cls_token': (1, 1, WIDTH), 'norm_pre.bias': VECTOR, 'head.weight': (2, WIDTH),
                      'patch_embed.proj.weight': (WIDTH, 3, 2, 2)}
    assert weights.is_projection
    assert 'took the vision model; the text model (3 arrays) is left out' in caplog.text


@pytest.mark.parametrize('unused', ['vit.pooler.dense.weight', 'vit.embeddings.mask_token', 'decoder.norm.bias'])
def test_find_weights_arrays_of_pretraining_are_left_out(unused):
    arrays, _ = found({'vit.embeddings.cls_token': (1, 1, WIDTH), unused: VECTOR})
    assert {*arrays} == {'cls_token'}


@pytest.mark.parametrize('model_type', ['vit', 'deit', 'dinov2', 'dinov2_with_registers'])
@pytest.mark.parametrize('has_head', [True, False])
def test_to_hugging_face_is_read_back(model_type, has_head):
    rng = np.random.default_rng(0)
    names = TIMM_BLOCK | {'mlp.fc1.bias': (8,)} | ({'ls1.gamma': VECTOR} if 'dino' in model_type else {})
    arrays = {'cls_token': (1, 1, WIDTH), 'patch_embed.proj.bias': VECTOR, 'norm.weight': VECTOR} | {
        f'blocks.0.{key}': shape for key, shape in names.items()}
    arrays |= {'head.weight': (3, WIDTH)} if has_head else {}
    arrays |= {'reg_token': (1, 2, WIDTH)} if 'registers' in model_type else {}
    arrays |= {'dist_token': (1, 1, WIDTH)} if model_type == 'deit' else {}
    arrays |= {'head_dist.weight': (3, WIDTH)} if model_type == 'deit' and has_head else {}
    arrays = {key: rng.normal(size=shape) for key, shape in arrays.items()}
    theirs = to_hugging_face(arrays, model_type)
    assert (f'{model_type}.embeddings.cls_token' if has_head else 'embeddings.cls_token') in theirs
    back = find_weights({key: LazyArray(value.shape, value.dtype, lambda value=value: value)
                         for key, value in theirs.items()}, ema=False).arrays
    assert back.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(np.asarray(back[key]), value, err_msg=key)
