"""What a vLLM server is asked for, and how its answers are read.

A prompt of text goes to /v1/completions as token ids. One with images goes to /v1/chat/completions: its text with a
placeholder for each image, as it is, and the images beside it. There vLLM's own processor makes the tokens, which are
then compared with those that training sees.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxtune.data.image_encoder import EncodedPrompt
from jaxtune.generate import Generation, Sampling
from jaxtune.rl.vllm_server import VLLMError

TRUST_TEMPLATE = "--trust-request-chat-template"  # an argument of a server that is sent images
# Renders a text as it is; the images that stand beside it take the places of its placeholders.
_TEXT_ALONE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


class Question(NamedTuple):
    """n samples of what follows a prompt.

    ids: its tokens. number: of the prompt, for messages. route: behind the server's address.
    """

    ids: Sequence[int]
    number: int
    n: int
    route: str
    payload: dict[str, Any]

    @property
    def has_images(self) -> bool:
        return self.route == "/v1/chat/completions"


def question(
    number: int, ids: Sequence[int], seen: EncodedPrompt | None, n: int, fields: dict[str, Any]
) -> Question:
    """A question about prompt `number`.

    Args:
        seen: the prompt, where it has images.
        fields: of the request, see `sampling_fields`.
    """
    common = {**fields, "n": n, "return_token_ids": True, "include_stop_str_in_output": True}
    if seen is None or not seen.pictures:
        payload = {
            **common,
            "prompt": [int(token) for token in ids],
            "logprobs": 0,
        }  # of the sampled token alone
        return Question(ids, number, n, "/v1/completions", payload)
    images = [{"type": "image_url", "image_url": {"url": _data_url(one)}} for one in seen.pictures]
    content = [{"type": "text", "text": seen.text}, *images]
    payload = {**common, "messages": [{"role": "user", "content": content}], "chat_template": _TEXT_ALONE}
    payload |= {"logprobs": True, "top_logprobs": 0}
    return Question(ids, number, n, "/v1/chat/completions", payload)


def sampling_fields(sampling: Sampling, stop_strings: Sequence[str]) -> dict[str, Any]:
    """How tokens are chosen, as vLLM has it."""
    return {
        "temperature": sampling.temperature if sampling.do_sample else 0.0,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop": list(stop_strings),
    }


def generations(answer: Any, asked: Question) -> list[Generation]:
    """The samples of an answer, in order.

    Raises:
        VLLMError: it is none, or one to other tokens.
    """
    try:
        if asked.has_images:
            _check_prompt(answer["prompt_token_ids"], asked)
        found = []
        for sample, choice in enumerate(sorted(answer["choices"], key=lambda choice: choice["index"])):
            ids, log_probs = choice["token_ids"], choice["logprobs"]
            if asked.has_images:
                log_probs = [one["logprob"] for one in log_probs["content"]]
            else:
                log_probs = log_probs["token_logprobs"]
            if len(ids) != len(log_probs) or None in log_probs:
                raise ValueError(f"{len(ids)} tokens with log-probabilities {log_probs}")
            values = np.asarray(log_probs, np.float32)
            reason = "stop" if choice["finish_reason"] == "stop" else "length"
            found.append(Generation(asked.number, sample, list(ids), values, values, reason))
        if len(found) != asked.n:
            raise ValueError(f"{len(found)} samples instead of {asked.n}")
    except (KeyError, TypeError, ValueError) as error:
        raise VLLMError(
            f"vLLM's answer is not what was asked for ({type(error).__name__}: {error}); expected {asked.n} choices "
            f"with token_ids and logprobs, as vLLM gives since 0.10.2; it began {str(answer)[:300]!r}"
        ) from error
    return found


def _check_prompt(theirs: Sequence[int], asked: Question) -> None:
    """Raises VLLMError where vLLM's processor makes other tokens of a prompt than training sees."""
    ours = list(asked.ids)
    if list(theirs) == ours:
        return
    pairs = enumerate(zip(theirs, ours, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
    raise VLLMError(
        f"vLLM makes {len(theirs)} tokens of prompt {asked.number} with its images and jaxtune {len(ours)}; from token "
        f"{place} on they are {list(theirs[place : place + 8])} and {ours[place : place + 8]}. Images must be resized "
        "alike: the folder that is served holds the processor that the model was loaded with, and no other sizes are "
        "given to the server (mm_processor_kwargs)"
    )


def _data_url(picture: Image.Image) -> str:
    """A picture as it is, in PNG."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
