"""The examples in the docstrings of jaxtune.data."""

import doctest
import importlib
import pkgutil

import pytest

import jaxtune.data

MODULES = [module.name for module in pkgutil.iter_modules(jaxtune.data.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(f"jaxtune.data.{name}")).failed == 0
