"""The ledger: what an edit, a crash and two writers do to it, and what the owner sees of it."""

import errno
import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from datetime import UTC, datetime

import pytest

from fedimaging.cli import main
from fedimaging.errors import FedImagingError, Reason
from fedimaging.governance.grants import Grant, Kind, NoConsentError, Request, decide, read_grants, write_grants
from fedimaging.governance.ledger import (
    HEAD_FILE,
    LEDGER_FILE,
    PASSED,
    START,
    Entry,
    Ledger,
    read_records,
    rounds_used,
    verify,
)


def entry(number=0, **changes):
    values = {
        "site": "hospital-a", "job_id": "job-1", "job": "chest_xray_fedavg", "config": "5d" * 32,
        "submitter": "lead@example.org", "role": "lead", "signed": True, "dataset": "chest_xray", "task": "train",
        "kind": Kind.TRAIN, "round": number, "cases": 100 + number, "bytes_out": 1000, "sha256": "ab" * 32,
        "grant": "g", "consent": "granted", "gate": PASSED, "counts": True,
    }  # fmt: skip
    return Entry(**{**values, **changes})


def write(folder, count, start=0):
    ledger = Ledger(folder)
    for number in range(start, start + count):
        with ledger.locked() as book:
            book.append(entry(number))


def granted(**values):
    return Grant(id="g", dataset="chest_xray", job="*", submitter="*", kinds=["train"], **values)


@pytest.fixture
def site(tmp_path):
    (tmp_path / "local").mkdir()
    write(tmp_path, 5)
    return tmp_path


def lines(folder):
    return (folder / LEDGER_FILE).read_bytes().splitlines(keepends=True)


def test_a_ledger_is_whole_and_each_line_holds_the_hash_of_the_one_before(site):
    check = verify(site)
    assert (check.lines, check.faults) == (5, [])
    records = read_records(site)
    assert [record["previous"] for record in records] == [START, *check.hashes[:-1]]
    assert re.fullmatch(r"2\d{3}-\d\d-\d\dT[\d:.]+\+00:00", records[0]["time"])
    assert oct((site / LEDGER_FILE).stat().st_mode & 0o777) == "0o600"
    assert rounds_used(site)(granted()) == 5


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("how", ["changed", "removed", "swapped", "doubled", "garbled"])
def test_an_edit_of_any_line_is_told_and_nothing_is_written_after_it(site, how, number, capsys):
    edited = lines(site)
    match how:
        case "changed":
            edited[number] = edited[number].replace(b'"cases": 10', b'"cases": 20')
        case "removed":
            del edited[number]
        case "swapped":
            other = (number + 1) % 5
            edited[number], edited[other] = edited[other], edited[number]
        case "doubled":
            edited.insert(number, edited[number])
        case "garbled":
            edited[number] = b"\xff\n"
    (site / LEDGER_FILE).write_bytes(b"".join(edited))
    assert verify(site).faults
    assert main(["ledger", "verify", "--site", str(site)]) == 1
    assert "line" in capsys.readouterr().out
    with pytest.raises(FedImagingError, match="the ledger was changed"), Ledger(site).locked():
        pass
    assert lines(site) == edited


def test_a_lost_head_and_a_rewritten_chain_are_told(site, capsys):
    known = verify(site).last
    (site / HEAD_FILE).unlink()
    assert "missing or damaged" in verify(site).faults[0]
    (site / LEDGER_FILE).unlink()
    write(site, 5)
    assert verify(site).faults == []
    assert main(["ledger", "verify", "--contains", known, "--site", str(site)]) == 1
    assert "changed or removed" in capsys.readouterr().out
    assert main(["ledger", "verify", "--contains", verify(site).hashes[2], "--site", str(site)]) == 0
    assert "whole: 5 lines" in capsys.readouterr().out


def test_a_writer_that_is_killed_at_any_moment_loses_at_most_its_line(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.governance.test_ledger import write\n"
        "print('ready', flush=True); write(Path(sys.argv[1]), 10**6)"
    )
    for _ in range(3):
        before = verify(tmp_path).lines
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        while verify(tmp_path).lines < before + 3:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept = verify(tmp_path)
        assert kept.faults == []
        write(tmp_path, 1)
        assert verify(tmp_path).faults == []
        assert verify(tmp_path).lines == kept.lines + 1


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_line_that_was_cut_short_is_dropped_and_told(site, kept):
    whole = (site / LEDGER_FILE).read_bytes()
    torn = lines(site)[-1][:kept]
    (site / LEDGER_FILE).write_bytes(whole + torn)
    assert len(read_records(site)) == 5
    assert verify(site).faults == []
    write(site, 1, start=5)
    assert verify(site).faults == []
    assert read_records(site)[-1]["dropped_bytes"] == len(torn)
    assert (site / LEDGER_FILE).read_bytes().startswith(whole)


CRASH = """
import os, sys
from pathlib import Path
from fedimaging.governance import ledger
from tests.governance.test_ledger import write
calls = 0
def fsync(handle):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os._exit(9)
ledger.os.fsync = fsync
write(Path(sys.argv[1]), 1, start=5)
"""


@pytest.mark.parametrize(("step", "count", "unfinished"), [(1, 5, True), (2, 6, False), (3, 6, False)])
def test_a_crash_at_any_step_is_no_edit_and_the_next_line_tells_of_one_that_was_lost(
    site, step, count, unfinished, capsys
):
    assert subprocess.run([sys.executable, "-c", CRASH, str(site), str(step)], check=False).returncode == 9
    check = verify(site)
    assert (check.lines, check.faults, check.unfinished) == (count, [], unfinished)
    assert main(["ledger", "verify", "--site", str(site)]) == 0
    assert ("a crash cut short the line" in capsys.readouterr().out) is unfinished
    write(site, 1, start=6)
    check = verify(site)
    assert (check.lines, check.faults, check.unfinished) == (count + 1, [], False)
    assert ("unfinished" in read_records(site)[-1]) is unfinished


def forge(site, **changes):
    """Adds a line that follows the last by its hash."""
    record = {**read_records(site)[-1], "previous": verify(site).last, **changes}
    with (site / LEDGER_FILE).open("a") as file:
        file.write(json.dumps(record) + "\n")


@pytest.mark.parametrize("count", [1, 2])
def test_lines_that_were_added_at_the_end_are_told_though_they_follow(site, count):
    for number in range(count):
        forge(site, round=number, job="never_ran")
    assert verify(site).faults == [f"{count} lines at the end were not written by this programme"]
    with pytest.raises(FedImagingError, match="the ledger was changed"), Ledger(site).locked():
        pass


def test_after_a_crash_too_no_other_line_than_the_one_begun_is_taken(site):
    subprocess.run([sys.executable, "-c", CRASH, str(site), "1"], check=False)
    forge(site, job="never_ran")
    assert verify(site).faults
    (site / LEDGER_FILE).write_bytes(b"".join(lines(site)[:-2]))
    assert verify(site).faults


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_write_that_fails_leaves_no_part_of_a_line_and_no_line(site, step, monkeypatch):
    before, calls, really = (site / LEDGER_FILE).read_bytes(), [], os.fsync

    def fsync(handle):
        calls.append(handle)
        if len(calls) == step:
            raise OSError(errno.EIO, "injected")
        really(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(FedImagingError) as caught, Ledger(site).locked() as book:
        book.append(entry(5))
    assert caught.value.reason is Reason.NO_DISK_SPACE
    assert (site / LEDGER_FILE).read_bytes() == before
    assert (verify(site).faults, verify(site).unfinished) == ([], False)
    write(site, 1, start=6)
    assert [record["round"] for record in read_records(site)] == [0, 1, 2, 3, 4, 6]
    assert rounds_used(site)(granted()) == 6


def test_a_ledger_that_cannot_begin_begins_later(tmp_path):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(FedImagingError, match="can't be written"), Ledger(tmp_path).locked():
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    write(tmp_path, 1)
    assert (verify(tmp_path).lines, verify(tmp_path).faults) == (1, [])


def test_a_disk_that_is_full_in_the_middle_of_a_line_keeps_no_part_of_it(site):
    before = (site / LEDGER_FILE).read_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ledger = Ledger(site)
    with ledger.locked() as book:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
        try:
            with pytest.raises(FedImagingError, match="can't be written"):
                book.append(entry(5))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert (site / LEDGER_FILE).read_bytes() == before
        book.append(entry(6))
    assert "dropped_bytes" not in read_records(site)[-1]
    assert (verify(site).lines, verify(site).faults) == (6, [])


def test_rounds_are_not_had_again_by_setting_the_ledger_aside(site, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    give = ["grant", "give", "--dataset", "chest_xray", "--job", "j", "--anybody", "--rounds", "5"]
    where = ["--site", str(site)]
    assert main([*give, "--until", "2999-12-31", *where]) == 0
    (grant,) = read_grants(site / "local/grants.yml")
    with Ledger(site).locked() as book:
        assert (grant.ledger, book.rounds(grant)) == (book.id, 0)
        book.append(entry(5, grant=grant.id))
        assert book.rounds(grant) == 1
    assert rounds_used(site)(grant) == 1
    for name in (LEDGER_FILE, HEAD_FILE):
        (site / name).unlink()
    assert rounds_used(site)(grant) is None
    with Ledger(site).locked() as book:
        assert book.rounds(grant) is None
        assert book.rounds(granted()) == 0
    asked = Request("chest_xray", "j", "5d" * 32, "", "", False, Kind.TRAIN, counts=True)
    with pytest.raises(NoConsentError, match="counted in another ledger; give it anew"):
        decide([grant], asked, rounds_used(site), datetime.now(UTC))
    assert main(["grant", "list", *where]) == 0
    assert "void" in capsys.readouterr().out
    assert main([*give, "--until", "2999-12-31", *where]) == 0
    anew = read_grants(site / "local/grants.yml")[1]
    assert decide([grant, anew], asked, rounds_used(site), datetime.now(UTC)) == anew


def test_a_grant_of_rounds_that_names_no_ledger_is_void(site):
    assert rounds_used(site)(granted(rounds=3)) is None
    with Ledger(site).locked() as book:
        assert book.rounds(granted(rounds=3)) is None


def test_jobs_that_write_at_once_do_not_mix_their_lines(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write, args=(tmp_path, 40, start)) for start in (0, 100)]
    for writer in writers:
        writer.start()
    threads = [threading.Thread(target=write, args=(tmp_path, 20, start)) for start in (200, 300)]
    for thread in threads:
        thread.start()
    for task in (*threads, *writers):
        task.join(120)
    assert verify(tmp_path).faults == []
    rounds = [record["round"] for record in read_records(tmp_path)]
    assert sorted(rounds) == [*range(40), *range(100, 140), *range(200, 220), *range(300, 320)]
    assert rounds_used(tmp_path)(granted()) == 120


def test_a_place_that_cannot_be_written_is_an_error_and_no_line(tmp_path):
    (tmp_path / LEDGER_FILE).mkdir()
    with pytest.raises(FedImagingError), Ledger(tmp_path).locked() as book:
        book.append(entry())
    with pytest.raises(FedImagingError), Ledger(tmp_path / "nowhere").locked():
        pass


def test_the_ledger_on_the_screen(site, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with Ledger(site).locked() as book:
        book.append(entry(9, gate="refused: no_consent", consent="refused: used up", bytes_out=0, sha256=None))
    assert main(["ledger", "show", "--last", "2", "--site", str(site)]) == 0
    said = capsys.readouterr().out
    assert said.count("chest_xray_fedavg") == 2
    assert "refused: used up" in said
    assert "left" in said


def test_lines_are_exported_as_they_are_and_from_where_the_last_export_ended(site, capfdbinary):
    assert main(["ledger", "export", "--site", str(site)]) == 0
    assert capfdbinary.readouterr().out == (site / LEDGER_FILE).read_bytes()
    assert main(["ledger", "export", "--after", "3", "--site", str(site)]) == 0
    assert capfdbinary.readouterr().out.splitlines(keepends=True) == lines(site)[3:]


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_lines_reach_a_log_collector(site, kind, capsys):
    with socket.socket(socket.AF_INET, kind) as collector:
        collector.bind(("127.0.0.1", 0))
        collector.settimeout(30)
        if kind == socket.SOCK_STREAM:
            collector.listen()
        where = f"127.0.0.1:{collector.getsockname()[1]}"
        tcp = ["--tcp"] if kind == socket.SOCK_STREAM else []
        assert main(["ledger", "export", "--syslog", where, *tcp, "--site", str(site)]) == 0
        if kind == socket.SOCK_STREAM:
            with collector.accept()[0] as connection, connection.makefile("rb") as stream:
                received = [line.rstrip(b"\n") for line in stream]
        else:
            received = [collector.recv(65536) for _ in range(5)]
    assert [message.partition(b"fedimaging-ledger: ")[2] + b"\n" for message in received] == lines(site)
    assert all(re.match(rb"<14>\w{3} [ \d]\d \d\d:\d\d:\d\d ", message) for message in received)
    assert "--after 5" in capsys.readouterr().err


def test_a_collector_that_is_not_there_is_one_line(site, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main(["ledger", "export", "--syslog", f"127.0.0.1:{port}", "--tcp", "--site", str(site)]) == 2
    assert "ledger export --syslog" in capsys.readouterr().err


def test_the_owner_s_page_says_what_ran_left_was_refused_and_is_granted(site, tmp_path, capsys):
    with Ledger(site).locked() as book:
        ledger = book.id
    values = {"dataset": "chest_xray", "job": "chest_xray_fedavg", "submitter": "lead@example.org", "kinds": ["train"]}
    grants = [
        Grant(id="g", **values, rounds=12, until="2999-12-31", ledger=ledger),
        Grant(id="old", **values, rounds=7),
    ]
    write_grants(site / "local/grants.yml", grants)
    with Ledger(site).locked() as book:
        book.append(entry(5, job="<script>alert(1)</script>", job_id="job-2", bytes_out=0, sha256=None, grant=None,
                          consent="refused: no grant for the job x", gate="refused: no_consent"))  # fmt: skip
        book.append(entry(6, gate="stopped: the update holds 1 tensors that are not declared", bytes_out=0))
    out = tmp_path / "page.html"
    assert main(["ledger", "report", "--out", str(out), "--site", str(site)]) == 0
    page, data = out.read_text(), json.loads(out.with_suffix(".json").read_text())
    for words in (
        "lead@example.org",
        "5 of 12",
        "2999-12-31",
        "void",
        "no grant for the job x",
        "not declared",
        "ab" * 32,
    ):
        assert words in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in page
    assert not re.search(r"(?:src|href)\s*=", page)
    assert [(job["job_id"], job["rounds"], job["bytes"]) for job in data["jobs"]] == [
        ("job-2", 0, 0),
        ("job-1", 5, 5000),
    ]
    assert data["ledger"]["faults"] == []
    assert [oct(path.stat().st_mode & 0o777) for path in (out, out.with_suffix(".json"))] == ["0o600"] * 2


def test_the_page_tells_of_a_changed_ledger_and_of_a_wrong_grants_file(site, tmp_path):
    (site / LEDGER_FILE).write_bytes(b"".join(lines(site)[:-1]))
    (site / "local/grants.yml").write_text("grants: {")
    assert main(["ledger", "report", "--out", str(tmp_path / "page.html"), "--site", str(site)]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "The ledger was changed" in page
    assert "1 lines at the end were removed" in page
    assert "Nothing is granted" in page
    assert str(site) not in page
