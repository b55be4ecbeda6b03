"""Which images of a run are chosen to be labelled: their scores, their spread, their groups, and the list."""

import csv
import io
import logging
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import vlsm
from tests.conftest import SHARED
from tests.tiny import save_tiny_clipseg
from vlsm.archive.archive import open_archive
from vlsm.archive.carried import Carry
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.inspection import NEAR_BITS, examples_table, inspect_record, perceptual_hash
from vlsm.datasets.read import read_dataset
from vlsm.datasets.settings import DatasetSettings
from vlsm.images.decode import decode_image
from vlsm.runs.results import write_part
from vlsm.segmentation.masks import describe_mask
from vlsm.select.__main__ import main
from vlsm.select.lists import LIST_SCHEMA

KVASIR = SHARED / "data" / "kvasir_seg"
pytestmark = pytest.mark.skipif(not KVASIR.is_dir(), reason="needs ../shared/data/kvasir_seg")
CARRIED = pa.struct([("patient_id", pa.string()), ("rank", pa.int64())])
NUM_IMAGES = 24


def write_run(folder, rows, is_finished=True, parts=3, width=0, **config):
    """The files of a run that segment writes, with these rows in some part files."""
    rows = list(rows)
    for number in range(parts):
        part = rows[number * len(rows) // parts : (number + 1) * len(rows) // parts]
        write_part(str(folder), number, part, "run", 0, CARRIED, width)
    record = {"config": {"prompts": ["polyp"], "members": [{"checkpoint": "c"}]} | config, "plan": {}, "run_id": "run"}
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    if is_finished:
        (folder / "summary.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    """Rows of real images as a small CLIPSeg segments them, with embeddings; one image failed."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    model = vlsm.build_model("clipseg", source=str(save_tiny_clipseg(folder / "clipseg")), image_size=64)
    vlsm.save_checkpoint(model, folder / "checkpoint", prompt="polyp")
    segmenter = vlsm.Segmenter(vlsm.load_checkpoint(folder / "checkpoint"), device="cpu")
    rows = []
    for number, path in enumerate(sorted((KVASIR / "images").iterdir())[:NUM_IMAGES]):
        found = segmenter.segment(str(path), "polyp", probabilities=True, embedding=True)
        record = vars(describe_mask(np.asfortranarray(found.mask.astype(bool)), found.probability))
        row = {"image_id": path.name, "image_uri": str(path), "prompt": "polyp", "kind": "mask", "model": "clipseg@0"}
        row |= record | {"status": "ok", "max_probability": float(found.probability.max())}
        rows.append(row | {"embedding": found.embedding, "patient_id": f"p{number // 3}", "rank": number})
    failed = {"status": "failed", "error": "corrupt: no image", "image_id": "z.jpg", "image_uri": "/z.jpg"}
    rows.append({"prompt": "polyp", "kind": "mask", "model": "clipseg@0"} | failed)
    return rows


@pytest.fixture(scope="module")
def run(segmented, tmp_path_factory):
    width = len(segmented[0]["embedding"])
    return write_run(tmp_path_factory.mktemp("run") / "masks of a run", segmented, width=width)


@pytest.fixture
def select(tmp_path, capsys):
    def select(output, *words, name="list.parquet", code=0):
        """The rows of the list, or the message."""
        path = tmp_path / name
        path.unlink(missing_ok=True)
        assert main([str(output), str(path), *map(str, words)]) == code
        said = capsys.readouterr()
        if code:
            assert not path.exists() and said.err.count("\n") >= 1
            return said.err.splitlines()[-1]
        assert said.out.startswith(f"{path}: ")
        return pq.read_table(path).to_pylist() if name.endswith(".parquet") else path

    return select


def test_the_least_certain_come_first_and_the_failed_one_never(run, select, segmented):
    rows = select(run, "--count", 6, "--by", "uncertainty")
    confidence = {row["image_id"]: row["confidence"] for row in segmented if row["status"] == "ok"}
    assert None not in confidence.values() and len(set(confidence.values())) == NUM_IMAGES
    assert [row["image_id"] for row in rows] == sorted(confidence, key=confidence.get)[:6]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5, 6] and {row["why"] for row in rows} == {"uncertain"}
    assert [row["uncertainty"] for row in rows] == pytest.approx([1 - row["confidence"] for row in rows], abs=1e-6)
    assert len(select(run, "--count", NUM_IMAGES)) == NUM_IMAGES


def test_the_list_has_the_columns_of_the_schema_then_those_of_the_users_list(run, select, segmented):
    rows = select(run, "--count", 3)
    assert list(rows[0]) == [*LIST_SCHEMA.names, "patient_id", "list_rank"]
    for row in rows:
        source = segmented[row["list_rank"]]
        assert {name: row[name] for name in ("image_id", "image_uri", "patient_id")} == {
            name: source[name] for name in ("image_id", "image_uri", "patient_id")
        }


def farthest(vectors, chosen):
    """The greedy k-centre choice in plain words: the vector whose nearest chosen one is farthest."""
    return max(
        set(range(len(vectors))) - {*chosen}, key=lambda each: min(1 - vectors[each] @ vectors[c] for c in chosen)
    )


def test_diverse_images_are_the_farthest_by_embedding(run, select, segmented, caplog):
    rows = select(run, "--count", 5)
    ok = [row for row in segmented if row["status"] == "ok"]
    vectors = np.array([row["embedding"] for row in ok], np.float64)
    names = [row["image_id"] for row in ok]
    chosen = [min(range(NUM_IMAGES), key=lambda each: ok[each]["confidence"])]
    while len(chosen) < 5:
        chosen.append(farthest(vectors, chosen))
    assert [row["image_id"] for row in rows] == [names[each] for each in chosen]
    assert {row["why"] for row in rows} == {"uncertain, diverse"}
    assert rows[0]["distance"] is None and all(row["distance"] > 0 for row in rows[1:])
    assert "hash" not in caplog.text


def test_without_embeddings_perceptual_hashes_are_compared_and_it_is_said(segmented, select, tmp_path, caplog):
    output = write_run(tmp_path / "out", segmented)
    with caplog.at_level(logging.INFO):
        rows = select(output, "--count", 4, "--by", "diversity", "--seed", 3)
    assert (
        f"OUTPUT has no embeddings: {NUM_IMAGES} images are read again, and compared by perceptual hashes"
        in caplog.text
    )
    hashes = [perceptual_hash(decode_image(open(row["image_uri"], "rb").read(), "x")) for row in rows]
    bits = [
        min(int(each ^ other).bit_count() for other in hashes[:number]) for number, each in enumerate(hashes) if number
    ]
    assert [row["distance"] for row in rows[1:]] == pytest.approx([2 * each / 64 for each in bits])
    assert min(bits) > NEAR_BITS and {row["why"] for row in rows} == {"diverse"}


def test_images_that_can_no_longer_be_read_are_not_chosen_for_their_looks(segmented, select, tmp_path, caplog):
    gone = [row | {"image_uri": str(tmp_path / "gone.jpg")} if n % 8 == 0 else row for n, row in enumerate(segmented)]
    output = write_run(tmp_path / "out", gone)
    rows = select(output, "--count", NUM_IMAGES - 3)
    assert not any(row["image_uri"].endswith("gone.jpg") for row in rows)
    assert "3 images cannot be read any more and are not chosen; the first: missing: " in caplog.text
    assert select(output, "--count", NUM_IMAGES - 2, code=2).endswith("only 21 images can be chosen")


def test_the_same_seed_gives_the_same_list_and_another_one_another(run, select):
    words = "--count", 8, "--random", 0.5
    assert select(run, *words) == select(run, *words) != select(run, *words, "--seed", 1)


def test_a_random_share_stands_evenly_between_the_others_and_comes_from_all_images(run, select):
    rows = select(run, "--count", 10, "--random", 0.2)
    assert [row["why"] == "random" for row in rows].count(True) == 2
    assert {number for number, row in enumerate(rows) if row["why"] == "random"} <= {2, 3, 7, 8}
    drawn = Counter(
        row["image_id"] for seed in range(30) for row in select(run, "--count", 8, "--random", 1, "--seed", seed)
    )
    assert len(drawn) == NUM_IMAGES and all(1 <= number <= 22 for number in drawn.values())  # 10 of each are expected


def test_no_group_has_more_images_than_its_limit(run, select):
    for words in (["--random", "0.5"], ["--by", "uncertainty"], ["--by", "diversity"]):
        rows = select(run, "--count", 16, "--group", "patient_id", "--per-group", 2, *words)
        assert set(Counter(row["patient_id"] for row in rows).values()) == {2}  # 8 patients with 3 images each
    message = select(run, "--count", 17, "--group", "patient_id", "--per-group", 2, code=2)
    assert message == "error: --count is 17, but only 16 images can be chosen with at most 2 per group"
    assert len({row["patient_id"] for row in select(run, "--count", 8, "--group", "patient_id")}) == 8


def test_labelled_images_are_not_chosen_and_the_next_ones_differ_from_them(run, select, segmented, tmp_path, caplog):
    (tmp_path / "done.csv").write_text("image_uri\n" + "".join(f"{row['image_uri']}\n" for row in segmented[:10]))
    with caplog.at_level(logging.INFO):
        rows = select(run, "--count", NUM_IMAGES - 10, "--exclude", tmp_path / "done.csv")
    assert {row["image_id"] for row in rows} == {row["image_id"] for row in segmented[10:NUM_IMAGES]}
    assert "10 images of OUTPUT are labelled already (--exclude names 10)" in caplog.text
    vectors = np.array([row["embedding"] for row in segmented[:NUM_IMAGES]], np.float64)
    first = segmented.index(next(row for row in segmented if row["image_id"] == rows[0]["image_id"]))
    assert first == farthest(vectors, list(range(10)))
    message = select(run, "--count", 15, "--exclude", tmp_path / "done.csv", code=2)
    assert message == "error: --count is 15, but only 14 images can be chosen (1 failed, 10 labelled besides)"


def test_examples_of_a_training_are_labelled_also_where_their_files_were_copied(run, select, tmp_path, segmented):
    for row in segmented[:4]:
        for kind in ("images", "masks"):
            copy = tmp_path / kind / row["image_id"]
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes((KVASIR / kind / row["image_id"]).read_bytes())
    settings = DatasetSettings(prompts={"kvasir": "polyp"})
    records = read_dataset("kvasir", str(tmp_path), settings)
    facts = [inspect_record(record, ExampleReader(settings)) for record in records]
    pq.write_table(examples_table(records, facts), tmp_path / "examples.parquet")
    output = tmp_path / "out"
    hashed = [row | {"content_sha256": fact.image_sha256} for row, fact in zip(segmented, facts, strict=False)]
    write_run(output, [*hashed, *segmented[4:]], width=len(segmented[0]["embedding"]))
    rows = select(output, "--count", NUM_IMAGES - 4, "--exclude", tmp_path / "examples.parquet")
    assert {row["image_id"] for row in rows}.isdisjoint(row["image_id"] for row in segmented[:4])


def make_row(number, prompt="polyp", confidence=0.9, **more):
    row = {"image_id": f"{number:03d}", "image_uri": f"/{number:03d}.png", "prompt": prompt, "kind": "mask"}
    row |= {"model": "m", "status": "ok", "confidence": confidence, "max_probability": 0.9, "area_fraction": 0.1}
    return row | more


def test_what_makes_a_mask_uncertain(select, tmp_path):
    rows = [
        make_row(0, confidence=0.7),  # 0.3
        make_row(1, confidence=None, max_probability=0.45, area_fraction=0.0),  # empty, but nearly not: 0.45
        make_row(2, confidence=None, max_probability=0.01, area_fraction=0.0),  # empty, and surely so: 0.01
        make_row(3, confidence=0.9, agreement=0.2),  # its models disagree: 0.8
        make_row(4, confidence=float("nan"), max_probability=7.0),  # nothing of it is known
    ]
    found = select(write_run(tmp_path / "out", rows), "--count", 4, "--by", "uncertainty")
    assert [(row["image_id"], row["uncertainty"]) for row in found] == [
        ("003", 0.8), ("001", 0.45), ("000", 0.3), ("002", 0.01)
    ]  # fmt: skip


def test_odd_areas_are_the_smallest_and_largest_of_their_prompt(select, tmp_path):
    rows = [
        make_row(number, prompt, area_fraction=area * (number + 1) / 9)
        for number in range(9)
        for prompt, area in (("polyp", 0.1), ("organ", 0.9))
    ]
    output = write_run(tmp_path / "out", rows)
    found = select(output, "--count", 9, "--by", "area")
    assert [row["image_id"] for row in found] == ["000", "008", "001", "007", "002", "006", "003", "005", "004"]
    assert found[-1]["odd_area"] == 0 and {row["why"] for row in found} == {"odd area"}
    assert {row["prompt"] for row in select(output, "--count", 9, "--by", "area", "--prompt", "organ")} == {"organ"}


def test_two_criteria_take_turns_and_say_which_one_chose(select, tmp_path):
    rows = [make_row(n, confidence=0.5 + n / 40, area_fraction=n / 20 if n < 12 else 0.3) for n in range(20)]
    found = select(write_run(tmp_path / "out", rows), "--count", 4, "--by", "uncertainty,area")
    assert [(row["image_id"], row["why"]) for row in found] == [
        ("000", "uncertain"), ("011", "odd area"), ("001", "uncertain"), ("010", "odd area")
    ]  # fmt: skip


def test_equal_scores_stay_in_the_order_of_the_run_and_an_image_stands_there_once(select, tmp_path):
    rows = [make_row(number, prompt) for number in range(40) for prompt in ("polyp", "fold")]
    rows += [row | {"kind": "member 1", "confidence": 0.1} for row in rows]
    output = write_run(tmp_path / "out", sorted(rows, key=lambda row: row["image_id"]), parts=8)
    found = select(output, "--count", 40, "--by", "uncertainty")
    assert [row["image_id"] for row in found] == [f"{number:03d}" for number in range(40)]
    assert {row["prompt"] for row in found} == {"polyp"}


def test_the_embedding_of_an_image_serves_all_its_prompts(select, tmp_path):
    vectors = np.eye(4, dtype=np.float16)[[0, 0, 0, 1, 2, 3]]
    rows = []
    for number, vector in enumerate(vectors):
        rows.append(make_row(number, "fold", 0.9, embedding=vector))
        rows.append(make_row(number, "polyp", 0.5 + number / 100))
    output = write_run(tmp_path / "out", rows, parts=1, width=4)
    found = select(output, "--count", 4, "--prompt", "polyp")
    assert [row["image_id"] for row in found] == ["000", "003", "004", "005"]
    assert [row["distance"] for row in found] == [None, 1, 1, 1]


def test_rows_are_found_in_every_piece_of_a_large_part(select, tmp_path):
    sure = {3: 0.5, 700: 0.6, 1029: 0.7}  # parts are read in pieces of 256 rows
    rows = [make_row(number, confidence=sure.get(number, 0.99)) for number in range(1030)]
    output = write_run(tmp_path / "out", rows, parts=1)
    found = select(output, "--count", 3, "--by", "uncertainty")
    assert [(row["image_id"], row["confidence"]) for row in found] == [("003", 0.5), ("700", 0.6), ("1029", 0.7)]


def test_a_csv_has_the_same_rows_is_safe_in_a_spreadsheet_and_is_a_list_itself(segmented, select, tmp_path):
    rows = [row | {"patient_id": "=1+1"} for row in segmented if row["status"] == "ok"]
    output = write_run(tmp_path / "out", rows)
    path = select(output, "--count", 5, "--by", "uncertainty", name="list.csv")
    text = path.read_bytes().decode()
    read = list(csv.DictReader(io.StringIO(text, newline="")))
    table = select(output, "--count", 5, "--by", "uncertainty")
    assert [row["image_uri"] for row in read] == [row["image_uri"] for row in table]
    assert {row["patient_id"] for row in read} == {"'=1+1"} and read[0]["distance"] == ""
    archive = open_archive(str(path), (), carry=Carry("all"))
    images = list(archive.rows)
    assert [image["image_id"] for image in images] == [row["image_id"] for row in table]
    assert all(image["prompts"] == ["polyp"] for image in images)
    assert [image["carried"]["patient_id"] for image in images] == ["=1+1"] * 5


def test_a_list_with_masks_is_a_dataset(run, select, tmp_path):
    rows = select(run, "--count", 3)
    labelled = [row | {"mask_uri": row["image_uri"].replace("/images/", "/masks/")} for row in rows]
    pq.write_table(pa.Table.from_pylist(labelled), tmp_path / "labelled.parquet")
    records = read_dataset("kvasir", str(tmp_path / "labelled.parquet"), DatasetSettings())
    assert [(record.image_uri, record.prompts) for record in records] == [
        (row["image_uri"], {"p1": ("polyp",)}) for row in rows
    ]
    reader = ExampleReader(DatasetSettings())
    assert all(0 < reader.read(record).target.mask.mean() < 1 for record in records)


def test_a_run_that_is_not_finished_is_told(segmented, select, tmp_path, caplog):
    output = write_run(tmp_path / "out", segmented, is_finished=False)
    (output / "masks" / "part-00000002.parquet").unlink()
    assert len(select(output, "--count", 3, "--by", "uncertainty")) == 3
    assert f"{output} is not finished: images are chosen among those that are segmented so far" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--group", "sex"], "unknown column 'sex'; columns: image_id, .*patient_id, rank"),
        (["--group", "bbox"], "--group bbox: the column has lists; groups need texts or numbers"),
        (["--prompt", "liver"], "no row of OUTPUT has the prompt 'liver'; its prompts are 'polyp'"),
        (["--count", "25"], r"--count is 25, but only 24 images can be chosen \(1 failed besides\)"),
        (["--exclude", "/nowhere.csv"], "/nowhere.csv"),
    ],
)
def test_wrong_words_are_one_sentence(run, select, words, message):
    assert re.search(message, select(run, *words, code=2))


def test_a_run_without_scores_is_told(select, tmp_path):
    output = write_run(tmp_path / "out", [make_row(n, confidence=None, max_probability=None) for n in range(5)])
    assert select(output, "--count", 2, code=2) == (
        "error: --by uncertainty needs the column confidence, max_probability or agreement, but no row of OUTPUT has a "
        "value there"
    )
    assert len(select(output, "--count", 2, "--by", "area")) == 2


def test_what_is_no_run_and_what_is_no_list(run, select, tmp_path, capsys):
    assert f"there are no masks in '{tmp_path}'; it must be the OUTPUT" in select(tmp_path, code=2)
    assert "it must end in .parquet or .csv" in select(run, name="list.xlsx", code=2)
    (tmp_path / "labels.csv").write_text("image_uri,mask_uri\n")
    assert main([str(run), str(tmp_path / "labels.csv")]) == 2
    assert "exists, and may hold labels: remove it or choose another name" in capsys.readouterr().err
    assert (tmp_path / "labels.csv").read_text() == "image_uri,mask_uri\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--by", "beauty"], "--by has 'beauty'; it takes uncertainty, area, diversity, with commas"),
        (["--count", "0"], "--count is 0; it must be 1 or more"),
        (["--random", "1.5"], "--random is 1.5; it must be a share from 0 to 1"),
        (["--per-group", "2"], "--per-group needs --group COLUMN"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_words_out_of_range_end_with_usage(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["out", "list.csv", *words])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_damaged_embedding_is_no_vector(select, tmp_path, caplog):
    vectors = [[0, 1], [1, 0], [float("nan"), 0], [0, 0], [1, 1], [1, -1]]
    rows = [make_row(number, embedding=np.array(vector, np.float16)) for number, vector in enumerate(vectors)]
    output = write_run(tmp_path / "out", rows, width=2)
    assert [row["image_id"] for row in select(output, "--count", 4)] == ["000", "005", "001", "004"]
    assert "2 images have no embedding and are not chosen" in caplog.text
