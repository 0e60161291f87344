"""Recurrences that write outer products into a decaying state, over a tree in closed form.

A node i with key k, value v and log decay g makes of its parent's state S, (D, E),

    e^g S + k v^T                                               (Mamba-2, arXiv 2405.21060)
    e^g S + k u^T,    u = beta (v - (e^g S)^T k)                (gated delta rule, arXiv 2412.06464)

and reads it with its query: q^T S. Let G be the sum of g along a path, the node's own included. By induction along the path

    S_i = e^(G_i) S_0 + sum of e^(G_i - G_j) k_j u_j^T  over all j on the path to i

so that what all nodes read is one masked product, as in attention; and the u of the delta rule, each of which needs those of
its ancestors, solve a triangular system, since parents come first. This is the chunk form of both papers with "is an ancestor"
in place of "comes before". Decays may differ by channel of the key (Kimi Delta Attention, arXiv 2510.26692).

B rows, N nodes, H heads, K of keys (each serves H / K heads in a row), D and E sizes of keys and values, C decays (1 or D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OuterProducts:
    """What every node of a tree writes: all that is needed to keep any path.

    Args:
        keys (`torch.Tensor` of shape `(B, K, N, D)`): The keys.
        values (`torch.Tensor` of shape `(B, H, N, E)`): The values, with what the delta rule takes off them.
        decays (`torch.Tensor` of shape `(B, H, N, C)`): Log decays summed along the path to each node, itself included.
    """

    keys: torch.Tensor
    values: torch.Tensor
    decays: torch.Tensor

    def after(self, state: torch.Tensor, path: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The state (B, H, D, E) behind the first `counts` (B,) nodes of `path` (B, P), from the one before the tree."""
        keys, values, decays = (_on_path(part, path) for part in (self.keys, self.values, self.decays))
        last = (counts - 1).clamp(min=0)[:, None, None, None].expand(-1, decays.shape[1], 1, decays.shape[3])
        total = decays.gather(2, last)
        is_kept = (torch.arange(path.shape[1], device=path.device) < counts[:, None])[:, None, :, None]
        weights = (total - decays).masked_fill(~is_kept, -torch.inf).exp()
        total = total.masked_fill((counts == 0)[:, None, None, None], 0).exp()
        keys = keys.repeat_interleave(values.shape[1] // keys.shape[1], dim=1)
        return torch.addcmul((keys * weights).mT @ values, state, total.mT)


def over_tree(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    log_decays: torch.Tensor,
    state: torch.Tensor,
    ancestors: torch.Tensor,
    betas: torch.Tensor | None = None,
) -> tuple[torch.Tensor, OuterProducts]:
    """What every node reads, (B, H, N, E), and writes.

    Args:
        queries, keys (`torch.Tensor` of shape `(B, K, N, D)`): Queries and keys.
        values (`torch.Tensor` of shape `(B, H, N, E)`): Values.
        log_decays (`torch.Tensor` of shape `(B, H, N, C)`): Each node's own log decay, at most 0.
        state (`torch.Tensor` of shape `(B, H, D, E)`): The state before the tree.
        ancestors (`torch.BoolTensor` of shape `(B, N, N)`): Which nodes lie on the path to each, itself included.
        betas (`torch.Tensor` of shape `(B, H, N)`, *optional*): How much of its own reading a node takes off its value; None
            where nothing is.
    """
    num_groups = keys.shape[1]
    decays = ancestors[:, None].to(log_decays.dtype) @ log_decays
    values, summed, before = (torch.unflatten(part, 1, (num_groups, -1)) for part in (values, decays, state))
    queries, keys = queries[:, :, None], keys[:, :, None]
    between = (summed[..., :, None, :] - summed[..., None, :, :]).masked_fill(
        ~ancestors[:, None, None, ..., None], -torch.inf
    )
    between, since_root = between.exp(), summed.exp()
    if betas is not None:
        betas = torch.unflatten(betas, 1, (num_groups, -1))[..., None]
        read = (keys * since_root) @ before
        system = betas * _decayed_product(keys, keys, between)
        values = torch.linalg.solve_triangular(system, betas * (values - read), upper=False, unitriangular=True)
    outputs = (queries * since_root) @ before + _decayed_product(queries, keys, between) @ values
    return outputs.flatten(1, 2), OuterProducts(keys[:, :, 0], values.flatten(1, 2), decays)


def _decayed_product(left: torch.Tensor, right: torch.Tensor, between: torch.Tensor) -> torch.Tensor:
    """`left` (..., N, D) times `right` (..., N, D), each pair and channel with its decay `between` (..., N, N, C)."""
    if between.shape[-1] == 1:
        return (left @ right.mT) * between[..., 0]
    return torch.einsum("...id,...jd,...ijd->...ij", left, right, between)


def _on_path(parts: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """Of `parts` (B, heads, N, size) those of the nodes `path` (B, P)."""
    index = path[:, None, :, None].expand(-1, parts.shape[1], -1, parts.shape[3])
    return parts.gather(2, index)
