"""`python -m jaxtune.rl.train`: settings, reward functions by name, and a whole small run."""

import dataclasses
import json

import pytest

from jaxtune import command_line
from jaxtune.rl import train
from jaxtune.rl.command_line import GRPOJob
from jaxtune.rl.job import reward_function

pytestmark = pytest.mark.usefixtures("quick_compilation")


def parse(arguments):
    return command_line.parse(arguments, GRPOJob)


def test_every_setting_has_one_name_and_can_be_read_back(tmp_path):
    names = [field.name for cls in GRPOJob.parts().values() for field in dataclasses.fields(cls)]
    assert len(names) == len(set(names))
    job = parse(["--reward_weights", "1", "0.5", "--beta", "0.04", "--loss_type", "grpo"])
    assert job.training.output_dir == "outputs/sums"  # the shipped task's
    path = tmp_path / "run.yaml"
    path.write_text(job.to_yaml())
    assert parse(["--config", str(path)]).settings() == job.settings()


def test_yaml_takes_what_the_class_takes(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "num_generations: 4\nchat_template_kwargs: {enable_thinking: false}\nscale_rewards: false\n"
    )
    training = parse(["--config", str(path)]).training
    assert training.chat_template_kwargs == {"enable_thinking": False}
    assert (training.num_generations, training.scale_rewards) == (4, "none")


@pytest.mark.parametrize("arguments, message", [
    (["--dataset", "rows.jsonl"], "a dataset needs reward_funcs"),
    (["--reward_funcs", "nothing"], "'nothing' is neither FILE.py:NAME nor one of think_format_reward"),
    (["--reward_funcs", "nowhere.py:f"], "there is no file nowhere.py"),
    (["--model_name", "nowhere/at/all"], "nowhere/at/all"),
])  # fmt: skip
def test_what_cannot_be_meant_is_one_line(arguments, message, capsys):
    try:
        status = train.main(arguments)
    except SystemExit as stop:  # the flags' own parser
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2 and "Traceback" not in captured.err
    assert message in captured.err + captured.out


def test_reward_functions_by_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def half(completions, **_):\n    return [0.5] * len(completions)\n")
    assert reward_function(f"{file}:half")(completions=[1, 2]) == [0.5, 0.5]
    assert reward_function("think_format_reward").__name__ == "think_format_reward"
    with pytest.raises(ValueError, match="has no function 'whole'"):
        reward_function(f"{file}:whole")


def test_a_whole_run(tmp_path, tiny_model_dir, capsys):
    rows, rewards, out = tmp_path / "rows.jsonl", tmp_path / "mine.py", tmp_path / "out"
    rows.write_text("".join(json.dumps({"question": f"{n}?", "answer": str(n)}) + "\n" for n in range(4)))
    rewards.write_text(
        "def length(completions, answer, **_):\n    return [len(c[0]['content']) for c in completions]\n"
    )
    settings = {
        "model_name": tiny_model_dir("llama", num_hidden_layers=1), "dataset": rows, "prompt_column": "question",
        "system_prompt": "Be brief.", "reward_funcs": f"{rewards}:length", "output_dir": out, "max_steps": 2,
        "num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 8, "logging_steps": 1,
        "max_seq_length": 128, "learning_rate": 1e-3,
    }  # fmt: skip
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    assert train.main([*arguments, "--log_completions"]) == 0
    shown = capsys.readouterr().out
    assert "step 2/2" in shown and "system: Be brief." in shown and "rewards    length" in shown
    assert (out / "adapter" / "adapter_config.json").is_file() and (
        out / "completions" / "index.html"
    ).is_file()
    assert parse(["--config", str(out / "train.yaml")]).training.max_steps == 2
