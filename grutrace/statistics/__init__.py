"""Running statistics of a trace: figures per unit, in constant memory, without the rows."""
