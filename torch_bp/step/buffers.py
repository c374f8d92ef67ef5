"""Memory of a captured step: one block, whose stretches are used again as soon as nobody reads them any more."""

from __future__ import annotations

from collections.abc import Mapping

import torch

ALIGNMENT = 64


class Arena:
    """Places in one block for memory of given sizes and lifetimes.

    Args:
        wanted: by a key, (bytes, first, last): the numbers of the first and the last call that use it.

    Attributes:
        offsets: by a key, where its stretch begins, in bytes.
        storage: the block.
        size: its bytes; `total` is what it would be with nothing used twice.

    Example:
        >>> arena = Arena({"a": (64, 0, 1), "b": (64, 1, 2), "c": (64, 2, 3)})
        >>> arena.size, arena.total, arena.offsets["a"] == arena.offsets["c"]
        (128, 192, True)
    """

    def __init__(self, wanted: Mapping[int, tuple[int, int, int]]) -> None:
        self.offsets: dict[int, int] = {}
        placed: list[tuple[int, int, int, int]] = []  # start, end, first, last
        self.size = 0
        # the largest first, each in the lowest place that is free while it lives
        for key, (size, first, last) in sorted(wanted.items(), key=lambda item: -item[1][0]):
            size = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
            start = 0
            for other, end, begins, ends in sorted(placed):
                if ends < first or begins > last:
                    continue
                if other >= start + size:
                    break
                start = max(start, end)
            placed.append((start, start + size, first, last))
            self.offsets[key] = start
            self.size = max(self.size, start + size)
        self.total = sum(-(-max(size, 1) // ALIGNMENT) * ALIGNMENT for size, *_ in wanted.values())
        self.storage = torch.empty(max(self.size, 1), dtype=torch.uint8, device="cpu").untyped_storage()
