"""`python -m fedimaging compare`: is the federated model as good as pooling, and better than training alone?"""

from fedimaging.compare.command import add_commands

__all__ = ["add_commands"]
