"""The words that server and sites exchange beside FLARE's own."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

REASON_HEADER: Final = "fedimaging.reason"
"""reply header: the code of a refusal (errors.Reason), nothing else"""
REPORT: Final = "fedimaging.report"
"""meta of a training result: cases, seconds, losses and memory of the round"""
COUNTED: Final = "fedimaging.counted"
"""meta of a train task where the strategy asks for it: {site: the last round whose mean its result is in}"""
VALIDATE_LAST: Final = "fedimaging.validate_last"
"""meta of a validate task: give the validation metrics only, as before a round of training"""
SERVER_MODEL: Final = "SRV_"
"""how FLARE's cross-site evaluation begins the name of a model of the server: SRV_best, SRV_last"""
EVALUATE_AT: Final = "fedimaging.evaluate_at"
"""property of the server's context: the sites that are asked for the cross-site evaluation"""
PERSISTOR_ID: Final = "persistor"
CLIENT_CONFIG: Final = "config_fed_client.json"
"""a job's configuration for sites, in its app/config"""
SERVER_CONFIG: Final = "config_fed_server.json"
ROUNDS_FILE: Final = "rounds.jsonl"
START_MODELS_FILE: Final = "start_models.yml"
PROGRESS_FILE: Final = "progress.jsonl"
SITE_REPORT_FILE: Final = "site_report.json"
STRATEGY_FILE: Final = "strategy.pt"
"""in a site's run directory: what the strategy keeps there, readable by its owner alone"""
STRATEGY_STATE: Final = "strategy"
"""in the file of the last global model: what the server's half of the strategy keeps"""
SELECTION: Final = "selection"
"""in the file of the best global model: its index and its value, as :class:`ModelSelection` counts"""
SIMULATED_JOB_ID: Final = "simulate_job"


def to_parameters(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A state_dict as FLARE sends it: arrays by name."""
    return {key: value.detach().cpu().numpy() for key, value in state.items()}


def to_state(parameters: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What arrived, as a state_dict; whether names and shapes fit is checked where it is loaded."""
    return {str(key): torch.as_tensor(np.asarray(value)) for key, value in parameters.items()}
