"""Session settings: one thread per rank, the loopback device, and Hypothesis profiles.

``HYPOTHESIS_PROFILE=explore`` draws new examples on every run; the default repeats the same ones.
"""

import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"
if sys.platform == "linux":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import hypothesis
import torch

torch.set_num_threads(1)

_SHARED = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
}
hypothesis.settings.register_profile("repeat", derandomize=True, database=None, **_SHARED)
hypothesis.settings.register_profile("explore", derandomize=False, **_SHARED)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))
