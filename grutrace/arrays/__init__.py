"""Traces as dask arrays and xarray datasets."""
