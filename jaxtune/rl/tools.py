"""Completions in which the model calls tools: it writes a call, the tool's answer is put behind it, and it goes on.

Token ids are put one behind the other and never tokenised again, so that what the model wrote is what is trained; the
tool's tokens have mask 0. The behaviour is TRL's.
"""

import asyncio
import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxtune.rl.apart import apart
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.rollout import Completions, Request, Rollout

Message = dict[str, Any]
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def parsed_message(
    tokenizer: Any, ids: list[int], prefix: list[int], tools: Sequence[Callable] = ()
) -> Message:
    """What a completion says, as a message of the assistant, with its tool calls.

    A tokenizer with a response_template (or schema) parses its own format; else a call is JSON with name and arguments
    between <tool_call> and </tool_call>, as Qwen, SmolLM3 and Hermes write it.
    """
    if has_own_format(tokenizer):
        return tokenizer.parse_response(ids, prefix=prefix, tools=list(tools) or None)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if not tools:
        return {"role": "assistant", "content": text}
    calls = []
    for found in _CALL.findall(tokenizer.decode(ids)):
        try:
            call = json.loads(found)
        except json.JSONDecodeError:
            continue
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            function = {"name": call["name"], "arguments": call.get("arguments") or {}}
            calls.append({"type": "function", "function": function})
    message = {"role": "assistant", "content": _CALL.sub("", text).strip() if calls else text}
    return message | ({"tool_calls": calls} if calls else {})


def has_own_format(tokenizer: Any) -> bool:
    """Whether the tokenizer knows how its model's answers are written."""
    return any(
        getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema")
    )


class ToolRollout:
    """Another source of completions, with tools.

    Args:
        inner: makes each turn.
        tokenizer: its chat template takes tools and messages of the role "tool".
        tools: plain or async functions with type hints and a docstring.
        turns: most rounds of calls in a completion; None: any number.
        template_kwargs: for the chat template.
        limit: most tokens of prompt and completion together.
    """

    makes_prompt_ids = False

    def __init__(
        self,
        inner: Rollout,
        tokenizer: Any,
        tools: Sequence[Callable[..., Any]],
        *,
        turns: int | None,
        template_kwargs: dict[str, Any],
        limit: int,
    ):
        self._inner, self._tokenizer, self._tools = inner, tokenizer, list(tools)
        self._turns, self._template_kwargs, self._limit = turns, template_kwargs, limit

    def sync(self, step: int) -> None:
        self._inner.sync(step)

    def pause(self) -> None:
        self._inner.pause()

    def forecast(self, groups: int, group: int, prompt: int) -> str:
        return self._inner.forecast(groups, group, prompt)

    def close(self) -> None:
        self._inner.close()

    def generate(self, request: Request) -> Completions:
        return self.converse(request, [self._tools] * len(request.prompts))

    def converse(self, request: Request, tools: Sequence[Sequence[Callable[..., Any]]]) -> Completions:
        """Completions with tools of their own."""
        assert request.prompt_ids is not None
        made = self._inner.generate(request)
        prompts, ids = request.prompt_ids, [list(one) for one in made.completion_ids]
        log_probs = [list(one) for one in made.logprobs] if made.logprobs is not None else None
        own = [[1] * len(one) for one in ids]
        messages = [[self._parsed(ids[i], prompts[i], tools[i])] for i in range(len(ids))]
        calls = failures = turn = 0
        active = [i for i in range(len(ids)) if messages[i][-1].get("tool_calls")]
        while active and (self._turns is None or turn < self._turns):
            turn += 1
            answers = {}
            for i in active:
                answers[i], failed = _answers(messages[i][-1]["tool_calls"], tools[i])
                calls, failures = calls + len(answers[i]), failures + failed
            suffixes = {i: self._suffix(answers[i]) for i in active}
            active = [i for i in active if self._fits(request, prompts[i], ids[i], suffixes[i])]
            if not active:
                break
            following = Request(
                prompts=[request.prompts[i] for i in active],
                prompt_ids=[prompts[i] + ids[i] + suffixes[i] for i in active],
                group=1,
                seed=request.seed + turn,
                max_new_tokens=max(request.max_new_tokens - len(ids[i]) - len(suffixes[i]) for i in active),
                first=request.first * request.group,
            )
            more = self._inner.generate(following)
            for k, i in enumerate(active):
                room = request.max_new_tokens - len(ids[i]) - len(suffixes[i])
                new = list(more.completion_ids[k])[:room]
                said = [self._parsed(new, following.prompt_ids[k], tools[i])] if new else []
                messages[i] += answers[i] + said
                own[i] += [0] * len(suffixes[i]) + [1] * len(new)
                if log_probs is not None and more.logprobs is not None:
                    log_probs[i] += [0.0] * len(suffixes[i]) + list(more.logprobs[k])[:room]
                ids[i] += suffixes[i] + new
            active = [i for i in active if messages[i][-1].get("tool_calls")]
        metrics = {
            "tools/call_frequency": calls / len(ids),
            "tools/failure_frequency": failures / max(calls, 1),
        }
        return Completions(prompts, ids, log_probs, own, messages=messages, metrics=metrics)

    def _parsed(self, ids: list[int], prefix: list[int], tools: Sequence[Callable[..., Any]]) -> Message:
        return parsed_message(self._tokenizer, ids, prefix, tools)

    def _fits(self, request: Request, prompt: list[int], ids: list[int], suffix: list[int]) -> bool:
        """Whether there is room for a tool's answer and a token after it."""
        length = len(ids) + len(suffix)
        return length < request.max_new_tokens and len(prompt) + length < self._limit

    def _suffix(self, answers: list[Message]) -> list[int]:
        """Tokens that follow the end of the model's turn: the tools' answers, and the beginning of its next turn."""
        call = {"type": "function", "function": {"name": answers[0]["name"], "arguments": {}}}
        before = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        render = lambda messages, more: self._tokenizer.apply_chat_template(  # noqa: E731
            messages, add_generation_prompt=more, tokenize=True, return_dict=True, **self._template_kwargs
        )["input_ids"]
        prefix, full = render(before, False), render(before + answers, True)
        ends = [n for n, token in enumerate(prefix) if token == self._tokenizer.eos_token_id]
        prefix = (
            prefix[: ends[-1] + 1] if ends else prefix
        )  # not the newline that some templates put behind it
        if full[: len(prefix)] != prefix:
            raise ValueError(
                "tools need a chat template that renders a conversation as the beginning of a longer one; this one "
                "changes what stands before a tool's answer"
            )
        return full[len(prefix) :]


def _answers(calls: list[dict[str, Any]], tools: Sequence[Callable[..., Any]]) -> tuple[list[Message], int]:
    """Messages of the tools that a message calls, in order; and how many calls failed."""
    by_name = {tool.__name__: tool for tool in tools}
    results: list[Any] = []
    waiting: dict[int, Any] = {}
    for n, call in enumerate(calls):
        function = (
            call["function"] if call.get("type") == "function" else {"name": call.get("name", "unknown")}
        )
        results.append((function["name"], None))
        try:
            tool = by_name[function["name"]]
            arguments = function["arguments"]
            if inspect.iscoroutinefunction(tool):
                waiting[n] = tool(**arguments)
            else:
                results[n] = (function["name"], tool(**arguments))
        except KeyError as error:
            missing = f"Tool {function['name']} not found." if function["name"] not in by_name else str(error)
            results[n] = (function["name"], ToolFailure(missing))
        except Exception as error:  # noqa: BLE001  the model is told what its call did
            results[n] = (function["name"], ToolFailure(str(error)))
    if waiting:

        async def together() -> list[Any]:
            return await asyncio.gather(*waiting.values(), return_exceptions=True)

        for n, result in zip(waiting, apart(lambda: asyncio.run(together())), strict=True):
            failed = isinstance(result, BaseException)
            results[n] = (results[n][0], ToolFailure(str(result)) if failed else result)
    messages = [{"role": "tool", "name": name, "content": str(result)} for name, result in results]
    return messages, sum(isinstance(result, ToolFailure) for _, result in results)


class ToolFailure:
    """What a failed call answers the model."""

    def __init__(self, error: str):
        self.error = error

    def __str__(self) -> str:
        return str({"error": self.error})


def with_tools(
    rollout: Rollout, tokenizer: Any, tools: Sequence[Callable[..., Any]], args: GRPOConfig, limit: int
) -> Rollout:
    """A source of completions, with tools.

    Raises:
        ValueError: it makes its own prompts. TypeError: a tool is no function.
    """
    if rollout.makes_prompt_ids:
        raise ValueError("give tools or rollout_func, not both: a rollout_func calls its tools itself")
    for tool in tools:
        if not callable(tool) or not hasattr(tool, "__name__"):
            raise TypeError(f"tools: expected functions with type hints and a docstring, got {tool!r:.60}")
    kwargs = args.chat_template_kwargs or {}
    turns = args.max_tool_calling_iterations
    return ToolRollout(rollout, tokenizer, tools, turns=turns, template_kwargs=kwargs, limit=limit)
