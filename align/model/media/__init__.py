"""Images and video in a row of tokens. In order of reading: support, places, features, prompt_inputs, spelled."""
