"""PCG32 (O'Neill 2014), the generator that tiny-cuda-nn draws initial parameters from, many numbers at once."""

import numpy as np

_MULTIPLIER = 0x5851F42D4C957F2D
_MASK = (1 << 64) - 1


class PCG32:
    def __init__(self, seed: int, stream: int = 1) -> None:
        self.increment = (2 * stream + 1) & _MASK
        self.state = ((self.increment + seed) * _MULTIPLIER + self.increment) & _MASK

    def floats(self, count: int) -> np.ndarray:
        """The next numbers, float32 [count] in [0, 1) with 23 bits."""
        return ((self.bits(count) >> np.uint32(9)) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)

    def bits(self, count: int) -> np.ndarray:
        """The next numbers, uint32 [count]."""
        states = np.empty(count, np.uint64)
        states[:1] = self.state
        known, factor, plus = 1, _MULTIPLIER, self.increment
        while known < count:  # the states so far, `known` steps later
            more = min(known, count - known)
            states[known : known + more] = states[:more] * np.uint64(factor) + np.uint64(plus)
            factor, plus, known = factor * factor & _MASK, plus * (factor + 1) & _MASK, 2 * known
        if count:
            self.state = (int(states[-1]) * _MULTIPLIER + self.increment) & _MASK
        shifted = (((states >> np.uint64(18)) ^ states) >> np.uint64(27)).astype(np.uint32)
        turn = (states >> np.uint64(59)).astype(np.uint32)
        return (shifted >> turn) | (shifted << ((~turn + np.uint32(1)) & np.uint32(31)))
