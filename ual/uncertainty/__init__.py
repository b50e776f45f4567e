"""Where each sample's uncertainty comes from: estimators behind one interface."""

from ual.uncertainty.estimators import Column as Column
from ual.uncertainty.estimators import Estimator as Estimator
from ual.uncertainty.white_box import WhiteBox as WhiteBox

__all__ = ["Column", "Estimator", "WhiteBox"]
