"""Reads what a job left on disk into one plain dictionary, the content of report.json.

Only the server's run directory is read, which holds aggregates; a site's own directory is read for that site's report
alone. Rounds are counted from 1: `round` 1 is the first one trained, `after_rounds` 0 the model before any training.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedimaging import __version__
from fedimaging.errors import FedImagingError, Reason
from fedimaging.report.evaluation import (
    macro_mean,
    read_evaluation,
    to_figure,
    to_list,
    to_mapping,
    to_names,
    to_number,
    to_numbers,
    to_text,
)

REPORT_VERSION = 1
ROUNDS_FILE = "rounds.jsonl"
SITE_FILE = "site_report.json"
FEW_CASES = 50
WIDE_INTERVAL = 0.2

LABELS = {
    "auroc": "AUROC",
    "mean_dice": "mean Dice",
    "dice": "Dice",
    "hd95": "HD95 (mm)",
    "mean_hd95": "mean HD95 (mm)",
    "f1": "F1",
}
REASONS: dict[str, str] = {
    Reason.BAD_SETTING: "a setting of the job was refused",
    Reason.WRONG_VERSION: "the site runs another version of fedimaging than the job needs",
    Reason.NO_DATASET: "the site has no dataset of that name",
    Reason.BAD_MANIFEST: "the site's manifest was not valid",
    Reason.UNREADABLE_IMAGES: "too many images could not be read",
    Reason.TOO_FEW_CASES: "the site has too few cases",
    Reason.ONE_CLASS: "the site has cases of one class only",
    Reason.BAD_MODEL: "the model that arrived did not fit",
    Reason.NOT_FINITE: "the loss was not a finite number",
    Reason.NO_DISK_SPACE: "the site's disk was full",
    Reason.OUT_OF_MEMORY: "the site ran out of memory",
    Reason.NO_CONSENT: "the site's data owner has not granted it",
    Reason.STOPPED_AT_GATE: "the result held what the job does not declare, and the site kept it",
    Reason.NO_GATE: "the site's gate on what leaves is not in place",
    Reason.UNKNOWN_TASK: "the server asked for a task that sites do not know",
    Reason.INTERNAL: "an unexpected error at the site",
}


@dataclass(frozen=True)
class Log:
    """The events of rounds.jsonl; an absent one is empty, and a round written twice counts once, as it was last."""

    start: dict[str, Any]
    rounds: list[dict[str, Any]]
    final: dict[str, Any]
    end: dict[str, Any]
    failed: dict[str, Any]
    late: frozenset[tuple[int, str]]
    """(round, site) of what came after its round was closed"""

    @classmethod
    def of(cls, events: list[dict[str, Any]]) -> "Log":
        named = {event["event"]: event for event in events if event.get("event") in ("start", "final", "end", "failed")}
        trained = [event for event in events if event.get("event") == "round" and "round" in event]
        rounds = {int(index): event for event in trained if (index := to_number(event["round"])) is not None}
        late = [
            (int(number), str(event.get("site")))
            for event in events
            if event.get("event") == "late" and (number := to_number(event.get("round"))) is not None
        ]
        return cls(
            named.get("start", {}),
            [rounds[r] for r in sorted(rounds)],
            named.get("final", {}),
            named.get("end", {}),
            named.get("failed", {}),
            frozenset(late),
        )


def metric_label(name: str) -> str:
    """The name of a metric as a reader knows it; an unknown one is shown as it is written, without underscores."""
    return LABELS.get(name, name.replace("_", " "))


def collect(workspace: Path, site: str | None = None) -> dict[str, Any]:
    """Collects the report of a simulator workspace, a server's run directory or a downloaded job.

    Args:
        workspace: the folder that `simulate`, `nvflare simulator -w` or the console's `download_job` wrote; for a
            site's own report also the run directory of that site's client.
        site: adds the per-case results of this site, which exist only there.

    Raises:
        FedImagingError: the folder holds no run of ours, or a file of it cannot be read.
    """
    own = None if site is None else _read_site_report(workspace, site)
    run = find_run(workspace, required=own is None)
    log = Log.of(_read_events(run / ROUNDS_FILE) if run else [])
    simulate = _read_json(workspace / "simulate.json") or {}
    models = _models(_read_json(run / "cross_site_val" / "cross_val_results.json") or {}) if run else {}
    if own and not models:
        models = {name: {own["site"]: model["eval"]} for name, model in own["models"].items()}
    sites = _site_names(log, models, simulate)
    key = _key_metric(log, models)
    job = _job(workspace, run, log, simulate)
    trained = {
        name: {site: evaluation for site, evaluation in evaluations.items() if site != job["leave_out"]}
        for name, evaluations in models.items()
    }
    report: dict[str, Any] = {
        "report_version": REPORT_VERSION,
        "made": {"time": datetime.now(UTC).isoformat(timespec="seconds"), "fedimaging": __version__},
        "site": own,
        "key_metric": {"name": key, "label": metric_label(key)},
        "sites": sites,
        "job": job,
        "picked": _picked(log),
        "participation": [_participation(event, sites, log) for event in log.rounds],
        "training": [_training(event) for event in log.rounds],
        "validation": _validation(log, key),
        "cross_site": models,
        "macro_mean": {name: macro_mean(evaluations, key) for name, evaluations in trained.items()},
        "cases": _cases(sites, log, models),
        "resources": _resources(log),
        "versions": to_mapping(log.start.get("versions")) | _packages(log),
        "settings": _settings(run),
        "overrides": to_mapping(simulate.get("overrides")),
        "command": to_text(simulate.get("command")),
    }
    report["problems"] = _problems(report, log.failed, simulate) if run else []
    report["headline"] = _headline(report)
    return report


def find_run(workspace: Path, required: bool = True) -> Path | None:
    """Finds the server's run directory, the one that holds rounds.jsonl.

    Raises:
        FedImagingError: there is none although one is required, or there are several.
    """
    for folder in (workspace, workspace / "workspace", workspace / "server" / "simulate_job"):
        if (folder / ROUNDS_FILE).is_file():
            return folder
    patterns = (f"*/workspace/{ROUNDS_FILE}", f"server*/*/{ROUNDS_FILE}")
    found = sorted({path.parent for pattern in patterns for path in workspace.glob(pattern)})
    if len(found) == 1:
        return found[0]
    if found:
        jobs = ", ".join(str(path.relative_to(workspace)) for path in found)
        raise FedImagingError(f"{workspace} holds several jobs: name the folder of one of them ({jobs})")
    if required:
        raise FedImagingError(
            f"no {ROUNDS_FILE} in {workspace}: expected the workspace of a simulation "
            f"(with server/simulate_job/{ROUNDS_FILE}) or a downloaded job (with workspace/{ROUNDS_FILE})"
        )
    return None


def _read_events(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object per line; a last line that was cut off by a crash is left out.

    Raises:
        FedImagingError: the file cannot be read, or another line is not a JSON object.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    except OSError as error:
        raise FedImagingError(f"{path} cannot be read ({error.strerror}): check the file's permissions") from error
    events = []
    for count, line in enumerate(lines, 1):
        try:
            event = json.loads(line, parse_constant=lambda _: None)
        except (ValueError, RecursionError) as error:
            if count == len(lines):
                break
            raise FedImagingError(f"{path} line {count} is not JSON: the file is damaged, run the job again") from error
        if not isinstance(event, dict):
            raise FedImagingError(f"{path} line {count} is not a JSON object: the file is damaged, run the job again")
        events.append(event)
    return events


def _read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON object, None where there is no such file.

    Raises:
        FedImagingError: the file cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FedImagingError(f"{path} cannot be read ({error.strerror}): check the file's permissions") from error
    except (ValueError, RecursionError) as error:
        raise FedImagingError(f"{path} is not JSON: the file is damaged, run the job again") from error
    if not isinstance(content, dict):
        raise FedImagingError(f"{path} is not a JSON object: the file is damaged, run the job again")
    return content


def _site_names(log: Log, models: dict[str, Any], simulate: dict[str, Any]) -> list[str]:
    found = {*to_names(simulate.get("sites")), *to_names(log.final.get("metrics"))}
    for event in log.rounds:
        found.update(to_names(event.get("sites")), to_names(event.get("refused")), to_names(event.get("missing")))
    if log.rounds and (left_out := to_text(log.start.get("leave_out"))):
        found.add(left_out)
    return sorted(found.union(*models.values()))


def _key_metric(log: Log, models: dict[str, Any]) -> str:
    """The key metric as the job names it; in a site's report without the server's log, the first with an interval."""
    if name := to_text(log.start.get("key_metric")):
        return name
    evaluations = [evaluation for sites in models.values() for evaluation in sites.values()]
    figures = [item for evaluation in evaluations for item in evaluation["metrics"].items()]
    return next((name for name, figure in figures if figure["ci"]), figures[0][0] if figures else "auroc")


def _job(workspace: Path, run: Path | None, log: Log, simulate: dict[str, Any]) -> dict[str, Any]:
    start, meta = log.start, (_read_json(run / "meta.json") if run else None) or {}
    return {
        "name": to_text(start.get("job"))
        or to_text(simulate.get("job"))
        or to_text(meta.get("name"))
        or workspace.name,
        "started": to_text(start.get("time")),
        "rounds": to_number(start.get("rounds")),
        "rounds_done": len(log.rounds),
        "min_clients": to_number(start.get("min_clients")),
        "leave_out": to_text(start.get("leave_out")),
        "seed": to_number(start.get("seed")),
        "start_from": to_text(start.get("start_from")),
        "continues": to_text(start.get("continues")),
        "start_round": to_number(start.get("start_round")),
        "strategy": to_mapping(start.get("strategy")),
        "task": to_mapping(start.get("task")),
        "network": to_mapping(start.get("network")),
        "finished": bool(log.end),
        "simulated": bool(simulate) or (run is not None and run.name == "simulate_job"),
    }


def _picked(log: Log) -> dict[str, Any]:
    """Which model was picked: the one after so many rounds of training, and its vote-weighted validation metric."""
    best = to_number(log.end.get("best_round"))
    if best is not None:
        return {"after_rounds": best, "key_metric": to_number(log.end.get("best_key_metric")), "so_far": False}
    event: dict[str, Any] = next((event for event in reversed(log.rounds) if event.get("best") is True), {})
    after, metric = to_number(event.get("round")), to_number(event.get("key_metric"))
    return {"after_rounds": after, "key_metric": metric, "so_far": not log.end}


def _participation(event: dict[str, Any], sites: Iterable[str], log: Log) -> dict[str, Any]:
    present, refused = to_mapping(event.get("sites")), to_mapping(event.get("refused"))

    def cell(site: str) -> dict[str, Any]:
        if site in present:
            result = to_mapping(present[site])
            skipped = to_number(result.get("skipped")) or 0
            return {"status": "took_part", "cases": to_number(result.get("cases")), "skipped": skipped}
        if site in refused:
            code = str(refused[site])
            return {"status": "refused", "reason": code, "meaning": REASONS.get(code)}
        if site == log.start.get("leave_out"):
            return {"status": "left_out"}
        return {"status": "late" if (event["round"], site) in log.late else "missing"}

    return {"round": int(event["round"]) + 1, "sites": {site: cell(site) for site in sites}}


def _training(event: dict[str, Any]) -> dict[str, Any]:
    sites = {site: to_mapping(result) for site, result in to_mapping(event.get("sites")).items()}
    return {
        "round": int(event["round"]) + 1,
        "seconds": to_number(event.get("seconds")),
        "bytes_out": to_number(event.get("bytes_out")),
        "bytes_in": to_number(event.get("bytes_in")),
        "sites": {
            s: {"loss": to_number(r.get("loss")), "seconds": to_number(r.get("seconds"))} for s, r in sites.items()
        },
    }


def _validation(log: Log, key: str) -> list[dict[str, Any]]:
    """The global model on each site's validation split, after 0, 1, ... rounds of training.

    Returns:
        [{"after_rounds", "picked", "mean": the vote-weighted key metric, "key": {site: its key metric}, "sites": {site:
        all its metrics and votes}}]
    """
    picked = _picked(log)["after_rounds"]

    def point(after: int, mean: Any, sites: dict[str, dict[str, float | None]]) -> dict[str, Any]:
        figures = {site: metrics.get(key) for site, metrics in sites.items()}
        return {
            "after_rounds": after,
            "picked": after == picked,
            "mean": to_number(mean),
            "key": figures,
            "sites": sites,
        }

    points = []
    for event in log.rounds:
        results = {site: to_mapping(result) for site, result in to_mapping(event.get("sites")).items()}
        sites = {s: to_numbers(r.get("metrics")) | {"votes": to_number(r.get("votes"))} for s, r in results.items()}
        points.append(point(int(event["round"]), event.get("key_metric"), sites))
    if log.final:
        sites = {site: to_numbers(metrics) for site, metrics in to_mapping(log.final.get("metrics")).items()}
        after = points[-1]["after_rounds"] + 1 if points else 0
        points.append(point(after, log.final.get("key_metric"), sites))
    return points


def _models(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Turns FLARE's {site: {model: EVAL}} into {"best" | "last" | a site's own model: {site: evaluation}}."""
    models: dict[str, dict[str, Any]] = {}
    for site, evaluations in sorted(results.items()):
        for name, raw in to_mapping(evaluations).items():
            if isinstance(raw, dict) and raw:
                models.setdefault(_model_name(name), {})[site] = read_evaluation(raw)
    order = {"best": 0, "last": 1}
    return {name: models[name] for name in sorted(models, key=lambda n: (order.get(n, 2), n))}


def _model_name(name: str) -> str:
    """'best' or 'last' for a model of the server; a site's own model keeps its name."""
    if name.startswith("SRV_"):
        return "best" if "best" in name.lower() else "last"
    return name


def _cases(sites: Iterable[str], log: Log, models: dict[str, Any]) -> dict[str, Any]:
    """Cases and class counts per site and split; without an evaluation, the counts that the rounds tell."""
    table: dict[str, Any] = {}
    for site in sites:
        evaluation = next((model[site] for model in models.values() if site in model), None)
        if evaluation:
            table[site] = {
                "training": evaluation["training"],
                "validation": evaluation["validation"],
                evaluation["split"]: {"cases": evaluation["cases"], "classes": evaluation["classes"]},
                "min_cell": evaluation["min_cell"],
            }
            continue
        results = [to_mapping(event.get("sites")).get(site) for event in log.rounds]
        result = to_mapping(next((r for r in reversed(results) if r), None))
        validation = to_number(to_mapping(result.get("metrics")).get("cases"))
        table[site] = {
            "training": {"cases": to_number(result.get("cases")), "classes": {}},
            "validation": {"cases": validation, "classes": {}},
        }
    return table


def _resources(log: Log) -> dict[str, Any]:
    memory = to_mapping(log.end.get("peak_memory"))
    seconds = [s for event in log.rounds if (s := to_number(event.get("seconds"))) is not None]
    return {
        "seconds": to_number(log.end.get("seconds")),
        "round_seconds": sum(seconds) if seconds else None,
        "model_bytes": to_number(log.start.get("model_bytes")),
        "parameters": to_number(log.start.get("parameters")),
        "peak_memory": {"server": to_number(memory.get("server")), "sites": to_numbers(memory.get("sites"))},
    }


def _settings(run: Path | None) -> dict[str, Any]:
    """The job's configuration files as they lie in the run directory, {"client", "server"}."""
    settings = {}
    for part in ("client", "server") if run else ():
        paths = sorted(run.glob(f"app*/config/config_fed_{part}.json")) if run else []
        content = next((c for c in map(_read_json, paths) if c is not None), None)
        if content is not None:
            settings[part] = content
    return settings


def _packages(log: Log) -> dict[str, Any]:
    """The package that each site said it ran, as it was last told: ``{"sites": {site: "version (hash)"}}``."""
    said: dict[str, str] = {}
    for event in log.rounds:
        for site, result in to_mapping(event.get("sites")).items():
            package = to_mapping(to_mapping(result).get("fedimaging"))
            if package:
                said[site] = f"{to_text(package.get('version'))} ({to_text(package.get('sha256'))})"
    return {"sites": said} if said else {}


def _problems(report: dict[str, Any], failed: dict[str, Any], simulate: dict[str, Any]) -> list[str]:
    """What is missing from the run, one sentence each."""
    job, models = report["job"], report["cross_site"]
    done, planned = job["rounds_done"], job["rounds"]
    problems = []
    if not done:
        problems.append("The log holds no round of training: the report has no curves and no picked model.")
    elif not job["finished"]:
        of = f" of {planned}" if planned else ""
        problems.append(f"The job did not finish: its log ends after round {done}{of}, without an end.")
    elif planned and done < planned:
        problems.append(f"The job ended after {done} of {planned} rounds.")
    if failed and not job["finished"]:
        number, why = to_number(failed.get("round")), to_text(failed.get("reason"))
        problems.append(f"Round {int(number or 0) + 1} was not averaged, and the job ended there: {why}.")
    absent = [site for site in report["sites"] if not any(site in sites for sites in models.values())]
    if not models:
        problems.append(
            "The cross-site evaluation left no results: test figures, calibration and subgroups are missing."
        )
    elif absent:
        problems.append(f"No test results came from {_listing(absent)}.")
    packages = to_mapping(report["versions"].get("sites"))
    if len(set(packages.values())) > 1:
        said = "; ".join(f"{site} {package}" for site, package in sorted(packages.items()))
        problems.append(f"The hospitals did not all run the same fedimaging: {said}.")
    if simulate.get("ok") is False:
        problems.append("The simulation was recorded as failed.")
    return problems + [f"The simulation reported: {error}" for error in to_names(simulate.get("errors"))]


def _headline(report: dict[str, Any]) -> dict[str, Any]:
    """The model that the report leads with, its macro mean, and what happened in plain sentences."""
    models, key = report["cross_site"], report["key_metric"]["name"]
    model = next((name for name in ("best", "last", *models) if name in models), None)
    return {
        "model": model,
        "macro_mean": report["macro_mean"][model] if model else macro_mean({}, key),
        "summary": _summary(report),
        "cautions": [*_test_cautions(report, models.get(model, {})), *_participation_cautions(report)],
    }


def _summary(report: dict[str, Any]) -> list[str]:
    job, picked = report["job"], report["picked"]["after_rounds"]
    rows = [row["sites"] for row in report["participation"]]
    count = sum(any(row[site]["status"] == "took_part" for row in rows) for site in report["sites"])
    if not count:
        return []
    sentence = f"{_plural(count, 'hospital')} trained one model together over {_plural(job['rounds_done'], 'round')}."
    sentences = [sentence[0].upper() + sentence[1:]]
    if picked is not None:
        so_far = " so far" if report["picked"]["so_far"] else ""
        last = " (the last)" if picked == job["rounds_done"] else ""
        when = "before any training" if picked == 0 else f"after round {picked}{last}"
        sentences.append(f"The model picked is the one {when}, the best on validation{so_far}.")
    if job["leave_out"]:
        sentences.append(
            f"{job['leave_out']} was left out of training and of picking: its figures are those of a hospital that the "
            "model never saw, and no part of the macro mean."
        )
    if job["continues"] and job["start_round"]:
        before = _plural(int(job["start_round"]), "round")
        sentences.append(f"It continues job {job['continues']}, which was interrupted after {before}.")
    if job["simulated"]:
        sentences.append("This was a simulation: one machine played every hospital, each with its own images only.")
    else:
        sentences.append("The images stayed at the hospitals; weights, counts and aggregated figures travelled.")
    return sentences


def _test_cautions(report: dict[str, Any], evaluations: dict[str, Any]) -> list[str]:
    key, label = report["key_metric"]["name"], report["key_metric"]["label"]
    cautions, few = [], []
    for site, evaluation in evaluations.items():
        figure, cases = evaluation["metrics"].get(key, to_figure({}, key)), evaluation["cases"]
        low, high = figure["ci"] or (0, 0)
        if figure["value"] is None:
            cautions.append(f"{site} gives no {label} on its test cases, and the mean leaves it out.")
        elif high - low > WIDE_INTERVAL:
            cautions.append(f"The interval of {site} is wide, {low:.3f}–{high:.3f}: more test cases would tell more.")
        if cases is not None and cases < FEW_CASES:
            few.append(f"{site} ({cases})")
    if any(evaluation["personal"] for evaluation in evaluations.values()):
        cautions.insert(0, "Each hospital is judged by a model of its own, a part of which never left it.")
    return cautions + ([f"Few test cases: {_listing(few)}."] if few else [])


def _participation_cautions(report: dict[str, Any]) -> list[str]:
    cautions = []
    for site in report["sites"]:
        rows = [row["sites"][site] for row in report["participation"]]
        refused = [row["reason"] for row in rows if row["status"] == "refused"]
        missed = sum(row["status"] == "missing" for row in rows)
        if refused:
            codes = ", ".join(sorted(set(refused)))
            cautions.append(f"{site} refused in {len(refused)} of {len(rows)} rounds ({codes}).")
        if missed:
            cautions.append(f"{site} was missing in {missed} of {len(rows)} rounds.")
        if late := sum(row["status"] == "late" for row in rows):
            cautions.append(f"{site} answered too late in {late} of {len(rows)} rounds.")
    return cautions


def _plural(count: int, noun: str) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    return f"{words[count] if count < len(words) else count} {noun}{'' if count == 1 else 's'}"


def _listing(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _read_site_report(workspace: Path, site: str) -> dict[str, Any]:
    """Reads the per-case results that a site keeps to itself.

    Returns:
        {"site", "dataset", "models": {name: {"eval": evaluation, "cases": [...], the worst first}}}

    Raises:
        FedImagingError: the workspace holds no site_report.json of this site.
    """
    if site in ("", ".", "..") or Path(site).name != site:
        raise FedImagingError(f"{site!r} is no site's name: give it as the federation knows it, such as hospital-a")
    folders = [workspace / site / "simulate_job", workspace / site, workspace, *sorted((workspace / site).glob("*/"))]
    for folder in folders:
        content = _read_json(folder / SITE_FILE)
        if content is not None and content.get("site") == site:
            models = {_model_name(n): _site_model(to_mapping(m)) for n, m in to_mapping(content.get("models")).items()}
            return {"site": site, "dataset": to_text(content.get("dataset")), "models": models}
    raise FedImagingError(
        f"no {SITE_FILE} of {site} in {workspace}: per-case results exist only at the site; expected a simulation's "
        f"workspace (with {site}/simulate_job/{SITE_FILE}) or the run directory of the job at that site's client"
    )


def _site_model(model: dict[str, Any]) -> dict[str, Any]:
    cases = [_case(to_mapping(case)) for case in to_list(model.get("cases"))]
    return {
        "eval": read_evaluation(to_mapping(model.get("eval"))),
        "cases": sorted(cases, key=lambda case: -case["error"]),
    }


def _case(raw: dict[str, Any]) -> dict[str, Any]:
    """One case with its scores; `error` is the largest distance of a class score from its label, 0 to 1.

    A case without class scores (a segmentation) keeps its numbers by name, and its error is one minus its Dice.
    """
    label = raw.get("label")
    labels = [label] if isinstance(label, str) else to_names(label)
    if isinstance(raw.get("scores"), dict):
        scores = to_numbers(raw["scores"])
        distances = [abs((name in labels) - score) for name, score in scores.items() if score is not None]
        error = max(distances, default=0.0)
    else:
        scores = {name: to_number(item) for name, item in raw.items() if item is None or to_number(item) is not None}
        error = 1 - next((value for name, value in scores.items() if "dice" in name and value is not None), 1.0)
    image, patient = to_text(raw.get("image")) or "", to_text(raw.get("patient")) or ""
    return {"image": image, "patient": patient, "label": labels, "scores": scores, "error": error}
