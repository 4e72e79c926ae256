"""DPOTrainer on a tiny Llama: resume, references, evaluation, failures, configuration."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune.fast import FastLanguageModel
from jaxtune.rl.dpo import REF_COLUMNS, DPOTrainer
from jaxtune.rl.dpo_config import DPOConfig

ROWS = [
    {"prompt": f"row {i}:", "chosen": " yes" * (1 + i % 3), "rejected": " no" * (1 + i % 2)} for i in range(9)
]
pytestmark = pytest.mark.usefixtures("quick_compilation")
CLOCK = {"tokens_per_second", "peak_memory_gib", "eval_runtime"}


@pytest.fixture(scope="module")
def base(tiny_model_dir, quick_compilation):
    folder = tiny_model_dir("llama", num_hidden_layers=1)
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, dtype="float32")[0]


def make_trainer(base, folder, *, fresh=True, **settings):
    keywords = {name: settings.pop(name) for name in ("callbacks", "eval_dataset") if name in settings}
    model = FastLanguageModel.get_peft_model(
        base, r=4, lora_dropout=0.2, target_modules=["q_proj", "down_proj"]
    )
    if not fresh:
        rng = np.random.default_rng(0)
        model.trainable = {
            name: jax.numpy.asarray(0.05 * rng.standard_normal(x.shape), x.dtype)
            for name, x in model.trainable.items()
        }
    defaults = {
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 5e-3,
        "disable_dropout": False,
        "logging_steps": 1,
        "save_steps": 2,
        "disable_tqdm": True,
        "beta": 0.5,
    }
    args = DPOConfig(str(folder), **defaults | settings)
    return DPOTrainer(model, args=args, train_dataset=ROWS, **keywords)


def records(trainer):
    return [
        {name: value for name, value in record.items() if name not in CLOCK}
        for record in trainer.state.log_history
        if "train_runtime" not in record
    ]


def test_an_evaluation_that_does_not_fit_is_told_before_the_first_step(base, tmp_path):
    settings = {"per_device_eval_batch_size": 512, "memory_budget_gb": 0.1, "eval_strategy": "epoch"}
    trainer = make_trainer(base, tmp_path, eval_dataset=ROWS, **settings)
    with pytest.raises(MemoryError, match="an evaluation batch of 1024 x 64 tokens needs"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_resumes_bit_for_bit(base, tmp_path):
    """With the reference of the first start, which is a copy of the adapter then."""
    whole = make_trainer(base, tmp_path / "whole", fresh=False)
    whole.train()
    first = make_trainer(base, tmp_path / "parts", fresh=False, callbacks=[Stop(2)])
    first.train()
    with pytest.raises(ValueError, match="reference"):
        make_trainer(base, tmp_path / "parts", fresh=True).train(resume_from_checkpoint=True)
    second = make_trainer(base, tmp_path / "parts", fresh=False)
    second.train(resume_from_checkpoint=True)
    assert records(second) == records(whole)
    for name, value in whole.model.trainable.items():
        np.testing.assert_array_equal(value, second.model.trainable[name])


class Stop:
    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer, metrics):
        trainer.should_stop = trainer.state.global_step == self.step


def test_precomputed_reference_is_the_reference(base, tmp_path):
    same = {"fresh": False, "disable_dropout": True, "save_strategy": "no", "max_steps": 3}
    during = make_trainer(base, tmp_path / "during", **same)
    before = make_trainer(base, tmp_path / "before", precompute_ref_log_probs=True, **same)
    assert set(REF_COLUMNS) <= set(before.train_dataset.column_names)
    during.train(), before.train()
    for one, other in zip(records(during), records(before), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_it_learns_and_evaluates(base, tmp_path):
    trainer = make_trainer(
        base, tmp_path, eval_dataset={"all": ROWS, "few": ROWS[:3]}, max_steps=12, save_strategy="no"
    )
    start = trainer.evaluate()
    assert start["eval_all_loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert start["eval_few_rewards/margins"] == pytest.approx(0, abs=1e-5)
    trainer.train()
    end = trainer.evaluate()
    assert end["eval_all_rewards/accuracies"] == 1 and end["eval_all_loss"] < 0.3
    given = trainer.evaluate(ROWS[:3], "test")
    assert given["test_loss"] == pytest.approx(end["eval_few_loss"], rel=1e-6)
    history = [json.loads(line) for line in (Path(tmp_path) / "history.jsonl").read_text().splitlines()]
    assert history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert history[-2]["rewards/margins"] > 0.1


def test_a_bad_step_names_its_pairs(base, tmp_path):
    trainer = make_trainer(base, tmp_path, train_sampling_strategy="sequential", save_strategy="no")
    trainer.model.trainable = {name: x * np.nan for name, x in trainer.model.trainable.items()}
    with pytest.raises(
        FloatingPointError, match=r"step 1 of 4.*(\n.*)*pair 3: prompt 'row 3:', chosen ' yes"
    ):
        trainer.train()


def test_a_whole_model_is_its_own_reference(tiny_model_dir, tmp_path):
    folder = tiny_model_dir("llama", num_hidden_layers=1)
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, dtype="float32", load_in_4bit=False, full_finetuning=True
    )
    args = DPOConfig(
        str(tmp_path), max_steps=2, learning_rate=1e-3, logging_steps=1, save_strategy="no", max_length=64,
        disable_tqdm=True, optim="adamw",
    )  # fmt: skip
    trainer = DPOTrainer(model, args=args, train_dataset=ROWS)
    trainer.train()
    first, second = records(trainer)[:2]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert second["rewards/margins"] > 1e-3


def test_config_takes_trls_and_unsloths_names():
    with pytest.warns(UserWarning, match="ignored: max_prompt_length"):
        args = DPOConfig(loss_type="ipo", max_prompt_length=128, max_seq_length=256)
    assert args.loss_type == ("ipo",) and args.max_length == 256
    assert DPOConfig().learning_rate == 1e-6 and DPOConfig().disable_dropout
    with pytest.raises(ValueError, match="sync_ref_model=True is not supported"):
        DPOConfig(sync_ref_model=True)
    with pytest.raises(ValueError, match="label_smoothing above 0"):
        DPOConfig(loss_type=["exo_pair"])


def test_config_has_trls_fields_and_defaults():
    trl = pytest.importorskip("trl")
    ours = {field.name: field.default for field in dataclasses.fields(DPOConfig)}
    theirs = {field.name: field for field in dataclasses.fields(trl.DPOConfig)}
    unknown = theirs.keys() - ours.keys() - DPOConfig.FOREIGN.names
    assert not unknown
    own = {"loss_type", "beta", "max_length", "learning_rate", "disable_dropout", "precompute_ref_log_probs"}
    own |= {"ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing", "use_weighting"}
    own |= {"discopop_tau", "loss_weights", "precompute_ref_batch_size", "per_device_train_batch_size"}
    for name in own - {"loss_type"}:
        assert ours[name] == theirs[name].default, name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ref_model": object()}, "ref_model is not supported; the reference is the model as it is now"),
        ({"eval_strategy": "steps"}, "needs an eval_dataset"),
    ],
)
def test_arguments_are_checked(base, tmp_path, given, message):
    args = DPOConfig(str(tmp_path), **{k: v for k, v in given.items() if k != "ref_model"})
    model = FastLanguageModel.get_peft_model(base, r=4)
    with pytest.raises(ValueError, match=message):
        DPOTrainer(model, given.get("ref_model"), args, train_dataset=ROWS)


def test_public_names():
    assert jaxtune.DPOTrainer is DPOTrainer and jaxtune.DPOConfig is DPOConfig
