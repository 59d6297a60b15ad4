"""The format of TensorFlow's checkpoints: read, named, compared."""
