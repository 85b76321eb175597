"""What a site lets a job name: the one source of the class allow-list, for the simulator and for kits."""

import json
from pathlib import Path

ALLOWED_CLASSES = (
    "fedimaging.federation.evaluation.CrossSiteEvaluation",
    "fedimaging.federation.executor.TrainerExecutor",
    "fedimaging.federation.persistor.NetworkPersistor",
    "fedimaging.federation.workflow.FederatedAveraging",
)


def write_resources(local: Path) -> None:
    """Writes ``local/resources.json`` for a simulator workspace: the allow-list, enforced, and nothing else."""
    resources = {
        "format_version": 2,
        "class_allow_list": list(ALLOWED_CLASSES),
        "class_list_enforcement_mode": "enforce",
    }
    (local / "resources.json").write_text(json.dumps(resources, indent=2) + "\n")
