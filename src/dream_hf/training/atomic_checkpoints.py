"""Checkpoints that are whole or not there at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

STAGING_PREFIX = "incomplete-"
NO_SPACE_PHRASES = ("no space left", "os error 28", "disk quota")


@contextmanager
def whole_folder(final: Path, is_main: bool, barrier: Callable[[], None]) -> Iterator[Path]:
    """Fill a folder under another name and give it its own when it is complete.

    What is left behind by a killed process has a name that nobody takes for a checkpoint, and is removed by the next one.

    Args:
        final (`Path`): The folder's name; what is there is replaced.
        is_main (`bool`): Whether this process renames; one process in a job does.
        barrier (`Callable`): Waits for all processes.

    Yields:
        `Path`: Where to write.

    Raises:
        OSError: The disk is full; earlier checkpoints are as they were.
    """
    staging = final.with_name(STAGING_PREFIX + final.name)
    if is_main:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True, exist_ok=True)
    barrier()
    try:
        yield staging
    except Exception as error:
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
        if is_full_disk(error):
            raise OSError(
                errno.ENOSPC,
                f"There is no space left for the checkpoint {final.name}. Earlier checkpoints are untouched: free some "
                "space and go on with `resume_from_checkpoint=True`, or set `save_total_limit`",
                str(final.parent),
            ) from error
        raise
    barrier()
    if is_main:
        _replace(staging, final)
    barrier()


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, of whatever library, says that the disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(phrase in str(error).lower() for phrase in NO_SPACE_PHRASES)


def _replace(staging: Path, final: Path) -> None:
    old = final.with_name(STAGING_PREFIX + "old-" + final.name)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(staging, final)
    shutil.rmtree(old, ignore_errors=True)


class WholeCheckpointTrainer(Trainer):
    """A Trainer whose checkpoints get their name when they are complete."""

    accelerator: Any
    args: Any
    state: Any

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, but a checkpoint gets its name when it is complete."""
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        if self.state.best_global_step:
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)
        with whole_folder(final, self.args.should_save, self.accelerator.wait_for_everyone) as folder:
            self.save_model(str(folder), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
            if self.args.should_save:
                self._export_callbacks()
                self.state.save_to_json(str(folder / "trainer_state.json"))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _export_callbacks(self) -> None:
        """Bring the state of callbacks that have one up to date, for resuming."""
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name = type(callback).__name__
                if isinstance(self.state.stateful_callbacks[name], list):
                    self.state.stateful_callbacks[name].append(callback.state())
                else:
                    self.state.stateful_callbacks[name] = callback.state()
