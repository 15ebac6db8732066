"""What a head needs to run. These files travel with every head that is pushed, and import nothing of the package.

A head on the Hub is loaded by them where `soap-hf` is not installed. They import torch, transformers, safetensors,
huggingface_hub, and each other as `from .sibling import name`. The door is `modeling_soap`."""
