"""The trace at rest: records go to memory or to an HDF5 file, and come back as arrays.

NumPy and h5py only. `sinks` opens sinks and sources, `trace` is what users read; the rest is
behind these two.
"""
