"""Writes a folder that timm or transformers, and `evit_jax.load`, load as a pretrained model."""

import json
import os
import pathlib

from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.interchange import pretrained_files, run_metadata, safetensors_file, weight_files
from evit_jax.interchange.model_card import Measured, model_card
from evit_jax.reduction.registry import get_reducer
from evit_jax.runtime import storage
from evit_jax.runtime.names import get_by_name

LAYOUTS = {'timm': ('timm', pretrained_files.timm_files),
           'hugging_face': ('transformers', pretrained_files.hugging_face_files)}  # layout -> (library, function)


def write(folder: str | os.PathLike, model: LoadedModel, *, layout: str, measured: Measured | None,
          evaluated: Measured | None) -> None:
    """Writes weights, configs and the model card. The folder appears when it is complete.

    Args:
      folder: new or empty local folder.
      model: model with the token budget to store.
      layout: a key of `LAYOUTS`.
      measured, evaluated: see `VisionModel.save_pretrained`.

    Raises:
      ValueError: the folder is not empty or cannot be written, the layout cannot represent the model, or the
        measurements do not belong to it.
    """
    library, files_of = get_by_name('layout', layout, LAYOUTS)
    path = _new_path(folder)
    reducer = get_reducer(model.budget.reducer.name)  # raises an error for a name that cannot be loaded
    if reducer.is_learned:
        raise ValueError(f'the learned modules of reducer {reducer} have no place in a folder for {library}: use '
                         "VisionModel.save, or model.with_reducer('evit')")
    files = files_of(model)
    card = model_card(model, name=path.name, library=library, code=files.code, measured=measured, evaluated=evaluated)
    own = run_metadata.to_metadata(model.config, workdirs.flat(model.metadata()['config']) | {
        'class_names': list(model.class_names)})
    configs = files.configs | {weight_files.CONFIG: files.configs[weight_files.CONFIG] | {
        run_metadata.METADATA: json.loads(own[run_metadata.METADATA])}}
    with storage.new_folder(path, num_bytes=sum(array.nbytes for array in files.arrays.values())) as unfinished:
        safetensors_file.write(unfinished / 'model.safetensors', files.arrays, {'format': 'pt'})
        for name, content in configs.items():
            (unfinished / name).write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
        (unfinished / 'README.md').write_text(card, encoding='utf-8')


def _new_path(folder: str | os.PathLike) -> pathlib.Path:
    if storage.is_remote(folder):
        raise ValueError(f'{folder} is not a local folder: save to a local folder, then copy it')
    path = pathlib.Path(folder).expanduser().absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f'{folder} exists and is not empty: give another folder')
    return path
