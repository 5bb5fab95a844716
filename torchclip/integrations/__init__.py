"""torchclip in frameworks and loggers: one module each, imported only when it is used.

``lightning``, ``transformers`` and ``tensorboard`` need the package of that name, which the extra of the same
name installs (``pip install 'torchclip[lightning]'``).  ``loggers`` needs no package.
"""
