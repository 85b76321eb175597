"""The gate: the site's last filter on what leaves. A result holds what the job declares, or nothing of it leaves.

It stands in the default scope of the site's ``privacy.json``. FLARE runs a scope's filters before a job's own, so the
executor refuses a job that has any, and refuses to work where the gate is not the last filter. What passes is built
anew from what was checked, so that nothing travels beside it, and is in the ledger before it goes.

The gate guards against mistakes and against results that were tampered with, not against hostile code in its own
process: that is what the signed kit and the allow-list are for. Nor can it see a message in the low bits of weights.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.filter import ContentBlockedException, Filter
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants

from fedimaging.errors import FedImagingError, Reason
from fedimaging.federation.custody import Custody
from fedimaging.federation.protocol import REASON_HEADER, REPORT
from fedimaging.tasks.declared import Context, Outgoing, fault
from fedimaging.tasks.statistics import MIN_CELL
from fedimaging.training.declared import DTYPE, DeclaredResult, Shapes

_CODES = {value for name, value in vars(ReturnCode).items() if name.isupper()}
_CONTENT = {ReservedHeaderKey.HEADERS, "DXO"}

Tensors = Mapping[str, np.ndarray[Any, Any]]


class StoppedError(Exception):
    """A result holds what its job does not declare. The message quotes nothing of it."""


@dataclass(frozen=True)
class Checked:
    """A result that may leave, with nothing beside.

    Args:
        kind: FLARE's DataKind.
        tensors: the model update, empty for metrics.
        figures: all else, as decoded from its canonical JSON.
        size: bytes of the canonical form.
        sha256: of the canonical form: one line of JSON (kind; name, dtype and shape of each tensor in order of names;
            figures), then the tensors' bytes in that order.
        cases: how many cases it rests on, as it says itself.
    """

    kind: str
    tensors: Tensors
    figures: dict[str, Any]
    size: int
    sha256: str
    cases: int | None

    def to_shareable(self) -> Shareable:
        if self.kind == DataKind.METRICS:
            return DXO(self.kind, data=self.figures).to_shareable()
        return DXO(self.kind, data=dict(self.tensors), meta=self.figures).to_shareable()


class Gate(Filter):
    """Lets pass what the running job declares, and of a refusal its code only.

    Args:
        minimum: the smallest count above zero that may leave; a site may raise it in its ``privacy.json``, and then
            keeps back results that rest on fewer cases.
    """

    def __init__(self, minimum: int = MIN_CELL) -> None:
        super().__init__()
        if not isinstance(minimum, int) or isinstance(minimum, bool) or minimum < MIN_CELL:
            raise ValueError(f"minimum must be a whole number, {MIN_CELL} or more")
        self.minimum = minimum

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        custody = Custody.current
        task = custody.task if custody is not None else None
        code = shareable.get_return_code()
        if code != ReturnCode.OK:
            reason = shareable.get_header(REASON_HEADER)
            known = reason if reason in set(Reason) else None
            if task is not None:
                task.close(f"refused: {known or 'error'}")
            return refusal(known, code if code in _CODES else ReturnCode.EXECUTION_EXCEPTION)
        if custody is None or task is None or task.closed:
            raise ContentBlockedException("blocked: the result is of no task that this site has in hand")
        try:
            checked = check(
                shareable, task.entry.task, custody.declared, custody.declared.context(self.minimum, custody.groups())
            )
            task.release(checked.cases, checked.size, checked.sha256)
        except StoppedError as stopped:
            self.log_error(fl_ctx, f"stopped at the gate: {stopped}", fire_event=False)
            task.close(f"stopped: {stopped}")
            return refusal(Reason.STOPPED_AT_GATE)
        except FedImagingError as error:
            self.log_error(fl_ctx, f"kept back ({error.reason.value}): {error}", fire_event=False)
            return refusal(error.reason)
        reply = checked.to_shareable()
        if task.entry.round is not None:
            reply.set_header(AppConstants.CURRENT_ROUND, task.entry.round)
        return reply


def refusal(reason: str | None, code: str = ReturnCode.EXECUTION_EXCEPTION) -> Shareable:
    """What the server learns of a refusal: FLARE's return code and the reason's code."""
    return make_reply(code, {REASON_HEADER: str(reason)} if reason else None)


def check(shareable: Shareable, task: str, declared: DeclaredResult, context: Context) -> Checked:
    """Compares a result with what its job declares, its figures in the context of the site.

    Raises:
        StoppedError: it holds anything else, lacks anything, or is not finite.
    """
    dxo = _content(shareable)
    meta, data = dict(dxo.meta or {}), dxo.data
    if task == AppConstants.TASK_VALIDATION:
        _require(dxo.data_kind == DataKind.METRICS, "the answer to a validation is no metrics")
        _require(not meta, "metrics with meta data")
        whole = "split" in data
        _figures("metrics", data, declared.evaluation if whole else declared.metrics, context)
        return _checked(dxo, data.get("cases"), declared)
    _require(dxo.data_kind == DataKind.WEIGHTS, "the update is of another kind than weights")
    if task == AppConstants.TASK_SUBMIT_MODEL:
        _tensors(data, declared.weights)
        _require(not meta, "a model with meta data")
        return _checked(dxo, None, declared)
    _tensors(data, declared.update)
    wanted = {MetaKey.INITIAL_METRICS, MetaKey.NUM_STEPS_CURRENT_ROUND, REPORT}
    _require(set(meta) == wanted, "other meta data than declared")
    _figures("metrics", meta[MetaKey.INITIAL_METRICS], declared.metrics, context)
    _figures("report", meta[REPORT], declared.figures, context)
    cases = meta[REPORT]["cases"]
    weight = meta[MetaKey.NUM_STEPS_CURRENT_ROUND]
    _require(type(weight) is int and weight == cases, "a weight that is not the number of cases")
    return _checked(dxo, cases, declared)


def _content(shareable: Shareable) -> DXO:
    _require(set(shareable) <= _CONTENT, "something beside the data exchange object")
    try:
        return from_shareable(shareable)
    except Exception:
        raise StoppedError("no data exchange object") from None


def _tensors(tensors: Any, declared: Shapes) -> None:
    for name, shape in declared.items():
        value = tensors.get(name)
        _require(type(value) is np.ndarray, f"the update lacks the tensor {name}")
        _require(value.dtype.str == DTYPE, f"{name} is of another dtype than {DTYPE}")
        _require(value.shape == shape, f"{name} is of another shape than {shape}")
        _require(bool(np.isfinite(value).all()), f"{name} is not finite")
    extra = len(tensors) - len(declared)
    _require(extra == 0, f"the update holds {extra} tensors that are not declared")


def _figures(what: str, figures: Any, declared: type[Outgoing], context: Context) -> None:
    wrong = fault(figures, declared, context)
    _require(wrong is None, f"{what}: {wrong}")


def _checked(dxo: DXO, cases: int | None, declared: DeclaredResult) -> Checked:
    """The canonical form of a result whose parts are all declared."""
    tensors, figures = (dxo.data, dxo.meta or {}) if dxo.data_kind == DataKind.WEIGHTS else ({}, dxo.data)
    text = json.dumps(figures, sort_keys=True, separators=(",", ":"), allow_nan=False)
    _require(len(text) <= declared.figures_bytes, f"figures of more than {declared.figures_bytes} bytes")
    ordered = [(name, np.ascontiguousarray(tensors[name])) for name in sorted(tensors)]
    index = [[name, value.dtype.str, value.shape] for name, value in ordered]
    head = f"{json.dumps([dxo.data_kind, index], separators=(',', ':'))}{text}\n".encode()
    digest = hashlib.sha256(head)
    for _, value in ordered:
        digest.update(value.data)
    size = len(head) + sum(value.nbytes for _, value in ordered)
    return Checked(dxo.data_kind, tensors, json.loads(text), size, digest.hexdigest(), cases)


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise StoppedError(what)
