"""EViT-DeiT-B, keep rate 0.7, inattentive tokens fused. Not run on ImageNet here.

python -m evit_jax.main --config configs/deit_b.py --workdir runs/deit_b

86.57 M parameters; 11.61 G MACs per image (dense 17.56: --config.keep.rate=1).
300 epochs are 384 M images in 375,300 steps. Top-1 on ImageNet in DeiT's paper, dense: 81.8.
"""

from evit_jax.configs import base


def get_config():
    config = base.get_config()
    config.model.name = 'deit_b'
    config.keep.update(rate=0.7, start_epoch=10, shrink_epochs=100)
    config.data.source = 'tfds'
    return config.lock()
