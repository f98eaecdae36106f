"""Models behind one adapter protocol: `base` (protocol and values), `registry`, `hooks`, `presets`, `hf`, `eventgpt`."""
