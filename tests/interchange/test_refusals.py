"""Models that are no plain vision transformers are refused by what they are."""

import numpy as np
import pytest

from evit_jax.interchange import architecture, refusals
from evit_jax.interchange.checkpoint_layouts import find_weights
from evit_jax.interchange.lazy_array import LazyArray

VIT = ('cls_token', 'pos_embed', 'patch_embed.proj.weight', 'blocks.0.norm1.weight', 'blocks.0.norm1.bias',
       'blocks.0.attn.qkv.weight', 'blocks.0.mlp.fc1.weight', 'blocks.0.mlp.fc2.weight', 'norm.bias')


def lazy(*shape):
    return LazyArray(shape, np.dtype(np.float32), lambda: np.zeros(shape, np.float32))


@pytest.mark.parametrize('key, message', [
    ('layers.0.blocks.0.attn.relative_position_bias_table', 'a Swin: windows, no global tokens to drop'),
    ('swin.encoder.layers.0.blocks.0.layernorm_before.weight', 'a Swin'), ('layers.1.downsample.norm.bias', 'a Swin'),
    ('stages.0.blocks.0.attn.attention_biases', 'a LeViT'), ('blocks.0.local_mp.conv1.weight', 'an XCiT'),
    ('cls_attn_blocks.0.norm1.bias', 'an XCiT'), ('blocks_token_only.0.gamma_1', 'a CaiT'),
    ('stages.2.1.conv_kxk.conv.weight', 'a MobileViT'), ('blocks.0.attn.relative_position_bias_table', 'a BEiT'),
    ('encoder.layer.0.attention.attention.relative_position_bias.index', 'a BEiT'),
    ('stages.0.blocks.1.conv_dw.weight', 'a convolutional network or a hierarchical'),
    ('layer1.0.conv1.weight', 'a convolutional network or a hierarchical'),
    ('patch_embed.backbone.stem.conv.weight', 'a hybrid'), ('embeds.proj.weight', 'a NaFlexViT'),
    ('bert.embeddings.word_embeddings.weight', 'a text model'), ('token_embedding.weight', 'a text model'),
    ('visual.transformer.resblocks.0.ln_1.weight', 'a CLIP with the array names of OpenAI'),
    ('blocks.0.attn.norm.weight', 'a norm of the attention output'), ('patch_embed.norm.weight', 'a norm in the patch'),
    ('blocks.0.attns.0.norm.bias', 'in parallel'), ('blocks.0.attn.lambda_q1', 'differential attention'),
    ('rope.freqs', 'learned rotary positions'), ('blocks.0.attn.gate.weight', 'gated attention')])
@pytest.mark.parametrize('others', [VIT, ()])
def test_detect_array_of_another_model_is_refused_by_what_it_is(key, message, others):
    weights = find_weights({name: lazy(4, 4) for name in (*others, key)}, ema=False)
    with pytest.raises(ValueError, match=rf'^this is .*{message}.*\(found .*; wanted: a vision transformer with'):
        architecture.detect(weights.arrays)


@pytest.mark.parametrize('config, message', [
    ({'model_type': 'swin'}, 'a Swin'), ({'model_type': 'swinv2'}, 'a Swin'), ({'model_type': 'beit'}, 'a BEiT'),
    ({'model_type': 'levit'}, 'a LeViT'), ({'model_type': 'mobilevitv2'}, 'a MobileViT'),
    ({'model_type': 'convnextv2'}, 'a convolutional network'), ({'model_type': 'vit_hybrid'}, 'a hybrid'),
    ({'model_type': 'audio-spectrogram-transformer'}, 'an audio model'), ({'model_type': 'videomae'}, 'a video model'),
    ({'model_type': 'dpt'}, 'a model of depth'),
    ({'model_type': 'siglip2'}, 'a NaFlexViT'), ({'model_type': 'clip_text_model'}, 'a text model'),
    ({'architecture': 'swin_tiny_patch4_window7_224.ms_in1k'}, 'a Swin'), ({'architecture': 'cait_s24_224'}, 'a CaiT'),
    ({'architecture': 'xcit_nano_12_p16_224'}, 'an XCiT'), ({'architecture': 'beitv2_base_patch16_224'}, 'a BEiT')])
def test_check_config_of_another_model_is_refused_by_what_it_is(config, message):
    with pytest.raises(ValueError, match=rf'^this is {message}.*\(found (model_type|architecture) .* in config.json; '):
        refusals.check_config(config)


@pytest.mark.parametrize('name', ['vit', 'deit', 'dinov2', 'dinov3_vit', 'siglip', 'clip', 'vit_mae',
                                  'vit_base_patch16_siglip_224.v2_webli', 'eva02_tiny_patch14_224', 7, None])
def test_check_config_of_a_vision_transformer_is_accepted(name):
    refusals.check_config({'model_type': name, 'architecture': name})
    refusals.check_names([name] if isinstance(name, str) else [])


@pytest.mark.parametrize('name', ['vit_base_patch16_rpn_224.pth', 'timm/vit_pe_core_base_patch16_224',
                                  'vit_pwee_patch16', 'eva02_enormous_patch14_clip_224', 'vit_base_r50_s16_224.in1k'])
def test_check_names_of_another_forward_pass_are_refused(name):
    with pytest.raises(ValueError, match=r'of timm: .*\(found the name '):
        refusals.check_names(['mine', name])


def test_detect_rmsnorm_and_linear_patches_are_refused():
    arrays = {name: lazy(4, 4) for name in VIT if name != 'blocks.0.norm1.bias'}
    with pytest.raises(ValueError, match='a model with RMSNorm'):
        architecture.detect(arrays)
    with pytest.raises(ValueError, match=r'a NaFlexViT.*patch_embed.proj.weight of shape \(4, 4\)'):
        architecture.detect({name: lazy(4, 4) for name in VIT})


@pytest.mark.parametrize('key', ['patch_embed.proj.weight', 'videomae.embeddings.patch_embeddings.projection.weight'])
def test_detect_patches_of_several_frames_are_refused(key):
    with pytest.raises(ValueError, match=rf'this is a video model.*\(found {key} of shape \(4, 3, 2, 4, 4\)'):
        architecture.detect({name: lazy(4) for name in VIT} | {key: lazy(4, 3, 2, 4, 4)})


@pytest.mark.parametrize('dtype', [np.int8, np.uint8, np.int32, np.bool_])
def test_detect_integer_weights_are_refused(dtype):
    integers = LazyArray((8, 4), np.dtype(dtype), lambda: np.zeros((8, 4), dtype))
    arrays = {name: lazy(4, 3, 2, 2) for name in VIT} | {'blocks.0.mlp.fc1.weight': integers}
    with pytest.raises(ValueError, match=r'a quantised model.*blocks.0.mlp.fc1.weight of dtype'):
        architecture.detect(arrays)


def test_find_weights_clip_classifier_is_refused():
    arrays = {f'vision_model.{name}': lazy(4) for name in ('embeddings.class_embedding', 'pre_layrnorm.weight')}
    with pytest.raises(ValueError, match='it is a CLIPForImageClassification'):
        find_weights(arrays | {'classifier.weight': lazy(5, 4)}, ema=False)


def test_find_weights_many_arrays_are_refused_in_time_linear_in_their_number():
    """A cost quadratic in 30,000 arrays would take hours."""
    for key in ('x.{}.cls_token', 'blocks.{}.norm1.bias', 'vit.encoder.layer.{}.thing.weight', 'extra.{}.weight'):
        arrays = {key.format(number): lazy(1) for number in range(30_000)}
        with pytest.raises(ValueError) as error:
            architecture.detect(find_weights({'cls_token': lazy(1, 1, 1)} | arrays, ema=False).arrays)
        assert len(str(error.value)) < 1000


def test_detect_too_many_blocks_are_refused():
    arrays = {f'blocks.{block}.norm1.bias': lazy(4) for block in range(300)}
    arrays |= {'patch_embed.proj.weight': lazy(4, 3, 2, 2), 'blocks.0.mlp.fc1.weight': lazy(8, 4),
               'blocks.0.mlp.fc2.weight': lazy(4, 8)}
    with pytest.raises(ValueError, match='it has 300 blocks; at most 256 are supported'):
        architecture.detect(arrays)
