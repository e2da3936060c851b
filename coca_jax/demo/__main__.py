"""A page in the browser to try a model on: captions, labels, where it looks, and pictures found by text.

    python -m coca_jax.demo --checkpoint=runs/mine
    python -m coca_jax.demo --checkpoint=runs/mine --pictures=photos/ --output=photos.parquet

Drop a picture: captions with scores, labels for the words that are typed, and the attention of the poolers over it.
Type a text: the nearest pictures of --pictures, whose features are computed first and kept in --output, as
`coca_jax.embed` does. It needs gradio (pip install "coca_jax[demo]"), and no network. Only this machine can reach the
page unless --host says otherwise; there is no password. docs/demo.md says more.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import tempfile

from absl import flags

from coca_jax import commandline, compiler

_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "What coca_jax.load opens: a workdir, an exported directory, ...")
_PICTURES = flags.DEFINE_string("pictures", "", "Folder whose pictures a text finds.")
_OUTPUT = flags.DEFINE_string(
    "output",
    "",
    "Index of the pictures, as coca_jax.embed writes it: .jsonl or .parquet. Made, completed, or used as it is where "
    "no --pictures are named. Default: a temporary one.",
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in.")
_PORT = flags.DEFINE_integer("port", 7860, "Port; 0 for any that is free.", lower_bound=0, upper_bound=65535)
_MAX_UPLOAD = flags.DEFINE_float("max_upload", 20.0, "Size of an uploaded picture at most, MB (2^20 bytes).")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}: a folder of pictures is named by --pictures=FOLDER")
    if not _CHECKPOINT.value:
        sys.exit("error: --checkpoint=PATH is needed; --help says what it may be")
    if not 0 < _MAX_UPLOAD.value <= 4096:
        sys.exit(f"error: --max_upload={_MAX_UPLOAD.value:g} must be more than 0 and at most 4096 MB")
    if importlib.util.find_spec("gradio") is None:
        sys.exit('error: gradio is not installed, which the page is made with: pip install "coca_jax[demo]"')
    compiler.setup()
    commandline.quiet()
    with commandline.starting():
        from coca_jax import pretrained
        from coca_jax.config import ConfigError
        from coca_jax.data.records import DataError
        from coca_jax.demo import answers, page
        from coca_jax.interop.weights import ConversionError
        from coca_jax.train.checkpoint import CheckpointError

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that temporary folders are removed
    try:
        bound = page.listen(_HOST.value, _PORT.value)  # before minutes are spent on an index
        coca = pretrained.load(_CHECKPOINT.value)
        index = None
        if _PICTURES.value or _OUTPUT.value:
            with tempfile.TemporaryDirectory(prefix="coca_jax-demo-") as folder:
                output = _OUTPUT.value or os.path.join(folder, "index.jsonl")
                index, done = answers.open_index(output, coca, _CHECKPOINT.value, _PICTURES.value)
            print(done if _OUTPUT.value else f"{len(index.paths)} pictures indexed; --output=FILE would keep the index")
        max_upload = int(_MAX_UPLOAD.value * page.MIB)
        with page.uploads():
            behind = answers.Answers(coca, index)
            blocks = page.build(behind, f"{_CHECKPOINT.value}, step {coca.step}", max_upload)
            page.serve(blocks, bound, max_upload, lambda: _ready(*bound.getsockname()[:2]))
    except (DataError, ConversionError, CheckpointError, ConfigError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(0)


def _ready(host: str, port: int) -> None:
    if not (host.startswith("127.") or host == "::1"):
        print(f"warning: {host} can be reached by others, and there is no password", file=sys.stderr)
    print(f"http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C stops it)", flush=True)


if __name__ == "__main__":
    commandline.run(main)
