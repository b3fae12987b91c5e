"""ChaCha20 and Philox4x64-10 as Triton device functions: the integers of ``secure.py`` and ``fast.py``.

A *unit* is 16 consecutive uint32 words of a position's stream, at word index 16·unit: one ChaCha20 block, or
two Philox blocks. Every lane of a program computes the unit it is asked for; nothing is read from memory, so
any kernel can produce the noise of the elements it holds.

The key is eight uint32 words, derived on the host (``DevicePosition``):
    chacha20    the step's 256-bit key; the step itself is not needed
    philox4x64  words 0..3 are (k0 low, k0 high, k1 low, k1 high), words 4..7 are unused
"""

import triton
import triton.language as tl


@triton.jit
def _quarter_round(a, b, c, d):
    # RFC 8439, section 2.1. Both shifts are of unsigned words; the compiler joins them into one rotation.
    a = a + b
    d = d ^ a
    d = (d << 16) | (d >> 16)
    c = c + d
    b = b ^ c
    b = (b << 12) | (b >> 20)
    a = a + b
    d = d ^ a
    d = (d << 8) | (d >> 24)
    c = c + d
    b = b ^ c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def chacha20_block(key, c12, c13, c14, c15):
    """Returns the 16 words of a ChaCha20 block (RFC 8439, section 2.3), each of ``c12``'s shape.

    Args:
        key: Tuple of eight uint32 scalars.
        c12: State word 12, uint32 of any shape: the block counter.
        c13: State word 13, uint32, as all that follow: scalar or of the same shape.
        c14: State word 14.
        c15: State word 15.
    """
    zero = c12 ^ c12
    i0, i1, i2, i3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    i4, i5, i6, i7 = zero + key[0], zero + key[1], zero + key[2], zero + key[3]
    i8, i9, i10, i11 = zero + key[4], zero + key[5], zero + key[6], zero + key[7]
    i12, i13, i14, i15 = c12, zero + c13, zero + c14, zero + c15
    x0, x1, x2, x3, x4, x5, x6, x7 = i0, i1, i2, i3, i4, i5, i6, i7
    x8, x9, x10, x11, x12, x13, x14, x15 = i8, i9, i10, i11, i12, i13, i14, i15
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    return (
        x0 + i0,
        x1 + i1,
        x2 + i2,
        x3 + i3,
        x4 + i4,
        x5 + i5,
        x6 + i6,
        x7 + i7,
        x8 + i8,
        x9 + i9,
        x10 + i10,
        x11 + i11,
        x12 + i12,
        x13 + i13,
        x14 + i14,
        x15 + i15,
    )


@triton.jit
def philox4x64_block(c0, c1, c2, c3, k0, k1):
    """Returns the four words of a Philox4x64-10 block (Salmon et al. 2011, section 3.3), of ``c0``'s shape.

    Args:
        c0: Counter word 0, uint64 of any shape.
        c1: Counter word 1, uint64, as all that follow: scalar or of the same shape.
        c2: Counter word 2.
        c3: Counter word 3.
        k0: Key word 0.
        k1: Key word 1.
    """
    zero = c0 ^ c0
    c1, c2, c3 = zero + c1, zero + c2, zero + c3
    k0, k1 = zero + k0, zero + k1
    multiplier0, multiplier1 = zero + 0xD2E7470EE14C6C93, zero + 0xCA5A826395121157
    for _ in range(10):
        high0, low0 = tl.umulhi(multiplier0, c0), multiplier0 * c0
        high1, low1 = tl.umulhi(multiplier1, c2), multiplier1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B97F4A7C15, k1 + 0xBB67AE8584CAA73B
    return c0, c1, c2, c3


@triton.jit
def _halves(word):
    return word.to(tl.uint32), (word >> 32).to(tl.uint32)


@triton.jit
def _join16(w):
    # Each join adds a last dimension of two that stays inside a thread, so no word moves between threads.
    x0, x1 = tl.join(w[0], w[8]), tl.join(w[1], w[9])
    x2, x3 = tl.join(w[2], w[10]), tl.join(w[3], w[11])
    x4, x5 = tl.join(w[4], w[12]), tl.join(w[5], w[13])
    x6, x7 = tl.join(w[6], w[14]), tl.join(w[7], w[15])
    y0, y1, y2, y3 = tl.join(x0, x4), tl.join(x1, x5), tl.join(x2, x6), tl.join(x3, x7)
    return tl.join(tl.join(y0, y2), tl.join(y1, y3))


@triton.jit
def unit_words(key, unit, stream, step, DOMAIN: tl.constexpr, CIPHER: tl.constexpr):
    """Returns the 16 words of each unit, uint32 [*unit.shape, 2, 2, 2, 2]; the last four dimensions count 0..15.

    Args:
        key: Tuple of eight uint32 scalars, see the module's docstring.
        unit: Index of the unit, uint64 of any shape.
        stream: Number of the stream, uint32.
        step: Logical step, uint64.
        DOMAIN: A ``keystream.Domain`` as an integer.
        CIPHER: ``"chacha20"`` or ``"philox4x64"``.
    """
    if CIPHER == "chacha20":
        low, high = _halves(unit)
        return _join16(chacha20_block(key, low, DOMAIN, stream, high))
    else:
        tl.static_assert(CIPHER == "philox4x64")
        k0 = key[0].to(tl.uint64) | (key[1].to(tl.uint64) << 32)
        k1 = key[2].to(tl.uint64) | (key[3].to(tl.uint64) << 32)
        zero = unit ^ unit
        where = zero + DOMAIN
        where = (where << 32) | stream.to(tl.uint64)
        # NumPy's bit generator increments before it produces a block, hence the 1 and the 2.
        a0, a1, a2, a3 = philox4x64_block(unit * 2 + 1, where, step, 0, k0, k1)
        b0, b1, b2, b3 = philox4x64_block(unit * 2 + 2, where, step, 0, k0, k1)
        w0, w1 = _halves(a0)
        w2, w3 = _halves(a1)
        w4, w5 = _halves(a2)
        w6, w7 = _halves(a3)
        w8, w9 = _halves(b0)
        w10, w11 = _halves(b1)
        w12, w13 = _halves(b2)
        w14, w15 = _halves(b3)
        return _join16((w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15))
