"""What answers an estimator's requests: an endpoint, a local model, batch files, the cache alone."""
