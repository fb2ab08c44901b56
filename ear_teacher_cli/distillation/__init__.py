"""Distil a student of your own from a teacher: `Teacher` and `Distillation` (see distillation.py for an example).

`earteach distill` does it for timm's models.
"""

from .distillation import Distillation, relation_loss
from .teacher import MEASURED_ON, Targets, Teacher, config_for

__all__ = ["MEASURED_ON", "Distillation", "Targets", "Teacher", "config_for", "relation_loss"]
