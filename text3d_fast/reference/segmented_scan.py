"""Running sums and products within segments in plain torch: the oracle for `ops.segmented_scan`."""

import torch


def segmented_scan(
    values: torch.Tensor, offsets: torch.Tensor, op: str, exclusive: bool, reverse: bool
) -> torch.Tensor:
    """Shapes and meaning as `ops.segmented_scan`; any floating dtype, differentiable any number of times.

    log2(longest segment) steps (Hillis and Steele 1986), each combines with the partial result a power of two before.
    One running sum over all segments would lose the digits of a segment among those before it, and a NaN would reach
    them all.
    """
    total = int(offsets[-1])  # what follows belongs to no segment
    beyond = values.new_zeros(values.shape[0] - total)
    values, counts = values[:total], offsets.diff()
    if reverse:
        values, counts = values.flip(0), counts.flip(0)
    begins = counts.long().cumsum(0) - counts
    position = torch.arange(total, device=values.device) - torch.repeat_interleave(begins, counts, output_size=total)
    longest = int(counts.max()) if len(counts) else 0
    nothing = 0.0 if op == "sum" else 1.0

    def shifted(x: torch.Tensor, by: int) -> torch.Tensor:
        return torch.where(position >= by, torch.cat([x.new_full((by,), nothing), x[:-by]]), nothing)

    if exclusive and total:
        values = shifted(values, 1)
    reach = 1
    while reach < longest:  # each of `values` is now that of the last `reach` ones
        before = shifted(values, reach)
        values = before + values if op == "sum" else before * values
        reach *= 2
    return torch.cat([values.flip(0) if reverse else values, beyond])
