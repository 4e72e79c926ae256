"""Printing text while it is generated."""

import sys
from collections.abc import Callable

import numpy as np


class TextStreamer:
    """Prints generated text word by word; the interface of transformers' TextStreamer.

    Args:
      tokenizer: decodes the tokens.
      skip_prompt: the prompt is not printed.
      write: where text goes, standard output by default.
      decode_kwargs: for tokenizer.decode, such as skip_special_tokens=True.
    """

    def __init__(
        self,
        tokenizer,
        skip_prompt: bool = False,
        write: Callable[[str], object] | None = None,
        **decode_kwargs,
    ):
        self.tokenizer, self.skip_prompt, self.decode_kwargs = tokenizer, skip_prompt, decode_kwargs
        self._write = write or (lambda text: (sys.stdout.write(text), sys.stdout.flush()))
        self._ids: list[int] = []
        self._printed = 0
        self._prompt_next = True

    def put(self, value) -> None:
        """Takes the prompt's ids first, then each new token; one row only."""
        value = np.asarray(value)
        if value.ndim > 1 and value.shape[0] > 1:
            raise ValueError(f"TextStreamer prints one prompt, got a batch of {value.shape[0]}")
        is_prompt, self._prompt_next = self._prompt_next, False
        if is_prompt and self.skip_prompt:
            return
        self._ids += value.reshape(-1).tolist()
        text = self.tokenizer.decode(self._ids, **self.decode_kwargs)
        if not text.endswith("\ufffd"):  # half of a character: wait for the rest
            self._write(text[self._printed :])
            self._printed = len(text)

    def end(self) -> None:
        """Prints what is left and a newline."""
        text = self.tokenizer.decode(self._ids, **self.decode_kwargs)
        self._write(text[self._printed :] + "\n")
        self._ids, self._printed, self._prompt_next = [], 0, True
