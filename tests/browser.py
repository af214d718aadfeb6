"""A real browser without a screen: Chromium, driven by its DevTools protocol over a pipe. No port, no other package.

Everything that it writes goes into one directory, which is removed with it; so are all its processes.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)

_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-crash-reporter",
        "--disable-breakpad",
    ),
    *("--disable-features=Translate,OptimizationHints,MediaRouter", "--no-first-run", "--mute-audio", "--no-zygote"),
    *("--hide-scrollbars", "--remote-debugging-pipe"),
)
_DEADLINE_S = 60.0
"""Longest wait for anything that the browser says."""


class Browser:
    """One page of a browser. `with Browser() as browser:`"""

    def __enter__(self) -> Browser:
        assert CHROMIUM is not None
        self.folder = Path(tempfile.mkdtemp(prefix="browser-"))
        here = {
            name: str(self.folder)
            for name in ("HOME", "TMPDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR")
        }
        commands_in, self._commands = os.pipe()
        self._answers, answers_out = os.pipe()
        script = f'exec "$@" 3<&{commands_in} 4>&{answers_out}'
        self._process = subprocess.Popen(
            [
                "bash",
                "-c",
                script,
                "bash",
                CHROMIUM,
                *_FLAGS,
                f"--user-data-dir={self.folder / 'profile'}",
                "about:blank",
            ],
            pass_fds=(commands_in, answers_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a group of its own, to be ended as one
            env={**os.environ, **here},
        )
        os.close(commands_in)
        os.close(answers_out)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.said: list[str] = []
        try:
            target = self._call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._call(f"{domain}.enable")
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def open(self, page: Path, *, width: int = 1200, height: int = 900, scheme: str = "light") -> None:
        """Load a file into a window of that size; what the console says goes to `said`, and every request."""
        mobile = width < 600
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.said = []
        self.requests: list[str] = []
        self._loaded = False
        self._call("Page.navigate", url=page.absolute().as_uri())
        while not self._loaded:
            self._notice(self._read())

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self) -> bytes:
        """A PNG of the whole page."""
        shown = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(shown["data"])

    def pdf(self) -> bytes:
        return base64.b64decode(self._call("Page.printToPDF", printBackground=True)["data"])

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._notice(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._answers], [], [], _DEADLINE_S)[0], (
                f"the browser has said nothing for {_DEADLINE_S} s"
            )
            more = os.read(self._answers, 1 << 16)
            assert more, "the browser has ended"
            self._buffer += more
        message, self._buffer = self._buffer.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found

    def _notice(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Log.entryAdded":
            self.said.append(params["entry"]["text"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.said.append(json.dumps(params))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def _close(self) -> None:
        os.close(self._commands)  # which ends it
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._end_group()
        self._process.wait()
        os.close(self._answers)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
