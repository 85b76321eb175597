"""Number format and memory layout, chosen together: bfloat16 pays with channels_last and loses without."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Precision:
    """How to run a network on this machine."""

    device: torch.device
    bfloat16: bool

    @classmethod
    def choose(cls, precision: str) -> "Precision":
        """``precision`` is "auto", "float32" or "bfloat16"."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(device, precision == "bfloat16" or (precision == "auto" and _fast_bfloat16(device)))

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def place(self, value: Tensor) -> Tensor:
        """A batch (cases, channels, *spatial) on the device, in the layout that goes with the format."""
        if value.ndim not in (4, 5):
            return value.to(self.device)
        return value.to(self.device, memory_format=self._layout(value.ndim - 2))

    def place_network(self, network: nn.Module, spatial_dims: int) -> nn.Module:
        return network.to(self.device, memory_format=self._layout(spatial_dims))  # type: ignore[call-overload]

    def _layout(self, spatial_dims: int) -> torch.memory_format:
        if not self.bfloat16:
            return torch.contiguous_format
        return torch.channels_last if spatial_dims == 2 else torch.channels_last_3d


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not public in torch 2.13; a CPU without either instruction set emulates bfloat16, which is slow.
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
