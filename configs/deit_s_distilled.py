"""EViT-DeiT-S with a distillation token, hard distillation, keep rate 0.7, fused. Not run on ImageNet here.

python -m evit_jax.main --config configs/deit_s_distilled.py --workdir runs/deit_s_distilled \\
    --config.teacher.path=runs/deit_b_dense

The teacher can be any trained run with the same classes; here it is configs/deit_b.py with --config.keep.rate=1.
Soft labels: --config.distill.kind=soft --config.distill.alpha=0.1.
22.44 M parameters; 3.05 G MACs per image (dense 4.62: --config.keep.rate=1).
300 epochs are 384 M images in 375,300 steps, each with a forward pass of the teacher.
Top-1 on ImageNet in DeiT's paper, dense: 81.2 with a RegNetY-16GF teacher (top-1 82.9), 79.8 without a teacher.
"""

from ml_collections import config_dict

from evit_jax.configs import base


def get_config():
    config = base.get_config()
    config.model.update(name='deit_s', distilled=True)
    config.keep.update(rate=0.7, start_epoch=10, shrink_epochs=100)
    config.distill.update(kind='hard', alpha=0.5)
    config.teacher.path = config_dict.placeholder(str)  # required: give it on the command line
    config.data.source = 'tfds'
    return config.lock()
