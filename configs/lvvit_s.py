"""EViT-LV-ViT-S, keep rate 0.7, inattentive tokens fused. Not run on ImageNet here.

python -m evit_jax.label --published label_top5_train_nfnet --config configs/lvvit_s.py --out labels/imagenet
python -m evit_jax.main --config configs/lvvit_s.py --workdir runs/lvvit_s --config.data.token_labels=labels/imagenet

The first command converts the published label maps. To make label maps with any trained model, use
python -m evit_jax.label CHECKPOINT. If there are no label maps, both heads are trained on the label of the image.
26.15 M parameters; 4.71 G MACs per image (dense 6.55: --config.keep.rate=1).
300 epochs are 384 M images in 375,300 steps. Top-1 on ImageNet in EViT's paper: 83.0 (dense 83.3).
"""

from evit_jax.configs import base


def get_config():
    config = base.get_config()
    config.ema_decay = 0.99992
    config.model.update(name='lvvit_s', reduce_at=(4, 8, 12))
    config.keep.update(rate=0.7, start_epoch=10, shrink_epochs=100)
    config.data.update(source='tfds', repeats=1, eval_crop=0.9)
    config.mixing.update(mixup=0.0, cutmix=0.0)  # MixToken replaces them
    config.optimizer.lr = 8e-4  # 1.6e-3 for a batch of 1024
    return config.lock()
