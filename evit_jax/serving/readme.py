"""Writes the README.md of an exported model."""

from typing import Any

from evit_jax.serving.loader import OLDEST_PILLOW

_TEXT = """\
# {name}, exported

Classifies images into {classes} classes. Runs on {platforms}, without the package that trained it:

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

If an image cannot be read, or its probabilities are not finite, `serve.py` writes its name to standard error, continues
with the next image, and ends with exit code 1.

Output: `probabilities`, float32 [b, {classes}]; `class_names` in `manifest.json` names the classes.{kept}
Computed in {dtype}; the weights are float32. The probabilities are the softmax of the logits of an evaluation. Another
compiler, device or batch size rounds differently, and may change a probability by about {tolerance:.0e}.

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
_KEPT = """

`kept`: one int32 array [b, K] for each reduction, with the indices of the patches that it keeps, best first. Patches
are numbered by rows in a grid of {rows} x {columns}; a negative number is a fused token."""


def readme(manifest: dict[str, Any], loader: str) -> str:
    """Returns the README for a manifest. `loader` is the source code of the loader."""
    versions = manifest['versions']
    return _TEXT.format(
        platforms=', '.join(manifest['platforms']), jax=versions['jax'], pillow=OLDEST_PILLOW, loader=loader,
        convention=versions['calling_convention'],
        kept=_KEPT.format(**fields(manifest)) if manifest['kept'] else '', **fields(manifest))


def fields(manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a README that every format has: the plans, the model and the preprocessing."""
    image, model = manifest['image'], manifest['model']
    (height, width), crop = image['size'], image['crop']
    short = int(height / (crop or 1)), int(width / (crop or 1))
    text = _SQUEEZED if crop is None else _CROP if short[0] == short[1] else _COVER
    plans = '\n'.join(
        f'| `{name}` | {" > ".join(map(str, [plan["patches"], *plan["tokens"]]))} | {plan["macs"] / 1e9:.3g} | '
        f'{plan["macs_of_dense"]:.0%} |' for name, plan in manifest['plans'].items())
    return {
        'name': model['name'], 'classes': model['classes'], 'dtype': model['dtype'], 'weights': manifest['weights'],
        'plans': plans, 'height': height, 'width': width, 'crop': text.format(
            height=height, width=width, short=short[0], short_height=short[0], short_width=short[1],
            filter=image['interpolation']),
        'mean': tuple(image['mean']), 'std': tuple(image['std']), 'rows': height // model['patch_size'],
        'columns': width // model['patch_size'], 'source': manifest['checkpoint']['path'],
        'step': manifest['checkpoint']['step'], 'default': manifest['default'],
        'why': _WHY[manifest['plans'][manifest['default']]['trained']], 'tolerance': manifest['tolerance'],
        'average': 'averaged' if manifest['checkpoint']['weights'] == 'moving average' else 'trained'}
