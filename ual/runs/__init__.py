"""The folder of a run: written, described, read back."""
