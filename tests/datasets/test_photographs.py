"""Synthetic colour photographs: ten classes, told apart by what they show, shared out as the concentration says."""

import numpy as np
import pytest

from fedimaging.cli import main
from fedimaging.datasets.images import read_image
from fedimaging.datasets.manifest import SPLITS, Manifest
from fedimaging.datasets.synthetic import synthesize
from fedimaging.datasets.synthetic.photographs import FIGURES, class_shares
from fedimaging.errors import FedImagingError


def make(root, **named):
    return [Manifest.read(path) for path in synthesize(root, task="photographs", **named)]


def counts(manifest):
    return [sum(manifest.class_counts(split)[name] for split in SPLITS) for name in FIGURES]


def test_photographs_are_in_colour_and_the_same_for_the_same_seed(tmp_path):
    made = {"a": 1, "b": 1, "c": 2}
    first, second, other = (make(tmp_path / n, hospitals=2, cases=24, longer=48, seed=seed) for n, seed in made.items())
    assert first[0].digest() == second[0].digest() != other[0].digest()
    for name, same in (("b", True), ("c", False)):
        path = "hospital-a/photographs/images/SYN-A-00001/1.jpg"
        assert ((tmp_path / "a" / path).read_bytes() == (tmp_path / name / path).read_bytes()) is same
    folder = tmp_path / "a" / "hospital-a" / "photographs"
    image = read_image(folder / first[0].training[0].image, channels=3)
    assert image.shape == (3, 48, 48)
    assert np.abs(image[0] - image[2]).mean() > 0.02
    patients = [{case.patient for case in first[0].split(split)} for split in SPLITS]
    assert not set.intersection(patients[0], patients[1] | patients[2])


def test_classes_are_shared_equally_or_by_a_dirichlet_distribution(tmp_path):
    (equal,) = make(tmp_path / "equal", hospitals=1, cases=200, longer=32)
    assert min(counts(equal)) >= 8
    skewed = make(tmp_path / "skewed", hospitals=4, cases=60, longer=32, concentration=0.1)
    assert all(sum(count > 0 for count in counts(manifest)) >= 2 for manifest in skewed)
    assert all(max(counts(manifest)) > 60 / 4 for manifest in skewed)
    assert len({np.argmax(counts(manifest)) for manifest in skewed}) > 1


@pytest.mark.parametrize(("concentration", "largest"), [(0.1, 0.7), (1.0, 0.3), (1000.0, 0.11)])
def test_the_concentration_says_how_skewed_the_classes_are(concentration, largest):
    rng = np.random.default_rng(0)
    shares = np.array([class_shares(10, concentration, rng) for _ in range(400)])
    assert np.allclose(shares.sum(1), 1)
    assert (np.sort(shares, axis=1)[:, -2] >= 0.099).all() or concentration == 1000.0
    assert shares.max(1).mean() == pytest.approx(largest, abs=0.06)
    assert shares.mean(0) == pytest.approx(np.full(10, 0.1), abs=0.06)


@pytest.mark.parametrize("arguments", [["--concentration", "0.1"], ["--task", "photographs", "--concentration", "0"]])
def test_a_wrong_concentration_is_refused_in_one_line(tmp_path, arguments, capsys):
    assert main(["data", "synth", "--out", str(tmp_path / "new"), *arguments]) == 2
    assert "concentration" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_findings_are_refused(tmp_path):
    with pytest.raises(FedImagingError, match="multi-label"):
        make(tmp_path, multi_label=True)


def test_a_source_is_split_into_skewed_sites(tmp_path, capsys):
    make(tmp_path / "made", hospitals=1, cases=200, longer=32)
    source = tmp_path / "made" / "hospital-a" / "photographs"
    folders = tmp_path / "folders"
    for case in (case for split in SPLITS for case in Manifest.read(source / "manifest.json").split(split)):
        target = folders / case.label / case.image.replace("/", "_")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((source / case.image).read_bytes())
    regex = r"(SYN-A-\d+)"
    sites = "a=30,b=30,c=30"
    largest = {}
    for name, extra in (("alike", []), ("skewed", ["--concentration", "0.1"])):
        command = ["data", "index", str(folders), "--split-sites", sites, "--patient-regex", regex, "--name", "rgb"]
        assert main([*command, "--out", str(tmp_path / name), *extra]) == 0
        manifests = [Manifest.read(tmp_path / name / site / "rgb" / "manifest.json") for site in "abc"]
        largest[name] = np.mean([max(counts(manifest)) / sum(counts(manifest)) for manifest in manifests])
        assert all(abs(sum(counts(manifest)) - 30) <= 3 for manifest in manifests)
        patients = [{c.patient for split in SPLITS for c in m.split(split)} for m in manifests]
        assert not any(patients[i] & patients[j] for i, j in ((0, 1), (0, 2), (1, 2)))
        assert all(len({case.label for case in manifest.training}) >= 2 for manifest in manifests)
    assert largest["skewed"] > largest["alike"] + 0.1
    assert manifests[0].made["concentration"] == 0.1
    assert main(["data", "index", str(folders), "--out", str(tmp_path / "x"), "--concentration", "0.1"]) == 2
