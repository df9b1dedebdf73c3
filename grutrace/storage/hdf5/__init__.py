"""HDF5 made safe: opening, handles, filters, errors and atomic replacement of files."""
