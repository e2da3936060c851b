"""open_clip's `generate`, run when asked: the peer's process of benchmarks/decode.py.

The weights come as a file, so that both decode with the same. Every caption has the full length: its end is forbidden.
"""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

from benchmarks import peers
from benchmarks.turns import Answer, serve

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")


def open_worker(options: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    import torch
    from safetensors.torch import load_file

    peers.torchvision()
    import open_clip

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    sizes = {k: v for k, v in options["open_clip"].items() if k != "custom_text"}
    model = open_clip.CoCa(**sizes)
    missing = model.load_state_dict(load_file(options["weights"]), strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"text.attn_mask", "text_decoder.attn_mask"}
    half = options["dtype"] == "bfloat16"
    model = model.to(device, torch.bfloat16 if half else torch.float32).eval()
    images = load_file(options["images"])["images"].to(device, next(model.parameters()).dtype)
    common = {"seq_len": options["length"], "min_seq_len": options["length"] - 1, "fixed_output_length": True}
    ids = {"sot_token_id": options["bos_id"], "eos_token_id": options["eos_id"]}
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"generation_type": "top_k", "top_k": 1},
        "beam": {"generation_type": "beam_search", "num_beams": options["beams"], "num_beam_groups": 1},
    }

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        with torch.no_grad():
            tokens = model.generate(images, **common, **ids, **ways[request["do"]])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - started, "tokens": tokens.tolist()}

    return {"versions": f"torch {torch.__version__}, open_clip {open_clip.__version__}"}, answer


if __name__ == "__main__":
    serve(open_worker)
