"""Export of traces to the file formats of other programs, one module per format."""
