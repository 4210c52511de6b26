"""A small EViT on cluttered digits, keep rate 0.7, dropped tokens fused. Top-1 accuracy: 96.8 % (2026-11-24).

python -m evit_jax.main --config configs/digits.py --workdir runs/digits

0.37 M parameters; 18.2 M MACs per image (dense 27.8). 2,812 steps; a step takes 0.15 to 0.4 s on two CPU cores.
"""

from evit_jax.configs import base


def get_config():
    config = base.get_config()
    config.batch_size = 128
    config.epochs = 18
    config.ema_decay = 0.998
    config.model.update(name='vit_digits', image_size=64, classes=10, drop_path=0.0, dtype='float32',
                        reduce_at=(0, 2, 4))
    config.keep.update(rate=0.7, start_epoch=2, shrink_epochs=2, levels=4)
    config.data.update(source='digits', augment='jitter', crop=(), flip=0.0, colour_jitter=0.0, repeats=1,
                       eval_crop=1.0, workers=0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    config.mixing.update(erase=0.0, mixup=0.0, cutmix=0.0)
    config.optimizer.update(lr=6e-3, warmup_epochs=0.6, b2=0.98)
    config.log.update(every=100, eval_epochs=3.0)
    config.checkpoint.update(every=500)
    return config.lock()
