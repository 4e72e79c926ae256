"""Rows with images, in every format they come in, as one: `Document`.

Formats, each with or without images:

    messages           messages (or conversations, or the row is the list itself): [{"role", "content"}, …], a content
                       being text or a list of {"type": "text", "text"} and {"type": "image"} parts
    prompt/completion  both lists of messages, or both strings with the processor's image token where an image goes
    text               a string with the processor's image token where an image goes

An image part holds its image under image, url, path or base64 ({"type": "image_url"} as OpenAI has it), or is a
placeholder for the next one of the column images (or image). Text with <image> in it, as LLaVA's data has it, has its
placeholders there. Where no content has an image part, the images go before the first user message that is a text, as
in TRL.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtune.data.formats import ROLE_ALIASES, is_conversation, json_tools
from jaxtune.data.images import ImageError, describe

IMAGE_COLUMNS = ("images", "image")
LLAVA_PLACEHOLDER = "<image>"
_PAYLOADS = ("image", "bytes", "url", "path", "base64")

Parts = list[dict[str, Any]]
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Document:
    """One row.

    Attributes:
        number: of the row in its dataset, for messages.
        prompt: messages whose contents are lists of parts, or a text; all of the row if there is no completion.
        completion: what follows, of the same kind, or None.
        images: as the row has them, in the order of their placeholders.
        options: of the chat template: tools and chat_template_kwargs.
    """

    number: int
    prompt: Messages | str
    completion: Messages | str | None
    images: tuple[Any, ...]
    options: Mapping[str, Any]

    def with_images(self, change: Callable[[Any], Any]) -> "Document":
        """The same with each image changed."""
        return dataclasses.replace(self, images=tuple(map(change, self.images)))


def has_images(row: Any) -> bool:
    """Whether a row has images, or is of a dataset whose rows have."""
    talks: list[Any] = [row]
    if isinstance(row, Mapping):
        if any(column in row for column in IMAGE_COLUMNS):
            return True
        talks = [row.get(name) for name in ("messages", "conversations", "prompt", "chosen")]
    parts = (part for talk in talks if is_conversation(talk) for message in talk for part in _listed(message))
    kinds = ("image", "image_url")
    return any((part.get("type") or next((k for k in kinds if part.get(k)), None)) in kinds for part in parts)


def rows_with_images(rows: Iterable[Any]) -> Iterator[int]:
    """Numbers of the rows that have images themselves, whatever columns the others give them."""
    for number, row in enumerate(rows):
        if isinstance(row, Mapping):
            row = {name: row[name] for name in row if name not in IMAGE_COLUMNS or _images_in(row[name])}
        if has_images(row):
            yield number


@contextmanager
def naming(number: int) -> Iterator[None]:
    """Puts the row's number before what goes wrong with it."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ImageError(f"row {number}: {error}") from error


def read_row(row: Any, number: int, text_field: str = "text") -> Document:
    """The document of a row.

    Raises:
        ImageError: no known format, an unknown part, or placeholders and images that differ in number; names the row.
    """
    with naming(number):
        return _read(row, number, text_field)


def _read(row: Any, number: int, text_field: str) -> Document:
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise ImageError(f"expected a dict, or a list of messages, got {describe(row)}")
    column = image_column(row)
    images = [] if column is None else _images_in(row[column])
    options = {"tools": json_tools(row.get("tools")), **(row.get("chat_template_kwargs") or {})}
    if is_conversation(row.get("prompt")) and is_conversation(row.get("completion")):
        prompt, completion = map(_messages, (row["prompt"], row["completion"]))
        if _has_image_parts(completion):
            raise ImageError(
                "an image in the completion; a model learns to write text, so images go into the prompt"
            )
        prompt, used = _filled(prompt, images)
        completion, _ = _filled(completion, [])
        return Document(number, prompt, completion, used, options)
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return Document(number, row["prompt"], row["completion"], tuple(images), options)
    talk = next((row[name] for name in ("messages", "conversations") if is_conversation(row.get(name))), None)
    if talk is not None:
        messages, used = _filled(_messages(talk), images)
        return Document(number, messages, None, used, options)
    if isinstance(row.get(text_field), str):
        return Document(number, row[text_field], None, tuple(images), options)
    raise ImageError(
        f"no known format in {columns(row)}; expected messages (or conversations), prompt and completion, or "
        f"{text_field}"
    )


def columns(row: Mapping[str, Any]) -> str:
    """Names of a row's columns and of what they hold, for messages."""
    return ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items()) or "an empty row"


def image_column(row: Mapping[str, Any]) -> str | None:
    """The column that the images beside a row's text are in."""
    return next((column for column in IMAGE_COLUMNS if _images_in(row.get(column))), None)


def _images_in(value: Any) -> list[Any]:
    """The images of a column's value, which is one, several or none."""
    return [one for one in (value if isinstance(value, (list, tuple)) else [value]) if one is not None]


def _messages(talk: Sequence[Mapping[str, Any]]) -> Messages:
    """Messages with role and content (ShareGPT's names are changed into them); no keys without a value."""
    found = []
    for place, message in enumerate(talk):
        if not isinstance(message, Mapping):
            raise ImageError(
                f"message {place}: expected a dict with role and content, got {describe(message)}"
            )
        names = {"from": "role", "value": "content"} if "from" in message else {}
        kept = {names.get(key, key): value for key, value in message.items() if value is not None}
        if "role" not in kept:
            raise ImageError(f"a message without a role: {str(dict(message))[:100]}")
        found.append(kept | {"role": ROLE_ALIASES.get(kept["role"], kept["role"])})
    return found


def _filled(messages: Messages, images: Sequence[Any]) -> tuple[Messages, tuple[Any, ...]]:
    """Messages of parts with bare image placeholders, and the images that belong to them, in order."""
    texts = [message["content"] for message in messages if isinstance(message.get("content"), str)]
    marked = bool(images) and any(LLAVA_PLACEHOLDER in text for text in texts)
    placed = marked or _has_image_parts(messages)
    waiting = 0 if placed else len(images)  # images to put before the first user message that is text
    listed = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            parts = _split(content) if marked else [{"type": "text", "text": content}]
            if message["role"] == "user" and waiting:
                parts, waiting = [{"type": "image"}] * waiting + parts, 0
        elif content is None or isinstance(content, (list, tuple)):
            parts = [_part(part) for part in content or []]
        else:
            raise ImageError(
                f"message {len(listed)} ({message['role']}): expected a content that is a text or a list of parts, got "
                f"{describe(content)}"
            )
        listed.append({**message, "content": parts} if "content" in message else message)
    left, used, holes = list(images), [], []
    for number, message in enumerate(listed):
        for part in message.get("content", ()):
            if part["type"] == "image":
                holes += [] if "image" in part else [number]
                used.append(part.get("image", left.pop(0) if left and "image" not in part else None))
    _check_holes(listed, holes, len(images))
    bare = [
        {
            **message,
            "content": [
                {"type": "image"} if part["type"] == "image" else part for part in message["content"]
            ],
        }
        if "content" in message
        else message
        for message in listed
    ]
    return bare, tuple(used)


def _check_holes(messages: Messages, holes: Sequence[int], beside: int) -> None:
    """Raises ImageError unless there are as many parts without an image as images beside the messages.

    Args:
        holes: the messages of those parts. beside: how many images there are.
    """
    places = ", ".join(_PAYLOADS)
    if holes and not beside:
        raise ImageError(
            f"message {holes[0]} ({messages[holes[0]]['role']}) has an image part without an image; expected one under "
            f"{places}, or beside the messages ({' or '.join(IMAGE_COLUMNS)})"
        )
    if len(holes) != beside:
        raise ImageError(
            f"{len(holes)} image placeholders in its messages and {beside} images beside them; a part is a placeholder "
            f"where it has no value under {places}"
        )


def _listed(message: Any) -> Sequence[Mapping[str, Any]]:
    content = message.get("content") if isinstance(message, Mapping) else None
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []


def _has_image_parts(messages: Messages) -> bool:
    return any(_part(part)["type"] == "image" for message in messages for part in _listed(message))


def _split(text: str) -> Parts:
    """Text with <image> in it as parts."""
    parts: Parts = []
    for i, piece in enumerate(text.split(LLAVA_PLACEHOLDER)):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _part(part: Any) -> dict[str, Any]:
    """One part of a content: {"type": "text", "text"} or {"type": "image"}, its image under "image" if it has one."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise ImageError(
            f"a content holds a {type(part).__name__}; expected parts, as {{'type': 'text', 'text': …}}"
        )
    kept = {key: value for key, value in part.items() if value is not None}
    kind = kept.get("type", "image" if "image" in kept else "text" if "text" in kept else None)
    if kind == "text" and isinstance(kept.get("text"), str):
        return {"type": "text", "text": kept["text"]}
    if kind in ("image", "image_url"):
        names = _PAYLOADS if kind == "image" else ("image_url",)
        payload = next((kept[key] for key in names if key in kept), None)
        if kind == "image_url" and isinstance(payload, Mapping):
            payload = payload.get("url")
        return {"type": "image"} if payload is None else {"type": "image", "image": payload}
    raise ImageError(
        f"a part of type {kind!r} with the keys {', '.join(map(str, part))}; expected text, image or image_url"
    )
