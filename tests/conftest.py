"""Triton's kernels run through its interpreter where there is no GPU; it must know before anything imports it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
