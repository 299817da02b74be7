"""Replacements for upstream forwards: each is a factory `(original) -> forward`."""
