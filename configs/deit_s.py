"""EViT-DeiT-S, keep rate 0.7, inattentive tokens fused. Paper: 79.5 top-1 on ImageNet. Here: not run on ImageNet.

python -m evit_jax.main --config configs/deit_s.py --workdir runs/deit_s

22.05 M parameters; 3.03 G MACs an image (dense 4.60: --config.keep.rate=1, paper 79.8). 300 epochs: 384 M images,
375,300 steps. ImageNet is read as TFDS prepared it, in data/; --config.data.source=generated tries it without.

Higher resolution for about the MACs of the dense model at 224; the paper's top-1:
  --config.model.image_size=304 --config.keep.rate=0.5    81.0   4.44 G
  --config.model.image_size=288 --config.keep.rate=0.6    81.0   4.50 G
  --config.model.image_size=272 --config.keep.rate=0.7    80.3   4.56 G
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.name = 'deit_s'
    config.keep.update(rate=0.7, start_epoch=10, shrink_epochs=100)
    config.data.source = 'tfds'
    return config.lock()
