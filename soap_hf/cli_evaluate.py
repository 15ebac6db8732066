"""The command line of the evaluations: `soap-hf evaluate saliency | knn | segmentation | position`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from .cli_options import (
    DatasetName,
    Head,
    hide_progress_bars,
    parse_image_size,
    with_evaluation_options,
    with_single_image_options,
)
from .errors import DataError

if TYPE_CHECKING:
    from .evaluation.comparison import Comparison
    from .evaluation.results import Results
    from .modeling_soap import SOAPModelWrapper

app = typer.Typer(help="Measure what a head does: raw, clean and rivals side by side.", no_args_is_help=True)

Masks = Annotated[
    Optional[str], typer.Argument(metavar="[MASKS]", help="Folder of masks, if the one before is of images.")
]
MaskColumn = Annotated[str, typer.Option(help="Column that holds the masks.")]
SameSize = Annotated[
    bool, typer.Option("--same-size", help="Refuse masks of another size than their image, instead of resizing.")
]
Split = Annotated[Optional[str], typer.Option(help="Split; default: the only one, else train.")]
TrainSplit = Annotated[Optional[str], typer.Option(help="Default: the only one, else train.")]
TestSplit = Annotated[Optional[str], typer.Option(help="Default: test; of another data set as for --train-split.")]
TestDataset = Annotated[Optional[str], typer.Option(help="Another data set to test on.")]
TrainSize = Annotated[Optional[int], typer.Option(min=2, help="Size of a random sample of the training images.")]
TestSize = Annotated[Optional[int], typer.Option(min=2, help="Size of a random sample of the test images.")]
Neighbours = Annotated[Optional[list[int]], typer.Option(min=1, help="Neighbours that vote. May be repeated.")]


@app.command()
@with_single_image_options
def saliency(
    head: Head,
    dataset: Annotated[str, typer.Argument(metavar="IMAGES", help="Folder of images, or a data set.")],
    masks: Masks = None,
    mask_column: MaskColumn = "mask",
    split: Split = None,
    num_images: Annotated[Optional[int], typer.Option(min=2, help="Size of a random sample; default: all.")] = None,
    image_size: Annotated[
        Any,
        typer.Option(
            parser=parse_image_size, metavar="SIZE|HxW", help="Resize all images; default: each has its own size."
        ),
    ] = None,
    centred: Annotated[
        bool, typer.Option("--centred", help="Take the fit's mean token away first, in all arms.")
    ] = False,
    same_size: SameSize = False,
    bilateral: Annotated[
        bool, typer.Option("--bilateral/--no-bilateral", help="Measure after refinement by the bilateral solver, too.")
    ] = True,
    **options: Any,
) -> None:
    """Find the salient object of each image by TokenCut, and compare it with its mask."""
    begin(options)
    from .evaluation.examples import Examples, open_pairs
    from .evaluation.saliency import evaluate_saliency

    opened = open_pairs(
        dataset,
        masks,
        split=split,
        config_name=options["config_name"],
        token=options["token"],
        image_column=options["image_column"],
        mask_column=mask_column,
    )
    examples = Examples(
        opened, mask_column=mask_column, num_images=num_images, resize_masks=not same_size, **reading(options)
    )
    comparison = compare(head, options | {"image_size": image_size})
    shown = {"bilateral": bilateral, "image_size": image_size, "centred": centred}
    found = evaluate_saliency(comparison, examples, **shown, **running(options))
    finish(found, options, head, dataset)


@app.command()
@with_evaluation_options
def knn(
    head: Head,
    dataset: DatasetName,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    test_dataset: TestDataset = None,
    label_column: Annotated[str, typer.Option(help="Column that holds the labels.")] = "label",
    k: Neighbours = None,
    num_train: TrainSize = None,
    num_test: TestSize = None,
    **options: Any,
) -> None:
    """Classify images by weighted k-NN (k = 1, 5, 10, 20) on CLS, on the mean of the patch tokens, and on both."""
    begin(options)
    from .data import open_dataset
    from .evaluation.examples import Examples
    from .evaluation.knn import NEIGHBOURS, evaluate_knn

    def examples(name: str, split: str | None, number: int | None) -> Examples:
        opened = open_dataset(name, split=split, config_name=options["config_name"], token=options["token"])
        return Examples(opened, label_column=label_column, num_images=number, **reading(options))

    test_split = _test_split(train_split, test_split, test_dataset)
    train = examples(dataset, train_split, num_train)
    test = examples(test_dataset or dataset, test_split, num_test)
    found = evaluate_knn(compare(head, options), train, test, neighbours=k or NEIGHBOURS, **running(options))
    finish(found, options, head, dataset)


@app.command()
@with_evaluation_options
def segmentation(
    head: Head,
    dataset: DatasetName,
    masks: Masks = None,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    test_dataset: TestDataset = None,
    test_masks: Annotated[Optional[str], typer.Option(help="Folder of the masks of --test-dataset.")] = None,
    mask_column: MaskColumn = "mask",
    ignore_label: Annotated[int, typer.Option(help="Class of pixels that count nowhere.")] = 255,
    same_size: SameSize = False,
    k: Neighbours = None,
    num_train: Annotated[
        int, typer.Option(min=2, help="Size of a random sample of the training images, held in memory.")
    ] = 1000,
    num_test: TestSize = None,
    **options: Any,
) -> None:
    """Segment images by k-NN (k = 10) of their patches among the labelled patches of other images."""
    begin(options)
    from .evaluation.examples import Examples, open_pairs
    from .evaluation.segmentation import NEIGHBOURS, evaluate_segmentation

    def examples(name: str, folder: str | None, split: str | None, number: int | None) -> Examples:
        source = {"split": split, "config_name": options["config_name"], "token": options["token"]}
        columns = {"image_column": options["image_column"], "mask_column": mask_column}
        return Examples(
            open_pairs(name, folder, **columns, **source),
            mask_column=mask_column,
            num_images=number,
            resize_masks=not same_size,
            **reading(options),
        )

    test_split = _test_split(train_split, test_split, test_dataset)
    train = examples(dataset, masks, train_split, num_train)
    tested = (dataset, masks) if test_dataset is None else (test_dataset, test_masks)
    test = examples(*tested, test_split, num_test)
    found = evaluate_segmentation(
        compare(head, options),
        train,
        test,
        neighbours=k or NEIGHBOURS,
        ignore_label=ignore_label,
        **running(options),
    )
    finish(found, options, head, dataset)


@app.command()
@with_evaluation_options
def position(
    head: Head,
    dataset: DatasetName,
    split: Split = None,
    num_images: Annotated[int, typer.Option(min=2, help="Size of a random sample, held in memory.")] = 500,
    ridge: Annotated[float, typer.Option(help="Of the probe, in mean variances of the raw tokens.")] = 1.0,
    **options: Any,
) -> None:
    """Measure how much of the patch tokens a position explains: share of variance, and R² of a linear probe."""
    begin(options)
    from .data import open_dataset
    from .evaluation.examples import Examples
    from .evaluation.position import evaluate_position

    opened = open_dataset(dataset, split=split, config_name=options["config_name"], token=options["token"])
    images = Examples(opened, num_images=num_images, **reading(options))
    finish(evaluate_position(compare(head, options), images, ridge=ridge, **running(options)), options, head, dataset)


def begin(options: dict[str, Any]) -> None:
    """What comes before the work of every evaluation: bars, and an output folder that can be written."""
    if options["quiet"]:
        hide_progress_bars()
    if options["output"] is not None:
        from .tensor_files import check_output_folder

        check_output_folder(options["output"], options["overwrite"])


def load_head(head: str, options: dict[str, Any]) -> "SOAPModelWrapper":
    """The head and its backbone, on the device asked for."""
    from .fit_inputs import find_device
    from .modeling_soap import SOAPModelWrapper

    device = find_device(options["device"])
    reach = {name: options[name] for name in ("revision", "token", "trust_remote_code") if options[name]}
    return SOAPModelWrapper.from_pretrained(head, **reach).to(device)


def compare(head: str, options: dict[str, Any]) -> "Comparison":
    """The arms that the options ask for."""
    from .evaluation.comparison import Comparison

    model = load_head(head, options)
    if options["mu"] is not None:
        model.reweight(options["mu"], model.config.tau, model.config.threshold)
    return Comparison.of(
        model,
        options["method"] or ["soap"],
        rank=options["rank"],
        layer=options["layer"],
        image_size=options["image_size"],
    )


def reading(options: dict[str, Any]) -> dict[str, Any]:
    """The options that belong to `Examples`."""
    return {name: options[name] for name in ("image_column", "seed", "max_bad_images")}


def running(options: dict[str, Any]) -> dict[str, Any]:
    """The options that belong to every evaluation."""
    from .evaluation.results import command_line

    batches = {"batch_size": options["batch_size"]} if "batch_size" in options else {}
    return {**batches, "progress": not options["quiet"], "command": command_line(sys.argv[1:])}


def finish(found: "Results", options: dict[str, Any], head: str, dataset: str) -> None:
    """Prints the table, and writes the files if there is a folder for them; one in the head's reaches its card."""
    from .data import public_name
    from .evaluation.results import results_table, write_results
    from .head_files import EVALUATIONS_FOLDER
    from .model_card import refresh_card

    Console().print(results_table(found.summary, found.name))
    if options["output"] is not None:
        summary = {"evaluation": found.name, "dataset": public_name(dataset), **found.summary}
        write_results(options["output"], found.name, found.rows, summary)
        typer.echo(f"Results written to {options['output']}")
        if options["output"].absolute().parent == Path(head).absolute() / EVALUATIONS_FOLDER:
            refresh_card(Path(head))


def _test_split(train_split: str | None, test_split: str | None, test_dataset: str | None) -> str | None:
    """The split to test on.

    Raises:
        DataError: it is the one to train on.
    """
    if test_dataset is not None:
        return test_split
    if (test_split or "test") == (train_split or "train"):
        raise DataError(
            f"Training and test images would be one split ({test_split or 'test'}); choose two with --train-split and "
            "--test-split, or name a --test-dataset."
        )
    return test_split or "test"
