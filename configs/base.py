"""Every config key, with DeiT's value. A recipe overrides some of them and locks the config."""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 1024                      # global batch size, over all devices
    config.epochs = 300
    config.ema_decay = 0.99996                    # decay of the moving average (EMA) of the weights; 0: no EMA
    config.label_smoothing = 0.1
    config.init_from = ''  # workdir whose newest weights are the initial weights; '': random weights
    config.init_ema = False                       # start from the EMA in init_from
    config.sharding = 'replicated'                # training state: 'replicated' on all devices, or 'fsdp': divided
    config.remat = False  # rematerialise activations in the backward pass: less memory, more time
    config.nonfinite = 'stop'                     # 'stop' the run at a loss that is not finite, or 'skip' the step
    config.profile_steps = ''                     # steps to profile, as '10:20', into WORKDIR/profile; '': none
    config.compilation_cache = '~/.cache/evit_jax'  # folder of compiled programs; '': none

    config.model = ConfigDict()
    config.model.name = 'deit_s'
    config.model.image_size = 224
    config.model.classes = 1000         # number of classes; 0: as many as the data has
    config.model.distilled = False      # add a distillation token
    config.model.heads = 0              # number of attention heads; 0: the named model's number
    config.model.norm_epsilon = 0.0     # epsilon of the layer norms; 0: the named model's
    config.model.activation = ''        # gelu, gelu_tanh or quick_gelu, in the MLPs; '': the named model's
    config.model.pooling = ''           # input of the head: token, avg or avg_fc_norm; '': the named model's
    config.model.one_head = False       # distilled models: only the class token has a head
    config.model.drop_path = 0.1        # drop path rate of the last block; linear in depth, from 0
    config.model.dtype = 'auto'         # float32, bfloat16, or auto: float32 on a CPU, bfloat16 elsewhere
    config.model.gather_impl = ''          # how reductions move tokens: gather, one_hot, product; '': by platform
    config.model.reduce_at = (3, 6, 9)  # blocks that reduce tokens, 0-based
    config.model.fuse = True            # fuse the dropped tokens into one, where the reducer can

    config.reducer = ConfigDict()
    config.reducer.name = 'evit'       # evit, tome, dynamicvit; controls: random, least, pool
    config.reducer.r = 0               # tome, pool: tokens merged in every block; replaces keep.rate
    config.reducer.decreasing = False  # r falls linearly from 2 r in the first block to 0 in the last
    config.reducer.share_weight = 2.0  # dynamicvit: weight of the loss that holds predictors to the keep rates

    config.keep = ConfigDict()
    config.keep.rate = 0.7         # fraction of the tokens that each reduction keeps, in (0, 1]; 1 is dense
    config.keep.rates = ()         # one rate for each block in model.reduce_at; replaces rate
    config.keep.tokens = ()        # number of tokens that each block in model.reduce_at keeps; replaces rates
    config.keep.macs = 0.0         # fraction of the dense model's MACs; replaces all of the above; 0: not used
    config.keep.start_epoch = 0    # epoch until which the keep rate is 1
    config.keep.shrink_epochs = 0  # epochs over which the keep rate falls by a cosine
    config.keep.levels = 8         # number of compiled programs in these epochs

    config.distill = ConfigDict()
    config.distill.kind = 'none'       # a teacher trains the distillation token (hard, soft) or the class token (self)
    config.distill.alpha = 0.5         # hard, soft: weight of the teacher's loss; that of the labels is 1 - alpha
    config.distill.tau = 3.0           # soft: temperature
    config.distill.weight = 0.5        # self: weight of the teacher's logits; that of the labels is 1
    config.distill.token_weight = 0.0  # self: weight of the MSE between the kept tokens and the teacher's

    config.teacher = ConfigDict()
    config.teacher.path = ''     # workdir of the teacher; '': none, or init_from with distill.kind=self
    config.teacher.ema = False   # use the teacher's EMA
    config.teacher.dense = True  # the teacher keeps all tokens; False: it follows its own plan

    config.data = ConfigDict()
    config.data.source = 'generated'              # digits, generated, tfds or folder
    config.data.name = 'imagenet2012'             # tfds: name of the data set
    config.data.path = 'data'                     # folder of the data
    config.data.index_cache = '~/.cache/evit_jax/data'  # lists of files, where not beside the data
    config.data.train_split = 'train'
    config.data.test_split = 'auto'               # validation, val or test, the first there is; else a tenth of train
    config.data.crop = (0.08, 1.0)                # area of the random crop; (): squeeze the whole image
    config.data.ratio = (3 / 4, 4 / 3)            # width / height of the random crop
    config.data.flip = 0.5                        # probability of a horizontal flip
    config.data.augment = 'rand-m9-mstd0.5-inc1'  # RandAugment policy; or 3a, jitter (for the digits), none
    config.data.colour_jitter = 0.4               # strength of the colour jitter; not used with RandAugment
    config.data.token_labels = ''  # folder of label maps (python -m evit_jax.label) to train on; '': none
    config.data.token_weight = 1.0                # weight of the token labels' loss; that of the class token is 1
    config.data.repeats = 3                       # repeated augmentation: copies of an image in a row
    config.data.eval_crop = 224 / 256             # centre crop / short side in evaluation; 0: squeeze the whole image
    config.data.workers = -1                      # processes that decode; 0: a thread; -1: by cores, at most 8
    config.data.max_failed = 0.01                 # fraction of unreadable images that stops the run
    config.data.mean = ()                         # mean of each channel in 0..1; (): that of init_from, else ImageNet's
    config.data.std = ()                          # standard deviation of each channel; (): see mean

    config.mixing = ConfigDict()
    config.mixing.erase = 0.25  # probability of random erasing
    config.mixing.mixup = 0.8   # alpha of mixup; 0: off
    config.mixing.cutmix = 1.0  # alpha of cutmix; 0: off
    config.mixing.switch = 0.5  # probability of cutmix where mixup is on, too

    config.optimizer = ConfigDict()
    config.optimizer.lr = 5e-4                  # base learning rate for a batch of 512; scaled linearly with the batch
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.warmup_lr = 1e-6           # learning rate at step 0; not scaled
    config.optimizer.min_lr = 1e-5              # learning rate at the end; not scaled
    config.optimizer.weight_decay = 0.05
    config.optimizer.b2 = 0.999                 # decay of AdamW's second moment
    config.optimizer.clip_norm = 0.0            # largest norm of the gradient; 0: no clipping
    config.optimizer.accumulate = 1             # steps whose gradients are averaged for one update
    config.optimizer.backbone_scale = 1.0       # learning rate of the backbone / that of the token predictors
    config.optimizer.backbone_from_epoch = 0.0  # the backbone is frozen before this epoch

    config.log = ConfigDict()
    config.log.every = 50          # steps between two log lines
    config.log.writer = 'default'  # default (JSONL, tensorboardX) or clu (needs TensorFlow)
    config.log.eval_epochs = 1.0   # epochs between two evaluations; one more follows at the end
    config.log.pictures = 12       # number of test images in kept.png

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1000    # steps between two checkpoints
    config.checkpoint.minutes = 15.0  # most minutes between two, checked every log.every steps; 0: no limit
    config.checkpoint.keep = 3        # number of checkpoints kept
    config.checkpoint.best = 'top1'   # metric that decides WORKDIR/best: top1 or top1_ema; '': none
    return config.lock()  # a key that is not here is an error
