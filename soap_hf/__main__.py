"""`python -m soap_hf` is `soap-hf`."""

from .cli.app import main

main()
