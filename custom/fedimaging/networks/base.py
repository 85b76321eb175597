"""What every registered network has in common."""

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from torch import nn

from fedimaging.settings import Settings

Output = Literal["case", "voxel"]
"""what a network gives logits of, and a task learns from: a case as a whole, or each of its voxels"""


class NetworkSettings(Settings):
    """Settings of a network; a subclass pins ``name`` and builds the module.

    ``norm`` is "batch" (running statistics are averaged over the sites) or "group" (no statistics to share;
    Wu and He 2018), which suits sites whose images differ much.
    """

    output: ClassVar[Output] = "case"

    name: str
    norm: Literal["batch", "group"] = "batch"
    """running statistics are averaged over the sites (batch), or there are none to share (group)"""

    @property
    def divisor(self) -> int:
        """What every side of an input must be a multiple of."""
        return 1

    @abstractmethod
    def build(self, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
        """Returns a module from (batch, in_channels, *spatial) to logits (batch, out_channels) of the case, or (batch,
        out_channels, *spatial) of the voxels, as :attr:`output` says.
        """

    def norm_layer(self, groups: int = 8) -> Any:
        """The norm in MONAI's notation; ``groups`` must divide every channel count of the network."""
        return "batch" if self.norm == "batch" else ("group", {"num_groups": groups})
