"""``torchclip run``."""
