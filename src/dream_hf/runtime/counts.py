"""Numbers of the rows of a batch that are wanted on the host and on a device, and cross over once at most."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Counts(Sequence[int]):
    """One number for each of B rows. A sequence of them on the host, a tensor wherever it is asked for.

    Args:
        numbers (`Sequence[int]`): The numbers.
        found (`torch.LongTensor` of shape `(B,)`, *optional*): The same numbers on the device where they were found.
    """

    def __init__(self, numbers: Sequence[int], found: torch.Tensor | None = None):
        self.numbers = list(numbers)
        self._tensors = {} if found is None else {found.device: found}

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Counts:
        """`numbers` as they are, if they are counts already."""
        return numbers if isinstance(numbers, Counts) else cls(numbers)

    def on(self, device: torch.device) -> torch.Tensor:
        """The numbers on a device, (B,), not to be written."""
        if device not in self._tensors:
            there = next(iter(self._tensors.values()), None)
            self._tensors[device] = torch.tensor(self.numbers, device=device) if there is None else there.to(device)
        return self._tensors[device]

    def plus(self, more: Counts) -> Counts:
        """The sums, which are on all devices where these numbers are."""
        total = Counts([number + other for number, other in zip(self.numbers, more.numbers, strict=True)])
        total._tensors = {device: tensor + more.on(device) for device, tensor in self._tensors.items()}
        return total

    def less(self, amount: int) -> Counts:
        """The same numbers less `amount`, none of them below 0."""
        if not amount:
            return self
        less = Counts([max(number - amount, 0) for number in self.numbers])
        less._tensors = {device: (tensor - amount).clamp(min=0) for device, tensor in self._tensors.items()}
        return less

    def __getitem__(self, row):  # type: ignore[override]
        return self.numbers[row]

    def __len__(self) -> int:
        return len(self.numbers)
