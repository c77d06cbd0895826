"""mergekit documents: read as recipes and stacks, and written."""
