"""Configs: TRL's defaults, foreign names, and errors that say what to do."""

import dataclasses
import warnings

import pytest

from jaxtune.config import DataArguments, LoadArguments, LoraArguments, SFTConfig


def test_defaults_are_trls():
    import trl

    theirs = {field.name: field.default for field in dataclasses.fields(trl.SFTConfig)}
    on_purpose = {
        "output_dir": (None, "trainer_output"),  # transformers puts the second in place of the first
        "optim": ("adamw_torch_fused", "adamw"),  # the same optimizer
        "report_to": ("none", ()),
    }
    for field in dataclasses.fields(SFTConfig):
        if field.name in on_purpose:
            assert (theirs[field.name], field.default) == on_purpose[field.name]
        elif field.name not in (
            "embedding_learning_rate",
            "total_batch_size",
            "warmup_ratio",
            "logging_dir",
            "remat",
            "memory_budget_gb",
        ):  # Unsloth, transformers 4, jaxtune
            assert field.default == theirs[field.name], field.name


def test_every_argument_of_trl_is_known():
    import trl

    ours = {field.name for field in dataclasses.fields(SFTConfig)}
    known = ours | SFTConfig.FOREIGN.names
    assert {field.name for field in dataclasses.fields(trl.SFTConfig)} <= known
    assert not ours & SFTConfig.FOREIGN.names


def test_every_argument_of_trl_with_its_default_asks_for_nothing():
    import trl

    theirs = {}
    for field in dataclasses.fields(trl.SFTConfig):
        made = field.default_factory is not dataclasses.MISSING
        theirs[field.name] = field.default_factory() if made else field.default
    with pytest.warns(UserWarning, match="ignored"):
        args = SFTConfig(**theirs | {"output_dir": "out"})
    assert args == SFTConfig(output_dir="out")


def test_fields_have_help():
    import docstring_parser

    for kind in (SFTConfig, LoadArguments, LoraArguments, DataArguments):
        described = {
            p.arg_name: p.description
            for cls in kind.__mro__[:-1]
            for p in docstring_parser.parse_from_object(cls).params
        }
        assert all(described.get(field.name) for field in dataclasses.fields(kind)), kind


def test_aliases_and_spellings():
    args = SFTConfig(
        max_seq_length=2048, evaluation_strategy="steps", optim="paged_adamw_8bit", report_to="none"
    )
    assert (args.max_length, args.max_seq_length, args.eval_strategy) == (2048, 2048, "steps")
    assert (args.optim, args.report_to) == ("adamw_8bit", ())
    assert SFTConfig(optim="adamw_torch").optim == "adamw"
    assert SFTConfig(gradient_checkpointing="unsloth").gradient_checkpointing is True
    assert SFTConfig(report_to=["tensorboard", "wandb"]).report_to == ("tensorboard", "wandb")
    with pytest.raises(ValueError, match="max_length is given twice"):
        SFTConfig(max_length=1, max_seq_length=2)


def test_replace_keeps_what_was_resolved_late():
    args = dataclasses.replace(
        SFTConfig(seed=1, logging_steps=5, eval_strategy="steps"), seed=2, logging_steps=7
    )
    assert (args.data_seed, args.interval("eval", 100)) == (None, 7)


def test_one_warning_lists_what_is_ignored():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SFTConfig(fp16=False, bf16=True, tf32=True, remove_unused_columns=False)
    assert [str(w.message) for w in caught] == [
        "SFTConfig: without effect in jaxtune, ignored: fp16, bf16, tf32, remove_unused_columns"
    ]
    assert caught[0].filename == __file__


def test_refused_arguments_pass_with_the_value_that_asks_for_nothing():
    args = SFTConfig(
        label_smoothing_factor=0.0, lr_scheduler_kwargs={}, push_to_hub=False, model_init_kwargs=None
    )
    assert args == SFTConfig()
    with pytest.raises(ValueError, match=r"push_to_hub=True is not supported; call model.push_to_hub"):
        SFTConfig(push_to_hub=True)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1"):
        SFTConfig(label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"remat": "all", "memory_budget_gb": 8}, "memory_budget_gb=8 is what remat='auto' stays under"),
        (
            {"gradient_checkpointing": False, "remat": "all"},
            "remat='all', memory_budget_gb=None ask otherwise",
        ),
        (
            {"gradient_checkpointing": False, "memory_budget_gb": 8},
            "remat='auto', memory_budget_gb=8 ask otherwise",
        ),
    ],
)
def test_what_says_two_things_about_memory(given, words):
    with pytest.raises(ValueError, match=words):
        SFTConfig(**given)


def test_unknown_name_gets_the_nearest():
    with pytest.raises(TypeError, match="'warmup_step'; did you mean 'warmup_steps'"):
        SFTConfig(warmup_step=3)


@pytest.mark.parametrize(
    ("field", "value", "error", "words"),
    [
        ("learning_rate", "2e-4", TypeError, 'YAML reads "2e-4" as text'),
        ("learning_rate", None, TypeError, "must be float"),
        ("learning_rate", float("nan"), TypeError, "must be float"),
        ("learning_rate", -1.0, ValueError, "at least 0"),
        ("max_length", 0, ValueError, "at least 1"),
        ("max_length", 10.5, TypeError, "int or NoneType"),
        ("packing", "yes", TypeError, "must be bool"),
        ("max_steps", True, TypeError, "must be int"),
        ("per_device_train_batch_size", 0, ValueError, "at least 1"),
        ("adam_beta2", 1.0, ValueError, "below 1"),
        ("optim", "lion", ValueError, "expected one of adamw"),
        ("loss_type", "dft", ValueError, "expected one of 'nll'"),
        ("lr_scheduler_type", "polynomial", ValueError, "'constant_with_warmup'"),
        ("save_strategy", "best", ValueError, "'no', 'steps', 'epoch'"),
        ("packing_strategy", "ffd", ValueError, "'bfd_split'"),
        ("report_to", "mlflow", ValueError, "tensorboard, wandb, trackio"),
        ("dataset_kwargs", {"add_special_tokens": False}, ValueError, "skip_prepare_dataset"),
        ("memory_budget_gb", 0, ValueError, "must be above 0, got 0; expected GB of"),
        ("memory_budget_gb", -2.5, ValueError, "above 0, got -2.5"),
        ("remat", None, TypeError, "must be a text, got None; expected 'auto'"),
        ("remat", True, TypeError, "got True"),
        ("remat", 3, TypeError, "got 3"),
        ("load_best_model_at_end", True, ValueError, "lowest eval_loss"),
        ("num_train_epochs", 0.0, ValueError, "nothing to train"),
    ],
)
def test_bad_values_are_named(field, value, error, words):
    with pytest.raises(error, match=field) as caught:
        SFTConfig(**{field: value})
    assert words in str(caught.value)


def test_packing_needs_a_length():
    with pytest.raises(ValueError, match="packing=True needs max_length"):
        SFTConfig(packing=True, max_length=None)


@pytest.mark.parametrize(("settings", "steps"), [({"warmup_steps": 5}, 5), ({"warmup_steps": 0.1}, 7),
                                                 ({"warmup_ratio": 0.03}, 2), ({}, 0)])  # fmt: skip
def test_warmup_is_transformers(settings, steps):
    assert SFTConfig(**settings).num_warmup_steps(61) == steps
    if "warmup_steps" in settings:
        import transformers

        theirs = transformers.TrainingArguments("out", use_cpu=True, **settings)
        assert theirs.get_warmup_steps(61) == steps


def test_intervals():
    args = SFTConfig(save_steps=0.25, eval_strategy="epoch")
    assert args.interval("logging", 100) == 10
    assert args.interval("save", 90) == 23
    assert args.interval("eval", 100) == 0


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SFTConfig().seed = 1


def test_load_arguments():
    with pytest.raises(ValueError, match="load_in_4bit and full_finetuning exclude each other"):
        LoadArguments(full_finetuning=True)
    assert LoadArguments(full_finetuning=True, load_in_4bit=False).full_finetuning
    assert LoadArguments(compute_dtype="fp8").compute_dtype == "fp8"
    with pytest.raises(ValueError, match=r"fp8.* multiplies by NF4 weights; set load_in_4bit=True"):
        LoadArguments(compute_dtype="fp8", load_in_4bit=False, load_in_16bit=True)
    with pytest.raises(ValueError, match="compute_dtype='int8' is not supported; expected one of 'fp8'"):
        LoadArguments(compute_dtype="int8")
    with pytest.raises(ValueError, match=r"give it to FastLanguageModel\.from_pretrained"):
        SFTConfig(compute_dtype="fp8")
    with pytest.raises(ValueError, match="dtype='int8'"):
        LoadArguments(dtype="int8")
    assert "hf_secret" not in repr(LoadArguments(token="hf_secret"))


def test_lora_arguments():
    assert LoraArguments(target_modules=["q_proj"]).target_modules == ("q_proj",)
    assert LoraArguments(target_modules="all-linear").target_modules == "all-linear"
    assert LoraArguments(target_modules=("all-linear",)).target_modules == "all-linear"
    assert LoraArguments(init_lora_weights="gaussian").init_lora_weights == "gaussian"
    assert LoraArguments(layers_to_transform=3).layers_to_transform == (3,)
    for bad in ({"r": 0}, {"lora_dropout": 1.0}, {"init_lora_weights": "loftq"}):
        with pytest.raises(ValueError):
            LoraArguments(**bad)


def test_data_arguments():
    with pytest.raises(ValueError, match="both instruction_part and response_part"):
        DataArguments(instruction_part="<user>")
