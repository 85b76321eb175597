"""EfficientNet-B0 (Tan and Le 2019), MONAI's implementation, from scratch."""

from typing import Literal

from monai.networks.nets import EfficientNetBN
from torch import nn

from fedimaging.networks.base import NetworkSettings


class EfficientNetB0Settings(NetworkSettings):
    name: Literal["EfficientNetB0"] = "EfficientNetB0"

    def build(self, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
        return EfficientNetBN(
            "efficientnet-b0",
            pretrained=False,
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            num_classes=out_channels,
            norm=self.norm_layer(),
        )
