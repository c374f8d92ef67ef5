"""The examples in docstrings run."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import torch_bp

MODULES = [name for _, name, _ in pkgutil.walk_packages(torch_bp.__path__, "torch_bp.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    # The wrapped function of a formula is what doctest should look into; names a module only imports are skipped.
    result = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
