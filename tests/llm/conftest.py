"""Fixtures of the tests that run models."""

from types import ModuleType
from typing import Any

import pytest

from sop.llm.model import TorchModel


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


@pytest.fixture
def own(model: TorchModel) -> Any:
    """Fail if a test leaves the model with other weights than it had."""
    before = {name: values.detach().clone() for name, values in model.module.named_parameters()}
    yield before
    for name, values in model.module.named_parameters():
        assert (values == before[name]).all(), name
