"""Long tests of runs that are killed, lose their disk or power, or are read while they write.

``python -m tools.soak --help`` lists the options. The tests run it for a minute.
"""
