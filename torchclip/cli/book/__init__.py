"""``torchclip book``."""
