"""Comparison of token reducers on the cluttered digits. Results: docs/compare.md (2026-11-28).

python -m evit_jax.compare --config configs/compare_digits.py --out runs/compare

The dense model is trained for 12 epochs, or read from --config.dense=WORKDIR. The 73 runs and evaluations take about
180 minutes on two slow CPU cores: about 115 minutes for the runs from scratch, 65 minutes for the others.
"""

from ml_collections import ConfigDict

from evit_jax.configs import digits

METHODS = {
    'EViT': {'reducer': {'name': 'evit'}, 'model': {'fuse': True}},
    'EViT, not fused': {'reducer': {'name': 'evit'}, 'model': {'fuse': False}},
    'EViT, distilled': {'reducer': {'name': 'evit'}, 'distill': {'kind': 'self'}},
    'ToMe': {'reducer': {'name': 'tome'}},
    'DynamicViT': {'reducer': {'name': 'dynamicvit'}},
    'DynamicViT, distilled': {'reducer': {'name': 'dynamicvit'}, 'distill': {'kind': 'self', 'token_weight': 0.5}},
    'pooling': {'reducer': {'name': 'pool'}},
    'random': {'reducer': {'name': 'random'}, 'model': {'fuse': False}},
    'least attended': {'reducer': {'name': 'least'}, 'model': {'fuse': False}}}


def get_config():
    config = ConfigDict()
    config.run = digits.get_config()   # config of every run; methods and settings below override it
    with config.run.unlocked():
        config.run.model.update(image_size=48)   # 36 patches halve the time
        config.run.keep.update(start_epoch=0, shrink_epochs=0)
        config.run.update(epochs=12, ema_decay=0.0)
        config.run.log.update(eval_epochs=100.0, pictures=0)
    config.dense = ''                  # workdir of a trained dense model; '': train one
    config.seeds = (0, 1, 2)
    config.methods = ConfigDict(METHODS)
    config.untrained = ConfigDict({
        'methods': ('EViT', 'EViT, not fused', 'ToMe', 'pooling', 'random', 'least attended'),
        'shares': (0.9, 0.8, 0.7, 0.6, 0.5), 'run': {}})
    config.finetuned = ConfigDict({
        'methods': ('EViT', 'EViT, not fused', 'EViT, distilled', 'ToMe', 'DynamicViT', 'DynamicViT, distilled',
                    'pooling', 'random'),
        'shares': (0.5,), 'run': {'epochs': 1, 'optimizer': {'lr': 1e-3, 'warmup_epochs': 0.0}}})
    config.scratch = ConfigDict({
        'methods': ('EViT', 'EViT, not fused', 'ToMe', 'DynamicViT'),
        'shares': (0.5,), 'run': {'epochs': 8, 'keep': {'start_epoch': 1, 'shrink_epochs': 1, 'levels': 3}}})
    config.orderings = (
        ConfigDict({'better': 'EViT', 'worse': 'DynamicViT', 'setting': 'scratch'}),
        ConfigDict({'better': 'EViT', 'worse': 'DynamicViT, distilled', 'setting': 'finetuned'}),
        ConfigDict({'better': 'EViT', 'worse': 'EViT, not fused', 'setting': 'untrained'}),
        ConfigDict({'better': 'EViT', 'worse': 'EViT, not fused', 'setting': 'finetuned'}),
        ConfigDict({'better': 'EViT', 'worse': 'EViT, not fused', 'setting': 'scratch'}),
        ConfigDict({'better': 'EViT', 'worse': 'EViT', 'setting': 'finetuned', 'worse_setting': 'untrained'}))
    return config.lock()
