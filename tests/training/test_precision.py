"""Precision: bfloat16 where it is fast and right; gradients agree with float32 at the smallest level allowed."""

import pytest
import torch
from torch import nn

from fedimaging.errors import FedImagingError
from fedimaging.training import precision
from fedimaging.training.precision import Precision


@pytest.fixture(autouse=True)
def fast_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "_fast_bfloat16", lambda device: True)


def test_auto_takes_float32_where_bfloat16_has_wrong_gradients():
    assert Precision.choose("auto", [5, 7, 5]).bfloat16
    assert Precision.choose("auto", [64, 64]).bfloat16
    assert Precision.choose("auto", [2, 2]).bfloat16
    assert not Precision.choose("auto", [4, 4, 2]).bfloat16
    assert not Precision.choose("float32", [5, 7, 5]).bfloat16


def test_what_would_be_wrong_is_refused_by_name():
    with pytest.raises(FedImagingError, match=r"training\.precision"):
        Precision.choose("bfloat16", [2, 8, 8])


@pytest.mark.parametrize("sides", [(3, 3, 3), (3, 8, 8), (8, 8, 3), (5, 7, 5), (2, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_agree_with_float32(sides, stride):
    kind = nn.Conv3d if len(sides) == 3 else nn.Conv2d
    torch.manual_seed(0)
    image = torch.randn(4, 16, *sides)
    gradients = []
    for name in ("float32", "bfloat16"):
        torch.manual_seed(1)
        how = Precision.choose(name, sides)
        layer = how.place_network(kind(16, 16, 3, stride=stride, padding=1), len(sides))
        junk = [torch.full((n,), float("nan")) for n in (2**10, 2**12, 2**14, 2**16) for _ in range(8)]
        del junk  # what is read without having been written is now not a number
        with how.autocast():
            outputs = layer(how.place(image))
        outputs.float().square().mean().backward()
        gradients.append(layer.weight.grad)
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()


def test_group_norm_is_the_same_and_keeps_the_layout():
    torch.manual_seed(0)
    image = torch.randn(2, 16, 4, 6, 5)
    results = []
    for name in ("float32", "bfloat16"):
        how = Precision.choose(name, [4, 6, 5])
        layer = how.place_network(nn.GroupNorm(8, 16), 3)
        kind = torch.bfloat16 if how.bfloat16 else torch.float32
        inputs = how.place(image).to(kind).detach().requires_grad_()
        outputs = layer(inputs)
        (outputs.float() * image).sum().backward()
        results.append((outputs.float(), inputs.grad.float(), layer.weight.grad, layer.bias.grad))
        assert outputs.is_contiguous(memory_format=torch.channels_last_3d) == how.bfloat16
    for expected, found in zip(*results, strict=True):
        assert (expected - found).norm() < 0.02 * expected.norm()
