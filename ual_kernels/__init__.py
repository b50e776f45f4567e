"""Fused cross entropy with a separate label smoothing and weight for every sample or token."""

from ual_kernels._types import IGNORE_INDEX as IGNORE_INDEX
from ual_kernels._types import Backend as Backend
from ual_kernels._types import UnsupportedError as UnsupportedError
from ual_kernels.functional import cross_entropy as cross_entropy
from ual_kernels.functional import cross_entropy_with_statistics as cross_entropy_with_statistics
from ual_kernels.functional import linear_cross_entropy as linear_cross_entropy
from ual_kernels.functional import (
    linear_cross_entropy_with_statistics as linear_cross_entropy_with_statistics,
)
from ual_kernels.options import CrossEntropyOptions as CrossEntropyOptions
from ual_kernels.options import LinearCrossEntropyOptions as LinearCrossEntropyOptions
from ual_kernels.statistics import TokenStatistics as TokenStatistics
from ual_kernels.targets import SparseTarget as SparseTarget

__version__ = "0.1.0"
__all__ = [
    "IGNORE_INDEX",
    "Backend",
    "CrossEntropyOptions",
    "LinearCrossEntropyOptions",
    "SparseTarget",
    "TokenStatistics",
    "UnsupportedError",
    "cross_entropy",
    "cross_entropy_with_statistics",
    "linear_cross_entropy",
    "linear_cross_entropy_with_statistics",
]
