"""What an update can minimise, by name. No torch is imported: a config is checked against these names first."""

from __future__ import annotations

from common.registry import Registry

OBJECTIVES: Registry = Registry("objective")
"""`train.objectives.Objective`s: functions (ObjectiveInput, the config's `training` section) -> ObjectiveOutput."""
OBJECTIVES.register("clipped", "train.objectives:clipped")
OBJECTIVES.register("likelihood", "train.objectives:likelihood")
