"""DiPO (arXiv 2512.22234): the slices of TraceRL, exactly on-policy at every update, normalised by tokens, on mixed groups only."""

from __future__ import annotations

from train.methods.registry import METHODS, Method

METHODS.register(
    "DiPO",
    Method(
        trace="trace",
        objective="clipped",
        stage="rl",
        follows_steps=True,
        defaults={
            "training.old_logprobs": "current",
            "training.loss_weighting": "token",
            "reward.keep_solve_rate": [0.0, 1.0],  # only groups that are all right or all wrong go ...
            "rollout.resample": True,  # ... and others take their place
        },
    ),
)
