"""Writes the README.md of a model that is exported to ONNX."""

from typing import Any

from evit_jax.serving.readme import fields, outputs

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

Output, b images:

{outputs}

Computed in {dtype}. {checks}

Exported from {source}, step {step} ({average} weights), by jax {jax} and onnx {onnx}.
`manifest.json` holds all of this for programs, and the SHA-256 of every file.
"""


def onnx_readme(manifest: dict[str, Any]) -> str:
    """Returns the README for a manifest."""
    checked = [check for check in manifest['checks'].values() if check]
    checks = 'The files were not checked: ONNX Runtime was not installed.' if not checked else (
        f'At the export, ONNX Runtime {manifest["versions"]["onnxruntime"]} ran each file on random images. The '
        f"outputs differ from the model's by up to {max(check['difference'] for check in checked):.1e} of the largest.")
    return _TEXT.format(
        opset=manifest['opset'], file=manifest['plans'][manifest['default']]['file'],
        input_dtype=manifest['input']['dtype'], outputs=outputs(manifest, 'one output for each reduction s'),
        checks=checks, jax=manifest['versions']['jax'], onnx=manifest['versions']['onnx'], **fields(manifest))
