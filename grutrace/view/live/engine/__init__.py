"""What a live view computes, without bokeh: windows, stretches, searches, links and runs."""
