"""Where tests and their helpers lie, for processes that tests start."""

from pathlib import Path

FOLDERS = [str(path) for path in sorted(Path(__file__).parents[1].iterdir()) if path.is_dir()]
