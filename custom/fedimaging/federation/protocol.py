"""The words that server and sites exchange beside FLARE's own."""

from typing import Final

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
