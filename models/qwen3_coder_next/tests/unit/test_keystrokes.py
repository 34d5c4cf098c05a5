"""The keystroke benchmark on a tiny model: what it reports is what the engine did. Also `python -m unittest`."""

import runpy
import sys
import unittest
from pathlib import Path

from inference_pio.engine.checkpoints import SPACING

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "benchmark_keystrokes.py"


class Keystrokes(unittest.TestCase):
    def test_typing_computes_what_was_typed_and_an_edit_little_more_than_what_follows(self):
        sys.path.insert(0, str(SCRIPT.parent))
        try:
            found = runpy.run_path(str(SCRIPT))["main"](["--tiny", "--context", "4096", "--rounds", "6", "--pause-ms", "0", "--cold", "3"])
        finally:
            sys.path.remove(str(SCRIPT.parent))
        kinds = found["kinds"]
        self.assertEqual(kinds["same line"]["computed"]["max"], 1)
        self.assertEqual(kinds["new line"]["computed"]["max"], 3)
        for kind in ("same line", "new line", "after accept"):
            self.assertEqual(kinds[kind]["recomputed"]["max"], 0)
        self.assertLessEqual(kinds["edit in the middle"]["recomputed"]["max"], SPACING)
        self.assertLess(kinds["edit in the middle"]["computed"]["max"], 4096 - 1024)


if __name__ == "__main__":
    unittest.main()
