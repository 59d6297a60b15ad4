"""Checkpoints as trees of readable names, and files of tensors."""
