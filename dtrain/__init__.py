"""Fault-tolerant training of GANs on many GPUs with TensorFlow.

`python -m dtrain.main --help` lists what a run can be told. The modules are
nouns and are imported whole: `from dtrain import config`.
"""

__version__ = "0.1.0"
