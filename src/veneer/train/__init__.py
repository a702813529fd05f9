"""The training loop: setup, steps, optimizers, restarts, checkpoints."""
