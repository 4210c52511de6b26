"""A loaded model: computes logits, features and predictions under any token plan."""

import copy
import functools
import os
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import Array
from PIL import Image

from evit_jax.checkpoints import weights
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.checkpoints.manager import newest_step
from evit_jax.inference import streaming
from evit_jax.inference.compiled import CompiledModel, ModelOutput, make_apply, model_output, num_devices
from evit_jax.inference.pictures import Picture
from evit_jax.inference.prediction import Prediction
from evit_jax.interchange import pretrained_folder
from evit_jax.interchange.model_card import Measured
from evit_jax.models import Params
from evit_jax.models.config import ImageSize, ViTConfig, as_hw, as_size
from evit_jax.reduction.plan import TokenPlan, make_plan
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.reduction.reducer import Reducer
from evit_jax.reduction.registry import get_reducer
from evit_jax.viz.kept import kept_grid


class VisionModel:
    """A model with its token plan: a function from images to logits.

    Create a model with `evit_jax.load` or `evit_jax.create_model`. The methods `with_*` return a copy that shares
    weights and compiled programs. A program is compiled once for each token plan, batch shape and image type.
    """

    def __init__(self, loaded: LoadedModel, *, batch_size: int = 16):
        """Creates a model from loaded weights.

        Args:
          batch_size: number of images in a batch of `predict`. The last batch is padded.
        """
        if batch_size < 1:
            raise ValueError(f'batch_size={batch_size} is less than 1')
        self.loaded, self.batch_size = loaded, batch_size
        self._plan: TokenPlan | None = None  # created from the budget at the first use
        self._apply = make_apply(loaded)
        self._compiled: dict[int, CompiledModel] = {}  # key: number of devices; copies of the model share it

    @property
    def params(self) -> Params:
        """The parameters as float32 numpy arrays."""
        return self.loaded.params

    @property
    def config(self) -> ViTConfig:
        """The architecture."""
        return self.loaded.config

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class, by label."""
        return self.loaded.class_names

    @property
    def plan(self) -> TokenPlan:
        """The token plan.

        Raises:
          ValueError: the reducer does not support the token budget of the weights; see `with_plan`.
        """
        if self._plan is None:
            self._plan = self.loaded.plan()
        return self._plan

    @property
    def macs(self) -> int:
        """Number of multiply-accumulates for one image under the plan."""
        return self.config.macs(self.plan)

    def __repr__(self) -> str:
        config, (height, width) = self.config, as_hw(self.loaded.image_size)
        dense = config.macs(make_plan(self.plan.patches, config.depth, reduce_at=()))
        source = f' from {self.loaded.path}' if self.loaded.path else ''
        outputs = (f'{config.classes} classes' if self.class_names else
                   f'{config.classes or config.head_width} features and no classes')
        return (f'VisionModel({self.loaded.name}{source}: {config.parameters(self.plan) / 1e6:.2f} M parameters, '
                f'{outputs}, images of {height} x {width}; {self.plan}; {self.macs / 1e9:.3g} G MACs per '
                f'image, {self.macs / dense:.0%} of the dense model)')

    def __call__(self, images: Array | np.ndarray) -> Array:
        """Classifies a batch.

        Args:
          images: [B, H, W, 3]. uint8 images are normalised here; float images must be normalised already.

        Returns:
          Logits, [B, L] float32; the features if the model has no head.

        Raises:
          ValueError: the images have another shape or dtype.
        """
        return self._run('logits', images)

    def forward(self, images: Array | np.ndarray) -> ModelOutput:
        """Classifies a batch like `__call__`, and also returns features, kept patches and patch tokens."""
        return self._run('forward', images)

    def apply(self, params: Params, images: Array) -> ModelOutput:
        """The forward pass as a pure function, for `jax.grad`, `jax.jit` and `jax.vmap`.

        Args:
          params: parameters with the tree structure of `self.params`.
          images: see `__call__`.
        """
        self._check(images)
        return model_output(*self._apply(params, images, self.plan, patch_tokens=True))

    def with_plan(self, *, keep_rate: float | None = None, keep_rates: Sequence[float] = (),
                  tokens: Sequence[int] = (), r: int | Sequence[int] | None = None, macs: float | None = None,
                  plan: TokenPlan | PlanFile | str | os.PathLike | None = None) -> 'VisionModel':
        """Returns a model with the same weights and another token plan. Give exactly one argument.

        Args:
          keep_rate: fraction of the tokens that each reduction keeps, in (0, 1].
          keep_rates: one fraction for each reduction.
          tokens: number of tokens that each reduction keeps.
          r: number of tokens merged in every block, or one number for each block; only for a reducer that merges.
          macs: multiply-accumulates as a fraction of the dense model's, in (0, 1].
          plan: a plan, or a file written by `python -m evit_jax.plan`.

        Raises:
          ValueError: there is more than one argument, a value is out of range, or the plan is for another model or
            reducer.
        """
        budget = {'keep_rate': keep_rate, 'keep_rates': keep_rates, 'tokens': tokens, 'r': r, 'macs': macs,
                  'plan': plan}
        loaded = self.loaded.with_plan(**budget)
        return self._copy(loaded, loaded.plan(plan=plan) if isinstance(plan, TokenPlan) else loaded.plan())

    def with_reducer(self, reducer: str | Reducer | None) -> 'VisionModel':
        """Returns a model with the same weights and token budget, and another reducer.

        If the reducer has learned modules that the weights lack, they are initialised at random, with a warning.

        Args:
          reducer: a registered name, or a reducer. None changes nothing.

        Raises:
          ValueError: no reducer is registered under the name.
        """
        if reducer is None:
            return self
        loaded = self.loaded.with_reducer(reducer)
        if not loaded.needs_modules():
            return self._copy(loaded)
        logging.warning('the learned modules of reducer %s are random: train the model before you use it', reducer)
        return VisionModel(loaded.with_random_modules(), batch_size=self.batch_size)

    def with_image_size(self, image_size: ImageSize) -> 'VisionModel':
        """Returns a model with the same weights for images of another size. Position embeddings are resized.

        Args:
          image_size: side of square images, or (height, width), in pixels.

        Raises:
          ValueError: the size is not a multiple of the patch size.
        """
        image_size = as_size(as_hw(image_size))
        self.config.patches(image_size)
        return self._copy(self.loaded._replace(image_size=image_size))

    def predict(self, images: Picture | Iterable[Picture], *, top: int = 5) -> list[Prediction]:
        """Predicts the classes of images. Returns one prediction per image, in the same order.

        A missing or damaged file raises no error; its prediction has a `problem`.

        Args:
          images: one or several images: paths, Pillow images, or uint8 [H, W, 3] of any size.
          top: maximum number of guesses per image.

        Raises:
          ValueError: an object is not an image, or the model has no classes.
        """
        return list(self.stream(images, top=top))

    def stream(self, images: Picture | Iterable[Picture], *, top: int = 5) -> Iterator[Prediction]:
        """Returns an iterator over the predictions of `predict`. Only a few batches are held in memory."""
        if top < 1:
            raise ValueError(f'top={top} is less than 1')
        self.loaded.check_has_classes()
        run = functools.partial(self.compiled(self.batch_size).run, 'predict', plan=self.plan)
        return streaming.stream(run, images, self.plan, self.class_names, transform=self.loaded.eval_transform(),
                                batch_size=self.batch_size, top=top)

    def draw(self, prediction: Prediction) -> Image.Image:
        """Draws the image, the patches that each reduction keeps, and the best guess.

        Raises:
          ValueError: the image has no prediction.
        """
        if prediction.problem:
            raise ValueError(f'{prediction.name} has no prediction ({prediction.problem}): there is nothing to draw')
        kept = [ids[None] for ids in prediction.kept]
        token_of_patch = [index[None] for index in prediction.token_of_patch]
        return kept_grid(prediction.image[None], kept, self.config.patch_size, token_of_patch=token_of_patch or None,
                         predictions=[prediction.top[0].label], class_names=self.class_names)

    def unpool(self, tokens: Array, token_of_patch: Array | Sequence[Array]) -> Array:
        """Expands tokens to a dense map: each patch gets the token that holds it. Use it for segmentation or heat maps.

        `model.unpool(output.patch_tokens, output.token_of_patch)` expands the final tokens of `forward`.

        Args:
          tokens: [B, N, D], tokens after a reduction and before the next one.
          token_of_patch: [B, P] int32 of that reduction; or a sequence with one array per reduction, of which the last
            is used. An empty sequence means that nothing was dropped.

        Returns:
          [B, rows, columns, D] in row-major order of the patches; NaN if the patch was dropped.
        """
        token_of_patch = token_of_patch or None if isinstance(token_of_patch, tuple | list) else (token_of_patch,)
        if token_of_patch is not None:
            index = jnp.maximum(token_of_patch[-1], 0)[..., None]
            dropped = token_of_patch[-1][..., None] < 0
            tokens = jnp.where(dropped, jnp.nan, jnp.take_along_axis(tokens, index, axis=1))
        rows, columns = self.config.grid(self.loaded.image_size)
        return tokens.reshape(tokens.shape[0], rows, columns, tokens.shape[2])

    def save(self, folder: str | os.PathLike) -> None:
        """Writes weights, architecture, token budget, preprocessing and class names, for `evit_jax.load`.

        Raises:
          ValueError: the folder holds a checkpoint, or the reducer has no registered name.
        """
        if newest_step(folder) is not None:
            raise ValueError(f'{folder} holds a checkpoint already: give another folder')
        get_reducer(self.loaded.budget.reducer.name)  # raises an error for a name that cannot be loaded
        weights.save(folder, self.params, self.loaded.metadata())

    def save_pretrained(self, folder: str | os.PathLike, *, layout: str = 'timm', measured: Measured | None = None,
                        evaluated: Measured | None = None) -> None:
        """Writes a folder for timm or transformers, with a model card. `evit_jax.load` reads it with the token plan.

        The other libraries compute the dense model.

        Args:
          folder: new or empty folder. It appears when it is complete.
          layout: 'timm', for `timm.create_model('local-dir:FOLDER', pretrained=True)`; or 'hugging_face', for the ViT,
            DeiT and DINOv2 classes of transformers.
          measured: speed for the card: the JSON file of `python -m evit_jax.benchmark model --json`, or a dict with
            images_per_second, and optionally batch_size, dtype and device.
          evaluated: accuracy for the card: the result of `evit_jax.evaluate` or `evit_jax.knn`, or the JSON file of
            `python -m evit_jax.main --mode=evaluate`.

        Raises:
          ValueError: the folder is not empty, the layout cannot represent the model, the reducer has learned modules or
            no registered name, or the measurements are of another plan.
        """
        pretrained_folder.write(folder, self.loaded, layout=layout, measured=measured, evaluated=evaluated)

    def _copy(self, loaded: LoadedModel, plan: TokenPlan | None = None) -> 'VisionModel':
        model = copy.copy(self)
        model.loaded, model._plan = loaded, plan
        return model

    def _check(self, images):
        height, width = as_hw(self.loaded.image_size)
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f'images have the shape {list(images.shape)}: give a batch [B, {height}, {width}, 3]')
        if images.shape[1:3] != (height, width):
            raise ValueError(f'images are {images.shape[1]} x {images.shape[2]}, the model takes {height} x {width}: '
                             f'resize them, or use model.with_image_size({as_size(images.shape[1:3])})')
        if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f'images are {images.dtype}: give uint8, or normalised floats')

    def compiled(self, batch_size: int) -> CompiledModel:
        """Returns the compiled programs for batches of this size. They are created at the first use."""
        count = num_devices(batch_size)
        if count not in self._compiled:
            self._compiled[count] = CompiledModel(self.loaded.fold_batchnorm(), batch_size)
        return self._compiled[count]

    def _run(self, name, images):
        if isinstance(images, jax.core.Tracer):  # jax.jit or jax.grad is tracing; a tracer cannot be put on a device
            output = self.apply(self.params, images)
            return output.logits if name == 'logits' else output
        images = images if isinstance(images, Array) else np.asarray(images)
        self._check(images)
        if not len(images):
            raise ValueError('the batch has no images: give at least one')
        return self.compiled(len(images)).run(name, images, self.plan)
