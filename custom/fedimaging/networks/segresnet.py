"""SegResNet (Myronenko 2018, without the autoencoder branch), MONAI's implementation."""

from typing import Annotated, ClassVar, Literal

from monai.networks.nets import SegResNet
from pydantic import Field
from torch import nn

from fedimaging.networks.base import NetworkSettings, Output


class SegResNetSettings(NetworkSettings):
    output: ClassVar[Output] = "voxel"

    name: Literal["SegResNet"] = "SegResNet"
    norm: Literal["batch", "group"] = "group"
    init_filters: Literal[8, 16, 32] = 16
    """channels of the first level; doubled at each of the three below"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of activations that training leaves out"""

    @property
    def divisor(self) -> int:
        return 8

    def build(self, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
        return SegResNet(
            spatial_dims=spatial_dims,
            init_filters=self.init_filters,
            in_channels=in_channels,
            out_channels=out_channels,
            norm=self.norm_layer(),
            dropout_prob=self.dropout or None,
        )
