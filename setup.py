"""Lists the packages of the wheel: evit_jax, and the recipes of configs/ as evit_jax.configs. See pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=['evit_jax', 'evit_jax.*']), 'evit_jax.configs'],
      package_dir={'evit_jax.configs': 'configs'})
