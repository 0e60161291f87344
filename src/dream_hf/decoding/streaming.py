"""Tokens on their way to a streamer."""

from __future__ import annotations

from transformers.generation.streamers import BaseStreamer

from .sequences import Sequences
from .stopping import Stopping


class Stream:
    """Feeds a streamer token by token, all rows of a batch in step, as `generate()` does."""

    def __init__(self, streamer: BaseStreamer | None, sequences: Sequences):
        self.streamer = streamer
        self.num_sent = sequences.prompt_length

    def send(self, sequences: Sequences, stopping: Stopping) -> None:
        """Send what every row has reached."""
        if self.streamer is None:
            return
        reached = [length for row, length in enumerate(sequences.lengths) if not stopping.is_resting(row)]
        for length in range(self.num_sent, min(reached) if reached else max(sequences.lengths)):
            self.streamer.put(sequences.column(length).cpu())
            self.num_sent = length + 1

    def close(self) -> None:
        """Tell the streamer that nothing follows."""
        if self.streamer is not None:
            self.streamer.end()
