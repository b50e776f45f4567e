"""Pytest plugins, loaded with -p into a run of the benchmark suites, to test the suites' verdicts."""
