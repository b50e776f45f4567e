"""`python -m ual.train config.yaml` is `ual train config.yaml`, in the form that launchers start."""

from ual.cli import train_module

train_module()
