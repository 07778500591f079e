"""``python -m otcxr`` is the command line."""

import sys

from otcxr.cli import main

sys.exit(main())
