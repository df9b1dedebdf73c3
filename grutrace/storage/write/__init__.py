"""From records to a file."""
