"""`soap-hf tune`: the strength of a head that matching between views supports."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..evaluation.arguments import EvaluationArguments, ViewRule
from ..heads.printing import show
from ..runtime.errors import OutputError
from .evaluate import Split, load_head
from .fit import can_draw, figures_of
from .options import Command, DatasetName, Head, Overwrite, hide_progress_bars, options_of, values_of

if TYPE_CHECKING:
    from ..evaluation.examples import Examples
    from ..evaluation.strength import StrengthChoice
    from ..heads.model import SOAPModelWrapper

TuneOptions: Any = options_of(EvaluationArguments, without=("method", "rank", "mu", "output", "overwrite"))
RuleOptions: Any = options_of(ViewRule)


@dataclass(kw_only=True)
class Tune(Command, TuneOptions, RuleOptions):
    """Choose a head's strength by matching between views; 0, the identity, where nothing is gained."""

    head: Head
    dataset: DatasetName
    split: Split = None
    num_images: Annotated[int, typer.Option(min=2, help="Size of a random sample.")] = 200
    apply: Annotated[bool, typer.Option("--apply", help="Give the head in HEAD that strength.")] = False
    output: Annotated[Optional[Path], typer.Option(help="Folder for a head with that strength.")] = None
    overwrite: Overwrite = False
    compare: Annotated[
        Optional[list[str]], typer.Option(metavar="HEAD", help="Another head to try on the images. May be repeated.")
    ] = None
    figure: Annotated[Optional[Path], typer.Option(metavar="PNG", help="File for a picture of the curves.")] = None

    def plan(self) -> str:
        """What is chosen by what."""
        return f"Choosing the strength of {self.head} by matching on images of {self.dataset}"

    def run(self) -> None:
        """Measures, prints and draws the curves, and writes the head if there is a place for it."""
        from ..data.data_sets import open_dataset
        from ..evaluation.examples import Examples
        from ..evaluation.strength import choose_mu
        from ..heads.opening import refuse_missing_head
        from ..processes import from_main_alone, join_processes, on_main

        chosen = EvaluationArguments(**values_of(self, EvaluationArguments))
        rule = ViewRule(**values_of(self, ViewRule))
        is_main = join_processes(self.device).is_main_process
        for name in (self.head, *(self.compare or [])):
            refuse_missing_head(name)  # before a data set is fetched
        target = from_main_alone(self._target)
        draws = is_main and self._draws(target)
        if not self.progress or not is_main:
            hide_progress_bars()
        images = open_dataset(self.dataset, split=self.split, config_name=self.config_name, token=self.token)
        choices: dict[str, StrengthChoice] = {}
        same = ("layer", "image_size", "batch_size", "seed", "progress")
        options = {name: getattr(chosen, name) for name in same}
        for name in dict.fromkeys([self.head, *(self.compare or [])]):
            here = chosen.hub_kwargs if name == self.head else {"token": chosen.token}
            model = load_head(name, chosen.device, **here)
            examples = Examples(images, num_images=self.num_images, **chosen.reading)
            choice = choices[name] = choose_mu(model, examples, rule=rule, share=True, **options)
            if name == self.head:
                tuned, seen = model, examples
            on_main(show, choice.table())
            on_main(show, choice.reason)
        if target is not None:
            tuned.reweight(choices[self.head].mu, tuned.config.tau, tuned.config.threshold)
            tuned.config.checks = self._checks(tuned, choices[self.head], seen, chosen)
        if not is_main:
            return
        picture = _drawn(choices) if draws else None
        if self.figure is not None and picture is not None:
            self.figure.write_bytes(picture)
            show(f"Figure written to {self.figure}")
        if target is not None:
            _write(tuned, target, figures_of(tuned) | {"matching_curve.png": picture} if picture else {})
        elif choices[self.head].mu != tuned.config.mu:
            show("Nothing was changed; pass --apply or --output to give the head that strength.")

    def _checks(
        self, model: "SOAPModelWrapper", choice: "StrengthChoice", images: "Examples", chosen: EvaluationArguments
    ) -> list[dict[str, Any]]:
        """What matching says of the head at its new strength, for each layer."""
        from ..evaluation.check import check_head, check_of_choice
        from ..heads.running import head_preprocessor

        if len(model.config.layers) == 1:
            return check_of_choice(choice, chosen.seed)
        options: dict[str, Any] = {name: getattr(chosen, name) for name in ("batch_size", "seed", "progress")}
        preprocess = head_preprocessor(model, chosen.image_size)
        return check_head(model, images, preprocess, unseen=False, share=True, **options)

    def _draws(self, target: Path | None) -> bool:
        """Whether a picture is drawn; without matplotlib one that was asked for is refused, before the work."""
        if self.figure is not None:
            from .. import figures  # noqa: F401

            return True
        return target is not None and can_draw()

    def _target(self) -> Path | None:
        """The folder to write to, checked before the work."""
        from ..files import check_output_folder
        from ..heads.saving import refuse_other_model

        if self.apply and self.output is not None:
            raise OutputError("--apply writes into HEAD and --output elsewhere; pass one of them.")
        if self.figure is not None and not self.figure.absolute().parent.is_dir():
            raise OutputError(f"There is no folder for {self.figure}; choose another place.")
        if self.apply:
            if not Path(self.head).is_dir():
                raise OutputError(f"{self.head} is no folder that --apply could write into; pass --output.")
            return Path(self.head)
        if self.output is not None:
            check_output_folder(self.output, self.overwrite)
            refuse_other_model(self.output)
        return self.output


def _write(model: "SOAPModelWrapper", folder: Path, figures: dict[str, bytes]) -> None:
    """Saves the head with its new strength, and its figures."""
    model.save_pretrained(folder, figures=figures)
    show(f"Head with mu={model.config.mu} written to {folder}")


def _drawn(choices: "dict[str, StrengthChoice]") -> bytes:
    """The curves as a picture."""
    from ..figures import matching_curve, to_png  # matplotlib comes with an extra

    short = {name: Path(name).name for name in choices}
    unique = len(set(short.values())) == len(short)
    return to_png(matching_curve({short[name] if unique else name: choice for name, choice in choices.items()}))
