"""The tables of dual marching cubes (Nielson 2004; Wenger 2013, section 2.5), derived for the 256 signs of a cube.

Corner k lies at (k & 1, k >> 1 & 1, k >> 2); bit k of a case: inside. A dual vertex stands for one loop of edges that
the surface crosses. On a face whose diagonals differ, loops go around the inside corners, and so separate them.
"""

import functools

EDGES = ((0, 1), (1, 5), (4, 5), (0, 4), (2, 3), (3, 7), (6, 7), (2, 6), (2, 0), (3, 1), (7, 5), (6, 4))
EDGE_AXES = (0, 2, 0, 2, 0, 2, 0, 2, 1, 1, 1, 1)
FACES = tuple(tuple(k for k in range(8) if k >> axis & 1 == side) for axis in range(3) for side in (0, 1))
UNUSED = -1


def _crossed(case: int, face: tuple[int, ...] = tuple(range(8))) -> list[int]:
    return [e for e, (a, b) in enumerate(EDGES) if a in face and b in face and (case >> a ^ case >> b) & 1]


def _loops(case: int) -> list[list[int]]:
    """Crossed edges by loop, ascending; loops by the first inside corner that they pass."""
    loop_of = {e: {e} for e in _crossed(case)}

    def join(a: int, b: int) -> None:
        merged = loop_of[a] | loop_of[b]
        loop_of.update(dict.fromkeys(merged, merged))

    for face in FACES:
        edges = _crossed(case, face)
        if len(edges) == 2:
            join(*edges)
        elif edges:
            for corner in face:
                if case >> corner & 1:
                    join(*(e for e in edges if corner in EDGES[e]))
    loops = {tuple(sorted(loop)) for loop in loop_of.values()}
    order = sorted(loops, key=lambda loop: (min(k for e in loop for k in EDGES[e] if case >> k & 1), loop))
    if case == 231:  # the one case that kaolin has the other way round
        order.reverse()
    return [list(loop) for loop in order]


@functools.cache
def loops() -> list[list[list[int]]]:
    """[256, 4, 7] edges of each dual vertex, padded with -1."""
    table = []
    for case in range(256):
        rows = [loop + [UNUSED] * (7 - len(loop)) for loop in _loops(case)]
        table.append(rows + [[UNUSED] * 7] * (4 - len(rows)))
    return table


@functools.cache
def flips() -> list[list[int]]:
    """[256, 4]: for a case with one ambiguous face and two outside corners on it (C16 and C19), the step to the cube
    behind that face and the case to take where that cube is of such a case too, as the two would make a surface that is
    no manifold (Shen et al. 2023, supplement 1.3); otherwise zeros."""
    table = []
    for case in range(256):
        ambiguous = [f for f, face in enumerate(FACES) if len(_crossed(case, face)) == 4]
        row = [0, 0, 0, 0]
        if len(ambiguous) == 1 and case.bit_count() >= 5:
            axis, side = divmod(ambiguous[0], 2)
            row[axis], row[3] = 2 * side - 1, 255 - case
        table.append(row)
    return table


@functools.cache
def edges_of_faces() -> list[list[int]]:
    """[256, 6]: an edge of the dual vertex that is next to a face with an inside edge; 12, the cube's centre, where all
    is inside; -1 if there is none."""
    table = []
    for case in range(256):
        rows, found = loops()[case], []
        for face in FACES:
            touching = [row for row in rows if any(e in row for e in _crossed(case, face))]
            only = rows[:1] if rows[0][0] != UNUSED and rows[1][0] == UNUSED else []
            found.append((touching or only or [[12 if case == 255 else UNUSED]])[0][0])
        table.append(found)
    return table
