"""What a model does on held-out rows: token-level NLL, accuracy and calibration.

`evaluate`, which runs a model, is imported with torch when first asked for.
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
    from ual.evaluate.held_out import evaluate

__all__ = [
    "Evaluation",
    "ReliabilityBin",
    "SourceEvaluation",
    "TokenMetrics",
    "brier",
    "evaluate",
    "expected_calibration_error",
    "reliability_bins",
    "rms_calibration_error",
]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from ual.evaluate.held_out import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
