"""Drives FLARE's admin console as a person does: a startup kit's ``fl_admin.sh`` in a terminal of its own."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pexpect

from fedimaging.simulator import stop_process_tree

_PROMPT = r"(?:^|\n)> "
_CONFIRM_USER, _CONFIRM = "Confirm with User Name: ", r"Are you sure \(y/N\): "
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
_DONE = re.compile(r"^Done \[\d+ usecs\].*\n?", re.MULTILINE)


class LoginRefusedError(Exception):
    """The console ended before it was ready; the message is what it said."""


class AdminConsole:
    """A session of FLARE's admin console, as a context manager.

    Args:
        kit: the startup kit of an admin user.
        user: the name that is typed at ``User Name:``, the one in the kit's certificate.
        command: what to run instead of the kit's ``startup/fl_admin.sh``, for example ``kit.py start``.
        environment: of the console (default: this process's); its ``python3`` must be one that has nvflare.
        timeout: seconds that the console has for the login and for each reply.

    Raises:
        LoginRefusedError: the server, or the console itself, let nobody in.
    """

    def __init__(
        self,
        kit: Path,
        user: str,
        *,
        command: list[str] | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> None:
        self.user, self._timeout = user, timeout
        program, *arguments = command or ["/bin/bash", str(kit / "startup" / "fl_admin.sh")]
        self.process = pexpect.spawn(
            program,
            arguments,
            cwd=str(kit),
            # A dumb and very wide terminal: no colours, and no echoed line is broken.
            env={**(os.environ if environment is None else environment), "TERM": "dumb"},
            dimensions=(100, 4000),
            encoding="utf-8",
            timeout=timeout,
        )
        self.greeting = ""
        try:
            # A console told to take the name from the certificate asks for none.
            if self.process.expect(["User Name: ", _PROMPT, pexpect.EOF]) == 0:
                self.process.sendline(user)
                self.process.expect([_PROMPT, pexpect.EOF])
            self.greeting = self._said()
            if not self.process.isalive() or self.process.after is pexpect.EOF:
                raise LoginRefusedError(self.greeting)
            # FLARE gives a reply five seconds, which a busy machine may not keep.
            self.send(f"timeout {timeout}")
        except BaseException:
            self.close()
            raise

    def send(self, command: str, timeout: float | None = None) -> str:
        """Types a command, confirms it where it must be, and returns the reply without echo and time.

        The reply to a command that ends the console (``bye``, ``shutdown server``) is all that it said until its end.
        """
        self.process.sendline(command)
        patience = self._timeout if timeout is None else timeout
        replies = []
        while True:
            asked = self.process.expect([_PROMPT, pexpect.EOF, _CONFIRM_USER, _CONFIRM], timeout=patience)
            replies.append(self._said().partition("\n")[2])  # without the echo of what was typed
            if asked <= 1:
                return _DONE.sub("", "".join(replies)).strip()
            self.process.sendline(self.user if asked == 2 else "y")

    def submit(self, job: Path) -> str:
        """Submits a job folder, into which the console writes signatures. Returns the job's ID."""
        reply = self.send(f"submit_job {job}")
        found = re.search(r"Submitted job: (\S+)", reply)
        if found is None:
            raise AssertionError(f"{job} was not submitted: {reply}")
        return found[1]

    def finished(self, job_id: str, timeout: float = 900) -> dict[str, Any]:
        """Waits until a job has ended, whichever way. Returns what the server keeps of it, with its ``status``."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            meta: dict[str, Any] = json.loads(self.send(f"list_jobs -d {job_id}"))
            if meta["status"].startswith("FINISHED"):
                return meta
            time.sleep(0.5)
        raise TimeoutError(f"job {job_id} has not ended after {timeout:.0f} s: {meta['status']}")

    def download(self, job_id: str) -> Path:
        """Downloads a job's result into the kit's ``transfer/``. Returns its folder."""
        reply = self.send(f"download_job {job_id}")
        found = re.search(r"content downloaded to (\S+)", reply)
        if found is None:
            raise AssertionError(f"job {job_id} was not downloaded: {reply}")
        return Path(found[1]).resolve()

    def close(self) -> None:
        """Says good-bye, and ends whatever is left of the console."""
        if self.process.isalive():
            try:
                self.process.sendline("bye")
                self.process.expect(pexpect.EOF, timeout=10)
            except (pexpect.TIMEOUT, OSError):
                stop_process_tree(self.process.pid)
        self.process.close(force=True)

    def __enter__(self) -> AdminConsole:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _said(self) -> str:
        return _ESCAPES.sub("", self.process.before or "")
