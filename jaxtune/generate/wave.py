"""One wave: rows that begin together, from their prompts to the last one's end."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from jaxtune.generate import plan, steps
from jaxtune.generate.results import Record
from jaxtune.generate.sight import Sight
from jaxtune.generate.weights import Weights, step_bytes
from jaxtune.kernels.decode_attention import supported

COMPACT = 0.6  # of a step's cost: what a smaller batch must come down to


class Job(NamedTuple):
    """One call of `generate`.

    prompts: different ones. streams: int32 [N, 2], the (prompt, sample) that each row's noise is drawn for. segment:
    decode steps a dispatch. look: numbers of prompts, their ids int32 [N, S] and lengths -> those prompts with their
    images and offsets and seen of `steps.Prompts`; None where no prompt has images.
    """

    prompts: list[list[int]]
    streams: np.ndarray
    seed: np.uint32
    spec: steps.Spec
    record: Record
    segment: int
    look: Sight | None = None


class Pending(NamedTuple):
    """A report that the device may still be working on: whose rows it is, and the number of its first token."""

    report: steps.Report
    rows: np.ndarray
    column: int


class Wave:
    """Runs the rows of a job that are seated.

    Args:
      weights: what steps read. job: whose rows these are. seats: which of them.
      programs: gets a key for every compiled program that is used.
    """

    def __init__(self, weights: Weights, job: Job, seats: plan.Slots, programs: set):
        self._weights, self._job, self._seats, self._programs = weights, job, seats, programs
        token = plan.token_bytes(job.spec.config, job.spec.dtype)
        self._weights_cost = step_bytes(weights) / token  # in tokens of cache
        longest = max(len(job.prompts[prompt]) for prompt in seats.prompts if prompt >= 0)
        self._columns = plan.bucket(longest, plan.PROMPT_COLUMNS)  # of the prompts' caches
        c = job.spec.config
        query = jax.ShapeDtypeStruct((1, 1, 1, c.head_dim), job.spec.dtype)
        cache = jax.ShapeDtypeStruct((1, 1, plan.OWN_COLUMNS, c.head_dim), job.spec.dtype)
        # where only filled columns are read, caches need not grow, and one program does for all lengths
        self._reads_filled = supported(query, cache, c.attention_softcap)
        self._own = 0  # columns of the rows' own caches
        self._steps = 0  # decode steps dispatched

    def run(self, bar: tqdm) -> None:
        """Fills the job's record for these rows; returns when all of them have ended."""
        record = self._job.record
        mine = self._seats.rows[self._seats.rows >= 0]
        pending = self._begin()
        while True:
            following = self._segment() if self._steps + 1 < record.limit else None
            before = record.ended[mine].sum()
            record.receive(jax.device_get(pending.report), pending.rows, pending.column)
            bar.update(int(record.ended[mine].sum() - before))
            if following is None or record.ended[mine].all():
                return
            pending = following
            self._compact()

    def _begin(self) -> Pending:
        """Prompts, each run once, and first tokens."""
        job = self._job
        seated = self._seats.prompts.tolist()
        different = list(dict.fromkeys(prompt for prompt in seated if prompt >= 0))
        ids, (layers, lengths, offsets, seen), hidden = self._prefill(different)
        if different + [-1] * (len(lengths) - len(different)) != seated:  # a prompt is in several groups
            group = np.array([different.index(prompt) if prompt >= 0 else 0 for prompt in seated])
            ids, lengths, hidden, offsets = ids[group], lengths[group], hidden[group], offsets[group]
            seen = seen[group]
            layers = steps.taken(list(layers), group)
        self._prompts = steps.Prompts(layers, lengths, offsets, seen)
        self._uses("begin", *self._seats.rows.shape)
        self._state, report = steps.begin(
            self._weights, hidden, ids, lengths, self._streams(), job.seed, spec=job.spec
        )
        return Pending(report, self._seats.rows.ravel(), 0)

    def _prefill(self, prompts: list[int]):
        """Prompts by number -> ids int32 [P, S], steps.Prompts, last hidden states [P, D]."""
        job, count = self._job, plan.bucket(len(prompts))
        ids, lengths = np.zeros((count, self._columns), np.int32), np.ones(count, np.int32)
        offsets, seen = np.zeros(count, np.int32), np.zeros(count, np.int32)
        for place, prompt in enumerate(prompts):
            tokens = job.prompts[prompt]
            ids[place, : len(tokens)], lengths[place] = tokens, len(tokens)
        layers, batch, hidden = (
            self._caches(count, self._columns, 1 if job.look is None else max(1, job.look.columns)),
            plan.prefill_batch(count, self._columns),
            [],
        )
        self._uses("prefill", count, batch)
        for at in range(0, count, batch):
            some, shown = slice(at, at + batch), None
            if job.look is not None:
                shown, offsets[some], seen[some] = job.look(prompts[some], ids[some], lengths[some])
            layers, last = steps.prefill(
                self._weights, layers, ids[some], lengths[some], np.int32(at), shown, spec=job.spec
            )
            hidden.append(last)
        made = steps.Prompts(layers, *map(jnp.asarray, (lengths, offsets, seen)))
        return jnp.asarray(ids), made, jnp.concatenate(hidden)

    def _segment(self) -> Pending:
        """Dispatches the next steps."""
        job, count, column = self._job, self._job.segment, self._steps + 1
        self._make_room(self._steps + count)
        self._uses("decode", *self._seats.rows.shape, self._own, count)
        self._state, report = steps.decode(
            self._weights, self._prompts, self._state, self._streams(), job.seed, spec=job.spec, steps=count
        )
        self._steps += count
        return Pending(report, self._seats.rows.ravel(), column)

    def _make_room(self, columns: int) -> None:
        if columns <= self._own:
            return
        if self._reads_filled:
            columns = max(columns, self._job.record.limit)
        self._own = plan.bucket(columns, plan.OWN_COLUMNS)
        layers = list(self._state.layers)
        self._state = self._state._replace(layers=())
        made = steps.widened(layers, self._own) if layers else self._caches(self._seats.rows.size, self._own)
        self._state = self._state._replace(layers=made)

    def _compact(self) -> None:
        """Moves the rows that go on into a smaller batch, if that makes steps cheaper by enough."""
        job, rows = self._job, dict[int, list[int]]()
        for prompt, mine in zip(self._seats.prompts.tolist(), self._seats.rows.tolist(), strict=True):
            going_on = [row for row in mine if row >= 0 and not job.record.ended[row]]
            if going_on:
                rows.setdefault(prompt, []).extend(going_on)
        read = self._steps if self._reads_filled else self._own
        size = plan.group_size(rows, self._columns, read)
        parts = plan.split(rows, size)
        places, room = self._seats.rows.shape
        now = plan.cost(places, room, self._columns, read, self._weights_cost)
        then = plan.cost(len(parts), size, self._columns, read, self._weights_cost)
        if then > COMPACT * now:
            return
        old, self._seats = self._seats, plan.seat(parts, size)
        place = {row: at for at, row in enumerate(old.rows.ravel().tolist())}
        group = {prompt: at for at, prompt in enumerate(old.prompts.tolist())}
        # empty places take any: nobody reads them
        by_row = jnp.array([place[row] if row >= 0 else 0 for row in self._seats.rows.ravel().tolist()])
        by_group = jnp.array([group[prompt] if prompt >= 0 else 0 for prompt in self._seats.prompts.tolist()])
        own, prompts = list(self._state.layers), list(self._prompts.layers)
        state, self._state = self._state._replace(layers=()), self._state._replace(layers=())
        self._prompts = self._prompts._replace(layers=())
        self._state = steps.State(
            steps.taken(own, by_row),
            state.last[by_row],
            state.step,
            None if state.seen is None else state.seen[by_row],
        )
        others = (x[by_group] for x in self._prompts[1:])
        self._prompts = steps.Prompts(steps.taken(prompts, by_group), *others)

    def _caches(self, batch: int, columns: int, of_images: int | None = None) -> tuple:
        """of_images: columns of layers that attend to images, where they are others."""
        c, dtype = self._job.spec.config, self._job.spec.dtype
        own = {} if of_images is None else dict.fromkeys(c.cross_layers, of_images)
        shapes = [(batch, c.num_kv_heads, own.get(i, columns), c.head_dim) for i in range(len(c.windows))]
        return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for shape in shapes)

    def _streams(self) -> np.ndarray:
        """int32 [P, G, 2] of the seated rows."""
        return self._job.streams[np.maximum(self._seats.rows, 0)]

    def _uses(self, *program: Any) -> None:
        kind = jax.tree.structure(self._weights)
        self._programs.add((*program, self._columns, self._job.spec, kind))
