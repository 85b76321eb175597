"""The classification task: loading, weights, metrics against scikit-learn, what its evaluation says and withholds."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, recall_score, roc_auc_score

from fedimaging.datasets.manifest import Case, Manifest
from fedimaging.errors import FedImagingError, Reason
from fedimaging.tasks import make_task

CLASSES = ["normal", "consolidation", "effusion"]


def task(**settings):
    return make_task({"name": "classification", "classes": CLASSES, "image_size": 32, **settings})


def cases(labels, **covariates):
    return [
        Case(image=f"{i}.png", label=label, patient=f"p{i}", **{k: v[i] for k, v in covariates.items()})
        for i, label in enumerate(labels)
    ]


@pytest.fixture
def predicted():
    """60 cases of three classes with fairly good logits."""
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 3, 60)
    logits = generator.normal(size=(60, 3)) + 1.5 * np.eye(3)[truth]
    return torch.tensor(logits, dtype=torch.float32), truth, cases([CLASSES[i] for i in truth], sex=["F", "M"] * 30)


def test_an_image_keeps_its_aspect_ratio_and_is_normalised(tmp_path):
    pixels = np.zeros((40, 80), np.uint8)
    pixels[:, 40:] = 200
    Image.fromarray(pixels).save(tmp_path / "0.png")
    image = task().load(tmp_path, cases(["normal"])[0])["image"]
    assert image.shape == (1, 32, 32)
    assert (image[0, :8] == 0).all(), "rows above and below a wide image are padding"
    assert (image[0, -8:] == 0).all()
    assert image[0, 8:24].mean() == pytest.approx(0, abs=1e-5)
    assert image[0, 8:24].std(correction=0) == pytest.approx(1, abs=1e-4)
    assert image[0, 16, 31] > 0 > image[0, 16, 0]


def test_augmentation_is_seeded_and_keeps_the_stored_item():
    item = {"image": torch.rand(1, 32, 32), "label": torch.tensor(1)}
    before = item["image"].clone()
    first, second, other = (task().augmentation(seed)(item)["image"] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(item["image"], before)
    assert first.shape == (1, 32, 32)
    off = task(augmentation=dict.fromkeys(["rotate_degrees", "shift", "scale", "flip"], 0.0))
    assert torch.allclose(off.augmentation(0)(item)["image"], before, atol=1e-5)


def test_class_weights_are_inverse_to_the_counts():
    loss = task().loss(cases(["normal"] * 6 + ["consolidation"] * 3 + ["effusion"]))
    assert loss.weight.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert task(class_weighting="none").loss(cases(["normal"])).weight is None
    multi = task(classes=CLASSES[1:], multi_label=True).loss(cases([[], [], ["effusion"], ["effusion"]]))
    assert multi.pos_weight.tolist() == pytest.approx([4.0, 1.0])


def test_metrics_agree_with_scikit_learn(predicted):
    logits, truth, labelled = predicted
    metrics = task().metrics(logits, labelled)
    probabilities, decided = logits.softmax(1).numpy(), logits.argmax(1).numpy()
    assert metrics["auroc"] == pytest.approx(roc_auc_score(truth, probabilities, multi_class="ovr"), abs=1e-6)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(truth, decided))
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, decided))
    assert metrics["sensitivity"] == pytest.approx(recall_score(truth, decided, average="macro"))
    assert metrics["loss"] == pytest.approx(log_loss(truth, probabilities), rel=1e-4)
    assert metrics["cases"] == 60


def test_of_two_classes_the_second_is_the_positive_one():
    two = task(classes=["normal", "pneumonia"])
    truth = np.array([0] * 10 + [1] * 10)
    logits = torch.zeros(20, 2)
    logits[:, 1] = torch.linspace(-1, 1, 20)
    logits[0, 1] = 2.0
    metrics = two.metrics(logits, cases([["normal", "pneumonia"][i] for i in truth]))
    assert metrics["sensitivity"] == 1.0
    assert metrics["specificity"] == pytest.approx(0.9)


def test_multi_label_metrics_agree_with_scikit_learn():
    generator = np.random.default_rng(1)
    truth = generator.random((50, 2)) < 0.4
    logits = torch.tensor(generator.normal(size=(50, 2)) + truth, dtype=torch.float32)
    multi = task(classes=CLASSES[1:], multi_label=True)
    labelled = cases([[name for name, on in zip(CLASSES[1:], row, strict=True) if on] for row in truth])
    metrics = multi.metrics(logits, labelled)
    assert metrics["auroc"] == pytest.approx(roc_auc_score(truth, logits.numpy()), abs=1e-6)
    assert set(multi.evaluation(logits, labelled, logits, labelled, seed=0)["per_class"]) == {
        "consolidation",
        "effusion",
    }


def test_too_few_cases_of_a_class_give_no_metric(predicted):
    logits, _, _ = predicted
    few = cases(["normal"] * 50 + ["consolidation"] * 6 + ["effusion"] * 4)
    assert task().metrics(logits, few) == {}
    figures = task().evaluation(logits, few, logits, few, seed=0)
    assert figures["auroc"] is figures["accuracy"] is figures["calibration"] is None
    assert figures["per_class"]["effusion"]["auroc"] is figures["per_class"]["effusion"]["sensitivity"] is None
    assert figures["per_class"]["consolidation"]["auroc"] is not None


def test_the_evaluation_fixes_thresholds_on_validation(predicted):
    logits, truth, labelled = predicted
    figures = task().evaluation(logits, labelled, logits * 0 + torch.linspace(0, 1, 60)[:, None], labelled, seed=0)
    own = task().evaluation(logits, labelled, logits, labelled, seed=0)
    normal, scores = truth == 0, logits.softmax(1)[:, 0].numpy()
    threshold = own["per_class"]["normal"]["threshold"]
    assert own["per_class"]["normal"]["sensitivity"] == pytest.approx((scores[normal] > threshold).mean(), abs=0.02)
    assert figures["per_class"]["normal"]["threshold"] != threshold
    low, high = own["auroc_ci"]
    assert low < own["auroc"] < high
    assert json.loads(json.dumps(own)) == own


def test_subgroups_are_told_only_if_none_of_them_is_small(predicted):
    logits, _, labelled = predicted
    groups = task().evaluation(logits, labelled, logits, labelled, seed=0)["subgroups"]
    assert {name: group["cases"] for name, group in groups["sex"].items()} == {"F": 30, "M": 30}
    small = [c.model_copy(update={"sex": "M" if i < 3 else "F"}) for i, c in enumerate(labelled)]
    assert task().evaluation(logits, small, logits, small, seed=0)["subgroups"] == {}


@pytest.mark.parametrize(
    "names",
    [
        ["Doe^John", "Doe^Jane"],
        ["x" * 33, "M"],
        ["F\n", "M"],
        ["\u00e9", "M"],
        ["", "M"],
        [f"room {i}" for i in range(17)],
    ],
)
def test_a_covariate_that_is_free_text_is_withheld(predicted, names):
    logits, _, labelled = predicted
    cases = [c.model_copy(update={"sex": names[i % len(names)], "vendor": "GE Healthcare"})
             for i, c in enumerate(labelled * 2)]  # fmt: skip
    logits = logits.repeat(2, 1)
    figures = task().evaluation(logits, cases, logits, cases, seed=0)
    assert list(figures["subgroups"]) == ["vendor"]


def manifest(labels, **changes):
    splits = {
        split: [
            c.model_copy(update={"image": f"{split}/{c.image}", "patient": f"{split}{c.patient}"})
            for c in cases(labels)
        ]
        for split in ("training", "validation", "test")
    }
    header = {"name": "x", "modality": "DX", "task": "classification", "classes": CLASSES}
    return Manifest(**{**header, **splits, **changes})


@pytest.mark.parametrize(
    ("changes", "settings", "reason", "words"),
    [
        ({"validation": []}, {}, Reason.TOO_FEW_CASES, "validation split is empty"),
        ({"test": []}, {}, Reason.TOO_FEW_CASES, "test split is empty"),
        ({"training": cases(["normal"] * 4)}, {}, Reason.ONE_CLASS, "one class"),
        ({}, {"classes": ["normal", "pneumonia"]}, Reason.BAD_MANIFEST, "'consolidation' is not one of the job's"),
        ({}, {"multi_label": True}, Reason.BAD_MANIFEST, "multi-label"),
    ],
)
def test_a_manifest_that_cannot_serve_is_refused(changes, settings, reason, words):
    with pytest.raises(FedImagingError, match=words) as caught:
        task(**settings).check(manifest(["normal", "consolidation"], **changes), "manifest.json")
    assert caught.value.reason is reason
    task().check(manifest(["normal", "consolidation"]), "manifest.json")


def test_accuracy_as_key_metric_is_given_where_a_class_is_absent():
    cases = [Case(image=str(i), label="ab"[i % 2], patient=str(i)) for i in range(12)]
    logits = torch.tensor([[2.0, 0.0, 0.0] if i < 9 else [0.0, 2.0, 0.0] for i in range(12)])
    settings = {"name": "classification", "classes": ["a", "b", "c"], "image_size": 32}
    assert make_task(settings).metrics(logits, cases) == {}
    task = make_task(settings | {"key_metric": "accuracy"})
    metrics = task.metrics(logits, cases)
    assert set(metrics) == {"loss", "accuracy", "cases"}
    assert metrics["accuracy"] == pytest.approx(7 / 12)
    figures = task.evaluation(logits, cases, logits, cases, seed=0)
    low, high = figures["accuracy_ci"]
    assert low < figures["accuracy"] < high
    assert (figures["auroc"], figures["balanced_accuracy"]) == (None, None)
    assert task.metrics(logits[:4], cases[:4]) == {}
