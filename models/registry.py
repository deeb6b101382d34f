"""All families that ship with Unmask. Importing this module registers them; no torch is imported."""

from models.families import dream, llada, mmada, sdar  # noqa: F401
from models.family import FAMILIES  # noqa: F401
