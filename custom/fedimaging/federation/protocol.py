"""The words that server and sites exchange beside FLARE's own."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

REASON_HEADER: Final = "fedimaging.reason"
"""reply header: the code of a refusal (errors.Reason), nothing else"""
REPORT: Final = "fedimaging.report"
"""meta of a training result: cases, seconds, losses and memory of the round"""
VALIDATE_LAST: Final = "fedimaging.validate_last"
"""meta of a validate task: give the validation metrics only, as before a round of training"""
PERSISTOR_ID: Final = "persistor"
ROUNDS_FILE: Final = "rounds.jsonl"
START_MODELS_FILE: Final = "start_models.yml"
PROGRESS_FILE: Final = "progress.jsonl"
SITE_REPORT_FILE: Final = "site_report.json"
SIMULATED_JOB_ID: Final = "simulate_job"

Parameters = dict[str, NDArray[np.floating]]


def to_parameters(state: Mapping[str, Tensor]) -> Parameters:
    """A state_dict as FLARE sends it: float32 arrays."""
    return {key: value.detach().cpu().numpy() for key, value in state.items()}


def to_state(parameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """What arrived, as a state_dict; it is the network's affair whether names and shapes fit."""
    return {str(key): torch.as_tensor(np.asarray(value)) for key, value in parameters.items()}
