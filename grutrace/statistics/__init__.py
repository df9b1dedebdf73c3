"""Running statistics of a model's gates, for each unit, in constant memory and without rows."""
