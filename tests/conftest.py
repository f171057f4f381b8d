"""Settings of all tests."""

import torch
from hypothesis import settings

# Two workers on two cores: more threads only wait for each other
torch.set_num_threads(1)
settings.register_profile("steady", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("steady")
