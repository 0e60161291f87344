"""Answers written by the target itself, to train on."""
