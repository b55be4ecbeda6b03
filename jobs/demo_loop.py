"""Label in rounds on drawn images: train on few, segment the rest, choose, label, train again.

drawn/           images with a lesion, and their masks: a pool of images, few of them labelled at first, and a test
start/           output of `python -m jobs.train start --dataset drawn=start.csv --set model=unet_d ...`
chosen/N/        round N: the pool as the last model segments it (`masks/`), the list of `python -m vlsm.select masks
                 next.csv`, all labelled images with the drawn masks (`labelled.csv`), the next training (`training/`)
random/N/        the control: images are chosen at random
loop.html        the report: the Dice on the test over the number of labelled images, for both
"""

import csv
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.command import RaySession, logger
from jobs.demo import IMAGE_SIZE, SIDES_PX, WIDTH
from jobs.phantoms import write_labelled
from jobs.segment import segment
from jobs.train import train
from vlsm.config import MemberSettings, SegmentSettings
from vlsm.images.decode import decode_mask_file
from vlsm.select.__main__ import Scope, select_images
from vlsm.select.choosing import Wish
from vlsm.shown import say
from vlsm.training.history import MEAN, read_history
from vlsm.training.settings import OptimSettings, TrainRunSettings, TrainSettings

NUM_POOL, SPLITS = 240, {"val": 30, "test": 60}
NUM_START, NUM_CHOSEN, NUM_ROUNDS = 16, 24, 2
OPTIM = OptimSettings(epochs=40, lr=4e-3, batch_size=8, ce_weight=1.0, clip_norm=1.0, warmup_epochs=1)
KIND = "lesion"
ARMS = {"chosen": 0.0, "random": 1.0}  # share of images that each chooses at random
_COLUMNS = ("image_uri", "mask_uri", "split", "prompt")
_NUM_SHOWN = 12  # images of a round in the report


@dataclass
class Arm:
    """One way to choose images, and how far it is.

    Attributes:
        name: of ARMS.
        labelled: labelled images, by path.
        model: OUTPUT of the last training.
        scores: number of labelled images and Dice on the test, after each training.
        chosen: rows of the lists of all rounds.
    """

    name: str
    labelled: list[str]
    model: Path
    scores: list[tuple[int, float]]
    chosen: list[dict[str, str]] = field(default_factory=list)


def tell_loop(output: Path, seed: int = 0) -> None:
    """Run the rounds in the folder `output`, and replace the files of an earlier demo."""
    started_s = time.monotonic()
    with RaySession() as session:
        session.start()  # Ray starts while the images are drawn
        pool = draw(output, seed)
        session.wait()
        start = [str(path) for path in pool[:NUM_START]]
        score = learn(output, start, output / "start", seed)
        arms = [Arm(name, list(start), output / "start", [(len(start), score)]) for name in ARMS]
        for number in range(1, NUM_ROUNDS + 1):
            for arm in arms:
                add_round(output, arm, number, seed)
    report = write_page(output, arms)
    last = ", ".join(f"{arm.name} {arm.scores[-1][1]:.3f}" for arm in arms)
    say(
        f"\nDice on the test: {score:.3f} with {len(start)} labelled images; with {arms[0].scores[-1][0]}: {last}\n"
        f"lists     {output}/chosen/*/next.csv, {output}/random/*/next.csv\n"
        f"done in {time.monotonic() - started_s:.0f} s; open the report in a browser:\n"
        f"report    {report}"
    )


def draw(output: Path, seed: int) -> list[Path]:
    """Write the images and masks; return the images of the pool."""
    for name in ("start", *ARMS):
        shutil.rmtree(output / name, ignore_errors=True)
    logger.info("drawing %d images below %s", NUM_POOL + sum(SPLITS.values()), output)
    write_labelled(output / "drawn", {"pool": NUM_POOL} | SPLITS, seed, SIDES_PX)
    return sorted((output / "drawn" / "images").glob("pool_*"))


def mask_of(image: str) -> Path:
    """Return the drawn mask of an image: it stands for the work of a labeller."""
    path = Path(image)
    return path.parents[1] / "masks" / KIND / f"{path.stem}.png"


def learn(output: Path, labelled: Sequence[str], training: Path, seed: int) -> float:
    """Train on labelled images and return the Dice on the test."""
    rows = [(image, "train") for image in labelled]
    for split in SPLITS:
        rows += [(str(path), split) for path in sorted((output / "drawn" / "images").glob(f"{split}_*"))]
    list_path = training.parent / ("labelled.csv" if training.name == "training" else f"{training.name}.csv")
    list_path.parent.mkdir(parents=True, exist_ok=True)
    with list_path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([_COLUMNS, *((image, mask_of(image), split, KIND) for image, split in rows)])
    logger.info("python -m jobs.train %s --dataset drawn=%s", training, list_path)
    train(
        TrainSettings(
            output=str(training),
            datasets={"drawn": str(list_path)},
            model="unet_d",
            options={"image_size": IMAGE_SIZE, "width": WIDTH, "dropout": 0},
            seed=seed,
            optim=OPTIM,
            run=TrainRunSettings(workers=1, micro_batch_size=OPTIM.batch_size),
        )
    )
    rows_of_test = [row for row in read_history(str(training)).rows if (row.split, row.dataset) == ("test", MEAN)]
    return rows_of_test[-1].dice


def add_round(output: Path, arm: Arm, number: int, seed: int) -> None:
    """Segment the pool, choose images, label them, and train again with all that are labelled."""
    folder = output / arm.name / str(number)
    folder.mkdir(parents=True)
    # the random images need no masks of their own: the masks only name the images that there are
    masks, list_path, known = output / "chosen" / str(number) / "masks", folder / "next.csv", folder / "known.csv"
    if not masks.exists():
        logger.info(
            "python -m jobs.segment '%s/drawn/images/pool_*' %s --checkpoint %s/checkpoint", output, masks, arm.model
        )
        segment(
            SegmentSettings(
                input=str(output / "drawn" / "images" / "pool_*"),
                output=str(masks),
                members=(MemberSettings(checkpoint=str(arm.model / "checkpoint")),),
                shard_rows=32,
            )
        )
    with known.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image_uri",), *((image,) for image in arm.labelled)])
    wish = Wish(NUM_CHOSEN, random_share=ARMS[arm.name], seed=seed + number)
    words = f"--count {wish.number} --random {wish.random_share:g} --seed {wish.seed} --exclude {known}"
    logger.info("python -m vlsm.select %s %s %s", masks, list_path, words)
    logger.info("%s", select_images(str(masks), str(list_path), wish, Scope(exclude=[str(known)])))
    with list_path.open(encoding="utf-8", newline="") as file:
        chosen = [row | {"round": str(number)} for row in csv.DictReader(file)]
    arm.chosen += chosen
    arm.labelled += [row["image_uri"] for row in chosen]
    arm.model = folder / "training"
    arm.scores.append((len(arm.labelled), learn(output, arm.labelled, arm.model, seed)))


def write_page(output: Path, arms: Sequence[Arm]) -> Path:
    """Write the report with both curves and the chosen images, and return its path."""
    # imported here: they import matplotlib
    from vlsm.report.charts import draw_curves
    from vlsm.report.page import Page, Section, Stat, as_table, render

    sizes = [number for number, _ in arms[0].scores]
    curves = [(arm.name, str(number), arm.name == "random", arm.scores) for number, arm in enumerate(arms)]
    chart = draw_curves("Dice on the test", curves, (min(sizes), max(sizes)), 1.0, "labelled images")
    rows = [
        {"labelled images": size} | {f"Dice, {arm.name}": arm.scores[position][1] for arm in arms}
        for position, size in enumerate(sizes)
    ]
    reasons = Counter((row["round"], row["why"]) for arm in arms for row in arm.chosen)
    counts = [{"round": number, "why": why, "images": images} for (number, why), images in sorted(reasons.items())]
    intro = (
        f"A model learned from {sizes[0]} images. In each of {NUM_ROUNDS} rounds, {NUM_CHOSEN} more were labelled: "
        "those that vlsm select chose with the last model, or random ones. This is one seed and a small test: the "
        "curves of another seed differ."
    )
    page = Page(
        kind="Labelling in rounds",
        title=output.name,
        banner="",
        stats=[
            Stat("Test Dice, chosen", f"{arms[0].scores[-1][1]:.3f}", f"{sizes[-1]} labelled images", "lead"),
            Stat("Test Dice, random", f"{arms[1].scores[-1][1]:.3f}", f"{sizes[-1]} labelled images"),
            Stat("Test Dice at first", f"{arms[0].scores[0][1]:.3f}", f"{sizes[0]} labelled images"),
        ],
        sections=[
            Section("curves", "Both ways to choose", intro, lines=[chart], tables=[as_table(rows)]),
            Section("reasons", "Why images were chosen", tables=[as_table(counts)]),
            Section("images", "Chosen images", groups=_draw_rounds(arms[0]), outlines=["target"]),
        ],
    )
    path = output / "loop.html"
    path.write_text(render(page), encoding="utf-8")
    return path


def _draw_rounds(arm: Arm) -> list[tuple[str, str, Any]]:
    """Return the first images of each round, with the outlines of their labels."""
    from vlsm.report.page import Case
    from vlsm.report.pictures import Painter
    from vlsm.runs.reading import open_reader

    def read_label(row: dict[str, Any]) -> tuple[None, Any]:
        path = mask_of(row["image_uri"])
        return None, decode_mask_file(path.read_bytes(), str(path), 127)

    painter = Painter(open_reader({}, str(arm.model), ()), read_label)
    groups = []
    for number in range(1, NUM_ROUNDS + 1):
        rows = [row for row in arm.chosen if row["round"] == str(number)][:_NUM_SHOWN]
        cases = []
        for row in rows:
            picture = painter.draw(row | {"status": "ok", "selector": None}, is_case=False)
            facts = [(name, row[name]) for name in ("uncertainty", "distance") if row[name]]
            uris = () if picture.problem else (picture.card,)
            cases.append(Case(row["image_id"], uris, picture.problem, facts, {"why": row["why"]}, {}))
        groups.append((f"Round {number}", f"the first {len(cases)} of {NUM_CHOSEN} images", cases))
    return groups
