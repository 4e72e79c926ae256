"""NF4 against bitsandbytes, byte for byte."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import quant

bnb = pytest.importorskip("bitsandbytes.functional")
torch = pytest.importorskip("torch")

SHAPES = [
    (1, 64),
    (3, 64),
    (5, 128),
    (64, 64),
    (7, 192),
    (64, 576),
    (192, 576),
    (576, 1536),
    (33, 320),
    (128, 1024),
]


def _matrices():
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        yield f"normal{shape}", rng.normal(size=shape).astype(np.float32)
    for shape in SHAPES[3:7]:
        w = rng.normal(size=shape).astype(np.float32) * 0.02
        w[:, ::17] *= 300  # outliers
        yield f"outliers{shape}", w
    zeros = rng.normal(size=(64, 256)).astype(np.float32)
    zeros[5:20] = 0
    yield "zero blocks", zeros
    yield "all zero", np.zeros((32, 128), np.float32)
    yield "tiny", rng.normal(size=(64, 128)).astype(np.float32) * 1e-30
    yield "huge", rng.normal(size=(64, 128)).astype(np.float32) * 1e30
    yield "on the bounds", np.resize(np.r_[quant.NF4_BOUNDS, 1.0].astype(np.float32), (16, 64))
    yield "on the codes", np.resize(quant.NF4_CODE, (16, 64))


CASES = dict(_matrices())


def _judge(w, double_quant):
    packed, state = bnb.quantize_4bit(torch.tensor(w), quant_type="nf4", compress_statistics=double_quant)
    tensors = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    return {k: v.numpy() for k, v in tensors.items()}, packed, state


def assert_same_tensors(got, want):
    """Equal bytes; the quant_state, which holds the offset, is JSON and equal in every number."""
    assert got.keys() == want.keys()
    for key in want:
        if "quant_state" in key:
            assert json.loads(bytes(got[key])) == json.loads(bytes(want[key]))
        else:
            np.testing.assert_array_equal(got[key], want[key], err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_single_quantisation_equals_bitsandbytes(name):
    want, packed, state = _judge(CASES[name], False)
    assert_same_tensors(
        quant.to_bnb(quant.quantize_nf4(CASES[name], double_quant=False), dtype="float32"), want
    )
    back = quant.dequantize_nf4(quant.from_bnb(want))
    np.testing.assert_array_equal(np.asarray(back), bnb.dequantize_4bit(packed, state).numpy())


@pytest.mark.parametrize("name", CASES)
def test_double_quantisation_equals_bitsandbytes(name):
    want, _, _ = _judge(CASES[name], True)
    assert_same_tensors(quant.to_bnb(quant.quantize_nf4(CASES[name]), dtype="float32"), want)


@pytest.mark.parametrize("size", [1, 7, 8, 31, 33, 100, 1000, 4095, 13824, 32767, 40000, 917504])
def test_the_mean_is_torchs_on_one_thread(size):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = np.random.default_rng(size).random(size, np.float32) * 0.1
    want = torch.tensor(x).mean().numpy()
    torch.set_num_threads(threads)
    assert quant._mean(x).view(np.int32) == want.view(np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantisation_equals_bitsandbytes(dtype, double_quant):
    w = torch.tensor(CASES["normal(192, 576)"]).to(getattr(torch, dtype))
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=double_quant)
    tensors = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    ours = quant.dequantize_nf4(quant.from_bnb({k: v.numpy() for k, v in tensors.items()}), jnp.dtype(dtype))
    want = bnb.dequantize_4bit(packed, state).float().numpy()
    np.testing.assert_array_equal(np.asarray(ours.astype(jnp.float32)), want)


@pytest.mark.parametrize("double_quant", [False, True])
def test_round_trip_is_exact(double_quant):
    want, _, _ = _judge(CASES["normal(64, 576)"], double_quant)
    got = quant.to_bnb(quant.from_bnb(want), dtype="float32")
    for key in want:
        np.testing.assert_array_equal(got[key], want[key], err_msg=key)


@pytest.mark.parametrize("shape", [(4, 63), (4, 100), (64,), (2, 3, 64)])
def test_shapes_that_are_not_whole_blocks_raise(shape):
    with pytest.raises(ValueError, match="multiple of 64"):
        quant.quantize_nf4(np.zeros(shape, np.float32))


def test_foreign_formats_raise():
    packed, state = bnb.quantize_4bit(torch.ones(64, 64), quant_type="fp4")
    tensors = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    with pytest.raises(ValueError, match="nf4"):
        quant.from_bnb({k: v.numpy() for k, v in tensors.items()})


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map(signed):
    np.testing.assert_array_equal(quant.dynamic_map(signed), bnb.create_dynamic_map(signed=signed).numpy())


@pytest.mark.parametrize("rows", [1, 7, 8, 48])
def test_large_arrays_go_to_the_device_in_pieces(monkeypatch, rows):
    """At most so many bytes of the host are under way, and the result is that of the whole."""
    w = np.random.default_rng(0).normal(size=(48, 128)).astype(np.float32)
    want = quant.quantize_nf4(w)
    sent, put = [], jax.device_put
    monkeypatch.setattr(quant, "PIECE_BYTES", rows * w[0].nbytes)
    monkeypatch.setattr(jax, "device_put", lambda x, **how: sent.append(x.nbytes) or put(x, **how))
    np.testing.assert_array_equal(quant.on_device(w), w)
    got = quant.quantize_nf4(w)
    for left, right in zip(got, want, strict=True):
        np.testing.assert_array_equal(left, right)
    assert max(sent) <= quant.PIECE_BYTES and sent.count(rows * w[0].nbytes) == 2 * -(-48 // rows)
