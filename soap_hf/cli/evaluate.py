"""The command line of the evaluations: `soap-hf evaluate matching | position | knn | segmentation | saliency`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..evaluation.arguments import EvaluationArguments, ViewRule
from ..heads.printing import show
from ..runtime.errors import DataError
from .options import Command, DatasetName, Head, hide_progress_bars, options_of, values_of

if TYPE_CHECKING:
    from ..evaluation.comparison import Comparison
    from ..evaluation.examples import Examples
    from ..evaluation.results import Results
    from ..heads.model import SOAPModelWrapper

Masks = Annotated[
    Optional[str], typer.Argument(metavar="[MASKS]", help="Folder of masks, if the one before is of images.")
]
MaskColumn = Annotated[str, typer.Option(help="Column that holds the masks.")]
SameSize = Annotated[
    bool, typer.Option("--same-size", help="Refuse masks of another size than their image, instead of resizing.")
]
Split = Annotated[Optional[str], typer.Option(help="Split; default: the only one, else train.")]
Neighbours = Annotated[Optional[list[int]], typer.Option(min=1, help="Neighbours that vote. May be repeated.")]
TestSize = Annotated[Optional[int], typer.Option(min=2, help="Size of a random sample of the test images.")]


@dataclass(kw_only=True)
class Evaluation(Command, options_of(EvaluationArguments)):  # type: ignore[misc]
    """What every evaluation does around its measuring."""

    head: Head
    dataset: DatasetName

    def plan(self) -> str:
        """What is measured."""
        return f"Measuring {type(self).__name__.lower()} with the head {self.head}"

    def run(self) -> None:
        """Measures, in any number of processes; the main one prints the table and writes the files."""
        from ..files import check_output_folder
        from ..heads.opening import refuse_missing_head
        from ..processes import from_main_alone, join_processes

        refuse_missing_head(self.head)  # before a data set is fetched
        self.arguments = EvaluationArguments(**values_of(self, EvaluationArguments))
        is_main = join_processes(self.device).is_main_process
        if not self.progress or not is_main:
            hide_progress_bars()
        if self.output is not None:
            from_main_alone(check_output_folder, self.output, self.overwrite)
        found = self.measure()
        if is_main:
            self._tell(found)

    def _tell(self, found: "Results") -> None:
        """Writes the files, then prints the table."""
        from ..data.data_sets import public_name
        from ..evaluation.results import results_table, write_results
        from ..heads.card import refresh_card
        from ..heads.opening import EVALUATIONS_FOLDER

        if self.output is not None:
            summary = {"evaluation": found.name, "dataset": public_name(self.dataset), **found.summary}
            write_results(self.output, found.name, found.rows, summary)
            if self.output.absolute().parent == Path(self.head).absolute() / EVALUATIONS_FOLDER:
                refresh_card(Path(self.head))
        show(results_table(found.summary, found.name))
        for name, group in found.summary.get("groups", {}).items():
            show(results_table(group, f"{found.name}: {name} ({group['counts']['images']})"))
        if self.output is not None:
            show(f"Results written to {self.output}")

    def measure(self) -> "Results":
        """What this evaluation finds."""
        raise NotImplementedError

    def examples(self, name: str, split: str | None, number: int | None, masks: str | None = None) -> "Examples":
        """Images to measure on, paired with masks for an evaluation that needs them."""
        from ..data.data_sets import open_dataset
        from ..evaluation.examples import Examples, open_pairs

        source = {"split": split, "config_name": self.config_name, "token": self.token}
        own: dict[str, Any] = {"num_images": number, **self.arguments.reading}
        if hasattr(self, "label_column"):
            own["label_column"] = self.label_column
        if not hasattr(self, "mask_column"):
            return Examples(open_dataset(name, **source), **own)
        pairs = open_pairs(name, masks, image_column=self.image_column, mask_column=self.mask_column, **source)
        return Examples(pairs, mask_column=self.mask_column, resize_masks=not self.same_size, **own)

    def comparison(self) -> "Comparison":
        """The methods asked for, on the head and its backbone."""
        from ..evaluation.comparison import Comparison

        chosen = self.arguments
        model = load_head(self.head, chosen.device, **chosen.hub_kwargs)
        names = ("mu", "rank", "layer", "image_size")
        options: dict[str, Any] = {name: getattr(chosen, name) for name in names}
        return Comparison.of(model, chosen.method or None, **options, share=True)

    @property
    def noted(self) -> dict[str, Any]:
        """What every evaluation takes."""
        from ..evaluation.results import command_line

        return {"progress": self.progress, "command": command_line(sys.argv[1:])}

    @property
    def running(self) -> dict[str, Any]:
        """What those take that run the backbone on batches of images."""
        return {"batch_size": self.batch_size, **self.noted}


@dataclass(kw_only=True)
class Saliency(Evaluation):
    """Find the salient object of each image by TokenCut, and compare it with its mask."""

    dataset: Annotated[str, typer.Argument(metavar="IMAGES", help="Folder of images, or a data set.")]
    masks: Masks = None
    mask_column: MaskColumn = "mask"
    split: Split = None
    num_images: Annotated[Optional[int], typer.Option(min=2, help="Size of a random sample; default: all.")] = None
    batch_size: Annotated[int, typer.Option(hidden=True)] = 1
    centred: Annotated[
        bool, typer.Option("--centred", help="Take the fit's mean token away first, in all methods.")
    ] = False
    same_size: SameSize = False
    bilateral: Annotated[
        bool,
        typer.Option("--bilateral/--no-bilateral", help="Measure without refinement by the bilateral solver alone."),
    ] = True

    def measure(self) -> "Results":
        """Of images in their own sizes, one at a time."""
        from ..evaluation.saliency import evaluate_saliency  # scipy comes with an extra

        examples = self.examples(self.dataset, self.split, self.num_images, self.masks)
        shown = {"bilateral": self.bilateral, "image_size": self.image_size, "centred": self.centred}
        return evaluate_saliency(self.comparison(), examples, **shown, **self.noted)


@dataclass(kw_only=True)
class Voting(Evaluation):
    """What evaluations have in which training images vote on test images."""

    train_split: Annotated[Optional[str], typer.Option(help="Default: the only one, else train.")] = None
    test_split: Annotated[
        Optional[str], typer.Option(help="Default: test; of another data set as for --train-split.")
    ] = None
    test_dataset: Annotated[Optional[str], typer.Option(help="Another data set to test on.")] = None

    def refuse_one_split(self) -> None:
        """Completes the split to test on, and refuses the one to train on."""
        if self.test_dataset is None:
            self.test_split = self.test_split or "test"
            if self.test_split == (self.train_split or "train"):
                raise DataError(
                    f"Training and test images would be one split ({self.test_split}); choose two with --train-split "
                    "and --test-split, or name a --test-dataset."
                )


@dataclass(kw_only=True)
class Knn(Voting):
    """Classify images by weighted k-NN (k = 1, 5, 10, 20) on CLS, on the mean of the patch tokens, and on both."""

    label_column: Annotated[str, typer.Option(help="Column that holds the labels.")] = "label"
    k: Neighbours = None
    num_train: Annotated[
        Optional[int], typer.Option(min=2, help="Size of a random sample of the training images.")
    ] = None
    num_test: TestSize = None

    def measure(self) -> "Results":
        """Of labelled images."""
        from ..evaluation.knn import NEIGHBOURS, evaluate_knn

        self.refuse_one_split()
        train = self.examples(self.dataset, self.train_split, self.num_train)
        test = self.examples(self.test_dataset or self.dataset, self.test_split, self.num_test)
        return evaluate_knn(self.comparison(), train, test, neighbours=self.k or NEIGHBOURS, **self.running)


@dataclass(kw_only=True)
class Segmentation(Voting):
    """Segment images by k-NN (k = 10) of their patches among the labelled patches of other images."""

    masks: Masks = None
    test_masks: Annotated[Optional[str], typer.Option(help="Folder of the masks of --test-dataset.")] = None
    mask_column: MaskColumn = "mask"
    ignore_label: Annotated[int, typer.Option(help="Class of pixels that count nowhere.")] = 255
    same_size: SameSize = False
    k: Neighbours = None
    num_train: Annotated[
        int, typer.Option(min=2, help="Size of a random sample of the training images, held in memory.")
    ] = 1000
    num_test: TestSize = None

    def measure(self) -> "Results":
        """Of images with masks whose values are classes."""
        from ..evaluation.segmentation import NEIGHBOURS, evaluate_segmentation

        self.refuse_one_split()
        train = self.examples(self.dataset, self.train_split, self.num_train, self.masks)
        tested = (self.dataset, self.masks) if self.test_dataset is None else (self.test_dataset, self.test_masks)
        test = self.examples(tested[0], self.test_split, self.num_test, tested[1])
        chosen: dict[str, Any] = {"neighbours": self.k or NEIGHBOURS, "ignore_label": self.ignore_label}
        return evaluate_segmentation(self.comparison(), train, test, **chosen, **self.running)


RuleOptions: Any = options_of(ViewRule)


@dataclass(kw_only=True)
class Matching(Evaluation, RuleOptions):
    """Match the patches of two views of each photograph: does a patch find the same thing, or the same place?"""

    dataset: Annotated[str, typer.Argument(metavar="[IMAGES]", help="Folder of images, or a data set.")] = ""
    split: Split = None
    num_images: Annotated[
        Optional[int], typer.Option(min=2, help="Size of a random sample; of --spair, of its pairs. Default: 500.")
    ] = 500
    hpatches: Annotated[
        Optional[Path], typer.Option(metavar="FOLDER", help="Match images whose homography is known, as in HPatches.")
    ] = None
    spair: Annotated[
        Optional[Path],
        typer.Option(metavar="FOLDER", help="Match key points of one class of things, as in SPair-71k."),
    ] = None

    def measure(self) -> "Results":
        """Of views of photographs, or of pairs with known truth."""
        sources = [source for source in (self.dataset, self.hpatches, self.spair) if source]
        if len(sources) != 1:
            raise DataError("Matching needs one source: IMAGES, or --hpatches FOLDER, or --spair FOLDER.")
        self.dataset = str(sources[0])
        rule = ViewRule(**values_of(self, ViewRule))
        if not self._draws_views and rule != ViewRule():
            raise DataError("--hpatches and --spair have pairs of their own; leave out the options that draw views.")
        if self.hpatches is not None:
            from ..evaluation.homographies import evaluate_homographies

            return evaluate_homographies(self.comparison(), self.hpatches, **self.noted)
        if self.spair is not None:
            from ..evaluation.keypoints import evaluate_keypoints

            options: dict[str, Any] = {"split": self.split or "test", "num_pairs": self.num_images, "seed": self.seed}
            return evaluate_keypoints(self.comparison(), self.spair, **options, **self.noted)
        from ..evaluation.matching import evaluate_matching

        examples = self.examples(self.dataset, self.split, self.num_images)
        return evaluate_matching(self.comparison(), examples, rule=rule, seed=self.seed, **self.running)

    @property
    def _draws_views(self) -> bool:
        return self.hpatches is None and self.spair is None


@dataclass(kw_only=True)
class Position(Evaluation):
    """Measure how much of the patch tokens a position explains: share of variance, and R² of a linear probe."""

    split: Split = None
    num_images: Annotated[int, typer.Option(min=2, help="Size of a random sample, held in memory.")] = 500
    ridge: Annotated[float, typer.Option(help="Of the probe, in mean variances of the raw tokens.")] = 1.0

    def measure(self) -> "Results":
        """Of images alone."""
        from ..evaluation.position import evaluate_position

        images = self.examples(self.dataset, self.split, self.num_images)
        return evaluate_position(self.comparison(), images, ridge=self.ridge, **self.running)


def load_head(head: str, device: str | None, **hub_kwargs: Any) -> "SOAPModelWrapper":
    """The head and its backbone, on the device asked for."""
    from ..heads.model import SOAPModelWrapper
    from ..heads.opening import refuse_missing_head
    from ..processes import find_device

    refuse_missing_head(head)
    target = find_device(device)
    return SOAPModelWrapper.from_pretrained(head, **hub_kwargs).to(target)
