"""What `poc result` says of a job that ended early; the folders are those of a real job's download."""

import contextlib
import json
from argparse import Namespace
from types import SimpleNamespace

import pytest

from poc import cli
from tests.conftest import SITES

START = {"event": "start", "job": "chest_xray_leave_one_out", "rounds": 2, "key_metric": "auroc"}
ROUND = {
    "event": "round", "round": 0, "seconds": 1.0, "sites": {"hospital-a": {"loss": 0.5, "metrics": {}}}, "refused": {},
    "missing": [], "key_metric": 0.7, "best": True,
}  # fmt: skip
FAILED = {
    "event": "failed", "round": 0, "sites": {}, "refused": {}, "missing": [],
    "reason": "leave_out: no site hospital-c takes part in this job",
}  # fmt: skip


@pytest.mark.parametrize(("events", "continuable"), [([START, FAILED], False), ([START, ROUND], True)])
def test_only_a_job_with_a_finished_round_is_said_to_be_continuable(tmp_path, capsys, events, continuable):
    run = tmp_path / "workspace"
    run.mkdir()
    (run / "rounds.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    poc = SimpleNamespace(
        prepared=True, server="server", sites=SITES, running=lambda: {"server": None},
        status_of=lambda job: "FINISHED:EXECUTION_EXCEPTION", rounds_file=lambda job: tmp_path / "none",
        waiting=lambda job: contextlib.nullcontext(SimpleNamespace(poll=lambda: 0)), download=lambda job: tmp_path,
    )  # fmt: skip
    assert cli._result(Namespace(job_id="0b5e"), poc) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert ("--resume 0b5e" in said) is continuable
    assert ("the job ends: leave_out" in said) is not continuable
