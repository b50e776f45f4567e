"""Estimators of uncertainty: each file defines one, and `registry` finds it."""
