"""A whole study of a real model, from nothing but PyPI."""
