"""Writes files of synthetic workdirs, evaluations and measurements."""

import json

from evit_jax.metrics import writers


def make_run(folder, *, macs=1000, top1=0.5, **config):
    folder.mkdir()
    writer = writers.JsonlWriter(folder / writers.METRICS_FILE)
    writer.write_scalars(1, {'eval/top1': 0.1})
    writer.write_scalars(2, {'eval/top1': top1, 'eval/macs': macs, 'eval/images_per_second': 7, 'eval/top1_ema': 0.6})
    writer.close()
    (folder / 'config.json').write_text(json.dumps({'model.name': 'vit', 'keep.rate': 0.7} | config))
    return folder


def make_rows(file, *rows):
    file.write_text(json.dumps({'machine': {}, 'rows': rows}))
    return file
