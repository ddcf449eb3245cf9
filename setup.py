"""Install the folder configs/ as mvar_jax/configs, not as a top-level package; pyproject.toml cannot say this."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mvar_jax*"]), "mvar_jax.configs"],
    package_dir={"mvar_jax.configs": "configs"},
)
