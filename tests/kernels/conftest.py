"""The heap is poisoned, and the interpreter rounds."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.conftest import GPU

if GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only so
else:
    from tests.kernels.interpreter import repair

    repair()


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """Fresh memory starts as NaN (the largest integer, for integers), and an operation that races raises.

    So an output that nobody wrote cannot look right, and "same inputs, same bits" is tested everywhere.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
