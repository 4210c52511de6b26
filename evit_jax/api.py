"""Functions of the public API: load, create, train and evaluate models. Import them from `evit_jax`."""

import dataclasses
import os
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging

from evit_jax import configs, models
from evit_jax.checkpoints import loaded, weights
from evit_jax.checkpoints import model_config as model_configs
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.checkpoints.manager import newest_step
from evit_jax.data import pipeline, sources
from evit_jax.data.sources import Source
from evit_jax.inference.held_out import check_classes
from evit_jax.inference.images import find_images
from evit_jax.inference.model import VisionModel
from evit_jax.interchange.opening import open_model
from evit_jax.models.config import ViTConfig
from evit_jax.planning import image_search
from evit_jax.planning.fidelity_search import METHODS
from evit_jax.planning.search import parse_target
from evit_jax.planning.speed_up import Settings
from evit_jax.reduction.budget import TokenBudget
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.reducer import Reducer
from evit_jax.reduction.registry import get_reducer
from evit_jax.runtime import backend, distributed, storage
from evit_jax.training import evaluation, loop
from evit_jax.training.initial_weights import folder_in


def load(path: str | os.PathLike, *, ema: bool = False, batch_size: int = 16) -> VisionModel:
    """Loads a model.

    Args:
      path: the workdir of a run or its folder `best`; a folder written by `VisionModel.save`,
        `VisionModel.save_pretrained` or `python -m evit_jax.convert`; a PyTorch or safetensors file; a Hugging Face or
        timm folder; or a model on the Hugging Face Hub, as hf-hub:ORG/NAME[@REVISION] or timm/NAME, which is
        downloaded into the cache of `huggingface_hub`. A local path timm/NAME takes precedence over the Hub.
      ema: load the exponential moving average (EMA) of the weights.
      batch_size: number of images that `VisionModel.predict` computes at a time.

    Raises:
      ValueError: there is no readable checkpoint, it has no EMA, weights are not finite, or the file does not contain
        a supported model.
      FileNotFoundError: the path does not exist, or the Hub has no such model.
      OSError: the model cannot be downloaded: the Hub refuses access or cannot be reached, or the disk is full.
    """
    backend.start()
    return VisionModel(open_model(path, ema=ema), batch_size=batch_size)


def create_model(model: str | ViTConfig, *, keep_rate: float = 0.7, num_classes: int | None = None,
                 reduce_at: Sequence[int] | None = None, reducer: str | Reducer = 'evit',
                 class_names: Sequence[str] = (), seed: int = 0, batch_size: int = 16) -> VisionModel:
    """Creates a model with random weights.

    Args:
      model: a name from `list_models()`, or your own `ViTConfig`.
      keep_rate: fraction of the tokens that each reduction keeps, in (0, 1]; 1 is dense.
      num_classes: number of classes; default: the number of class names, or the number in the config.
      reduce_at: blocks that reduce tokens, counted from 0; default: at a quarter, half and three quarters of the depth.
      reducer: a name from `list_reducers()`, or a reducer.
      class_names: name of each class, in the order of the labels; default: ImageNet's names for 1000 classes, numbers
        for another number.
      seed: seed of the random weights.
      batch_size: number of images that `VisionModel.predict` computes at a time.

    Raises:
      ValueError: an unknown name, or a value out of range.
    """
    backend.start()
    reducer = get_reducer(reducer)
    config = models.get_config(model) if isinstance(model, str) else model
    reduce_at = config.default_reduce_at if reduce_at is None else tuple(reduce_at)
    config = dataclasses.replace(config, classes=num_classes or len(class_names) or config.classes)
    budget = TokenBudget(reducer, tuple(reduce_at), True, (keep_rate,) * len(reduce_at))
    modules = budget.modules(config.patches(config.image_size), config.depth, config.macs)
    params = jax.device_get(models.create(config, modules=modules).init(jax.random.key(seed)))
    created = loaded.from_arrays('', weights.by_name(params), {
        'class_names': list(class_names), model_configs.KEY: model_configs.to_json(config), 'config': {
            'model': {'name': model if isinstance(model, str) else loaded.CUSTOM, 'reduce_at': reduce_at},
            'keep': {'rate': keep_rate}}}, reducer)
    created.plan()  # raises a ValueError for a value out of range
    return VisionModel(created, batch_size=batch_size)


def train(config: Any, *, workdir: str | os.PathLike, model: VisionModel | None = None, train: Any = None,
          test: Any = None, accept_changes: bool = False) -> VisionModel:
    """Trains a model for all epochs of the config. Returns the trained model.

    A second call with the same arguments resumes the run in the workdir.

    Args:
      config: the name of a recipe ('digits'), the path of a config file, or a `ConfigDict`.
      workdir: folder of the run for checkpoints, metrics and pictures.
      model: model to start from. Its architecture, reducer, token budget and preprocessing replace those of the config.
        The head is reinitialised if the data have another number of classes.
      train: training data, which replace those of the config: a tuple (images, labels) of numpy arrays, the path of a
        folder with one subfolder of images for each class, a sequence of records, or a source; see `as_source`.
      test: test data, in any of these forms. Give both or neither.
      accept_changes: resume even if the run in the workdir has another config.

    Raises:
      ValueError: a config value is out of range, the data do not match the model, or the workdir contains another run.
      FloatingPointError: the loss or the gradient is not finite.
    """
    config = _read_config(config)
    if (train is None) != (test is None):
        raise ValueError(f'only {"test" if train is None else "train"} is given: give train and test, or none of them')
    train_and_test, model_config = None, None
    if train is not None:
        train = _training_source(train, model)
        train_and_test = train, _as_source(test, train.class_names)
        config.model.classes = train.num_classes
    if model is not None:
        config.update_from_flattened_dict(_settings_of(model.loaded))
        config.init_from = distributed.on_process_zero(lambda: _save_initial(model, workdir)) or folder_in(workdir)
        model_config = dataclasses.replace(model.config, image_size=model.loaded.image_size,
                                           classes=train.num_classes if train_and_test else model.config.classes)
        config.model.classes = model_config.classes
    loop.train(config.lock(), workdir, accept_changes=accept_changes, sources=train_and_test, model_config=model_config)
    return load(workdir)


def evaluate(model: VisionModel, source: Any, *, batch_size: int = 64) -> dict[str, float]:
    """Evaluates a model under its token plan.

    Args:
      source: labelled images, in any form that `train` accepts.
      batch_size: number of images computed at a time.

    Returns:
      A dict with images (number of evaluated images), left_out (number of unreadable images), loss, top1 and top5 in
      [0, 1], macs and macs_dense (multiply-accumulates of an image under the plan and without reductions). It has
      images_per_second if there is more than one batch. If the data have masks, it has two more values for each
      reduction s, counted from 1: object_kept_s (fraction of object patches kept) and random_kept_s (fraction of all
      patches kept).

    Raises:
      ValueError: the classes of data and model differ, or no image is readable.
      FloatingPointError: logits are not finite.
    """
    source = _as_source(source, model.class_names)
    check_classes(model.loaded, source)
    batch_size = min(batch_size, len(source))
    compiled, plan, failed = model.compiled(batch_size), model.plan, []
    batches = pipeline.eval_batches(source, batch_size=batch_size, transform=model.loaded.eval_transform())

    def readable():
        for batch in batches:
            failed.extend(batch['failed'].tolist())
            yield batch

    try:
        metrics = evaluation.evaluate(lambda batch: compiled.run('evaluate', batch, plan), readable(), dict,
                                      patches=plan.patches).metrics
    finally:
        batches.close()
    if failed:
        logging.warning('%d images are left out, as they cannot be read; the first: %s', len(failed), failed[0])
    dense = make_plan(plan.patches, model.config.depth, reduce_at=())
    return metrics | {'left_out': len(source) - int(metrics['images']), 'macs': model.macs,
                      'macs_dense': model.config.macs(dense)}


def speed_up(model: VisionModel, images: Any, *, target: str = '2x', check: Any = (), minutes: float = 5.0,
             num_images: int = 64, reducers: Sequence[str] = METHODS, seed: int = 0) -> VisionModel:
    """Returns a faster model with the same weights: a token plan for a target, searched on images without labels.

    The search compares the outputs of many plans with those of the dense model; the figures of the result, on images
    that it has not seen, are logged. See `python -m evit_jax.plan --help`.

    Args:
      images: a folder or pattern of image files, or a sequence of paths, Pillow images or uint8 arrays [H, W, 3].
      target: '2x' (as fast as dense on this device), '0.5MACs' (of the dense model), '3.0GMACs', '500img/s'.
      check: images to check the plan on; default: a part of `images` that the search does not use.
      minutes: time limit of the search. Measuring costs and checking the plan come on top.
      num_images: number of images of the search, drawn at random.
      reducers: names of the reducers to choose among.
      seed: seed of the draw.

    Raises:
      ValueError: the target cannot be reached, a name is unknown, or there are not enough readable images.
    """
    search, check = (find_images(value) if isinstance(value, str | os.PathLike) else list(value)
                     for value in (images, check))
    files = image_search.Files(search, check, num_images, seed=seed)
    settings = Settings((parse_target(target),), tuple(reducers), minutes)
    result = image_search.run(model.loaded, files, settings, image_search.OutputFiles())
    logging.info('%s', image_search.summary(model.loaded, result))
    return model.with_plan(plan=result.targets[0].found.plan)


def _training_source(value, model) -> Source:
    """Returns the source of training data. Unnamed classes get the names of the model, if it has as many classes."""
    source = _as_source(value, ())
    numbers = tuple(map(str, range(source.num_classes)))
    if model is None or source.class_names != numbers or source.num_classes != model.config.classes:
        return source
    return _as_source(value, model.class_names)


def _as_source(value, class_names) -> Source:
    return sources.as_source(value, () if isinstance(value, Source) else class_names)


def _read_config(config):
    """Returns an unlocked copy of a config, given as an object, by recipe name or by file."""
    if isinstance(config, str | os.PathLike):
        path = pathlib.Path(config).expanduser()
        recipe = configs.FOLDER / f'{config}.py'
        if not path.is_file() and not recipe.is_file():
            names = ', '.join(sorted(file.stem for file in recipe.parent.glob('[!_]*.py')))
            raise FileNotFoundError(f'there is no config {config}: give a file, or one of the recipes {names}')
        config = runpy.run_path(str(path if path.is_file() else recipe))['get_config']()
    return config.copy_and_resolve_references().unlock()


def _settings_of(model: LoadedModel) -> dict[str, Any]:
    """Returns the config keys for the token budget, preprocessing and name of a model."""
    settings = model.metadata()['config']
    part = {'model': ('name', 'image_size', 'image_width', 'reduce_at', 'fuse'), 'reducer': ('name', 'r', 'decreasing'),
            'keep': ('rate', 'rates', 'tokens', 'drop', 'macs'),
            'data': ('mean', 'std', 'eval_crop', 'interpolation')}
    return {f'{group}.{key}': settings[group][key] for group, keys in part.items() for key in keys}


def _save_initial(model, workdir) -> str:
    """Saves the initial weights of a run, unless it has a checkpoint. Returns their folder."""
    folder = folder_in(workdir)
    if newest_step(workdir) is None:
        storage.as_path(folder).rmtree(missing_ok=True)
        model.save(folder)
    return folder
