"""One train step of open_clip's CoCa, made when asked: the peer's process of benchmarks/train_step.py.

Runs in an environment of its own (`pip install "coca_jax[peers]"`) and imports nothing of ours but for the protocol.
The step is that of open_clip's trainer: autocast for bfloat16, its CoCaLoss, clipping by the global norm, AdamW without
decay on what has fewer than two dimensions. AdamW is `fused`, PyTorch's fastest.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
import warnings
from typing import Any

from benchmarks import peers
from benchmarks.turns import Answer, peak_memory, serve

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")


def build(options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """(torch, a function that makes one step and returns the loss, what is known before the first)."""
    import torch

    peers.torchvision()
    import open_clip

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    sizes = {k: v for k, v in options["open_clip"].items() if k != "custom_text"}
    model = open_clip.CoCa(**sizes).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=1e-4, fused=True
    )
    loss = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
    half = options["dtype"] == "bfloat16"
    autocast = (lambda: torch.autocast(device.type, torch.bfloat16)) if half else contextlib.nullcontext
    size = options["open_clip"]["vision_cfg"]["image_size"]
    text = options["open_clip"]["text_cfg"]
    shape = (options["batch"], 3, size, size)
    images = torch.randn(shape, device=device)
    tokens = torch.randint(1, text["vocab_size"], (options["batch"], text["context_length"]), device=device)

    def losses(images: Any, tokens: Any) -> Any:
        with autocast():
            output = model(images, tokens)
            return sum(loss(**output, output_dict=True).values())

    if options["compile"]:
        losses = torch.compile(losses)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        value = losses(images, tokens)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return float(value.detach())

    known = {
        "parameters": parameters,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "versions": f"torch {torch.__version__}, open_clip {open_clip.__version__}",
    }
    return torch, step, known


def matmul_rate(torch: Any, n: int, dtype: str) -> float:
    """FLOP/s of an n^3 product, the best of three."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.ones((n, n), dtype=getattr(torch, dtype), device=device)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        x @ x
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return float(2 * n**3 / best)


def open_worker(options: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    started = time.perf_counter()
    torch, step, known = build(options)
    first = step()
    known |= {"loss": first, "first_step_seconds": time.perf_counter() - started}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "step":
            started = time.perf_counter()
            for _ in range(request["steps"]):
                value = step()
            return {"seconds": (time.perf_counter() - started) / request["steps"], "loss": value}
        if request["do"] == "matmul":
            return {"flops": matmul_rate(torch, request["n"], options["dtype"])}
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
        return {"peak_bytes": memory}

    return known, answer


if __name__ == "__main__":
    serve(open_worker)
