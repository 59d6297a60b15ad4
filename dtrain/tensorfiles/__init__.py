"""Tensors in the files of other programs: safetensors, npz, h5."""
