"""What the server makes of results that it should not take as they come."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import TaskCompletionStatus
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, FLMetaKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.wf_comm_server import WFCommServer
from nvflare.apis.shareable import Shareable
from nvflare.apis.utils.event import fire_event_to_components
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
from nvflare.app_opt.pt.model_persistence_format_manager import PTModelPersistenceFormatManager

from fedimaging.errors import FedImagingError, Reason
from fedimaging.federation.earlier import EarlierRun
from fedimaging.federation.persistor import NetworkPersistor
from fedimaging.federation.protocol import COUNTED, REPORT
from fedimaging.federation.record import RunRecord
from fedimaging.federation.selection import ModelSelection
from fedimaging.federation.workflow import FederatedAveraging
from fedimaging.training.strategies import FedAvg, Server


@pytest.fixture
def workflow(tmp_path):
    workflow = FederatedAveraging(num_rounds=3, min_clients=1)
    workflow.fl_ctx, workflow._record, workflow._running = FLContext(), RunRecord(tmp_path), True
    return workflow


@pytest.mark.parametrize(("told", "recorded"), [(1, 1), ("../../etc", None), (True, None)])
def test_a_late_reply_is_recorded_and_not_averaged(workflow, tmp_path, told, recorded):
    reply = Shareable()
    reply.add_cookie("contribution_round", told)
    workflow.process_result_of_unknown_task(Client("hospital-b", "token"), "train", "task", reply, workflow.fl_ctx)
    assert json.loads((tmp_path / "rounds.jsonl").read_text()) == {
        "event": "late", "round": recorded, "site": "hospital-b"
    }  # fmt: skip
    assert workflow._received_count == 0


@pytest.mark.parametrize("weight", [10**12, 41, 0, -40, True, 40.0, None])
def test_a_result_with_an_unfit_weight_is_left_out(workflow, weight):
    workflow._wanted = {"w": (2,)}
    meta = {FLMetaKey.NUM_STEPS_CURRENT_ROUND: weight, REPORT: {"cases": 40}, "client_name": "hospital-b"}
    if weight == 10**12:
        meta[REPORT]["cases"] = weight
    result = FLModel(params={"w": np.ones(2, np.float32)}, meta=meta)
    assert workflow._aggregate_one_result(result) is False
    assert workflow._refused == {"hospital-b": Reason.BAD_MODEL.value}
    assert not workflow._sites


def test_sites_are_told_which_of_their_results_counted_last_where_the_strategy_asks(workflow, monkeypatch):
    told = []
    monkeypatch.setattr(workflow, "broadcast_model", lambda data, **_: told.append(data.meta.get(COUNTED)))
    workflow._members = {"a", "b"}
    model = FLModel(params={"w": np.zeros(2, np.float32)})
    for acknowledges in (True, False):
        workflow._server = Server()
        workflow._server.acknowledges = acknowledges
        for number, contributed in enumerate([["a", "b"], ["b"], ["a"]]):
            workflow.current_round = number
            workflow.send_model(data=model, targets=["a", "b"])
            workflow._sites = {site: {} for site in contributed}
            workflow._received_count = len(contributed)
            workflow.update_model(FLModel(params=model.params), FLModel(params=model.params))
    assert told == [{}, {"a": 0, "b": 0}, {"a": 0, "b": 1}, None, None, None]
    assert COUNTED not in model.meta


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ([1.0, 1.0], Reason.BAD_MODEL),
        (np.array(["a", "b"], object), Reason.BAD_MODEL),
        (np.ones(2, np.int64), Reason.BAD_MODEL),
        (np.ones(3, np.float32), Reason.BAD_MODEL),
        (np.array([1, np.nan], np.float32), Reason.NOT_FINITE),
    ],
)
def test_a_result_with_unfit_weights_is_left_out(workflow, value, code):
    workflow._wanted = {"w": (2,)}
    meta = {FLMetaKey.NUM_STEPS_CURRENT_ROUND: 40, REPORT: {"cases": 40}, "client_name": "hospital-b"}
    assert workflow._aggregate_one_result(FLModel(params={"w": value}, meta=meta)) is False
    assert workflow._refused == {"hospital-b": code.value}


def test_a_mean_does_not_depend_on_who_arrives_first(workflow, monkeypatch):
    generator = np.random.default_rng(0)
    workflow._wanted, workflow._server = {"w": (20_000,)}, Server()
    results = [generator.normal(size=20_000).astype(np.float32) for _ in range(3)]
    means = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        workflow._members, workflow._peaks = {"a", "b", "c"}, {}
        workflow._aggr_helper = WeightedAggregationHelper()
        workflow._received_count = 0
        for i in order:
            meta = {FLMetaKey.NUM_STEPS_CURRENT_ROUND: 7 + i, REPORT: {"cases": 7 + i}, "client_name": "abc"[i]}
            assert workflow._aggregate_one_result(FLModel(params={"w": results[i]}, meta=meta, metrics={}))
        mean = FLModel(params=workflow._aggr_helper.get_result())
        start = FLModel(params={"w": np.zeros(20_000, np.float32)})
        means.append(workflow.update_model(start, mean).params["w"])
    assert means[0].dtype == np.float32
    assert all(np.array_equal(mean, means[0]) for mean in means)


@pytest.fixture
def persistor(tmp_path):
    task = {"name": "classification", "classes": ["normal", "pneumonia"], "image_size": 32}
    persistor = NetworkPersistor(task, {"name": "ResNet18"}, 0)
    persistor.persistence_manager = PTModelPersistenceFormatManager({"w": torch.ones(2)})
    persistor._best_ckpt_save_path = str(tmp_path / "best.pt")
    return persistor


def test_the_file_of_the_best_model_says_which_one_it_is(workflow, persistor, tmp_path, monkeypatch):
    workflow.persistor, workflow._selection = persistor, ModelSelection("auroc")
    monkeypatch.setattr(workflow, "fire_event", persistor.handle_event)
    said = []
    for number, value in enumerate([0.6, 0.8, 0.7]):
        workflow.current_round = number
        workflow._sites = {"hospital-a": {"metrics": {"auroc": value, "cases": 20}}}
        workflow._judge_arrived(workflow.fl_ctx)
        said.append(torch.load(tmp_path / "best.pt", weights_only=True)["selection"])
    assert said == [(0, 0.6), (1, 0.8), (1, 0.8)]


def test_a_continued_job_holds_the_best_model_for_what_its_file_says(workflow, persistor, monkeypatch):
    """The crash came after the best model of round 2 was written and before the line of that round was."""
    task, network, _ = persistor.settings()
    rounds = [{"event": "round", "round": r, "best": r == 1, "key_metric": 0.5 + r / 10} for r in range(2)]
    start = {"task": task.settings, "network": network, "strategy": FedAvg()}
    dumped = {name: json.loads(settings.model_dump_json()) for name, settings in start.items()}
    earlier = EarlierRun("5f0c", rounds, dumped, next_round=2, best=(2, 0.9))
    monkeypatch.setattr("fedimaging.federation.workflow.take_over", lambda *_: earlier)
    workflow.persistor, workflow.engine = persistor, SimpleNamespace(get_workspace=lambda: None)
    workflow._selection, workflow._server = ModelSelection("auroc"), Server()
    workflow._continue_earlier()
    assert (workflow._selection.best_index, workflow._selection.best_value) == (2, 0.9)
    assert (workflow.start_round, workflow.num_rounds) == (2, 1)
    monkeypatch.setattr(workflow, "fire_event", lambda *_: pytest.fail("a worse model took the best one's place"))
    workflow.current_round, workflow._sites = 2, {"hospital-a": {"metrics": {"auroc": 0.8, "cases": 20}}}
    workflow._judge_arrived(workflow.fl_ctx)
    assert workflow._judged == (0.8, False)


def test_a_site_that_is_not_asked_this_round_still_counts_among_all(workflow, monkeypatch):
    class Recorder(Server):
        def update(self, weights, mean, share):
            self.share = share
            return super().update(weights, mean, share)

    workflow._server = Recorder()
    monkeypatch.setattr(workflow, "broadcast_model", lambda **kwargs: None)
    sites = [SimpleNamespace(name=name) for name in "abc"]
    workflow.engine = SimpleNamespace(get_clients=lambda: sites, sync_clients_from_main_process=lambda: None)
    monkeypatch.setattr(workflow, "get_client_disconnect_time", lambda name: 1.0 if name == "c" else None)
    workflow.send_model()
    assert workflow._asked == ["a", "b"], "the third one was never there"
    workflow._received_count = 2
    model, mean = (FLModel(params={"w": np.full(2, value, np.float32)}) for value in (0.0, 1.0))
    assert workflow.update_model(model, mean).params["w"].tolist() == [1, 1]
    assert workflow._server.share == pytest.approx(2 / 3)


@pytest.fixture
def without_c(tmp_path, monkeypatch):
    """A workflow over the sites a, b and c that leaves out c; what it sends is kept instead of sent."""
    workflow = FederatedAveraging(num_rounds=3, min_clients=2, leave_out="c")
    workflow.fl_ctx, workflow._record, workflow._running = FLContext(), RunRecord(tmp_path), True
    sites = [SimpleNamespace(name=name) for name in "abc"]
    workflow.engine = SimpleNamespace(get_clients=lambda: sites, sync_clients_from_main_process=lambda: None)
    workflow.sent = []
    monkeypatch.setattr(workflow, "broadcast_model", lambda **sent: workflow.sent.append(sent))
    monkeypatch.setattr(workflow, "get_client_disconnect_time", lambda name: None)
    monkeypatch.setattr(workflow, "cancel_all_tasks", lambda status: None)
    return workflow


def test_the_site_left_out_is_asked_for_neither_training_nor_validation_and_is_not_missing(without_c):
    for task in ("train", "validate"):
        without_c.send_model(task)
        assert without_c.sent[-1]["targets"] == ["a", "b"]
        assert without_c.sent[-1]["min_responses"] == 2
    assert without_c._members == {"a", "b"}, "of all members, two of two contribute"
    without_c._sites = {"a": {}}
    assert without_c._participants()["missing"] == ["b"]


def test_a_round_is_given_up_when_the_site_left_out_alone_could_save_it(without_c, tmp_path):
    without_c.send_model("train")
    without_c._sites = {"a": {}}
    without_c._give_up_without_quorum(outstanding=["b"])
    with pytest.raises(RuntimeError, match="only 1 of the 2 sites needed contributed"):
        without_c._give_up_without_quorum(outstanding=[])
    assert json.loads((tmp_path / "rounds.jsonl").read_text())["missing"] == ["b"]


@pytest.mark.parametrize(("gone", "asked"), [(None, ["a", "b", "c"]), (1.0, ["a", "b"])])
def test_the_site_left_out_is_asked_for_the_evaluation_if_it_is_there(without_c, monkeypatch, gone, asked):
    without_c._answered = {"a", "b"}
    monkeypatch.setattr(without_c, "get_client_disconnect_time", lambda name: gone)
    assert without_c._to_evaluate_at() == asked


def test_only_those_who_answered_are_asked_for_the_evaluation_where_nobody_is_left_out(workflow):
    workflow._answered = {"b"}
    assert workflow._to_evaluate_at() == ["b"]


def test_a_job_ends_at_once_if_the_site_to_leave_out_is_not_there(without_c, persistor, monkeypatch, tmp_path):
    without_c.leave_out, without_c.persistor = "hospital-z", persistor
    persistor.model = torch.nn.Linear(2, 2)
    start = FLModel(params={"w": np.zeros(2, np.float32)})
    monkeypatch.setattr("nvflare.app_common.workflows.fedavg.FedAvg.load_model", lambda self: start)
    with pytest.raises(RuntimeError, match="no site hospital-z takes part"):
        without_c.load_model()
    begun, failed = map(json.loads, (tmp_path / "rounds.jsonl").read_text().splitlines())
    assert (begun["event"], begun["leave_out"]) == ("start", "hospital-z")
    assert (failed["event"], failed["round"]) == ("failed", 0)
    assert failed["reason"] == "leave_out: no site hospital-z takes part in this job"
    assert failed["missing"] == [], "nobody was asked yet"


def test_a_job_that_leaves_out_a_site_does_not_start_from_a_model(without_c, persistor, monkeypatch, tmp_path):
    without_c.persistor, persistor.model, persistor.start_from = persistor, torch.nn.Linear(2, 2), "spring.pt"
    start = FLModel(params={"w": np.zeros(2, np.float32)})
    monkeypatch.setattr("nvflare.app_common.workflows.fedavg.FedAvg.load_model", lambda self: start)
    with pytest.raises(RuntimeError, match="nobody can tell whether c had a part in it"):
        without_c.load_model()
    begun, failed = map(json.loads, (tmp_path / "rounds.jsonl").read_text().splitlines())
    assert (begun["start_from"], failed["event"]) == ("spring.pt", "failed")
    persistor.start_from = None
    assert without_c.load_model() is start


@pytest.mark.parametrize("left_out", [{}, {"leave_out": "b"}], ids=["nobody", "another"])
def test_a_job_that_left_out_another_is_not_continued(without_c, persistor, monkeypatch, left_out):
    task, network, _ = persistor.settings()
    same = {"task": task.settings, "network": network, "strategy": FedAvg()}
    dumped = {name: json.loads(settings.model_dump_json()) for name, settings in same.items()}
    earlier = EarlierRun("5f0c", [], dumped | left_out, next_round=2)
    monkeypatch.setattr("fedimaging.federation.workflow.take_over", lambda *_: earlier)
    without_c.persistor, without_c.continues, without_c._server = persistor, "5f0c", Server()
    without_c.engine.get_workspace = lambda: None
    with pytest.raises(FedImagingError, match="job 5f0c had another leave_out"):
        without_c._continue_earlier()
    earlier.start["leave_out"] = "c"
    without_c._continue_earlier()
    assert without_c.start_round == 2


class Engine:
    """What FLARE's monitor of dead sites needs of a job's process at the server, whose job has the sites a, b and c."""

    def __init__(self, required):
        self.sites = [Client(name, f"token-{name}") for name in "abc"]
        self.meta = {"job_id": "one", "min_clients": 2, "mandatory_clients": required}
        self.components, self.panics = [], []

    def get_clients(self):
        return self.sites

    def sync_clients_from_main_process(self):
        pass

    @contextlib.contextmanager
    def new_context(self):
        fl_ctx = FLContext()
        fl_ctx.set_prop(ReservedKey.ENGINE, self, private=True)
        fl_ctx.set_prop(FLContextKey.JOB_META, self.meta, private=True)
        yield fl_ctx

    def fire_event(self, event_type, fl_ctx):
        if event_type == EventType.FATAL_SYSTEM_ERROR:
            self.panics.append(fl_ctx.get_prop(FLContextKey.EVENT_DATA))
        fire_event_to_components(event_type, self.components, fl_ctx)


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Makes a workflow in a round of training, with FLARE's own monitor, for which a reported site is gone at once."""

    def make(required=(), leave_out="", **settings):
        workflow = FederatedAveraging(3, 2, required, leave_out=leave_out, **settings)
        workflow.fl_ctx, workflow._record, workflow._running = FLContext(), RunRecord(tmp_path), True
        workflow.engine = Engine(list(required))
        workflow.engine.components.append(workflow)
        workflow.communicator = WFCommServer()
        workflow.communicator.controller, workflow.communicator._engine = workflow, workflow.engine
        workflow.communicator._dead_client_grace, workflow.communicator._task_check_period = 0, 0
        workflow.cancelled = []
        monkeypatch.setattr(workflow, "cancel_all_tasks", workflow.cancelled.append)
        monkeypatch.setattr(workflow, "broadcast_model", lambda **_: None)
        workflow.send_model("train")
        return workflow

    return make


def lose(workflow, *sites):
    """Reports sites as dead and runs one pass of FLARE's monitor. Returns what it panicked of, by anybody."""
    communicator = workflow.communicator
    for site in sites:
        communicator.process_dead_client_report(site, workflow.fl_ctx)
    communicator.check_tasks = lambda: setattr(communicator, "_all_done", True)
    communicator._monitor_tasks()
    return workflow.engine.panics


@pytest.mark.parametrize(
    ("required", "lost", "needs"),
    [((), "bc", "2 sites"), (("a",), "a", "2 sites, a among them"), ((), "abc", "2 sites")],
)
def test_a_job_that_lost_too_many_sites_says_so_before_flare_ends_it(watched, tmp_path, required, lost, needs):
    workflow = watched(required)
    workflow._sites = {"a": {}, "b": {}}
    panics = lose(workflow, *lost)
    assert panics[-1] == "Aborting job due to deployment policy violation", "what FLARE says of it"
    (failed,) = map(json.loads, (tmp_path / "rounds.jsonl").read_text().splitlines())
    assert failed["event"] == "failed"
    gone = ", ".join(lost[:2] if lost == "abc" else lost)
    assert failed["reason"] == panics[0] == f"no sign of {gone}; the job needs {needs}"
    with pytest.raises(RuntimeError):
        workflow._give_up("seen by the workflow's own thread too")
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == 1, "recorded once"


def test_a_site_that_is_gone_is_not_waited_for_and_too_few_others_end_the_job(watched, tmp_path):
    workflow = watched(straggler_wait=3600)
    workflow._answered, workflow._sites = {"a", "b"}, {"a": {}, "b": {}}
    workflow.get_num_standing_tasks()
    assert workflow.cancelled == []
    assert lose(workflow, "c") == []
    workflow.get_num_standing_tasks()
    assert workflow.cancelled == [TaskCompletionStatus.OK]
    workflow.send_model("train")
    assert workflow._asked == ["a", "b"]
    assert not (tmp_path / "rounds.jsonl").exists()


@pytest.mark.parametrize("gone", "bc")
def test_a_job_ends_when_a_site_is_gone_and_the_one_left_out_cannot_take_its_place(watched, tmp_path, gone):
    """FLARE counts the site left out among those that the job needs."""
    workflow = watched(leave_out="c")
    workflow._answered, workflow._sites = {"a"}, {"a": {}}
    why = f"no sign of {gone}; the job needs 3 sites"
    assert lose(workflow, gone)[0] == why
    assert json.loads((tmp_path / "rounds.jsonl").read_text())["reason"] == why


def test_a_job_that_is_over_did_not_fail(watched, tmp_path):
    workflow = watched()
    workflow._running = False
    assert lose(workflow, "b", "c") == ["Aborting job due to deployment policy violation"]
    assert not (tmp_path / "rounds.jsonl").exists()
