"""`python -m soap_hf` is `soap-hf`."""

from .cli import main

main()
