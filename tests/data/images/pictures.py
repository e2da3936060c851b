"""Pictures for the tests of coca_jax.data.images."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps


def save(image: PIL.Image.Image | np.ndarray, kind: str, **options) -> bytes:
    """A file's content."""
    out = io.BytesIO()
    (PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
    return out.getvalue()


def turned(orientation: int) -> PIL.Image.Exif:
    """EXIF data of that orientation."""
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return exif


def reference(data: bytes) -> np.ndarray:
    """What Pillow makes of it, upright, int32 `[h, w, 3]`."""
    return np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB"), np.int32)


def photo(height: int = 240, width: int = 320) -> np.ndarray:
    """Smooth enough that JPEG keeps it, with a different colour in each corner."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = 20 * np.sin(9 * x + 5 * y)
    return np.stack([200 * x + 30, 200 * y + 30, 120 - 80 * x * y + waves], axis=-1).clip(0, 255).astype(np.uint8)


def detailed(height: int = 240, width: int = 320, seed: int = 0) -> np.ndarray:
    """Like a photograph: amplitudes fall with frequency, some edges, colours that go together; uint8 `[h, w, 3]`."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]
    fall = np.maximum(np.hypot(fy, fx), 1 / max(height, width)) ** -1.5
    waves = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) * fall).real for _ in range(3)]
    grey, red, blue = (wave / wave.std() for wave in waves)
    edges = 40.0 * (np.hypot(*np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]) < 0.6)
    channels = [110 + edges + 40 * grey + 12 * red, 110 + edges + 40 * grey, 110 + 40 * grey + 12 * blue]
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int,
    height: int,
    bits: int,
    color_type: int,
    rows: bytes = b"",
    *,
    filtered: bytes = b"",
    interlace: int = 0,
    **chunks: bytes,
) -> bytes:
    """A PNG made by hand: `rows` one after the other, or `filtered`, each row with its filter's number before it."""
    if rows:
        line = len(rows) // height
        filtered = b"".join(b"\0" + rows[i : i + line] for i in range(0, len(rows), line))
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, interlace)
    extra = b"".join(chunk(kind.encode(), data) for kind, data in chunks.items())
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(filtered)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\0"


def xmp(orientation: int | str, *, element: bool = False, quote: str = '"', padding: int = 0) -> bytes:
    """An XMP packet of that orientation, as an attribute or an element, after so many bytes of something else."""
    attribute = "" if element else f" tiff:Orientation={quote}{orientation}{quote}"
    inside = f"<tiff:Orientation>{orientation}</tiff:Orientation>" if element else ""
    return (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        f'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><!--{"history " * (padding // 8)}--><rdf:Description '
        f'xmlns:tiff="http://ns.adobe.com/tiff/1.0/"{attribute}>{inside}</rdf:Description></rdf:RDF></x:xmpmeta>'
    ).encode()


def with_chunks(data: bytes, *chunks: bytes, after: bool = False) -> bytes:
    """The PNG with chunks behind its header, or after its pixels."""
    at = len(data) - 12 if after else 33
    return data[:at] + b"".join(chunks) + data[at:]


def with_segment(data: bytes, marker: int, body: bytes) -> bytes:
    """The JPEG with another segment at its beginning."""
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + data[2:]


def raw_profile(name: str, body: bytes, kind: str = "zTXt") -> bytes:
    """A text chunk as ImageMagick writes it: hexadecimal digits, 72 a line, after the profile's name and length."""
    digits = body.hex()
    lines = "\n".join(digits[i : i + 72] for i in range(0, len(digits), 72))
    return text_chunk(f"Raw profile type {name}", f"\n{name}\n{len(body):8}\n{lines}\n".encode(), kind)


def text_chunk(key: str, text: bytes, kind: str) -> bytes:
    """A PNG's tEXt, zTXt, iTXt, or, compressed, `ziTXt`."""
    head = {"tEXt": b"\0", "zTXt": b"\0\0", "iTXt": b"\0\0\0\0\0", "ziTXt": b"\0\1\0\0\0"}[kind]
    body = zlib.compress(text) if kind.startswith("z") else text
    return chunk(kind[-4:].encode(), key.encode() + head + body)
