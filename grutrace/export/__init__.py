"""From a trace to files of other programs: one format a file, all from the same content."""
