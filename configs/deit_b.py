"""EViT-DeiT-B, keep rate 0.7, inattentive tokens fused. DeiT's paper, dense: 81.8 top-1 on ImageNet. Not run here.

python -m evit_jax.main --config configs/deit_b.py --workdir runs/deit_b

86.57 M parameters; 11.61 G MACs an image (dense 17.56: --config.keep.rate=1). 300 epochs: 384 M images, 375,300 steps.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.name = 'deit_b'
    config.keep.update(rate=0.7, start_epoch=10, shrink_epochs=100)
    config.data.source = 'tfds'
    return config.lock()
