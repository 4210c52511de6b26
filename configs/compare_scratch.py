"""Comparison of token reducers from scratch, on images where dropping tokens costs accuracy. Results: docs/compare.md.

python -m evit_jax.compare --config configs/compare_scratch.py --out runs/compare_scratch

An image shows two digits among clutter, and the label is the larger one. A patch of 8 pixels holds a whole digit and is
projected linearly, so the model cannot read a digit before the first MLP. The first reduction takes place before it, in
block 0. Run the command again to continue.
"""

from ml_collections import ConfigDict

from evit_jax.configs import base, compare_digits

METHODS = 'EViT', 'EViT, not fused', 'ToMe', 'DynamicViT', 'random'


def get_config():
    config = ConfigDict()
    config.run = base.get_config()   # config of every run; methods and settings below override it
    with config.run.unlocked():
        config.run.update(batch_size=64, epochs=1, ema_decay=0.0, label_smoothing=0.0)
        config.run.model.update(name='vit_digit_pairs', image_size=48, classes=10, drop_path=0.0, dtype='float32',
                                reduce_at=(0, 2, 4))
        config.run.data.update(source='digit_pairs', augment='none', crop=(), flip=0.0, colour_jitter=0.0, repeats=1,
                               eval_crop=1.0, workers=0, mean=(0.28, 0.28, 0.28), std=(0.25, 0.25, 0.25))
        config.run.mixing.update(erase=0.0, mixup=0.0, cutmix=0.0)
        config.run.optimizer.update(lr=16e-3, warmup_epochs=0.1, b2=0.98, clip_norm=1.0)
        config.run.log.update(every=200, eval_epochs=100.0, pictures=0)
        config.run.checkpoint.update(every=500)
    config.dense = ''                # not used: no cell starts from a trained model
    config.seeds = (0, 1, 2)
    config.methods = ConfigDict({name: compare_digits.METHODS[name] for name in METHODS})
    config.scratch = ConfigDict({'methods': METHODS, 'shares': (0.7, 0.5), 'run': {}})
    config.orderings = tuple(
        ConfigDict({'better': 'EViT', 'worse': worse, 'setting': 'scratch'})
        for worse in ('random', 'EViT, not fused', 'ToMe', 'DynamicViT')) + tuple(
        ConfigDict({'better': 'dense', 'worse': method, 'setting': 'scratch', 'share': 1.0, 'worse_share': 0.5})
        for method in ('random', 'EViT'))
    return config.lock()
