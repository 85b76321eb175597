"""What a job asks of a site's data, read from its configuration and told in plain words."""

import json
import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedimaging.errors import FedImagingError
from fedimaging.governance.grants import (
    GRANTS_FILE,
    Kind,
    NoConsentError,
    Request,
    config_hash,
    decide,
    read_grants,
)
from fedimaging.governance.ledger import read_records, rounds_used


@dataclass(frozen=True)
class Asked:
    """A job as a site got it, or is to get it.

    Args:
        settings: the arguments of its trainer, not validated.
        rounds: of training, as its server configuration says; None if that is not with it.
        leave_out: the site that is not to train, as that configuration says; empty for none.
        submitter: as the ledger knows them; empty before the first task.
    """

    name: str
    job_id: str | None
    config: str
    settings: dict[str, Any]
    rounds: int | None
    leave_out: str = ""
    submitter: str = ""
    role: str = ""
    signed: bool = False

    @property
    def dataset(self) -> str:
        return str(self.settings.get("dataset", "?"))

    def request(self, kind: Kind) -> Request:
        return Request(
            self.dataset,
            self.name,
            self.config,
            self.submitter,
            self.role,
            self.signed,
            kind,
            counts=kind is Kind.TRAIN,
        )


def find_job(site: Path, job: str) -> Asked:
    """A job by its id, of which FLARE left a folder at the site, or by the path of a job folder.

    Raises:
        FedImagingError: there is none, or it is no job of this programme.
    """
    deployed = Path(job).name == job and (site / job / "meta.json").is_file()
    folder = site / job if deployed else Path(job)
    configs = sorted(folder.glob("*/config/config_fed_client.json"))
    if len(configs) != 1:
        known = sorted({str(record.get("job_id")) for record in read_records(site)})
        hint = f"; jobs of this site: {', '.join(known[-10:])}" if known else ""
        raise FedImagingError(f"{job}: neither the id of a job at this site nor a job folder{hint}")
    raw = configs[0].read_bytes()
    try:
        meta = json.loads((folder / "meta.json").read_text())
        (executor,) = json.loads(raw)["executors"]
        name, settings, said = str(meta["name"]), dict(executor["executor"]["args"]), config_hash(raw)
    except (OSError, ValueError, KeyError, TypeError):
        raise FedImagingError(f"{folder}: no job of this programme") from None
    workflow = _workflow(configs[0].with_name("config_fed_server.json"))
    rounds, leave_out = workflow.get("num_rounds"), str(workflow.get("leave_out", ""))
    asked = Asked(name, job if deployed else None, said, settings, rounds, leave_out)
    lines = [record for record in read_records(site) if deployed and record.get("job_id") == job]
    if not lines:
        return asked
    last = lines[-1]
    return replace(
        asked, submitter=str(last.get("submitter")), role=str(last.get("role")), signed=last.get("signed") is True
    )


def _workflow(path: Path) -> dict[str, Any]:
    """The arguments of the server's workflow; none if its configuration is not there."""
    try:
        workflows = json.loads(path.read_text())["workflows"]
        return dict(next(w["args"] for w in workflows if "num_rounds" in w.get("args", {})))
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return {}


def in_words(asked: Asked, site: Path) -> list[tuple[str, str]]:
    """What the job asks for and what would leave, as lines of (what, words)."""
    from fedimaging.training.declared import declare
    from fedimaging.training.settings import JobSettings

    settings = JobSettings(asked.settings)
    declared, task, training = declare(settings), settings.task, settings.training
    size = sum(4 * math.prod(shape) for shape in declared.update.values()) / 1e6
    rounds = "as many rounds as the server says" if asked.rounds is None else f"{asked.rounds} rounds"
    metrics = ", ".join(name for name in declared.metrics.model_fields if name != "cases")
    train = f"train (not at {asked.leave_out})" if asked.leave_out else "train"
    return [
        ("job", asked.name + (f" ({asked.job_id})" if asked.job_id else ", not sent to this site yet")),
        ("submitted by", _who(asked)),
        ("data", f"the dataset {asked.dataset}"),
        ("to do", f"{train} for {rounds} of {training.epochs} epoch{'s' * (training.epochs > 1)}, and evaluate"),
        ("task", f"{task.settings.name}: {', '.join(task.settings.classes)}; inputs of {_sides(task.input_shape)}"),
        ("network", f"{settings.network.name}, {training.strategy.name}"),
        ("leaves each round", f"{len(declared.update)} tensors of model weights, {size:.1f} MB; {metrics}; counts"),
        ("leaves at the end", f"figures of the model: {', '.join(declared.evaluation.model_fields)}"),
        ("never leaves", "images, labels, names and results of cases, counts below the site's minimum"),
        ("configuration", asked.config),
        *[(f"granted to {kind}?", _verdict(asked, kind, site)) for kind in (Kind.TRAIN, Kind.EVALUATE)],
    ]


def _verdict(asked: Asked, kind: Kind, site: Path) -> str:
    try:
        grants = read_grants(site / "local" / GRANTS_FILE)
        grant = decide(grants, asked.request(kind), rounds_used(site), datetime.now(UTC))
    except NoConsentError as error:
        return "no: " + str(error).partition("; `python")[0]
    return f"yes, by the grant {grant.id}"


def _who(asked: Asked) -> str:
    if asked.job_id is None:
        return "nobody yet: this is a folder"
    if not asked.submitter:
        return "nobody that is known here"
    proof = "proven by their signature" if asked.signed else "the server says so; no signature proves it"
    return f"{asked.submitter} ({asked.role}), {proof}"


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
