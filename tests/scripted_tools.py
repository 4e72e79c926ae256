"""What tests of tools share: a chat template with tools, a tool, and a model that says its lines."""

import json

from jaxtune.rl.rollout import Completions

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: a number.
        b: another.
    """
    return a + b


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


class Scripted:
    """A rollout that says its lines; each with the end token unless it ends with …"""

    makes_prompt_ids = False

    def __init__(self, tokenizer, *turns):
        self.tokenizer, self.turns, self.requests = tokenizer, list(turns), []

    def generate(self, request):
        self.requests.append(request)
        texts = self.turns.pop(0)
        assert len(texts) == len(request.prompts)
        ids = [self.tokenizer(text.removesuffix("…"))["input_ids"] for text in texts]
        end = self.tokenizer.eos_token_id
        ids = [row if text.endswith("…") else [*row, end] for row, text in zip(ids, texts)]
        log_probs = [[-0.5 - len(self.turns)] * len(row) for row in ids]
        return Completions(request.prompt_ids, ids, log_probs)
