"""Whole evaluations of a tiny model: numbers, resuming, the command, and training with it."""

import json
import re

import pytest
from pyarrow import parquet

from jaxtune.evaluate import EvaluateCallback, EvaluateConfig, evaluate
from jaxtune.evaluate.__main__ import main
from jaxtune.evaluate.results import Completion
from jaxtune.evaluate.run import carry_out, chunks, plan
from jaxtune.fast import FastLanguageModel
from jaxtune.generate import Engine
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.trainer import GRPOTrainer

ROWS = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(5)]
SHORT = {"instruction": "", "max_new_tokens": 8}
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tiny_model_dir):
    return tiny_model_dir("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def model(folder, quick_compilation):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=None, dtype="float32")[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def texts(results):
    return [[one.text for one in judged.completions] for judged in results.judged]


def say(planned, answers):
    """Completions with these texts, a list for each question."""
    return {
        (i, j): Completion(i, j, text, 3, "stop")
        for i, row in enumerate(answers)
        for j, text in enumerate(row)
    }


def test_metrics_of_known_completions(model):
    config = EvaluateConfig(n=4, temperature=1.0, **SHORT)
    planned = plan(model, ROWS[:3], config)
    answers = [
        ["#### 0", "#### 0", "#### 0", "#### 1"],  # 3 of 4
        ["#### 5", "#### 5", "#### 1", ""],  # 1 of 4, the majority wrong
        ["", "", "", "no"],  # none, and no answer
    ]
    results = carry_out(model, planned, known=say(planned, answers), progress=False)
    found = {name: one.value for name, one in results.metrics.items()}
    assert found == pytest.approx(
        {
            "accuracy": (3 / 4 + 1 / 4 + 0) / 3,
            "pass@2": (1 + 3 / 6 + 0) / 3,  # of the 6 pairs of the second, 3 hold the right one
            "pass@4": 2 / 3,
            "maj@2": ((1 + 1 / 2) / 2 + (0 + 1) / 2 + 0) / 3,  # blocks (0, 0), (0, 1) and (5, 5), (1, none)
            "maj@4": 1 / 3,
        }
    )
    assert results.shares == {"answered": 7 / 12, "cut": 0.0} and results.new_tokens == 0
    assert results.judged[1].found == ["5", "5", "1", None] and results.judged[1].votes == [0, 0, 1, None]
    assert results.judged[1].expected == "1"


def test_greedy_answers_are_the_models_own(model):
    results = evaluate(model, ROWS[:2], EvaluateConfig(**SHORT), progress=False)
    prompt = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "1?"}], add_generation_prompt=True, return_dict=True, return_tensors="np"
    )
    ids = model.generate(**prompt, max_new_tokens=8)[0, prompt["input_ids"].shape[1] :]
    assert texts(results)[1] == [model.tokenizer.decode(ids, skip_special_tokens=True)]
    assert results.checker == "gsm8k" and results.accuracy == 0.0
    assert list(results.metrics) == ["accuracy"]


def test_what_is_there_is_not_made_again(model, monkeypatch):
    """Parts of an evaluation give what the whole gives: fewer questions, fewer samples, an interruption."""
    config = EvaluateConfig(n=3, temperature=1.0, seed=5, **SHORT)
    planned = plan(model, ROWS, config)
    saved = []
    whole = carry_out(model, planned, save=saved.append, progress=False)
    assert len({text for row in texts(whole) for text in row}) > 5  # they differ
    all_of_them = {(one.question, one.sample): one for part in saved for one in part}
    assert len(all_of_them) == 15

    known = {key: one for key, one in all_of_them.items() if key[0] < 2 or key[1] < 1}
    assert [first for _, first in chunks(planned, known)] == [3, 1]
    asked = []
    generate = Engine.generate

    def listening(self, prompts, **arguments):
        asked.append((len(prompts), arguments["n"]))
        return generate(self, prompts, **arguments)

    monkeypatch.setattr(Engine, "generate", listening)
    again = carry_out(model, planned, known=known, progress=False)
    assert texts(again) == texts(whole) and again.metrics == whole.metrics
    assert asked == [(3, 2)]


def test_the_engine_stops_a_model_without_a_chat_template_at_the_next_question(model, monkeypatch):
    asked = []
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    monkeypatch.setattr(
        Engine,
        "generate",
        lambda self, prompts, **a: asked.append(a["stop_strings"]) or _Said("3\nQuestion: 4?"),
    )
    results = evaluate(model, ROWS[:1], EvaluateConfig(checker="number", **SHORT), progress=False)
    assert asked == [("\nQuestion:",)] and texts(results) == [["3"]]


class _Said(list):
    """One generation that says a text."""

    def __init__(self, text):
        class One:
            prompt, sample, token_ids, finish_reason = 0, 0, [5], "stop"

        super().__init__([One])
        self._text = text

    def texts(self, tokenizer):
        return [self._text]


@pytest.mark.parametrize(
    "rows, config, extra, message",
    [
        ([{"question": "q", "answer": "none"}], {"checker": "number"}, {},
         "row 0 has no answer for the checker 'number', which expects a number; it has 'none'"),
        (ROWS, {"max_new_tokens": 500}, {}, "make 5"),
        (ROWS, {"few_shot": 2}, {}, "few_shot and few_shot_data go together"),
        (ROWS, {"few_shot": 1}, {"few_shot_data": ROWS[2:]}, "few_shot_data holds 3 of the questions"),
        (ROWS, {}, {"few_shot_data": ROWS}, "few_shot and few_shot_data go together"),
        (ROWS, {"few_shot": 1}, {"few_shot_data": [{"question": "q", "answer": "Paris"}]},
         "few_shot_data has the format 'plain', the questions have 'gsm8k'"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated(model, rows, config, extra, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(model, rows, EvaluateConfig(**config), **extra)


def test_the_command(folder, data, tmp_path, capsys):
    out = tmp_path / "out"
    flags = [
        str(folder),
        "--data",
        str(data),
        "--output_dir",
        str(out),
        "--instruction",
        "",
        "--max_new_tokens",
        "8",
    ]
    flags += ["--temperature", "1", "--seed", "3", "--token", "hf_secretsecret"]
    assert main([*flags, "--n", "2", "--limit", "3"]) == 0
    said = capsys.readouterr().out
    assert "3 questions, 2 answers each" in said and "pass@2" in said and "maj@2" in said
    results = json.loads((out / "results.json").read_text())
    assert results["metrics"]["accuracy"]["questions"] == 3 and results["completions"]["count"] == 6
    assert results["data"]["rows"] == 5 and results["data"]["asked"] == 3
    assert results["settings"]["temperature"] == 1.0 and results["settings"]["checker"] == "auto"
    assert results["checker"] == "gsm8k" and results["settings"]["first_prompt"][0]["content"] == "0?"
    assert "hf_secretsecret" not in (out / "results.json").read_text()
    table = parquet.read_table(out / "completions" / "completions.parquet").to_pydict()
    assert table["question"] == ["0", "0", "1", "1", "2", "2"] and table["sample"] == [0, 1] * 3
    assert table["expected"] == ["0", "0", "1", "1", "2", "2"] and set(table["correct"]) <= {0.0, 1.0}
    assert "step" not in table and "advantage" not in table
    page = (out / "completions" / "index.html").read_text()
    assert "0?" in page and "advantage" not in page and "nan" not in page

    # more questions and samples: what is there stays, also after a line that was cut in the middle
    lines = (out / "completions.jsonl").read_text()
    (out / "completions.jsonl").write_text(lines + '{"prompt": "half')
    assert main([*flags, "--n", "3"]) == 0
    assert "6 of 15 completions are in" in capsys.readouterr().out
    grown = (out / "completions.jsonl").read_text()
    assert grown.startswith(lines) and len(grown.splitlines()) == 15
    # another checker: nothing is generated
    assert main([*flags, "--n", "3", "--checker", "number"]) == 0
    assert "15 of 15 completions are in" in capsys.readouterr().out
    assert (out / "completions.jsonl").read_text() == grown
    # what would mix two evaluations is refused
    assert main([*flags, "--n", "3", "--top_p", "0.5"]) == 2
    assert "holds the completions of another evaluation: top_p was 1.0, is now 0.5" in capsys.readouterr().err
    assert main([*flags, "--system_prompt", "Hm."]) == 2
    assert "holds completions of other prompts, first at question 0" in capsys.readouterr().err


def test_an_adapter_with_examples(model, data, tmp_path, capsys):
    adapted = FastLanguageModel.get_peft_model(model, r=4, init_lora_weights=False)
    adapted.save_pretrained(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "train.yaml").write_text("learning_rate: 1e-3\n")
    out = tmp_path / "out"
    (tmp_path / "train.jsonl").write_text('{"question": "7?", "answer": "#### 7"}\n')
    flags = [
        "--data",
        str(data),
        "--few_shot",
        "1",
        "--few_shot_data",
        str(tmp_path / "train.jsonl"),
        "--limit",
        "2",
    ]
    flags += ["--instruction", "", "--max_new_tokens", "8", "--output_dir", str(out)]
    assert main([str(tmp_path / "run"), *flags, "--num_completions_to_print", "0"]) == 0
    assert "═" not in capsys.readouterr().out
    made_by = json.loads((out / "settings.json").read_text())
    assert made_by["adapter"] == str(tmp_path / "run" / "adapter") and made_by["weights"] == "nf4"
    turns = json.loads((out / "results.json").read_text())["settings"]["first_prompt"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "DATA", "--question_column", "text"], "no column 'text'; it has question, answer"),
        (["--data", "DATA", "--n", "2"], "n=2 answers at temperature 0"),
        (["--data", "DATA", "--limit", "0"], "limit must be at least 1, got 0"),
        (["--data", "DATA", "--checker", "best"], "best"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(arguments, message, folder, data, capsys):
    try:
        status = main([str(folder), *[str(data) if one == "DATA" else one for one in arguments]])
    except SystemExit as stop:  # the flags' own parser
        status = stop.code
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_an_interruption_keeps_what_was_made(folder, data, tmp_path, capsys, monkeypatch):
    flags = [str(folder), "--data", str(data), "--instruction", "", "--max_new_tokens", "8"]
    flags += ["--output_dir", str(tmp_path)]
    monkeypatch.setattr("jaxtune.evaluate.run.ROWS", {"cpu": 2})
    generate, calls = Engine.generate, []

    def interrupted(self, prompts, **arguments):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, prompts, **arguments)

    monkeypatch.setattr(Engine, "generate", interrupted)
    assert main(flags) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len((tmp_path / "completions.jsonl").read_text().splitlines()) == 2
    assert main(flags) == 0
    assert calls == [2, 2, 2, 1]


def test_in_training(model, tmp_path):
    """Every second step of a GRPOTrainer; the last evaluation is that of the model as it is afterwards."""

    def rollout(prompts, trainer):
        ids = [[3 + (i + trainer.state.global_step) % 7] * 4 for i in range(len(prompts))]
        return {"prompt_ids": [[5, 6, 7]] * len(prompts), "completion_ids": ids, "logprobs": None}

    callback = EvaluateCallback(ROWS[:2], EvaluateConfig(**SHORT), every=2)
    trainer = GRPOTrainer(
        model=FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "down_proj"]),
        reward_funcs=lambda completion_ids, **_: [float(ids[0] % 2) for ids in completion_ids],
        train_dataset=[{"prompt": "say"}] * 4,
        rollout_func=rollout,
        callbacks=[callback],
        args=GRPOConfig(
            output_dir=str(tmp_path), max_steps=4, num_generations=2, per_device_train_batch_size=2,
            learning_rate=0.05, max_completion_length=4, save_strategy="no", disable_tqdm=True,
        ),
    )  # fmt: skip
    trainer.train()
    assert [step for step, _ in callback.results] == [2, 4]
    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert lines == [{"step": 2, "accuracy": 0.0}, {"step": 4, "accuracy": 0.0}]
    after = evaluate(trainer.model, ROWS[:2], EvaluateConfig(**SHORT), progress=False)
    assert texts(callback.results[1][1]) == texts(after) != texts(callback.results[0][1])
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        EvaluateCallback(ROWS, every=0)
