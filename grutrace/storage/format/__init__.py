"""The format of a trace file: datasets, header and tables. See docs/format.md."""
