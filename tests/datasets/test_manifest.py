"""Manifests: what is read and refused, and the split by patient."""

import json
import math
import os
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedimaging.datasets.manifest import FRACTIONS, SPLITS, Case, Manifest, assign_splits
from fedimaging.errors import FedImagingError, Reason


def plain(**changes):
    """A valid manifest as plain values: three patients, two classes."""
    data = {
        "name": "chest_xray",
        "modality": "DX",
        "task": "classification",
        "classes": ["normal", "pneumonia"],
        "made": {"by": "a test", "synthetic": True},
        "training": [
            {"image": "images/1.png", "label": "normal", "patient": "P1", "sex": "F"},
            {"image": "images/2.png", "label": "pneumonia", "patient": "P1"},
        ],
        "validation": [{"image": "images/3.png", "label": "normal", "patient": "P2"}],
        "test": [{"image": "images/4.png", "label": "pneumonia", "patient": "P3"}],
    }
    return data | changes


def multi_label(label):
    case = {"image": "1.png", "label": label, "patient": "P1"}
    return plain(multi_label=True, training=[case], validation=[], test=[])


def written(folder, data):
    path = folder / "manifest.json"
    path.write_text(json.dumps(data))
    return path


def with_case(**changes):
    data = plain()
    data["training"][1] |= changes
    return data


def test_written_manifest_reads_back_equal(tmp_path):
    manifest = Manifest.parse(plain(), tmp_path / "manifest.json")
    manifest.write(tmp_path / "new" / "manifest.json")
    again = Manifest.read(tmp_path / "new" / "manifest.json")
    assert again == manifest
    assert again.digest() == manifest.digest()
    assert again.synthetic
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["manifest.json"]


def test_counts_and_assignments(tmp_path):
    manifest = Manifest.parse(plain(), tmp_path)
    assert manifest.class_counts("training") == {"normal": 1, "pneumonia": 1}
    assert manifest.class_counts("test") == {"normal": 0, "pneumonia": 1}
    assert manifest.assignments() == {"P1": "training", "P2": "validation", "P3": "test"}
    assert manifest.split("training")[0].sex == "F"
    with pytest.raises(FedImagingError, match="'train' is no split"):
        manifest.split("train")


def test_digest_depends_on_content_only(tmp_path):
    data = plain()
    reordered = dict(reversed(data.items()))
    assert Manifest.parse(data, tmp_path).digest() == Manifest.parse(reordered, tmp_path).digest()
    assert Manifest.parse(data, tmp_path).digest() != Manifest.parse(with_case(label="normal"), tmp_path).digest()


def test_multi_label_counts_every_finding(tmp_path):
    data = multi_label(["normal", "pneumonia"])
    data["training"].append({"image": "2.png", "label": [], "patient": "P2"})
    manifest = Manifest.parse(data, tmp_path)
    assert manifest.class_counts("training") == {"normal": 1, "pneumonia": 1}
    assert manifest.training[1].class_names == ()


def test_segmentation_label_is_a_path(tmp_path):
    case = {"image": "imagesTr/1.nii.gz", "label": "labelsTr/1.nii.gz", "patient": "P1"}
    data = plain(task="segmentation", classes=["background", "hippocampus"], training=[case], validation=[], test=[])
    manifest = Manifest.parse(data, tmp_path)
    assert manifest.class_counts("training") == {}
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / "1.nii.gz").touch()
    with pytest.raises(FedImagingError, match=r"training\[0\]: 'labelsTr/1.nii.gz' does not exist"):
        manifest.check_files(tmp_path)
    case["label"] = "/etc/passwd"
    with pytest.raises(FedImagingError, match="absolute path"):
        Manifest.parse(data, tmp_path)


@pytest.mark.parametrize(
    ("data", "entry", "reason"),
    [
        (with_case(label="fracture"), "training[1]", "unknown class 'fracture'; the classes are normal, pneumonia"),
        (with_case(image="images/1.png"), "training[1]", "already in training[0]"),
        (with_case(image="images/./1.png"), "training[1]", "already in training[0]"),
        (with_case(patient="P3"), "test[0]", "its patient is also in training[1]"),
        (with_case(image=""), "training[1].image", "is empty"),
        (with_case(patient=" "), "training[1].patient", "is empty"),
        (with_case(patient=7), "training[1].patient", "valid string"),
        (with_case(image="/srv/1.png"), "training[1]", "is an absolute path"),
        (with_case(image="C:\\1.png"), "training[1]", "is an absolute path"),
        (with_case(image="images\\1.png"), "training[1]", "holds a backslash"),
        (with_case(image="../1.png"), "training[1]", "leaves the manifest's folder"),
        (with_case(image="images/../../1.png"), "training[1]", "leaves the manifest's folder"),
        (with_case(image="images/../1.png"), "training[1]", "leaves the manifest's folder"),
        (with_case(image="."), "training[1]", "names no file"),
        (with_case(label=["normal"]), "training[1]", "label must be one class name"),
        (with_case(label=3), "training[1].label", "neither a text nor a list of texts"),
        (with_case(label=""), "training[1].label", "is empty"),
        (with_case(age=30), "training[1]", "unknown key 'age'; the keys are image, label, patient"),
        (plain(training=[{"image": "1.png", "label": "normal"}]), "training[0]", "the key 'patient' is missing"),
        (plain(training=["1.png"]), "training[0]", "valid dictionary"),
        (plain(training={}), "training", "valid list"),
        (plain(numTraining=2), "", "unknown key 'numTraining'; the keys are name, modality"),
        (plain(task="detection"), "task", "'classification' or 'segmentation'"),
        (plain(classes=[]), "classes", "at least 1 item"),
        (plain(classes=["normal", "normal"]), "classes", "'normal' is listed twice"),
        (plain(training=[], validation=[], test=[]), "", "holds no case"),
        (multi_label("normal"), "training[0]", "label must be a list of class names"),
        (multi_label(["normal", "normal"]), "training[0]", "names the class 'normal' twice"),
        (multi_label(["normal", "fracture"]), "training[0]", "unknown class 'fracture'"),
        ([1], "", "holds a list, not an object"),
    ],
)
def test_fault_is_told_in_one_line_with_file_entry_and_reason(tmp_path, data, entry, reason):
    path = written(tmp_path, data)
    with pytest.raises(FedImagingError) as caught:
        Manifest.read(path)
    message = str(caught.value)
    assert caught.value.reason is Reason.BAD_MANIFEST
    assert message.startswith(f"{path}: {entry}")
    assert reason in message
    assert "\n" not in message
    assert "pydantic" not in message


def test_fault_tells_no_patient(tmp_path):
    with pytest.raises(FedImagingError) as caught:
        Manifest.parse(with_case(patient="P3"), tmp_path)
    assert "P3" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "line 1, column 2: not JSON"),
        (b"\xff\xfe{}", "is not UTF-8 text"),
        (b'{"name": "a", "name": "b"}', "the key 'name' occurs twice"),
    ],
)
def test_file_that_is_no_manifest(tmp_path, content, reason):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(FedImagingError, match=reason) as caught:
        Manifest.read(path)
    assert caught.value.reason is Reason.BAD_MANIFEST


def test_missing_manifest(tmp_path):
    with pytest.raises(FedImagingError, match="no such manifest; make it with") as caught:
        Manifest.read(tmp_path / "manifest.json")
    assert caught.value.reason is Reason.NO_DATASET


@pytest.fixture
def dataset(tmp_path):
    """A folder with a manifest and its four (empty) images."""
    folder = tmp_path / "chest_xray"
    (folder / "images").mkdir(parents=True)
    for number in range(1, 5):
        (folder / "images" / f"{number}.png").touch()
    written(folder, plain())
    return folder


def check(folder):
    path = folder / "manifest.json"
    Manifest.read(path).check_files(folder, path)


def test_complete_dataset_passes(dataset):
    check(dataset)


def test_missing_image_is_named(dataset):
    (dataset / "images" / "3.png").unlink()
    with pytest.raises(
        FedImagingError, match=r"manifest.json: validation\[0\]: 'images/3.png' does not exist"
    ) as caught:
        check(dataset)
    assert caught.value.reason is Reason.BAD_MANIFEST


def test_image_that_is_a_folder_is_refused(dataset):
    (dataset / "images" / "3.png").unlink()
    (dataset / "images" / "3.png").mkdir()
    with pytest.raises(FedImagingError, match="is no file"):
        check(dataset)


@pytest.mark.parametrize("linked", ["images/4.png", "images"])
def test_link_out_of_the_folder_is_refused(dataset, linked):
    elsewhere = dataset.parent / "chest_xray_2"  # shares the folder's name as a prefix
    (dataset / linked).rename(elsewhere)
    (dataset / linked).symlink_to(elsewhere)
    with pytest.raises(FedImagingError, match="is a link out of the manifest's folder"):
        check(dataset)


def test_link_within_the_folder_is_followed(dataset):
    (dataset / "images").rename(dataset / "files")
    (dataset / "images").symlink_to("files")
    check(dataset)


def test_two_names_of_one_file_are_a_duplicate(dataset):
    (dataset / "images" / "4.png").unlink()
    (dataset / "images" / "4.png").symlink_to("1.png")
    with pytest.raises(FedImagingError, match=r"test\[0\]: .* same file as the image of training\[0\]"):
        check(dataset)


def test_failed_write_keeps_the_old_file(dataset, monkeypatch):
    path = dataset / "manifest.json"
    before = path.read_text()
    manifest = Manifest.parse(plain(name="other"), path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FedImagingError, match="No space left") as caught:
        manifest.write(path)
    assert caught.value.reason is Reason.NO_DISK_SPACE
    assert path.read_text() == before
    assert {entry.name for entry in dataset.iterdir()} == {"images", "manifest.json"}


names = st.text("abcdef0123456789._-", min_size=1, max_size=8)
cases = st.builds(
    Case,
    image=names.map(lambda name: f"images/{name}x.png"),
    label=st.sampled_from(["normal", "pneumonia"]),
    patient=names,
    sex=st.sampled_from([None, "F", "M"]),
)


@settings(max_examples=50)
@given(st.lists(cases, min_size=1, max_size=30, unique_by=lambda case: case.image), st.integers(0, 3))
def test_any_manifest_survives_the_file(tmp_path_factory, listed, seed):
    splits = assign_splits([case.patient for case in listed], seed=seed)
    entries = {split: [case.model_dump() for case in listed if splits[case.patient] == split] for split in SPLITS}
    path = tmp_path_factory.getbasetemp() / "any.json"
    manifest = Manifest.parse(plain() | entries, path)
    manifest.write(path)
    assert Manifest.read(path) == manifest
    assert manifest.assignments() == splits
    assert sum(sum(manifest.class_counts(split).values()) for split in SPLITS) == len(listed)


patients = st.lists(names, min_size=1, max_size=120, unique=True)
labelled = st.dictionaries(names, st.sampled_from(["normal", "pneumonia", "effusion"]), min_size=1, max_size=120)
shares = st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20)).filter(any)


def per_stratum(strata, splits):
    """Stratum -> patients per split, for strata large enough to be split on their own."""
    sizes = Counter(strata.values())
    return {
        name: Counter(splits[patient] for patient in strata if strata[patient] == name)
        for name, size in sizes.items()
        if size > len(SPLITS)
    }


@given(labelled, st.integers())
def test_fresh_split_is_within_one_patient_of_the_fractions(strata, seed):
    splits = assign_splits(strata, seed=seed, strata=strata)
    assert splits.keys() == strata.keys()
    for counts in per_stratum(strata, splits).values():
        for split, fraction in zip(SPLITS, FRACTIONS, strict=True):
            assert counts[split] >= 1
            assert abs(counts[split] - fraction * counts.total()) < 1 + 1e-6


@given(patients, shares, st.integers())
def test_any_fractions_are_respected(listed, weights, seed):
    fractions = [weight / sum(weights) for weight in weights]
    counts = Counter(assign_splits(listed, seed=seed, fractions=fractions).values())
    wanted = [fraction * len(listed) for fraction in fractions]
    if len(listed) > len(SPLITS):  # a split with a share gets a patient, at the expense of the largest
        wanted = [max(1, count) if count else 0 for count in wanted]
        wanted[wanted.index(max(wanted))] -= sum(wanted) - len(listed)
    for split, count in zip(SPLITS, wanted, strict=True):
        assert abs(counts[split] - count) < 1 + 1e-6
        assert counts[split] == 0 or count > 0


@given(labelled, labelled, st.integers(), st.integers())
def test_old_assignments_are_kept_when_patients_are_added(strata, added, seed, other_seed):
    old = assign_splits(strata, seed=seed, strata=strata)
    both = added | strata
    new = assign_splits(both, seed=other_seed, strata=both, previous=old)
    assert new.keys() == both.keys()
    assert {patient: new[patient] for patient in old} == old


@given(st.lists(names, min_size=40, max_size=80, unique=True), st.integers(0, 5))
def test_added_patients_bring_the_split_back_to_its_fractions(listed, seed):
    old = dict.fromkeys(listed[:5], "test")
    counts = Counter(assign_splits(listed, seed=seed, previous=old).values())
    for split, fraction in zip(SPLITS, FRACTIONS, strict=True):
        assert abs(counts[split] - fraction * len(listed)) < 1 + 1e-6


@given(labelled, st.integers(), st.randoms())
def test_split_depends_on_seed_and_patients_not_on_order(strata, seed, random):
    shuffled = list(strata) * 2
    random.shuffle(shuffled)
    assert assign_splits(shuffled, seed=seed, strata=strata) == assign_splits(strata, seed=seed, strata=strata)


def test_another_seed_gives_another_split():
    listed = [f"P{number}" for number in range(100)]
    assert assign_splits(listed, seed=0) != assign_splits(listed, seed=1)


def test_rare_classes_do_not_all_end_in_training():
    strata = {f"P{number}": f"finding {number}" for number in range(60)}
    counts = Counter(assign_splits(strata, seed=0, strata=strata).values())
    assert counts == {"training": 42, "validation": 6, "test": 12}


@pytest.mark.parametrize("fractions", [(0.7, 0.3), (0.7, 0.2, 0.2), (1.2, -0.1, -0.1), (math.nan, 0.5, 0.5)])
def test_wrong_fractions_are_refused(fractions):
    with pytest.raises(FedImagingError, match="three shares of training, validation, test that sum to 1"):
        assign_splits(["P1"], seed=0, fractions=fractions)


def test_unknown_previous_split_is_refused():
    with pytest.raises(FedImagingError, match="'train' is no split"):
        assign_splits(["P1"], seed=0, previous={"P1": "train"})
