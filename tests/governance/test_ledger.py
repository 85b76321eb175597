"""The ledger: what an edit, a crash and two writers do to it, and what the owner sees of it."""

import json
import multiprocessing
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from fedimaging.cli import main
from fedimaging.errors import FedImagingError
from fedimaging.governance.grants import Grant, Kind, write_grants
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
    assert rounds_used(site) == {"g": 5}


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


def test_a_crash_between_line_and_head_is_no_edit(site):
    head = (site / HEAD_FILE).read_bytes()
    write(site, 1, start=5)
    (site / HEAD_FILE).write_bytes(head)
    assert verify(site).faults == []
    write(site, 1, start=6)
    assert (verify(site).lines, verify(site).faults) == (7, [])


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
    assert rounds_used(tmp_path)["g"] == 120


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
    grants = [
        Grant(id="g", dataset="chest_xray", job="chest_xray_fedavg", submitter="lead@example.org", kinds=["train"],
              rounds=12, until="2999-12-31"),
    ]  # fmt: skip
    write_grants(site / "local/grants.yml", grants)
    with Ledger(site).locked() as book:
        book.append(entry(5, job="<script>alert(1)</script>", job_id="job-2", bytes_out=0, sha256=None, grant=None,
                          consent="refused: no grant for the job x", gate="refused: no_consent"))  # fmt: skip
        book.append(entry(6, gate="stopped: the update holds 1 tensors that are not declared", bytes_out=0))
    out = tmp_path / "page.html"
    assert main(["ledger", "report", "--out", str(out), "--site", str(site)]) == 0
    page, data = out.read_text(), json.loads(out.with_suffix(".json").read_text())
    for words in ("lead@example.org", "5 of 12", "2999-12-31", "no grant for the job x", "not declared", "ab" * 32):
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
