"""All metadata is in pyproject.toml; this file exists for what will be compiled from csrc/."""

from setuptools import setup

setup()
