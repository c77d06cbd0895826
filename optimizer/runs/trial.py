"""What a trial in the study says of itself: its kind, and why it failed. Written by `search`, read by `run`."""

SEARCHED = "search"  # the kind of a trial that is not an anchor; not written to the study
DRIVER_DIED = "driver_died"
WORKER_DIED = "worker_died"
DUPLICATE = "duplicate of"
NOT_COUNTED = (DRIVER_DIED, DUPLICATE)  # failures that say nothing about a recipe
