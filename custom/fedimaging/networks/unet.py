"""U-Net (Ronneberger et al. 2015) with residual units (Zhang et al. 2018), MONAI's implementation."""

from typing import Annotated, ClassVar, Literal

from monai.networks.nets import UNet
from pydantic import Field
from torch import nn

from fedimaging.networks.base import NetworkSettings, Output


class UNetSettings(NetworkSettings):
    output: ClassVar[Output] = "voxel"

    name: Literal["UNet"] = "UNet"
    norm: Literal["batch", "group"] = "group"
    filters: Literal[8, 16, 32] = 16
    """channels of the first level; doubled at each level below"""
    levels: Annotated[int, Field(ge=2, le=6)] = 4
    """resolutions of the encoder"""
    residual_units: Annotated[int, Field(ge=0, le=4)] = 2
    """convolutions of a residual unit; 0 for plain convolutions"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of activations that training leaves out"""

    @property
    def divisor(self) -> int:
        return int(2 ** (self.levels - 1))

    def build(self, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
        # MONAI's last transposed convolution has a norm too, of as many channels as there are outputs: what it is
        # given here as outputs are features, so that the groups divide them, and the logits come from a convolution.
        body = UNet(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            out_channels=self.filters,
            channels=[self.filters * 2**level for level in range(self.levels)],
            strides=[2] * (self.levels - 1),
            num_res_units=self.residual_units,
            norm=self.norm_layer(),
            dropout=self.dropout,
        )
        convolution = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        return nn.Sequential(body, convolution(self.filters, out_channels, kernel_size=1))
