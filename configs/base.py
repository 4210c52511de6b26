"""Every key there is, with DeiT's values. A recipe overrides few and locks."""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 1024     # over all devices
    config.epochs = 300
    config.ema_decay = 0.99996   # 0: no average is kept; its memory is 1 / (1 - decay) steps
    config.label_smoothing = 0.1
    config.init_from = ''        # workdir of the run whose newest weights are the initial ones
    config.init_ema = False      # start from their moving average
    config.sharding = 'replicated'  # of the state: whole on every device, or divided among them ('fsdp')
    config.remat = False         # training makes activations of the blocks again where it needs them: memory for time
    config.nonfinite = 'stop'    # at a loss that is not finite: end the run, or 'skip' the step and count it
    config.profile_steps = ''    # '10:20' traces these steps, in WORKDIR/profile
    config.compilation_cache = '~/.cache/evit_jax'  # '': none

    config.model = ConfigDict()
    config.model.name = 'deit_s'
    config.model.image_size = 224
    config.model.classes = 1000           # 0: as many as the data has
    config.model.distilled = False
    config.model.heads = 0                # number of attention heads; 0: the named model's number
    config.model.norm_epsilon = 0.0       # epsilon of the layer norms; 0: the named model's
    config.model.activation = ''          # gelu, gelu_tanh or quick_gelu, in the MLPs; '': the named model's
    config.model.pooling = ''             # input of the head: token, avg or avg_fc_norm; '': the named model's
    config.model.one_head = False         # a distilled model whose class token alone has a head
    config.model.drop_path = 0.1          # share of residual branches dropped in training, at the last block
    config.model.dtype = 'auto'           # float32, bfloat16, or auto: float32 on a CPU, bfloat16 elsewhere
    config.model.lowering = ''            # how reductions move tokens: gather, one_hot, product; '': as is best there
    config.model.reduce_at = (3, 6, 9)    # blocks that drop tokens, 0-based
    config.model.fuse = True              # dropped tokens become one, where the reducer can

    config.reducer = ConfigDict()
    config.reducer.name = 'evit'  # evit, tome, dynamicvit; or random, least, pool, their controls
    config.reducer.r = 0          # tome, pool: tokens merged in every block, in place of keep.rate at model.reduce_at
    config.reducer.decreasing = False  # of r: 2 r in the first block, in a line to none in the last
    config.reducer.share_weight = 2.0  # dynamicvit: of the loss that draws its predictors to the keep rates

    config.keep = ConfigDict()
    config.keep.rate = 0.7        # in (0, 1]; 1 is dense
    config.keep.rates = ()        # one for each reduction, in place of rate
    config.keep.tokens = ()       # tokens kept at each reduction, in place of rates
    config.keep.macs = 0.0        # share of the dense model's multiply-accumulates, in place of all these
    config.keep.start_epoch = 0   # the rate is 1 until then
    config.keep.shrink_epochs = 0  # and falls by a cosine over these
    config.keep.levels = 8        # in so many compiled programs

    config.distill = ConfigDict()
    config.distill.kind = 'none'       # a distillation token learns from a teacher, hard or soft; self: the logits do
    config.distill.alpha = 0.5         # hard and soft: weight of the teacher, the labels have the rest
    config.distill.tau = 3.0           # soft: temperature
    config.distill.weight = 0.5        # self: of the divergence from the teacher's logits; the labels have 1
    config.distill.token_weight = 0.0  # self: of the distance of what is left of the patch tokens to the teacher's

    config.teacher = ConfigDict()
    config.teacher.path = ''      # workdir of its run; '': none, or with distill.kind=self what init_from names
    config.teacher.ema = False    # its moving average
    config.teacher.dense = True   # every token stays in it; False: as it was trained

    config.data = ConfigDict()
    config.data.source = 'generated'      # digits, generated, tfds or folder
    config.data.name = 'imagenet2012'     # of a data set of tfds
    config.data.path = 'data'             # folder of the data
    config.data.index_cache = '~/.cache/evit_jax/data'  # lists of files, where they cannot be kept beside the data
    config.data.train_split = 'train'
    config.data.test_split = 'auto'       # validation, val or test, the first there is; else a tenth of train
    config.data.crop = (0.08, 1.0)        # area of the random crop; (): the whole image, squeezed to a square
    config.data.ratio = (3 / 4, 4 / 3)    # width / height of the random crop
    config.data.flip = 0.5                # share of the images mirrored
    config.data.augment = 'rand-m9-mstd0.5-inc1'  # RandAugment; or 3a, jitter (of the digits), none
    config.data.colour_jitter = 0.4       # under RandAugment there is none
    config.data.token_labels = ''         # folder of label maps (python -m evit_jax.label) to train on; '': none
    config.data.token_weight = 1.0        # of their loss; the class token's has 1. LV-ViT's paper has 0.5, its code 1
    config.data.repeats = 3               # copies of an image in a row, each augmented by itself
    config.data.eval_crop = 224 / 256     # side of the centre crop, of the image's short side; 0: the whole, squeezed
    config.data.workers = -1              # processes that decode; 0: a thread; -1: by the number of cores, 8 at most
    config.data.max_failed = 0.01         # share of unreadable images that stops the run
    config.data.mean = ()                 # for pixels in 0..1; (): the values of init_from's weights, else ImageNet's
    config.data.std = ()                  # likewise

    config.mixing = ConfigDict()
    config.mixing.erase = 0.25   # share of the images with a box erased
    config.mixing.mixup = 0.8    # of lambda's Beta distribution; 0: none
    config.mixing.cutmix = 1.0   # likewise
    config.mixing.switch = 0.5   # share of cutmix, where mixup is on too

    config.optimizer = ConfigDict()
    config.optimizer.lr = 5e-4          # of 512 images, scaled to the batch
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.warmup_lr = 1e-6   # not scaled
    config.optimizer.min_lr = 1e-5      # not scaled
    config.optimizer.weight_decay = 0.05
    config.optimizer.b2 = 0.999         # memory of the squared gradients
    config.optimizer.clip_norm = 0.0    # 0: no clipping
    config.optimizer.accumulate = 1     # steps to one update
    config.optimizer.backbone_scale = 1.0       # of the learning rate of all but predictors of tokens
    config.optimizer.backbone_from_epoch = 0.0  # until then these parameters stay as they are

    config.log = ConfigDict()
    config.log.every = 50               # steps
    config.log.writer = 'default'       # default (JSONL, tensorboardX) or clu (needs TensorFlow)
    config.log.eval_epochs = 1.0        # epochs between two evaluations; one more at the end
    config.log.pictures = 12            # test images drawn with what is kept

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1000      # steps
    config.checkpoint.minutes = 15.0    # at most, between two; looked at every log.every steps. 0: steps alone count
    config.checkpoint.keep = 3
    config.checkpoint.best = 'top1'     # or top1_ema: of the evaluations, the best is kept in WORKDIR/best. '': none is
    return config.lock()  # a recipe that names a key of its own by mistake is refused
