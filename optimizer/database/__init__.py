"""Where trials are stored: the study's database, in the run folder or elsewhere, read and written with care."""
