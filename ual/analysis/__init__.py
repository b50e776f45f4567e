"""What a run looks like: figures for reports, papers and notebooks."""

from ual.analysis.plots import data_uri, distribution, loss_curves, reliability_diagram, write_png

__all__ = ["data_uri", "distribution", "loss_curves", "reliability_diagram", "write_png"]
