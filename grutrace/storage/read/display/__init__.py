"""What a trace, a site and a sequence show of themselves in a console and in a notebook."""
