"""Packages of the project. Everything else about it is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vapt_fast", "vapt_fast.*"]), "vapt_fast.kernels"],
    package_dir={"vapt_fast.kernels": "kernels"},
    package_data={"vapt_fast": ["**/*.safetensors"]},
)
