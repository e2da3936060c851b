"""The page, and the server that it comes from: Gradio's parts, told to stay on this machine.

Nothing is asked of another machine: no analytics, no share link, no fonts from elsewhere, and a request that gives an
address in the place of a file is refused. All that a user or a file brings is shown as text.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from coca_jax.data.records import DataError
from coca_jax.demo.answers import METHODS, MOST_CAPTIONS, MOST_FOUND, Answers, Seen

MIB = 1 << 20
_ENVELOPE = MIB  # what a request has beside the file that it brings, at most
_WAITING = 64  # questions that wait for the model; more are told to come back
# Read by gradio and huggingface_hub when they are imported.
_ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_MCP_SERVER": "False",
}
_CSS = """
.coca table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.coca th, .coca td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--border-color-primary); }
.coca th:first-child, .coca td:first-child { text-align: left; overflow-wrap: anywhere; }
.coca meter { width: 9em; }
.said { padding: 8px 12px; border-radius: 8px; background: var(--background-fill-secondary); overflow-wrap: anywhere; }
.said.bad { border-left: 5px solid #c2481a; }
"""


def said(text: str, *, bad: bool = False) -> str:
    """A line of plain text for the page, which screen readers read out."""
    kind = "said bad" if bad else "said"
    return f'<p class="{kind}" role="{"alert" if bad else "status"}">{html.escape(text)}</p>' if text else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text, but for cells that begin with <meter."""

    def cell(text: str) -> str:
        return text if text.startswith("<meter ") else html.escape(text)

    top = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


class Page:
    """What the page's events call: the answers as HTML, and what went wrong as a line instead of an exception."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers

    def picture(
        self, path: str | None, method: str, count: float, prompt: str, words: str, prompts: str
    ) -> tuple[Any, str, Seen | None, list[tuple[np.ndarray, str]], str, str]:
        """A file that was dropped -> (the drop area, empty again; message; what is kept; views; captions; labels)."""
        if not path:
            return None, said("no picture was given: drop one", bad=True), None, [], "", ""
        name = pathlib.Path(path).name
        try:
            seen, views = self.answers.see(pathlib.Path(path).read_bytes())
        except (ValueError, OSError) as error:
            return None, said(f"{name}: {error}", bad=True), None, [], "", ""
        captions = self.captions(seen, method, count, prompt) if self.answers.captions_pictures else ""
        # Nobody has typed a word yet: no reproach for that.
        labels = self.labels(seen, words, prompts) if self.answers.compares and words.strip() else ""
        return None, said(name), seen, views, captions, labels

    def captions(self, seen: Seen | None, method: str, count: float, prompt: str) -> str:
        def rows() -> str:
            seed = int.from_bytes(os.urandom(4), "big")  # each time another sample
            found = self.answers.captions(_given(seen), method, int(count), prompt, seed)
            cells = [
                [c.text or "(empty)", f"{c.score:.3f}", f"{c.log_prob:.2f}"]
                + ([] if c.similarity is None else [f"{c.similarity:.3f}"])
                for c in found
            ]
            head = ["caption", "score", "log P (nats)", *(["similarity"] if self.answers.compares else [])]
            return table(head, cells)

        return _or_said(rows)

    def labels(self, seen: Seen | None, words: str, prompts: str) -> str:
        def rows() -> str:
            return table(
                ["word", "", "probability", "cosine"],
                [
                    [x.word, f'<meter value="{x.probability:.4f}"></meter>', f"{x.probability:.1%}", f"{x.cosine:.3f}"]
                    for x in self.answers.labels(_given(seen), words, prompts)
                ],
            )

        return _or_said(rows)

    def find(self, text: str, count: float) -> tuple[str, list[tuple[np.ndarray, str]]]:
        """(message, pictures with their cosine and name)."""
        try:
            found, unread = self.answers.nearest(text, int(count))
        except (ValueError, OSError) as error:
            return said(str(error), bad=True), []
        return said("; ".join(unread), bad=True), found


def _given(seen: Seen | None) -> Seen:
    if seen is None:
        raise ValueError("no picture yet: drop one first")
    return seen


def _or_said(make: Callable[[], str]) -> str:
    try:
        return make()
    except (ValueError, OSError) as error:
        return said(str(error), bad=True)


def build(answers: Answers, title: str, max_upload: int) -> Any:
    """The page as Gradio's Blocks; api names: picture, captions, labels, find."""
    import gradio as gr

    page, index = Page(answers), answers.index
    one: dict[str, Any] = {
        "concurrency_id": "model",
        "concurrency_limit": 1,
    }  # one question at a time is what fits the machine
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.HTML(f"<h1>{html.escape(title)}</h1>")
        with gr.Tab("Picture"), gr.Row():
            seen = gr.State(None)
            with gr.Column(scale=1):
                drop = gr.File(label=f"Drop a picture, {max_upload / MIB:g} MB at most", elem_id="drop", height=120)
                message = gr.HTML(elem_id="message", elem_classes="coca")
                with gr.Group(visible=answers.captions_pictures):
                    method = gr.Radio(list(METHODS), value="beam", label="Captions by", elem_id="method")
                    count = gr.Slider(1, MOST_CAPTIONS, value=3, step=1, label="How many (greedy: one)")
                    prompt = gr.Textbox(label="They begin with", max_lines=1)
                    again = gr.Button("Caption again", elem_id="again")
                with gr.Group(visible=answers.compares):
                    words = gr.Textbox(label="Words to choose from, with commas between", lines=2, elem_id="words")
                    templates = gr.Textbox(
                        value=" | ".join(answers.coca.config.evaluate.prompts),
                        label="Said as ({} is the word, | between several)",
                        max_lines=1,
                    )
                    choose = gr.Button("Choose", elem_id="choose")
            with gr.Column(scale=2):
                captions = gr.HTML(elem_id="captions", elem_classes="coca")
                labels = gr.HTML(elem_id="labels", elem_classes="coca")
                views = gr.Gallery(
                    label="What the model sees, and where it looks", columns=3, elem_id="views", interactive=False,
                    buttons=["download", "fullscreen"], object_fit="contain", height="auto", format="png",
                )  # fmt: skip
        drop.upload(
            page.picture,
            [drop, method, count, prompt, words, templates],
            [drop, message, seen, views, captions, labels],
            api_name="picture",
            **one,
        )
        again.click(page.captions, [seen, method, count, prompt], captions, api_name="captions", **one)
        gr.on([choose.click, words.submit], page.labels, [seen, words, templates], labels, api_name="labels", **one)
        with gr.Tab("Text to pictures", visible=index is not None and answers.compares):
            if index is not None:
                gr.HTML(said(f"{len(index.paths):,} pictures are indexed"), elem_classes="coca")
            text = gr.Textbox(label="Text", max_lines=1, elem_id="text")
            most = gr.Slider(1, MOST_FOUND, value=12, step=1, label="How many pictures")
            look = gr.Button("Find", elem_id="find")
            unread = gr.HTML(elem_id="unread", elem_classes="coca")
            found = gr.Gallery(
                label="Nearest pictures, with cosine", columns=6, elem_id="found", interactive=False,
                buttons=["download", "fullscreen"], object_fit="contain", height="auto", format="png",
            )  # fmt: skip
        gr.on([look.click, text.submit], page.find, [text, most], [unread, found], api_name="find", **one)
    blocks.queue(max_size=_WAITING)
    return blocks


class _Bounded:
    """An ASGI application that reads so many bytes of a request's body and no more."""

    def __init__(self, app: Any, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._limit:
            text = f"a request of {int(declared)} bytes is over the limit of {self._limit}".encode()
            headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
            await send({"type": "http.response.start", "status": 413, "headers": headers})
            await send({"type": "http.response.body", "body": text})
            return
        read = 0

        async def counted() -> Any:
            nonlocal read
            event = await receive()
            read += len(event.get("body", b""))
            return event if read <= self._limit else {"type": "http.disconnect"}

        await self._app(scope, counted, send)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, not open yet. Raises DataError where it cannot be."""
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        if bound:
            bound.close()
        reason = error.strerror or error
        raise DataError(f"--host={host} --port={port}: {reason}: name another, 0 for any port") from error
    return bound


@contextlib.contextmanager
def uploads() -> Iterator[None]:
    """A folder for what is uploaded, removed at the end. Before gradio is imported, which reads where it is."""
    folder = tempfile.mkdtemp(prefix="coca_jax-demo-")
    os.environ |= _ENVIRONMENT | {"GRADIO_TEMP_DIR": folder}
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def serve(blocks: Any, bound: socket.socket, max_upload: int, ready: Callable[[], None]) -> None:
    """Serves the page until the process is told to stop: uvicorn ends its answers, and raises the signal once more."""
    import fastapi
    import gradio as gr
    import uvicorn
    from gradio import processing_utils

    async def refused(url: str) -> Any:
        raise DataError(f"{url[:200]!r} is an address, not a file: nothing is fetched for a client")

    processing_utils.async_ssrf_protected_get = refused
    blocks.has_launched = True  # else a path that a client sends is not held to the folder of uploads
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        blocks,
        path="/",
        server_name=bound.getsockname()[0],
        server_port=bound.getsockname()[1],
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=max_upload,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        css=_CSS,
    )
    config = uvicorn.Config(_Bounded(app, max_upload + _ENVELOPE), log_level="error", timeout_graceful_shutdown=2)
    bound.listen(128)
    ready()
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        uvicorn.Server(config).run(sockets=[bound])
