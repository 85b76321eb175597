"""What a site's or the server's long-lived process does besides FLARE's own: it says what it is, and stops cleanly."""

import signal
import threading
from collections.abc import Callable

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext

from fedimaging import __version__
from fedimaging.version import package_hash


class LongLivedProcess(FLComponent):
    """Logs version and hash at the start, and takes SIGTERM for what the console's ``shutdown`` is.

    FLARE has no handler of its own: SIGTERM would end it at once, and the server would wait for it.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.SYSTEM_START:
            self.log_info(fl_ctx, f"fedimaging {__version__} ({package_hash()})")
            engine = fl_ctx.get_prop(ReservedKey.ENGINE)
            shutdown = getattr(engine, "shutdown", None) or engine.shutdown_server
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, lambda *_: _once(shutdown))


def _once(shutdown: Callable[[], str]) -> None:
    """Shuts down outside the signal's handler, which may have interrupted somebody who holds a lock."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=shutdown, name="shutdown", daemon=True).start()
