"""llama.cpp as the judge of GGUF files: quantises blocks and files, loads a model and runs it.

The prebuilt libraries (release v0.5.0, x86-64, MIT) come from the npm package @node-llama-cpp/linux-x64;
scripts/test.sh fetches them. Bound by ctypes, so the structures below belong to that version; `LlamaCpp` checks
their defaults.
"""

import ctypes as C
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType, LlamaFileType

KINDS_END = 42  # GGML_TYPE_COUNT: "not given"


class _Importance(C.Structure):
    _fields_ = [("name", C.c_char_p), ("data", C.POINTER(C.c_float)), ("size", C.c_size_t)]


class _QuantizeParams(C.Structure):
    _fields_ = [
        *((name, C.c_int32) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        *((name, C.c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure")),
        *((name, C.c_bool) for name in ("keep_split", "dry_run")),
        ("imatrix", C.POINTER(_Importance)),
        *((name, C.c_void_p) for name in ("kv_overrides", "tt_overrides", "prune_layers")),
        ("max_buf_size", C.c_size_t),
    ]


class _ModelParams(C.Structure):
    _fields_ = [
        ("devices", C.c_void_p),
        ("tensor_buft_overrides", C.c_void_p),
        *((name, C.c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *(
            (name, C.c_void_p)
            for name in ("tensor_split", "progress_callback", "progress_data", "kv_overrides")
        ),
        *(
            (name, C.c_bool)
            for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc")
        ),
        ("load_mtp", C.c_bool),
    ]


class _ContextParams(C.Structure):
    _fields_ = [
        *((name, C.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, C.c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, C.c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, C.c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, C.c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor")),
        *((name, C.c_float) for name in ("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", C.c_uint32),
        ("defrag_thold", C.c_float),
        *((name, C.c_void_p) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, C.c_int32) for name in ("type_k", "type_v")),
        *((name, C.c_void_p) for name in ("abort_callback", "abort_callback_data")),
        *((name, C.c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full")),
        ("kv_unified", C.c_bool),
        ("samplers", C.c_void_p),
        ("n_samplers", C.c_size_t),
        ("ctx_other", C.c_void_p),
    ]


class _Batch(C.Structure):
    _fields_ = [
        ("n_tokens", C.c_int32),
        ("token", C.POINTER(C.c_int32)),
        ("embd", C.POINTER(C.c_float)),
        ("pos", C.POINTER(C.c_int32)),
        ("n_seq_id", C.POINTER(C.c_int32)),
        ("seq_id", C.POINTER(C.POINTER(C.c_int32))),
        ("logits", C.POINTER(C.c_int8)),
    ]


_LOG = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)
_TEXT, _PTR, _INT, _BOOL, _FLOATS = C.c_char_p, C.c_void_p, C.c_int32, C.c_bool, C.POINTER(C.c_float)
_FUNCTIONS = {
    "llama_model_quantize_default_params": (_QuantizeParams, []),
    "llama_model_quantize": (C.c_uint32, [_TEXT, _TEXT, C.POINTER(_QuantizeParams)]),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (_PTR, [_TEXT, _ModelParams]),
    "llama_model_free": (None, [_PTR]),
    "llama_model_get_vocab": (_PTR, [_PTR]),
    "llama_model_chat_template": (_TEXT, [_PTR, _TEXT]),
    "llama_init_from_model": (_PTR, [_PTR, _ContextParams]),
    "llama_free": (None, [_PTR]),
    "llama_get_memory": (_PTR, [_PTR]),
    "llama_memory_clear": (None, [_PTR, _BOOL]),
    "llama_batch_init": (_Batch, [_INT, _INT, _INT]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (_INT, [_PTR, _Batch]),
    "llama_get_logits": (_FLOATS, [_PTR]),
    "llama_vocab_n_tokens": (_INT, [_PTR]),
    "llama_vocab_is_eog": (_BOOL, [_PTR, _INT]),
    "llama_vocab_bos": (_INT, [_PTR]),
    "llama_vocab_eos": (_INT, [_PTR]),
    "llama_vocab_eot": (_INT, [_PTR]),
    "llama_vocab_pad": (_INT, [_PTR]),
    "llama_vocab_get_add_bos": (_BOOL, [_PTR]),
    "llama_vocab_get_add_eos": (_BOOL, [_PTR]),
    "llama_tokenize": (_INT, [_PTR, _TEXT, _INT, _PTR, _INT, _BOOL, _BOOL]),
    "llama_detokenize": (_INT, [_PTR, _PTR, _INT, _TEXT, _INT, _BOOL, _BOOL]),
    "llama_adapter_lora_init": (_PTR, [_PTR, _TEXT]),
    "llama_set_adapters_lora": (_INT, [_PTR, C.POINTER(_PTR), C.c_size_t, _FLOATS]),
}


class LlamaCpp:
    """llama.cpp's libraries in `folder` (libllama.v*.so, libggml*.so). `log` holds the messages of the last call."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.base = C.CDLL(str(folder / "libggml-base.so"), mode=C.RTLD_GLOBAL)
        ggml = C.CDLL(str(next(folder.glob("libggml.v*.so"))), mode=C.RTLD_GLOBAL)
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        self.lib = C.CDLL(str(next(folder.glob("libllama.v*.so"))))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        self.base.ggml_row_size.restype = C.c_size_t
        self.base.ggml_row_size.argtypes = [C.c_int, C.c_int64]
        self.base.ggml_quantize_chunk.restype = C.c_size_t
        self.base.ggml_quantize_chunk.argtypes = [C.c_int, _PTR, _PTR, C.c_int64, C.c_int64, C.c_int64, _PTR]
        self.base.ggml_validate_row_data.restype = C.c_bool
        self.base.ggml_validate_row_data.argtypes = [C.c_int, _PTR, C.c_size_t]
        self.log: list[str] = []
        self._callback = _LOG(lambda _, text, __: self.log.append(text.decode("utf-8", "replace")))
        self.lib.llama_log_set(self._callback, None)
        self.lib.llama_backend_init()
        self._check_layout()

    def _check_layout(self) -> None:
        quantize = self.lib.llama_model_quantize_default_params()
        context, model = self.lib.llama_context_default_params(), self.lib.llama_model_default_params()
        layout = (
            (
                quantize.ftype,
                quantize.max_buf_size,
                context.n_ctx,
                context.n_batch,
                context.type_k,
                context.n_samplers,
            ),
            (model.use_extra_bufts, model.vocab_only, context.yarn_beta_fast, context.yarn_beta_slow),
        )
        expected = (7, 1 << 33, 512, 2048, GGMLQuantizationType.F16, 0), (True, False, -1.0, -1.0)
        assert layout == expected, f"this llama.cpp has other structures than v0.5.0: {layout}"

    def quantise(
        self, values: np.ndarray, kind: GGMLQuantizationType, importance: np.ndarray | None = None
    ) -> np.ndarray:
        """float32 [rows, width] -> uint8 [rows, row_bytes] by ggml_quantize_chunk."""
        values = np.ascontiguousarray(values, np.float32)
        rows, width = values.shape
        out = np.empty((rows, self.base.ggml_row_size(kind, width)), np.uint8)
        if importance is not None:
            importance = np.ascontiguousarray(importance, np.float32)
        pointer = None if importance is None else importance.ctypes.data
        done = self.base.ggml_quantize_chunk(
            kind, values.ctypes.data, out.ctypes.data, 0, rows, width, pointer
        )
        assert done == out.size
        return out

    def is_valid(self, blocks: np.ndarray, kind: GGMLQuantizationType) -> bool:
        """What llama.cpp asks of quantised data before it writes it."""
        return self.base.ggml_validate_row_data(kind, blocks.ctypes.data, blocks.size)

    def quantise_file(
        self,
        source: Path,
        target: Path,
        file_type: LlamaFileType,
        *,
        importance: dict[str, np.ndarray] | None = None,
        threads: int = 2,
        **fields,
    ) -> None:
        """llama-quantize: `fields` are members of llama_model_quantize_params; raises RuntimeError with its log."""
        params = self.lib.llama_model_quantize_default_params()
        params.nthread, params.ftype = threads, file_type
        for name, value in fields.items():
            setattr(params, name, value)
        if importance is not None:
            kept = {k: np.ascontiguousarray(v, np.float32) for k, v in importance.items()}
            entries = [_Importance(k.encode(), v.ctypes.data_as(_FLOATS), v.size) for k, v in kept.items()]
            params.imatrix = (_Importance * (len(entries) + 1))(*entries, _Importance(None, None, 0))
        self.log.clear()
        if self.lib.llama_model_quantize(str(source).encode(), str(target).encode(), C.byref(params)):
            raise RuntimeError("".join(self.log)[-2000:])

    def load(self, path: str | Path, *, context: int = 512, adapter: str | Path | None = None) -> "Loaded":
        """A model ready to run on 1 thread; use it with `with`."""
        return Loaded(self, Path(path), context, adapter)


class Loaded:
    """A model in llama.cpp. Token ids are lists of int; `eos`, `bos`, … are ids, or -1."""

    def __init__(self, llama: LlamaCpp, path: Path, context: int, adapter: str | Path | None):
        self._lib, self._context_size = llama.lib, context
        llama.log.clear()
        self._model = self._lib.llama_model_load_from_file(
            str(path).encode(), self._lib.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}:\n" + "".join(llama.log)[-2000:])
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        params = self._lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type, params.type_k, params.type_v = 0, *[GGMLQuantizationType.F32] * 2
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {path}:\n" + "".join(llama.log)[-2000:])
        if adapter is not None:
            lora = self._lib.llama_adapter_lora_init(self._model, str(adapter).encode())
            if not lora:
                raise RuntimeError(
                    f"llama.cpp does not load the adapter {adapter}:\n" + "".join(llama.log)[-2000:]
                )
            self._lib.llama_set_adapters_lora(self._context, (_PTR * 1)(lora), 1, (C.c_float * 1)(1.0))
        for name in ("bos", "eos", "eot", "pad"):
            setattr(self, name, getattr(self._lib, f"llama_vocab_{name}")(self._vocab))
        self.add_bos = self._lib.llama_vocab_get_add_bos(self._vocab)
        self.add_eos = self._lib.llama_vocab_get_add_eos(self._vocab)
        template = self._lib.llama_model_chat_template(self._model, None)
        self.chat_template = template.decode() if template else None
        self.vocab_size = self._lib.llama_vocab_n_tokens(self._vocab)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def is_end(self, token: int) -> bool:
        """Whether generation stops at this token."""
        return self._lib.llama_vocab_is_eog(self._vocab, token)

    def tokenise(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        raw = text.encode()
        room = len(raw) + 8
        ids = (C.c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, add_special, parse_special)
        assert count >= 0, f"{-count} tokens for {len(raw)} bytes"
        return ids[:count]

    def detokenise(
        self, ids: list[int], *, remove_special: bool = False, unparse_special: bool = True
    ) -> str:
        room = 64 * len(ids) + 64
        text = C.create_string_buffer(room)
        tokens = (C.c_int32 * len(ids))(*ids)
        count = self._lib.llama_detokenize(
            self._vocab, tokens, len(ids), text, room, remove_special, unparse_special
        )
        assert count >= 0
        return text.raw[:count].decode("utf-8", "replace")

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 [len(ids), vocabulary]: the logits after each token of a fresh sequence."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        return self._decode(ids, 0)

    def generate(self, ids: list[int], count: int = 64) -> list[int]:
        """Greedy continuation of up to `count` tokens, without the end token."""
        logits, answer = self.logits(ids), []
        while len(answer) < count:
            token = int(logits[-1].argmax())
            if self.is_end(token):
                break
            answer.append(token)
            logits = self._decode([token], len(ids) + len(answer) - 1)
        return answer

    def perplexity(self, ids: list[int], *, window: int | None = None) -> float:
        """exp of the mean negative log-likelihood of the second half of each window of `window` tokens."""
        window = window or self._context_size
        losses = []
        for start in range(0, len(ids) - window + 1, window):
            part = ids[start : start + window]
            logits = self.logits(part)[window // 2 - 1 : -1].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            right = logits[np.arange(len(logits)), part[window // 2 :]]
            losses.append(np.log(np.exp(logits).sum(-1)) - right)
        return float(np.exp(np.mean(losses)))

    def _decode(self, ids: list[int], position: int) -> np.ndarray:
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        failed = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        assert not failed, f"llama_decode returned {failed}"
        shape = (len(ids), self.vocab_size)
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), shape).copy()
