"""Recognises models that are not vision transformers of this package, and says what they are."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from absl import logging

from evit_jax.interchange import timm_models
from evit_jax.interchange.restricted_pickle import printable
from evit_jax.models.config import ViTConfig

_WANTED = ('wanted: a vision transformer with global attention in every block, such as ViT, DeiT, DINOv2, DINOv3, '
           'CLIP, SigLIP or EVA-02. Give one of those')
_SWIN = 'a Swin: windows, no global tokens to drop'
_BEIT = 'a BEiT: its attention has relative position biases between all pairs of patches, which dropping breaks'
_CONVNET = 'a convolutional network: no tokens to drop'
_PYRAMID = 'a hierarchical transformer: its stages merge neighbouring tokens, so that none can be dropped'
_HYBRID = 'a hybrid: a convolutional network embeds its patches'
_TEXT = 'a text model: no patches to drop'
_AUDIO = 'an audio model: its patches are parts of a spectrogram'
_VIDEO = 'a video model: its patches span several frames'
_DENSE = ('a model of depth, poses, boxes or masks: its decoder reads the tokens of several blocks. Give the '
          'ViT that it starts from')
_NAFLEX = 'a NaFlexViT: it packs images of any size into one sequence, with positions of their own'
_INNER_NORM = 'a model with a norm of the attention output, which no model here has'
_BY_NAME = {  # prefix of a model_type of transformers or of a name of timm -> description
    'swin': _SWIN, 'donut-swin': _SWIN, 'maskformer-swin': _SWIN, 'beit': _BEIT, 'data2vec-vision': _BEIT,
    'levit': 'a LeViT: attention over a shrinking grid', 'xcit': 'an XCiT: attention among channels, not tokens',
    'cait': 'a CaiT: class attention in blocks of their own, and talking heads',
    'mobilevit': 'a MobileViT: convolutions with attention inside patches', 'vit_hybrid': _HYBRID,
    **dict.fromkeys(('convnext', 'resnet', 'regnet', 'efficientnet', 'mobilenet', 'dinov3_convnext', 'densenet', 'vgg',
                     'convmixer', 'nfnet'), _CONVNET),
    **dict.fromkeys(('pvt', 'segformer', 'hiera', 'mvit', 'twins', 'nat', 'dinat', 'focalnet', 'davit', 'maxvit',
                     'coat', 'poolformer', 'cvt', 'pit', 'nest', 'gcvit', 'efficientformer', 'glpn'), _PYRAMID),
    **dict.fromkeys(('audio-spectrogram-transformer', 'wav2vec2', 'hubert', 'whisper', 'clap'), _AUDIO),
    **dict.fromkeys(('videomae', 'vivit', 'timesformer', 'vjepa2'), _VIDEO),
    **dict.fromkeys(('dpt', 'depth_anything', 'zoedepth', 'vitpose', 'vitdet', 'vitmatte', 'yolos', 'eomt', 'owlvit',
                     'owlv2', 'clipseg', 'upernet'), _DENSE),
    'naflexvit': _NAFLEX, 'siglip2': _NAFLEX, 'samvit': 'a SAM: windows and relative position biases',
    **dict.fromkeys(('bert', 'roberta', 'gpt', 'llama', 'clip_text', 'siglip_text', 't5', 'distilbert'), _TEXT)}
_BY_ARRAY = {  # pattern of array names -> description
    r'(?:^|\.)visual\.transformer\.resblocks\.':
        'a CLIP with the array names of OpenAI: load it with timm or transformers and save it again',
    r'(?:^|\.)layers\.\d+\.(?:blocks\.\d+|downsample)\.': _SWIN,
    r'^.*attention_bias(?:es|_idxs)': _BY_NAME['levit'], r'cls_attn_blocks\.|\.local_mp\.': _BY_NAME['xcit'],
    r'blocks_token_only\.': _BY_NAME['cait'], r'^.*(?:mobilevit|\.conv_kxk\.)': _BY_NAME['mobilevit'],
    r'^.*(?:relative_position_bias|rel_pos)': _BEIT, r'patch_embed\.backbone\.|\.bit\.embedder': _HYBRID,
    r'(?:^|\.)(?:stages|features)\.\d+\.|(?:^|\.)layer[1-4]\.\d+\.conv|(?:^|\.)(?:conv1|stem\.conv)\.weight$':
        'a convolutional network or a hierarchical transformer: no fixed set of tokens to drop',
    r'(?:^|\.)embeds\.proj\.': _NAFLEX,
    r'word_embeddings|token_embedding\.|(?:^|\.)wte\.|embed_tokens\.': _TEXT,
    r'blocks\.\d+\.attn\.norm\.': _INNER_NORM, r'patch_embed\.norm\.': 'a model with a norm in the patch embedding',
    r'blocks\.\d+\.(?:attns|ffns|attn_out_proj|in_proj|out_proj|mlp_out_proj)\.':
        'a model whose blocks run attention and MLP in parallel, which no model here does',
    r'blocks\.\d+\.(?:attn\.)?(?:lambda_[qk]\d|lambda_[ab]|sub_norm)':
        'a model with differential attention, which no model here has',
    r'rope\.freqs': 'a model with learned rotary positions, which no model here has',
    r'blocks\.\d+\.attn\.gate\.': 'a model with gated attention, which no model here has'}
_ARRAYS = re.compile('|'.join(f'(?P<r{index}>{pattern})' for index, pattern in enumerate(_BY_ARRAY)))
_PROJECTION = re.compile(r'patch_embed(?:dings)?\.(?:patch_embeddings\.)?proj(?:ection)?\.weight$')
_OURS = re.compile(r'patch_embed\.(stem|conv\d|bn\d|proj)\.|score_predictor\.')  # LV-ViT and DynamicViT


def check_config(config: Mapping[str, Any]) -> None:
    """Raises a ValueError if the config.json of Hugging Face or timm describes an unsupported model."""
    for key in ('model_type', 'architecture'):
        name = config.get(key)
        if isinstance(name, str) and (description := _description(name)):
            _refuse(description, f'{key} {printable(name)} in config.json')


def check_names(names: Iterable[str]) -> None:
    """Raises a ValueError if one of the names is that of a model of timm whose forward pass is not supported."""
    for name in names:
        if reason := timm_models.unsupported(name):
            _refuse(f'{printable(timm_models.bare_name(name))} of timm: {reason}', f'the name {printable(name)}')


def warn_of_twin(config: ViTConfig, is_eva: bool) -> None:
    """Logs a warning if an unsupported model of timm has the same arrays; see `timm_models.unsupported_twin`."""
    if twin := timm_models.unsupported_twin(config, is_eva):
        logging.warning('its arrays have the names and shapes of %s of timm too: %s, which no array shows. If it is '
                        'such a model, every result is wrong: compare with --check of evit_jax.convert', twin,
                        timm_models.unsupported(twin))


def check_arrays(arrays: Mapping[str, Any]) -> None:
    """Raises a ValueError if an array occurs only in unsupported models."""
    descriptions = list(_BY_ARRAY.values())
    found: dict[int, str] = {}
    for key in arrays:
        if (match := _ARRAYS.search(key)) and not _OURS.match(key):
            found.setdefault(int(match.lastgroup[1:]), key)
    if found:
        index = min(found)
        _refuse(descriptions[index], f'the array {printable(found[index])}')
    if 'blocks.0.norm1.weight' in arrays and 'blocks.0.norm1.bias' not in arrays:
        _refuse('a model with RMSNorm in place of layer norm, which no model here has',
                'blocks.0.norm1.weight without blocks.0.norm1.bias')
    for key in filter(_PROJECTION.search, arrays):
        shape = arrays[key].shape
        if description := {2: _NAFLEX, 5: _VIDEO}.get(len(shape)):
            _refuse(description, f'{printable(key)} of shape {shape}')
    if integers := [key for key, value in arrays.items() if len(value.shape) > 1 and value.dtype.kind in 'iub']:
        _refuse('a quantised model: its scales are unknown here. Save it in floating point',
                f'{printable(integers[0])} of dtype {arrays[integers[0]].dtype}')


def _description(name):
    """Returns the description of an unsupported model type or architecture; '' for other names."""
    bare = timm_models.bare_name(name)
    prefixes = [prefix for prefix in _BY_NAME if re.match(rf'{re.escape(prefix)}(v?\d+)?([-_.]|\d|$)', bare)]
    return _BY_NAME[max(prefixes, key=len)] if prefixes else ''


def _refuse(description: str, evidence: str) -> NoReturn:
    raise ValueError(f'this is {description} (found {evidence}; {_WANTED})')
