"""What Python loads on its own before the script. Not imported as a package."""
