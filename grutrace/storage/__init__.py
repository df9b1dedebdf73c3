"""Store traces in memory or in HDF5 files, and read them as arrays. Needs only NumPy and h5py.

Other packages use `storage.open`, which opens sinks and sources, and `storage.read.trace`, the
trace that users read.
"""
