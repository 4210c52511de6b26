"""Writes the model card (README.md) of a saved model: base model, token plan, cost, and what was measured."""

import json
import os
from collections.abc import Mapping
from typing import Any

from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.interchange import hub
from evit_jax.models.config import as_hw
from evit_jax.reduction.plan import make_plan

Measured = Mapping[str, Any] | str | os.PathLike
_PERCENTAGES = 'top1', 'top5'  # prefixes of metrics that are fractions


def model_card(model: LoadedModel, *, name: str, library: str, code: str, measured: Measured | None = None,
               evaluated: Measured | None = None) -> str:
    """Returns the text of the card.

    Args:
      name: title of the card.
      library: library that loads the folder: 'timm' or 'transformers'.
      code: Python code that loads the folder with this library.
      measured: speeds; see `VisionModel.save_pretrained`.
      evaluated: accuracies; see `VisionModel.save_pretrained`.

    Raises:
      ValueError: the speeds or accuracies are malformed, or belong to another plan.
    """
    plan, config = model.plan(), model.config
    dense = make_plan(plan.patches, config.depth, reduce_at=())
    macs, dense_macs = config.macs(plan), config.macs(dense)
    height, width = as_hw(model.image_size)
    facts = {
        'Base model': _base_model(model), 'Reducer': str(plan.reducer) if plan.reductions else 'none',
        'Plan': str(plan),
        'MACs per image': f'{macs / 1e9:.3g} G, {macs / dense_macs:.0%} of the dense model ({dense_macs / 1e9:.3g} G)',
        'Parameters': f'{config.parameters(plan) / 1e6:.2f} M',
        'Images': f'{height} x {width} pixels, mean {_numbers(model.mean)}, std {_numbers(model.std)}'}
    sections = [
        _front_matter(model, library), f'# {name}',
        f'A vision transformer with {config.depth} blocks of width {config.width} and patches of {config.patch_size} '
        'pixels, saved by evit_jax with its token plan.',
        '\n'.join(['| | |', '|---|---|', *(f'| {key} | {value} |' for key, value in facts.items())]),
        '## Use', f"```python\nimport evit_jax\nmodel = evit_jax.load('{name}')  # with the token plan\n\n"
        f'import {library}\nmodel = {code.format(folder=name)}  # the dense model\n```',
        '## Speed', _speed(plan, dense, measured), '## Accuracy', _accuracy(plan, macs, evaluated)]
    return '\n\n'.join(sections) + '\n'


def _front_matter(model, library):
    """Returns the YAML metadata that the Hub reads."""
    task = 'image-classification' if model.class_names else 'image-feature-extraction'
    repository = model.base_model.removeprefix(hub.PREFIX).partition('@')[0]
    base = f'\nbase_model: {repository}' if hub.is_hub_name(model.base_model) else ''
    return f'---\nlibrary_name: {library}\npipeline_tag: {task}\ntags: [evit_jax, token-reduction]{base}\n---'


def _base_model(model):
    if not hub.is_hub_name(model.base_model):
        return model.base_model or 'none recorded'
    repository, _, commit = model.base_model.removeprefix(hub.PREFIX).partition('@')
    return f'[{repository}](https://huggingface.co/{repository}/tree/{commit}), commit {commit}'


def _speed(plan, dense, measured):
    """Returns a table of the rows for the plan and for the dense model."""
    if measured is None:
        return 'Speed was not measured.'
    content = _read('measured', measured)
    rows = [row for row in content.get('rows', [content]) if row.get('step') != 'train' and row.get(
        'engine', 'jax') == 'jax']
    if 'rows' in content:
        present = [row.get('plan') for row in rows]
        rows = [row for row in rows if row.get('plan') in (str(plan), str(dense))]
        if str(plan) not in [row['plan'] for row in rows]:
            raise ValueError(f'measured has no row for the plan {plan}, but for {" | ".join(map(str, present))}: '
                             'measure this plan, or leave measured out')
    if any('images_per_second' not in row for row in rows):
        raise ValueError('measured has no images_per_second: give the JSON file of python -m evit_jax.benchmark model '
                         '--json, or a dict with images_per_second, and optionally batch_size, dtype and device')
    table = ['| plan | batch | dtype | images/s | against dense |', '|---|---|---|---|---|']
    for row in rows:
        speedup = row.get('speedup_over_dense')
        table.append(f'| {row.get("plan", plan)} | {row.get("batch_size", "")} | {row.get("dtype", "")} | '
                     f'{row["images_per_second"]:,.1f} | {f"{speedup:.2f}x" if speedup else ""} |')
    device = content.get('device')
    return '\n'.join(([f'Measured on {device}.', ''] if device else []) + table)


def _accuracy(plan, macs, evaluated):
    if evaluated is None:
        return 'Accuracy was not measured under this plan.'
    content = _read('evaluated', evaluated)
    metrics, data = content.get('metrics', content), content.get('data', {})
    other = content.get('plan', {}).get('description', str(plan))
    if other != str(plan) or metrics.get('macs', macs) != macs:
        raise ValueError(f'evaluated is of another plan ({other}, {metrics.get("macs", macs):,} MACs) than the model '
                         f'({plan}, {macs:,} MACs): evaluate the model under its plan')
    values = {key: value for key, value in metrics.items() if key.startswith(_PERCENTAGES)}
    if not values:
        raise ValueError(f'evaluated has no accuracy ({", ".join(_PERCENTAGES)}...): give the result of '
                         'evit_jax.evaluate, or the JSON file of python -m evit_jax.main --mode=evaluate')
    origin = ' '.join(filter(None, (data.get('source'), os.path.basename(data.get('path') or ''))))
    count = metrics.get('images', metrics.get('queries'))
    heading = f'Measured on {f"{count:,.0f} " if count else ""}images{f" of {origin}" if origin else ""}.'
    rows = [f'| {key} | {value:.2%} |' for key, value in values.items()]
    return '\n'.join([heading, '', '| metric | value |', '|---|---|', *rows])


def _read(argument, value) -> Mapping[str, Any]:
    """Returns the dict of an argument that is a dict or the path of a JSON file."""
    if isinstance(value, Mapping):
        return value
    with open(value, encoding='utf-8') as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise ValueError(f'{argument}={value} is not JSON ({error}): give another file') from error
    if not isinstance(content, dict):
        raise ValueError(f'{argument}={value} holds a {type(content).__name__}, not a JSON object: give another file')
    return content


def _numbers(values):
    return ', '.join(f'{value:g}' for value in values)
