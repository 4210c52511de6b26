"""The README.md of an exported model."""

from typing import Any

_TEXT = """\
# {name}, exported

Tells {classes} classes apart. Runs on {platforms}, without the package that it was trained with:

    pip install jax=={jax} flatbuffers Pillow
    python serve.py a.jpg b.png

`serve.py` is all there is to a loader:

```python
{loader}```

## Plans

All share the weights in `{weights}`. The first one runs if none is named.

| plan | tokens | G MACs | of dense |
|---|---|---|---|
{plans}

## What goes in, what comes out

In: `images`, uint8 [b, {size}, {size}, 3], RGB, any b. A batch size is compiled at its first use: fill up to a few.
{crop}
Mean {mean} and deviation {std} of the channels, of values in 0..1, are applied inside the programs.
`Served.read` gives the pixels that the model was evaluated on. The one departure: of grey with more than 8 bits Pillow
clips what is bright.

Out: `probabilities`, float32 [b, {classes}]; `class_names` in `manifest.json` has their names.{kept}
Computed in {dtype}; the weights are float32.

## How long it lasts

The programs are StableHLO, written by `jax.export` of jax {jax} (calling convention {convention}). JAX promises that
they run with a jax and jaxlib up to six months newer, and up to three weeks older, than what wrote them; all but the
operation `LayoutConstraint`, which only a TPU runs. Others may work; to be certain keep the checkpoint, and export
again.

Made of {source}, step {step} ({average} weights).
`manifest.json` has all of this for programs, and the SHA-256 of every file.
"""
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
        loader=loader, weights=manifest['weights'], plans=plans, size=size, dtype=model['dtype'],
        crop=_SQUEEZED.format(size=size) if crop is None else _CROP.format(short=int(size / crop), size=size),
        mean=tuple(image['mean']), std=tuple(image['std']), convention=versions['calling_convention'],
        kept=_KEPT.format(grid=size // model['patch_size']) if manifest['kept'] else '',
        source=manifest['checkpoint']['path'], step=manifest['checkpoint']['step'],
        average='averaged' if manifest['checkpoint']['weights'] == 'moving average' else 'trained')
