"""How to install what is missing."""

import importlib.util


def installing(extra: str) -> str:
    """The command that installs an extra: from an index, and from a checkout."""
    return f"pip install 'torchclip[{extra}]' (from a checkout: pip install '.[{extra}]')"


def check_installed(what: str, *packages: str) -> None:
    """Raise an error if something needs a package of the extra ``demo`` that is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(f"{what} needs {' and '.join(missing)}; install with: {installing('demo')}")
