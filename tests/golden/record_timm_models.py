"""Records the table of timm's vision transformers: their ViTConfig, preprocessing and reason of refusal.

Each registered model is created on PyTorch's meta device, and its module tree is inspected. `record.py` calls it.
"""

import timm
import torch
from timm.layers import (
    Attention,
    AttentionPoolLatent,
    AttentionRope,
    GluMlp,
    LayerScale,
    Mlp,
    PatchEmbed,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    SwiGLU,
)
from timm.models import deit, eva, vision_transformer

MODULES = ('beit', 'deit', 'eva', 'naflexvit', 'vision_transformer', 'vision_transformer_hybrid',
           'vision_transformer_relpos', 'vision_transformer_sam')
FORMAT = (
    'models: name without tag -> entry. An entry has either `unsupported`, the reason why no ViTConfig computes the '
    'model, or `config`, all fields of its ViTConfig under the default tag (the first of `tags`). `layout`: the index '
    'of its arrays in `layouts`. `tags`: pretrained tag -> mean, std, crop (crop_pct), crop_mode, interpolation, '
    'and `config`, the fields that differ from those of the default tag (often image_size, classes). '
    "layouts: arrays of state dicts, name -> shape. A name with blocks.* stands for each block, if all blocks have equal arrays. The default tag's "
    'image size and classes apply. projection is a judgement by name: a CLIP tag without an ImageNet tag. '
    'image_size is the size of pos_embed in the file, [height, width] if not a square. layer_scale is an initial value: '
    'a file tells only that it is not 0.')
ACTIVATIONS = {'GELU': 'gelu', 'GELUTanh': 'gelu_tanh', 'GeluTanh': 'gelu_tanh', 'QuickGELU': 'quick_gelu',
               'SiLU': 'silu'}


class Unsupported(ValueError):
    """Raised if no ViTConfig computes the forward pass of a model."""


def require(condition, reason):
    if not condition:
        raise Unsupported(reason)


def record():
    """Returns the table: format, models and layouts."""
    names = [name for module in MODULES for name in timm.list_models(module=module)]
    pretrained = {}
    for full in timm.list_pretrained():
        name, _, tag = full.partition('.')
        pretrained.setdefault(name, []).append(tag)
    layouts, models = [], {}
    for name in sorted(names):
        default = timm.get_pretrained_cfg(name)
        tags = dict.fromkeys([(default and default.tag) or '', *pretrained.get(name, ())])
        models[name] = record_model(name, [tag for tag in tags if tag or len(tags) == 1], layouts)
    return {'format': FORMAT, 'models': models, 'layouts': layouts}


def record_model(name, tags, layouts):
    entry = {'tags': {}}
    for tag in tags:
        full = f'{name}.{tag}' if tag else name
        with torch.device('meta'):
            model = timm.create_model(full)
        try:
            config = read_config(model, full)
        except Unsupported as error:
            return {'unsupported': str(error), 'layout': add_layout(layouts, read_layout(model))}
        differs = {key: value for key, value in config.items() if value != entry.setdefault('config', config)[key]}
        entry['tags'][tag] = read_preprocessing(model.pretrained_cfg) | ({'config': differs} if differs else {})
        if 'layout' not in entry:
            entry['layout'] = add_layout(layouts, read_layout(model))
    return entry


def add_layout(layouts, layout):
    """Returns the index of a layout, which is appended if it is new."""
    if layout not in layouts:
        layouts.append(layout)
    return layouts.index(layout)


def read_layout(model):
    """Returns the shapes of the arrays by name. The arrays of equal blocks are written once."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    blocks, others = {}, {}
    for name, shape in shapes.items():
        if name.startswith('blocks.'):
            _, number, rest = name.split('.', 2)
            blocks.setdefault(int(number), {})[f'blocks.*.{rest}'] = shape
        else:
            others[name] = shape
    are_equal = all(block == blocks[0] for block in blocks.values())
    return others | blocks.get(0, {}) if are_equal else shapes


def read_preprocessing(cfg):
    return {'mean': list(cfg['mean']), 'std': list(cfg['std']), 'crop': cfg['crop_pct'],
            'crop_mode': cfg.get('crop_mode') or 'center', 'interpolation': cfg['interpolation']}


def read_config(model, name):
    """Returns the fields of the ViTConfig of a model.

    Raises:
      Unsupported: no ViTConfig computes this model.
    """
    kind = type(model)
    known = (vision_transformer.VisionTransformer, deit.VisionTransformerDistilled, eva.Eva)
    require(kind in known, f'class {kind.__name__} of timm.models.{kind.__module__.rpartition(".")[2]}')
    block = model.blocks[0]
    require(type(block) in (vision_transformer.Block, eva.EvaBlock), f'blocks of class {type(block).__name__}')
    patch, distilled = model.patch_embed, kind is deit.VisionTransformerDistilled
    require(type(patch) is PatchEmbed, f'a patch embedding of class {type(patch).__name__}')
    require(type(patch.norm) is torch.nn.Identity, 'a norm in the patch embedding')
    require(len(set(patch.patch_size)) == 1, f'patches of {patch.patch_size}')
    prefix = model.num_prefix_tokens > 0
    registers = 0 if model.reg_token is None else model.reg_token.shape[1]
    config = {'image_size': image_size(patch), 'patch_size': patch.patch_size[0], 'width': model.embed_dim,
              'depth': len(model.blocks), 'classes': model.num_classes, 'distilled': distilled,
              'class_token': model.cls_token is not None, 'registers': registers,
              'prefix_positions': 0 if model.no_embed_class and prefix and model.pos_embed is not None else None,
              'absolute_positions': model.pos_embed is not None, 'position_resize': 'antialiased',
              'pre_norm': type(model.norm_pre) is not torch.nn.Identity, 'patch_bias': patch.proj.bias is not None}
    return (config | read_norms(model) | read_attention(block.attn) | read_mlp(block.mlp, model.embed_dim)
            | read_rope(getattr(model, 'rope', None), model) | read_layer_scale(block) | read_pooling(model)
            | read_head(model, name))


def image_size(patch):
    """Returns the size in pixels that the patches cover; timm leaves out the rest of an image."""
    height, width = (count * side for count, side in zip(patch.grid_size, patch.patch_size))
    return height if height == width else [height, width]


def read_norms(model):
    """All norms of a ViTConfig are layer norms with scale, bias and one epsilon."""
    norms = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if 'Norm' in kind:
            require(isinstance(module, torch.nn.LayerNorm), f'norms of class {kind} ({name})')
            require(module.bias is not None, f'norms without bias ({name})')
            norms.setdefault(module.eps, name)
    require(len(norms) == 1, f'norms with the epsilons {", ".join(map(str, norms))}')
    return {'norm_epsilon': min(norms)}


def read_attention(attention):
    kind = type(attention)
    require(kind in (Attention, AttentionRope, eva.EvaAttention), f'attention of class {kind.__name__}')
    require(type(attention.norm) is torch.nn.Identity, 'a norm of the attention output')
    require(attention.gate is None, 'gated attention')
    require(getattr(attention, 'num_kv_heads', attention.num_heads) == attention.num_heads, 'grouped-query attention')
    width = attention.proj.weight.shape[0]
    require(attention.num_heads * attention.head_dim == width, f'heads of {attention.head_dim}, which do not add up to '
            f'the width {width}')
    require(attention.proj.bias is not None, 'no bias of the attention output')
    if attention.qkv is None:
        biases = tuple(part.bias is not None for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    else:
        separate = getattr(attention, 'q_bias', None) is not None
        biases = (True, False, True) if separate else (attention.qkv.bias is not None,) * 3
    return {'heads': attention.num_heads, 'qkv_bias': biases[0], 'k_bias': biases[1] or not biases[0],
            'qk_norm': type(attention.q_norm) is not torch.nn.Identity}


def read_mlp(mlp, width):
    kind = type(mlp)
    require(kind in (Mlp, GluMlp, SwiGLU), f'an MLP of class {kind.__name__}')
    require(mlp.fc2.bias is not None, 'no biases in the MLP')
    activation = type(mlp.act).__name__
    require(activation in ACTIVATIONS, f'the activation {activation}')
    hidden, norm = mlp.fc2.weight.shape[1], type(mlp.norm) is not torch.nn.Identity
    require(kind is not Mlp or not norm, 'a norm in an MLP without gate')
    require(kind is not GluMlp or not mlp.gate_last, 'a gated MLP with the gate last')
    return {'mlp_ratio': hidden / width, 'activation': ACTIVATIONS[activation], 'swiglu': kind is not Mlp,
            'mlp_norm': norm}


def read_rope(rope, model):
    if rope is None:
        return {'rope': '', 'rope_base': 10000.0, 'rope_grid': 0}
    require(type(rope) in (RotaryEmbeddingCat, RotaryEmbeddingDinoV3), f'rotary positions of class '
            f'{type(rope).__name__}')
    require(rope.grid_indexing == 'ij', f'rotary positions with the indexing {rope.grid_indexing}')
    require(rope.grid_offset == 0, f'rotary positions with an offset of {rope.grid_offset}')
    half = model.blocks[0].attn.rotate_half
    if type(rope) is RotaryEmbeddingDinoV3:
        require(half and rope.normalize_coords == 'separate' and rope.min_period is None, 'rotary positions that are '
                'normalised otherwise than in DINOv3')
        return {'rope': 'dinov3', 'rope_base': rope.temperature, 'rope_grid': 0}
    require(not half and not rope.in_pixels, 'rotary positions that pair values otherwise than in EVA-02')
    grid = rope.ref_feat_shape or (0,)
    require(len(set(grid)) == 1, f'rotary positions for a reference grid of {grid}')
    return {'rope': 'eva', 'rope_base': float(rope.temperature), 'rope_grid': grid[0]}


def read_layer_scale(block):
    if isinstance(block, eva.EvaBlock):
        present = [gamma is not None for gamma in (block.gamma_1, block.gamma_2)]
        value = block.init_values
    else:
        present = [type(scale) is LayerScale for scale in (block.ls1, block.ls2)]
        value = block.ls1.init_values if present[0] else 0.0
    require(len(set(present)) == 1, 'LayerScale in one of two branches')
    return {'layer_scale': float(value) if present[0] else 0.0}


def read_pooling(model):
    norm, fc_norm = (type(part) is not torch.nn.Identity for part in (model.norm, model.fc_norm))
    require(norm or fc_norm, 'no norm after the blocks')
    require(not (norm and fc_norm), 'a norm before and a norm after the pooling')
    pooling = model.global_pool
    if pooling == 'map':
        require(norm, 'attention pooling without a norm before it')
        return check_attention_pool(model)
    require(pooling in ('token', 'avg'), f'pooling {pooling!r}')
    require(pooling == 'token' or not getattr(model, 'pool_include_prefix', False), 'a mean that includes the prefix '
            'tokens')
    return {'pooling': 'avg_fc_norm' if pooling == 'avg' and fc_norm else pooling}


def check_attention_pool(model):
    pool, attention, mlp = model.attn_pool, model.blocks[0].attn, model.blocks[0].mlp
    require(type(pool) is AttentionPoolLatent and pool.latent_len == 1 and pool.mlp is not None,
            f'attention pooling of class {type(pool).__name__}')
    require(type(pool.q_norm) is torch.nn.Identity and pool.pos_embed is None, 'attention pooling with norms of queries '
            'or positions')
    require(pool.num_heads == attention.num_heads, f'attention pooling with {pool.num_heads} heads, blocks with '
            f'{attention.num_heads}')
    require(type(pool.mlp.act) is type(mlp.act), 'attention pooling with another activation than the blocks')
    require(pool.mlp.fc1.weight.shape == mlp.fc1.weight.shape, 'attention pooling with another MLP than the blocks')
    require(model.num_prefix_tokens == 0 or not getattr(model, 'pool_include_prefix', True),
            'attention pooling of patches and prefix tokens')
    return {'pooling': 'map'}


def read_head(model, name):
    if not model.num_classes:
        return {'projection': False, 'head_bias': True}
    tag = name.partition('.')[2]
    is_clip = 'clip' in name or any(word in tag for word in ('openai', 'laion', 'datacomp', 'metaclip', 'dfn', 'webli'))
    return {'projection': is_clip and 'in1k' not in tag and 'in12k' not in tag, 'head_bias': model.head.bias is not None}

