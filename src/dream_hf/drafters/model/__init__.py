"""Drafting with another model of transformers: a smaller one of the family, or a text-only one."""
