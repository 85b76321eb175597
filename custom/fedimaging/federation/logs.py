"""Log formatters of kits: what looks as if it named a patient is blanked before a line is written."""

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
_RELATIVE = re.compile(r"""(?<![\w./:@-])[\w.^@+-]+(?:/[\w.^@+-]+)+""")
_RATIO = re.compile(r"[\d.]+/[\d.]+|\w+/s|and/or")
_DICOM_NAME = re.compile(r"""[^\W\d_][\w.'-]*\^[\w^.'-]*|\^[^\W\d_][\w^.'-]*""")
_CASE = re.compile(r"(?i)\b((?:case|subject|study|series|exam|accession|mrn)(?:\s*[:=#]\s*|\s+))[\w^.-]*\d{4,}[\w^.-]*")
_NUMBERED = re.compile(r"(?<![\w.-])(?=[\w-]*[A-Za-z])[A-Za-z]{0,8}[_-]?\d{5,}(?:[_-]\w+)*(?![\w-])")
_UUID_OR_HASH = re.compile(r"(?i)[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{12,}")
_RAISED = re.compile(r"(\b\w*(?:Error|Exception|Warning|Interrupt|Exit): )(.*)")
_KNOWN = re.compile(r"[a-z_]\w*(?:\.[A-Za-z_]\w*)+|[a-z]+(?:-[a-z]+)*(?:-[a-z0-9]{1,3})")
"""a class that a job may not name, a layer that a model lacks; a participant such as hospital-a"""
_QUOTED = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\"""")


def redact(text: str) -> str:
    """Blanks what looks like the name of a patient or of an image.

    These are names and paths of images, other folders, DICOM UIDs and DICOM names (``DOE^JOHN``), letters with a number
    of five digits or more, numbers and values that follow words such as "patient" and "case", and what an exception
    quotes if it is neither a dotted name as of a class nor a participant's as hospital-a. A name in running text is not
    known as one, so no line of ours may hold one.

    A DICOM file often has no suffix: of paths only those to files that are certainly no images stay.
    """
    text = _IMAGE.sub("<image>", text)
    text = _PATH.sub(_path, _RELATIVE.sub(_path, text))
    text = _DICOM_NAME.sub("<name>", _UID.sub("<uid>", text))
    text = _CASE.sub(r"\1<number>", _PATIENT.sub(r"\1<patient>", text))
    text = _NUMBERED.sub(lambda found: found[0] if _UUID_OR_HASH.fullmatch(found[0]) else "<number>", text)
    return _RAISED.sub(lambda found: found[1] + _QUOTED.sub(_quoted, found[2]), text)


def _quoted(found: re.Match[str]) -> str:
    return found[0] if _KNOWN.fullmatch(found[0][1:-1]) else "<text>"


def _path(found: re.Match[str]) -> str:
    harmless = found[0].rstrip(".").endswith(_HARMLESS) or _RATIO.fullmatch(found[0])
    return found[0] if harmless else "<path>"


class TextFormatter(BaseFormatter):
    """FLARE's log line after :func:`redact`; tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class JsonLinesFormatter(JsonFormatter):
    """FLARE's JSON log line after :func:`redact`; it holds no tracebacks."""

    def formatMessageDict(self, record: logging.LogRecord) -> dict[str, Any]:  # noqa: N802 (FLARE's name)
        values: dict[str, Any] = super().formatMessageDict(record)
        return {name: redact(value) if isinstance(value, str) else value for name, value in values.items()}
