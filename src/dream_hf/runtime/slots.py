"""Where the rows of a batch stand in key/value buffers.

A row's first slots hold verified tokens, one slot for each, in order; the slots after them are tentative. Rows may have
different numbers of verified slots: a row always writes right behind its own.

Compiled code must not read a number that changes from step to step, or it is compiled anew. It reads [`Pointers`] instead:
tensors that are written in place before a forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .counts import Counts
from .leases import Lease


@dataclass(frozen=True)
class Pointers:
    """Where rows stand, on one device, as compiled code sees it.

    Args:
        starts (`torch.LongTensor` of shape `(B,)`): The slot that each row writes next.
        end (`torch.LongTensor` of shape `()`): First slot that no row uses.
        moved_from, moved_to (`torch.LongTensor` of shape `(B, P)`): Slots to be moved before anything is written.
    """

    starts: torch.Tensor
    end: torch.Tensor
    moved_from: torch.Tensor
    moved_to: torch.Tensor


class Slots:
    """Where the rows of a batch stand, shared by the layers of a cache.

    Args:
        lengths (`Sequence[int]`): Verified slots of each row.
        limit (`int`, *optional*): Slots that will never be exceeded, so that buffers need not grow past it.
        path_size (`int`): Longest path that [`Slots.keep`] is ever given; 0 if none is.
        lease (`Lease`, *optional*): Where the buffers and pointers lie, which are fixed then: compiled code can use them.
        name (`str`): What tells these slots from others of the same lease.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        limit: int | None = None,
        path_size: int = 0,
        lease: Lease | None = None,
        name: str = "slots",
    ):
        self.limit, self.path_size = limit, path_size
        self.lease, self.name = lease, name
        self.tentative = 0  # slots after the verified ones that hold something, equal for all rows
        self._pointers: dict[torch.device, Pointers] = {}
        self.place(lengths)

    def place(self, lengths: Sequence[int]) -> None:
        """Set the verified slots of each row."""
        self.ahead: torch.Tensor | None = None  # (B,), what devices take for verified, too, and the host will hear of
        self.most_ahead = 0  # how much that may be
        self._counts = Counts.of(lengths)
        self.lengths = self._counts.numbers
        self.longest, self.shortest = max(self.lengths), min(self.lengths)
        for device, pointers in self._pointers.items():
            pointers.starts.copy_(self.tensor(device))
            pointers.end.fill_(self.longest)

    @property
    def reach(self) -> int:
        """First slot that no row's verified tokens can have got to."""
        return self.longest + self.most_ahead

    @property
    def end(self) -> int:
        """First slot that no row uses."""
        return self.reach + self.tentative

    def tensor(self, device: torch.device) -> torch.Tensor:
        """`lengths` on a device, (B,), and what is verified there already."""
        lengths = self._counts.on(device)
        return lengths if self.ahead is None else lengths + self.ahead.to(device)

    def extend(self, num_slots: int) -> None:
        """Take note of `num_slots` tentative slots written by a forward pass, in every layer."""
        self.tentative += num_slots
        for pointers in self._pointers.values():
            pointers.starts.add_(num_slots)

    def commit(self, counts: Sequence[int]) -> None:
        """Verify the first `counts` tentative slots of each row and take the others back."""
        self.rollback()
        if any(counts) or self.ahead is not None:
            self.place(self._counts.plus(Counts.of(counts)))

    def rollback(self) -> None:
        """Take all tentative slots back."""
        if self.tentative:
            self.tentative = 0
            for device, pointers in self._pointers.items():
                pointers.starts.copy_(self.tensor(device))

    def pointers(self, device: torch.device) -> Pointers:
        """The tensors for layers on a device; the same ones as long as they can be written."""
        if device not in self._pointers:
            self._pointers[device] = self._make_pointers(device)
        if self._pointers[device].starts.is_inference() and not torch.is_inference_mode_enabled():
            self._pointers[device] = self._make_pointers(device)
        return self._pointers[device]

    def keep(self, path: torch.Tensor) -> None:
        """Let the next forward move the tentative slots `path` (B, P) to the first P tentative slots.

        Paths are shorter than `path_size`, or as long; node 0, where they start, stays where it is.
        """
        missing = self.path_size - path.shape[1]
        for device, pointers in self._pointers.items():
            here = torch.nn.functional.pad(path.to(device), (0, missing))
            steps = torch.arange(path.shape[1], device=device)
            pointers.moved_from.copy_(pointers.starts[:, None] + here)
            pointers.moved_to.copy_(pointers.starts[:, None] + torch.nn.functional.pad(steps, (0, missing)))

    def go_ahead(self, path: torch.Tensor, counts: torch.Tensor) -> None:
        """Keep `path` (B, P), and let devices stand behind the first `counts` (B,) of it, until `commit` or `place`."""
        self.keep(path)
        self.ahead, self.most_ahead = counts, path.shape[1]
        for pointers in self._pointers.values():
            pointers.starts.add_(counts.to(pointers.starts.device))
            pointers.end.copy_(pointers.starts.max())

    def settle(self) -> None:
        """Take note that every layer has made its move."""
        for pointers in self._pointers.values():
            pointers.moved_from.copy_(pointers.moved_to)

    def _make_pointers(self, device: torch.device) -> Pointers:
        """Pointers that stand where the rows do, and move nothing."""
        assert self.lease is not None  # only what is fixed is pointed to
        lengths, num_rows = self.tensor(device), len(self.lengths)
        shapes = {
            "starts": (num_rows,),
            "end": (),
            "from": (num_rows, self.path_size),
            "to": (num_rows, self.path_size),
        }
        parts = [self.lease.buffer(f"{self.name}.{part}.{device}", lengths, shape) for part, shape in shapes.items()]
        starts, end, moved_from, moved_to = parts
        starts.copy_(lengths + self.tentative)
        end.fill_(self.longest)
        for moved in (moved_from, moved_to):
            moved.copy_(starts[:, None].expand_as(moved))
        return Pointers(starts, end, moved_from, moved_to)
