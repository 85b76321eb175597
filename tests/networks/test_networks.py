"""Every registered network: builds, gives logits of the right shape, trains, and depends on its seed alone."""

import pytest
import torch

from fedimaging.errors import FedImagingError
from fedimaging.networks import NETWORKS, build_network, network_settings


def build(name, norm="batch", seed=0):
    return build_network(
        network_settings({"name": name, "norm": norm}), spatial_dims=2, in_channels=1, out_channels=3, seed=seed
    )


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_gives_logits_and_gradients(name, norm):
    network = build(name, norm).train()
    logits = network(torch.randn(4, 1, 64, 64))
    assert logits.shape == ((4, 3) if NETWORKS[name].output == "case" else (4, 3, 64, 64))
    logits.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    has_statistics = any("running_mean" in key for key in network.state_dict())
    assert has_statistics == (norm == "batch")


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", [name for name, settings in NETWORKS.items() if settings.output == "voxel"])
def test_networks_of_voxels_take_volumes_of_several_channels(name, norm):
    settings = network_settings({"name": name, "norm": norm})
    network = build_network(settings, spatial_dims=3, in_channels=2, out_channels=4, seed=0)
    sides = [settings.divisor * n for n in (1, 2, 1)]
    logits = network(torch.randn(2, 2, *sides))
    assert logits.shape == (2, 4, *sides)
    assert logits.std() > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_depend_on_the_seed_alone(name):
    torch.manual_seed(7)
    first = build(name, seed=3).state_dict()
    state = torch.random.get_rng_state()
    second, other = build(name, seed=3).state_dict(), build(name, seed=4).state_dict()
    assert torch.equal(state, torch.random.get_rng_state()), "building must not disturb the caller's random state"
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_densenet121_has_the_published_size():
    parameters = sum(p.numel() for p in build("DenseNet121").parameters())
    # torchvision's DenseNet121 has 7,978,856 with 3 input channels and 1,000 classes.
    assert parameters == 7_978_856 - 2 * 64 * 7 * 7 - 997 * 1025


def test_mobilenetv2_has_the_published_size():
    settings = network_settings({"name": "MobileNetV2"})
    network = build_network(settings, spatial_dims=2, in_channels=3, out_channels=10, seed=0).eval()
    # torchvision's MobileNetV2 has 3,504,872 with 1,000 classes.
    assert sum(p.numel() for p in network.parameters()) == 2_236_682 == 3_504_872 - 990 * 1281
    features = network.features(torch.zeros(1, 3, 224, 224))
    assert features.shape == (1, 1280, 7, 7)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"name": "torch.nn.Linear"}, "network.name"),
        ({"name": "subprocess.Popen"}, "network.name"),
        ({"path": "torch.nn.Linear"}, "network.name"),
        ("DenseNet121", "network.name"),
        ({"name": ["DenseNet121"]}, "network.name"),
        ({"name": "DenseNet121", "pretrained": True}, "network.pretrained"),
        ({"name": "DenseNet121", "dropout": "0.5"}, "network.dropout"),
        ({"name": "DenseNet121", "dropout": float("nan")}, "network.dropout"),
        ({"name": "DenseNet121", "norm": "instance"}, "network.norm"),
    ],
)
def test_wrong_settings_are_refused_by_name(raw, named):
    with pytest.raises(FedImagingError, match=named):
        network_settings(raw)
