"""The tree and the break-even for pauses that are fastest on a machine."""
