"""``torchclip train``."""
