"""The README.md of an exported model."""

from typing import Any

from evit_jax.serving.loader import OLDEST_PILLOW

_TEXT = """\
# {name}, exported

Tells {classes} classes apart. Runs on {platforms}, without the package that it was trained with:

    pip install jax=={jax} flatbuffers 'Pillow>={pillow}'
    python serve.py a.jpg b.png

`serve.py` is all there is to a loader:

```python
{loader}```

## Plans

All share the weights in `{weights}`. `{default}` runs if none is named: {why}.

| plan | tokens | G MACs | of dense |
|---|---|---|---|
{plans}

## What goes in, what comes out

In: `images`, uint8 [b, {size}, {size}, 3], RGB, any b. A batch size is compiled at its first use: fill up to a few.
{crop}
Mean {mean} and deviation {std} of the channels, of values in 0..1, are applied inside the programs.

`Served.read` gives the pixels that the model was evaluated on, except in these cases:

- Grey with 16 bits: the evaluation scales it to 8 bits, Pillow clips what is bright. With 32 bits the evaluation
  refuses it, Pillow clips it too.
- A JPEG whose data are damaged or end early, but that closes properly: the evaluation refuses it, Pillow fills in
  what is missing.
- A CMYK JPEG without Adobe's marker: the evaluation takes its inks as inverted, Pillow as they are.
- Other formats than JPEG, PNG, WebP, GIF, BMP and TIFF: the evaluation refuses them, Pillow reads many.
- More than 100 million pixels: the evaluation refuses the image, Pillow one of more than 179 million.

An image that cannot be read, or whose probabilities are not finite, is named by `serve.py` on standard error and ends
no other; the exit code is then 1.

Out: `probabilities`, float32 [b, {classes}]; `class_names` in `manifest.json` has their names.{kept}
Computed in {dtype}; the weights are float32. An evaluation gives logits, of which these are the softmax; another
compiler, device or batch size rounds otherwise, and may change a probability by about {tolerance:.0e}.

## How long it lasts

The programs are StableHLO, written by `jax.export` of jax {jax} (calling convention {convention}). JAX promises that
they run with a jax and jaxlib up to six months newer, and up to three weeks older, than what wrote them; all but the
operation `LayoutConstraint`, which only a TPU runs. Others may work; to be certain keep the checkpoint, and export
again.

Made of {source}, step {step} ({average} weights).
`manifest.json` has all of this for programs, and the SHA-256 of every file.
"""
_WHY = {True: 'it is the plan of training',
        False: 'it was requested first, and the plan of training is not here'}
_CROP = """\
An image's short side is resized to {short} pixels, bicubic and antialiased, and the middle {size} x {size} cut out."""
_SQUEEZED = 'An image is resized to {size} x {size}, bicubic and antialiased, its aspect ratio not kept.'
_KEPT = """

`kept`, for each reduction int32 [b, K]: the patches that leave it, best first, numbered by rows in a grid of
{grid} x {grid}; a negative number is a fused token."""


def readme(manifest: dict[str, Any], loader: str) -> str:
    """The text, of what the manifest says and the source of the loader."""
    image, model, versions = manifest['image'], manifest['model'], manifest['versions']
    size, crop = image['size'], image['crop']
    plans = '\n'.join(
        f'| `{name}` | {" > ".join(map(str, [plan["patches"], *plan["tokens"]]))} | {plan["macs"] / 1e9:.3g} | '
        f'{plan["macs_of_dense"]:.0%} |' for name, plan in manifest['plans'].items())
    return _TEXT.format(
        name=model['name'], classes=model['classes'], platforms=', '.join(manifest['platforms']), jax=versions['jax'],
        pillow=OLDEST_PILLOW, loader=loader, weights=manifest['weights'], plans=plans, size=size, dtype=model['dtype'],
        crop=_SQUEEZED.format(size=size) if crop is None else _CROP.format(short=int(size / crop), size=size),
        mean=tuple(image['mean']), std=tuple(image['std']), convention=versions['calling_convention'],
        kept=_KEPT.format(grid=size // model['patch_size']) if manifest['kept'] else '',
        source=manifest['checkpoint']['path'], step=manifest['checkpoint']['step'],
        default=manifest['default'], why=_WHY[manifest['plans'][manifest['default']]['trained']],
        tolerance=manifest['tolerance'],
        average='averaged' if manifest['checkpoint']['weights'] == 'moving average' else 'trained')
