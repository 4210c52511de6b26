"""Array names of timm's Eva and of the code of DINOv2 and DINOv3 become those of timm's VisionTransformer."""

import numpy as np
import pytest

from evit_jax.interchange import names_timm
from evit_jax.interchange.lazy_array import LazyArray
from evit_jax.interchange.names_timm import from_timm, to_eva


def lazy(*shape, value=0.0):
    return LazyArray(shape, np.dtype(np.float32), lambda: np.full(shape, value, np.float32))


def shapes(arrays):
    return {key: value.shape for key, value in arrays.items()}


def test_from_timm_eva_block_is_renamed_and_joined():
    arrays, layout = from_timm({
        'blocks.3.gamma_1': lazy(4), 'blocks.3.attn.q_proj.weight': lazy(4, 4, value=1),
        'blocks.3.attn.k_proj.weight': lazy(4, 4, value=2), 'blocks.3.attn.v_proj.weight': lazy(4, 4, value=3),
        'blocks.3.attn.q_proj.bias': lazy(4, value=1), 'blocks.3.attn.v_proj.bias': lazy(4, value=3),
        'blocks.3.mlp.fc1_x.weight': lazy(6, 4, value=2), 'blocks.3.mlp.fc1_g.weight': lazy(6, 4, value=1),
        'norm.bias': lazy(4)})
    assert layout == names_timm.EVA
    assert shapes(arrays) == {
        'blocks.3.ls1.gamma': (4,), 'blocks.3.attn.qkv.weight': (12, 4), 'blocks.3.attn.q_bias': (4,),
        'blocks.3.attn.v_bias': (4,), 'blocks.3.mlp.fc1.weight': (12, 4), 'norm.bias': (4,)}
    np.testing.assert_array_equal(np.asarray(arrays['blocks.3.attn.qkv.weight'])[::4, 0], [1, 2, 3])
    np.testing.assert_array_equal(np.asarray(arrays['blocks.3.mlp.fc1.weight'])[::6, 0], [1, 2])  # the gate first
    assert float(np.asarray(arrays['blocks.3.attn.v_bias'])[0]) == 3


@pytest.mark.parametrize('split_qkv, split_mlp', [(True, True), (False, True), (False, False)])
def test_to_eva_is_the_inverse_of_from_timm(split_qkv, split_mlp):
    rng = np.random.default_rng(0)
    ours = {key: rng.normal(size=shape) for key, shape in {
        'blocks.0.attn.qkv.weight': (12, 4), 'blocks.0.attn.q_bias': (4,), 'blocks.0.attn.v_bias': (4,),
        'blocks.0.mlp.fc1.weight': (12, 4), 'blocks.0.mlp.fc1.bias': (12,), 'blocks.0.ls2.gamma': (4,)}.items()}
    theirs = to_eva(ours, split_qkv=split_qkv, split_mlp=split_mlp)
    assert ('blocks.0.attn.q_proj.bias' in theirs) == split_qkv and ('blocks.0.mlp.fc1_g.bias' in theirs) == split_mlp
    assert 'blocks.0.gamma_2' in theirs
    back, _ = from_timm({key: LazyArray(value.shape, value.dtype, lambda value=value: value)
                         for key, value in theirs.items()})
    assert back.keys() == ours.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(np.asarray(back[key]), value, err_msg=key)


@pytest.mark.parametrize('chunk', ['', '0.'])
def test_from_timm_names_of_dinov2_are_renamed(chunk):
    arrays, layout = from_timm({
        'cls_token': lazy(1, 1, 4), 'register_tokens': lazy(1, 4, 4), 'mask_token': lazy(1, 4),
        f'blocks.{chunk}0.ls1.gamma': lazy(4), f'blocks.{chunk}0.mlp.w12.weight': lazy(12, 4),
        f'blocks.{chunk}0.mlp.w3.bias': lazy(4)})
    assert layout == names_timm.DINOV2
    assert shapes(arrays) == {'cls_token': (1, 1, 4), 'reg_token': (1, 4, 4), 'blocks.0.ls1.gamma': (4,),
                              'blocks.0.mlp.fc1.weight': (12, 4), 'blocks.0.mlp.fc2.bias': (4,)}


def test_from_timm_masked_key_bias_of_dinov3_is_left_out():
    bias = LazyArray((12,), np.dtype(np.float32), lambda: np.arange(12, dtype=np.float32))
    arrays, _ = from_timm({
        'storage_tokens': lazy(1, 4, 4), 'blocks.0.ls1.gamma': lazy(4), 'rope_embed.periods': lazy(2),
        'blocks.0.attn.qkv.bias': bias, 'blocks.0.attn.qkv.bias_mask': lazy(12)})
    assert shapes(arrays) == {'reg_token': (1, 4, 4), 'blocks.0.ls1.gamma': (4,), 'blocks.0.attn.q_bias': (4,),
                              'blocks.0.attn.v_bias': (4,)}
    np.testing.assert_array_equal(np.asarray(arrays['blocks.0.attn.v_bias']), [8, 9, 10, 11])


def test_from_timm_parts_of_different_shapes_keep_their_names():
    arrays, _ = from_timm({f'blocks.0.attn.{part}_proj.weight': lazy(8 if part == 'q' else 4, 8) for part in 'qkv'})
    assert {*arrays} == {f'blocks.0.attn.{part}.weight' for part in 'qkv'}


def test_from_timm_two_arrays_of_one_name_are_refused():
    with pytest.raises(ValueError, match='two arrays have the timm name reg_token, one of them register_tokens'):
        from_timm({'reg_token': lazy(1, 4, 4), 'register_tokens': lazy(1, 4, 4)})
