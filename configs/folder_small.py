"""Your own images on a CPU: a small EViT trained from scratch, keep rate 0.7, fused.

python -m evit_jax.main --config configs/folder_small.py --workdir runs/mine --config.data.path=images

The images are in images/train/CLASS/ and images/val/CLASS/: a few thousand images in 2 to several tens of classes.
If there is no val/, a part of train/ is held out. 0.43 M parameters (with 1000 classes); 0.02 G MACs per image.
Measured on Fashion-MNIST as folders, with 2,000 images for training and 2,000 for evaluation: top-1 83.9 after 319 s on
two cores of an Intel Xeon, with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment (2026-11-28); top-1 84.5 with
--config.epochs=100.

- Set --config.epochs so that epochs times the number of images in train/ is about 100,000: 50 for 2,000 images, 500 for
  200, 10 for 10,000. The time is proportional to that product.
- Shrink large photographs to 128 to 192 pixels per side first: otherwise decoding takes longer than training.
- Use --config.data.flip=0 for text, digits and other images that a mirror changes.
- --config.model.image_size=32, 48 or 96 (any multiple of 8) trades accuracy for speed.
- --config.init_from=runs/digits starts from a run of configs/digits.py, with a new head.
"""

from evit_jax.configs import base


def get_config():
    config = base.get_config()
    config.batch_size = 64
    config.epochs = 50
    config.ema_decay = 0.0  # too few steps for an EMA
    config.model.update(name='vit_digits', image_size=64, classes=0, drop_path=0.0, reduce_at=(0, 2, 4))
    config.keep.rate = 0.7  # constant: no keep-rate schedule
    config.data.update(source='folder', crop=(0.5, 1.0), augment='none', colour_jitter=0.3, repeats=1, eval_crop=1.0,
                       max_failed=0.05)
    config.mixing.update(erase=0.0, mixup=0.0, cutmix=0.0)  # no gain for such a small model
    config.optimizer.update(lr=1.2e-2, warmup_epochs=5.0, b2=0.98)
    config.log.update(every=50, eval_epochs=20.0)
    config.checkpoint.every = 500
    return config.lock()
