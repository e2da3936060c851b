"""Decoding against references: the full decoder run again for each token, and all possible captions."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax import generate
from coca_jax.generate import Options, choosing
from coca_jax.generate.decoder import Decoder
from coca_jax.model.coca import CoCa
from tests import tiny

BOS, EOS, PAD = 2, 1, 0
# Seven tokens, five of which can be generated, and captions of up to six tokens with bos: few enough to enumerate.
MODEL = tiny.replace(
    tiny.MODEL, text__vocab_size=7, text__length=6, text__n_uni=1, text__n_multi=2, image__depth=1, text__mlp_dim=16
)
BATCH = 3


@functools.cache
def params() -> Any:
    initial = tiny.parameters(MODEL)
    initial["text_decoder"]["lm_head"]["kernel"] *= 3  # confident enough that captions have distinct scores
    return initial


@functools.cache
def image_tokens() -> jax.Array:
    images = tiny.images(MODEL, BATCH, seed=5)
    return CoCa(MODEL).apply({"params": params()}, images, method="encode_image").image_tokens


@functools.cache
def _decoder() -> Any:
    def logits(tokens: Any, pooled: Any) -> Any:
        def run(m: CoCa) -> Any:
            hidden, _ = m.text_decoder.encode(tokens, cls=False)
            return m.text_decoder.logits(m.text_decoder.decode(hidden, pooled))

        return CoCa(MODEL).apply({"params": params()}, method=run)

    return jax.jit(logits)


def teacher_forced(tokens: np.ndarray, row: int) -> np.ndarray:
    """log P(next | before) `[n, t, v]` of captions of one image, from the full decoder."""
    pooled = jnp.repeat(image_tokens()[row : row + 1], len(tokens), axis=0)
    return np.asarray(jax.nn.log_softmax(_decoder()(jnp.asarray(tokens), pooled), axis=-1), np.float64)


def run(options: Options, **arguments: Any) -> generate.Captions:
    """Generate captions; compiled once per options and shapes."""
    return jax.tree.map(np.asarray, _compiled(options, arguments.pop("prefix", 1))(image_tokens(), **arguments))


@functools.cache
def _compiled(options: Options, prefix: int) -> Any:
    def call(pooled: Any, **arguments: Any) -> Any:
        return generate.generate(MODEL, params(), pooled, options, bos_id=BOS, eos_id=EOS, prefix=prefix, **arguments)

    return jax.jit(call)


def all_captions(length: int) -> np.ndarray:
    """All captions of up to `length` tokens that end in eos, padded."""
    content = [token for token in range(7) if token not in (BOS, EOS, PAD)]
    found = []
    for count in range(length - 1):
        for middle in itertools.product(content, repeat=count):
            found.append([BOS, *middle, EOS, *[PAD] * (length - count - 2)])
    return np.array(found, np.int32)


def log_probs_of(captions: np.ndarray, row: int) -> np.ndarray:
    """Log-probabilities of captions, `[n, t]`, 0 for bos and padding."""
    table = teacher_forced(captions, row)
    own = np.take_along_axis(table[:, :-1], captions[:, 1:, None], axis=2)[:, :, 0]
    own = np.concatenate([np.zeros((len(captions), 1)), own], axis=1)
    ended = np.cumsum(captions == EOS, axis=1) - (captions == EOS) > 0
    return np.where(ended, 0.0, own)


def counts(captions: np.ndarray) -> np.ndarray:
    return (captions == EOS).argmax(axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Beam search


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
def test_beam_search_equals_brute_force(penalty: float) -> None:
    """With 64 beams, as many as there can be unfinished captions (4^3 of 4 tokens), nothing can be pruned."""
    result = run(Options("beam", beams=64, returns=5, length_penalty=penalty))
    captions = all_captions(6)
    assert len(captions) == sum(4**n for n in range(5)) == 341
    for row in range(BATCH):
        log_probs = log_probs_of(captions, row)
        scores = log_probs.sum(axis=1) / counts(captions) ** penalty
        best = np.argsort(-scores)[:5]
        assert np.diff(-scores[best]).min() > 1e-4, "scores too close to rank"
        np.testing.assert_array_equal(result.tokens[row], captions[best])
        # float32 sums of float32 logits
        np.testing.assert_allclose(result.scores[row], scores[best], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(result.log_probs[row], log_probs[best], rtol=1e-5, atol=1e-5)


def test_truncated_captions_come_last() -> None:
    """Two tokens after bos: at most 1 + 4 captions end; the other requested ones are truncated."""
    result = run(Options("beam", beams=16, returns=12, length=3))
    for row in range(BATCH):
        ended = (result.tokens[row] == EOS).any(axis=1)
        assert ended.tolist() == [True] * 5 + [False] * 7
        assert (np.diff(result.scores[row, :5]) <= 0).all() and (np.diff(result.scores[row, 5:]) <= 0).all()
        assert len({tuple(tokens) for tokens in result.tokens[row]}) == 12


@pytest.mark.parametrize("options", [{}, {"min_length": 3}, {"no_repeat_ngram": 1}])
def test_empty_slots_have_infinite_scores_when_few_captions_exist(options: dict[str, Any]) -> None:
    """Two tokens after bos, of four: every caption that the options allow occurs once, and no other."""
    result = run(Options("beam", beams=40, returns=30, length=3, **options))
    content = [token for token in range(7) if token not in (BOS, EOS, PAD)]
    wanted = {(BOS, EOS, PAD)} | {(BOS, word, last) for word in content for last in (*content, EOS)}
    if "min_length" in options:
        wanted.remove((BOS, EOS, PAD))
    if "no_repeat_ngram" in options:
        wanted -= {(BOS, word, word) for word in content}
    for row in range(BATCH):
        is_caption = np.isfinite(result.scores[row])
        assert is_caption.tolist() == [True] * len(wanted) + [False] * (30 - len(wanted))
        assert {tuple(map(int, tokens)) for tokens in result.tokens[row, is_caption]} == wanted


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities, prompts, returns


def test_log_probabilities_equal_those_of_teacher_forcing() -> None:
    keys = jax.random.split(jax.random.key(0), BATCH)
    for result in (run(Options()), run(Options("sample", returns=4, temperature=1.7), keys=keys)):
        for row in range(BATCH):
            captions = result.tokens[row]
            np.testing.assert_allclose(result.log_probs[row], log_probs_of(captions, row), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(result.scores, result.log_probs.sum(axis=2), rtol=1e-6)


PROMPTS = np.array([[BOS, 4, 5], [BOS, 6, PAD], [BOS, PAD, PAD]], np.int32)


@pytest.mark.parametrize("options", [Options(), Options("beam", beams=5, returns=3)], ids=["greedy", "beam"])
def test_prompts_of_different_lengths_are_continued_as_if_alone(options: Options) -> None:
    result = run(options, prompt=PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        count = int((prompt != PAD).sum())
        alone = run(options, prompt=np.repeat(prompt[None, :count], BATCH, axis=0))
        np.testing.assert_array_equal(result.tokens[row], alone.tokens[row])
        np.testing.assert_allclose(result.scores[row], alone.scores[row], rtol=1e-5, atol=1e-6)
        assert (result.tokens[row, :, :count] == prompt[:count]).all()
        assert (result.log_probs[row, :, :count] == 0).all()


def test_the_prefix_length_does_not_change_the_captions() -> None:
    prompt = np.array([[BOS, 4, 5], [BOS, 6, 3], [BOS, 3, 3]], np.int32)
    one, three = (run(Options("beam", beams=4), prompt=prompt, prefix=prefix) for prefix in (1, 3))
    np.testing.assert_array_equal(one.tokens, three.tokens)
    np.testing.assert_allclose(one.scores, three.scores, rtol=1e-5, atol=1e-6)


def test_prefix_lengths_are_powers_of_two() -> None:
    found = [generate.prefix_length([n, n + 3]) for n in range(1, 65)]
    assert all(p <= n for n, p in enumerate(found, 1))
    assert sorted(set(found)) == [1, 2, 4, 8, 16, 32, 64]


def test_ten_batches_with_two_prompt_widths_compile_two_programs() -> None:
    """Widths of 2 and 4 tokens, with varying prompt lengths within them and varying caption lengths."""
    options = Options(length=6)
    call = _compiled.__wrapped__(options, 1)
    rng = np.random.default_rng(0)
    for _ in range(5):
        for width in (2, 4):
            lengths = rng.integers(1, width + 1, BATCH)
            content = rng.integers(3, 7, (BATCH, width))
            prompt = np.where(np.arange(width)[None, :] < lengths[:, None], content, PAD)
            prompt[:, 0] = BOS
            call(image_tokens(), prompt=prompt.astype(np.int32))
    assert call._cache_size() == 2


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_samples_follow_the_models_probabilities() -> None:
    """First tokens of 3,000 captions against the model's probabilities, within four standard deviations."""
    n = 1000
    keys = jax.random.split(jax.random.key(1), BATCH)
    result = run(Options("sample", returns=n, length=2), keys=keys)
    for row in range(BATCH):
        probability = np.exp(teacher_forced(np.array([[BOS]], np.int32), row)[0, 0])
        probability[[BOS, PAD]] = 0
        probability /= probability.sum()
        share = np.bincount(result.tokens[row, :, 1], minlength=7) / n
        assert (np.abs(share - probability) <= 4 * np.sqrt(probability * (1 - probability) / n) + 1e-9).all()


def test_samples_of_an_image_do_not_depend_on_the_batch() -> None:
    keys = jax.random.split(jax.random.key(2), BATCH)
    options = Options("sample", returns=3)
    together = run(options, keys=keys)
    order = np.array([2, 0, 1])
    moved = jax.tree.map(
        np.asarray,
        jax.jit(
            lambda pooled, keys: generate.generate(MODEL, params(), pooled, options, bos_id=BOS, eos_id=EOS, keys=keys)
        )(image_tokens()[order], keys[order]),
    )
    np.testing.assert_array_equal(moved.tokens, together.tokens[order])
    assert len({tuple(t) for t in together.tokens.reshape(-1, 6)}) > 3


def test_top_k_and_top_p_keep_the_likeliest_tokens() -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 50)) * 2, jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4 * 500).reshape(500, 4)

    def initial(options: Options) -> np.ndarray:
        return np.asarray(jax.jit(jax.vmap(lambda k: choosing.draw(logits, k, options)))(keys))

    order = np.argsort(-np.asarray(logits), axis=1)
    five = initial(Options("sample", top_k=5))
    np.testing.assert_array_equal(initial(Options("sample", top_k=1)), np.tile(order[:, 0], (500, 1)))
    nucleus = initial(Options("sample", top_p=0.7, temperature=0.8))
    for row in range(4):
        assert set(five[:, row]) == set(order[row, :5])
        p = np.exp(np.asarray(logits[row], np.float64) / 0.8)
        p = (p / p.sum())[order[row]]
        size = int(np.searchsorted(np.cumsum(p), 0.7) + 1)  # the fewest tokens that reach it
        assert set(nucleus[:, row]) <= set(order[row, :size]) and order[row, 0] in nucleus[:, row]
        assert 1 < size < 30


@pytest.mark.parametrize("kept", [{}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_extreme_temperatures_sample_only_allowed_tokens(kept: dict[str, Any]) -> None:
    """Forbidden tokens stay forbidden at high temperatures; low ones give the likeliest token at any logit level."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, 50)).astype(np.float32)
    logits[:, :40] = choosing.FORBIDDEN
    keys = jax.random.split(jax.random.key(0), 64)
    for temperature in (1e9, 1e30, math.inf):
        initial = choosing.draw(jnp.asarray(logits), keys, Options("sample", temperature=temperature, **kept))
        assert (initial >= 40).all() and len(set(initial.tolist())) > 5
    for temperature in (1e-8, 1e-30, 1e-50):
        for level in (-20.0, 0.0, 20.0):
            moved = np.where(logits > choosing.FORBIDDEN / 2, logits + np.float32(level), logits)
            initial = choosing.draw(jnp.asarray(moved), keys, Options("sample", temperature=temperature, **kept))
            np.testing.assert_array_equal(initial, moved.argmax(axis=1))


# ---------------------------------------------------------------------------------------------------------------------
# Forbidden tokens and penalties, against plain Python


def adjusted(logits: np.ndarray, before: list[int], options: Options) -> np.ndarray:
    out = logits.astype(np.float64).copy()
    for token in set(before):
        p = options.repetition_penalty
        out[token] = out[token] / p if out[token] > 0 else out[token] * p
    size = options.no_repeat_ngram
    if size and len(before) >= size:
        for start in range(len(before) - size + 1):
            if size == 1 or before[start : start + size - 1] == before[len(before) - size + 1 :]:
                out[before[start + size - 1]] = -math.inf
    out[[PAD, BOS]] = -math.inf
    if len(before) + 1 < options.min_length:
        out[EOS] = -math.inf
    return out


@pytest.mark.parametrize(
    "options",
    [
        Options(repetition_penalty=1.3),
        Options(no_repeat_ngram=1),
        Options(no_repeat_ngram=2, min_length=6),
        Options(no_repeat_ngram=3, repetition_penalty=0.7),
    ],
    ids=str,
)
def test_penalties_equal_plain_python(options: Options) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 6, (16, 12)).astype(np.int32)  # few distinct tokens, so that n-grams repeat
    logits = rng.normal(size=(16, 7)).astype(np.float32)
    call = jax.jit(lambda t, at: choosing.adjust(logits, t, at, options, never=(PAD, BOS), eos_id=EOS))
    forbidden = 0
    for at in range(1, 12):
        found = np.asarray(call(tokens, jnp.int32(at)))
        for row in range(16):
            wanted = adjusted(logits[row], tokens[row, :at].tolist(), options)
            np.testing.assert_array_equal(found[row] <= choosing.FORBIDDEN / 2, np.isinf(wanted))
            forbidden += int(np.isinf(wanted).sum()) - 2
            np.testing.assert_allclose(found[row][np.isfinite(wanted)], wanted[np.isfinite(wanted)], rtol=1e-6)
    assert (forbidden > 50) == bool(options.no_repeat_ngram or options.min_length)


def test_captions_respect_min_length_and_no_repeat_ngram() -> None:
    result = run(Options("beam", beams=6, returns=6, min_length=5, no_repeat_ngram=1))
    for tokens in result.tokens.reshape(-1, 6):
        content = tokens[(tokens != PAD) & (tokens != EOS)]
        assert len(set(content)) == len(content)
        assert EOS not in tokens[:4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options("best"), "method='best'.*greedy, sample or beam"),
        (Options(returns=2), "greedy gives one"),
        (Options("beam", beams=2, returns=3), "beams=2 .*returns=3"),
        (Options(length=7), r"length=7 must be 2 to 6"),
        (Options(min_length=7), r"min_length=7 must be 0 to 6"),
        (Options("sample", temperature=0.0), r"temperature=0\.0 .*above 0"),
        (Options("sample", top_p=1.5), r"top_p=1\.5"),
        (Options("sample", top_k=-1), "top_k=-1"),
        (Options(repetition_penalty=0.0), r"repetition_penalty=0\.0"),
        (Options("sample"), "method='sample' with keys=None"),
    ],
)
def test_invalid_options_are_rejected_with_their_value(options: Options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(options)


def test_a_prompt_that_fills_the_length_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"3 tokens.*length=3"):
        run(Options(length=3), prompt=PROMPTS)


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_the_model_takes_no_step_after_the_last_token(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """The prompt gives the first token, and one step gives each of the others."""
    length, step = 5, Decoder.step
    steps: list[int] = []

    def counted(self: Decoder, tokens: Any, cache: Any) -> Any:
        jax.debug.callback(lambda: steps.append(1))
        return step(self, tokens, cache)

    monkeypatch.setattr(Decoder, "step", counted)
    options = Options(method, beams=3, length=length, min_length=length)
    call = jax.jit(lambda pooled: generate.generate(MODEL, params(), pooled, options, bos_id=BOS, eos_id=EOS))
    result = jax.block_until_ready(call(image_tokens()))
    jax.effects_barrier()
    assert np.all(np.asarray(result.tokens)[:, :, 1:] != PAD) and len(steps) == length - 2
