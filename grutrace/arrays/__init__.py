"""A trace as other libraries' arrays, which compute in parts: dask's and xarray's."""
