"""NF4 storage (QLoRA, arXiv 2305.14314): 4-bit codes, one scale per 64 weights, the scales themselves in 8 bits.

The numbers are bitsandbytes'; only the order of the codes in memory differs. bitsandbytes packs elements 2i and
2i+1 into byte i. Here byte j of a 64-block holds elements j (high nibble) and j+32 (low nibble), so that unpacking
is two contiguous halves and no interleave: 2.5 times faster through XLA on a GPU. `to_bnb` and `from_bnb` convert.

The scale of a block is `absmax`. With double quantisation `absmax` is an 8-bit code into a dynamic (non-linear)
map, in groups of 256 over the flattened tensor, plus one float32 offset for the tensor.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64
NESTED_BLOCK = 256
PIECE_BYTES = 1 << 27  # of an array under way to the device; matrices of an 8B model are smaller, but for two
NF4_CODE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
NF4_BOUNDS = (NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2)
_STATE = "quant_state.bitsandbytes__nf4"


class NF4(NamedTuple):
    """One quantised matrix [out, in]; a pytree.

    codes: uint8 [out, in/2], half-block order.
    absmax: float32 [out, in/64], or uint8 codes of the same shape when double-quantised.
    absmax_scale: float32 [ceil(out*in/64/256)] and absmax_offset: float32 [], both None unless double-quantised.
    """

    codes: jax.Array
    absmax: jax.Array
    absmax_scale: jax.Array | None = None
    absmax_offset: jax.Array | None = None


def check_quantisable(shape: tuple[int, ...], name: str = "weight") -> None:
    """Raises ValueError unless `shape` is a matrix whose rows are whole blocks of 64."""
    if len(shape) != 2 or shape[1] % BLOCK:
        raise ValueError(
            f"{name}: NF4 needs a matrix [out, in] with in a multiple of {BLOCK}, got {list(shape)}; "
            "load the model with load_in_4bit=False, load_in_16bit=True"
        )


@cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """The 256 sorted values of the 8-bit dynamic data type (arXiv 1511.04561), float32.

    Seven decades of exponent; the fraction's bits shrink as the value does. Signed covers [-0.993, 1], unsigned (0, 1].
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        items = 2 ** (exponent if signed else exponent + 1)
        step, index = np.float64(np.float32(0.9) / np.float32(items)), np.arange(items + 1)
        below, above = np.float32(0.1) + step * index, 1.0 - step * (items - index)
        edges = np.where(index < (items + 1) // 2, below, above).astype(
            np.float32
        )  # torch.linspace to the last bit
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        decade = (np.float32(10.0 ** (exponent - 6)) * means).tolist()
        values += decade + ([-v for v in decade] if signed else [])
    return np.array(sorted(values), np.float32)


@cache
def _nested_table() -> np.ndarray:
    """Nearest dynamic code of each of 65,536 equal steps over [-1, 1]: bitsandbytes' CPU rule, uint8."""
    grid = np.arange(65536, dtype=np.float32) * np.float32(2.0 / 65535.0) - np.float32(1)
    code = dynamic_map()
    return np.searchsorted((code[:-1] + code[1:]) / np.float32(2), grid, side="left").astype(np.uint8)


@jax.jit
def _quantize_blocks(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """w float [out, in] -> (codes uint8 [out, in/2] half-block order, absmax float32 [out, in/64])."""
    out, width = w.shape
    blocks = w.astype(jnp.float32).reshape(out, width // BLOCK, BLOCK)
    absmax = jnp.abs(blocks).max(-1)
    inverse = jnp.where(absmax > 0, 1.0 / absmax, 0.0)
    scaled = jnp.clip(blocks * inverse[..., None], -1.0, 1.0)
    codes = sum((scaled > bound).astype(jnp.uint8) for bound in NF4_BOUNDS)
    packed = (codes[..., : BLOCK // 2] << 4) | codes[..., BLOCK // 2 :]
    return packed.reshape(out, width // 2), absmax


def _in_order(rows: np.ndarray) -> np.ndarray:
    """Float32 sum over the first axis, one row after the other."""
    return reduce(np.add, rows, np.zeros(rows.shape[1:], np.float32))


def _cascade(rows: np.ndarray) -> np.ndarray:
    """Float32 sum over the first axis in four levels: groups of rows, groups of groups, and so on."""
    step = 1 << max(4, (len(rows) - 1).bit_length() // 4)
    parts = []
    for _ in range(3):
        whole = len(rows) // step * step
        parts.append(_in_order(rows[whole:]))
        rows = _in_order(rows[:whole].reshape(-1, step, *rows.shape[1:]).swapaxes(0, 1))
    return _in_order(np.stack([*parts, _in_order(rows)]))


def _mean(x: np.ndarray) -> np.float32:
    """The mean of float32 [n] to the last bit of torch's on one CPU thread, so that the offset is bitsandbytes' own.

    torch adds eight lanes at a time, in four interleaved cascades.
    """
    vectors = x[: x.size // 8 * 8].reshape(-1, 8)
    fours = vectors[: len(vectors) // 4 * 4].reshape(-1, 4, 8)
    lanes = _cascade(fours) if len(fours) else np.zeros((4, 8), np.float32)
    lane = _in_order(np.concatenate([lanes[:1], vectors[len(fours) * 4 :], lanes[1:]]))
    total = np.float32(_in_order(np.concatenate([x[vectors.size :], lane])))
    return np.float32(total / np.float32(x.size))


def _quantize_absmax(absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """float32 [out, in/64] -> (codes uint8 same shape, scales float32 [n/256], offset float32)."""
    offset = _mean(absmax.reshape(-1))
    flat = (absmax - offset).reshape(-1)
    padded = np.pad(flat, (0, -flat.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    scale = np.abs(padded).max(1)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    steps = (padded * inverse[:, None] + np.float32(1)) * np.float32(0.5) * np.float32(65535) + np.float32(
        0.5
    )
    codes = _nested_table()[np.clip(steps, 0, 65535).astype(np.int32)]
    codes[scale == 0] = 0  # what bitsandbytes writes for a group of equal scales; it means zero either way
    return codes.reshape(-1)[: flat.size].reshape(absmax.shape), scale, offset


@partial(jax.jit, donate_argnums=0)
def _put_rows(whole: Any, rows: Any, start: int) -> Any:
    return jax.tree.map(lambda into, x: jax.lax.dynamic_update_slice_in_dim(into, x, start, 0), whole, rows)


def by_rows[T](convert: Callable[[Any], T], x: np.ndarray | jax.Array) -> T:
    """convert(x) of a function that takes each row [...] of x by itself, PIECE_BYTES of x at a time.

    For the host: a GPU's runtime copies what it is sent into a pool of page-locked memory, which grows by regions of
    powers of two, none smaller than the array or the region before, and never gets smaller. Each piece is waited for
    before the next. All are of one shape, so one program: the last begins early.
    """
    if x.nbytes <= PIECE_BYTES or not x.ndim:
        return convert(x)
    rows = max(1, PIECE_BYTES * len(x) // x.nbytes)
    whole: Any = None
    for start in range(0, len(x), rows):
        start = min(start, len(x) - rows)
        piece = convert(x[start : start + rows])
        if whole is None:
            whole = jax.tree.map(lambda p: jnp.zeros((len(x), *p.shape[1:]), p.dtype), piece)
        whole = jax.block_until_ready(_put_rows(whole, piece, np.int32(start)))
    return whole


def on_device(x: np.ndarray | jax.Array) -> jax.Array:
    """A host array on the default device, never sharing its memory (a CPU would, with the pages of a mapped file).

    jnp.asarray would compile a copy for each shape and hold the array twice while it runs.
    """
    return by_rows(lambda piece: jax.device_put(piece, may_alias=False), x)


def quantize_nf4(w: jax.Array | np.ndarray, double_quant: bool = True) -> NF4:
    """Quantises a float matrix [out, in] (in a multiple of 64) to NF4, as bitsandbytes does.

    Args:
      w: float16, bfloat16 or float32 [out, in].
      double_quant: also store the scales in 8 bits (0.127 instead of 0.5 bits a weight).

    Raises:
      ValueError: the shape is no matrix of whole blocks.
    """
    check_quantisable(w.shape)
    codes, absmax = by_rows(lambda rows: _quantize_blocks(jax.device_put(rows)), w)
    if not double_quant:
        return NF4(codes, absmax)
    nested, scale, offset = _quantize_absmax(np.asarray(absmax))
    return NF4(codes, on_device(nested), on_device(scale), on_device(offset))


def dequantize_absmax(w: NF4) -> jax.Array:
    """The scales of `w`, float32 [out, in/64]."""
    if w.absmax_scale is None:
        return w.absmax
    values = jnp.asarray(dynamic_map())[w.absmax.reshape(-1)]
    values = jnp.pad(values, (0, -values.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    flat = (values * w.absmax_scale[:, None]).reshape(-1)[: w.absmax.size] + w.absmax_offset
    return flat.reshape(w.absmax.shape)


def dequantize_nf4(w: NF4, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """NF4 -> [out, in] in `dtype`; the product code × scale is taken in float32 and rounded once."""
    out, half = w.codes.shape
    packed = w.codes.reshape(out, -1, BLOCK // 2)
    table = jnp.asarray(NF4_CODE)
    values = jnp.concatenate([table[packed >> 4], table[packed & 15]], -1)  # [out, in/64, 64]
    return (values * dequantize_absmax(w)[..., None]).astype(dtype).reshape(out, 2 * half)


def _to_bnb_order(codes: np.ndarray) -> np.ndarray:
    packed = codes.reshape(-1, BLOCK // 2)
    nibbles = np.concatenate([packed >> 4, packed & 15], -1)
    return ((nibbles[:, 0::2] << 4) | nibbles[:, 1::2]).reshape(-1, 1)


def _from_bnb_order(codes: np.ndarray) -> np.ndarray:
    packed = codes.reshape(-1, BLOCK // 2)
    nibbles = np.stack([packed >> 4, packed & 15], -1).reshape(-1, BLOCK)
    return (nibbles[:, : BLOCK // 2] << 4) | nibbles[:, BLOCK // 2 :]


def to_bnb(w: NF4, dtype: str = "bfloat16") -> dict[str, np.ndarray]:
    """bitsandbytes' serialised form of a `Linear4bit.weight`: the tensors beside (and under) the key "weight".

    Args:
      w: the quantised matrix.
      dtype: name of the type that the weight had, which bitsandbytes dequantises to.

    Returns:
      "weight" uint8 [out*in/2, 1], "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4" (JSON
      in uint8) and, when double-quantised, "weight.nested_absmax" and "weight.nested_quant_map".
    """
    out, half = w.codes.shape
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": [out, 2 * half]}
    tensors = {
        "weight": _to_bnb_order(np.asarray(w.codes)),
        "weight.absmax": np.asarray(w.absmax).reshape(-1),
        "weight.quant_map": NF4_CODE,
    }
    if w.absmax_scale is not None:
        tensors["weight.nested_absmax"] = np.asarray(w.absmax_scale)
        tensors["weight.nested_quant_map"] = dynamic_map()
        offset = float(np.asarray(w.absmax_offset))
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    tensors[f"weight.{_STATE}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors


def from_bnb(tensors: Mapping[str, np.ndarray], name: str = "weight", *, flat: bool = False) -> NF4:
    """The inverse of `to_bnb`.

    flat: as a matrix [out·in/64, 64], which there is for rows that are no whole blocks too.

    Raises:
      ValueError: the tensors are not NF4 in blocks of 64 with bitsandbytes' own maps.
    """
    states = [k for k in tensors if "quant_state" in k]
    if states != [f"weight.{_STATE}"]:
        raise ValueError(
            f"{name}: expected bitsandbytes NF4 ('weight.{_STATE}'), got {states or sorted(tensors)}"
        )
    state = json.loads(bytes(tensors[f"weight.{_STATE}"]))
    if state["blocksize"] != BLOCK or state.get("nested_blocksize", NESTED_BLOCK) != NESTED_BLOCK:
        raise ValueError(f"{name}: expected blocks of {BLOCK} and {NESTED_BLOCK}, got {state}")
    if not np.array_equal(tensors["weight.quant_map"], NF4_CODE):
        raise ValueError(f"{name}: its quant_map is not the NF4 map")
    out, width = (int(np.prod(state["shape"])) // BLOCK, BLOCK) if flat else state["shape"]
    check_quantisable((out, width), name)
    codes = on_device(_from_bnb_order(np.asarray(tensors["weight"])).reshape(out, width // 2))
    absmax = on_device(tensors["weight.absmax"].reshape(out, width // BLOCK))
    if "weight.nested_absmax" not in tensors:
        return NF4(codes, absmax)
    if not np.array_equal(tensors["weight.nested_quant_map"], dynamic_map()):
        raise ValueError(f"{name}: its nested_quant_map is not the signed dynamic map")
    offset = on_device(np.float32(state["nested_offset"]))
    return NF4(codes, absmax, on_device(tensors["weight.nested_absmax"]), offset)
