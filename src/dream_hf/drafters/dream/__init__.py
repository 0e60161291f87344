"""DREAM (arXiv 2505.19201): the drafter that reads the target's features through cross-attention."""
