"""Pictures of sequences and of results, drawn with matplotlib. One kind of picture a module."""
