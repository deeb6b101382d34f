"""Training methods, one file each: which slices (train/traces.py) meet which objective (train/objectives.py).

Importing this package registers them. No torch is imported: a config is checked against the table first.
"""

from train.methods import coupled, dipo, next_token, random_masking, semi_ar, tracerl  # noqa: F401
from train.methods.registry import METHODS, Method  # noqa: F401
