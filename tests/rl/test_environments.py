"""Environments, with TRL's GRPOTrainer as the judge: resets, prompts, tools, tokens, rewards and advantages."""

import numpy as np
import pytest
from scripted_tools import TEMPLATE, Scripted, add, call

from jaxtune.fast import FastLanguageModel
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.environments import with_environments
from jaxtune.rl.rollout import Request
from jaxtune.rl.tools import parsed_message
from jaxtune.rl.trainer import GRPOTrainer

pytestmark = pytest.mark.usefixtures("quick_compilation")
GROUP = 2


class Counter:
    """A number that calls change; its reward is the number."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.log, self.count = [], None

    def reset(self, **row):
        self.log.append(sorted(row))
        self.count = row.get("start") or 0
        return f" You begin with {self.count}."

    def more(self, by: int) -> int:
        """Counts on.

        Args:
            by: how far.
        """
        self.log.append(by)
        self.count += by
        return self.count

    @property
    def nothing(self):
        raise AssertionError("properties are not looked at")

    def get_reward(self):
        return float(self.count)


class Echo:
    """Says nothing at first, and has no reward of its own."""

    def reset(self, **_):
        self.heard = []

    async def say(self, text: str) -> str:
        """Repeats.

        Args:
            text: what to say.
        """
        self.heard.append(text)
        return text * 2


class Judge(Counter):
    async def get_reward(self):
        return float(-self.count)


ROWS = [
    {"prompt": [{"role": "user", "content": "count"}], "start": 3, "environment": "counter"},
    {"prompt": [{"role": "user", "content": "say"}], "start": None, "environment": "echo"},
    {"prompt": [{"role": "user", "content": "more"}], "start": 1, "environment": "judge"},
]
FACTORIES = {"counter": Counter, "echo": Echo, "judge": Judge}
TURNS = (
    [call("more", by=2), "none", call("say", text="ha"), call("more", by=1), call("more", by=5), call("add", a=1, b=2)],
    [call("more", by=1), "ha ha", "not there", "six", "three"],
    ["six again"],
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_model_dir):
    return tiny_model_dir("llama", num_hidden_layers=1, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def model(folder, quick_compilation):
    base = FastLanguageModel.from_pretrained(str(folder), max_seq_length=4096, dtype="float32")[0]
    base.tokenizer.chat_template = TEMPLATE
    return FastLanguageModel.get_peft_model(base, r=4, target_modules=["q_proj"])


class Lines(Scripted):
    def sync(self, step):
        pass

    def forecast(self, *_):
        return ""

    pause = close = lambda self: None


def seen(recorded):
    """A reward function that counts words, and keeps what it is given."""

    def words(prompts, completions, environments, **columns):
        logs = [list(one.heard if isinstance(one, Echo) else one.log) for one in environments]
        kinds = [type(one).__name__ for one in environments]
        recorded.append((prompts, completions, kinds, logs, len({id(one) for one in environments})))
        recorded.append({name: columns[name] for name in ("start", "environment")})
        return [float(len(turns)) for turns in completions]

    return words


def trainer(model, folder, inner, reward_funcs, rows=ROWS, factories=FACTORIES, **settings):
    defaults = {
        "num_generations": GROUP, "per_device_train_batch_size": 6, "max_completion_length": 400, "save_strategy": "no",
        "shuffle_dataset": False, "disable_tqdm": True,
    }  # fmt: skip
    return GRPOTrainer(
        model, reward_funcs, GRPOConfig(str(folder), **defaults | settings), rows, tools=[add],
        environment_factory=factories, rollout=inner,
    )  # fmt: skip


def test_equal_to_trls_trainer(model, folder, tmp_path, monkeypatch):
    import datasets
    import transformers
    import trl
    from trl.trainer import grpo_trainer

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    ours_seen, theirs_seen = [], []
    ours = trainer(model, tmp_path, Lines(model.tokenizer, *TURNS), seen(ours_seen), reward_weights=(0.5,))
    for _ in range(2):  # environments are used again
        ours.rollout._loop._inner.turns = [list(one) for one in TURNS]
        samples, metrics = ours._collector._samples(ours._prompts, [0, 1, 2], GROUP, 0)

    tokenizer = model.tokenizer.__class__.from_pretrained(folder)
    tokenizer.chat_template, tokenizer.response_schema = TEMPLATE, {"is": "there"}
    parse = lambda tokenizer, ids, prefix, tools: parsed_message(model.tokenizer, ids, prefix, tools)  # noqa: E731
    monkeypatch.setattr(grpo_trainer, "parse_response", parse)
    monkeypatch.setattr(grpo_trainer, "is_chat_template_prefix_preserving", lambda _: True)
    judge = trl.GRPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        seen(theirs_seen),
        trl.GRPOConfig(
            str(tmp_path), num_generations=GROUP, per_device_train_batch_size=6, max_completion_length=400,
            reward_weights=[0.5], report_to="none", use_cpu=True, bf16=False,
        ),
        datasets.Dataset.from_list(ROWS),
        processing_class=tokenizer, tools=[add], environment_factory=FACTORIES,
    )  # fmt: skip
    for _ in range(2):
        inner = Lines(model.tokenizer, *TURNS)

        def turn(prompt_ids, *_, inner=inner, **__):
            made = inner.generate(type("Request", (), {"prompts": prompt_ids, "prompt_ids": prompt_ids}))
            return made.completion_ids, made.logprobs

        judge._generate_single_turn = turn
        theirs = judge._generate_and_score_completions([row for row in ROWS for _ in range(GROUP)])

    assert ours_seen == theirs_seen and len(ours_seen) == 4
    assert ours_seen[0][3][0] == [["prompt", "start"], 2, 1]  # reset with the row, then the calls
    assert ours_seen[0][0][0][-1]["content"] == "count You begin with 3."
    for i, sample in enumerate(samples):
        prompt, mask = theirs["prompt_mask"][i].bool(), theirs["completion_mask"][i].bool()
        assert sample.prompt_ids == theirs["prompt_ids"][i][prompt].tolist()
        assert sample.completion_ids == theirs["completion_ids"][i][mask].tolist()
        assert sample.own == theirs["tool_mask"][i][mask].tolist()
    assert ours.reward_func_names == judge.reward_func_names == ["words", "Counter", "Judge"]
    rewards = np.stack([sample.rewards for sample in samples])
    np.testing.assert_array_equal(rewards[:, 1], [6.0, 3.0, np.nan, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(rewards[:, 2], [np.nan] * 4 + [-6.0, -1.0])
    found = ours._collector._advantages(samples, GROUP)
    np.testing.assert_allclose(found.values, theirs["advantages"].reshape(-1), atol=1e-5)
    logged = judge._metrics["eval"]  # its model is not training
    for name in ("tools/call_frequency", "tools/failure_frequency"):
        assert metrics[name] == pytest.approx(logged[name][-1])


def test_an_environment_that_asks(model, tmp_path):
    """Training without data: the environment's own prompts and rewards, the embedded engine's completions."""
    Counter.made = 0
    settings = {
        "max_steps": 2,
        "max_completion_length": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
    }
    run = trainer(model, tmp_path, None, None, rows=None, factories=Counter, **settings)
    run.train()
    records = [record for record in run.state.log_history if "loss" in record]
    assert len(records) == 2 and records[0]["rewards/Counter/mean"] == 0.0
    assert Counter.made == 4  # as many as completions at a time
    assert run.rollout._pool[None][0].log == [["prompt"], ["prompt"]]


def test_what_cannot_be_meant(model, tmp_path):
    def refused(kind, message, *args, **settings):
        inner = Lines(model.tokenizer, *TURNS)
        with pytest.raises(kind, match=message):
            made = trainer(model, tmp_path, inner, *args, **settings)
            made._collector._samples(made._prompts, range(len(made._prompts)), GROUP, 0)

    refused(TypeError, "expected a function or class that makes an environment", None, factories={"a": 3})
    refused(ValueError, "object has no method reset", None, factories=object)
    refused(ValueError, "or an environment with get_reward", None, factories=Echo)
    refused(ValueError, "needs a train_dataset with a column 'environment'", None, rows=None)
    refused(ValueError, "max_steps has to say how long to train", None, rows=None, factories=Counter)
    refused(ValueError, "environment='game', which is not among .*: counter, echo, judge", None,
            rows=[{"prompt": ROWS[0]["prompt"], "environment": "game"}] * 3)  # fmt: skip
    refused(ValueError, "needs prompts of messages", None, rows=[{"prompt": "count"}] * 3, factories=Counter)
    refused(ValueError, "reward_weights has 2 numbers for 0", None, reward_weights=(1, 2))

    class Picture(Counter):
        def reset(self, **_):
            return [{"type": "image", "image": None}]

    refused(ValueError, "reset returned images, which are not supported", None, factories=Picture)
    long = [{"prompt": [{"role": "user", "content": "x" * 5000}]}] * 3
    refused(ValueError, "give from_pretrained a larger max_seq_length", None, rows=long, factories=Counter)
    with pytest.raises(ValueError, match="give environment_factory or rollout_func, not both"):
        GRPOTrainer(
            model, None, GRPOConfig(str(tmp_path)), ROWS, environment_factory=Counter, rollout_func=add
        )


def test_a_part_of_the_prompts_keeps_its_random_numbers(model):
    """Another process makes the first three prompts: completions here are those from 3 · GROUP on, in every turn."""
    lines = Lines(model.tokenizer, [call("more", by=2), "none"], ["done"])
    args = GRPOConfig(num_generations=GROUP)
    environments = with_environments(lines, model.tokenizer, [], args, model.max_seq_length, Counter)
    prompts = [ROWS[0]["prompt"]] * GROUP
    request = Request(prompts, None, GROUP, seed=0, max_new_tokens=999, rows=[ROWS[0]] * GROUP, first=3)
    environments.generate(request)
    assert [(one.first, one.group) for one in lines.requests] == [(3 * GROUP, 1)] * 2
