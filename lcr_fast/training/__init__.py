"""Two-phase training, checkpoints and evaluation."""
