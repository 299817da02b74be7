"""The version, where both the package and its report can read it."""

__version__ = "0.1.0"
