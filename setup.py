"""Packages of the wheel: jaxrm, and the folder configs/ as jaxrm.configs. Everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["jaxrm", "jaxrm.*"]), "jaxrm.configs"],
    package_dir={"jaxrm.configs": "configs"},
)
