"""The command line `soap-hf`. The door is `app`."""
