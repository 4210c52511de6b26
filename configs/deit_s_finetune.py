"""EViT-DeiT-S fine-tuned for 30 epochs from a trained dense DeiT-S, keep rate 0.7, fused. Not run on ImageNet here.

python -m evit_jax.main --config configs/deit_s_finetune.py --workdir runs/finetune --config.init_from=runs/deit_s_dense

The dense run is configs/deit_s.py with --config.keep.rate=1.
22.05 M parameters; 3.03 G MACs per image (dense 4.60). 30 epochs are 38 M images in 18,765 steps.
Top-1 on ImageNet in EViT's paper: 79.5; at keep rate 0.5 (--config.keep.rate=0.5): 78.5.
"""

from ml_collections import config_dict

from evit_jax.configs import base


def get_config():
    config = base.get_config()
    config.batch_size = 2048
    config.epochs = 30
    config.init_from = config_dict.placeholder(str)  # required: give it on the command line
    config.model.update(name='deit_s', drop_path=0.0)  # the paper fine-tunes in evaluation mode
    config.keep.rate = 0.7  # constant: no keep-rate schedule
    config.data.source = 'tfds'
    config.optimizer.update(lr=2e-5, warmup_epochs=0.0, min_lr=2e-6, weight_decay=1e-6)
    return config.lock()
