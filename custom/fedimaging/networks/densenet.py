"""DenseNet121 (Huang et al. 2017), MONAI's implementation."""

from typing import Annotated, Literal

from monai.networks.nets import DenseNet121
from pydantic import Field
from torch import nn

from fedimaging.networks.base import NetworkSettings


class DenseNet121Settings(NetworkSettings):
    name: Literal["DenseNet121"] = "DenseNet121"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of activations that training leaves out"""

    def build(self, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
        return DenseNet121(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            out_channels=out_channels,
            norm=self.norm_layer(groups=32),
            dropout_prob=self.dropout,
        )
