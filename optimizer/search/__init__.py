"""Ask and tell: the plan before a search, the driver of it, its samplers."""
