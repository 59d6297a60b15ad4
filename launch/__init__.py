"""Starts dtrain on one machine or many. Nothing in here imports TensorFlow."""
