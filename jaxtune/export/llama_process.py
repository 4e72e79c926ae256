"""A program that runs a .gguf file in an installed llama.cpp: `verify` starts it apart from the training process.

    python llama_process.py < request.json        (the request and the answer: `run`)

It needs nothing but Python, so that it starts quickly, and it is a process of its own, so that a llama.cpp that does
not get along with a file or with this program takes nothing with it. The structs that llama.h passes by value are
taken as they come from its own functions, without a look inside, since their fields change from version to version.
"""

import ctypes as C
import json
import os
import sys
from pathlib import Path


class _Opaque(C.Structure):
    """Any of llama.h's structs: longer than all of them; the callee reads and writes what it knows of it."""

    _fields_ = [("raw", C.c_uint8 * 1024)]


_LOG = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)
_POINTER = C.c_void_p
_PROTOTYPES = {
    "llama_model_default_params": (_Opaque, []),
    "llama_context_default_params": (_Opaque, []),
    "llama_model_load_from_file": (_POINTER, [C.c_char_p, _Opaque]),
    "llama_init_from_model": (_POINTER, [_POINTER, _Opaque]),
    "llama_set_n_threads": (None, [_POINTER, C.c_int32, C.c_int32]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_vocab_n_tokens": (C.c_int32, [_POINTER]),
    "llama_vocab_is_eog": (C.c_bool, [_POINTER, C.c_int32]),
    "llama_tokenize": (
        C.c_int32,
        [_POINTER, C.c_char_p, C.c_int32, C.POINTER(C.c_int32), C.c_int32, C.c_bool, C.c_bool],
    ),
    "llama_token_to_piece": (
        C.c_int32,
        [_POINTER, C.c_int32, C.c_char_p, C.c_int32, C.c_int32, C.c_bool],
    ),
    "llama_batch_get_one": (_Opaque, [C.POINTER(C.c_int32), C.c_int32]),
    "llama_decode": (C.c_int32, [_POINTER, _Opaque]),
    "llama_get_logits_ith": (C.POINTER(C.c_float), [_POINTER, C.c_int32]),
}


_messages: list[str] = []


@_LOG
def _quiet(level: int, text: bytes, data: object) -> None:
    _messages.append(text.decode("utf-8", "replace"))


def _said() -> str:
    """The end of llama.cpp's log, on one line."""
    return " ".join("".join(_messages[-4:]).split())


def load_library(path: Path) -> C.CDLL:
    """libllama, or a Python extension that contains it, with ggml's libraries beside it, quiet and initialised."""
    for name in ("libggml-base", "libggml"):  # libllama names them in ways that do not find them everywhere
        for file in sorted(path.parent.glob(f"{name}.*")):
            base = C.CDLL(str(file), mode=C.RTLD_GLOBAL)
            if hasattr(base, "ggml_log_set"):
                base.ggml_log_set(_quiet, None)
            if hasattr(base, "ggml_backend_load_all_from_path"):
                base.ggml_backend_load_all_from_path(str(path.parent).encode())
    library = C.CDLL(str(path))
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_quiet, None)
    library.llama_backend_init()
    return library


class Session:
    """A model file with a context of `length` tokens."""

    def __init__(self, library: C.CDLL, path: str, length: int):
        self.lib = library
        self.model = library.llama_model_load_from_file(path.encode(), library.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp does not load the file: " + _said())
        self.vocab = library.llama_model_get_vocab(self.model)
        parameters = library.llama_context_default_params()
        C.c_uint32.from_buffer(parameters).value = length  # n_ctx is the first field
        self.context = library.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context: " + _said())
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        library.llama_set_n_threads(self.context, threads, threads)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text that holds its special tokens already."""
        raw = text.encode()
        room = (C.c_int32 * (len(raw) + 8))()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), room, len(room), False, True)
        return list(room[:count])

    def decode(self, token: int) -> C.Array:
        """Float32 logits [V] after one more token."""
        one = (C.c_int32 * 1)(token)
        status = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(one, 1))
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}: {_said()}")
        size = self.lib.llama_vocab_n_tokens(self.vocab)
        values = (C.c_float * size)()
        C.memmove(values, self.lib.llama_get_logits_ith(self.context, -1), 4 * size)
        return values

    def piece(self, token: int) -> bytes:
        """The text of a token, special ones shown."""
        room = C.create_string_buffer(512)
        count = self.lib.llama_token_to_piece(self.vocab, token, room, len(room), 0, True)
        return room.raw[: max(count, 0)]


def run(request: dict) -> dict:
    """Loads a file, feeds it a prompt token by token, then continues it greedily.

    Args:
        request: library, file: paths. prompt: text with its special tokens. ids: tokens to feed. new: most tokens to
            generate. logits: path to write float32 [len(ids), V] to.

    Returns:
        ids: llama.cpp's own tokens of the prompt. new_ids, text: the continuation, without what ended it.
        ended: whether an end-of-generation token came.
    """
    session = Session(
        load_library(Path(request["library"])), request["file"], len(request["ids"]) + request["new"]
    )
    with open(request["logits"], "wb") as file:
        for token in request["ids"]:
            values = session.decode(token)
            file.write(bytes(values))
    new: list[int] = []
    while True:
        token = max(range(len(values)), key=values.__getitem__)
        ended = session.lib.llama_vocab_is_eog(session.vocab, token)
        if ended or len(new) == request["new"]:
            break
        new.append(token)
        values = session.decode(token)
    text = b"".join(map(session.piece, new)).decode("utf-8", "replace")
    return {"ids": session.tokenize(request["prompt"]), "new_ids": new, "text": text, "ended": bool(ended)}


if __name__ == "__main__":
    try:
        print(json.dumps(run(json.load(sys.stdin))))
    except (RuntimeError, OSError, AttributeError) as error:
        sys.exit(f"{error}")
