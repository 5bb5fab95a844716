"""The functions, one file per rule."""
