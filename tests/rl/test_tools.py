"""Completions with tool calls: the turns, the tokens, the mask, and TRL's loop as the judge."""

import types

import pytest
import transformers
from scripted_tools import TEMPLATE, Scripted, add, call

from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.data import prepare_prompts
from jaxtune.rl.rollout import Request
from jaxtune.rl.tools import ToolRollout, parsed_message, with_tools


@pytest.fixture(scope="module")
def tokenizer():
    import tiny_models

    made: transformers.PreTrainedTokenizerBase = tiny_models.make_tokenizer()
    made.chat_template = TEMPLATE
    return made


async def shout(text: str) -> str:
    """Upper case.

    Args:
        text: any.
    """
    return text.upper()


TURNS = (
    [call("add", a=2, b=3), "no tool", call("add", a="x", b=1) + call("shout", text="hi"), call("nothing")],
    ["five", call("add", a=1, b=1), "sorry"],
    ["two…"],
)


def rollout(tokenizer, inner, turns=None, limit=2000):
    return ToolRollout(inner, tokenizer, [add, shout], turns=turns, template_kwargs={}, limit=limit)


def request(tokenizer, prompts, longest=400):
    data = [{"prompt": prompt} for prompt in prompts]
    args = GRPOConfig(max_completion_length=longest)
    ids = prepare_prompts(data, tokenizer, args, limit=4000, tools=[add, shout]).ids
    return Request(prompts, ids, 2, 7, longest)


@pytest.fixture
def asked(tokenizer):
    return request(tokenizer, [[{"role": "user", "content": text}] for text in ("a", "a", "b", "b")])


def test_turns_are_put_one_behind_the_other(tokenizer, asked):
    inner = Scripted(tokenizer, *TURNS)
    made = rollout(tokenizer, inner).generate(asked)
    assert '"name": "add"' in tokenizer.decode(made.prompt_ids[0])
    assert tokenizer.decode(made.completion_ids[0]) == (
        f"{call('add', a=2, b=3)}<|im_end|>\n<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\nfive<|im_end|>"
    )
    written = [token for token, own in zip(made.completion_ids[0], made.tool_mask[0]) if own]
    assert tokenizer.decode(written) == f"{call('add', a=2, b=3)}<|im_end|>five<|im_end|>"
    assert [m["role"] for m in made.messages[2]] == [
        "assistant",
        "tool",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert made.messages[2][2] == {"role": "tool", "name": "shout", "content": "HI"}
    assert made.messages[2][1]["content"].startswith("{'error': 'can only concatenate str")
    assert made.messages[3][1]["content"] == "{'error': 'Tool nothing not found.'}"
    assert made.messages[1] == [{"role": "assistant", "content": "no tool"}]
    for ids, own, log_probs in zip(made.completion_ids, made.tool_mask, made.logprobs):
        assert len(ids) == len(own) == len(log_probs)
        assert all((value == 0.0) == (not mine) for value, mine in zip(log_probs, own))
    assert made.metrics == {"tools/call_frequency": 5 / 4, "tools/failure_frequency": 2 / 5}
    assert inner.requests[1].prompt_ids[0] == made.prompt_ids[0] + made.completion_ids[0][: -len("five") - 1]


def test_equal_to_trls_loop(tokenizer, asked):
    """The same turns through GRPOTrainer._tool_call_loop."""
    from trl import GRPOTrainer

    ours = rollout(tokenizer, Scripted(tokenizer, *TURNS)).generate(asked)
    theirs = types.SimpleNamespace(
        processing_class=tokenizer, _tokenizer=tokenizer, chat_template=None, chat_template_kwargs={}, _is_vlm=False,
        environment_factories=None, tools=[add, shout], use_vllm=False, max_completion_length=400,
        max_tool_calling_iterations=100, model=types.SimpleNamespace(
            config=types.SimpleNamespace(max_position_embeddings=2000)),
        _sync_tool_dicts=[{"add": add}] * 4, _async_tool_dicts=[{"shout": shout}] * 4,
    )  # fmt: skip
    inner = Scripted(tokenizer, *TURNS)
    theirs._get_tool_suffix_ids = lambda messages: GRPOTrainer._get_tool_suffix_ids(theirs, messages)

    def turn(prompt_ids, *_, **__):
        made = inner.generate(Request([None] * len(prompt_ids), prompt_ids, 1, 0, 400))
        return made.completion_ids, made.logprobs

    theirs._generate_single_turn = turn
    with pytest.MonkeyPatch.context() as patch, loop() as running:
        theirs.async_loop = running
        parse = lambda tokenizer, ids, prefix, tools: parsed_message(tokenizer, ids, prefix, tools)  # noqa: E731
        patch.setattr("trl.trainer.grpo_trainer.parse_response", parse)
        ids, log_probs = turn(asked.prompt_ids)
        messages = [[parsed_message(tokenizer, row, [], [add])] for row in ids]
        prompts = [list(prompt) for prompt in asked.prompts]
        mask, messages, ids, log_probs, calls, failures, _ = GRPOTrainer._tool_call_loop(
            theirs, prompts, asked.prompt_ids, ids, messages, log_probs, None, {}
        )
    assert (ours.completion_ids, ours.tool_mask, ours.logprobs) == (ids, mask, log_probs)
    assert ours.messages == messages
    assert ours.metrics == {"tools/call_frequency": calls / 4, "tools/failure_frequency": failures / calls}


class loop:
    """An event loop in a thread, as TRL has one."""

    def __enter__(self):
        import asyncio
        import threading

        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        return self.loop

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def test_turns_end_with_the_room_and_at_the_limit(tokenizer):
    prompts = [[{"role": "user", "content": "a"}]] * 2
    lines = [call("add", a=2, b=3)] * 2
    length = len(tokenizer(lines[0])["input_ids"]) + 1
    room = length + len("\n<|tool\n5|\n<|assistant\n") + 4
    made = rollout(tokenizer, Scripted(tokenizer, lines, ["a long answer"] * 2)).generate(
        request(tokenizer, prompts, room)
    )
    assert all(len(ids) <= room for ids in made.completion_ids)
    assert made.completion_ids[0][-1] != tokenizer.eos_token_id and made.tool_mask[0][-1] == 1
    short = rollout(tokenizer, Scripted(tokenizer, lines)).generate(request(tokenizer, prompts, length + 2))
    assert [len(talk) for talk in short.messages] == [1, 1]  # the tool's answer does not fit: as it was
    once = rollout(tokenizer, Scripted(tokenizer, lines, lines), turns=1).generate(
        request(tokenizer, prompts)
    )
    assert [m["role"] for m in once.messages[0]] == ["assistant", "tool", "assistant"]


def test_what_cannot_be_meant(tokenizer):
    own = types.SimpleNamespace(makes_prompt_ids=True)
    with pytest.raises(ValueError, match="give tools or rollout_func, not both"):
        with_tools(own, tokenizer, [add], GRPOConfig(), 100)
    with pytest.raises(TypeError, match="expected functions with type hints"):
        with_tools(types.SimpleNamespace(makes_prompt_ids=False), tokenizer, ["add"], GRPOConfig(), 100)
    with pytest.raises(ValueError, match="tools need prompts of messages"):
        prepare_prompts([{"prompt": "text"}], tokenizer, GRPOConfig(), limit=2000, tools=[add])
    broken = parsed_message(tokenizer, tokenizer("<tool_call>{no json}</tool_call>")["input_ids"], [], [add])
    assert "tool_calls" not in broken
