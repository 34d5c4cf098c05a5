"""The plugin's record: also `python -m unittest`."""

import unittest

from inference_pio.models.qwen3_4b_instruct_2507.plugin import PLUGIN
from inference_pio.models.qwen3_0_6b.plugin import PLUGIN as SMALL


class Plugin(unittest.TestCase):
    def test_it_is_the_small_models_architecture_in_another_size(self):
        self.assertEqual(PLUGIN.architectures, SMALL.architectures)
        self.assertIs(PLUGIN.forward, SMALL.forward)
        self.assertNotEqual(PLUGIN.checkpoint, SMALL.checkpoint)

    def test_it_never_thinks_and_says_so_to_no_template(self):
        self.assertIsNone(PLUGIN.prompts.template_variables)


if __name__ == "__main__":
    unittest.main()
