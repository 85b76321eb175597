"""DynUNet, the U-Net of nnU-Net (Isensee et al. 2021) without deep supervision, MONAI's implementation."""

from typing import Annotated, ClassVar, Literal

from monai.networks.nets import DynUNet
from pydantic import Field
from torch import nn

from fedimaging.networks.base import NetworkSettings, Output

_MOST_FILTERS = 320


class DynUNetSettings(NetworkSettings):
    output: ClassVar[Output] = "voxel"

    name: Literal["DynUNet"] = "DynUNet"
    norm: Literal["batch", "group"] = "group"
    filters: Literal[8, 16, 32] = 32
    """channels of the first level; doubled at each level below, up to 320"""
    levels: Annotated[int, Field(ge=3, le=7)] = 5
    """resolutions of the encoder"""
    residual: bool = False
    """whether blocks have a residual path"""

    @property
    def divisor(self) -> int:
        return int(2 ** (self.levels - 1))

    def build(self, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
        steps = self.levels - 1
        return DynUNet(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=[3] * self.levels,
            strides=[1] + [2] * steps,
            upsample_kernel_size=[2] * steps,
            filters=[min(self.filters * 2**level, _MOST_FILTERS) for level in range(self.levels)],
            norm_name=self.norm_layer(),
            res_block=self.residual,
        )
