import pytest

from vlsm.datasets.pairing import Pair, Pairing, pair_by_stem, split_of

PAIRS = {
    "equal names": (["images/a.jpg", "masks/a.png"], "", ["masks/a.png"]),
    "a volume": (["images/a.nii.gz", "labels/a.nii.gz"], "", ["labels/a.nii.gz"]),
    "a sub-folder that both have": (["images/p1/a.png", "masks/p1/a.png"], "", ["masks/p1/a.png"]),
    "a folder of slices with a word for images": (["images/scans_2/a.png", "masks/scans_2/a.png"], "", None),
    "split below": (["images/train/a.jpg", "masks/train/a.png"], "train", None),
    "split above": (["validation/images/a.jpg", "validation/masks/a.png"], "val", None),
    "split in the name": (["valid_images/a.png", "valid_masks/a.png"], "val", None),
    "names of the split differ": (["images/val/a.png", "masks/Validation/a.png"], "val", None),
    "folders with numbers": (["test_1/images/a.png", "test_1/masks/a.png"], "test", None),
    "other names": (["TrainDataset/Original/a.tif", "TrainDataset/Ground Truth/a.tif"], "train", None),
    "names with further words": (
        ["ISIC2018_Task1-2_Test_Input/I_1.jpg", "ISIC2018_Task1_Test_GroundTruth/I_1_segmentation.png"],
        "test",
        None,
    ),
    "a suffix in the other folder": (["imgs/a (1).jpg", "gt/a (1)_GT.tif"], "", None),
    "a prefix": (["Train Folder/img/covid_1.png", "Train Folder/labelcol/mask_covid_1.png"], "train", None),
    "words on both sides": (["images/image_7.png", "labels/label_7.png"], "", None),
    "a mask in the middle": (["images/scan_7.png", "labels/scan_mask_7.png"], "", None),
    "one folder": (["a.png", "a_mask.png"], "", ["a_mask.png"]),
    "one folder, numbered": (
        ["benign/b (1).png", "benign/b (1)_mask.png", "benign/b (1)_mask_10.png", "benign/b (1)_mask_2.png"],
        "",
        ["benign/b (1)_mask.png", "benign/b (1)_mask_2.png", "benign/b (1)_mask_10.png"],
    ),
    "one folder below a name with a word for masks": (
        ["Set_with_GT/test/a.png", "Set_with_GT/test/a_mask.png"],
        "test",
        None,
    ),
    "one folder with words only": (["p1/image.png", "p1/mask.png"], "", None),
    "a folder for each image": (["p1/images/a.png", "p1/masks/0af.png", "p1/masks/9c.png"], "", None),
    "nnU-Net": (["imagesTr/a_0000.png", "labelsTr/a.png"], "train", None),
    "nnU-Net's test": (["imagesTs/a_0000.png", "labelsTs/a.png"], "test", None),
}


@pytest.mark.parametrize("name", PAIRS)
def test_names_make_a_pair(name):
    paths, split, masks = PAIRS[name]
    pairing = pair_by_stem(reversed(paths))
    assert pairing == Pairing([Pair(split, paths[0], tuple(masks or paths[1:]))], is_nnunet="nnU-Net" in name)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["images/a.png", "masks/b.png"], Pairing(lone_images=["images/a.png"], lone_masks=["masks/b.png"])),
        (
            ["images/train/a.png", "masks/val/a.png"],
            Pairing(lone_images=["images/train/a.png"], lone_masks=["masks/val/a.png"]),
        ),
        (
            ["train_images/a.png", "test_masks/a.png"],
            Pairing(lone_images=["train_images/a.png"], lone_masks=["test_masks/a.png"]),
        ),
        (["images/A.png", "masks/a.png"], Pairing(lone_images=["images/A.png"], lone_masks=["masks/a.png"])),
        (["a.png", "b.png"], Pairing(lone_images=["a.png", "b.png"])),
        (
            ["images/a.png", "images/a.jpg", "masks/a.png"],
            Pairing(lone_masks=["masks/a.png"], unclear=[("images/a.jpg", "images/a.png")]),
        ),
        (["images/a.png", "masks/a.png", "gt/a.png"], Pairing(unclear=[("gt/a.png", "masks/a.png")])),
        (
            ["images/a.png", "masks/a.png", "masks/a_label.png"],
            Pairing(unclear=[("masks/a.png", "masks/a_label.png")]),
        ),
    ],
)
def test_what_makes_no_pair_is_told(paths, expected):
    assert pair_by_stem(paths) == expected


def test_files_in_other_folders_and_splits_without_masks_and_channels_are_told():
    pair = Pair("train", "imagesTr/a_0000.png", ("labelsTr/a.png",))
    paths = [pair.image, *pair.masks, "imagesTr/a_0001.png", "imagesTs/b_0000.png", "edges/a.png"]
    assert pair_by_stem(paths) == Pairing(
        [pair], unlabelled={"test": ["imagesTs/b_0000.png"]}, channels=["imagesTr/a_0001.png"], others=["edges/a.png"],
        is_nnunet=True,
    )  # fmt: skip


def test_an_image_without_a_mask_among_others_is_told_and_so_is_a_mask_of_an_image_that_has_one_of_its_own():
    pairing = pair_by_stem(["images/a.png", "images/a_1.png", "images/b.png", "masks/a_mask.png", "masks/a_1_mask.png"])
    assert [pair.masks for pair in pairing.pairs] == [("masks/a_mask.png",), ("masks/a_1_mask.png",)]
    assert pairing.lone_images == ["images/b.png"]
    # a_mask_1 is the mask of a_1, if there is such an image, and else mask 1 of a
    pairing = pair_by_stem(["images/a.png", "images/a_1.png", "masks/a_mask.png", "masks/a_mask_1.png"])
    assert [pair.masks for pair in pairing.pairs] == [("masks/a_mask.png",), ("masks/a_mask_1.png",)]


def test_numbered_folders_of_a_split_stay_apart():
    paths = [f"test_{number}/{kind}/a.png" for number in (1, 2) for kind in ("images", "masks")]
    assert [(pair.split, pair.image) for pair in pair_by_stem(paths).pairs] == [
        ("test", "test_1/images/a.png"),
        ("test", "test_2/images/a.png"),
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("Training", "train"),
        ("validation", "val"),
        ("VALID", "val"),
        (" dev ", "val"),
        ("testing", "test"),
        ("a", None),
    ],
)
def test_a_split_has_other_names(name, split):
    assert split_of(name) == split


def test_a_long_number_behind_a_mask_is_read_in_no_time():
    """A UID as DICOM tools put it into names; some regular expressions take years for it."""
    uid = "1.3.6.1.4.1.14519.5.2.1.6279.6001.298806137288633453246975630178"
    pairing = pair_by_stem([f"images/a_{uid}.png", f"masks/a_seg_{uid}_L.png", f"masks/a_mask_{'1' * 60}_L.png"])
    assert len(pairing.lone_images) + len(pairing.pairs) == 1
