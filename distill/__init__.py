"""Distillation: objectives, how a student is drawn from its teacher, and the trainer."""
