"""The exact discrete Gaussian as a Triton kernel: the same ChaCha20 words, tables and integers as on the CPU.

Layout and law are those of ``discrete_gaussian_scan.py`` and ``discrete_gaussian_layers.py``; every comparison is one of
integers, so the results are equal and not only close. A program makes one tile of 8,192 samples, layer after layer, top
first. Each sample is compared with every threshold of its table, and each slot of a group with all of the 128-bit ones,
whatever the values are; only a tile whose groups have more late samples than slots does more, as on the CPU.

Nothing here is an AES: without its instructions a kernel would look bytes up in tables, at addresses that depend on the key.
"""

import triton
import triton.language as tl

from dp_flash_attention.noise.discrete_gaussian_scan import OVERFLOW_BYTES, TILE, TILE_BYTES
from dp_flash_attention.noise.kernels.words import unit_words
from dp_flash_attention.noise.keystream import Domain

# A unit is 64 bytes. In a tile: 256 units of hot words, 16 of signs, 32 of slots.
_TILE_UNITS = tl.constexpr(TILE_BYTES // 64)
_SIGN_UNIT = tl.constexpr(2 * TILE // 64)
_SLOT_UNIT = tl.constexpr((2 * TILE + TILE // 8) // 64)
_OVERFLOW_UNITS = tl.constexpr(OVERFLOW_BYTES // 64)
_WORDS = tl.constexpr(int(Domain.DISCRETE_GAUSSIAN))
_OVERFLOW = tl.constexpr(int(Domain.DISCRETE_GAUSSIAN_OVERFLOW))
_CIPHER = tl.constexpr("chacha20")

_KEY = ["k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "stream"]
_NEVER_SPECIALISED = [*_KEY, "num_layers", "num_hot", "num_rest", "multiplier"]


@triton.jit
def _units(key, first, stream, NUM: tl.constexpr, DOMAIN: tl.constexpr):
    """Returns the words of ``NUM`` units from ``first`` on, uint32 [NUM, 2, 2, 2, 2]."""
    unit = first + tl.arange(0, NUM).to(tl.uint64)
    return unit_words(key, unit, stream, 0, DOMAIN, _CIPHER)


@triton.jit
def _pairs(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the first and the second uint64 of each 16 bytes, [ROWS, COLUMNS] each."""
    low, high = tl.split(tl.reshape(words, [ROWS, COLUMNS, 2, 2]))
    return tl.split(low.to(tl.uint64) | (high.to(tl.uint64) << 32))


@triton.jit
def _search(relative, first, second, rest, num_rest):
    """Returns how many thresholds the numbers relative·2^112 + v reach; v is what 16 bytes of a slot stand for."""
    high = (relative.to(tl.uint64) << 48) | (second >> 16)
    count = relative * 0
    for index in range(num_rest):
        threshold_high = tl.load(rest + 2 * index).to(tl.uint64, bitcast=True)
        threshold_low = tl.load(rest + 2 * index + 1).to(tl.uint64, bitcast=True)
        reached = (high > threshold_high) | ((high == threshold_high) & (first >= threshold_low))
        count += reached.to(tl.int32)
    return count


@triton.jit
def _layer_samples(key, part, stream, hot, rest, direct, num_hot, num_rest):
    """Returns one tile of one layer's samples, int32 [128 members, 64 groups]; sample i lies at [i // 64, i % 64]."""
    unit = part * _TILE_UNITS
    pairs = _units(key, unit, stream, 256, _WORDS)
    word = tl.reshape(tl.join(pairs & 0xFFFF, pairs >> 16), [128, 64]).to(tl.int32)
    value = word * 0
    for index in range(num_hot):
        value += (word >= tl.load(hot + index)).to(tl.int32)

    late = word >= direct
    member = tl.arange(0, 128)[:, None]
    last = tl.max(tl.where(late, member, -1), axis=0)
    first = tl.min(tl.where(late, member, 128), axis=0)
    is_last = member == last[None, :]
    is_first = (member == first[None, :]) & (first < last)[None, :]
    served = tl.sum((last >= 0).to(tl.int32), axis=0) + tl.sum((first < last).to(tl.int32), axis=0)
    relative_last = tl.sum(tl.where(is_last, word - direct, 0), axis=0)
    relative_first = tl.sum(tl.where(is_first, word - direct, 0), axis=0)
    slot_first, slot_second = _pairs(_units(key, unit + _SLOT_UNIT, stream, 32, _WORDS), 2, 64)
    of_last, of_first = tl.split(
        _search(
            tl.join(relative_last, relative_first),
            tl.trans(slot_first),
            tl.trans(slot_second),
            rest,
            num_rest,
        )
    )
    many = tl.sum(tl.sum(late.to(tl.int32), axis=0), axis=0) > served
    if many:
        # In eight pieces of 16 members, each of as many units as the hot words have.
        relative = tl.where(late, word - direct, 0)
        piece_of = tl.arange(0, 128)[:, None] >> 4
        for piece in range(8):
            words = _units(key, part * _OVERFLOW_UNITS + piece * 256, stream, 256, _OVERFLOW)
            own_first, own_second = _pairs(words, 16, 64)
            here = late & (piece_of == piece)
            all_first = tl.reshape(tl.broadcast_to(own_first[None, :, :], [8, 16, 64]), [128, 64])
            all_second = tl.reshape(tl.broadcast_to(own_second[None, :, :], [8, 16, 64]), [128, 64])
            value = tl.where(here, _search(relative, all_first, all_second, rest, num_rest), value)
    else:
        value = tl.where(is_last, of_last[None, :], value)
        value = tl.where(is_first, of_first[None, :], value)

    signs = tl.reshape(_units(key, unit + _SIGN_UNIT, stream, 16, _WORDS), [256, 1])
    negative = tl.reshape((signs >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1, [128, 64])
    return tl.where(negative != 0, -value, value)


@triton.jit(
    do_not_specialize=_NEVER_SPECIALISED
)  # a variant for each key or table would be compiled otherwise
def write_discrete_gaussian_kernel(
    out,
    total,
    hot,
    rest,
    direct,
    num_layers,
    num_hot,
    num_rest,
    multiplier,
    k0: tl.uint32,
    k1: tl.uint32,
    k2: tl.uint32,
    k3: tl.uint32,
    k4: tl.uint32,
    k5: tl.uint32,
    k6: tl.uint32,
    k7: tl.uint32,
    stream: tl.uint32,
    ADD: tl.constexpr,
):
    """Fills ``out`` (int64, contiguous, ``total`` numbers) with samples, or adds them modulo 2^64 if ``ADD``.

    Args:
        out: Where to.
        total: How many.
        hot: int32 [num_layers, num_hot], bottom layer first, filled up with 2^16.
        rest: uint64 [num_layers, num_rest, 2], high and low halves, filled up with 2^128 - 1.
        direct: int32 [num_layers].
        num_layers: Number of layers.
        num_hot: Most hot thresholds of a layer.
        num_rest: Most 128-bit thresholds of a layer.
        multiplier: k.
        k0: The step's key, eight words in all.
        k1: See k0.
        k2: See k0.
        k3: See k0.
        k4: See k0.
        k5: See k0.
        k6: See k0.
        k7: See k0.
        stream: Number of the stream.
        ADD: Whether to add.
    """
    # The interpreter ignores the annotations of the arguments; on a device these conversions do nothing.
    key = (
        k0.to(tl.uint32),
        k1.to(tl.uint32),
        k2.to(tl.uint32),
        k3.to(tl.uint32),
        k4.to(tl.uint32),
        k5.to(tl.uint32),
        k6.to(tl.uint32),
        k7.to(tl.uint32),
    )
    tile = tl.program_id(0).to(tl.int64)
    samples = tl.zeros([128, 64], dtype=tl.int64)
    for back in range(num_layers):
        layer = num_layers - 1 - back
        drawn = _layer_samples(
            key,
            (tile * num_layers + layer).to(tl.uint64),
            stream.to(tl.uint32),
            hot + layer * num_hot,
            rest + layer * num_rest * 2,
            tl.load(direct + layer),
            num_hot,
            num_rest,
        )
        samples = samples * multiplier + drawn
    index = tile * 8192 + tl.arange(0, 128)[:, None] * 64 + tl.arange(0, 64)[None, :]
    inside = index < total
    if ADD:
        samples += tl.load(out + index, mask=inside, other=0)
    tl.store(out + index, samples, mask=inside)
