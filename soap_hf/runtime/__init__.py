"""What a head needs to run. These files travel with every head that is pushed, and import nothing of the package.

A head on the Hub is loaded by them where `soap-hf` is not installed (`trust_remote_code=True`). They import each other
as `from .sibling import name` alone, since transformers copies no other files, and of other packages only torch,
transformers, safetensors and huggingface_hub. The door is `modeling_soap`.
"""
