"""The explorer of soap-hf as a Space: of the head that the variable SOAP_HEAD names, else of the demo beside it.

`python examples/space/app.py` shows the same page on this computer.
"""

import os
from pathlib import Path

from soap_hf import SOAPModelWrapper
from soap_hf.explore import Explorer
from soap_hf.explore.serving import serve

HERE = Path(__file__).resolve().parent
DEMO = "soap-vit-mae-tiny"

head = os.environ.get("SOAP_HEAD")
if not head:  # beside this file in a Space, one folder up in a clone
    head = next(str(folder / DEMO) for folder in (HERE, HERE.parent) if (folder / DEMO).is_dir())
explorer = Explorer(SOAPModelWrapper.from_pretrained(head), Path(head).name if os.path.isdir(head) else head)
in_space = {"host": "0.0.0.0", "port": 7860} if "SPACE_ID" in os.environ else {}
serve(explorer, started=lambda address: print(f"The explorer is at {address}", flush=True), **in_space)
