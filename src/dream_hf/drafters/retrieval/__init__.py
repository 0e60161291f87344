"""Drafting without a model: what the text itself suggests."""
