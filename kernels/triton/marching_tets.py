"""Triton twin of csrc/marching_tets: the same words of 64 flags, the same ranks; csrc/marching_tets/marching_tets.h
says what they mean. A lane is a word, a vertex, a cube or a tet; programs that meet no surface leave at once."""

import triton
import triton.language as tl
from text3d_fast._triton.common import bits_below, popcount
from text3d_fast._triton.launch import LAUNCH, options, programs

WORDS = 8  # that a program packs
TRIANGLE_COUNTS = tl.constexpr(0x16696994)  # two bits a sign pattern
EDGE_STARTS, EDGE_ENDS = tl.constexpr(0x940), tl.constexpr(0xFB9)  # corners of a tet's edges 01 02 03 12 13 23


def _pack(*numbers):
    return sum(number << 3 * place for place, number in enumerate(numbers))


# The edges of a sign pattern's triangles and the corners of a cube's six tets, three bits each.
TRIANGLE_EDGES = tl.constexpr(tuple(_pack(*edges) for edges in (
    (), (1, 0, 2), (4, 0, 3), (1, 4, 2, 1, 3, 4), (3, 1, 5), (2, 3, 0, 2, 5, 3), (1, 4, 0, 1, 5, 4), (4, 2, 5), (4, 5,
    2), (4, 1, 0, 4, 5, 1), (3, 2, 0, 3, 5, 2), (1, 3, 5), (4, 1, 2, 4, 3, 1), (3, 0, 4), (2, 0, 1), (),
)))  # fmt: skip
TET_CORNERS = tl.constexpr(tuple(_pack(*corners) for corners in (
    (0, 6, 4, 7), (0, 4, 5, 7), (0, 2, 6, 7), (0, 3, 2, 7), (0, 5, 1, 7), (0, 1, 3, 7),
)))  # fmt: skip


@triton.jit
def _load_word(words, i, real):
    return tl.load(words + i, real, 0).to(tl.uint64, bitcast=True)


@triton.jit
def _bit(word, bit):
    """Bit number `bit` of each word, int32."""
    return ((word >> bit.to(tl.uint64)) & 1).to(tl.int32)


@triton.jit
def _triangle_edges(inside):
    edges = tl.zeros_like(inside)
    for pattern in tl.static_range(1, 15):
        edges = tl.where(inside == pattern, TRIANGLE_EDGES[pattern], edges)
    return edges


@triton.jit
def _pack_signs(sdf, bad, first, last, real):
    """Words of the signs of sdf[first[i] + lane], lanes below last[i] - first[i]; sets bad at NaN and infinity."""
    lane = tl.arange(0, 64)
    at = first[:, None] + lane[None, :]
    there = real[:, None] & (at < last[:, None])
    value = tl.load(sdf + at, there, 0.0)
    strange = there & ~(tl.abs(value) <= 3.4028234663852886e38)
    tl.store(bad + tl.zeros_like(at), tl.full(at.shape, 1, tl.int32), strange)
    return tl.sum((value > 0.0).to(tl.int64) << lane[None, :].to(tl.int64), 1)


@triton.jit
def kuhn_signs_kernel(sdf, signs, bad, count, words, nz, WORDS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    row = i // words
    first = row * (nz + 1)
    word = _pack_signs(sdf, bad, first + 64 * (i - row * words), first + nz + 1, i < count)
    tl.store(signs + i, word, i < count)


@triton.jit
def _corner_pair(signs, row, w, words, real):
    """The words of a row's signs and of those above them."""
    word = _load_word(signs, row * words + w, real)
    following = _load_word(signs, row * words + w + 1, real & (w + 1 < words))
    return word, (word >> 1) | (following << 63)


@triton.jit
def _corners(signs, x, y, w, real, nx, ny, words):
    """Bit z of corner c: the sign of that corner of the cube above (x, y, z). Rows beyond the grid repeat (x, y)."""
    row = x.to(tl.int64) * (ny + 1) + y
    right, up = tl.where(x < nx, ny + 1, 0), tl.where(y < ny, 1, 0)
    c0, c1 = _corner_pair(signs, row, w, words, real)
    c2, c3 = _corner_pair(signs, row + up, w, words, real)
    c4, c5 = _corner_pair(signs, row + right, w, words, real)
    c6, c7 = _corner_pair(signs, row + right + up, w, words, real)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def _crossings(corners, x, y, w, nx, ny, nz):
    """Bit z of word c - 1: the edge from (x, y, z) to corner c exists and its ends differ."""
    c0, c1, c2, c3, c4, c5, c6, c7 = corners
    cell = bits_below(nz - 64 * w)
    none = cell - cell
    in_x, in_y = x < nx, y < ny
    return (
        (c0 ^ c1) & cell, tl.where(in_y, c0 ^ c2, none), tl.where(in_y, (c0 ^ c3) & cell, none),
        tl.where(in_x, c0 ^ c4, none), tl.where(in_x, (c0 ^ c5) & cell, none), tl.where(in_x & in_y, c0 ^ c6, none),
        tl.where(in_x & in_y, (c0 ^ c7) & cell, none),
    )  # fmt: skip


@triton.jit
def _rank(crossing, below):
    rank = popcount(crossing[0] & below)
    for c in tl.static_range(1, 7):
        rank += popcount(crossing[c] & below)
    return rank


@triton.jit
def _flags(crossing, bit):
    flags = _bit(crossing[0], bit)
    for c in tl.static_range(1, 7):
        flags |= _bit(crossing[c], bit) << c
    return flags


@triton.jit
def _tet_words(a, b, c, d, cell):
    """Tets with one triangle, tets with two."""
    odd = a ^ b ^ c ^ d
    return odd & cell, ((a ^ b) | (a ^ c)) & ~odd & cell


@triton.jit
def _count_tets(corners, cell):
    """How many tets of the cubes of `cell` have one triangle, and how many two."""
    c0, c1, c2, c3, c4, c5, c6, c7 = corners
    one0, two0 = _tet_words(c0, c6, c4, c7, cell)
    one1, two1 = _tet_words(c0, c4, c5, c7, cell)
    one2, two2 = _tet_words(c0, c2, c6, c7, cell)
    one3, two3 = _tet_words(c0, c3, c2, c7, cell)
    one4, two4 = _tet_words(c0, c5, c1, c7, cell)
    one5, two5 = _tet_words(c0, c1, c3, c7, cell)
    ones = popcount(one0) + popcount(one1) + popcount(one2) + popcount(one3) + popcount(one4) + popcount(one5)
    twos = popcount(two0) + popcount(two1) + popcount(two2) + popcount(two3) + popcount(two4) + popcount(two5)
    return ones, twos


@triton.jit
def _place_of(i, words, ny):
    """x, y and word number of word i of all rows."""
    row = i // words
    x = row // (ny + 1)
    return x.to(tl.int32), (row - x * (ny + 1)).to(tl.int32), (i - row * words).to(tl.int32)


@triton.jit
def kuhn_count_kernel(signs, counts, count, words, nx, ny, nz, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < count
    x, y, w = _place_of(i, words, ny)
    corners = _corners(signs, x, y, w, real, nx, ny, words)
    cell = bits_below(nz - 64 * w)
    vertices = _rank(_crossings(corners, x, y, w, nx, ny, nz), ~(cell - cell))
    ones, twos = _count_tets(corners, tl.where((x < nx) & (y < ny), cell, cell - cell))
    tl.store(counts + 1 + i, vertices, real)
    tl.store(counts + (count + 1) + 1 + i, ones, real)
    tl.store(counts + (count + 1) + (count + 1) + 1 + i, twos, real)


@triton.jit
def _cross_edge(positions, sdf, vertices, a, b, to, real):
    """The zero of the linear function between two grid vertices, stored as vertex `to`."""
    sa, sb = tl.load(sdf + a, real, 1.0), tl.load(sdf + b, real, 0.0)
    t = sa / (sa - sb)
    for axis in tl.static_range(3):
        start = tl.load(positions + 3 * a + axis, real, 0.0)
        end = tl.load(positions + 3 * b + axis, real, 0.0)
        tl.store(vertices + 3 * to + axis, start + t * (end - start), real)


@triton.jit
def kuhn_vertices_kernel(positions, sdf, signs, offsets, vertices, count, words, nx, ny, nz, BLOCK: tl.constexpr):
    bits = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i, bit = bits >> 6, (bits & 63).to(tl.int32)
    real = i < count
    before = tl.load(offsets + i, real, 0)
    real = real & (before != tl.load(offsets + i + 1, real, 0))
    if tl.sum(real.to(tl.int32)) > 0:
        x, y, w = _place_of(i, words, ny)
        crossing = _crossings(_corners(signs, x, y, w, real, nx, ny, words), x, y, w, nx, ny, nz)
        flags = tl.where(real, _flags(crossing, bit), 0)
        vertex = (x.to(tl.int64) * (ny + 1) + y) * (nz + 1) + 64 * w + bit
        to = before.to(tl.int64) + _rank(crossing, bits_below(bit))
        for c in range(1, 8):
            here = (flags >> (c - 1) & 1) != 0
            step = ((c >> 2) * (ny + 1) + (c >> 1 & 1)) * (nz + 1) + (c & 1)
            _cross_edge(positions, sdf, vertices, vertex, vertex + step, to, here)
            to += here.to(tl.int64)


@triton.jit
def _edge_id(signs, offsets, x, y, z, c, real, words, nx, ny, nz):
    """The id of the vertex on the edge from grid vertex (x, y, z) to its corner c, one for each lane."""
    w, bit = z >> 6, z & 63
    crossing = _crossings(_corners(signs, x, y, w, real, nx, ny, words), x, y, w, nx, ny, nz)
    own = _flags(crossing, bit).to(tl.uint64) & bits_below(c - 1)
    word = (x.to(tl.int64) * (ny + 1) + y) * words + w
    return tl.load(offsets + word, real, 0) + _rank(crossing, bits_below(bit)) + popcount(own)


@triton.jit
def kuhn_faces_kernel(signs, offsets, faces, count, words, nx, ny, nz, BLOCK: tl.constexpr):
    bits = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i, bit = bits >> 6, (bits & 63).to(tl.int32)
    real = i < count
    ones, twos = offsets + (count + 1), offsets + (count + 1) + (count + 1)
    one, two = tl.load(ones + i, real, 0), tl.load(twos + i, real, 0)
    real = real & ((one != tl.load(ones + i + 1, real, 0)) | (two != tl.load(twos + i + 1, real, 0)))
    if tl.sum(real.to(tl.int32)) > 0:
        x, y, w = _place_of(i, words, ny)
        corners = _corners(signs, x, y, w, real, nx, ny, words)
        cube = _bit(corners[0], bit)
        for c in tl.static_range(1, 8):
            cube |= _bit(corners[c], bit) << c
        own_ones, own_twos = _count_tets(corners, bits_below(bit))
        place_one = one.to(tl.int64) + own_ones
        place_two = tl.load(ones + count).to(tl.int64) + 2 * (two.to(tl.int64) + own_twos)
        real = real & (64 * w + bit < nz) & (cube != 0) & (cube != 255)
        for tet in range(6):
            packed = tet * 0 + TET_CORNERS[0]
            for k in tl.static_range(1, 6):
                packed = tl.where(tet == k, TET_CORNERS[k], packed)
            inside = (cube & 1) | (cube >> (packed >> 3 & 7) & 1) << 1 | (cube >> (packed >> 6 & 7) & 1) << 2
            inside |= (cube >> 7) << 3
            triangles = tl.where(real, (TRIANGLE_COUNTS >> (2 * inside)) & 3, 0)
            edges = _triangle_edges(inside)
            face = tl.where(triangles == 1, place_one, place_two)
            for corner in range(3 * tl.max(triangles)):
                edge = edges >> (3 * corner) & 7
                a = packed >> (3 * (EDGE_STARTS >> (2 * edge) & 3)) & 7
                b = packed >> (3 * (EDGE_ENDS >> (2 * edge) & 3)) & 7
                low, wanted = tl.minimum(a, b), corner < 3 * triangles
                vertex = _edge_id(signs, offsets, x + (low >> 2), y + (low >> 1 & 1), 64 * w + bit + (low & 1),
                                  tl.where(wanted, a ^ b, 1), wanted, words, nx, ny, nz)  # fmt: skip
                tl.store(faces + 3 * face + corner, vertex, wanted)
            place_one += triangles & 1
            place_two += triangles & 2


@triton.jit
def _edge_gradient(grad_vertices, positions, sdf, row, a, b, to_high, real, gx, gy, gz, gs):
    """Adds what vertex `row` on edge (a, b) passes to its end a, or to b on lanes of to_high."""
    sa, sb = tl.load(sdf + a, real, 1.0), tl.load(sdf + b, real, 0.0)
    difference = sa - sb
    t = sa / difference
    share = tl.where(to_high, t, 1.0 - t)
    x, y = tl.load(grad_vertices + 3 * row, real, 0.0), tl.load(grad_vertices + 3 * row + 1, real, 0.0)
    z = tl.load(grad_vertices + 3 * row + 2, real, 0.0)
    along = x * (tl.load(positions + 3 * b, real, 0.0) - tl.load(positions + 3 * a, real, 0.0))
    along += y * (tl.load(positions + 3 * b + 1, real, 0.0) - tl.load(positions + 3 * a + 1, real, 0.0))
    along += z * (tl.load(positions + 3 * b + 2, real, 0.0) - tl.load(positions + 3 * a + 2, real, 0.0))
    return gx + share * x, gy + share * y, gz + share * z, gs + along * share / difference


@triton.jit
def _store_gradient(grad_positions, grad_sdf, vertex, gx, gy, gz, gs, real, TO_POSITIONS: tl.constexpr):
    tl.store(grad_sdf + vertex, gs, real)
    if TO_POSITIONS:
        tl.store(grad_positions + 3 * vertex, gx, real)
        tl.store(grad_positions + 3 * vertex + 1, gy, real)
        tl.store(grad_positions + 3 * vertex + 2, gz, real)


@triton.jit
def kuhn_backward_kernel(grad_vertices, positions, sdf, signs, offsets, grad_positions, grad_sdf, count, words, nx, ny,
                         nz, TO_POSITIONS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """All that each grid vertex gets: from its edges to the corners above it, then from those below it."""
    vertex = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = vertex < count
    x, y, z = _place_of(vertex, nz + 1, ny)
    w, bit = z >> 6, z & 63
    row = x.to(tl.int64) * (ny + 1) + y
    crossing = _crossings(_corners(signs, x, y, w, real, nx, ny, words), x, y, w, nx, ny, nz)
    flags = tl.where(real, _flags(crossing, bit), 0)
    own = _bit(_load_word(signs, row * words + w, real), bit)
    # lower neighbours whose sign differs
    below = tl.zeros_like(flags)
    for c in tl.static_range(1, 8):
        lx, ly, lz = x - (c >> 2), y - (c >> 1 & 1), z - (c & 1)
        there = real & (lx >= 0) & (ly >= 0) & (lz >= 0)
        lower = _load_word(signs, (lx.to(tl.int64) * (ny + 1) + ly) * words + (lz >> 6), there)
        below |= tl.where(there & (_bit(lower, lz & 63) != own), 1 << c, 0)
    if tl.max(flags | below) > 0:
        gx = tl.zeros((BLOCK,), tl.float32)
        gy, gz, gs = gx, gx, gx
        to = tl.load(offsets + row * words + w, flags != 0, 0).to(tl.int64) + _rank(crossing, bits_below(bit))
        for k in range(1, 8):
            here = (flags >> (k - 1) & 1) != 0
            step = ((k >> 2) * (ny + 1) + (k >> 1 & 1)) * (nz + 1) + (k & 1)
            gx, gy, gz, gs = _edge_gradient(grad_vertices, positions, sdf, to, vertex, vertex + step, here & ~here,
                                            here, gx, gy, gz, gs)  # fmt: skip
            to += here.to(tl.int64)
        for k in range(1, 8):
            here = (below >> k & 1) != 0
            lx, ly, lz = x - (k >> 2), y - (k >> 1 & 1), z - (k & 1)
            number = tl.zeros_like(lx) + k
            row_of = _edge_id(signs, offsets, tl.maximum(lx, 0), tl.maximum(ly, 0), tl.maximum(lz, 0), number, here,
                              words, nx, ny, nz)  # fmt: skip
            step = ((k >> 2) * (ny + 1) + (k >> 1 & 1)) * (nz + 1) + (k & 1)
            gx, gy, gz, gs = _edge_gradient(grad_vertices, positions, sdf, row_of.to(tl.int64), vertex - step, vertex,
                                            here, here, gx, gy, gz, gs)  # fmt: skip
        _store_gradient(grad_positions, grad_sdf, vertex, gx, gy, gz, gs, (flags | below) != 0, TO_POSITIONS)


@triton.jit
def signs_kernel(sdf, signs, bad, num_vertices, WORDS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    word = _pack_signs(sdf, bad, 64 * i, tl.zeros_like(i) + num_vertices, 64 * i < num_vertices)
    tl.store(signs + i, word, 64 * i < num_vertices)


@triton.jit
def _sign(signs, vertex, real):
    return _bit(_load_word(signs, vertex.to(tl.int64) >> 6, real), (vertex & 63).to(tl.int32))


@triton.jit
def _case(signs, tets, t, real):
    """The sign pattern of each tet."""
    inside = _sign(signs, tl.load(tets + 4 * t, real, 0), real)
    for k in tl.static_range(1, 4):
        inside |= _sign(signs, tl.load(tets + 4 * t + k, real, 0), real) << k
    return inside


@triton.jit
def _store_flags(words, counts, i, flags, real):
    """Flags [words, 64] as words and as their numbers, one place further, behind a zero."""
    lane = tl.arange(0, 64)[None, :].to(tl.int64)
    tl.store(words + i, tl.sum(flags.to(tl.int64) << lane, 1), real)
    tl.store(counts + 1 + i, tl.sum(flags, 1), real)


@triton.jit
def edges_kernel(edges, signs, crossing, edge_counts, num_edges, WORDS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    e = 64 * i[:, None] + tl.arange(0, 64)[None, :]
    real = e < num_edges
    low, high = tl.load(edges + 2 * e, real, 0), tl.load(edges + 2 * e + 1, real, 0)
    differ = _sign(signs, low, real) ^ _sign(signs, high, real)
    _store_flags(crossing, edge_counts, i, differ, 64 * i < num_edges)


@triton.jit
def tets_kernel(tets, signs, triangles, tet_counts, num_tets, words, WORDS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    t = 64 * i[:, None] + tl.arange(0, 64)[None, :]
    real = t < num_tets
    count = tl.where(real, (TRIANGLE_COUNTS >> (2 * _case(signs, tets, t, real))) & 3, 0)
    _store_flags(triangles, tet_counts, i, count & 1, i < words)
    _store_flags(triangles + words, tet_counts + words + 1, i, count >> 1, i < words)


@triton.jit
def _ranked(words, offsets, i, real):
    """Whether flag i is set, and how many are before it."""
    word = _load_word(words, i >> 6, real)
    bit = (i & 63).to(tl.int32)
    return _bit(word, bit) != 0, tl.load(offsets + (i >> 6), real, 0) + popcount(word & bits_below(bit))


@triton.jit
def vertices_kernel(positions, sdf, edges, crossing, edge_offsets, vertices, num_edges, BLOCK: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    crosses, to = _ranked(crossing, edge_offsets, e, e < num_edges)
    if tl.sum(crosses.to(tl.int32)) > 0:
        low, high = tl.load(edges + 2 * e, crosses, 0).to(tl.int64), tl.load(edges + 2 * e + 1, crosses, 0).to(tl.int64)
        _cross_edge(positions, sdf, vertices, low, high, to.to(tl.int64), crosses)


@triton.jit
def faces_kernel(tets, tet_edges, signs, crossing, triangles, edge_offsets, tet_offsets, faces, num_tets, words,
                 BLOCK: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = t < num_tets
    has_one, one = _ranked(triangles, tet_offsets, t, real)
    has_two, two = _ranked(triangles + words, tet_offsets + words + 1, t, real)
    if tl.sum((has_one | has_two).to(tl.int32)) > 0:
        face = tl.where(has_one, one.to(tl.int64), tl.load(tet_offsets + words).to(tl.int64) + 2 * two)
        edges = _triangle_edges(_case(signs, tets, t, has_one | has_two))
        for corner in range(6):
            wanted = has_two | (has_one & (corner < 3))
            edge = tl.load(tet_edges + 6 * t + (edges >> (3 * corner) & 7), wanted, 0).to(tl.int64)
            _, vertex = _ranked(crossing, edge_offsets, edge, wanted)
            tl.store(faces + 3 * face + corner, vertex, wanted)


@triton.jit
def backward_kernel(grad_vertices, positions, sdf, edges, low_offsets, high_offsets, high_edges, crossing, edge_offsets,
                    grad_positions, grad_sdf, num_vertices, TO_POSITIONS: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    v = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = v < num_vertices
    low, high = tl.load(low_offsets + v, real, 0), tl.load(high_offsets + v, real, 0)
    lows, highs = tl.load(low_offsets + v + 1, real, 0) - low, tl.load(high_offsets + v + 1, real, 0) - high
    gx = tl.zeros((BLOCK,), tl.float32)
    gy, gz, gs = gx, gx, gx
    for k in range(tl.max(lows + highs)):
        there = k < lows + highs
        to_high = there & (k >= lows)
        listed = tl.load(high_edges + high + k - lows, to_high, 0)
        e = tl.where(to_high, listed, low + k).to(tl.int64)
        crosses, row = _ranked(crossing, edge_offsets, e, there)
        a, b = tl.load(edges + 2 * e, crosses, 0).to(tl.int64), tl.load(edges + 2 * e + 1, crosses, 0).to(tl.int64)
        gx, gy, gz, gs = _edge_gradient(grad_vertices, positions, sdf, row.to(tl.int64), a, b, to_high, crosses, gx, gy,
                                        gz, gs)  # fmt: skip
    _store_gradient(grad_positions, grad_sdf, v, gx, gy, gz, gs, real, TO_POSITIONS)


def _words(count):
    return (count + 63) // 64


def _run(kernel, count, block, *arguments):
    if count:
        kernel[(programs(count, block),)](*arguments, block, **options("marching_tets"))


def marching_tets_kuhn_flag(sdf, signs, counts, bad, nx, ny, nz):
    words = (nz + 64) // 64
    total = (nx + 1) * (ny + 1) * words
    _run(kuhn_signs_kernel, total, WORDS, sdf, signs, bad, total, words, nz)
    _run(kuhn_count_kernel, total, LAUNCH["marching_tets"].block, signs, counts, total, words, nx, ny, nz)


def marching_tets_kuhn_emit(positions, sdf, signs, offsets, vertices, faces, nx, ny, nz):
    words, block = (nz + 64) // 64, LAUNCH["marching_tets"].block
    total = (nx + 1) * (ny + 1) * words
    _run(kuhn_vertices_kernel, 64 * total, block, positions, sdf, signs, offsets, vertices, total, words, nx, ny, nz)
    _run(kuhn_faces_kernel, 64 * total, block, signs, offsets, faces, total, words, nx, ny, nz)


def marching_tets_kuhn_backward(grad_vertices, positions, sdf, signs, offsets, grad_positions, grad_sdf, nx, ny, nz):
    total = (nx + 1) * (ny + 1) * (nz + 1)
    _run(kuhn_backward_kernel, total, LAUNCH["marching_tets"].block, grad_vertices, positions, sdf, signs, offsets,
         sdf if grad_positions is None else grad_positions, grad_sdf, total, (nz + 64) // 64, nx, ny, nz,
         grad_positions is not None)


def marching_tets_flag(sdf, tets, edges, signs, crossing, triangles, edge_counts, tet_counts, bad, num_vertices,
                       num_tets, num_edges):
    _run(signs_kernel, _words(num_vertices), WORDS, sdf, signs, bad, num_vertices)
    _run(edges_kernel, _words(num_edges), WORDS, edges, signs, crossing, edge_counts, num_edges)
    _run(tets_kernel, _words(num_tets), WORDS, tets, signs, triangles, tet_counts, num_tets, _words(num_tets))


def marching_tets_emit(positions, sdf, tets, edges, tet_edges, signs, crossing, triangles, edge_offsets, tet_offsets,
                       vertices, faces, num_tets, num_edges):
    block = LAUNCH["marching_tets"].block
    _run(vertices_kernel, num_edges, block, positions, sdf, edges, crossing, edge_offsets, vertices, num_edges)
    _run(faces_kernel, num_tets, block, tets, tet_edges, signs, crossing, triangles, edge_offsets, tet_offsets, faces,
         num_tets, _words(num_tets))


def marching_tets_backward(grad_vertices, positions, sdf, edges, low_offsets, high_offsets, high_edges, crossing,
                           edge_offsets, grad_positions, grad_sdf, num_vertices):
    _run(backward_kernel, num_vertices, LAUNCH["marching_tets"].block, grad_vertices, positions, sdf, edges,
         low_offsets, high_offsets, high_edges, crossing, edge_offsets,
         sdf if grad_positions is None else grad_positions, grad_sdf, num_vertices, grad_positions is not None)


def compile_cases():
    """(kernel, signature, constants) for the ahead-of-time check."""
    types = dict.fromkeys(("positions", "sdf", "vertices", "grad_vertices", "grad_positions", "grad_sdf"), "*fp32")
    types |= dict.fromkeys(("signs", "crossing", "triangles"), "*i64")
    types |= dict.fromkeys(("count", "words", "nx", "ny", "nz", "num_vertices", "num_edges", "num_tets"), "i32")
    fixed = {"WORDS": WORDS, "BLOCK": LAUNCH["marching_tets"].block, "TO_POSITIONS": True}
    for kernel in (kuhn_signs_kernel, kuhn_count_kernel, kuhn_vertices_kernel, kuhn_faces_kernel, kuhn_backward_kernel,
                   signs_kernel, edges_kernel, tets_kernel, vertices_kernel, faces_kernel, backward_kernel):
        constants = {name: value for name, value in fixed.items() if name in kernel.arg_names}
        yield kernel, {n: "constexpr" if n in constants else types.get(n, "*i32") for n in kernel.arg_names}, constants
