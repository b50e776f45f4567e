"""Fill new memory with NaN and repair Triton's interpreter."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.conftest import GPU

if GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for a deterministic cuBLAS
else:
    from tests.kernels.interpreter import repair

    repair()


@pytest.fixture(autouse=True)
def nan_filled_allocations() -> Iterator[None]:
    """Fill new memory with NaN (integers: with the largest value), and raise on nondeterministic operations.

    An output that was not written fails the tests. Equal inputs give equal bits in every test.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
