"""Headless Chromium, driven by its DevTools protocol over a pipe: no package is needed.

    python tests/browser.py PAGE.html FOLDER

writes a screenshot of the page for each width and colour scheme, with all that folds open, or with
--fold as a reader finds it.
"""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

WIDTHS, SCHEMES = (390, 1280), ("light", "dark")
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_TIMEOUT = 120


class Seen(NamedTuple):
    """What a browser shows of a page."""

    png: bytes
    overflow: int  # pixels that the page is wider than the screen
    wide: list[str]  # elements that stick out of it and do not scroll
    complaints: list[str]  # of the console, exceptions, and what was fetched or refused
    text: str
    height: int


def find_browser() -> str | None:
    """Find a Chromium, or the one that $CHROMIUM names."""
    return next(filter(None, map(shutil.which, (os.environ.get("CHROMIUM", ""), *_NAMES))), None)


class Browser:
    """A running browser with one tab."""

    def __init__(self, binary: str) -> None:
        self._files = contextlib.ExitStack()
        profile = self._files.enter_context(tempfile.TemporaryDirectory())
        (read, theirs_out), (theirs_in, write) = os.pipe(), os.pipe()
        # The browser reads from descriptor 3 and writes to 4.
        command = 'exec 3<&"$0" 4>&"$1"; shift; exec "$@"'
        arguments = [
            "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}",
            "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--hide-scrollbars", "--disable-background-networking", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "-c", command, str(theirs_in), str(theirs_out), binary, *arguments],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_out)
        os.close(theirs_in)
        self._read = self._files.enter_context(os.fdopen(read, "rb", buffering=0))
        self._write = self._files.enter_context(os.fdopen(write, "wb", buffering=0))
        self._rest, self._numbers = b"", itertools.count(1)
        self.events: list[dict] = []
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._process.kill()
        self._process.wait(_TIMEOUT)
        self._files.close()

    def call(self, method: str, **parameters) -> dict:
        """Ask for one thing and wait for the answer; events that come before it are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") != number:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']['message']}")
            else:
                return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self._rest:
            chunk = self._read.read(1 << 20)
            if not chunk:
                raise RuntimeError("the browser ended")
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def evaluate(self, expression: str):
        """Evaluate an expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)[
            "result"
        ].get("value")

    def look(self, page: Path, width: int, scheme: str, whole: bool = True) -> Seen:
        """Show a page at a width in a colour scheme; ``whole`` opens all that folds."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        if whole:
            self.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        # Not innerWidth, which grows where a phone zooms out to show what is too wide.
        overflow = self.evaluate("document.documentElement.scrollWidth") - width
        wide = self.evaluate(_WIDE.replace("WIDTH", str(width)))
        height = self.evaluate("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, 16_000), "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        text = self.evaluate("document.body.innerText")
        png = base64.b64decode(shot["data"])
        return Seen(png, overflow, wide, self._complaints(page), text, height)

    def _complaints(self, page: Path) -> list[str]:
        found = []
        for event in self.events:
            method, about = event.get("method"), event.get("params", {})
            if method == "Runtime.consoleAPICalled":
                found.append(" ".join(str(each.get("value")) for each in about["args"]))
            elif method == "Runtime.exceptionThrown":
                found.append(about["exceptionDetails"]["exception"]["description"])
            elif method == "Log.entryAdded":
                found.append(about["entry"]["text"])
            elif method == "Network.requestWillBeSent":
                url = about["request"]["url"]
                if url != page.resolve().as_uri():
                    found.append(f"fetched {url}")
        return found


# Elements whose right end lies beyond the screen, outside of what scrolls in itself.
_WIDE = """
[...document.querySelectorAll('body *')].filter(each =>
  each.getBoundingClientRect().right > WIDTH + 1 && !each.closest('.scroll')
  && !each.closest('svg')
).map(each => each.tagName + '.' + each.className).slice(0, 10)
"""


def main() -> None:
    page, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(exist_ok=True)
    with Browser(find_browser() or "chromium") as browser:
        for width, scheme in itertools.product(WIDTHS, SCHEMES):
            seen = browser.look(page, width, scheme, whole="--fold" not in sys.argv)
            (folder / f"{page.stem}-{width}-{scheme}.png").write_bytes(seen.png)
            print(width, scheme, seen.height, seen.overflow, seen.wide, seen.complaints)


if __name__ == "__main__":
    main()
