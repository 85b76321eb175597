"""ResNet18 (He et al. 2016), MONAI's implementation."""

from typing import Any, Literal

from monai.networks.nets import ResNet
from torch import nn

from fedimaging.networks.base import NetworkSettings


class ResNet18Settings(NetworkSettings):
    name: Literal["ResNet18"] = "ResNet18"

    def build(self, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
        norm = self.norm_layer()

        class NormedResNet(ResNet):
            # MONAI 1.6.1 does not hand the norm on from its constructor to its layers.
            def _make_layer(self, *args: Any, **kwargs: Any) -> nn.Sequential:
                return super()._make_layer(*args, **{**kwargs, "norm": norm})

        return NormedResNet(
            block="basic",
            layers=[2, 2, 2, 2],
            block_inplanes=[64, 128, 256, 512],
            spatial_dims=spatial_dims,
            n_input_channels=in_channels,
            num_classes=out_channels,
            conv1_t_stride=2,
            norm=norm,
        )
