"""Grants: what they allow, what a wrong file allows, and the owner's commands."""

import json
import os
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from fedimaging.cli import main
from fedimaging.errors import Reason
from fedimaging.governance.grants import (
    GRANTS_FILE,
    Grant,
    GrantsFile,
    Kind,
    NoConsentError,
    Request,
    config_hash,
    decide,
    grant_everything,
    read_grants,
    write_grants,
)
from fedimaging.governance.ledger import PASSED, Entry, Ledger

REPOSITORY = Path(__file__).parents[2]
JOB = REPOSITORY / "jobs" / "chest_xray_fedavg"
NOW = datetime(2026, 12, 31, 23, 59, tzinfo=UTC)
CONFIG = "5d" * 32
ASKED = {
    "dataset": "chest_xray", "job": "chest_xray_fedavg", "config": CONFIG, "submitter": "lead@example.org",
    "role": "lead", "signed": True, "kind": Kind.TRAIN, "counts": True,
}  # fmt: skip
GIVEN = {
    "id": "3f9c2a", "dataset": "chest_xray", "job": "chest_xray_fedavg", "submitter": "lead@example.org",
    "kinds": ["train", "evaluate"], "rounds": 12, "until": date(2026, 12, 31),
}  # fmt: skip


def ask(grant, used=0, now=NOW, **changes):
    return decide([Grant(**grant)], Request(**{**ASKED, **changes}), lambda _: used, now)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"config": CONFIG},
        {"submitter": None, "role": "lead"},
        {"dataset": "*", "job": "*", "submitter": "*"},
        {"rounds": None, "until": None},
    ],
)
def test_a_grant_allows_what_it_names(changes):
    assert ask({**GIVEN, **changes}).id == "3f9c2a"


@pytest.mark.parametrize(
    ("grant", "asked", "words"),
    [
        ({}, {"dataset": "hippocampus"}, "no grant for the dataset hippocampus"),
        ({}, {"job": "other"}, "no grant for the job other"),
        ({"config": "ab" * 32}, {}, "another configuration"),
        ({}, {"submitter": "other@example.org"}, "not for other@example.org"),
        ({"submitter": None, "role": "lead"}, {"role": "member"}, "any lead"),
        ({}, {"signed": False}, "no signature"),
        ({"submitter": "*", "role": "lead"}, {"signed": False}, "no signature"),
        ({"kinds": ["evaluate"]}, {}, "not for the kind train"),
        ({"kinds": ["train"]}, {"kind": Kind.EVALUATE, "counts": False}, "not for the kind evaluate"),
        ({"until": date(2026, 12, 30)}, {}, "expired on 2026-12-30"),
    ],
)
def test_a_grant_for_something_else_is_none(grant, asked, words):
    with pytest.raises(NoConsentError, match=words) as caught:
        ask({**GIVEN, **grant}, **asked)
    assert caught.value.reason is Reason.NO_CONSENT


def test_rounds_are_used_up_and_evaluation_uses_none():
    assert ask(GIVEN, used=11)
    with pytest.raises(NoConsentError, match="the 12 rounds of the grant 3f9c2a are used up"):
        ask(GIVEN, used=12)
    assert ask(GIVEN, used=12, kind=Kind.EVALUATE, counts=False)


def test_no_grant_at_all_is_a_no():
    with pytest.raises(NoConsentError):
        decide([], Request(**ASKED), lambda _: 0, NOW)


GOOD = "grants:\n- {id: a, dataset: d, job: j, submitter: s, kinds: [train]}\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "grants",
        "grants: {a: 1}",
        "- a",
        "grants: [",
        "other: []",
        GOOD + "more: 1\n",
        GOOD.replace("id: a", "id: A B"),
        GOOD.replace("submitter: s", "note: s"),
        GOOD.replace("submitter: s, ", ""),
        GOOD.replace("[train]", "[everything]"),
        GOOD.replace("[train]", "[statistics]"),
        GOOD.replace("[train]", "[]"),
        GOOD.replace("[train]", "[train], rounds: 0"),
        GOOD.replace("[train]", "[train], rounds: many"),
        GOOD.replace("[train]", "[train], until: someday"),
        GOOD + "- {id: a, dataset: d, job: j, submitter: s, kinds: [train]}\n",
        GOOD + "- 7\n",
    ],
)
def test_a_wrong_file_grants_nothing_not_even_its_right_entries(tmp_path, text):
    path = tmp_path / GRANTS_FILE
    path.write_text(GOOD)
    assert len(read_grants(path)) == 1
    path.write_text(text)
    with pytest.raises(NoConsentError, match="nothing is granted"):
        read_grants(path)


def test_a_missing_or_unreadable_file_or_one_that_anybody_may_write_grants_nothing(tmp_path):
    path = tmp_path / GRANTS_FILE
    with pytest.raises(NoConsentError, match="no such file"):
        read_grants(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(NoConsentError, match="can't be read"):
        read_grants(path)
    path.write_text(GOOD)
    path.chmod(0o666)
    with pytest.raises(NoConsentError, match="chmod o-w"):
        read_grants(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(NoConsentError, match="no regular file"):
        read_grants(path)


def test_a_change_of_the_file_is_seen(tmp_path):
    grant_everything(tmp_path, ["b", "a"])
    file = GrantsFile(tmp_path / GRANTS_FILE)
    before = file.stamp()
    assert [grant.dataset for grant in file.grants()] == ["a", "b"]
    assert file.stamp() == before
    write_grants(file.path, [])
    assert file.stamp() != before
    assert file.grants() == []
    file.path.unlink()
    with pytest.raises(NoConsentError):
        file.grants()


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / GRANTS_FILE).write_text("grants: []\n")
    return tmp_path


@pytest.fixture
def run(site, capsys, monkeypatch):
    """Runs a command on the site; its exit code, and what it said."""
    monkeypatch.setenv("COLUMNS", "250")

    def run(*arguments):
        code = main([*map(str, arguments), "--site", str(site)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


TO_LEAD = ("--submitter", "lead@example.org", "--rounds", 12, "--until", "2999-12-31")


def test_a_grant_is_given_listed_and_taken_back(site, run):
    code, said = run("grant", "give", "--dataset", "chest_xray", "--job", "chest_xray_fedavg", *TO_LEAD)
    assert code == 0, said
    (grant,) = read_grants(site / "local" / GRANTS_FILE)
    assert (grant.rounds, grant.until, grant.kinds) == (12, date(2999, 12, 31), [Kind.TRAIN, Kind.EVALUATE])
    code, said = run("grant", "list")
    assert code == 0
    assert all(word in said for word in (grant.id, "chest_xray_fedavg", "lead@example.org", "0 of 12", "2999-12-31"))
    assert run("grant", "take", grant.id)[0] == 0
    assert read_grants(site / "local" / GRANTS_FILE) == []
    assert "every job is refused" in run("grant", "list")[1]


def test_what_a_job_asks_for_is_told_in_plain_words(run):
    code, said = run("grant", "show", JOB)
    assert code == 0
    for word in ("the dataset chest_xray", "12 rounds", "DenseNet121", "28.1 MB", "auroc", "no: no grant for the data"):
        assert word in said
    assert "train for 12 rounds of 1 epoch, and evaluate" in said
    code, said = run("grant", "show", JOB.with_name("chest_xray_leave_one_out"))
    assert code == 0
    assert "train (not at hospital-c) for 12 rounds of 1 epoch, and evaluate" in said


def test_a_job_that_was_refused_is_listed_shown_and_granted_as_it_asked(site, run):
    deployed = site / "0b5e3c1a-7f1d-4c8e-9a53-2f6f0d9d7c11"
    (deployed / "app_site").mkdir(parents=True)
    (deployed / "app_site/config").symlink_to(JOB / "app/config")
    (deployed / "meta.json").write_text(json.dumps({"name": "chest_xray_fedavg"}))
    entry = Entry(
        site="hospital-a", job_id=deployed.name, job="chest_xray_fedavg", config=CONFIG, submitter="lead@example.org",
        role="lead", signed=True, dataset="chest_xray", task="train", kind=Kind.TRAIN, gate="refused: no_consent",
        consent="refused: no grant for the dataset chest_xray", counts=True,
    )  # fmt: skip
    with Ledger(site).locked() as ledger:
        ledger.append(entry)
    code, said = run("grant", "list")
    assert code == 0
    assert "Refused for want of consent" in said
    assert deployed.name in said
    code, said = run("grant", "show", deployed.name)
    assert "lead@example.org (lead), proven by their signature" in said
    code, said = run("grant", "give", "--as-asked", deployed.name, "--rounds", 12, "--until", "2999-12-31")
    assert code == 0, said
    assert "yes, by the grant" in run("grant", "show", deployed.name)[1]
    (grant,) = read_grants(site / "local" / GRANTS_FILE)
    assert grant.submitter == "lead@example.org"
    assert grant.config in run("grant", "show", JOB)[1]


def test_used_rounds_are_counted_from_the_ledger(site, run):
    run("grant", "give", "--dataset", "chest_xray", "--job", "j", *TO_LEAD)
    (grant,) = read_grants(site / "local" / GRANTS_FILE)
    for gate, counts in ((PASSED, True), (PASSED, True), ("stopped: x", True), (PASSED, False)):
        entry = Entry("a", "i", "j", CONFIG, "s", "r", True, "d", "train", Kind.TRAIN)
        entry.grant, entry.gate, entry.consent, entry.counts = grant.id, gate, "granted", counts
        with Ledger(site).locked() as ledger:
            ledger.append(entry)
    assert "2 of 12" in run("grant", "list")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["give", "--dataset", "d", *TO_LEAD], "--job missing"),
        (["give", "--dataset", "d", "--job", "j", "--rounds", 1, "--until", "2999-12-31"], "say to whom"),
        (["give", "--dataset", "d", "--job", "j", "--anybody", "--rounds", 1, "--until", "2020-01-01"], "is over"),
        (["give", "--dataset", "d", "--job", "j", "--anybody", "--rounds", 1, "--until", "soon"], "expected a day"),
        (["give", "--dataset", "d", "--job", "j", "--anybody", "--rounds", 0, "--until", "2999-12-31"], "--rounds"),
        (["give", "--dataset", "d", "--job", "j/k", *TO_LEAD], "--job"),
        (["give", "--dataset", "d", "--job", "j", "--kinds", "train,peek", *TO_LEAD], "one of train, evaluate"),
        (["give", "--dataset", "d", "--job", "j", "--kinds", "statistics", *TO_LEAD], "one of train, evaluate"),
        (["give", "--as-asked", "nothing", *TO_LEAD], "neither the id of a job"),
        (["take", "nothing"], "no such grant"),
        (["show", "nothing"], "neither the id of a job"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(site, run, arguments, words):
    before = (site / "local" / GRANTS_FILE).read_bytes()
    code, said = run("grant", *arguments)
    assert code == 2
    assert words in said
    assert said.strip().count("\n") == 0
    assert (site / "local" / GRANTS_FILE).read_bytes() == before
    assert [path.name for path in (site / "local").iterdir()] == [GRANTS_FILE]


def test_a_folder_that_is_no_site_s_is_told(tmp_path, capsys):
    assert main(["grant", "list", "--site", str(tmp_path / "nowhere")]) == 2
    assert "no site's folder" in capsys.readouterr().err


def test_the_hash_of_a_configuration_is_of_what_it_says():
    submitted = config_hash(b'{"a": 1, "b": [2]}')
    assert submitted == config_hash(b'{"b":[2],\n\t"a":1}')
    assert submitted != config_hash(b'{"a": 1, "b": [3]}')
