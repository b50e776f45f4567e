"""Uncertainty of samples: estimators, the backends that answer their requests, the cache between them."""
