"""What a run is on disk: its configuration, directory and checkpoints."""
