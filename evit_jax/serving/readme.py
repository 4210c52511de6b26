"""Writes the README.md of an exported model."""

from typing import Any

from evit_jax.serving.loader import OLDEST_PILLOW

_TEXT = """\
# {name}, exported

{task} Runs on {platforms}, without the package that trained it:

    pip install jax=={jax} flatbuffers 'Pillow>={pillow}'
    python serve.py a.jpg b.png

`serve.py` is the complete loader:

```python
{loader}```

## Plans

A plan sets how many tokens each block processes. All plans share the weights in `{weights}`.
`{default}` is the default: {why}.

| plan | tokens | G MACs | of dense |
|---|---|---|---|
{plans}

## Input and output

Input: `images`, uint8 [b, {height}, {width}, 3], RGB, any b. Each new batch size is compiled at its first use, so use
few different sizes, and pad batches to them.
{crop}
Mean {mean} and standard deviation {std} of the channels, for values in 0..1, are applied inside the programs.

`Served.read` gives the pixels that the model was evaluated on, except in these cases:

- Grey images with 16 bits: the evaluation scales them to 8 bits, Pillow clips bright values. With 32 bits the
  evaluation refuses them, Pillow clips them too.
- A JPEG with damaged or missing data that ends with the closing marker: the evaluation refuses it, Pillow fills in the
  missing part.
- A CMYK JPEG without Adobe's marker: the evaluation inverts its inks, Pillow does not.
- Formats other than JPEG, PNG, WebP, GIF, BMP and TIFF: the evaluation refuses them, Pillow reads many.
- More than 100 million pixels: the evaluation refuses the image; Pillow refuses more than 179 million.

If an image cannot be read, or its outputs are not finite, `serve.py` writes its name to standard error, continues
with the next image, and ends with exit code 1.

Output, b images:

{outputs}

Computed in {dtype}; the weights are float32. Another compiler, device or batch size rounds differently, and may change
{rounded} by about {tolerance:.0e}.

## Compatibility

The programs are StableHLO, written by `jax.export` of jax {jax} (calling convention {convention}). JAX promises that
they run with a jax and jaxlib up to six months newer, and up to three weeks older, than the version that wrote them,
except for the operation `LayoutConstraint`, which only a TPU runs. Other versions may work. Keep the checkpoint, so
that you can export it again.

Exported from {source}, step {step} ({average} weights).
`manifest.json` holds all of this for programs, and the SHA-256 of every file.
"""
_WHY = {True: 'it is the plan of training',
        False: 'it was requested first, and the plan of training was not exported'}
_CROP = """\
Resize the short side of an image to {short} pixels by Pillow's filter {filter}, and cut out the centre
{height} x {width}."""
_COVER = """\
Resize an image by Pillow's filter {filter} to the smallest size that covers {short_height} x {short_width} pixels
(height and width) and keeps its aspect ratio. Cut out the centre {height} x {width}."""
_SQUEEZED = "Resize an image to {height} x {width} by Pillow's filter {filter}, without keeping its aspect ratio."
_TASK = {True: 'Classifies images into {classes} classes.', False: 'Computes features of images.'}
_OUTPUTS = {
    'probabilities': 'float32 [b, {classes}], the softmax of the logits; `class_names` in `manifest.json` names the '
                     'classes',
    'logits': 'float32 [b, {classes}]; `class_names` in `manifest.json` names the classes',
    'embedding': 'float32 [b, E], the output of the head',
    'features': 'float32 [b, D], the input of the head',
    'kept': 'int32 [b, K], {each}: the indices of the patches that it keeps, best first. Patches are numbered by rows '
            'in a grid of {rows} x {columns}; a negative number is a fused token',
    'token_of_patch': 'int32 [b, {patches}], {each}: the index of the token that contains each patch; -1: the patch is '
                      'dropped',
    'class_attention': 'float32 [b, N], {each}: the attention of the class token to each of the N tokens that enter it'}


def readme(manifest: dict[str, Any], loader: str) -> str:
    """Returns the README for a manifest. `loader` is the source code of the loader."""
    versions = manifest['versions']
    return _TEXT.format(
        platforms=', '.join(manifest['platforms']), jax=versions['jax'], pillow=OLDEST_PILLOW, loader=loader,
        convention=versions['calling_convention'],
        outputs=outputs(manifest, 'a list with one array for each reduction'),
        rounded='a probability' if manifest['model']['classes'] else 'an output, relative to the largest one,',
        **fields(manifest))


def outputs(manifest: dict[str, Any], each: str) -> str:
    """Returns the list of the outputs, as lines of Markdown.

    Args:
      each: phrase that describes how an output is given for every reduction.
    """
    names, values, lines = manifest['outputs'], fields(manifest), []
    for name, text in _OUTPUTS.items():
        if name in names or f'{name}_0' in names:
            shown = name if name in names else f'{name}_s'
            lines.append(f'- `{shown}`: {text.format(each=each, **values)}')
    return ';\n'.join(lines) + '.'


def fields(manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a README that every format has: the plans, the model and the preprocessing."""
    image, model = manifest['image'], manifest['model']
    grid = [side // model['patch_size'] for side in image['size']]
    (height, width), crop = image['size'], image['crop']
    short = int(height / (crop or 1)), int(width / (crop or 1))
    text = _SQUEEZED if crop is None else _CROP if short[0] == short[1] else _COVER
    plans = '\n'.join(
        f'| `{name}` | {" > ".join(map(str, [plan["patches"], *plan["tokens"]]))} | {plan["macs"] / 1e9:.3g} | '
        f'{plan["macs_of_dense"]:.0%} |' for name, plan in manifest['plans'].items())
    return {
        'name': model['name'], 'task': _TASK[bool(model['classes'])].format(**model), 'classes': model['classes'],
        'dtype': model['dtype'], 'weights': manifest['weights'], 'plans': plans, 'height': height, 'width': width,
        'crop': text.format(
            height=height, width=width, short=short[0], short_height=short[0], short_width=short[1],
            filter=image['interpolation']),
        'mean': tuple(image['mean']), 'std': tuple(image['std']), 'rows': grid[0], 'columns': grid[1],
        'patches': grid[0] * grid[1], 'source': manifest['checkpoint']['path'],
        'step': manifest['checkpoint']['step'], 'default': manifest['default'],
        'why': _WHY[manifest['plans'][manifest['default']]['trained']], 'tolerance': manifest['tolerance'],
        'average': 'averaged' if manifest['checkpoint']['weights'] == 'moving average' else 'trained'}
