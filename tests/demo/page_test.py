"""The page as a process of its own: called over HTTP, and used in Chromium, which has no network but this machine.

A test in the browser needs Debian's `chromium` and `chromium-driver`; where they are not, it is skipped and says so.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image
import pytest

from coca_jax import config
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import exported
from coca_jax.interop.weights import Weights
from tests import conftest, pairs, tiny

pytestmark = pytest.mark.slow
LIMIT = 1 << 19  # --max_upload=0.5


class Server:
    """A demo that listens, and the end of what it said."""

    def __init__(self, folder: pathlib.Path, *arguments: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._log = (folder / "log").open("w+")
        environment = os.environ | conftest.STRICT | {"TMPDIR": str(self.temporary)}
        command = [sys.executable, "-m", "coca_jax.demo", "--port=0", *arguments]
        self.process = subprocess.Popen(
            command, cwd=conftest.REPOSITORY, env=environment, stdout=self._log, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 150
        while not (found := re.search(r"^(http://\S+) \(Ctrl-C stops it\)$", self.log(), re.MULTILINE)):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.1)
        self.url = found[1]

    def log(self) -> str:
        return pathlib.Path(self._log.name).read_text()

    def stop(self) -> None:
        """It ends when it is told, and leaves nothing behind."""
        left = "coca_jax-demo-*"
        assert self.process.poll() is None and list(self.temporary.glob(left)), self.log()
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(30) == 0, self.log()
        finally:
            self.process.kill()
            self._log.close()
        assert not list(self.temporary.glob(left))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """model/, photos/, and files to drop: good ones and bad ones."""
    folder = tmp_path_factory.mktemp("demo")
    tokenizer = Tokenizer.train([pairs.caption(*e) for e in pairs.examples()] * 20, vocab_size=300)
    model = tiny.replace(tiny.MODEL, text__vocab_size=tokenizer.vocab_size)
    exported.write(Weights(config.Config(model=model), tiny.parameters(model), tokenizer, 5), folder / "model")
    (folder / "photos").mkdir()
    for color, shape in pairs.examples()[:5]:
        PIL.Image.fromarray(pairs.picture(color, shape)).save(folder / "photos" / f"{color} {shape}.png")
    (folder / "photos" / "torn.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    good = PIL.Image.fromarray(pairs.picture("red", "dot", side=64))
    good.save(folder / "good.png")
    good.save(folder / "good.tiff")
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    good.save(folder / "turned.jpg", exif=turned, quality=95)
    others = [PIL.Image.fromarray(pairs.picture(color, "dot", side=64)) for color in ("blue", "green")]
    good.save(folder / "moving.gif", save_all=True, append_images=others, duration=100)
    (folder / "text.jpg").write_text("this is no picture\n")
    (folder / "torn.png").write_bytes((folder / "good.png").read_bytes()[:60])
    small = bytearray((folder / "good.png").read_bytes())
    small[16:24] = struct.pack(">II", 30_000, 30_000)  # 900 million pixels, says its header
    small[29:33] = struct.pack(">I", zlib.crc32(small[12:29]))
    (folder / "bomb.png").write_bytes(small)
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    PIL.Image.fromarray(noise).save(folder / "large.png")
    assert (folder / "large.png").stat().st_size > LIMIT
    return folder


@pytest.fixture(scope="module")
def server(folder: pathlib.Path) -> Iterator[Server]:
    pytest.importorskip("gradio", reason='the page needs gradio: pip install "coca_jax[demo]"')
    server = Server(folder, f"--checkpoint={folder}/model", f"--pictures={folder}/photos", "--max_upload=0.5")
    yield server
    server.stop()


def ask(
    server: Server, path: str, data: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of a request. `headers` may promise more than there is."""
    with contextlib.closing(http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=120)) as connection:
        connection.request("GET" if data is None else "POST", path, data, dict(headers or {}))
        with connection.getresponse() as response:
            return response.status, response.read()


@pytest.fixture(scope="module")
def call(server: Server) -> Callable[..., Any]:
    """call(name, *data): an event of the page over HTTP, in one session; RuntimeError where it fails."""

    def post(path: str, data: bytes, kind: str) -> Any:
        status, said = ask(server, path, data, {"Content-Type": kind})
        if status != 200:
            raise RuntimeError(f"{status}: {said.decode()}")
        return json.loads(said)

    def call(name: str, *data: Any) -> Any:
        def sent(x: Any) -> Any:
            if not isinstance(x, pathlib.Path):
                return x
            body = (
                f'--edge\r\nContent-Disposition: form-data; name="files"; filename="{x.name}"\r\n\r\n'.encode()
                + x.read_bytes()
                + b"\r\n--edge--\r\n"
            )
            (path,) = post("/gradio_api/upload", body, "multipart/form-data; boundary=edge")
            return {"path": path, "orig_name": x.name, "meta": {"_type": "gradio.FileData"}}

        body = json.dumps({"data": [sent(x) for x in data], "session_hash": "tester"}).encode()
        event = post(f"/gradio_api/call/{name}", body, "application/json")["event_id"]
        _, said = ask(server, f"/gradio_api/call/{name}/{event}")
        kind, result = re.findall(r"event: (\w+)\ndata: (.*)", said.decode())[-1]
        if kind != "complete":
            raise RuntimeError(result)
        return json.loads(result)

    return call


HOW = ("beam", 2, "", "a red dot, a blue cross", "{}")


def test_a_picture_is_answered_whatever_its_format(
    server: Server, folder: pathlib.Path, call: Callable[..., Any]
) -> None:
    answers = {name: call("picture", folder / name, *HOW) for name in ("good.png", "good.tiff", "moving.gif")}
    for name, (drop, message, _, views, captions, labels) in answers.items():
        assert drop is None and name in message and "alert" not in message
        assert captions.count("<tr>") == 3 and "log P" in captions  # the head, and two of them
        assert labels.count("<tr>") == 3 and "a blue cross" in labels
        assert len(views) == 7
    # One picture in three formats: of the animation, its first.
    assert len({(captions, labels) for *_, captions, labels in answers.values()}) == 1
    (shown, *_) = answers["good.png"][3]
    status, content = ask(server, shown["image"]["url"].removeprefix(server.url))
    assert status == 200 and PIL.Image.open(io.BytesIO(content)).size == (336, 336)
    assert "alert" not in call("picture", folder / "turned.jpg", *HOW)[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.jpg", "text.jpg: 19 bytes that are not a readable picture: none of JPEG"),
        ("torn.png", "torn.png: 60 bytes that are not a readable picture"),
        ("bomb.png", "bytes that unpack to too much: DecompressionBombError: Image size (900000000 pixels)"),
    ],
)
def test_a_bad_file_gives_a_message_and_the_server_goes_on(
    folder: pathlib.Path, call: Callable[..., Any], name: str, message: str
) -> None:
    drop, said, _, views, captions, labels = call("picture", folder / name, *HOW)
    assert message in said and 'role="alert"' in said
    assert (drop, views, captions, labels) == (None, [], "", "")
    assert "alert" not in call("picture", folder / "good.png", *HOW)[1]


def test_limits_hold_for_those_who_do_not_ask_the_page(
    server: Server, folder: pathlib.Path, call: Callable[..., Any]
) -> None:
    with pytest.raises(RuntimeError, match=f"413: File size exceeded maximum allowed size of {LIMIT} bytes"):
        call("picture", folder / "large.png", *HOW)
    # More than the limit and its envelope: refused by its header, before it is read.
    length = LIMIT + (1 << 20) + 1
    status, said = ask(server, "/gradio_api/queue/join", b"", {"Content-Length": str(length)})
    assert (status, said.decode()) == (413, f"a request of {length} bytes is over the limit of {length - 1}")
    for path in ("http://192.0.2.1/cat.png", "/etc/passwd", f"{folder}/good.png"):
        with pytest.raises(RuntimeError):
            call("picture", {"path": path, "meta": {"_type": "gradio.FileData"}}, *HOW)
    assert "'http://192.0.2.1/cat.png' is an address, not a file" in server.log()
    assert "Cannot move /etc/passwd" in server.log()
    for file in (f"{folder}/good.png", "/etc/passwd"):
        assert ask(server, f"/gradio_api/file={file}")[0] in (403, 404)
    with pytest.raises(RuntimeError, match="greater than maximum value 8"):
        call("captions", None, "beam", 1e6, "")
    assert "no text to look for" in call("find", " ", 3)[0]
    unread, found = call("find", "a red dot", 3)
    assert unread == "" and len(found) == 3 and found[0]["caption"].endswith(".png")
    assert server.process.poll() is None


# ---------------------------------------------------------------------------------------------------------------------
# In the browser

_DROP = """
const [area, name, content] = arguments, transfer = new DataTransfer();
transfer.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt(0))], name));
for (const kind of ["dragenter", "dragover", "drop"])
  area.dispatchEvent(new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
"""


@pytest.fixture
def browser(tmp_path: pathlib.Path) -> Iterator[Any]:
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not chromium:
        missing = " and ".join(name for name, at in (("chromium", chromium), ("chromedriver", driver)) if not at)
        pytest.skip(f"NOT TESTED in a real browser: {missing} not on the PATH (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason='pip install "coca_jax[demo-test]"')
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    for argument in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"),
        *("disable-background-networking", "disable-component-update", "disable-dev-shm-usage"),
        *(f"user-data-dir={tmp_path}/profile", "window-size=1280,1400"),
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # a page that needs another host fails here
    ):
        options.add_argument(f"--{argument}")
    # With its path given, Selenium Manager does not look for a driver to download.
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    with contextlib.ExitStack() as stack:
        stack.callback(started.quit)
        yield started


def test_in_chromium_without_a_network(server: Server, folder: pathlib.Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def one(selector: str) -> Any:
        return browser.find_element(By.CSS_SELECTOR, selector)

    def until(condition: Callable[[], Any], what: str) -> Any:
        # An element that the page has just replaced is looked for again.
        wait = WebDriverWait(browser, 60, 0.1, ignored_exceptions=[Exception])
        return wait.until(lambda _: condition(), f"{what}; the page says: {one('body').text[:2000]!r}")

    def drop(name: str) -> None:
        area = until(lambda: one("#drop button"), "no place to drop on")
        browser.execute_script(_DROP, area, name, base64.b64encode((folder / name).read_bytes()).decode())

    browser.get(server.url)
    until(lambda: one("#drop input[type=file]"), "no page")
    one("#words textarea").send_keys("a red dot, a blue cross")
    drop("good.png")
    until(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#captions tbody tr")) == 3, "no captions")
    words = until(lambda: [e.text for e in browser.find_elements(By.CSS_SELECTOR, "#labels tbody td:first-child")], "")
    assert sorted(words) == ["a blue cross", "a red dot"]
    until(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#views .grid-container img")) == 7, "no attention")
    sizes = browser.execute_script("return [...document.querySelectorAll('#views img')].map(i => i.naturalWidth)")
    assert min(sizes) > 0  # they are shown, not only named

    # A bad file, by the other way in; then a good one again.
    until(lambda: one("#drop input[type=file]"), "").send_keys(str(folder / "text.jpg"))
    until(lambda: "text.jpg: 19 bytes that are not a readable picture" in one("#message").text, "no message")
    assert not browser.find_elements(By.CSS_SELECTOR, "#captions tbody tr")
    drop("large.png")
    until(lambda: re.search("(?i)size|large|limit", " ".join(
        e.text for e in browser.find_elements(By.CSS_SELECTOR, ".toast-body, .toast-wrap, #drop .error"))
    ), "nothing is said of a file that is too large")  # fmt: skip
    browser.refresh()
    until(lambda: one("#drop input[type=file]"), "").send_keys(str(folder / "moving.gif"))
    until(lambda: "moving.gif" in one("#message").text, "no answer after bad files")
    one("#words textarea").send_keys(" , ")
    one("#choose").click()
    until(lambda: "no words to choose from" in one("#labels").text, "no message for empty words")

    browser.find_element(By.XPATH, "//button[@role='tab'][contains(., 'Text to pictures')]").click()
    until(lambda: one("#text textarea, #text input").is_displayed(), "no tab")
    one("#text textarea, #text input").send_keys("a red dot\n")
    until(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#found .grid-container img")) == 5, "no pictures found")

    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    elsewhere = {url for url in asked if not url.startswith((server.url, "data:", "blob:", "chrome:", "about:"))}
    assert len(asked) > 20 and not elsewhere
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in errors if "413" not in message], errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--checkpoint=PATH is needed"),
        (["--checkpoint={f}/none"], "none: no such file or directory"),
        (["--checkpoint={f}/model", "--pictures={f}/none"], "none: no such file or folder"),
        (["--checkpoint={f}/model", "--max_upload=0"], "--max_upload=0 must be more than 0"),
        (
            ["--checkpoint={f}/model", "photos"],
            "unknown argument 'photos': a folder of pictures is named by --pictures",
        ),
    ],
)
def test_wrong_arguments_get_one_line(
    folder: pathlib.Path, run_python: Any, arguments: list[str], message: str
) -> None:
    pytest.importorskip("gradio", reason='the page needs gradio: pip install "coca_jax[demo]"')
    given = [argument.format(f=folder) for argument in arguments]
    done = run_python(["-m", "coca_jax.demo", "--port=0", *given], devices=1, check=False)
    assert done.returncode == 1 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
