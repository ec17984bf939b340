"""Lets the tests in this folder import `core_examples`, which importlib mode alone does not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
