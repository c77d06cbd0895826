"""A merge as a model folder that can be loaded, published and rebuilt."""
