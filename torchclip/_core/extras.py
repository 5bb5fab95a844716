"""How to install what is missing."""


def installing(extra: str) -> str:
    """The command that installs an extra: from an index, and from a checkout."""
    return f"pip install 'torchclip[{extra}]' (from a checkout: pip install '.[{extra}]')"
