"""Comparison of token reducers on a pretrained vision transformer and photographs.

python -m evit_jax.compare --config configs/compare_real.py --out runs/compare_real --config.run.data.path=images \\
    --config.run.init_from=hf-hub:facebook/dinov2-small --plan=0.5=plan.json

The images are in images/train/CLASS/ and images/val/CLASS/; 700 and 1,000 of them are meant. init_from is any model
that `evit_jax.load` opens. First its features are classified under each plan without training (k-NN, linear probe).
Then the dense model is fine-tuned; its reductions are evaluated without training, and each method is fine-tuned from it
with three seeds. A searched plan (`python -m evit_jax.plan`) is one more method: --plan=SHARE=FILE, with its share of
the MACs. All cells: about 3 hours on two CPU cores with a ViT-S/14, estimated from a third of them. Run the command
again to continue. Results: docs/compare.md.
"""

from ml_collections import ConfigDict

from evit_jax.configs import finetune

SHARES = 0.7, 0.5
DROPPING = {
    'EViT': {'reducer': {'name': 'evit'}, 'model': {'fuse': True}},
    'EViT, not fused': {'reducer': {'name': 'evit'}, 'model': {'fuse': False}},
    'ToMe': {'reducer': {'name': 'tome'}},
    'prune_merge': {'reducer': {'name': 'prune_merge'}},
    'DPC-KNN': {'reducer': {'name': 'dpcknn'}},
    'K-medoids': {'reducer': {'name': 'kmedoids'}},
    'ATS': {'reducer': {'name': 'ats'}},
    'pooling': {'reducer': {'name': 'pool'}},
    'heuristic': {'reducer': {'name': 'heuristic'}, 'model': {'fuse': False}},
    'random': {'reducer': {'name': 'random'}, 'model': {'fuse': False}},
    'least attended': {'reducer': {'name': 'least'}, 'model': {'fuse': False}}}
LEARNED = {
    'DynamicViT, distilled': {'reducer': {'name': 'dynamicvit'}, 'distill': {'kind': 'self', 'token_weight': 0.5},
                              'optimizer': {'backbone_scale': 0.1}},
    'SiT': {'reducer': {'name': 'sit'}},
    'PatchMerger': {'reducer': {'name': 'patchmerger'}},
    'Sinkhorn': {'reducer': {'name': 'sinkhorn'}}}
SHORT = {  # a third of the epochs of the others
    f'{name}, 1 epoch': methods[name] | {'epochs': 1}
    for methods, name in ((DROPPING, 'EViT'), (LEARNED, 'DynamicViT, distilled'))}
LARGE = {'EViT, 126 px': DROPPING['EViT'] | {'model': {'fuse': True, 'image_size': 126}}}


def get_config():
    config = ConfigDict()
    config.run = finetune.get_config()
    with config.run.unlocked():
        config.run.model.image_size = 98  # 49 patches of 14 pixels
        config.run.optimizer.update(lr=8e-4, warmup_epochs=0.5)
        config.run.update(batch_size=32, epochs=3)
        config.run.log.update(eval_epochs=100.0, pictures=0)
    config.dense_run = {'epochs': 6}   # values of the run that trains the dense model
    config.dense = ''                  # workdir of a trained dense model; '': train one
    config.seeds = (0, 1, 2)
    config.record = 256                # test images whose tokens are recorded for --analyse; 0: none
    config.methods = ConfigDict(DROPPING | LEARNED | SHORT | LARGE)
    config.shares_of = ConfigDict(     # method -> shares, where they are not those of the setting
        dict.fromkeys(SHORT, (0.5,)) | {'EViT, 126 px': (0.6,)})  # 0.6 at 126 px costs as much as dense at 98 px
    for setting in ('knn', 'probe', 'untrained'):
        config[setting] = ConfigDict({'methods': tuple(DROPPING), 'shares': SHARES, 'run': {}})
    config.untrained.shares = (*SHARES, 0.4)
    config.finetuned = ConfigDict({'methods': (*DROPPING, *LEARNED, *SHORT, *LARGE), 'shares': SHARES, 'run': {}})
    orderings = [('EViT', 'finetuned', 'EViT', 'untrained'), ('EViT', 'untrained', 'random', 'untrained'),
                 ('EViT', 'finetuned', 'DynamicViT, distilled', 'finetuned'),
                 ('EViT, 1 epoch', 'finetuned', 'DynamicViT, distilled, 1 epoch', 'finetuned'),
                 ('EViT', 'finetuned', 'EViT, 1 epoch', 'finetuned')]
    orderings += [('EViT', setting, 'EViT, not fused', setting) for setting in ('knn', 'untrained', 'finetuned')]
    orderings += [('EViT', setting, 'random', setting) for setting in ('knn', 'finetuned')]
    config.orderings = tuple(
        ConfigDict({'better': better, 'worse': worse, 'setting': setting, 'worse_setting': worse_setting})
        for better, setting, worse, worse_setting in orderings) + (
        ConfigDict({'better': 'EViT, 126 px', 'worse': 'dense', 'setting': 'finetuned', 'share': 0.6,
                    'worse_share': 1.0}),)
    return config.lock()
