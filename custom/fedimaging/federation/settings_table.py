"""The table of everything that a job may set, made of the typed settings: in jobs/README.md, and never by hand."""

import json
from collections.abc import Iterator
from typing import Any

from fedimaging.federation.evaluation import EvaluationSettings
from fedimaging.federation.workflow import WorkflowSettings
from fedimaging.networks import NETWORKS
from fedimaging.settings import Settings
from fedimaging.tasks import TASKS
from fedimaging.training.settings import TrainingSettings
from fedimaging.training.strategies import StrategySettings

_RENAMED = {"num_rounds": "rounds"}
_ELSEWHERE = {"name", "strategy", "fedimaging"}


def settings_table() -> str:
    """Markdown: one table for the rounds, the training, each task, network and strategy."""
    groups: list[tuple[str, str, type[Settings]]] = [
        ("Rounds, and who must take part", "", WorkflowSettings),
        ("Local training", "training.", TrainingSettings),
        *((f"Task `{name}`", "task.", task.settings_type) for name, task in sorted(TASKS.items())),
        *((f"Network `{name}`", "network.", network) for name, network in sorted(NETWORKS.items())),
        *((f"Strategy `{name}`", "training.strategy.", strategy) for name, strategy in _strategies()),
        ("Evaluation at the end (in the server's configuration only)", "", EvaluationSettings),
    ]
    return "\n".join(_table(*group) for group in groups if _fields(group[2]))


def _strategies() -> list[tuple[str, type[Settings]]]:
    return sorted((str(s.model_fields["name"].default), s) for s in StrategySettings.__subclasses__())


def _fields(settings: type[Settings]) -> list[str]:
    return [name for name in settings.model_fields if name not in _ELSEWHERE]


def _table(title: str, prefix: str, settings: type[Settings]) -> str:
    rows = "\n".join(_rows(prefix, settings))
    return f"**{title}**\n\n| setting | value | default | meaning |\n|---|---|---|---|\n{rows}\n"


def _rows(prefix: str, settings: type[Settings]) -> Iterator[str]:
    schema = settings.model_json_schema()
    for name in _fields(settings):
        part, field = schema["properties"][name], settings.model_fields[name]
        default = "needed" if field.is_required() else f"`{_text(field.get_default(call_default_factory=True))}`"
        meaning = _meaning(settings, name).replace("|", "\\|").replace("\n", " ")
        value = _value(part, schema.get("$defs", {})).replace("|", "\\|")
        yield f"| `{prefix}{_RENAMED.get(name, name)}` | {value} | {default} | {meaning} |"


def _meaning(settings: type[Settings], name: str) -> str:
    """What the setting's docstring says, in the class or in the one that it refines."""
    fields = (base.model_fields.get(name) for base in settings.__mro__ if issubclass(base, Settings))
    return next((field.description for field in fields if field is not None and field.description), "")


def _text(value: Any) -> str:
    """A default as JSON writes it, words without quotes."""
    if isinstance(value, Settings):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value)
    return value if isinstance(value, str) and value else json.dumps(value)


def _value(part: dict[str, Any], definitions: dict[str, Any]) -> str:
    """The values that a JSON schema allows, in words."""
    if "$ref" in part:
        return _value(definitions[part["$ref"].rsplit("/", 1)[1]], definitions)
    if "anyOf" in part:
        return " or ".join(_value(one, definitions) for one in part["anyOf"])
    if choices := part.get("enum") or [part[key] for key in ("const",) if key in part]:
        return ", ".join(f"`{one}`" for one in choices)
    if part.get("properties"):
        return ", ".join(f"`{name}`" for name in part["properties"])
    words = {"integer": "whole number", "boolean": "true, false", "string": "text", "array": "list"}
    word = words.get(part["type"], part["type"])
    if "items" in part:
        return f"{word} of {_value(part['items'], definitions)}"
    low = part.get("minimum", part.get("exclusiveMinimum"))
    high = part.get("maximum", part.get("exclusiveMaximum"))
    return word if low is None or high is None else f"{word} {low} to {high}"
