"""What a person types: the study file, checked and frozen, and the search space it asks for."""
