"""What a loading actor of a training with data.tile_size makes of a micro-batch. No cluster is needed here."""

import numpy as np
import pytest

from jobs.phantoms import write_labelled
from jobs.train_feed import _Loader
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.read import read_dataset
from vlsm.images.preprocess import Square
from vlsm.training.augment import draw_window
from vlsm.training.sampling import ExampleOrder
from vlsm.training.settings import TrainSettings


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_example_is_a_window_of_the_stored_image(tmp_path, split):
    """Validation has the same windows in every epoch."""
    write_labelled(tmp_path / "drawn", {"train": 2, "val": 2, "test": 1}, seed=2)
    tree = {
        "output": "out",
        "model": "pixel",
        "datasets": {"drawn": str(tmp_path / "drawn")},
        "data": {"tile_size": 24},
    }
    settings = TrainSettings.model_validate(tree)
    records = read_dataset("drawn", str(tmp_path / "drawn"), settings.data)
    order, square = ExampleOrder(records, settings), Square(24)
    loader = _Loader(settings.data, square, None)
    loaded = []
    for epoch in (0, 1):
        (batch, *_) = order.train(epoch) if split == "train" else order.evaluate("val", epoch)
        images, masks = loader.load(batch, [records[example] for example in batch.examples])
        loaded.append(dict(zip(batch.examples, masks, strict=True)))
        for example, seed, image in zip(batch.examples, batch.seeds, images, strict=True):
            stored = ExampleReader(settings.data).read(records[example])
            window = draw_window(stored.target.mask, 24, seed)
            assert (image == window.cut(stored.image)).all()  # as large as the model's square: not resized
            assert (loaded[-1][example] == window.cut(stored.target.mask)).all()
    both = loaded[0].keys() & loaded[1].keys()
    same = [np.array_equal(loaded[0][example], loaded[1][example]) for example in both]
    assert both and (all(same) if split == "val" else not all(same))
