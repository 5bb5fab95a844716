"""The functions, a file a rule."""
