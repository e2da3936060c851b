"""Installs coca_jax; all that is known about the package stands in pyproject.toml."""

from setuptools import setup

setup()
