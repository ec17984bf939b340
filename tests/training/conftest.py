"""Lets the tests in this folder, and the processes they start, import `training_toy`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))  # for tiny pipelines
