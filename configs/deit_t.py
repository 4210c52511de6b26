"""EViT-DeiT-T, keep rate 0.7, inattentive tokens fused. DeiT's paper, dense: 72.2 top-1 on ImageNet. Not run here.

python -m evit_jax.main --config configs/deit_t.py --workdir runs/deit_t

5.72 M parameters; 0.82 G MACs an image (dense 1.25: --config.keep.rate=1). 300 epochs: 384 M images, 375,300 steps.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.name = 'deit_t'
    config.keep.update(rate=0.7, start_epoch=10, shrink_epochs=100)
    config.data.source = 'tfds'
    return config.lock()
