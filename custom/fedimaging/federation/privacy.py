"""The result filter of a site's default privacy scope: what it does not know does not leave."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import ContentBlockedException, Filter
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply

from fedimaging.errors import Reason
from fedimaging.federation.protocol import REASON_HEADER

_TEXT_LENGTH = 128
_DEPTH = 8


class OutgoingResults(Filter):
    """Lets weights of finite floats and plain metrics pass, and of a refusal its code only. All else is blocked.

    FLARE's own filters let pass what they do not understand; this one raises, and FLARE then sends an error code in
    place of the result.

    Args:
        max_metric_values: how many numbers and texts the metrics of one result may hold, which no image fits in.
    """

    def __init__(self, max_metric_values: int = 20000) -> None:
        super().__init__()
        if not isinstance(max_metric_values, int) or isinstance(max_metric_values, bool) or max_metric_values < 1:
            raise ValueError("max_metric_values must be a whole number above 0")
        self.max_metric_values = max_metric_values

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        code = shareable.get_return_code()
        if code != ReturnCode.OK:
            reason = shareable.get_header(REASON_HEADER)
            return make_reply(code, {REASON_HEADER: reason} if reason in set(Reason) else None)
        try:
            dxo = from_shareable(shareable)
        except Exception:
            raise ContentBlockedException("blocked: the result is no data exchange object") from None
        self._check(dxo)
        return shareable

    def _check(self, dxo: DXO) -> None:
        if dxo.data_kind in (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF):
            for name, value in dxo.data.items():
                _check_tensor(name, value)
            self._check_plain("the result's meta data", dxo.meta or {})
        elif dxo.data_kind == DataKind.METRICS:
            self._check_plain("the metrics", {"data": dxo.data, "meta": dxo.meta or {}})
        else:
            raise ContentBlockedException(f"blocked: results of the kind {dxo.data_kind!r} do not leave this site")

    def _check_plain(self, what: str, values: Mapping[str, Any]) -> None:
        count = 0
        for leaf in _leaves(values, 0):
            count += 1
            if not _is_plain(leaf):
                raise ContentBlockedException(
                    f"blocked: {what} hold a {type(leaf).__name__}, or a text or number unfit"
                )
        if count > self.max_metric_values:
            raise ContentBlockedException(f"blocked: {what} hold {count} values, more than {self.max_metric_values}")


def _check_tensor(name: Any, value: Any) -> None:
    if not isinstance(name, str) or not isinstance(value, np.ndarray) or not np.issubdtype(value.dtype, np.floating):
        raise ContentBlockedException("blocked: the weights hold something that is no array of floats")
    if not np.isfinite(value).all():
        raise ContentBlockedException("blocked: the weights are not finite")


def _leaves(value: Any, depth: int) -> Iterator[Any]:
    if depth > _DEPTH:
        raise ContentBlockedException("blocked: the result is nested too deep")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, depth + 1)
    else:
        yield value


def _is_plain(value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, str):
        return len(value) <= _TEXT_LENGTH and value.isprintable()
    return isinstance(value, int | float | np.number) and math.isfinite(value)
