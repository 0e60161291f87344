"""The multi-token prediction head that ships inside a target's own checkpoint, as a drafter."""
