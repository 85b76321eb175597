"""Federated learning for hospital imaging: the package that runs inside hospitals."""

__version__ = "0.1.0"
