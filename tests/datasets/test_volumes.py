"""Volumes with label volumes, written by nibabel and SimpleITK in several orientations."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.inspection import examples_table, inspect_record, records_from_table
from vlsm.datasets.read import read_dataset
from vlsm.datasets.settings import DatasetSettings
from vlsm.datasets.volumes import expand_volumes
from vlsm.errors import ImageError, ManifestError

# the label has no symmetry: a turned or mirrored slice differs
LABELS = np.zeros((7, 6, 5), np.uint8)
LABELS[1:4, 2:5, 1] = 1
LABELS[1:3, 1, 1:3] = 2
LABELS[5, 5, 3] = 1
AFFINE = np.array([[-0.7, 0, 0, 40], [0, -0.8, 0, 30], [0, 0, 2.5, -100], [0, 0, 0, 1]])


def turn(image, codes):
    """The same volume, stored along other axes."""
    target = nib.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), target))


def save(path, values, codes="LPS", affine=AFFINE, dtype=np.uint8):
    """Save a volume whose axes run to the left, the back and the head, stored along other axes. Return its path."""
    image = turn(nib.Nifti1Image(np.asarray(values, dtype), affine, dtype=dtype), codes)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii", ".nii.gz")):
        nib.save(image, path)
    else:
        import SimpleITK

        itk = SimpleITK.GetImageFromArray(np.asarray(image.dataobj).T)
        placed = np.diag([-1, -1, 1, 1]) @ image.affine
        spacing = np.linalg.norm(placed[:3, :3], axis=0)
        itk.SetSpacing(spacing)
        itk.SetOrigin(placed[:3, 3])
        itk.SetDirection((placed[:3, :3] / spacing).ravel())
        SimpleITK.WriteImage(itk, str(path))
    return str(path)


def write_list(folder, *pairs, split="train"):
    lines = ["image_uri,mask_uri,split,prompt", *(f"{image},{mask},{split},liver" for image, mask in pairs)]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "list.csv")


def examples(records, **settings):
    reader = ExampleReader(DatasetSettings(**settings))
    return [reader.read(record) for record in records]


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize(
    ("image", "image_codes", "label", "label_codes"),
    [
        ("a.nii.gz", "LPS", "b.nii.gz", "LPS"),
        ("a.nii", "LAS", "b.nii.gz", "RAS"),
        ("a.nii.gz", "RAS", "b.nii", "PIR"),
        ("a.nrrd", "LPS", "b.mha", "LAS"),
        ("a.mha", "PIR", "b.nrrd", "LPS"),
    ],
)
def test_a_label_is_turned_as_its_image(tmp_path, axis, image, image_codes, label, label_codes):
    """The image shows the label in white."""
    save(tmp_path / image, (LABELS > 0) * 200, image_codes)
    save(tmp_path / label, LABELS, label_codes)
    records = read_dataset("mine", write_list(tmp_path, (image, label)), DatasetSettings(slices=axis))
    turned = nib.as_closest_canonical(nib.Nifti1Image(LABELS, AFFINE)).dataobj
    has_label = np.asarray(turned).any(axis=tuple({0, 1, 2} - {("sagittal", "coronal", "axial").index(axis)}))
    assert [record.image_selector for record in records] == [f"slice={number}" for number in np.flatnonzero(has_label)]
    read = examples(records, slices=axis)
    assert sum(int(example.target.mask.sum()) for example in read) == np.count_nonzero(LABELS)
    for example in read:
        np.testing.assert_array_equal(example.target.mask, example.image[:, :, 0] > 127)


def test_the_records_of_slices(tmp_path, caplog):
    caplog.set_level("INFO")
    save(tmp_path / "a.nii", LABELS * 100)
    save(tmp_path / "b.nii", LABELS)
    records = read_dataset("mine", write_list(tmp_path, ("a.nii", "b.nii")))
    assert [record.mask_selector for record in records] == ["slice=1", "slice=2", "slice=3"]
    first = records[0]
    assert first.where == f"{tmp_path}/list.csv, row 1, slice=1"
    assert (first.split, first.labels, first.group) == ("train", (1, 2), f"{tmp_path}/a.nii")
    assert "3 of 5 slices of classes in volumes show the class; the others are left out" in caplog.text
    assert "every value except 0 is foreground" in caplog.text


def test_all_slices_are_kept_on_request(tmp_path):
    save(tmp_path / "a.nii", LABELS * 100)
    save(tmp_path / "b.nii", LABELS)
    settings = DatasetSettings(absent_classes="empty")
    records = read_dataset("mine", write_list(tmp_path, ("a.nii", "b.nii")), settings)
    assert [bool(example.target.mask.any()) for example in examples(records)] == [False, True, True, True, False]


def test_only_the_slices_of_a_class_are_kept(tmp_path):
    """A record with classes, as nnU-Net's dataset.json states them."""
    save(tmp_path / "a.nii", LABELS * 100)
    save(tmp_path / "b.nii", LABELS, "RAS", dtype=np.float32)
    [whole, *_] = read_dataset("mine", write_list(tmp_path, ("a.nii", "b.nii")))
    whole = replace(whole, image_selector=None, mask_selector=None, labels=(1,), prompts={"p1": ("liver",)})
    records = list(expand_volumes([whole, replace(whole, labels=(2,))], DatasetSettings()))
    selectors = [(record.labels, record.mask_selector) for record in records]
    assert selectors == [((1,), "slice=1"), ((1,), "slice=3"), ((2,), "slice=1"), ((2,), "slice=2")]
    counts = [int(example.target.mask.sum()) for example in examples(records)]
    assert counts == [np.count_nonzero(LABELS[:, :, z] == label) for label, z in ((1, 1), (1, 3), (2, 1), (2, 2))]


def test_several_label_files_of_one_image_are_joined(tmp_path):
    save(tmp_path / "a.nii", LABELS * 100)
    save(tmp_path / "b.nii", LABELS == 1)
    save(tmp_path / "c.nii", LABELS == 2)
    [whole, *_] = read_dataset("mine", write_list(tmp_path, ("a.nii", "b.nii")))
    more = (str(tmp_path / "c.nii"),)
    whole = replace(whole, image_selector=None, mask_selector=None, labels=(), more_masks=more)
    records = list(expand_volumes([whole], DatasetSettings()))
    counts = [int(example.target.mask.sum()) for example in examples(records)]
    assert counts == [np.count_nonzero(LABELS[:, :, z]) for z in (1, 2, 3)]


def test_of_several_channels_the_first_is_used(tmp_path, caplog):
    caplog.set_level("INFO")
    channels = np.stack([(LABELS > 0) * 200, np.zeros_like(LABELS)], axis=3)
    nib.save(nib.Nifti1Image(channels.astype(np.uint8), AFFINE), tmp_path / "a.nii")
    save(tmp_path / "b.nii", LABELS)
    records = read_dataset("mine", write_list(tmp_path, ("a.nii", "b.nii")))
    assert records[0].image_selector == "volume=0,slice=1"
    assert "1 image volumes have several channels or times; only the first is used" in caplog.text
    for example in examples(records):
        np.testing.assert_array_equal(example.target.mask, example.image[:, :, 0] > 127)


def test_labels_of_each_time_go_with_the_image_of_that_time(tmp_path):
    times = np.stack([LABELS, LABELS * 0, LABELS == 2], axis=3).astype(np.uint8)
    for name in ("a.nii", "b.nii"):
        nib.save(nib.Nifti1Image(times, AFFINE), tmp_path / name)
    records = read_dataset("mine", write_list(tmp_path, ("a.nii", "b.nii")))
    assert {record.image_selector.partition(",")[0] for record in records} == {"volume=0", "volume=2"}
    assert [record.image_selector for record in records] == [record.mask_selector for record in records]


def test_headers_may_round(tmp_path):
    rounded = AFFINE.copy()
    rounded[0, 0] *= 1.0001
    rounded[:3, 3] += 0.1
    save(tmp_path / "a.nii", LABELS)
    save(tmp_path / "b.nii", LABELS, affine=rounded)
    assert len(read_dataset("mine", write_list(tmp_path, ("a.nii", "b.nii")))) == 3


def test_records_survive_their_table_and_are_not_expanded_again(tmp_path):
    save(tmp_path / "a.nii", LABELS * 100)
    save(tmp_path / "b.nii", LABELS)
    records = read_dataset("mine", write_list(tmp_path, ("a.nii", "b.nii")))
    facts = [inspect_record(record, ExampleReader(DatasetSettings())) for record in records]
    assert len({fact.image_sha256 for fact in facts}) == 3
    assert records_from_table(examples_table(records, facts)) == records
    assert list(expand_volumes(records, DatasetSettings())) == records


def moved(millimetres):
    affine = AFFINE.copy()
    affine[0, 3] += millimetres
    return affine


@pytest.mark.parametrize(
    ("values", "affine", "message"),
    [
        (LABELS[:-1], AFFINE, "b.nii has 6 x 6 x 5 voxels, .*; its image .*a.nii has 7 x 6 x 5; resample"),
        (LABELS, moved(0.35), "b.nii is up to 0.35 mm away from its image .*a.nii, whose voxels have 0.7 mm"),
        (LABELS, np.eye(4), "b.nii is up to .* mm away from its image .*a.nii"),
        (LABELS * 0, AFFINE, "none of the 5 slices of the label volumes holds a class"),
        (LABELS + 0.5, AFFINE, "b.nii has values that are not whole numbers; it is no label volume"),
        (np.arange(12 * 12 * 12).reshape(12, 12, 12), AFFINE, "b.nii has more than 1,000 different values"),
    ],
)
def test_a_label_that_does_not_fit_is_named(tmp_path, values, affine, message):
    save(tmp_path / "a.nii", LABELS)
    save(tmp_path / "b.nii", values, affine=affine, dtype=np.float32)
    with pytest.raises(ManifestError, match=message):
        read_dataset("mine", write_list(tmp_path, ("a.nii", "b.nii")))


def test_a_volume_with_a_picture_is_named(tmp_path):
    save(tmp_path / "a.nii", LABELS)
    Image.fromarray(LABELS[:, :, 1]).save(tmp_path / "b.png")
    for pair in (("a.nii", "b.png"), ("b.png", "a.nii")):
        with pytest.raises(ManifestError, match="a.nii is a volume and .*b.png is not; both must be volumes"):
            read_dataset("mine", write_list(tmp_path, pair))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "missing: there is no file .*.nii"),
        (lambda path: path.write_bytes(b"x" * 400), "has no NIfTI header"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "fewer than its header needs"),
    ],
)
@pytest.mark.parametrize("name", ["a.nii", "b.nii"])
def test_a_damaged_file_is_a_broken_record(tmp_path, name, spoil, message):
    """So that data.skip_broken can leave it out. The other volume of the dataset is read."""
    save(tmp_path / "a.nii", LABELS)
    save(tmp_path / "b.nii", LABELS)
    spoil(tmp_path / name)
    save(tmp_path / "c.nii", LABELS)
    broken, *good = read_dataset("mine", write_list(tmp_path, ("a.nii", "b.nii"), ("c.nii", "c.nii")))
    assert len(examples(good)) == 3
    with pytest.raises(ImageError, match=message):
        examples([broken])


def test_a_volume_that_is_repaired_later_is_not_read_as_its_first_slice(tmp_path):
    save(tmp_path / "a.nii", LABELS)
    [record] = read_dataset("mine", write_list(tmp_path, ("a.nii", "b.nii")))
    save(tmp_path / "b.nii", LABELS)
    with pytest.raises(ImageError, match="b.nii has no 'every slice'"):
        examples([record])


def test_large_labels_are_not_read_and_images_are_never(tmp_path):
    save(tmp_path / "a.nii", LABELS * 100, dtype=np.float64)
    save(tmp_path / "b.nii", LABELS)
    path = write_list(tmp_path, ("a.nii", "b.nii"))
    assert len(read_dataset("mine", path, DatasetSettings(max_image_bytes=700))) == 3  # the image has 2,032 bytes
    [broken] = read_dataset("mine", path, DatasetSettings(max_image_bytes=500))
    with pytest.raises(ImageError, match="bytes; max_image_bytes is 500"):
        examples([broken], max_image_bytes=500)
