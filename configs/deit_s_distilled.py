"""EViT-DeiT-S with a distillation token, taught hard labels, keep rate 0.7, fused. Here: not run on ImageNet.

python -m evit_jax.main --config configs/deit_s_distilled.py --workdir runs/deit_s_distilled \\
    --config.teacher.path=runs/deit_b_dense

DeiT's paper, dense, taught by a RegNetY-16GF of 82.9: 81.2 top-1 on ImageNet (79.8 without). Any trained run of this
project can teach, here configs/deit_b.py with --config.keep.rate=1; its classes must be the same.
22.44 M parameters; 3.05 G MACs an image (dense 4.62: --config.keep.rate=1). 300 epochs: 384 M images, 375,300 steps,
each with a forward pass of the teacher. Soft labels: --config.distill.kind=soft --config.distill.alpha=0.1.
"""

from ml_collections import config_dict

from configs import base


def get_config():
    config = base.get_config()
    config.model.update(name='deit_s', distilled=True)
    config.keep.update(rate=0.7, start_epoch=10, shrink_epochs=100)
    config.distill.update(kind='hard', alpha=0.5)
    config.teacher.path = config_dict.placeholder(str)  # to be given
    config.data.source = 'tfds'
    return config.lock()
