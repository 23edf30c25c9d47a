"""Fixtures of the tests that run models."""

from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """The package; skipped where the extra ``llm`` is not installed."""
    reason = "the extra llm is not installed"
    pytest.importorskip("torch", reason=reason)
    module: ModuleType = pytest.importorskip("transformers", reason=reason)
    return module


@pytest.fixture(scope="session")
def torch(transformers: ModuleType) -> ModuleType:
    """PyTorch, beside transformers."""
    module: ModuleType = pytest.importorskip("torch")
    return module
