"""Print, as JSON, where bench/gpu.py measures: ``environment`` and ``info``."""

from __future__ import annotations

import json
import sys

from vapt_fast import info
from vapt_fast.benchmark import describe

print(json.dumps({"environment": describe(sys.argv[1]), "info": info.report()}))
