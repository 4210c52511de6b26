"""Your own images on a machine without an accelerator: a small EViT from scratch, keep rate 0.7, fused.

python -m evit_jax.main --config configs/folder_small.py --workdir runs/mine --config.data.path=images

images/train/<class>/ and images/val/<class>/ hold the pictures, some thousand images of two to some tens of classes.
Without val/, a part of train/ is held out. 0.43 M parameters (a head of 1000 classes counted); 0.02 G MACs an image.
Fashion-MNIST as folders, 2,000 images to train on and 2,000 to evaluate on: 83.9 top-1 in 319 s on two cores of an
Intel Xeon, with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment (2026-11-28); 84.5 with --config.epochs=100.

- Set --config.epochs so that epochs times the images in train/ is about 100,000: 50 for 2,000 images, 500 for 200,
  10 for 10,000. The time grows with that product.
- Large photographs take longer to decode than to learn from. Shrink a copy of them first, to 128 to 192 pixels a side.
- --config.data.flip=0 for text, digits and whatever else has another meaning in the mirror.
- --config.model.image_size=32, 48 or 96, a multiple of 8, for coarser and faster, or finer and slower.
- --config.init_from=runs/digits starts from a run of configs/digits.py, with a new head.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.batch_size = 64
    config.epochs = 50
    config.ema_decay = 0.0                      # too few steps for an average
    config.model.update(name='vit_digits', image_size=64, classes=0, drop_path=0.0, reduce_at=(0, 2, 4))
    config.keep.rate = 0.7                      # from the first step on
    config.data.update(source='folder', crop=(0.5, 1.0), augment='none', colour_jitter=0.3, repeats=1, eval_crop=1.0,
                       max_failed=0.05)
    config.mixing.update(erase=0.0, mixup=0.0, cutmix=0.0)  # so small a model learns no more from harder images
    config.optimizer.update(lr=1.2e-2, warmup_epochs=5.0, b2=0.98)
    config.log.update(every=50, eval_epochs=20.0)
    config.checkpoint.every = 500
    return config.lock()
