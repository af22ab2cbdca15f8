"""What every test runs under."""

import torch

# The models are tiny: threads would only wait for each other.
torch.set_num_threads(1)
