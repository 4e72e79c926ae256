"""Opening images: every kind of source, modes, and errors that say what came; resize policies."""

import base64
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tiny_processors
from PIL import Image

from jaxtune.data import VisionDataCollator
from jaxtune.data.image_sources import row_document
from jaxtune.data.images import ImageError, open_image, prefetch
from jaxtune.data.resize import Resize, resize_policy


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def server(png):
    """A web server: /image.png is one, /text becomes one when it is in `mended`, all else is missing; `requests` are
    the paths asked for."""

    requests: list[str] = []
    mended: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            bodies = {"/image.png": png, "/text": b"<html>"} | dict.fromkeys(mended, png)
            body = bodies.get(self.path)
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_): ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{http.server_port}", requests=requests, mended=mended)
    http.shutdown()


def test_every_source_gives_the_same_pixels(picture, png, tmp_path, server):
    path = tmp_path / "a b.png"
    path.write_bytes(png)
    text = base64.b64encode(png).decode()
    sources = [
        *(picture, np.asarray(picture), png, bytearray(png), path, str(path), path.as_uri()),
        *(f"data:image/png;base64,{text}", text, "\n".join([text[:40], text[40:]])),
        *(base64.urlsafe_b64encode(data).decode().rstrip("=") for data in (png, png + b" ", png + b"  ")),
        *({"bytes": png, "path": None}, {"bytes": None, "path": str(path)}, {"url": str(path)}),
        f"{server.url}/image.png",
    ]
    for source in sources:
        opened = open_image(source, tmp_path / "cache")
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(picture), err_msg=repr(source)[:80])


def test_a_url_is_downloaded_once(server, tmp_path):
    url = f"{server.url}/image.png"
    assert prefetch([url, url], tmp_path, progress=False) == {}
    open_image(url, tmp_path)
    assert server.requests == ["/image.png"]


def test_urls_that_fail_are_told_beforehand(server, tmp_path):
    missing = f"{server.url}/missing.png"
    failed = prefetch([f"{server.url}/image.png", missing], tmp_path, progress=False)
    assert list(failed) == [missing] and "missing.png cannot be downloaded" in str(failed[missing])
    with pytest.raises(ImageError, match="text' cannot be read as an image"):
        open_image(f"{server.url}/text", tmp_path)
    spaced = f"{server.url}/a b.png"  # http.client refuses it before it asks
    assert "a b.png cannot be downloaded" in str(prefetch([spaced], tmp_path, progress=False)[spaced])


def test_an_image_that_map_took_apart(picture):
    """`Dataset.map` stores a PIL image in messages as a dict of its attributes."""
    table = datasets.Dataset.from_list([{"image": picture}])

    def convert(row):
        parts = [{"type": "image", "image": row["image"]}, {"type": "text", "text": "what?"}]
        return {"messages": [{"role": "user", "content": parts}]}

    mapped = table.map(convert, remove_columns="image")
    with pytest.raises(ImageError, match=r"Dataset.map\(\) .* formatting_func"):
        open_image(mapped[0]["messages"][0]["content"][0]["image"])


def test_an_answer_that_is_no_image_is_not_kept(server, tmp_path):
    url = f"{server.url}/text"
    assert "text' cannot be read as an image" in str(prefetch([url], tmp_path, progress=False)[url])
    assert list(tmp_path.iterdir()) == []
    server.mended.add("/text")
    assert prefetch([url], tmp_path, progress=False) == {} and open_image(url, tmp_path).size == (9, 6)


def test_a_url_that_fails_is_asked_once(server, tmp_path):
    """Two rows, in two chunks, and one more image of the first, which has no fault."""
    content = [{"type": "image", "image": f"{server.url}/{name}"} for name in ("image.png", "missing.png")]
    plain, bad = ([{"role": "user", "content": parts}] for parts in ("a text", content))
    processor = tiny_processors.make_processor(tmp_path / "processor")
    collator = VisionDataCollator(tiny_processors.stand_in(), processor, image_cache=tmp_path / "cache")
    rows = [{"messages": talk} for talk in (bad, *[plain] * 20, bad)]
    with pytest.raises(
        ImageError, match=r"2 of 22 .*\nrow 0: image 2 of 2: .*cannot be downloaded.*\nrow 21: "
    ):
        collator.prepare(rows, progress=False)
    assert sorted(server.requests) == ["/image.png", "/missing.png"]


def test_a_scheme_in_capitals(server, picture, tmp_path):
    path = tmp_path / "x.png"
    picture.save(path)
    for source in (server.url.replace("http", "HTTP") + "/image.png", path.as_uri().replace("file", "FILE")):
        assert open_image(source, tmp_path / "cache").size == picture.size


def test_an_image_of_too_many_pixels(monkeypatch, png):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(
        ImageError, match=r"is too large \(9 × 6 pixels\); PIL reads 0.0 million pixels at most"
    ):
        open_image(png)


def test_modes():
    red = (200, 10, 20)
    rgba = Image.new("RGBA", (2, 1), (*red, 255))
    rgba.putpixel((1, 0), (*red, 0))
    assert [open_image(rgba).getpixel((x, 0)) for x in (0, 1)] == [red, (255, 255, 255)]
    half = open_image(Image.new("LA", (1, 1), (0, 128))).getpixel((0, 0))
    assert half == (127, 127, 127)
    palette = Image.new("RGB", (1, 1), red).quantize(2)
    assert palette.mode == "P" and np.abs(np.subtract(open_image(palette).getpixel((0, 0)), red)).max() <= 1
    clear = Image.new("P", (1, 1), 0)
    clear.info["transparency"] = 0
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(Image.new("L", (1, 1), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert open_image(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(Image.new("CMYK", (1, 1), (0, 0, 0, 255))).getpixel((0, 0)) == (0, 0, 0)


def test_an_image_is_turned_as_its_camera_says():
    picture = Image.new("RGB", (4, 2))
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture.save(file, "JPEG", exif=exif)
    assert open_image(file.getvalue()).size == (2, 4)


@pytest.mark.parametrize(
    "source, message",
    [
        (Image.new("RGB", (0, 5)), "0 × 5 pixels"),
        (np.zeros((3, 0, 3), np.uint8), "0 × 3 pixels"),
        (Image.new("I;16", (2, 2)), "mode I;16 .16 bits"),
        (Image.new("F", (2, 2)), "mode F .32 bits"),
        (np.zeros((2, 2, 3)), "float64 .* is no image"),
        ("nowhere/at/all.png", "'nowhere/at/all.png' does not exist"),
        (
            "a_long/path-without-a-point" * 4,
            "no format that PIL knows; it is no file, so it was taken for base64",
        ),
        (b"no image", "8 bytes .* cannot be read as an image"),
        ("data:image/png;base64,!!", "is no base64"),
        ({}, "keys .none. and no image"),
        (None, "None is no image"),
        (3, "3 is no image"),
    ],
)
def test_what_cannot_be_used_is_said(source, message):
    with pytest.raises(ImageError, match=message):
        open_image(source)


def test_a_file_that_ends_too_early(png):
    with pytest.raises(ImageError, match=r"cannot be read|damaged"):
        open_image(png[:-40])


def test_resize_policies():
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=100, patch_size=14, spatial_merge_size=2)
    )
    assert resize_policy("min", config=config) == Resize(100)
    assert resize_policy("min", config=SimpleNamespace(vision_config=SimpleNamespace())) == Resize(512)
    assert resize_policy("max", config=config)(Image.new("RGB", (3000, 20))).size == (3000, 20)
    assert resize_policy(50)(Image.new("RGB", (100, 30))).size == (50, 15)
    assert resize_policy(50)(Image.new("RGB", (40, 300))).size == (
        40,
        300,
    )  # Unsloth looks at the width alone
    assert resize_policy(50, 1)(Image.new("RGB", (40, 300))).size == (6, 50)
    assert resize_policy(50, "min")(Image.new("RGB", (100, 200))).size == (50, 100)
    assert resize_policy((20, 30))(Image.new("RGB", (7, 7))).size == (20, 30)
    assert resize_policy("max", 0, True, config)(Image.new("RGB", (100, 13))).size == (112, 28)
    noise = Image.effect_noise((100, 30), 50)
    assert resize_policy(50)(noise).tobytes() == noise.resize((50, 15), Image.Resampling.LANCZOS).tobytes()


@pytest.mark.parametrize("wrong", ["large", 0, (1, 2, 3), (0, 4), 1.5])
def test_wrong_policies(wrong):
    with pytest.raises(ValueError, match="resize="):
        resize_policy(wrong)


def test_no_policy_makes_an_image_too_narrow():
    with pytest.raises(ValueError, match="1000 × 2 pixels; one side may be at most 200 times"):
        resize_policy("max")(Image.new("RGB", (1000, 2)))


def test_base64_in_a_file_is_not_looked_for_beside_it(tmp_path):
    text = "iVBORw0KGgo" * 30  # too long for a name, not for a path
    row = {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": [text]}
    assert row_document(row, 0, tmp_path).images == (text,)
