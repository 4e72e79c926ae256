"""`python -m jaxtune.train`: settings from YAML and flags, messages, dry run, and a whole small run."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml
from safetensors.numpy import load_file

from jaxtune import command_line, train
from jaxtune.command_line import SHIPPED_TASK, ConfigError, Job
from jaxtune.dry_run import Memory

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).resolve().parents[1]
parse = functools.partial(command_line.parse, kind=Job)


def _yaml(tmp_path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_every_setting_has_one_name():
    names = [field.name for cls in Job.parts().values() for field in dataclasses.fields(cls)]
    assert len(names) == len(set(names))


def test_order_of_precedence(tmp_path):
    file = _yaml(tmp_path, "learning_rate: 2e-4\nr: 8\nmax_length: 128\n")
    job = parse(["--config", file, "--max_length", "64"])
    assert job.training.learning_rate == 2e-4  # file over the shipped task; 2e-4 is a number
    assert job.lora.r == 8 and job.lora.lora_alpha == 16
    assert job.training.max_length == 64  # command line over file
    assert job.training.packing is SHIPPED_TASK["packing"]


def test_shipped_settings_only_without_a_dataset(tmp_path):
    assert parse([]).training.packing
    assert not parse(["--dataset", "rows.jsonl"]).training.packing
    assert not parse(["--config", _yaml(tmp_path, "dataset: rows.jsonl")]).training.packing
    assert parse(["--dataset=rows.jsonl", "--packing"]).training.packing


def test_resuming_takes_a_folder_or_true():
    assert parse(["--resume_from_checkpoint", "true"]).training.resume_from_checkpoint is True
    assert (
        parse(["--resume_from_checkpoint", "out/checkpoint-3"]).training.resume_from_checkpoint
        == "out/checkpoint-3"
    )


def test_settings_can_be_read_back(tmp_path):
    job = parse(["--target_modules", "q_proj", "v_proj", "--seed", "7", "--token", "hf_secretsecret"])
    text = job.to_yaml()
    assert "hf_secret" not in text and "\ntoken:" not in text
    again = parse(["--config", _yaml(tmp_path, text)])
    assert again.settings() == job.settings()
    assert yaml.safe_load(text)["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("packng: true", "unknown setting 'packng'; did you mean 'packing'?"),
        ("- 3", "expected lines 'name: value', came a list"),
        ("r: [", "is no YAML"),
        ("optim: sgd", "optim='sgd' is not supported; expected one of adamw"),
        ("max_steps: three", "max_steps must be int, got 'three'"),
        ("push_to_hub: true", "push_to_hub=True is not supported"),
        ("load_in_16bit: true", "exclude each other"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, capsys, text, message):
    assert train.main(["--config", _yaml(tmp_path, text)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_missing_file():
    with pytest.raises(ConfigError, match=r"--config nowhere.yaml: cannot be read"):
        parse(["--config", "nowhere.yaml"])


@pytest.mark.parametrize("arguments", [["--packng"], ["--optim", "sgd"], ["--max_steps", "three"]])
def test_bad_flags_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    shown = captured.err + captured.out
    assert arguments[0].lstrip("-") in shown and "Traceback" not in shown


def test_names_of_hugging_face_are_understood(tmp_path):
    file = _yaml(tmp_path, "bf16: true\nevaluation_strategy: epoch\n")
    with pytest.warns(UserWarning, match="without effect in jaxtune, ignored: bf16"):
        assert parse(["--config", file]).training.eval_strategy == "epoch"


def _rows(path: Path, number: int) -> str:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} and {n}?"},
                {"role": "assistant", "content": str(2 * n)},
            ]
        }
        for n in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_too_little_memory_is_one_line(tmp_path, tiny_model_dir, capsys):
    """Also for the shipped task, whose settings say nothing about memory."""
    arguments = ["--model_name", str(tiny_model_dir("llama")), "--output_dir", str(tmp_path / "out")]
    assert train.main([*arguments, "--memory_budget_gb", "0.0001"]) == 2
    errors = capsys.readouterr().err
    assert "error: the training step needs at least" in errors and "memory_budget_gb is 0.00" in errors
    assert "Traceback" not in errors


def test_dry_run(tmp_path, tiny_model_dir, capsys):
    arguments = ["--model_name", str(tiny_model_dir("llama")), "--dataset", _rows(tmp_path / "rows.jsonl", 5)]
    arguments += ["--max_length", "128", "--train_on_responses_only", "--output_dir", str(tmp_path / "out")]
    arguments += ["--packing", "--eval_packing", "False"]
    arguments += ["--eval_split", "train[:2]", "--per_device_eval_batch_size", "16"]
    assert train.main([*arguments, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "max_length: 128" in shown and "evaluation (16 × 64 tokens)" in shown  # packed they had 128
    assert Memory(base=1, trained=2, optimizer=3, step=4, evaluation=9).total == 15
    assert "base, NF4" in shown and "predicted peak on the device" in shown
    assert "<|im_start|>user" in shown and "What is 0 and 0?" in shown
    assert not (tmp_path / "out").exists()


def test_a_missing_model_or_dataset_is_one_line(tmp_path, tiny_model_dir, capsys):
    model = str(tiny_model_dir("llama"))
    assert train.main(["--model_name", str(tmp_path / "none.gguf")]) == 2
    assert train.main(["--model_name", model, "--dataset", str(tmp_path / "none.jsonl")]) == 2
    assert train.main(["--model_name", model, "--target_modules", "wq"]) == 2
    errors = capsys.readouterr().err
    assert "none.gguf" in errors and "none.jsonl" in errors and "'wq' matches no layer" in errors
    assert "Traceback" not in errors


def test_a_run_without_a_terminal(tmp_path, tiny_model_dir):
    """Another process, its output in a pipe: trains, evaluates, saves, and tells where."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jaxtune.train", "--model_name", str(tiny_model_dir("llama"))]
    command += ["--dataset", _rows(tmp_path / "rows.jsonl", 12), "--eval_split", "train[:4]", "--packing"]
    command += ["--max_length", "128", "--per_device_train_batch_size", "2", "--max_steps", "3"]
    command += ["--logging_steps", "1", "--learning_rate", "1e-2", "--output_dir", str(out)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "60"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # quicker to compile
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stdout and "\x1b[" not in done.stdout
    assert "held-out rows" in done.stdout and str(out / "adapter") in "".join(done.stdout.split())
    losses = [
        json.loads(line)["loss"]
        for line in (out / "history.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert len(losses) == 3
    assert parse(["--config", str(out / "train.yaml")]).training.max_steps == 3
    assert (out / "adapter" / "adapter_config.json").is_file() and (out / "loss.png").is_file()
    merged = transformers.AutoConfig.from_pretrained(out / "merged")
    assert merged.model_type == "llama" and load_file(out / "merged" / "model.safetensors")
