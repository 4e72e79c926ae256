"""What generation gives back, and the host's record of it while it runs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np

Updates = list[tuple[int, list[int]]]


class Generation(NamedTuple):
    """One answer.

    prompt, sample: which prompt it continues and which of its n samples it is. token_ids: the stop token included.
    logprobs: float32, of each token under logits / temperature over the whole vocabulary, nothing cut or penalised:
    what a trainer computes again. kept_logprobs: float32, over what top-k, top-p, min-p and the repetition penalty
    left; the same array where they are off. finish_reason: "stop" at a stop token or string, "length" at
    max_new_tokens.
    """

    prompt: int
    sample: int
    token_ids: list[int]
    logprobs: np.ndarray
    kept_logprobs: np.ndarray
    finish_reason: Literal["stop", "length"]


class Generations(Sequence[Generation]):
    """Answers, prompt by prompt and sample by sample: number i·n + j is sample j of prompt i."""

    def __init__(self, answers: Sequence[Generation]):
        self._answers = list(answers)

    @overload
    def __getitem__(self, index: int) -> Generation: ...
    @overload
    def __getitem__(self, index: slice) -> "Generations": ...
    def __getitem__(self, index):
        found = self._answers[index]
        return Generations(found) if isinstance(index, slice) else found

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[Generation]:
        return iter(self._answers)

    @property
    def num_tokens(self) -> int:
        """Generated tokens of all answers."""
        return sum(len(answer.token_ids) for answer in self)

    def texts(self, tokenizer, **options) -> list[str]:
        """The answers as text, special tokens left out unless `options` of tokenizer.decode say otherwise."""
        options = {"skip_special_tokens": True} | options
        return [tokenizer.decode(answer.token_ids, **options) for answer in self]


class Record:
    """Tokens of N rows as they come, and which rows have ended.

    Args:
      count: rows. limit: tokens of each at most.
      stop: ids that end a row.
      strings: texts that end a row; tokenizer: decodes for them.
      on_tokens: called with (row, new ids) of every row that got some.
      kept: whether there are log-probs of their own over what was kept.
    """

    def __init__(
        self,
        count: int,
        limit: int,
        *,
        stop: Sequence[int],
        strings: Sequence[str],
        tokenizer: Any,
        on_tokens: Callable[[Updates], object] | None,
        kept: bool,
    ):
        self.tokens = np.zeros((count, limit), np.int32)
        self.logprobs = np.zeros((count, limit), np.float32)
        self.kept_logprobs = np.zeros((count, limit), np.float32) if kept else self.logprobs
        self.lengths = np.zeros(count, np.int32)
        self.ended, self.stopped = np.zeros(count, bool), np.zeros(count, bool)
        self._stop, self._strings, self._tokenizer = np.array(stop, np.int32), tuple(strings), tokenizer
        self._on_tokens = on_tokens

    @property
    def limit(self) -> int:
        return self.tokens.shape[1]

    def receive(self, report: Any, rows: np.ndarray, column: int) -> None:
        """Takes a `steps.Report` whose first tokens are number `column` of their rows; rows int32 [slots], -1: none."""
        places = np.flatnonzero((rows >= 0) & ~self.ended[rows])
        rows = rows[places]
        if not rows.size:
            return
        width = min(len(report.token), self.limit - column)
        for name, source in (("tokens", report.token), ("logprobs", report.logprob)):
            getattr(self, name)[rows, column : column + width] = np.asarray(source)[:width, places].T
        if report.kept_logprob is not None:
            new = np.asarray(report.kept_logprob)[:width, places].T
            self.kept_logprobs[rows, column : column + width] = new
        self._end(rows, column, width)
        if self._on_tokens is not None:
            self._on_tokens([(int(r), self.tokens[r, column : self.lengths[r]].tolist()) for r in rows])

    def _end(self, rows: np.ndarray, column: int, width: int) -> None:
        """Sets lengths, and what has ended within the newest columns."""
        hits = np.isin(self.tokens[rows, column : column + width], self._stop)
        found = hits.any(1)
        self.lengths[rows] = column + np.where(found, hits.argmax(1) + 1, width)
        if self._strings:
            for i, row in enumerate(rows):
                end = self._end_of_string(row, column)
                if end is not None:
                    self.lengths[row], found[i] = end, True
        self.stopped[rows] = found
        self.ended[rows] = found | (self.lengths[rows] >= self.limit)

    def _end_of_string(self, row: int, column: int) -> int | None:
        """How many tokens of a row complete a stop string, if its tokens from `column` on do."""
        longest = max(len(text.encode()) for text in self._strings)
        begin = max(0, column - 2 * longest)  # a token is a byte or more, but for a few that are none

        def complete(end: int) -> bool:
            text = self._tokenizer.decode(self.tokens[row, begin:end].tolist())
            return any(stop in text for stop in self._strings)

        end = int(self.lengths[row])
        if not complete(end):
            return None
        return next(i for i in range(column + 1, end + 1) if complete(i))

    def generations(self, samples: Sequence[tuple[int, int]]) -> Generations:
        """samples: (prompt, sample) of each row."""
        answers = []
        for row, (prompt, sample) in enumerate(samples):
            end = int(self.lengths[row])
            answers.append(
                Generation(
                    prompt,
                    sample,
                    self.tokens[row, :end].tolist(),
                    self.logprobs[row, :end],
                    self.kept_logprobs[row, :end],
                    "stop" if self.stopped[row] else "length",
                )
            )
        return Generations(answers)
