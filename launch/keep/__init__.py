"""Starts the workers of one machine and keeps them alive."""
