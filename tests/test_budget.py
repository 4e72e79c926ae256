"""remat="auto": the fastest choice that fits, one compilation where one is enough, and an answer that is kept."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import tiny_models

from jaxtune import budget, models
from jaxtune.budget import CHOICES, LEAST, PlannedStep, check_evaluation, choose, hides_copies, kept_bytes
from jaxtune.models.remat import Remat

CONFIG = dataclasses.replace(
    models.build(tiny_models.make_config("llama"), jnp.bfloat16).config, windows=(None,) * 16
)
BATCH = {"input_ids": jax.ShapeDtypeStruct((1, 4, 512), jnp.int32)}
ARGUMENTS = ({}, {}, {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.uint8)}, BATCH, None)
WORK = 50_000_000  # what every choice needs beside what it keeps


def compiled(remat, tokens=4 * 512):
    """A program of the size that the forecast would have, but for some work space."""
    temp = WORK + kept_bytes(remat, CONFIG, tokens, 2)[0]
    needs = SimpleNamespace(
        argument_size_in_bytes=1_008_192,
        temp_size_in_bytes=temp,
        output_size_in_bytes=0,
        alias_size_in_bytes=0,
    )
    return SimpleNamespace(memory_analysis=lambda: needs, remat=remat)


def need(text):
    remat = next(r for r in CHOICES if str(r) == text)
    return 1_008_192 + WORK + kept_bytes(remat, CONFIG, 4 * 512, 2)[0]


@pytest.fixture
def tried(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXTUNE_COMPILE_CACHE", str(tmp_path))
    return []


def plan(tried, budget, host=0):
    def compile_step(remat):
        tried.append(str(remat))
        return compiled(remat)

    return choose(compile_step, CONFIG, ARGUMENTS, itemsize=2, budget=budget, host=host)


def test_with_room_nothing_is_recomputed_and_one_step_is_compiled(tried):
    choice = plan(tried, 10**12)
    assert str(choice.remat) == "none" and tried == ["none"] and choice.compiled.remat == choice.remat


def test_what_fp8_needs_is_remembered_apart(tried):
    counts = []
    for fp8 in (False, True, True):
        del tried[:]
        choose(
            lambda remat: tried.append(str(remat)) or compiled(remat), CONFIG, ARGUMENTS, itemsize=2,
            budget=need("attention"), host=0, fp8=fp8,
        )  # fmt: skip
        counts.append(len(tried))
    assert counts[0] == counts[1] > counts[2] == 1


@pytest.mark.parametrize("wanted", [str(remat) for remat in CHOICES if not remat.offload])
def test_the_fastest_that_fits_is_taken(tried, wanted):
    choice = plan(tried, need(wanted))
    assert str(choice.remat) == wanted
    assert len(tried) <= 3  # the forecast skips the rest
    assert choice.needs[wanted] == need(wanted) <= choice.budget


def test_the_line_names_the_neighbours(tried):
    line = str(plan(tried, need("attention+gate_up")))
    assert line.startswith("remat=attention+gate_up: ")
    assert "attention+qkv+gate_up about " in line and "attention+qkv about 0" in line


def test_the_answer_is_kept(tried):
    plan(tried, need("attention"))
    before = list(tried)
    again = plan(tried, need("attention"))
    assert str(again.remat) == "attention" == str(again.compiled.remat) and tried == [*before, "attention"]


def test_the_answer_is_forgotten_where_the_program_is_another(tried, monkeypatch):
    """With arguments of the same shapes, as with dropout or another number of heads."""
    room, small, large = need("none"), WORK, WORK + need("none") - need("attention")
    for work, want in ((small, "none"), (large, "attention"), (small, "none")):
        monkeypatch.setitem(globals(), "WORK", work)
        for _ in range(2):
            del tried[:]
            assert str(plan(tried, room).remat) == want
            assert len(set(tried)) == len(tried)  # none twice
        assert tried == [want]


def test_the_answer_is_forgotten_when_the_code_changes(tried, monkeypatch):
    plan(tried, need("attention"))
    before = len(tried)
    monkeypatch.setattr(budget, "_sources", lambda: "other code")
    plan(tried, need("attention"))
    assert len(tried) == 2 * before


def test_layer_inputs_go_to_the_host_when_nothing_else_fits(tried):
    inputs = kept_bytes(LEAST, CONFIG, 4 * 512, 2)[1]
    choice = plan(tried, need("all") - 1, host=inputs)
    assert str(choice.remat) == "all+offload" and choice.away == inputs
    assert f", {inputs / 1e9:.2f} GB in host memory (others: " in str(choice)
    with pytest.raises(MemoryError, match=r"less with \d\.\d\d GB in host memory, of which"):
        plan(tried, need("all") - 1, host=inputs - 1)


@pytest.fixture
def hidden(monkeypatch):
    """The machine's products hide the copies of the tests' narrow layers."""
    monkeypatch.setattr(budget, "OPERATIONS_PER_BYTE", 1)


def test_what_goes_to_the_host_unnoticed_is_not_kept_on_the_device(tried, hidden):
    host = 10**12
    assert str(plan(tried, 10**12, host=host).remat) == "none"
    choice = plan(tried, need("none") - 1, host=host)
    assert str(choice.remat) == "none+offload"
    assert list(choice.needs) == [
        "none", "none+offload", "attention+qkv+residual+offload", "attention+offload", "all+offload"
    ]  # fmt: skip
    assert str(plan(tried, need("none+offload") - 1, host=host).remat) == "attention+qkv+residual+offload"
    least = need("attention+qkv+residual+offload") - 1
    assert str(plan(tried, least, host=host).remat) == "attention+offload"


def test_the_host_has_to_have_room(tried, hidden):
    away = kept_bytes(Remat.parse("attention+offload"), CONFIG, 4 * 512, 2)[1]
    choice = plan(tried, need("attention+gate_up"), host=away)
    assert str(choice.remat) == "attention+gate_up"
    assert list(choice.needs)[-3:] == ["attention", "attention+offload", "all+offload"]


def test_room_on_the_host(monkeypatch):
    """Half of what is free, and of XLA's pool, which is for all devices, what earlier programs left."""
    monkeypatch.setattr(budget.jax, "local_device_count", lambda: 2)
    monkeypatch.setattr(budget.host_memory, "available", lambda: 100 << 30)
    assert budget.free_on_host() == 25 << 30
    monkeypatch.setattr(budget.host_memory, "available", lambda: 1000 << 30)
    assert budget.free_on_host() == 32 << 30
    assert budget.free_on_host([4 << 30, 6 << 30]) == (64 - 2 * 20) // 2 << 30
    assert budget.free_on_host([10 << 30, 15 << 30]) == 15 << 30  # where the larger one was
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "120")
    assert budget.free_on_host() == 60 << 30


def test_later_shapes_have_what_earlier_ones_left(monkeypatch, hidden):
    """A batch of another shape goes where the first was, or to the rest of the pool; never past its end."""
    monkeypatch.setattr(budget.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(budget.host_memory, "available", lambda: 10**15)
    monkeypatch.setattr(budget, "_place", lambda *_: None)
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "1")
    none, offload = Remat.parse("none"), Remat.parse("none+offload")
    length = int(0.35 * 2**30 / kept_bytes(offload, CONFIG, 4, 2)[1])  # a third of the pool

    def make_step(remat):
        program = lambda batch: compiled(remat, batch["input_ids"].size)  # noqa: E731
        return SimpleNamespace(lower=lambda *given: SimpleNamespace(compile=lambda: program(given[3])))

    model = SimpleNamespace(module=SimpleNamespace(config=CONFIG, fp8=False), dtype=jnp.bfloat16)
    memory = 0.9e-9 * kept_bytes(none, CONFIG, 4 * length, 2)[0]
    step = PlannedStep(make_step, model, "auto", budget_gb=memory, announce=lambda _: None)
    for rows, tokens, want in (
        (4, length, "none+offload"),
        (4, int(1.2 * length), "attention+gate_up"),
        (2, 2 * length, "none+offload"),
    ):
        batch = {"input_ids": jax.ShapeDtypeStruct((1, rows, tokens), jnp.int32)}
        assert str(step.compile(({}, {}, {}, batch, None)).remat) == want


def test_images_stay_on_the_device(tried, hidden, monkeypatch):
    monkeypatch.setitem(BATCH, "images", {})
    assert "none+offload" not in plan(tried, 10**12, host=10**12).needs


@pytest.mark.parametrize(
    "family, text, fp8, hides",
    [
        ((4096, 32, 8, 128, 14336), "attention+qkv+residual+offload", False, True),  # 8B
        ((4096, 32, 8, 128, 14336), "attention+qkv+residual+offload", True, False),
        ((4096, 32, 8, 128, 14336), "attention+offload", True, True),
        ((2048, 32, 8, 64, 8192), "attention+qkv+residual+offload", False, False),  # 1B
        ((2048, 32, 8, 64, 8192), "attention+offload", False, True),
        ((8192, 64, 8, 128, 28672), "none+offload", True, True),  # 70B
    ],
)
def test_wide_layers_hide_their_copies(family, text, fp8, hides):
    d, heads, kv, h, f = family
    config = dataclasses.replace(
        CONFIG, hidden_size=d, num_heads=heads, num_kv_heads=kv, head_dim=h, intermediate_size=f
    )
    assert hides_copies(Remat.parse(text), config, 2048, 2, fp8) == hides


def test_too_little_memory_says_how_much_is_needed(tried):
    with pytest.raises(
        MemoryError, match=r"at least 0\.06 GB and 0\.00 GB are free.*per_device_train_batch_size"
    ):
        plan(tried, 1000)


def planned(budget_gb, announce):
    def make_step(remat):
        return SimpleNamespace(lower=lambda *_: SimpleNamespace(compile=lambda: compiled(remat)))

    model = SimpleNamespace(module=SimpleNamespace(config=CONFIG, fp8=False), dtype=jnp.bfloat16)
    return PlannedStep(make_step, model, "auto", budget_gb=budget_gb, announce=announce)


def test_too_small_a_budget_is_named(tried):
    with pytest.raises(MemoryError, match=r"GB and memory_budget_gb is 0\.01\. Raise memory_budget_gb, make"):
        planned(0.01, print).compile(ARGUMENTS)


def test_a_budget_beyond_what_is_free_is_what_is_free(tried, monkeypatch):
    lines = []
    monkeypatch.setattr(budget, "free_bytes", lambda _: need("attention"))
    assert str(planned(1000, lines.append).compile(ARGUMENTS).remat) == "attention"
    assert "remat=attention: " in lines[0] and lines[0].endswith(
        "; memory_budget_gb=1000 is more than is free"
    )
    monkeypatch.setattr(budget, "free_bytes", lambda _: 1000)
    with pytest.raises(MemoryError, match=r"0\.00 GB are free\. Make per_device"):
        planned(1000, lines.append).compile(ARGUMENTS)


def test_an_evaluation_that_does_not_fit_is_told(monkeypatch, recwarn):
    """Beside 10 MB of optimizer state, which is not free anyway."""
    arguments = ({}, {}, {"input_ids": jax.ShapeDtypeStruct((8, 512), jnp.int32)})
    beside = jax.ShapeDtypeStruct((10_000_000,), jnp.uint8)

    def check(budget_gb, free):
        monkeypatch.setattr(budget, "free_bytes", lambda _: free)
        check_evaluation(compiled(LEAST), arguments, beside, budget_gb)

    needs = need(str(LEAST))
    check(None, needs)
    check((needs + 10_000_000) / 1e9, needs)
    assert not recwarn.list
    with pytest.raises(
        MemoryError, match=r"8 x 512 tokens needs 0\.0. GB and memory_budget_gb=0\.0.* leaves 0\.0. GB"
    ):
        check((needs + 9_000_000) / 1e9, needs)
    with pytest.raises(
        MemoryError, match=r"GB and 0\.00 GB are free. Make per_device_eval_batch_size smaller"
    ):
        check(1.0, 1000)
    with pytest.warns(UserWarning, match=r"8 x 512 tokens needs 0\.0. GB and 0\.0. GB are free"):
        check(None, needs - 1)


def test_a_step_is_compiled_once_for_each_shape():
    made, lines = [], []

    def make_step(remat):
        made.append(str(remat))
        return jax.jit(
            lambda trainable, state, base, batch, key: (trainable, state, {"loss": batch["input_ids"].sum()})
        )

    model = SimpleNamespace(module=SimpleNamespace(config=CONFIG, fp8=False), dtype=jnp.float32)
    step = PlannedStep(make_step, model, "auto", budget_gb=1.0, announce=lines.append)
    for length in (8, 8, 16):
        _, _, metrics = step(
            {}, {}, {}, {"input_ids": jnp.ones((1, 2, length), jnp.int32)}, jax.random.key(0)
        )
        assert metrics["loss"] == 2 * length
    assert step.compilations == 2 and made == ["none", "none"]
    assert lines[0].startswith("2 x 8 tokens: remat=none: ") and len(lines) == 2
