"""Tar shards for tests."""

from __future__ import annotations

import io
import pathlib
import tarfile
from collections.abc import Iterable


def tar(members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """The bytes of a tar file with those files in it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
    """What img2dataset writes: three files a sample."""
    members = []
    for i in range(first, first + count):
        key = f"{i:09d}"
        fields = f'{{"caption": "json {i}", "alt": ["one {i}", "two {i}", null, 3], "class": {i % 3}}}'
        members += [
            (f"{key}.jpg", b"picture %d" % i * 100),
            (f"{key}.json", fields.encode()),
            (f"{key}.txt", b"text %d" % i),
        ]
    return members


def write(path: pathlib.Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> pathlib.Path:
    path.write_bytes(tar(members, format))
    return path
