"""`EagleDrafter`: a published or trained EAGLE drafter, passed to `generate(assistant_model=...)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ...decoding.drafter import Drafter, Needs, Prefill
from ...decoding.settings import DraftSettings
from ...targets.target import Target
from ..fit import check_place, check_reading, check_weights, describe_target
from ..vocabulary import sorted_token_ids
from .configuration import EagleConfig
from .modeling import EagleModel
from .session import EagleSession


class EagleDrafter(EagleModel, Drafter):
    """A drafter of the EAGLE family (EAGLE-1, arXiv 2401.15077; EAGLE-2, arXiv 2406.16858; EAGLE-3, arXiv 2503.01840).

    So are MSD (arXiv 2505.14260) and ViSpec (arXiv 2509.15235): EAGLE-2 that reads pictures in its own way (`image_rows`). It
    reads the target's features of some layers and drafts on its own; embedding and head are its own or the target's. Its
    forwards are not compiled, whatever `compile` says; the target's are.
    """

    @classmethod
    def for_target(cls, target: PreTrainedModel, **config_overrides: Any) -> EagleDrafter:
        """A fresh, untrained EAGLE-3 drafter with the target's shapes, dtype and device, and a copy of its head.

        Args:
            target (`PreTrainedModel`): The model to draft for, vision-language or text-only.
            **config_overrides: Any argument of [`EagleConfig`].

        Returns:
            `EagleDrafter`: In evaluation mode.
        """
        drafter: Any = cls(EagleConfig.from_target(target.config, **config_overrides))
        head = Target(target).lm_head.weight
        own = None if drafter.lm_head is None else drafter.lm_head.weight
        if own is not None and own.shape == head.shape and head.dtype.is_floating_point:
            own.data.copy_(head)
        return drafter.to(device=target.device, dtype=target.dtype).eval()

    def set_draft_vocabulary(self, token_ids: Sequence[int] | torch.Tensor | None) -> None:
        """Draft these tokens only from now on; saved with the weights. A head of its own keeps their rows and no others.

        Args:
            token_ids (`Sequence[int]` or `torch.LongTensor` of shape `(R,)`, *optional*): The tokens, in any order; `None`
                for all tokens again, of which a head of its own has to have all rows still.

        Raises:
            ValueError: No whole numbers, none at all, repeats, or tokens that there is no row for.
        """
        ids = None if token_ids is None else sorted_token_ids(token_ids, self.config.vocab_size)
        if self.lm_head is not None and (ids is not None or self.draft_token_ids is not None):
            if self.lm_head.out_features != self.config.vocab_size:
                raise ValueError(
                    f"The drafter's head has {self.lm_head.out_features} rows of {self.config.vocab_size} tokens: `token_ids` "
                    "can be chosen once."
                )
            weight = self.lm_head.weight.data[ids]
            self.lm_head = nn.Linear(
                weight.shape[1], len(weight), bias=False, device=weight.device, dtype=weight.dtype
            )
            self.lm_head.weight.data.copy_(weight)
        self.draft_token_ids = None if ids is None else ids.to(self.device)
        self.config.draft_vocab_size = None if ids is None else len(ids)

    @property
    def settings(self) -> DraftSettings:
        """As its config says."""
        return DraftSettings.of(self.config)

    @property
    def needs(self) -> Needs:
        """The features of its layers; positions where it stands where the target does; pictures where it reads them."""
        num_layers = (self.config.target or {}).get("num_hidden_layers", 0)
        layers = self.config.layers_of(num_layers)
        return Needs(
            layers=layers,
            embeds=self.config.image_rows != "token",
            positions=self.config.mrope_section is not None,
        )

    def check(self, target: PreTrainedModel, settings: DraftSettings) -> None:
        """Refuse a target that this drafter was not made for, settings beyond its vocabulary, and damaged weights."""
        check_reading(self, describe_target(target.config))
        self.config.check_width(settings)
        check_weights(self)
        check_place(target, self)

    def start(self, prefill: Prefill, settings: DraftSettings) -> EagleSession:
        """Read a prompt with the target's features."""
        return EagleSession(self, prefill, settings)
