"""A real browser without a window, driven through a pipe.

Chromium speaks its DevTools protocol, JSON with a NUL behind each message, on
two file descriptors: no client library is needed for the dozen commands here.
https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import pathlib
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from PIL import Image

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-dev-shm-usage", "--disable-background-networking"),
    *("--disable-component-update", "--disable-extensions", "--disable-sync"),
    *("--hide-scrollbars", "--force-device-scale-factor=1"),
    *("--remote-debugging-pipe", "--no-default-browser-check"),
)
_PATIENCE_SECS = 60.0


def find() -> str | None:
    """Returns the program; None if there is none."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """A browser with one tab.

    Attributes:
        trouble: what the console had to say of errors and warnings.
        requests: addresses that the tab asked for.
    """

    def __init__(self, program: str) -> None:
        self.trouble: list[str] = []
        self.requests: list[str] = []
        self._profile = tempfile.mkdtemp(prefix="browser-")
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        # Those that it wants are 3 and 4.
        self._process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}'),
                *("bash", program, *_FLAGS),
                *(f"--user-data-dir={self._profile}", "about:blank"),
            ],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._numbers = itertools.count(1)
        self._received = b""
        # What has happened to which page.
        self._lived: list[tuple[str, str]] = []
        self._session = ""
        targets = self.call("Target.getTargets")["targetInfos"]
        [tab] = [each for each in targets if each["type"] == "page"]
        self._session = self.call(
            "Target.attachToTarget", targetId=tab["targetId"], flatten=True
        )["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command, and returns its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        ends = time.monotonic() + _PATIENCE_SECS
        while b"\0" not in self._received:
            ready, _, _ = select.select(
                [self._answers], [], [], max(0.0, ends - time.monotonic())
            )
            assert ready, "the browser does not answer"
            part = os.read(self._answers, 1 << 20)
            assert part, f"the browser has ended: {self._process.poll()}"
            self._received += part
        text, _, self._received = self._received.partition(b"\0")
        message = json.loads(text)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        method, values = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = values["exceptionDetails"]
            self.trouble.append(json.dumps(details)[:1000])
        elif method == "Log.entryAdded":
            self.trouble.append(values["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.trouble.append(json.dumps(values["args"])[:1000])
        elif method == "Page.lifecycleEvent":
            self._lived.append((values["loaderId"], values["name"]))

    def open(self, path: pathlib.Path) -> None:
        """Opens a file, until all of it is there."""
        self.trouble.clear()
        self.requests.clear()
        # Of that page and no other, such as one that reads itself again.
        loader = self.call("Page.navigate", url=path.as_uri())["loaderId"]
        while (loader, "load") not in self._lived:
            self._receive()

    def wait_for_reload(self) -> None:
        """Waits until the page has read itself again."""
        before = len(self._lived)
        while not any(name == "load" for _, name in self._lived[before:]):
            self._receive()

    def value(self, expression: str) -> Any:
        """Returns the value of an expression of JavaScript."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Returns left, top, width and height of an element, in view."""
        left, top, width, height = self.value(
            f"(() => {{ const e = document.querySelector({selector!r});"
            "e.scrollIntoView({block: 'center'});"
            "const r = e.getBoundingClientRect();"
            "return [r.left, r.top, r.width, r.height]; })()"
        )
        return left, top, width, height

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """Moves the mouse, or presses or releases its button."""
        self.call(
            "Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more
        )

    def click(self, selector: str) -> None:
        """Clicks on the middle of an element."""
        left, top, width, height = self.box(selector)
        x, y = left + width / 2, top + height / 2
        for kind in ("Pressed", "Released"):
            self.mouse(kind, x, y, button="left", clickCount=1)

    def drag(self, selector: str, start: float, end: float) -> None:
        """Drags from one part of the width of an element to another."""
        left, top, width, height = self.box(selector)
        y = top + height / 2
        self.mouse("Moved", left + start * width, y)
        held = {"button": "left", "clickCount": 1}
        self.mouse("Pressed", left + start * width, y, **held)
        for part in (0.5 * (start + end), end):
            self.mouse("Moved", left + part * width, y, button="left")
        self.mouse("Released", left + end * width, y, **held)

    def press(self, key: str, text: str = "") -> None:
        """Presses a key on what has the focus."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}
        codes |= {"Enter": 13, "Tab": 9}
        values = {"key": key, "windowsVirtualKeyCode": codes.get(key, 0)}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **values)
        self.call("Input.dispatchKeyEvent", type="keyUp", **values)

    def screenshot(self, selector: str) -> Image.Image:
        """Returns what an element looks like."""
        left, top, width, height = self.box(selector)
        scroll = self.value("[scrollX, scrollY]")
        clip = {"x": left + scroll[0], "y": top + scroll[1], "scale": 1}
        clip |= {"width": width, "height": height}
        result = self.call(
            "Page.captureScreenshot", clip=clip, captureBeyondViewport=True
        )
        content = base64.b64decode(result["data"])
        return Image.open(io.BytesIO(content)).convert("RGB")

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(AssertionError, OSError):
            self._session = ""
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
        shutil.rmtree(self._profile, ignore_errors=True)


@contextlib.contextmanager
def opened(program: str) -> Iterator[Browser]:
    """Yields a browser, and ends it."""
    browser = Browser(program)
    try:
        yield browser
    finally:
        browser.close()
