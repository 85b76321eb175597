"""The data owner's page: what ran on which data, for whom, how often, what left, what was refused, what is granted."""

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedimaging import __version__
from fedimaging.errors import FedImagingError
from fedimaging.governance.grants import GRANTS_FILE, read_grants
from fedimaging.governance.ledger import PASSED, read_records, rounds_used, verify
from fedimaging.report.collect import REASONS
from fedimaging.report.html import page_environment, write_files


def write_page(site: Path, out: Path | None = None) -> tuple[Path, Path]:
    """Writes the page of a site, and its figures as JSON beside it, readable by their owner only.

    Args:
        site: the site's folder.
        out: the HTML file, by default ledger-report.html in the working folder.

    Raises:
        FedImagingError: the ledger cannot be read, or the page cannot be written.
    """
    content = collect(site)
    out = out or Path("ledger-report.html")
    return write_files(out, render(content), content, private=True)


def collect(site: Path) -> dict[str, Any]:
    """All that the page says, as plain values."""
    records, check = read_records(site), verify(site)
    grants, fault = _grants(site)
    left = [record for record in records if record.get("gate") == PASSED]
    return {
        "site": str(records[-1].get("site")) if records else site.resolve().name,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "fedimaging": __version__,
        "ledger": {"lines": check.lines, "last": check.last, "faults": check.faults},
        "first": records[0].get("time") if records else None,
        "jobs": _jobs(records),
        "left": {
            "results": len(left),
            "rounds": sum(record.get("counts") is True for record in left),
            "bytes": sum(int(record.get("bytes_out") or 0) for record in left),
        },
        "refused": _refused(records),
        "grants": grants,
        "grants_fault": fault,
    }


def render(content: dict[str, Any]) -> str:
    """The page. Every text in it is escaped, it runs no scripts and loads nothing."""
    environment = page_environment("fedimaging.governance")
    environment.filters |= {"minute": _minute, "people": _people}
    return environment.get_template("page.html").render(page=content)


def _jobs(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a job that was sent here, the newest first."""
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        row = rows.setdefault(
            str(record.get("job_id")) + str(record.get("dataset")) + str(record.get("config")),
            {key: record.get(key) for key in ("job", "job_id", "dataset", "submitter", "role", "signed", "config")}
            | {"from": record.get("time"), "rounds": 0, "evaluations": 0, "cases": 0, "seconds": 0.0, "bytes": 0}
            | {"manifests": [], "results": [], "kept": 0},
        )
        row["to"] = record.get("time")
        row["seconds"] += float(record.get("seconds") or 0)
        if record.get("gate") != PASSED:
            row["kept"] += 1
            continue
        row["rounds"] += record.get("counts") is True
        row["evaluations"] += record.get("kind") == "evaluate"
        row["cases"] = max(row["cases"], int(record.get("cases") or 0))
        row["bytes"] += int(record.get("bytes_out") or 0)
        if (manifest := record.get("manifest")) not in {None, *row["manifests"]}:
            row["manifests"].append(manifest)
        row["results"].append({key: record.get(key) for key in ("time", "task", "round", "bytes_out", "sha256")})
    return list(rows.values())[::-1]


def _refused(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a job and reason, the newest first."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        if record.get("gate") == PASSED:
            continue
        consent, gate = str(record.get("consent", "")), str(record.get("gate", ""))
        why = consent if consent.startswith("refused") else _plain(gate)
        row = rows.setdefault(
            (str(record.get("job_id")), why),
            {key: record.get(key) for key in ("job", "job_id", "dataset", "submitter", "role", "task")}
            | {"why": why, "times": 0},
        )
        row["times"] += 1
        row["last"] = record.get("time")
    return sorted(rows.values(), key=lambda row: str(row["last"]), reverse=True)


def _grants(site: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The grants with what is used of them; the fault of a file that grants nothing, named without its folder."""
    try:
        grants = read_grants(site / "local" / GRANTS_FILE)
    except FedImagingError as error:
        return [], str(error).replace(str(site / "local"), "local")
    used, now = rounds_used(site), datetime.now(UTC)
    return [
        grant.model_dump(mode="json") | {"who": grant.who, "used": used(grant), "over": grant.expired(now)}
        for grant in grants
    ], None


def _plain(gate: str) -> str:
    """What the gate wrote, with a reason's code in words."""
    return f"refused: {REASONS.get(gate.removeprefix('refused: '), gate)}" if gate.startswith("refused: ") else gate


def _minute(time: object) -> str:
    return str(time or "")[:16].replace("T", " ")


def _people(row: dict[str, Any]) -> str:
    """A submitter with their role, for a row."""
    name, role = row.get("submitter") or "unknown", row.get("role")
    return f"{name} ({role})" if role else str(name)
