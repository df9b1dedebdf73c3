#!/usr/bin/env bash
# torch 2.13.0 (CPU build) with NumPy 2.4.6, Python 3.11.
#
# Looking at the weights of an nn.GRU through Tensor.numpy() changes them for good: the storage can
# never be resized again, also when the array is long gone. Code that frees weights between calls by
# resizing their storage to nothing (FSDP2, offloading wrappers) then fails, far from whoever looked.
# A copy (`weight.detach().clone().numpy()`) leaves the weights as they were.
#
# Seen:
#   before: True
#   after a copy was looked at: True
#   after the weight was looked at: False
#   resize_(0): RuntimeError: Trying to resize storage that is not resizable
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import gc

from torch import nn

weight = nn.GRU(3, 4).weight_hh_l0
storage = weight.untyped_storage()
print("before:", storage.resizable())
assert storage.resizable()
weight.detach().clone().numpy().sum()
print("after a copy was looked at:", storage.resizable())
assert storage.resizable()
weight.detach().numpy().sum()
gc.collect()
print("after the weight was looked at:", storage.resizable())
assert not storage.resizable(), "the behaviour has changed"
try:
    storage.resize_(0)
except RuntimeError as error:
    print("resize_(0): RuntimeError:", str(error).splitlines()[0])
else:
    raise AssertionError("the behaviour has changed")
PYTHON
