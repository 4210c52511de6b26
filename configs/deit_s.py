"""EViT-DeiT-S, keep rate 0.7, inattentive tokens fused. Not run on ImageNet here.

python -m evit_jax.main --config configs/deit_s.py --workdir runs/deit_s

22.05 M parameters; 3.03 G MACs per image (dense 4.60: --config.keep.rate=1).
300 epochs are 384 M images in 375,300 steps. Top-1 on ImageNet in EViT's paper: 79.5 (dense 79.8).
ImageNet is read from data/, as prepared by TFDS; --config.data.source=generated runs without it.

Higher resolutions with about the MACs of the dense model at 224; top-1 in the paper, and MACs:
  --config.model.image_size=304 --config.keep.rate=0.5    81.0   4.44 G
  --config.model.image_size=288 --config.keep.rate=0.6    81.0   4.50 G
  --config.model.image_size=272 --config.keep.rate=0.7    80.3   4.56 G
"""

from evit_jax.configs import base


def get_config():
    config = base.get_config()
    config.model.name = 'deit_s'
    config.keep.update(rate=0.7, start_epoch=10, shrink_epochs=100)
    config.data.source = 'tfds'
    return config.lock()
