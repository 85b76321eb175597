"""What a job that continues takes over from an interrupted one, and from whom it may."""

import json
import shutil
import zipfile

import pytest
import torch
import yaml
from nvflare.apis.workspace import Workspace

from fedimaging.errors import FedImagingError
from fedimaging.federation.earlier import BEST_MODEL, LAST_MODEL, take_over
from fedimaging.federation.protocol import SELECTION

LEAD = {"submitter_name": "lead@example.org", "submitter_org": "consortium"}
JOB = "5f0c1b0e-6a2f-4f0c-9f39-000000000001"


@pytest.fixture
def server(tmp_path):
    """A server's workspace with the folder of a job that was killed in its fourth round, whose model was the best."""
    for name in ("startup", "local"):
        (tmp_path / name).mkdir()
    resources = {"components": [{"id": "job_manager", "args": {"uri_root": str(tmp_path / "store")}}]}
    (tmp_path / "local/resources.json").write_text(json.dumps(resources))
    run = tmp_path / JOB
    (run / "app_server").mkdir(parents=True)
    (run / "meta.json").write_text(json.dumps({**LEAD, "name": "chest_xray_fedavg"}))
    rounds = [{"event": "round", "round": r, "best": r == 1, "key_metric": r / 10} for r in range(4)]
    events = [{"event": "start", "rounds": 9}, *rounds[:3], {"event": "late", "round": 2, "site": "b"}, rounds[3]]
    (run / "rounds.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "rou')
    for name, value in ((LAST_MODEL, 2.0), (BEST_MODEL, 1.0)):
        saved = {"model": {"w": torch.tensor([value])}, "meta_props": {"current_round": 2}, SELECTION: (3, 0.35)}
        torch.save(saved, run / name)
    return tmp_path


def resume(server, meta=LEAD, job=JOB):
    return take_over(job, Workspace(str(server), "server"), meta, server / "new")


def archive(server):
    (server / "store" / JOB).mkdir(parents=True)
    with zipfile.ZipFile(server / "store" / JOB / "workspace", "w") as file:
        for path in (server / JOB).rglob("*"):
            file.write(path, path.relative_to(server / JOB))
    shutil.rmtree(server / JOB)


def name_it(server):
    shutil.move(server / JOB, server / "elsewhere")
    (server / "local/start_models.yml").write_text(yaml.safe_dump({JOB: "../elsewhere"}))


@pytest.mark.parametrize("kept", [lambda _: None, archive, name_it], ids=["left behind", "archived", "named"])
def test_rounds_up_to_the_last_model_and_both_models_are_taken_over(server, kept):
    kept(server)
    run = resume(server)
    assert [record["round"] for record in run.rounds] == [0, 1, 2], "the round whose model was not saved is run again"
    assert (run.next_round, run.start["rounds"], run.state["w"].item()) == (3, 9, 2.0)
    assert torch.load(server / "new" / BEST_MODEL, weights_only=True)["model"]["w"].item() == 1.0
    assert run.best == (3, 0.35), "as its file says, though no line of a kept round does"


@pytest.mark.parametrize("other", [{"submitter_name": "else@example.org"}, {"submitter_org": "elsewhere"}])
def test_nobody_gets_at_another_s_model_by_continuing_the_job(server, other):
    with pytest.raises(FedImagingError, match="submitted by somebody else"):
        resume(server, {**LEAD, **other})
    assert not (server / "new").exists()


def test_a_job_without_a_model_or_unknown_is_told(server):
    with pytest.raises(FedImagingError, match="the server keeps no job"):
        resume(server, job="5f0c1b0e-6a2f-4f0c-9f39-000000000002")
    (server / JOB / BEST_MODEL).unlink()
    with pytest.raises(FedImagingError, match="no best model"):
        resume(server)
    (server / JOB / LAST_MODEL).unlink()
    with pytest.raises(FedImagingError, match="before its first round"):
        resume(server)
