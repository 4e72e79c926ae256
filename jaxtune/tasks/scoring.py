"""How well a model does a task: its greedy answers, and the share of them that are right."""

from collections.abc import Callable, Sequence
from typing import Any

from tqdm.auto import tqdm

Message = dict[str, str]


def answers(
    model: Any,
    prompts: Sequence[list[Message]],
    *,
    max_new_tokens: int,
    batch_size: int = 50,
) -> list[str]:
    """Greedy answers to conversations that end with a user's turn.

    Args:
        model: a `jaxtune.model.Model`.
        prompts: conversations of {"role", "content"} messages.
        max_new_tokens: tokens of an answer at most; it ends earlier at the end-of-turn token.
        batch_size: prompts generated together. All are padded to one length, so that generation compiles once.

    Returns:
        One text for each prompt, without special tokens and surrounding space.
    """
    tokenizer = model.tokenizer
    encoded = tokenizer.apply_chat_template(
        list(prompts),
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="np",
    )
    ids, mask = encoded["input_ids"], encoded["attention_mask"]  # [N, T]
    texts: list[str] = []
    starts = range(0, len(prompts), batch_size)
    for start in tqdm(starts, desc="answer", unit="batch", disable=None, leave=False):
        rows = slice(start, start + batch_size)
        out = model.generate(
            input_ids=ids[rows], attention_mask=mask[rows], max_new_tokens=max_new_tokens, do_sample=False
        )
        new = [row[ids.shape[1] :] for row in out]
        texts += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts


def accuracy(
    predictions: Sequence[str], expected: Sequence[str], is_right: Callable[[str, str], bool]
) -> float:
    """Share of predictions that `is_right(prediction, expected)` accepts, 0 to 1."""
    return sum(map(is_right, predictions, expected)) / len(expected)
