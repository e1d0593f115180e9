"""Training: the Lightning module, optimizers, schedules and callbacks."""
