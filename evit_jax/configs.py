"""Makes the recipes importable as `evit_jax.configs.NAME`.

The recipes are in evit_jax/configs/ in an installed wheel, and in the top-level folder configs/ in a checkout.
"""

import pathlib

_INSTALLED = pathlib.Path(__file__).with_suffix('')
FOLDER = _INSTALLED if _INSTALLED.is_dir() else pathlib.Path(__file__).parents[1] / 'configs'
__path__ = [str(FOLDER)]  # a module with __path__ is a package; its submodules are imported from this folder
