"""Images from wherever they are, as PIL images in RGB.

An image may be a PIL image, a path, a file:// or http(s):// URL, a data: URI, base64 text, bytes, a NumPy array, or the
dict of bytes and path that `datasets` stores. What cannot be used raises ImageError before training, not in the middle
of it; a URL is downloaded once, into a folder.
"""

import base64
import binascii
import hashlib
import http.client
import io
import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

DOWNLOADS = 8  # at a time
TIMEOUT = 30  # seconds a server may take to answer
# Modes of one number a pixel beyond 8 bits: converting them would clip, and what is white is not ours to say.
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_ORIENTATION = 0x0112  # of EXIF
_DATA_URI = re.compile(r"data:[^,]*?(;base64)?,", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")  # with - and _ it is the alphabet for URLs
_URL_ALPHABET = str.maketrans("-_", "+/")
_TAKEN_APART = {"im", "mode", "size", "readonly"}  # attributes of a PIL image
_SHORTEST_BASE64 = 64  # characters; shorter text is taken for a path


class ImageError(ValueError):
    """An image that cannot be used; the message says what came and what is expected."""


def default_cache() -> Path:
    """Folder of downloaded images: $JAXTUNE_IMAGES, or jaxtune/images in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("JAXTUNE_IMAGES") or Path(base) / "jaxtune" / "images")


def open_image(source: Any, cache: Path | None = None, *, rgb: bool = True) -> Image.Image:
    """An image, decoded, turned as its EXIF orientation says.

    Args:
        source: see above; an ImageError, of an image that failed before, is raised again.
        cache: folder of downloaded images; None: `default_cache`.
        rgb: False: in its own mode.

    Raises:
        ImageError: missing, damaged, empty or of a kind that is no image.
    """
    image = _opened(source, cache)
    if 0 in image.size:
        raise ImageError(f"the image is {image.width} × {image.height} pixels; both sides must be at least 1")
    try:
        image.load()
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        image = ImageOps.exif_transpose(image) if turned else image
        return to_rgb(image) if rgb else image
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # PIL's decoders raise all of them
        raise ImageError(f"{describe(source)} is damaged: {error}") from error


def peek(source: Any, cache: Path | None = None) -> Image.Image:
    """An image in its own mode, turned; unless it has to be, its pixels are decoded when they are asked for.

    Args:
        source, cache: as of `open_image`.

    Raises:
        ImageError: see there.
    """
    image = _opened(source, cache)
    turned = "exif" in image.info and image.getexif().get(_ORIENTATION, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB: what is transparent becomes white, as qwen_vl_utils has it; other modes are converted by PIL.

    Raises:
        ImageError: more than 8 bits a pixel, whose white nobody knows.

    >>> to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
    (255, 255, 255)
    """
    if image.mode in _DEEP_MODES:
        raise ImageError(
            f"the image has mode {image.mode} ({'32' if image.mode in 'IF' else '16'} bits a pixel); expected 8 bits a "
            "channel. Scale it to 0…255 and convert it to 'L' first"
        )
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _opened(source: Any, cache: Path | None) -> Image.Image:
    if isinstance(source, ImageError):
        raise source
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, Mapping):
        if _TAKEN_APART <= source.keys():
            raise ImageError(
                "Dataset.map() has stored the attributes of a PIL image, not the image: it knows images in columns, "
                "not in messages. Convert rows to a list, [convert(row) for row in dataset], or give the function that "
                "converts a row as VisionDataCollator's formatting_func"
            )
        if (found := stored_in(source)) is None:
            raise ImageError(
                f"a dict with the keys {', '.join(map(str, source)) or '(none)'} and no image in it; expected bytes or "
                "path"
            )
        return _opened(found, cache)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read(io.BytesIO(source), source)
    if isinstance(source, os.PathLike):
        return _read(Path(source), source)
    if isinstance(source, str) and source:
        return _read(_of_text(source, cache), source)
    raise ImageError(
        f"{describe(source)} is no image; expected a PIL image, a path, a URL, a data URI, base64 text, bytes, or a "
        "dict with bytes or path"
    )


def stored_in(source: Mapping[str, Any]) -> Any:
    """What a dict of `datasets` ({"bytes", "path"}) or of a message ({"url"}) holds, or None."""
    keys = ("bytes", "path", "url", "image", "base64")
    return next((source[key] for key in keys if source.get(key) is not None), None)


def _of_text(text: str, cache: Path | None) -> Path | io.BytesIO:
    if is_url(text):
        return fetch(text, default_cache() if cache is None else cache)
    if text[:7].lower() == "file://":
        return Path(unquote(urlparse(text).path))
    if match := _DATA_URI.match(text):
        body = text[match.end() :]
        return _base64(body, text) if match[1] else io.BytesIO(unquote(body).encode("latin-1"))
    if len(text) >= _SHORTEST_BASE64 and _BASE64.fullmatch(text) and not is_file(text):
        return _base64(text, text)
    return Path(text).expanduser()


def is_file(text: str) -> bool:
    """Whether a text, of whatever length, is a file's path."""
    try:
        return Path(text).is_file()
    except OSError:  # too long for a name
        return False


def _base64(body: str, source: str) -> io.BytesIO:
    digits = "".join(body.split()).translate(_URL_ALPHABET).rstrip("=")
    try:
        return io.BytesIO(base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True))
    except binascii.Error as error:
        raise ImageError(f"{describe(source)} is no base64 and no file: {error}") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] not in (1, 3, 4))
    ):
        raise ImageError(
            f"an array {array.dtype} {list(array.shape)} is no image; expected uint8 [height, width] or "
            "[height, width, 3 or 4]"
        )
    if 0 in array.shape:
        raise ImageError(
            f"the image is {array.shape[1]} × {array.shape[0]} pixels; both sides must be at least 1"
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _read(file: Path | io.BytesIO, source: Any) -> Image.Image:
    try:
        image = Image.open(file)
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Image.DecompressionBombError(f"{image.width} × {image.height} pixels")
        return image
    except FileNotFoundError as error:
        raise ImageError(f"{describe(source)} does not exist (current folder: {Path.cwd()})") from error
    except Image.DecompressionBombError as error:
        most = f"{(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.1f} million pixels"
        raise ImageError(f"{describe(source)} is too large ({error}); PIL reads {most} at most") from error
    except UnidentifiedImageError as error:
        taken = isinstance(source, str) and isinstance(file, io.BytesIO)
        why = "no format that PIL knows" + ("; it is no file, so it was taken for base64" if taken else "")
        raise ImageError(f"{describe(source)} cannot be read as an image: {why}") from error
    except (OSError, SyntaxError, ValueError) as error:  # PIL's decoders raise all of them
        why = getattr(error, "strerror", None) or error
        raise ImageError(f"{describe(source)} cannot be read as an image: {why}") from error


def describe(source: Any) -> str:
    """A source in a few words, for messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes ({bytes(source[:8])!r} …)" if len(source) else "0 bytes"
    if isinstance(source, (str, os.PathLike)):
        text = str(source)
        return repr(text) if len(text) <= 200 else f"{text[:40]!r} … ({len(text)} characters)"
    if source is None or isinstance(source, (bool, int, float)):
        return repr(source)
    return f"a {type(source).__name__}"


# -- URLs ----------------------------------------------------------------------------------------------------


def is_url(source: Any) -> bool:
    """Whether a source has to be downloaded."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def fetch(url: str, folder: Path) -> Path:
    """The file of a URL in `folder`, downloaded unless it is there; what is no image is not put there.

    Raises:
        ImageError: it cannot be downloaded, or is no image; says why.
    """
    file = folder / hashlib.sha256(url.encode()).hexdigest()[:32]
    if file.is_file():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    request = urllib.request.Request(url, headers={"User-Agent": "jaxtune"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            part.write_bytes(answer.read())
        _read(part, url).load()
        return part.replace(file)
    except ImageError:
        raise
    # URLErrors and time-outs are OSErrors, PIL's any of these
    except (OSError, SyntaxError, ValueError, http.client.HTTPException) as error:
        raise ImageError(f"{url} cannot be downloaded: {getattr(error, 'reason', error)}") from error
    finally:
        part.unlink(missing_ok=True)


def prefetch(urls: Iterable[str], folder: Path, *, progress: bool = True) -> dict[str, ImageError]:
    """Downloads what is not in `folder` yet, several at a time; url -> why it failed."""
    wanted = list(dict.fromkeys(urls))
    failed: dict[str, ImageError] = {}

    def get(url: str) -> None:
        try:
            fetch(url, folder)
        except ImageError as error:
            failed[url] = error

    if wanted:
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            done = pool.map(get, wanted)
            list(
                tqdm(
                    done, "Downloading images", len(wanted), unit="image", disable=None if progress else True
                )
            )
    return failed
