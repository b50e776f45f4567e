"""Token-level NLL, accuracy and calibration of a model on held-out samples.

`evaluate` imports torch, so it is imported on first use.
"""

from typing import TYPE_CHECKING, Any

from ual.evaluate.calibration import (
    Evaluation,
    ReliabilityBin,
    SourceEvaluation,
    TokenMetrics,
    brier,
    expected_calibration_error,
    reliability_bins,
    rms_calibration_error,
)

if TYPE_CHECKING:
    from ual.evaluate.held_out import SampleEvaluation, evaluate

__all__ = [
    "Evaluation",
    "ReliabilityBin",
    "SampleEvaluation",
    "SourceEvaluation",
    "TokenMetrics",
    "brier",
    "evaluate",
    "expected_calibration_error",
    "reliability_bins",
    "rms_calibration_error",
]


def __getattr__(name: str) -> Any:
    if name in ("evaluate", "SampleEvaluation"):
        from ual.evaluate import held_out

        return getattr(held_out, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
