"""`DreamTrainer`: transformers' Trainer for drafters, with the target's features made inside the step."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import EarlyStoppingCallback, PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..data import ConversationCollator
from ..drafters.dream.configuration import DreamConfig
from ..drafters.dream.drafter import DreamDrafter
from ..drafters.eagle.drafter import EagleDrafter
from ..drafters.levels import TargetHead
from ..drafters.paired_session import embed_from
from ..hub.model_card import write_adapter_card, write_card
from ..targets.target import Target, end_ids, unwrap
from .acceptance_metrics import AcceptanceCounts, count_chain_hits, replay_decoding
from .arguments import DreamTrainingArguments
from .atomic_checkpoints import WholeCheckpointTrainer
from .feature_cache import FeatureCache, collate_rows, to_batch, to_row
from .logged_means import LoggedMeans
from .objective import Objective, add_noise
from .rows import probe_rows, read_rows
from .setup import (
    check_best_metric,
    check_models,
    check_vocabulary_request,
    choose_vocabulary,
    describe_features,
    freeze,
    make_objective,
    make_selection,
    prepare_drafter,
    whole_weight,
)
from .target_features import DrafterBatch, FeatureExtractor, predictions
from .ways import Logits, way_of

logger = logging.get_logger(__name__)


class DreamTrainer(WholeCheckpointTrainer):
    """
    Train a drafter for a frozen target (DREAM, arXiv 2505.19201, section 3.2; EAGLE-3, arXiv 2503.01840).

    Every step runs the target once over the conversations, without gradients, and trains the drafter on what it makes of
    the answers; no features are stored. Everything else is transformers' [`~transformers.Trainer`].

    Args:
        model (`DreamDrafter` or `EagleDrafter`): The drafter; in half precision it is trained in float32, use
            `bf16=True` for mixed precision.
        target (`PreTrainedModel`): The target. It is put into evaluation mode and frozen, never saved and never wrapped;
            it may be quantised or lie on several devices.
        args (`DreamTrainingArguments`): The training arguments.
        train_dataset, eval_dataset: Rows of `messages` and `images`, a file or a Hub id; see [`ConversationDataset`].
            Answers should be the target's own (`dream-hf regenerate`). `train_dataset` may be a stream
            (`load_dataset(..., streaming=True)`) if `max_steps` is set; `eval_dataset` may be a dictionary of several, whose
            metrics are then `eval_NAME_tau` and so on.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The target's own, with its chat template.
        peft_config (`PeftConfig`, *optional*): Train adapters of this kind instead of the drafter's own weights.
        kwargs: `callbacks`, `optimizers` and `optimizer_cls_and_kwargs` as for [`~transformers.Trainer`].

    Raises:
        TypeError: A drafter or target that is none.
        ValueError: Data, a processor or a target that does not fit; before any work.
    """

    loss_is_scaled_for_ga = True
    accelerator: Any
    model: Any
    args: Any
    state: Any
    objective: Objective

    def __init__(
        self,
        model: DreamDrafter | EagleDrafter,
        *,
        target: PreTrainedModel,
        args: DreamTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = args or DreamTrainingArguments(output_dir="tmp_trainer")
        check_models(model, target)
        self.way = way_of(unwrap(model))
        check_vocabulary_request(model, args, train_dataset, peft_config)
        if processing_class is None:
            raise ValueError("`processing_class` is missing; pass the target's processor, with its chat template.")
        if train_dataset is None and eval_dataset is None:
            raise ValueError(
                "`train_dataset` is missing; pass rows with `messages`, and `images` where there are any."
            )
        check_best_metric(args, eval_dataset)
        args._n_gpu = min(args.n_gpu, 1)  # several devices are several processes: `accelerate launch`
        self.collator = ConversationCollator(processing_class, max_length=args.max_length)
        model = prepare_drafter(model, args, peft_config)
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collator,
            train_dataset=read_rows(train_dataset, "train_dataset", args),
            eval_dataset=read_rows(eval_dataset, "eval_dataset", args),
            processing_class=processing_class,
            **kwargs,
        )
        self.target = Target(freeze(target, args))
        self.objective = make_objective(args, self.way)
        config = self._config
        self.extractor = FeatureExtractor(
            self.target,
            make_selection(args, self.target, self.way),
            getattr(config, "visual_keep_ratio", 1.0),
            getattr(config, "visual_importance", "attention"),
            layers=self.way.layers(unwrap(model)),
            has_placeholders=self.way.reads_placeholders,
        )
        self.logged_means = LoggedMeans(args.device)
        self._num_batches = 0
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        for name, rows in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            probe_rows(rows, name, self.collator, self.target, config.vocab_size)
        if args.draft_vocab_size is not None:
            self._choose_vocabulary()

    # --- data ---

    def _choose_vocabulary(self) -> None:
        """Set what the drafter may draft, the same in every process."""

        def add_up(counts: Tensor) -> Tensor:
            return self.accelerator.reduce(counts.to(self.args.device), "sum").cpu()

        data: Any = self.train_dataset
        drafter: Any = unwrap(self.model)
        choose_vocabulary(drafter, self.target.model, self.processing_class, data, self.args, add_up)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of conversations, or of their features with `feature_cache_dir`."""
        if self.args.feature_cache_dir is None:
            return super().get_train_dataloader()
        conversations, collator = self.train_dataset, self.data_collator
        self.train_dataset, self.data_collator = self._cached_features(), collate_rows
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = conversations, collator

    def _cached_features(self) -> FeatureCache:
        """The features of all rows on disk, made where they are not there yet."""
        data: Any = self.train_dataset
        cache = FeatureCache(
            Path(self.args.feature_cache_dir),
            describe_features(self.extractor, self.processing_class, self.args.max_length, data),
            len(data),
            self.args.feature_cache_max_gb,
        )

        def make_row(index: int) -> Any:
            inputs = self._prepare_inputs(self.collator([data[index]]))
            return to_row(self.extractor.drafter_batch(inputs, inputs.pop("answer_mask")))

        make_row(0)  # from one forward the head learns its scaling, even where all features are there
        cache.build(make_row, self.args.process_index, self.args.world_size, self.accelerator.wait_for_everyone)
        return cache

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This process's share of the rows. Nothing is repeated to even shares out: rows would count twice."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            name = eval_dataset
            eval_dataset = self.eval_dataset if name is None else self.eval_dataset[name]  # type: ignore[index,call-overload]
        dataset: Dataset = read_rows(eval_dataset, "eval_dataset", self.args)
        if dataset is None:
            raise ValueError("`eval_dataset` is missing; pass it to the trainer or to `evaluate`.")
        share = range(self.args.process_index, len(dataset), self.args.world_size)  # type: ignore[arg-type]
        return DataLoader(
            Subset(dataset, share),
            batch_size=self.args.eval_batch_size,
            collate_fn=self.collator,
            num_workers=self.args.dataloader_num_workers,
        )

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"):
        """Losses, per-depth acceptance and simulated tau (bonus included) on rows; see [`~transformers.Trainer`]."""
        if not isinstance(eval_dataset, str):
            eval_dataset = read_rows(eval_dataset, "eval_dataset", self.args)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Predictions of one optimizer step, all accumulated batches of all processes together."""
        count = sum(self._predictions(batch).sum().to(device) for batch in batch_samples)
        count = torch.as_tensor(count, device=device)
        return self.accelerator.reduce(count, reduction="sum").clamp(min=1)

    def _predictions(self, batch: dict[str, Tensor]) -> Tensor:
        if "predicts" in batch:
            return batch["predicts"]
        return predictions(batch["answer_mask"], self.target.is_visual(batch["input_ids"]))

    # --- the step ---

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective over this batch, as its share of the global batch's mean over answer tokens."""
        batch = self._drafter_batch(inputs).to(self.args.device)
        lengths = (batch.text.positions.gather(1, batch.text.counts[:, None] - 1) + 1)[:, 0]
        features = batch.text.features.to(next(model.parameters()).dtype)
        generator = self._generator(features.device)
        features = add_noise(features, lengths, self.args.feature_noise, generator)
        head, own_head = self._loss_logits(model)
        value = self.objective(model, batch, features, head, generator, own_head)
        self.logged_means.add(value, batch, self.target.is_visual(batch.token_ids))
        num_items = batch.predicts.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        # Processes average their gradients, and what is wanted is the sum.
        loss = value.total / num_items * self.accelerator.num_processes
        return (loss, value) if return_outputs else loss

    def _drafter_batch(self, inputs: dict[str, Any]) -> DrafterBatch:
        """What the drafter reads, from the target or from the cache."""
        if "predicts" in inputs:
            return to_batch(inputs)
        inputs = dict(inputs)
        answer_mask = inputs.pop("answer_mask")
        return self.extractor.drafter_batch(inputs, answer_mask)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward; a loss that is no number ends the run before it reaches the weights."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._num_batches += 1
        if not torch.isfinite(loss):
            raise ValueError(
                f"The loss became {loss.item()} in step {self.state.global_step + 1}. The weights of the step before are "
                "intact. Look for NaN in the target's features (float16 overflows where bfloat16 does not), and try a "
                f"lower `learning_rate` ({self.args.learning_rate}) or `max_grad_norm` ({self.args.max_grad_norm}); then "
                "go on with `resume_from_checkpoint=True`."
            )
        return loss

    def logits(self, features: Tensor) -> Tensor:
        """The target's logits (..., V) for features (..., H), on the features' device."""
        return self._run_head(self.target.logits, features)

    def _loss_logits(self, drafter: Any) -> tuple[Logits, Logits]:
        """The heads whose logits losses compare, the target's and the drafter's, for a drafter or what wraps it."""
        drafter = unwrap(self.accelerator.unwrap_model(drafter, keep_torch_compile=False))
        has_own_head = getattr(drafter, "lm_head", None) is not None  # which knows no more than may be drafted
        head = self._draft_logits(drafter) if has_own_head or self.args.loss_vocabulary == "draft" else self.logits
        return head, self.way.logits(drafter, head)

    def _draft_logits(self, drafter: Any) -> Callable[[Tensor], Tensor]:
        """The logits of what a drafter may draft, made as `logits` are."""
        head = self.target.draft_logits(drafter)
        return lambda features: self._run_head(head, features)

    def _run_head(self, head: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
        weight: Any = self.target.lm_head.weight
        dtype = weight.dtype if weight.dtype.is_floating_point else self.target.model.dtype
        return head(features.to(weight.device, dtype)).to(features.device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of the drafter: six per weight and token."""
        num_weights = sum(parameter.numel() for parameter in self.model.parameters())
        ids = inputs["token_ids" if "token_ids" in inputs else "input_ids"]
        return round(6 * num_weights * ids.numel() * (1 + self.args.rollout_share * (self.args.rollout_steps - 1)))

    def _generator(self, device: torch.device) -> torch.Generator:
        """Random numbers of their own for each batch, whatever ran before: a resumed run draws the same."""
        place = (self.args.seed, self.state.global_step, self._num_batches_in_step(), self.args.process_index)
        seed = int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=7).digest(), "big")
        return torch.Generator(device).manual_seed(seed)

    def _num_batches_in_step(self) -> int:
        return self._num_batches % self.args.gradient_accumulation_steps

    # --- logs ---

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with a word about a warm-up that never ends."""
        num_warmup_steps = self.args.get_warmup_steps(num_training_steps)
        if num_warmup_steps >= num_training_steps:
            logger.warning(
                f"`warmup_steps` ({num_warmup_steps}) is no less than the {num_training_steps} steps of this run, so the "
                f"learning rate never reaches {self.args.learning_rate}. Lower it, for instance to `warmup_steps=0.05`."
            )
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, together with the means of single losses and scales since the last time."""
        if "loss" in logs:
            logs |= self.logged_means.take(lambda sums: self.accelerator.reduce(sums, "sum"))
        super().log(logs, start_time)

    # --- evaluation ---

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Replay decoding along the answers of all rows, each process its share, and add up."""
        self.callback_handler.eval_dataloader = dataloader  # for the progress bar
        drafter, was_training = self._whole_drafter(), self.model.training
        drafter.eval()
        counts = AcceptanceCounts(drafter.config.tree_depth)
        head = self.draft_head(drafter)
        loss = torch.zeros((), device=self.args.device)
        num_items = torch.zeros((), dtype=torch.long, device=self.args.device)
        for raw_inputs in dataloader:
            inputs = self._prepare_inputs(raw_inputs)
            answer_mask = inputs.pop("answer_mask")
            batch = self.extractor.drafter_batch(inputs, answer_mask).to(self.args.device)
            if batch.predicts.any():
                features = batch.text.features.to(drafter.dtype)
                head_of_loss, own_head = self._loss_logits(drafter)
                loss += self.objective(drafter, batch, features, head_of_loss, own_head=own_head).total
                num_items += batch.predicts.sum()
                replay_decoding(drafter, head, batch, counts)
                count_chain_hits(drafter, head, batch, counts)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.model.train(was_training)
        metrics = self._gather_metrics(counts, loss, num_items)
        num_rows = len(dataloader.dataset.dataset)  # type: ignore[attr-defined]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_rows)  # type: ignore[arg-type]

    def draft_head(self, drafter: Any) -> TargetHead:
        """Embedding and head that a drafter drafts with, as [`replay_decoding`] takes them."""
        ends = end_ids(self.target.model.generation_config)
        logits = self.way.logits(drafter, self._draft_logits(drafter))
        return TargetHead(self._embed, logits, drafter.draft_token_ids, ends)

    def _gather_metrics(self, counts: AcceptanceCounts, loss: Tensor, num_items: Tensor) -> dict[str, float]:
        whole = torch.tensor(counts.flat(), device=loss.device)  # int64: exact, and on devices without float64 too
        total, num_tokens, *flat = [
            value
            for each in (loss, num_items, whole)
            for value in self.accelerator.reduce(each, "sum").view(-1).tolist()
        ]
        if not num_tokens:
            raise ValueError("`eval_dataset` has no answer tokens; rows need an assistant message.")
        return {"loss": total / num_tokens, **AcceptanceCounts.from_flat(counts.depth, flat).metrics()}

    def _embed(self, token_ids: Tensor) -> Tensor:
        own: Any = getattr(
            unwrap(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)), "embed_tokens", None
        )
        return embed_from(own or self.target.embedding, token_ids)

    def _whole_drafter(self) -> Any:
        """The drafter without wrappers; where its weights are spread over processes, a whole copy."""
        drafter: Any = unwrap(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        weights = {name: whole_weight(weight) for name, weight in drafter.named_parameters()}
        if all(weights[name] is weight for name, weight in drafter.named_parameters()):
            return drafter
        if drafter.draft_token_ids is not None:
            weights["draft_token_ids"] = drafter.draft_token_ids
        whole: Any = type(drafter)(copy.deepcopy(drafter.config))
        whole.load_state_dict(weights)
        return whole.to(self.args.device)

    @property
    def _config(self) -> Any:
        return unwrap(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)).config

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        adapters = getattr(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), "peft_config", None)
        for each in (adapters or {}).values() if isinstance(self._config, DreamConfig) else ():
            write_adapter_card(output_dir or self.args.output_dir, self._config, each.base_model_name_or_path or "")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the drafter's own card; transformers' template knows neither the target nor how to use a drafter."""
        if not isinstance(self._config, DreamConfig):
            return  # of other kinds there is no card yet
        write_card(self.args.output_dir, self._config, self.hub_model_id)
