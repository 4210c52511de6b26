"""Any pretrained vision transformer fine-tuned on your own images, keep rate 0.7. Not tried on a large data set here.

python -m evit_jax.main --config configs/finetune.py --workdir runs/mine --config.data.path=images \\
    --config.init_from=hf-hub:facebook/dinov2-small

init_from is a run, a file or folder of weights (.pth, .safetensors, Hugging Face, timm), or hf-hub:ORG/NAME. The model,
its image size, its mean, std and crop are those of the weights; the head is new if the classes differ. The images are
in images/train/CLASS/ and images/val/CLASS/. With 10,000 images, 20 epochs are 3,120 steps.

- --config.model.freeze=backbone --config.optimizer.lr=8e-3 trains only the head (linear probe).
- --config.keep.rate=1 is the dense model. --config.reducer.name=tome --config.reducer.r=8 merges 8 tokens in every
  block.
- --config.model.image_size=98 trains on smaller images: position embeddings are resized.
- The peak learning rate is 5e-5 at a batch of 64; it is proportional to the batch size.
"""

from ml_collections import config_dict

from evit_jax.configs import base


def get_config():
    config = base.get_config()
    config.batch_size = 64
    config.epochs = 20
    config.ema_decay = 0.0  # too few steps for an EMA
    config.init_from = config_dict.placeholder(str)  # required: give it on the command line
    config.model.update(name='init_from', image_size=0, classes=0, drop_path=0.05, reduce_at=(-1,))
    config.keep.rate = 0.7  # constant: no keep-rate schedule
    config.data.update(source='folder', crop=(0.35, 1.0), augment='none', colour_jitter=0.3, repeats=1, eval_crop=-1.0,
                       max_failed=0.05)
    config.mixing.update(erase=0.0, mixup=0.0, cutmix=0.0)
    config.optimizer.update(lr=4e-4, warmup_epochs=2.0, min_lr=1e-6, clip_norm=1.0)
    config.log.every = 10
    config.checkpoint.every = 200
    return config.lock()
