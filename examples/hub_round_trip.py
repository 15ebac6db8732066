"""A head to the Hub and back, without an account: a hub on 127.0.0.1 stands in for huggingface.co.

    python examples/hub_round_trip.py                 # the hub on this machine (tests/hub_server)
    python examples/hub_round_trip.py --real-hub you  # huggingface.co, in two private repositories that are deleted
                                                      # at the end; needs HF_TOKEN with write access

It publishes the tiny backbone, fits a head on it by its hub id, pushes the head, and pulls it in other processes with
empty caches: with soap_hf, and without it, by the code in the repository.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # for tests.hub_server

PULL = """
import sys
if sys.argv[1] == "without":
    sys.modules["soap_hf"] = None  # as where it is not installed
else:
    import soap_hf
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained(sys.argv[2], trust_remote_code=sys.argv[1] == "without")
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[3])).last_hidden_state, sys.argv[4])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real-hub", metavar="USER", help="use huggingface.co under this name")
    user = parser.parse_args().real_hub
    sys.stdout.reconfigure(line_buffering=True)  # in step with the other processes
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # else each file of code that is fetched is announced
    with tempfile.TemporaryDirectory() as folder:
        if user is not None:
            round_trip(user, Path(folder), real=True)
            return
        from tests.hub_server import HubServer

        with HubServer(user="you") as hub:
            os.environ.update(hub.environment())  # before huggingface_hub is imported
            print(f"A hub listens at {hub.endpoint}.\n")
            round_trip(hub.user, Path(folder), real=False)


def round_trip(user: str, folder: Path, real: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    backbone, head = f"{user}/vit-mae-tiny-demo", f"{user}/soap-vit-mae-tiny-demo"
    try:
        api.create_repo(backbone, private=real)
        api.upload_folder(repo_id=backbone, folder_path=HERE / "vit-mae-tiny")
        print(f"The backbone is published as {backbone}.\n")
        output, private = str(folder / "head"), ["--private"] if real else []
        photos = str(HERE / "photos" / "fit")
        run("-m", "soap_hf", "fit", backbone, photos, "--output", output, "--push-to-hub", head, *private)
        print("\nIn the repository:", ", ".join(api.list_repo_files(head)))
        print(f"Its last commit: {api.list_repo_commits(head)[0].title}")
        pull_and_compare(head, folder)
    finally:
        if real:
            for repo in (backbone, head):
                api.delete_repo(repo, missing_ok=True)


def pull_and_compare(head: str, folder: Path) -> None:
    import torch
    from transformers import AutoModel

    import soap_hf  # noqa: F401  registers the model

    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.save(pixels, folder / "pixels.pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder / "head")(pixels).last_hidden_state
    for how in ("with", "without"):
        os.environ["HF_HOME"] = str(folder / f"cache {how}")
        run("-c", PULL, how, head, str(folder / "pixels.pt"), str(folder / "tokens.pt"))
        same = torch.equal(torch.load(folder / "tokens.pt"), expected)
        print(f"Pulled into an empty cache, {how} soap_hf: outputs bit-identical: {'yes' if same else 'NO'}.")


def run(*arguments: str) -> None:
    """Another process, which ends this one if it fails."""
    subprocess.run([sys.executable, *arguments], cwd=HERE.parent, check=True)


if __name__ == "__main__":
    main()
