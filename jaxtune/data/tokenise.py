"""Canonical rows to token ids and loss masks, with the ids and masks of TRL's SFTTrainer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from jaxtune.data.columns import IGNORE
from jaxtune.data.templates import has_marks, marked_variant

Messages = Sequence[Mapping[str, Any]]


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


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> str:
    """A conversation as the chat template writes it; options as in `apply_chat_template`.

    Raises:
        ValueError: the template refuses the conversation.
    """
    chat: Any = list(messages)
    with _naming_the_conversation(messages):
        text: Any = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    return text


@contextmanager
def _naming_the_conversation(messages: Messages) -> Iterator[None]:
    try:
        yield
    except (TemplateError, TypeError) as error:
        shown = str(list(messages))[:500]
        raise ValueError(f"the chat template cannot render a conversation ({error}): {shown}") from error


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
    texts = [with_eos(row["text"], tokenizer) for row in rows]
    return [Encoded(ids) for ids in encode_text(tokenizer, texts)]


def encode_prompt_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[Encoded]:
    """Rows {"prompt", "completion"} of strings. The completion starts where prompt and whole first differ."""
    prompts = encode_text(tokenizer, [row["prompt"] for row in rows])
    wholes = encode_text(tokenizer, [row["prompt"] + with_eos(row["completion"], tokenizer) for row in rows])
    return [_split_at_prompt(prompt, whole) for prompt, whole in zip(prompts, wholes, strict=True)]


class ChatEncoder:
    """Rows {"messages"} or {"prompt", "completion"} of messages, through the chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_only: bool):
        """
        Args:
            tokenizer: with a chat template.
            assistant_only: find out which tokens the assistant said.

        Raises:
            ValueError: no chat template.
        """
        if tokenizer.chat_template is None:
            raise ValueError(
                "the dataset is conversational but the tokenizer has no chat template; set one, for instance with "
                "tokenizer = get_chat_template(tokenizer, 'chatml')"
            )
        self.tokenizer = tokenizer
        self.assistant_only = assistant_only
        # TRL renders prompt and whole with the marked template too, which for Qwen3 is not the tokenizer's own.
        self.template = marked_variant(tokenizer.get_chat_template()) if assistant_only else None

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[Encoded]:
        """Ids and masks of canonical rows, all "messages" or all "chat_completion"; no messages give no tokens."""
        options = [self._options(row) for row in rows]
        talks = [
            row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]] for row in rows
        ]
        if self.assistant_only:
            wholes = [self._with_mask(talk, chosen) for talk, chosen in zip(talks, options, strict=True)]
        else:
            wholes = [Encoded(ids) for ids in self.ids(talks, options)]
        if "messages" in rows[0]:
            return wholes
        asking = [chosen | {"add_generation_prompt": True} for chosen in options]
        prompts = self.ids([row["prompt"] for row in rows], asking)
        return [
            replace(_split_at_prompt(prompt, whole.ids), assistant=whole.assistant)
            for prompt, whole in zip(prompts, wholes, strict=True)
        ]

    def _options(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"chat_template": self.template, "tools": row["tools"], **row["chat_template_kwargs"]}

    def _render(self, messages: Messages, options: Mapping[str, Any]) -> str:
        return render_chat(self.tokenizer, messages, **options) if messages else ""

    def ids(self, talks: Sequence[Messages], options: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        """Token ids of conversations, each rendered with its options of `apply_chat_template`."""
        texts = [self._render(talk, chosen) for talk, chosen in zip(talks, options, strict=True)]
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(ids, np.int32) for ids in encoded]

    def _with_mask(self, messages: Messages, options: Mapping[str, Any]) -> Encoded:
        """One conversation with its assistant mask, from the template's marks or, without them, by prefixes."""
        # chat_template_kwargs may name a template of its own
        if messages and has_marks(options["chat_template"]):
            chat: Any = list(messages)
            with _naming_the_conversation(messages):
                encoded: Any = self.tokenizer.apply_chat_template(
                    chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
                )
            mask = np.asarray(encoded["assistant_masks"], bool)
            return Encoded(np.asarray(encoded["input_ids"], np.int32), assistant=mask)
        ids = self.ids([messages], [options])[0]
        return Encoded(ids, assistant=self._spans_by_prefix(messages, options, ids))

    def _spans_by_prefix(self, messages: Messages, options: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
        """bool [T]: what each assistant message adds after its generation prompt, for a template without
        marks.

        Raises:
            ValueError: the template renders an earlier message differently once others follow it.
        """
        whole = self._render(messages, options)
        encoded = self.tokenizer(whole, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        begins, ends = np.asarray(encoded["offset_mapping"]).reshape(-1, 2).T  # characters of `whole`
        mask = np.zeros(len(ids), bool)
        for turn, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._render(messages[:turn], {**options, "add_generation_prompt": True})
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
                stop = common_prefix(ids, self.ids([messages[: turn + 1]], [options])[0])
            mask[np.searchsorted(ends, len(before), side="right") : stop] = True
        return mask


def _split_at_prompt(prompt: np.ndarray, whole: np.ndarray) -> Encoded:
    shared = common_prefix(prompt, whole)
    return Encoded(whole, completion=np.arange(len(whole)) >= shared, prompt_changed=shared < len(prompt))


def with_eos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text, ending with the EOS token.

    Raises:
        ValueError: no text, or no EOS token.
    """
    eos = tokenizer.eos_token
    if not isinstance(text, str):
        raise ValueError(f"expected a string to tokenise; a row has {text!r}. Filter such rows out first")
    if eos is None:
        raise ValueError(
            "the tokenizer has no EOS token, so the model would never learn to stop; name one with args.eos_token"
        )
    return text if text.endswith(eos) else text + eos
