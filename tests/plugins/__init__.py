"""Loaded by name (-p) into a pytest that runs the benchmark suites, to see what the suites make of them."""
