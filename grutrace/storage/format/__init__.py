"""The layout of a trace file: names, shapes, types and tables. See docs/format.md."""
