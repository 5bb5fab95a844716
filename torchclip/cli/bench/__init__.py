"""``torchclip bench``."""
