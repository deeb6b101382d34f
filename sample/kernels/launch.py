"""When a kernel of the engine runs and when its torch reference does: as models/kernels/launch.py says."""

from __future__ import annotations

from models.kernels.launch import INTERPRET, jit, tl, triton, use_kernel

__all__ = ["INTERPRET", "jit", "tl", "triton", "use_kernel"]
