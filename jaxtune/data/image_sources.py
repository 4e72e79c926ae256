"""Where rows with images come from, and their paths."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from jaxtune.data.image_rows import IMAGE_COLUMNS, Document, columns, image_column, naming, read_row
from jaxtune.data.images import ImageError, describe, is_file, is_url, open_image, peek, stored_in
from jaxtune.data.prepare import plain_rows
from jaxtune.data.sources import load_dataset

TEXT_COLUMNS = ("text", "answer", "label", "caption")


def row_document(row: Any, number: int, folder: Path | None, text_field: str = "text") -> Document:
    """`read_row`, relative paths of images looked for in `folder` too.

    Raises:
        ImageError: see there.
    """
    return read_row(row, number, text_field).with_images(partial(_beside, folder=folder))


def format_row(function: Callable[[Any], Any], row: Any, folder: Path | None, cache: Path | None) -> Any:
    """What a formatting function makes of a row, whose stored images it gets as PIL images; those whose pixels it does
    not look at stay as they are stored, so that other processes decode them.

    Raises:
        ImageError: the function fails, or returns no row.
    """
    given: dict[int, tuple[Image.Image, Any]] = {}

    def opened(value: Any) -> Any:
        if not _is_stored(value):
            return value
        image = peek(_beside(value, folder), cache)
        given[id(image)] = image, value
        return image

    def stored(value: Any) -> Any:
        image, source = given.get(id(value), (None, None))
        return source if getattr(image, "tile", None) else value  # PIL empties `tile` when it decodes

    try:
        made = function(_mapped(opened, row))
    except ValueError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise ImageError(f"formatting_func raised {type(error).__name__}: {error}") from error
    if not isinstance(made, (Mapping, list)):
        raise ImageError(
            f"formatting_func returned {describe(made)}; expected a row, as a dict with messages, or a list of messages"
        )
    return _mapped(stored, made)


def open_stored(row: Any, folder: Path | None, cache: Path | None) -> Any:
    """A row whose stored images, at any depth, are PIL images in their own mode, as `datasets` decodes them.

    Raises:
        ImageError: one cannot be used.
    """

    def opened(value: Any) -> Any:
        return open_image(_beside(value, folder), cache, rgb=False) if _is_stored(value) else value

    return _mapped(opened, row)


def _is_stored(value: Any) -> bool:
    """Whether it is an image that `datasets` has not decoded."""
    return isinstance(value, Mapping) and value.keys() == {"bytes", "path"} and any(value.values())


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """A row with what it holds changed, at any depth."""
    changed = change(value)
    if changed is not value:
        return changed
    if isinstance(value, Mapping):
        return {key: _mapped(change, one) for key, one in value.items()}
    return [_mapped(change, one) for one in value] if isinstance(value, list) else value


def reading_row(row: Any, instruction: str, number: int) -> Any:
    """A row of images and a text as a question about them and its answer; a row of another format stays as it is.

    Raises:
        ImageError: there is no text, or no image.
    """
    if (
        not isinstance(row, Mapping)
        or not {*IMAGE_COLUMNS} & row.keys()
        or {"messages", "prompt"} & row.keys()
    ):
        return row
    with naming(number):
        return _reading(row, instruction)


def _reading(row: Mapping[str, Any], instruction: str) -> dict[str, Any]:
    text = next((row[column] for column in TEXT_COLUMNS if isinstance(row.get(column), str)), None)
    if text is None:
        raise ImageError(
            f"no text in {columns(row)}; expected one in {', '.join(TEXT_COLUMNS)} (a class is its name, not its "
            "number)"
        )
    column = image_column(row)
    if column is None:
        raise ImageError("no image to ask about; leave the row out, or give it one")
    asked, answer = (
        {"role": role, "content": said} for role, said in (("user", instruction), ("assistant", text))
    )
    return {"prompt": [asked], "completion": [answer], column: row[column]}


def vision_rows(source: Any) -> tuple[Any, Path | None]:
    """Rows by number, their images not decoded, and the folder that they came from.

    Raises:
        ValueError: there are none.
    """
    if isinstance(source, Sequence) and not isinstance(source, str):
        if not source:
            raise ValueError("the dataset has no rows")
        return source, None
    folder = Path(source).expanduser().absolute().parent if isinstance(source, (str, Path)) else None
    return plain_images(plain_rows(load_dataset(source))), folder


def _beside(image: Any, folder: Path | None) -> Any:
    """A relative path that exists in `folder` and not here, made whole; a dict of a path or URL alone is that."""
    if isinstance(image, Mapping) and isinstance(text := stored_in(image), str):
        image = text
    if folder is None or not isinstance(image, str) or not image or len(image) > 1000 or is_url(image):
        return image
    path = folder / image
    return str(path) if not is_file(image) and is_file(str(path)) else image


def plain_images(dataset: datasets.Dataset) -> datasets.Dataset:
    """A dataset that gives its images as bytes and path, so that other processes decode them."""
    changed = {name: _undecoded(feature) for name, feature in dataset.features.items()}
    for name, feature in changed.items():
        if isinstance(feature, datasets.Image):  # a view; the other cast copies
            dataset = dataset.cast_column(name, feature)
    return dataset if changed == dict(dataset.features) else dataset.cast(datasets.Features(changed))


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return datasets.Image(mode=feature.mode, decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(feature.feature), length=feature.length)
    if isinstance(feature, list):
        return [_undecoded(one) for one in feature]
    if isinstance(feature, dict):
        return {name: _undecoded(one) for name, one in feature.items()}
    return feature
