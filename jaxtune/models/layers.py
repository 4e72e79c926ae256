"""The layers every family is made of. Declared with Flax NNX; leaves start as shapes and are filled by `load`.

Shapes: B batch, T tokens, D model, H heads, K kv heads, h head_dim, F ffn, V vocab, L layers, R rank.
"""

import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from jaxtune.kernels.fp8 import fp8_linear
from jaxtune.kernels.fp8_mlp import fp8_gated_mlp
from jaxtune.kernels.gated_mlp import gated_mlp, joinable, supported
from jaxtune.kernels.keep import keep
from jaxtune.kernels.linear import Adapter, adapted_linear, dense, is_few
from jaxtune.quant import BLOCK, NESTED_BLOCK, NF4

Shape = jax.ShapeDtypeStruct


class Frozen(nnx.Variable):
    """A weight that is loaded and never trained."""


def fold(keys: jax.Array, number) -> jax.Array:
    """A key for each row [B], or one for what has no rows -> other ones. Rows have keys of their own, so that what is
    dropped from a row does not depend on the rows beside it, on this device or on others."""
    return (jax.vmap(jax.random.fold_in, (0, None)) if keys.ndim else jax.random.fold_in)(keys, number)


def whole(x: jax.Array, mesh_axis: str | None, dim: int = 0) -> jax.Array:
    """The array of which this device holds its part along `dim` (devices.Layout); x itself where mesh_axis is None."""
    return x if mesh_axis is None else jax.lax.all_gather(x, mesh_axis, axis=dim, tiled=True)


class NF4Weight(nnx.Module):
    """The four leaves of an NF4 matrix [out, in]."""

    mesh_axis: str | None = None  # over which rows of codes and absmax are split

    def __init__(self, out_features: int, in_features: int, double_quant: bool = True):
        blocks = out_features * in_features // BLOCK
        self.codes = Frozen(Shape((out_features, in_features // 2), jnp.uint8))
        kind = jnp.uint8 if double_quant else jnp.float32
        self.absmax = Frozen(Shape((out_features, in_features // BLOCK), kind))
        self.absmax_scale = (
            Frozen(Shape((-(-blocks // NESTED_BLOCK),), jnp.float32)) if double_quant else None
        )
        self.absmax_offset = Frozen(Shape((), jnp.float32)) if double_quant else None

    def nf4(self) -> NF4:
        nested = self.absmax_scale is not None
        return NF4(
            whole(self.codes[...], self.mesh_axis),
            whole(self.absmax[...], self.mesh_axis),
            self.absmax_scale[...] if nested else None,
            self.absmax_offset[...] if nested else None,
        )


class Linear(nnx.Module):
    """y = x Wᵀ + b, plus scaling · (x A) B once `lora.attach` has added an adapter."""

    lora_A: nnx.LoRAParam | None = None  # [in, R]
    lora_B: nnx.LoRAParam | None = None  # [R, out]
    lora_magnitude: nnx.LoRAParam | None = None  # [out], DoRA
    lora_scaling: Frozen | None = None  # [], 0 in a stacked layer that has no adapter
    dropout: float = 0.0
    dropout_salt: int = 0
    fp8: bool = False  # whether the product with the frozen weight is taken in 8-bit floats (kernels.fp8)
    mesh_axis: str | None = None  # over which the rows of a frozen 16-bit weight are split

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype):
        self.in_features, self.out_features = in_features, out_features
        self.weight = Frozen(Shape((out_features, in_features), dtype))
        self.bias = Frozen(Shape((out_features,), dtype)) if bias else None

    def quantize(self, double_quant: bool, fp8: bool = False) -> None:
        self.weight = NF4Weight(self.out_features, self.in_features, double_quant)
        self.fp8 = fp8

    def add_lora(self, name: str, rank: int, dropout: float, use_dora: bool) -> None:
        self.lora_A = nnx.LoRAParam(Shape((self.in_features, rank), jnp.float32))
        self.lora_B = nnx.LoRAParam(Shape((rank, self.out_features), jnp.float32))
        if use_dora:
            self.lora_magnitude = nnx.LoRAParam(Shape((self.out_features,), jnp.float32))
        self.lora_scaling = Frozen(Shape((), jnp.float32))
        self.dropout, self.dropout_salt = dropout, zlib.crc32(name.encode())

    def _stored(self):
        return self.weight.nf4() if isinstance(self.weight, NF4Weight) else self.matrix()

    def matrix(self) -> jax.Array:
        """The weight [out, in] where it is not quantised."""
        return whole(self.weight[...], self.mesh_axis)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """x [B, …, in] -> [B, …, out]; key: of dropout, one a row [B]."""
        return apply_together([self], x, key)[0]

    def is_plain(self, key: jax.Array | None) -> bool:
        """Whether this is x Wᵀ + (x A) B with W frozen: what can be one product with other layers of the same x."""
        dropping = self.lora_A is not None and key is not None and self.dropout > 0
        return not (isinstance(self.weight, nnx.Param) or dropping or self.lora_magnitude is not None)

    def adapter(self, dtype) -> Adapter | None:
        """A and scaling · B in `dtype`."""
        if self.lora_A is None:
            return None
        a, b = self.lora_A[...].astype(dtype), (self.lora_B[...] * self.lora_scaling[...]).astype(dtype)
        # As they lie in the stacks of all layers, which XLA would turn around to have this layer's turned around.
        return Adapter(*(with_layout_constraint(part, Layout((0, 1))) for part in (a, b)))

    def apply_alone(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """The layer without its bias where it is not plain: trained weight, dropout, DoRA."""
        if isinstance(self.weight, nnx.Param):  # full fine-tuning: a float32 master weight
            y = x @ self.weight[...].astype(x.dtype).T
        else:
            y = _products([self], x, [None])[0]
        return y if self.lora_A is None else self._adapt(x, y, key)

    def _adapt(self, x: jax.Array, y: jax.Array, key: jax.Array | None) -> jax.Array:
        dropped = x
        if key is not None and self.dropout > 0:
            draw = partial(jax.random.bernoulli, p=1 - self.dropout, shape=x.shape[key.ndim :])
            keep = (jax.vmap(draw) if key.ndim else draw)(fold(key, self.dropout_salt))
            dropped = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        adapter = self.adapter(x.dtype)
        assert adapter is not None
        update = (dropped @ adapter.a) @ adapter.b
        if self.lora_magnitude is None:
            return y + update
        base = y if dropped is x else _products([self], dropped, [None])[0]
        scale = (self.lora_magnitude[...] / self._dora_norm()).astype(x.dtype)
        # a layer that layers_to_transform leaves out has scaling 0 and keeps its weight
        scale = jnp.where(self.lora_scaling[...] == 0, jnp.ones_like(scale), scale)
        return y + (scale - 1) * base + scale * update

    def _dora_norm(self) -> jax.Array:
        """‖W + s·(A B)ᵀ‖ of each row, float32 [out]; constant for the gradient (DoRA, arXiv 2402.09353, §4.3)."""
        delta = (self.lora_A[...] @ self.lora_B[...]).T * self.lora_scaling[...]
        return jax.lax.stop_gradient(jnp.linalg.norm(dense(self._stored(), jnp.float32) + delta, axis=1))


def _products(
    linears: list[Linear], x: jax.Array, adapters: list[Adapter | None], name: str | None = None
) -> list[jax.Array]:
    """The outputs of frozen layers with their adapters, without biases."""
    weights = tuple(linear._stored() for linear in linears)
    if all(linear.fp8 for linear in linears) and not is_few(x):
        return fp8_linear(x, weights, tuple(adapters), name)
    ends = np.cumsum([linear.out_features for linear in linears])[:-1]
    return jnp.split(_named(adapted_linear(x, weights, tuple(adapters)), name), ends, axis=-1)


def _named(y, name: str | None):
    return y if name is None else keep(y, name)


def apply_together(
    linears: list[Linear], x: jax.Array, key: jax.Array | None, name: str | None = None
) -> list[jax.Array]:
    """The outputs of layers that share x [..., in], in one product where they can share it.

    name: what `Remat` calls the outputs, None for what is never kept.
    """
    if all(linear.is_plain(key) for linear in linears):
        outputs = _products(linears, x, [linear.adapter(x.dtype) for linear in linears], name)
    else:
        outputs = _named([linear.apply_alone(x, key) for linear in linears], name)
    return [
        y if linear.bias is None else y + linear.bias[...].astype(y.dtype)
        for y, linear in zip(outputs, linears, strict=True)
    ]


def apply_gated(linears: list[Linear], x: jax.Array, key: jax.Array | None) -> jax.Array | None:
    """down(silu(gate(x))·up(x)) in one operation, or None where there is none for these layers."""
    if not all(linear.is_plain(key) and linear.bias is None for linear in linears):
        return None
    weights = tuple(linear._stored() for linear in linears)
    adapters = tuple(linear.adapter(x.dtype) for linear in linears)
    if is_few(x) or not joinable(adapters):
        return None
    if all(linear.fp8 for linear in linears):
        return fp8_gated_mlp(x, weights, adapters)
    if any(linear.fp8 for linear in linears) or not supported(x, weights, adapters):
        return None
    return gated_mlp(x, weights, adapters)


class Embedding(nnx.Module):
    """Rows of a [V, D] table."""

    mesh_axis: str | None = None  # over which the columns of a frozen table are split

    def __init__(self, vocab_size: int, width: int, *, dtype):
        self.weight = Frozen(Shape((vocab_size, width), dtype))

    def __call__(self, ids: jax.Array, dtype) -> jax.Array:
        weight = self.weight[...]
        if not isinstance(self.weight, nnx.Param):
            weight = jax.lax.stop_gradient(weight)
        if self.mesh_axis is None:
            return weight[ids].astype(dtype)
        columns = weight[whole(ids, self.mesh_axis)].astype(dtype)  # [all devices' B, T, part of D]
        return jax.lax.all_to_all(columns, self.mesh_axis, split_axis=0, concat_axis=2, tiled=True)

    def matrix(self) -> jax.Array:
        """The whole table [V, D]."""
        return whole(self.weight[...], self.mesh_axis, 1)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, *, plus_one: bool) -> jax.Array:
    """x / rms(x) · weight over the last axis, in float32 (arXiv 1910.07467).

    plus_one: Gemma's, whose weights are kept less 1 and multiplied before x is rounded.
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    normed = wide * keep(inverse, "statistic")
    if plus_one:
        return (normed * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    return weight.astype(x.dtype) * normed.astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with its weight."""

    def __init__(self, width: int, eps: float, *, dtype, plus_one: bool = False):
        self.weight = Frozen(Shape((width,), dtype))
        self.eps, self.plus_one = eps, plus_one

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps, plus_one=self.plus_one)


class LayerNorm(nnx.Module):
    """(x - mean) / deviation · weight + bias over the last axis, in float32 (arXiv 1607.06450)."""

    def __init__(self, width: int, eps: float, *, dtype):
        self.weight = Frozen(Shape((width,), dtype))
        self.bias = Frozen(Shape((width,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, -1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + self.eps)
        weight, bias = (leaf[...].astype(jnp.float32) for leaf in (self.weight, self.bias))
        return (normed * weight + bias).astype(x.dtype)
