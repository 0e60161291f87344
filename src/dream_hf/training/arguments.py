"""`DreamTrainingArguments`: transformers' training arguments with the drafter's, and the paper's defaults."""

# ruff: noqa: RUF009 - `_argument` is `dataclasses.field`

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from ..drafters.dream.reading import VISUAL_IMPORTANCE

FeatureSelection = Literal["token", "sample", "static", "none"]
AcceptanceLoss = Literal["none", "tv", "nla"]
LossVocabulary = Literal["all", "draft"]
FeatureNormalization = Literal["none", "mid", "all"]


def _argument(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DreamTrainingArguments(TrainingArguments):
    r"""
    Arguments of a [`DreamTrainer`]: those of [`~transformers.TrainingArguments`] and the ones below, which
    [`~transformers.HfArgumentParser`] reads from the command line or from one YAML file.

    Losses (paper 3.2.1; each is averaged over the answer tokens of the global batch):
        final_feature_loss_weight (`float`, defaults to 0.2): Weight of smooth-L1 between final features.
        mid_feature_loss_weight (`float`, defaults to 0.2):
            Weight of smooth-L1 between what enters the drafter's final block and the selected feature of the target.
        kl_loss_weight (`float`, defaults to 1.0): Weight of KL(target || drafter).
        feature_normalization (`"none"`, `"mid"` or `"all"`, defaults to `"mid"`):
            Which feature losses compare features at root mean square 1. Intermediate features can be tens of times
            larger than final ones and would drown the other losses; the published code compares them as they are
            (`"none"`).
        acceptance_loss (`"none"`, `"tv"` or `"nla"`, defaults to `"none"`):
            A loss on acceptance itself: total variation or negative log acceptance (beyond the paper).
        acceptance_loss_weight (`float`, defaults to 1.0): Its weight.

    Selection of the target's intermediate feature (paper 3.2):
        feature_selection (`"token"`, `"sample"`, `"static"` or `"none"`, defaults to `"token"`):
            The layer of least attention entropy for each token (published code) or each sample (paper), one given
            layer (the paper's baseline), or no intermediate loss at all.
        static_layer_index (`int`, *optional*): For `"static"`: the layer, 1 being the first layer's output.
        static_layer_depth (`float`, *optional*): For `"static"`: the layer as a share of the target's depth.
        candidate_depth (`float`, defaults to 0.4): For `"token"` and `"sample"`: candidates lie above this share of
        the
            target's depth, as in the published code.

    Inputs of the drafter:
        feature_noise (`float`, defaults to 0.2):
            Width of the uniform noise on the target's features, times 512 / sequence length (published code); 0 is
            none.
        visual_keep_ratio (`float`, *optional*):
            Share of the visual tokens that the drafter sees; by default `drafter.config.visual_keep_ratio`, as in
            decoding.
        visual_importance (`"attention"`, `"novelty"`, `"uniform"` or `"pool"`, *optional*):
            Which visual tokens are kept; by default `drafter.config.visual_importance`.
        rollout_steps (`int`, defaults to 1):
            Steps in which the drafter is trained on its own features of the step before, as it meets them in decoding
            (HASS, EAGLE-3); 1 is the paper's.
        rollout_decay (`float`, defaults to 0.8): Step k weighs `rollout_decay**k`.
        rollout_share (`float`, defaults to 1.0):
            Share of the answer positions below which the later steps are run, chosen anew for every batch and weighted so
            that the loss is the same on average. Deep rollouts (`rollout_steps` 16, say) need 0.1 to 0.2 to be cheap.

    What may be drafted:
        draft_vocab_size (`int`, *optional*):
            Draft only this many tokens, those that end answers and the most frequent of the training answers; by default
            what the drafter's config says.
        loss_vocabulary (`"all"` or `"draft"`, defaults to `"all"`):
            Over which tokens the target's and the drafter's distributions are compared. `"draft"` compares them over the
            tokens that may be drafted, each renormalised to these as in EAGLE-3: for a small target with a large vocabulary
            most of a step's time is spent on the others.

    Data:
        max_length (`int`, *optional*, defaults to 4096):
            Longest row in tokens, images included. Longer ones lose answer text or last turns, never part of an image.
        max_bad_rows (`int`, defaults to 100): Rows of a dataset that may be skipped because they cannot be used.
        feature_cache_dir (`str`, *optional*): Where to keep the target's features between epochs; by default nowhere.
        feature_cache_max_gb (`float`, defaults to 100.0): Most disk space that they may take.

    Stopping:
        early_stopping_patience (`int`, *optional*):
            Stop after this many evaluations without a better `metric_for_best_model`, and end with the best
            checkpoint.

    Defaults that differ from transformers': `learning_rate` 3e-5, `adam_beta2` 0.95, `max_grad_norm` 0.5,
    `per_device_train_batch_size` 4 (paper), `warmup_steps` 0.03 (a share of all steps, the paper's 2,000 of 68,000),
    `metric_for_best_model` `"eval_tau"`, `remove_unused_columns` `False`.

    Raises:
        ValueError: A value out of range, or values that contradict each other.
    """

    # -- losses
    final_feature_loss_weight: float = _argument(0.2, "Weight of smooth-L1 between final features.")
    mid_feature_loss_weight: float = _argument(0.2, "Weight of smooth-L1 on the selected intermediate feature.")
    kl_loss_weight: float = _argument(1.0, "Weight of KL(target || drafter).")
    feature_normalization: FeatureNormalization = _argument(
        "mid", "Feature losses that compare features at root mean square 1: none, mid or all."
    )
    acceptance_loss: AcceptanceLoss = _argument(
        "none", "A loss on acceptance itself: none, tv (total variation) or nla (negative log acceptance)."
    )
    acceptance_loss_weight: float = _argument(1.0, "Weight of `acceptance_loss`.")

    # -- selection of the intermediate feature
    feature_selection: FeatureSelection = _argument(
        "token", "Intermediate feature: least attention entropy per token or per sample, one static layer, or none."
    )
    static_layer_index: int | None = _argument(
        None, "Layer for feature_selection=static; 1 is the first layer's output."
    )
    static_layer_depth: float | None = _argument(None, "Layer for feature_selection=static, as a share of the depth.")
    candidate_depth: float = _argument(0.4, "Share of the target's depth, from below, that entropy selects from.")

    # -- inputs of the drafter
    feature_noise: float = _argument(0.2, "Width of the noise on the target's features, times 512 / sequence length.")
    visual_keep_ratio: float | None = _argument(
        None, "Share of the visual tokens that the drafter sees; by default that of its config, as in decoding."
    )
    visual_importance: str | None = _argument(
        None,
        "Which visual tokens are kept, by attention, novelty, uniform or pool; by default as the drafter's config says.",
    )
    rollout_steps: int = _argument(1, "Training steps fed with the drafter's own features; 1 is the paper's.")
    rollout_decay: float = _argument(0.8, "Step k of a rollout weighs rollout_decay**k.")
    rollout_share: float = _argument(1.0, "Share of the answer positions that rollouts start from, chosen at random.")

    # -- what may be drafted
    draft_vocab_size: int | None = _argument(
        None,
        "Draft only this many tokens, the most frequent of the training answers; by default what the drafter does.",
    )
    loss_vocabulary: LossVocabulary = _argument("all", "Tokens that distributions are compared over: all or draft.")

    # -- data
    max_length: int | None = _argument(4096, "Longest row in tokens, images included.")
    max_bad_rows: int = _argument(100, "Rows of a dataset that may be skipped because they cannot be used.")
    feature_cache_dir: str | None = _argument(None, "Where to keep the target's features between epochs.")
    feature_cache_max_gb: float = _argument(100.0, "Most disk space for `feature_cache_dir`, in GB.")

    # -- stopping
    early_stopping_patience: int | None = _argument(
        None, "Stop after this many evaluations without a better metric, and end with the best checkpoint."
    )

    # -- transformers' own, with the paper's values
    per_device_train_batch_size: int = _argument(4, "The batch size per device for training.")
    learning_rate: float = _argument(3e-5, "The initial learning rate for AdamW.")
    adam_beta2: float = _argument(0.95, "The second beta of AdamW.")
    warmup_steps: float = _argument(0.03, "Steps of linear warm-up, or a share of all steps when below 1.")
    max_grad_norm: float = _argument(0.5, "Maximum gradient norm; 0 disables clipping.")
    metric_for_best_model: str | None = _argument(
        "eval_tau", "Metric that says which checkpoint is best; of several evaluation sets, eval_NAME_tau."
    )
    greater_is_better: bool | None = _argument(None, "Whether higher is better; by default unless it ends in loss.")
    remove_unused_columns: bool = _argument(False, "Must stay off: a row's `messages` and `images` are not arguments.")

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_selection()
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns` (True) would remove `messages` and `images` from the rows; leave it off."
            )
        if self.early_stopping_patience is not None:
            if self.eval_strategy == "no":
                raise ValueError(
                    f"`early_stopping_patience` ({self.early_stopping_patience}) needs evaluations: set "
                    "`eval_strategy`, and `save_strategy` to the same, so that there is a best checkpoint to end with."
                )
            self.load_best_model_at_end = True
        super().__post_init__()

    def _check_ranges(self) -> None:
        self._require(0, math.inf, "final_feature_loss_weight", "mid_feature_loss_weight", "kl_loss_weight")
        self._require(0, math.inf, "acceptance_loss_weight", "feature_noise", "max_bad_rows")
        self._require(1, math.inf, "rollout_steps", "early_stopping_patience", "static_layer_index")
        self._require(2, math.inf, "max_length")
        self._require(1, math.inf, "draft_vocab_size")
        for name in ("static_layer_depth", "candidate_depth", "rollout_decay", "rollout_share"):
            self._require(0, 1, name, is_open_below=True)
        self._require(0, 1, "visual_keep_ratio")
        self._require(0, math.inf, "feature_cache_max_gb", is_open_below=True)
        weights = [self.final_feature_loss_weight, self.kl_loss_weight]
        weights += [self.mid_feature_loss_weight] * (self.feature_selection != "none")
        weights += [self.acceptance_loss_weight] * (self.acceptance_loss != "none")
        if not any(weights):
            raise ValueError(
                "All loss weights are 0, so there is nothing to learn; set `kl_loss_weight`, for instance."
            )

    def _require(self, low: float, high: float, *names: str, is_open_below: bool = False) -> None:
        """The arguments `names` lie between `low` and `high`, or are `None`."""
        for name in names:
            value = getattr(self, name)
            if value is None:
                continue
            is_above = low < value if is_open_below else low <= value
            if not (is_above and value <= high and math.isfinite(value)):
                lower = f"above {low}" if is_open_below else f"at least {low}"
                upper = f"at most {high}" if high < math.inf else "finite"
                raise ValueError(f"`{name}` ({value}) must be {lower} and {upper}.")

    def _check_selection(self) -> None:
        if self.visual_importance is not None and self.visual_importance not in VISUAL_IMPORTANCE:
            raise ValueError(
                f"`visual_importance` ({self.visual_importance!r}) must be one of {list(VISUAL_IMPORTANCE)}."
            )
        self._require_choice("feature_selection", FeatureSelection)
        self._require_choice("acceptance_loss", AcceptanceLoss)
        self._require_choice("loss_vocabulary", LossVocabulary)
        self._require_choice("feature_normalization", FeatureNormalization)
        given = [name for name in ("static_layer_index", "static_layer_depth") if getattr(self, name) is not None]
        if self.feature_selection == "static" and len(given) != 1:
            raise ValueError(
                "`feature_selection` ('static') needs exactly one of `static_layer_index` and `static_layer_depth`, "
                f"got {given or 'neither'}."
            )
        if self.feature_selection != "static" and given:
            raise ValueError(
                f"`{given[0]}` ({getattr(self, given[0])}) has no effect with `feature_selection` "
                f"({self.feature_selection!r}); set it to 'static' or leave `{given[0]}` out."
            )

    def _require_choice(self, name: str, choices: Any) -> None:
        if getattr(self, name) not in choices.__args__:
            raise ValueError(f"`{name}` ({getattr(self, name)!r}) must be one of {list(choices.__args__)}.")
