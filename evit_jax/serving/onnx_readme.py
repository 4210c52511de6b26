"""Writes the README.md of a model that is exported to ONNX."""

from typing import Any

from evit_jax.serving.readme import fields

_TEXT = """\
# {name}, exported to ONNX

{task} ONNX opset {opset}. Keep all files in one folder: the `.onnx` files read their weights from `{weights}`.

With ONNX Runtime (`pip install onnxruntime`):

```python
import onnxruntime
session = onnxruntime.InferenceSession('{file}')
outputs = session.run(None, {{'images': images}})  # in the order of session.get_outputs()
```

With OpenVINO (`pip install openvino`), which computes in bfloat16 where the CPU has it:

```python
import openvino
model = openvino.Core().compile_model('{file}', 'CPU')
outputs = model(images)
```

With TensorRT 10:

    trtexec --onnx={file} --minShapes=images:1x{height}x{width}x3 --optShapes=images:8x{height}x{width}x3 \\
        --maxShapes=images:64x{height}x{width}x3

## Plans

A plan sets how many tokens each block processes. `{default}` is the default: {why}.

| plan | tokens | G MACs | of dense |
|---|---|---|---|
{plans}

## Input and output

Input: `images`, {input_dtype} [b, {height}, {width}, 3], RGB, values 0 to 255, any b.
{crop}
Mean {mean} and standard deviation {std} of the channels, for values in 0..1, are applied inside the programs.

Output, b images:{outputs}
Computed in {dtype}. {checks}

Exported from {source}, step {step} ({average} weights), by jax {jax} and onnx {onnx}.
`manifest.json` holds all of this for programs, and the SHA-256 of every file.
"""
_OUTPUTS = {
    'logits': 'float32 [b, {classes}]; `class_names` in `manifest.json` names the classes',
    'features': 'float32 [b, D], the input of the head',
    'kept': 'int32 [b, K], one output for each reduction s: the indices of the patches that it keeps, best first. '
            'Patches are numbered by rows in a grid of {rows} x {columns}; a negative number is a fused token',
    'token_of_patch': 'int32 [b, {patches}], one output for each reduction s: the index of the token that contains '
                      'each patch; -1: the patch is dropped',
    'class_attention': 'float32 [b, N], one output for each reduction s: the attention of the class token to each of '
                       'the N tokens that enter it'}


def onnx_readme(manifest: dict[str, Any]) -> str:
    """Returns the README for a manifest."""
    shared, names = fields(manifest), manifest['outputs']
    patches = shared['rows'] * shared['columns']
    outputs = ''.join(
        f'\n- `{name if name in names else f"{name}_s"}`: {text.format(patches=patches, **shared)};'
        for name, text in _OUTPUTS.items() if name in names or f'{name}_0' in names)
    checked = [check for check in manifest['checks'].values() if check]
    checks = 'The files were not checked: ONNX Runtime was not installed.' if not checked else (
        f'At the export, ONNX Runtime {manifest["versions"]["onnxruntime"]} ran each file on random images. The '
        f"outputs differ from the model's by up to {max(check['difference'] for check in checked):.1e} of the largest.")
    classes = manifest['model']['classes']
    return _TEXT.format(
        opset=manifest['opset'], file=manifest['plans'][manifest['default']]['file'],
        task=f'Classifies images into {classes} classes.' if classes else 'Computes features of images.',
        input_dtype=manifest['input']['dtype'], outputs=outputs.removesuffix(';') + '.', checks=checks,
        jax=manifest['versions']['jax'], onnx=manifest['versions']['onnx'], **shared)
