"""Templates and names of classes, over real ArrayRecord files with labels."""

from __future__ import annotations

import pickle

import pytest

from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources import open_source
from coca_jax.data.sources.base import Spec


@pytest.fixture
def spec(small_folder) -> str:
    return f"array_record:{small_folder}/small-*.array_record"


def test_templates_make_the_captions(spec, tmp_path):
    source = open_source(f"{spec}?template=a photo of a {{}}.&template=50%25 {{}} %26 {{}}")
    assert source[1].captions == ("a photo of a green.", "50% green & green")
    (tmp_path / "templates.txt").write_text("  itap of a {}.\n\na {x} of {}\n")
    from_file = open_source(f"{spec}?templates={tmp_path}/templates.txt")
    assert from_file[1].captions == ("itap of a green.", "a {x} of green")
    assert open_source(spec)[1].captions[0] == "a green picture number 1"  # its own, where nothing is asked for
    assert len({s.fingerprint() for s in (source, from_file, open_source(spec))}) == 3
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


def test_names_of_classes(spec, tmp_path):
    path = tmp_path / "names.json"
    path.write_text('{"red": "scarlet", "green": ["emerald", "jade"], "blue": "azure"}')
    source = open_source(f"{spec}?classes={path}&template={{}}")
    assert (source[1].label, source[1].captions) == ("emerald", ("emerald", "jade"))
    assert source.class_names == {"scarlet": ["scarlet"], "emerald": ["emerald", "jade"], "azure": ["azure"]}
    with pytest.raises(BadExample, match=r"record 3 has the label 'yellow', which \?classes= does not name") as error:
        source[3]
    assert error.value.reason == "no_caption"
    assert open_source(f"{spec}?classes={path}")[1].captions == open_source(spec)[1].captions


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("n.txt", "cat\ndog\ncat\n", "the classes 0 and 2 are both named 'cat'"),
        ("n.txt", "cat\n\ndog\n", "class 1 has no name"),
        ("n.txt", "\n", "names no classes"),
        ("n.json", '{"a": 3}', "class a has no name"),
        ("n.json", "3", "names no classes"),
        ("n.json", "{", "is not JSON"),
    ],
)
def test_bad_names(spec, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        open_source(f"{spec}?classes={tmp_path}/{name}")
    assert "\n" not in str(error.value) and name in str(error.value)


def test_bad_templates(spec, tmp_path):
    with pytest.raises(DataError, match=r"the template 'a photo' has no \{\}"):
        open_source(f"{spec}?template=a photo")
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no template"):
        open_source(f"{spec}?templates={tmp_path}/none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 {}")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8"):
        open_source(f"{spec}?templates={tmp_path}/latin.txt")
    with pytest.raises(DataError, match=r"missing\.txt cannot be read"):
        open_source(f"{spec}?templates={tmp_path}/missing.txt")


def test_specifications_taken_apart():
    parsed = Spec.parse("webdataset:/data/a?b-[0-9].tar?caption=a,b&template=one {} + C%2B%2B&template=50%25")
    assert (parsed.kind, parsed.location) == ("webdataset", "/data/a?b-[0-9].tar")
    assert parsed.fields("caption") == ("a", "b")
    assert parsed.options["template"] == ("one {} + C++", "50%")
    split = Spec.parse("tfds:coco/2017:1.1.0?split=train[:90%]+test[10%:20%]")
    assert (split.location, split.get("split")) == ("coco/2017:1.1.0", "train[:90%]+test[10%:20%]")
