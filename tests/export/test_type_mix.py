"""The types of a file's tensors, and whole files, equal llama_model_quantize's for every method."""

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind
from gguf.constants import LlamaFileType

from jaxtune.export.gguf_format import GgufWriter, TensorEntry
from jaxtune.export.quantisers import quantise
from jaxtune.export.type_mix import METHODS, bits_per_weight, file_type, find_method, tensor_kinds
from jaxtune.formats.gguf_file import GgufFile

# llama.cpp reads only the metadata when it quantises, so matrices of two rows stand for whole ones.
MODELS = {
    "llama gqa": dict(architecture="llama", layers=9, heads=8, kv_heads=2),
    "llama tied": dict(architecture="llama", layers=4, heads=4, kv_heads=4, tied=True),
    "odd feed-forward": dict(architecture="llama", layers=5, heads=4, kv_heads=2, ffn=352),
    "odd everything": dict(architecture="llama", layers=2, heads=4, kv_heads=2, hidden=96, ffn=112),
    "qwen2": dict(architecture="qwen2", layers=24, heads=14, kv_heads=2, bias=True, tied=True),
    "qwen3": dict(architecture="qwen3", layers=6, heads=4, kv_heads=2, head_norm=True),
    "80 layers": dict(architecture="llama", layers=80, heads=64, kv_heads=8),
    "80 layers, no gqa": dict(architecture="llama", layers=80, heads=8, kv_heads=8),
    "80 layers qwen2": dict(architecture="qwen2", layers=80, heads=64, kv_heads=8, bias=True),
}
NAMES = sorted({method.name for method in METHODS.values()})
LARGE = ("q2_k", "q3_k_s", "q4_k_m")  # the methods tried on 80 layers, for the time it takes


def _shapes(
    layers, hidden=256, ffn=512, tied=False, bias=False, head_norm=False, **_
) -> dict[str, tuple[int, ...]]:
    shapes = {"token_embd.weight": (3, hidden), "output_norm.weight": (hidden,), "rope_freqs.weight": (8,)}
    if not tied:
        shapes["output.weight"] = (3, hidden)
    for i in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"):
            shapes[f"blk.{i}.{name}.weight"] = (2, hidden)
        shapes[f"blk.{i}.ffn_down.weight"] = (2, ffn)
        for name in ("attn_norm", "ffn_norm", *(("attn_q_norm", "attn_k_norm") if head_norm else ())):
            shapes[f"blk.{i}.{name}.weight"] = (hidden,)
        if bias:
            shapes |= {f"blk.{i}.attn_{x}.bias": (2,) for x in "qkv"}
    return shapes


def _metadata(architecture, layers, heads, kv_heads, hidden=256, ffn=512, **_):
    own = {
        "block_count": layers,
        "context_length": 128,
        "embedding_length": hidden,
        "feed_forward_length": ffn,
    }
    own |= {"attention.head_count": heads, "attention.head_count_kv": kv_heads, "vocab_size": 3}
    own |= {"attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": 32, "attention.key_length": 32}
    own |= {"attention.value_length": 32}
    return {"general.architecture": architecture, **{f"{architecture}.{key}": v for key, v in own.items()}}


def _numbers(model):
    return {key: model[key] for key in ("architecture", "layers", "heads", "kv_heads")}


def _write(path, metadata, tensors, kinds=None, importance=None, method="f32"):
    """Our file; without `kinds` a source in float32, in no particular order."""
    if kinds is not None:
        metadata = {**metadata, "general.quantization_version": 2, "general.file_type": file_type(method)}
    kinds = kinds or dict.fromkeys(reversed(tensors), Kind.F32)
    entries = [TensorEntry(name, tensors[name].shape, kind) for name, kind in kinds.items()]
    with GgufWriter(path, metadata, entries) as writer:
        for name, kind in kinds.items():
            rows = np.atleast_2d(tensors[name])
            writer.write(name, quantise(rows, kind, (importance or {}).get(name)))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """`source(name)` -> (metadata, tensors, path) of a random model of `MODELS`."""
    folder, made = tmp_path_factory.mktemp("source"), {}

    def make(name):
        if name not in made:
            rng = np.random.default_rng(0)
            shapes = _shapes(**MODELS[name])
            tensors = {
                key: (0.05 * rng.normal(size=shape)).astype(np.float32) for key, shape in shapes.items()
            }
            metadata = _metadata(**MODELS[name])
            made[name] = metadata, tensors, _write(folder / f"{name}.gguf", metadata, tensors)
        return made[name]

    return make


def _judge(llama_cpp, source, target, method, importance=None):
    fields = {}
    if find_method(method).embeddings is not None:
        fields = dict.fromkeys(("output_tensor_type", "token_embedding_type"), find_method(method).embeddings)
    llama_cpp.quantise_file(source, target, LlamaFileType(file_type(method)), importance=importance, **fields)
    return target


def _cases():
    for model, fields in MODELS.items():
        for method in LARGE if fields["layers"] == 80 else NAMES:
            # llama-quantize has no fallback for a type forced on rows that it does not fit
            if (model, method) != ("odd everything", "q2_k_l"):
                yield model, method


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize(("model", "method"), _cases())
def test_whole_files_equal_llama_cpps(llama_cpp, source, tmp_path, model, method, weighted):
    metadata, tensors, path = source(model)
    importance = None
    if weighted:
        rng = np.random.default_rng(1)
        importance = {
            name: (rng.normal(size=x.shape[-1]) ** 2).astype(np.float32)
            for name, x in tensors.items()
            if x.ndim == 2 and name != "token_embd.weight"
        }
    shapes = {name: x.shape for name, x in tensors.items()}
    kinds = tensor_kinds(method, shapes, **_numbers(MODELS[model]), has_importance=weighted)
    theirs = _judge(llama_cpp, path, tmp_path / "theirs.gguf", method, importance)
    told = {name: tensor.kind for name, tensor in GgufFile(theirs).tensors.items()}
    assert kinds == told and list(kinds) == list(told)
    ours = _write(tmp_path / "ours.gguf", metadata, tensors, kinds, importance, method)
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.fixture(scope="module")
def real(smollm2_gguf, tmp_path_factory):
    """The first layer and a part of the embedding of SmolLM2 (rows of 576 and 1536) as a file of its own."""
    read = GgufFile(smollm2_gguf)
    names = [name for name in read.tensors if name.startswith("blk.0.") or name == "output_norm.weight"]
    tensors = {name: np.array(read.read(name)) for name in names}
    tensors["token_embd.weight"] = read.read("token_embd.weight")[:2000]
    metadata = {**_metadata("llama", 1, 9, 3, 576, 1536), "llama.vocab_size": 2000}
    return metadata, tensors, _write(tmp_path_factory.mktemp("real") / "real.gguf", metadata, tensors)


@pytest.mark.parametrize("method", NAMES)
def test_real_weights_equal_llama_cpps(llama_cpp, real, tmp_path, method):
    metadata, tensors, path = real
    shapes = {name: x.shape for name, x in tensors.items()}
    kinds = tensor_kinds(method, shapes, architecture="llama", layers=1, heads=9, kv_heads=3)
    ours = _write(tmp_path / "ours.gguf", metadata, tensors, kinds, method=method)
    assert ours.read_bytes() == _judge(llama_cpp, path, tmp_path / "theirs.gguf", method).read_bytes()


def test_types_known_without_llama_cpp():
    """Llama-3.1-8B as q4_k_m, whose published files have 4.89 bits a weight."""
    hidden, ffn, vocab = 4096, 14336, 128256
    shapes = {
        "token_embd.weight": (vocab, hidden),
        "output.weight": (vocab, hidden),
        "output_norm.weight": (hidden,),
    }
    for i in range(32):
        sizes = {"attn_q": (hidden, hidden), "attn_k": (1024, hidden), "attn_v": (1024, hidden)}
        sizes |= {"attn_output": (hidden, hidden), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden)}
        sizes |= {"ffn_down": (hidden, ffn), "attn_norm": (hidden,), "ffn_norm": (hidden,)}
        shapes |= {f"blk.{i}.{name}.weight": size for name, size in sizes.items()}
    kinds = tensor_kinds("quantized", shapes, architecture="llama", layers=32, heads=32, kv_heads=8)
    assert kinds["output.weight"] == Kind.Q6_K and kinds["token_embd.weight"] == Kind.Q4_K
    assert [i for i in range(32) if kinds[f"blk.{i}.attn_v.weight"] == Kind.Q6_K] == [
        *range(4),
        *range(6, 28, 3),
        *range(28, 32),
    ]
    assert bits_per_weight(kinds, shapes) == pytest.approx(4.89, abs=0.01)


def test_names():
    assert find_method("Q4_K_M") is METHODS["quantized"] is METHODS["q4_k"]
    assert METHODS["fast_quantized"].name == "q8_0" and METHODS["not_quantized"].name == "f16"
    assert all(method.text for method in METHODS.values())
    with pytest.raises(ValueError, match=r"'q4_k_x' is unknown; expected one of f32, f16"):
        find_method("q4_k_x")
    with pytest.raises(ValueError, match="iq1, iq2 and iq3 types are not written"):
        find_method("iq2_xxs")
