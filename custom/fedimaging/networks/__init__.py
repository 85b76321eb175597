"""The registry of reviewed networks: a job names one, the site builds it; nothing is downloaded.

A new network is one file with a subclass of :class:`~fedimaging.networks.base.NetworkSettings` and one line in
``NETWORKS``.
"""

from typing import Any

import torch
from torch import nn

from fedimaging.errors import FedImagingError
from fedimaging.networks.base import NetworkSettings
from fedimaging.networks.densenet import DenseNet121Settings
from fedimaging.networks.dynunet import DynUNetSettings
from fedimaging.networks.efficientnet import EfficientNetB0Settings
from fedimaging.networks.mobilenet import MobileNetV2Settings
from fedimaging.networks.resnet import ResNet18Settings
from fedimaging.networks.segresnet import SegResNetSettings
from fedimaging.networks.unet import UNetSettings
from fedimaging.settings import parse

NETWORKS: dict[str, type[NetworkSettings]] = {
    "DenseNet121": DenseNet121Settings,
    "DynUNet": DynUNetSettings,
    "EfficientNetB0": EfficientNetB0Settings,
    "MobileNetV2": MobileNetV2Settings,
    "ResNet18": ResNet18Settings,
    "SegResNet": SegResNetSettings,
    "UNet": UNetSettings,
}


def network_settings(raw: Any) -> NetworkSettings:
    """Typed settings from a job's ``{"name": ..., ...}``. Raises FedImagingError by name of the setting."""
    name = raw.get("name") if isinstance(raw, dict) else None
    if not isinstance(name, str) or name not in NETWORKS:
        raise FedImagingError(f"network.name: not a registered network; choose one of {', '.join(NETWORKS)}")
    return parse(NETWORKS[name], raw, "network")


def build_network(
    settings: NetworkSettings, *, spatial_dims: int, in_channels: int, out_channels: int, seed: int
) -> nn.Module:
    """A network with initial weights that depend on ``seed`` alone; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return settings.build(spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)


__all__ = ["NETWORKS", "NetworkSettings", "build_network", "network_settings"]
