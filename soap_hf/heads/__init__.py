"""A head as a thing that is opened, saved, described and pushed. The door is `model`."""
