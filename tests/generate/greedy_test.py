from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax import generate
from coca_jax.config import Optimizer
from coca_jax.data.images import normalize
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.model.coca import CoCa
from coca_jax.sharding import make_mesh
from coca_jax.train import optimizer, state
from coca_jax.train.step import compile_step
from tests import pairs, tiny


def test_greedy_is_the_argmax_of_teacher_forcing() -> None:
    model, params = tiny.MODEL, tiny.parameters(tiny.MODEL)
    images = tiny.images(model, 4)

    def apply(*args: Any, **kwargs: Any) -> Any:
        return CoCa(model).apply({"params": params}, *args, **kwargs)

    image_tokens = apply(images, method="encode_image").image_tokens
    eos = 7
    tokens = np.asarray(jax.jit(lambda x: generate.greedy(model, params, x, bos_id=2, eos_id=eos))(image_tokens))
    assert tokens.shape == (4, 9) and (tokens[:, 0] == 2).all()
    logits = np.array(apply(images, jnp.asarray(tokens)).logits)
    logits[..., [0, 2]] = -np.inf
    for row, ids in enumerate(tokens):
        for at in range(1, 9):
            if ids[at] == 0:
                assert eos in ids[:at]  # padding only after eos
            else:
                assert ids[at] == logits[row, at - 1].argmax()


def test_layers_are_not_copied_out_of_a_stack_for_each_token() -> None:
    """The program slices a layer's kernels when it reads the prompt and nowhere else."""
    model, params = tiny.MODEL, tiny.parameters(tiny.MODEL)
    image_tokens = jnp.ones((2, 4, 16))

    def slices(function: Any) -> int:
        text = str(jax.jit(function).lower(params, image_tokens).compile().as_text())
        return sum(
            f"f32[1,{model.text.width},{model.text.mlp_dim}]" in line
            for line in text.splitlines()
            if "dynamic-slice(" in line
        )

    def start(params: Any, image_tokens: jax.Array) -> Any:
        tokens = jnp.full((2, 1), 2, jnp.int32)
        return CoCa(model).apply({"params": params}, tokens, image_tokens, 9, method="prefill")

    def one_by_one(params: Any, image_tokens: jax.Array) -> Any:
        logits, cache = CoCa(model).apply(
            {"params": params}, jnp.ones((2, 1), jnp.int32), image_tokens, 9, method="prefill"
        )

        def step(carry: Any) -> Any:
            tokens, (_, cache) = carry
            outputs = CoCa(model).apply({"params": params}, tokens, cache, method="decode_step")
            return jnp.argmax(outputs[0], axis=2).astype(jnp.int32), outputs

        return jax.lax.fori_loop(1, 9, lambda _, carry: step(carry), (jnp.ones((2, 1), jnp.int32), (logits, cache)))

    ours = slices(lambda params, x: generate.greedy(model, params, x, bos_id=2, eos_id=7))
    assert 0 < ours == slices(start) < slices(one_by_one)  # with stacks, the search finds more


def test_a_shorter_length_truncates_captions() -> None:
    model, params = tiny.MODEL, tiny.parameters(tiny.MODEL)
    image_tokens = jnp.ones((2, 4, 16))
    full, short = (
        np.asarray(generate.greedy(model, params, image_tokens, bos_id=2, eos_id=39, length=n)) for n in (9, 4)
    )
    np.testing.assert_array_equal(short, full[:, :4])


@pytest.mark.slow
def test_eight_memorized_pairs_are_captioned_exactly() -> None:
    names = pairs.examples()[::2]
    captions = [pairs.caption(*name) for name in names]
    tokenizer = Tokenizer.train(captions * 50, vocab_size=300)
    c = tiny.replace(
        tiny.CONFIG,
        steps=150,
        model__text__vocab_size=tokenizer.vocab_size,
        model__text__length=24,
        model__image__size=24,
        model__image__patch=6,
        model__image__depth=1,
        optimizer=Optimizer(name="adamw", peak_lr=2e-2, schedule="cosine", weight_decay=0.0),
    )
    batch = {
        "images": np.stack([pairs.picture(*name) for name in names]),
        "tokens": tokenizer.encode_batch(captions, 24),
    }
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    tx = optimizer.make_optimizer(c.optimizer, c.steps, state.abstract_parameters(c))
    with jax.set_mesh(mesh):
        now = state.real(c, tx, mesh)
        step = compile_step(c, tx, mesh, now)
        for _ in range(c.steps):
            now, metrics = step(now, batch)
    assert metrics["loss/captioning"] < 0.01, metrics
    assert metrics["accuracy/image_to_text"] == metrics["accuracy/text_to_image"] == 1.0

    images = normalize(batch["images"], c.data.mean, c.data.std)
    tokens = CoCa(c.model).apply({"params": now.params}, images, method="encode_image").image_tokens
    generated = generate.greedy(c.model, now.params, tokens, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    assert [tokenizer.decode(ids) for ids in np.asarray(generated)] == captions
