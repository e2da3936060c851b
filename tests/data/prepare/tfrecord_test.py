"""TFRecord files, written by another library than reads them here, whole and damaged."""

from __future__ import annotations

import gzip
import pickle
import struct

import pytest
from tensorboardX.record_writer import RecordWriter, masked_crc32c
from tensorflow_datasets.proto import tf_example_pb2

from coca_jax.data.prepare.convert import convert
from coca_jax.data.prepare.inputs import open_inputs
from coca_jax.data.prepare.tfrecord import TFRecords, masked_crc
from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources import open_source
from coca_jax.data.sources.base import Spec
from tests.data.images import pictures

FIELDS = "image=image/encoded&caption=caption/text&label=class&key=name"


def example(**features) -> bytes:
    found = tf_example_pb2.Example()
    for name, value in features.items():
        feature = found.features.feature[name.replace("__", "/")]
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0], int):
            feature.int64_list.value.extend(values)
        else:
            feature.bytes_list.value.extend(v if isinstance(v, bytes) else v.encode() for v in values)
    return found.SerializeToString()


def examples(start: int, stop: int) -> list[bytes]:
    return [
        example(
            image__encoded=pictures.save(pictures.photo(20 + i, 30), "JPEG"),
            caption__text=[f"caption {i}", "größer"],
            **{"class": i % 3},
            name=f"name-{i}",
        )
        for i in range(start, stop)
    ]


def write(path, data: list[bytes]) -> None:
    writer = RecordWriter(str(path))
    for one in data:
        writer.write(one)
    writer.close()


@pytest.fixture
def folder(tmp_path):
    """Two files, the second gzipped: 5 and 7 records."""
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "part-0.tfrecord", examples(0, 5))
    write(folder / "plain", examples(5, 12))
    (folder / "part-1.tfrecord.gz").write_bytes(gzip.compress((folder / "plain").read_bytes()))
    (folder / "plain").unlink()
    return folder


def opened(folder, pattern: str = "part-*", fields: str = FIELDS) -> TFRecords:
    return TFRecords(Spec.parse(f"tfrecord:{folder}/{pattern}?{fields}"))


def test_checksum():
    # The check value of CRC-32C (RFC 3720, appendix B.4: 32 zeros), masked.
    crc = 0x8A9136AA
    assert masked_crc(bytes(32)) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32
    for data in (b"", b"123456789", bytes(range(256))):
        assert masked_crc(data) == masked_crc32c(data)


def test_records(folder):
    source = opened(folder)
    assert len(source) == 12
    for i in (11, 0, 5, 4, 11, 6):  # in any order
        record = source[i]
        assert (record.key, record.captions, record.label) == (f"name-{i}", (f"caption {i}", "größer"), str(i % 3))
        assert record.image == pictures.save(pictures.photo(20 + i, 30), "JPEG")
    with pytest.raises(IndexError):
        source[12]


def test_defaults(folder):
    record = TFRecords(Spec.parse(f"tfrecord:{folder}/part-*"))[6]
    assert (record.key, record.label, record.captions) == ("part-1.tfrecord.gz:1", "", ("caption 6", "größer"))


def test_it_travels_and_is_scanned_once(folder, cache, monkeypatch):
    source = opened(folder)
    source[7]
    assert len(list((cache / "tfrecord").iterdir())) == 2
    monkeypatch.setattr("coca_jax.data.prepare.tfrecord._scan", None)
    for other in (pickle.loads(pickle.dumps(source)), opened(folder)):
        assert other[7] == source[7]
        assert other.fingerprint() == source.fingerprint()
    assert opened(folder, "part-0*").fingerprint() != source.fingerprint()


def test_conversion(folder, tmp_path):
    manifest = convert(
        f"tfrecord:{folder}/part-*?{FIELDS}",
        tmp_path / "out",
        name="set",
        workers=1,
        progress=False,
        records_per_shard=4,
    )
    assert (manifest["records"], manifest["dropped"]) == (12, {})
    source, converted = opened(folder), open_source(f"array_record:{tmp_path}/out/*.array_record")
    assert [converted[i] for i in range(12)] == [source[i] for i in range(12)]
    with pytest.raises(DataError, match="gzipped files can only be read in order"):
        convert(f"tfrecord:{folder}/part-*?{FIELDS}", tmp_path / "other", workers=1, progress=False, shuffle=True)


def damaged(path, offset: int, by: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(by)] = by
    path.write_bytes(data)


def test_bad_data_are_one_bad_record(folder, tmp_path):
    first = len(examples(0, 1)[0])
    damaged(folder / "part-0.tfrecord", 12 + first + 4 + 12 + 100, b"\xff\xee")
    source = opened(folder)
    with pytest.raises(BadExample, match=r"part-0\.tfrecord: record 1: its data do not match their CRC-32C"):
        source[1]
    assert [source[i].key for i in (0, 2)] == ["name-0", "name-2"]
    manifest = convert(f"tfrecord:{folder}/part-*?{FIELDS}", tmp_path / "out", workers=1, progress=False)
    assert (manifest["records"], manifest["dropped"]) == (11, {"unreadable": 1})


@pytest.mark.parametrize("cut", [1, 4, 10, 500])
@pytest.mark.parametrize("name", ["part-0.tfrecord", "part-1.tfrecord.gz"])
def test_a_file_that_is_cut_off(folder, name, cut):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match=rf"{name}.*(is cut off|cannot be read|stream marker)"):
        opened(folder)


def test_a_plain_file_that_is_cut_off_names_the_record(folder):
    path = folder / "part-0.tfrecord"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"part-0\.tfrecord: record 4 is cut off"):
        opened(folder)


def test_a_damaged_length(folder):
    first = len(examples(0, 1)[0])
    damaged(folder / "part-0.tfrecord", 12 + first + 4, struct.pack("<Q", 1 << 40))
    with pytest.raises(DataError, match=r"part-0\.tfrecord: record 1: its length does not match its CRC-32C"):
        opened(folder)


def test_overwritten_after_it_was_opened(folder):
    source = opened(folder)
    write(folder / "part-0.tfrecord", examples(0, 3))
    with pytest.raises(DataError, match="was overwritten"):
        source[4]


@pytest.mark.parametrize("content", [b"not a record", b"\x1f\x8b\x08 nor gzip ....", b"PAR1" * 10])
def test_other_files(folder, content):
    (folder / "part-9").write_bytes(content)
    with pytest.raises(DataError, match="part-9"):
        opened(folder)


def test_empty_files(folder):
    (folder / "part-0.5").write_bytes(b"")
    assert len(opened(folder)) == 12
    with pytest.raises(DataError, match="holds no records"):
        open_inputs(f"tfrecord:{folder}/part-0.5")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("image=jpeg", r"no feature 'jpeg'; name one by \?image=; there are caption/text, class, image/encoded, name"),
        ("caption=caption/text,alt", r"no feature 'alt'; name one by \?caption="),
        ("key=id", r"no feature 'id'; name one by \?key="),
        ("imagee=x", "no option 'imagee'; did you mean image"),
    ],
)
def test_wrong_fields(folder, fields, said):
    with pytest.raises(DataError, match=said):
        opened(folder, fields=fields)


def test_records_that_lack_something(tmp_path):
    whole = {"image__encoded": b"jpeg", "caption__text": "fine"}
    write(
        tmp_path / "few",
        [
            example(**whole),
            example(image__encoded=b"jpeg"),
            example(image__encoded=3, caption__text="numbers"),
            example(image__encoded=b"jpeg", caption__text=b"\xff\xfe"),
            b"\xff\xff\xff\xff",
            example(image__encoded=b"", caption__text="empty"),
        ],
    )
    source = opened(tmp_path, "few", "image=image/encoded")
    assert source[0].captions == ("fine",)
    reasons = []
    for i in range(1, 5):
        with pytest.raises(BadExample, match=rf"few: record {i}") as error:
            source[i]
        reasons.append(error.value.reason)
    assert reasons == ["unreadable", "unreadable", "encoding", "unreadable"]
    assert source[5].image == b""
