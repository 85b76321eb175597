"""The one error that users see, and the fixed codes that are all a server learns of it."""

from enum import StrEnum


class Reason(StrEnum):
    """Why a site refused. A code and nothing else may leave the site: no path, name or value."""

    BAD_SETTING = "bad_setting"
    WRONG_VERSION = "wrong_version"
    NO_DATASET = "no_dataset"
    BAD_MANIFEST = "bad_manifest"
    UNREADABLE_IMAGES = "unreadable_images"
    TOO_FEW_CASES = "too_few_cases"
    ONE_CLASS = "one_class"
    BAD_MODEL = "bad_model"
    NOT_FINITE = "not_finite"
    NO_DISK_SPACE = "no_disk_space"
    OUT_OF_MEMORY = "out_of_memory"
    NO_CONSENT = "no_consent"
    STOPPED_AT_GATE = "stopped_at_gate"
    NO_GATE = "no_gate"
    UNKNOWN_TASK = "unknown_task"
    INTERNAL = "internal"


class FedImagingError(Exception):
    """A mistake or a refusal that the user can mend.

    Args:
        message: one line for the site's own eyes: what, where, what to do.
        reason: the code that may be told to the server.
    """

    def __init__(self, message: str, reason: Reason = Reason.BAD_SETTING) -> None:
        super().__init__(message)
        self.reason = reason
