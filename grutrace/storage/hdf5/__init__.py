"""Safe access to HDF5: open files, handles, filters, errors, locks and atomic replacement."""
