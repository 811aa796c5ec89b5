"""One training loop for every task, and what it needs: optimizers, checkpoints, run folders, processes."""
