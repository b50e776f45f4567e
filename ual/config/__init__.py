"""Configurations: YAML to validated records."""
