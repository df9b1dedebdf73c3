"""Write records to a trace file."""
