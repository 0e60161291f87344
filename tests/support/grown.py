"""Trees grown below what a drafter's state has read, without a `generate()` around them."""

from dream_hf.decoding.settings import DraftSettings
from dream_hf.drafters.dream.state import DreamLevels
from dream_hf.drafters.growth import grow_tree


def grow(state, head, root_tokens, config, max_depth=None):
    """`grow_tree` with the settings of a config, on the drafter's device."""
    roots = root_tokens.to(state.drafter.device)
    return grow_tree(DreamLevels(state, head), roots, DraftSettings.of(config), head.ends, max_depth)
