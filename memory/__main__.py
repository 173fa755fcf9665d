"""python -m xlroute.memory: looks into a memory store on disk."""

import sys

from xlroute.memory.command_line import main

sys.exit(main())
