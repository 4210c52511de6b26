"""DynamicViT-DeiT-S fine-tuned for 30 epochs from a trained dense DeiT-S, keep rate 0.7. Not run on ImageNet here.

python -m evit_jax.main --config configs/dynamicvit_s.py --workdir runs/dynamicvit --config.init_from=runs/deit_s_dense

The dense run is configs/deit_s.py with --config.keep.rate=1; it is also the teacher.
22.77 M parameters; 2.98 G MACs per image (dense 4.60). 30 epochs are 38 M images in 37,534 steps. A step computes all
tokens and a forward pass of the teacher. Top-1 on ImageNet in DynamicViT's paper: 79.3; at keep rate 0.5
(--config.keep.rate=0.5): 77.5.
"""

from ml_collections import config_dict

from evit_jax.configs import base


def get_config():
    config = base.get_config()
    config.batch_size = 1024
    config.epochs = 30
    config.ema_decay = 0.9999
    config.init_from = config_dict.placeholder(str)  # required: give it on the command line
    config.model.update(name='deit_s', drop_path=0.0)
    config.reducer.update(name='dynamicvit', share_weight=2.0)
    config.keep.rate = 0.7  # constant: no keep-rate schedule
    config.distill.update(kind='self', weight=0.5, token_weight=0.5)
    config.data.update(source='tfds', repeats=1)
    config.optimizer.update(lr=5e-4, warmup_epochs=5.0, min_lr=1e-6, weight_decay=0.05, backbone_scale=0.01,
                            backbone_from_epoch=5.0)
    config.checkpoint.best = 'top1_ema'
    return config.lock()
