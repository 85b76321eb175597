"""Log formatters of kits: what could name a patient is blanked before a line is written."""

import logging
import re
from typing import Any

from nvflare.fuel.utils.log_utils import BaseFormatter, JsonFormatter

_IMAGE_SUFFIX = r"\.(?:dcm|dicom|ima|nii(?:\.gz)?|mha|nrrd|png|jpe?g|tiff?|bmp|npz|npy)\b"
_IMAGE = re.compile(
    rf"""'[^'\n]*{_IMAGE_SUFFIX}'|"[^"\n]*{_IMAGE_SUFFIX}"|(?<![\w:/])/[^'"\n:]*?{_IMAGE_SUFFIX}|[^\s'"`,;:()]+{_IMAGE_SUFFIX}""",
    re.IGNORECASE,
)
_PATH = re.compile(r"""(?<![\w.:/])/[^\s'"`,;:()\[\]{}<>]+""")
_HARMLESS = (".py", ".json", ".jsonl", ".yml", ".yaml", ".txt", ".pt", ".fl", ".sh", ".crt", ".pem", ".so")
_UID = re.compile(r"(?<![\w.])\d+(?:\.\d+){5,}(?![\w.])")
_PATIENT = re.compile(
    r"""(?i)\b(patient(?:[ _]?(?:id|name))?(?:\s*[:=]\s*|\s+))(?:'[^'\n]*'|"[^"\n]*"|[\w^.-]*[\d^][\w^.-]*)"""
)


def redact(text: str) -> str:
    """Blanks names and paths of images, other folders, DICOM UIDs, and values that follow the word "patient".

    A DICOM file often has no suffix: of absolute paths only those to files that are certainly no images stay.
    """
    text = _IMAGE.sub("<image>", text)
    text = _PATH.sub(lambda found: found[0] if found[0].rstrip(".").endswith(_HARMLESS) else "<path>", text)
    return _PATIENT.sub(r"\1<patient>", _UID.sub("<uid>", text))


class TextFormatter(BaseFormatter):
    """FLARE's log line without patient identifiers; tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class JsonLinesFormatter(JsonFormatter):
    """FLARE's JSON log line without patient identifiers; it holds no tracebacks."""

    def formatMessageDict(self, record: logging.LogRecord) -> dict[str, Any]:  # noqa: N802 (FLARE's name)
        values: dict[str, Any] = super().formatMessageDict(record)
        return {name: redact(value) if isinstance(value, str) else value for name, value in values.items()}
