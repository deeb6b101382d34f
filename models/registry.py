"""All families that ship with Unmask. Importing this module registers them; no torch is imported."""

from common.registry import NO_IMAGES
from models.families import dream, llada, mmada, sdar  # noqa: F401
from models.family import FAMILIES

FAMILIES.lacks("lladav", NO_IMAGES)
