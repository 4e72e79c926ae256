"""SFTTrainer on a tiny Llama: resume bit for bit, signals, bad losses, evaluation, logs, compilations."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import checkpoint, training_loop
from jaxtune.config import SFTConfig
from jaxtune.fast import FastLanguageModel
from jaxtune.metrics import read_history
from jaxtune.trainer import SFTTrainer
from jaxtune.training_loop import TrainOutput

pytestmark = pytest.mark.usefixtures("quick_compilation")
CLOCK = {"tokens_per_second", "peak_memory_gib", "eval_runtime"}
ROWS = [{"text": f"row {i}: " + "abcdefgh"[: i % 9] * (i % 4)} for i in range(22)]


@pytest.fixture(scope="module")
def base(tiny_model_dir):
    return load_base(tiny_model_dir("llama", num_hidden_layers=1))


def load_base(folder):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=128, dtype="float32")[0]


def make_trainer(base, output_dir, **settings):
    """A trainer on a new adapter with dropout, and with NEFTune: everything that is random."""
    keywords = {name: settings.pop(name) for name in ("callbacks", "eval_dataset") if name in settings}
    rows = settings.pop("rows", ROWS)
    model = FastLanguageModel.get_peft_model(
        base, r=4, lora_dropout=0.2, target_modules=["q_proj", "down_proj"]
    )
    defaults = {
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 5e-3,
        "neftune_noise_alpha": 5.0,
        "logging_steps": 2,
        "save_steps": 3,
        "disable_tqdm": True,
    }
    args = SFTConfig(str(output_dir), **defaults | settings)
    return SFTTrainer(model=model, args=args, train_dataset=rows, **keywords)


def assert_same_run(one, other, up_to=None):
    """Weights, optimizer state and logs are equal bit for bit."""
    for ours, theirs in ((one.model.trainable, other.model.trainable), (one.opt_state, other.opt_state)):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert results(one.state.log_history) == results(other.state.log_history)


def results(history):
    """Records without what the clock decides."""
    kept = ({k: v for k, v in r.items() if k not in CLOCK and not k.startswith("train_")} for r in history)
    return [record for record in kept if record.keys() - {"epoch", "step"}]


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    trainer = make_trainer(base, tmp_path_factory.mktemp("whole"), eval_strategy="steps", eval_steps=4,
                           eval_dataset=ROWS[:5])  # fmt: skip
    trainer.output = trainer.train()
    return trainer


def test_training_learns_and_tells(uninterrupted):
    trainer, folder = uninterrupted, Path(uninterrupted.args.output_dir)
    history = trainer.state.log_history
    assert read_history(folder / "history.jsonl") == history
    losses = [record for record in history if "loss" in record]
    assert [record["step"] for record in losses] == [2, 4, 6, 8]
    assert losses[-1]["loss"] < losses[0]["loss"]
    np.testing.assert_allclose(
        [r["learning_rate"] for r in losses], [5e-3 * f for f in (7 / 8, 5 / 8, 3 / 8, 1 / 8)]
    )
    assert [r["step"] for r in history if "eval_loss" in r] == [4, 8]
    assert losses[-1].keys() == {
        "loss", "grad_norm", "mean_token_accuracy", "num_tokens", "learning_rate", "tokens_per_second",
        "peak_memory_gib", "epoch", "step",
    }  # fmt: skip
    assert isinstance(trainer.output, TrainOutput)
    assert trainer.output.global_step == trainer.state.global_step == 8
    assert trainer.output.training_loss == pytest.approx(np.mean([r["loss"] for r in losses]), rel=1e-6)
    assert trainer.output.metrics["train_loss"] == trainer.output.training_loss
    assert trainer.state.epoch == pytest.approx(8 / 6)
    assert (folder / "loss.png").stat().st_size > 5000
    assert checkpoint.checkpoint_steps(folder) == [3, 6, 8]


def test_checkpoint_is_an_adapter_to_load_and_holds_the_state(uninterrupted):
    from safetensors.numpy import load_file

    from jaxtune.lora import adapter_tensors

    folder = Path(uninterrupted.args.output_dir) / "checkpoint-8"
    saved, ours = load_file(folder / "adapter_model.safetensors"), adapter_tensors(uninterrupted.model)
    assert saved.keys() == ours.keys()
    assert all(np.array_equal(saved[name], ours[name]) for name in ours)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    assert (folder / "tokenizer.json").is_file()
    loaded, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=128, dtype="float32")
    trained = uninterrupted.model.trainable
    assert loaded.trainable.keys() == trained.keys()
    assert all(np.array_equal(loaded.trainable[name], trained[name]) for name in trained)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (8, 8)
    assert state["log_history"] == uninterrupted.state.log_history[:-1]


def test_resume_is_bitwise_equal(base, uninterrupted, tmp_path):
    folder = Path(uninterrupted.args.output_dir)
    resumed = make_trainer(base, tmp_path, eval_strategy="steps", eval_steps=4, eval_dataset=ROWS[:5])
    output = resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))  # between two logs
    assert_same_run(resumed, uninterrupted)
    assert output.training_loss == uninterrupted.output.training_loss
    assert resumed.compilations == uninterrupted.compilations == 1
    assert results(read_history(tmp_path / "history.jsonl")) == results(uninterrupted.state.log_history)

    other = make_trainer(base, tmp_path / "seed", seed=1)
    other.train()
    assert results(other.state.log_history)[0] != results(uninterrupted.state.log_history)[0]


def test_resume_with_8bit_adam_and_packing_is_bitwise_equal(base, tmp_path):
    settings = {
        "optim": "adamw_8bit",
        "packing": True,
        "max_steps": 5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
    }
    whole = make_trainer(base, tmp_path, **settings)
    whole.train()
    part = make_trainer(base, tmp_path, **settings)
    part.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert_same_run(part, whole)


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
import test_trainer as t

def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith("tmp-checkpoint-6/trainer_state.json"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
t.make_trainer(t.load_base({model!r}), {folder!r}, eval_strategy="steps", eval_steps=4, eval_dataset=t.ROWS[:5]).train()
"""


def test_killed_while_saving_then_resumed_is_bitwise_equal(base, uninterrupted, tmp_path, compile_once):
    script = KILLED.format(
        tests=str(Path(__file__).parent), model=str(base.checkpoint.path), folder=str(tmp_path)
    )
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": compile_once,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint.checkpoint_steps(tmp_path) == [3]
    assert (tmp_path / "tmp-checkpoint-6").is_dir()
    assert read_history(tmp_path / "history.jsonl")[-1]["step"] == 6

    resumed = make_trainer(base, tmp_path, eval_strategy="steps", eval_steps=4, eval_dataset=ROWS[:5])
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, uninterrupted)
    assert results(read_history(tmp_path / "history.jsonl")) == results(uninterrupted.state.log_history)
    assert not list(tmp_path.glob("tmp-*"))


def test_resuming_another_run_is_refused(base, uninterrupted, tmp_path):
    folder = Path(uninterrupted.args.output_dir) / "checkpoint-3"
    for changes, name in (
        ({"learning_rate": 1e-3}, "learning_rate: 0.005 in the checkpoint, 0.001 now"),
        ({"rows": ROWS[:-1]}, "rows of data: 22 in the checkpoint, 21 now"),
        ({"rows": [*ROWS[:-1], {"text": "other"}]}, "data"),
        ({"max_steps": 9}, "steps of the schedule"),
    ):
        with pytest.raises(ValueError, match="differs in what decides the result") as caught:
            make_trainer(base, tmp_path, **changes).train(resume_from_checkpoint=folder)
        assert name in str(caught.value)


class SendSignal:
    """Sends this process a signal after a step, and again after the next one if asked."""

    def __init__(self, number, steps):
        self.number, self.steps = number, steps

    def on_step_end(self, trainer, metrics):
        if trainer.state.global_step in self.steps:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_signal_finishes_the_step_and_saves(base, uninterrupted, tmp_path, number, error):
    before = signal.getsignal(number)
    settings = {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 4, "eval_dataset": ROWS[:5]}
    stopped = make_trainer(base, tmp_path, callbacks=[SendSignal(number, [4])], **settings)
    with pytest.raises(error) as caught:
        stopped.train()
    if error is SystemExit:
        assert caught.value.code == 143
    assert signal.getsignal(number) is before
    assert checkpoint.checkpoint_steps(tmp_path) == [stopped.state.global_step]
    assert stopped.state.global_step in (4, 5)
    assert (tmp_path / "loss.png").is_file()
    resumed = make_trainer(base, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, uninterrupted)


def test_second_signal_stops_at_once(base, tmp_path):
    class Twice(SendSignal):
        def on_save(self, trainer, folder):
            raise AssertionError("saved")

    twice = [Twice(signal.SIGINT, [2]), Twice(signal.SIGINT, [2])]
    with pytest.raises(KeyboardInterrupt, match="a second time"):
        make_trainer(base, tmp_path, callbacks=twice).train()
    assert checkpoint.checkpoint_steps(tmp_path) == []


def test_should_stop_ends_the_run(base, tmp_path):
    class Stop:
        def on_step_end(self, trainer, metrics):
            trainer.should_stop = metrics["loss"] > 0

    trainer = make_trainer(base, tmp_path, callbacks=[Stop()], save_steps=100)
    assert trainer.train().global_step <= 2
    assert checkpoint.checkpoint_steps(tmp_path) == [trainer.state.global_step]


def test_non_finite_loss_names_step_and_rows(base, tmp_path):
    rows = [{"text": f"plain row {i}"} for i in range(12)]
    rows[7] = {"text": "the Zebra row"}
    settings = {
        "rows": rows,
        "train_sampling_strategy": "sequential",
        "gradient_accumulation_steps": 1,
        "save_steps": 1,
    }
    trainer = make_trainer(base, tmp_path, **settings)
    [token] = trainer.processing_class("Z")["input_ids"]
    embeddings = trainer.model.base["model.embed_tokens.weight"]
    trainer.model.base = trainer.model.base | {
        "model.embed_tokens.weight": embeddings.at[token].set(jnp.nan)
    }  # fmt: skip
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "step 4 of 8: loss nan" in message
    assert "row 6: 'plain row 6" in message
    assert "row 7: 'the Zebra row" in message
    assert f"{tmp_path}/checkpoint-3" in message
    assert checkpoint.checkpoint_steps(tmp_path) == [1, 2, 3]
    assert trainer.state.global_step == 3


def test_one_compilation_for_each_length(base, tmp_path):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    long_row = {"text": "long " * 22}
    seen = []

    class Watch:
        def on_step_end(self, trainer, metrics):
            seen.append((trainer.compilations, len(compiled)))

    settings = {
        "rows": [*ROWS, long_row],
        "max_length": 128,
        "gradient_accumulation_steps": 1,
        "max_steps": 24,
    }
    trainer = make_trainer(base, tmp_path, callbacks=[Watch()], save_strategy="no", **settings)
    trainer.train()
    assert trainer.compilations == 2  # 64 and 128 tokens
    # Where the step was not compiled, nothing was: no hidden compilation in the loop (reading is a step late).
    for (before, total_before), (after, total_after) in itertools.pairwise(seen[1:]):
        assert after > before or total_after == total_before


def test_metrics_are_read_one_step_late(base, tmp_path, monkeypatch):
    trainer = make_trainer(base, tmp_path, save_steps=4, max_steps=6)
    events = []
    count = trainer._count
    monkeypatch.setattr(
        trainer, "_count", lambda run, n, metrics: (events.append(("read", n)), count(run, n, metrics))
    )
    begin = trainer._begin

    def begin_watched(*arguments):
        run = begin(*arguments)
        step = trainer._train_step
        number = iter(range(100))

        def watched(*arguments):
            events.append(("step", next(number)))
            return step(*arguments)

        trainer._train_step = watched
        return run

    monkeypatch.setattr(trainer, "_begin", begin_watched)
    trainer.train()
    order = ["step 0", "step 1", "read 0", "step 2", "read 1", "step 3", "read 2", "read 3",  # saved
             "step 4", "step 5", "read 4", "read 5"]  # fmt: skip
    assert [f"{kind} {n}" for kind, n in events] == order


def test_evaluation_is_weighted_by_tokens(base, tmp_path):
    rows = [{"text": "a"}, {"text": "a much longer row of text"}, {"text": "middle one"}]
    trainer = make_trainer(base, tmp_path, eval_dataset=rows, per_device_eval_batch_size=2)
    total = items = correct = 0
    for row in trainer.eval_dataset:
        ids, labels = np.asarray([row["input_ids"]]), np.asarray(row["labels"])[1:]
        logits = np.asarray(trainer.model.logits(ids))[0, :-1].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        trained = labels != -100
        total -= logp[np.arange(len(labels)), labels][trained].sum()
        correct += (logits.argmax(-1) == labels)[trained].sum()
        items += trained.sum()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(total / items, rel=1e-5)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(correct / items)
    packed = make_trainer(base, tmp_path, eval_dataset=rows, eval_packing=True)
    assert packed.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)

    both = make_trainer(base, tmp_path, eval_dataset={"short": rows[:1], "long": rows[1:]})
    assert {"eval_short_loss", "eval_long_loss"} <= both.evaluate().keys()
    alone = both.evaluate(trainer.eval_dataset)  # in batches of 4
    assert alone["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)


def test_evaluation_is_compiled_before_the_first_step(base, tmp_path, monkeypatch):
    """Once, for the longest of its batches, which its own calls find; where it does not fit, nothing is trained."""
    rows = [{"text": "a"}] * 4 + [{"text": "a longer row of text, " * 4}] * 3
    how = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": rows, "max_length": 128}
    trainer = make_trainer(base, tmp_path / "fits", max_steps=2, **how)
    compiled, later = [], []
    monkeypatch.setattr(
        training_loop, "check_evaluation", lambda _, arguments, *__: compiled.append(arguments[-1])
    )
    events = lambda name, *_, **__: "backend_compile" in name and later.append(name)  # noqa: E731
    evaluate = trainer.evaluate

    def watched():
        del later[:]
        found = evaluate(trainer.eval_dataset.select(range(4, 7)))
        assert not later
        return found

    monkeypatch.setattr(trainer, "evaluate", watched)
    jax.monitoring.register_event_duration_secs_listener(events)
    try:
        trainer.train()
    finally:
        jax.monitoring.unregister_event_duration_listener(events)
    assert [batch["input_ids"].shape for batch in compiled] == [(4, 128)]

    monkeypatch.undo()
    how |= {"per_device_eval_batch_size": 512, "memory_budget_gb": 0.1}
    trainer = make_trainer(base, tmp_path / "not", max_steps=2, **how)
    with pytest.raises(MemoryError, match="an evaluation batch of 512 x 128 tokens needs"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_epochs_and_limits(base, tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 2, "save_total_limit": 1, "eval_on_start": True}
    strategies = {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"}
    trainer = make_trainer(base, tmp_path, eval_dataset=ROWS[:3], **settings, **strategies)
    saved = []
    trainer.callbacks = [
        type("Saves", (), {"on_save": lambda self, trainer, folder: saved.append(folder.name)})()
    ]
    (tmp_path / "checkpoint-99").mkdir()
    with pytest.warns(UserWarning, match=r"checkpoints of an earlier run \(steps 99\)"):
        trainer.train()
    history = trainer.state.log_history
    assert [record["step"] for record in history if "loss" in record] == [6, 12]
    assert [record["step"] for record in history if "eval_loss" in record] == [0, 6, 12]
    assert saved == ["checkpoint-6", "checkpoint-12"]
    assert checkpoint.checkpoint_steps(tmp_path) == [12, 99]


def test_labels_may_be_changed_before_training(base, tmp_path):
    trainer = make_trainer(base, tmp_path, packing=True, max_steps=1, logging_steps=1)
    assert set(trainer.train_dataset.column_names) == {"input_ids", "labels"}
    masked = trainer.train_dataset.map(
        lambda row: {"labels": [*[-100] * (len(row["labels"]) - 1), row["labels"][-1]]}
    )
    trainer.train_dataset = masked
    trainer.train()
    items = trainer.evaluate(masked)
    everything = make_trainer(base, tmp_path / "all", packing=True, max_steps=1, logging_steps=1)
    everything.train()
    assert everything.state.log_history[0]["loss"] != trainer.state.log_history[0]["loss"]
    assert items["eval_loss"] > 0


def test_older_keywords_and_defaults(base):
    model = FastLanguageModel.get_peft_model(base, r=4)
    with pytest.warns(UserWarning, match="max_length 4096 is more than the model was loaded for"):
        trainer = SFTTrainer(
            model=model,
            tokenizer=base.tokenizer,
            train_dataset=[{"body": "text"}],
            dataset_text_field="body",
            max_seq_length=4096,
            packing=True,
            dataset_num_proc=2,
        )
    assert (trainer.args.max_length, trainer.args.packing, trainer.args.dataset_num_proc) == (128, True, 2)
    assert trainer.tokenizer is trainer.processing_class is base.tokenizer
    with_function = SFTTrainer(
        model,
        SFTConfig(max_length=100),
        train_dataset=[{"a": "x"}],
        formatting_func=lambda row: row["a"] + "!",
    )
    assert trainer.tokenizer.decode(with_function.train_dataset[0]["input_ids"]).startswith("x!")


def test_wrong_arguments_are_named(base, tmp_path):
    model = FastLanguageModel.get_peft_model(base, r=4)

    class DataCollatorForSeq2Seq:
        pass

    class TrainerCallback:
        def on_step_end(self, args, state, control): ...

    with pytest.warns(UserWarning, match="DataCollatorForSeq2Seq is not needed"):
        SFTTrainer(model, SFTConfig(max_length=64), data_collator=DataCollatorForSeq2Seq())
    for keywords, error, words in (
        ({"model": "some/model"}, TypeError, "FastLanguageModel.from_pretrained, got str 'some/model'"),
        ({"model": base}, ValueError, "get_peft_model"),
        ({"args": {"max_steps": 1}}, TypeError, "SFTConfig, got dict"),
        ({"data_collator": object()}, ValueError, "data_collator=object"),
        ({"compute_metrics": print}, ValueError, "compute_metrics is not supported"),
        ({"peft_config": object()}, ValueError, "get_peft_model"),
        ({"optimizers": (object(), None)}, ValueError, "set optim"),
        ({"callbacks": [TrainerCallback()]}, TypeError, "TrainerCallback of transformers"),
        ({"callbacks": [object()]}, TypeError, "on_save"),
        ({"args": SFTConfig(max_length=64, eval_strategy="steps")}, ValueError, "needs an eval_dataset"),
    ):
        with pytest.raises(error) as caught:
            SFTTrainer(**{"model": model, "args": SFTConfig(max_length=64)} | keywords)
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="needs a train_dataset"):
        SFTTrainer(model, SFTConfig(max_length=64)).train()
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        SFTTrainer(model, SFTConfig(max_length=64)).evaluate()


@pytest.mark.parametrize(
    "model_says, given, want",
    [
        (True, {}, "auto"),
        (False, {}, "none"),
        (True, {"gradient_checkpointing": False}, "none"),
        (False, {"remat": "all"}, "all"),  # not lost behind get_peft_model(use_gradient_checkpointing=False)
        (False, {"memory_budget_gb": 8.0}, "auto"),
    ],
)
def test_what_is_kept_is_what_args_say_first(model_says, given, want):
    said = SimpleNamespace(gradient_checkpointing=model_says)
    assert SFTTrainer._remat(SimpleNamespace(args=SFTConfig(**given), model=said)) == want
