"""The types of what a task may let leave a site beside weights: finite scalars, counts, and curves in fixed bins.

A task declares its metrics and its evaluation as classes of :class:`Outgoing`; what such a class does not name does not
leave. The validation context (:class:`Context`) holds what depends on the job and the site.
"""

from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, TypedDict, TypeVar, cast

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo

from fedimaging import __version__
from fedimaging.tasks.statistics import CALIBRATION_BINS, ROC_BINS, Groups
from fedimaging.version import package_hash

_LARGEST_COUNT: Final = 2**31 - 1
_LARGEST_MEMORY: Final = 2**44
_LARGEST_FLOAT: Final = float(np.finfo(np.float32).max)
_LONGEST: Final = 1e7
"""seconds; four months"""
_FARTHEST: Final = 1e4
"""mm; no volume has a longer diagonal"""


class Context(TypedDict):
    """What a declaration depends on."""

    minimum: int
    """the smallest count above zero that may leave"""
    classes: tuple[str, ...]
    epochs: int
    groups: Groups
    """the subgroups of the site's own cases, by covariate"""


class Outgoing(BaseModel):
    """Figures that may leave a site. Nothing is coerced, nothing undeclared or not finite passes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _only(allowed: Callable[[Any, Context], bool], what: str) -> AfterValidator:
    """Refuses a value that is not ``allowed``; the message is ``what`` and never the value."""

    def check(value: Any, info: ValidationInfo) -> Any:
        if not allowed(value, cast(Context, info.context)):
            raise ValueError(what)
        return value

    return AfterValidator(check)


Share = Annotated[float, Field(ge=0, le=1)]
Loss = Annotated[float, Field(ge=-_LARGEST_FLOAT, le=_LARGEST_FLOAT)]
Seconds = Annotated[float, Field(ge=0, le=_LONGEST)]
Distance = Annotated[float, Field(ge=0, le=_FARTHEST)]
"""in mm"""
_Rising = _only(lambda values, _: values == sorted(values), "values that do not rise")
ShareInterval = Annotated[list[Share], Field(min_length=2, max_length=2), _Rising]
DistanceInterval = Annotated[list[Distance], Field(min_length=2, max_length=2), _Rising]
ShareQuartiles = Annotated[list[Share], Field(min_length=3, max_length=3), _Rising]
DistanceQuartiles = Annotated[list[Distance], Field(min_length=3, max_length=3), _Rising]
Count = Annotated[
    int,
    Field(ge=0, le=_LARGEST_COUNT),
    _only(lambda count, context: not 0 < count < context["minimum"], "a count below the minimum"),
]
"""of cases or patients: zero, or at least the site's minimum"""
ClassKey = Annotated[str, _only(lambda name, context: name in context["classes"], "none of the job's classes")]
Losses = Annotated[
    list[Loss],
    Field(min_length=1),
    _only(lambda values, context: len(values) <= context["epochs"], "more values than epochs"),
]
Covariate = Literal["age_group", "sex", "vendor", "view"]
Figures = TypeVar("Figures")
Subgroups = Annotated[
    dict[Covariate, dict[str, Figures]],
    _only(
        lambda groups, context: all(set(of) <= set(context["groups"].get(name, ())) for name, of in groups.items()),
        "none of the groups of the site's own cases",
    ),
]
"""figures by covariate and group; a group's name is one that the site's manifest has, and simple"""

_STEPS = np.linspace(0, 1, ROC_BINS + 1).round(4).tolist()


class RocCurve(Outgoing):
    """The true positive rate at equal steps of the false positive rate; it rises, and holds no score of a case."""

    fpr: Annotated[list[Share], _only(lambda rates, _: rates == _STEPS, "not the fixed steps")]
    tpr: Annotated[
        list[Share],
        Field(min_length=ROC_BINS + 1, max_length=ROC_BINS + 1),
        _only(lambda rates, _: rates == sorted(rates), "a curve that falls"),
    ]


class CalibrationBin(Outgoing):
    confidence: Share | None
    accuracy: Share | None


class Calibration(Outgoing):
    """A reliability diagram in fixed bins."""

    ece: Share
    bins: Annotated[list[CalibrationBin], Field(max_length=CALIBRATION_BINS)]
    brier: Annotated[float, Field(ge=0, le=1000)]
    """squared errors summed over the classes, of which a job has at most 1000"""


class PackageFigures(Outgoing):
    """Which version of this package made a result: the one that runs here, and no other text."""

    version: Annotated[str, _only(lambda version, _: version == __version__, "another version than this")]
    sha256: Annotated[str, _only(lambda digest, _: digest == package_hash(), "another package than this")]


class RoundFigures(Outgoing):
    """A round of training: how many cases, how long, how well."""

    cases: Count
    seconds: Seconds
    loss: Loss
    epoch_losses: Losses
    skipped: Count | None
    peak_memory: Annotated[int, Field(ge=0, le=_LARGEST_MEMORY)]
    fedimaging: PackageFigures


class SplitCounts(Outgoing):
    cases: Count | None
    classes: dict[ClassKey, Count | None]


class Evaluation(Outgoing):
    """What every task tells of a model on a site's test split; a task adds its own figures."""

    split: Literal["test"]
    task: Literal["classification", "segmentation"]
    cases: Count | None
    patients: Count | None
    min_cell: Annotated[int, Field(ge=1, le=_LARGEST_COUNT)]
    classes: dict[ClassKey, Count | None]
    training: SplitCounts
    validation: SplitCounts
    skipped: Count | None
    seconds: Seconds
    judged: Literal["personal", "global"]


def fault(figures: Any, declared: type[Outgoing], context: Context) -> str | None:
    """What is wrong with figures by their declaration, in words that quote none of them; None if nothing is."""
    try:
        declared.model_validate(figures, context=context)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        if first["type"] == "extra_forbidden":
            return f"a figure that {declared.__name__} does not declare"
        # Names of fields are ours; a key of a dictionary could be anything.
        known = _field_names(declared)
        names = [part if isinstance(part, str) and part in known else "..." for part in first["loc"]]
        what = first["msg"].removeprefix("Value error, ") if first["type"] == "value_error" else first["type"]
        return f"{'.'.join(names) or 'the figures'}: {what.replace('_', ' ')}"
    return None


def _field_names(declared: type[BaseModel]) -> set[str]:
    names: set[str] = set()
    waiting: list[Any] = [declared]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names |= set(kind.model_fields)
            waiting += [field.annotation for field in kind.model_fields.values()]
        else:
            waiting += getattr(kind, "__args__", ())
    return names
