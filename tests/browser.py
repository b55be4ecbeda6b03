"""A page in headless Chromium, controlled over its debugging pipe, without a driver or a package."""

import base64
import fcntl
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")


class Browser:
    """One browser tab. `errors` collects console errors and exceptions, `requests` all requested URLs but data URLs."""

    def __init__(self):
        self._folder = tempfile.mkdtemp()
        (read_end, chromium_out), (chromium_in, write_end) = os.pipe(), os.pipe()
        # move them away from 3 and 4, which Chromium uses for its pipe
        chromium_in, chromium_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 64) for end in (chromium_in, chromium_out))
        arguments = [CHROMIUM, *_FLAGS, f"--user-data-dir={self._folder}", "about:blank"]
        quiet = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
        ends = [(os.POSIX_SPAWN_DUP2, chromium_in, 3), (os.POSIX_SPAWN_DUP2, chromium_out, 4)]
        self._pid = os.posix_spawn(CHROMIUM, arguments, os.environ, file_actions=[*quiet, *ends], setpgroup=0)
        os.close(chromium_in), os.close(chromium_out)
        self._in, self._out = os.fdopen(read_end, "rb"), os.fdopen(write_end, "wb")
        self._number, self._buffer, self._session = 0, b"", None
        self.errors, self.requests = [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._in.close(), self._out.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def send(self, method, **parameters):
        """Send a command of the DevTools protocol, and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while (answer := self._receive()).get("id") != self._number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, path, width=1440, height=900, dark=False):
        """Open a local file in a window of `width` x `height` pixels, and wait until it is loaded."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=Path(path).absolute().as_uri())
        while self.run("document.readyState") != "complete":
            pass

    def run(self, script):
        """Evaluate a JavaScript expression in the page, and return its value."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def press(self, key):
        """Press a key on the focused element: a letter, or one of those below by its name."""
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        code = codes[key] if key in codes else ord(key.upper())
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def download(self, script, folder, name):
        """Evaluate an expression that makes the page save a file, and return the file when it is complete."""
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self.run(script)
        while not (Path(folder) / name).exists():  # Chromium gives it its name at the end
            self.run("new Promise(resolve => setTimeout(resolve, 20))")
        return Path(folder) / name

    def choose_file(self, selector, path):
        """Give a local file to an input of the page."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path, **options):
        """Write the visible page as a PNG file."""
        data = self.send("Page.captureScreenshot", format="png", **options)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def _receive(self):
        while b"\0" not in self._buffer:
            chunk = os.read(self._in.fileno(), 1 << 16)
            if not chunk:
                raise EOFError("the browser has ended")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(parameters["exceptionDetails"]["exception"].get("description"))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            self.errors.append(str(parameters["args"]))
        elif method == "Network.requestWillBeSent" and not parameters["request"]["url"].startswith("data:"):
            self.requests.append(parameters["request"]["url"])
