"""Training: configuration, loop, optimizer and checkpoints."""
