"""EViT-DeiT-S, keep rate 0.7, inattentive tokens fused. Paper: 79.5 top-1 on ImageNet. Here: not run on ImageNet.

python -m evit_jax.main --config configs/deit_s.py --workdir runs/deit_s

Runs on generated images until ImageNet input stands; 22.05 M parameters, 3.03 G MACs an image against 4.60 dense.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.update(name='deit_s', reduce_at=(3, 6, 9), fuse=True)
    config.keep.update(rate=0.7, start_epoch=10, shrink_epochs=100, levels=8)
    return config.lock()
