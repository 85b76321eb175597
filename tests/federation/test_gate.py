"""The gate: what a result may hold, what becomes of one that holds anything else, and where the gate must stand."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from nvflare.apis.analytix import AnalyticsDataType
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.filter import ContentBlockedException, Filter
from nvflare.apis.fl_constant import FilterKey, FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.private.privacy_manager import Scope

from fedimaging import __version__
from fedimaging.federation import executor as executor_file
from fedimaging.federation.custody import Custody, JobFacts
from fedimaging.federation.executor import gate_is_last
from fedimaging.federation.gate import Gate
from fedimaging.federation.protocol import REASON_HEADER, REPORT
from fedimaging.governance.grants import GRANTS_FILE, Grant, Kind, write_grants
from fedimaging.governance.ledger import Ledger, read_records, verify
from fedimaging.tasks.classification import ClassificationEvaluation, ClassificationMetrics
from fedimaging.tasks.declared import Evaluation, fault
from fedimaging.tasks.segmentation import SegmentationEvaluation
from fedimaging.training import declared as declared_file
from fedimaging.training.declared import DeclaredResult
from fedimaging.version import package_hash

DECLARED = DeclaredResult(
    update={"conv.weight": (2, 3), "norm.running_var": (4,)},
    weights={"conv.weight": (2, 3), "norm.running_var": (4,)},
    metrics=ClassificationMetrics,
    evaluation=ClassificationEvaluation,
    classes=("normal", "pneumonia"),
    epochs=2,
)
FIGURES = {
    "cases": 40, "seconds": 1.5, "loss": 0.5, "epoch_losses": [0.6, 0.5], "skipped": None, "peak_memory": 2**33,
    "fedimaging": {"version": __version__, "sha256": package_hash()},
}  # fmt: skip
OWN_GROUPS = {"sex": ["F", "M"], "vendor": ["Vendor A"]}
METRICS = {"auroc": 0.7, "loss": 0.4, "cases": 20}
STEPS = np.linspace(0, 1, 21).round(4).tolist()
COUNTS = {"cases": 40, "classes": {"normal": 20, "pneumonia": 20}}
CLASS = {
    "auroc": 0.8, "auroc_ci": [0.7, 0.9], "threshold": 0.5, "roc": {"fpr": STEPS, "tpr": STEPS},
    "sensitivity": 0.8, "sensitivity_ci": None, "specificity": None, "specificity_ci": None,
}  # fmt: skip
CALIBRATION = {"ece": 0.1, "brier": 0.2, "bins": [{"confidence": 0.5, "accuracy": None}] * 10}
EVALUATION = {
    "split": "test", "task": "classification", "cases": 40, "patients": None, "min_cell": 5,
    "classes": {"normal": 20, "pneumonia": 20}, "training": COUNTS, "validation": COUNTS, "skipped": 0, "seconds": 0.1,
    "judged": "global", "auroc": 0.8, "auroc_ci": [0.7, 0.9], "accuracy": 0.7, "accuracy_ci": None,
    "balanced_accuracy": None,
    "per_class": {"pneumonia": CLASS}, "subgroups": {"sex": {"F": {"cases": 20, "auroc": None, "auroc_ci": None}}},
    "calibration": CALIBRATION,
}  # fmt: skip


def update(tensors=None, figures=None, metrics=None, **meta):
    data = {"conv.weight": np.ones((2, 3), np.float32), "norm.running_var": np.ones(4, np.float32)}
    data |= tensors or {}
    meta = {
        MetaKey.INITIAL_METRICS: {**METRICS, **(metrics or {})},
        MetaKey.NUM_STEPS_CURRENT_ROUND: 40,
        REPORT: {**FIGURES, **(figures or {})},
        **meta,
    }
    return DXO(
        DataKind.WEIGHTS, {name: value for name, value in data.items() if value is not None}, meta
    ).to_shareable()


def evaluation(**changes):
    return DXO(DataKind.METRICS, {**EVALUATION, **changes}).to_shareable()


def curve(fpr, tpr):
    return evaluation(per_class={"normal": {**CLASS, "roc": {"fpr": fpr, "tpr": tpr}}})


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site with one grant, and the hands to take tasks and pass results."""
    (tmp_path / "local").mkdir()
    grants = tmp_path / "local" / GRANTS_FILE
    with Ledger(tmp_path).locked() as ledger:
        values = {"kinds": ["train", "evaluate"], "rounds": 2, "ledger": ledger.id}
    write_grants(grants, [Grant(id="g", dataset="d", job="j", submitter="*", **values)])
    job = JobFacts("job-1", "j", "5d" * 32, "d", "lead@example.org", "lead", signed=False)
    custody = Custody(
        site="hospital-a", folder=tmp_path, local=tmp_path / "local", job=job, declare=lambda: DECLARED,
        groups=lambda: OWN_GROUPS,
    )  # fmt: skip
    monkeypatch.setattr(Custody, "current", custody)

    def passed(result, task="train", minimum=5):
        hand = custody.open(task, 0)
        hand.ask()
        return Gate(minimum).process(result, FLContext())

    return SimpleNamespace(passed=passed, custody=custody, folder=tmp_path, grants=grants)


def last(site):
    assert verify(site.folder).faults == []
    return read_records(site.folder)[-1]


def test_what_is_declared_passes_unchanged_and_is_in_the_ledger(site):
    reply = site.passed(update())
    dxo = from_shareable(reply)
    assert dxo.data.keys() == DECLARED.update.keys()
    assert all(np.array_equal(value, np.ones_like(value)) for value in dxo.data.values())
    assert dxo.meta[REPORT] == FIGURES
    assert dxo.meta[MetaKey.INITIAL_METRICS] == METRICS
    line = last(site)
    assert (line["gate"], line["consent"], line["grant"], line["cases"]) == ("passed", "granted", "g", 40)
    assert (line["kind"], line["round"], line["job"], line["site"]) == (Kind.TRAIN, 0, "j", "hospital-a")


def test_the_hash_is_that_of_the_canonical_form(site):
    site.passed(update())
    figures = {REPORT: FIGURES, MetaKey.INITIAL_METRICS: METRICS, MetaKey.NUM_STEPS_CURRENT_ROUND: 40}
    index = [["conv.weight", "<f4", [2, 3]], ["norm.running_var", "<f4", [4]]]
    compact = {"separators": (",", ":")}
    head = json.dumps(["WEIGHTS", index], **compact) + json.dumps(figures, sort_keys=True, **compact) + "\n"
    canonical = head.encode() + np.ones(10, np.float32).tobytes()
    line = last(site)
    assert line["sha256"] == hashlib.sha256(canonical).hexdigest()
    assert line["bytes_out"] == len(canonical)


def test_metrics_evaluations_and_a_whole_model_pass(site):
    assert from_shareable(site.passed(evaluation(), "validate")).data == EVALUATION
    assert from_shareable(site.passed(DXO(DataKind.METRICS, METRICS).to_shareable(), "validate")).data == METRICS
    nothing = DXO(DataKind.METRICS, {"cases": 0}).to_shareable()
    assert from_shareable(site.passed(nothing, "validate")).data == {"cases": 0}
    model = DXO(DataKind.WEIGHTS, {n: np.zeros(s, np.float32) for n, s in DECLARED.weights.items()}).to_shareable()
    assert set(from_shareable(site.passed(model, "submit_model")).data) == set(DECLARED.weights)
    assert [record["counts"] for record in read_records(site.folder)] == [False] * 4


def test_nothing_travels_beside_what_was_checked(site):
    result = update()
    result.set_header("pixels", [1, 2, 3])
    result.set_header("current_round", 10**1000)
    reply = site.passed(result)
    assert "pixels" not in json.dumps(reply["__headers__"])
    assert reply.get_header("current_round") == 0


IMAGE = np.linspace(0, 1, 64 * 64).reshape(64, 64)
SECRET = "P0012-Doe"
HOSTILE = {
    "extra tensor": (update({SECRET: np.ones(2, np.float32)}), "1 tensors that are not declared"),
    "renamed tensor": (update({"conv.weight": None, SECRET: np.ones((2, 3), np.float32)}), "lacks the tensor"),
    "missing tensor": (update({"conv.weight": None}), "lacks the tensor conv.weight"),
    "other dtype": (update({"conv.weight": np.ones((2, 3), np.float64)}), "another dtype"),
    "other byte order": (update({"conv.weight": np.ones((2, 3), ">f4")}), "another dtype"),
    "integers": (update({"conv.weight": np.ones((2, 3), np.int32)}), "another dtype"),
    "texts": (update({"conv.weight": np.array([[SECRET] * 3] * 2)}), "another dtype"),
    "objects": (update({"conv.weight": np.array([[SECRET] * 3] * 2, object)}), "another dtype"),
    "a list": (update({"conv.weight": [[1.0] * 3] * 2}), "lacks the tensor"),
    "an image": (update({"conv.weight": IMAGE.astype(np.float32)}), "another shape"),
    "same size, other shape": (update({"conv.weight": np.ones((3, 2), np.float32)}), "another shape"),
    "NaN": (update({"norm.running_var": np.array([1, np.nan, 1, 1], np.float32)}), "is not finite"),
    "infinity": (update({"norm.running_var": np.array([1, np.inf, 1, 1], np.float32)}), "is not finite"),
    "text in a metric": (update(metrics={"auroc": SECRET}), "metrics: auroc: float type"),
    "metric that is not declared": (update(metrics={SECRET: 0.5}), "does not declare"),
    "metric out of range": (update(metrics={"auroc": 1234.5}), "metrics: auroc"),
    "metric that is NaN": (update(metrics={"loss": float("nan")}), "metrics: loss: finite number"),
    "truth for a number": (update(metrics={"auroc": True}), "metrics: auroc"),
    "pixels for a metric": (update(metrics={"auroc": IMAGE.ravel().tolist()}), "metrics: auroc"),
    "pixels in a list": (update(figures={"epoch_losses": IMAGE.ravel().tolist()}), "more values than epochs"),
    "array in a list": (update(figures={"epoch_losses": IMAGE}), "report: epoch_losses"),
    "few cases": (update(figures={"cases": 3}), "a count below the minimum"),
    "few skipped": (update(figures={"skipped": 1}), "a count below the minimum"),
    "text in the report": (update(figures={"fedimaging": {"version": SECRET, "sha256": package_hash()}}), "version"),
    "text as a hash": (update(figures={"fedimaging": {"version": __version__, "sha256": "d0e" + "0" * 61}}), "sha256"),
    "a message as a count": (update(figures={"cases": 10**1000}), "cases"),
    "a message as skipped": (update(figures={"skipped": 2**31}), "skipped"),
    "a message as memory": (update(figures={"peak_memory": 10**1000}), "peak_memory"),
    "a message as seconds": (update(figures={"seconds": 1e308}), "seconds"),
    "a message as a loss": (update(figures={"loss": -7e200}), "loss"),
    "a message as losses": (update(figures={"epoch_losses": [1.2e300, 0.5]}), "epoch_losses"),
    "another weight": (update(**{MetaKey.NUM_STEPS_CURRENT_ROUND: 10**6}), "not the number of cases"),
    "a hidden weight": (update(**{MetaKey.NUM_STEPS_CURRENT_ROUND: 40.0}), "not the number of cases"),
    "other meta data": (update(pixels=IMAGE), "other meta data"),
    "metrics for weights": (DXO(DataKind.METRICS, METRICS).to_shareable(), "another kind than weights"),
    "a difference": (DXO(DataKind.WEIGHT_DIFF, {"conv.weight": IMAGE}).to_shareable(), "another kind than weights"),
    "analytics": (DXO(DataKind.ANALYTIC, {"key": "x", "value": AnalyticsDataType.TEXT}).to_shareable(), "another kind"),
    "a collection": (DXO(DataKind.COLLECTION, {"w": DXO(DataKind.WEIGHTS, {})}).to_shareable(), "another kind"),
    "no exchange object": (Shareable(), "no data exchange object"),
    "something beside it": (Shareable({"image": IMAGE}), "beside the data exchange object"),
}
BINS = [{"confidence": 0.5, "accuracy": 0.5}]
GROUP = {"cases": 20, "auroc": None, "auroc_ci": None}
GROUPS = {str(i): GROUP for i in range(3000)}
NAMES = {f"PatientName=Doe^John PatientID={SECRET} {i:03}": GROUP for i in range(445)}
HOSTILE_EVALUATIONS = {
    "scores for a curve": (curve(STEPS, IMAGE[0].tolist()), "tpr"),
    "a curve that falls": (curve(STEPS, STEPS[::-1]), "falls"),
    "free steps": (curve(IMAGE[0].tolist(), STEPS), "fixed"),
    "a message as an interval": (evaluation(auroc_ci=[1.2e300, -7e200]), "auroc_ci"),
    "a message as an interval of a class": (evaluation(per_class={"normal": {**CLASS, "sensitivity_ci": [0.5, 7e9]}}),
                                            "sensitivity_ci"),
    "an interval that falls": (evaluation(accuracy_ci=[0.9, 0.7]), "accuracy_ci: values that do not rise"),
    "a message as seconds": (evaluation(seconds=1e308), "seconds"),
    "a message as cases": (evaluation(cases=10**1000), "cases"),
    "a message as the smallest count": (evaluation(min_cell=10**1000), "min_cell"),
    "a message as a Brier score": (evaluation(calibration={**CALIBRATION, "brier": 1e300}), "brier"),
    "a row of an image": (evaluation(auroc_ci=IMAGE[0].tolist()), "auroc_ci: too long"),
    "another class": (evaluation(per_class={SECRET: CLASS}), "none of the job's classes"),
    "a patient as a class": (evaluation(classes={SECRET: 20}), "none of the job's classes"),
    "a case's figure": (evaluation(cases_by_patient={SECRET: 0.5}), "does not declare"),
    "few patients": (evaluation(patients=2), "patients: a count below the minimum"),
    "a small group": (evaluation(subgroups={"sex": {"F": {"cases": 2, "auroc": None, "auroc_ci": None}}}), "minimum"),
    "another covariate": (evaluation(subgroups={"name": {SECRET: {}}}), "subgroups"),
    "texts as groups": (evaluation(subgroups={"vendor": NAMES}), "none of the groups"),
    "numbers as groups": (evaluation(subgroups={"view": GROUPS}), "none of the groups"),
    "a group of another covariate": (evaluation(subgroups={"sex": {"Vendor A": GROUP}}), "none of the groups"),
    "a name beside the site's groups": (evaluation(subgroups={"sex": {"F": GROUP, SECRET: GROUP}}), "none of the gr"),
    "many bins": (evaluation(calibration={**CALIBRATION, "bins": BINS * 64}), "bins"),
    "not the test split": (evaluation(split=SECRET), "split"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "result", "words"),
    [("train", *case) for case in HOSTILE.values()] + [("validate", *case) for case in HOSTILE_EVALUATIONS.values()],
    ids=[*HOSTILE, *HOSTILE_EVALUATIONS],
)
def test_what_is_not_declared_is_stopped_written_down_and_not_quoted(site, task, result, words):
    reply = site.passed(result, task)
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert reply.get_header(REASON_HEADER) == "stopped_at_gate"
    assert set(reply) == {"__headers__"}
    line = last(site)
    assert line["gate"].startswith("stopped: ")
    assert words in line["gate"]
    assert SECRET not in json.dumps(line)
    assert (line["bytes_out"], line["sha256"], line["cases"]) == (0, None, None)


SEGMENTATION = {
    **{name: EVALUATION[name] for name in Evaluation.model_fields}, "task": "segmentation", "mean_dice": 0.8,
    "mean_dice_ci": [0.7, 0.9], "mean_hd95": 3.5, "mean_hd95_ci": [2.0, 40.5], "subgroups": {},
    "per_class": {"normal": {
        "cases": 20, "dice": 0.8, "dice_ci": [0.7, 0.9], "dice_quantiles": [0.7, 0.8, 0.9], "hd95": 3.5,
        "hd95_ci": [2.0, 40.5], "hd95_quantiles": [1.0, 3.5, 60.0],
    }},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean_dice_ci", [0.9, 0.7]),
        ("mean_dice_ci", [0.1, 1.2e300]),
        ("mean_hd95", 1e300),
        ("mean_hd95_ci", [-7e200, 1.0]),
        ("mean_hd95_ci", [1.0, 1.2e300]),
        ("dice_ci", [0.5, 1.5]),
        ("dice_quantiles", [0.9, 0.8, 0.7]),
        ("hd95_ci", [1.2e300, -7e200]),
        ("hd95_quantiles", [1.0, 2.0, 1e5]),
        ("subgroups", {"vendor": {SECRET: {"cases": 20, "mean_dice": None, "mean_dice_ci": None}}}),
    ],
)
def test_figures_of_a_segmentation_are_shares_and_distances(name, value):
    context = DECLARED.context(5, OWN_GROUPS)
    assert fault(SEGMENTATION, SegmentationEvaluation, context) is None
    changed = json.loads(json.dumps(SEGMENTATION))
    (changed if name in changed else changed["per_class"]["normal"])[name] = value
    assert name in fault(changed, SegmentationEvaluation, context).replace(" ", "_")


def test_figures_of_more_bytes_than_declared_are_stopped(site, monkeypatch):
    monkeypatch.setattr(declared_file, "_FIGURES_BYTES", -3000)
    assert site.passed(evaluation(), "validate").get_header(REASON_HEADER) == "stopped_at_gate"
    assert "figures of more than" in last(site)["gate"]


def test_all_that_a_task_may_tell_is_within_the_bytes_declared(site, monkeypatch):
    """The widest figures that the types allow: no text and no free number is left to fill the rest with."""
    third, widest = 1 / 3, {"cases": 2**31 - 1, "auroc": 1 / 3, "auroc_ci": [1 / 3, 2 / 3]}
    names = {covariate: [f"{i:032}" for i in range(16)] for covariate in ("age_group", "sex", "vendor", "view")}
    monkeypatch.setattr(site.custody, "groups", lambda: names)
    curve = {"fpr": STEPS, "tpr": [third] * 21}
    figures = {**CLASS, "auroc": third, "auroc_ci": [third, third], "threshold": third, "roc": curve}
    whole = evaluation(
        per_class=dict.fromkeys(DECLARED.classes, figures),
        subgroups={covariate: dict.fromkeys(values, widest) for covariate, values in names.items()},
    )
    assert site.passed(whole, "validate").get_return_code() == ReturnCode.OK
    assert last(site)["bytes_out"] < DECLARED.figures_bytes < 25_000


def test_a_site_may_ask_for_larger_counts_but_not_for_smaller_ones(site):
    assert site.passed(update(), minimum=41).get_header(REASON_HEADER) == "stopped_at_gate"
    for minimum in (4, 0, -1, "5", True, None):
        with pytest.raises(ValueError, match="minimum"):
            Gate(minimum)


def test_of_a_refusal_its_code_alone_leaves(site):
    reply = make_reply(ReturnCode.EXECUTION_EXCEPTION, {REASON_HEADER: "no_dataset", "note": SECRET})
    reply["data"] = SECRET
    left = site.passed(reply)
    assert (left.get_return_code(), left.get_header(REASON_HEADER)) == (ReturnCode.EXECUTION_EXCEPTION, "no_dataset")
    assert SECRET not in json.dumps(left)
    assert last(site)["gate"] == "refused: no_dataset"
    odd = site.passed(make_reply(SECRET, {REASON_HEADER: SECRET}))
    assert SECRET not in json.dumps(odd)
    assert odd.get_return_code() == ReturnCode.EXECUTION_EXCEPTION


def test_a_result_of_no_task_in_hand_does_not_pass(site, monkeypatch):
    site.passed(update())
    with pytest.raises(ContentBlockedException):
        Gate().process(update(), FLContext())
    monkeypatch.setattr(Custody, "current", None)
    with pytest.raises(ContentBlockedException):
        Gate().process(update(), FLContext())
    assert len(read_records(site.folder)) == 1


def test_consent_that_is_gone_keeps_a_finished_result_back(site):
    hand = site.custody.open("train", 0)
    hand.ask()
    write_grants(site.grants, [])
    reply = Gate().process(update(), FLContext())
    assert reply.get_header(REASON_HEADER) == "no_consent"
    assert last(site)["gate"] == "kept back: no consent any more"
    assert last(site)["consent"].startswith("refused: no grant")


def test_two_jobs_cannot_use_the_same_last_round(site, monkeypatch):
    other = Custody(
        site="hospital-a", folder=site.folder, local=site.folder / "local", job=site.custody.job,
        declare=lambda: DECLARED, groups=lambda: OWN_GROUPS,
    )  # fmt: skip
    site.passed(update())
    first, second = site.custody.open("train", 1), other.open("train", 1)
    first.ask()
    second.ask()
    assert Gate().process(update(), FLContext()).get_return_code() == ReturnCode.OK
    monkeypatch.setattr(Custody, "current", other)
    assert Gate().process(update(), FLContext()).get_header(REASON_HEADER) == "no_consent"
    assert "used up" in last(site)["consent"]


def test_what_cannot_be_written_down_does_not_leave(site):
    hand = site.custody.open("train", 0)
    hand.ask()
    site.passed(update())
    (site.folder / "ledger.jsonl").write_text("{}\n")
    site.custody.open("train", 1)
    assert Gate().process(update(), FLContext()).get_header(REASON_HEADER) == "internal"


def test_a_check_in_the_middle_sees_the_grant_taken_back_or_over(site):
    hand = site.custody.open("train", 0)
    hand.ask()
    hand.check()
    (grant,) = [Grant(id="g", dataset="d", job="j", submitter="*", kinds=["train"], until="2020-01-01")]
    write_grants(site.grants, [grant])
    with pytest.raises(Exception, match="expired"):
        hand.check()
    write_grants(site.grants, [])
    with pytest.raises(Exception, match="no grant"):
        hand.check()
    site.grants.unlink()
    with pytest.raises(Exception, match="no such file"):
        hand.check()


# -- where the gate stands ---------------------------------------------------------------------------------------------


class Harmless(Filter):
    def process(self, shareable, fl_ctx):
        return shareable


def context(*filters, of_job=()):
    scope = Scope()
    for item in filters:
        scope.add_task_result_filter(item, FilterKey.OUT)
    fl_ctx = FLContext()
    fl_ctx.set_prop(FLContextKey.SCOPE_OBJECT, scope, private=True, sticky=False)
    runner = SimpleNamespace(task_result_filters={"train/out": list(of_job)} if of_job else {})
    fl_ctx.set_prop(FLContextKey.RUNNER, runner, private=True, sticky=False)
    return fl_ctx


def test_the_gate_must_be_the_last_of_all_filters():
    class Subclass(Gate):
        def process(self, shareable, fl_ctx):
            return shareable

    assert gate_is_last("train", context(Gate()))
    assert gate_is_last("train", context(Harmless(), Gate()))
    assert not gate_is_last("train", context())
    assert not gate_is_last("train", context(Gate(), Harmless()))
    assert not gate_is_last("train", context(Subclass()))
    assert not gate_is_last("train", context(Gate(), of_job=[Harmless()]))
    assert gate_is_last("validate", context(Gate(), of_job=[Harmless()]))


def test_without_a_privacy_scope_there_is_no_gate():
    fl_ctx = context()
    fl_ctx.set_prop(FLContextKey.SCOPE_OBJECT, None, private=True, sticky=False)
    assert not gate_is_last("train", fl_ctx)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"components": [{"id": "x", "path": "y"}]}, "more than one TrainerExecutor"),
        ({"executors": [{}, {}]}, "more than one TrainerExecutor"),
        ({"task_result_filters": [{"tasks": ["train"], "filters": []}]}, "filters of its own"),
        ({"task_data_filters": [{"tasks": ["train"], "filters": []}]}, "filters of its own"),
        ({"format_version": "{$SECRET}"}, "environment variables"),
    ],
)
def test_a_job_brings_one_executor_and_nothing_else(changes, words):
    config = {"format_version": 2, "executors": [{}], "components": [], "task_result_filters": []}
    said = executor_file._objection({**config, **changes})
    assert said is None if words is None else words in said
