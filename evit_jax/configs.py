"""Makes the recipes importable as `evit_jax.configs.NAME`.

An installed wheel holds them in evit_jax/configs/, a checkout in the top-level folder configs/.
"""

import pathlib

_INSTALLED = pathlib.Path(__file__).with_suffix('')
FOLDER = _INSTALLED if _INSTALLED.is_dir() else pathlib.Path(__file__).parents[1] / 'configs'
__path__ = [str(FOLDER)]  # a module with a path is a package: its submodules are imported from there
