"""``python -m torchclip``: the same as the command ``torchclip``."""

import sys

from torchclip.cli.main import main

sys.exit(main())
