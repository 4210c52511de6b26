"""Your own images: a trained EViT-DeiT-S fine-tuned on a few thousand images, keep rate 0.7, inattentive tokens fused.

python -m evit_jax.main --config configs/folder.py --workdir runs/mine --config.data.path=images \\
    --config.init_from=runs/deit_s

The images are in images/train/CLASS/ and images/val/CLASS/. The folder names are the class names. The head is new.
22.05 M parameters (with 1000 classes); 3.03 G MACs per image. Not tried on a real data set here.
The recipe needs a GPU or TPU; on a CPU use configs/folder_small.py.
"""

from ml_collections import config_dict

from evit_jax.configs import base


def get_config():
    config = base.get_config()
    config.batch_size = 128
    config.epochs = 30
    config.ema_decay = 0.0  # too few steps for an EMA
    config.init_from = config_dict.placeholder(str)  # required: give it on the command line
    config.model.update(name='deit_s', classes=0)
    config.keep.rate = 0.7  # constant: no keep-rate schedule
    config.data.update(source='folder', crop=(0.25, 1.0), repeats=1, max_failed=0.05)
    config.optimizer.update(lr=2e-4, warmup_epochs=1.0, min_lr=1e-6)
    config.log.every = 10
    config.checkpoint.every = 200
    return config.lock()
