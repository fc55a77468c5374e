"""Chromium without a window, with real clicks and keys, over the pipe of its DevTools protocol."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars",
           "--no-first-run", "--disable-extensions", "--remote-debugging-pipe")


class Browser:
    """A page in Chromium: `run` evaluates JavaScript in it; `click`, `drag` and `key` are what a person does.

    Args:
        folder: for the profile and downloads; size: of the window, px; touch: a phone.
    """

    def __init__(self, url, folder, size=(1280, 900), touch=False):
        theirs, self.write_end = os.pipe()
        self.read_end, answers = os.pipe()
        # The browser reads from descriptor 3 and writes to 4.
        command = f'exec "$@" 3<&{theirs} 4>&{answers} 2>/dev/null'
        self.process = subprocess.Popen(
            ["bash", "-c", command, "browser", CHROMIUM, *OPTIONS, f"--user-data-dir={folder / 'profile'}"],
            pass_fds=(theirs, answers))
        os.close(theirs)
        os.close(answers)
        self.buffer, self.number, self.session, self.downloads = b"", 0, None, folder / "downloads"
        self.errors = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Page"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1,
                  mobile=touch)
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        self.open(url)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        os.close(self.write_end)
        os.close(self.read_end)

    def send(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(answer["params"]["exceptionDetails"])
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _receive(self, seconds=60):
        while b"\0" not in self.buffer:
            assert select.select([self.read_end], [], [], seconds)[0], "the browser does not answer"
            part = os.read(self.read_end, 1 << 20)
            assert part, "the browser has ended"
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(text)

    def open(self, url):
        """Go to a page, or load it again, and wait until it is drawn."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        self.run("new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)))")

    def run(self, script):
        """The value of a JavaScript expression, awaited."""
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script, seconds=30):
        deadline = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < deadline, f"waited in vain for {script}"
            time.sleep(0.02)

    def place(self, selector, across=0.5, down=0.5):
        """Window coordinates within the first element of a CSS selector, scrolled into view."""
        box = self.run(f"(e => {{ e.scrollIntoView({{block: 'nearest'}}); const b = e.getBoundingClientRect(); "
                       f"return [b.left, b.top, b.width, b.height] }})(document.querySelector({json.dumps(selector)}))")
        return box[0] + across * box[2], box[1] + down * box[3]

    def click(self, selector, across=0.5, down=0.5):
        self.mouse([self.place(selector, across, down)])

    def click_text(self, text, within="body"):
        """Click the first button with this text."""
        self.run(f"[...document.querySelectorAll({json.dumps(within + ' button')})]"
                 f".find(b => b.textContent === {json.dumps(text)}).id = 'to-be-clicked'")
        self.click("#to-be-clicked")
        self.run("document.getElementById('to-be-clicked')?.removeAttribute('id')")

    def tap(self, selector, across=0.5, down=0.5):
        x, y = self.place(selector, across, down)
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def mouse(self, points):
        """Press at the first point, move along all others, let go at the last."""
        for kind, (x, y) in [("mouseMoved", points[0]), ("mousePressed", points[0]),
                             *[("mouseMoved", point) for point in points[1:]], ("mouseReleased", points[-1])]:
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name):
        code = {"Escape": 27, "Enter": 13, "ArrowLeft": 37, "ArrowRight": 39}.get(name)
        what = {"text": name} if code is None else {"windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=name, **what)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code or 0)

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def download(self, name, seconds=20):
        """Path of a file that the page was told to save."""
        deadline = time.monotonic() + seconds
        while not (self.downloads / name).exists():
            assert time.monotonic() < deadline, f"no {name} among {list(self.downloads.glob('*'))}"
            time.sleep(0.05)
        return self.downloads / name
