"""What comes after its round was closed is recorded and not averaged."""

import json

import pytest
from nvflare.apis.client import Client
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from fedimaging.federation.workflow import FederatedAveraging


@pytest.fixture
def workflow(tmp_path):
    workflow = FederatedAveraging(num_rounds=3, min_clients=1)
    workflow.fl_ctx, workflow._run_dir = FLContext(), tmp_path
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
