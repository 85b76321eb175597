"""A folder that would fail after it was submitted is told before, in one line that says what."""

import json
import shutil
from pathlib import Path

import pytest

from fedimaging.cli import main
from fedimaging.federation.check import check

JOBS = Path(__file__).parents[2] / "jobs"
META, SERVER, CLIENT = "meta.json", "app/config/config_fed_server.json", "app/config/config_fed_client.json"


def edit(name, change):
    def apply(folder):
        config = json.loads((folder / name).read_text())
        change(config)
        (folder / name).write_text(json.dumps(config))

    return apply


def workflow(**settings):
    return edit(SERVER, lambda c: c["workflows"][0]["args"].update(settings))


def trainer(change):
    return edit(CLIENT, lambda c: change(c["executors"][0]["executor"]["args"]))


def both(**settings):
    def apply(folder):
        workflow(**settings)(folder)
        edit(META, lambda c: c.update(settings))(folder)

    return apply


def pinned(sites, **meta):
    return edit(META, lambda c: c.update(deploy_map={"app": ["server", *sites]}, **meta))


BROKEN = {
    "no meta": (lambda f: (f / META).unlink(), "meta.json: no such file"),
    "no JSON": (lambda f: (f / SERVER).write_text("{"), "not JSON: line 1"),
    "name is a path": (edit(META, lambda c: c.update(name="../x")), "name: expected"),
    "no deploy map": (edit(META, lambda c: c.pop("deploy_map")), "deploy_map is empty"),
    "app that is not there": (edit(META, lambda c: c.update(deploy_map={"other": ["@ALL"]})), "'other' in deploy_map"),
    "resources that are no object": (edit(META, lambda c: c.update(resource_spec=[])), "resource_spec"),
    "class off the list": (
        edit(SERVER, lambda c: c["components"].append({"id": "x", "path": "subprocess.Popen"})),
        "subprocess.Popen is not on the sites' allow-list",
    ),
    "component without an id": (
        edit(SERVER, lambda c: c["components"][0].pop("id")),
        "FLARE: ",
    ),
    "two components of one id": (
        edit(SERVER, lambda c: c["components"].append(c["components"][0])),
        "duplicate component id",
    ),
    "code": (lambda f: (f / "app/custom").mkdir(), "configuration only"),
    "further file": (lambda f: (f / "app/config/model.pt").write_bytes(b"x"), "and nothing else"),
    "symbolic link": (lambda f: (f / "data").symlink_to("/etc"), "a symbolic link"),
    "environment variable": (trainer(lambda a: a.update(dataset="{$HOME}")), "environment variable"),
    "unknown setting": (trainer(lambda a: a["training"].update(epoch=1)), "training.epoch: unknown setting"),
    "setting out of range": (workflow(num_rounds=0), "num_rounds"),
    "unequal networks": (trainer(lambda a: a.update(network={"name": "ResNet18"})), "'network' differs"),
    "unequal strategies": (workflow(strategy={"name": "fedprox"}), "strategy differs"),
    "key metric of another task": (
        lambda f: [
            trainer(lambda a: a["task"].update(key_metric="mean_dice"))(f),
            edit(SERVER, lambda c: c["components"][0]["args"]["task"].update(key_metric="mean_dice"))(f),
        ],
        "key_metric",
    ),
    "tasks that nobody answers": (edit(CLIENT, lambda c: c["executors"][0].update(tasks=["train"])), "task validate"),
    "min_clients only in the workflow": (workflow(min_clients=3), "min_clients differs"),
    "site left out and not counted": (
        workflow(leave_out="c"),
        "the workflow's, 2 and one more, for c, which leave_out names; write 3",
    ),
    "one site is enough": (both(min_clients=1), "one site's model as it is"),
    "every site is needed": (pinned(["a", "b"]), "one absence ends it; deploy it to more sites"),
    "every site of three is needed": (
        lambda f: [both(min_clients=3)(f), pinned(["a", "b", "c"])(f)],
        "one absence ends it; lower min_clients",
    ),
    "more sites needed than there are": (pinned(["a"]), "FLARE: min 2 clients required"),
    "required site only in the workflow": (workflow(required_sites=["a"]), "mandatory_clients differs"),
    "required site without the job": (
        lambda f: [workflow(required_sites=["z"])(f), pinned(["a", "b", "c"], mandatory_clients=["z"])(f)],
        "not deployed to z",
    ),
    "more required than needed": (
        lambda f: [
            workflow(required_sites=["a", "b", "c"])(f),
            edit(META, lambda c: c.update(mandatory_clients=["a", "b", "c"]))(f),
        ],
        "names 3 already",
    ),
    "one site to train at is absent": (
        lambda f: [workflow(leave_out="c")(f), pinned(["a", "b", "c"], min_clients=3)(f)],
        "trains at 2 sites and needs 2 in every round: one absence ends it; deploy it to more sites",
    ),
    "site left out without the job": (
        lambda f: [workflow(leave_out="z")(f), pinned(["a", "b", "c"])(f)],
        "not deployed to z, which leave_out names",
    ),
    "site left out and never asked": (
        lambda f: [workflow(leave_out="c")(f), edit(SERVER, lambda c: c["workflows"].pop())(f)],
        "no CrossSiteEvaluation follows",
    ),
    "site left out and asked for its model": (
        lambda f: [
            workflow(leave_out="c")(f),
            edit(SERVER, lambda c: c["workflows"][1]["args"].update(site_models=True))(f),
        ],
        "site_models asks each site for its model",
    ),
    "site left out and required": (
        lambda f: [
            workflow(leave_out="a", required_sites=["a"])(f),
            edit(META, lambda c: c.update(mandatory_clients=["a"]))(f),
        ],
        "required_sites names a, which leave_out keeps from training",
    ),
    "site left out where models are personal": (
        lambda f: [
            workflow(leave_out="a", strategy={"name": "fedbn"})(f),
            trainer(lambda a: a["training"].update(strategy={"name": "fedbn"}))(f),
        ],
        "with fedbn each site is judged by what it trained itself",
    ),
    "round too short for the model": (workflow(round_timeout=20, straggler_wait=10), "Mbit/s; give at least"),
    "evaluation too short for the model": (
        edit(SERVER, lambda c: c["workflows"][1]["args"].update(timeout=5)),
        "the evaluation's timeout is 5 s",
    ),
    "wait longer than the round": (workflow(round_timeout=600), "straggler_wait is longer"),
}


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(JOBS / "chest_xray_fedavg", tmp_path / "chest_xray_fedavg"))


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_told_in_one_line(folder, kind, capsys):
    harm, words = BROKEN[kind]
    harm(folder)
    assert main(["job", "check", str(folder)]) == 2
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert any(words in line for line in lines), lines
    assert all(line.startswith(f"error: {folder}") or line.startswith("error: ") for line in lines)
    assert said.out == ""


@pytest.mark.parametrize("job", sorted(path.parent.name for path in JOBS.glob("*/meta.json")))
def test_the_committed_jobs_are_sound(job):
    assert check(JOBS / job) == []


def test_several_folders_are_checked_at_once(folder, capsys):
    (folder / "app/custom").mkdir()
    assert main(["job", "check", str(JOBS / "chest_xray_fedavg"), str(folder)]) == 2
    assert "chest_xray_fedavg: good" in capsys.readouterr().out
