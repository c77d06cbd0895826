"""The arithmetic: sources and a recipe to tensors."""
