"""The bytes of GGML's blocks from their scales and levels (ggml-common.h), for NumPy and JAX arrays alike.

B blocks; d, dmin float16 [B]; scales, minima uint8 [B, groups]; q the levels, uint8, counted from 0, in the order of
the weights: [B, …] with 32 or 256 of them. Every function returns uint8 [B, bytes of a block].
"""


def store(*parts):
    """Join the parts of a layout: float16 [B] or integers [B, …]."""
    join = parts[0].__array_namespace__().concat
    return join([part.reshape(part.shape[0], -1).view("uint8") for part in parts], axis=1)


def nibbles(q):
    """uint8 [..., 2, n] -> [..., n]: two halves of a run share its bytes, the first one low."""
    return (q[..., 0, :] & 15) | (q[..., 1, :] << 4)


def _crumbs(q):
    """uint8 [..., 4, n] -> [..., n]: the 2 low bits of the four quarters of a run, the first one lowest."""
    low = q & 3
    return low[..., 0, :] | (low[..., 1, :] << 2) | (low[..., 2, :] << 4) | (low[..., 3, :] << 6)


def _bit_planes(bits):
    """0 or 1 [B, 256] -> uint8 [B, 32]: bit g of byte j belongs to element j of the g-th run of 32."""
    return bits.__array_namespace__().packbits(bits.reshape(-1, 8, 32), axis=1, bitorder="little")[:, 0]


def _six_bits(scales, minima):
    """Eight 6-bit scales and minima in 12 bytes: the last four give their high bits to the first four."""
    high_scales, high_minima = scales[:, 4:] >> 4 << 6, minima[:, 4:] >> 4 << 6
    mixed = (scales[:, 4:] & 15) | (minima[:, 4:] << 4)
    return store(scales[:, :4] | high_scales, minima[:, :4] | high_minima, mixed)


def q2_k(d, dmin, scales, minima, q):
    return store(scales | (minima << 4), _crumbs(q.reshape(-1, 2, 4, 32)), d, dmin)


def q3_k(d, scales, q):
    """scales count from 0 to 63, standing for -32 … 31."""
    packed = store(nibbles(scales.reshape(-1, 2, 8)), _crumbs((scales >> 4).reshape(-1, 4, 4)))
    return store(_bit_planes(q >> 2), _crumbs(q.reshape(-1, 2, 4, 32)), packed, d)


def q4_k(d, dmin, scales, minima, q):
    return store(d, dmin, _six_bits(scales, minima), nibbles(q.reshape(-1, 4, 2, 32)))


def q5_k(d, dmin, scales, minima, q):
    high = _bit_planes(q >> 4)
    return store(d, dmin, _six_bits(scales, minima), high, nibbles(q.reshape(-1, 4, 2, 32)))


def q6_k(d, scales, q):
    """scales int8; the nibbles pair quarter 0 with 2 and 1 with 3 of each 128 weights."""
    q = q.reshape(-1, 2, 4, 32)
    return store(nibbles(q.reshape(-1, 2, 2, 64)), _crumbs(q >> 4), scales, d)


def iq4_xs(d, scales, q):
    """scales count from 0 to 63, standing for -32 … 31."""
    low = nibbles(scales.reshape(-1, 4, 2, 1))
    return store(d, _crumbs((scales >> 4).reshape(-1, 2, 4, 1)), low, nibbles(q.reshape(-1, 8, 2, 16)))
