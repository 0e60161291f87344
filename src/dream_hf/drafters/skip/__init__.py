"""Drafting with the target itself, without some of its sublayers (SWIFT, arXiv 2410.06916)."""
