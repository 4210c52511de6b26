"""Your own images, some thousands: a trained EViT-DeiT-S fine-tuned, keep rate 0.7, inattentive tokens fused.

python -m evit_jax.main --config configs/folder.py --workdir runs/mine --config.data.path=images \\
    --config.init_from=runs/deit_s

images/train/<class>/ and images/val/<class>/ hold the pictures; the classes are read from there, the head is new.
22.05 M parameters (a head of 1000 classes counted); 3.03 G MACs an image. Not tried on a real data set here.
It needs a GPU or TPU; on a machine without one take configs/folder_small.py.
"""

from ml_collections import config_dict

from configs import base


def get_config():
    config = base.get_config()
    config.batch_size = 128
    config.epochs = 30
    config.ema_decay = 0.0                           # too few steps for an average
    config.init_from = config_dict.placeholder(str)  # to be given
    config.model.update(name='deit_s', classes=0)
    config.keep.rate = 0.7                           # from the first step on
    config.data.update(source='folder', crop=(0.25, 1.0), repeats=1, max_failed=0.05)
    config.optimizer.update(lr=2e-4, warmup_epochs=1.0, min_lr=1e-6)
    config.log.every = 10
    config.checkpoint.every = 200
    return config.lock()
