"""A job's settings: what is wrong, unknown or out of range is refused by name, and its value is never echoed."""

import pytest

from fedimaging.errors import FedImagingError, Reason
from fedimaging.training.settings import JobSettings

GOOD = {
    "dataset": "chest_xray",
    "task": {"name": "classification", "classes": ["normal", "pneumonia"]},
    "network": {"name": "DenseNet121"},
    "training": {"epochs": 2},
    "seed": 3,
}


def test_good_settings_come_back_with_defaults_filled_in():
    settings = JobSettings(GOOD).to_dict()
    assert settings["training"]["epochs"] == 2
    assert settings["training"]["optimizer"] == "adamw"
    assert settings["task"]["image_size"] == 64
    assert JobSettings(settings).to_dict() == settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("job.dataset", "../../etc"),
        ("job.dataset", "/srv/other"),
        ("job.dataset", "file:///etc/passwd"),
        ("job.seed", -1),
        ("job.seed", "SECRET-VALUE"),
        ("job.seed", True),
        ("job.training.epochs", 0),
        ("job.training.epochs", 1.5),
        ("job.training.epochs", "1"),
        ("job.training.learning_rate", float("inf")),
        ("job.training.learning_rate", float("nan")),
        ("job.training.learning_rate", 0),
        ("job.training.optimizer", "torch.optim.Adam"),
        ("job.training.batch_size", 1),
        ("job.training.precision", "float16"),
        ("job.training.max_unreadable", 1.0),
        ("job.training.checkpoint", "SECRET-VALUE"),
        ("task.name", "SECRET-VALUE"),
        ("task.classes", ["normal"]),
        ("task.classes", ["normal", "normal"]),
        ("task.classes.1", ["normal", "../SECRET-VALUE"]),
        ("task.image_size", 10**9),
        ("task.augmentation.rotate_degrees", 1000.0),
        ("task.transforms", ["SECRET-VALUE"]),
        ("network.name", "SECRET-VALUE"),
        ("network.weights", "SECRET-VALUE"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_without_its_value(name, value):
    raw = {key: dict(group) if isinstance(group, dict) else group for key, group in GOOD.items()}
    parts = name.removeprefix("job.").split(".")
    owner = raw
    for part in parts[:-1] if not parts[-1].isdigit() else parts[:-2]:
        owner = owner.setdefault(part, {})
    owner[parts[-1] if not parts[-1].isdigit() else parts[-2]] = value
    with pytest.raises(FedImagingError) as caught:
        JobSettings(raw)
    assert caught.value.reason is Reason.BAD_SETTING
    message = str(caught.value)
    assert name.split(".")[0] in message
    assert ".".join(parts[:2]).split(".")[-1] in message
    assert "SECRET-VALUE" not in message
    assert "\n" not in message


@pytest.mark.parametrize("raw", [None, [], "chest_xray", {}, {**GOOD, "path": "subprocess.Popen"}])
def test_a_job_of_another_shape_is_refused(raw):
    with pytest.raises(FedImagingError):
        JobSettings(raw)
