"""The engine: answers do not depend on how rows are put together, and log-probs are the model's own."""

import jax
import numpy as np
import pytest
from tolerances import SAMPLED_LOGPROBS

from jaxtune.fast import FastLanguageModel
from jaxtune.generate import Engine, Sampling, engine, plan, wave

pytestmark = pytest.mark.usefixtures("quick_compilation")

SAMPLED = Sampling(do_sample=True, temperature=1.3)
NEW = 12


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    """NF4 in float32 with an adapter that changes the answers."""
    base, _ = FastLanguageModel.from_pretrained(tiny_model_dir("llama"), dtype="float32", max_seq_length=None)
    adapted = FastLanguageModel.get_peft_model(base, r=4, lora_alpha=32, init_lora_weights=False)
    return adapted


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 320, length).tolist() for length in (5, 33, 64, 70, 1)]


def generate(model, prompts, *, weights="merged", max_sequences=None, **options):
    options = {"sampling": SAMPLED, "max_new_tokens": NEW, "stop_token_ids": [], "seed": 7} | options
    return Engine(model, weights=weights, max_sequences=max_sequences, progress=False).generate(
        prompts, **options
    )


@pytest.fixture(scope="module")
def answers(model, prompts):
    return generate(model, prompts, n=3)


def check_same(got, want):
    for one, other in zip(got, want, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=SAMPLED_LOGPROBS)
        assert one.finish_reason == other.finish_reason


def recomputed(model, prompts, answers, temperature):
    """Log-probs of each answer's tokens by the model's own forward pass."""
    rows = [prompts[answer.prompt] + answer.token_ids for answer in answers]
    ids, mask = np.zeros((15, 90), np.int32), np.zeros((15, 90), np.int32)  # one shape: one compilation
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    logprobs = np.asarray(jax.nn.log_softmax(model.logits(ids, mask) / temperature))
    for row, tokens, answer in zip(logprobs, rows, answers, strict=False):
        end, new = len(tokens), np.array(answer.token_ids)
        yield np.take_along_axis(row[end - len(new) - 1 : end - 1], new[:, None], 1)[:, 0]


def check_logprobs(model, prompts, answers, temperature=SAMPLED.temperature):
    for answer, want in zip(answers, recomputed(model, prompts, answers, temperature), strict=True):
        np.testing.assert_allclose(answer.logprobs, want, atol=SAMPLED_LOGPROBS)


def test_logprobs_are_those_of_the_model(model, prompts, answers):
    check_logprobs(model, prompts, answers)
    assert all((answer.kept_logprobs == answer.logprobs).all() for answer in answers)


def test_order_and_streams(prompts, answers):
    assert [(a.prompt, a.sample) for a in answers] == [(i, j) for i in range(len(prompts)) for j in range(3)]
    assert len({tuple(a.token_ids) for a in answers}) == len(answers)
    assert all(len(a.token_ids) == NEW and a.finish_reason == "length" for a in answers)
    assert answers.num_tokens == len(answers) * NEW


def test_rows_alone(model, prompts, answers):
    """Another batch, another group and another bucket of prompt lengths."""
    check_same(generate(model, [prompts[0]], streams=[(0, 2)]), [answers[2]])


def test_repeated_prompts_are_one_group(model, prompts, answers, monkeypatch):
    """As TRL gives them: each prompt n times. It is run once all the same."""
    run = []
    prefill = wave.steps.prefill
    monkeypatch.setattr(
        wave.steps, "prefill", lambda *args, **options: run.append(args[3]) or prefill(*args, **options)
    )
    repeated = [prompt for prompt in prompts for _ in range(3)]
    streams = [(i, j) for i in range(len(prompts)) for j in range(3)]
    check_same(generate(model, repeated, streams=streams), answers)
    lengths = np.concatenate(run).tolist()
    assert sum(lengths) - lengths.count(1) == sum(map(len, prompts)) - 1  # empty places are one token long


def test_one_prompt_twice(model, prompts, answers):
    """Its answers are in two groups, and there are as many places for groups as for different prompts."""
    twice, streams = [prompts[0], *prompts], [(5, 0), *((i, 0) for i in range(len(prompts)))]
    assert plan.bucket(len(twice)) == plan.bucket(len(prompts))
    check_same(generate(model, twice, n=3, streams=streams)[3:], answers)


def test_waves(model, prompts, answers):
    """Of one or two rows, so that the three of a prompt are not all in one."""
    check_same(generate(model, prompts, n=3, max_sequences=2), answers)


def test_stored_weights(model, prompts, answers):
    check_same(generate(model, prompts, n=3, weights="lora"), answers)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_windows_softcaps_and_two_ropes(tiny_model_dir, prompts, family):
    """NF4 with an adapter; prompts and answers are longer than the window of some layers."""
    base, _ = FastLanguageModel.from_pretrained(tiny_model_dir(family), dtype="float32", max_seq_length=None)
    model = FastLanguageModel.get_peft_model(base, r=4, lora_alpha=8, init_lora_weights=False)
    got = generate(model, prompts, n=3, max_new_tokens=20)
    check_logprobs(model, prompts, got)
    check_same(generate(model, prompts, n=3, max_new_tokens=20, weights="lora"), got)


def test_caches_that_grow(model, prompts, answers, monkeypatch):
    monkeypatch.setattr(plan, "OWN_COLUMNS", 4)
    monkeypatch.setattr(engine, "SEGMENT", 4)
    check_same(generate(model, prompts, n=3), answers)


def test_compaction(model, prompts, answers, monkeypatch):
    """Rows that end early leave a smaller batch; those that stay are what they would have been."""
    stop = sorted({token for a in answers for token in a.token_ids[:3]} - set(answers[4].token_ids))[:12]
    monkeypatch.setattr(engine, "SEGMENT", 2)
    monkeypatch.setattr(wave, "step_bytes", lambda weights: 0)
    shapes = []
    monkeypatch.setattr(
        wave.steps, "decode",
        lambda *args, decode=wave.steps.decode, **options: shapes.append(args[3].shape) or decode(*args, **options),
    )  # fmt: skip
    got = generate(model, prompts, n=3, stop_token_ids=stop)
    assert len(set(shapes)) > 1 and len(got[4].token_ids) == NEW
    for one, whole in zip(got, answers, strict=True):
        end = next((i + 1 for i, token in enumerate(whole.token_ids) if token in stop), NEW)
        assert one.token_ids == whole.token_ids[:end]
        assert one.finish_reason == ("stop" if whole.token_ids[end - 1] in stop else "length")
        np.testing.assert_allclose(one.logprobs, whole.logprobs[:end], atol=SAMPLED_LOGPROBS)


def test_streaming_gives_what_is_returned(model, prompts, answers):
    heard = {}
    on_tokens = lambda new: [heard.setdefault(row, []).extend(ids) for row, ids in new]  # noqa: E731
    check_same(generate(model, prompts, n=3, on_tokens=on_tokens), answers)
    assert [heard[i] for i in range(len(answers))] == [a.token_ids for a in answers]


def test_logprobs_over_what_is_kept(model, prompts):
    sampling = Sampling(do_sample=True, temperature=1.3, top_k=5, top_p=0.9, repetition_penalty=1.2)
    got = generate(model, prompts[:2], sampling=sampling)
    check_logprobs(model, prompts, got, sampling.temperature)
    assert all((answer.kept_logprobs > answer.logprobs).all() for answer in got)


def test_sync_after_training(model, prompts, answers):
    """New arrays in model.trainable are noticed; a merged copy is made again."""
    trained = model.trainable
    with Engine(model, weights="merged", progress=False) as made:
        options = {"sampling": SAMPLED, "max_new_tokens": NEW, "stop_token_ids": [], "seed": 7}
        check_same(made.generate(prompts, n=3, **options), answers)
        before = made.num_compilations
        try:
            model.trainable = {path: leaf * 0.9 for path, leaf in trained.items()}
            changed = made.generate(prompts, n=3, **options)
            made.sync()
            check_same(made.generate(prompts, n=3, **options), changed)
            check_logprobs(model, prompts, changed)
        finally:
            model.trainable = trained
        check_same(made.generate(prompts, n=3, **options), answers)
        assert made.num_compilations == before and made.weights == "merged"


def test_stop_strings(model, answers, prompts):
    """An answer ends with the token that completes the string, wherever that stands in a segment."""
    decode = model.tokenizer.decode
    whole = answers[2].token_ids
    stop = decode(whole[4:6])
    end = next(i for i in range(NEW + 1) if stop in decode(whole[:i]))
    got = generate(model, prompts, n=3, stop_strings=["never there", stop])
    assert got[2].token_ids == whole[:end] and got[2].finish_reason == "stop"
    others = [i for i, a in enumerate(answers) if stop not in decode(a.token_ids)]
    assert [got[i].token_ids for i in others] == [answers[i].token_ids for i in others]


def test_one_token(model, prompts, answers):
    got = generate(model, prompts, n=3, max_new_tokens=1)
    assert [a.token_ids for a in got] == [a.token_ids[:1] for a in answers]


def test_memory_is_asked_for_before_it_is_taken(model, prompts, answers, monkeypatch):
    asked = Engine(model, weights="merged", progress=False)
    two = asked.forecast(2, 3, 128, 256).total
    monkeypatch.setattr(engine, "free_bytes", lambda arguments: two)
    check_same(generate(model, prompts, n=3), answers)
    assert asked._places(5, 3, 128, 256) == 2
    monkeypatch.setattr(engine, "free_bytes", lambda arguments: 1000)
    with pytest.raises(
        MemoryError, match="one row with 128 columns for its prompt and 256 for its answer needs"
    ):
        generate(model, prompts)


def test_auto_takes_the_copy_where_it_fits(model, monkeypatch):
    auto = Engine(model, progress=False)
    auto.generate([[5]], max_new_tokens=1)
    assert auto.weights == "merged"
    small = auto.forecast(1, 1, 64, 256).total + engine.merged_bytes(model) // 2
    monkeypatch.setattr(engine, "free_bytes", lambda arguments: small)
    tight = Engine(model, progress=False)
    tight.generate([[5]], max_new_tokens=1)
    assert tight.weights == "lora"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n": 0}, "n must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\)"),
        ({"stop_strings": "a"}, "stop_strings must be a list"),
        ({"streams": [(0, 0)] * 2}, "streams must name one stream a prompt: 1, got 2"),
    ],
)
def test_bad_arguments(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [[5, 6]], **options)


def test_bad_prompts(model):
    bad = {
        "not empty": [],
        "list of texts": "abc",
        "prompt 1 is empty": [[5], []],
        "vocabulary of 320": [[320]],
    }
    for message, prompts in bad.items():
        with pytest.raises(ValueError, match=message):
            generate(model, prompts)
    with pytest.raises(ValueError, match="weights must be"):
        Engine(model, weights="bf16")
    with pytest.raises(ValueError, match="max_sequences must be at least 1"):
        Engine(model, max_sequences=0)


@pytest.mark.parametrize(
    "count, unit, want", [(1, 1, 1), (5, 1, 6), (7, 1, 8), (9, 1, 12), (65, 64, 128), (257, 256, 512)]
)
def test_buckets(count, unit, want):
    assert plan.bucket(count, unit) == want


def test_group_sizes():
    """All of a prompt's rows together, unless that leaves most places empty."""
    assert plan.group_size({i: range(8) for i in range(32)}, 512, 1024) == 8
    spread = {i: range(1 + 7 * (i == 0)) for i in range(32)}
    assert plan.group_size(spread, 512, 1024) == 1
    assert [part.rows for part in plan.split({3: [4, 5, 6]}, 2)] == [(4, 5), (6,)]
