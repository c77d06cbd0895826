"""What a search leaves: the run folder, its study, and the statistics of its trials."""
