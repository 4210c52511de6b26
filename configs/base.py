"""All config keys with default value, limits and help. The defaults are DeiT's recipe.

A recipe calls `get_config()` and overrides some keys. The command line can override more keys, for example
--config.keep.rate=0.5. `python -m evit_jax.main --helpkeys` prints the table of keys.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Key(NamedTuple):
    """One config key. A value has the type of its default."""

    default: Any
    help: str
    limits: str = ''                # interval for the value, or for each value in a tuple; '(0, 1]' excludes 0
    choices: tuple[str, ...] = ()   # allowed strings; (): all
    lengths: tuple[int, ...] = ()   # allowed lengths of a tuple; (): all
    special: float | None = None    # allowed value outside the limits
    absent: Any = None              # value for a saved config that lacks this key; None: the default


KEYS = {
    'seed': Key(0, 'seed of the initial weights, the data order and the augmentation', '[-inf, inf]'),
    'batch_size': Key(1024, 'global batch size, over all devices', '[1, inf]'),
    'epochs': Key(300, 'number of epochs', '[1, inf]'),
    'ema_decay': Key(0.99996, 'decay of the moving average (EMA) of the weights; 0: no EMA', '[0, 0.999999]'),
    'label_smoothing': Key(0.1, 'fraction of the target that is spread over all classes', '[0, 0.999]'),
    'init_from': Key('', "initial weights: a run, a file or folder of weights, or hf-hub:ORG/NAME; '': random weights"),
    'init_ema': Key(False, 'start from the EMA in init_from'),
    'base_model': Key('', "name of the pretrained model, for the model card; '': that of init_from"),
    'sharding': Key('replicated', "training state: 'replicated' on all devices, or 'fsdp': sharded over them",
                    choices=('replicated', 'fsdp')),
    'remat': Key(False, 'recompute activations in the backward pass (rematerialise): less memory, more time'),
    'nonfinite': Key('stop', "if a loss or gradient is not finite, 'stop' the run or 'skip' the step",
                     choices=('stop', 'skip')),
    'profile_steps': Key('', "steps to profile into WORKDIR/profile, as '10:20'; '': none"),
    'compilation_cache': Key('~/.cache/evit_jax', "cache folder for compiled programs; '': none"),

    'model.name': Key('deit_s', 'named model: deit_t, deit_s, deit_b, lvvit_t, lvvit_s, lvvit_m; for small images: '
                      'vit_digits, vit_digit_pairs, lvvit_digits; init_from: the model of the weights in init_from'),
    'model.image_size': Key(224, 'height and width of the input, in pixels; 0: that of init_from', '[1, inf]',
                            special=0),
    'model.image_width': Key(0, 'width of the input if it is not a square, in pixels; 0: a square', '[0, inf]'),
    'model.classes': Key(1000, 'number of classes; 0: as many as the data has', '[2, inf]', special=0),
    'model.distilled': Key(False, 'add a distillation token'),
    'model.heads': Key(0, "number of attention heads; 0: the named model's", '[0, inf]'),
    'model.norm_epsilon': Key(0.0, "epsilon of the layer norms; 0: the named model's", '[0, 1)'),
    'model.activation': Key('', "activation of the MLPs; '': the named model's",
                            choices=('', 'gelu', 'gelu_tanh', 'quick_gelu', 'silu')),
    'model.pooling': Key('', "input of the head: class token, mean of the patches, norm of the mean, class token and "
                         "mean side by side, or attention pool; '': the named model's",
                         choices=('', 'token', 'avg', 'avg_fc_norm', 'token_avg', 'map')),
    'model.one_head': Key(False, 'distilled models: only the class token has a head'),
    'model.drop_path': Key(0.1, 'drop path rate of the last block; it grows linearly with depth, from 0',
                           '[0, 0.999]'),
    'model.dtype': Key('auto', 'dtype of the computation; auto: float32 on a CPU, bfloat16 elsewhere',
                       choices=('auto', 'float32', 'bfloat16')),
    'model.freeze': Key('', "'backbone': train only the heads (linear probe), on features without drop path; '': train "
                        'all parameters', choices=('', 'backbone')),
    'model.gather_impl': Key('', "implementation of token gathers; '': by platform",
                             choices=('', 'gather', 'one_hot', 'product')),
    'model.reduce_at': Key((3, 6, 9), 'blocks that reduce tokens, counted from 0; -1: at a quarter, half and three '
                           'quarters of the depth', '[0, inf]', special=-1),
    'model.fuse': Key(True, 'fuse the dropped tokens into one, if the reducer can'),

    'reducer.name': Key('evit', 'method: evit, topk, ats, tome, ward, prune_merge, pitome, tofu, dpcknn, kmedoids; '
                        'with learned modules: dynamicvit, sit, patchmerger, sinkhorn; baselines: random, least, pool, '
                        'heuristic'),
    'reducer.r': Key(0, 'number of tokens merged in every block, by a method that merges; replaces the keep rates',
                     '[0, inf]'),
    'reducer.decreasing': Key(False, 'r falls linearly from 2 r in the first block to 0 in the last'),
    'reducer.share_weight': Key(2.0, 'dynamicvit: weight of the loss that ties the predictors to the keep rates',
                                '[0, inf]'),

    'keep.rate': Key(0.7, 'fraction of the tokens that each reduction keeps; 1: dense', '(0, 1]', absent=1.0),
    'keep.rates': Key((), 'keep rate of each block in model.reduce_at; replaces keep.rate', '(0, 1]'),
    'keep.tokens': Key((), 'number of tokens that each block in model.reduce_at keeps; replaces the keep rates',
                       '[1, inf]'),
    'keep.drop': Key((), 'prune_merge: number of tokens that each block in model.reduce_at drops before it merges '
                     'others; needs keep.tokens', '[0, inf]'),
    'keep.macs': Key(0.0, "fraction of the dense model's MACs; replaces keep rates, keep.tokens and reducer.r; 0: not "
                     'used', '[0, 1]'),
    'keep.start_epoch': Key(0, 'the keep rate is 1 until this epoch', '[0, inf]'),
    'keep.shrink_epochs': Key(0, 'number of epochs over which the keep rate falls, by a cosine', '[0, inf]'),
    'keep.levels': Key(8, 'number of keep rates in these epochs; each is a compiled program', '[1, inf]'),

    'distill.kind': Key('none', 'a teacher trains the distillation token (hard, soft) or the class token (self)',
                        choices=('none', 'hard', 'soft', 'self')),
    'distill.alpha': Key(0.5, "hard, soft: weight of the teacher's loss; the labels have weight 1 - alpha", '[0, 1]'),
    'distill.tau': Key(3.0, 'soft: temperature', '[0.001, inf]'),
    'distill.weight': Key(0.5, "self: weight of the loss on the teacher's logits; the labels have weight 1",
                          '[0, inf]'),
    'distill.token_weight': Key(0.0, "self: weight of the MSE between the kept tokens and the teacher's", '[0, inf]'),

    'teacher.path': Key('', "teacher: a run, a file or folder of weights, or hf-hub:ORG/NAME; '': none, or init_from "
                        'with distill.kind=self'),
    'teacher.ema': Key(False, "use the teacher's EMA"),
    'teacher.dense': Key(True, 'True: the teacher keeps all tokens; False: it uses its own plan'),

    'data.source': Key('generated', 'kind of data: digits, digit_pairs, generated, tfds or folder'),
    'data.name': Key('imagenet2012', 'tfds: name of the data set'),
    'data.path': Key('data', 'folder of the data'),
    'data.index_cache': Key('~/.cache/evit_jax/data', 'folder for file lists that cannot be stored next to the data'),
    'data.train_split': Key('train', 'split to train on'),
    'data.test_split': Key('auto', 'split to evaluate on; auto: the first of validation, val and test that the data '
                           'has, else a tenth of train'),
    'data.crop': Key((0.08, 1.0), 'smallest and largest area of the random crop, relative to the image; (): squeeze '
                     'the whole image', '(0, 1]', lengths=(0, 2)),
    'data.ratio': Key((3 / 4, 4 / 3), 'smallest and largest width / height of the random crop', '(0, inf]',
                      lengths=(2,)),
    'data.flip': Key(0.5, 'probability of a horizontal flip', '[0, 1]'),
    'data.augment': Key('rand-m9-mstd0.5-inc1', 'RandAugment policy, 3a, jitter (small shifts, for digits), or none'),
    'data.colour_jitter': Key(0.4, 'strength of the colour jitter; not used with RandAugment', '[0, inf]'),
    'data.token_labels': Key('', "folder of label maps to train on (see evit_jax.label); '': none"),
    'data.token_weight': Key(1.0, "weight of the loss of token labels; the class token has weight 1", '[0, inf]'),
    'data.repeats': Key(3, 'repeated augmentation: number of consecutive copies of each image', '[1, inf]'),
    'data.eval_crop': Key(224 / 256, 'evaluation: side of the centre crop, relative to the short side of the image; 0: '
                          'squeeze the whole image; -1: that of init_from', '[0, 1]', special=-1),
    'data.interpolation': Key('', "evaluation: filter that resizes the images; '': that of init_from, else bicubic",
                              choices=('', 'nearest', 'lanczos', 'bilinear', 'bicubic', 'box', 'hamming'),
                              absent='bicubic'),
    'data.workers': Key(-1, 'number of decoding processes; 0: a thread; -1: by number of cores, at most 8',
                        '[-1, inf]'),
    'data.max_failed': Key(0.01, 'the run stops if a larger fraction of the images is unreadable', '[0, 1]'),
    'data.mean': Key((), "mean of each channel, for values in 0..1; (): that of init_from, else ImageNet's", '[0, 1]',
                     lengths=(3, 0), absent=(0.485, 0.456, 0.406)),
    'data.std': Key((), 'standard deviation of each channel; (): as for data.mean', '(0, 1]', lengths=(3, 0),
                    absent=(0.229, 0.224, 0.225)),

    'mixing.erase': Key(0.25, 'probability of random erasing', '[0, 1]'),
    'mixing.mixup': Key(0.8, 'alpha of mixup; 0: off', '[0, inf]'),
    'mixing.cutmix': Key(1.0, 'alpha of cutmix; 0: off', '[0, inf]'),
    'mixing.switch': Key(0.5, 'probability of cutmix if both are on', '[0, 1]'),

    'optimizer.lr': Key(5e-4, 'base learning rate for a batch of 512; scaled linearly with the batch', '[0, inf]'),
    'optimizer.warmup_epochs': Key(5.0, 'number of epochs over which the learning rate rises from warmup_lr',
                                   '[0, inf]'),
    'optimizer.warmup_lr': Key(1e-6, 'learning rate at step 0; not scaled', '[0, inf]'),
    'optimizer.min_lr': Key(1e-5, 'learning rate at the end; not scaled', '[0, inf]'),
    'optimizer.weight_decay': Key(0.05, 'weight decay of AdamW', '[0, inf]'),
    'optimizer.b2': Key(0.999, "decay of AdamW's second moment", '[0, 0.9999999]'),
    'optimizer.clip_norm': Key(0.0, 'largest norm of the gradient; 0: no clipping', '[0, inf]'),
    'optimizer.accumulate': Key(1, 'number of steps whose gradients are averaged for one update', '[1, inf]'),
    'optimizer.backbone_scale': Key(1.0, 'learning rate of the backbone, relative to that of the token predictors',
                                    '[0, inf]'),
    'optimizer.backbone_from_epoch': Key(0.0, 'the backbone is frozen until this epoch', '[0, inf]'),

    'log.every': Key(50, 'number of steps between two log lines', '[1, inf]'),
    'log.writer': Key('default', 'default (JSONL and TensorBoard) or clu (needs TensorFlow)',
                      choices=('default', 'clu')),
    'log.eval_epochs': Key(1.0, 'number of epochs between two evaluations; one more follows at the end',
                           '[1e-09, inf]'),
    'log.pictures': Key(12, 'number of test images in kept.png', '[0, inf]'),

    'checkpoint.every': Key(1000, 'number of steps between two checkpoints', '[1, inf]'),
    'checkpoint.minutes': Key(15.0, 'maximal number of minutes between two checkpoints, checked every log.every steps; '
                              '0: no limit', '[0, inf]'),
    'checkpoint.keep': Key(3, 'number of checkpoints kept', '[1, inf]'),
    'checkpoint.best': Key('top1', "metric that selects WORKDIR/best; '': none", choices=('', 'top1', 'top1_ema')),
}


def get_config() -> ConfigDict:
    """Returns a locked config with all defaults. Setting an unknown key is an error."""
    config = ConfigDict()
    for key, entry in KEYS.items():
        group, _, name = key.rpartition('.')
        if group and group not in config:
            config[group] = ConfigDict()
        (config[group] if group else config)[name] = entry.default
    return config.lock()


def absent(*keys: str) -> dict[str, Any]:
    """Returns the values for a saved config that lacks these keys; for all keys if none is given."""
    return {key: KEYS[key].default if KEYS[key].absent is None else KEYS[key].absent for key in keys or KEYS}
