"""Your own images on a machine without an accelerator: a small EViT from nothing, keep rate 0.7, fused.

python -m evit_jax.main --config configs/folder_small.py --workdir runs/mine --config.data.path=images

images/train/<class>/ and images/val/<class>/ hold the pictures; the classes are read from there. Without val/ a part
of train/ is held out.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.batch_size = 64
    config.epochs = 100
    config.ema_decay = 0.0                      # too few steps for an average
    config.model.update(name='vit_digits', image_size=64, classes=0, drop_path=0.0, reduce_at=(0, 2, 4))
    config.keep.rate = 0.7                      # from the first step on
    config.data.update(source='folder', crop=(0.35, 1.0), augment='none', colour_jitter=0.3, repeats=1, eval_crop=1.0,
                       max_failed=0.05)
    config.mixing.update(erase=0.0, mixup=0.0, cutmix=0.0)  # so small a model learns no more from harder images
    config.optimizer.update(lr=8e-3, warmup_epochs=5.0, b2=0.98)
    config.log.update(every=50, eval_epochs=20.0)
    config.checkpoint.every = 500
    return config.lock()
