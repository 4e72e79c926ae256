"""Canonical rows to token ids and loss masks, with the ids and masks of TRL's SFTTrainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from jaxtune.data.columns import IGNORE
from jaxtune.data.templates import has_marks, marked_variant


@dataclass(frozen=True)
class Encoded:
    """One row's tokens: int32 [T], and bool [T] masks of what may be trained (None: everything)."""

    ids: np.ndarray
    completion: np.ndarray | None = None
    assistant: np.ndarray | None = None
    prompt_changed: bool = False  # the prompt's tokens differ once the completion follows

    def labels(self, completion_only: bool) -> np.ndarray:
        """int32 [T]: ids where every mask that applies is set, -100 elsewhere."""
        keep = np.ones(len(self.ids), bool)
        if completion_only and self.completion is not None:
            keep &= self.completion
        if self.assistant is not None:
            keep &= self.assistant
        return np.where(keep, self.ids, IGNORE).astype(np.int32)


def common_prefix(left: Sequence[int] | np.ndarray, right: Sequence[int] | np.ndarray) -> int:
    """How many leading tokens two sequences share."""
    length = min(len(left), len(right))
    differs = np.asarray(left[:length]) != np.asarray(right[:length])
    return int(differs.argmax()) if differs.any() else length


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any
) -> str:
    """A conversation as the chat template writes it; options as in `apply_chat_template`."""
    chat: Any = list(messages)
    text: Any = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    return text


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of plain texts, with the special tokens the tokenizer adds by itself, but never two BOS tokens."""
    encoded = tokenizer(list(texts), verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    rows = []
    for text, ids in zip(texts, encoded, strict=True):
        doubled = bos is not None and ids[:2] == [bos, bos] and text.startswith(tokenizer.bos_token)
        rows.append(np.asarray(ids[1:] if doubled else ids, np.int32))
    return rows


def encode_text_rows(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Rows {"text"}; the EOS token is appended where the text does not end with it."""
    texts = [_with_eos(row["text"], tokenizer) for row in rows]
    return [Encoded(ids) for ids in encode_text(tokenizer, texts)]


def encode_prompt_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[Encoded]:
    """Rows {"prompt", "completion"} of strings. The completion starts where prompt and whole first differ."""
    prompts = encode_text(tokenizer, [row["prompt"] for row in rows])
    wholes = encode_text(tokenizer, [row["prompt"] + _with_eos(row["completion"], tokenizer) for row in rows])
    return [_split_at_prompt(prompt, whole) for prompt, whole in zip(prompts, wholes, strict=True)]


def encode_chat_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, assistant_only: bool
) -> list[Encoded]:
    """Rows {"messages"} or {"prompt", "completion"} of messages, through the chat template.

    Raises:
        ValueError: no chat template, or the template refuses a conversation (its position in `rows` is
            named).
    """
    encoder = ChatEncoder(tokenizer, assistant_only)
    encoded = []
    for index, row in enumerate(rows):
        try:
            encoded.append(encoder.encode(row))
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"the chat template cannot render conversation {index} of this batch ({error}): "
                f"{str(row.get('messages') or row)[:500]}"
            ) from error
    return encoded


class ChatEncoder:
    """Conversations to ids and masks. One instance serves a whole dataset."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_only: bool):
        if tokenizer.chat_template is None:
            raise ValueError(
                "the dataset is conversational but the tokenizer has no chat template; set one, for instance with "
                "tokenizer = get_chat_template(tokenizer, 'chatml')"
            )
        self.tokenizer = tokenizer
        self.assistant_only = assistant_only
        # TRL renders prompt and whole with the marked template too, which for Qwen3 is not the tokenizer's own.
        self.template = marked_variant(tokenizer.get_chat_template()) if assistant_only else None

    def encode(self, row: Mapping[str, Any]) -> Encoded:
        """Ids and masks of one canonical "messages" or "chat_completion" row."""
        options = {"chat_template": self.template, "tools": row["tools"], **row["chat_template_kwargs"]}
        if not row.get("messages", True):
            return Encoded(np.zeros(0, np.int32))
        if "messages" in row:
            ids, assistant = self._ids_and_mask(row["messages"], options)
            return Encoded(ids, assistant=assistant)
        prompt = self._ids(row["prompt"], options | {"add_generation_prompt": True})
        ids, assistant = self._ids_and_mask([*row["prompt"], *row["completion"]], options)
        split = _split_at_prompt(prompt, ids)
        return replace(split, assistant=assistant)

    def _render(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        return render_chat(self.tokenizer, messages, **options)

    def _ids(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> np.ndarray:
        ids = self.tokenizer(self._render(messages, options), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return np.asarray(ids, np.int32)

    def _ids_and_mask(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        if not self.assistant_only:
            return self._ids(messages, options), None
        # chat_template_kwargs may name a template of its own
        if has_marks(options["chat_template"]):
            chat: Any = list(messages)
            encoded: Any = self.tokenizer.apply_chat_template(
                chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
            )
            return np.asarray(encoded["input_ids"], np.int32), np.asarray(encoded["assistant_masks"], bool)
        ids = self._ids(messages, options)
        return ids, self._spans_by_prefix(messages, options, ids)

    def _spans_by_prefix(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], ids: np.ndarray
    ) -> np.ndarray:
        """bool [T]: what each assistant message adds after its generation prompt, for a template without
        marks.

        Raises:
            ValueError: the template renders an earlier message differently once others follow it.
        """
        whole = self._render(messages, options)
        encoded = self.tokenizer(whole, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        begins, ends = np.asarray(encoded["offset_mapping"]).T  # characters of `whole`
        mask = np.zeros(len(ids), bool)
        for turn, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._render(messages[:turn], options | {"add_generation_prompt": True}) if turn else ""
            if not whole.startswith(before):
                raise ValueError(
                    "assistant_only_loss needs to know what the assistant said, and this chat template renders the "
                    "messages before an answer differently once the answer follows. Put {% generation %} marks into "
                    "the template, or use train_on_responses_only"
                )
            through = self._render(messages[: turn + 1], options)
            if whole.startswith(through):
                stop = np.searchsorted(begins, len(through))
            else:  # the template ends a conversation with something of its own, such as EOS
                stop = common_prefix(ids, self._ids(messages[: turn + 1], options))
            mask[np.searchsorted(ends, len(before), side="right") : stop] = True
        return mask


def _split_at_prompt(prompt: np.ndarray, whole: np.ndarray) -> Encoded:
    shared = common_prefix(prompt, whole)
    return Encoded(whole, completion=np.arange(len(whole)) >= shared, prompt_changed=shared < len(prompt))


def _with_eos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    eos = tokenizer.eos_token
    if not isinstance(text, str):
        raise ValueError(f"expected a string to tokenise; a row has {text!r}. Filter such rows out first")
    if eos is None:
        raise ValueError(
            "the tokenizer has no EOS token, so the model would never learn to stop; name one with args.eos_token"
        )
    return text if text.endswith(eos) else text + eos
