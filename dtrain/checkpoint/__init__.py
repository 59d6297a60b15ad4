"""Checkpoints that are whole or not there: commit, keep, verify, go on."""
