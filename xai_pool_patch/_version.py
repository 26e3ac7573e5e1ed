"""The version, apart from everything that it would import."""

__version__ = "0.1.0"
