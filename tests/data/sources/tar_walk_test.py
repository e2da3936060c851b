"""The walk over tar headers, against the standard library's and against files that mean harm."""

from __future__ import annotations

import io
import random
import tarfile

import pytest

from coca_jax.data.sources import tar_walk
from coca_jax.data.sources.tar_walk import DamagedTar, Member
from tests.data.sources import tars


def reader(data: bytes) -> tar_walk.Read:
    return lambda start, length: data[start : start + length]


def walked(data: bytes) -> list[Member]:
    return list(tar_walk.walk(reader(data), len(data)))


def by_tarfile(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [(m.name, m.offset_data, m.size) for m in archive if m.isreg() and not m.issparse()]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_same_members_as_tarfile(format):
    draw = random.Random(format)
    out = io.BytesIO()
    options = {"pax_headers": {"comment": "for all"}} if format == tarfile.PAX_FORMAT else {}
    with tarfile.open(fileobj=out, mode="w", format=format, **options) as archive:
        for i in range(200):
            info = tarfile.TarInfo("/".join(["folder" * draw.randrange(1, 8)] * draw.randrange(3)) + f"ü{i}.jpg")
            if format != tarfile.USTAR_FORMAT and i % 5 == 0:
                info.name = "x" * draw.randrange(90, 700) + info.name
            info.type = draw.choice(
                [tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE]
            )
            info.linkname = (
                "/etc/passwd" * (20 if format != tarfile.USTAR_FORMAT and i % 3 else 1)
                if info.issym() or info.islnk()
                else ""
            )
            info.size = draw.choice([0, 1, 511, 512, 513, 5000]) if info.isreg() else 0
            if format == tarfile.PAX_FORMAT and i % 7 == 0:
                info.pax_headers = {"mtime": "1.5", "SCHILY.xattr.a": "line\nline"}
            archive.addfile(info, io.BytesIO(draw.randbytes(info.size)))
    data = out.getvalue()
    found = walked(data)
    assert [(m.name, m.offset, m.size) for m in found] == by_tarfile(data)
    assert len(found) > 60
    for member in found:  # what random reads go by
        header = data[member.header : member.offset]
        assert tar_walk.name_in(header) == (member.name, member.size)


def test_sizes_beyond_octal():
    """A header of 10 GB, base 256 in GNU's format and a record in pax: the size is known before the data are there."""
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("large.jpg")
        info.size = 10 << 30
        header = info.tobuf(format)
        with pytest.raises(DamagedTar, match=r"ends inside 'large.jpg'"):
            walked(header)
        assert tar_walk.name_in(header) == ("large.jpg", 10 << 30)


def test_sparse_members_are_passed_over():
    def header(name: str, size: int, kind: bytes, sparse: bytes = b"") -> bytes:
        info = tarfile.TarInfo(name)
        info.size, info.type = size, kind
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        block[386 : 386 + len(sparse)] = sparse
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)

    entry = b"%011o\0%011o\0" % (0, 512)
    old = header("old.jpg", 512, tarfile.GNUTYPE_SPARSE, entry * 4 + b"\1" + b"%011o\0" % 9000)
    more = (entry * 21 + b"\1").ljust(512, b"\0") + (entry * 21 + b"\0").ljust(512, b"\0")
    pax = tarfile.TarInfo("new.jpg")
    pax.size, pax.pax_headers = 512, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "n.jpg"}
    data = old + more + b"s" * 512 + pax.tobuf(tarfile.PAX_FORMAT) + b"1\n0\n9\n".ljust(512, b"\0")
    data += tars.tar([("plain.jpg", b"plain")])
    assert [(member.name, data[member.offset :][: member.size]) for member in walked(data)] == [("plain.jpg", b"plain")]


def test_the_end_may_be_missing():
    data = tars.tar([("a.jpg", b"a" * 700)])
    assert [member.name for member in walked(data[:1536])] == ["a.jpg"]
    assert [member.name for member in walked(data[: 512 + 700])] == ["a.jpg"]  # even without the padding
    assert walked(b"") == []


def test_every_cut_is_noticed():
    """Of any first part of a shard the same members are told, and that it is cut where a member or a header is."""
    data = tars.tar([("a.jpg", b"a" * 700), ("n" * 150 + ".jpg", b"b" * 512), ("c.txt", b"")], tarfile.GNU_FORMAT)
    whole = walked(data)
    assert len(whole) == 3
    for length in range(whole[-1].offset):
        found: list[Member] = []
        cut = False
        try:
            for member in tar_walk.walk(reader(data[:length]), length):
                found.append(member)
        except DamagedTar:
            cut = True
        assert found == whole[: len(found)]
        inside = [member for member in found if member.offset + member.size > length]
        assert bool(inside) <= cut
        assert cut or length == 0 or any(length >= m.offset + m.size for m in found[-1:])


@pytest.mark.parametrize("seed", range(20))
def test_damaged_bytes_raise_nothing_else(seed):
    draw = random.Random(seed)
    data = bytearray(tars.tar([*tars.samples(0, 4), ("p" * 300 + ".jpg", b"x")], draw.choice([1, 2])))
    for _ in range(30):
        damaged = bytearray(data)
        at = draw.randrange(0, len(data), 512)
        damaged[at : at + 512] = draw.randbytes(512) if draw.random() < 0.5 else bytes(damaged[at : at + 512][::-1])
        try:
            found = walked(bytes(damaged))
        except DamagedTar as error:
            assert "\n" not in str(error)
        else:
            assert len(found) <= 13


def test_hostile_headers():
    def pax(content: bytes) -> bytes:
        info = tarfile.TarInfo("././@PaxHeader")
        info.type, info.size = tarfile.XHDTYPE, len(content)
        return info.tobuf(tarfile.USTAR_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")

    plain = tars.tar([("a.jpg", b"a")])
    for content in (b"9999 path=x\n", b"0 path=x\n", b"-5 path=x\n", b"path=x\n", b"10 path:x\n", b"12 size=-1\n\n"):
        with pytest.raises(DamagedTar):
            walked(pax(content) + plain)
    with pytest.raises(DamagedTar, match="has the size"):
        walked(pax(b"12 size=-10\n") + plain)
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 5 << 30
    with pytest.raises(DamagedTar, match="announces a name of"):  # and does not read it
        walked(long.tobuf(tarfile.GNU_FORMAT) + plain)
    long.size = 8
    chain = (long.tobuf(tarfile.GNU_FORMAT) + b"other\0\0\0".ljust(512, b"\0")) * 5000  # deeper than Python recurses
    assert [member.name for member in walked(chain + plain)] == ["other"]
