"""What all tests share."""

import os

# Tensors here are tiny: threads would only wait for each other, and badly so on a busy machine.
# Set before torch loads, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
