"""The segmentation task: loading, patches, metrics against SciPy, and what its evaluation says and withholds."""

import gzip
import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import set_track_meta
from scipy.ndimage import binary_erosion, distance_transform_edt

from fedimaging.datasets.manifest import Case, Manifest
from fedimaging.errors import FedImagingError, Reason
from fedimaging.tasks import make_task
from fedimaging.tasks.segmentation import keep_largest_components

CLASSES = ["core", "rim"]
OFF = dict.fromkeys(["rotate_degrees", "shift", "scale", "noise", "brightness", "contrast"], 0.0)


def task(**settings):
    return make_task(
        {
            "name": "segmentation",
            "classes": CLASSES,
            "spacing": [1.0, 1.0, 1.0],
            "patch_size": [16, 16, 16],
            **settings,
        }
    )


def ball(shape, spacing=(1.0, 1.0, 1.0), radius=6.0, offset=(0.0, 0.0, 0.0)):
    """A mask of a core within a rim, in voxels of any size, about the middle of the volume plus an offset in mm."""
    places = [(np.arange(n) - (n - 1) / 2) * s - o for n, s, o in zip(shape, spacing, offset, strict=True)]
    distance = np.sqrt(sum(axis**2 for axis in np.meshgrid(*places, indexing="ij")))
    return (distance < radius).astype(np.uint8) * 2 - (distance < radius / 2)


def write_case(folder, name="0", *, shape=(20, 24, 18), spacing=(1.0, 1.0, 1.0), scale=1.0, mask=None):
    mask = ball(shape, spacing) if mask is None else mask
    image = np.random.default_rng(0).normal(100, 5, shape) + 60.0 * mask
    affine = np.diag([*spacing, 1.0])
    nib.save(nib.Nifti1Image((image * scale).astype(np.float32), affine), folder / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image(mask, affine), folder / f"{name}_mask.nii.gz")
    return Case(image=f"{name}.nii.gz", label=f"{name}_mask.nii.gz", patient=f"p{name}")


def cases(count, **covariates):
    return [
        Case(image=f"{i}.nii.gz", label=f"{i}_mask.nii.gz", patient=f"p{i}", **{k: v[i] for k, v in covariates.items()})
        for i in range(count)
    ]


def perfect(item, classes=3):
    """A network that sees a whole volume at once and gives what the item's label says, as logits."""
    one_hot = torch.nn.functional.one_hot(item["label"][0].long(), classes).movedim(-1, 0).float()

    def network(image):
        before = [(side - own) // 2 for side, own in zip(image.shape[2:], one_hot.shape[1:], strict=True)]
        logits = torch.zeros(1, classes, *image.shape[2:])
        x, y, z = (slice(start, start + own) for start, own in zip(before, one_hot.shape[1:], strict=True))
        logits[0, :, x, y, z] = 20.0 * one_hot
        return logits

    return network


def outcomes_of(volumes_task, item, network):
    return volumes_task.outcomes(network, volumes_task.collate([item]))[0]


@pytest.mark.parametrize("track", [True, False])
def test_volumes_of_any_scale_and_spacing_become_alike(tmp_path, track):
    set_track_meta(track)
    try:
        fine = task().load(tmp_path, write_case(tmp_path))
        loud = task().load(tmp_path, write_case(tmp_path, "1", scale=1e4))
        coarse = task().load(tmp_path, write_case(tmp_path, "2", shape=(10, 12, 9), spacing=(2.0, 2.0, 2.0)))
    finally:
        set_track_meta(False)
    assert torch.allclose(fine["image"], loud["image"], atol=1e-3)
    assert fine["image"].dtype == torch.float32
    assert fine["image"].mean() == pytest.approx(0, abs=1e-4)
    assert fine["image"].std(correction=0) == pytest.approx(1, abs=1e-3)
    assert fine["label"].dtype == torch.uint8
    assert "truth" not in fine, "the mask is kept once where the file has the job's spacing"
    assert coarse["image"].shape == coarse["label"].shape == (1, 19, 23, 17)
    assert coarse["truth"].shape == (1, 10, 12, 9)
    assert coarse["spacing"].tolist() == [2.0, 2.0, 2.0]
    assert (coarse["label"] > 0).sum() == pytest.approx(8 * int((coarse["truth"] > 0).sum()), rel=0.25)


def test_resampling_keeps_places(tmp_path):
    """A voxel of the file lies, at another spacing, where its coordinates in mm say."""
    ramp = np.add.outer(np.add.outer(np.arange(12) * 2.0, np.arange(11) * 1.5), np.arange(9) * 3.0)
    affine = np.diag([2.0, 1.5, 3.0, 1.0])
    nib.save(nib.Nifti1Image(ramp.astype(np.float32), affine), tmp_path / "0.nii.gz")
    nib.save(nib.Nifti1Image(ball((12, 11, 9)), affine), tmp_path / "0_mask.nii.gz")
    image = task(intensity={"window": [0.0, 100.0]}).load(tmp_path, cases(1)[0])["image"][0]
    assert image.shape == (23, 16, 25)
    millimetres = (image[5, 7, 11] + 1) * 50
    assert float(millimetres) == pytest.approx(5 + 7 + 11, abs=1e-3)


def test_hounsfield_units_keep_their_meaning(tmp_path):
    values = np.array([-1000, -200, 50, 300, 2000], np.float32).repeat(200).reshape(10, 10, 10)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "0.nii.gz")
    nib.save(nib.Nifti1Image(ball((10, 10, 10), radius=4), np.eye(4)), tmp_path / "0_mask.nii.gz")
    image = task(intensity={"window": [-200.0, 300.0]}).load(tmp_path, cases(1)[0])["image"]
    assert image.unique().tolist() == pytest.approx([-1, 0, 1])


def test_a_removed_background_stays_out_of_the_statistics(tmp_path):
    case = write_case(tmp_path)
    stripped = nib.load(tmp_path / case.image).get_fdata()
    stripped[:10] = 0
    nib.save(nib.Nifti1Image(stripped.astype(np.float32), np.eye(4)), tmp_path / case.image)
    image = task(intensity={"nonzero": True}).load(tmp_path, case)["image"]
    assert (image[:, :10] == 0).all()
    assert image[:, 10:].mean() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("shape", [(40, 48, 44), (12, 10, 30)], ids=["larger", "smaller"])
def test_patches_have_one_size_are_seeded_and_leave_the_item_as_it_was(tmp_path, shape):
    item = task().load(tmp_path, write_case(tmp_path, shape=shape, mask=ball(shape, radius=4)))
    before = {key: value.clone() for key, value in item.items()}
    first, second, other = (task().augmentation(seed)(item) for seed in (1, 1, 2))
    assert set(first) == {"image", "label"}
    assert first["image"].shape == first["label"].shape == (1, 16, 16, 16)
    assert first["image"].dtype == torch.float32 and first["label"].dtype == torch.uint8
    assert torch.equal(first["image"], second["image"]) and torch.equal(first["label"], second["label"])
    assert not torch.equal(first["image"], other["image"])
    assert all(torch.equal(before[key], item[key]) for key in before)


def test_image_and_mask_are_moved_together(tmp_path):
    item = task().load(tmp_path, write_case(tmp_path, shape=(30, 30, 30)))
    item["image"] = item["label"].float() * 10
    geometry = {**OFF, "rotate_degrees": 20.0, "scale": 0.2, "shift": 0.1, "flip": ["left_right", "inferior_superior"]}
    augment = task(augmentation=geometry).augmentation(0)
    for _ in range(5):
        patch = augment(item)
        assert (patch["image"] / 10 - patch["label"]).abs().lt(0.5).float().mean() > 0.9


def test_without_augmentation_a_patch_is_a_piece_of_the_volume(tmp_path):
    item = task().load(tmp_path, write_case(tmp_path, shape=(16, 16, 16), mask=ball((16, 16, 16), radius=5)))
    patch = task(augmentation=OFF).augmentation(0)(item)
    assert torch.allclose(patch["image"], item["image"], atol=1e-4)
    assert torch.equal(patch["label"], item["label"])


def test_patches_are_balanced_over_the_classes(tmp_path):
    mask = np.zeros((64, 64, 64), np.uint8)
    mask[4:6, 4:6, 4:6], mask[56:60, 56:60, 56:60] = 1, 2
    small = task(patch_size=[8, 8, 8], augmentation=OFF)
    item = small.load(tmp_path, write_case(tmp_path, shape=mask.shape, mask=mask))
    augment = small.augmentation(0)
    patches = [augment(item)["label"] for _ in range(90)]
    for value in (1, 2):
        share = np.mean([bool((patch == value).any()) for patch in patches])
        assert 0.2 < share < 0.5, "8 of 262,144 voxels are in a third of the patches"


def test_voxels_of_unequal_sides_are_rotated_in_plane_only():
    assert task()._angles() == pytest.approx([math.radians(10)] * 3)
    thick = task(spacing=[1.0, 1.0, 5.0])._angles()
    assert thick == pytest.approx([0.0, 0.0, math.radians(10)])
    reach = task(spacing=[1.0, 1.0, 5.0], augmentation={**OFF, "rotate_degrees": 90.0})._reach(
        [0.0, 0.0, math.pi / 2], [0] * 3
    )
    assert reach[2] == 16 and min(reach[:2]) >= 16 * math.sqrt(2)


def hd95_by_hand(first, second, spacing):
    edges = [mask & ~binary_erosion(mask) for mask in (first, second)]
    far = [distance_transform_edt(~edge, sampling=spacing) for edge in edges]
    return max(np.percentile(far[1][edges[0]], 95), np.percentile(far[0][edges[1]], 95))


def test_dice_and_hd95_agree_with_their_definitions(tmp_path):
    shape, spacing = (20, 20, 12), (1.0, 1.0, 2.0)
    segmentation = task(spacing=list(spacing), patch_size=[32, 32, 32])
    item = segmentation.load(tmp_path, write_case(tmp_path, shape=shape, spacing=spacing))
    moved = {"label": torch.from_numpy(ball(shape, spacing, offset=(1.0, 0.0, 2.0)))[None]}
    dice, hd95, predicted, true, loss = outcomes_of(segmentation, item, perfect(moved)).split([2, 2, 2, 2, 1])
    for i, value in enumerate((1, 2)):
        t, p = (labels["label"][0].numpy() == value for labels in (item, moved))
        assert dice[i] == pytest.approx(2 * (t & p).sum() / (t.sum() + p.sum()), abs=1e-6)
        assert hd95[i] == pytest.approx(hd95_by_hand(p, t, spacing), abs=1e-4)
        assert true[i] == pytest.approx(t.sum() * 2 / 1000)
        assert predicted[i] == pytest.approx(p.sum() * 2 / 1000)
    assert loss > 0


def test_predictions_are_judged_in_the_voxels_of_the_file(tmp_path):
    item = task().load(tmp_path, write_case(tmp_path, shape=(31, 31, 31), spacing=(0.5, 0.5, 0.5)))
    assert item["image"].shape == (1, 16, 16, 16)
    result = outcomes_of(task(), item, perfect(item))
    assert (result[:2] > 0.8).all(), "only what resampling loses"
    assert (result[2:4] <= 1.0).all()
    assert result[6:8].sum() == pytest.approx(float((item["truth"] > 0).sum()) * 0.125 / 1000)


@pytest.mark.parametrize("shape", [(40, 24, 20), (9, 16, 11)], ids=["many windows", "smaller than the patch"])
def test_a_whole_volume_is_predicted_window_by_window(tmp_path, shape):
    item = task().load(tmp_path, write_case(tmp_path, shape=shape, mask=ball(shape, radius=4)))
    seen = []

    def threshold(windows):
        seen.append(windows.shape)
        return torch.cat([-windows, windows, windows - 1e3], dim=1)

    logits = task().logits(threshold, item["image"][None])
    assert logits.shape == (1, 3, *shape)
    assert all(tuple(window[2:]) == (16, 16, 16) for window in seen)
    assert torch.equal(logits.argmax(1), (item["image"] > 0).long())


def test_a_missed_structure_has_the_diagonal_and_an_absent_one_no_figure(tmp_path):
    mask = (ball((20, 24, 18)) > 0).astype(np.uint8)
    whole = task(patch_size=[32, 32, 32])
    item = whole.load(tmp_path, write_case(tmp_path, mask=mask))
    nothing = {"label": torch.zeros_like(item["label"])}
    result = outcomes_of(whole, item, perfect(nothing))
    assert result[0] == 0.0
    assert result[2] == pytest.approx(math.hypot(20, 24, 18))
    assert torch.isnan(result[[1, 3]]).all()


def test_the_largest_component_is_kept_on_demand():
    mask = torch.zeros(1, 12, 12, 12, dtype=torch.uint8)
    mask[0, 1:4, 1:4, 1:4], mask[0, 4, 4, 4], mask[0, 9:11, 9:11, 9:11], mask[0, 6, 0, 0] = 1, 1, 1, 2
    kept = keep_largest_components(mask, 3)
    assert (kept == 1).sum() == 28, "a voxel that touches by its corner belongs to it"
    assert (kept == 2).sum() == 1
    logits = 20.0 * torch.nn.functional.one_hot(mask.long(), 3).movedim(-1, 1).float()
    assert torch.equal(task(largest_component=True).segment(logits, (12, 12, 12), (1.0, 1.0, 1.0)), kept)
    assert torch.equal(task().segment(logits, (12, 12, 12), (1.0, 1.0, 1.0)), mask)


def test_a_batch_of_patches_without_a_structure_is_no_miss():
    loss = task().loss([])
    label = torch.zeros(2, 1, 8, 8, 8)
    label[0, :, 2:6, 2:6, 2:6] = 1
    label[0, :, 6:, 6:, 6:] = 2
    logits = 20.0 * torch.nn.functional.one_hot(label[:, 0].long(), 3).movedim(-1, 1).float()
    assert loss(logits, label) < 1e-3


def table(dice, hd95=None, predicted=None):
    """Outcomes of cases with these Dice values (cases, structures)."""
    dice = torch.tensor(dice, dtype=torch.float32)
    hd95 = torch.where(dice.isnan(), dice, 5 * (1 - dice)) if hd95 is None else hd95
    predicted = torch.ones_like(dice) if predicted is None else predicted
    return torch.cat([dice, hd95, predicted, torch.ones_like(dice), torch.full((len(dice), 1), 0.3)], dim=1)


@pytest.fixture
def judged():
    """Forty cases of two structures; the second is absent in eight."""
    generator = np.random.default_rng(0)
    dice = generator.beta(8, 2, (40, 2))
    dice[:8, 1] = np.nan
    return dice, table(dice), cases(40, sex=["F", "M"] * 20)


def test_metrics_are_means_over_cases_then_structures(judged):
    dice, outcomes, labelled = judged
    metrics = task().metrics(outcomes, labelled)
    assert metrics["mean_dice"] == pytest.approx((dice[:, 0].mean() + dice[8:, 1].mean()) / 2, rel=1e-5)
    assert metrics["mean_hd95"] == pytest.approx(5 * (1 - metrics["mean_dice"]), rel=1e-5)
    assert metrics["loss"] == pytest.approx(0.3)
    assert metrics["cases"] == 40


def test_the_evaluation_has_figures_intervals_and_quantiles(judged):
    dice, outcomes, labelled = judged
    figures = task().evaluation(outcomes, labelled, outcomes, labelled, seed=0)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    low, high = figures["mean_dice_ci"]
    assert low < figures["mean_dice"] < high
    rim = figures["per_class"]["rim"]
    present = dice[8:, 1]
    assert rim["cases"] == 32
    assert rim["dice"] == pytest.approx(present.mean(), abs=1e-4)
    assert rim["dice_ci"][0] < rim["dice"] < rim["dice_ci"][1]
    half_width = 1.96 * present.std() / math.sqrt(32)
    assert np.diff(rim["dice_ci"])[0] == pytest.approx(2 * half_width, rel=0.15)
    assert rim["dice_quantiles"] == pytest.approx(np.quantile(present, [0.25, 0.5, 0.75]), abs=0.03)
    assert rim["hd95"] == pytest.approx(5 * (1 - rim["dice"]), abs=1e-3)
    assert rim["false_positives"] == 1.0
    assert "false_positives" not in figures["per_class"]["core"], "it is in every case"
    assert {name: group["cases"] for name, group in figures["subgroups"]["sex"].items()} == {"F": 20, "M": 20}


def test_no_quantile_is_one_case_s_value():
    values = np.array([[0.91234, 0.8], [0.52345, 0.8], [0.71357, 0.7], [0.66421, 0.6], [0.83333, 0.9]])
    figures = task().evaluation(table(values), cases(5), table(values), cases(5), seed=0)
    quantiles = figures["per_class"]["core"]["dice_quantiles"]
    assert quantiles == sorted(quantiles)
    assert not any(math.isclose(q, v, abs_tol=5e-4) for q in quantiles for v in values[:, 0])


def test_too_few_cases_of_a_structure_give_no_figure():
    dice = np.full((12, 2), 0.9)
    dice[:8, 1] = np.nan
    outcomes, labelled = table(dice), cases(12)
    assert task().metrics(outcomes, labelled) == {}
    figures = task().evaluation(outcomes, labelled, outcomes, labelled, seed=0)
    rim = figures["per_class"]["rim"]
    assert figures["mean_dice"] is figures["mean_dice_ci"] is figures["mean_hd95"] is None
    assert rim["dice"] is rim["dice_ci"] is rim["dice_quantiles"] is rim["hd95"] is rim["cases"] is None
    assert figures["per_class"]["core"]["dice"] == pytest.approx(0.9)
    dice[:, 1], dice[:3, 1] = 0.8, np.nan
    rim = task().evaluation(table(dice), labelled, table(dice), labelled, seed=0)["per_class"]["rim"]
    assert rim["dice"] == pytest.approx(0.8)
    assert rim["cases"] is None, "twelve less these would tell that three have no rim"


def test_a_case_s_result_is_plain():
    outcomes = table([[0.9, math.nan]])
    result = task().case_result(cases(1)[0], outcomes[0])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["mean_dice"] == result["dice core"] == pytest.approx(0.9)
    assert result["dice rim"] is result["hd95 rim"] is None
    empty = task().case_result(cases(1)[0], table([[math.nan, math.nan]])[0])
    assert empty["mean_dice"] is None


def spoil(folder, case, how):
    image, mask = folder / case.image, folder / str(case.label)
    if how == "label value":
        nib.save(nib.Nifti1Image(ball((20, 24, 18)) * 3, np.eye(4)), mask)
    elif how == "other patient":
        nib.save(nib.Nifti1Image(ball((20, 24, 18)), np.diag([1.0, 1.0, 1.3, 1.0])), mask)
    elif how == "other shape":
        nib.save(nib.Nifti1Image(ball((20, 24, 20)), np.eye(4)), mask)
    elif how == "empty mask":
        nib.save(nib.Nifti1Image(np.zeros((20, 24, 18), np.uint8), np.eye(4)), mask)
    elif how == "4D":
        nib.save(nib.Nifti1Image(np.zeros((20, 24, 18, 3), np.float32), np.eye(4)), image)
    elif how == "corrupt gzip":
        image.write_bytes(image.read_bytes()[:-200])
    elif how == "no gzip":
        image.write_bytes(gzip.compress(b"not a volume"))
    elif how == "no file":
        mask.unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("label value", "from 0 .*to 2"),
        ("other patient", "same patient"),
        ("other shape", "20 x 24 x 20"),
        ("empty mask", "empty mask"),
        ("4D", "4D"),
        ("corrupt gzip", "damaged"),
        ("no gzip", "0.nii.gz"),
        ("no file", "0_mask.nii.gz"),
    ],
)
def test_a_bad_case_is_one_clear_line(tmp_path, how, words):
    case = write_case(tmp_path)
    spoil(tmp_path, case, how)
    with pytest.raises(FedImagingError, match=words) as caught:
        task().load(tmp_path, case)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_an_empty_mask_can_be_allowed(tmp_path):
    case = write_case(tmp_path)
    spoil(tmp_path, case, "empty mask")
    allowing = task(allow_empty=True, patch_size=[32, 32, 32])
    item = allowing.load(tmp_path, case)
    assert allowing.augmentation(0)(item)["label"].sum() == 0
    assert torch.isnan(outcomes_of(allowing, item, perfect(item))[:4]).all()


def test_a_spacing_that_fills_the_memory_is_refused(tmp_path):
    case = write_case(tmp_path, spacing=(10.0, 10.0, 10.0))
    with pytest.raises(FedImagingError, match="million voxels at the job's spacing"):
        task(spacing=[0.1, 0.1, 0.1]).load(tmp_path, case)


def manifest(**changes):
    splits = {
        split: [
            c.model_copy(
                update={"image": f"{split}/{c.image}", "label": f"{split}/{c.label}", "patient": split + c.patient}
            )
            for c in cases(3)
        ]
        for split in ("training", "validation", "test")
    }
    header = {"name": "x", "modality": "MR", "task": "segmentation", "classes": CLASSES}
    return Manifest(**{**header, **splits, **changes})


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"classes": ["rim", "core"]}, Reason.BAD_MANIFEST, "order of the mask's values"),
        ({"classes": ["core"]}, Reason.BAD_MANIFEST, "the job's core, rim"),
        ({"validation": []}, Reason.TOO_FEW_CASES, "validation split is empty"),
    ],
)
def test_a_manifest_that_cannot_serve_is_refused(changes, reason, words):
    with pytest.raises(FedImagingError, match=words) as caught:
        task().check(manifest(**changes), "manifest.json")
    assert caught.value.reason is reason
    task().check(manifest(), "manifest.json")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"patch_size": [16, 16]}, "task.patch_size"),
        ({"patch_size": [1024, 1024, 1024]}, "patch_size"),
        ({"spacing": [1.0, 1.0, 0.0]}, "task.spacing.2"),
        ({"classes": ["core", "core"]}, "classes"),
        ({"intensity": {"percentiles": [99.5, 0.5]}}, "task.intensity"),
        ({"intensity": {"window": [0.0, float("inf")]}}, "task.intensity.window"),
        ({"augmentation": {"flip": ["sideways"]}}, "task.augmentation.flip"),
        ({"overlap": 1.0}, "task.overlap"),
        ({"model": "/tmp/x"}, "task.model"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, named):
    with pytest.raises(FedImagingError, match=named):
        task(**settings)
