"""MobileNetV2 (Sandler et al. 2018) at width 1: inverted residuals with linear bottlenecks. MONAI has none."""

from functools import partial
from typing import Annotated, Any, Literal

from monai.networks.layers import Conv, Pool, get_norm_layer
from pydantic import Field
from torch import Tensor, nn

from fedimaging.networks.base import NetworkSettings

# Table 2 of the paper: expansion, channels, repeats, stride of the first.
_BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_STEM, _HEAD = 32, 1280


class MobileNetV2Settings(NetworkSettings):
    name: Literal["MobileNetV2"] = "MobileNetV2"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """before the last layer"""

    def build(self, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
        return MobileNetV2(spatial_dims, in_channels, out_channels, norm=self.norm_layer(), dropout=self.dropout)


class MobileNetV2(nn.Module):
    """From (batch, in_channels, *spatial) to logits (batch, out_channels)."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, norm: Any, dropout: float) -> None:
        super().__init__()
        layer = partial(_layer, spatial_dims, norm)
        self.features = nn.Sequential(layer(in_channels, _STEM, kernel=3, stride=2))
        channels = _STEM
        for expansion, width, repeats, stride in _BLOCKS:
            for number in range(repeats):
                self.features.append(_InvertedResidual(layer, channels, width, stride if number == 0 else 1, expansion))
                channels = width
        self.features.append(layer(channels, _HEAD))
        self.classifier = nn.Sequential(
            Pool["adaptiveavg", spatial_dims](1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(_HEAD, out_channels)
        )
        for module in self.modules():
            if isinstance(module, Conv["conv", spatial_dims]):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images))
        return logits


class _InvertedResidual(nn.Module):
    """Expands, filters each channel by itself, projects linearly; added to its input where the shapes agree."""

    def __init__(self, layer: Any, channels: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.layers = nn.Sequential(
            *([layer(channels, wide)] if expansion > 1 else []),
            layer(wide, wide, kernel=3, stride=stride, groups=wide),
            layer(wide, width, activation=False),
        )
        self.residual = stride == 1 and channels == width

    def forward(self, features: Tensor) -> Tensor:
        outputs: Tensor = self.layers(features)
        return features + outputs if self.residual else outputs


def _layer(  # noqa: PLR0917
    spatial_dims: int,
    norm: Any,
    channels: int,
    width: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: bool = True,
) -> nn.Sequential:
    return nn.Sequential(
        Conv["conv", spatial_dims](
            channels, width, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
        ),
        get_norm_layer(norm, spatial_dims, width),
        *([nn.ReLU6(inplace=True)] if activation else []),
    )
