"""Where each sample's uncertainty comes from: estimators, those who answer them, and the cache between.

`ual train` uses `Column` and `WhiteBox`; `ual elicit` the estimators of `ual.uncertainty.registry`.
"""

from ual.uncertainty.estimators import Column as Column
from ual.uncertainty.estimators import Estimator as Estimator
from ual.uncertainty.white_box import WhiteBox as WhiteBox

__all__ = ["Column", "Estimator", "WhiteBox"]
