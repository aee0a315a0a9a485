"""The workers that train together, as the training loop sees them."""

from __future__ import annotations

import torch.distributed
from torch import Tensor


class Group:
    """One worker, alone."""

    rank = 0
    size = 1

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, written into `tensor`; no gradient flows through it."""
        return tensor


class ProcessGroup(Group):
    """The workers of the default group of `torch.distributed`, which must have been set up."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, written into `tensor`; no gradient flows through it."""
        torch.distributed.all_reduce(tensor)
        return tensor
