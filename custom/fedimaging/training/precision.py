"""Number format and memory layout, chosen together: bfloat16 pays with channels_last and loses without."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedimaging.errors import FedImagingError

_SOUND = 3
"""With fewer voxels along a side, the weights' gradient of a 3 x 3 x 3 convolution in bfloat16 holds memory that was
never written: measured against float32, torch 2.13 with oneDNN on a CPU with AVX512-BF16."""


@dataclass(frozen=True)
class Precision:
    """How to run a network on this machine."""

    device: torch.device
    bfloat16: bool

    @classmethod
    def choose(cls, precision: str, deepest: Sequence[int] = ()) -> "Precision":
        """The number format for this machine and network.

        Args:
            precision: "auto", "float32" or "bfloat16".
            deepest: sides of the network's smallest features.

        Raises:
            FedImagingError: bfloat16 is asked for and its gradients would be wrong here.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sound = device.type == "cuda" or len(deepest) < 3 or min(deepest) >= _SOUND
        if precision == "bfloat16" and not sound:
            raise FedImagingError(
                "training.precision: bfloat16 gives wrong gradients on a CPU where the network's deepest level has "
                f"fewer than {_SOUND} voxels along a side; set it to auto, or make the inputs larger"
            )
        return cls(device, precision == "bfloat16" or (precision == "auto" and sound and _fast_bfloat16(device)))

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def place(self, value: Tensor) -> Tensor:
        """A batch (cases, channels, *spatial) on the device, in the layout that goes with the format."""
        if value.ndim not in (4, 5):
            return value.to(self.device)
        return value.to(self.device, memory_format=self._layout(value.ndim - 2))

    def place_network(self, network: nn.Module, spatial_dims: int) -> nn.Module:
        layout = self._layout(spatial_dims)
        if self.bfloat16 and self.device.type == "cpu":
            _keep_group_norm_contiguous(network, layout)
        return network.to(self.device, memory_format=layout)  # type: ignore[call-overload]

    def _layout(self, spatial_dims: int) -> torch.memory_format:
        if not self.bfloat16:
            return torch.contiguous_format
        return torch.channels_last if spatial_dims == 2 else torch.channels_last_3d


def _keep_group_norm_contiguous(network: nn.Module, layout: torch.memory_format) -> None:
    """Copies to contiguous memory and back: without, torch 2.13's gradient of a group norm is five times slower on a
    CPU, and it was 44 % of a SegResNet's time.
    """
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
            module.register_forward_hook(lambda _, __, output: output.contiguous(memory_format=layout))


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not public in torch 2.13; a CPU without either instruction set emulates bfloat16, which is slow.
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
