"""vLLM's server in this process: the routes that jaxtune uses, as vLLM 0.32 answers them.

It reads an adapter's folder at the time it is loaded, as vLLM does, and fails where a test asks it to.
"""

import base64
import io
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from jinja2 import Environment
from PIL import Image
from safetensors.numpy import load_file

EOS = 2


def countdown(payload, number):
    """Tokens that depend on prompt and seed, the end among them, with log-probabilities."""
    ids = [5 + (payload["prompt"][0] + payload["seed"] + number + i) % 90 for i in range(3)] + [EOS]
    return ids[: payload["max_tokens"]], [-0.5, -1.5, -2.5, -3.5][: payload["max_tokens"]]


class StubVLLM(ThreadingHTTPServer):
    """`with StubVLLM() as server:` serves on a free port of the loopback until the block ends.

    sample: (payload, number of the sample) -> (token ids, log-probabilities). max_model_len: of its model.
    takes_adapters: False: started without VLLM_ALLOW_RUNTIME_LORA_UPDATING. processor: of what has images.
    events: (route, name) in order. payloads: of completions; those with images get "prompt", the tokens that the
    processor made. adapters: name -> (adapter_config.json, tensors) of what is loaded.
    answers: route -> function of the handler that answers in its place.
    """

    daemon_threads = True

    def __init__(self, sample=countdown, max_model_len=128, takes_adapters=True, port=0, processor=None):
        super().__init__(("127.0.0.1", port), _Handler)
        self.processor = processor
        self.sample, self.max_model_len, self.takes_adapters = sample, max_model_len, takes_adapters
        self.events, self.payloads, self.adapters, self.answers = [], [], {}, {}
        self.together = self.most_together = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Nothing: clients give up where a test wants it."""


class _Handler(BaseHTTPRequestHandler):
    server: StubVLLM

    def log_message(self, *_):
        pass

    def answer(self, body, status=200):
        body = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, message):
        self.answer({"error": {"message": message, "type": "BadRequestError", "code": status}}, status)

    def do_GET(self):
        if self.path in self.server.answers:
            self.server.answers[self.path](self)
        elif self.path == "/health":
            self.answer("")
        elif self.path == "/v1/models":
            base = {"id": "base", "root": "/some/folder", "parent": None}
            cards = [{"id": name, "parent": "base", "max_model_len": None} for name in self.server.adapters]
            self.answer({"data": [*cards, base | {"max_model_len": self.server.max_model_len}]})
        else:
            self.answer({"detail": "Not Found"}, 404)

    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        route = self.path.removeprefix("/v1/")
        if route in self.server.answers:
            self.server.answers[route](self)
        elif route == "completions":
            self.complete(payload, "completions")
        elif route == "chat/completions":
            self.complete(payload | {"prompt": self.rendered(payload)}, "chat/completions")
        elif not self.server.takes_adapters:
            self.answer({"detail": "Not Found"}, 404)
        else:
            self.change(route, payload["lora_name"], payload.get("lora_path"))

    def change(self, route, name, path):
        server = self.server
        if route == "load_lora_adapter":
            if name in server.adapters:
                return self.refuse(400, f"The lora adapter '{name}' has already been loaded.")
            folder = Path(path)
            config = json.loads((folder / "adapter_config.json").read_text())
            server.adapters[name] = (config, load_file(folder / "adapter_model.safetensors"))
            assert len(list(folder.iterdir())) == 2
        elif name not in server.adapters:
            return self.refuse(404, f"The lora adapter '{name}' cannot be found.")
        else:
            del server.adapters[name]
        server.events.append((route, name))
        self.answer(f"Success: LoRA adapter '{name}'")

    def rendered(self, payload):
        """Tokens of messages with images."""
        text = Environment().from_string(payload["chat_template"]).render(messages=payload["messages"])
        parts = [part for message in payload["messages"] for part in message["content"]]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
        return self.server.processor(text=[text], images=[images], add_special_tokens=False)["input_ids"][0]

    def complete(self, payload, route):
        server = self.server
        with server.lock:
            server.payloads.append(payload)
            server.events.append((route, payload["model"]))
            server.together += 1
            server.most_together = max(server.together, server.most_together)
        if payload["model"] not in {"base", *server.adapters}:
            return self.refuse(404, f"The model `{payload['model']}` does not exist.")
        if len(payload["prompt"]) + payload["max_tokens"] > server.max_model_len:
            return self.refuse(400, f"This model's maximum context length is {server.max_model_len} tokens.")
        choices = []
        for number in range(payload["n"]):
            ids, log_probs = server.sample(payload, number)
            chat = {"content": [{"token": "", "logprob": value} for value in log_probs]}
            choices.append(
                {
                    "index": number,
                    "text": "",
                    "token_ids": ids,
                    "logprobs": chat if route == "chat/completions" else {"token_logprobs": log_probs},
                    "finish_reason": "length" if len(ids) == payload["max_tokens"] else "stop",
                }
            )
        time.sleep(0.05)
        with server.lock:
            server.together -= 1
        whole = {"prompt_token_ids": payload["prompt"]} if route == "chat/completions" else {}
        self.answer({"choices": choices[::-1]} | whole)


def python_with_vllm(folder, code=None):
    """A Python, made in a folder, with a package vllm whose server is `code` (by default this file)."""
    package = folder / "packages/vllm/entrypoints/openai"
    package.mkdir(parents=True, exist_ok=True)
    for place in (package, package.parent, package.parent.parent):
        (place / "__init__.py").touch()
    (package / "api_server.py").write_text(Path(__file__).read_text() if code is None else code)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder}/packages exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


if __name__ == "__main__":
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
    print("listening", flush=True)
    StubVLLM(port=int(options["--port"])).serve_forever()
