from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import pathlib
import runpy
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from coca_jax import config
from coca_jax.config import Config, ConfigError, mesh, reading, rules
from tests import tiny

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
# Recipe -> devices that it is meant for. A recipe that is not named here fails the test of their names.
RECIPES = {
    "coca_base": 256,
    "coca_large": 512,
    "coca_giant": 2048,
    "debug": 1,
    "emoji": 1,
    "evaluate": 1,
    "quickstart": 1,
}


def recipe(name: str) -> Config:
    return config.from_config_dict(runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]())


def broken(**changes: Any) -> Callable[[], None]:
    """Checks the small configuration with other values, on 8 devices."""
    return lambda: config.check(tiny.replace(tiny.CONFIG, **changes), 8)


def on(platform: str, slice_count: int = 1, **changes: Any) -> Callable[[], None]:
    """Checks the small configuration with other values, on 8 devices of a platform."""
    c = tiny.replace(tiny.CONFIG, **changes)
    return lambda: config.check(c, 8, slice_count=slice_count, platform=platform)


def read(values: Any) -> Callable[[], object]:
    return lambda: config.from_config_dict(values)


# What cannot run, and what the message must say: the key, its value, what would work.
BROKEN: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "unknown key": (
        read({"model": {"image": {"widht": 3}}}),
        ("config.model.image.widht is not a key", "near it: config.model.image.width"),
    ),
    "unknown key like no other": (read({"zzz": 1}), ("config.zzz", "config.batch_size", "config.optimizer")),
    "unknown path": (lambda: config.check_key("optimizer.peak_rl"), ("config.optimizer.peak_rl", "peak_lr")),
    "path below a value": (lambda: config.check_key("steps.x"), ("config.steps.x", "config.steps holds a value")),
    "value for a group": (read({"model": {"image": 3}}), ("config.model.image=3", "group of keys")),
    "text for a number": (read({"steps": "many"}), ("config.steps='many'", "str, not a int")),
    "share for a count": (read({"steps": 1.5}), ("config.steps=1.5", "float, not a int")),
    "truth for a count": (read({"steps": True}), ("config.steps=True", "bool, not a int")),
    "truth for a number": (read({"optimizer": {"eps": True}}), ("config.optimizer.eps=True", "bool, not a float")),
    "number for a truth": (read({"data": {"flip": 1}}), ("config.data.flip=1", "int, not a bool")),
    "tuple of another length": (
        read({"data": {"std": [1, 2]}}),
        ("config.data.std=[1, 2]", "tuple[float, float, float]"),
    ),
    "text for a tuple": (read({"evaluate": {"splits": "a"}}), ("config.evaluate.splits='a'", "tuple[str, ...]")),
    "tuple of another type": (read({"evaluate": {"splits": [1]}}), ("config.evaluate.splits=1", "int, not a str")),
    "seed": (broken(seed=-1), ("config.seed=-1", "0..4294967295")),
    "nothing to train": (
        broken(loss__lambda_con=0.0, loss__lambda_cap=0.0),
        ("config.loss.lambda_con=0", "config.loss.lambda_cap=0", "set one above 0"),
    ),
    "captions without a decoder": (
        broken(model__text__n_multi=0),
        ("config.model.text.n_multi=0", "config.loss.lambda_cap=2.0", "set n_multi to 1 or more"),
    ),
    "crop area": (broken(data__crop_area=(0.5, 1.5)), ("config.data.crop_area=(0.5, 1.5)", "0 < low <= high <= 1")),
    "crop ratio": (broken(data__crop_ratio=(2.0, 1.0)), ("config.data.crop_ratio=(2.0, 1.0)", "0 < low <= high")),
    "background": (broken(data__background=(0, 0, 256)), ("config.data.background=(0, 0, 256)", "0..255")),
    "std": (broken(data__std=(1.0, 0.0, 1.0)), ("config.data.std=(1.0, 0.0, 1.0)", "more than 0")),
    "decay mask": (broken(optimizer__decay_mask="("), ("config.optimizer.decay_mask: '('", "an example: '.*/kernel$'")),
    "freeze": (broken(optimizer__freeze=("a", "[")), ("config.optimizer.freeze: '['", "regular expression")),
    "sigmoid without a bias": (
        broken(loss__contrastive="sigmoid"),
        ("config.model.logit_bias=0", "config.loss.contrastive='sigmoid'", "set it to -10", "temperature to 0.1"),
    ),
    "softmax with a bias": (
        broken(model__logit_bias=-10.0),
        ("config.model.logit_bias=-10.0", "config.loss.contrastive='softmax'", "set it to 0"),
    ),
    "second moments that Adafactor does not have": (
        broken(optimizer__name="adafactor", optimizer__second_moment_dtype="bfloat16"),
        ("config.optimizer.second_moment_dtype='bfloat16'", "adamw and muon", "set it to 'float32'"),
    ),
    "momentum that stands still": (broken(optimizer__b1=1.0), ("config.optimizer.b1=1.0", "below 1, e.g. 0.9")),
    "moments that stand still": (
        broken(optimizer__name="muon", optimizer__b2=1.0),
        ("config.optimizer.b2=1.0", "below 1, e.g. 0.999"),
    ),
    "low-rank updates of nothing": (
        broken(lora__rank=2, lora__kernels=()),
        ("config.lora.kernels=()", "config.lora.rank=2", "or set rank to 0"),
    ),
    "nothing in a denominator": (
        broken(optimizer__name="adamw", optimizer__eps=0.0),
        ("config.optimizer.eps=0.0", "name='adamw'", "set it to 1e-8"),
    ),
    "a moving average that never moves": (
        broken(optimizer__ema_decay=1.0),
        ("config.optimizer.ema_decay=1.0", "set it below 1, e.g. 0.9999"),
    ),
    "a split without a name": (
        broken(evaluate__splits=("",)),
        ("config.evaluate.splits=('',)", "by an empty text", '--config.evaluate.splits="()"'),
    ),
    "no prompts": (
        broken(evaluate__zero_shot="emoji:all", evaluate__prompts=()),
        ("config.evaluate.prompts is empty", "config.evaluate.zero_shot='emoji:all'", "('a photo of a {}.',)"),
    ),
    "a prompt without a place": (
        broken(evaluate__prompts=("imagenet", "a photo")),
        ("config.evaluate.prompts: 'a photo'", "write {} where it goes", "'imagenet' for CLIP's"),
    ),
    "batch": (broken(batch_size=12), ("config.batch_size=12", "8 shards", "near it: 8, 16")),
    "batch smaller than the mesh": (broken(batch_size=3), ("config.batch_size=3", "near it: 8, 16")),
    "microbatches": (broken(microbatches=3), ("config.microbatches=3", "config.batch_size=8", "it may be 1, 2, 4, 8")),
    "microbatches smaller than the mesh": (
        broken(batch_size=16, microbatches=4),
        ("config.microbatches=4", "config.batch_size=16", "4 rows", "8 shards", "it may be 1, 2"),
    ),
    "heads over devices": (
        broken(mesh__tensor=8),
        ("config.model.image.heads=2", "config.mesh.tensor=8", "it may be 1, 2"),
    ),
    "two axes are the rest": (
        broken(mesh__replica=-1),
        ("replica=-1, fsdp=-1, tensor=1", "at most one is -1"),
    ),
    "an axis of nothing": (broken(mesh__replica=0), ("replica=0", "each axis is 1 or more")),
    "an axis that does not divide": (
        broken(mesh__replica=3),
        ("replica=3", "3 does not divide the 8 devices", "what does: 1, 2, 4, 8"),
    ),
    "slices that are not there": (
        broken(mesh__dcn_replica=2),
        ("dcn_replica=2, dcn_fsdp=1", "names 2 slices where there are 1"),
    ),
    "slices that do not divide": (
        on("tpu", slice_count=4, mesh__dcn_replica=3, mesh__dcn_fsdp=-1),
        ("dcn_replica=3, dcn_fsdp=-1", "3 does not divide the 4 slices", "what does: 1, 2, 4"),
    ),
    "two kinds of slices are the rest": (
        on("gpu", slice_count=2, mesh__dcn_replica=-1, mesh__dcn_fsdp=-1),
        ("dcn_replica=-1, dcn_fsdp=-1", "at most one is -1"),
    ),
    "devices of a slice": (
        on("tpu", slice_count=2, mesh__dcn_replica=-1, mesh__fsdp=8),
        ("replica=1, fsdp=8, tensor=1", "names 8 devices of each of the 2 slices where there are 4"),
    ),
    "slices without an axis": (
        on("tpu", slice_count=2),
        ("dcn_replica=1, dcn_fsdp=1", "2 slices", "8 chips", "set config.mesh.dcn_replica=-1"),
    ),
    "cudnn elsewhere": (
        on("cpu", model__attention="cudnn", model__dtype="bfloat16"),
        ("config.model.attention='cudnn' runs on a gpu", "this is a cpu", "'xla'"),
    ),
    "too many keys for flash": (
        on("tpu", model__attention="flash", model__image__size=504, model__image__patch=14, model__dtype="float32"),
        ("attention='flash' takes up to 1,024 tokens of float32", "size=504", "gives 1,296", "'xla'"),
    ),
    "flash elsewhere": (
        on("gpu", model__attention="flash"),
        ("config.model.attention='flash' runs on a tpu", "this is a gpu", "'xla'"),
    ),
    "cudnn in float32": (
        broken(model__attention="cudnn"),
        ("config.model.attention='cudnn'", "config.model.dtype='float32'", "'bfloat16'"),
    ),
    "cudnn with narrow heads": (
        broken(model__attention="cudnn", model__dtype="bfloat16", model__image__heads=4),
        ("multiple of 8 up to 128", "config.model.image.width=16", "config.model.image.heads=4", "is 4"),
    ),
    "axes of other devices": (broken(mesh__fsdp=4), ("fsdp=4", "names 4 devices where there are 8", "one axis to -1")),
    "patches": (
        broken(model__image__size=18),
        ("config.model.image.size=18", "config.model.image.patch=4", "near it: 16, 20"),
    ),
    "image heads": (
        broken(model__image__heads=3),
        ("config.model.image.heads=3", "config.model.image.width=16", "near it: 1, 2, 4"),
    ),
    "text heads": (broken(model__text__heads=5), ("config.model.text.heads=5", "config.model.text.width=16", "4")),
    "pooler heads": (broken(model__pooler__heads=3), ("config.model.pooler.heads=3", "config.model.text.width=16")),
    "image sines": (
        broken(model__image__position="sincos", model__image__width=18),
        ("config.model.image.width=18", "multiple of 4"),
    ),
    "text sines": (
        broken(model__text__position="sincos", model__text__width=17, model__text__heads=1, model__pooler__heads=1),
        ("config.model.text.width=17", "even"),
    ),
    "single pooler": (
        broken(model__pooler__kind="single", model__pooler__queries=1),
        ("config.model.pooler.queries=1", "2 or more"),
    ),
    "padding": (broken(model__text__pad_id=40), ("config.model.text.pad_id=40", "vocab_size=40", "0..39")),
    "length": (broken(model__text__length=2), ("config.model.text.length=2", "3 or more")),
}


def _changed(path: str, value: Any) -> Callable[[], None]:
    return broken(**{path.replace(".", "__"): value})


for _path, _choices in rules.CHOICES.items():
    BROKEN[f"choice of {_path}"] = _changed(_path, "other"), (f"config.{_path}='other'", ", ".join(_choices))
for _path in rules.POSITIVE:
    BROKEN[f"positive {_path}"] = _changed(_path, 0), (f"config.{_path}=0 ", "more than 0")
for _path in ("steps", "model.image.width", "loss.caption_chunk"):
    BROKEN[f"large {_path}"] = _changed(_path, 10**30), (f"config.{_path} must be no more than 2147483647", "digit")
for _path in rules.NOT_NEGATIVE:
    BROKEN[f"not negative {_path}"] = _changed(_path, -1), (f"config.{_path}=-1 ", "0 or more")
for _path in rules.SHARE:
    BROKEN[f"share {_path}"] = _changed(_path, 1.5), (f"config.{_path}=1.5 ", "0..1")


def test_adafactors_second_moments_need_no_cap() -> None:
    broken(optimizer__name="adafactor", optimizer__b2=1.0)()


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_run_is_refused_in_one_line(name: str) -> None:
    start, said = BROKEN[name]
    with pytest.raises(ConfigError) as error:
        start()
    message = str(error.value)
    assert "\n" not in message
    assert [part for part in said if part not in message] == [], message


def test_every_rule_has_an_example() -> None:
    written = set()
    functions = (config.check, config.check_model, config.mesh_shape, mesh._resolve, config.check_key)
    for function in (*functions, reading._known, reading._freeze, reading._coerce):
        lines, first = inspect.getsourcelines(function)
        for node in ast.walk(ast.parse("".join(lines))):
            if isinstance(node, ast.Raise):
                written.add((function.__name__, first + node.lineno - 1))
    raised = set()
    for start, _ in BROKEN.values():
        with pytest.raises(ConfigError) as error:
            start()
        last = error.traceback[-1]
        raised.add((last.frame.code.name, last.lineno + 1))
    assert written and sorted(written - raised) == [], "these lines of coca_jax/config are raised by no example here"


def test_every_number_has_a_bound() -> None:
    tables = {*rules.POSITIVE, *rules.NOT_NEGATIVE, *rules.SHARE}
    elsewhere = {
        "seed",
        "model.logit_bias",
        "mesh.replica",
        "mesh.fsdp",
        "mesh.tensor",
        "mesh.dcn_replica",
        "mesh.dcn_fsdp",
    }  # have rules of their own

    def numbers(values: dict[str, Any], path: str = "") -> list[str]:
        found = []
        for key, value in values.items():
            if isinstance(value, dict):
                found += numbers(value, f"{path}{key}.")
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                found.append(path + key)
        return found

    everything = numbers(json.loads(config.to_json(Config())))
    assert sorted(everything) == sorted(tables | elsewhere)


@pytest.mark.parametrize("value", [tiny.CONFIG, Config(), *map(recipe, RECIPES)], ids=["tiny", "default", *RECIPES])
def test_json_gives_back_the_same(value: Config) -> None:
    assert config.from_config_dict(json.loads(config.to_json(value))) == value


def test_lists_become_tuples_and_whole_numbers_floats() -> None:
    read = config.from_config_dict({"data": {"std": [1, 2, 3]}, "evaluate": {"prompts": ["{}", "a {}"]}})
    assert read.data.std == (1.0, 2.0, 3.0) and all(type(v) is float for v in read.data.std)
    assert read.evaluate.prompts == ("{}", "a {}") and hash(read)
    assert read.steps == Config().steps  # a key that is not there takes its default


def test_the_default_is_every_key_with_its_default() -> None:
    assert config.from_config_dict(config.default()) == Config()


def test_a_typo_in_a_recipe_fails_with_a_suggestion() -> None:
    c = config.default()
    with pytest.raises(AttributeError, match='Did you mean "peak_lr"'):
        c.optimizer.peak_rl = 1e-3
    with pytest.raises(KeyError, match='Did you mean "width"'):
        c.model.image.update(widht=3)
    with pytest.raises(TypeError, match="steps"):
        c.steps = "many"
    assert config.from_config_dict(c) == Config()  # nothing of it was taken over


@pytest.mark.parametrize(
    ("mesh", "devices", "shape"),
    [
        (config.Mesh(), 8, (1, 8, 1)),
        (config.Mesh(), 1, (1, 1, 1)),
        (config.Mesh(replica=-1, fsdp=2, tensor=2), 8, (2, 2, 2)),
        (config.Mesh(replica=2, fsdp=4), 8, (2, 4, 1)),
        (config.Mesh(replica=-1, fsdp=8), 16, (2, 8, 1)),
        (config.Mesh(replica=-1, fsdp=8), 4, (1, 4, 1)),
        (config.Mesh(replica=-1, fsdp=8), 1, (1, 1, 1)),
        (config.Mesh(replica=-1, fsdp=8, tensor=2), 4, (1, 2, 2)),
    ],
)
def test_the_mesh_fills_the_devices(mesh: config.Mesh, devices: int, shape: tuple[int, int, int]) -> None:
    assert config.mesh_shape(mesh, devices) == shape


@pytest.mark.parametrize(
    ("mesh", "slices", "shape", "dcn"),
    [
        (config.Mesh(dcn_replica=-1), 1, (1, 16, 1), (1, 1, 1)),  # the rest of one slice is nothing
        (config.Mesh(dcn_replica=-1), 4, (4, 4, 1), (4, 1, 1)),
        (config.Mesh(dcn_fsdp=4, tensor=2), 4, (1, 8, 2), (1, 4, 1)),
        (config.Mesh(replica=2, dcn_replica=2, dcn_fsdp=-1), 4, (4, 4, 1), (2, 2, 1)),
    ],
)
def test_sizes_are_inside_a_slice_where_slices_have_an_axis(
    mesh: config.Mesh, slices: int, shape: tuple[int, int, int], dcn: tuple[int, int, int]
) -> None:
    assert config.mesh_shape(mesh, 16, slice_count=slices, platform="tpu") == shape
    assert config.dcn_shape(mesh, slices) == dcn


def test_groups_of_devices_that_are_no_slices_need_no_axis() -> None:
    assert config.mesh_shape(config.Mesh(), 16, slice_count=2, platform="gpu") == (1, 16, 1)


def test_every_recipe_is_named() -> None:
    assert {file.stem for file in CONFIGS.glob("*.py")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_run(name: str) -> None:
    config.check(recipe(name), RECIPES[name])


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.py")), ids=lambda file: file.stem)
def test_a_recipes_command_can_be_copied_from_its_file(file: pathlib.Path) -> None:
    """A docstring that is not raw has two backslashes where the shell wants one."""
    text = file.read_text()
    assert (ast.get_docstring(ast.parse(text), clean=False) or "?") in text


def test_the_small_configuration_of_the_tests_can_run() -> None:
    config.check(tiny.CONFIG, 8)
    for path in (*rules.CHOICES, *rules.POSITIVE):
        config.check_key(path)


def test_every_key_and_section_is_listed_with_its_meaning() -> None:
    listed = config.list_keys()
    paths = [path for path, _ in _leaves(Config)]
    assert len(paths) > 100
    for path in paths:
        section, _, name = path.rpartition(".")
        title, _, shown = config.list_keys(path).rpartition(f"  {name}=")
        assert " ".join(title.split()).startswith(f"{section}: " if section else "")
        assert len(shown.split()) > 1 and f"  {name}={shown}" in listed, f"{path} has no comment"
    assert max(map(len, listed.splitlines())) <= 100


def test_keys_are_listed_by_section_by_path_and_by_last_name() -> None:
    assert config.list_keys("config.model.image").startswith("model.image: ")
    assert "model.text" not in config.list_keys("model.image")
    assert config.list_keys("optimizer.peak_lr") == config.list_keys("peak_lr")
    assert config.list_keys("scan_unroll").count("scan_unroll=1") == 2
    with pytest.raises(ConfigError, match=r"model.imag .*near it: model.image"):
        config.list_keys("model.imag")


def _leaves(cls: type, path: str = "") -> Iterator[tuple[str, type]]:
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _leaves(typing.cast(type, hint), f"{path}{name}.")
        else:
            yield path + name, hint
