"""Which drafted tokens the target keeps. Pure tensors: B rows, N nodes, V tokens in the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..runtime import crossings
from .tree import DraftTree


@dataclass(frozen=True)
class Acceptance:
    """The path each row keeps.

    Args:
        path (`torch.LongTensor` of shape `(B, max_depth + 1)`): From the root to the last accepted node; 0 beyond.
        tokens (`torch.LongTensor` of shape `(B, max_depth + 1)`): The target's choice after each of them: the accepted
            drafted tokens, then the bonus token.
        lengths (`torch.LongTensor` of shape `(B,)`): Tokens gained, bonus included: valid entries of both.
    """

    path: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor

    def fetch(self) -> Callable[[], list[list[int]]]:
        """Send the tokens each row gained to the host, in one transfer; what is returned waits for them."""
        rows = crossings.fetch(torch.cat([self.lengths[:, None], self.tokens], dim=1))
        return lambda: [row[1 : row[0] + 1] for row in rows()]


def accept_greedy(tree: DraftTree, choices: torch.Tensor) -> Acceptance:  # choices: (B, N)
    """Walk from the root while the target's choice is a drafted child (method of EAGLE-2, arXiv 2406.16858).

    Args:
        tree (`DraftTree`): The drafted tree.
        choices (`torch.LongTensor` of shape `(B, N)`): The token the target chooses after each node.

    Returns:
        `Acceptance`
    """
    is_chosen = choices.gather(1, tree.parents) == tree.tokens
    is_chosen[:, 0].fill_(True)  # a number that is assigned would be copied to the device
    is_accepted = ~(tree.ancestors & ~is_chosen[:, None]).any(-1)
    last = torch.where(is_accepted, tree.depths, -1).argmax(-1)
    rows = torch.arange(last.shape[0], device=last.device)
    on_path = tree.ancestors[rows, last]
    levels = torch.arange(tree.max_depth + 1, device=last.device)
    path = (on_path[:, None] & (tree.depths[:, None] == levels[:, None])).int().argmax(-1)
    return Acceptance(path, choices.gather(1, path), tree.depths[rows, last] + 1)


def accept_sampled(
    tree: DraftTree, probabilities: torch.Tensor, generator: torch.Generator | None = None
) -> Acceptance:
    """Walk from the root, sampling the target's choice at every node.

    The usual rule tries the children one by one: accept child x with probability p(x), else set p(x) to 0 and
    renormalise, and draw the bonus token from what remains. As children are deterministic picks, child x is accepted
    with total probability p(x) and the bonus token is any other token x with probability p(x): the same as drawing x
    from p and asking whether it was drafted. The target's distribution is unchanged (arXiv 2211.17192).

    Args:
        tree (`DraftTree`): The drafted tree.
        probabilities (`torch.Tensor` of shape `(B, N, V)`): The target's distribution after each node, all logits
            processors applied.
        generator (`torch.Generator`, *optional*): Source of randomness.

    Returns:
        `Acceptance`
    """
    return accept_greedy(tree, sample(probabilities, generator))


def sample(probabilities: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw one token from each distribution: (..., V) -> (...)."""
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    return torch.multinomial(flat, num_samples=1, generator=generator).view(probabilities.shape[:-1])
