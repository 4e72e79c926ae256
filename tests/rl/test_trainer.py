"""GRPOTrainer on a tiny Llama: resume inside a generation, failures, dynamic sampling, evaluation, completions."""

import json
import re
from pathlib import Path

import datasets
import jax
import numpy as np
import pytest
from tolerances import SAMPLER_GAP

from jaxtune.fast import FastLanguageModel
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.experience import Experience
from jaxtune.rl.reward_runner import RewardError
from jaxtune.rl.rollout import Completions
from jaxtune.rl.trainer import GRPOTrainer

EOS = 2
ROWS = [{"prompt": [{"role": "user", "content": "say " + "xy" * i}], "answer": i} for i in range(6)]
pytestmark = pytest.mark.usefixtures("quick_compilation")
CLOCK = {"step_time", "tokens_per_second", "peak_memory_gib", "eval_runtime"}


@pytest.fixture(scope="module")
def base(tiny_model_dir, quick_compilation):
    folder = tiny_model_dir("llama", num_hidden_layers=1)
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=128, dtype="float32")[0]


def rollout(prompts, trainer):
    """Completions that depend on the step and the prompt alone."""
    step, ids = trainer.state.global_step, []
    for i, prompt in enumerate(prompts):
        rng = np.random.default_rng([step, len(prompt[0]["content"]), i])
        text = rng.integers(3, 259, rng.integers(2, 9)).tolist()
        ids.append([*text, EOS] if rng.random() < 0.7 else text)
    prompt_ids = [
        trainer.processing_class.apply_chat_template(p, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        for p in prompts
    ]
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": [[-5.0] * len(row) for row in ids]}


def odd(completion_ids, **_):
    return [float(sum(ids) % 3) for ids in completion_ids]


def make_trainer(
    base, output_dir, reward_funcs=odd, rows=ROWS, rollout_func=rollout, eval_dataset=None, **settings
):
    model = FastLanguageModel.get_peft_model(
        base, r=4, lora_dropout=0.2, target_modules=["q_proj", "down_proj"]
    )
    defaults = {
        "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 10, "max_steps": 7,
        "learning_rate": 5e-3, "logging_steps": 2, "save_steps": 3, "disable_tqdm": True, "beta": 0.04,
        "steps_per_generation": 3, "num_iterations": 2, "loss_type": "grpo",
        "lr_scheduler_type": "constant",  # the same program for any number of steps
    }  # fmt: skip
    args = GRPOConfig(str(output_dir), **defaults | settings)
    return GRPOTrainer(model, reward_funcs, args, rows, rollout_func=rollout_func, eval_dataset=eval_dataset)


def results(history):
    return [{k: v for k, v in r.items() if k not in CLOCK and not k.startswith("train_")} for r in history]


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    trainer = make_trainer(base, tmp_path_factory.mktemp("whole"), log_completions=True)
    trainer.train()
    return trainer


@pytest.mark.parametrize("step", [3, 6])  # in the middle of a generation, and between two
def test_resume_is_bitwise_equal(step, base, uninterrupted, tmp_path):
    folder = Path(uninterrupted.args.output_dir)
    assert (folder / f"checkpoint-{step}/experience.npz").is_file() == (step == 3)
    resumed = make_trainer(base, tmp_path)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    pairs = (
        (resumed.model.trainable, uninterrupted.model.trainable),
        (resumed.opt_state, uninterrupted.opt_state),
    )
    for ours, theirs in pairs:
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert results(resumed.state.log_history)[:-1] == results(uninterrupted.state.log_history)[:-1]


def test_another_reward_is_another_run(base, uninterrupted, tmp_path):
    def even(completion_ids, **_):
        return [0.0] * len(completion_ids)

    checkpoint = f"{uninterrupted.args.output_dir}/checkpoint-3"
    with pytest.raises(ValueError, match="reward functions: \\['odd'\\] in the checkpoint, \\['even'\\] now"):
        make_trainer(base, tmp_path, even).train(resume_from_checkpoint=checkpoint)


def test_one_compilation_for_each_length(base, tmp_path):
    def growing(prompts, trainer):
        made = rollout(prompts, trainer)
        if trainer.state.global_step >= 2:
            made["completion_ids"] = [[7] * 60 for _ in prompts]
            made["logprobs"] = [[-5.0] * 60 for _ in prompts]
        return made

    settings = {"num_iterations": 1, "steps_per_generation": 1, "max_steps": 5, "save_strategy": "no"}
    trainer = make_trainer(base, tmp_path, rollout_func=growing, max_completion_length=60, **settings)
    trainer.train()
    assert trainer.compilations == 2  # 64 and 128 tokens
    assert trainer._collector.policy.score._cache_size() == 2


def test_completions_are_written_and_shown(base, uninterrupted, tmp_path, capsys):
    folder = Path(uninterrupted.args.output_dir) / "completions"
    rows = datasets.Dataset.from_parquet(str(folder / "completions_00002.parquet"))
    assert rows.column_names == ["step", "prompt", "completion", "odd", "advantage"]
    assert len(rows) == 12
    assert (folder / "index.html").read_text().count("<article>") >= 6
    trainer = make_trainer(base, tmp_path, log_completions=True, num_completions_to_print=2, max_steps=1)
    trainer.train()
    shown = capsys.readouterr().out
    assert shown.count("\ncompletion ") == 2
    assert "rewards    odd " in shown and "and 10 more in" in shown


def test_a_failing_reward_loses_nothing(base, tmp_path):
    def picky(completions, trainer_state, **_):
        if trainer_state.global_step == 6:
            raise KeyError("no such answer")
        return [1.0] * len(completions)

    trainer = make_trainer(base, tmp_path, [odd, picky], save_strategy="no")
    with pytest.raises(RewardError, match="reward function 'picky' raised KeyError") as caught:
        trainer.train()
    assert "on row 0: prompt 'say" in str(caught.value)
    kept = Path(str(caught.value).split("are kept in ")[1])
    assert len(kept.read_text().splitlines()) == 12
    assert "prompts" in json.loads(kept.read_text().splitlines()[0])
    assert any("up to step 6 is saved" in note for note in caught.value.__notes__)
    assert (tmp_path / "checkpoint-6").is_dir()
    resumed = make_trainer(base, tmp_path, [odd, lambda completions, **_: [1.0] * len(completions)])
    resumed.reward_func_names[1] = "picky"  # mended
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7


def test_dynamic_sampling_replaces_groups_without_a_signal(base, tmp_path):
    def only_some(prompts, completion_ids, **_):
        """Prompts of even length are never solved: their groups have no variance."""
        return [i % 2 * float(len(p[0]["content"]) % 4 == 0) for i, p in enumerate(prompts)]

    settings = {"max_steps": 1, "num_iterations": 1, "steps_per_generation": 1, "save_strategy": "no"}
    frozen = make_trainer(base, tmp_path / "a", only_some, **settings)
    frozen.train()
    trainer = make_trainer(base, tmp_path / "b", only_some, max_resample_rounds=20, **settings)
    trainer.train()
    before, after = (t.state.log_history[0] for t in (frozen, trainer))
    assert before["frac_reward_zero_std"] == after["frac_reward_zero_std"] > 0  # of what was sampled first
    assert after["resample/groups"] >= 1 and after["resample/left"] == 0
    assert trainer.state.num_input_tokens_seen > frozen.state.num_input_tokens_seen
    experience: Experience = trainer._held[0]
    assert np.all(np.abs(experience.advantages) > 0.5)


def test_evaluation(base, tmp_path):
    evaluation = {"one": ROWS[:3], "two": ROWS[3:]}
    settings = {
        "max_steps": 1,
        "eval_strategy": "steps",
        "per_device_eval_batch_size": 4,
        "num_generations_eval": 4,
    }
    trainer = make_trainer(base, tmp_path, eval_dataset=evaluation, save_strategy="no", **settings)
    trainer.train()
    record = next(r for r in trainer.state.log_history if "eval_one_loss" in r)
    train = next(r for r in trainer.state.log_history if "loss" in r)
    not_there = {"grad_norm", "num_tokens", "learning_rate", "epoch", "step", *CLOCK}
    assert {f"eval_one_{name}" for name in train.keys() - not_there} <= record.keys()
    again = trainer.evaluate(ROWS[:3])
    assert again["eval_reward"] == record["eval_one_reward"]


def test_an_evaluation_that_does_not_fit_is_told_before_the_first_step(base, tmp_path):
    """That of the longest prompt with as many tokens as there may be; those of a rollout_func are not known."""
    settings = {
        "eval_strategy": "epoch",
        "per_device_eval_batch_size": 2048,
        "num_generations_eval": 1024,
        "memory_budget_gb": 0.1,
    }
    trainer = make_trainer(base, tmp_path, rollout_func=None, eval_dataset=ROWS[:2], **settings)
    with pytest.raises(MemoryError, match=r"an evaluation batch of 2048 x [0-9]+ tokens needs"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_arguments_that_are_not_there(base, tmp_path):
    model = FastLanguageModel.get_peft_model(base, r=4)
    with pytest.raises(ValueError, match="give tools or rollout_func, not both"):
        GRPOTrainer(model, odd, GRPOConfig(str(tmp_path)), ROWS, rollout_func=rollout, tools=[len])
    with pytest.raises(ValueError, match="sync_ref_model=True needs full_finetuning=True"):
        make_trainer(base, tmp_path, sync_ref_model=True, beta=0.1)
    with pytest.raises(ValueError, match="sync_ref_model=True needs a reference"):
        make_trainer(base, tmp_path, sync_ref_model=True, beta=0.0)
    with pytest.raises(ValueError, match="one generation takes 8"):
        make_trainer(base, tmp_path, per_device_train_batch_size=16, steps_per_generation=1).train()
    with pytest.raises(ValueError, match="reward_weights has 2 numbers for 1"):
        make_trainer(base, tmp_path, reward_weights=(1, 2))
    with pytest.raises(ValueError, match="needs a column 'prompt'"):
        make_trainer(base, tmp_path, rows=[{"text": "a"}])
    with pytest.raises(FileNotFoundError, match="no/reward-model does not exist"):
        make_trainer(base, tmp_path, "./no/reward-model")


def test_the_engine_samples_from_the_policy_of_its_step(base, tmp_path, capsys):
    """Log-probabilities of the sampler and of the trainer are equal at each step, though the steps are large."""
    settings = {
        "beta": 0.0,
        "num_iterations": 1,
        "steps_per_generation": 1,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    settings |= {"learning_rate": 0.05, "importance_sampling_correction": True, "max_steps": 4}
    trainer = make_trainer(base, tmp_path, rollout_func=None, **settings)
    trainer.train()
    told = capsys.readouterr().out  # the memory of both phases, before the first step
    assert re.search(
        r"remat=.* GB of .*\n2 x 2 completions of 10 tokens: .* GB", told[: told.index("step 1/4")]
    )
    records = [r for r in trainer.state.log_history if "loss" in r]
    gaps = [r["sampling/sampling_logp_difference/max"] for r in records]
    assert len(gaps) == 4 and max(gaps) < SAMPLER_GAP
    assert all(r["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3) for r in records)
    assert records[-1]["completions/max_length"] <= 10
    assert (tmp_path / "reward.png").is_file()
    again = make_trainer(base, tmp_path / "again", rollout_func=None, **settings)
    again.train()
    assert results(again.state.log_history)[:-1] == results(trainer.state.log_history)[:-1]


class Recorded:
    """A Rollout of one's own that tells what it was asked."""

    makes_prompt_ids = False

    def __init__(self):
        self.calls = []

    def sync(self, step):
        self.calls.append(f"sync {step}")

    def generate(self, request):
        self.calls.append(f"generate {len(request.prompts)}")
        assert (
            request.prompt_ids is not None and request.prompts[0] == request.prompts[1] != request.prompts[2]
        )
        rng = np.random.default_rng(request.seed)
        ids = [[*rng.integers(3, 259, 4).tolist(), EOS] for _ in request.prompts]
        return Completions(request.prompt_ids, ids, metrics={"mine": 3.0})

    def pause(self):
        self.calls.append("pause")

    def forecast(self, groups, group, prompt):
        return f"{groups} {group} {prompt}"

    def close(self):
        self.calls.append("close")


def test_a_rollout_of_ones_own_is_called_in_order(base, tmp_path, capsys):
    model, source = FastLanguageModel.get_peft_model(base, r=4), Recorded()
    args = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=4, num_generations=2, gradient_accumulation_steps=2, max_steps=3,
        steps_per_generation=1, max_completion_length=10, logging_steps=1, save_strategy="no", disable_tqdm=True,
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer = GRPOTrainer(model, odd, args, ROWS, ROWS[:4], rollout=source)
    trainer.train()
    two = [
        "generate 4",
        "generate 4",
        "pause",
    ]  # two generations in a step; the second ends the epoch and has one
    evaluation = ["generate 8", "pause"]
    assert source.calls == [
        "sync 0", *two, "sync 1", "generate 4", "pause", "sync 2", *evaluation, *two, "sync 3", *evaluation, "close"
    ]  # fmt: skip
    assert trainer.state.log_history[0]["mine"] == 3.0
    assert "2 2 " in capsys.readouterr().out.split("step 1/3")[0]


def test_a_loss_that_is_no_number_is_told_with_its_rows(base, tmp_path):
    trainer = make_trainer(base, tmp_path, save_strategy="no", beta=0.0)

    class Break:
        def on_step_end(self, trainer, metrics):
            if trainer.state.global_step == 2:  # step 3's batch is made already, and step 4 will be another's
                trainer.model.trainable = {path: x * np.nan for path, x in trainer.model.trainable.items()}

    trainer.callbacks.append(Break())
    with pytest.raises(FloatingPointError, match=r"step \d of 7: loss nan") as caught:
        trainer.train()
    assert str(caught.value).count("a completion that ends with") == 4
