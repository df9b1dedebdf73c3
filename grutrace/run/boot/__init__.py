"""The folder on PYTHONPATH whose `sitecustomize` Python loads first. Not imported as a package."""
