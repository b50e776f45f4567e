"""The pytest-benchmark suites: `pytest benchmarks/suites`."""
