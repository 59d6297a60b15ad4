"""Starts dtrain on one machine or many. Nothing in here imports TensorFlow."""

from dtrain import interrupts

# Before all else, which takes a tenth of a second.
interrupts.end_quietly()
