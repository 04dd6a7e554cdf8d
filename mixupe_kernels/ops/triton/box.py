"""CutMix's box within a tile: which elements are inside, and which packs of each sample need be read.

A pack is what a thread loads at once. Its line and column are worked out once, and what its elements are is a number of as
many bits: two divisions, some twenty instructions, and then one for each element.
"""

import triton
import triton.language as tl


@triton.jit
def divide(values, reciprocal):
    """values // d of 0 ≤ values < 2^31 by the ``launch.reciprocal`` of d: a division proper takes some twenty instructions."""
    factor, shift = reciprocal.to(tl.uint32), (reciprocal >> 32).to(tl.uint32) - 64
    return (tl.umulhi(values.to(tl.uint32) * 2, factor) >> shift).to(tl.int32)


@triton.jit
def edges(box, size, everything, OFFSET: tl.constexpr):
    """Where the box begins and ends in a dimension of ``size``, both within it; ``everything``: 0 and ``size``."""
    first, last = tl.load(box + OFFSET), tl.load(box + OFFSET + 1)
    first = tl.where(everything | (first < 0), 0, tl.where(first < size, first.to(tl.int32), size))
    last = tl.where(last < 0, 0, tl.where(last < size, last.to(tl.int32), size))
    return first, tl.where(everything, size, last)


@triton.jit
def bits_of(line, column, top, bottom, left, right, VEC: tl.constexpr):
    """A bit for each of the VEC elements of a line from ``column`` on: 1 inside the box."""
    begin = tl.minimum(tl.maximum(left - column, 0), VEC)
    end = tl.where((line >= top) & (line < bottom), right - column, 0)
    end = tl.minimum(tl.maximum(end, begin), VEC)
    return (1 << end) - (1 << begin)


@triton.jit
def inside_box(
    box, everything, height, width, by_height, by_width, UNIT: tl.constexpr, VEC: tl.constexpr, WRAPS: tl.constexpr,
    IMAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which elements of a tile are inside CutMix's box, as the bits of the pack that each is in.

    Packs are VEC elements beside one another, whose line and column are worked out once. A line has ``width`` elements, UNIT a
    column; WRAPS: a pack may have a part in the next one, or in the first of the next image. IMAGE: the tile is of one
    image, otherwise of a sample, whose images have ``height`` lines each.
    """
    top, bottom = edges(box, height, everything, 0)
    left, right = edges(box, width // UNIT, everything, 2)
    left, right = left * UNIT, right * UNIT
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK // VEC) * VEC
    line = divide(place, by_width)
    column = place - line * width
    if not IMAGE:
        line -= divide(line, by_height) * height
    bits = bits_of(line, column, top, bottom, left, right, VEC)
    if WRAPS:
        line = tl.where(line == height - 1, 0, line + 1)
        bits |= bits_of(line, column - width, top, bottom, left, right, VEC)
    return tl.reshape(tl.broadcast_to(bits[:, None], (BLOCK // VEC, VEC)), (BLOCK,))


@triton.jit
def own_bit(bits, out, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Each element's bit of its pack's. A thread stores 16 bytes at a time, and shifts the bits of that many at once."""
    element = tl.arange(0, BLOCK) % VEC
    STORED: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth
    return ((bits >> (element // STORED * STORED)) >> (element % STORED)) & 1 != 0


@triton.jit
def read_at(source, needed, VEC: tl.constexpr, IN_ORDER: tl.constexpr, BLOCK: tl.constexpr):
    """Where to read: for what is not ``needed``, in the tile's first pack, which costs no traffic.

    Masks would leave it out as well. But they would be a predicate for each load, of which a thread has seven, and so
    few loads would be on their way at once.
    """
    source = tl.where(needed, source, tl.arange(0, BLOCK) % VEC)
    # Not every layout keeps a pack's elements together. ``needed`` is the same for all of them.
    return tl.max_contiguous(tl.multiple_of(source, VEC), VEC) if IN_ORDER else source
