"""Print the versions of this Python's packages, and what they change in grutrace."""

from __future__ import annotations

import platform

import h5py
import numpy as np
import torch

from grutrace.capture.kernel_calls import registration
from grutrace.gru import kernel_gates


def main() -> None:
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
        "NumPy": np.__version__,
        "h5py": f"{h5py.__version__} (HDF5 {h5py.version.hdf5_version})",
    }
    gates = "copied" if kernel_gates.kernel_supported() else "recomputed"
    kept = "at once" if registration.has_kernel_handles() else "without other threads"
    eager = "yes" if hasattr(torch.compiler, "set_stance") else "no"
    print(", ".join(f"{name} {version}" for name, version in versions.items()), end="|")
    print(f"gates {gates}; kernels removed {kept}; compiled='eager': {eager}")


if __name__ == "__main__":
    main()
