"""Backends, which answer requests: an endpoint, a local model, batch files, the cache alone."""
