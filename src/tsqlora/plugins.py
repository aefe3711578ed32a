"""Where axolotl's plugin is now: axolotl only logs a module that is not found, and trains without its plugin."""

from tsqlora.errors import SettingsError

raise SettingsError(
    "tsqlora.plugins.axolotl was removed; use examples/axolotl_plugin.py of tsqlora's repository: "
    "plugins: [axolotl_plugin.TsqloraPlugin]"
)
