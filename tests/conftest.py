"""One thread, no network, no chatter."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it: a download in a test fails at once
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch


def pytest_configure(config):
    torch.set_num_threads(1)
    for line in (
        "ignore:QuickGELU mismatch",
        "ignore:.*pynvml.*:FutureWarning",
        "ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning",  # timm, when it resizes Swin
        "ignore:.*torch.jit.script.*:DeprecationWarning",
    ):
        config.addinivalue_line("filterwarnings", line)
