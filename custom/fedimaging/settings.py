"""The base of all typed settings: plain values only, checked by type and range, refused by name."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from fedimaging.errors import FedImagingError, Reason

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
ClassName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _+-]{0,63}$")]
_CLAUSE = r"(?:~=|==|!=|<=|>=|<|>)[0-9][0-9a-z.]{0,31}"
Specifier = Annotated[str, StringConstraints(pattern=rf"^{_CLAUSE}(?:,{_CLAUSE}){{0,3}}$")]
"""the versions of this package that a job runs on, a PEP 440 specifier such as ``~=0.1.0`` or ``>=0.1,<0.2``"""
ANY_VERSION = ">=0"


class Settings(BaseModel):
    """Settings that a job may make. No path, URL, class path or object gets through; nothing is coerced."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


S = TypeVar("S", bound=Settings)


def holds_placeholder(config: Any) -> bool:
    """Whether any text of a decoded configuration holds a brace, which FLARE may replace by an environment variable."""
    if isinstance(config, Mapping):
        return any(holds_placeholder(part) for item in config.items() for part in item)
    if isinstance(config, list):
        return any(holds_placeholder(part) for part in config)
    return isinstance(config, str) and "{" in config


def parse(settings: type[S], raw: Any, where: str) -> S:
    """Validate ``raw`` as ``settings``; the message names the setting at fault, never its value."""
    if not isinstance(raw, Mapping):
        raise FedImagingError(f"{where}: expected settings as an object with names and values", Reason.BAD_SETTING)
    try:
        return settings.model_validate(dict(raw))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join([where, *(str(part) for part in first["loc"])])
        message = re.sub(r"\s+", " ", first["msg"])
        if first["type"] == "extra_forbidden":
            known = f"; known here: {', '.join(sorted(settings.model_fields))}" if len(first["loc"]) == 1 else ""
            message = f"unknown setting{known}"
        elif first["type"] == "union_tag_invalid":
            message = f"unknown name; choose one of {first['ctx']['expected_tags']}"
        elif first["type"] == "union_tag_not_found":
            message = "name is missing"
        raise FedImagingError(f"{name}: {message}", Reason.BAD_SETTING) from None
