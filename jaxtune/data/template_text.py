"""Sources of the chat templates, written with `{%- generation -%}` around what the assistant says.

The marks let `assistant_only_loss` find the assistant's tokens. They are taken out before a template goes into a
tokenizer, because other libraries' Jinja does not know the tag. Every tag trims its whitespace on both sides,
so the layout of these sources never shows in what they render.
"""

from collections.abc import Mapping

# A string, or the text blocks of structured content.
TEXT_OF_CONTENT = (
    "(message['content'] if message['content'] is string "
    "else message['content'] | map(attribute='text') | join)"
)


def turns(
    roles: Mapping[str, tuple[str, str]],
    *,
    begin: str = "",
    end: str = "",
    trim: bool = False,
    prelude: str = "",
) -> str:
    """A template in which each message is: its role's opening, the content, its role's closing.

    Args:
        roles: role -> (opening, closing), both Jinja expressions; the generation prompt is the assistant's opening.
        begin: expression rendered once before the messages.
        end: expression rendered after the messages when no generation prompt is asked for.
        trim: strip whitespace around each content.
        prelude: statements before everything.
    """
    content = TEXT_OF_CONTENT + (" | trim" if trim else "")
    lines = [prelude] if prelude else []
    if begin:
        lines.append(f"{{{{- {begin} -}}}}")
    lines.append("{%- for message in messages -%}")
    keyword = "if"
    for role, (opening, closing) in roles.items():
        lines.append(f"{{%- {keyword} message['role'] == '{role}' -%}}")
        keyword = "elif"
        body = f"{{{{- ({content}) + {closing} -}}}}"
        if role == "assistant":
            body = f"{{%- generation -%}}\n{body}\n{{%- endgeneration -%}}"
        lines += [f"{{{{- {opening} -}}}}", body]
    known = ", ".join(roles)
    lines += [
        "{%- else -%}",
        f"{{{{- raise_exception('This template knows the roles {known}; came ' + message['role']) -}}}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}\n{{{{- {roles['assistant'][0]} -}}}}",
    ]
    if end:
        lines.append(
            "{%- elif messages[-1]['role'] == 'assistant' -%}\n{%- generation -%}\n"
            f"{{{{- {end} -}}}}\n{{%- endgeneration -%}}\n{{%- else -%}}\n{{{{- {end} -}}}}"
        )
    lines.append("{%- endif -%}")
    return "\n".join(lines)


def system_into_first_user(separator: str, before: str = "''", after: str = "''") -> str:
    """Prelude for models without a system role: its content becomes `first_user_prefix`."""
    return f"""\
{{%- if messages[0]['role'] == 'system' -%}}
{{%- set first_user_prefix = {before} + messages[0]['content'] + {after} + {separator} -%}}
{{%- set messages = messages[1:] -%}}
{{%- else -%}}
{{%- set first_user_prefix = '' -%}}
{{%- endif -%}}
{{%- for message in messages -%}}
{{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}}
{{{{- raise_exception('After the optional system message, roles must alternate user/assistant/user/assistant/...') -}}}}
{{%- endif -%}}
{{%- endfor -%}}"""


FIRST_USER_PREFIX = "(first_user_prefix if loop.first else '')"


def rename_messages(role: str, content: str, user: str, assistant: str) -> str:
    """Prelude that reads messages with other keys and role names (`mapping` of `get_chat_template`)."""
    return f"""\
{{%- set renamed = namespace(messages=[]) -%}}
{{%- set role_names = {{'{user}': 'user', '{assistant}': 'assistant'}} -%}}
{{%- for message in messages -%}}
{{%- set name = message['{role}'] -%}}
{{%- set turn = {{'role': role_names.get(name, name), 'content': message['{content}']}} -%}}
{{%- set renamed.messages = renamed.messages + [turn] -%}}
{{%- endfor -%}}
{{%- set messages = renamed.messages -%}}
"""


def show_images(mark: str) -> str:
    """Prelude that makes texts of contents that are lists of parts, with `mark` where an image is."""
    return f"""\
{{%- set shown = namespace(messages=[]) -%}}
{{%- for message in messages -%}}
{{%- if message['content'] is string or message['content'] is not iterable -%}}
{{%- set shown.messages = shown.messages + [message] -%}}
{{%- else -%}}
{{%- set said = namespace(text='') -%}}
{{%- for part in message['content'] -%}}
{{%- set said.text = said.text + ('{mark}' if part['type'] in ('image', 'image_url') else part['text']) -%}}
{{%- endfor -%}}
{{%- set shown.messages = shown.messages + [dict(message, content=said.text)] -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- set messages = shown.messages -%}}
"""


def default_system(text: str) -> str:
    """Prelude that puts `text` as the system message where the conversation has none."""
    quoted = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"""\
{{%- if messages[0]['role'] != 'system' -%}}
{{%- set messages = [{{'role': 'system', 'content': '{quoted}'}}] + messages -%}}
{{%- endif -%}}
"""


# The Hermes-style tool calls of Qwen2.5 and Qwen3.
_QWEN_TOOLS = r"""
{{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n" -}}
{{- "You are provided with function signatures within <tools></tools> XML tags:\n<tools>" -}}
{%- for tool in tools -%}
{{- "\n" + (tool | tojson) -}}
{%- endfor -%}
{{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments " -}}
{{- "within <tool_call></tool_call> XML tags:\n<tool_call>\n" -}}
{{- "{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" -}}
"""

_QWEN_TOOL_RESULT = r"""
{%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' -%}
{{- '<|im_start|>user' -}}
{%- endif -%}
{{- '\n<tool_response>\n' + content + '\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
"""

_GENERATION_PROMPT = r"""
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""

QWEN_2_5 = (
    r"""
{%- set opening = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set opening = messages[0]['content'] -%}
{%- endif -%}
{{- '<|im_start|>system\n' + opening -}}
{%- if tools -%}
{{- '\n\n' -}}"""
    + _QWEN_TOOLS
    + r"""
{%- else -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- set content = message['content'] or '' -%}
{%- if message['role'] == 'user' or (message['role'] == 'system' and not loop.first) -%}
{{- '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant' -}}
{%- generation -%}
{%- if content or not message['tool_calls'] -%}
{{- '\n' + content -}}
{%- endif -%}
{%- for call in message['tool_calls'] -%}
{%- set call = call['function'] or call -%}
{{- '\n<tool_call>\n{"name": "' + call['name'] + '", "arguments": ' + (call['arguments'] | tojson) -}}
{{- '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endgeneration -%}
{%- elif message['role'] == 'tool' -%}"""
    + _QWEN_TOOL_RESULT
    + r"""
{%- endif -%}
{%- endfor -%}"""
    + _GENERATION_PROMPT
)

_QWEN3_CALLS = r"""
{%- for call in message['tool_calls'] -%}
{%- if content or not loop.first -%}
{{- '\n' -}}
{%- endif -%}
{%- set call = call['function'] or call -%}
{%- set arguments = call['arguments'] if call['arguments'] is string else call['arguments'] | tojson -%}
{{- '<tool_call>\n{"name": "' + call['name'] + '", "arguments": ' + arguments + '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
"""

_QWEN3_HEAD = (
    r"""
{%- if tools -%}
{{- '<|im_start|>system\n' -}}
{%- if messages[0]['role'] == 'system' -%}
{{- messages[0]['content'] + '\n\n' -}}
{%- endif -%}"""
    + _QWEN_TOOLS
    + r"""
{%- elif messages[0]['role'] == 'system' -%}
{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' -}}
{%- endif -%}
"""
)

_QWEN3_GENERATION_PROMPT = r"""
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\n\n</think>\n\n' -}}
{%- endif -%}
{%- endif -%}
"""

# Only what follows the user's last own question keeps its <think> block.
_QWEN3_LAST_QUESTION = r"""
{%- set question = namespace(index=-1) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' and message['content'] is string -%}
{%- set wrapped = message['content'].startswith('<tool_response>') -%}
{%- if not (wrapped and message['content'].endswith('</tool_response>')) -%}
{%- set question.index = loop.index0 -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if question.index < 0 -%}
{%- set question.index = messages | length - 1 -%}
{%- endif -%}
"""

_QWEN3_PLAIN_TURN = (
    r"""
{%- for message in messages -%}
{%- set content = message['content'] if message['content'] is string else '' -%}
{%- if message['role'] == 'user' or (message['role'] == 'system' and not loop.first) -%}
{{- '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' -}}
{%- elif message['role'] == 'tool' -%}"""
    + _QWEN_TOOL_RESULT
)

_QWEN3_SPLIT_THOUGHT = r"""
{%- set thought = '' -%}
{%- if message['reasoning_content'] is string -%}
{%- set thought = message['reasoning_content'] -%}
{%- elif '</think>' in content -%}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
"""


def qwen3(thinking: str) -> str:
    """Qwen3's template.

    Args:
        thinking: "after the last question" (the model's own), "always" (each assistant turn has a <think> block, as
            training on every turn needs) or "never" (the 2507 Instruct models).
    """
    body = "{%- set said = content -%}\n"
    if thinking == "never":
        head = split = ""
    else:
        head = _QWEN3_LAST_QUESTION if thinking == "after the last question" else ""
        split = _QWEN3_SPLIT_THOUGHT
        block = "{%- set said = '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -%}\n"
        condition = "{%- if loop.index0 > question.index and (loop.last or thought) -%}\n"
        body = block if thinking == "always" else f"{body}{condition}{block}{{%- endif -%}}\n"
    prompt = _GENERATION_PROMPT if thinking == "never" else _QWEN3_GENERATION_PROMPT
    return (
        f"{_QWEN3_HEAD}{head}{_QWEN3_PLAIN_TURN}"
        "{%- elif message['role'] == 'assistant' -%}\n"
        f"{split}{body}"
        "{{- '<|im_start|>assistant\\n' -}}\n{%- generation -%}\n{{- said -}}"
        f"{_QWEN3_CALLS}"
        "{%- endgeneration -%}\n{%- endif -%}\n{%- endfor -%}"
        f"{prompt}"
    )


LLAMA_3_1 = r"""
{{- bos_token -}}
{%- set date_string = date_string if date_string is defined else '26 Jul 2024' -%}
{%- set tools_in_user_message = tools_in_user_message if tools_in_user_message is defined else true -%}
{%- set system = '' -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] | trim -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- set schemas = namespace(text='') -%}
{%- for tool in tools or [] -%}
{%- set schemas.text = schemas.text + (tool | tojson(indent=4)) + '\n\n' -%}
{%- endfor -%}
{%- set how = 'Respond in the format {"name": function name, "parameters": ' -%}
{%- set how = how + 'dictionary of argument name and its value}.Do not use variables.\n\n' + schemas.text -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' + ('Environment: ipython\n' if tools else '') -}}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' -}}
{%- if tools and not tools_in_user_message -%}
{{- 'You have access to the following functions. To call a function, please respond with JSON for a function call.' -}}
{{- how -}}
{%- endif -%}
{{- system + '<|eot_id|>' -}}
{%- for message in messages -%}
{%- if message['role'] == 'tool' or message['role'] == 'ipython' -%}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (message['content'] | tojson) + '<|eot_id|>' -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- generation -%}
{%- if message['tool_calls'] -%}
{%- if message['tool_calls'] | length != 1 -%}
{{- raise_exception('This model makes one tool call at a time; came ' + (message['tool_calls'] | length | string)) -}}
{%- endif -%}
{%- set call = message['tool_calls'][0]['function'] -%}
{{- '{"name": "' + call['name'] + '", "parameters": ' + (call['arguments'] | tojson) + '}' -}}
{%- else -%}
{{- message['content'] | trim -}}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}
{%- if loop.first and tools and tools_in_user_message -%}
{{- 'Given the following functions, please respond with a JSON for a function call ' -}}
{{- 'with its proper arguments that best answers the given prompt.\n\n' + how -}}
{%- endif -%}
{{- (message['content'] | trim) + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""
